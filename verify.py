"""A look at a data set before training: what train.py --verify prints, with a contact sheet.

    usable = verify_dataset("photos", "outputs/dataset_sheet.png")      # a name or a folder
"""

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from command_line import make_output_dir
from data import (DATASETS, check_shape, class_names, existing_folder, get_dataset, keep_apart,
                  keep_unseen, split_held_out)
from folders import (MIN_SIDE, check_class_names, class_folders, common_size, find_files, listing,
                     read_folder)
from images import save_images, to_signed
from models import create_model

FEW_TO_LEARN = 200  # images; with fewer, copies are nearly all that a network draws


def counted(values, most=8):
    """The commonest values and how often each is there."""
    counts = Counter(values).most_common()
    return (", ".join(f"{value} ({count})" for value, count in counts[:most])
            + f" and {len(counts) - most} more" * (len(counts) > most))


def section(title, lines):
    """Print how many lines there are, and the first of them."""
    print(f"{title}: {len(lines)}")
    if lines:
        print(listing(lines))


def digest(pixels):
    """A hash of an array's values: equal for equal images of a set."""
    return hashlib.sha256(np.ascontiguousarray(pixels)).digest()


def find_duplicates(digests):
    """Pairs (index, index of the first one that is equal to it)."""
    first = {}
    return [(k, first[d]) for k, d in enumerate(digests) if first.setdefault(d, k) != k]


def save_sheet(images, path, total=None):
    """A contact sheet of up to 100 images, evenly spread over the set.

    images: uint8 [N, C, H, W], of `total`.
    """
    picks = torch.linspace(0, len(images) - 1, min(100, len(images))).round().long().unique()
    save_images(to_signed(images[picks]), path, columns=10)
    total = total or len(images)
    print(f"wrote {path}" + f", {len(picks)} of the {total} images" * (len(picks) < total))


