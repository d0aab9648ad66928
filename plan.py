"""When a training does what, and what it will cost: told before it starts."""

import math
import shutil
from typing import NamedTuple

from command_line import format_seconds


class Plan(NamedTuple):
    """When a run does what, in steps. A run is counted in epochs or, with --steps, in steps."""
    total_steps: int
    sample_every: int
    save_every: int
    unit: int  # steps in what the run is counted in: an epoch, or 1
    unit_name: str  # "epoch" or "step"

    def name(self, step):
        """What a file written after `step` steps is called: epoch_005 or step_0005000."""
        return f"{self.unit_name}_{step // self.unit:0{3 if self.unit_name == 'epoch' else 7}d}"

    def title(self, step):
        """For the eye: epoch 5/20, step 5000/8000."""
        return f"{self.unit_name} {step // self.unit}/{self.total_steps // self.unit}"

    def stretch(self, first, last):
        """What lies between two reports: epoch 5/20, steps 4001 to 5000 of 8000."""
        if self.unit_name == "epoch":
            return self.title(last)
        return f"steps {first + 1} to {last} of {self.total_steps}"

    def _intervals(self):
        return [self.unit] if self.unit_name == "epoch" else [self.sample_every, self.save_every]

    def next_report(self, step):
        """The next step to look at the training: each epoch, or with pictures or a checkpoint."""
        return min([self.total_steps, *((step // n + 1) * n for n in self._intervals())])

    def previous_report(self, step):
        """The last such step up to this one, or 0."""
        return max(step // n * n for n in self._intervals())

    def is_report(self, step):
        """Is the training looked at after this step?"""
        return self.next_report(step - 1) == step

    def num_reports(self):
        """How often it is: multiples of either interval, those of both once, and the last step."""
        one, other, total = self._intervals()[0], self._intervals()[-1], self.total_steps
        return (total // one + total // other - total // math.lcm(one, other)
                + bool(total % one and total % other))

    def pictures_due(self, step):
        """Are pictures drawn after this step? Every sample_every steps, and at the end."""
        return step % self.sample_every == 0 or step == self.total_steps

    def count(self, every):
        """How often something is due every so many steps, and at the end."""
        return math.ceil(self.total_steps / every)


def make_plan(steps_per_epoch, num_epochs, steps=None, sample_every=None, save_every=None, warmup=0,
              ema_every=1):
    """Pictures after each epoch and a checkpoint every 5; in a run by steps both 5 times, at least
    200 steps apart. Raises ValueError if the run is too short for its warmup or its average."""
    total = num_epochs * steps_per_epoch if steps is None else steps
    if warmup >= total:
        raise ValueError(f"warmup must be shorter than the run of {total} steps, got {warmup}: "
                         f"give --warmup {total // 10}, for instance")
    if ema_every > total:
        raise ValueError(f"--ema_every {ema_every}: in {total} steps nothing would be averaged")
    if steps is None:
        unit = steps_per_epoch
        return Plan(total, (sample_every or 1) * unit, (save_every or 5) * unit, unit, "epoch")
    # In a short trial pictures would take the longest.
    apart = max(math.ceil(steps / 5), min(steps, 200))
    return Plan(total, sample_every or apart, save_every or apart, 1, "step")


def print_cost(plan, done, batches, step_seconds, picture_seconds, check_seconds, memory):
    """Say before the training how long it will take here, and how much memory.

    done: the steps that a resumed run has behind it.  memory: in bytes.
    The seconds are those of a step, of a set of pictures, and of a look at the held-out images.
    """
    left = (plan.total_steps - done) / plan.total_steps
    seconds = left * (plan.total_steps * step_seconds
                      + plan.count(plan.sample_every) * picture_seconds
                      + plan.num_reports() * check_seconds)
    rate = batches.batch_size / step_seconds
    which = (f"the {plan.total_steps - done} steps left" if done
             else f"the whole run of {plan.total_steps} steps")
    print(f"cost: an epoch is {len(batches)} step{'s' * (len(batches) > 1)} "
          f"of {batches.batch_size} images, about "
          f"{format_seconds(len(batches) * step_seconds)} here ({rate:.0f} images/s); "
          f"{which} about {format_seconds(seconds)}, "
          f"with {format_seconds(picture_seconds)} for each set of pictures; "
          f"{memory / 1e9:.1f} GB of memory", flush=True)


def check_disk(output_dir, num_checkpoints, checkpoint_bytes, to_be_freed=0):
    """Raise OSError if so many checkpoints will not fit: better now than after hours."""
    # An earlier run's files go only once the first checkpoint is written.
    need = max(num_checkpoints * checkpoint_bytes - to_be_freed, checkpoint_bytes)
    if shutil.disk_usage(output_dir).free < need:
        raise OSError(28, f"{num_checkpoints} checkpoints of {checkpoint_bytes / 1e6:.0f} MB "
                      "do not fit on the disk; --save_every sets how many there are",
                      str(output_dir))
