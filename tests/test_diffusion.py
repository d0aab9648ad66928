"""The process against closed forms, plain loops and the papers' own formulas."""

import math

import numpy as np
import pytest
import torch

import edit
from checkpoint import load_checkpoint, save_checkpoint
from conftest import LEVELS, MEAN, STD, GaussianModel, exact_flow
from data import Batches
from diffusion import SAMPLERS, DiffusionProcess, seeded_noise
from images import to_signed
from interpolate import invert
from loop import held_out_loss
from predictors import loss_by_timestep, predictor_errors
from sample import model_calls
from synthetic import digits


class CountingModel:
    """Predicts zeros and remembers what it was asked."""

    def __init__(self):
        self.calls = []

    def __call__(self, x_t, t, y=None):
        self.calls.append((int(t[0]), y))
        return torch.zeros_like(x_t)


# ---- Schedules


@pytest.mark.parametrize("settings", [
    dict(num_timesteps=50, beta_start=2e-3, beta_end=0.3, clip_loss=True, objective="v"),
    dict(num_timesteps=7, schedule="cosine", objective="x0"), dict(schedule=[0.9, 0.5, 0.1])])
def test_its_settings_rebuild_a_process(settings):
    process = DiffusionProcess(**settings)
    again = DiffusionProcess(**process.config)
    assert torch.equal(process.alpha_bar, again.alpha_bar)
    assert (again.objective, again.clip_loss) == (process.objective, process.clip_loss)


@pytest.mark.parametrize("betas", [(1e-4, 1.5), (0.9995, 0.02), (-1e-4, 0.02), (1e-4, math.inf)])
def test_betas_that_no_step_can_have_are_refused(betas):
    with pytest.raises(ValueError, match="betas must"):
        DiffusionProcess(beta_start=betas[0], beta_end=betas[1])


@pytest.mark.parametrize("column, schedule", [(0, "linear"), (2, "cosine")])
def test_schedules_match_the_known_table(column, schedule):
    ab = DiffusionProcess(schedule=schedule).alpha_bar
    for t, row in LEVELS.items():
        assert float(ab[t]) == pytest.approx(row[column], rel=0.02)
        assert 10 * math.log10(ab[t] / (1 - ab[t])) == pytest.approx(row[column + 1], abs=0.006)


@pytest.mark.parametrize("T, values", [
    (1000, {0: 0.9996997208, 100: 0.9600004766, 500: 0.4983428218, 900: 0.03898857754,
            999: 3.00287e-7}),
    (400, {0: 0.9992462354, 40: 0.9592356028, 200: 0.4958571139, 360: 0.03823697762,
           399: 7.53772e-7})])
def test_the_sigmoid_schedule_is_the_one_of_denoising_diffusion_pytorch(T, values):
    """Its sigmoid_beta_schedule (version 2.3.4), cumulated in float64."""
    ab = DiffusionProcess(T, schedule="sigmoid").alpha_bar
    for t, value in values.items():
        assert float(ab[t]) == pytest.approx(value, rel=1e-6 if t < T - 1 else 1e-4)


def test_schedules_cross_0_db_where_they_should():
    for schedule, first in (("linear", 259), ("cosine", 496), ("sigmoid", 499)):
        ab = DiffusionProcess(schedule=schedule).alpha_bar
        assert ab[first] < 0.5 <= ab[first - 1]


def plain_alpha_bar(schedule, T):
    """The schedules as loops over Python floats."""
    def sigmoid(u):                                   # falls from 1 to 0
        low, high, here = (1 / (1 + math.exp(-x)) for x in (-3, 3, -3 + 6 * u / T))
        return (high - here) / (high - low)

    ab, table = 1.0, []
    for t in range(T):
        if schedule == "linear":
            share = t / (T - 1) if T > 1 else 1.0
            beta = (1e-4 + share * (0.02 - 1e-4)) * 1000 / T
        elif schedule == "sigmoid":
            beta = 1 - sigmoid(t + 1) / sigmoid(t)
        else:
            f0, f1 = (math.cos((u / T + 0.008) / 1.008 * math.pi / 2) ** 2 for u in (t, t + 1))
            beta = 1 - f1 / f0
        ab *= 1 - min(beta, 0.999)
        table.append(ab)
    return np.array(table)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid"])
@pytest.mark.parametrize("T", [1, 2, 10, 20, 50, 200, 1000, 2000])
def test_schedules_equal_a_plain_loop_in_double_precision(schedule, T):
    ab = DiffusionProcess(T, schedule).alpha_bar
    assert ab.dtype == torch.float64
    np.testing.assert_allclose(ab.numpy(), plain_alpha_bar(schedule, T), rtol=1e-9)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid"])
