"""Data sets as arrays: get_dataset(name) -> images uint8 [N, C, H, W], labels int64 [N] or None.

    mnist, fashion_mnist, cifar10           through torchvision, which downloads them once
    synthetic_digits, synthetic_fabrics     drawn by synthetic.py: no download, 10,000 images each
    a path                                  any folder of images, nested or flat (folders.py)

Images stay uint8 until a batch is made. That needs no worker processes: indexing an array is fast.
"""

import hashlib
import math
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import synthetic
from folders import check_memory, class_folders, load_folder
from images import MAX_SIZE, to_signed


class Dataset(NamedTuple):
    source: Callable | str  # a function of synthetic.py, or what torchvision calls the set
    classes: tuple  # class names, in the order of the labels

    @property
    def drawn(self):
        """Is it drawn by code, without a download?"""
        return callable(self.source)


DIGITS = tuple("0123456789")
DATASETS = {
    "mnist": Dataset("MNIST", DIGITS),
    "fashion_mnist": Dataset("FashionMNIST", (
        "t-shirt", "trouser", "pullover", "dress", "coat",
        "sandal", "shirt", "sneaker", "bag", "boot")),
    "cifar10": Dataset("CIFAR10", (
        "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")),
    "synthetic_digits": Dataset(synthetic.digits, DIGITS),
    "synthetic_fabrics": Dataset(synthetic.fabrics, synthetic.FABRIC_FAMILIES),
}
SYNTHETIC_SIZE = 10_000
DATASET_HELP = (f"one of {', '.join(DATASETS)}, or a folder of images; "
                "without it MNIST, or synthetic digits where MNIST cannot be downloaded")


class DatasetUnavailable(ValueError):
    """The data set is not on disk and cannot be downloaded now."""


def get_dataset(name, data_dir="data", *, train=True, image_size=None, channels=None,
                fit="crop", with_labels=False, cache_dir=None):
    """Load a data set by name, or a folder of images by its path.

    data_dir:    where torchvision's files lie or go.
    train:       False for the test set (not for folders).
    image_size:  resize to this height and width; by default a named set keeps its own size, and a
                 folder keeps its images' common square size if that is at most 64, else takes 64.
    channels:    1 for grey, 3 for colour; by default as the data are.
    fit, with_labels, cache_dir: for folders, see folders.load_folder.
    Returns (images uint8 [N, C, H, W], labels int64 [N] or None).
    Raises ValueError for an unknown name or a folder without usable images, DatasetUnavailable if a
    download fails.
    """
    check_shape(image_size, channels)
    if name not in DATASETS:
        return load_folder(existing_folder(name), image_size, channels=channels, fit=fit,
                           with_labels=with_labels, cache_dir=cache_dir)
    if DATASETS[name].drawn:
        images, labels = DATASETS[name].source(SYNTHETIC_SIZE, seed=0 if train else 1)
    else:
        images, labels = _torchvision_arrays(name, data_dir, train)
    size = image_size or images.shape[-1]
    check_memory(name, (len(images), channels or images.shape[1], size, size))
    return _with_channels(_resize(images, image_size), channels), labels


def check_shape(image_size, channels):
    """Raise ValueError for a size or a number of channels that no image can be given."""
    if image_size is not None and not 4 <= image_size <= MAX_SIZE:
        raise ValueError(f"image_size must lie in 4..{MAX_SIZE}, got {image_size}")
    if channels not in (None, 1, 3):
        raise ValueError(f"channels must be 1 or 3, got {channels}")


def existing_folder(name):
    """The path of a data set that is a folder. ValueError where there is none."""
    if not name or not Path(name).is_dir():
        shipped = name and Path(__file__).with_name("pretrained").joinpath(f"{name}.pt").is_file()
        raise ValueError(
            f"unknown dataset {name!r}; choose from {sorted(DATASETS)} or give a folder of images"
            + (" (its weights come with the project, the pictures do not)" if shipped else ""))
    return Path(name)


def get_default_dataset(data_dir="data", **settings):
    """MNIST if it can be had, else synthetic digits, saying so. Returns (name, images, labels)."""
    try:
        return "mnist", *get_dataset("mnist", data_dir, **settings)
    except DatasetUnavailable:
        print("MNIST is not on disk and cannot be downloaded: using synthetic digits instead "
              "(--dataset mnist tells what is missing)")
        return "synthetic_digits", *get_dataset("synthetic_digits", **settings)


def keep_unseen(name, val_dir):
    """Raise ValueError where the held-out images would be among those that are trained on."""
    if name in DATASETS or val_dir in DATASETS or not name or not val_dir:
        return
    one, other = Path(name).resolve(), Path(val_dir).resolve()
    if one == other or one in other.parents or other in one.parents:
        raise ValueError(f"--val_dir {val_dir} and --dataset {name}: one holds the other, so that "
                         "the held-out images would be trained on; --val_fraction sets some aside")


