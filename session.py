"""A training on its way: from one report to the next, with pictures, tables and checkpoints.

train.py prepares what is used here: the State that changes, the Plan of what happens when, and a
Keeper, which writes the checkpoints.
"""

import contextlib
import math
import statistics
import sys
import time

import torch
from tqdm import tqdm

import distributed
from checkpoint import GO_ON, check_settings, load_checkpoint, save_checkpoint
from command_line import one_line
from files import write_file
from images import plot_losses, save_images
from loop import held_out_loss, train_steps
from models import model_defaults
from running import BEST, LATEST, Stopped, clear_run

SAVE_SECONDS = 300  # about so many at most from one save of the latest state to the next


def sample_images(model, diffusion, device, num_images=64, image_size=28):
    """Pictures for a look at the training: from the same noises each time, so that epochs compare,
    and by DDIM in 50 steps, because the full chain would take minutes. A model that knows classes
    draws them in turn.

    Returns [num_images, C, image_size, image_size] in [-1, 1].
    """
    classes, channels = getattr(model, "num_classes", None), getattr(model, "image_channels", 1)
    y = torch.arange(num_images) % classes if classes else None
    return diffusion.sample(model, image_size, num_images, channels, seed=0, device=device,
                            sampler="ddim", y=y)


# ---- Checkpoints

class Keeper:
    """Writes the checkpoints of a run into its folder.

    facts: what they tell beside the state.  signals: see running.py.
    replacing: the folder may hold an earlier run. It is deleted after the first save: a run that
    fails before that leaves it as it was.
    """

    def __init__(self, folder, state, facts, steps_per_epoch, signals, replacing):
        self.folder, self.state, self.facts, self.steps_per_epoch = (
            folder, state, facts, steps_per_epoch)
        self.signals, self.replacing = signals, replacing
        self.saved_step = 0                     # the steps in model_latest.pt, as far as it knows
        self.tables_written, self.tables_seconds = time.perf_counter(), 0.0

    def save(self, name):
        """Write a checkpoint; a signal waits until it is there."""
        with self.signals.postponed():  # torch.save turns an exception in its midst into its own
            self._write(name)

    def _write(self, name):
        """Raises ValueError if the training has become useless; an older file then stays."""
        path, state = self.folder / name, self.state
        sound = all(p.isfinite().all() for p in state.model.parameters())
        if not sound or not all(map(math.isfinite, state.losses)):
            raise ValueError("weights or losses are no numbers any more "
                             f"by step {len(state.losses)}; {path} is left as it was")
        epoch = len(state.losses) // self.steps_per_epoch
        save_checkpoint(path, {**self.facts, **state.entries(), "epoch": epoch})
        if path.name == LATEST:
            self.saved_step = len(state.losses)
        else:
            print(f"wrote {path}")
        if self.replacing:
            self.replacing = False              # whatever happens now, the new run is there
            clear_run(self.folder, keep=path)

    def write_tables(self, rate, last):
        """write_losses, as long as that takes under a twentieth of the time, and at the end."""
        start = time.perf_counter()
        if not last and start - self.tables_written < 20 * self.tables_seconds:
            return
        with self.signals.postponed():
            write_losses(self.folder, self.state, rate)
        self.tables_written = time.perf_counter()
        self.tables_seconds = self.tables_written - start

    @contextlib.contextmanager
    def saved_if_stopped(self, total_steps):
        """If a signal, a full disk or want of memory stops what is inside, save the state and let
        it stop; but not a state that an optimizer has left half-way."""
        try:
            yield
        except (Stopped, OSError, MemoryError, RuntimeError) as stop:
            steps, latest = len(self.state.losses), self.folder / LATEST
            if steps and not getattr(stop, "half_done", False):
                try:
                    with self.signals.held():
                        self._write(LATEST)
                    saved = (f"saved to {latest}; the same command with --resume goes on, "
                             f"and python sample.py --checkpoint {latest} draws from it")
                except OSError as error:                # the disk is still full
                    saved = f"it cannot be saved ({error.strerror or error})" + (
                        f"; {latest} has the first {self.saved_step}, and --resume goes on "
                        "from there" * bool(self.saved_step))
                what = (one_line(stop) if isinstance(stop, OSError) else
                        stop if isinstance(stop, Stopped) else type(stop).__name__)
                with contextlib.suppress(OSError):              # the terminal may be gone
                    print(f"{what} after step {steps} of {total_steps}: {saved}", flush=True,
                          file=sys.stderr if isinstance(stop, BrokenPipeError) else None)
                stop.told = isinstance(stop, Stopped)
            raise