@pytest.mark.parametrize("T", [1, 2, 10, 20, 50, 200, 500, 1000, 2000])
def test_a_chain_of_any_length_starts_clean_and_ends_in_noise(schedule, T):
    ab = DiffusionProcess(T, schedule).alpha_bar
    assert len(ab) == T
    assert 0 < ab[-1] <= 0.0011                       # under 0.11 % of the variance is image
    assert (ab.diff() < 0).all()
    if T >= 50:
        assert ab[0] > 0.99


def test_unscaled_betas_leave_a_short_chain_unfinished():
    """T = 200 with betas as published for T = 1000, which many tutorials do."""
    diffusion = DiffusionProcess(200, beta_start=1e-4, beta_end=0.02)
    assert float(diffusion.alpha_bar[-1]) == pytest.approx(0.132, abs=0.001)


def test_a_given_alpha_bar_is_used_as_it_is():
    table = [0.9, 0.5, 0.1]
    diffusion = DiffusionProcess(schedule=table)
    assert diffusion.num_timesteps == 3 and diffusion.alpha_bar.tolist() == table
    assert DiffusionProcess(**diffusion.config).alpha_bar.tolist() == table


@pytest.mark.parametrize("bad", [
    dict(num_timesteps=0), dict(num_timesteps=-5), dict(num_timesteps=2.5),
    dict(schedule="quadratic"), dict(objective="noise"), dict(beta_end=float("nan")),
    dict(beta_start=-1e-4), dict(schedule="cosine", beta_end=0.02), dict(schedule=[0.5, 0.5]),
    dict(schedule=[1.0, 0.5]), dict(schedule=[0.5, 0.0]), dict(schedule=[0.5, float("nan")])])
def test_impossible_settings_are_refused(bad):
    with pytest.raises(ValueError):
        DiffusionProcess(**bad)


# ---- Forward

@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid"])
def test_the_forward_jump_equals_the_chain_step_by_step(schedule):
    """x_t = sqrt(1 - beta) x_{t-1} + sqrt(beta) z, repeated, has the jump's mean and variance."""
    diffusion = DiffusionProcess(300, schedule)
    x_0, unit = torch.full((1, 1, 1, 1), 0.7), torch.ones(1, 1, 1, 1)
    table = plain_alpha_bar(schedule, 300)
    betas = 1 - table / np.concatenate([[1.0], table[:-1]])
    mean, variance = 0.7, 0.0
    for t, beta in enumerate(betas):
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        at = torch.tensor([t])
        assert float(diffusion.forward_diffusion(x_0, at, 0 * unit)[0]) == pytest.approx(
            mean, abs=1e-6)
        assert float(diffusion.forward_diffusion(0 * x_0, at, unit)[0]) == pytest.approx(
            math.sqrt(variance), abs=1e-6)


def test_forward_mixes_each_image_at_its_own_level():
    diffusion = DiffusionProcess()
    x_0, t = torch.rand(5, 3, 8, 8) * 2 - 1, torch.tensor([0, 10, 400, 999, 400])
    x_t, noise = diffusion.forward_diffusion(x_0, t)
    for i in range(5):
        ab = float(diffusion.alpha_bar[t[i]])
        torch.testing.assert_close(x_t[i], math.sqrt(ab) * x_0[i] + math.sqrt(1 - ab) * noise[i])
    assert abs(float(noise.mean())) < 0.15 and 0.85 < float(noise.std()) < 1.15


def test_forward_at_t_500_keeps_028_of_the_image_not_044():
    diffusion = DiffusionProcess()
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    assert float(diffusion.forward_diffusion(one, torch.tensor([500]), zero)[0]) == pytest.approx(
        0.279, abs=5e-4)
    assert float(diffusion.forward_diffusion(one, torch.tensor([400]), zero)[0]) == pytest.approx(
        0.440, abs=5e-4)


@pytest.mark.parametrize("t", [-1, 1000])
def test_a_timestep_outside_the_table_is_an_error_and_not_its_other_end(t):
    with pytest.raises(ValueError):
        DiffusionProcess().forward_diffusion(torch.zeros(1, 1, 4, 4), torch.tensor([t]))


# ---- Loss

@pytest.mark.parametrize("objective", ["eps", "x0", "v"])
def test_the_loss_is_the_distance_to_the_target_of_the_objective(objective):
    diffusion = DiffusionProcess(objective=objective)
    x_0, noise = torch.rand(4, 1, 8, 8) * 2 - 1, torch.randn(4, 1, 8, 8)
    t = torch.tensor([0, 300, 700, 999])
    ab = diffusion.alpha_bar[t].view(-1, 1, 1, 1)
    target = {"eps": noise, "x0": x_0,
              "v": ab.sqrt() * noise - (1 - ab).sqrt() * x_0}[objective].float()
    seen = []

    def model(x_t, t, y):
        seen.append(x_t)
        return target + 0.5

    assert float(diffusion.training_loss(model, x_0, t=t, noise=noise)) == pytest.approx(
        0.25, abs=1e-5)
    torch.testing.assert_close(seen[0], (ab.sqrt() * x_0 + (1 - ab).sqrt() * noise).float())


