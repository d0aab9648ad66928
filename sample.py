"""Make new pictures from noise with a trained model.

    python sample.py                                      # 64 images; DDIM in 50 steps for a model of your own
    python sample.py --show_intermediate                  # also how they came out of the noise
    python sample.py --sampler dpmpp_2m                   # 10 steps
    python sample.py --sampler ddpm                       # the paper's full chain, about 20 times longer

Writes outputs/generated_samples.png; with --show_intermediate also generation_strip.png, generation.gif
and generation_frames/. The PNG tells how it was made, and --recreate makes it again.
"""

import contextlib
import math
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

import interop
from checkpoint import (check_weights, drawing_digest, load_checkpoint, read_container, told_of,
                        whole_precision)
from command_line import (Parser, command, format_seconds, fraction, guidance_number, interval, make_output_dir,
                          positive_int, seed_number, spare, whole_number)
from diffusion import SAMPLERS, DiffusionProcess, model_calls, seeded_noise
from images import image_grid, png_bytes, save_gif, save_images, save_strip, to_uint8
from models import create_model
from recipe import as_flags, compare, make_note, read_recipe
from schedules import SPACINGS
from utils import PRECISIONS, describe_device, get_device, get_precision, measure, write_file

MAX_IMAGE_SIZE = 4096  # a checkpoint may not claim more
PRETRAINED = Path(__file__).resolve().parent / "pretrained"
OWN = "outputs/model_final.pt"
MAX_SHEET = 80_000_000  # pixels: more, and PIL warns of a bomb when it is read
WEAK_GUIDANCE, WEAK_FROM = 3.0, 0.3  # by --weak, at the noisier levels: from this share of T on
CHECKPOINT_HELP = f"a file written by train.py; default: {OWN}, or shipped weights as long as there is none"


def find_model(checkpoint=None, dataset=None, made_with=None):
    """The path of the weights to draw from: your own, or as long as there are none those that are shipped.

    checkpoint: a file, or None for OWN.  dataset: take the shipped weights of this data set.
    made_with: where neither is named, take those of this digest.
    Raises ValueError where there is nothing.
    """
    shipped = sorted(path.stem for path in PRETRAINED.glob("*.pt") if not path.stem.startswith("classifier"))
    if made_with is not None and checkpoint is None and dataset is None:
        own = [Path(OWN)] * Path(OWN).exists()
        for path in [*own, *(PRETRAINED / f"{name}.pt" for name in shipped)]:
            with contextlib.suppress(ValueError):                      # a damaged file is not the one
                if load_model(path)[2]["digest"] == made_with:
                    return path
        raise ValueError(f"neither {OWN} nor shipped weights made that picture: name with --checkpoint what did")
    if dataset is not None:
        if dataset not in shipped:
            raise ValueError(f"no weights are shipped for {dataset!r}; choose from {', '.join(shipped)}, or "
                             f"train your own with python train.py --dataset {dataset}")
        return PRETRAINED / f"{dataset}.pt"
    if checkpoint is None and not Path(OWN).exists() and "mnist" in shipped:
        print(f"no {OWN} yet: taking the weights that are shipped, pretrained/mnist.pt")
        return PRETRAINED / "mnist.pt"
    checkpoint = checkpoint or OWN
    if not Path(checkpoint).exists():
        raise ValueError(f"no checkpoint at {checkpoint}; make one with python train.py, or name one "
                         "with --checkpoint (model_latest.pt is that of a run that was stopped)")
    return checkpoint


