"""Figures of a network: where attention looks, feature maps, embeddings, a map of the bottleneck's
features, a table.

visualize_model.py draws them from the numbers of inside.py.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.colors import LogNorm
from matplotlib.patheffects import withStroke

from images import COLOURS, mark, new_figure, save_figure, set_heading, show
from inside import centre_accuracy, reach

# Okabe & Ito's colours but yellow, which white paper swallows, and three more: ten for ten classes.
PALETTE, MARKERS = (*COLOURS, "#e69f00", "#56b4e9", "#999999", "#8c510a", "#5e3c99"), "o^sDvP*"


# ---- Attention

def attention_figure(moments, query, path, title=None):
    """A row for each level: x_t, the guess of x_0, and where each head looks from the framed cell.

    moments: what inside.attention_maps returns.  query: (row, column) of the cell.
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

    x_t, picture: [C, H, W] in [-1, 1].  seen: what inside.activations returns.
    Of each part the channels whose values differ most across the picture are shown, in their own
    order, each from its lowest to its highest value.
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

    sines, learned: see inside.time_embeddings.
    timesteps: those whose likeness to all others is drawn.
    """
    T, dim = sines.shape
    half = dim // 2
    figure, axes = new_figure(10, 6.6, 2, 2)
    drawn = axes[0, 0].imshow(sines.T.numpy(), aspect="auto", cmap="RdBu_r", vmin=-1, vmax=1,
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
    for k in range(len(names)):
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

    features: {t: [N, D]}, of inside.bottleneck_features.  labels: [N], or None without classes.
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
    """Bars: where the parameters are, and where the memory goes.

    levels: the first of what inside.model_table returns.
    """
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
