"""How to draw from a model: the flags --image_size to --weak, what the model tells where they are
not typed, and what --label asks for.

    add_drawing_flags(parser.add)       # sample.py and evaluate.py have them
    take_sampler(args, data)            # data: what load_model tells
    take_guidance(args, data, diffusion)
    y, columns = choose_labels(args.label, data["classes"], 64)
"""

import math
from pathlib import Path

import torch

from command_line import guidance_number, interval, number_from, positive_int
from diffusion import MAX_ETA, SAMPLERS, guidance_at
from interop import UNKNOWN_SIZE
from schedules import MAX_TIMESTEPS, SPACINGS

WEAK_GUIDANCE, WEAK_FROM = 2.0, 0.3  # by --weak, at the noisier levels: from this share of T on


def card_recipe(card, T):
    """{sampler, steps, spacing, eta, guidance, guidance_interval, weak} with which a model was
    measured, as its card (export.py) tells, or its preset is drawn (presets.py); weak is the name
    of a file beside it. Where nothing is told: ddim, the class followed plainly, and None for the
    others."""
    card = card if isinstance(card, dict) else {}

    def told(name, kinds, fits, otherwise=None):
        """The card's value, made the last of `kinds`, if a flag could have it; or `otherwise`."""
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
    """The flags that say how to draw, --image_size to --weak; take_sampler and take_guidance fill
    in what was not typed.  add: Parser.add."""
    add("--image_size", "in pixels, for a checkpoint of denoising-diffusion-pytorch: those do not "
        f"tell it (default: {UNKNOWN_SIZE})", type=positive_int)
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
        "default: as the model tells where --sampler is not given (above 1 only with as many "
        "--steps as it tells), else the sampler's own", type=number_from(0, MAX_ETA))
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
    """Put the sampler, steps, spacing and eta that the model tells into `args` where no sampler was
    named.

    data: what load_model tells.  An eta above 1 is one for many steps: it is left out of fewer.
    ValueError for an eta that the sampler does not take.
    """
    if args.sampler is None:
        args.sampler, args.steps = data["sampler"], args.steps or data["steps"]
        args.spacing = args.spacing or data["spacing"]
        many = data["steps"] and args.steps >= data["steps"]
        if args.eta is None and ((data["eta"] or 0) <= 1 or many):
            args.eta = data["eta"]
        elif args.eta is None:
            print(f"eta {data['eta']:g} is left out: the model has it for more steps")
    if args.eta and args.eta > 1 and SAMPLERS[args.sampler].variance == "beta":
        raise ValueError(f"--eta {args.eta:g}: {args.sampler} takes 0 to 1")


def take_guidance(args, data, diffusion):
    """Put into `args` what was not named: the guidance, the levels at which it acts (None: all) and
    the weak model that it leads away from, as the model tells.

    data: what load_model tells.  args.sampler: None where several are compared.
    ValueError for guidance towards nothing, or asked for at levels where it cannot act.
    """
    T, guided = diffusion.num_timesteps, bool(data["classes"]) and args.label != "none"
    weak, guidance, levels = default_guidance(args, data, T, guided)
    if args.guidance is not None:
        guidance = args.guidance
        levels = levels if weak else None       # away from "no class" it may act at all levels
    if guidance == 0 and not data["classes"] and not weak:
        guidance = 1.0                          # what it sees without a class is all that it sees
    check_guidance(args, data, T, guidance, weak, guided)

    interval = args.guidance_interval or levels
    if interval and guidance not in (0, 1) and args.sampler:
        visited = diffusion.sampling_levels(args.sampler, args.steps, args.spacing)[:-1]
        if all(guidance_at(t, guidance, interval) == 1 for t in visited):
            where = "t = {} to {}".format(*interval)
            none_there = f"none of the {len(visited)} levels of this chain lies there"
            if args.guidance_interval:
                raise ValueError(f"--guidance_interval: guidance at {where}, and {none_there}")
            print(f"guidance is left out: the model has it at {where}, and {none_there}")
            weak, guidance = None, 1.0
    args.weak, args.guidance = weak, guidance
    args.guidance_interval = None if guidance in (0, 1) else interval


