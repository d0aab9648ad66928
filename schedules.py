"""How much of an image each noise level keeps, and at which levels sampling stops.
"""

import math

import numpy as np
import torch

# ---- Schedules: a function of T that returns alpha_bar, float64 [T], strictly falling in (0, 1).

MAX_TIMESTEPS = 100_000
MAX_BETA = 0.999  # keeps alpha_bar above zero: its square root divides in predict_x0


def linear_alpha_bar(num_timesteps, beta_start=None, beta_end=None):
    """Betas on a straight line, 1e-4 to 0.02 at T = 1000 (Ho et al. 2020, section 4).

    Unless they are given, both ends are scaled by 1000 / T, so that a chain of any length ends in
    noise: left unscaled, T = 200 would stop at alpha_bar = 0.13, with the image still visible.
    Raises ValueError for a beta that is given and does not lie in (0, MAX_BETA].
    """
    scale = 1000 / num_timesteps
    start = 1e-4 * scale if beta_start is None else beta_start
    end = 0.02 * scale if beta_end is None else beta_end
    if not 0 < start < math.inf or not 0 < end < math.inf:
        raise ValueError(f"betas must be positive numbers, got beta_start={start}, beta_end={end}")
    if max(beta_start or 0, beta_end or 0) > MAX_BETA:  # those that follow from T are capped below
        raise ValueError(f"betas must not exceed {MAX_BETA}, "
                         f"got beta_start={start}, beta_end={end}")
    # Drawn from the end backwards, so that T = 1 keeps beta_end and still ends in noise.
    betas = torch.linspace(end, start, num_timesteps, dtype=torch.float64).flip(0)
    return torch.cumprod(1 - betas.clamp(max=MAX_BETA), dim=0)


def _from_curve(f):
    """alpha_bar for t = 0..T-1 from a curve at the T + 1 points 0, 1/T, ... 1, betas capped."""
    betas = (1 - f[1:] / f[:-1]).clamp(max=MAX_BETA)
    return torch.cumprod(1 - betas, dim=0)


def cosine_alpha_bar(num_timesteps, s=0.008):
    """alpha_bar falls like cos^2 (Nichol & Dhariwal 2021, eq. 17): gentler at both ends."""
    level = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    return _from_curve(torch.cos((level + s) / (1 + s) * math.pi / 2) ** 2)


def sigmoid_alpha_bar(num_timesteps, start=-3.0, end=3.0):
    """alpha_bar falls like a logistic curve between `start` and `end`, stretched to run from 1 to 0
    (Jabri et al. 2022; Chen 2023)."""
    level = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    f = torch.sigmoid(-(start + level * (end - start)))
    return _from_curve((f - f[-1]) / (f[0] - f[-1]))


SCHEDULES = {"linear": linear_alpha_bar, "cosine": cosine_alpha_bar, "sigmoid": sigmoid_alpha_bar}


def alpha_bar_table(schedule, num_timesteps=1000, beta_start=None, beta_end=None):
    """alpha_bar of every noise level: float64 [T].

    schedule: a key of SCHEDULES, or the numbers themselves, whatever num_timesteps is.
    beta_start, beta_end: see linear_alpha_bar.  Raises ValueError for an unknown name, betas given
    for another schedule, a number out of range, and a table that does not fall strictly.
    """
    named = isinstance(schedule, str)
    if (beta_start, beta_end) != (None, None) and not (named and schedule == "linear"):
        raise ValueError("beta_start and beta_end belong to the linear schedule, and to no other")
    if not named:
        table = torch.as_tensor(schedule, dtype=torch.float64).cpu().clone()
        if table.ndim != 1 or not len(table):
            raise ValueError(f"alpha_bar must be a row of numbers, got shape {tuple(table.shape)}")
    elif schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}; choose from {sorted(SCHEDULES)}")
    elif not 1 <= num_timesteps <= MAX_TIMESTEPS or num_timesteps != int(num_timesteps):
        raise ValueError(f"num_timesteps must be a whole number from 1 to {MAX_TIMESTEPS}, "
                         f"got {num_timesteps}")
    elif schedule == "linear":
        table = linear_alpha_bar(int(num_timesteps), beta_start, beta_end)
    else:
        table = SCHEDULES[schedule](int(num_timesteps))
    ends = table.new_tensor([1.0, 0.0])
    if not (torch.cat([ends[:1], table, ends[1:]]).diff() < 0).all():
        raise ValueError("alpha_bar must fall strictly, from below 1 to above 0")
    return table


def half_log_snr(alpha_bar):
    """Half the log of the signal-to-noise ratio, lambda in Lu et al. 2022. alpha_bar: below 1."""
    return 0.5 * math.log(alpha_bar / (1 - alpha_bar))


# ---- Spacings: a function of alpha_bar (float64 [T]) and the number of steps; it returns as many
# levels, real numbers from T-1 down, then -1 (clean). They are rounded to distinct integers.

def uniform_spacing(alpha_bar, steps):
    """Equal strides from T-1 down to -1; "trailing" in diffusers, but for how halves are rounded
    (Lin et al. 2023, table 2)."""
    return np.linspace(-1, len(alpha_bar) - 1, steps + 1)[::-1]


def _even_in(value, steps):
    """Levels whose `value` (an array over t that rises or falls all the way) is evenly spread."""
    t = np.arange(len(value))
    wanted = np.linspace(value[-1], value[0], steps)
    rising = slice(None) if value[0] < value[-1] else slice(None, None, -1)   # as interp wants it
    return np.append(np.interp(wanted, value[rising], t[rising]), -1)


def log_snr_spacing(alpha_bar, steps):
    """Equal strides in the logarithm of signal over noise, down to t = 0 (Lu et al. 2022)."""
    return _even_in(np.log(alpha_bar / (1 - alpha_bar)), steps)


def karras_spacing(alpha_bar, steps, rho=7):
    """Equal strides in s^(1/rho), s = sqrt((1 - ab) / ab), sigma in Karras et al. 2022 (eq. 5)."""
    return _even_in(((1 - alpha_bar) / alpha_bar) ** (0.5 / rho), steps)


def tapered_spacing(alpha_bar, steps, bend=0.02):
    """Equal strides down to about t = bend T, and from there ever shorter ones, in proportion to t.

    The last step of "uniform" leaps from T / steps to the clean image, and smooths what noise hides
    at that level. Here the last leap is from t = 0, at the price of somewhat longer strides above.
    """
    T = len(alpha_bar)
    t = np.arange(T)
    return _even_in(t / (bend * T) + np.log(t + 1), steps)


SPACINGS = {"uniform": uniform_spacing, "tapered": tapered_spacing, "log_snr": log_snr_spacing,
            "karras": karras_spacing}


def distinct(levels):
    """Round levels that fall from T-1 to -1 to integers of which no two are equal."""
    levels = [round(level) for level in levels]
    top = levels[0]
    for k in reversed(range(len(levels) - 1)):          # where several meet, they move up,
        levels[k] = max(levels[k], levels[k + 1] + 1)
    return [min(level, top - k) for k, level in enumerate(levels)]      # but none above the first


def nearest_levels(levels, timesteps):
    """Where in a sampler's `levels` the wanted timesteps are, or what is nearest; in order."""
    return sorted({min(range(len(levels)), key=lambda k: abs(levels[k] - t)) for t in timesteps})
