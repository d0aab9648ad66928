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
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.colors import LogNorm
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from data import DATASET_HELP, class_names
from diffusion import SAMPLERS, seeded_noise
from models import MODELS, create_model
from models.attention_unet import SelfAttention
from models.unet import TimeEmbedding
from sample import CHECKPOINT_HELP, choose_labels, find_model, load_model, seconds_for
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


@contextlib.contextmanager
def recording(*layers):
    """Inside the `with`, these layers keep the weights of their last call."""
    for layer in layers:
        layer.record = True
    try:
        yield
    finally:
        for layer in layers:
            layer.record, layer.weights = False, None


@torch.no_grad()
def choose_layer(model, name, image_size):
    """(name, layer, side of its map): the one asked for, or of those with the finest map the last.

    Raises ValueError for a name that is not there.
    """
    layers, device = attention_layers(model), next(model.parameters()).device
    if name is not None and name not in layers:
        raise ValueError(f"unknown layer {name!r}; choose from {', '.join(layers)}")
    with recording(*layers.values()):
        model(torch.zeros(1, model.image_channels, image_size, image_size, device=device),
              torch.zeros(1, dtype=torch.long, device=device))
        sides = {key: math.isqrt(layer.weights.shape[-1]) for key, layer in layers.items()}
    name = name or max(reversed(sides), key=sides.get)
    return name, layers[name], sides[name]


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
    figure, axes = new_figure(1.1 * (channels + 1) + 1.2, 1.15 * len(maps) + 0.5, len(maps), channels + 1)
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
        count, height, width = output.shape
        panels[0].set_ylabel(f"{name}\n{count} of {height}x{width}", fontsize=9.5, rotation=0, ha="right", va="center", labelpad=6)
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
    axes[1, 0].legend(frameon=False, fontsize=9, loc="lower center", ncols=3)
    axes[0, 0].set_title("the embedding of each timestep", fontsize=10.5)
    axes[0, 1].set_title("three of its sines, by the length of a wave", fontsize=10.5)
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
            axis.text(*points[labels == k].median(dim=0).values, name, ha="center", va="center", fontsize=11,
                      weight="bold", color=PALETTE[k % len(PALETTE)],
                      path_effects=[withStroke(linewidth=3, foreground="white")])


def features_figure(features, labels, names, path, project, heading=None):
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
    figure.suptitle(heading, fontsize=12)
    save_figure(figure, path)
    return [*lines, f"all of them, by timestep: {phrase}"]


# ---- The table

class PlainUNet(nn.Module):
    """A U-Net reduced to what decides its size: no norms, no activations, no time, no output layer.

    channels: of each level, from the top.  On the way down a 3x3 convolution, then a 2x2 max-pool; at the bottom a
    3x3 convolution that keeps the channels; on the way up a transposed 4x4 convolution (stride 2) to the level's
    channels and a 3x3 convolution on the concatenation with the skip. Height and width: multiples of 2^levels.
    """

    def __init__(self, channels, image_channels=3):
        super().__init__()
        below = [*channels[1:], channels[-1]]
        self.image_channels = image_channels
        self.encoder = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1)
                                     for i, o in zip([image_channels, *channels[:-1]], channels))
        self.bottleneck = nn.Conv2d(channels[-1], channels[-1], 3, padding=1)
        self.upsample = nn.ModuleList(nn.ConvTranspose2d(b, c, 4, stride=2, padding=1)
                                      for b, c in reversed(list(zip(below, channels))))
        self.decoder = nn.ModuleList(nn.Conv2d(2 * c, c, 3, padding=1) for c in reversed(channels))

    def forward(self, x, t=None, y=None):
        skips = []
        for encode in self.encoder:
            skips.append(encode(x))
            x = F.max_pool2d(skips[-1], 2)
        x = self.bottleneck(x)
        for upsample, decode in zip(self.upsample, self.decoder):
            x = decode(torch.cat([upsample(x), skips.pop()], dim=1))
        return x