def test_predicting_no_noise_scores_one_at_every_level():
    diffusion, x_0 = DiffusionProcess(), torch.zeros(64, 1, 28, 28)
    for t in (0, 500, 999):
        loss = diffusion.training_loss(lambda x, t, y: torch.zeros_like(x), x_0,
                                       t=torch.full((64,), t))
        assert float(loss) == pytest.approx(1.0, abs=0.03)


def test_training_visits_all_levels_evenly():
    diffusion = DiffusionProcess(10)
    torch.manual_seed(0)
    seen = []
    model = lambda x, t, y: seen.append(t) or torch.zeros_like(x)       # noqa: E731
    for _ in range(20):
        diffusion.training_loss(model, torch.zeros(100, 1, 4, 4))
    counts = torch.bincount(torch.cat(seen), minlength=10)
    assert counts.min() > 140 and counts.max() < 260                    # 200 each, +- 4 sigma


@pytest.mark.parametrize("objective", ["eps", "x0", "v"])
def test_min_snr_weighs_the_error_of_x0_alike_for_every_objective(objective):
    """Hang et al. 2023: min(SNR, gamma) times the squared error of x_0, whatever is predicted."""
    diffusion = DiffusionProcess(100, "cosine", objective)
    generator = torch.Generator().manual_seed(0)
    x_0, noise = (torch.rand(100, 1, 2, 2, generator=generator) * 2 - 1,
                  torch.randn(100, 1, 2, 2, generator=generator))
    t = torch.arange(100)
    x_t, _ = diffusion.forward_diffusion(x_0, t, noise)

    def model(x_t, t, y=None):
        return 0.3 * x_t

    guess = diffusion.predict_x0(model, x_t, t, clip=False)
    snr = (diffusion.alpha_bar / (1 - diffusion.alpha_bar)).view(-1, 1, 1, 1)
    expected = float((snr.clamp(max=5) * (guess - x_0).double() ** 2).mean())
    found = float(diffusion.training_loss(model, x_0, t=t, noise=noise, min_snr=5))
    assert found == pytest.approx(expected, rel=1e-3)    # at the last t float32 divides by 1e-4


@pytest.mark.parametrize("objective", ["eps", "x0", "v"])
def test_clip_loss_forgives_what_clipping_mends_and_nothing_else(objective):
    """Pixel by pixel: the image, what the model sees, and the error left in its estimate of x_0."""
    cases = [(-1.0, -1.3, 0.0), (-1.0, 1.4, 2.4), (1.0, 1.2, 0.0), (1.0, -1.5, 2.5),
             (0.5, -1.2, 1.7), (0.5, 1.2, 0.7), (-1.0, -0.9, 0.1)]
    x_0, seen, left = (torch.tensor(column).view(1, 1, 1, -1) for column in zip(*cases))
    noise, t = (torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0)),
                torch.tensor([40]))
    for clip_loss, expected in ((True, left), (False, (seen - x_0).abs())):
        diffusion = DiffusionProcess(100, "cosine", objective, clip_loss=clip_loss)
        ab = float(diffusion.alpha_bar[40])

        def model(x_t, t, y=None):
            eps = (x_t - math.sqrt(ab) * seen) / math.sqrt(1 - ab)
            return {"eps": eps, "x0": seen,
                    "v": math.sqrt(ab) * eps - math.sqrt(1 - ab) * seen}[objective]

        # of the squared error of x_0
        factor = {"eps": ab / (1 - ab), "x0": 1, "v": 1 / (1 - ab)}[objective]
        loss = float(diffusion.training_loss(model, x_0, t=t, noise=noise))
        assert loss == pytest.approx(float(factor * (expected**2).mean()), rel=1e-4)
        assert DiffusionProcess(**diffusion.config).clip_loss == clip_loss


def test_clip_loss_leaves_the_best_answer_the_mean():
    """Of one pixel that is -1, -1 and 0.5 with equal chance, and of one that is always -1:
    there any value below."""
    x_0 = torch.tensor([[-1.0, -1], [-1, -1], [0.5, -1]]).view(3, 1, 1, 2)
    diffusion, guesses = (DiffusionProcess(10, objective="x0", clip_loss=True),
                          torch.linspace(-2, 2, 401))
    losses = [[float(diffusion.training_loss(
        lambda x, t, y: torch.where(torch.arange(2) == k, guess, -1.0).expand_as(x),
        x_0, t=torch.zeros(3, dtype=torch.long))) for guess in guesses] for k in range(2)]
    varying, constant = (torch.tensor(row) for row in losses)
    assert float(guesses[varying.argmin()]) == pytest.approx(-0.5, abs=0.011)
    assert ((constant[guesses <= -1] == constant.min()).all()
            and (constant[guesses > -0.98] > constant.min()).all())


