"""Figures of the diffusion process: the command, and the figures of data.

    python visualize_diffusion.py                             # noise destroys eight digits
    python visualize_diffusion.py --dataset fashion_mnist --schedule cosine
    python visualize_diffusion.py --figure schedules          # what schedules keep, with a table
    python visualize_diffusion.py --figure solvers            # samplers against the exact answer
    python visualize_diffusion.py --figure reverse            # a trained model undoes the noise
    python visualize_diffusion.py --figure predictors         # its errors, beside simple answers'
    python visualize_diffusion.py --figure loss_by_timestep   # where a run in outputs/ got better
    python visualize_diffusion.py --figure explore            # forward, steps, seeds and reverse

Writes outputs/forward_diffusion.png, or the file that FIGURES names.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from command_line import (Parser, choose_timesteps, command, few_numbers, format_seconds,
                          make_output_dir, positive_float, positive_int, seed_number, whole_number)
from convergence import EVALUATIONS, MIXTURES, SOLVERS, solver_errors, solver_lines
from data import (DATASET_HELP, class_names, get_dataset, get_default_dataset, keep_apart,
                  keep_apart_from_own)
from diffusion import SAMPLERS, DiffusionProcess
from drawing import choose_labels, choose_one_label
from figures import (one_step_figure, predictors_figure, schedule_table, schedules_figure,
                     solvers_figure, step_rows, timestep_loss_figure)
from folders import sorted_into_classes
from images import as_text, save_strip, to_signed
from load import CHECKPOINT_HELP, load_model, open_model, refuse_other_images
from predictors import RANGES, loss_by_timestep, predictor_errors, predictor_lines
from reference import same_classes, training_images, unseen_images
from running import FINAL, LATEST
from run_figures import epochs_figure, found_in, loss_figure, spread_out, when, with_the_end
from sample import drawing_words, model_calls, seconds_for
from sampling_figures import explain_step, reverse_figure, seeds_figure, steps_figure
from schedules import SCHEDULES, SPACINGS
from utils import get_device, shuffled


EXPLORE = ("forward", "steps", "seeds", "reverse")
# Noise levels of T = 1000; for another T they are scaled.
FORWARD_TIMESTEPS = (0, 50, 100, 200, 400, 600, 800, 999)
TIMESTEPS = {"forward": FORWARD_TIMESTEPS, "explore": (0, 100, 250, 500, 750, 999),
             "one_step": (250,), "reverse": (999, 800, 600, 400, 200, 100, 50, 0),
             "schedules": (0, 100, 250, 500, 750, 900, 999)}
STEPS_LIST, SEEDS = (50, 100, 250, 500, 1000), (42, 7, 123, 999)
TIMESTEP_BINS = 20  # rows of the heat map of losses


# ---- Figures of data

def different_ones(labels, count, seed=0):
    """The numbers below `count` in random order, but one of each class before a second of any.
    labels: [count] class indices, or None."""
    order = shuffled(count, seed)
    if labels is None:
        return order
    turns = torch.empty(count)
    for k in labels.unique():
        turns[labels[order] == k] = torch.arange((labels == k).sum(), dtype=turns.dtype)
    return order[turns.argsort(stable=True)]


def forward_figure(images, diffusion, path, timesteps=FORWARD_TIMESTEPS, seed=0, title=None):
    """One row per image, one column per timestep: the image sinks into noise.

    images: uint8 [N, C, H, W]. A row keeps one noise throughout, so that only its share grows.
    """
    x_0 = to_signed(images)
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(seed))
    columns = [diffusion.forward_diffusion(x_0, torch.full((len(x_0),), t), noise)[0]
               for t in timesteps]
    shares = [diffusion.alpha_bar_at(t) for t in timesteps]
    labels = [f"t = {t}\n" + r"$\bar\alpha$ "
              + (f"{share:.{4 + (share > 0.99995)}f}" if share > 1e-3 else f"{share:.0e}")
              for t, share in zip(timesteps, shares)]
    save_strip(torch.stack(columns, dim=1), labels, path, title=title)


def dataset_figure(images, labels, names, path, columns=10, seed=0, title=None):
    """A row of random images for each class, or eight rows where there are no classes.

    images: uint8 [N, C, H, W].  labels: [N] class indices or None.  names: of the classes, or None.
    """
    order = shuffled(len(images), seed)
    if labels is None or not names:
        chosen, names = order[:8 * columns].split(columns), None
    else:
        chosen = [order[labels[order] == k][:columns] for k in range(len(names))]
    # White where a class has too few images.
    blank = torch.full((columns, *images.shape[1:]), 255, dtype=torch.uint8)
    rows = [to_signed(torch.cat([images[row], blank[len(row):]])) for row in chosen]
    save_strip(rows, [""] * columns, path,
               row_labels=names and [as_text(name, most=30) for name in names], title=title)


# ---- From the flags to a figure. Each draw_... makes one of FIGURES and returns the paths written.
# loaded: (model, diffusion, what the checkpoint says of its data), or None.

def named_process(args):
    """The process of the flags, where there is no model."""
    return DiffusionProcess(args.num_timesteps, args.schedule, beta_start=args.beta_start,
                            beta_end=args.beta_end)


def named_images(args, **how):
    """(name, images, labels or None) of --dataset, or of digits where there is none."""
    if args.dataset is None:
        return get_default_dataset(args.data_dir, image_size=args.image_size, **how)
    return args.dataset, *get_dataset(args.dataset, args.data_dir, image_size=args.image_size,
                                      **how)


def schedule_words(diffusion):
    """For a title: linear schedule. A process that came as numbers has a schedule of its own."""
    schedule = diffusion.config["schedule"]
    return f"{schedule} schedule" if isinstance(schedule, str) else "a schedule of its own"


def draw_forward(args, path, loaded):
    """By the process of a model, and of what it was trained on, or by that of the flags."""
    if loaded:
        _, diffusion, data = loaded
        dataset, images, labels = training_images(data, args.data_dir, args.dataset)
    else:
        diffusion = named_process(args)
        dataset, images, labels = named_images(args)
    timesteps = choose_timesteps(args.timesteps, TIMESTEPS[args.figure], diffusion.num_timesteps)
    pick = different_ones(labels, len(images), args.seed)[:args.num_images]
    forward_figure(images[pick], diffusion, path, timesteps, args.seed,
                   title=f"{as_text(Path(dataset).name)}: the forward process, "
                         + schedule_words(diffusion))
    return [path]


def draw_dataset(args, path, loaded):
    in_classes = args.dataset is not None and sorted_into_classes(args.dataset)
    dataset, images, labels = named_images(args, with_labels=in_classes)
    shape = "x".join(map(str, images.shape[1:]))
    dataset_figure(images, labels, class_names(dataset, labels is not None), path, args.num_images,
                   args.seed,
                   title=f"{as_text(Path(dataset).name)}: {len(images):,} images of {shape}")
    return [path]


def draw_schedules(args, path, loaded):
    T = args.num_timesteps
    curves = {schedule: DiffusionProcess(T, schedule).alpha_bar.numpy() for schedule in SCHEDULES}
    timesteps = choose_timesteps(args.timesteps, TIMESTEPS["schedules"], T)
    print(*schedule_table(curves, timesteps), sep="\n")
    schedules_figure(curves, path)
    return [path]


def draw_solvers(args, path, loaded):
    T = args.num_timesteps
    counts = [steps for steps in EVALUATIONS if steps <= T]
    if not counts:
        raise ValueError(f"--num_timesteps {T}: "
                         f"the fewest evaluations compared are {EVALUATIONS[0]}")
    with tqdm(total=len(MIXTURES) * len(SOLVERS) * len(SPACINGS) * len(counts),
              desc="solving") as bar:
        tables = {data: solver_errors(mixture, T, args.schedule, evaluations=counts,
                                      tick=bar.update)
                  for data, mixture in MIXTURES.items()}
    for data, errors in tables.items():
        print(f"mean distance to the exact flow of {data}, by evaluations",
              *solver_lines(errors, counts), sep="\n")
    solvers_figure(tables, counts, path)
    return [path]


def begin_sampling(name, args, loaded, chains, y, guided=True):
    """Tell what it costs to draw a figure's pictures. Returns (how many, the settings of sampling).

    chains: the number of steps of each set of pictures.  y: their classes, [K], or None.
    guided: as the model tells; but no figure is drawn away from a weak model.
    """
    model, diffusion, data = loaded
    plain = not guided or y is None or args.label == "none" or data["weak"]
    guidance, interval = (1.0, None) if plain else (data["guidance"], data["guidance_interval"])
    count = args.num_images if y is None else len(y)        # several labels get full rows
    calls = sum(sum(model_calls(diffusion.sampling_levels(args.sampler, steps), guidance, interval))
                for steps in chains)
    cost = format_seconds(seconds_for(model, diffusion, count, data["image_size"], calls))
    print(f"{name}: {calls} calls of the model on {count} image{'s' * (count > 1)}"
          + drawing_words(guidance, interval) + f", about {cost} here", flush=True)
    return count, dict(image_size=data["image_size"], seed=args.seed, sampler=args.sampler,
                       steps=args.steps, y=y, device=args.device, guidance=guidance,
                       guidance_interval=interval)


def draw_reverse(args, path, loaded):
    model, diffusion, data = loaded
    y, _ = choose_labels(args.label, data["classes"], args.num_images)
    count, settings = begin_sampling("reverse", args, loaded, [args.steps], y)
    timesteps = choose_timesteps(args.timesteps, TIMESTEPS["reverse"], diffusion.num_timesteps)
    return reverse_figure(model, diffusion, path, timesteps, count, **settings)


def draw_one_step(args, path, loaded):
    model, diffusion, data = loaded
    args.sampler, y = "ddpm", choose_one_label(args.label, data["classes"])
    _, settings = begin_sampling("one_step", args, loaded, [args.steps], y, guided=False)
    t, *_ = choose_timesteps(args.timesteps, TIMESTEPS["one_step"], diffusion.num_timesteps)
    step = explain_step(model, diffusion, t, **settings)
    for _, title, _, how, value in step_rows(step)[1]:
        print(f"{title:22}{how:>41} = {value:.4f}")
    one_step_figure(step, path)
    return [path]


def draw_steps(args, path, loaded):
    model, diffusion, data = loaded
    steps_list = args.steps_list or sorted({min(steps, diffusion.num_timesteps)
                                            for steps in STEPS_LIST})
    y, _ = choose_labels(args.label, data["classes"], args.num_images)
    count, settings = begin_sampling("steps", args, loaded, steps_list, y)
    print(*steps_figure(model, diffusion, path, steps_list, count, **settings), sep="\n")
    return [path]


def draw_seeds(args, path, loaded):
    model, diffusion, data = loaded
    y, _ = choose_labels(args.label, data["classes"], args.num_images)
    count, settings = begin_sampling("seeds", args, loaded, 2 * len(args.seeds) * [args.steps], y)
    print(*seeds_figure(model, diffusion, path, args.seeds, count, **settings), sep="\n")
    return [path]


def some_unseen(data, args):
    """(x_0, y or None, what they are: "256 test images of mnist")"""
    dataset, images, labels, kind = unseen_images(data, args.data_dir, args.dataset)
    known = labels is not None and same_classes(data, dataset)
    x_0 = to_signed(images[:args.num_images]).to(args.device)
    which = f"{len(x_0)} {kind}" + ("" if " of " in kind else f" of {Path(dataset).name}")
    return x_0, labels[:args.num_images].to(args.device) if known else None, which


def draw_predictors(args, path, loaded):
    """Of a model with its process, or with that of the flags those that need none."""
    model = y = None
    if loaded:
        model, diffusion, data = loaded
        x_0, y, which = some_unseen(data, args)
        cost = format_seconds(
            seconds_for(model, diffusion, len(x_0), data["image_size"], RANGES))
        print(f"{which} at up to {RANGES} ranges of t, about {cost} here", flush=True)
    else:
        diffusion = named_process(args)
        dataset, images, _ = named_images(args, train=False)
        x_0 = to_signed(images[shuffled(len(images), args.seed)[:args.num_images]])
        which = f"{len(x_0)} images of {Path(dataset).name}"
    ranges = min(RANGES, diffusion.num_timesteps)
    with tqdm(total=ranges, desc="predicting", unit="range") as bar:
        edges, errors = predictor_errors(diffusion, x_0, model, y, ranges, args.seed, bar.update)
    title = (f"error of the predicted noise, {which}, T = {diffusion.num_timesteps}, "
             + schedule_words(diffusion))
    print("mean squared " + title, *predictor_lines(edges, errors), sep="\n")
    predictors_figure(edges, errors, path, as_text(title))
    return [path]


def draw_loss(args, path, loaded):
    loss_figure(args.run, path)
    return [path]


def draw_epochs(args, path, loaded):
    final, *_ = found_in(args.run, FINAL, LATEST)
    data = load_model(final)[2]
    keep_apart_from_own(data, args.output_dir)
    epochs_figure(args.run, path, data["image_size"], args.num_images)
    return [path]


def draw_loss_by_timestep(args, path, loaded):
    files = found_in(args.run, "checkpoints/*.pt",
                     hint="; train.py --save_every 1 keeps many checkpoints")
    model, diffusion, data = load_model(files[0], args.device)
    keep_apart_from_own(data, args.output_dir)
    files = with_the_end(spread_out(files, 24), args.run)
    x_0, y, which = some_unseen(data, args)
    cost = format_seconds(seconds_for(model, diffusion, len(x_0), data["image_size"],
                                      TIMESTEP_BINS * len(files)))
    print(f"{len(files)} checkpoints, {len(x_0)} images at {TIMESTEP_BINS} noise levels each, "
          f"about {cost} here", flush=True)
    losses = []
    for file in tqdm(files, desc="checkpoints"):
        model, diffusion, _ = load_model(file, args.device)
        edges, column = loss_by_timestep(model, diffusion, x_0, y, TIMESTEP_BINS, args.seed)
        losses.append(column)
    timestep_loss_figure(edges, losses, [when(file) for file in files], path,
                         as_text(f"loss at each noise level, {which}"))
    return [path]


# ---- The command

class Row(NamedTuple):
    draw: Callable  # (args, path, loaded) -> the paths of what it wrote
    count: int  # how many images it shows, unless told
    flags: str  # what it looks at, beside --figure, --seed, --output_dir and --device
    help: str
    file: str = ""  # what it is called in --output_dir, if not like the figure


DATA, PROCESS = "dataset data_dir num_images ", "schedule num_timesteps beta_start beta_end "
MODEL = "checkpoint dataset label num_images sampler "
FIGURES = {
    "forward":   Row(draw_forward, 8, DATA + PROCESS + "image_size timesteps",
                     "images sink into noise", "forward_diffusion.png"),
    "reverse":   Row(draw_reverse, 4, MODEL + "steps timesteps",
                     "pictures come out of it, as PNG and GIF", "reverse_process.png"),
    "schedules": Row(draw_schedules, 0, "num_timesteps timesteps", "the noise schedules compared"),
    "one_step":  Row(draw_one_step, 1, "checkpoint dataset label steps timesteps",
                     "a single denoising step with its numbers"),
    "steps":     Row(draw_steps, 4, MODEL + "steps_list",
                     "the same noise in few and in many steps", "steps_compared.png"),
    "seeds":     Row(draw_seeds, 8, MODEL + "steps seeds",
                     "the same seed twice, and different seeds", "seeds_compared.png"),
    "epochs":    Row(draw_epochs, 6, "run num_images",
                     "the samples of a run, epoch after epoch"),
    "loss":      Row(draw_loss, 0, "run", "its loss"),
    "loss_by_timestep": Row(draw_loss_by_timestep, 256, DATA + "run", "that at each noise level"),
    "predictors": Row(draw_predictors, 256, DATA + PROCESS + "checkpoint image_size",
                      "what it takes for noise, beside simple answers"),
    "dataset":   Row(draw_dataset, 10, DATA + "image_size", "what a data set holds"),
    "solvers":   Row(draw_solvers, 0, "schedule num_timesteps",
                     "errors of the samplers where the exact answer is known"),
}


@command
def main(argv=None):
    parser = Parser(description=(
        "Figures of the diffusion process. --figure: "
        + "; ".join(f"{name}: {row.help}" for name, row in FIGURES.items())
        + f"; explore: {', '.join(EXPLORE)} at once."))
    add = parser.add
    add("--figure", "what to draw", "forward", choices=[*FIGURES, "explore"])
    add("--timesteps", "the noise levels shown, 0 to T - 1, in forward, reverse, one_step "
        "(the first) and schedules; default: each figure's own",
        type=whole_number, nargs="+", metavar="t")
    add("--steps_list", "the numbers of steps that steps compares; default: "
        + " ".join(map(str, STEPS_LIST)), type=positive_int, nargs="+", metavar="N")
    add("--seeds", "the seeds that seeds compares", list(SEEDS), type=seed_number, nargs="+",
        metavar="SEED")
    add("--num_images", "how many images; default: " + ", ".join(
        f"{row.count} in {name}" for name, row in FIGURES.items() if row.count > 1),
        type=positive_int)
    add("--dataset", DATASET_HELP + "; with a model, the data it was trained on", metavar="NAME")
    add("--data_dir")
    add("--image_size", "resize to this many pixels", type=positive_int)
    parser.group("a process without a model, in forward, "
                 "and in predictors if any of these is given")
    add("--schedule", "how alpha_bar falls, in solvers, too; default: linear",
        choices=sorted(SCHEDULES))
    add("--num_timesteps", "T, in schedules and solvers, too; default: 1000", type=positive_int)
    add("--beta_start", "the first beta of the linear schedule, as it is; default: scaled with T",
        type=positive_float)
    add("--beta_end", "and the last", type=positive_float)
    parser.group("a model, in reverse, one_step, steps, seeds, predictors and explore")
    add("--checkpoint", CHECKPOINT_HELP)
    add("--sampler", "how to step down; one_step takes ddpm", "ddim", choices=sorted(SAMPLERS))
    add("--steps", "model calls; default: the sampler's own number", type=positive_int)
    add("--label", "the class to draw, as in sample.py; "
        "default: each class in turn, if the model knows any")
    parser.group("a run, results")
    add("--run", "the folder of the training that epochs, loss and loss_by_timestep show",
        "outputs")
    add("--seed", "picks the images and the noise", 0, type=seed_number)
    add("--output_dir", "where the figure goes", "outputs")
    add("--device")
    args = parser.parse_args(argv)
    names = EXPLORE if args.figure == "explore" else [args.figure]
    without_model = args.figure == "predictors" and any(
        (args.schedule, args.num_timesteps, args.beta_start, args.beta_end))
    used = {flag for name in names for flag in FIGURES[name].flags.split()}
    if args.figure == "explore" or args.figure == "predictors" and not without_model:
        used -= {*PROCESS.split(), "image_size"}        # the model has its own
    parser.refuse(vars(args).keys() - used - {"figure", "seed", "output_dir", "device"},
                  f"--figure {args.figure}")
    for flag, most in (("timesteps", 50), ("steps_list", 20), ("seeds", 20)):
        few_numbers(flag, getattr(args, flag), most)
    if (args.num_images or 1) > 64 and args.figure not in ("loss_by_timestep", "predictors"):
        raise ValueError(f"--num_images {args.num_images}: at most 64 in a figure")

    device = get_device(args.device)
    keep_apart(args.dataset, args.output_dir)
    args.schedule, args.num_timesteps = args.schedule or "linear", args.num_timesteps or 1000
    if without_model and args.checkpoint:
        raise ValueError(f"--checkpoint {args.checkpoint} has a process of its own: "
                         "name that or another one")
    loaded = None
    if "checkpoint" in used and not without_model:
        loaded = open_model(args, device)[1:]
        if args.figure not in ("predictors", "explore"):
            refuse_other_images(args, loaded[2])
    files = {name: FIGURES[name].file or f"{name}.png" for name in names}
    output_dir = make_output_dir(args.output_dir, *files.values())
    for name in names:
        row = FIGURES[name]
        own = argparse.Namespace(**{**vars(args), "device": device,
                                    "num_images": args.num_images or row.count})
        for path in row.draw(own, output_dir / files[name], loaded):
            print(f"wrote {path}")


if __name__ == "__main__":
    main()
