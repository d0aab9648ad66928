"""What every command needs: one-line errors, device and precision, EMA, image files, plots.
"""

import argparse
import contextlib
import copy
import ctypes
import functools
import io
import json
import math
import os
import re
import signal
import sys
import time
from pathlib import Path

import matplotlib.backends.backend_agg  # noqa: F401: else at the first plot, where a signal may break it
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torchvision.utils import make_grid

try:
    import resource
except ImportError:      # Windows
    resource = None

# ---- Commands: a user's mistake is one line and exit code 2, a bug keeps its traceback.

def speaks():
    """Is this the process that prints? Of several that torchrun has started, the first."""
    return os.environ.get("RANK", "0") == "0"


def command(main):
    """Decorate main(argv=None): turn a bad value or a file that cannot be used into one clear line."""
    @functools.wraps(main)
    def wrapped(argv=None):
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")   # an odd file name must not end a training
        keep_memory()
        try:
            return main(argv)
        except (RuntimeError, MemoryError) as error:
            mine = True
            if not isinstance(error, MemoryError) and not re.search("out of memory|t allocate memory", str(error)):
                raise
            message = ("out of memory; try a smaller --batch_size, and in training --accumulate 2, fewer "
                       "--num_samples, --grad_checkpoint, a smaller --base_channels or --image_size")
        except OSError as error:
            mine = True
            name = f"{error.filename}: " if error.filename else ""
            message = f"{name}{error.strerror or error}"
        except (ValueError, FloatingPointError) as error:
            mine = False                                # of several processes, the others meet the same
            message = str(error)
        except KeyboardInterrupt as stop:
            print(f"\n{str(stop) or 'interrupted'}", file=sys.stderr)
            sys.exit(128 + getattr(stop, "number", signal.SIGINT))
        if not speaks() and mine:
            message = f"process {os.environ['RANK']}: {message}"
        if speaks() or mine:
            print(f"{Path(sys.argv[0]).name}: error: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)
    return wrapped


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and whose help states every default."""

    _place = None

    def group(self, title):
        """The flags added from here on stand under this title in the help."""
        self._place = self.add_argument_group(title)

    def add(self, flag, help, default=None, **settings):
        if default is not None and default is not False:
            help += f" (default: {default})"
        (self._place or self).add_argument(flag, help=help, default=default, **settings)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def positive_int(text):
    """An argparse type: 1, 2, 3, ... 10^9."""
    value = int(text)
    if not 1 <= value <= 10**9:
        raise ValueError
    return value


def whole_number(text):
    """An argparse type: 0, 1, 2, ... 10^9."""
    return 0 if text.strip() == "0" else positive_int(text)


def int_tuple(text):
    """An argparse type: 1,2,4."""
    return tuple(int(part) for part in text.split(","))


def positive_float(text):
    """An argparse type: a finite number above zero."""
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError
    return value


def guidance_number(text):
    """An argparse type: 0 to 100."""
    value = float(text)
    if not 0 <= value <= 100:
        raise ValueError
    return value


def seed_number(text):
    """An argparse type: 0, 1, 2, ..."""
    value = int(text)
    if not 0 <= value < 2**63:
        raise ValueError
    return value


def fraction(text):
    """An argparse type: a number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise ValueError
    return value


# argparse says "invalid <__name__> value: ..."
positive_int.__name__ = "positive whole number"
whole_number.__name__ = "whole number"
int_tuple.__name__ = "list of numbers (1,2,4)"
positive_float.__name__ = "positive number"
guidance_number.__name__ = "number from 0 to 100"
seed_number.__name__ = "seed (a whole number from 0)"
fraction.__name__ = "number from 0 to 1"


def format_seconds(seconds):
    """0.42 -> "0.4 s", 75 -> "75 s", 400 -> "6.7 min", 9000 -> "2.5 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def make_output_dir(path, *files):
    """Create a folder for results and check that it, and each of `files` in it, can be written: a run of
    hours must not find out at its end that something is in the way. Returns the folder as a Path."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    probe = path / f".write_test.{os.getpid()}"
    write_file(probe, b"")
    probe.unlink()
    for file in files:
        if (path / file).is_dir():
            raise IsADirectoryError(21, "a folder is in the way", str(path / file))
    return path


# ---- Device, precision, seeds

def get_device(name="auto"):
    """A torch.device: CUDA, then MPS, then CPU, or the one that is named. ValueError if it is not there."""
    if name != "auto":
        try:
            device = torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
        if device.type not in ("cpu", "cuda", "mps"):
            raise ValueError(f"device {name!r} cannot be used; choose from auto, cpu, cuda, cuda:1, mps")
        return device
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def describe_device(device, name="auto"):
    """One phrase: which device, and why that one."""
    if device.type == "cuda":
        what = torch.cuda.get_device_name(device)
    elif device.type == "cpu":
        what = f"{torch.get_num_threads()} threads"
    else:
        what = "Apple GPU"
    why = "as asked" if name != "auto" else {"cuda": "a CUDA GPU was found", "cpu": "no GPU was found",
                                             "mps": "no CUDA, but an Apple GPU was found"}[device.type]
    return f"{device} ({what}; {why})"


PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16}


