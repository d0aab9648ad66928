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

from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from command_line import (Parser, command, few_numbers, format_seconds, make_output_dir,
                          positive_float, positive_int, seed_number, whole_number)
from convergence import EVALUATIONS, MIXTURES, SOLVERS, solver_errors, solver_lines
from data import (DATASET_HELP, class_names, get_dataset, get_default_dataset, keep_apart,
                  keep_apart_from_own)
from diffusion import SAMPLERS, DiffusionProcess, model_calls
from figures import (one_step_figure, predictors_figure, schedule_table, schedules_figure,
                     solvers_figure, step_rows, timestep_loss_figure)
from folders import sorted_into_classes
from images import as_text, save_strip, to_signed
from load import CHECKPOINT_HELP, load_model, open_model, refuse_other_images
from predictors import RANGES, loss_by_timestep, predictor_errors, predictor_lines
from reference import same_classes, training_images, unseen_images
from running import FINAL, LATEST
from run_figures import epochs_figure, found_in, loss_figure, spread_out, when, with_the_end
from sample import choose_labels, choose_one_label, drawing_words, seconds_for
from sampling_figures import explain_step, reverse_figure, seeds_figure, steps_figure
from schedules import SCHEDULES, SPACINGS, choose_timesteps
from utils import get_device, shuffled


class Row(NamedTuple):
    file: str  # what it is called in --output_dir
    count: int  # how many images it shows, unless told
    needs: str  # "data", "model", "run" or nothing
    flags: str  # what it looks at, beside --figure, --seed, --output_dir and --device
    help: str


DATA, PROCESS = "dataset data_dir num_images ", "schedule num_timesteps beta_start beta_end "
MODEL = "checkpoint dataset label num_images sampler "
FIGURES = {
    "forward":   Row("forward_diffusion.png", 8, "data", DATA + PROCESS + "image_size timesteps",
                     "images sink into noise"),
    "reverse":   Row("reverse_process.png", 4, "model", MODEL + "steps timesteps",
                     "pictures come out of it, as PNG and GIF"),
    "schedules": Row("schedules.png", 0, "", "num_timesteps timesteps",
                     "the noise schedules compared"),
    "one_step":  Row("one_step.png", 1, "model", "checkpoint dataset label steps timesteps",
                     "a single denoising step with its numbers"),
    "steps":     Row("steps_compared.png", 4, "model", MODEL + "steps_list",
                     "the same noise in few and in many steps"),
    "seeds":     Row("seeds_compared.png", 8, "model", MODEL + "steps seeds",
                     "the same seed twice, and different seeds"),
    "epochs":    Row("epochs.png", 6, "run", "run num_images",
                     "the samples of a run, epoch after epoch"),
    "loss":      Row("loss.png", 0, "run", "run", "its loss"),
    "loss_by_timestep": Row("loss_by_timestep.png", 256, "run", DATA + "run",
                            "that at each noise level"),
    "predictors": Row("predictors.png", 256, "model", DATA + PROCESS + "checkpoint image_size",
                      "what it takes for noise, beside simple answers"),
    "dataset":   Row("dataset.png", 10, "data", DATA + "image_size", "what a data set holds"),
    "solvers":   Row("solvers.png", 0, "", "schedule num_timesteps",
                     "errors of the samplers where the exact answer is known"),
}
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


# ---- From the flags to a figure. Each of these returns the paths of what it wrote.

def named_process(args):
    """The process of the flags, where there is no model."""
    return DiffusionProcess(args.num_timesteps, args.schedule, beta_start=args.beta_start,
                            beta_end=args.beta_end)


def schedule_words(diffusion):
    """For a title: linear schedule. A process that came as numbers has a schedule of its own."""
    schedule = diffusion.config["schedule"]
    return f"{schedule} schedule" if isinstance(schedule, str) else "a schedule of its own"


