"""A folder of images as one array: what cannot be used is reported, the rest cut to one size.

    images, labels = load_folder("photos", image_size=64)           # uint8 [N, C, 64, 64], None

Nested or flat; png, jpg, webp and bmp; grey, colour, palette, with or without transparency.
"""

import hashlib
import json
import os
import struct
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import distributed
from files import write_file
from images import to_signed

UNREAD = "cannot be read at this time"  # the file may be good
IMAGE_SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP"}
FITS = ("crop", "stretch")
MAX_PIXELS = 50_000_000
MIN_SIDE = 8
DEFAULT_SIZE = 64


DECODER = 1  # to be raised when the same file gives other pixels: old caches are then left alone
EXIF_ORIENTATION = 0x0112
UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
           4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
           6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
           8: Image.Transpose.ROTATE_90}


class Picture(NamedTuple):
    """What became of one file."""
    name: str  # its path below the folder
    problem: str  # why it cannot be used, or ""
    tiny: bool = False  # the problem is that it has too few pixels
    size: tuple = ()  # (width, height) in the file
    mode: str = ""  # PIL's name of its kind of pixels
    pixels: np.ndarray | None = None  # uint8 [C, S, S]


# ---- One file

def _open(path):
    """The header of an image file, if it is of a format that we name."""
    return Image.open(path, formats=sorted(set(IMAGE_SUFFIXES.values())))


def _upright(picture):
    """Phones store the pixels as the sensor saw them, and note in EXIF data which side was up."""
    try:
        turn = UPRIGHT.get(picture.getexif().get(EXIF_ORIENTATION))
    except (ValueError, OSError, SyntaxError, KeyError, TypeError, struct.error):
        turn = None                           # the notes are damaged, the pixels need not be
    return picture if turn is None else picture.transpose(turn)


def _cut(picture, image_size, fit, channels):
    """A PIL picture -> uint8 [C, S, S]: upright, transparency on white, resized, antialiased."""
    if picture.format == "JPEG":
        picture.draft(None, (2 * image_size, 2 * image_size))     # decode no finer than needed
    picture = _upright(picture)
    if picture.mode.startswith("I"):
        # 16-bit grey: PIL's own conversion would cut at 255 instead of scaling.
        picture = Image.fromarray((np.asarray(picture) / 257).clip(0, 255).astype(np.uint8))
    elif "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    picture = picture.convert("L" if channels == 1 else "RGB")
    width, height = picture.size
    box = (0, 0, width, height)
    if fit == "crop":
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        box = (left, top, left + side, top + side)
    pixels = np.asarray(picture.resize((image_size, image_size), Image.LANCZOS, box=box))
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def read_picture(path, name, image_size, fit="crop", channels=None):
    """Decode one file. Returns a Picture; an unusable file is one with a problem, not an error.

    Only the named formats are decoded, and the size in the header is checked first: a few bytes can
    claim a picture of many gigabytes.
    """
    if path.is_symlink():
        return Picture(name, "a link")
    try:
        if not path.stat().st_size:
            return Picture(name, "empty")
        with _open(path) as picture:
            size, mode = picture.size, picture.mode
            if size[0] * size[1] > MAX_PIXELS:
                return Picture(name, f"{size[0]}x{size[1]} pixels are too many")
            if min(size) < MIN_SIDE:
                return Picture(name, f"{size[0]}x{size[1]} pixels are too few", tiny=True)
            return Picture(name, "", False, size, mode, _cut(picture, image_size, fit, channels))
    except MemoryError:
        raise
    except Exception as error:                # a damaged file makes PIL raise nearly anything
        if isinstance(error, OSError) and error.errno:
            return Picture(name, f"{UNREAD}: {error.strerror}")
        reason = " ".join(str(error).replace(repr(str(path)), "").split())
        return Picture(name, reason or type(error).__name__)


# ---- A folder

def _refuse(error):
    raise error


def find_files(folder):
    """(image files below a folder, in the order of names; the files that are none by their name).
    Hidden files and folders are left out, and links to folders, which are named. OSError for a
    folder that cannot be read."""
    files, linked = [], []
    for above, below, names in os.walk(folder, onerror=_refuse):    # rglob skips what is forbidden
        below[:] = [name for name in below if not name.startswith(".")]
        linked += [path for path in (Path(above, name) for name in below) if path.is_symlink()]
        files += [path for path in (Path(above, name) for name in names if not name.startswith("."))
                  if path.is_file() or path.is_symlink()]
    if linked:
        print("links to other folders are not followed:\n"
              + listing([path.relative_to(folder) for path in sorted(linked)]))
    parts = [], []
    for path in sorted(files):
        parts[path.suffix.lower() not in IMAGE_SUFFIXES].append(path)
    return parts