# ---- One step back

@pytest.mark.parametrize("objective", ["eps", "x0", "v"])
def test_forward_then_predict_returns_the_image(objective):
    """A model that knows the noise gives x_0 back, each image at its own level."""
    diffusion = DiffusionProcess(objective=objective)
    x_0, t = torch.rand(4, 1, 8, 8) * 2 - 1, torch.tensor([0, 250, 500, 900])
    x_t, noise = diffusion.forward_diffusion(x_0, t)
    ab = diffusion.alpha_bar[t].view(-1, 1, 1, 1)
    out = {"eps": noise, "x0": x_0,
           "v": ab.sqrt() * noise - (1 - ab).sqrt() * x_0}[objective].float()
    torch.testing.assert_close(diffusion.predict_x0(lambda *_: out, x_t, t), x_0, atol=1e-4, rtol=0)


def test_the_estimate_is_clamped_unless_asked_otherwise():
    diffusion, x_t = DiffusionProcess(), torch.full((2, 1, 4, 4), 3.0)
    model = CountingModel()
    assert float(diffusion.predict_x0(model, x_t, 999).max()) == 1.0
    assert float(diffusion.predict_x0(model, x_t, 999, clip=False).max()) > 100


@pytest.mark.parametrize("schedule, t", [("linear", 1), ("linear", 500), ("linear", 999),
                                         ("cosine", 1), ("cosine", 500), ("cosine", 990)])
def test_eta_1_is_the_posterior_of_ho_et_al(schedule, t):
    """Equations 6 and 7 with beta_t, and the other variance of section 3.2."""
    diffusion = DiffusionProcess(schedule=schedule)
    x_t, x_0, z = torch.randn(3, 2, 1, 8, 8, dtype=torch.float64).unbind()
    x_0 = x_0.clamp(-1, 1)
    ab = diffusion.alpha_bar.numpy()
    beta = 1 - ab[t] / ab[t - 1]
    mean = (math.sqrt(ab[t - 1]) * beta * x_0
            + math.sqrt(1 - beta) * (1 - ab[t - 1]) * x_t) / (1 - ab[t])
    variance = (1 - ab[t - 1]) / (1 - ab[t]) * beta
    step = DiffusionProcess(schedule=schedule, objective="x0").reverse_diffusion_step
    got, seen = step(lambda *_: x_0, x_t, t, noise=z)
    torch.testing.assert_close(seen, x_0)
    torch.testing.assert_close(got, mean + math.sqrt(variance) * z, atol=5e-7, rtol=0)
    got, _ = step(lambda *_: x_0, x_t, t, noise=z, variance="beta")
    torch.testing.assert_close(got, mean + math.sqrt(beta) * z, atol=5e-7, rtol=0)
    # With less noise the mean is that of Song et al. 2021, eq. 12, and the noise as much less.
    eps = (x_t - math.sqrt(ab[t]) * x_0) / math.sqrt(1 - ab[t])
    mean = (math.sqrt(ab[t - 1]) * x_0 + math.sqrt(1 - ab[t - 1] - 0.5**2 * variance) * eps)
    got, _ = step(lambda *_: x_0, x_t, t, noise=z, variance="beta", eta=0.5)
    torch.testing.assert_close(got, mean + 0.5 * math.sqrt(beta) * z, atol=1e-5, rtol=0)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_a_long_stride_equals_the_published_ddim_step(eta):
    """Song et al. 2021, equations 12 and 16, written out from the noise prediction."""
    diffusion, t, s = DiffusionProcess(), 700, 300
    x_t, eps, z = torch.randn(3, 2, 1, 8, 8, dtype=torch.float64).unbind()
    a_t, a_s = diffusion.alpha_bar[[t, s]].tolist()
    sigma = eta * math.sqrt((1 - a_s) / (1 - a_t)) * math.sqrt(1 - a_t / a_s)
    want = (math.sqrt(a_s) * (x_t - math.sqrt(1 - a_t) * eps) / math.sqrt(a_t)
            + math.sqrt(1 - a_s - sigma**2) * eps + sigma * z)
    got, _ = diffusion.reverse_diffusion_step(lambda *_: eps, x_t, t, s, eta=eta, noise=z,
                                              clip=False)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_a_step_takes_an_integer_or_a_batch_of_equal_timesteps():
    diffusion, x_t = DiffusionProcess(), torch.randn(3, 1, 4, 4)
    model = GaussianModel(diffusion)
    one, _ = diffusion.reverse_diffusion_step(model, x_t, 400, eta=0)
    many, _ = diffusion.reverse_diffusion_step(model, x_t, torch.full((3,), 400), eta=0)
    assert torch.equal(one, many)
    with pytest.raises(ValueError):
        diffusion.reverse_diffusion_step(model, x_t, torch.tensor([400, 400, 399]))