def load_model(path, device="cpu", ema=True, image_size=None):
    """A model ready to sample from, out of a checkpoint alone.

    ema: take the averaged weights (better pictures), not those of the last step.
    image_size: of a foreign checkpoint that does not tell it (interop.py).
    Returns (model in eval mode, DiffusionProcess, what the checkpoint says about its data: a dict with
    name, image_size, channels, classes, a digest of what it draws with, and the sampler, steps and guidance to
    take where none are named: see card_recipe). Raises FileNotFoundError, or ValueError for an unusable file.
    """
    entries = None if Path(path).is_dir() else read_container(path)
    if entries is None or interop.is_trainer(entries):
        model, diffusion, data = interop.load_foreign(path, entries, image_size)
        return model.to(device), diffusion, {**data, **card_recipe(None, diffusion.num_timesteps)}
    if image_size:
        raise ValueError(f"--image_size {image_size}: {path} tells its own")
    entries = load_checkpoint(path, entries)
    try:
        # On "meta" a network has shapes but no memory, so a config that does not match its weights
        # (or asks for a monstrous network) fails here at no cost.
        with torch.device("meta"):
            model = create_model(entries["model_name"], **entries["model_config"])
        weights = whole_precision(entries["ema" if ema else "model"])
        check_weights(path, weights, model)
        model.load_state_dict(weights, assign=True)
        diffusion = DiffusionProcess(**entries["diffusion_config"])
        data = {"classes": None, **entries["data"], "digest": drawing_digest(entries),
                **{name: told_of(entries).get(name) for name in ("images", "held_out")},
                "started_from": told_of(entries, "started_from"),
                **card_recipe(entries.get("card"), diffusion.num_timesteps)}
        if not all(value.isfinite().all() for value in weights.values()):
            raise ValueError("not all weights are finite numbers")
        if type(data["image_size"]) is not int or not 4 <= data["image_size"] <= MAX_IMAGE_SIZE:
            raise ValueError(f"image_size {data['image_size']!r}")
        data["name"] = str(data["name"])
        data["classes"] = [str(name) for name in data["classes"]] if model.num_classes else None
        if model.num_classes and len(data["classes"]) != model.num_classes:
            raise ValueError(f"{len(data['classes'])} names for {model.num_classes} classes")
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: its weights and settings do not fit together ({reason})") from error
    return model.to(device).eval().requires_grad_(False), diffusion, data


def card_recipe(card, T):
    """{sampler, steps or None, guidance, guidance_interval or None, weak or None} with which a model was
    measured, as its card (export.py) tells; weak is the name of a file beside it. Where the card does not tell:
    ddim, its own number of steps, and the class followed plainly."""
    card = card if isinstance(card, dict) else {}
    sampler, steps, guidance, weak = map(card.get, ("sampler", "sampler_steps", "guidance", "weak"))
    if not isinstance(sampler, str) or sampler not in SAMPLERS:
        sampler, steps = "ddim", None
    levels = card.get("guidance_interval")
    known = isinstance(levels, (list, tuple)) and [type(level) for level in levels] == [int, int]
    return {"guidance_interval": tuple(levels) if known else None,
            "sampler": sampler, "steps": steps if type(steps) is int and 1 <= steps <= T else None,
            "guidance": float(guidance) if type(guidance) in (int, float) and 0 <= guidance <= 100 else 1.0,
            # Never a path: only what lies beside.
            "weak": weak if isinstance(weak, str) and weak and weak == Path(weak).name else None}


def fill_in(args, data, T):
    """Take the model's own sampler, steps, guidance and weak model where the command line names none.
    ValueError for guidance towards nothing."""
    if args.sampler is None:
        args.sampler, args.steps = data["sampler"], args.steps or data["steps"]
    guided = data["classes"] and args.label != "none"
    as_measured = guided and not args.weak
    if data["weak"] and not args.weak and args.guidance != 1:
        beside = Path(args.checkpoint).parent / data["weak"]
        as_measured = beside.is_file()
        if as_measured:
            args.weak = str(beside)
        else:
            print(f"{args.checkpoint} was measured with --weak {beside}, and there is no such file: "
                  "drawing without")
    if args.guidance is None:
        args.guidance, levels = 1.0, None
        if as_measured:
            args.guidance, levels = data["guidance"], data["guidance_interval"]
        elif args.weak:
            args.guidance, levels = WEAK_GUIDANCE, (round(WEAK_FROM * T), T)
        if args.guidance not in (0, 1):
            args.guidance_interval = args.guidance_interval or levels
    elif args.guidance not in (0, 1) and not guided and not args.weak:
        raise ValueError(f"--guidance {args.guidance:g} needs classes to guide towards, or a --weak model: "
                         + ("--label none has none" if data["classes"] else "the model was trained without"))
    if args.guidance_interval and args.guidance in (0, 1):
        raise ValueError(f"--guidance_interval says where guidance acts, and --guidance {args.guidance:g} is none")


