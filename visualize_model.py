"""Figures of the network, one function each.

    python visualize_model.py                                 # its feature maps, level by level
    python visualize_model.py --figure attention              # where each head looks while a picture is sampled
    python visualize_model.py --figure time                   # what the network is told of t
    python visualize_model.py --figure features               # what the bottleneck knows of the class, as a map
    python visualize_model.py --figure table                  # parameters and memory, level by level
    python visualize_model.py --figure table --channels 64 128 256      # of a plain U-Net with these channels

Writes outputs/activations.png, or the file that FIGURES names.
"""

import contextlib
import copy
import math
import weakref
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from data import DATASET_HELP, class_names
from diffusion import SAMPLERS, seeded_noise
from models import MODELS, create_model
from models.attention_unet import SelfAttention
from models.unet import TimeEmbedding
from sample import OWN, choose_labels, find_model, load_model, seconds_for
from utils import (Parser, command, describe_device, format_seconds, get_device, image_grid, make_output_dir,
                   positive_int, save_figure, seed_number, to_signed, to_uint8, whole_number)
from visualize_diffusion import COLOURS, choose_timesteps, images_of, nearest, new_figure


class Row(NamedTuple):
    file: str  # what it is called in --output_dir
    timesteps: tuple  # its noise levels for T = 1000; for another T they are scaled
    help: str


FIGURES = {
    "activations": Row("activations.png", (250,), "feature maps of each level while a picture is sampled"),
    "attention":   Row("attention.png", (999, 800, 600, 400, 200, 50), "where each head looks meanwhile"),
    "time":        Row("time_embedding.png", (0, 100, 250, 500, 750, 999), "what the network is told of t"),
    "features":    Row("features.png", (0, 200, 400, 600, 800), "the bottleneck's features of real pictures"),
    "table":       Row("model_table.png", (), "channels, parameters and memory of each level"),
}
# Nine marks that stay apart for the colour-blind (Okabe & Ito 2008, without the yellow, which white paper swallows).
PALETTE, MARKERS = (*COLOURS, "#e69f00", "#56b4e9", "#cc79a7"), "o^sDvP*"


# ---- Looking inside: a forward hook on each part

def parts(model):
    """{name: module}: the boxes that one would draw, in the order of the file; lists of modules are opened."""
    def walk(module, prefix):
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList):
                yield from walk(child, f"{prefix}{name}.")
            else:
                yield prefix + name, child

    found = dict(walk(model, ""))
    if len(found) == 1:                                     # a wrapper: what matters is inside
        inside, = found.values()
        return parts(inside) or found
    return found


