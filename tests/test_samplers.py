"""The fast samplers: orders of convergence, published formulas, another library's schedulers."""

import math

import numpy as np
import pytest
import torch

from conftest import GaussianModel, MEAN, STD, exact_flow
from diffusion import SAMPLERS, DiffusionProcess, seeded_noise
from schedules import SPACINGS, distinct


def noise():
    return seeded_noise(3, range(4), 0, (1, 16, 16)).double()


def errors(diffusion, sampler, spacing, counts):
    """Distance to the exact flow at the last noisy level, for each number of steps. The jump from
    there to the clean image is of first order in all of them."""
    x_T, ab = noise(), diffusion.alpha_bar.tolist()
    found = []
    for steps in counts:
        *_, (t, x_t, _), _ = diffusion.trajectory(GaussianModel(diffusion), x_T, sampler=sampler,
                                                  steps=steps, spacing=spacing, clip=False)
        found.append(float((x_t - exact_flow(x_T, ab[-1], ab[t])).abs().mean()))
    return found


def test_2m_converges_at_second_order_where_ddim_does_at_first():
    """On levels even in the log-SNR, of which T = 50,000 has so many that no rounding shows."""
    diffusion = DiffusionProcess(50_000)
    for sampler, low, high in (("dpmpp_2m", 3.6, 4.4), ("ddim", 1.8, 2.2)):
        found = errors(diffusion, sampler, "log_snr", (40, 80, 160, 320))
        ratios = [a / b for a, b in zip(found, found[1:])]
        assert all(low < ratio < high for ratio in ratios), (sampler, found)


def test_ipndm_converges_at_second_order_on_levels_even_in_sigma():
    """Its Adams-Bashforth rule is of order 4, but its first step can only be of order 1, and that
    remains: one error of second order, far below those of DDIM."""
    sigma = np.linspace(0.002, 2, 40_000)
    diffusion = DiffusionProcess(schedule=1 / (1 + sigma**2))
    found = errors(diffusion, "ipndm", "uniform", (100, 200, 400))
    ratios = [a / b for a, b in zip(found, found[1:])]
    assert all(ratio > 3.3 for ratio in ratios), found
    assert found[0] < errors(diffusion, "ddim", "uniform", (100,))[0] / 100


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "ipndm"])
def test_ten_evaluations_beat_fifty_of_ddim(sampler):
    """With an exact denoiser and levels that suit one. (Trained networks prefer uniform ones.)"""
    diffusion, x_T = DiffusionProcess(), noise()
    want = exact_flow(x_T, float(diffusion.alpha_bar[-1]))
    fast, slow = (diffusion.sample(GaussianModel(diffusion), x_T=x_T, sampler=name, steps=steps,
                                   spacing=spacing, clip=False)
                  for name, steps, spacing in ((sampler, 10, "log_snr"), ("ddim", 50, "uniform")))
    assert (fast - want).abs().mean() < (slow - want).abs().mean() / 2


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "dpmpp_2m_sde"])
def test_2m_is_the_published_formula(sampler):
    """Lu et al. 2022b, algorithm 2, and its form with noise, in their own letters."""
    diffusion, eta = DiffusionProcess(100), SAMPLERS[sampler].eta
    x_T, model = noise(), GaussianModel(DiffusionProcess(100, objective="x0"))
    levels = diffusion.timesteps(12, "log_snr")
    alphas = [math.sqrt(diffusion.alpha_bar[t]) for t in levels[:-1]]
    sigmas = [math.sqrt(1 - diffusion.alpha_bar[t]) for t in levels[:-1]]
    lambdas = [math.log(a / s) for a, s in zip(alphas, sigmas)]
    x, before = x_T, None
    for i in range(1, 12):
        now = model(x, torch.full((4,), levels[i - 1]))
        h = lambdas[i] - lambdas[i - 1]
        d = now
        if before is not None:
            r = (lambdas[i - 1] - lambdas[i - 2]) / h
            d = (1 + 1 / (2 * r)) * now - 1 / (2 * r) * before
        z = seeded_noise(0, range(4), i, (1, 16, 16)).double()
        if eta:
            x = (sigmas[i] / sigmas[i - 1] * math.exp(-h) * x
                 + alphas[i] * (1 - math.exp(-2 * h)) * d
                 + sigmas[i] * math.sqrt(1 - math.exp(-2 * h)) * z)
        else:
            x = sigmas[i] / sigmas[i - 1] * x - alphas[i] * (math.exp(-h) - 1) * d
        before = now
    want = model(x, torch.full((4,), levels[-2]))
    got = diffusion.sample(GaussianModel(diffusion), x_T=x_T, sampler=sampler, steps=12,
                           spacing="log_snr", seed=0, clip=False)
    torch.testing.assert_close(got, want, atol=2e-6, rtol=0)    # float32 weights in the estimate


def test_ipndm_carries_the_noise_on_by_adams_and_bashforth():
    diffusion, x_T = DiffusionProcess(100), noise()
    levels, model = diffusion.timesteps(8, "uniform"), GaussianModel(diffusion)
    weights = [[1], [1.5, -0.5], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24]]
    x, past = x_T, []
    for t, t_prev in zip(levels, levels[1:]):
        past.insert(0, model(x, torch.full((4,), t)))
        eps = (past[0] if t_prev < 0
               else sum(w * e for w, e in zip(weights[min(len(past), 4) - 1], past)))
        a, b = (float(diffusion.alpha_bar[t]),
                1.0 if t_prev < 0 else float(diffusion.alpha_bar[t_prev]))
        x = math.sqrt(b / a) * (x - math.sqrt(1 - a) * eps) + math.sqrt(1 - b) * eps
    got = diffusion.sample(model, x_T=x_T, sampler="ipndm", steps=8, spacing="uniform", clip=False)
    torch.testing.assert_close(got, x, atol=2e-6, rtol=0)