def load_pictures(paths, image_size, channels):
    """Real pictures, cut to size: [N, C, S, S] in [-1, 1]. Raises ValueError for a bad file."""
    for path in paths:
        if not Path(path).exists():
            raise ValueError(f"{path}: no such file")
    found = [read_picture(Path(path), str(path), image_size, channels=channels) for path in paths]
    for picture in found:
        if picture.problem:
            raise ValueError(f"{picture.name}: {picture.problem}")
    return to_signed(torch.stack([torch.from_numpy(picture.pixels.copy()) for picture in found]))


def read_folder(folder, files, image_size, fit="crop", channels=None):
    """Yield a Picture for each file, in order, with a progress bar where it takes long."""
    def read(path):
        return read_picture(path, str(path.relative_to(folder)), image_size, fit, channels)

    with (ThreadPoolExecutor(os.cpu_count()) as pool,                  # PIL frees Python's lock
          tqdm(total=len(files), desc=f"reading {folder}", unit="file", delay=2,
               disable=not distributed.speaks()) as bar):
        for first in range(0, len(files), 256):                        # in parts: they are large
            for picture in pool.map(read, files[first:first + 256]):
                yield picture
                bar.update()


def common_size(files):
    """The square size that nearly all files share, if it is at most 64; otherwise 64."""
    sizes = Counter()
    for path in files:
        try:
            with _open(path) as picture:
                sizes[picture.size] += 1
        except MemoryError:
            raise
        except Exception:
            continue                          # read_picture names it
    (width, height), count = sizes.most_common(1)[0] if sizes else ((0, 1), 0)
    return (width if width == height <= DEFAULT_SIZE and count > 0.9 * sizes.total()
            else DEFAULT_SIZE)


def class_folders(folder):
    """The names of the sub-folders, sorted: the classes of a folder that is sorted into classes."""
    return sorted(p.name for p in Path(folder).iterdir()
                  if p.is_dir() and not p.is_symlink() and not p.name.startswith("."))


def sorted_into_classes(folder, most=20):
    """Does every image of a folder lie in one of a few sub-folders, as if each were a class?"""
    folder = Path(folder)
    if not folder.is_dir() or any(path.suffix.lower() in IMAGE_SUFFIXES
                                  for path in folder.iterdir()):
        return False
    return 2 <= len(class_folders(folder)) <= most


def check_class_names(folder, names):
    """Raise ValueError for class names that no flag could ask for."""
    if {"none", "all"} & set(names):
        raise ValueError(f"{folder}: a class cannot be called none or all, "
                         "as --label means something else by them: rename the sub-folder")


def load_folder(folder, image_size=None, *, channels=None, fit="crop", with_labels=False,
                cache_dir=None):
    """Every usable image below a folder, in the order of their names. Says which files it skipped.

    image_size:  height and width; by default the images' common square size up to 64, else 64.
    channels:    1 or 3; by default 1 if all pictures are grey, also where stored as colour.
    fit:         "crop" takes the central square, "stretch" the whole picture.
    with_labels: the name of the sub-folder is the class.
    cache_dir:   keep the decoded images there in a file and map it into memory, for a set larger
                 than the memory or slow to read; made once.
    Returns (images uint8 [N, C, H, W], labels int64 [N] or None).
    Raises ValueError if nothing is usable.
    """
    folder = Path(folder)
    if cache_dir and Path(cache_dir).resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"--cache_dir {cache_dir} lies within {folder}, "
                         "where it would count as a class: give another")
    files, _ = find_files(folder)
    if not files:
        raise ValueError(f"{folder}: no images found "
                         f"(looked for {', '.join(sorted(IMAGE_SUFFIXES))})")
    image_size = image_size or common_size(files)
    if cache_dir is None:
        images, names, problems = _decode(folder, files, image_size, fit, channels)
        images = images.contiguous()
    else:
        images, names, problems = _cached(Path(cache_dir), folder, files, image_size, fit, channels)
    if problems:
        print(f"{len(problems)} of {len(files)} files in {folder} cannot be used and are skipped:")
        print(listing(problems))
    if not len(images):
        raise ValueError(f"{folder}: none of its {len(files)} images can be used")
    kind = "grey" if images.shape[1] == 1 else "colour"
    print(f"{len(images)} images of {image_size}x{image_size} ({kind}) from {folder}")
    labels = None
    if with_labels:
        classes = class_folders(folder)
        outside = next((name for name in names if len(Path(name).parts) < 2), None)
        if outside:
            raise ValueError(f"{folder}: with labels every image lies in a sub-folder "
                             f"named like its class; {outside} does not")
        labels = torch.tensor([classes.index(Path(name).parts[0]) for name in names])
    return images, labels


