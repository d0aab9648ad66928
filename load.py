"""A model to draw with: found, read, and used as it was measured.

    model, diffusion, data = load_model(find_model())  # your own; if there is none, the shipped one
"""

import contextlib
from pathlib import Path

import torch

import interop
from checkpoint import (PRETRAINED, check_weights, drawing_digest, load_checkpoint, read_container,
                        told_of, whole_precision)
from command_line import guidance_number, interval, number_from, positive_int
from data import keep_apart_from_own
from diffusion import MAX_ETA, SAMPLERS, DiffusionProcess, guidance_at
from images import MAX_SIZE
from models import create_model, model_defaults
from running import FINAL, LATEST
from schedules import MAX_TIMESTEPS, SPACINGS
from utils import describe_device

OWN, UNFINISHED = f"outputs/{FINAL}", f"outputs/{LATEST}"
WEAK_GUIDANCE, WEAK_FROM = 2.0, 0.3  # by --weak, at the noisier levels: from this share of T on
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
    and guidance to take where none are named: see card_recipe). Raises FileNotFoundError, or
    ValueError for an unusable file.
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
                "class_needed": bool(model.num_classes) and told_of(entries).get("label_drop") == 0,
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


def card_recipe(card, T):
    """{sampler, steps, spacing, eta, guidance, guidance_interval, weak} with which a model was
    measured, as its card (export.py) tells, or its preset is drawn (presets.py); weak is the name
    of a file beside it. Where nothing is told: ddim, the class followed plainly, and None for the
    others."""
    card = card if isinstance(card, dict) else {}

    def told(name, kinds, fits, otherwise=None):
        """The card's value, as the last of `kinds`, if it is one that a flag could have."""
        value = card.get(name)
        return kinds[-1](value) if type(value) in kinds and fits(value) else otherwise

    sampler = told("sampler", [str], lambda name: name in SAMPLERS)
    most = 1 if SAMPLERS[sampler or "ddim"].variance == "beta" else MAX_ETA
    return {"sampler": sampler or "ddim",
            "steps": told("sampler_steps", [int], lambda n: sampler and 1 <= n <= T),
            "spacing": told("spacing", [str], lambda name: name in SPACINGS),
            "eta": told("eta", [int, float], lambda eta: 0 <= eta <= most),
            "guidance": told("guidance", [int, float], lambda g: 0 <= g <= 100, 1.0),
            "guidance_interval": told("guidance_interval", [list, tuple], lambda levels: (
                [type(t) for t in levels] == [int, int] and 0 <= levels[0] <= levels[1] <= T)),
            # Never a path: only what lies beside.
            "weak": told("weak", [str], lambda name: (
                0 < len(name) < 200 and name == Path(name).name and name.isprintable()))}


def check_draw_with(draw_with):
    """Raise ValueError unless these are settings of presets.DRAW_WITH's kind, or None."""
    if draw_with is not None and not isinstance(draw_with, dict):
        raise ValueError(f"draw_with must be a dict or None, got {draw_with!r:.50}")
    told = card_recipe(draw_with, MAX_TIMESTEPS)
    told["sampler_steps"] = told["steps"]
    for name, value in (draw_with or {}).items():
        if (name not in ("sampler", "sampler_steps", "spacing", "eta", "guidance")
                or type(value) not in (str, int, float) or told[name] != value):
            raise ValueError(f"draw_with: {name!r:.50} cannot be {value!r:.50}")


def add_drawing_flags(add):
    """The flags that say how to draw, --sampler to --weak; take_sampler and take_guidance fill in
    what was not typed.  add: Parser.add."""
    add("--sampler",
        "how to step down; default: what the model tells (shipped weights, what they were "
        "measured with; those of --preset quick and fabrics_laptop, what is best for them), "
        "else ddim",
        choices=sorted(SAMPLERS))
    add("--steps", "model calls, twice as many with guidance; "
        "default: as the model tells where --sampler is not given, else " + ", ".join(
            f"{row.steps or 'all T'} for {name}" for name, row in SAMPLERS.items()),
        type=positive_int)
    add("--spacing", "at which timesteps; default: as the model tells where --sampler is not "
        "given, else uniform", choices=sorted(SPACINGS))
    add("--eta", "fresh noise in each step: 0 none, 1 as much as DDPM, "
        f"above 1 (at most {MAX_ETA}) more, only with many steps; "
        "default: as the model tells where --sampler is not given, else the sampler's own",
        type=number_from(0, MAX_ETA))
    add("--guidance", "how strongly to follow the class: 1 plainly, 2 or 4 more so at twice the "
        "cost; default: as the model tells, or 1", type=guidance_number)
    add("--guidance_interval", "the noise levels at which guidance acts, from the lowest to the "
        "highest; default: as the model tells where --guidance is not given, else all, "
        "or those of --weak", metavar="LOW,HIGH", type=interval)
    add("--weak", "a worse model of the same images, smaller or an early checkpoint: guidance "
        "leads away from its mistakes (autoguidance), also without classes, "
        f"by {WEAK_GUIDANCE:g} unless --guidance says otherwise, "
        f"at the noisier {1 - WEAK_FROM:.0%} of the levels unless --guidance_interval does; "
        "default: what the model tells of a file beside it, unless a --guidance is given that can "
        "follow a class", metavar="FILE")


