"""The diffusion process: how noise destroys an image, and how a model's guesses undo it.

    forward    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise       (one jump, any t)
    training   a model sees x_t and t and is asked for the noise; the loss is the squared error
    sampling   start from noise; again and again guess x_0, and step to a slightly cleaner level

A model is any callable `model(x_t, t, y=None)`: x_t [B, C, H, W], t [B] integers (0 = least noisy),
y [B] class indices with -1 for "no class" (None means all -1). It returns a tensor shaped like x_t.
What that means is the objective of the process: the noise ("eps"), the image ("x0") or the velocity
("v"). predict_x0 makes an image of each, so that samplers need not know. Images are in [-1, 1].

    diffusion = DiffusionProcess(num_timesteps=1000, schedule="linear")
    loss = diffusion.training_loss(model, x_0)
    images = diffusion.sample(model, sampler="ddim", steps=50, seed=0)

Papers: Ho et al. 2020 (DDPM), Song et al. 2021 (DDIM), Nichol & Dhariwal 2021 (cosine schedule),
Jabri et al. 2022 (sigmoid schedule), Salimans & Ho 2022 (the v objective), Ho & Salimans 2022
(classifier-free guidance), Lu et al. 2022 (DPM-Solver++), Zhang & Chen 2023 (iPNDM),
Karras et al. 2022 (noise levels).
"""

import contextlib
import math
import secrets
from typing import NamedTuple

import numpy as np
import torch

from schedules import SPACINGS, alpha_bar_table, distinct, half_log_snr

OBJECTIVES = ("eps", "x0", "v")


# ---- Samplers: a row of numbers each. One loop (DiffusionProcess.trajectory) serves them all.

class Sampler(NamedTuple):
    eta: float  # 0: no noise is added on the way down (DDIM); 1: as much as in DDPM; it may be more
    order: int  # how many estimates, this one and those before it, a step is made from
    extrapolates: str  # what is carried on from them: "x0", or "eps"
    variance: str  # size of the added noise: "posterior" or "beta", the two choices of Ho et al.
    steps: int | None  # the default number of model calls; None: all T


SAMPLERS = {
    #                       eta order from   variance    steps
    "ddpm":         Sampler(1.0, 1, "x0",  "posterior", None),
    "ddpm_beta":    Sampler(1.0, 1, "x0",  "beta",      None),
    "ddim":         Sampler(0.0, 1, "x0",  "posterior", 50),
    "dpmpp_2m":     Sampler(0.0, 2, "x0",  "posterior", 10),    # Lu et al. 2022, algorithm 2
    "dpmpp_2m_sde": Sampler(1.0, 2, "x0",  "posterior", 20),    # the same with noise
    "ipndm":        Sampler(0.0, 4, "eps", "posterior", 10),    # Zhang & Chen 2023
}

MAX_ETA = 10  # with the "posterior" variance: then nearly any step renews all of the noise

# The Adams-Bashforth weights of order 1 to 4, for the newest estimate first.
ADAMS_BASHFORTH = [[1.0], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12],
                   [55 / 24, -59 / 24, 37 / 24, -9 / 24]]


# ---- Noise that belongs to an image, not to a batch.