def listing(lines, limit=20):
    """The first lines, indented, and how many more there are."""
    return "\n".join([f"  {line}" for line in lines[:limit]]
                     + [f"  and {len(lines) - limit} more"] * (len(lines) > limit))


def check_memory(name, shape, advice=""):
    """Raise ValueError if uint8 images of this shape, [N, C, H, W], are too many for the memory."""
    memory = (os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
              if hasattr(os, "sysconf") else 2**63)
    size = np.prod(shape, dtype=float)
    if size > memory / 2 / distributed.place()[1]:      # each of torchrun's processes reads its own
        raise ValueError(f"{name}: {shape[0]} images of {shape[-1]}x{shape[-1]} need "
                         f"{size / 1e9:.0f} GB, more than half of the memory{advice}")


def _decode(folder, files, image_size, fit, channels, out=None):
    """Read all files into one array, or into the array `out`. Returns (images, names, problems)."""
    shape = (len(files), 1 if channels == 1 else 3, image_size, image_size)
    if out is None:
        check_memory(folder, shape, "; train.py --cache_dir keeps them on disk instead")
        out = np.empty(shape, np.uint8)
    names, problems, grey = [], [], True
    for picture in read_folder(folder, files, image_size, fit, channels):
        if picture.problem:
            problems.append(f"{picture.name}: {picture.problem}")
            continue
        out[len(names)] = picture.pixels
        names.append(picture.name)
        grey = grey and bool((picture.pixels == picture.pixels[:1]).all())
    images = torch.from_numpy(out[:len(names)])
    if channels is None and grey:
        images = images[:, :1]
    return images, names, problems


def _array_on_disk(path, shape):
    """A new uint8 array in a file, mapped into memory. Its place on the disk is taken at once: on a
    full one that is an OSError, while a page that finds no place later would end the process."""
    try:
        array = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
        if hasattr(os, "posix_fallocate"):
            with open(path, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    except OSError as error:
        error.filename = error.filename or str(path)        # else nobody knows whose disk is full
        raise
    return array


def _cached(cache_dir, folder, files, image_size, fit, channels):
    """What _decode returns, with the images mapped from a file in cache_dir, made if need be.

    Its name tells the settings and the state of the folder: a changed folder gets another file.
    """
    state = [(str(p.relative_to(folder)), s.st_size, s.st_mtime_ns)
             for p in files for s in [p.lstat()]]
    # With its place: another folder may have files of the same names, sizes and times.
    key = hashlib.sha256(
        repr((DECODER, str(folder.resolve()), state, image_size, fit, channels)).encode())
    key = key.hexdigest()[:16]
    cache_dir.mkdir(parents=True, exist_ok=True)
    pixels = cache_dir / f"{folder.resolve().name}_{image_size}_{key}.npy"
    notes = pixels.with_suffix(".json")
    # The notes come last: a sign that the pixels are whole.
    if not (notes.exists() and pixels.exists()):
        part = cache_dir / f".{pixels.name}.{os.getpid()}.tmp"
        try:
            shape = (len(files), 1 if channels == 1 else 3, image_size, image_size)
            out = _array_on_disk(part, shape)
            images, names, problems = _decode(folder, files, image_size, fit, channels, out)
            if images.shape != shape:  # grey after all, or some files skipped: the array is smaller
                smaller = _array_on_disk(f"{part}2", tuple(images.shape))
                for first in range(0, len(images), 1024):
                    smaller[first:first + 1024] = images[first:first + 1024].numpy()
                out = smaller
                os.replace(f"{part}2", part)
            out.flush()
            os.replace(part, pixels)
        finally:
            for leftover in (part, Path(f"{part}2")):
                leftover.unlink(missing_ok=True)
        # Next time the disk may be well again.
        if any(f": {UNREAD}" in problem for problem in problems):
            return torch.from_numpy(np.load(pixels, mmap_mode="c")), names, problems
        write_file(notes, json.dumps(dict(names=names, problems=problems)).encode())
        print(f"wrote {pixels} ({pixels.stat().st_size / 1e6:.0f} MB)")
    try:
        told = json.loads(notes.read_text())
        # "c": a private copy on write, because torch wants arrays that it could write to.
        images, names, problems = (np.load(pixels, mmap_mode="c"), list(told["names"]),
                                   list(told["problems"]))
        if images.dtype != np.uint8 or images.ndim != 4 or len(images) != len(names):
            raise ValueError("an array of another kind")
        if not set(names) <= {name for name, *_ in state}:
            raise ValueError("names that no file has")
    except Exception as error:                # numpy and json raise nearly anything, too
        raise ValueError(f"{pixels} or its .json is damaged ({error}): "
                         "delete both, they are made anew") from error
    return torch.from_numpy(images), names, problems
