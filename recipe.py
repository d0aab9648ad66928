"""What a picture tells of its making, and whether it was made so again: sample.py --recreate."""

import io
import shlex

import numpy as np
import torch
from PIL import Image

from diffusion import SAMPLERS
from images import read_note

RECIPE = ("num_images", "first_index", "seed", "sampler", "steps", "eta", "spacing", "label",
          "guidance", "batch_size", "precision", "upscale")
OPTIONAL = ("image_size", "guidance_interval")
SURROUNDINGS = ("device", "threads", "torch")  # these change single bits: sums in another order
MAX_IMAGES = 1_000_000


def make_note(args, diffusion, digest, device):
    """All that decides the pixels, for the PNG: the flags with defaults filled in, and what else
    does. Its command names no checkpoint, as paths differ between machines: the digests do.
    """
    note = {name: getattr(args, name) for name in RECIPE}
    note["steps"] = len(diffusion.sampling_levels(args.sampler, args.steps)) - 1
    note["eta"] = SAMPLERS[args.sampler].eta if args.eta is None else args.eta
    note["spacing"] = args.spacing or "uniform"
    if args.image_size:
        note["image_size"] = args.image_size
    if args.guidance_interval:
        note["guidance_interval"] = "{},{}".format(*args.guidance_interval)
    note["command"] = shlex.join(["sample.py", *note_flags(note)])
    return {**note, "device": device.type, "threads": torch.get_num_threads(),
            "torch": torch.__version__, "weights": digest}


def note_flags(note):
    """The note as sample.py's flags."""
    return [f"--{name}={note[name]}" for name in (*RECIPE, *OPTIONAL) if note.get(name) is not None]


def read_recipe(path):
    """The note of a picture that can be made again. Raises ValueError if this one cannot."""
    note = read_note(path)
    if "made_from" in note:
        raise ValueError(f"{path} cannot be made again from a seed: it was made from "
                         f"{str(note['made_from'])[:60]!r}")
    missing = [name for name in (*RECIPE, *SURROUNDINGS, "weights") if name not in note]
    if missing:
        raise ValueError(f"{path} does not tell its {', '.join(missing)}")
    numbers = [note["num_images"], note["threads"], note.get("picture", 0)]
    if (any(type(number) is not int for number in numbers)
            or not (0 <= numbers[2] < MAX_IMAGES and 1 <= numbers[0] <= MAX_IMAGES
                    and 1 <= numbers[1] <= 1024)
            or not (note["label"] is None or isinstance(note["label"], str))):
        raise ValueError(f"{path}: what it tells of how it was made is damaged")
    return note


def compare(picture, reference, note, again):
    """Say whether a picture that was made again is the same, and if not, what was different."""
    if picture.read_bytes() == reference:
        return "byte for byte the same"
    with Image.open(picture) as a, Image.open(io.BytesIO(reference)) as b:
        a, b = (np.asarray(image.convert("RGB")).astype(np.int16) for image in (a, b))
    apart = np.abs(a - b) if a.shape == b.shape else None
    differ = [f"{name} {str(again[name])[:40]!r} then, {note[name]!r} now" for name in SURROUNDINGS
              if again[name] != note[name]]
    if apart is None:
        verdict = "NOT of the same size"
    elif apart.any():
        verdict = (f"NOT the same pixels: {(apart > 0).mean():.4%} of the values differ, "
                   f"by {apart.max()} of 255 at most")
        if apart.max() <= 2:
            verdict += ", as rounding on another machine may make it"
    else:
        verdict = "the same pixels"
    return verdict + (f" ({'; '.join(differ)})" if differ else "")