def class_names(name, with_labels=False):
    """The names of the classes, in the order of the labels; None for a folder without labels."""
    if name in DATASETS:
        return list(DATASETS[name].classes)
    return class_folders(existing_folder(name)) if with_labels else None


def full_name(name):
    """What a checkpoint tells of its images: a key of DATASETS, or where the folder lies."""
    return name if name in DATASETS else str(Path(name).resolve())


# The folders that train.py and sample.py write into.
WRITTEN = ("samples", "checkpoints", "generated_samples", "generation_frames")


def keep_apart(name, output_dir):
    """Raise ValueError where results would be written into a folder of images, or a run be replaced
    that it is part of: what is written would be an image of it, or take the place of one.

    name: what --dataset names, or None.
    """
    if name is None or name in DATASETS:
        return
    folder, output = Path(name).resolve(), Path(output_dir).resolve()
    above = [folder, *folder.parents]
    if folder in [output, *output.parents] or any(output / name in above for name in WRITTEN):
        raise ValueError(
            f"--output_dir {output_dir} and the images of {name} are not apart: what is written "
            "there would count as images, or replace some. Give another --output_dir")


def keep_apart_from_own(data, output_dir):
    """keep_apart of the images a model was trained on. data: what the checkpoint says of them."""
    for name in (data["name"], data.get("val_dir")):
        # A bare name, as a card has it, is no path.
        if name is not None and Path(str(name)).is_absolute():
            keep_apart(str(name), output_dir)


# ---- torchvision's sets

def _torchvision_arrays(name, data_dir, train):
    import torchvision                          # it takes seconds, for which drawing need not wait
    source = getattr(torchvision.datasets, DATASETS[name].source)
    try:
        dataset = source(data_dir, train=train, download=False)
    except (RuntimeError, ValueError, AssertionError, EOFError, OSError, KeyError, IndexError,
            TypeError) as error:
        if "not found" not in str(error):
            reason = str(error) or type(error).__name__
            raise ValueError(f"{name}: the files under {data_dir} are damaged ({reason}); "
                             "delete them to download anew") from error
        dataset = _download(name, source, data_dir, train)
    images = torch.as_tensor(np.asarray(dataset.data))
    if len(images) != len(dataset.targets):
        raise ValueError(f"{name}: {len(images)} images but {len(dataset.targets)} labels "
                         f"under {data_dir}")
    labels = torch.as_tensor(np.asarray(dataset.targets), dtype=torch.int64)
    strange = labels[(labels < 0) | (labels >= len(DATASETS[name].classes))]
    if len(strange):
        raise ValueError(f"{name}: the labels under {data_dir} are damaged: "
                         f"one is {int(strange[0])}")
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)    # [N, C, H, W]
    return images.contiguous(), labels


def _download(name, source, data_dir, train):
    folder = Path(data_dir) / getattr(source, "base_folder", Path(source.__name__) / "raw")

    def missing(reason):
        return DatasetUnavailable(
            f"{name} is not (or not whole) in {folder} and cannot be downloaded ({reason}); "
            "put its files there, name the folder that holds them with --data_dir, "
            "or use --dataset synthetic_digits")

    urls = [source.url] if hasattr(source, "url") else source.mirrors
    if not _any_reachable(urls):
        raise missing("no connection")
    try:
        return source(data_dir, train=train, download=True)
    except (RuntimeError, urllib.error.URLError, ConnectionError, TimeoutError) as error:
        raise missing(" ".join(str(error).split()) or type(error).__name__) from error


def _any_reachable(urls, seconds=8):
    """Does any of these servers answer within a few seconds? A download itself has no time limit,
    and without a network the name lookup alone can hang for a minute, hence the threads."""
    answered = threading.Event()

    def knock(url):
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"),
                                   timeout=seconds).close()
        except urllib.error.HTTPError:
            pass                              # an error page is an answer, too
        except (OSError, ValueError):
            return
        answered.set()

    threads = [threading.Thread(target=knock, args=(url,), daemon=True) for url in urls]
    for thread in threads:
        thread.start()
    for _ in range(seconds * 10):
        if answered.wait(0.1) or not any(thread.is_alive() for thread in threads):
            break
    return answered.is_set()


def split_held_out(num_images, share, seed=0):
    """Set a random share of the images aside, to measure the loss on images not trained on.

    Returns (indices to train on, indices held out), both in order.
    """
    count = round(share * num_images)
    if share and not 0 < count < num_images:
        raise ValueError(f"holding out {share} of {num_images} images leaves nothing on one side; "
                         "--val_fraction 0 holds out none")
    order = torch.from_numpy(np.random.default_rng([seed, 2**32 - 1]).permutation(num_images))
    return order[count:].sort().values, order[:count].sort().values


