"""Pictures as files: sheets, strips, GIFs, plots. Models see floats in [-1, 1], files and data sets
hold uint8: to_signed and to_uint8 lead from one to the other.
"""

import io
import json
import math
import textwrap
import warnings
from pathlib import Path

# Imported now and not at the first plot, where a signal would leave it half imported.
import matplotlib.backends.backend_agg  # noqa: F401
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from files import write_file


# Colours that stay apart for the colour-blind too (Okabe & Ito 2008), each with a line of its own.
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#000000", "#cc79a7")
LINES = ("-", "--", "-.", ":", (0, (4, 1, 1, 1, 1, 1)))


def to_signed(images):
    """uint8 0..255 -> float32 [-1, 1]: centred on zero, like the noise that is to be mixed in."""
    return images.float() / 127.5 - 1


def to_uint8(images):
    """[-1, 1] -> 0..255, for saving only; values outside are cut off."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


MAX_SIZE = 4096  # pixels: the height and width of an image that anything here will make
PADDING = 2  # between the images of a grid


def enlargement(size):
    """How large each pixel is shown, so that a small image is 84 pixels wide or more."""
    return max(1, math.ceil(84 / size))


def image_grid(images, columns=None, padding=PADDING):
    """Lay images side by side, as square as possible: uint8 [N, C, H, W] -> [H', W', 3].

    One alone has no border. As torchvision's make_grid does it, whose import alone would take two
    seconds of every command.
    """
    count, _, height, width = images.shape
    images = images.expand(-1, 3, -1, -1)
    if count == 1:
        return images[0].permute(1, 2, 0)
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    down, across = height + padding, width + padding
    grid = torch.full((3, math.ceil(count / columns) * down + padding, columns * across + padding),
                      255, dtype=torch.uint8)
    for k, image in enumerate(images):
        top, left = padding + k // columns * down, padding + k % columns * across
        grid[:, top:top + height, left:left + width] = image
    return grid.permute(1, 2, 0)


NOTE = "diffusion"  # the name of the text chunk in our PNGs


def png_bytes(pixels, upscale=1, note=None):
    """A uint8 array [H, W, 3] as the bytes of a PNG file, every pixel shown upscale x upscale.

    note: a dict that goes with the picture, as JSON: how it was made.
    """
    picture = Image.fromarray(np.asarray(pixels))
    picture = picture.resize((picture.width * upscale, picture.height * upscale), Image.NEAREST)
    buffer, chunks = io.BytesIO(), PngInfo()
    if note is not None:
        chunks.add_text(NOTE, json.dumps(note))
    picture.save(buffer, format="PNG", pnginfo=chunks)
    return buffer.getvalue()


def read_note(path):
    """Our note in a PNG. Raises ValueError if it has none, FileNotFoundError without a file."""
    if not Path(path).is_file():                # a pipe would let one wait for ever
        raise FileNotFoundError(2, "No such file", str(path))
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            note = json.loads(picture.text[NOTE])
        if isinstance(note, dict):
            return note
    except MemoryError:
        raise
    except Exception as error:                  # PIL raises nearly anything for a damaged file
        if isinstance(error, OSError) and error.errno:
            raise                               # that is no fault of what the file says
        raise ValueError(f"{path} does not tell how it was made: of our pictures only the sheets "
                         "and single images of sample.py do") from error
    raise ValueError(f"{path}: what it tells of how it was made is damaged")


def save_images(images, path, columns=None, padding=PADDING, upscale=None, note=None):
    """Save a grid of images as PNG. images: [N, C, H, W] in [-1, 1], grey or colour.

    upscale: show every pixel upscale x upscale; by default see enlargement.
    note: see png_bytes.
    """
    upscale = upscale or enlargement(images.shape[-1])
    write_file(path, png_bytes(image_grid(to_uint8(images), columns, padding), upscale, note))


def save_gif(pictures, path, seconds=0.12, last_seconds=2.0):
    """Save PIL images as a GIF that loops, resting on the last one."""
    buffer = io.BytesIO()
    # A GIF counts in hundredths of a second: each frame ends at the hundredth nearest to its time.
    ends = [round(100 * seconds * k) for k in range(len(pictures))]
    durations = ([10 * (end - start) for start, end in zip(ends, ends[1:])]
                 + [int(1000 * last_seconds)])
    try:
        pictures[0].save(buffer, format="GIF", save_all=True, append_images=pictures[1:],
                         duration=durations, loop=0)
    except OverflowError as error:              # equal ones are made one, and their times added
        raise ValueError(f"{path}: a GIF cannot rest on one picture for so long") from error
    write_file(path, buffer.getvalue())


def as_text(name, most=100):
    """A name from outside (a folder, a class) for a figure: no formula, no stray bytes, and of a
    long one the beginning."""
    text = str(name).encode("utf-8", "backslashreplace").decode()
    text = text if len(text) <= most else text[:most - 3] + "..."
    return text.replace("$", r"\$")


def wrapped(text, inches, points=12):
    """Words on as many lines as keep them within so many inches; letters are half as wide as high,
    about.  text: None is none."""
    return "\n".join(textwrap.wrap(text or "", max(20, int(inches * 144 / points))))


DPI = 150  # dots in an inch of a figure


def save_figure(figure, path):
    """Save a matplotlib figure as PNG."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():             # a letter that the font lacks becomes a box
        warnings.filterwarnings("ignore", "Glyph", UserWarning)
        figure.savefig(buffer, format="png", dpi=DPI, bbox_inches="tight", facecolor="white")
    write_file(path, buffer.getvalue())


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