def get_precision(name, device):
    """(dtype, reason) for training: bfloat16 where the hardware multiplies in it, else float32.

    name: "auto", "float32" or "bf16".
    """
    if name != "auto":
        if name not in PRECISIONS:
            raise ValueError(f"unknown precision {name!r}; choose from {['auto', *PRECISIONS]}")
        return PRECISIONS[name], f"{name} (as asked)"
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "mps":
        return torch.float32, "float32 (bf16 is not tried on Apple GPUs unless asked for)"
    else:
        features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        native = features.get("avx512_bf16", False) or features.get("amx_bf16", False)
    if native:
        return torch.bfloat16, "bf16 autocast (the device has bfloat16 instructions)"
    return torch.float32, "float32 (the device has no bfloat16 instructions)"


def seed_step(seed, step):
    """Make everything random in training step `step` (timesteps, noise, dropout) follow from (seed, step)."""
    # spawn_key, not [seed, step]: its numbers never coincide with those of sampling.
    state = np.random.SeedSequence(seed, spawn_key=(step,)).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0]))


DENSITIES = ("uniform", "logit_normal")


def get_timesteps(batch_size, num_timesteps, device, density="uniform"):
    """Random timesteps: [batch_size] integers in 0..num_timesteps-1, spread evenly over a batch.

    One comb with a random start, so that no batch has many early and few late ones, and the loss jumps about
    less (Kingma et al. 2021, appendix I.1). Each place in the batch keeps to its own stretch of the levels: the
    images have to be shuffled, so that all of them meet all levels.

    density: "uniform", or "logit_normal": the logit of (t / T) is Gaussian, so that the levels in the middle, where
    the picture is decided, are met 1.6 times as often as the average, and those at both ends seldom (Esser et al.
    2024, section 3.1, with m = 0, s = 1). Raises ValueError for another name.
    """
    comb = (torch.arange(batch_size, device=device) + torch.rand((), device=device)) / batch_size
    if density == "logit_normal":
        comb = torch.sigmoid(2**0.5 * torch.erfinv(2 * comb - 1))   # the Gaussian's quantiles, from a line to (0, 1)
    elif density != "uniform":
        raise ValueError(f"unknown density {density!r}; choose from {', '.join(DENSITIES)}")
    return (comb * num_timesteps).long().clamp(max=num_timesteps - 1)       # the clamp: 0.9999999 may round up


# ---- Models

def count_parameters(model):
    """The number of trainable values."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


class EMA:
    """A running average of a model's weights; samples come from it (Ho et al. 2020, appendix B).

    After n updates the next one keeps min(decay, (1 + n) / (10 + n)) of the average. A fixed 0.9995
    from the start would still hold a good part of the random initial weights after 2,000 steps.

    `model` is the averaged copy, in eval mode.  decay: 0 <= decay < 1.
    """

    def __init__(self, model, decay=0.9995):
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), got {decay}")
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, model):
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for average, value in zip(self.model.parameters(), model.parameters(), strict=True):
            average.lerp_(value, 1 - decay)
        for average, value in zip(self.model.buffers(), model.buffers(), strict=True):
            average.copy_(value)
        self.updates += 1


# ---- Files

def write_file(path, data):
    """Write bytes so that the file is either the old one or wholly the new one, never half of it."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":              # the new name, too, has to reach the disk
        folder = os.open(path.parent, os.O_RDONLY)
        with contextlib.suppress(OSError):                      # some file systems cannot do this
            os.fsync(folder)
        os.close(folder)


# ---- Images and plots

def to_signed(images):
    """uint8 0..255 -> float32 [-1, 1]: centred on zero, like the noise that is to be mixed in."""
    return images.float() / 127.5 - 1