@pytest.mark.parametrize("bad", [dict(t=5, t_prev=5), dict(t=5, t_prev=6), dict(t=5, t_prev=-2),
                                 dict(t=1000), dict(t=5, eta=10.5), dict(t=5, eta=-0.1),
                                 dict(t=5, eta=1.5, variance="beta"),
                                 dict(t=5, eta=float("nan")), dict(t=5, variance="big")])
def test_impossible_steps_are_refused(bad):
    with pytest.raises(ValueError):
        DiffusionProcess().reverse_diffusion_step(CountingModel(), torch.zeros(1, 1, 4, 4), **bad)


@pytest.mark.parametrize("eta", [10.5, -0.1, float("nan")])
def test_the_loop_refuses_an_impossible_eta_like_the_step(eta):
    with pytest.raises(ValueError, match="eta must lie"):
        DiffusionProcess(20).sample(CountingModel(), 4, 2, sampler="ddim", steps=5, eta=eta,
                                    device="cpu")


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_the_last_step_adds_no_noise(sampler):
    diffusion = DiffusionProcess(20)
    x_T = torch.randn(4, 1, 8, 8)
    *_, (t, x, x_0) = diffusion.trajectory(GaussianModel(diffusion), x_T, sampler=sampler)
    assert t == -1
    torch.testing.assert_close(x, x_0)
    for variance in ("posterior", "beta"):
        y, x_0 = diffusion.reverse_diffusion_step(
            GaussianModel(diffusion), x_T, 0, variance=variance, noise=torch.ones_like(x_T) * 9)
        torch.testing.assert_close(y, x_0)


def test_a_step_follows_its_class_as_far_as_guidance_says():
    """A model that sees the class's own shade everywhere, and grey without one."""
    diffusion, x_t = DiffusionProcess(objective="x0"), torch.zeros(2, 1, 4, 4)

    def shade(x_t, t, y=None):
        y = torch.full((len(x_t),), -1) if y is None else y
        return (0.2 * (y + 1)).view(-1, 1, 1, 1).expand_as(x_t)

    for y, guidance, wanted in ((None, 1.0, (0, 0)), (torch.tensor([0, 1]), 1.0, (0.2, 0.4)),
                                (torch.tensor([0, 1]), 2.0, (0.4, 0.8))):
        _, x_0 = diffusion.reverse_diffusion_step(shade, x_t, 500, y=y, guidance=guidance, eta=0)
        assert x_0[:, 0, 0, 0].tolist() == pytest.approx(wanted)


# ---- The loop

