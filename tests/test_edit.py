"""The operators against their definition, the rule against closed-form posteriors, the command on
a tiny model."""

import math
import re

import numpy as np
import pytest
import torch

import data
import edit
from conftest import fails
from diffusion import DiffusionProcess
from edit import colourise, deblur, inpaint, read_mask, solve, upscale
from images import to_uint8

SIZE = 12
OPERATORS = {"inpaint": (inpaint(read_mask("lower", SIZE)), 1), "upscale": (upscale(SIZE, 4), 1),
             "deblur": (deblur(SIZE), 1), "colourise": (colourise(), 3)}


@pytest.mark.parametrize("name", OPERATORS)
def test_what_is_given_back_has_the_measurement_it_was_made_from(name):
    operator, channels = OPERATORS[name]
    x = torch.randn(2, channels, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    y = operator.measure(x)
    assert torch.allclose(operator.measure(operator.back(y)), y, atol=1e-5)


@pytest.mark.parametrize("name", OPERATORS)
def test_measuring_and_giving_back_is_an_orthogonal_projection(name):
    """Written out as a matrix, column by column, it is symmetric and its own square: then a
    correction changes what contradicts the measurement and nothing else."""
    operator, channels = OPERATORS[name]
    basis = torch.eye(channels * SIZE * SIZE).view(-1, channels, SIZE, SIZE)
    matrix = operator.back(operator.measure(basis)).flatten(1)
    assert (torch.allclose(matrix, matrix.T, atol=1e-4)
            and torch.allclose(matrix @ matrix, matrix, atol=1e-4))


def test_a_block_is_known_by_its_mean():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert upscale(4, 2).measure(x).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]


def test_masks_are_what_their_names_say(tmp_path):
    from PIL import Image
    lower = read_mask("lower", 8)
    assert lower[:4].all() and not lower[4:].any()
    assert torch.equal(read_mask("upper", 8), ~lower)
    assert read_mask("left", 8)[:, 4:].all() and not read_mask("left", 8)[:, :4].any()
    assert torch.equal(read_mask("right", 8), ~read_mask("left", 8))
    assert read_mask("box", 8).sum() == 64 - 16
    picture = Image.new("L", (16, 16), 255)
    picture.paste(0, (0, 0, 8, 16))
    picture.save(tmp_path / "mask.png")
    assert torch.equal(read_mask(str(tmp_path / "mask.png"), 8), read_mask("left", 8))


# ---- The rule, where the posterior is known

MEAN, STD, RHO = -0.1, 0.3, 0.8


def correlated_pair(diffusion):
    """The exact denoiser of pairs of pixels, Gaussian with correlation RHO: E[x_0 | x_t] from the
    joint Gaussian."""
    covariance = STD**2 * torch.tensor([[1.0, RHO], [RHO, 1.0]], dtype=torch.float64)

    def model(x_t, t, y=None):
        ab = float(diffusion.alpha_bar[int(t[0])])
        gain = ab**0.5 * covariance @ torch.linalg.inv(
            ab * covariance + (1 - ab) * torch.eye(2, dtype=torch.float64))
        away = (x_t.double() - ab**0.5 * MEAN).flatten(1)
        return (MEAN + away @ gain.T).view_as(x_t).float()

    return model


@pytest.fixture
def quick_noise(monkeypatch):
    """Noise of a whole batch at once: a generator for each image takes most of the time."""
    monkeypatch.setattr(edit, "seeded_noise", lambda seed, indices, step, shape: torch.randn(
        len(indices), *shape, generator=torch.Generator().manual_seed(step)))


def second_pixel(given, travel, steps=50, count=800):
    """Draws of the second pixel, with the first known to be `given`."""
    diffusion = DiffusionProcess(1000, objective="x0")
    operator = inpaint(torch.tensor([[True, False]]))
    known = torch.full((count, 1, 1, 2), given) * torch.tensor([1.0, 0.0])
    found = solve(correlated_pair(diffusion), diffusion, known, operator, (count, 1, 1, 2),
                  steps=steps, travel=travel)
    assert torch.equal(found[..., 0], known[..., 0])
    return found[..., 1]


def test_a_missing_pixel_follows_its_neighbour_as_the_posterior_says(quick_noise):
    """Given the first pixel, the second is Gaussian with mean m + rho (x_1 - m). The rule is too
    timid: it takes the estimate at its word, as though it were certain. Going back up and down
    again makes good half of that."""
    given = MEAN + 1.5 * STD
    expected = MEAN + RHO * (given - MEAN)
    errors = [abs(float(second_pixel(given, travel).mean()) - expected) for travel in (1, 5)]
    # the shift is one of 0.36
    assert errors[0] < 0.2 and errors[1] < 0.1 and errors[1] < 0.7 * errors[0]


def test_draws_are_as_varied_as_the_posterior(quick_noise):
    spread = float(second_pixel(MEAN, travel=5).std())
    assert spread == pytest.approx(STD * (1 - RHO**2) ** 0.5, rel=0.2)