def load_weak(path, model, diffusion, own, device="cpu", image_size=None):
    """(the model of --weak, its digest), or (None, None) without one. own: what the model's checkpoint says of its
    data. Raises ValueError for a model of other images or another process."""
    if path is None:
        return None, None
    weak, process, data = load_model(path, device, image_size=image_size)
    same = (weak.image_channels, process.objective) == (model.image_channels, diffusion.objective)
    facts = [(told["image_size"], told["classes"], told.get("images")) for told in (own, data)]
    if not same or facts[0] != facts[1] or not torch.equal(process.alpha_bar, diffusion.alpha_bar):
        raise ValueError(f"--weak {path} was trained on other images, or with another schedule or objective")
    return weak, data["digest"]


@torch.no_grad()
def generate(model, diffusion, num_images=64, image_size=28, *, seed=0, sampler="ddim", steps=None,
             eta=None, spacing=None, y=None, guidance=1.0, guidance_interval=None, weak=None, first_index=0,
             batch_size=64, device="cpu", precision=torch.float32, num_frames=0):
    """Make images first_index, first_index + 1, ... of a seed, batch by batch, with a progress bar.

    y: [num_images] classes, -1 for none (as without it).
    guidance: 1 follows the class, more pushes towards it at twice the cost; or away from `weak`, a worse model;
    and that at all levels or in guidance_interval (low, high).
    Returns (images [num_images, C, H, W] in [-1, 1], frames). frames is empty unless num_frames > 0:
    then it lists at most that many moments (t, x_t, x_0 estimate made from x_t) of the first batch,
    evenly spread from pure noise to the finished pictures, which stand last with t = -1.
    """
    images, frames = [], []
    shape = (model.image_channels, image_size, image_size)
    firsts = range(first_index, first_index + num_images, batch_size)
    settings = dict(sampler=sampler, steps=steps, eta=eta, spacing=spacing, seed=seed, guidance=guidance,
                    guidance_interval=guidance_interval, weak=weak)
    calls = len(diffusion.sampling_levels(sampler, steps)) - 1
    keep = set(torch.linspace(0, calls, min(num_frames, calls + 1)).round().int().tolist())
    with (tqdm(total=len(firsts) * calls, desc="sampling", unit="call") as bar,
          torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == torch.bfloat16)):
        for first in firsts:
            indices = range(first, min(first + batch_size, first_index + num_images))
            x_t = seeded_noise(seed, indices, 0, shape).to(device)
            t = diffusion.num_timesteps - 1
            path = diffusion.trajectory(model, x_t, first_index=first, **settings,
                                        y=None if y is None else y[first - first_index:][:batch_size].to(device))
            for k, (t_next, x_next, x_0) in enumerate(path):
                if first == first_index and k in keep:
                    frames.append((t, x_t, x_0))
                t, x_t = t_next, x_next
                bar.update()
            if first == first_index and num_frames:
                frames.append((t, x_t, x_t))
            images.append(x_t)
    return torch.cat(images), frames


def guidance_words(guidance, interval=None):
    """For the line that tells the cost."""
    where = " at t = {} to {}".format(*interval) if interval else ""
    return f", guidance {guidance:g}{where}" if guidance != 1 else ""


