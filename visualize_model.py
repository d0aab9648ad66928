"""Figures of the network, one function each.

    python visualize_model.py                     # its feature maps, level by level
    python visualize_model.py --figure attention  # where each head looks while a picture is sampled
    python visualize_model.py --figure time       # what the network is told of t
    python visualize_model.py --figure features   # what the bottleneck knows of the class, as a map
    python visualize_model.py --figure table      # parameters and memory, level by level
    python visualize_model.py --figure table --channels 64 128 256  # of a plain U-Net with these

Writes outputs/activations.png, or the file that FIGURES names.
"""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.colors import LogNorm
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from tqdm import tqdm

from command_line import (Parser, command, few_numbers, format_seconds, make_output_dir,
                          positive_int, seed_number, whole_number)
from data import DATASET_HELP, class_names, keep_apart
from diffusion import SAMPLERS
from images import (COLOURS, as_text, image_grid, new_figure, save_figure, set_heading,
                    to_uint8)
from inside import (PlainUNet, activations, attention_maps, bottleneck_features, busiest,
                    centre_accuracy, choose_layer, find_tsne, model_table, parts, pca, reach,
                    sampled, table_lines, time_embeddings, tsne)
from load import CHECKPOINT_HELP, open_model, refuse_other_images
from models import MODELS, create_model
from reference import unseen_images
from sample import choose_one_label, seconds_for
from schedules import choose_timesteps
from utils import get_device, shuffled


class Row(NamedTuple):
    file: str  # what it is called in --output_dir
    timesteps: tuple  # its noise levels for T = 1000; for another T they are scaled
    # What it looks at, beside --figure, --checkpoint, --dataset, --seed, --output_dir and --device.
    flags: str
    help: str


FIGURES = {
    "activations": Row("activations.png", (250,), "timesteps label sampler steps",
                       "feature maps of each level while a picture is sampled"),
    "attention":   Row("attention.png", (999, 800, 600, 400, 200, 50),
                       "timesteps label sampler steps layer query",
                       "where each head looks meanwhile"),
    "time":        Row("time_embedding.png", (0, 100, 250, 500, 750, 999), "timesteps",
                       "what the network is told of t"),
    "features":    Row("features.png", (0, 200, 400, 600, 800),
                       "timesteps data_dir num_images flatten projection",
                       "the bottleneck's features of real pictures"),
    "table":       Row("model_table.png", (), "channels model image_size",
                       "channels, parameters and memory of each level"),
}
# Okabe & Ito's colours but yellow, which white paper swallows, and three more: ten for ten classes.
PALETTE, MARKERS = (*COLOURS, "#e69f00", "#56b4e9", "#999999", "#8c510a", "#5e3c99"), "o^sDvP*"


# ---- Cells and pictures

def mark(axes, row, column, size):
    """A frame around a cell that is `size` units wide."""
    axes.add_patch(Rectangle((column * size - 0.5, row * size - 0.5), size, size, fill=False,
                             edgecolor=COLOURS[0], linewidth=2))


def show(axes, image, **settings):
    """A picture without ticks: [C, H, W] in [-1, 1], or a map [H, W]."""
    if image.ndim == 3:
        image = image_grid(to_uint8(image[None]), padding=0)
    axes.set_xticks([], [])
    axes.set_yticks([], [])
    axes.grid(False)
    axes.spines[:].set_visible(False)
    return axes.imshow(np.asarray(image), interpolation="nearest", **settings)


# ---- Attention

def attention_figure(moments, query, path, title=None):
    """A row for each level: x_t, the guess of x_0, and where each head looks from the framed cell.

    moments: what attention_maps returns.  query: (row, column) of the cell.
    """
    heads, positions, _ = moments[0][-1].shape
    side = math.isqrt(positions)
    place = query[0] * side + query[1]
    most = max(float(weights[:, place].max()) for *_, weights in moments) * positions
    norm = LogNorm(0.1, max(most, 1))
    figure, axes = new_figure(1.25 * (heads + 2) + 1.1, 1.42 * len(moments) + 0.6,
                              len(moments), heads + 2)
    for panels, (t, x_t, x_0, weights) in zip(axes, moments):
        for axis, image in zip(panels, (x_t, x_0)):
            show(axis, image)
            mark(axis, *query, image.shape[-1] / side)
        far = reach(weights, side) * x_t.shape[-1] / side
        for axis, seen, pixels in zip(panels[2:], weights[:, place], far):
            drawn = show(axis, (seen * positions).clamp(min=0.1).view(side, side),
                         norm=norm, cmap="viridis")
            mark(axis, *query, 1)
            axis.set_xlabel(f"reach {pixels:.1f} px", fontsize=9, labelpad=2)
        panels[0].set_ylabel(f"t = {t}", fontsize=10.5)
    for axis, name in zip(axes[0], ("$x_t$", "guess of $x_0$",
                                    *(f"head {k + 1}" for k in range(heads)))):
        axis.set_title(name, fontsize=10.5)
    bar = figure.colorbar(drawn, ax=axes, shrink=min(1, 3 / len(moments)), format="%g", pad=0.015)
    bar.set_label("attention, times the even share")
    set_heading(figure, title)
    save_figure(figure, path)


