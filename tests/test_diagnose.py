"""The diagnosis against networks whose fault is known, because they are formulas. tests/broken.py
trains real ones."""

import math

import pytest
import torch

import diagnose as d
from conftest import fails
from diffusion import DiffusionProcess
from reference import Reference

SPREAD = 0.15  # of the pixels, which know nothing of each other


@pytest.fixture(scope="module")
def images():
    """Grey static: independent Gaussian pixels, uint8 [400, 1, 8, 8]."""
    x = SPREAD * torch.randn(400, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def exact(signal, noise, objective="eps", mean=0.0, spread=SPREAD):
    """The best network for such images, where x_t = signal[t] x_0 + noise[t] eps."""
    def model(x_t, t, y=None):
        a, b = signal[t].float().view(-1, 1, 1, 1), noise[t].float().view(-1, 1, 1, 1)
        x_0 = mean + spread**2 * a * (x_t - a * mean) / (spread**2 * a**2 + b**2)
        return {"eps": (x_t - a * x_0) / b, "x0": x_0, "v": (a * x_t - x_0) / b}[objective]
    model.num_classes, model.image_channels = None, 1
    return model


def roots(process):
    return process.alpha_bar.sqrt(), (1 - process.alpha_bar).sqrt()


def test_the_linear_error_of_static_is_the_closed_form():
    power = torch.full((1, 8, 8), SPREAD**2, dtype=torch.float64)
    assert d.linear_error(power, 0.6, 0.8) == pytest.approx(0.0225 * 0.64 / (0.36 * 0.0225 + 0.64))


def test_the_linear_error_is_that_of_a_filter_applied():
    """Images with a spectrum of their own; the filter is applied to them as a matrix, plainly."""
    random = torch.Generator().manual_seed(0)
    blur = torch.zeros(16, 16, dtype=torch.float64)
    for i in range(16):
        for k, weight in ((-1, 0.25), (0, 0.5), (1, 0.25)):
            blur[i, (i + k) % 16] = weight
    # covariance: blur blur^T
    x = torch.randn(4000, 16, generator=random, dtype=torch.float64) @ blur.T
    a, b = 0.7, 0.5
    noisy = a * x + b * torch.randn(x.shape, generator=random, dtype=torch.float64)
    covariance = blur @ blur.T
    best = a * covariance @ torch.linalg.inv(
        a**2 * covariance + b**2 * torch.eye(16, dtype=torch.float64))
    error = float((noisy @ best.T - x).square().mean())
    power = torch.fft.fft(x, norm="ortho").abs().square().mean(0)
    assert d.linear_error(power, a, b) == pytest.approx(error, rel=0.02)


@pytest.mark.parametrize("clip_loss", [True, False])
def test_after_clip_loss_no_reading_looks_beyond_the_range(clip_loss, images):
    """Two networks that differ there alone err alike, however they are understood."""
    process = DiffusionProcess(objective="x0", clip_loss=clip_loss)
    wild, power = (lambda x, t, y=None: 2 * x), d.spectrum(images)
    for reading in d.readings(process):
        low = 0 if reading.zero_to_one else -1
        if reading.objective == "x0":
            tame = d.errors(lambda x, t, y=None: wild(x, t).clamp(low, 1), reading, images[:20],
                            power)
            assert (d.errors(wild, reading, images[:20], power) == tame) == clip_loss


@pytest.mark.parametrize("objective", ["eps", "x0", "v"])
def test_the_best_network_for_static_scores_one_and_is_not_blamed(objective, images):
    process = DiffusionProcess(objective=objective)
    power, model = d.spectrum(images), exact(*roots(process), objective)
    ratios = {r.name: d.errors(model, r, images[:100], power) for r in d.readings(process)}
    assert next(iter(ratios.values())) == pytest.approx([1] * 6, abs=0.06)
    assert not d.check_readings(ratios) and not d.check_time(model, process, images[:20])


@pytest.mark.parametrize("words, trained_with", [
    ("linear schedule", lambda process: exact(*roots(DiffusionProcess()))),
    ("objective v", lambda process: exact(*roots(process), "v")),
    ("objective x0", lambda process: exact(*roots(process), "x0")),
    ("[0, 1]", lambda process: exact(*roots(process), mean=0.5, spread=SPREAD / 2)),
    ("square roots", lambda process: exact(process.alpha_bar, 1 - process.alpha_bar))])
def test_a_network_of_another_assumption_is_recognised(words, trained_with, images):
    process = DiffusionProcess(schedule="cosine")
    power = d.spectrum(images)
    ratios = {r.name: d.errors(trained_with(process), r, images[:100], power)
              for r in d.readings(process)}
    found = d.check_readings(ratios)
    assert len(found) == 1 and words in found[0].what


def test_a_deaf_network_is_found(images):
    process = DiffusionProcess()
    hearing = exact(*roots(process))
    assert d.check_time(lambda x_t, t, y=None: hearing(x_t, torch.full_like(t, 300), y), process,
                        images[:20])


def test_classes_are_missed_where_they_say_nothing():
    """Dark and bright images; a network draws its class's shade, another forgets which is which."""
    process, labels = DiffusionProcess(objective="x0"), torch.arange(64) % 2
    images = (40 + 175 * labels).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)

    def model(x_t, t, y):
        return (y * 2.0 - 1).view(-1, 1, 1, 1).expand_as(x_t) * 0.7

    model.num_classes = 2
    assert not d.check_labels(model, process, images, labels)
    assert d.check_labels(model, process, images, labels[
        torch.randperm(64, generator=torch.Generator().manual_seed(0))])
    model.num_classes = 1                       # there is no other to tell it
    assert not d.check_labels(model, process, images, labels * 0)