def draw_from_data(name, args, path, loaded=None):
    """Draw the figures `forward` and `dataset`. Returns the paths written, like the next three.

    loaded: (model, diffusion, data, device) whose process and data are shown; else the flags'.
    """
    diffusion = loaded[1] if loaded else named_process(args)
    if loaded:
        dataset, images, labels = training_images(loaded[2], args.data_dir, args.dataset)
    elif args.dataset is None:
        dataset, images, labels = get_default_dataset(args.data_dir, image_size=args.image_size)
    else:
        dataset = args.dataset
        images, labels = get_dataset(dataset, args.data_dir, image_size=args.image_size,
                                     with_labels=name == "dataset" and sorted_into_classes(dataset))
    count = args.num_images or FIGURES[name].count
    if name == "dataset":
        shape = "x".join(map(str, images.shape[1:]))
        dataset_figure(
            images, labels, class_names(dataset, labels is not None), path, count, args.seed,
            title=f"{as_text(Path(dataset).name)}: {len(images):,} images of {shape}")
    else:
        timesteps = choose_timesteps(args.timesteps, TIMESTEPS[args.figure],
                                     diffusion.num_timesteps)
        pick = different_ones(labels, len(images), args.seed)[:count]
        forward_figure(
            images[pick], diffusion, path, timesteps, args.seed,
            title=f"{as_text(Path(dataset).name)}: the forward process, "
                  + schedule_words(diffusion))
    return [path]


def draw_from_formulas(name, args, path):
    """Draw `schedules` and `solvers`, which need no images or network, and print their tables."""
    T = args.num_timesteps
    if name == "schedules":
        curves = {schedule: DiffusionProcess(T, schedule).alpha_bar.numpy()
                  for schedule in SCHEDULES}
        print(*schedule_table(curves, choose_timesteps(args.timesteps, TIMESTEPS[name], T)),
              sep="\n")
        schedules_figure(curves, path)
        return [path]
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


def draw_from_model(name, args, path, loaded):
    """Draw a figure of a model's sampling, or `predictors`. loaded: as in draw_from_data."""
    if name == "predictors":
        return (draw_predictors(args, path, *loaded) if loaded
                else draw_simple_predictors(args, path))
    model, diffusion, data, device = loaded
    T, size, count = (diffusion.num_timesteps, data["image_size"],
                      args.num_images or FIGURES[name].count)
    y = (choose_one_label(args.label, data["classes"]) if name == "one_step"
         else choose_labels(args.label, data["classes"], count)[0])
    count = count if y is None else len(y)                  # several labels get full rows
    sampler = "ddpm" if name == "one_step" else args.sampler
    steps_list = args.steps_list or sorted({min(steps, T) for steps in STEPS_LIST})
    # As the model's card says; one step is explained plainly,
    # and no figure is drawn away from a weak model.
    plain = y is None or name == "one_step" or args.label == "none" or data["weak"]
    guidance, interval = (1.0, None) if plain else (data["guidance"], data["guidance_interval"])

    def calls_of(steps):
        return sum(model_calls(diffusion.sampling_levels(sampler, steps), guidance, interval))

    calls = {"steps": sum(map(calls_of, steps_list)),
             "seeds": 2 * calls_of(args.steps) * len(args.seeds)}.get(name, calls_of(args.steps))
    cost = format_seconds(seconds_for(model, diffusion, count, size, 64, calls, device))
    print(f"{name}: {calls} calls of the model on {count} image{'s' * (count > 1)}"
          + drawing_words(guidance, interval) + f", about {cost} here", flush=True)
    settings = dict(image_size=size, seed=args.seed, sampler=sampler, steps=args.steps, y=y,
                    device=device, guidance=guidance, guidance_interval=interval)
    if name == "reverse":
        timesteps = choose_timesteps(args.timesteps, TIMESTEPS["reverse"], T)
        return reverse_figure(model, diffusion, path, timesteps, count, **settings)
    if name == "one_step":
        t = choose_timesteps(args.timesteps, TIMESTEPS["one_step"], T)[0]
        step = explain_step(model, diffusion, t, **settings)
        for _, title, _, how, value in step_rows(step)[1]:
            print(f"{title:22}{how:>41} = {value:.4f}")
        one_step_figure(step, path)
    else:
        figure, choice = ((steps_figure, steps_list) if name == "steps"
                          else (seeds_figure, args.seeds))
        print(*figure(model, diffusion, path, choice, count, **settings), sep="\n")
    return [path]