class Memory(TorchDispatchMode):
    """Inside the `with`, counts the bytes of all tensors made there: `alive` now, the most at once as `peak`.

    A view counts with the tensor it looks into, and not at all if that is a parameter of the model. The scratch
    space within one operation is not seen.
    """

    def __init__(self, model):
        super().__init__()
        self.parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.alive = self.peak = self.part = 0
        self.made = {}                                      # address: (bytes, part that was running)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if torch.is_tensor(tensor):
                self.count(tensor.untyped_storage())
        return made

    def count(self, storage):
        place, size = storage.data_ptr(), storage.nbytes()
        if place and place not in self.made and place not in self.parameters:
            self.made[place] = size, self.part
            self.alive += size
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self.forget, place)

    def forget(self, place):
        self.alive -= self.made.pop(place)[0]


class Level(NamedTuple):
    name: str
    shape: tuple  # of what it gives back, without the batch: (channels, height, width), or (values,)
    parameters: int
    activation: int  # bytes of what it gives back
    kept: int  # bytes that training keeps until the backward pass


def model_table(model, image_size):
    """Measure a network with one image: (a Level for each part in the order of the calls, peak bytes in sampling).

    activation: the output of the part alone, as a forward hook sees it: channels x height x width x 4 bytes.
    kept: of what was made from the end of the part before to the end of this one, in a forward pass with gradients
        and in training mode, all that is still there when the pass is over, because the backward pass needs it:
        inputs of convolutions and norms, concatenations, dropout's choices. The answer is in the last row.
    peak: the most bytes alive at one moment of a forward pass without gradients: skips, concatenations and all
        else that is being worked on. Neither counts the input, parameters or the scratch space of an operation.
    A part that is called twice has its parameters in the first row; parameters of no part that was called stand in
    a last row of their own. Batch 1, in the precision of the weights (float32).
    """
    model = copy.deepcopy(model).requires_grad_(True)
    device, rows, seen = next(model.parameters()).device, [], set()
    x_t = torch.zeros(1, model.image_channels, image_size, image_size, device=device)
    t = torch.zeros(1, dtype=torch.long, device=device)

    def look(name, module, output):
        new = [p for p in module.parameters() if id(p) not in seen]
        seen.update(map(id, new))
        rows.append((name, tuple(output.shape[1:]), sum(p.numel() for p in new), output.nbytes))
        memory.part += 1

    with torch.no_grad(), Memory(model) as memory:
        model.eval()(x_t, t)
    peak = memory.peak
    with watching(model, look), torch.enable_grad(), Memory(model) as memory:
        answer = model.train()(x_t, t)
    kept = [0] * len(rows)
    for size, part in memory.made.values():
        kept[min(part, len(rows) - 1)] += size
    del answer                                              # it held all that the backward pass needs
    levels = [Level(*row, size) for row, size in zip(rows, kept)]
    rest = sum(p.numel() for p in model.parameters() if id(p) not in seen)
    return levels + [Level("other", (), rest, 0, 0)] * (rest > 0), peak


def table_lines(levels, peak):
    """What model_table found, as lines of text with the totals."""
    head = ("level", "channels", "resolution", "parameters", "activation, bytes", "kept to train, bytes")
    rows = [(name, str(shape[0]) if shape else "", "x".join(map(str, shape[1:])) or "-", f"{parameters:,}",
             f"{activation:,}", f"{kept:,}") for name, shape, parameters, activation, kept in levels]
    parameters, activation, kept = (sum(getattr(level, key) for level in levels)
                                    for key in ("parameters", "activation", "kept"))
    rows = [head, *rows, ("total", "", "", f"{parameters:,}", f"{activation:,}", f"{kept:,}")]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [row[0].ljust(widths[0]) + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:]))
             for row in rows]
    return [*lines, f"peak memory of a forward pass (sampling one image): {peak:,} bytes of activations, "
            f"{peak + 4 * parameters:,} with the parameters in float32"]


