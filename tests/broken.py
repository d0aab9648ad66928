"""Does diagnose.py find what is wrong? Trains models broken in eleven ways, and four healthy ones.

    python tests/broken.py                                           # on digits that the code draws
    python tests/broken.py --dataset fashion_mnist --data_dir path/to/data --seed 1

Prints a table: what was broken, what the diagnosis names first and second. A minute for each on two
cores.
"""

import copy
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from command_line import Parser, command, positive_int, seed_number                 # noqa: E402
from data import Batches, get_dataset                                               # noqa: E402
from diagnose import diagnose                                                       # noqa: E402
from diffusion import DiffusionProcess                                              # noqa: E402
from loop import train_epoch                                                        # noqa: E402
from models import create_model                                                     # noqa: E402
from utils import EMA, seed_step                                                    # noqa: E402

BROKEN = {  # what is broken: words of the true cause
    "images in [0, 1]": "images in [0, 1]",
    "cold average": "averaged weights",
    "no square roots": "square roots",
    "time ignored": "listen to the time",
    "labels shuffled": "classes say nothing",
    "rate too high": "learning rate is too high",
    "betas not scaled": "does not end in noise",
    "too little training": "not trained enough",
    "too little, clip_loss": "not trained enough",
    "another schedule": "another assumption: the linear schedule",
    "diverged": "diverged",
}
HEALTHY = ("linear, eps", "T = 400, cosine", "cosine, v, clip_loss", "cosine, v, colour")


class Deaf(nn.Module):
    """A network that is never told the time."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.num_classes, self.image_channels = (
            inner, inner.num_classes, inner.image_channels)

    def forward(self, x_t, t, y=None):
        return self.inner(x_t, torch.zeros_like(t), y)


class Rootless(DiffusionProcess):
    """x_t = alpha_bar x_0 + (1 - alpha_bar) noise, as it is sometimes written by mistake."""

    def forward_diffusion(self, x_0, t, noise=None):
        signal, spread = self._weights(t)
        return signal**2 * x_0 + spread**2 * noise, noise


class ColdAverage(EMA):
    """The same decay from the first step on."""

    @torch.no_grad()
    def update(self, model):
        for average, value in zip(self.model.parameters(), model.parameters()):
            average.lerp_(value, 1 - self.decay)


def train_one(kind, images, labels, num_classes, seed, steps):
    """Train a model broken this way: (average, raw, process to sample with, losses, settings)."""
    seed_step(seed, 0)
    settings = dict(learning_rate=1e-3, optimizer="adam", lr_schedule="constant")
    process = DiffusionProcess()
    if kind == "betas not scaled":
        process = DiffusionProcess(200, "linear", beta_start=1e-4, beta_end=0.02)
    elif kind == "no square roots":
        process = Rootless()
    elif kind == "T = 400, cosine":
        process = DiffusionProcess(400, "cosine")
    elif kind in ("cosine, v, clip_loss", "too little, clip_loss"):
        process = DiffusionProcess(1000, "cosine", "v", clip_loss=True)
    elif kind == "cosine, v, colour":
        process = DiffusionProcess(1000, "cosine", "v")
    if kind == "labels shuffled":
        labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    model = create_model(base_channels=16, image_channels=images.shape[1], num_classes=num_classes,
                         add_input=process.objective == "eps")
    if kind == "time ignored":
        model = Deaf(model)
    if kind == "rate too high":
        settings["learning_rate"] = 2e-2
    elif kind == "diverged":
        settings["learning_rate"] = 3.0
    if kind.startswith("too little"):
        steps = 60
    average = ColdAverage(model, 0.9995) if kind == "cold average" else EMA(model, 0.995)
    batches, losses = Batches(images, labels, 64, seed), []
    stream = ((x, y) if kind != "images in [0, 1]" else ((x + 1) / 2, y)
              for x, y in batches.stream())
    optimizer = (torch.optim.SGD if kind == "diverged" else torch.optim.Adam)(
        model.parameters(), lr=settings["learning_rate"])
    if kind == "diverged":                          # a good start, then steps far too large
        good = torch.optim.Adam(model.parameters(), lr=1e-3)
        train_epoch(model, stream, good, process, "cpu", ema=average, seed=seed, steps=steps // 2,
                    losses=losses)
    try:
        train_epoch(model, stream, optimizer, process, "cpu", ema=average, seed=seed,
                    first_step=len(losses), steps=steps - len(losses), losses=losses,
                    label_drop=0.1 if num_classes else 0.0)
    except ValueError:
        if kind != "diverged":
            raise
    if kind == "no square roots":
        process = DiffusionProcess()
    elif kind == "another schedule":
        process = DiffusionProcess(1000, "cosine")
    return average.model, copy.deepcopy(model).eval(), process, losses, settings


@command
def main(argv=None):
    parser = Parser(
        description="Break models in eleven ways, and see whether diagnose.py finds out.")
    add = parser.add
    add("--dataset", "labelled images", "synthetic_digits")
    add("--data_dir")
    add("--colour", "images for the fourth healthy model", "synthetic_fabrics")
    add("--steps", "of each training", 700, type=positive_int)
    add("--seed", "of everything", 0, type=seed_number)
    add("--only", "these rows", nargs="+", choices=[*BROKEN, *HEALTHY], metavar="ROW")
    args = parser.parse_args(argv)
    images, labels = get_dataset(args.dataset, args.data_dir)
    held, held_labels = images[-2000:], labels[-2000:]
    images, labels = images[:-2000], labels[:-2000]
    first = both = silent = 0
    for kind in args.only or [*BROKEN, *HEALTHY]:
        start, data = time.perf_counter(), (images, labels, int(labels.max()) + 1)
        seen, seen_labels = held, held_labels
        if kind == "cosine, v, colour":
            cloth, _ = get_dataset(args.colour, args.data_dir, image_size=32, channels=3)
            data, seen, seen_labels = (
                (cloth[:-500], torch.full((len(cloth) - 500,), -1), None), cloth[-500:], None)
        average, raw, process, losses, settings = train_one(kind, *data, args.seed, args.steps)
        causes, ratios = diagnose(average, raw, process, data[0], seen, seen_labels, losses,
                                  settings)
        names = [cause.what for cause in causes]
        if kind in BROKEN:
            first += any(BROKEN[kind] in name for name in names[:1])
            both += any(BROKEN[kind] in name for name in names[:2])
        else:
            silent += not names
        print(f"{kind:<20} {time.perf_counter() - start:4.0f} s   "
              + ("; ".join(names[:2]) or "nothing"), flush=True)
        print(" " * 29 + f"loss {sum(losses[-50:]) / len(losses[-50:]):.3f}; ratios "
              + " ".join(f"{ratio:.2f}" for ratio in next(iter(ratios.values()))), flush=True)
    print(f"the true cause is named first for {first} of {len(BROKEN)}, "
          f"first or second for {both}; silent on {silent} of {len(HEALTHY)} healthy models")


if __name__ == "__main__":
    main()