def some_unseen(data, args, count, device):
    """(x_0, y or None, what they are: "256 test images of mnist")"""
    dataset, images, labels, kind = unseen_images(data, args.data_dir, args.dataset)
    known = labels is not None and same_classes(data, dataset)
    x_0 = to_signed(images[:count]).to(device)
    which = f"{len(x_0)} {kind}" + ("" if " of " in kind else f" of {Path(dataset).name}")
    return x_0, labels[:count].to(device) if known else None, which


def draw_predictors(args, path, model, diffusion, data, device):
    x_0, y, which = some_unseen(data, args, args.num_images or FIGURES["predictors"].count, device)
    cost = format_seconds(
        seconds_for(model, diffusion, len(x_0), data["image_size"], 64, RANGES, device))
    print(f"{which} at {RANGES} ranges of t, about {cost} here", flush=True)
    return show_predictors(args, path, diffusion, x_0, which, model, y)


def draw_simple_predictors(args, path):
    """Those that need no model, with the process of the flags."""
    like = dict(image_size=args.image_size, train=False)
    dataset, images, _ = (
        (args.dataset, *get_dataset(args.dataset, args.data_dir, **like)) if args.dataset
        else get_default_dataset(args.data_dir, **like))
    images = images[
        shuffled(len(images), args.seed)[:args.num_images or FIGURES["predictors"].count]]
    which = f"{len(images)} images of {Path(dataset).name}"
    return show_predictors(args, path, named_process(args), to_signed(images), which)


def show_predictors(args, path, diffusion, x_0, which, model=None, y=None):
    ranges = min(RANGES, diffusion.num_timesteps)
    with tqdm(total=ranges, desc="predicting", unit="range") as bar:
        edges, errors = predictor_errors(diffusion, x_0, model, y, ranges, args.seed, bar.update)
    title = (f"error of the predicted noise, {which}, T = {diffusion.num_timesteps}, "
             + schedule_words(diffusion))
    print("mean squared " + title, *predictor_lines(edges, errors), sep="\n")
    predictors_figure(edges, errors, path, as_text(title))
    return [path]


def draw_from_run(name, args, path, device):
    """Draw a figure of what a training has written: `loss`, `epochs` or `loss_by_timestep`."""
    if name == "loss":
        loss_figure(args.run, path)
        return [path]
    if name == "epochs":
        files = found_in(args.run, [FINAL, LATEST], f"{FINAL} or {LATEST}")
    else:
        files = found_in(args.run, "checkpoints",
                         "numbered checkpoints (train.py --save_every 1 keeps many)")
    model, diffusion, data = load_model(files[0], device)
    keep_apart_from_own(data, args.output_dir)
    count = args.num_images or FIGURES[name].count
    if name == "epochs":
        epochs_figure(args.run, path, data["image_size"], count)
        return [path]
    files = with_the_end(spread_out(files, 24), args.run)
    x_0, y, which = some_unseen(data, args, count, device)
    calls = TIMESTEP_BINS * len(files)
    cost = format_seconds(
        seconds_for(model, diffusion, len(x_0), data["image_size"], 64, calls, device))
    print(f"{len(files)} checkpoints, {len(x_0)} images at {TIMESTEP_BINS} noise levels each, "
          f"about {cost} here", flush=True)
    losses = []
    for file in tqdm(files, desc="checkpoints"):
        model, diffusion, _ = load_model(file, device)
        edges, column = loss_by_timestep(model, diffusion, x_0, y, TIMESTEP_BINS, args.seed)
        losses.append(column)
    timestep_loss_figure(edges, losses, [when(file) for file in files], path,
                         as_text(f"loss at each noise level, {which}"))
    return [path]


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
    if args.figure == "explore" or FIGURES[args.figure].needs == "model" and not without_model:
        loaded = *open_model(args, device)[1:], device
        if args.figure not in ("predictors", "explore"):
            refuse_other_images(args, loaded[2])
    output_dir = make_output_dir(args.output_dir, *(FIGURES[name].file for name in names))
    for name in names:
        path, needs = output_dir / FIGURES[name].file, FIGURES[name].needs
        if needs == "data":
            paths = draw_from_data(name, args, path, loaded)
        elif needs == "model":
            paths = draw_from_model(name, args, path, loaded)
        else:
            paths = (draw_from_run(name, args, path, device) if needs
                     else draw_from_formulas(name, args, path))
        for path in paths:
            print(f"wrote {path}")


if __name__ == "__main__":
    main()
