"""Make new pictures from noise with a trained model.

    python sample.py                          # 64 images, by DDIM in 50 steps unless the model says
                                              # otherwise: shipped ones do, and those of two presets
    python sample.py --show_intermediate      # also how they came out of the noise
    python sample.py --sampler dpmpp_2m       # 10 steps
    python sample.py --sampler ddpm           # the paper's full chain, about 20 times longer

Writes outputs/generated_samples.png; with --show_intermediate also generation_strip.png,
generation.gif and generation_frames/. The PNG tells how it was made, and --recreate makes it again.
"""

import math
import re
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from command_line import (Parser, command, format_seconds, make_output_dir, positive_int,
                          seed_number, spare, whole_number)
from data import keep_apart_from_own
from diffusion import guidance_at, seeded_noise
from drawing import add_drawing_flags, choose_labels, take_guidance, take_sampler, weak_beside
from files import write_file
from images import (PADDING, enlargement, image_grid, png_bytes, save_gif, save_images, save_strip,
                    to_uint8)
from load import CHECKPOINT_HELP, find_by_digest, find_model, load_model, load_weak
from recipe import MAX_IMAGES, OPTIONAL, compare, make_note, note_flags, read_recipe
from utils import PRECISIONS, autocast, describe_device, get_device, get_precision, measure

MAX_SHEET = 80_000_000  # pixels: more, and PIL warns of a bomb when it is read


@torch.no_grad()
def generate(model, diffusion, num_images=64, image_size=28, *, seed=0, sampler="ddim", steps=None,
             eta=None, spacing=None, y=None, guidance=1.0, guidance_interval=None, weak=None,
             first_index=0, batch_size=64, device="cpu", precision=torch.float32,
             keep=(), begin=None, x_T=None):
    """Make images first_index, first_index + 1, ... of a seed, batch by batch, with a progress bar.

    y: [num_images] classes, -1 for none (as without it).
    guidance: 1 follows the class, more pushes towards it at twice the cost; or away from `weak`, a
    worse model; and that at all levels or in guidance_interval (low, high).
    keep: which moments of the first batch to keep, by the number of steps taken; see moments.
    begin: (x_0, last_steps) to noise these images, [num_images, C, H, W], and take only the last so
    many steps (SDEdit, Meng et al. 2022).
    x_T: begin with these noises, [num_images, C, H, W], in place of the seed's.
    Returns (images [num_images, C, H, W] in [-1, 1], frames). frames lists the moments of `keep` as
    (t, x_t, x_0 estimate made from x_t); if any, the finished pictures stand last, with t = -1.
    """
    images, frames = [], []
    shape = (model.image_channels, image_size, image_size)
    firsts = range(first_index, first_index + num_images, batch_size)
    way = dict(sampler=sampler, steps=steps, spacing=spacing, last_steps=begin and begin[1])
    settings = dict(way, eta=eta, seed=seed,
                    guidance=guidance, guidance_interval=guidance_interval, weak=weak)
    levels = diffusion.sampling_levels(**way)
    count = len(levels) - 1
    with (tqdm(total=len(firsts) * count, desc="sampling", unit="step") as bar,
          autocast(device, precision)):
        for first in firsts:
            indices = range(first, min(first + batch_size, first_index + num_images))
            x_t, t = (seeded_noise(seed, indices, 0, shape) if x_T is None
                      else x_T[first - first_index:][:batch_size]).to(device), levels[0]
            if begin:
                x_0 = begin[0][first - first_index:][:batch_size].to(device)
                x_t, _ = diffusion.forward_diffusion(
                    x_0, torch.full((len(x_0),), t, device=device), x_t)
            path = diffusion.trajectory(
                model, x_t, first_index=first, **settings,
                y=None if y is None else y[first - first_index:][:batch_size].to(device))
            for k, (t_next, x_next, x_0) in enumerate(path):
                if first == first_index and k in keep:
                    frames.append((t, x_t, x_0))
                t, x_t = t_next, x_next
                bar.update()
            if first == first_index and len(keep):
                frames.append((t, x_t, x_t))
            images.append(x_t)
    return torch.cat(images), frames


def moments(steps, most):
    """Up to `most` numbers of steps taken, evenly spread from 0, pure noise, to all `steps`."""
    return torch.linspace(0, steps, min(most, steps + 1)).round().int().tolist()