def to_uint8(images):
    """[-1, 1] -> 0..255, for saving only; values outside are cut off."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def image_grid(images, columns=None, padding=2, background=255):
    """Lay images side by side. uint8 [N, C, H, W] -> uint8 [H', W', 3], as square as possible."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    return make_grid(images, nrow=columns, padding=padding, pad_value=background).permute(1, 2, 0)


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
    """The note in a PNG that we wrote. Raises ValueError if there is none."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            note = json.loads(picture.text[NOTE])
        if isinstance(note, dict):
            return note
    except FileNotFoundError:
        raise
    except (KeyError, ValueError, SyntaxError, OSError, RecursionError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} does not tell how it was made: it is not a PNG written by this project") from error
    raise ValueError(f"{path}: what it tells of how it was made is damaged")


def save_images(images, path, columns=None, padding=2, upscale=None, note=None):
    """Save a grid of images as PNG. images: [N, C, H, W] in [-1, 1], grey or colour.

    upscale: show every pixel upscale x upscale; by default so that an image is 84 pixels wide or more.
    note: see png_bytes.
    """
    upscale = upscale or max(1, math.ceil(84 / images.shape[-1]))
    write_file(path, png_bytes(image_grid(to_uint8(images), columns, padding), upscale, note))


def save_gif(pictures, path, seconds=0.12, last_seconds=2.0):
    """Save PIL images as a GIF that loops, resting on the last one."""
    buffer = io.BytesIO()
    durations = [int(1000 * seconds)] * (len(pictures) - 1) + [int(1000 * last_seconds)]
    pictures[0].save(buffer, format="GIF", save_all=True, append_images=pictures[1:], duration=durations,
                     loop=0)
    write_file(path, buffer.getvalue())


def save_figure(figure, path):
    """Save a matplotlib figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight", facecolor="white")
    write_file(path, buffer.getvalue())


def save_strip(rows, column_labels, path, row_labels=None, title=None):
    """Save a labelled table of images as PNG.

    rows: a list of rows, each [K, C, H, W] in [-1, 1].  column_labels: K strings.
    """
    count, channels, height, width = rows[0].shape
    pad = 2
    grid = image_grid(to_uint8(torch.cat(list(rows))), columns=count, padding=pad)
    scale = 0.95 / (width + pad)                                    # inches per pixel: 0.95 per image
    figure = Figure(figsize=(grid.shape[1] * scale, grid.shape[0] * scale))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(np.asarray(grid), interpolation="nearest")
    axes.set_xticks([pad + width / 2 + k * (width + pad) for k in range(count)], column_labels)
    axes.set_yticks([pad + height / 2 + k * (height + pad) for k in range(len(rows))],
                    row_labels or [""] * len(rows))
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False, labelsize=10.5)
    axes.spines[:].set_visible(False)
    if title:
        axes.set_title(title, fontsize=13, pad=14)
    save_figure(figure, path)


def moving_average(values, window):
    """The mean of the last `window` values at each point; at the start, of the later half of all so far."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, ends // 2)
    return (sums[ends] - sums[starts]) / (ends - starts)


def plot_losses(losses, path, held_out=None, window=100):
    """Plot the loss of every step and its moving average.

    losses: a list of numbers.  held_out: {step: loss on images that are not trained on}.
    """
    losses = np.asarray(losses, dtype=np.float64)
    window = max(1, min(window, len(losses) // 4))
    steps = np.arange(1, len(losses) + 1)
    average = moving_average(losses, window)
    figure = Figure(figsize=(8, 4.5))
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="#b8c4d6", linewidth=0.6, label="each step")
    axes.plot(steps, average, color="#d55e00", linewidth=1.8, label=f"mean of the last {window} steps")
    if held_out:
        axes.plot(list(held_out), list(held_out.values()), "o-", color="#0072b2", markersize=3, linewidth=1.2,
                  label="held-out images, averaged weights")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: f"{loss:g}"))         # 0.02, not 2e-02
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("training step")
    axes.set_ylabel("loss (mean squared error)")
    axes.set_title(f"Training loss after {len(losses)} steps: {average[-1]:.4f} on average")
    axes.grid(alpha=0.25, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    save_figure(figure, path)


# ---- What it costs

def measure(work, device, repeats=1):
    """Seconds that work() takes: the median of `repeats` calls, after one that warms up."""
    def clock():
        if device.type == "cuda":
            torch.cuda.synchronize(device)      # a GPU only queues the work
        elif device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter()

    times = []
    for _ in range(1 + repeats):
        start = clock()
        work()
        times.append(clock() - start)
    return sorted(times[1:])[repeats // 2]


def peak_memory(device):
    """The most memory this process has held so far, in bytes: of the GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024              # kilobytes, but for macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def keep_memory():
    """Let the C library keep memory that it has freed, for the next tensor of that size.

    glibc gives large blocks back at once and gets them anew, page by page, in each step: about 170,000
    page faults in a step of SimpleUNet, a tenth of its time. Other systems do as they do.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        trim_threshold, mmap_max = -1, -4                       # their numbers in malloc.h
        mallopt(trim_threshold, -1)
        mallopt(mmap_max, 0)