def weak_beside(checkpoint, data):
    """The path of the weak model that a checkpoint's card names, if it lies there, or None."""
    beside = data["weak"] and Path(checkpoint).parent / data["weak"]
    return str(beside) if beside and beside.is_file() else None


def default_guidance(args, data, T, guided):
    """(the path of a weak model or None, guidance, levels) where the command line names no more.
    The card's weak model is taken unless a --guidance was typed that can follow a class.
    guided: is there one to follow?"""
    if args.weak is not None:
        return args.weak, WEAK_GUIDANCE, (round(WEAK_FROM * T), T - 1)
    weak = None
    if data["weak"] and (args.guidance is None or not guided and args.guidance not in (0, 1)):
        weak = weak_beside(args.checkpoint, data)
        if weak is None and args.guidance is None:
            print(f"{args.checkpoint} was measured with --weak {data['weak']}, and there is no "
                  "such file beside it: drawing without")
    # What is told is worth nothing without the weak model that it was told with.
    if weak or guided and not data["weak"]:
        return weak, data["guidance"], data["guidance_interval"]
    return None, 1.0, None


def check_guidance(args, data, T, guidance, weak, guided):
    """Raise ValueError if this guidance leads nowhere. args: as typed."""
    if args.weak is not None and guidance == 1:
        raise ValueError("--weak says what guidance leads away from, and --guidance 1 is none")
    asked_for = guidance not in (0, 1) or args.guidance is None and args.guidance_interval
    if asked_for and not guided and not weak:
        raise ValueError("guidance needs classes to guide towards, or a --weak model: "
                         + ("no class is asked for" if data["classes"]
                            else "the model was trained without"))
    if args.guidance_interval:
        asked = "--guidance_interval {},{}".format(*args.guidance_interval)
        if guidance in (0, 1):
            raise ValueError(f"{asked} says where guidance acts, "
                             f"and --guidance {guidance:g} is none")
        if args.guidance_interval[0] >= T or args.guidance_interval[1] > T:
            raise ValueError(f"{asked}: the levels of this model go from 0 to {T - 1}")


# ---- Which class

def choose_labels(text, classes, num_images, first_index=0):
    """What --label asks for: (y [num_images] or None, columns of the grid or None). Several labels
    get full rows, as many each as make the grid nearest to a square, and so may need more images.

    text: a number or name, several with commas, "all", "none", or None for the default.
    classes: the names of the model's, or None.  Raises ValueError for one that is not there.
    """
    if text is None or text == "none" and not classes:
        turns = torch.arange(first_index, first_index + num_images)
        return (turns % len(classes) if classes else None), None
    if not classes:
        raise ValueError(f"--label {text}: the model was trained without classes")
    if text == "none":
        return torch.full((num_images,), -1), None
    by_number = not any(name.isdecimal() for name in classes)       # else a number is a name
    known = {str(k): k for k in range(len(classes))} if by_number else {}
    known.update((name, k) for k, name in enumerate(classes))
    labels = list(range(len(classes)))
    if text != "all":
        words = [text] if text in known else [word.strip() for word in text.split(",")]
        unknown = [word for word in words if word not in known]
        if unknown:
            names = [f"{k} ({name})" for k, name in enumerate(classes)] if by_number else classes
            raise ValueError(f"unknown class {unknown[0]!r}; "
                             f"choose from all, none, {', '.join(names)}")
        labels = [known[word] for word in words]
    if len(labels) == 1:
        return torch.full((num_images,), labels[0]), None
    rows = max(1, round(num_images**0.5 / len(labels)))             # of each label
    columns = math.ceil(num_images / (rows * len(labels)))
    return torch.tensor(labels).repeat_interleave(rows * columns), columns


def choose_one_label(text, classes):
    """choose_labels of pictures that have one class in common: y [1] or None."""
    y, _ = choose_labels(text, classes, 1)
    if y is not None and len(y) > 1:
        raise ValueError(f"--label {text}: {len(y)} classes, where one is drawn")
    return y


def thinned(y, count):
    """Cut the labels of choose_labels to `count`, as many of each."""
    return None if y is None else y[torch.arange(count) * len(y) // count]