@pytest.mark.parametrize("T", [1, 2, 10, 20, 50, 200, 1000, 2000])
def test_timesteps_are_distinct_and_exactly_as_many_as_asked(T):
    diffusion = DiffusionProcess(T)
    for steps in {1, 2, 3, 7, T // 3, T // 2, T - 1, T} & set(range(1, T + 1)):
        levels = diffusion.timesteps(steps)
        assert len(levels) == steps + 1 and levels[0] == T - 1 and levels[-1] == -1
        assert all(a > b for a, b in zip(levels, levels[1:]))
        gaps = [a - b for a, b in zip(levels, levels[1:])]
        assert max(gaps) - min(gaps) <= 2                               # uniform but for rounding
    assert diffusion.timesteps() == list(range(T - 1, -2, -1))


@pytest.mark.parametrize("steps", [0, -3, 11, 2.5, float("nan")])
def test_an_impossible_number_of_steps_is_refused(steps):
    with pytest.raises(ValueError):
        DiffusionProcess(10).timesteps(steps)


@pytest.mark.parametrize("T", [1, 2, 10, 20, 50, 200, 2000])
def test_samplers_run_for_any_chain_length(T):
    diffusion = DiffusionProcess(T)
    for sampler in SAMPLERS:
        images = diffusion.sample(GaussianModel(diffusion), 4, 2, seed=0, sampler=sampler,
                                  device="cpu")
        assert images.shape == (2, 1, 4, 4) and images.isfinite().all() and images.abs().max() <= 1


@pytest.mark.parametrize("sampler, steps, eta, schedule", [
    ("ddpm", 1000, None, "linear"), ("ddpm_beta", 1000, None, "cosine"),
    ("ddim", 100, None, "sigmoid"), ("ddim", 100, None, "cosine"), ("ddim", 500, 0.5, "linear"),
    ("ddim", 1000, 2.0, "cosine"), ("dpmpp_2m_sde", 250, 1.5, "sigmoid")])
def test_samplers_return_the_mean_and_spread_of_gaussian_data(sampler, steps, eta, schedule):
    diffusion = DiffusionProcess(schedule=schedule)
    images = diffusion.sample(GaussianModel(diffusion), 128, 1, seed=1, sampler=sampler,
                              steps=steps, eta=eta, clip=False)    # 16,384 independent pixels
    assert float(images.mean()) == pytest.approx(MEAN, abs=0.02)
    assert float(images.std()) == pytest.approx(STD, abs=0.02)


def test_more_noise_washes_out_more_of_what_was_wrong_before():
    """What is left of a mistake at the start, from the same fresh noises; all old noise can go."""
    diffusion, start = (DiffusionProcess(schedule="cosine"),
                        torch.zeros(1, 1, 1, 1, dtype=torch.float64))
    model, left = GaussianModel(diffusion), []
    for eta in (0, 0.5, 1, 1.5, 2):
        x, wrong = start, start + 1
        for t in range(500, 100, -10):
            x, wrong = (diffusion.reverse_diffusion_step(model, each, t, t - 10, eta=eta,
                                                         noise=start, clip=False)[0]
                        for each in (x, wrong))
        left.append(float(wrong - x))
    assert all(0 < b < 0.8 * a for a, b in zip(left, left[1:])), left
    noise = torch.randn(2, 1, 4, 4)
    got = diffusion.step_towards(torch.zeros(2, 1, 4, 4), noise.flip(0), 900, 500, eta=10,
                                 noise=noise)
    torch.testing.assert_close(got, math.sqrt(1 - float(diffusion.alpha_bar[500])) * noise)


def test_ddim_converges_to_the_exact_flow_at_first_order():
    diffusion = DiffusionProcess()
    x_T = seeded_noise(3, range(4), 0, (1, 16, 16)).double()
    want, model = exact_flow(x_T, float(diffusion.alpha_bar[-1])), GaussianModel(diffusion)
    errors = [float((diffusion.sample(model, x_T=x_T, sampler="ddim", steps=n, clip=False)
                     - want).abs().mean()) for n in (10, 20, 40, 80)]
    ratios = [a / b for a, b in zip(errors, errors[1:])]
    assert all(1.7 < ratio < 2.3 for ratio in ratios), (errors, ratios)


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_eps_x0_and_v_models_of_one_denoiser_give_the_same_pictures(sampler):
    results = []
    for objective in ("eps", "x0", "v"):
        diffusion = DiffusionProcess(100, objective=objective)
        x_T = seeded_noise(0, range(4), 0, (1, 8, 8)).double()
        results.append(diffusion.sample(GaussianModel(diffusion), x_T=x_T, sampler=sampler, seed=0))
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=0)   # float32 weights of x_0
    torch.testing.assert_close(results[2], results[0], atol=1e-5, rtol=0)


def test_one_ddim_step_from_noise_is_the_clamped_estimate(tiny_model):
    diffusion = DiffusionProcess()
    x_T = torch.randn(4, 1, 16, 16)
    t = torch.full((4,), 999)
    a = float(diffusion.alpha_bar[999])
    with torch.no_grad():
        want = ((x_T - math.sqrt(1 - a) * tiny_model(x_T, t)) / math.sqrt(a)).clamp(-1, 1)
    got = diffusion.sample(tiny_model, x_T=x_T, sampler="ddim", steps=1)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)    # float32, after dividing by 0.0064


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_n_steps_call_the_model_n_times(sampler):
    diffusion = DiffusionProcess(60)
    for steps in (1, 2, 7, 59, 60, None):
        model = CountingModel()
        diffusion.sample(model, 4, 2, sampler=sampler, steps=steps, seed=0, spacing="uniform")
        expected = steps or min(SAMPLERS[sampler].steps or 60, 60)
        assert len(model.calls) == expected
        assert [t for t, _ in model.calls] == diffusion.timesteps(expected)[:-1]


@pytest.mark.parametrize("guidance, calls", [(0.0, 5), (1.0, 5), (2.0, 10)])
def test_guidance_costs_a_second_call_only_when_it_is_used(guidance, calls):
    model = CountingModel()
    DiffusionProcess().sample(model, 4, 2, sampler="ddim", steps=5, y=3, guidance=guidance, seed=0)
    assert len(model.calls) == calls


def test_guidance_pushes_away_from_the_answer_without_a_class():
    diffusion = DiffusionProcess(objective="x0")
    model = lambda x, t, y: (y.float() * 0.1).view(-1, 1, 1, 1).expand_as(x)       # noqa: E731
    x_t, y = torch.zeros(2, 1, 4, 4), torch.tensor([2, 4])
    for g in (0.0, 1.0, 2.0):
        want = -0.1 + g * (0.1 * y.float() + 0.1)
        got = diffusion.predict_x0(model, x_t, 5, y, guidance=g)
        torch.testing.assert_close(got[:, 0, 0, 0], want)
    with pytest.raises(ValueError):
        diffusion.predict_x0(model, x_t, 5, guidance=2.0)