def seconds_for(model, diffusion, num_images, image_size, batch_size, calls, device, precision=torch.float32):
    """How long sampling will take here, from timing one call of the model."""
    x_T = torch.zeros(min(batch_size, num_images), model.image_channels, image_size, image_size,
                      device=device)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == torch.bfloat16):
        one_call = measure(lambda: diffusion.sample(model, x_T=x_T, sampler="ddim", steps=1), device)
    return one_call * calls * num_images / len(x_T)


def choose_labels(text, classes, num_images, first_index=0):
    """What --label asks for: (y [num_images] or None, columns of the grid or None). Several labels get full
    rows, as many each as make the grid nearest to a square, and so may need some images more.

    text: a number or name, several with commas, "all", "none", or None for the default.
    classes: the names of the classes, or None. Raises ValueError for a class that is not there.
    """
    if text is None or text == "none" and not classes:
        turns = torch.arange(first_index, first_index + num_images)
        return (turns % len(classes) if classes else None), None
    if not classes:
        raise ValueError(f"--label {text}: the model was trained without classes")
    if text == "none":
        return torch.full((num_images,), -1), None
    labels = []
    for word in [*map(str, range(len(classes)))] if text == "all" else text.split(","):
        word = word.strip()
        if word in classes:
            labels.append(classes.index(word))
        elif word.isdecimal() and int(word) < len(classes):
            labels.append(int(word))
        else:
            names = [f"{k} ({name})" if name != str(k) else name for k, name in enumerate(classes)]
            raise ValueError(f"unknown class {word!r}; choose from all, none, {', '.join(names)}")
    if len(labels) == 1:
        return torch.full((num_images,), labels[0]), None
    rows = max(1, round(num_images**0.5 / len(labels)))             # of each label
    columns = math.ceil(num_images / (rows * len(labels)))
    return torch.tensor(labels).repeat_interleave(rows * columns), columns


