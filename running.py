"""One run to a folder, and a clean stop on a signal.

    with Signals() as signals, only_run("outputs"):     # Ctrl-C, SIGTERM and SIGHUP raise Stopped,
        with signals.postponed():                       # but in here only at the end
            ...
"""

import contextlib
import os
import re
import signal
import threading
import time
from pathlib import Path

import torch

from checkpoint import equal, existing, load_checkpoint
from command_line import one_line

# ---- The folder of a run

LATEST, FINAL = "model_latest.pt", "model_final.pt"  # the first is there while a run is unfinished
BEST = "model_best.pt"  # by the held-out loss
RUN_FILES = (LATEST, FINAL, BEST, "training_loss.png", "training_loss.csv", "samples/epoch_*.png",
             "samples/step_*.png", "checkpoints/model_epoch_*.pt", "checkpoints/model_step_*.pt")
NUMBERED = re.compile(r"(model_)?(epoch|step)_\d+\.(png|pt)")  # and not step_by_step.png


def _lock(file):
    """Lock an open file until the process ends, however it ends. False if another has it."""
    try:
        if os.name == "nt":
            import msvcrt
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        pass                            # a file system without locks: it cannot be told
    return True


@contextlib.contextmanager
def only_run(folder):
    """Keep other runs out of a folder, and delete what a killed one has left half-written there.

    Raises ValueError if a run is going on there.
    """
    folder = Path(folder)
    # The file stays: were it deleted, two others could each hold a lock, on the old and a new one.
    path = folder / ".lock"
    if path.is_symlink() or path.exists() and not path.is_file():
        raise ValueError(f"{path} is in the way: no file that a run has left there")
    with open(path, "a") as lock:           # "w" would empty a file that happens to have this name
        if not _lock(lock):
            raise ValueError(f"{folder} is in use by a run that is still going on")
        for pattern in RUN_FILES:
            above, name = os.path.split(pattern)
            for half in (folder / above).glob(f".{name}.*.tmp"):
                half.unlink(missing_ok=True)
        yield


def find_checkpoint(folder, resume, overwrite):
    """What to start from: (the path of a checkpoint or None, does this folder's own run go on?).

    resume: None, "latest" or a checkpoint's path.  overwrite: a run that lies there may be
    replaced. Raises ValueError if one would be replaced unasked.
    """
    folder = Path(folder)
    latest, final = folder / LATEST, folder / FINAL
    there = [path for path in run_files(folder) if path.is_file()]
    saved = [path for path in there if path.suffix == ".pt"]
    numbered = [path for path in saved if path.parent.name == "checkpoints"]
    if resume == "latest":
        return farthest(folder, [latest, final, folder / BEST, *last_of_each_unit(numbered)]), True
    origin = None if resume is None else existing(resume)
    own = origin is not None and origin.resolve() in [path.resolve() for path in saved]
    if own and overwrite:
        raise ValueError(f"{origin} is of the run in {folder} itself: --resume goes on with that, "
                         "and --overwrite would replace it: give one of them")
    if there and not own and not overwrite:
        finished = final.exists() and not latest.exists()
        goes_on = "prolongs it if its rate is constant" if finished else "goes on with it"
        what = (f"{'a finished' if finished else 'an unfinished'} run: --resume {goes_on}"
                if saved else f"what a run has left ({there[0].relative_to(folder)})")
        raise ValueError(f"{folder} holds {what}, --overwrite replaces it, "
                         "another --output_dir keeps it")
    return origin, own


def last_of_each_unit(numbered):
    """Of model_epoch_995.pt, model_epoch_1000.pt and model_step_0000300.pt the last two."""
    last = {}
    for path in sorted(numbered, key=lambda path: int(path.stem.split("_")[-1])):
        last[path.stem.split("_")[-2]] = path
    return list(last.values())


def farthest(folder, paths):
    """Of several checkpoints of a run the one with the most steps behind it: one that was killed
    may have come farther in any of them than in the latest. Those of another run, with other
    settings or losses, do not count: one that was killed while it replaced an earlier run has left
    some of that. Says what it passes over. ValueError if it can read none.

    paths: the latest first.
    """
    losses, settings, problem = {}, {}, None
    for path in paths:
        try:
            if path.exists():
                entries = load_checkpoint(path)
                found, settings[path] = entries.get("losses"), entries.get("settings")
                known = torch.is_tensor(found) and found.ndim == 1
                losses[path] = found.tolist() if known else []
        except (ValueError, OSError) as error:
            problem = error
    if not losses:
        raise problem or ValueError(f"nothing to resume: {folder} holds no checkpoint of a run")
    if problem:
        print(f"passed over: {one_line(problem)}")
    latest, own = next(iter(losses.items()))    # if it is there
    for path, others in list(losses.items()):
        shared = min(len(own), len(others))
        if own[:shared] != others[:shared] or not equal(settings[path], settings[latest]):
            print(f"passed over: {path} is of an earlier run")
            del losses[path]
    return max(losses, key=lambda path: len(losses[path]))


def run_files(folder):
    """What a run has written into a folder, and nothing else that lies there."""
    return [path for pattern in RUN_FILES for path in Path(folder).glob(pattern)
            if ("*" not in pattern or NUMBERED.fullmatch(path.name)) and not path.is_dir()]


def clear_run(folder, keep):
    """Delete what an earlier run has written into a folder. keep: the path of the new one's first
    file."""
    old, left = [path for path in run_files(folder) if path != Path(keep)], []
    for path in old:
        try:
            path.unlink()
        except OSError as error:                # no reason to stop a training
            left.append(f"{path} ({error.strerror})")
    if old:
        print(f"replaced an earlier run in {folder} ({len(old) - len(left)} files)"
              + f"; it still has {', '.join(left[:5])}" * bool(left))


# ---- Stopping in good order

STOPS = ("SIGINT", "SIGTERM", "SIGHUP")  # the last: the terminal was closed


class Stopped(KeyboardInterrupt):
    """SIGINT, SIGTERM or SIGHUP came. told: the user knows already."""
    told = False

    def __init__(self, number):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class Signals:
    """While it is entered, the signals of STOPS raise Stopped; one more, a second or more later,
    ends the process at once.

    ignore: for all but the first of several processes. They go on until the first has left, and the
    error that they then meet becomes Stopped, too.
    """

    def __init__(self, ignore=False):
        self.ignore, self.came, self.since, self.holding, self.before = ignore, None, 0.0, False, {}

    def __enter__(self):
        # Python allows handlers in the main thread only.
        if threading.current_thread() is threading.main_thread():
            for name in STOPS:
                number = getattr(signal, name, None)    # Windows has no SIGHUP; nohup ignores it
                if number and (name != "SIGHUP" or signal.getsignal(number) is not signal.SIG_IGN):
                    self.before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind, error, trace):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.ignore and self.came and isinstance(error, RuntimeError):
            stop = Stopped(self.came)
            stop.told = True
            raise stop from error

    def _handle(self, number, frame):
        if self.ignore:
            self.came = number
            return
        if self.came:
            if time.monotonic() - self.since < 1:
                return          # launchers and timeout(1) send it to the process and to its group
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.came, self.since = number, time.monotonic()
        if not self.holding:
            raise Stopped(number)

    @contextlib.contextmanager
    def held(self):
        """Inside, a first signal is only noted in `came`; nothing is raised."""
        self.holding = True
        try:
            yield
        finally:
            self.holding = False

    @contextlib.contextmanager
    def postponed(self):
        """Let what is inside come to its end before a signal takes effect."""
        with self.held():
            yield
        if self.came and not self.ignore:
            raise Stopped(self.came)