def take_sampler(args, data):
    """Put the card's sampler, steps, spacing and eta into `args` where no sampler was named.

    data: what load_model tells.  An eta above 1 is one for many steps: it is left out of fewer.
    ValueError for an eta that the sampler does not take.
    """
    if args.sampler is None:
        args.sampler, args.steps = data["sampler"], args.steps or data["steps"]
        args.spacing = args.spacing or data["spacing"]
        many = data["steps"] and args.steps >= data["steps"]
        if args.eta is None and ((data["eta"] or 0) <= 1 or many):
            args.eta = data["eta"]
    if args.eta and args.eta > 1 and SAMPLERS[args.sampler].variance == "beta":
        raise ValueError(f"--eta {args.eta:g}: {args.sampler} takes 0 to 1")


def take_guidance(args, data, diffusion):
    """Put into `args` what was not named: the guidance, the levels at which it acts (None: all) and
    the weak model that it leads away from, as the model's card has them.

    data: what load_model tells.  args.sampler: None where several are compared.
    ValueError for guidance towards nothing, or asked for at levels where it cannot act.
    """
    refuse_no_class(args.label, data)
    named, guided = args.weak is not None, bool(data["classes"]) and args.label != "none"
    guidance, levels = default_guidance(args, data, diffusion.num_timesteps, guided)
    if args.guidance is not None:
        guidance = args.guidance
        levels = levels if args.weak else None  # away from "no class" it may act at all levels
    if guidance == 0 and not data["classes"] and not args.weak:
        guidance = 1.0                          # what it sees without a class is all that it sees
    check_guidance(args, data, diffusion.num_timesteps, guidance, guided, named)

    interval = args.guidance_interval or levels
    if interval and guidance not in (0, 1) and args.sampler:
        visited = diffusion.sampling_levels(args.sampler, args.steps, args.spacing)[:-1]
        if all(guidance_at(t, guidance, interval) == 1 for t in visited):
            where = "t = {} to {}".format(*interval)
            none_there = f"none of the {len(visited)} levels of this chain lies there"
            if args.guidance_interval:
                raise ValueError(f"--guidance_interval: guidance at {where}, and {none_there}")
            print(f"guidance is left out: the model has it at {where}, and {none_there}")
            guidance, args.weak = 1.0, None
    args.guidance, args.guidance_interval = guidance, None if guidance in (0, 1) else interval


def refuse_no_class(label, data):
    """Raise ValueError where none is asked for of a model that has not learnt to do without."""
    if label == "none" and data.get("class_needed"):
        raise ValueError("trained with --label_drop 0, this model cannot draw without a class: "
                         "name one with --label")


def weak_beside(checkpoint, data):
    """The path of the weak model that a checkpoint's card names, if it lies there, or None."""
    beside = data["weak"] and Path(checkpoint).parent / data["weak"]
    return str(beside) if beside and beside.is_file() else None


def default_guidance(args, data, T, guided):
    """(guidance, levels) where the command line names none. args.weak becomes the weak model of the
    card, unless a --guidance was typed that can follow a class. guided: is there one to follow?"""
    if args.weak is not None:
        return WEAK_GUIDANCE, (round(WEAK_FROM * T), T - 1)
    if data["weak"] and (args.guidance is None or not guided and args.guidance not in (0, 1)):
        args.weak = weak_beside(args.checkpoint, data)
        if args.weak is None and args.guidance is None:
            print(f"{args.checkpoint} was measured with --weak {data['weak']}, and there is no "
                  "such file beside it: drawing without")
    # a card's guidance is worth nothing without its --weak, or away from a "no class" of chance
    if args.weak or guided and not data["weak"] and not data.get("class_needed"):
        return data["guidance"], data["guidance_interval"]
    return 1.0, None


def check_guidance(args, data, T, guidance, guided, named):
    """Raise ValueError if this guidance, as typed, leads nowhere. named: was --weak typed?"""
    if named and guidance == 1:
        raise ValueError("--weak says what guidance leads away from, and --guidance 1 is none")
    if guidance != 1 and data.get("class_needed") and not args.weak:
        raise ValueError(f"--guidance {guidance:g} leads away from what a model draws without a "
                         "class, and this one, trained with --label_drop 0, has not learnt that")
    asked_for = guidance not in (0, 1) or args.guidance is None and args.guidance_interval
    if asked_for and not guided and not args.weak:
        raise ValueError("guidance needs classes to guide towards, or a --weak model: "
                         + ("--label none has none" if data["classes"]
                            else "the model was trained without"))
    if args.guidance_interval:
        asked = "--guidance_interval {},{}".format(*args.guidance_interval)
        if guidance in (0, 1):
            raise ValueError(f"{asked} says where guidance acts, "
                             f"and --guidance {guidance:g} is none")
        if args.guidance_interval[0] >= T or args.guidance_interval[1] > T:
            raise ValueError(f"{asked}: the levels of this model go from 0 to {T - 1}")


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
