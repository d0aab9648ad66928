"""How wrong a model is at which noise levels: its loss, and the error of the noise it predicts.

    edges, losses = loss_by_timestep(model, diffusion, x_0)  # a loss per range of t
    edges, errors = predictor_errors(diffusion, x_0, model)  # {answer: its error per range of t}

The second stands beside the errors of simple answers, which tell what it is worth. A model of any
objective can be asked, as its estimate of x_0 says what it takes for noise.
visualize_diffusion.py --figure predictors and loss_by_timestep print and draw them.
"""

import torch

from diffusion import evaluating

RANGES = 4
LOSS_RANGES = 10
NO_PREDICTION = "no prediction: x_t - x_0"  # how far the noisy image is from the clean one


def ranges_of_t(num_timesteps, ranges, count):
    """Cut 0..T into equal ranges. Returns (their edges, `count` evenly spread levels in each)."""
    edges = torch.linspace(0, num_timesteps, ranges + 1).round().int().tolist()
    return edges, [torch.linspace(low, high - 1, count).round().long()
                   for low, high in zip(edges, edges[1:])]


@torch.no_grad()
def loss_by_timestep(model, diffusion, x_0, y=None, ranges=LOSS_RANGES, seed=0):
    """The mean loss in equal ranges of t, for every model at the same noise and t.

    Only losses of one objective and one clip_loss compare.  x_0: [N, C, H, W] in [-1, 1].
    Returns (the edges of the ranges, from 0 to T, and a loss for each range).
    """
    random, T = torch.Generator().manual_seed(seed), diffusion.num_timesteps
    edges, levels = ranges_of_t(T, min(ranges, T), len(x_0))
    losses = []
    for t in levels:
        t = t.to(x_0.device)
        noise = torch.randn(x_0.shape, generator=random).to(x_0.device)
        total = 0.0
        for k in torch.arange(len(x_0), device=x_0.device).split(64):
            labels = None if y is None else y[k]
            with evaluating(model):
                total += len(k) * diffusion.training_loss(
                    model, x_0[k], labels, t[k], noise[k]).item()
        losses.append(total / len(x_0))
    return edges, losses


@torch.no_grad()
def predictor_errors(diffusion, x_0, model=None, y=None, ranges=RANGES, seed=0, tick=lambda: None):
    """Mean squared errors of the predicted noise in equal ranges of t, all at the same noises.

    x_0: [N, C, H, W] in [-1, 1].  y: [N] class indices or None.
    ranges: into how many parts 0..T-1 is cut, T at most.  tick: called after each of them.
    Returns (the edges of the ranges, from 0 to T; {answer: [ranges] errors}). The last row is no
    answer: it is the mean square of x_t - x_0, which does grow with t, and is often taken for the
    error of "zero".
    """
    T, random = diffusion.num_timesteps, torch.Generator().manual_seed(seed)
    edges, levels = ranges_of_t(T, ranges, len(x_0))
    errors = {}
    for t in levels:
        t = t.to(x_0.device)
        noise, other = (torch.randn(x_0.shape, generator=random).to(x_0.device) for _ in range(2))
        x_t, _ = diffusion.forward_diffusion(x_0, t, noise)
        answers = {"zero": torch.zeros_like(noise), "random noise": other, "the input, x_t": x_t,
                   "the noise itself": noise}
        if model is not None:
            with evaluating(model):
                answers["the model"] = torch.cat([
                    diffusion.predict_noise(model, x_t[k], t[k], None if y is None else y[k])
                    for k in torch.arange(len(x_0), device=x_0.device).split(64)])
        for name, answer in answers.items():
            errors.setdefault(name, []).append((answer - noise).square().mean().item())
        errors.setdefault(NO_PREDICTION, []).append((x_t - x_0).square().mean().item())
        tick()
    return edges, errors


def predictor_lines(edges, errors):
    """The errors as lines of text, one for each answer."""
    heads = [f"{low}-{high - 1}" for low, high in zip(edges, edges[1:])]
    return [f"{'t':26}" + "".join(f"{head:>12}" for head in heads),
            *(f"{name:26}" + "".join(f"{error:12.4f}" for error in row)
              for name, row in errors.items())]
