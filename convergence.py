"""How far a deterministic sampler is from the exact answer, on data for which that is known.

Let every pixel come from a mixture of Gaussians, independently. Then the best guess of x_0 needs no
network, and the place to which noise flows when no noise is added needs no sampler: both are
formulas. What is left between a sampler and the formula is the error of its steps alone.

    errors = solver_errors(MIXTURES["two Gaussians"])    # {(sampler, spacing): an error per count}

visualize_diffusion.py --figure solvers prints and draws them.
"""

import math

import torch

from diffusion import DiffusionProcess
from schedules import SPACINGS

# (weight, mean, standard deviation) of each Gaussian.
MIXTURES = {"one Gaussian": [(1.0, -0.2, 0.25)],
            "two Gaussians": [(0.5, -0.5, 0.15), (0.5, 0.6, 0.15)]}
SOLVERS = ("ddim", "dpmpp_2m", "ipndm")  # the samplers without noise
EVALUATIONS = (5, 10, 20, 50, 100, 200)


def at_level(mixture, alpha_bar):
    """The mixture of x_t at a noise level: again (weight, mean, standard deviation) of each."""
    return [(weight, math.sqrt(alpha_bar) * mean, math.sqrt(alpha_bar * std**2 + 1 - alpha_bar))
            for weight, mean, std in mixture]


def exact_denoiser(mixture, diffusion):
    """E[x_0 | x_t] as a model for a process of objective "x0".

    Each Gaussian has its own answer, mean + std^2 a (x_t - a mean) / (a^2 std^2 + 1 - a^2), where
    a = sqrt(alpha_bar); they are weighed by how probable each has become now that x_t is seen.
    """
    def model(x_t, t, y=None):
        alpha_bar = float(diffusion.alpha_bar[int(t[0])])
        weights, answers = [], []
        for (weight, mean, std), (_, mean_t, std_t) in zip(mixture, at_level(mixture, alpha_bar)):
            away = (x_t - mean_t) / std_t
            weights.append(math.log(weight / std_t) - away**2 / 2)
            answers.append(mean + std**2 * math.sqrt(alpha_bar) * away / std_t)
        return (torch.stack(weights).softmax(0) * torch.stack(answers)).sum(0)
    return model


def distribution(mixture, x):
    """The probability to draw less than x."""
    return sum(weight * torch.special.ndtr((x - mean) / std) for weight, mean, std in mixture)


def exact_flow(mixture, x_T, alpha_bar):
    """The x_0 to which the probability flow carries x_T from the level alpha_bar.

    In one dimension paths cannot cross, so as many of them end below x_0 as began below x_T: x_0 is
    where the distribution of the data has the value that the distribution of x_t has at x_T. It is
    found by halving.
    """
    share = distribution(at_level(mixture, alpha_bar), x_T)
    low = torch.full_like(x_T, min(mean - 10 * std for _, mean, std in mixture))
    high = torch.full_like(x_T, max(mean + 10 * std for _, mean, std in mixture))
    for _ in range(60):                                     # 2^-60: below the spacing of float64
        middle = (low + high) / 2
        below = distribution(mixture, middle) < share
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def even_noise(count):
    """Noise without chance: `count` numbers, float64 [count, 1, 1, 1], each for an equal share of
    the normal distribution."""
    share = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return torch.special.ndtri(share).view(-1, 1, 1, 1)


def solver_errors(mixture, num_timesteps=1000, schedule="linear", solvers=SOLVERS,
                  spacings=tuple(SPACINGS), evaluations=EVALUATIONS,
                  count=1000, tick=lambda: None):
    """Mean distance to the exact flow, clamp off: {(sampler, spacing): a list along `evaluations`}.

    Objective "x0" keeps all float64: from "eps", x_0 would be found by dividing by a small number.
    tick: called after each sampling, for a progress bar.
    """
    diffusion = DiffusionProcess(num_timesteps, schedule, objective="x0")
    model, x_T = exact_denoiser(mixture, diffusion), even_noise(count)
    want = exact_flow(mixture, x_T, float(diffusion.alpha_bar[-1]))
    errors = {}
    for sampler in solvers:
        for spacing in spacings:
            row = errors[sampler, spacing] = []
            for steps in evaluations:
                found = diffusion.sample(model, x_T=x_T, sampler=sampler, steps=steps,
                                         spacing=spacing, clip=False)
                row.append(float((found - want).abs().mean()))
                tick()
    return errors


def solver_lines(errors, evaluations=EVALUATIONS):
    """What solver_errors returns as lines of text."""
    head = f"{'sampler':10}{'spacing':10}" + "".join(f"{steps:>9}" for steps in evaluations)
    return [head, *(f"{sampler:10}{spacing:10}" + "".join(f"{error:>9.1e}" for error in row)
                    for (sampler, spacing), row in errors.items())]
