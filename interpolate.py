"""Walk from one picture to another through the noise they come from.

    python interpolate.py                            # seeds 42 and 123, 20 frames, as a GIF
    python interpolate.py --seeds 1 2 3 4 --loop     # through several, and back to the first
    python interpolate.py --images shoe.png bag.png  # between real pictures: DDIM finds their noise
    python interpolate.py --compare                  # lerp and slerp, one above the other

Writes outputs/morph.gif, and all frames in rows as morph.png; with --compare lerp_slerp.png.
"""

import math
from pathlib import Path

import torch
from PIL import Image

from command_line import (Parser, command, format_seconds, make_output_dir, positive_float,
                          positive_int, seed_number, spare)
from diffusion import evaluating, seeded_noise
from drawing import choose_one_label
from folders import load_pictures
from images import save_gif, save_images, save_strip, to_uint8
from load import CHECKPOINT_HELP, open_model
from measures import psnr
from sample import generate, seconds_for
from utils import get_device


def lerp(a, b, share):
    """The straight line from a to b. Halfway between two noises it has only 0.71 of their length,
    and the model has never seen so little noise: the picture pales."""
    return (1 - share) * a + share * b


def slerp(a, b, share):
    """The arc from a to b, which keeps the length (Shoemake 1985; Song et al. 2021, section 5.3).

    a, b: tensors of any shape, each taken as one vector.
    """
    cosine = (a * b).sum() / (a.norm() * b.norm())
    angle = torch.arccos(cosine.clamp(-1, 1))
    if angle.sin().abs() < 1e-4:                        # the same direction, or the opposite one
        return lerp(a, b, share)
    return (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / angle.sin()


SEEDS = [42, 123]
MAX_GIF = 1_000_000_000  # pixels, three bytes each while it is made
MAX_FRAMES = 10_000
COMPARED = 9  # frames in a row
GUESSES = 3  # calls of the model in each step to the noise
POOR = 20  # dB: below it a picture that went to its noise and back is another one to the eye
PATHS = {"lerp": lerp, "slerp": slerp}


def walk(keys, num_frames, path=slerp, loop=False):
    """Noises on the way through the key frames. keys: [K, C, H, W], K >= 2.

    Returns [num_frames, C, H, W], evenly spread, except that the frame nearest to a key is that
    key. Raises ValueError for fewer frames than keys.
    """
    if num_frames < len(keys):
        raise ValueError(f"{len(keys)} key frames need as many frames, got {num_frames}")
    stops = [*keys, keys[0]] if loop else list(keys)
    places = torch.linspace(0, len(stops) - 1, num_frames + loop)[:num_frames].tolist()
    for key in range(len(keys)):
        places[round(key * (num_frames + loop - 1) / (len(stops) - 1))] = float(key)
    legs = [min(int(place), len(stops) - 2) for place in places]
    return torch.stack([path(stops[leg], stops[leg + 1], place - leg)
                        for leg, place in zip(legs, places)])


@torch.no_grad()
def invert(diffusion, model, x_0, *, steps=None, y=None, guesses=GUESSES):
    """The noise that DDIM turns into these images: its steps, taken backwards.

    A step from t to t_prev uses the model's answer at t, which is not known yet on the way
    back; so it is guessed from x at t_prev, and the guess improved by asking again, `guesses`
    times in all (each is a call of the model). Going down again returns x_0, but for rounding,
    for what a guess still lacks, and for what was beyond [-1, 1] in an estimate on the way.

    x_0: [B, C, H, W] in [-1, 1].  Returns x_T, [B, C, H, W].
    """
    levels = diffusion.sampling_levels("ddim", steps)
    x = x_0.to(torch.promote_types(x_0.dtype, torch.float32))
    with evaluating(model):
        for t, t_prev in reversed(list(zip(levels, levels[1:]))):
            ab_t, ab_prev = diffusion.alpha_bar_at(t), diffusion.alpha_bar_at(t_prev)
            x_t = x
            for _ in range(guesses):
                eps = diffusion.predict_noise(model, x_t, t, y)
                clean = (x - math.sqrt(1 - ab_prev) * eps) / math.sqrt(ab_prev)
                x_t = math.sqrt(ab_t) * clean + math.sqrt(1 - ab_t) * eps
            x = x_t
    return x


def parse(argv):
    parser = Parser(
        description="Walk from one picture to another through the noise they come from.")
    add = parser.add
    add("--checkpoint", CHECKPOINT_HELP)
    add("--seeds", f"a key frame for each (default: {SEEDS[0]} {SEEDS[1]})",
        type=seed_number, nargs="+")
    add("--images", "key frames from these picture files instead of seeds, two or more: "
        "cut to the central square and to the model's size", nargs="+", metavar="FILE")
    add("--path", "the way from noise to noise", "slerp", choices=list(PATHS))
    add("--compare", "draw lerp and slerp, one above the other, instead of a GIF",
        False, action="store_true")
    add("--label", "the class to draw, as a number or name", "none")
    add("--frames", "how many pictures on the way", 20, type=positive_int)
    add("--fps", "frames a second", 8.0, type=positive_float)
    add("--size", "height and width of the GIF in pixels", 256, type=positive_int)
    add("--loop", "go back to the first key frame at the end", False, action="store_true")
    add("--steps", "model calls for a picture; default: 50, or T if that is less",
        type=positive_int)
    add("--output_dir", "where the pictures go", "outputs")
    add("--device")
    args = parser.parse_args(argv)
    if args.compare:
        parser.refuse({"path", "loop", "fps", "size"},
                      "--compare, which draws both ways and no GIF")
        if args.frames > COMPARED and "frames" in parser.typed:
            raise ValueError(f"--frames {args.frames}: "
                             f"--compare draws {COMPARED} at most, side by side")
    if args.images and args.seeds:
        raise ValueError("--images and --seeds: give one of them")
    args.seeds = args.seeds or SEEDS
    keys = args.images or args.seeds
    if len(keys) < 2 or args.frames < 2:
        raise ValueError(f"a walk needs at least two key frames and two frames, got {len(keys)} "
                         f"and {args.frames}")
    if args.frames < len(keys) or args.compare and len(keys) != 2:
        raise ValueError(f"{len(keys)} key frames need as many frames, "
                         "and --compare draws between two")
    if (not 16 <= args.size <= 4096 or args.frames > MAX_FRAMES
            or args.frames * args.size**2 > MAX_GIF or not 0.1 <= args.fps <= 50):
        raise ValueError(f"16 to 4096 pixels, {MAX_FRAMES} frames at most, "
                         f"{MAX_GIF / 1e6:.0f} million pixels in all of them, "
                         "and 0.1 to 50 frames a second; "
                         f"got {args.size}, {args.frames} frames and {args.fps:g}")
    return args


@command
def main(argv=None):
    args = parse(argv)
    spare(args.images or [],
          *(Path(args.output_dir) / name for name in ("morph.png", "lerp_slerp.png")))
    device = get_device(args.device)
    checkpoint, model, diffusion, data = open_model(args, device)
    output_dir = make_output_dir(args.output_dir, "morph.gif", "morph.png", "lerp_slerp.png")
    size = data["image_size"]
    y = choose_one_label(args.label, data["classes"])
    args.steps = len(diffusion.sampling_levels("ddim", args.steps)) - 1     # refuses too many
    count = 2 * min(args.frames, COMPARED) if args.compare else args.frames
    there_and_back = (GUESSES + 1) * len(args.images or [])
    seconds = seconds_for(model, diffusion, count + there_and_back, size, args.steps)
    print(f"cost: {count} pictures" + f" of class {args.label}" * (args.label != "none")
          + f", {args.steps} calls of the model for each, "
          + f"and {GUESSES + 1} times as many for each of yours, " * bool(args.images)
          + f"about {format_seconds(seconds)} here", flush=True)
    shape = (model.image_channels, size, size)

    def draw(noises):
        return generate(model, diffusion, len(noises), size, x_T=noises, steps=args.steps,
                        y=None if y is None else y.expand(len(noises)), device=device)[0]

    if args.images:
        real = load_pictures(args.images, size, model.image_channels).to(device)
        noises = torch.cat([invert(diffusion, model, part, steps=args.steps,
                                   y=None if y is None else y.expand(len(part)).to(device))
                            for part in real.split(64)])        # as many at a time as generate
        likeness = psnr(draw(noises), real)
        print(f"to their noise and back: PSNR {likeness:.1f} dB; " + (
            "more --steps lose less" if likeness >= POOR else
            f"more --steps lose less; if the walk still begins at another picture, {checkpoint} "
            "does not know pictures of that kind well enough"))
    else:
        noises = torch.cat([seeded_noise(seed, [0], 0, shape) for seed in args.seeds]).to(device)

    if args.compare:
        shares = torch.linspace(0, 1, min(args.frames, COMPARED)).tolist()
        rows = [draw(torch.stack([path(*noises, share) for share in shares]))
                for path in PATHS.values()]
        picture = output_dir / "lerp_slerp.png"
        save_strip(rows, [f"{share:.3g}" for share in shares], picture, row_labels=list(PATHS),
                   title="from one noise to another: the share of the second")
        print(f"wrote {picture}")
        return
    pictures = draw(walk(noises, args.frames, PATHS[args.path], args.loop))
    frames = [Image.fromarray(picture.permute(1, 2, 0).expand(-1, -1, 3).numpy()).resize(
        (args.size, args.size), Image.NEAREST) for picture in to_uint8(pictures)]
    seconds = 1 / args.fps
    save_gif(frames, output_dir / "morph.gif", seconds, seconds if args.loop else 2.0)
    save_images(pictures, output_dir / "morph.png")
    for name in ("morph.gif", "morph.png"):
        print(f"wrote {output_dir / name}")
    print(f"{len(frames)} frames, {args.fps:g} a second"
          + ", and a rest of 2 s on the last" * (not args.loop))


if __name__ == "__main__":
    main()
