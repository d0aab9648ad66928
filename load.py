"""A model to draw with: found and read.

    model, diffusion, data = load_model(find_model())  # your own; if there is none, the shipped one
"""

import contextlib
from pathlib import Path

import torch

import interop
from checkpoint import (PRETRAINED, check_weights, drawing_digest, load_checkpoint, read_container,
                        told_of, whole_precision)
from data import keep_apart_from_own
from diffusion import DiffusionProcess
from drawing import card_recipe
from images import MAX_SIZE
from models import create_model, model_defaults
from running import FINAL, LATEST
from utils import describe_device

OWN, UNFINISHED = f"outputs/{FINAL}", f"outputs/{LATEST}"
CHECKPOINT_HELP = (f"a file written by train.py; default: {OWN}, "
                   "or shipped weights as long as there is none")


def shipped_weights():
    """The names of all weights in pretrained/, sorted."""
    return sorted(path.stem for path in PRETRAINED.glob("*.pt")
                  if not path.stem.startswith("classifier"))


def find_model(checkpoint=None, dataset=None, images=None):
    """The path of the weights to draw from: your own, or while there are none the shipped ones.

    checkpoint: a file, or None for OWN.  dataset: take the shipped weights of this data set.
    images: the data set that they are to be used with; of the shipped weights, take its own if any.
    Raises ValueError where there is nothing.
    """
    datasets = [name for name in shipped_weights() if not name.endswith("_weak")]   # for --weak
    if dataset is not None:
        if dataset not in datasets:
            raise ValueError(f"no weights are shipped for {dataset!r}; choose from "
                             f"{', '.join(datasets)}, or train your own with "
                             f"python train.py --dataset {dataset}")
        return PRETRAINED / f"{dataset}.pt"
    if checkpoint is None and not Path(OWN).exists() and "mnist" in datasets:
        name = Path(images or "mnist").name
        name = name if name in datasets else "mnist"
        print(f"no {OWN} yet: taking the weights that are shipped, pretrained/{name}.pt"
              + f" ({UNFINISHED} is a run that was not finished: "
                "--checkpoint takes it)" * Path(UNFINISHED).exists())
        return PRETRAINED / f"{name}.pt"
    checkpoint = checkpoint or OWN
    if not Path(checkpoint).exists():
        unfinished = Path(checkpoint).with_name(LATEST)
        raise ValueError(f"no checkpoint at {checkpoint}; " + (
            f"there is {unfinished}, of a run that was not finished" if unfinished.exists() else
            "make one with python train.py, or name one with --checkpoint"))
    return checkpoint


def find_by_digest(digest, beside="."):
    """The path of the weights that draw with this digest: OWN, a model in the folder `beside`, or
    shipped ones. Raises ValueError where there are none."""
    own = (Path(OWN), *(Path(beside) / name for name in (FINAL, LATEST)))
    for path in (*own, *(PRETRAINED / f"{name}.pt" for name in shipped_weights())):
        with contextlib.suppress(ValueError, FileNotFoundError):    # a damaged file is not the one
            if load_model(path)[2]["digest"] == digest:
                return path
    raise ValueError(f"neither {OWN} nor a model beside it nor shipped weights made that picture: "
                     "name with --checkpoint what did "
                     "(a file that export.py has made smaller draws others)")