def drawing_words(guidance, interval=None, eta=None, spacing=None):
    """A phrase for the line that tells the cost: spacing, eta and guidance, where they are not the
    usual."""
    where = " at t = {} to {}".format(*interval) if interval else ""
    return ((f", {spacing} levels" if spacing not in (None, "uniform") else "")
            + (f", eta {eta:g}" if eta is not None else "")
            + (f", guidance {guidance:g}{where}" if guidance != 1 else ""))


def model_calls(levels, guidance=1.0, interval=None):
    """How often sampling down `levels` asks (the model, what guidance leads away from: a weak one,
    or the same without a class). Guidance 1 asks the one alone, 0 the other."""
    strengths = [guidance_at(t, guidance, interval) for t in levels[:-1]]
    return sum(g != 0 for g in strengths), sum(g != 1 for g in strengths)


def calls_in_words(calls, weak_calls, weak):
    """What model_calls counts.  weak: the weak model, if there is one."""
    return (f"{calls} calls of the model and {weak_calls} of the weak one" if weak else
            f"{calls + weak_calls} calls of the model")


def seconds_for(model, diffusion, num_images, image_size, calls, batch_size=64,
                precision=torch.float32, weak=None, weak_calls=0):
    """How long sampling will take here, from timing one call of the model, and of a weak one."""
    device = next(model.parameters()).device
    x_T = torch.zeros(min(batch_size, num_images), model.image_channels, image_size, image_size,
                      device=device)

    def one_call(network):
        with autocast(device, precision):
            return measure(lambda: diffusion.sample(network, x_T=x_T, sampler="ddim", steps=1),
                           device)

    if weak is None:
        seconds = (calls + weak_calls) * one_call(model)
    else:
        seconds = calls * one_call(model) + weak_calls * one_call(weak)
    return seconds * num_images / len(x_T)


# ---- The way out of the noise, as pictures

def level_name(t):
    return f"t = {t}" if t >= 0 else "finished"


def save_generation_strip(frames, path, num_images=3, num_columns=11, title=None):
    """For a few images, x_t above and the x_0 estimated from it below; timesteps over columns."""
    picks = torch.linspace(0, len(frames) - 1, min(num_columns, len(frames))).round().int().tolist()
    columns = [frames[k] for k in picks]
    rows, labels = [], []
    for i in range(min(num_images, len(frames[0][1]))):
        rows.append(torch.stack([x_t[i] for _, x_t, _ in columns]))
        rows.append(torch.stack([x_0[i] for _, _, x_0 in columns]))
        labels += ["$x_t$", r"guess of $x_0$"]
    save_strip(rows, [level_name(t) for t, _, _ in columns], path, row_labels=labels, title=title)