def restore(state, origin, facts, plan):
    """Put a new run where a checkpoint of the same settings was. ValueError names what differs."""
    saved = load_checkpoint(origin)
    # The checkpoint may be older than a setting of the network.
    if isinstance(saved.get("model_config"), dict):
        saved["model_config"] = {**model_defaults(facts["model_name"]), **saved["model_config"]}
    advice, was = GO_ON, saved.get("settings")
    if isinstance(was, dict) and was.get("total_steps") != facts["settings"].get("total_steps"):
        advice += (" (a rate that falls to zero cannot be prolonged: "
                   "--start_from learns on, in a run of its own)")
    for part in ("settings", "model_config"):   # the first has the process, too
        check_settings(origin, saved.get(part), facts[part], advice)
    if not isinstance(saved.get("data"), dict):
        raise ValueError(f"{origin} cannot be resumed: it does not tell its data")
    classes = [entries["data"].get("classes") for entries in (saved, facts)]
    if classes[0] != classes[1]:
        raise ValueError(f"{origin} belongs to a run with other classes ({classes[0]!r:.200} then, "
                         f"{classes[1]!r:.200} now)")
    facts["started_from"] = saved.get("started_from")
    facts["draw_with"] = facts["draw_with"] or saved.get("draw_with")
    state.restore(origin, saved)
    if len(state.losses) > plan.total_steps:
        raise ValueError(f"{origin} is at step {len(state.losses)}, "
                         f"beyond the {plan.total_steps} of this run: "
                         "give more --epochs or --steps")
    print(f"going on from {origin}, after {len(state.losses)} of {plan.total_steps} steps")


# ---- Reports

def write_losses(folder, state, rate):
    """training_loss.png and .csv, a row a step: step from 1, loss, learning rate, held-out loss."""
    rows = [f"{step},{loss:.6g},{rate(step - 1):.6g},{state.held_out_losses.get(step, '')}\n"
            for step, loss in enumerate(state.losses, start=1)]
    write_file(folder / "training_loss.csv",
               "".join(["step,loss,learning_rate,held_out_loss\n", *rows]).encode())
    plot_losses(state.losses, folder / "training_loss.png", state.held_out_losses)


def report(seconds, plan, keeper, data, rate, diffusion, precision, num_samples, min_snr=None):
    """After an epoch, or when pictures or a checkpoint are due: held-out loss, pictures, tables.

    seconds: since the last one.  data: a TrainingData.
    """
    if keeper.replacing:                        # the pictures, too, write over an earlier run's
        keeper.save(LATEST)
    state, step = keeper.state, len(keeper.state.losses)
    device = next(state.model.parameters()).device
    loss = statistics.fmean(state.losses[state.reported:])
    text = f"{plan.title(step)}: mean loss {loss:.4f}, {seconds:.0f} s"
    best = False
    if data.held_out:
        value = held_out_loss(state.ema.model, data.held_out, diffusion, device, precision, min_snr)
        state.held_out_losses[step] = value
        best = value == min(state.held_out_losses.values())
        text += f", held-out loss {value:.4f}"
    if plan.pictures_due(step):
        path = keeper.folder / "samples" / f"{plan.name(step)}.png"
        save_images(sample_images(state.ema.model, diffusion, device, num_samples,
                                  data.image_size), path)
        text += f"; wrote {path}"
    print(text, flush=True)
    keeper.write_tables(rate, last=step == plan.total_steps)
    if best:
        keeper.save(BEST)
    if step % plan.save_every == 0:
        keeper.save(f"checkpoints/model_{plan.name(step)}.pt")
    state.reported = step


# ---- The way from one report to the next

def follow(plan, keeper, look, network, batches, diffusion, device, *, step_seconds, **settings):
    """Train from where the state is to the end of the plan, saving it on the way.

    look(seconds): report, after so many seconds.
    step_seconds: that a step takes, roughly; unused if none is left.
    settings: as train_steps takes them.
    """
    state, (rank, _) = keeper.state, distributed.place()
    stream = batches.stream(len(state.losses))
    looked = saved = time.perf_counter()
    save_seconds = 0.0
    while True:
        step = len(state.losses)
        if rank == 0 and step > state.reported and plan.is_report(step):
            look(time.perf_counter() - looked)
            looked = time.perf_counter()
        if step >= plan.total_steps:
            return
        leg = max(1, int(SAVE_SECONDS / 10 / step_seconds))     # steps between looks at the clock
        first, last = plan.previous_report(step), plan.next_report(step)
        with tqdm(initial=step - first, total=last - first, desc=plan.stretch(first, last),
                  unit="step", disable=not distributed.speaks()) as bar:
            while (step := len(state.losses)) < last:
                epoch_end = (step // len(batches) + 1) * len(batches)
                end = min(step + leg, epoch_end, last)
                train_steps(network, stream, state.optimizer, diffusion, device, end - step,
                            state.losses, bar, ema=state.ema, first_step=step,
                            each=keeper.signals.postponed, **settings)
                # After each epoch, as long as that costs under a percent of the time.
                since = time.perf_counter() - saved
                if rank == 0 and (since > SAVE_SECONDS
                                  or end == epoch_end and since > 100 * save_seconds):
                    start = time.perf_counter()
                    keeper.save(LATEST)
                    saved = time.perf_counter()
                    save_seconds = saved - start
