"""Data sets as plain arrays: get_dataset(name) -> images uint8 [N, C, H, W] and labels int64 [N] or None.

    mnist, fashion_mnist, cifar10           through torchvision, which downloads them once
    synthetic_digits, synthetic_fabrics     drawn by synthetic.py: no download, 10,000 images each
    a path                                  any folder of images, nested or flat, grey or colour

Images stay uint8 until a batch is made. Batches need no worker processes: indexing an array is fast.
"""

import threading
import urllib.error
import urllib.request
import warnings
from collections import Counter
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image

import synthetic


class Row(NamedTuple):
    source: Callable  # a torchvision data set, or a function of synthetic.py
    classes: tuple  # class names, in the order of the labels


DIGITS = tuple("0123456789")
DATASETS = {
    "mnist": Row(torchvision.datasets.MNIST, DIGITS),
    "fashion_mnist": Row(torchvision.datasets.FashionMNIST, (
        "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")),
    "cifar10": Row(torchvision.datasets.CIFAR10, (
        "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")),
    "synthetic_digits": Row(synthetic.digits, DIGITS),
    "synthetic_fabrics": Row(synthetic.fabrics, synthetic.FABRIC_FAMILIES),
}
SYNTHETIC_SIZE = 10_000
DATASET_HELP = (f"one of {', '.join(DATASETS)}, or a folder of images; without it MNIST, or synthetic digits "
                "where MNIST cannot be downloaded")


class DatasetUnavailable(ValueError):
    """The data set is not on disk and cannot be downloaded now."""


def get_dataset(name, data_dir="data", *, train=True, image_size=None):
    """Load a data set by name, or a folder of images by its path.

    data_dir:    where torchvision's files lie or go.  train: False for the test set (not for folders).
    image_size:  resize to this height and width; by default a named set keeps its own size, and a
                 folder keeps its images' common square size if that is at most 64, else takes 64.
    Returns (images uint8 [N, C, H, W], labels int64 [N] or None).
    Raises ValueError for an unknown name or a folder without usable images, DatasetUnavailable if a
    download fails.
    """
    if image_size is not None and not 4 <= image_size <= 4096:
        raise ValueError(f"image_size must lie in 4..4096, got {image_size}")
    if name in DATASETS:
        source = DATASETS[name].source
        if name.startswith("synthetic"):
            images, labels = source(SYNTHETIC_SIZE, seed=0 if train else 1)
        else:
            images, labels = _torchvision_arrays(name, source, data_dir, train)
        return _resize(images, image_size), labels
    if name and Path(name).is_dir():
        return _load_folder(Path(name), image_size), None
    raise ValueError(f"unknown dataset {name!r}; choose from {sorted(DATASETS)} or give a folder of images")


def get_default_dataset(data_dir="data", image_size=None):
    """MNIST where it can be had, else the synthetic digits, saying so. Returns (name, images, labels)."""
    try:
        return "mnist", *get_dataset("mnist", data_dir, image_size=image_size)
    except DatasetUnavailable:
        print("MNIST is not on disk and cannot be downloaded: using synthetic digits instead "
              "(--dataset mnist tells what is missing)")
        return "synthetic_digits", *get_dataset("synthetic_digits", image_size=image_size)


def class_names(name):
    """The names of the classes of a data set, or None for a folder."""
    return list(DATASETS[name].classes) if name in DATASETS else None


# ---- torchvision's sets

def _torchvision_arrays(name, source, data_dir, train):
    try:
        dataset = source(data_dir, train=train, download=False)
    except (RuntimeError, ValueError, AssertionError, EOFError, OSError, KeyError, IndexError) as error:
        if "not found" not in str(error):
            raise ValueError(f"{name}: the files under {data_dir} are damaged ({error}); "
                             "delete them to download anew") from error
        dataset = _download(name, source, data_dir, train)
    images = torch.as_tensor(np.asarray(dataset.data))
    if len(images) != len(dataset.targets):
        raise ValueError(f"{name}: {len(images)} images but {len(dataset.targets)} labels under {data_dir}")
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)    # [N, C, H, W]
    return images.contiguous(), torch.as_tensor(np.asarray(dataset.targets), dtype=torch.int64)


def _download(name, source, data_dir, train):
    folder = Path(data_dir) / getattr(source, "base_folder", Path(source.__name__) / "raw")
    missing = (f"{name} is not in {folder} and cannot be downloaded ({{}}); put its files there, name "
               "the folder that holds them with --data_dir, or use --dataset synthetic_digits")
    urls = [source.url] if hasattr(source, "url") else source.mirrors
    if not _any_reachable(urls):
        raise DatasetUnavailable(missing.format("no connection"))
    try:
        return source(data_dir, train=train, download=True)
    except (RuntimeError, urllib.error.URLError, ConnectionError, TimeoutError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DatasetUnavailable(missing.format(reason)) from error


def _any_reachable(urls, seconds=8):
    """Does any of these servers answer within a few seconds? A download itself has no time limit, and
    without a network the name lookup alone can hang for a minute, hence the threads."""
    answered = threading.Event()

    def knock(url):
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds).close()
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