def verify_folder(folder, sheet, image_size=None, multiple=4, *, channels=None, fit="crop",
                  with_labels=False, few=FEW_TO_LEARN):
    """Read a folder without training and print what is in it; draw a contact sheet.

    Counts and names the unreadable files, the tiny ones (a side under 8 pixels: not used), the
    small ones (enlarged to image_size) and the duplicates (equal once they are cut to size).
    multiple: the network takes images whose sides are multiples of this.
    with_labels: every image has to lie in a sub-folder, its class.
    few: of fewer images it warns that a network will learn them by heart.
    Returns (how many images can be used, their size), or None if it cannot be trained on.
    """
    folder = Path(folder)
    files, others = find_files(folder)
    image_size = image_size or common_size(files)
    every = max(1, len(files) // 100)
    pictures, digests, sheet_pixels = [], [], []
    for k, picture in enumerate(read_folder(folder, files, image_size, fit, channels)):
        if not picture.problem:
            digests.append(digest(picture.pixels))
            if k % every == 0 or not sheet_pixels:
                sheet_pixels.append(picture.pixels)
        pictures.append(picture._replace(pixels=None))      # the set may be larger than memory
    used = [p for p in pictures if not p.problem]
    print(f"Found {len(used)} images in dataset {folder}, cut to {image_size}x{image_size} ({fit})")
    if used:
        print(f"sizes: {counted(f'{p.size[0]}x{p.size[1]}' for p in used)}")
        print(f"modes: {counted(p.mode for p in used)}")
    section("unreadable", [f"{p.name}: {p.problem}" for p in pictures if p.problem and not p.tiny])
    section(f"tiny, not used (a side under {MIN_SIDE} pixels)", [
        f"{p.name}: {p.problem}" for p in pictures if p.tiny])
    section(f"small, enlarged (a side under {image_size} pixels)", [
        f"{p.name}: {p.size[0]}x{p.size[1]}" for p in used if min(p.size) < image_size])
    section("duplicates", [f"{used[i].name} = {used[k].name}"
                            for i, k in find_duplicates(digests)])
    outside = [p.name for p in used if with_labels and len(Path(p.name).parts) < 2]
    bare = []
    if with_labels and not outside:
        counts = Counter(Path(p.name).parts[0] for p in used)
        print("classes: " + ", ".join(f"{name} ({counts[name]})" for name in class_folders(folder)))
        check_class_names(folder, class_folders(folder))
        bare = [name for name in class_folders(folder) if not counts[name]]
        section("classes without a usable image, so that --labels cannot be trained with", bare)
    elif outside:
        section("without a class (no sub-folder), so that --labels cannot be trained with",
                 outside)
    kinds = counted(path.suffix.lower() or path.name for path in others)
    print(f"other files, ignored: {len(others)}" + f", {kinds}" * bool(others))
    if 0 < len(used) < few:
        print(f"note: {len(used)} pictures are few: a network learns them by heart, "
              "and what it draws are copies")
    if used:
        save_sheet(torch.from_numpy(np.stack(sheet_pixels)), sheet, total=len(used))
    usable = used and not outside and not bare and fits(image_size, multiple)
    return (len(used), image_size) if usable else None


def fits(image_size, multiple):
    """Does a network take images of this size? Says so if not."""
    if image_size % multiple:
        print(f"this network needs multiples of {multiple}: train with --image_size "
              f"{(image_size // multiple + 1) * multiple}")
    return image_size % multiple == 0


def verify_dataset(name, sheet, data_dir="data", multiple=4, *, image_size=None, channels=None,
                   fit="crop", with_labels=False):
    """Look at a data set without training: print what is in it, draw a contact sheet as PNG.

    multiple: the network takes images whose sides are multiples of this.
    Returns (how many images it has, their size), or None if it cannot be trained on. Raises what
    get_dataset raises.
    """
    check_shape(image_size, channels)
    if name not in DATASETS:
        return verify_folder(existing_folder(name), sheet, image_size, multiple,
                             channels=channels, fit=fit, with_labels=with_labels)
    images, labels = get_dataset(name, data_dir, image_size=image_size, channels=channels)
    print(f"Found {len(images)} images in dataset {name}, {'x'.join(map(str, images.shape[1:]))}")
    counts = zip(class_names(name), torch.bincount(labels).tolist())
    print("classes: " + ", ".join(f"{label} ({count})" for label, count in counts))
    print(f"duplicates: {len(find_duplicates(map(digest, images.numpy())))}")
    save_sheet(images, sheet)
    return (len(images), images.shape[-1]) if fits(images.shape[-1], multiple) else None


def verify(settings, model_config):
    """Look at --dataset, and at --val_dir if that is a folder, without training.

    Returns whether they can be used. Raises ValueError as a training would.
    """
    name, val_dir = settings["dataset"] or "mnist", settings["val_dir"]
    look_there_too = val_dir and val_dir not in DATASETS
    keep_apart(name, settings["output_dir"])
    if look_there_too:
        keep_unseen(settings["dataset"], val_dir)
        keep_apart(val_dir, settings["output_dir"])
    folder = make_output_dir(settings["output_dir"])
    with torch.device("meta"):
        multiple = create_model(settings["model"], **model_config).multiple
    how = dict(channels=settings["channels"], fit=settings["fit"])
    found = verify_dataset(name, folder / "dataset_sheet.png", settings["data_dir"], multiple,
                           image_size=settings["image_size"],
                           with_labels=bool(settings["labels"]), **how)
    if found and not val_dir:
        split_held_out(found[0], settings["val_fraction"])      # refuses too large or small a share
    if not look_there_too:
        return bool(found)
    # It is cut to the size of the others, and may have other classes, or none.
    size = found[1] if found else settings["image_size"]
    held = verify_folder(val_dir, folder / "val_dir_sheet.png", size, 1, few=0, **how)
    return bool(found and held)
