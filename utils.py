"""Device and precision, seeds, the averaged copy of a model, what things cost.
"""

import copy
import ctypes
import os
import re
import sys
import time

import numpy as np
import torch

# many look for them here
from images import plot_losses, save_images  # noqa: F401

try:
    import resource
except ImportError:      # Windows
    resource = None

# ---- Device, precision, seeds

def get_device(name="auto"):
    """A torch.device: CUDA, then MPS, then CPU, or the one named; ValueError if that is missing."""
    if name != "auto":
        try:
            device = torch.empty(0, device=name).device
        except (RuntimeError, AssertionError, ImportError) as error:
            raise ValueError(f"device {name!r} cannot be used: "
                             f"{str(error).splitlines()[0]}") from error
        if device.type not in ("cpu", "cuda", "mps"):
            raise ValueError(f"device {name!r} cannot be used; "
                             "choose from auto, cpu, cuda, cuda:1, mps")
        return device
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def describe_device(device, name="auto"):
    """One phrase: which device, and why that one."""
    if device.type == "cuda":
        what = torch.cuda.get_device_name(device)
    elif device.type == "cpu":
        count = torch.get_num_threads()
        what = f"{count} thread{'s' * (count > 1)}"
    else:
        what = "Apple GPU"
    why = "as asked" if name != "auto" else {
        "cuda": "a CUDA GPU was found", "cpu": "no GPU was found",
        "mps": "no CUDA, but an Apple GPU was found"}[device.type]
    return f"{device} ({what}; {why})"


PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16}


def has_bfloat16(device):
    """Does this hardware multiply in bfloat16? Else torch imitates it, far slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "mps":
        return True                                     # the newer ones do
    features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    # The last is ARM's.
    return any(features.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def get_precision(name, device):
    """(dtype, a phrase that says which and why): what is asked for, "float32" or "bf16", or, with
    "auto", bfloat16 where the hardware multiplies in it, else float32. ValueError for another name.
    """
    if name != "auto" and name not in PRECISIONS:
        raise ValueError(f"unknown precision {name!r}; choose from {['auto', *PRECISIONS]}")
    native = has_bfloat16(device)
    if name == "auto" and device.type == "mps":
        return torch.float32, "float32 (bf16 is not tried on Apple GPUs unless asked for)"
    if name == "auto":
        name, why = ("bf16", "has") if native else ("float32", "has no")
        return PRECISIONS[name], f"{name} (the device {why} bfloat16 instructions)"
    slow = name == "bf16" and not native
    return (PRECISIONS[name],
            name + " (the device has no instructions for it: float32 would be faster)" * slow)


def autocast(device, precision):
    """Inside, layers multiply in `precision` (see get_precision); sums and losses stay float32."""
    return torch.autocast(torch.device(device).type, torch.bfloat16,
                          enabled=precision == torch.bfloat16)


def seed_step(seed, step):
    """Make a training step's randomness (timesteps, noise, dropout) follow from (seed, step)."""
    # spawn_key, not [seed, step]: its numbers never coincide with those of sampling.
    state = np.random.SeedSequence(seed, spawn_key=(step,)).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0]))


def shuffled(count, seed=0):
    """The numbers 0 to count - 1 in the random order of a seed: [count]."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


DENSITIES = ("uniform", "logit_normal", "quadratic")


def get_timesteps(batch_size, num_timesteps, device, density="uniform"):
    """Random timesteps: [batch_size] integers in 0..num_timesteps-1, spread evenly over a batch.

    Low-discrepancy sampling: one comb with a random start, so that no batch has many early and few
    late ones, and the loss jumps about less (Kingma et al. 2021, appendix I.1). Each place in the
    batch keeps to its own stretch of the levels: the images have to be shuffled, so that all of
    them meet all levels.

    density: "uniform", or "logit_normal": the logit of (t / T) is Gaussian, so that the levels in
    the middle, where the picture is decided, are met 1.6 times as often as the average, and those
    at both ends seldom (Esser et al. 2024, section 3.1, with m = 0, s = 1); or "quadratic": as the
    square of an even comb, so that half of them lie below T / 4, where fine detail is decided.
    Raises ValueError for another name.
    """
    comb = (torch.arange(batch_size, device=device) + torch.rand((), device=device)) / batch_size
    if density == "logit_normal":
        comb = torch.sigmoid(2**0.5 * torch.erfinv(2 * comb - 1))   # Gaussian quantiles, as levels
    elif density == "quadratic":
        comb = comb ** 2
    elif density != "uniform":
        raise ValueError(f"unknown density {density!r}; choose from {', '.join(DENSITIES)}")
    return (comb * num_timesteps).long().clamp(max=num_timesteps - 1)  # 0.9999999 may round up


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
        """Move the average towards `model`'s weights; buffers, which are no weights, are copied."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        # In one call: a lerp for each of hundreds of weights would cost a GPU hundreds of launches.
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)
        for average, value in zip(self.model.buffers(), model.buffers(), strict=True):
            average.copy_(value)
        self.updates += 1


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
    if os.path.exists("/proc/self/status"):  # ru_maxrss would begin with what the parent held
        with open("/proc/self/status") as file:
            found = re.search(r"^VmHWM:\s+(\d+) kB", file.read(), re.M)
        if found:
            return int(found[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024              # kilobytes, but for macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def keep_memory():
    """Let the C library keep memory that it has freed, for the next tensor of that size.

    glibc gives large blocks back at once and gets them anew, page by page, in each step: about
    170,000 page faults in a step of SimpleUNet, a tenth of its time. Other systems do as they do.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        trim_threshold, mmap_max = -1, -4                       # their numbers in malloc.h
        mallopt(trim_threshold, -1)
        mallopt(mmap_max, 0)
