"""What goes on inside a network, as numbers: visualize_model.py draws them.
"""

import contextlib
import copy
import math
import weakref
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from diffusion import seeded_noise
from images import to_signed
from models.attention_unet import SelfAttention
from models.unet import TimeEmbedding
from schedules import nearest_levels


# ---- A forward hook on each part

def parts(model):
    """{name: module}: the boxes one would draw, in the file's order; module lists are opened."""
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
    """Inside the `with`, look(name, module, output) is called after each part of the model."""
    def hook(name):
        return lambda module, inputs, output: (
            look(name, module, output) if torch.is_tensor(output) else None)
    handles = [module.register_forward_hook(hook(name)) for name, module in parts(model).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def activations(model, x_t, t, y=None):
    """What each part of the model gives back, in the order of the calls: [(name, tensor)].

    x_t: [B, C, H, W].  t: an integer.  Tensors are [B, C', H', W'], those of embeddings [B, dim].
    """
    seen = []
    with watching(model, lambda name, module, output: seen.append((name, output.detach().clone()))):
        model(x_t, torch.full((len(x_t),), t, device=x_t.device), y)
    return seen


def sampled(model, diffusion, timesteps, image_size, *, seed=0, sampler="ddim", steps=None,
            y=None, device="cpu"):
    """Sample one picture; yields (t, x_t, x_0 estimate made from x_t) at the levels nearest to
    `timesteps`, right after the model has answered there, and last (-1, picture, picture)."""
    levels = diffusion.sampling_levels(sampler, steps)
    wanted = set(nearest_levels(levels[:-1], timesteps))
    x_t = seeded_noise(seed, [0], 0, (model.image_channels, image_size, image_size)).to(device)
    path = diffusion.trajectory(model, x_t, sampler=sampler, steps=steps, seed=seed, y=y)
    for k, (_, x_next, x_0) in enumerate(
            tqdm(path, total=len(levels) - 1, desc="sampling", unit="call")):
        if k in wanted:
            yield levels[k], x_t, x_0
        x_t = x_next
    yield -1, x_t, x_t


# ---- Attention

def attention_layers(model):
    """{name: SelfAttention} in the order of the file. Raises ValueError if there is none."""
    found = {name: module for name, module in model.named_modules()
             if isinstance(module, SelfAttention)}
    if not found:
        raise ValueError(f"this {type(model).__name__} has no attention to draw; "
                         "train a network that has it with python train.py --dataset NAME "
                         "--preset fabrics_laptop (or quick, for small pictures)")
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

    settings: see sampled.  Returns ([(t, x_t, x_0 estimate, weights)], picture): images [C, H, W],
    weights [heads, positions, positions], whose row i says where position i looked and sums to 1.
    """
    moments = []
    with recording(layer):
        for t, x_t, x_0 in sampled(model, diffusion, timesteps, image_size, **settings):
            if t >= 0:
                moments.append((t, x_t[0].cpu(), x_0[0].cpu(), layer.weights[0].float().cpu()))
    return moments, x_0[0].cpu()


def busiest(picture, side):
    """(row, column) of the cell, of side x side, whose pixels differ most: worth asking about."""
    grey = picture.mean(dim=0, keepdim=True)
    cells = F.pixel_unshuffle(grey, picture.shape[-1] // side)              # [pixels, side, side]
    return divmod(int(cells.std(dim=0, unbiased=False).argmax()), side)


def reach(weights, side):
    """How far heads look, averaged over positions, in cells. weights: [heads, N, N] -> [heads]."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()], dim=1).float()                # [N, 2]
    return (weights * torch.cdist(places, places)).sum(-1).mean(-1)


# ---- Embeddings and features

@torch.no_grad()
def time_embeddings(model, num_timesteps):
    """(sines and cosines [T, dim], what the learned layers make of them [T, dim']) for t = 0..T-1.

    Raises ValueError for a network whose embedding is not ours.
    """
    table = next((module for module in model.modules() if isinstance(module, TimeEmbedding)), None)
    if table is None:
        raise ValueError("this network embeds the time in a way of its own; "
                         "the figure time draws TimeEmbedding")
    t = torch.arange(num_timesteps, device=next(model.parameters()).device)
    return table(t).cpu(), model.time_mlp(t).float().cpu()


@torch.no_grad()
def bottleneck_features(model, diffusion, images, t, *, seed=0, flatten=False, batch_size=100):
    """What the bottleneck gives back for real images at noise level t: [N, channels], the mean over
    its positions, or [N, channels * H * W] if flatten.

    images: uint8 [N, C, H, W].  The noise depends on the seed alone, not on t. The model is not
    told the class: what the features know of it comes from the picture.
    """
    names = [name for name in parts(model) if name.split(".")[-1].startswith(("bottleneck", "mid"))]
    if not names:
        raise ValueError("this network has no part called bottleneck or mid, "
                         "whose features could be drawn")
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


def find_tsne():
    """scikit-learn's TSNE. ValueError where that is not installed."""
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise ValueError("--projection tsne needs scikit-learn: pip install scikit-learn; "
                         "or take pca") from error
    return TSNE


def tsne(features, seed=0):
    """Neighbours stay neighbours, distances mean little (van der Maaten & Hinton 2008).
    features: [N, D].  Returns [N, 2]."""
    perplexity = min(30, (len(features) - 1) / 3)
    model = find_tsne()(init="pca", perplexity=perplexity, random_state=seed)
    return torch.from_numpy(model.fit_transform(features.numpy()))


def centre_accuracy(features, labels):
    """How well the classes stand apart: the share of the second half of the images whose nearest
    class centre, made from the first half, is that of their own class."""
    half = len(features) // 2
    known = labels[:half].unique()
    centres = torch.stack([features[:half][labels[:half] == k].mean(dim=0) for k in known])
    return float((known[torch.cdist(features[half:], centres).argmin(dim=1)]
                  == labels[half:]).float().mean())


# ---- Sizes

class PlainUNet(nn.Module):
    """A U-Net reduced to what decides its size: no norms, no activations, no time, no output layer.

    channels: of each level, from the top.  On the way down a 3x3 convolution, then a 2x2 max-pool;
    at the bottom a 3x3 convolution that keeps the channels; on the way up a transposed 4x4
    convolution (stride 2) to the level's channels and a 3x3 convolution on the concatenation with
    the skip. Height and width: multiples of 2^levels.
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
    """Counts the bytes of all tensors made inside the `with`: `alive` now, `peak` the most at once.

    A view counts with the tensor it looks into, and not at all if that is a parameter of the model.
    The scratch space within one operation is not seen.
    """

    def __init__(self, model):
        super().__init__()
        self.parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.alive = self.peak = self.part = 0
        self.made = {}                                  # address: (bytes, part that was running)

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


class PartSize(NamedTuple):
    name: str
    shape: tuple  # of what it gives back without the batch: (channels, height, width), or (values,)
    parameters: int
    activation: int  # bytes of what it gives back
    kept: int  # bytes that training keeps until the backward pass


def model_table(model, image_size):
    """Measure a network with one image: (a PartSize for each part in the order of the calls,
    peak bytes in sampling).

    activation: the output of the part alone, as a forward hook sees it:
        channels x height x width x 4 bytes.
    kept: of what was made from the end of the part before to the end of this one, in a forward pass
        with gradients and in training mode, all that is still there when the pass is over, because
        the backward pass needs it: inputs of convolutions and norms, concatenations, dropout's
        choices. The answer is in the last row.
    peak: the most bytes alive at one moment of a forward pass without gradients: skips,
        concatenations and all else that is being worked on. Neither counts the input, parameters
        or the scratch space of an operation.
    A part that is called twice has its parameters in the first row; parameters of no part that was
    called stand in a last row of their own. Batch 1, in the precision of the weights (float32).
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
    del answer                                          # it held all that the backward pass needs
    levels = [PartSize(*row, size) for row, size in zip(rows, kept)]
    rest = sum(p.numel() for p in model.parameters() if id(p) not in seen)
    return levels + [PartSize("other", (), rest, 0, 0)] * (rest > 0), peak


def table_lines(levels, peak):
    """What model_table found, as lines of text with the totals."""
    head = ("level", "channels", "resolution", "parameters",
            "activation, bytes", "kept to train, bytes")
    rows = [(name, str(shape[0]) if shape else "", "x".join(map(str, shape[1:])) or "-",
             f"{parameters:,}", f"{activation:,}", f"{kept:,}")
            for name, shape, parameters, activation, kept in levels]
    parameters, activation, kept = (sum(getattr(level, key) for level in levels)
                                    for key in ("parameters", "activation", "kept"))
    rows = [head, *rows, ("total", "", "", f"{parameters:,}", f"{activation:,}", f"{kept:,}")]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [row[0].ljust(widths[0])
             + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:]))
             for row in rows]
    return [*lines, f"peak memory of a forward pass (sampling one image): {peak:,} bytes of "
            f"activations, {peak + 4 * parameters:,} with the parameters in float32"]