def test_a_schedule_that_keeps_the_image_is_named():
    assert "0.132" in d.check_schedule(
        DiffusionProcess(200, beta_start=1e-4, beta_end=0.02))[0].evidence
    assert not d.check_schedule(DiffusionProcess(200))


@pytest.mark.parametrize("losses, diverged", [
    ([1 / (k + 1) + 0.02 for k in range(500)], False), ([0.05] * 300 + [math.nan], True),
    ([0.05] * 300 + [2.0] * 200, True), ([1.0] * 20, False)])
def test_a_loss_that_rises_again_is_a_divergence(losses, diverged):
    assert bool(d.check_divergence({}, losses)) == diverged


@pytest.mark.parametrize("losses", [[1.7e308] * 60, [math.inf, -math.inf] * 30])
def test_losses_beyond_all_numbers_are_a_divergence(losses, images):
    process = DiffusionProcess()
    told = d.diagnose(exact(*roots(process)), None, process, images[:200], images[200:],
                      losses=losses)[0]
    assert told[0].key == "diverged"


def test_what_it_started_from_counts_as_steps():
    few = [0.3] * 60
    assert d.has_hardly_begun(few, {}) and d.has_hardly_begun(few, {"started_from": {"steps": 9}})
    for start in ({"steps": 5000}, {"steps": "x"}, "a stranger's"):
        assert not d.has_hardly_begun(few, {"started_from": start})


def test_weights_that_are_no_numbers_are_a_divergence():
    assert d.check_divergence({"w": torch.tensor([math.nan])}, [])


def test_an_average_that_lags_is_named():
    assert (d.check_average(0.9, 0.3) and not d.check_average(0.3, 0.31)
            and not d.check_average(0.3, None))


def test_copies_and_tints_are_seen(images):
    training, held = images[:200], images[200:]
    assert not d.check_samples(held[:64], training, held[100:])
    assert "heart" in d.check_samples(training[:64], training, held)[0].what
    both = torch.cat([held[:40], training[:1]])         # one duplicate switched it off
    assert "heart" in d.check_samples(training[1:65], training, both)[0].what
    turned = training[:64].rot90(1, (-2, -1)).flip(-1)          # as after --turn
    assert "heart" in d.check_samples(turned, training, held, positions=8)[0].what
    assert "colour" in d.check_samples((held[:64] * 0.7).to(torch.uint8), training, held)[-1].what


def test_a_channel_that_never_changes_has_no_contrast_to_miss():
    """Perfect samples without blue had 0 % of its contrast, those off by one grey level 392 %."""
    images = torch.randint(256, (300, 3, 8, 8), generator=torch.Generator().manual_seed(0),
                           dtype=torch.uint8)
    images[:, 2] = 0
    for blue in (0, torch.arange(100).view(100, 1, 1) % 2):
        drawn = images[200:].clone()
        drawn[:, 2] = blue
        assert not d.check_samples(drawn, images[:100], images[100:200])