@pytest.mark.parametrize("clip_loss, clip, want", [
    (True, True, -1.0), (True, False, 0.7), (False, True, 0.7)])
def test_guidance_pushes_on_what_lies_beyond_black_unless_that_was_never_asked_for(clip_loss, clip,
                                                                                   want):
    """Both answers say black, -2 without the class and -1.1 with it."""
    diffusion = DiffusionProcess(objective="x0", clip_loss=clip_loss)
    model = lambda x, t, y: torch.where(                                        # noqa: E731
        y.view(-1, 1, 1, 1) < 0, -2.0, -1.1).expand_as(x)
    seen = diffusion.predict_x0(model, torch.zeros(2, 1, 4, 4), 5, torch.tensor([2, 4]),
                                guidance=3.0, clip=clip)
    torch.testing.assert_close(seen, torch.full_like(seen, want))


def test_after_clip_loss_an_inversion_reads_nothing_beyond_the_range():
    """Two models that differ there only have one noise for a picture, and two without clip_loss."""
    x_0 = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for clip_loss in (True, False):
        diffusion = DiffusionProcess(50, "cosine", "x0", clip_loss=clip_loss)
        beyond = invert(diffusion, lambda x, t, y=None: 1.5 * x, x_0, steps=10)
        within = invert(diffusion, lambda x, t, y=None: (1.5 * x).clamp(-1, 1), x_0, steps=10)
        assert torch.equal(beyond, within) == clip_loss


def test_guidance_acts_in_its_interval_only():
    """DDIM's formula by hand, with a model that sees 0.3 with a class and 0.1 without."""
    diffusion, asked = DiffusionProcess(objective="x0"), []

    def model(x, t, y):
        asked.append((int(t[0]), int(y[0])))
        return torch.full_like(x, 0.3 if y[0] >= 0 else 0.1)

    x = x_T = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    levels = [999, 799, 599, 399, 199, -1]
    for t, t_prev in zip(levels, levels[1:]):
        ab, ab_prev = (float(diffusion.alpha_bar[t]),
                       float(diffusion.alpha_bar[t_prev]) if t_prev >= 0 else 1.0)
        x_0 = 0.1 + 2.5 * 0.2 if 399 <= t <= 799 else 0.3
        x = ab_prev**0.5 * x_0 + (1 - ab_prev)**0.5 * (x - ab**0.5 * x_0) / (1 - ab)**0.5
    drawn = diffusion.sample(model, x_T=x_T, sampler="ddim", steps=5, y=7, guidance=2.5,
                             guidance_interval=(399, 799))
    torch.testing.assert_close(drawn, x, atol=1e-5, rtol=0)
    assert sorted(asked, reverse=True) == [(999, 7), (799, 7), (799, -1), (599, 7), (599, -1),
                                           (399, 7), (399, -1), (199, 7)]
    assert model_calls(levels, 2.5, (399, 799)) == (5, 3) and model_calls(levels, 2.5) == (5, 5)
    assert [model_calls(levels, g) for g in (0, 1)] == [(0, 5), (5, 0)]
    assert model_calls(levels, 2.5, (0, 198)) == (5, 0)


def test_guidance_leads_away_from_a_weak_model_with_classes_and_without():
    diffusion = DiffusionProcess(objective="x0")
    strong, weak = (lambda x, t, y, c=c: torch.full_like(x, c)
                    + (0 if y is None else 0.01 * y.view(-1, 1, 1, 1)) for c in (0.3, 0.1))
    x_t = torch.zeros(2, 1, 4, 4)
    for g in (0.0, 1.0, 2.5):
        for y in (None, torch.tensor([2, 4])):
            want = 0.1 + g * 0.2 + (0 if y is None else 0.01 * y)
            got = diffusion.predict_x0(strong, x_t, 5, y, guidance=g, weak=weak)[:, 0, 0, 0]
            torch.testing.assert_close(got, torch.as_tensor(want).float().expand(2))
    drawn = diffusion.sample(strong, 4, 2, sampler="ddim", steps=3, seed=0, guidance=2.5, weak=weak)
    torch.testing.assert_close(drawn, torch.full_like(drawn, 0.6))


def test_the_trajectory_ends_with_the_sample_and_names_its_own_levels():
    diffusion, x_T = DiffusionProcess(), torch.randn(2, 1, 8, 8)
    items = list(diffusion.trajectory(GaussianModel(diffusion), x_T, sampler="ddpm", steps=7,
                                      seed=5))
    assert [t for t, _, _ in items] == diffusion.timesteps(7)[1:]
    picture = diffusion.sample(GaussianModel(diffusion), x_T=x_T, sampler="ddpm", steps=7, seed=5)
    assert torch.equal(items[-1][1], picture)


# ---- Randomness