# ---- Folders of images

IMAGE_SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP"}
MAX_PIXELS = 50_000_000
MIN_SIDE = 8


def _open(path):
    """The header of an image file, if it is of a format that we name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")       # of huge sizes, which _read_image refuses by itself
        return Image.open(path, formats=sorted(set(IMAGE_SUFFIXES.values())))


def _read_image(path, image_size):
    """One image file -> PIL image in mode RGB, its central square resized to image_size.

    Only the named formats are decoded, and the size in the header is checked first: a few bytes can
    claim a picture of many gigabytes. Raises ValueError, OSError or SyntaxError for a bad file.
    """
    with _open(path) as picture:
        width, height = picture.size
        if width * height > MAX_PIXELS:
            raise ValueError(f"{width}x{height} pixels are too many")
        if min(width, height) < MIN_SIDE:
            raise ValueError(f"{width}x{height} pixels are too few")
        if picture.format == "JPEG":
            picture.draft(None, (2 * image_size, 2 * image_size))     # decode no finer than needed
        if picture.mode.startswith("I"):
            # 16-bit grey: PIL's own conversion would cut at 255 instead of scaling.
            picture = Image.fromarray((np.asarray(picture) / 257).clip(0, 255).astype(np.uint8))
        elif "A" in picture.getbands() or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        picture = picture.convert("RGB")
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.resize((image_size, image_size), Image.LANCZOS, box=(left, top, left + side, top + side))


def _load_folder(folder, image_size):
    """Every image below a folder, in the order of their names; files that cannot be used are named."""
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    if not files:
        raise ValueError(f"{folder}: no images found (looked for {', '.join(sorted(IMAGE_SUFFIXES))})")
    image_size = image_size or _common_size(files)
    pictures, skipped = [], []
    for path in files:
        try:
            pictures.append(np.asarray(_read_image(path, image_size)))
        except (ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
            reason = " ".join(str(error).replace(repr(str(path)), "").split()) or type(error).__name__
            skipped.append(f"  {path.relative_to(folder)}: {reason}")
    if skipped:
        print(f"{len(skipped)} of {len(files)} files in {folder} cannot be used and are skipped:")
        print("\n".join(skipped[:20] + [f"  and {len(skipped) - 20} more"] * (len(skipped) > 20)))
    if not pictures:
        raise ValueError(f"{folder}: none of its {len(files)} images can be used")
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)      # [N, 3, H, W]
    grey = bool((images == images[:, :1]).all())            # also where a grey picture is stored as RGB
    images = images[:, :1] if grey else images
    kind = "grey" if grey else "colour"
    print(f"{len(images)} images of {image_size}x{image_size} ({kind}) from {folder}")
    return images.contiguous()


def _common_size(files, limit=64):
    """The square size that nearly all files share, if it is at most `limit`; otherwise `limit`."""
    sizes = Counter()
    for path in files:
        try:
            with _open(path) as picture:
                sizes[picture.size] += 1
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            continue                          # _load_folder names it
    (width, height), count = sizes.most_common(1)[0] if sizes else ((0, 1), 0)
    return width if width == height <= limit and count > 0.9 * sizes.total() else limit


# ---- Batches

def _resize(images, size):
    if size is None or images.shape[-2:] == (size, size):
        return images
    return torch.cat([
        F.interpolate(part.float(), (size, size), mode="bilinear", antialias=True).round().to(torch.uint8)
        for part in images.split(1024)])


def to_signed(images):
    """uint8 0..255 -> float32 [-1, 1]: centred on zero, like the noise that is to be mixed in."""
    return images.float() / 127.5 - 1


class Batches:
    """An epoch of batches: iterates over (images float [B, C, H, W] in [-1, 1], labels [B]).

    The order depends only on (seed, epoch); set `epoch` before each pass. The last partial batch is
    dropped (60,000 images in batches of 128 are 468 steps); a set smaller than one batch is one batch.
    Without labels, every label is -1 ("no class").
    """

    def __init__(self, images, labels=None, batch_size=128, seed=0):
        if batch_size < 1 or not len(images):
            raise ValueError(f"batches of {batch_size} from {len(images)} images: both must be at least 1")
        self.images = images
        self.labels = torch.full((len(images),), -1) if labels is None else labels
        self.batch_size = min(batch_size, len(images))
        self.seed = seed
        self.epoch = 0

    def __len__(self):
        return len(self.images) // self.batch_size

    def __iter__(self):
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.images))
        for index in torch.from_numpy(order).split(self.batch_size)[:len(self)]:
            yield to_signed(self.images[index]), self.labels[index]
