"""The real images that samples are held against: a model's training images, and others like them.

    real = load_reference(data)         # data: what the checkpoint says
    real.images, real.held, real.what   # "test images"
"""

from pathlib import Path
from typing import NamedTuple

import torch

from data import (DATASETS, MOVES, Batches, class_names, get_dataset, get_default_dataset,
                  split_held_out)
from interop import UNKNOWN
from utils import shuffled


class Reference(NamedTuple):
    """Images that a model was trained on, and `held` ones like them: uint8 [N, C, H, W], in the
    model's size."""
    images: torch.Tensor
    labels: torch.Tensor | None  # [N], or None without classes
    held: torch.Tensor
    held_labels: torch.Tensor | None  # also None where those have other classes
    what: str  # what the held-out ones are, in words


FEWEST = 5  # images, or precision and recall have no neighbours to look at


def same_classes(data, name=None):
    """Does the model know the very classes of this data set, or of its own?

    data: what the checkpoint says.
    """
    return bool(data["classes"]) and data["classes"] == class_names(name or data["name"], True)


def chosen_name(data, name=None):
    """`name`, or the data set that the model was trained on. ValueError if nobody knows it."""
    if not name and data["name"] == UNKNOWN:
        raise ValueError("the checkpoint does not tell what it was trained on: "
                         "name it with --dataset")
    return name or data["name"]


def note_other_images(data, name):
    """Say so where a model is shown another data set than its own."""
    # Of a folder, a card has the last part alone; other libraries' files tell nothing.
    if name and data["name"] != UNKNOWN and Path(name).name != Path(data["name"]).name:
        print(f"note: the model was trained on {data['name']!r}, not on {name!r}: "
              "of pictures unlike its own it knows nothing")


def fit_of(data):
    """How the training cut a folder's pictures."""
    return "stretch" if data.get("fit") == "stretch" else "crop"


def positions_of(data):
    """In how many positions the training showed each image: 1, 2 (--flip) or 8 (--turn)."""
    return 8 if data.get("turn") is True else 2 if data.get("flip") is True else 1


def as_shown(images, data):
    """The images in positions drawn by chance as the training drew them: samples come in these,
    too, and would else be told from real images by their positions alone."""
    random = torch.Generator().manual_seed(0)
    for move in MOVES[:{1: 0, 2: 1, 8: 3}[positions_of(data)]]:
        chosen = torch.rand(len(images), 1, 1, 1, generator=random) < 0.5
        images = torch.where(chosen, move(images), images)
    return images


def load_reference(data, data_dir, name=None):
    """The Reference of a model.  data: what the checkpoint says.  name: another data set instead.

    A named set has its test set. To a folder belongs the --val_dir of the training, or it is
    divided as then (--val_fraction); where nothing was held out, a tenth (5 at least) is set aside.
    It has labels if its classes are those of the model. The held-out images stand in random order,
    so that the first of them are like all: the first half of MNIST's test set is by other writers
    than the second (LeCun et al. 1998, section III.A), and a folder begins with its first class.
    """
    like = dict(image_size=data["image_size"], channels=data.get("channels"))
    chosen = chosen_name(data, name)
    if chosen not in DATASETS:
        return folder_reference(data, data_dir, like, name)
    images, labels = get_dataset(chosen, data_dir, **like)
    held, held_labels = get_dataset(chosen, data_dir, train=False, **like)
    order = shuffled(len(held))
    return Reference(images, labels, held[order], held_labels[order], "test images")


