"""What every command needs: one-line errors (exit code 2), self-explaining flags, a results folder.
"""

import argparse
import functools
import os
import re
import signal
import sys
import threading
import warnings
from pathlib import Path

from distributed import speaks
from files import write_file
from utils import keep_memory


# What torch says of a full memory.
FULL = "out of memory|t allocate memory|size calculation overflowed|could not create a primitive"


def stopped(stop):
    """Say, once, that a signal ended the command, and exit as a shell counts it.

    stop: a KeyboardInterrupt.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_DFL)    # one more ends it at once, in silence
    if not getattr(stop, "told", False):
        print(f"\n{str(stop) or 'interrupted'}", file=sys.stderr)
    sys.exit(128 + getattr(stop, "number", signal.SIGINT))


def one_line(error):
    """What a command says of an error, or None for one that only a traceback explains."""
    text = str(error).strip()
    if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
        text = f"--compile does not work here: {(text.splitlines() or ['no reason is given'])[0]}"
    elif isinstance(error, MemoryError) or (isinstance(error, RuntimeError)
                                            and re.search(FULL, text)):
        text = ("out of memory; try fewer or smaller images at a time, and in training "
                "--accumulate 2, fewer --num_samples, --grad_checkpoint, "
                "a smaller --base_channels or --image_size")
    elif isinstance(error, RuntimeError) and not text.startswith("Symlink loop"):
        return None
    elif isinstance(error, OSError):
        text = (f"{error.filename}: " if error.filename else "") + str(error.strerror or error)
    return " ".join(text.split())


def command(main):
    """Decorate main(argv=None): turn a bad value or an unusable file into one clear line."""
    @functools.wraps(main)
    def wrapped(argv=None):
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is None:                          # closed by the shell: >&-
                setattr(sys, name, open(os.devnull, "w"))
            stream = getattr(sys, name)
            if hasattr(stream, "reconfigure"):
                # an odd file name must not end a training
                stream.reconfigure(errors="backslashreplace")
        keep_memory()
        # PIL's, of sizes that are refused or have been looked at
        warnings.filterwarnings("ignore", "Image size ")
        try:
            result = main(argv)
            sys.stdout.flush()
            return result
        except BrokenPipeError:                             # the reader has seen enough: | head -1
            # else Python complains at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)                                   # as a shell counts it, 128 + SIGPIPE
        except KeyboardInterrupt as stop:
            stopped(stop)
        except (RuntimeError, MemoryError, OSError, ValueError, FloatingPointError) as error:
            # Python 3.11 wraps what __set_name__ raises
            if isinstance(error.__cause__, KeyboardInterrupt):
                stopped(error.__cause__)
            message = one_line(error)
            if message is None or sys.flags.dev_mode:       # python -X dev: to look for a bug
                raise
            # of several processes, the others meet the same wrong value
            mine = not isinstance(error, (ValueError, FloatingPointError))
        if not speaks() and mine:
            message = f"process {os.environ['RANK']}: {message}"
        # else torchrun's first process tells it
        if speaks() or mine or "TORCHELASTIC_RUN_ID" not in os.environ:
            print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        sys.exit(2)
    return wrapped


# Flags that are the same in all commands: help and default.
COMMON = {"--device": ("auto, cpu, cuda, cuda:1, mps", "auto"),
          "--data_dir": ("where the data sets of torchvision lie, or go", "data")}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and whose help states every default."""

    _place = None

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)        # --seed is not --seeds

    def group(self, title):
        """The flags added from here on stand under this title in the help."""
        self._place = self.add_argument_group(title)

    def add(self, flag, help=None, default=None, **settings):
        """A flag, with its default in its help; of those in COMMON the name is enough."""
        if help is None:
            help, default = COMMON[flag]
        if default is not None and default is not False:
            help += (" (default: "
                     f"{' '.join(map(str, default)) if isinstance(default, list) else default})")
        help = help.replace("%", "%%")          # argparse would fill something in there
        (self._place or self).add_argument(flag, help=help, default=default, **settings)

    def parse_args(self, argv=None, namespace=None):
        args = super().parse_args(argv, namespace)
        # argparse puts in a default only where nothing stands yet
        nothing = argparse.Namespace(**{name: ... for name in vars(args)})
        self.typed = [name for name, value in vars(super().parse_args(argv, nothing)).items()
                      if value is not ...]
        for name, value in vars(args).items():        # as from a shell variable that was never set
            # (Python 3.11 makes an empty list of --flag=--)
            if value in ("", []) or isinstance(value, list) and "" in value:
                self.error(f"--{name} is given, but empty")
        return args

    def refuse(self, unused, what):
        """Raise ValueError for flags typed though `what` ignores them.  unused: their names."""
        idle = [f"--{name}" for name in self.typed if name in unused]
        if idle:
            raise ValueError(f"{', '.join(idle)} would be of no use to {what}")

    def error(self, message):
        message = re.sub(r"invalid (.+) value: ('.*')", r"\2 is no \1", message)
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def number(name, kind, low, high):
    """An argparse type: an int or float from `low` to `high`, both included. Of any other text
    Parser.error says that it is no `name`."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise ValueError
        return value

    parse.__name__ = name
    return parse


def number_from(low, high):
    return number(f"number from {low} to {high}", float, low, high)


positive_int = number("whole number from 1 to 10^9", int, 1, 10**9)
whole_number = number("whole number from 0 to 10^9", int, 0, 10**9)
positive_float = number("number from 1e-37 to 1e38", float, 1e-37, 1e38)    # float32 holds them
# Seeds above 32 bits repeat others' noise (seeded_noise).
seed_number = number("seed (a whole number from 0 to 2^32 - 1)", int, 0, 2**32 - 1)
fraction, guidance_number = number_from(0, 1), number_from(0, 100)


def int_tuple(text):
    """An argparse type: 1,2,4."""
    return tuple(int(part) for part in text.split(","))


def interval(text):
    """An argparse type: 150,850."""
    low, high = int_tuple(text)
    if not 0 <= low <= high:
        raise ValueError
    return low, high


int_tuple.__name__ = "list of numbers (1,2,4)"
interval.__name__ = "interval (150,850)"


def few_numbers(flag, values, most):
    """Raise ValueError if a flag (None: not given) has more than `most` numbers, or one twice."""
    if values and (len(values) > most or len(set(values)) < len(values)):
        raise ValueError(f"--{flag} takes up to {most} numbers, each once; got {len(values)}: "
                         f"{' '.join(map(str, values[:most + 1]))}")


def choose_timesteps(asked, default, num_timesteps):
    """The levels asked for, or the defaults, scaled from T = 1000. ValueError for one beyond T."""
    if asked is None:
        return list(dict.fromkeys(round(t * (num_timesteps - 1) / 999) for t in default))
    for t in asked:
        if t >= num_timesteps:
            raise ValueError(f"--timesteps {t}: there are 0 to {num_timesteps - 1}")
    return asked


def format_seconds(seconds):
    """0.42 -> "0.4 s", 75 -> "75 s", 400 -> "6.7 min", 9000 -> "2.5 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def make_output_dir(path, *files):
    """Create a folder for results and check that it, and each of `files` in it, can be written: a
    run of hours must not find out at its end that something is in the way. Returns its Path."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    probe = path / f".write_test.{os.getpid()}"
    try:
        write_file(probe, b"")
        probe.unlink()
    except OSError as error:
        error.filename = str(path)
        raise
    for file in files:
        if (path / file).is_dir():
            raise IsADirectoryError(21, "a folder is in the way", str(path / file))
        if (path / file).exists() and not (path / file).is_file():
            raise FileExistsError(17, "no file, and in the way", str(path / file))
    return path


def spare(inputs, *outputs, flag="--output_dir"):
    """Raise ValueError if a file that is to be read would be written over."""
    for path in inputs:
        for output in map(Path, outputs):
            if output.exists() and Path(path).exists() and output.samefile(path):
                raise ValueError(f"{path} would be written over: give another {flag}")