def seeded_noise(seed, indices, step, shape):
    """Unit Gaussian noise [len(indices), *shape]; row k depends only on (seed, indices[k], step).

    So image i of a seed is the same in any batch. Drawn on the CPU, hence the same on any device,
    and from generators of its own: the global one is never touched. These take 32 bits of what is
    hashed here, so that of 100,000 images about one pair has the same noise.
    seed: 0 to 2**32 - 1, else ValueError: the parts of a longer one would be another image's.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"a seed must lie in 0..{2**32 - 1}, got {seed}")
    rows = []
    for i in indices:
        entropy = np.random.SeedSequence([seed, i, step]).generate_state(1, np.uint64)[0]
        rows.append(torch.randn(shape, generator=torch.Generator().manual_seed(int(entropy))))
    return torch.stack(rows)


@contextlib.contextmanager
def evaluating(model):
    """Switch dropout off, and back to what it was afterwards. model: any callable, or None."""
    was_training = getattr(model, "training", False)
    if was_training:
        model.eval()
    try:
        yield
    finally:
        if was_training:
            model.train()


def _answer(model, x_t, t, y):
    """What a model says of x_t. One of another shape would be stretched to fit, without a word."""
    out = model(x_t, t, y)
    if out.shape != x_t.shape:
        raise ValueError(f"the model answers {tuple(out.shape)} to images of {tuple(x_t.shape)}")
    return out


def _as_batch(t, x_t):
    """t as [B] integers, one for each image, where it is a single number."""
    return t if torch.is_tensor(t) else torch.full((len(x_t),), int(t), device=x_t.device)


def guidance_at(t, guidance, interval=None):
    """The guidance of a step at level t: outside of the interval (low, high) it is 1.0 (off)."""
    return guidance if interval is None or interval[0] <= t <= interval[1] else 1.0


class DiffusionProcess:
    """A noise schedule, what the model predicts, and everything that follows from the two.

    num_timesteps: T, the number of noise levels (ignored where schedule is given as numbers).
    schedule:      "linear", "cosine", "sigmoid", or alpha_bar itself: [T] in (0, 1), falling.
    objective:     what the model's output means: "eps" (the noise), "x0" (the clean image) or
                   "v" = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x_0.
    beta_start, beta_end: ends of the linear schedule, used as they are; by default scaled with T.
    clip_loss:     the loss asks no more of an estimate of x_0 than that it be right once sampling
                   has cut it to [-1, 1]: where a pixel is black, all below black will do.

    alpha_bar (in diffusers: alphas_cumprod) is the share of the image's variance left at t, the
    product of (1 - beta) up to t. `config` rebuilds the process: DiffusionProcess(**config).
    Raises ValueError for an unknown name or a number out of range.
    """

    def __init__(self, num_timesteps=1000, schedule="linear", objective="eps",
                 beta_start=None, beta_end=None, clip_loss=False):
        if objective not in OBJECTIVES:
            raise ValueError(f"unknown objective {objective!r}; choose from {list(OBJECTIVES)}")
        self.alpha_bar = alpha_bar_table(schedule, num_timesteps, beta_start, beta_end)
        if not isinstance(schedule, str):
            schedule = self.alpha_bar
        self.num_timesteps = len(self.alpha_bar)
        self.objective, self.clip_loss = objective, bool(clip_loss)
        self.config = dict(num_timesteps=self.num_timesteps, schedule=schedule, objective=objective,
                           beta_start=beta_start, beta_end=beta_end, clip_loss=self.clip_loss)
        # Two float32 tables, the weights of image and noise in x_t. They follow the data's device.
        self._signal = self.alpha_bar.sqrt().float()
        self._noise = (1 - self.alpha_bar).sqrt().float()

    def _weights(self, t):
        """(sqrt(alpha_bar_t), sqrt(1 - alpha_bar_t)), each [B, 1, 1, 1]. t: [B] integers 0..T-1."""
        if t.device.type == "cpu" and not (0 <= int(t.min()) and int(t.max()) < self.num_timesteps):
            # A negative index would silently read the table from its end.
            raise ValueError(f"t must lie in 0..{self.num_timesteps - 1}, got {t.min()}..{t.max()}")
        if self._signal.device != t.device:
            self._signal, self._noise = self._signal.to(t.device), self._noise.to(t.device)
        return self._signal[t].view(-1, 1, 1, 1), self._noise[t].view(-1, 1, 1, 1)

    # ---- Forward and training

    def forward_diffusion(self, x_0, t, noise=None):
        """Jump from a clean image straight to noise level t.

        x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise      (Ho et al. 2020, eq. 4)

        x_0: [B, C, H, W] in [-1, 1].  t: [B] integers in 0..T-1.
        Returns (x_t, noise), both shaped like x_0; noise is drawn if not given.
        """
        if noise is None:
            noise = torch.randn_like(x_0)
        signal_weight, noise_weight = self._weights(t)
        return signal_weight * x_0 + noise_weight * noise, noise

    def training_loss(self, model, x_0, y=None, t=None, noise=None, min_snr=None):
        """Mean squared error of the prediction at random noise levels (Ho et al. 2020, eq. 14).

        x_0: [B, C, H, W] in [-1, 1].  y: [B] class indices or None.  t, noise: drawn if not given.
        min_snr: weigh the error of x_0 by min(SNR_t, min_snr) instead, SNR = ab / (1 - ab); Hang et
        al. 2023, section 3.4, take 5.  Plain "eps" weighs it by SNR_t, "v" by SNR_t + 1.
        With clip_loss the error of a pixel at -1 or 1 does not count where the estimate lies beyond
        it; others do in full, so the best clipped answer stays the mean of all images that fit x_t.
        Returns a scalar tensor, float32 whatever the model ran in.
        """
        if t is None:
            t = torch.randint(self.num_timesteps, (len(x_0),), device=x_0.device)
        x_t, noise = self.forward_diffusion(x_0, t, noise)
        if self.objective == "eps":
            target = noise
        elif self.objective == "x0":
            target = x_0
        else:
            signal_weight, noise_weight = self._weights(t)
            target = signal_weight * noise - noise_weight * x_0     # Salimans & Ho 2022, section 4
        error = _answer(model, x_t, t, y).float() - target
        if self.clip_loss:
            # over has the sign of (estimate of x_0) - x_0
            over = error if self.objective == "x0" else -error
            error = error.masked_fill((x_0.abs() >= 1) & (over * x_0 > 0), 0)
        if min_snr is None:
            return error.square().mean()
        signal_weight, noise_weight = self._weights(t)
        snr = (signal_weight / noise_weight) ** 2
        plain = {"eps": snr, "x0": torch.ones_like(snr), "v": snr + 1}[self.objective]
        return (snr.clamp(max=min_snr) / plain * error.square()).mean()

    # ---- From the model's output to one step down

    def predict_x0(self, model, x_t, t, y=None, *, guidance=1.0, weak=None, clip=True):
        """The clean image that the model sees in x_t.

        guidance leads it away from what the model sees without a class (Ho & Salimans 2022, eq. 6),
        or from what a weak model sees, which makes the same mistakes in a larger way (autoguidance,
        Karras et al. 2024). 1 is the model itself and 0 the other answer; each costs one call.
        (Ho & Salimans count from zero: their w is guidance - 1. For x_0 it comes to the same as for
        eps, but after clip_loss, where each of the two is cut to [-1, 1] first.)

        x_t: [B, C, H, W].  t: an integer, or [B] integers.
        Returns [B, C, H, W], in [-1, 1] if clip.  Raises ValueError for guidance towards nothing.
        Computed in float32 even for a model in bfloat16: at high t it divides by a small number.
        """
        if weak is None and y is None and guidance not in (0, 1):
            raise ValueError(f"guidance={guidance} needs class labels y to guide towards")
        t = _as_batch(t, x_t)

        def seen_by(network, labels):
            x_0 = self._as_x0(_answer(network, x_t, t, labels), x_t, t)
            # After clip_loss, what lies beyond the range means its end, and must not push.
            return x_0.clamp(-1, 1) if clip and self.clip_loss else x_0

        if guidance == 1 or weak is None and y is None:
            x_0 = seen_by(model, y)
        else:
            x_0 = seen_by(model, torch.full_like(y, -1)) if weak is None else seen_by(weak, y)
            if guidance != 0:
                x_0 = x_0 + guidance * (seen_by(model, y) - x_0)
        return x_0.clamp(-1, 1) if clip else x_0

    def _as_x0(self, out, x_t, t):
        """The clean image that a model's output means. out, x_t: [B, C, H, W].  t: [B]."""
        out = out.to(torch.promote_types(x_t.dtype, torch.float32))
        signal_weight, noise_weight = self._weights(t)
        if self.objective == "eps":
            return (x_t - noise_weight * out) / signal_weight
        if self.objective == "x0":
            return out
        return signal_weight * x_t - noise_weight * out

    def predict_noise(self, model, x_t, t, y=None):
        """The noise a model of any objective sees in x_t: what is left without the image it sees.

        eps = (x_t - sqrt(alpha_bar_t) x_0) / sqrt(1 - alpha_bar_t)

        x_t: [B, C, H, W].  t: an integer, or [B] integers.  Returns [B, C, H, W].
        """
        t = _as_batch(t, x_t)
        # Unclamped, x_0 gives back exactly the noise that the model meant. After clip_loss a value
        # beyond [-1, 1] means nothing, and is clamped.
        x_0 = self.predict_x0(model, x_t, t, y, clip=self.clip_loss)
        signal_weight, noise_weight = self._weights(t)
        return (x_t - signal_weight * x_0) / noise_weight

    def reverse_diffusion_step(self, model, x_t, t, t_prev=None, y=None, *, eta=1.0, noise=None,
                               clip=True, guidance=1.0, variance="posterior"):
        """From noise level t to the cleaner level t_prev.

        Estimate x_0, work out which noise would explain x_t, mix the two anew at level t_prev, and
        replace part of the noise by fresh noise (Song et al. 2021, eq. 12 and 16):

            x_prev = sqrt(ab_prev) x_0 + sqrt(1 - ab_prev - sigma^2) eps + sigma noise
            sigma^2 = eta^2 (1 - ab_prev) / (1 - ab_t) (1 - ab_t / ab_prev), at most 1 - ab_prev

        eta = 1 is Ho et al. 2020, eq. 6-7 ("posterior"); eta = 0 adds nothing and is DDIM. With
        more than 1 more of the old noise goes, and with it what earlier steps got wrong; that takes
        small steps, or pictures get smooth. At most all of it goes. With variance "beta" the mean
        stays and sigma^2 = eta^2 (1 - ab_t / ab_prev), the paper's other choice (section 3.2). The
        step to the clean image never adds noise.

        x_t: [B, C, H, W].  t: an integer in 0..T-1, or [B] equal integers.  t_prev: an integer
        below t; default t - 1; -1 is clean.  noise: like x_t, drawn if needed.
        Returns (x_prev, x_0 estimate).  Raises ValueError as step_towards does.
        """
        if torch.is_tensor(t):
            if (t != t.flatten()[0]).any():
                raise ValueError("reverse_diffusion_step takes one t for the whole batch")
            t = t.flatten()[0]
        t = int(t)
        t_prev = t - 1 if t_prev is None else int(t_prev)
        x_0 = self.predict_x0(model, x_t, t, y, guidance=guidance, clip=clip)
        return self.step_towards(x_0, x_t, t, t_prev, eta=eta, variance=variance, noise=noise), x_0

    def alpha_bar_at(self, t):
        """alpha_bar as a Python float: 1 - ab_t / ab_prev cancels in float32. t = -1 is clean."""
        return float(self.alpha_bar[t]) if t >= 0 else 1.0

    def _eps(self, x_t, x_0, t):
        """The noise that explains x_t, if x_0 is the image."""
        ab_t = self.alpha_bar_at(t)
        return (x_t - math.sqrt(ab_t) * x_0) / math.sqrt(1 - ab_t)

    def step_towards(self, x_0, x_t, t, t_prev, *, eta=1.0, variance="posterior", noise=None):
        """The formula of reverse_diffusion_step, once it is settled which x_0 to step towards: the
        model's, what several estimates of it come to, or one that was mended by hand (edit.py).

        x_0, x_t: [B, C, H, W].  t, t_prev: integers (-1: clean).  noise: like x_t, drawn if needed.
        Returns x_prev, like x_t.  Raises ValueError unless -1 <= t_prev < t < T, if eta is outside
        [0, MAX_ETA], of variance "beta" [0, 1], or for an unknown variance.
        """
        if not -1 <= t_prev < t < self.num_timesteps:
            raise ValueError(f"need -1 <= t_prev < t < {self.num_timesteps}, "
                             f"got t={t}, t_prev={t_prev}")
        ab_t, ab_prev = self.alpha_bar_at(t), self.alpha_bar_at(t_prev)
        if variance not in ("posterior", "beta"):
            raise ValueError(f"unknown variance {variance!r}; choose from ['beta', 'posterior']")
        most = MAX_ETA if variance == "posterior" else 1
        if not 0 <= eta <= most:
            raise ValueError(f"eta must lie in [0, {most}], got {eta}")
        beta = 1 - ab_t / ab_prev
        posterior = min(eta**2 * beta / (1 - ab_t), 1.0) * (1 - ab_prev)
        x_prev = (math.sqrt(ab_prev) * x_0
                  + math.sqrt(1 - ab_prev - posterior) * self._eps(x_t, x_0, t))
        sigma = math.sqrt(posterior) if variance == "posterior" else eta * math.sqrt(beta)
        if sigma > 0 and t_prev >= 0:
            x_prev = x_prev + sigma * (torch.randn_like(x_prev) if noise is None else noise)
        return x_prev

    def _extrapolate(self, extrapolates, t_prev, past):
        """The x_0 to step towards: where the last estimates are heading, not where they are.

        past: triples (t, x_t, x_0), the newest last.  "x0" goes on along a line in the log-SNR, to
        the middle of the step (DPM-Solver++(2M), Lu et al. 2022, algorithm 2); "eps" by the
        Adams-Bashforth rule of the order that `past` allows (iPNDM), as though steps were equal.
        """
        t, x_t, x_0 = past[-1]
        # The last step is plain DDIM: it ends at infinite log-SNR, and ipndm counts on equal steps.
        if len(past) == 1 or t_prev < 0:
            return x_0
        if extrapolates == "x0":
            before, _, x_0_before = past[-2]
            last, now, then = (half_log_snr(self.alpha_bar_at(level))
                               for level in (before, t, t_prev))
            return x_0 + (then - now) / (2 * (now - last)) * (x_0 - x_0_before)
        eps = sum(weight * self._eps(x, clean, level) for weight, (level, x, clean)
                  in zip(ADAMS_BASHFORTH[len(past) - 1], reversed(past)))
        ab_t = self.alpha_bar_at(t)
        return (x_t - math.sqrt(1 - ab_t) * eps) / math.sqrt(ab_t)

    # ---- The sampling loop

    def timesteps(self, steps=None, spacing="uniform"):
        """The levels that sampling visits: `steps` distinct ones from T-1 down, then -1 (clean).

        steps: 1..T, by default all T.  Raises ValueError outside that, or for an unknown spacing.
        """
        steps = self.num_timesteps if steps is None else steps
        if not 1 <= steps <= self.num_timesteps or steps != int(steps):
            raise ValueError(f"steps must be a whole number from 1 to {self.num_timesteps} "
                             f"(the number of timesteps), got {steps}")
        if spacing not in SPACINGS:
            raise ValueError(f"unknown spacing {spacing!r}; choose from {sorted(SPACINGS)}")
        return distinct(SPACINGS[spacing](self.alpha_bar.numpy(), int(steps)))

    def sampling_levels(self, sampler, steps=None, spacing=None, last_steps=None):
        """The timesteps of a sampler: those asked for, or its own number of them (at most T).
        last_steps: only those of the last so many."""
        if sampler not in SAMPLERS:
            raise ValueError(f"unknown sampler {sampler!r}; choose from {sorted(SAMPLERS)}")
        if steps is None and SAMPLERS[sampler].steps is not None:
            steps = min(SAMPLERS[sampler].steps, self.num_timesteps)
        levels = self.timesteps(steps, spacing or "uniform")
        return levels if last_steps is None else levels[-1 - last_steps:]

    @torch.no_grad()
    def trajectory(self, model, x_T, *, sampler="ddpm", steps=None, eta=None, spacing=None, y=None,
                   guidance=1.0, guidance_interval=None, weak=None, seed=0, first_index=0,
                   clip=True, last_steps=None):
        """The one sampling loop: a generator that yields (t, x_t, x_0) after each step.

        t is the level just reached, -1 in the last item, whose x_t is the finished picture; x_0 is
        the newest estimate, made from the x_t before this one. The model is called exactly `steps`
        times (twice as often with guidance other than 0 and 1: see sample.model_calls).

        x_T: [B, C, H, W] noise.  seed, first_index: which noise the steps add (see seeded_noise).
        sampler: a key of SAMPLERS; steps and eta default to its row.  spacing: "uniform" unless
        told.  y: [B] class indices.
        guidance_interval, weak: where guidance acts, and a model it leads away from, see sample.
        last_steps: only the last so many; x_T is then at the level where they begin.
        """
        levels = self.sampling_levels(sampler, steps, spacing, last_steps)
        if not math.isfinite(guidance):
            raise ValueError(f"guidance must be a number, got {guidance}")
        if guidance_interval and guidance_interval[0] > guidance_interval[1]:
            raise ValueError(f"guidance_interval must be (low, high), got {guidance_interval}")
        row = SAMPLERS[sampler]
        eta = row.eta if eta is None else eta
        indices = range(first_index, first_index + len(x_T))
        x_t = x_T.to(torch.promote_types(x_T.dtype, torch.float32))
        past = []
        with evaluating(model), evaluating(weak):
            for k, (t, t_prev) in enumerate(zip(levels, levels[1:]), start=1):
                x_0 = self.predict_x0(model, x_t, t, y,
                                      guidance=guidance_at(t, guidance, guidance_interval),
                                      weak=weak, clip=clip)
                noise = None
                if eta > 0 and t_prev >= 0:     # drawn while a GPU is still at work on x_0
                    noise = seeded_noise(seed, indices, k, x_t.shape[1:]).to(x_t)
                past = [*past, (t, x_t, x_0)][-row.order:]
                target = self._extrapolate(row.extrapolates, t_prev, past)
                x_t = self.step_towards(target, x_t, t, t_prev, eta=eta, variance=row.variance,
                                        noise=noise)
                yield t_prev, x_t, x_0

    def sample(self, model, image_size=28, batch_size=64, channels=1, *, x_T=None, seed=None,
               first_index=0, device=None, sampler="ddpm", steps=None, eta=None, spacing=None,
               y=None, guidance=1.0, guidance_interval=None, weak=None, clip=True):
        """Make new images from noise: [batch_size, channels, image_size, image_size] in [-1, 1].

        x_T:          the noise to start from, [B, C, H, W]; drawn from the seed if not given.
        seed:         the same seed gives the same images; None draws a fresh one.
        first_index:  image i of the result is image first_index + i of the seed.
        device:       by default where x_T or the model's parameters are.
        sampler:      a key of SAMPLERS: "ddpm" is the paper's full chain, "ddim" takes strides, the
                      others need fewer still. Each has its defaults for steps (model calls, 1..T)
                      and eta (0..MAX_ETA).
        spacing:      a key of SPACINGS, "uniform" unless told.
        y, guidance:  class indices (one number, or [B]) and how strongly to follow them; 1 = plain.
        guidance_interval: (low, high): guidance acts at these levels only, both included. At high
                      noise it costs variety, at low it is of no use (Kynkaanniemi et al. 2024).
        weak:         a worse model of the same process, smaller or hardly trained: guidance
                      then leads away from its mistakes, and needs no classes.
        clip:         keep every estimate of x_0 in [-1, 1], as training with clip_loss counts on.
        """
        seed = secrets.randbits(32) if seed is None else seed
        if device is None:
            parameters = model.parameters() if hasattr(model, "parameters") else iter(())
            device = (x_T.device if x_T is not None
                      else getattr(next(parameters, None), "device", "cpu"))
        if x_T is None:
            indices = range(first_index, first_index + batch_size)
            x_T = seeded_noise(seed, indices, 0, (channels, image_size, image_size))
        x_T = x_T.to(device)
        if y is not None:
            y = torch.as_tensor(y, device=device)
            if y.numel() not in (1, len(x_T)):
                raise ValueError(f"y has {y.numel()} classes for {len(x_T)} images")
            y = y.flatten().expand(len(x_T))
        for _, images, _ in self.trajectory(
                model, x_T, sampler=sampler, steps=steps, eta=eta, spacing=spacing, y=y,
                guidance=guidance, guidance_interval=guidance_interval, weak=weak, seed=seed,
                first_index=first_index, clip=clip):
            pass
        return images