def test_an_image_depends_on_its_number_and_not_on_the_batch(tiny_model):
    diffusion, operator = DiffusionProcess(50), inpaint(read_mask("box", 8))
    given = operator.measure(
        torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    settings = dict(steps=4, travel=2, seed=3)
    together = solve(tiny_model, diffusion, given, operator, (3, 1, 8, 8), **settings)
    alone = solve(tiny_model, diffusion, given[2:], operator, (1, 1, 8, 8), first_index=2,
                  **settings)
    assert torch.allclose(together[2:], alone, atol=1e-3)


def test_every_step_but_the_last_is_taken_again(tiny_model):
    calls, operator = [], inpaint(read_mask("box", 8))

    def counting(x_t, t, y=None):
        calls.append(int(t[0]))
        return tiny_model(x_t, t, y)

    solve(counting, DiffusionProcess(50), torch.zeros(1, 1, 8, 8), operator, (1, 1, 8, 8),
          steps=5, travel=3)
    assert calls == [*(t for t in (49, 39, 29, 19) for _ in range(3)), 9]


# ---- The command

def test_known_pixels_stay_as_they_are(two_shades, tmp_path, capsys):
    from PIL import Image
    picture = Image.new("L", (8, 8), 40)
    picture.save(tmp_path / "a.png")
    edit.main(["--checkpoint", str(two_shades), "--images", str(tmp_path / "a.png"),
               "--steps", "10", "--travel", "2", "--output_dir", str(tmp_path / "out"),
               "--device", "cpu"])
    assert "PSNR, likeness to the originals: given" in capsys.readouterr().out
    with Image.open(tmp_path / "out" / "edited_only.png") as result:
        pixels = np.asarray(result.convert("L"))
    half = len(pixels) // 2                             # enlarged, in a sheet of one
    assert (tmp_path / "out" / "edited.png").is_file()
    assert (pixels[:half] == 40).all() and (pixels[half:] != 40).any()
    operator = inpaint(read_mask("lower", 8))
    x = torch.full((1, 1, 8, 8), 40 / 127.5 - 1)
    from load import load_model
    model, diffusion, _ = load_model(two_shades)
    found = solve(model, diffusion, operator.measure(x), operator, x.shape, steps=10, travel=2,
                  y=torch.tensor([-1]))
    assert torch.equal(to_uint8(found)[..., :4, :], to_uint8(x)[..., :4, :])
    # The model knows dark squares and bright ones: below a dark half belongs a dark one.
    assert found[..., 4:, :].mean() < 0


def test_another_seed_is_another_answer_to_the_same_pictures(two_shades, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(data, "SYNTHETIC_SIZE", 30)
    monkeypatch.setattr(edit, "save_strip", lambda rows, *_, **__: asked.append(rows))
    for seed in "01":
        edit.main(["--checkpoint", str(two_shades), "--dataset", "synthetic_digits",
                   "--num_images", "4", "--steps", "3", "--travel", "1", "--seed", seed,
                   "--output_dir", str(tmp_path), "--device", "cpu"])
    (first, _, answer), (second, _, other) = asked
    assert torch.equal(first, second) and not torch.equal(answer, other)


@pytest.fixture
def mend(two_shades, tmp_path, monkeypatch):
    """edit.py on three digits, with further flags."""
    monkeypatch.setattr(data, "SYNTHETIC_SIZE", 30)
    return lambda *flags: edit.main([
        "--checkpoint", str(two_shades), "--dataset", "synthetic_digits", "--num_images", "3",
        "--steps", "3", "--travel", "1", "--output_dir", str(tmp_path), "--device", "cpu", *flags])


def test_the_mean_of_several_answers_of_the_class_that_was_asked_for(mend, monkeypatch):
    answers, classes, saved = [], [], []

    def spy(*args, y, **settings):
        classes.append(y.tolist())
        answers.append(solve(*args, y=y, **settings))
        return answers[-1]

    monkeypatch.setattr(edit, "solve", spy)
    monkeypatch.setattr(edit, "save_images", lambda images, path, note: saved.append(images))
    mend("--label", "bright", "--average", "2")
    assert classes == [[1, 1, 1]] * 2 and (answers[0] - answers[1]).abs().max() > 0.01
    torch.testing.assert_close(saved[0], ((answers[0] + answers[1]) / 2).clamp(-1, 1))


def test_each_picture_is_labelled_with_its_own_likeness(mend, monkeypatch):
    """In dB, a mean square of 2^2 = 4 being none: of what was given, and of the answer."""
    def likeness(image, original):
        return round(10 * math.log10(4 / np.square((image - original).numpy()).mean()))

    seen = []
    monkeypatch.setattr(edit, "save_strip", lambda rows, labels, path, row_labels, title:
                        seen.append((rows, labels, row_labels)))
    mend("--average", "8")
    mend()
    for (rows, labels, row_labels), answer in zip(seen, ("mean of 8\nanswers", "the model")):
        assert row_labels == ["original", "given", answer]
        assert labels == [f"{likeness(given, original)} → {likeness(ours, original)} dB"
                          for original, given, ours in zip(*rows)]
        assert len(set(labels)) == 3


@pytest.mark.parametrize("flags, message", [
    (["--mask", "nowhere"], "unknown mask 'nowhere'; choose from lower"),
    (["--task", "upscale", "--factor", "3"], "--factor 3 must divide"),
    (["--task", "colourise"], "this one is grey"),
    ([], "trained on 'shades'"),
    (["--dataset", "nothing"], "unknown dataset 'nothing'"),
    (["--task", "deblur", "--mask", "left"], "--mask belongs to --task inpaint"),
    (["--images", "a.png", "--dataset", "mnist", "--num_images", "3"],
     "--dataset, --num_images would be of no use"),
    (["--mask", __file__], "--mask .*test_edit.py: "),
])
def test_what_cannot_be_done_is_one_line(two_shades, tmp_path, capsys, flags, message):
    assert re.search(message, fails(capsys, edit.main, "--checkpoint", two_shades,
                                    "--output_dir", tmp_path, *flags))
