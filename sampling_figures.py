"""Figures of a model's sampling: its way, one step of it, few and many steps, seeds.

visualize_diffusion.py --figure reverse, one_step, steps and seeds draw them. In all of them
`settings` is what generate takes (sample.py), beyond the number of images.
"""

import itertools
import math
import time

import torch

from command_line import format_seconds
from diffusion import seeded_noise
from images import save_gif, save_strip
from sample import draw_frame, generate, save_generation_strip
from schedules import nearest_levels


def reverse_figure(model, diffusion, path, timesteps, count, **settings):
    """x_t and the guess of x_0 on the way, as PNG and GIF: at those levels, of all that the sampler
    visits, which are nearest to the timesteps asked for, and finished. Returns the two paths."""
    levels = diffusion.sampling_levels(settings["sampler"], settings["steps"])
    _, frames = generate(model, diffusion, count, keep=nearest_levels(levels[:-1], timesteps),
                         **settings)
    save_generation_strip(frames, path, num_images=count, num_columns=len(frames),
                          title=f"the reverse process, {settings['sampler']} "
                                f"in {len(levels) - 1} steps")
    save_gif([draw_frame(*frame) for frame in frames], path.with_suffix(".gif"), seconds=0.5)
    return [path, path.with_suffix(".gif")]


def explain_step(model, diffusion, t, **settings):
    """All that happens in a DDPM step, at the level nearest to t (not the last: it adds no noise).

    mean = to_x_0 x_0 + to_x_t x_t,   x_prev = mean + sigma noise          (Ho et al. 2020, eq. 6-7)

    Returns a dict: images [C, H, W] x_t, eps, x_0 (clamped), mean, noise, x_prev, and the numbers
    t, t_prev, signal_weight and noise_weight (of image and noise in x_t), to_x_0, to_x_t, sigma,
    and the objective.
    """
    settings = {**settings, "sampler": "ddpm"}
    levels = diffusion.sampling_levels("ddpm", settings.get("steps"))
    if len(levels) < 3:
        raise ValueError("a chain of one step adds no noise: --steps 2 or more")
    k, = nearest_levels(levels[:-2], [t])
    _, frames = generate(model, diffusion, 1, keep=(k, k + 1), **settings)
    (t, x_t, x_0), (t_prev, x_prev, _) = frames[:2]
    ab, ab_prev = diffusion.alpha_bar_at(t), diffusion.alpha_bar_at(t_prev)
    beta = 1 - ab / ab_prev
    to_x_0 = math.sqrt(ab_prev) * beta / (1 - ab)
    to_x_t = math.sqrt(ab / ab_prev) * (1 - ab_prev) / (1 - ab)
    sigma = math.sqrt((1 - ab_prev) / (1 - ab) * beta)
    y = settings.get("y")
    eps = diffusion.predict_noise(model, x_t, t, None if y is None else y.to(x_t.device))
    images = dict(x_t=x_t, eps=eps, x_0=x_0, mean=to_x_0 * x_0 + to_x_t * x_t,
                  noise=seeded_noise(settings["seed"], [0], k + 1, x_t.shape[1:]), x_prev=x_prev)
    return dict({name: image[0].cpu() for name, image in images.items()}, t=t, t_prev=t_prev,
                signal_weight=math.sqrt(ab), noise_weight=math.sqrt(1 - ab), to_x_0=to_x_0,
                to_x_t=to_x_t, sigma=sigma, objective=diffusion.objective)


def rms(a, b):
    """How far two sets of images are apart: the root of the mean square."""
    return float((a - b).square().mean().sqrt())


def steps_figure(model, diffusion, path, steps_list, count, **settings):
    """The same noise sampled in few and in many steps, side by side.

    Returns lines that say how long each took, and how far its pictures are from the last ones.
    """
    found, times = [], []
    for steps in steps_list:
        start = time.perf_counter()
        images, _ = generate(model, diffusion, count, **{**settings, "steps": steps})
        found.append(images.cpu())                          # a GPU is waited for here
        times.append(format_seconds(time.perf_counter() - start))
    labels = [f"{n} steps\n{took}" for n, took in zip(steps_list, times)]
    save_strip(list(torch.stack(found, dim=1)), labels, path,
               title=f"the same noise, {settings['sampler']}")
    return [f"{n} steps: {took}, "
            f"{rms(images, found[-1]):.4f} (root mean square) from the last column"
            for n, took, images in zip(steps_list, times, found)]


def seeds_figure(model, diffusion, path, seeds, count, **settings):
    """Each seed twice: two rows of the same pictures.

    Returns lines that say whether they are the same, and how far apart the nearest two seeds are.
    """
    rows, names, lines = [], [], []
    for seed in seeds:
        once, again = (generate(model, diffusion, count, **{**settings, "seed": seed})[0].cpu()
                       for _ in "12")
        verdict = "equal" if torch.equal(once, again) else "NOT equal"
        rows += [once, again]
        names += [f"seed {seed}", f"again: {verdict}"]
        lines.append(f"seed {seed} twice: {verdict}, "
                     f"largest difference {(once - again).abs().max():.1e}")
    save_strip(rows, [""] * count, path, row_labels=names)
    pairs = itertools.combinations(zip(seeds, rows[::2]), 2)
    apart = [(rms(x, y), f"seeds {a} and {b} are nearest") for (a, x), (b, y) in pairs]
    return lines + [f"{text}, {far:.4f} (root mean square) apart"
                    for far, text in sorted(apart)[:1]]
