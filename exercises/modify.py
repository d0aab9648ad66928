"""Exercise 2 of 3: each function works, but is not yet what its text asks for. Change it.

python exercises/modify.py tells what is right. Nothing here needs the project's own files.
"""

import torch

from grader import grade


def alpha_bar(T):
    """How much of the image's variance is left at t = 0, ..., T - 1: float64 [T].

    Now: the linear schedule.
    Wanted: the cosine schedule of Nichol & Dhariwal 2021, eq. 17: after n of T steps f(n) / f(0) is
    left, where f(n) = cos((n / T + s) / (1 + s) * pi / 2)^2 and s = 0.008; but no beta above 0.999.
    """
    betas = torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * 1000 / T
    return torch.cumprod(1 - betas, dim=0)


def target(x_0, noise, ab):
    """What the network is to answer when it sees sqrt(ab) x_0 + sqrt(1 - ab) noise. ab: a number.

    Now: the noise.
    Wanted: v of Salimans & Ho 2022, which turns from the noise to minus the image as ab falls.
    """
    return noise


def levels(T, steps):
    """The timesteps that a sampler visits, as a list of integers.

    Now: without the clean image, and where T / steps is no integer, too many or too few of them.
    Wanted: exactly `steps` levels, from T - 1 down in strides as equal as integers allow,
    and then -1, the clean image.
    """
    return list(range(T - 1, -1, -(T // steps)))


def step(x_t, eps, ab_t, ab_prev, fresh):
    """From the noise level ab_t (alpha_bar there, a number) to the cleaner ab_prev.

    eps: the predicted noise.
    Now: DDPM, which replaces part of the noise by fresh noise.
    Wanted: DDIM, which keeps all of it (Song et al. 2021, eq. 12 with sigma = 0).
    Both without a clamp.
    """
    sigma = ((1 - ab_prev) / (1 - ab_t) * (1 - ab_t / ab_prev)) ** 0.5
    x_0 = (x_t - (1 - ab_t) ** 0.5 * eps) / ab_t ** 0.5
    return ab_prev ** 0.5 * x_0 + (1 - ab_prev - sigma ** 2) ** 0.5 * eps + sigma * fresh


def guided(with_class, without_class, guidance):
    """The answer that is used, out of the network's two: with the class, and without any.

    Now: the class is followed plainly.
    Wanted: it is followed `guidance` times as far; 1 is plain, and 0 is the answer without a class.
    """
    return with_class


if __name__ == "__main__":
    grade("modify", globals())