# ---- Batches

def _resize(images, size):
    if size is None or images.shape[-2:] == (size, size):
        return images
    return torch.cat([
        F.interpolate(part.float(), (size, size), mode="bilinear",
                      antialias=True).round().to(torch.uint8)
        for part in images.split(1024)])


def _with_channels(images, channels):
    if channels is None or images.shape[1] == channels:
        return images
    if channels == 3:
        return images.expand(-1, 3, -1, -1)
    luma = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)  # ITU-R BT.601, as PIL's mode "L"
    return torch.cat([(part * luma).sum(1, keepdim=True).round().to(torch.uint8)
                      for part in images.split(1024)])


# Each with probability 1/2: together they put an image into any of the eight positions of a square.
MOVES = (lambda x: x.flip(-1), lambda x: x.flip(-2), lambda x: x.transpose(-1, -2))
FINGERPRINTED = 2_000_000_000  # bytes: a second or two


class Batches:
    """Batches (images float [B, C, H, W] in [-1, 1], labels [B]) without end, or an epoch of them.

    Iterating over it is one epoch, number `epoch`, and the next time the next one; stream(k)
    starts at step k of the run and goes on from epoch to epoch. Order and positions depend only
    on (seed, step). The last partial batch of an epoch is dropped (60,000 images in batches of
    128 are 468 steps); a set smaller than one batch is one batch. Without labels, every label
    is -1 ("no class").

    images: uint8 [N, C, H, W], on the device that makes the batches.
    flip: mirror each with probability 1/2.  turn: put each into one of its eight positions,
    mirrored or not and turned by quarters.
    indices: use only these images, without copying them.
    """

    def __init__(self, images, labels=None, batch_size=128, seed=0, flip=False, indices=None,
                 turn=False):
        self.indices = torch.arange(len(images)) if indices is None else indices
        self.num_images = len(self.indices)
        if batch_size < 1 or not self.num_images:
            raise ValueError(f"batches of {batch_size} from {self.num_images} images: "
                             "both must be at least 1")
        if images.dtype != torch.uint8:
            raise ValueError(f"images must be uint8, 0 to 255, not {images.dtype}: "
                             "Batches makes [-1, 1] of them")
        if labels is not None and (not torch.is_tensor(labels) or labels.shape != (len(images),)):
            raise ValueError(f"labels must be a tensor of {len(images)} class indices, "
                             "one for each image")
        self.images = images
        self.labels = (
            torch.full((len(images),), -1) if labels is None else labels).to(images.device)
        self.batch_size = min(batch_size, self.num_images)
        self.seed = seed
        self.moves = MOVES if turn else MOVES[:int(flip)]
        self.epoch = 0

    def __len__(self):
        return self.num_images // self.batch_size

    def take(self, index, moved=()):
        """The images at `index` as floats, and their labels.

        moved: for each of self.moves, which of the images it is done to.
        """
        x_0 = to_signed(self.images[index])
        for move, chosen in zip(self.moves, moved):
            x_0 = torch.where(chosen.view(-1, 1, 1, 1), move(x_0), x_0)
        return x_0, self.labels[index]

    def fingerprint(self):
        """A phrase that tells these images and labels from others.

        Of more than 2 GB, only a sample of that size is looked at.
        """
        size = self.num_images * self.images[0].numel()
        picks = self.indices[::max(1, math.ceil(size / FINGERPRINTED))].to(self.images.device)
        sha = hashlib.sha256()
        for part in picks.split(4096):
            sha.update(self.images[part].cpu().contiguous().numpy())
        sha.update(self.labels[picks].cpu().numpy())
        shape = "x".join(map(str, self.images.shape[1:]))
        return f"{self.num_images} of {shape}, digest {sha.hexdigest()[:8]}"

    def __iter__(self):
        self.epoch += 1
        return self.from_step(self.epoch - 1, 0)

    def from_step(self, epoch, first):
        """The batches of one epoch from the first-th on."""
        random = np.random.default_rng([self.seed, epoch])
        # To the images' device once an epoch: a copy makes a GPU wait.
        order = self.indices[torch.from_numpy(random.permutation(self.num_images))].to(
            self.images.device)
        moved = [torch.from_numpy(random.random(len(order)) < 0.5).to(order.device)
                 for _ in self.moves]
        for start in range(first * self.batch_size, len(self) * self.batch_size, self.batch_size):
            here = slice(start, start + self.batch_size)
            yield self.take(order[here], [chosen[here] for chosen in moved])

    def stream(self, first_step=0):
        """Batches from step `first_step` of the run on, epoch after epoch, without end."""
        epoch, first = divmod(first_step, len(self))
        while True:
            yield from self.from_step(epoch, first)
            epoch, first = epoch + 1, 0