# ---- Activations

def activations_figure(x_t, seen, picture, path, title=None, channels=8):
    """A row for each part that gives feature maps: its strongest channels, side by side.

    x_t, picture: [C, H, W] in [-1, 1].  seen: what activations returns. Of each part the channels
    whose values differ most across the picture are shown, in their own order, each from its lowest
    to its highest value.
    """
    maps = [(name, output[0].float().cpu()) for name, output in seen if output.ndim == 4]
    figure, axes = new_figure(1.1 * (channels + 1) + 1.2, 1.15 * len(maps) + 0.5,
                              len(maps), channels + 1)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, name in zip(axes[:, 0], (x_t, picture),
                                 ("$x_t$, the input", "the finished picture")):
        axis.axis("on")
        show(axis, image)
        axis.set_title(name, fontsize=9.5)
    for panels, (name, output) in zip(axes[:, 1:], maps):
        strongest = (output.flatten(1).std(dim=1, unbiased=False)
                     .argsort(descending=True)[:channels].sort().values)
        for axis, k in zip(panels, strongest.tolist()):
            axis.axis("on")
            show(axis, output[k], cmap="viridis")
            axis.set_title(f"channel {k}", fontsize=8, pad=2)
        count, height, width = output.shape
        panels[0].set_ylabel(f"{name}\n{count} of {height}x{width}", fontsize=9.5, rotation=0,
                             ha="right", va="center", labelpad=6)
    set_heading(figure, title)
    save_figure(figure, path)


# ---- Time embeddings