def save_strip(rows, column_labels, path, row_labels=None, title=None):
    """Save a labelled table of images as PNG.

    rows: a list of rows, each [K, C, H, W] in [-1, 1].  column_labels: K strings.
    """
    (count, _, height, width), pad = rows[0].shape, PADDING
    grid = image_grid(to_uint8(torch.cat(list(rows))), columns=count, padding=pad)
    # Inches per pixel: about 0.95 per image, and each pixel as many dots as the others.
    scale = max(1, round(0.95 * DPI / (width + pad))) / DPI
    figure = Figure(figsize=(grid.shape[1] * scale, grid.shape[0] * scale))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(np.asarray(grid), interpolation="nearest")
    axes.set_xticks([pad + width / 2 + k * (width + pad) for k in range(count)], column_labels)
    axes.set_yticks([pad + height / 2 + k * (height + pad) for k in range(len(rows))],
                    row_labels or [""] * len(rows))
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False,
                     labelsize=10.5)
    axes.spines[:].set_visible(False)
    if title:
        axes.set_title(wrapped(title, figure.get_figwidth(), 13), fontsize=13, pad=14)
    save_figure(figure, path)


def new_figure(width, height, rows=1, columns=1, **settings):
    """An empty figure in this project's style, sizes in inches: (figure, axes [rows, columns])."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **settings)
    for one in axes.flat:
        one.grid(alpha=0.25)
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def set_heading(figure, text):
    """A title above all panels of a figure."""
    figure.suptitle(wrapped(text, figure.get_figwidth()), fontsize=12)


def moving_average(values, window):
    """The mean of the last `window` values at each point; at first, of the later half so far."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, ends // 2)
    return (sums[ends] - sums[starts]) / (ends - starts)


def plot_losses(losses, path, held_out=None, window=100):
    """Plot the loss of every step and its moving average.

    losses: a list of numbers.  held_out: {step: loss on images that are not trained on}.
    """
    losses = np.asarray(losses, dtype=np.float64)
    window = max(1, min(window, len(losses) // 10))
    steps = np.arange(1, len(losses) + 1)
    average = moving_average(losses, window)
    middles = steps - (np.minimum(window, steps - steps // 2) - 1) / 2  # or a fall would lag behind
    figure, ((axes,),) = new_figure(8, 4.5)
    axes.plot(steps, losses, color="#b8c4d6", linewidth=0.6, label="each step")
    axes.plot(middles, average, color=COLOURS[0], linewidth=1.8,
              label=f"mean of {window} steps, at their middle")
    if held_out:
        axes.plot(list(held_out), list(held_out.values()), "o-", color=COLOURS[1], markersize=3,
                  linewidth=1.2, label="held-out images, averaged weights")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: f"{loss:g}"))  # 0.02, not 2e-02
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("training step")
    axes.set_ylabel("loss (mean squared error)")
    axes.set_title(f"Training loss after {len(losses)} steps: {average[-1]:.4f}, "
                   f"the mean of the last {window}")
    axes.grid(alpha=0.25, which="both")
    axes.legend(frameon=False)
    save_figure(figure, path)