def thinned(y, count):
    """`count` of the labels that choose_labels gives, still as many of each, where no sheet needs full rows."""
    return None if y is None else y[torch.arange(count) * len(y) // count]


# ---- The way out of the noise, as pictures

def level_name(t):
    return f"t = {t}" if t >= 0 else "finished"


def save_generation_strip(frames, path, num_images=3, num_columns=11):
    """x_t above, the estimate of x_0 made from it below, for a few images; the timesteps over the columns."""
    picks = torch.linspace(0, len(frames) - 1, min(num_columns, len(frames))).round().int().tolist()
    columns = [frames[k] for k in picks]
    rows, labels = [], []
    for i in range(min(num_images, len(frames[0][1]))):
        rows.append(torch.stack([x_t[i] for _, x_t, _ in columns]))
        rows.append(torch.stack([x_0[i] for _, _, x_0 in columns]))
        labels += ["$x_t$", r"guess of $x_0$"]
    save_strip(rows, [level_name(t) for t, _, _ in columns], path, row_labels=labels)


def draw_frame(t, x_t, x_0, num_images=16, height=360):
    """One frame of the animation: x_t at the left, the estimate of x_0 at the right. A PIL image."""
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


def save_intermediate(frames, output_dir):
    """Write the strip, the GIF and the single frames. Returns the paths, the strip first."""
    strip, gif = output_dir / "generation_strip.png", output_dir / "generation.gif"
    folder = make_output_dir(output_dir / "generation_frames")
    for old in folder.glob("frame_[0-9][0-9][0-9]_*.png"):      # a longer run may have left more of them
        old.unlink()
    save_generation_strip(frames, strip)
    pictures = [draw_frame(*frame) for frame in frames]
    for k, ((t, _, _), picture) in enumerate(zip(frames, pictures)):
        name = f"t{t:03d}" if t >= 0 else "finished"
        write_file(folder / f"frame_{k:03d}_{name}.png", png_bytes(picture))
    save_gif(pictures, gif)
    return [strip, gif, folder]


@command
def main(argv=None):
    parser = Parser(description="Make new pictures from noise with a trained model.")
    add = parser.add
    add("--checkpoint", CHECKPOINT_HELP)
    add("--dataset", "draw with the shipped weights of this data set", metavar="NAME")
    add("--image_size", "in pixels, for a checkpoint of denoising-diffusion-pytorch: those do not tell it "
        f"(default: {interop.UNKNOWN_SIZE})", type=positive_int)
    add("--num_images", "how many", 64, type=positive_int)
    add("--first_index", "begin with this image of the seed", 0, type=whole_number)
    add("--seed", "image i of a seed is always the same (train.py looks at seed 0)", 42, type=seed_number)
    add("--sampler", "how to step down; default: what shipped weights were measured with, ddim for others",
        choices=sorted(SAMPLERS))
    add("--steps", "model calls, twice as many with guidance; default: " + ", ".join(
        f"{row.steps or 'all T'} for {name}" for name, row in SAMPLERS.items()), type=positive_int)
    add("--eta", "fresh noise in each step, 0 to 1; default: the sampler's own", type=fraction)
    add("--label", "the class to draw, as a number or name; several with commas, or all: rows of pictures "
        "for each; none: without a class. Default: each class in turn, if the model knows any")
    add("--guidance", "how strongly to follow the class: 1 plainly, 2 or 4 more so at twice the cost; "
        "default: as the model's card says, or 1", type=guidance_number)
    add("--guidance_interval", "the noise levels at which guidance acts, from the lowest to the highest; default: as "
        "the model's card says where --guidance is not given, else all", metavar="LOW,HIGH", type=interval)
    add("--weak", "a worse checkpoint of the same training, an early one: guidance leads away from its "
        f"mistakes, also without classes, by {WEAK_GUIDANCE:g} at the noisier {1 - WEAK_FROM:.0%} of the "
        "levels unless --guidance says otherwise; default: what the model's card names beside it",
        metavar="FILE")
    add("--spacing", "at which timesteps; default: the sampler's own", choices=sorted(SPACINGS))
    add("--show_intermediate", "also write the way from noise to picture: a strip, a GIF and single frames",
        False, action="store_true")
    add("--upscale", "show every pixel as so many by so many; default: small images at least 84 wide",
        type=positive_int)
    add("--single_images", "also write each image to a file of its own, in the folder generated_samples", False,
        action="store_true")
    add("--recreate", "make this picture again as recreated.png: its own settings go before all other flags; "
        "--checkpoint is found by itself if it is outputs/model_final.pt or shipped", metavar="PNG")
    add("--batch_size", "images at a time", 64, type=positive_int)
    add("--output_dir", "where the pictures go", "outputs")
    add("--device", "auto, cpu, cuda, cuda:1, mps", "auto")
    add("--precision", "bf16 is faster on some devices and changes the pictures a little", "float32",
        choices=list(PRECISIONS))
    args = parser.parse_args(argv)
    picture = Path(args.output_dir) / "generated_samples.png"
    again = read_recipe(args.recreate) if args.recreate else None
    if again:
        picture, reference = picture.with_name("recreated.png"), Path(args.recreate).read_bytes()
        spare([args.recreate], picture)
        args = parser.parse_args([*(sys.argv[1:] if argv is None else argv), *as_flags(again)])
        for name in ("label", "upscale", "guidance_interval"):      # what the picture does not have
            if again.get(name) is None:
                setattr(args, name, None)
        torch.set_num_threads(again["threads"])

    device = get_device(args.device)
    if args.dataset and args.checkpoint:
        raise ValueError(f"--checkpoint {args.checkpoint} and --dataset {args.dataset}: give one of them")
    args.checkpoint = find_model(args.checkpoint, args.dataset, again and again["weights"])
    output_dir = make_output_dir(args.output_dir, picture.name, "generation_strip.png", "generation.gif")
    for name, asked in (("generated_samples", args.single_images), ("generation_frames", args.show_intermediate)):
        if asked:
            make_output_dir(output_dir / name)
    model, diffusion, data = load_model(args.checkpoint, device, image_size=args.image_size)
    if again and again["weights"] != data["digest"]:
        raise ValueError(f"{args.recreate} was not made with {args.checkpoint}, but with weights of "
                         f"digest {str(again['weights'])[:12]}..., not {data['digest'][:12]}...")
    fill_in(args, data, diffusion.num_timesteps)
    size, classes = data["image_size"], data["classes"]
    y, columns = choose_labels(args.label, classes, args.num_images, args.first_index)
    count = args.num_images if y is None else len(y)
    across = columns or math.ceil(math.sqrt(count))
    cells = across * math.ceil(count / across)
    pixels = cells * ((size + 2) * (args.upscale or max(1, math.ceil(84 / size)))) ** 2
    if pixels > MAX_SHEET:
        raise ValueError(f"a sheet of {pixels / 1e6:.0f} million pixels; at most {MAX_SHEET / 1e6:.0f} "
                         "million: lower --num_images or --upscale")
    weak, weak_digest = load_weak(args.weak, model, diffusion, data, device, args.image_size)
    if again and again.get("weak") != weak_digest:
        raise ValueError(f"{args.recreate} was made " + ("without --weak" if "weak" not in again else
                         f"with --weak and the checkpoint of digest {str(again['weak'])[:12]}...: name it"))
    note = make_note(args, diffusion, data["digest"], device)
    if weak_digest:
        note["weak"] = weak_digest
    precision, precision_reason = get_precision(args.precision, device)
    print(f"device: {describe_device(device, args.device)}; precision: {precision_reason}")
    print(f"model: {args.checkpoint}, trained on {data['name']!r} ({size}x{size})"
          + (f", and away from {args.weak}" if weak else ""))
    levels = diffusion.sampling_levels(args.sampler, args.steps, args.spacing)
    evaluations = model_calls(levels, args.guidance, args.guidance_interval)
    seconds = seconds_for(model, diffusion, count, size, args.batch_size, evaluations, device, precision)
    print(f"cost: {count} images in {note['steps']} steps of {args.sampler}"
          + guidance_words(args.guidance, args.guidance_interval) + f", about {format_seconds(seconds)} here",
          flush=True)

    images, frames = generate(
        model, diffusion, count, size, seed=args.seed, sampler=args.sampler, steps=args.steps,
        eta=args.eta, spacing=args.spacing, y=y, guidance=args.guidance, guidance_interval=args.guidance_interval,
        weak=weak, first_index=args.first_index, batch_size=args.batch_size, device=device, precision=precision,
        num_frames=51 if args.show_intermediate else 0)
    one = again.get("picture") if again else None
    if one is not None:
        if one >= count:
            raise ValueError(f"{args.recreate} says that it is picture {one} of {count}")
        save_images(images[one:one + 1], picture, padding=0, upscale=args.upscale, note={**note, "picture": one})
    else:
        save_images(images, picture, columns, upscale=args.upscale, note=note)
    print(f"wrote {picture}")
    if again:
        verdict = compare(picture, reference, note, again)
        print(f"beside {args.recreate}: {verdict}")
        if verdict.startswith("NOT"):
            sys.exit(1)
    elif args.single_images:
        folder = output_dir / "generated_samples"
        for k, image in enumerate(images):
            save_images(image[None], folder / f"{args.first_index + k:04d}.png", padding=0, upscale=args.upscale,
                        note={**note, "picture": k})
        others = len(list(folder.iterdir())) - len(images)
        print(f"wrote {folder}, {len(images)} images" + f"; {others} other files lie there" * (others > 0))
    if frames:
        for path in save_intermediate(frames, output_dir):
            print(f"wrote {path}")


if __name__ == "__main__":
    main()