def load_model(path, device="cpu", ema=True, image_size=None):
    """A model ready to sample from, out of a checkpoint alone.

    ema: take the averaged weights (better pictures), not those of the last step.
    image_size: of a foreign checkpoint that does not tell it (interop.py).
    Returns (model in eval mode, DiffusionProcess, what the checkpoint says about its data: a dict
    with name, image_size, channels, classes, a digest of what it draws with, and the sampler, steps
    and guidance to take where none are named: see card_recipe).
    Raises FileNotFoundError, or ValueError for an unusable file.
    """
    entries = None if Path(path).is_dir() else read_container(path)
    if entries is None or interop.averaged_of(entries):
        model, diffusion, data = interop.load_foreign(path, entries, image_size)
        return model.to(device), diffusion, {**data, **card_recipe(None, diffusion.num_timesteps)}
    if image_size:
        raise ValueError(f"--image_size {image_size}: {path} tells its own")
    entries = load_checkpoint(path, entries)
    try:
        # On "meta" a network has shapes but no memory, so a config that does not match its weights
        # (or asks for a monstrous network) fails here at no cost.
        check_config(entries["model_config"], model_defaults(entries["model_name"]))
        with torch.device("meta"):
            model = create_model(entries["model_name"], **entries["model_config"])
        weights = whole_precision(entries["ema" if ema else "model"])
        check_weights(path, weights, model)
        model.load_state_dict(weights, assign=True)
        diffusion = DiffusionProcess(**entries["diffusion_config"])
        told = {"classes": None, **entries["data"],
                "started_from": told_of(entries, "started_from"),
                **{name: told_of(entries).get(name) for name in ("images", "held_out")}}
        data = {**{name: value for name, value in told.items()
                   if not isinstance(value, torch.Tensor)},
                "channels": model.image_channels, "digest": drawing_digest(entries),
                **card_recipe(told_of(entries, "card") or entries.get("draw_with"),
                              diffusion.num_timesteps)}
        if type(data["image_size"]) is not int or not 4 <= data["image_size"] <= MAX_SIZE:
            raise ValueError(f"image_size {data['image_size']!r}")
        if data["image_size"] % model.multiple:
            raise ValueError(f"image_size {data['image_size']}, no multiple of {model.multiple}")
        data["name"] = str(data["name"])
        data["classes"] = [str(name) for name in data["classes"]] if model.num_classes else None
        if model.num_classes and len(data["classes"]) != model.num_classes:
            raise ValueError(f"{len(data['classes'])} names for {model.num_classes} classes")
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError,
            RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        if "allocate memory" in reason:
            raise                                           # that is no fault of the file
        raise ValueError(f"{path}: its weights and settings do not fit together "
                         f"({reason})") from error
    return model.to(device).eval().requires_grad_(False), diffusion, data


def open_model(args, device):
    """Load a command's model; print its name. args: checkpoint, output_dir, device, dataset or not.
    Returns (its path, and what load_model returns).
    Raises ValueError where output_dir holds what it learnt from."""
    path = find_model(args.checkpoint, images=getattr(args, "dataset", None))
    model, diffusion, data = load_model(path, device)
    keep_apart_from_own(data, args.output_dir)
    print(f"device: {describe_device(device, args.device)}; model: {path}")
    return path, model, diffusion, data


def refuse_other_images(args, data):
    """Raise ValueError if --dataset is not the model's, for a command that looks at no images."""
    if args.dataset and Path(args.dataset).name != Path(data["name"]).name:
        raise ValueError(f"--dataset {args.dataset} would be of no use: "
                         f"the model draws {data['name']}")


def check_config(config, defaults):
    """ValueError unless each setting of a network is one that it has, and of the kind of its
    default: "no" would count as yes, and 4.0 heads fail only in the first attention."""
    for name, value in config.items():
        if name not in defaults:
            raise ValueError(f"the network has no setting {name!r:.50}")
        default, kind = defaults[name], type(value)
        if isinstance(default, tuple):
            fits = kind in (tuple, list) and all(type(number) is int for number in value)
        elif default is None:
            fits = value is None or kind is int
        else:
            fits = kind is type(default) or kind is int and type(default) is float
        if not fits:
            raise ValueError(f"{name} is {value!r:.50}")


def load_weak(path, model, diffusion, own, device="cpu", image_size=None):
    """(the model of --weak, its digest), or (None, None) without one. own: what the model's
    checkpoint says of its data. Raises ValueError for one of other images or another process."""
    if path is None:
        return None, None
    weak, process, data = load_model(path, device, image_size=image_size)
    same = (weak.image_channels, process.objective) == (model.image_channels, diffusion.objective)
    facts = [(told["image_size"], told["classes"], told.get("images")) for told in (own, data)]
    if not same or facts[0] != facts[1] or not torch.equal(process.alpha_bar, diffusion.alpha_bar):
        raise ValueError(f"--weak {path} was trained on other images, "
                         "or with another schedule or objective")
    if own["digest"] == data["digest"]:
        raise ValueError(f"--weak {path} is the model itself: "
                         "name a smaller one, or an early checkpoint of its training")
    return weak, data["digest"]