@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_image_i_of_a_seed_is_the_same_in_batches_of_4_and_12(sampler, tiny_model):
    diffusion = DiffusionProcess(50)
    settings = dict(image_size=16, seed=7, sampler=sampler, steps=10)
    many = diffusion.sample(tiny_model, batch_size=12, **settings)
    few = torch.cat([diffusion.sample(tiny_model, batch_size=4, first_index=i, **settings)
                     for i in (0, 4, 8)])
    torch.testing.assert_close(few, many, atol=1e-3, rtol=0)
    shuffled = diffusion.sample(tiny_model, batch_size=12, **{**settings, "seed": 8})
    assert (shuffled - many).abs().mean() > 0.01


def test_noise_belongs_to_seed_image_and_step_bit_for_bit():
    many = seeded_noise(7, range(64), 3, (1, 28, 28))
    few = torch.cat([seeded_noise(7, range(i, i + 4), 3, (1, 28, 28)) for i in range(0, 64, 4)])
    assert torch.equal(many, few)
    assert not torch.equal(many, seeded_noise(8, range(64), 3, (1, 28, 28)))
    assert not torch.equal(many, seeded_noise(7, range(64), 4, (1, 28, 28)))
    assert len({float(row[0, 0, 0]) for row in many}) == 64             # no two images share theirs
    assert float(many.mean()) == pytest.approx(0, abs=0.02)
    assert float(many.std()) == pytest.approx(1, abs=0.02)


def test_sampling_leaves_the_global_generator_alone():
    diffusion = DiffusionProcess(10)
    torch.manual_seed(0)
    want = torch.randn(3)
    torch.manual_seed(0)
    for sampler in SAMPLERS:
        diffusion.sample(CountingModel(), 4, 2, sampler=sampler)
    assert torch.equal(torch.randn(3), want)


def test_without_a_seed_pictures_differ():
    diffusion = DiffusionProcess(10)
    draw = lambda: diffusion.sample(GaussianModel(diffusion), 4, 2)     # noqa: E731
    assert not torch.equal(draw(), draw())


def test_sampling_switches_dropout_off_and_back_on():
    model = torch.nn.Dropout(0.5)
    seen = []
    wrapped = torch.nn.Module()
    wrapped.dropout = model
    wrapped.forward = lambda x, t, y=None: seen.append(model.training) or x
    wrapped.train()
    DiffusionProcess(5).sample(wrapped, 4, 1)
    assert seen == [False] * 5 and model.training


# ---- Calls from other code

def test_a_schedule_of_ones_own_is_kept_and_can_be_saved(tmp_path):
    """The caller's tensor was shared: once that changed, training and sampling no longer agreed."""
    mine = torch.linspace(0.99, 0.01, 20, dtype=torch.float64)
    diffusion = DiffusionProcess(schedule=mine)
    mine[0] = 0.5
    assert diffusion.alpha_bar_at(0) == 0.99 and diffusion.config["schedule"][0] == 0.99
    config = DiffusionProcess(schedule=np.linspace(0.99, 0.01, 20)).config
    save_checkpoint(tmp_path / "c.pt", {"diffusion_config": config})
    again = DiffusionProcess(**load_checkpoint(tmp_path / "c.pt")["diffusion_config"])
    torch.testing.assert_close(again.alpha_bar, diffusion.alpha_bar, rtol=0, atol=1e-15)


@pytest.mark.parametrize("t, t_prev", [(5, 8), (5, 5), (-2, -1), (20, 3), (5, -2)])
def test_a_step_to_no_cleaner_level_is_refused(t, t_prev):
    x = torch.zeros(1, 1, 4, 4)
    with pytest.raises(ValueError, match="need -1 <= t_prev < t < 20"):
        DiffusionProcess(20).step_towards(x, x, t, t_prev)


def test_models_are_compared_without_dropout():
    """Of a model in training mode the loss of the same images was another one each time."""
    class Dropping(torch.nn.Module):
        def forward(self, x_t, t, y=None):
            return torch.nn.functional.dropout(x_t, 0.5, self.training)

    model, diffusion, images = Dropping().train(), DiffusionProcess(20), digits(6, seed=0)[0]
    x_0 = to_signed(images)
    measures = {
        "held_out_loss": lambda: held_out_loss(model, Batches(images, batch_size=4), diffusion,
                                               "cpu"),
        "loss_by_timestep": lambda: loss_by_timestep(model, diffusion, x_0, ranges=2)[1],
        "predictor_errors": lambda: predictor_errors(
            diffusion, x_0, model, ranges=2)[1]["the model"],
        "edit.solve": lambda: edit.solve(
            model, diffusion, x_0, edit.inpaint(torch.zeros(28, 28, dtype=torch.bool)),
            x_0.shape, steps=2).tolist()}
    for name, measure in measures.items():
        assert measure() == measure(), name
    assert model.training
