"""Fill holes, sharpen, colour: pictures completed by a model trained only to draw new ones.

    python edit.py                                         # 16 test images, lower half drawn anew
    python edit.py --images a.png b.png --mask hole.png    # of your own; white in the mask stays
    python edit.py --task upscale --factor 4               # 28x28 out of 7x7
    python edit.py --task deblur

Something was measured of an image, A x = y: some of its pixels, the means of its blocks, a blurred
version. Many images have that measurement. The model knows which of them look real, so it samples
as always, but each of its estimates of x_0 is corrected where it contradicts the measurement, and
nowhere else (DDNM, Wang et al. 2023, algorithm 1):

    x_0  <-  x_0 + A+ (y - A x_0)       A+ gives back an image with the measurement that it is given

Because a correction may fit badly to the rest of the picture, every step is taken `travel` times,
going back up to its noise level in between (RePaint, Lugmayr et al. 2022, algorithm 1). No training
and no gradients.

Writes outputs/edited.png: the originals, what was given of them, the plain answer and ours (of the
first eight); prints how near they are to the originals (PSNR, dB). edited_only.png has all answers.
"""

import itertools
import math
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from command_line import (Parser, command, format_seconds, fraction, make_output_dir, positive_int,
                          seed_number, spare)
from data import keep_apart
from diffusion import evaluating, seeded_noise
from drawing import choose_labels, thinned
from folders import load_pictures, read_picture
from images import save_images, save_strip, to_signed
from load import CHECKPOINT_HELP, open_model
from measures import psnr
from reference import unseen_images
from sample import seconds_for
from utils import get_device


# ---- What was measured, and back

class Operator(NamedTuple):
    measure: Callable  # A: images [B, C, H, W] -> what is known of them
    back: Callable  # A+: a measurement -> images that have it.  A A+ A = A
    plain: Callable  # a measurement -> what one would show without a model, [B, C, H, W]


def inpaint(mask):
    """Known are the pixels where mask [H, W] is True."""
    known = mask.float()
    return Operator(lambda x: x * known, lambda y: y * known, lambda y: y)


def upscale(size, factor):
    """Known is the mean of each block of factor x factor pixels."""
    if factor < 2 or size % factor:
        raise ValueError(f"--factor {factor} must divide the model's image size {size}, "
                         "and be at least 2")
    return Operator(lambda x: F.avg_pool2d(x, factor),
                    lambda y: y.repeat_interleave(factor, -2).repeat_interleave(factor, -1),
                    lambda y: F.interpolate(y, scale_factor=factor, mode="bicubic").clamp(-1, 1))


def deblur(size, width=1.5, keep=0.1):
    """Known is the image blurred by a Gaussian of `width` pixels, as far as it can be told from
    nothing: of the blur's singular values, those below `keep` times the largest count as lost."""
    place = torch.arange(size, dtype=torch.float64)
    blur = torch.exp(-((place[:, None] - place[None]) / width) ** 2 / 2)
    left, values, right = torch.linalg.svd(blur / blur.sum(1, keepdim=True))
    kept = values > keep * values[0]
    there = (left[:, kept] * values[kept] @ right[kept]).float()
    back = (right[kept].T / values[kept] @ left[:, kept].T).float()
    return Operator(*(lambda x, m=m: m.to(x.device) @ x @ m.T.to(x.device) for m in (there, back)),
                    lambda y: y.clamp(-1, 1))


def colourise():
    """Known is the mean of red, green and blue."""
    return Operator(lambda x: x.mean(1, keepdim=True), lambda y: y.expand(-1, 3, -1, -1),
                    lambda y: y.expand(-1, 3, -1, -1))


MAX_PICTURES = 1000  # mended at once; answer k to picture i is made from noise k * this + i
TASKS = ("inpaint", "upscale", "deblur", "colourise")
SIDES = ("lower", "upper", "left", "right", "box")


def read_mask(text, size):
    """What --mask names: a bool [H, W], True where the picture is known.

    text: the half, or the box in the middle, to be drawn anew; or a picture, white where it stays.
    """
    mask, half, quarter = torch.ones(size, size, dtype=torch.bool), size // 2, size // 4
    whole = slice(None)
    holes = {"lower": (slice(half, None), whole), "upper": (slice(0, half), whole),
             "left": (whole, slice(0, half)), "right": (whole, slice(half, None)),
             "box": (slice(quarter, size - quarter), slice(quarter, size - quarter))}
    if text in holes:
        mask[holes[text]] = False
        return mask
    if not Path(text).is_file():
        raise ValueError(f"unknown mask {text!r}; choose from {', '.join(SIDES)}, "
                         "or name a picture file")
    picture = read_picture(Path(text), text, size, channels=1)           # cut as --images are
    if picture.problem:
        raise ValueError(f"--mask {text}: {picture.problem}")
    mask = torch.from_numpy(picture.pixels.copy()).view(size, size) > 127
    if mask.all() or not mask.any():
        raise ValueError(f"{text} is {'white' if mask.all() else 'black'} all over: "
                         "nothing to draw, or nothing to go by")
    return mask