def folder_reference(data, data_dir, like, name=None):
    """load_reference of a folder. Its words follow from the fingerprints that the training left."""
    like["fit"] = fit_of(data)
    images, y = get_dataset(name or data["name"], with_labels=same_classes(data, name), **like)
    if len(images) < 2:
        raise ValueError(f"{name or data['name']}: one image is too few to hold others against it")
    share, seed = data.get("val_fraction") or 0, data.get("seed", 0)
    if type(share) not in (int, float) or not 0 <= share < 1 or type(seed) is not int or seed < 0:
        raise ValueError("what the checkpoint tells of its data is damaged: "
                         f"val_fraction {share!r:.40}, seed {seed!r:.40}")
    val_dir = str(data.get("val_dir") or "")
    there = val_dir and (val_dir in DATASETS or Path(val_dir).is_dir())
    if there and data.get("images") == Batches(images, y).fingerprint():
        return Reference(images, y, *others(data, data_dir, like, y is not None))
    kept, aside = split_held_out(
        len(images), share or min(0.5, max(0.1, FEWEST / len(images))), seed)
    trained_on, held_out = data.get("images"), data.get("held_out")
    if share and held_out == Batches(images, y, indices=aside).fingerprint():
        what = "held-out images"
        start = data.get("started_from")
        if start and start.get("images") != trained_on:
            what += " (the weights that it started from may know them)"
    elif not share and trained_on == Batches(images, y).fingerprint():
        what = "images that it was trained on: " + ("nothing was held out" if not held_out else
                                                    "what was held out lies elsewhere (--dataset)")
    elif name:
        what = f"images of {name} that are set aside here"
    elif trained_on or held_out:
        what = "images of a folder that has changed since: it was trained on some of them"
    else:                               # an older checkpoint has no fingerprints
        what = "held-out images" if share else "images that it was trained on: nothing was held out"
    aside = aside[shuffled(len(aside))]
    labels = (None, None) if y is None else (y[kept], y[aside])
    return Reference(images[kept], labels[0], images[aside], labels[1], what)


def others(data, data_dir, like, with_classes):
    """(images, labels or None, a phrase) of a run's --val_dir. with_classes: has the run any?"""
    name = str(data["val_dir"])
    try:
        same = with_classes and same_classes(data, name)
        held, held_y = get_dataset(name, data_dir, train=False, with_labels=same, **like)
    except ValueError as error:
        raise ValueError(
            f"the held-out images of the training, --val_dir {name}: {error}") from error
    held_y, order = held_y if same else None, shuffled(len(held))
    known = data.get("held_out") == Batches(held, held_y).fingerprint()
    return (held[order], None if held_y is None else held_y[order],
            f"images of {name}" + ("" if known else ", which has changed since"))


def classes_like(real, count):
    """The classes of `count` samples: those of the held-out images, sample i that of image i, and
    over again where there are not so many; where they have none, those of training images.

    So samples and floor have each class as often, and differ in nothing but who drew them. Chance
    alone would put 10,000 real garments at 1.5 floors (EXPERIMENTS.md, "Which classes").
    """
    labels = real.held_labels
    if labels is None:
        labels = real.labels[shuffled(len(real.labels))]
    return labels[torch.arange(count) % len(labels)]


# ---- For figures, which can do with drawn digits

def name_to_show(data, data_dir, name):
    """chosen_name; synthetic digits for an MNIST that nobody named and that cannot be had."""
    if name or data["name"] != "mnist":
        return chosen_name(data, name)
    return get_default_dataset(data_dir)[0]


def training_images(data, data_dir, name=None):
    """(name, images, labels or None) of what a model was trained on, or of data set `name`, cut as
    the model takes them."""
    name = name_to_show(data, data_dir, name)
    return name, *get_dataset(name, data_dir, image_size=data["image_size"],
                              channels=data["channels"], fit=fit_of(data),
                              with_labels=same_classes(data, name))


def unseen_images(data, data_dir, name=None):
    """(name, images, labels or None, what they are): images that a model was not trained on, where
    there are any, in random order. The labels are those of its own classes, or of a named set."""
    name = name_to_show(data, data_dir, name)
    real = load_reference(data, data_dir, None if name == data["name"] else name)
    note_other_images(data, name)
    return name, real.held, real.held_labels, real.what