def table_figure(levels, path, title=None):
    """Bars: where the parameters are, and where the memory goes."""
    names = [" ".join([level.name, "x".join(map(str, level.shape))]) for level in levels]
    figure, axes = new_figure(10, 0.27 * len(levels) + 1.8, 1, 2, sharey=True)
    places, (left, right) = np.arange(len(levels)), axes[0]
    left.barh(places, [level.parameters / 1e3 for level in levels], color=COLOURS[1], height=0.7)
    right.barh(places - 0.2, [level.activation / 1024 for level in levels], color=COLOURS[0], height=0.38,
               label="activation: its output")
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
    figure.suptitle(title, fontsize=12)
    save_figure(figure, path)


# ---- From the flags to a figure. Each of these returns a title for it, or prints what it found.

def draw_table(args, path, device):
    if args.channels:
        if len(args.channels) > 8 or max(args.channels) > 4096:
            raise ValueError(f"--channels {' '.join(map(str, args.channels))}: up to 8 levels of up to 4096 channels")
        size, multiple = args.image_size or 64, 2 ** len(args.channels)
        model, name = PlainUNet(args.channels), f"plain U-Net {args.channels}"
    elif args.model:
        model, name = create_model(args.model), f"{args.model} with its default settings"
        size, multiple = args.image_size or {"simple": 28}.get(args.model, 64), model.multiple
    else:
        model, _, data, name = load(args, device)
        size, multiple = args.image_size or data["image_size"], model.multiple
    if size % multiple or size > 512:
        raise ValueError(f"--image_size {size}: this network takes multiples of {multiple} up to 512")
    title = f"{name}, {model.image_channels}x{size}x{size}"
    levels, peak = model_table(model.to(device), size)
    print(f"{title}, one image, float32", *table_lines(levels, peak), sep="\n")
    table_figure(levels, path, title)


def load(args, device):
    """(model, process, facts about its data, name of the file) of --checkpoint."""
    path = find_model(args.checkpoint)
    print(f"device: {describe_device(device, args.device)}; model: {path}")
    return *load_model(path, device), Path(path).name


def draw_from_model(name, args, path, device):
    model, diffusion, data, _ = load(args, device)
    T, size = diffusion.num_timesteps, data["image_size"]
    timesteps = choose_timesteps(args.timesteps, FIGURES[name].timesteps, T)
    what = f"{type(model).__name__}, {data['name']}"
    if name == "time":
        sines, learned = time_embeddings(model, T)
        return time_figure(sines, learned, timesteps, path, f"time embedding: {what}")
    if name == "attention":
        layer_name, layer, side = choose_layer(model, args.layer, size)
        if args.query and not max(args.query) < size:
            raise ValueError(f"--query {args.query[0]} {args.query[1]}: rows and columns go from 0 to {size - 1}")
    y, _ = choose_labels(args.label, data["classes"], 1)
    if y is not None and len(y) > 1:
        raise ValueError(f"--label {args.label}: one picture is sampled, so one class")
    settings = dict(seed=args.seed, sampler=args.sampler, steps=args.steps, device=device,
                    y=None if y is None else y.to(device))
    calls = len(diffusion.sampling_levels(args.sampler, args.steps)) - 1
    cost = format_seconds(seconds_for(model, diffusion, 1, size, 1, calls, device))
    print(f"{name}: {calls} calls of the model on one image, about {cost} here", flush=True)
    what += "" if y is None or int(y) < 0 else f", class {data['classes'][int(y)]}"
    if name == "attention":
        moments, picture = attention_maps(model, diffusion, layer, timesteps, size, **settings)
        query = (args.query[0] * side // size, args.query[1] * side // size) if args.query else busiest(picture, side)
        print(f"layer {layer_name}, {side}x{side}, asked at row {query[0]}, column {query[1]}")
        return attention_figure(moments, query, path, f"where {layer_name} ({side}x{side}) looks from the framed cell"
                                f": {what}")
    (t, x_t, _), *_, (_, picture, _) = sampled(model, diffusion, timesteps[:1], size, **settings)
    boxes = parts(model)
    seen = [(part, output) for part, output in activations(model, x_t, t, settings["y"])
            if any(True for _ in boxes[part].parameters())]                 # a pool shows what came before it again
    return activations_figure(x_t[0].cpu(), seen, picture[0].cpu(), path, f"feature maps at t = {t}: {what}")


def draw_features(args, path, device):
    model, diffusion, data, _ = load(args, device)
    timesteps = choose_timesteps(args.timesteps, FIGURES["features"].timesteps, diffusion.num_timesteps)
    dataset, images, labels = images_of(data, args, train=False)
    count = min(args.num_images, len(images))
    if count < 4:
        raise ValueError(f"--num_images {args.num_images}: {count} images make no map; 4 or more")
    pick = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed))[:count]
    cost = format_seconds(seconds_for(model, diffusion, count, data["image_size"], 100, len(timesteps), device))
    print(f"features: {count} images of {dataset} at {len(timesteps)} noise levels, about {cost} here"
          + (", and as long again for t-SNE or longer" if args.projection == "tsne" else ""), flush=True)

    def project(features):
        if args.projection == "tsne":
            return tsne(features, args.seed), "t-SNE"
        points, shares = pca(features)
        return points, f"{100 * shares[0]:.0f} + {100 * shares[1]:.0f} % of the variance"

    features = {t: bottleneck_features(model, diffusion, images[pick], t, seed=args.seed, flatten=args.flatten)
                for t in tqdm(timesteps, desc="noise levels")}
    title = f"the bottleneck's features of {count} pictures: {type(model).__name__}, {dataset}"
    labels = labels[pick] if labels is not None and class_names(dataset) else None
    print(*features_figure(features, labels, class_names(dataset), path, project, title), sep="\n")