def test_a_process_of_one_level_has_no_wrong_level_to_be_told(images):
    process = DiffusionProcess(1)
    assert not d.check_time(exact(*roots(process)), process, images[:20])


def test_a_perfect_network_is_not_accused_by_the_whole_of_it(images):
    process = DiffusionProcess()
    causes, ratios = d.diagnose(exact(*roots(process)), None, process, images[:200], images[200:])
    assert causes == [] and len(ratios) > 5


def test_the_command_says_what_to_do_next(two_shades, tmp_path, capsys, monkeypatch):
    """A good checkpoint's stored process is changed, as happens in sampling code of one's own."""
    from checkpoint import load_checkpoint, save_checkpoint
    entries = load_checkpoint(two_shades)
    entries.pop("digest")
    entries["diffusion_config"] = DiffusionProcess(50, objective="eps").config          # it was x0
    save_checkpoint(tmp_path / "model.pt", entries)
    shades = torch.cat([torch.full((32, 1, 8, 8), 40),
                        torch.full((32, 1, 8, 8), 215)]).to(torch.uint8)
    labels = torch.arange(64) // 32
    monkeypatch.setattr(d, "load_reference",
                        lambda *args: Reference(shades, labels, shades, labels, "images"))
    monkeypatch.setattr(d, "same_classes", lambda *args: True)
    d.main(["--checkpoint", str(tmp_path / "model.pt"), "--device", "cpu"])
    out = capsys.readouterr().out
    assert "1. it was trained with another assumption: the objective x0" in out and "next: " in out


def test_a_missing_checkpoint_is_one_line(tmp_path, capsys):
    assert "no checkpoint" in fails(capsys, d.main, "--checkpoint", tmp_path / "none.pt")


@pytest.mark.parametrize("rate, losses, causes", [
    (1e-3, [0.3] * 400, ["few steps"]),             # an ordinary rate, data that stay hard
    (1.5e-3, [0.3] * 400, ["rate", "few steps"]),
    (1.5e-3, [1 / (k + 1) for k in range(400)], ["few steps"]),
    (2e-2, [1 / (k + 1) for k in range(400)], ["rate", "few steps"])])
def test_the_rate_is_blamed_if_it_is_high_or_if_nothing_falls_any_more(rate, losses, causes):
    settings = {"learning_rate": rate, "optimizer": "adam"}
    assert [cause.key for cause in d.check_training(1.2, losses, settings)] == causes
    assert d.check_training(0.5, losses, settings) == []


def test_sixty_steps_are_few_however_small_the_error():
    """The preset quick learns so fast that its error said nothing; its digits were illegible."""
    assert [cause.key for cause in d.check_training(0.4, [0.3] * 60, {})] == ["few steps"]


@pytest.mark.parametrize("steps", [1, 3, 20, 299])
def test_a_training_that_has_hardly_begun_is_not_accused_of_assumptions(steps, images):
    """Its answers fitted images in [0, 1] best, by chance, and did not depend on the time."""
    process = DiffusionProcess(objective="x0")
    half = DiffusionProcess(schedule="cosine")

    def begun(x_t, t, y=None):
        return exact(*roots(half), "x0", mean=0.5)(x_t, torch.full_like(t, 300)) * 2

    begun.num_classes, begun.image_channels = None, 1
    told = [[cause.key for cause in d.diagnose(begun, None, process, images[:200], images[200:],
                                               losses=losses)[0]]
            for losses in ([0.9] * steps, [0.9] * 400, [])]
    assert told[0][0] == "few steps" and not {"assumption", "deaf"} & set(told[0])
    assert all("deaf" in keys for keys in told[1:])


def test_a_fast_learner_that_has_hardly_begun_is_not_called_deaf(images, monkeypatch):
    """The preset quick after 60 steps: better than the filter, but all levels are still alike."""
    process = DiffusionProcess()
    hearing = exact(*roots(process))

    def begun(x_t, t, y=None):
        return hearing(x_t, torch.full_like(t, 300))

    begun.num_classes, begun.image_channels = None, 1
    monkeypatch.setattr(d, "errors", lambda *args: [0.4] * len(d.DECIBELS))
    young, old = ([cause.key for cause in d.diagnose(
        begun, None, process, images[:200], images[200:], losses=[0.9] * steps)[0]]
        for steps in (60, 400))
    assert "few steps" in young and "deaf" not in young and "deaf" in old