@contextlib.contextmanager
def watching(model, look):
    """Inside the `with`, look(name, module, output) is called after each part of the model has run."""
    def hook(name):
        return lambda module, inputs, output: look(name, module, output) if torch.is_tensor(output) else None
    handles = [module.register_forward_hook(hook(name)) for name, module in parts(model).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def activations(model, x_t, t, y=None):
    """What each part of the model gives back, in the order of the calls: [(name, tensor)].

    x_t: [B, C, H, W].  t: an integer.  Tensors are [B, C', H', W'], those of the embeddings [B, dim].
    """
    seen = []
    with watching(model, lambda name, module, output: seen.append((name, output.detach().clone()))):
        model(x_t, torch.full((len(x_t),), t, device=x_t.device), y)
    return seen


def sampled(model, diffusion, timesteps, image_size, *, seed=0, sampler="ddim", steps=None, y=None, device="cpu"):
    """Sample one picture; yields (t, x_t, x_0 estimate made from x_t) at the levels nearest to `timesteps`, right
    after the model has answered there, and last (-1, picture, picture)."""
    levels = diffusion.sampling_levels(sampler, steps)
    wanted = set(nearest(levels[:-1], timesteps))
    x_t = seeded_noise(seed, [0], 0, (model.image_channels, image_size, image_size)).to(device)
    path = diffusion.trajectory(model, x_t, sampler=sampler, steps=steps, seed=seed, y=y)
    for k, (_, x_next, x_0) in enumerate(tqdm(path, total=len(levels) - 1, desc="sampling", unit="call")):
        if k in wanted:
            yield levels[k], x_t, x_0
        x_t = x_next
    yield -1, x_t, x_t


# ---- Attention

def attention_layers(model):
    """{name: SelfAttention} in the order of the file. Raises ValueError if there is none."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, SelfAttention)}
    if not found:
        raise ValueError(f"this {type(model).__name__} has no attention to draw; train a network that has it with "
                         "python train.py --dataset NAME --preset fabrics_laptop (or quick, for small pictures)")
    return found


def choose_layer(model, name, image_size):
    """(name, layer, side of its map): the one asked for, or the finest on the way up.

    Raises ValueError for a name that is not there.
    """
    layers, sides = attention_layers(model), {}
    if name is not None and name not in layers:
        raise ValueError(f"unknown layer {name!r}; choose from {', '.join(layers)}")
    handles = [layer.register_forward_hook(lambda *call, key=key: sides.update({key: call[-1].shape[-1]}))
               for key, layer in layers.items()]
    device = next(model.parameters()).device
    with torch.no_grad():
        model(torch.zeros(1, model.image_channels, image_size, image_size, device=device),
              torch.zeros(1, dtype=torch.long, device=device))
    for handle in handles:
        handle.remove()
    name = name or max(sides, key=lambda key: (sides[key], list(sides).index(key)))    # in the order of the calls
    return name, layers[name], sides[name]


@contextlib.contextmanager
def recording(layer):
    """Inside the `with`, the layer keeps its weights."""
    layer.record = True
    try:
        yield
    finally:
        layer.record, layer.weights = False, None


def attention_maps(model, diffusion, layer, timesteps, image_size, **settings):
    """Sample a picture and keep what the layer's heads did at the levels nearest to `timesteps`.

    settings: see sampled.  Returns ([(t, x_t, x_0 estimate, weights)], picture): images [C, H, W], weights
    [heads, positions, positions], whose row i says where position i looked and sums to 1.
    """
    moments = []
    with recording(layer):
        for t, x_t, x_0 in sampled(model, diffusion, timesteps, image_size, **settings):
            if t >= 0:
                moments.append((t, x_t[0].cpu(), x_0[0].cpu(), layer.weights[0].float().cpu()))
    return moments, x_0[0].cpu()


def busiest(picture, side):
    """(row, column) of the cell, of side x side, whose pixels differ most: a place worth asking about."""
    cells = F.pixel_unshuffle(picture.mean(dim=0, keepdim=True), picture.shape[-1] // side)   # [pixels, side, side]
    return divmod(int(cells.std(dim=0, unbiased=False).argmax()), side)


def reach(weights, side):
    """How far the heads look, on average over all positions, in cells. weights: [heads, N, N] -> [heads]."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()], dim=1).float()                # [N, 2]
    return (weights * torch.cdist(places, places)).sum(-1).mean(-1)


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


def attention_figure(moments, query, path, title=None):
    """A row for each level: x_t, the guess of x_0, and where each head looks from the framed cell.

    moments: what attention_maps returns.  query: (row, column) of the cell.
    """
    heads, positions, _ = moments[0][-1].shape
    side = math.isqrt(positions)
    place = query[0] * side + query[1]
    most = max(float(weights[:, place].max()) for *_, weights in moments) * positions
    norm = LogNorm(0.1, max(most, 1))
    figure, axes = new_figure(1.25 * (heads + 2) + 1.1, 1.42 * len(moments) + 0.6, len(moments), heads + 2)
    for panels, (t, x_t, x_0, weights) in zip(axes, moments):
        for axis, image in zip(panels, (x_t, x_0)):
            show(axis, image)
            mark(axis, *query, image.shape[-1] / side)
        far = reach(weights, side) * x_t.shape[-1] / side
        for axis, seen, pixels in zip(panels[2:], weights[:, place], far):
            drawn = show(axis, (seen * positions).clamp(min=0.1).view(side, side), norm=norm, cmap="viridis")
            mark(axis, *query, 1)
            axis.set_xlabel(f"reach {pixels:.1f} px", fontsize=9, labelpad=2)
        panels[0].set_ylabel(f"t = {t}", fontsize=10.5)
    for axis, name in zip(axes[0], ("$x_t$", "guess of $x_0$", *(f"head {k + 1}" for k in range(heads)))):
        axis.set_title(name, fontsize=10.5)
    bar = figure.colorbar(drawn, ax=axes, shrink=min(1, 3 / len(moments)), format="%g", pad=0.015)
    bar.set_label("attention, times the even share")
    figure.suptitle(title, fontsize=12)
    save_figure(figure, path)


# ---- Activations

def activations_figure(x_t, seen, picture, path, title=None, channels=8):
    """A row for each part that gives feature maps: its strongest channels, side by side.

    x_t, picture: [C, H, W] in [-1, 1].  seen: what activations returns. Of each part the channels whose values
    differ most across the picture are shown, in their own order, each from its lowest to its highest value.
    """
    maps = [(name, output[0].float().cpu()) for name, output in seen if output.ndim == 4]
    figure, axes = new_figure(1.1 * (channels + 1) + 1.2, 1.13 * len(maps) + 0.5, len(maps), channels + 1)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, name in zip(axes[:, 0], (x_t, picture), ("$x_t$, the input", "the finished picture")):
        axis.axis("on")
        show(axis, image)
        axis.set_title(name, fontsize=9.5)
    for panels, (name, output) in zip(axes[:, 1:], maps):
        strongest = output.flatten(1).std(dim=1, unbiased=False).argsort(descending=True)[:channels].sort().values
        for axis, k in zip(panels, strongest.tolist()):
            axis.axis("on")
            show(axis, output[k], cmap="viridis")
            axis.set_title(f"channel {k}", fontsize=8, pad=2)
        size = "x".join(map(str, output.shape[1:]))
        panels[0].set_ylabel(f"{name}\n{size}", fontsize=9.5, rotation=0, ha="right", va="center", labelpad=6)
    figure.suptitle(title, fontsize=12)
    save_figure(figure, path)


# ---- Time embeddings

@torch.no_grad()
def time_embeddings(model, num_timesteps):
    """(sines and cosines [T, dim], what the learned network makes of them [T, dim']) for t = 0..T-1.

    Raises ValueError for a network whose embedding is not ours.
    """
    table = next((module for module in model.modules() if isinstance(module, TimeEmbedding)), None)
    if table is None:
        raise ValueError("this network embeds the time in a way of its own; the figure time draws TimeEmbedding")
    t = torch.arange(num_timesteps, device=next(model.parameters()).device)
    return table(t).cpu(), model.time_mlp(t).float().cpu()


def time_figure(sines, learned, timesteps, path, title=None):
    """The embedding as a picture and as waves; below, how alike two timesteps look, before and after learning.

    sines, learned: see time_embeddings.  timesteps: whose likeness to all others is drawn at the right.
    """
    T, dim = sines.shape
    half = dim // 2
    figure, axes = new_figure(10, 6.6, 2, 2)
    drawn = axes[0, 0].imshow(sines.T, aspect="auto", cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest",
                              extent=(-0.5, T - 0.5, dim - 0.5, -0.5))
    axes[0, 0].grid(False)
    axes[0, 0].set_ylabel(f"sines (0-{half - 1}), cosines ({half}-{dim - 1})")
    figure.colorbar(drawn, ax=axes[0, 0], label="value")
    for k, colour in zip(sorted({half // 4, half // 2, 3 * half // 4}), COLOURS):
        length = 2 * math.pi * 10_000 ** (k / half)
        axes[0, 1].plot(sines[:, k], color=colour, label=f"{k}: {length:,.0f} steps long", linewidth=1.4)
    axes[0, 1].set_ylim(-1.1, 1.6)
    axes[0, 1].legend(frameon=False, fontsize=9, loc="upper right", ncols=3, columnspacing=1)
    axes[0, 1].set_ylabel("value")
    for axis, values, name in zip(axes[1], (sines, learned), ("the sines and cosines", "the learned embedding")):
        unit = F.normalize(values, dim=1)
        for t, colour in zip(timesteps, PALETTE):
            axis.plot(unit @ unit[t], color=colour, linewidth=1.4, label=f"t = {t}")
        axis.set_ylabel("cosine of the angle")
        axis.set_title(f"how alike t and the others look to {name}", fontsize=10.5)
    axes[1, 1].sharey(axes[1, 0])
    axes[1, 1].legend(frameon=False, fontsize=9, loc="lower left", ncols=2)
    axes[0, 0].set_title("the embedding of each timestep", fontsize=10.5)
    axes[0, 1].set_title("three of its sines", fontsize=10.5)
    for axis in axes.flat:
        axis.set_xlabel("timestep t")
    figure.suptitle(title, fontsize=12)
    save_figure(figure, path)


# ---- Features of the bottleneck

@torch.no_grad()
def bottleneck_features(model, diffusion, images, t, *, seed=0, flatten=False, batch_size=100):
    """What the bottleneck gives back for real images at noise level t: [N, channels], the mean over its positions,
    or [N, channels * H * W] if flatten.

    images: uint8 [N, C, H, W].  The noise depends on the seed alone, not on t. The model is not told the class:
    what the features know of it comes from the picture.
    """
    names = [name for name in parts(model) if name.split(".")[-1].startswith(("bottleneck", "mid"))]
    if not names:
        raise ValueError("this network has no part called bottleneck or mid, whose features could be drawn")
    device, found = next(model.parameters()).device, []
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    for x_0, part in zip(images.split(batch_size), noise.split(batch_size)):
        x_t, _ = diffusion.forward_diffusion(to_signed(x_0), torch.full((len(x_0),), t), part)
        output = dict(activations(model, x_t.to(device), t))[names[-1]].float().cpu()
        found.append(output.flatten(1) if flatten else output.mean(dim=(2, 3)))
    return torch.cat(found)


def pca(features, dim=2):
    """Principal components: the directions in which the features spread most (Pearson 1901).

    features: [N, D].  Returns (coordinates [N, dim], the share of the variance in each of them).
    """
    centred = features.double() - features.double().mean(dim=0)
    _, lengths, directions = torch.linalg.svd(centred, full_matrices=False)
    variance = lengths.square()
    return (centred @ directions[:dim].T).float(), (variance / variance.sum())[:dim].tolist()


def tsne(features, seed=0):
    """Neighbours stay neighbours, distances mean little (van der Maaten & Hinton 2008). [N, D] -> [N, 2]."""
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise ValueError("--projection tsne needs scikit-learn: pip install scikit-learn; or take pca") from error
    perplexity = min(30, (len(features) - 1) / 3)
    return torch.from_numpy(TSNE(init="pca", perplexity=perplexity, random_state=seed).fit_transform(features.numpy()))


def centre_accuracy(features, labels):
    """How well the classes stand apart: the share of the second half of the images whose nearest class centre,
    made from the first half, is that of their own class."""
    half = len(features) // 2
    known = labels[:half].unique()
    centres = torch.stack([features[:half][labels[:half] == k].mean(dim=0) for k in known])
    return float((known[torch.cdist(features[half:], centres).argmin(dim=1)] == labels[half:]).float().mean())


def scatter_classes(axis, points, labels, names):
    """Points in the colours of their classes, whose names stand at the middle (median) of each."""
    for k, name in enumerate(names):
        own = points[labels == k]
        if len(own):
            axis.scatter(*own.T, s=7, color=PALETTE[k % len(PALETTE)], marker=MARKERS[k // len(PALETTE) % len(MARKERS)],
                         alpha=0.6, linewidths=0)
    for k, name in enumerate(names):
        if (labels == k).any():
            axis.text(*points[labels == k].median(dim=0).values, name, ha="center", va="center", fontsize=10,
                      weight="bold", color="black", path_effects=[withStroke(linewidth=3, foreground="white")])


def features_figure(features, labels, names, path, project, title=None):
    """A map of the features at each noise level, coloured by class, and one of all levels, coloured by timestep.

    features: {t: [N, D]}.  labels: [N], or None without classes.  project: features -> (points [M, 2], a phrase).
    Returns lines of text: what each map says.
    """
    columns = min(3, len(features) + 1)
    rows = math.ceil((len(features) + 1) / columns)
    figure, axes = new_figure(3.5 * columns, 3.5 * rows, rows, columns)
    lines = []
    for axis, (t, values) in zip(axes.flat, features.items()):
        points, phrase = project(values)
        if labels is None:
            axis.scatter(*points.T, s=7, color=COLOURS[1], alpha=0.6, linewidths=0)
        else:
            scatter_classes(axis, points, labels, names)
            phrase = f"{100 * centre_accuracy(values, labels):.0f} % nearest centre; {phrase}"
        axis.set_title(f"t = {t}\n{phrase}", fontsize=9.5)
        lines.append(f"t = {t}: {phrase}")
    points, phrase = project(torch.cat(list(features.values())))
    times = np.repeat(list(features), len(next(iter(features.values()))))
    last = axes.flat[len(features)]
    drawn = last.scatter(*points.T, c=times, s=5, cmap="viridis", alpha=0.6, linewidths=0)
    last.set_title(f"all of them, by timestep\n{phrase}", fontsize=9.5)
    figure.colorbar(drawn, ax=last, label="timestep t")
    for axis in axes.flat[:len(features) + 1]:
        axis.set_xticks([], [])
        axis.set_yticks([], [])
    for axis in axes.flat[len(features) + 1:]:
        axis.axis("off")
    figure.suptitle(title, fontsize=12)
    save_figure(figure, path)
    return [*lines, f"all of them, by timestep: {phrase}"]