def test_the_sde_form_returns_the_mean_and_spread_of_gaussian_data():
    diffusion = DiffusionProcess()
    images = diffusion.sample(GaussianModel(diffusion), 32, 16, seed=1, sampler="dpmpp_2m_sde",
                              steps=40, clip=False)
    assert float(images.mean()) == pytest.approx(MEAN, abs=0.02)
    assert float(images.std()) == pytest.approx(STD, abs=0.02)


# ---- The levels

@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid"])
@pytest.mark.parametrize("spacing", sorted(SPACINGS))
@pytest.mark.parametrize("T", [1, 2, 10, 50, 200, 1000, 2000])
def test_every_spacing_gives_distinct_levels_and_as_many_as_asked(T, spacing, schedule):
    diffusion = DiffusionProcess(T, schedule)
    for steps in {1, 2, 3, 5, 10, T // 3, T - 1, T} & set(range(1, T + 1)):
        levels = diffusion.timesteps(steps, spacing)
        assert len(levels) == steps + 1 and levels[0] == T - 1 and levels[-1] == -1
        assert all(a > b for a, b in zip(levels, levels[1:]))


def test_levels_that_meet_are_moved_apart():
    assert distinct([9.0, 0.4, 0.2, -1]) == [9, 1, 0, -1]
    assert distinct([4.0, 3.9, 3.8, 3.7, 0.0, -1]) == [4, 3, 2, 1, 0, -1]


def test_spacings_are_even_in_what_they_are_named_for():
    diffusion = DiffusionProcess(100_000)                                   # rounding hardly shows
    ab = diffusion.alpha_bar.numpy()
    for spacing, value in (("log_snr", np.log(ab / (1 - ab))),
                           ("karras", np.sqrt((1 - ab) / ab) ** (1 / 7)),
                           ("uniform", np.arange(100_000.0)),
                           ("tapered", np.arange(100_000) / 2000 + np.log(np.arange(1, 100_001)))):
        strides = np.diff(value[diffusion.timesteps(12, spacing)[:-1]])
        np.testing.assert_allclose(strides, strides.mean(), rtol=0.03)     # at t = 0 it does
    assert DiffusionProcess(1000).timesteps(4) == [999, 749, 499, 249, -1]


# ---- The schedulers of diffusers, on the same outputs

def denoiser(x_t, t):
    """Something smooth that is neither Gaussian nor linear, and depends on t."""
    return torch.tanh(x_t * (1 + t / 500)) * 0.8 + 0.1 * x_t


SETTINGS = dict(num_train_timesteps=1000, beta_schedule="linear", beta_start=1e-4, beta_end=0.02,
                timestep_spacing="trailing")


@pytest.mark.parametrize("sampler, name, settings", [
    ("ddim", "DDIMScheduler", dict(set_alpha_to_one=True, clip_sample=False)),
    ("dpmpp_2m", "DPMSolverMultistepScheduler", dict(
        algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint",
        final_sigmas_type="zero"))])
@pytest.mark.parametrize("steps", [10, 20, 50])
def test_end_points_equal_those_of_diffusers(sampler, name, settings, steps):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    scheduler = getattr(diffusers, name)(**SETTINGS, **settings)
    scheduler.set_timesteps(steps)
    diffusion, x_T = DiffusionProcess(), noise()
    assert scheduler.timesteps.tolist() == diffusion.timesteps(steps)[:-1]
    x = x_T
    for t in scheduler.timesteps:
        x = scheduler.step(denoiser(x, int(t)), t, x).prev_sample
    got = diffusion.sample(lambda x_t, t, y: denoiser(x_t, int(t[0])), x_T=x_T, sampler=sampler,
                           steps=steps, clip=False)
    torch.testing.assert_close(got, x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("eta", [None, 0.5, 1.0])
def test_one_step_with_noise_equals_that_of_diffusers(eta):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    diffusion, x_t, z = DiffusionProcess(), noise(), torch.randn(4, 1, 16, 16).double()
    for t in (1, 300, 999):
        if eta is None:
            scheduler = diffusers.DDPMScheduler(**SETTINGS, clip_sample=False,
                                                variance_type="fixed_small")
            scheduler.set_timesteps(1000)
            # in float32, 1 - ab_t / ab_prev is off by 1e-4
            scheduler.alphas_cumprod = diffusion.alpha_bar
            want = scheduler.step(denoiser(x_t, t), t, x_t,
                                  generator=torch.Generator().manual_seed(5)).prev_sample
            z = torch.randn(x_t.shape, dtype=x_t.dtype, generator=torch.Generator().manual_seed(5))
            t_prev = t - 1
        else:
            scheduler = diffusers.DDIMScheduler(**SETTINGS, set_alpha_to_one=True,
                                                clip_sample=False)
            scheduler.set_timesteps(500)
            want = scheduler.step(denoiser(x_t, t), t, x_t, eta=eta, variance_noise=z).prev_sample
            t_prev = max(t - 2, -1)
        got, _ = diffusion.reverse_diffusion_step(lambda x, *_: denoiser(x, t), x_t, t, t_prev,
                                                  eta=eta or 1.0, noise=z, clip=False)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