def draw_frame(t, x_t, x_0, num_images=16, height=360):
    """A frame of the animation, a PIL image: x_t at the left, the estimate of x_0 at the right."""
    left, right = (image_grid(to_uint8(x[:num_images])) for x in (x_t, x_0))
    scale = max(1, height // left.shape[0])
    title, gap = 28, 12
    width, height = left.shape[1] * scale, left.shape[0] * scale
    frame = Image.new("RGB", (2 * width + gap, height + title), "white")
    draw = ImageDraw.Draw(frame)
    name = f"x_t at {level_name(t)}" if t >= 0 else "finished"
    for x, pixels, text in ((0, left, name), (width + gap, right, "guess of x_0")):
        panel = Image.fromarray(pixels.numpy()).resize((width, height), Image.NEAREST)
        frame.paste(panel, (x, title))
        draw.text((x + 4, 6), text, fill="black", font_size=15)
    return frame


FRAME = re.compile(r"frame_\d{3}_(t\d{3,}|finished)\.png")


def save_intermediate(frames, output_dir):
    """Write the strip, the GIF and the single frames. Returns the paths, the strip first."""
    strip, gif = output_dir / "generation_strip.png", output_dir / "generation.gif"
    folder = make_output_dir(output_dir / "generation_frames")
    for old in folder.glob("frame_*.png"):              # a longer run may have left more of them
        if FRAME.fullmatch(old.name):
            old.unlink()
    save_generation_strip(frames, strip)
    pictures = [draw_frame(*frame) for frame in frames]
    for k, ((t, _, _), picture) in enumerate(zip(frames, pictures)):
        name = f"t{t:03d}" if t >= 0 else "finished"
        write_file(folder / f"frame_{k:03d}_{name}.png", png_bytes(picture))
    save_gif(pictures, gif)
    return [strip, gif, folder]


# ---- The command

def parse(argv):
    """(the settings, what the picture of --recreate tells of its making or None). Its settings win
    over typed flags."""
    parser = Parser(description="Make new pictures from noise with a trained model.")
    add = parser.add
    add("--checkpoint", CHECKPOINT_HELP)
    add("--dataset", "draw with the shipped weights of this data set", metavar="NAME")
    add("--num_images", "how many", 64, type=positive_int)
    add("--first_index", "begin with this image of the seed", 0, type=whole_number)
    add("--seed", "image i of a seed is always the same (train.py looks at seed 0)", 42,
        type=seed_number)
    add("--label", "the class to draw, as a number or name; several with commas, or all: "
        "rows of pictures for each; none: without a class. "
        "Default: each class in turn, if the model knows any")
    add_drawing_flags(add)
    add("--show_intermediate",
        "also write the way from noise to picture: a strip, a GIF and single frames",
        False, action="store_true")
    add("--upscale",
        "show every pixel as so many by so many; default: small images at least 84 wide",
        type=positive_int)
    add("--single_images",
        "also write each image to a file of its own, in the folder generated_samples",
        False, action="store_true")
    add("--recreate", "make this picture again as recreated.png in --output_dir: its own settings "
        "go before all other flags; --checkpoint is found by itself if it is "
        "outputs/model_final.pt, lies beside the picture or is shipped", metavar="PNG")
    add("--batch_size", "images at a time", 64, type=positive_int)
    add("--output_dir", "where the pictures go", "outputs")
    add("--device")
    add("--precision", "bf16 is faster on some devices and changes the pictures a little",
        "float32", choices=list(PRECISIONS))
    args = parser.parse_args(argv)
    if args.num_images > MAX_IMAGES:
        raise ValueError(f"--num_images {args.num_images}: at most {MAX_IMAGES}")
    again = read_recipe(args.recreate) if args.recreate else None
    if again:
        args = parser.parse_args([*(sys.argv[1:] if argv is None else argv), *note_flags(again)])
        for name in ("label", "upscale", *OPTIONAL):                # what the picture does not have
            if again.get(name) is None:
                setattr(args, name, None)
    if again and args.single_images:
        raise ValueError("--recreate makes one picture again, and --single_images many: "
                         "give one of them")
    if args.dataset and args.checkpoint:
        raise ValueError(f"--checkpoint {args.checkpoint} and --dataset {args.dataset}: "
                         "give one of them")
    return args, again


def check_sheet(count, columns, size, upscale):
    """Raise ValueError for a sheet of `count` images that no viewer would open."""
    across = columns or math.ceil(math.sqrt(count))
    cells = across * math.ceil(count / across)
    pixels = cells * ((size + PADDING) * (upscale or enlargement(size))) ** 2
    if pixels > MAX_SHEET:
        raise ValueError(f"a sheet of {pixels / 1e6:.0f} million pixels; at most "
                         f"{MAX_SHEET / 1e6:.0f} million: lower --num_images or --upscale")


def save_again(images, picture, columns, args, note, again, reference):
    """Write what --recreate drew; say whether it is the same.  reference: the picture's bytes."""
    one = again.get("picture")
    if one is None:
        save_images(images, picture, columns, upscale=args.upscale, note=note)
    elif one < len(images):
        save_images(images[one:one + 1], picture, padding=0, upscale=args.upscale,
                    note={**note, "picture": one})
    else:
        raise ValueError(f"{args.recreate} says that it is picture {one} of {len(images)}")
    print(f"wrote {picture}")
    verdict = compare(picture, reference, note, again)
    print(f"beside {args.recreate}: {verdict}")
    if verdict.startswith("NOT"):
        sys.exit(1)


def made_with_weak(picture, again):
    return (f"{picture} was made with --weak and the checkpoint of digest "
            f"{str(again['weak'])[:12]}...: name it, beside --checkpoint")


def save_singly(images, folder, args, note):
    """Each image as a file of its own, named by its number in the seed."""
    for k, image in enumerate(images):
        save_images(image[None], folder / f"{args.first_index + k:04d}.png", padding=0,
                    upscale=args.upscale, note={**note, "picture": k})
    others = len(list(folder.iterdir())) - len(images)
    print(f"wrote {folder}, {len(images)} images"
          + f"; {others} other files lie there" * (others > 0))


@command
def main(argv=None):
    args, again = parse(argv)
    picture = Path(args.output_dir) / ("recreated.png" if again else "generated_samples.png")
    if again:
        reference = Path(args.recreate).read_bytes()
        spare([args.recreate], picture)
        torch.set_num_threads(again["threads"])     # another number takes sums in another order
    device = get_device(args.device)
    if again and not args.checkpoint and not args.dataset:
        args.checkpoint = find_by_digest(again["weights"], Path(args.recreate).parent)
    else:
        args.checkpoint = find_model(args.checkpoint, args.dataset)
    model, diffusion, data = load_model(args.checkpoint, device, image_size=args.image_size)
    keep_apart_from_own(data, args.output_dir)  # before a folder is made: it would count as a class
    output_dir = make_output_dir(args.output_dir, picture.name,
                                 "generation_strip.png", "generation.gif")
    if args.single_images:
        make_output_dir(output_dir / "generated_samples")
    if args.show_intermediate:
        make_output_dir(output_dir / "generation_frames")
    if again and again["weights"] != data["digest"]:
        raise ValueError(f"{args.recreate} was not made with {args.checkpoint}, but with weights "
                         f"of digest {str(again['weights'])[:12]}..., "
                         f"not {data['digest'][:12]}...")
    size = data["image_size"]
    if again and "weak" in again and not args.weak:
        args.weak = weak_beside(args.checkpoint, data)
        if not args.weak:
            raise ValueError(made_with_weak(args.recreate, again))
    take_sampler(args, data)
    take_guidance(args, data, diffusion)
    y, columns = choose_labels(args.label, data["classes"], args.num_images, args.first_index)
    count = args.num_images if y is None else len(y)
    check_sheet(count, columns, size, args.upscale)
    weak, weak_digest = load_weak(args.weak, model, diffusion, data, device, args.image_size)
    if again and again.get("weak") != weak_digest:
        raise ValueError(f"{args.recreate} was made without --weak" if "weak" not in again else
                         made_with_weak(args.recreate, again))
    note = make_note(args, diffusion, data["digest"], device)
    if weak_digest:
        note["weak"] = weak_digest
    precision, precision_reason = get_precision(args.precision, device)
    print(f"device: {describe_device(device, args.device)}; precision: {precision_reason}")
    print(f"model: {args.checkpoint}, trained on {data['name']!r} ({size}x{size})"
          + ("" if not weak else f", and led away from {args.weak}, a weaker model"
             if args.guidance else f"; drawn by {args.weak} alone"))
    levels = diffusion.sampling_levels(args.sampler, args.steps, args.spacing)
    calls, weak_calls = model_calls(levels, args.guidance, args.guidance_interval)
    seconds = seconds_for(model, diffusion, count, size, calls, args.batch_size, precision, weak,
                          weak_calls)
    print(f"cost: {count} images in {len(levels) - 1} steps of {args.sampler}"
          + drawing_words(args.guidance, args.guidance_interval, args.eta, args.spacing)
          + f", {calls_in_words(calls, weak_calls, weak)}, about {format_seconds(seconds)} here"
          + ", and some seconds more to draw the way" * args.show_intermediate, flush=True)

    images, frames = generate(
        model, diffusion, count, size, seed=args.seed, sampler=args.sampler, steps=args.steps,
        eta=args.eta, spacing=args.spacing, y=y, guidance=args.guidance,
        guidance_interval=args.guidance_interval, weak=weak, first_index=args.first_index,
        batch_size=args.batch_size, device=device, precision=precision,
        keep=moments(len(levels) - 1, 51) if args.show_intermediate else ())
    if again:
        save_again(images, picture, columns, args, note, again, reference)
    else:
        save_images(images, picture, columns, upscale=args.upscale, note=note)
        print(f"wrote {picture}")
        if args.single_images:
            save_singly(images, output_dir / "generated_samples", args, note)
    if frames:
        for path in save_intermediate(frames, output_dir):
            print(f"wrote {path}")


if __name__ == "__main__":
    main()