# ---- The rule

@torch.no_grad()
def solve(model, diffusion, given, operator, shape, *, steps=50, travel=1, eta=1.0, seed=0,
          first_index=0, y=None, device="cpu", progress=lambda: None):
    """Draw images that have the measurement `given` and that the model finds likely.

    shape: (B, C, H, W).  travel: how often each of the steps is taken, but the last, which adds no
    noise to draw anew.  eta: fresh noise in each step.
    y: [B] classes or None.  Image i depends on (seed, i) alone.
    Returns [B, C, H, W], not cut to [-1, 1]: there it would fit an upscaled or deblurred
    measurement less exactly.
    """
    indices = range(first_index, first_index + shape[0])
    noises = itertools.count()                             # each draw has a number of its own

    def noise():
        return seeded_noise(seed, indices, next(noises), shape[1:]).to(device)

    levels = diffusion.timesteps(steps)
    x = noise()
    for t, t_prev in zip(levels, levels[1:]):
        for again in reversed(range(travel if t_prev >= 0 else 1)):
            with evaluating(model):
                x_0 = diffusion.predict_x0(model, x, t, y)
            # In this order known pixels come out bit for bit: what is taken away is all there was.
            x_0 = x_0 - operator.back(operator.measure(x_0)) + operator.back(given)
            x_prev = diffusion.step_towards(x_0, x, t, t_prev, eta=eta, noise=noise())
            progress()
            if again:                   # back up, by fresh noise: another draw of the same step
                kept = diffusion.alpha_bar_at(t) / diffusion.alpha_bar_at(t_prev)
                x = math.sqrt(kept) * x_prev + math.sqrt(1 - kept) * noise()
        x = x_prev
    return x


def load_originals(args, data, channels):
    """The pictures to spoil and to mend: those of --images, or such as the model has not seen,
    where there are any. [N, C, S, S] in [-1, 1]."""
    if args.images:
        print(f"pictures: {len(args.images)} of yours; the model knows pictures like those of "
              f"{data['name']!r}, and makes others more like them")
        return load_pictures(args.images, data["image_size"], channels)
    try:
        dataset, images, _, kind = unseen_images(data, args.data_dir, args.dataset)
    except ValueError as error:
        whose = "" if args.dataset else f"the model was trained on {data['name']!r}: "
        raise ValueError(f"{whose}{error}; or name pictures with --images") from error
    # The same ones whatever --seed is: it asks for another answer, not for another question.
    images = images[:args.num_images]
    print(f"pictures: {len(images)} {kind}" + f" of {dataset}" * (" of " not in kind))
    return to_signed(images)


def parse(argv):
    parser = Parser(description="Complete pictures with a model as the judge of what looks real.")
    add = parser.add
    add("--checkpoint", CHECKPOINT_HELP)
    add("--images", "pictures of your own, cut to the central square and to the model's size",
        nargs="+", metavar="FILE")
    add("--dataset", "take images of this set, of its test set if it has one; "
        "default: the one the model was trained on", metavar="NAME")
    add("--data_dir")
    add("--num_images", "how many of them", 16, type=positive_int)
    add("--task", "what to undo", "inpaint", choices=TASKS)
    add("--mask", f"inpaint: what to draw anew, of {', '.join(SIDES)}, or a picture that is "
        "white where all stays and black where the hole is; default: lower")
    add("--factor", "upscale: from blocks of so many by so many pixels; default: 4",
        type=positive_int)
    add("--label", "the class to draw, as a number or name", "none")
    add("--steps", "steps from noise to picture; default: 50, or T if that is less",
        type=positive_int)
    add("--travel", "how often each step but the last is taken; each is a call of the model", 5,
        type=positive_int)
    add("--eta", "fresh noise in each step, 0 to 1", 1.0, type=fraction)
    add("--average", "the mean of so many answers: nearer in PSNR, and blurred where they differ",
        1, type=positive_int)
    add("--seed", "another seed, another answer", 0, type=seed_number)
    add("--output_dir", "where the pictures go", "outputs")
    add("--device")
    args = parser.parse_args(argv)
    for flag, task in (("mask", "inpaint"), ("factor", "upscale")):
        if getattr(args, flag) is not None and args.task != task:
            raise ValueError(f"--{flag} belongs to --task {task}, not to {args.task}")
    if args.images:
        parser.refuse({"dataset", "data_dir", "num_images"}, "--images")
    count = len(args.images) if args.images else args.num_images
    if count > MAX_PICTURES:
        raise ValueError(f"{count} images: at most {MAX_PICTURES}, as all are mended at once")
    return args