def time_figure(sines, learned, timesteps, path, title=None):
    """The embedding as picture and waves; below, how alike timesteps are before and after learning.

    sines, learned: see time_embeddings.  timesteps: those whose likeness to all others is drawn.
    """
    T, dim = sines.shape
    half = dim // 2
    figure, axes = new_figure(10, 6.6, 2, 2)
    drawn = axes[0, 0].imshow(sines.T, aspect="auto", cmap="RdBu_r", vmin=-1, vmax=1,
                              interpolation="nearest", extent=(-0.5, T - 0.5, dim - 0.5, -0.5))
    axes[0, 0].grid(False)
    axes[0, 0].set_ylabel(f"sines (0-{half - 1}), cosines ({half}-{dim - 1})")
    figure.colorbar(drawn, ax=axes[0, 0], label="value")
    for k, colour in zip(sorted({half // 4, half // 2, 3 * half // 4}), COLOURS):
        length = 2 * math.pi * 10_000 ** (k / half)
        axes[0, 1].plot(sines[:, k], color=colour, label=f"{length:,.0f} steps", linewidth=1.4)
    axes[0, 1].set_ylim(-1.1, 1.6)
    axes[0, 1].legend(frameon=False, fontsize=9, loc="upper center", ncols=3, columnspacing=1)
    axes[0, 1].set_ylabel("value")
    for axis, values, name in zip(axes[1], (sines, learned), ("sines and cosines", "as learned")):
        unit = F.normalize(values, dim=1)
        for t, colour in zip(timesteps, PALETTE):
            axis.plot(unit @ unit[t], color=colour, linewidth=1.4, label=f"t = {t}")
        axis.set_ylabel("cosine of the angle")
        axis.set_title(f"likeness of t and the others: {name}", fontsize=10.5)
    axes[1, 1].sharey(axes[1, 0])
    low = axes[1, 0].get_ylim()[0]
    axes[1, 0].set_ylim(low - 0.3 * (1 - low), None)        # room for the legend below the curves
    axes[1, 0].legend(frameon=False, fontsize=9, loc="lower center", ncols=3)
    axes[0, 0].set_title("the embedding of each timestep", fontsize=10.5)
    axes[0, 1].set_title("three of its sines, by the length of a wave", fontsize=10.5)
    for axis in axes.flat:
        axis.set_xlabel("timestep t")
    set_heading(figure, title)
    save_figure(figure, path)


# ---- Features of the bottleneck

def apart(places, distance, rounds=50):
    """Move apart points [N, 2] that are nearer to each other than `distance` [2], so that what is
    written there can be read."""
    places = places / distance
    for _ in range(rounds):
        away = places[:, None] - places[None]                                       # [N, N, 2]
        length = away.norm(dim=2, keepdim=True).clamp(min=1e-3)
        places = places + (away / length * (1 - length).clamp(min=0) / 2).sum(dim=1)
    return places * distance


def scatter_classes(axis, points, labels, names):
    """Points in the colours of their classes, each of which is named near its middle (median)."""
    for k, name in enumerate(names):
        own = points[labels == k]
        if len(own):
            axis.scatter(*own.T, s=7, color=PALETTE[k % len(PALETTE)],
                         marker=MARKERS[k // len(PALETTE) % len(MARKERS)],
                         alpha=0.6, linewidths=0)
    seen = labels.unique().tolist()
    middles = torch.stack([points[labels == k].median(dim=0).values for k in seen])
    longest = max(len(names[k]) for k in seen)
    wide = max(0.07, 0.025 * longest)           # a word, in shares of the map
    size = points.amax(0) - points.amin(0)
    for k, place in zip(seen, apart(middles, torch.tensor([wide, 0.07]) * size)):
        axis.text(*place, names[k], ha="center", va="center", weight="bold",
                  fontsize=11 if longest < 4 else 9,
                  color=PALETTE[k % len(PALETTE)],
                  path_effects=[withStroke(linewidth=3, foreground="white")])


def features_figure(features, labels, names, path, project, heading=None):
    """Maps of features: at each noise level, coloured by class, and of all, coloured by timestep.

    features: {t: [N, D]}.  labels: [N], or None without classes.
    project: features -> (points [M, 2], a phrase).
    Returns lines of text: what each map says.
    """
    columns = min(3, len(features) + 1)
    rows = math.ceil((len(features) + 1) / columns)
    figure, axes = new_figure(3.5 * columns, 3.5 * rows, rows, columns)
    lines = []
    for axis, (t, values) in zip(axes.flat, features.items()):
        points, phrase = project(values)
        title = f"t = {t}"
        if labels is None:
            axis.scatter(*points.T, s=7, color=COLOURS[1], alpha=0.6, linewidths=0)
        else:
            scatter_classes(axis, points, labels, names)
            title += f": nearest centre right for {100 * centre_accuracy(values, labels):.0f} %"
        axis.set_title(title, fontsize=10.5)
        axis.set_xlabel(phrase, fontsize=9)
        lines.append(f"{title}; {phrase}")
    points, phrase = project(torch.cat(list(features.values())))
    times = np.repeat(list(features), len(next(iter(features.values()))))
    last = axes.flat[len(features)]
    drawn = last.scatter(*points.T, c=times, s=5, cmap="viridis", alpha=0.6, linewidths=0)
    last.set_title("all of them, by timestep", fontsize=10.5)
    last.set_xlabel(phrase, fontsize=9)
    figure.colorbar(drawn, ax=last, label="timestep t")
    for axis in axes.flat[:len(features) + 1]:
        axis.set_xticks([], [])
        axis.set_yticks([], [])
    for axis in axes.flat[len(features) + 1:]:
        axis.axis("off")
    set_heading(figure, heading)
    save_figure(figure, path)
    return [*lines, f"all of them, by timestep: {phrase}"]


# ---- The table

def table_figure(levels, path, title=None):
    """Bars: where the parameters are, and where the memory goes."""
    names = [" ".join([level.name, "x".join(map(str, level.shape))]) for level in levels]
    figure, axes = new_figure(10, 0.27 * len(levels) + 1.8, 1, 2, sharey=True)
    places, (left, right) = np.arange(len(levels)), axes[0]
    left.barh(places, [level.parameters / 1e3 for level in levels], color=COLOURS[1], height=0.7)
    right.barh(places - 0.2, [level.activation / 1024 for level in levels], color=COLOURS[0],
               height=0.38, label="activation: its output")
    right.barh(places + 0.2, [level.kept / 1024 for level in levels], color="#999999", height=0.38,
               label="kept until the backward pass")
    left.set_yticks(places, names, fontsize=9)
    left.invert_yaxis()
    left.set_xlabel("parameters, thousands")
    right.set_xlabel("memory for one image, KiB")
    right.legend(frameon=False, fontsize=9, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    for axis in (left, right):
        axis.grid(False, axis="y")
        axis.set_axisbelow(True)
    set_heading(figure, title)
    save_figure(figure, path)


# ---- From the flags to a figure. Each of these draws one, and prints what it found.

def draw_table(args, path, device):
    if args.channels:
        if len(args.channels) > 8 or max(args.channels) > 4096:
            raise ValueError(f"--channels {' '.join(map(str, args.channels))}: "
                             "up to 8 levels of up to 4096 channels")
        size, multiple = args.image_size or 64, 2 ** len(args.channels)
        model, name = PlainUNet(args.channels), f"plain U-Net {args.channels}"
    elif args.model:
        model, name = create_model(args.model), f"{args.model} with its default settings"
        size, multiple = args.image_size or {"simple": 28}.get(args.model, 64), model.multiple
    else:
        checkpoint, model, _, data = open_model(args, device)
        refuse_other_images(args, data)
        name = Path(checkpoint).name
        size, multiple = args.image_size or data["image_size"], model.multiple
    if size % multiple or size > 512:
        raise ValueError(f"--image_size {size}: "
                         f"this network takes multiples of {multiple} up to 512")
    title = f"{name}, {model.image_channels}x{size}x{size}"
    levels, peak = model_table(model.to(device), size)
    print(f"{title}, one image, float32", *table_lines(levels, peak), sep="\n")
    table_figure(levels, path, as_text(title))


def draw_from_model(name, args, path, device):
    _, model, diffusion, data = open_model(args, device)
    refuse_other_images(args, data)
    T, size = diffusion.num_timesteps, data["image_size"]
    timesteps = choose_timesteps(args.timesteps, FIGURES[name].timesteps, T)
    what = f"{type(model).__name__}, {as_text(data['name'])}"
    if name == "time":
        sines, learned = time_embeddings(model, T)
        time_figure(sines, learned, timesteps, path, f"time embedding: {what}")
        return
    if name == "attention":
        layer_name, layer, side = choose_layer(model, args.layer, size)
        if args.query and not max(args.query) < size:
            raise ValueError(f"--query {args.query[0]} {args.query[1]}: "
                             f"rows and columns go from 0 to {size - 1}")
    y = choose_one_label(args.label, data["classes"])
    settings = dict(seed=args.seed, sampler=args.sampler, steps=args.steps, device=device,
                    y=None if y is None else y.to(device))
    calls = len(diffusion.sampling_levels(args.sampler, args.steps)) - 1
    cost = format_seconds(seconds_for(model, diffusion, 1, size, 1, calls, device))
    print(f"{name}: {calls} calls of the model on one image, about {cost} here", flush=True)
    what += "" if y is None or int(y) < 0 else f", class {as_text(data['classes'][int(y)])}"
    if name == "attention":
        moments, picture = attention_maps(model, diffusion, layer, timesteps, size, **settings)
        query = (tuple(place * side // size for place in args.query) if args.query
                 else busiest(picture, side))
        rows, columns = (f"{place * size // side} to {(place + 1) * size // side - 1}"
                         for place in query)
        print(f"layer {layer_name}, {side}x{side}, asked by the cell of "
              f"rows {rows} and columns {columns} (--query takes one pixel of it)")
        attention_figure(moments, query, path,
                         f"where {layer_name} ({side}x{side}) looks from the framed cell; "
                         f"reach: the mean of all cells. {what}")
        return
    (t, x_t, _), *_, (_, picture, _) = sampled(model, diffusion, timesteps[:1], size, **settings)
    boxes = parts(model)
    seen = [(part, output) for part, output in activations(model, x_t, t, settings["y"])
            if any(True for _ in boxes[part].parameters())]     # a pool repeats what came before
    activations_figure(x_t[0].cpu(), seen, picture[0].cpu(), path,
                       f"feature maps at t = {t}: {what}")


def draw_features(args, path, device):
    if args.projection == "tsne":
        find_tsne()                                             # better now than after the features
    _, model, diffusion, data = open_model(args, device)
    timesteps = choose_timesteps(args.timesteps, FIGURES["features"].timesteps,
                                 diffusion.num_timesteps)
    dataset, images, labels, _ = unseen_images(data, args.data_dir, args.dataset)
    count = min(args.num_images, len(images))
    if count < 4:
        raise ValueError(f"--num_images {args.num_images}: {count} images make no map; 4 or more")
    pick = shuffled(len(images), args.seed)[:count]
    cost = format_seconds(
        seconds_for(model, diffusion, count, data["image_size"], 100, len(timesteps), device))
    print(f"features: {count} images of {dataset} at {len(timesteps)} noise levels, "
          f"about {cost} here"
          + (", and as long again for t-SNE or longer" if args.projection == "tsne" else ""),
          flush=True)

    def project(features):
        if args.projection == "tsne":
            return tsne(features, args.seed), "t-SNE"
        points, shares = pca(features)
        return points, (f"PCA; the axes: {100 * shares[0]:.0f} and {100 * shares[1]:.0f} % "
                        "of the variance")

    features = {t: bottleneck_features(model, diffusion, images[pick], t, seed=args.seed,
                                       flatten=args.flatten)
                for t in tqdm(timesteps, desc="noise levels")}
    title = (f"the bottleneck's features of {count} pictures: "
             f"{type(model).__name__}, {as_text(dataset)}")
    names = None if labels is None else class_names(dataset, True)
    labels = None if labels is None else labels[pick]
    print(*features_figure(
        features, labels, names and [as_text(name, most=14) for name in names], path, project,
        title), sep="\n")


@command
def main(argv=None):
    parser = Parser(description="Figures of the network. --figure: " + "; ".join(
        f"{name}: {row.help}" for name, row in FIGURES.items()))
    add = parser.add
    add("--figure", "what to draw", "activations", choices=list(FIGURES))
    add("--checkpoint", CHECKPOINT_HELP)
    add("--timesteps", "the noise levels shown, 0 to T - 1 (activations: the first); "
        "default: each figure's own", type=whole_number, nargs="+", metavar="t")
    add("--seed", "picks the noise and the real pictures", 0, type=seed_number)
    add("--output_dir", "where the figure goes", "outputs")
    add("--device")
    parser.group("activations and attention, of a picture that is sampled")
    add("--label", "its class, as a number or name; none: without a class; default: the first")
    add("--sampler", "how to step down", "ddim", choices=sorted(SAMPLERS))
    add("--steps", "model calls; default: the sampler's own number", type=positive_int)
    add("--layer", "which attention layer; default: of those with the finest map the last")
    add("--query", "row and column, in pixels, of the place that asks; "
        "default: where the picture is busiest",
        type=whole_number, nargs=2, metavar=("ROW", "COLUMN"))
    parser.group("features, of real pictures (of the test set where there is one)")
    add("--dataset", DATASET_HELP.split(";")[0] + "; default: what the model was trained on",
        metavar="NAME")
    add("--data_dir")
    add("--num_images", "how many", 500, type=positive_int)
    add("--flatten", "keep the bottleneck's positions apart instead of taking their mean", False,
        action="store_true")
    add("--projection", "from many numbers to two; tsne needs scikit-learn", "pca",
        choices=("pca", "tsne"))
    parser.group("table, of --checkpoint or instead of")
    add("--channels", "a plain U-Net with these channels, one level each: conv 3x3 down, "
        "conv 3x3 at the bottom, transposed conv 4x4 and conv 3x3 up; 3 channels in",
        type=positive_int, nargs="+", metavar="C")
    add("--model", "a network with its default settings, untrained", choices=sorted(MODELS))
    add("--image_size", "height and width in pixels; "
        "default: the checkpoint's, 28 for simple, else 64", type=positive_int)
    args = parser.parse_args(argv)
    used = {"figure", "checkpoint", "dataset", "seed", "output_dir", "device",
            *FIGURES[args.figure].flags.split()}
    if args.channels or args.model:
        used.remove("dataset")
    parser.refuse(vars(args).keys() - used, f"--figure {args.figure}")
    few_numbers("timesteps", args.timesteps, most=8)
    if args.num_images > 20_000:
        raise ValueError(f"--num_images {args.num_images}: at most 20000 in a figure")
    given = [f"--{flag}" for flag in ("channels", "model", "checkpoint") if getattr(args, flag)]
    if (args.channels or args.model) and len(given) > 1:
        raise ValueError(f"{' and '.join(given)}: give one of them")

    keep_apart(args.dataset, args.output_dir)
    device = get_device(args.device)
    path = make_output_dir(args.output_dir, FIGURES[args.figure].file) / FIGURES[args.figure].file
    if args.figure == "table":
        draw_table(args, path, device)
    elif args.figure == "features":
        draw_features(args, path, device)
    else:
        draw_from_model(args.figure, args, path, device)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