@command
def main(argv=None):
    parser = Parser(description="Figures of the network. --figure: " + "; ".join(
        f"{name}: {row.help}" for name, row in FIGURES.items()))
    add = parser.add
    add("--figure", "what to draw", "activations", choices=list(FIGURES))
    add("--checkpoint", CHECKPOINT_HELP)
    add("--timesteps", "the noise levels shown, 0 to T - 1 (activations: the first); default: each figure's own",
        type=whole_number, nargs="+", metavar="t")
    add("--seed", "picks the noise and the real pictures", 0, type=seed_number)
    add("--output_dir", "where the figure goes", "outputs")
    add("--device", "auto, cpu, cuda, cuda:1, mps", "auto")
    parser.group("activations and attention, of a picture that is sampled")
    add("--label", "its class, as a number or name; none: without a class; default: the first")
    add("--sampler", "how to step down", "ddim", choices=sorted(SAMPLERS))
    add("--steps", "model calls; default: the sampler's own number", type=positive_int)
    add("--layer", "which attention layer; default: of those with the finest map the last")
    add("--query", "row and column, in pixels, of the place that asks; default: where the picture is busiest",
        type=whole_number, nargs=2, metavar=("ROW", "COLUMN"))
    parser.group("features, of real pictures (of the test set where there is one)")
    add("--dataset", DATASET_HELP.split(";")[0] + "; default: what the model was trained on", metavar="NAME")
    add("--data_dir", "where the data sets of torchvision lie, or go", "data")
    add("--num_images", "how many", 500, type=positive_int)
    add("--flatten", "keep the bottleneck's positions apart instead of taking their mean", False, action="store_true")
    add("--projection", "from many numbers to two; tsne needs scikit-learn", "pca", choices=("pca", "tsne"))
    parser.group("table, of --checkpoint or instead of")
    add("--channels", "a plain U-Net with these channels, one level each: conv 3x3 down, conv 3x3 at the bottom, "
        "transposed conv 4x4 and conv 3x3 up; 3 channels in", type=positive_int, nargs="+", metavar="C")
    add("--model", "a network with its default settings, untrained", choices=sorted(MODELS))
    add("--image_size", "height and width in pixels; default: the checkpoint's, 28 for simple, else 64",
        type=positive_int)
    args = parser.parse_args(argv)
    if len(args.timesteps or []) > 8 or len(set(args.timesteps or [])) < len(args.timesteps or []):
        raise ValueError(f"--timesteps takes up to 8 numbers, each once; got {' '.join(map(str, args.timesteps[:9]))}")
    if args.num_images > 20_000:
        raise ValueError(f"--num_images {args.num_images}: at most 20000 in a figure")
    if args.channels and args.model:
        raise ValueError(f"--channels and --model {args.model}: give one of them")

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
