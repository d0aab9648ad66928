"""The training loop: one step, one pass over the data, and what can be measured of it.

    optimizer = OPTIMIZERS["adam"](model.parameters(), lr=2e-4)
    loss = train_epoch(model, batches, optimizer, DiffusionProcess(), "cpu")
"""

import contextlib
import functools
import itertools
import math
import statistics
import time

import torch
from tqdm import tqdm

import distributed
from diffusion import evaluating, seeded_noise
from muon import Muon
from utils import autocast, get_timesteps, measure, seed_step, shuffled

OPTIMIZERS = {"adam": functools.partial(torch.optim.Adam, fused=True),
              "adamw": functools.partial(torch.optim.AdamW, fused=True), "muon": Muon}
LR_SCHEDULES = ("constant", "cosine")


def rate_at(step, total_steps, peak, schedule="constant", warmup=0):
    """The learning rate of step 0, 1, ...: a line up to `peak` over `warmup` steps, then constant
    or down to zero along half a cosine (Loshchilov & Hutter 2017, eq. 5, without restarts)."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total_steps - warmup)))
    return peak


def train_step(model, x_0, y, optimizer, diffusion, precision=torch.float32, grad_clip=None,
               accumulate=1, label_drop=0.0, min_snr=None, density="uniform"):
    """One update: noise a batch, compare the model's prediction with the truth, step downhill.

    accumulate: work through the batch in so many parts, one after the other, to save memory.
    label_drop: the share of images whose class is withheld, so that the model also learns to do
    without (Ho & Salimans 2022, algorithm 1).   min_snr: see DiffusionProcess.training_loss.
    density: how often each timestep is met, see get_timesteps.
    Returns the loss. On a CPU a loss or gradient that is not a number raises FloatingPointError and
    leaves the weights as they are. Other devices, which are not waited for, take the step all the
    same: the weights are spoilt then, and the loss is NaN.
    Of several processes each works on every n-th image. What is random is drawn for the whole batch
    first, so that neither parts nor processes change it.
    """
    t = get_timesteps(len(x_0), diffusion.num_timesteps, x_0.device, density)
    noise = torch.randn_like(x_0)
    if label_drop:
        y = y.masked_fill(torch.rand(len(y), device=y.device) < label_drop, -1)
    rank, world = distributed.place()
    if rank > 0:
        torch.manual_seed(torch.initial_seed() + rank)  # or dropout would repeat in each process
    optimizer.zero_grad()
    loss = torch.zeros((), device=x_0.device)
    count = min(accumulate, len(x_0))
    parts = zip(*(values.tensor_split(count) for values in (x_0, y, t, noise)))
    for k, part in enumerate(parts, start=1):
        # Only after the last part do the processes exchange their gradients.
        with (contextlib.nullcontext() if k == count or world == 1 else model.no_sync(),
              autocast(x_0.device, precision)):
            share = diffusion.training_loss(model, *(values[rank::world] for values in part),
                                            min_snr)
            share = share * (len(part[0]) / len(x_0))
            share.backward()
        loss += share.detach()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    loss = distributed.mean_over_ranks(loss)
    # Another device would have to be waited for: train_steps looks at its losses once a second.
    if x_0.device.type == "cpu" and not (loss + norm).isfinite():
        raise FloatingPointError(f"no number any more: loss {float(loss)}, "
                                 f"gradient norm {float(norm)}")
    try:
        optimizer.step()
    except (RuntimeError, MemoryError) as error:
        error.half_done = True  # some of the weights may be those of this step already
        raise
    return loss + 0 * norm      # NaN, too, where a gradient was no number


def train_epoch(model, dataloader, optimizer, diffusion, device, *, steps=None, losses=None,
                **settings):
    """One pass over the data, with a progress bar. Returns the mean loss.

    dataloader:  gives (images [B, C, H, W] in [-1, 1], labels [B]): data.Batches or any DataLoader.
    steps:       how many to do, if not one pass; needed where the dataloader has no length.
    losses:      a list that the loss of each step is appended to, also if the training is stopped.
    settings:    as train_steps takes them.
    """
    losses = [] if losses is None else losses
    if steps is None:
        try:
            steps = len(dataloader)
        except TypeError as error:
            raise ValueError("this dataloader has no length: say how many steps to do") from error
    before = len(losses)
    with tqdm(total=steps, desc="training", unit="step", disable=not distributed.speaks()) as bar:
        train_steps(model, dataloader, optimizer, diffusion, device, steps, losses, bar, **settings)
    if len(losses) == before:
        raise ValueError("the dataloader gave no batch: are there fewer images than batch_size?")
    return statistics.fmean(losses[before:])


def train_steps(model, batches, optimizer, diffusion, device, steps, losses, bar, *, ema=None,
                ema_every=1, rate=None, seed=None, first_step=0, each=contextlib.nullcontext,
                **settings):
    """Take steps, at most as many as there are batches.

    losses:      a list that the loss of each step is appended to.   bar: a tqdm that counts them.
    ema:         an EMA to update after every `ema_every` steps.
    rate:        a function from the step to the learning rate.
    seed:        step k of the run then follows from (seed, k); None uses the global generator.
    first_step:  how many steps the run has behind it.   each: a context that each step is taken in.
    settings:    precision, grad_clip, accumulate, label_drop, min_snr, density: see train_step.
    """
    before, world = len(losses), distributed.place()[1]
    if world > 1 and seed is None:
        raise ValueError("several processes need a seed, or each would draw its own noise")
    model.train()
    start = shown = time.perf_counter()
    try:
        for k, (x_0, y) in enumerate(itertools.islice(batches, steps)):
            step = first_step + k
            if seed is not None:
                seed_step(seed, step)
            if rate is not None:
                for group in optimizer.param_groups:
                    group["lr"] = rate(step)
            with each():
                loss = train_step(model, x_0.to(device), y.to(device), optimizer, diffusion,
                                  **settings)
                if ema is not None and (step + 1) % ema_every == 0:
                    ema.update(model)
                losses.append(loss)  # still on the device; its place counts the step
            bar.update()
            now = time.perf_counter()
            last = k == steps - 1       # of several processes all look only here, and stop together
            if last or now - shown > 1 and world == 1:
                shown = now
                loss = loss.item()      # a GPU waits here, once a second
                if not math.isfinite(loss):
                    raise FloatingPointError("no number any more")
                bar.set_postfix_str(f"loss {loss:.4f}, "
                                    f"{(k + 1) * len(x_0) / (now - start):.0f} images/s")
    except FloatingPointError as error:
        taken = [math.isfinite(loss) for loss in losses[before:]]
        step = first_step + (taken.index(False) if False in taken else len(taken)) + 1
        raise ValueError(f"{error}, in step {step}: try a lower --lr, --grad_clip 1 or "
                         "--precision float32; earlier checkpoints are untouched") from error
    finally:
        if len(losses) > before:
            losses[before:] = torch.stack(losses[before:]).tolist()


@torch.no_grad()
def held_out_loss(model, batches, diffusion, device, precision=torch.float32, min_snr=None):
    """The loss on images that are not trained on, always at the same timesteps and noise, so that
    two models (of one objective and one clip_loss), or two moments of a training, compare.

    batches: a Batches of all held-out images, whose count is divided evenly over the timesteps;
    which of them gets which is random, or in a folder with classes each would meet its own levels.
    min_snr: weigh the errors as in the training.
    """
    images, losses, T = batches.num_images, [], diffusion.num_timesteps
    order, parts = shuffled(images), torch.arange(images).split(batches.batch_size)
    for places in parts:
        x_0, y = batches.take(batches.indices[places].to(batches.images.device))
        t = ((order[places] + 0.5) * T / images).long().to(device)
        noise = seeded_noise(0, places.tolist(), 0, x_0.shape[1:]).to(device)
        with evaluating(model), autocast(t.device, precision):
            loss = diffusion.training_loss(model, x_0.to(device), y.to(device), t, noise, min_snr)
        losses.append(loss)                     # still on the device: a GPU need not wait
    losses = torch.stack(losses).tolist()
    return sum(loss * len(places) for loss, places in zip(losses, parts)) / images


def measure_seconds(network, ema, batch, diffusion, picture_shape, optimizer="adam", **settings):
    """(seconds for a training step, seconds for a call of the model on one set of pictures).

    The steps are real ones, but at learning rate 0, so that they change nothing as long as the
    gradients are numbers; `ema` must be one to throw away.
    picture_shape: (B, C, H, W).  optimizer: a key of OPTIMIZERS.
    settings: as train_step takes them.
    """
    x_0, y = batch
    optimizer = OPTIMIZERS[optimizer](network.parameters(), lr=0.0)
    x_T = torch.zeros(picture_shape, device=x_0.device)

    def update():
        train_step(network, x_0, y, optimizer, diffusion, **settings)
        ema.update(network)

    step = measure(update, x_0.device, repeats=10 if x_0.device.type == "cuda" else 3)
    call = measure(lambda: diffusion.sample(ema.model, x_T=x_T, sampler="ddim", steps=1),
                   x_0.device)
    optimizer.zero_grad()
    return step, call
