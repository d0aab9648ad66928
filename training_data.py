"""What a training learns from: images, their classes, and what is held out of them.

    data = load_training_data("mnist", val_fraction=0.1)
    for x_0, y in data.batches:                     # an epoch
        ...
"""

import textwrap
from typing import NamedTuple

import torch

import distributed
from data import (DATASETS, Batches, class_names, full_name, get_dataset, get_default_dataset,
                  split_held_out)
from folders import check_class_names


class TrainingData(NamedTuple):
    """What a training learns from."""
    name: str  # a key of DATASETS, or a folder
    val_dir: str | None  # where the held-out images lie, if not among those of `name`
    classes: list | None  # their names
    batches: Batches
    held_out: Batches | None

    @property
    def channels(self):
        return self.batches.images.shape[1]

    @property
    def image_size(self):
        return self.batches.images.shape[-1]

    def facts(self, settings):
        """Entries of a checkpoint: "data", and "settings" with what the data decided (size,
        channels, classes, fingerprints)."""
        held_out, shape = self.held_out, dict(image_size=self.image_size, channels=self.channels)
        data = {"name": full_name(self.name), "classes": self.classes, **shape,
                "val_dir": self.val_dir and full_name(self.val_dir),
                "val_fraction": 0.0 if self.val_dir else settings["val_fraction"],
                **{name: settings[name] for name in ("fit", "flip", "turn", "seed")}}
        return {"data": data, "settings": dict(
            settings, **shape, labels=bool(self.classes), images=self.batches.fingerprint(),
            held_out=held_out and held_out.fingerprint())}

    def __str__(self):
        shape = "x".join(map(str, self.batches.images.shape[1:]))
        return (f"{self.name}, {self.batches.num_images} images of {shape}"
                + (f", {self.held_out.num_images} held out" if self.held_out else "")
                + (f", {len(self.classes)} classes "
                   f"({textwrap.shorten(', '.join(self.classes), 100)})" if self.classes else ""))


def check_classes(name, classes, y):
    """Raise ValueError for class names that no flag could ask for, and for a folder's classes of
    which there is no image. y: [N] class indices."""
    check_class_names(name, classes)
    bare = [label for k, label in enumerate(classes) if not (y == k).any()]
    if bare and name not in DATASETS:
        raise ValueError(f"{name}: no usable image of {', '.join(bare)}: "
                         "every sub-folder is a class")


def load_held_out(val_dir, classes, like, data_dir, **settings):
    """The images of --val_dir as Batches, 64 at a time; without classes if it has not these.

    classes: of the training, or None.  like: its images, whose shape these are given.
    """
    try:
        same = bool(classes) and class_names(val_dir, True) == classes
        settings.update(channels=like.shape[1], image_size=like.shape[-1], with_labels=same)
        images, labels = get_dataset(val_dir, data_dir, train=False, **settings)
    except ValueError as error:
        raise ValueError(f"--val_dir: {error}") from error
    if classes and not same:
        print(f"note: {val_dir} has not the same classes, "
              "so the held-out loss is that without a class")
    return Batches(images, labels if same else None, batch_size=64)


def load_training_data(name, batch_size=128, seed=0, flip=False, turn=False, labels=None,
                       data_dir="data", val_dir=None, val_fraction=0.0, device="cpu", **settings):
    """TrainingData of a named set or a folder, or where none is named of MNIST or synthetic digits.

    labels: train with classes or not; None: as the data set has them (a folder has none unasked).
    device: where the images go, if it is a GPU on which there is much room for them.
    settings: image_size, channels, fit, cache_dir: see data.get_dataset.
    The others are as in train().  Raises ValueError for images or classes that will not do.
    """
    settings["with_labels"] = bool(labels)
    held_out = None
    with distributed.first_rank_first():
        if name is None:
            name, images, y = get_default_dataset(data_dir, **settings)
        else:
            images, y = get_dataset(name, data_dir, **settings)
        classes = None if labels is False else class_names(name, bool(labels))
        if val_dir:
            held_out = load_held_out(val_dir, classes, images, data_dir, **settings)
    if classes:
        check_classes(name, classes, y)
    else:
        y = None
    device = torch.device(device)
    if (device.type == "cuda"
            and images.nbytes < torch.cuda.get_device_properties(device).total_memory / 8):
        images = images.to(device)      # then no step waits for a copy
    kept, held = split_held_out(len(images), 0.0 if val_dir else val_fraction, seed)
    if len(held):
        held_out = Batches(images, y, batch_size=64, indices=held)
    batches = Batches(images, y, batch_size, seed, flip, kept, turn)
    return TrainingData(name, val_dir, classes, batches, held_out)
