"""Figures of a run, out of the folder that train.py wrote: samples epoch after epoch, and loss.

visualize_diffusion.py --figure epochs, loss and loss_by_timestep draw them.
"""

import csv
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from images import PADDING, enlargement, plot_losses, save_strip, to_signed
from running import FINAL, LATEST, farthest, run_files


def when(path):
    """epoch_005.png -> "epoch 5"."""
    unit, number = path.stem.split("_")[-2:]
    return f"{unit} {int(number)}" if number.isdecimal() else "the end"


def spread_out(items, most):
    """At most so many of a list, dense at its start, where a run changes fastest, and the last."""
    if len(items) <= most:
        return items
    return [items[k - 1] for k in sorted({round(k) for k in np.geomspace(1, len(items), most)})]


def found_in(run, *patterns, hint=""):
    """What train.py left in a run's folder by these names, in order. ValueError where there is
    nothing."""
    own = sorted(run_files(run), key=lambda path: (len(path.name), path.name))      # 9 before 10
    paths = [path for pattern in patterns for path in own
             if path.match(pattern) and path.is_file()]
    if not paths:
        raise ValueError(f"no {' or '.join(patterns)} of a training in {run}: "
                         f"name with --run a folder that train.py wrote{hint}")
    return paths


def with_the_end(numbered, run):
    """Numbered checkpoints, and the run's last one if it comes after them."""
    last = farthest(run, [numbered[-1], Path(run) / FINAL, Path(run) / LATEST])
    return numbered if last == numbered[-1] else [*numbered, last]


def epochs_figure(run, path, image_size, count, columns=8):
    """The same noises after more and more training: the first `count` of the sheets the run wrote,
    or as many as those hold."""
    sheets = spread_out(found_in(run, "samples/*.png"), columns)
    scale, cell = enlargement(image_size), image_size + PADDING
    tiles = []
    for sheet in sheets:
        try:
            with Image.open(sheet, formats=["PNG"]) as picture:
                pixels = torch.from_numpy(
                    np.array(picture.convert("RGB"))[::scale, ::scale]).permute(2, 0, 1)
        except MemoryError:
            raise
        except Exception as error:              # PIL raises nearly anything for a damaged file
            raise ValueError(f"{sheet} is no sheet of {image_size}x{image_size} images, "
                             "or damaged") from error
        if pixels.shape[1:] == (image_size, image_size):    # one alone has no border
            pixels = torch.nn.functional.pad(pixels, (PADDING,) * 4)
        if pixels.shape[2] % cell != PADDING or pixels.shape[1] % cell != PADDING:
            raise ValueError(f"{sheet} is no sheet of {image_size}x{image_size} images")
        cells = [pixels[:, y:y + image_size, x:x + image_size]
                 for y in range(PADDING, pixels.shape[1] - PADDING, cell)
                 for x in range(PADDING, pixels.shape[2] - PADDING, cell)]
        while len(cells) > 1 and bool((cells[-1] == 255).all()):    # the last row has gaps
            cells.pop()
        tiles.append(to_signed(torch.stack(cells[:count])))
    fewest = min(len(row) for row in tiles)                 # a resumed run may draw more
    if fewest < count:
        print(f"the sheets hold {fewest} pictures (train.py --num_samples)")
    save_strip(list(torch.stack([row[:fewest] for row in tiles], dim=1)),
               [when(sheet) for sheet in sheets], path,
               title="the same noises, after more training")


def loss_figure(run, path):
    """The loss of each step of a run, its average, and that on held-out images if there are any."""
    table, = found_in(run, "training_loss.csv")
    try:
        rows = list(csv.DictReader(table.read_text().splitlines()))
        losses = [float(row["loss"]) for row in rows]
        held_out = {int(row["step"]): float(row["held_out_loss"])
                    for row in rows if row["held_out_loss"]}
        if not all(0 < step <= len(losses) for step in held_out):
            raise ValueError
    except (KeyError, TypeError, ValueError, OverflowError, csv.Error) as error:
        raise ValueError(f"{table} is not a table that train.py wrote") from error
    if not any(0 < loss < math.inf for loss in losses):
        raise ValueError(f"{table} holds no loss to draw")
    plot_losses(losses, path, held_out)