@command
def main(argv=None):
    args = parse(argv)
    spare([*(args.images or []), *([args.mask] if args.mask else [])],
          *(Path(args.output_dir) / name for name in ("edited.png", "edited_only.png")))
    device = get_device(args.device)
    keep_apart(args.dataset, args.output_dir)
    _, model, diffusion, data = open_model(args, device)
    output_dir = make_output_dir(args.output_dir, "edited.png", "edited_only.png")
    size, channels = data["image_size"], model.image_channels
    if args.task == "colourise" and channels != 3:
        raise ValueError("--task colourise needs a model of colour pictures, and this one is grey: "
                         "for instance --checkpoint pretrained/african_fabrics.pt")
    operator = {"inpaint": lambda: inpaint(read_mask(args.mask or "lower", size).to(device)),
                "upscale": lambda: upscale(size, args.factor or 4),
                "deblur": lambda: deblur(size),
                "colourise": colourise}[args.task]()
    originals = load_originals(args, data, channels).to(device)
    y, _ = choose_labels(args.label, data["classes"], len(originals))
    if y is not None and len(y.unique()) > len(originals):
        raise ValueError(f"--label {args.label}: {len(y.unique())} classes "
                         f"for {len(originals)} pictures")
    y = None if y is None else thinned(y, len(originals)).to(device)
    args.steps = len(diffusion.sampling_levels("ddim", args.steps)) - 1     # refuses too many
    calls = ((args.steps - 1) * args.travel + 1) * args.average
    seconds = seconds_for(model, diffusion, len(originals), size, calls, MAX_PICTURES)
    print(f"cost: {len(originals)} picture{'s' * (len(originals) > 1)}, "
          f"{calls} calls of the model for each, about {format_seconds(seconds)} here", flush=True)

    given = operator.measure(originals)
    answers = []
    with tqdm(total=calls, desc=args.task, unit="call") as bar:
        for k in range(args.average):
            answers.append(solve(
                model, diffusion, given, operator, originals.shape, steps=args.steps,
                travel=args.travel, eta=args.eta, seed=args.seed, first_index=k * MAX_PICTURES,
                y=y, device=device, progress=bar.update))
    ours = torch.stack(answers).mean(0).clamp(-1, 1)
    plain = operator.plain(given)
    # The plain answer to most tasks is what was given; of blocks it is a bicubic enlargement.
    answer = "the model" if args.average == 1 else f"mean of {args.average}\nanswers"
    rows = {"original": originals, "given": plain, answer: ours}
    if args.task == "upscale":
        rows = {"original": originals, "given": operator.back(given), "bicubic": plain,
                answer: ours}
    count = min(len(originals), 8)
    likenesses = [""] * count
    if args.label != "none":
        print("no PSNR, as --label may ask for something else than the originals are")
    else:
        found = ", ".join(f"{' '.join(name.split())} {psnr(pictures, originals):.2f} dB"
                          for name, pictures in rows.items() if name != "original")
        print(f"PSNR, likeness to the originals: {found}"
              + "; but other colours may be as right" * (args.task == "colourise"))
        if psnr(ours, originals) < psnr(plain, originals):
            print("That is less than what was given has: where several answers fit, a wrong one "
                  "is farther off than none, and one bad picture weighs much in the mean. "
                  "The mean of several answers is nearer, and blurred: --average 8")
        likenesses = ["{:.0f} → {:.0f} dB".format(
            *(psnr(pictures[k:k + 1], originals[k:k + 1]) for pictures in (plain, ours)))
            for k in range(count)]

    save_strip([pictures[:count].cpu() for pictures in rows.values()], likenesses,
               output_dir / "edited.png", row_labels=list(rows),
               title="PSNR before and after" if any(likenesses) else None)
    save_images(ours.cpu(), output_dir / "edited_only.png",
                note={"made_from": f"{args.task} of real pictures"})
    more = count < len(originals)
    print(f"wrote {output_dir / 'edited.png'}" + f", the first {count}" * more
          + f"\nwrote {output_dir / 'edited_only.png'}" + ", all of the answers" * more)


if __name__ == "__main__":
    main()
