"""The exercises as handed out, right answers, and for each usual mistake the words that help."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from conftest import ROOT
from diffusion import DiffusionProcess

sys.path.insert(0, str(ROOT / "exercises"))
import create                                                                       # noqa: E402
import execute                                                                      # noqa: E402
import grader                                                                       # noqa: E402
import modify                                                                       # noqa: E402


def graded(name, answers, capsys):
    """(exit code, {task: what is said of it}, all that is printed)"""
    with pytest.raises(SystemExit) as end:
        grader.grade(name, answers)
    out = capsys.readouterr().out
    lines = [line.split(". ", 1)[1].split(": ", 1)
             for line in out.splitlines()[:len(grader.EXERCISES[name])]]
    return end.value.code, dict(lines), out


@pytest.mark.parametrize("exercise", [execute, modify, create])
def test_as_it_is_handed_out_nothing_is_right(exercise, capsys):
    code, said, out = graded(exercise.__name__, vars(exercise), capsys)
    assert code == 1 and "right" not in said.values() and f"0 of {len(said)} are right" in out
    assert all("to do" in words for words in said.values())


def test_an_exercise_runs_by_itself_from_anywhere(tmp_path):
    run = subprocess.run([sys.executable, ROOT / "exercises" / "execute.py"], cwd=tmp_path,
                         capture_output=True, text=True)
    assert (run.returncode == 1 and "1. first_t_below_0_dB_cosine: to do" in run.stdout
            and not run.stderr)


def test_an_exercise_takes_no_flags(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["exercises/execute.py", "--task", "3"])
    with pytest.raises(SystemExit) as end:
        grader.grade("execute", vars(execute))
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (2, "") and "got --task 3" in err


def test_the_formulas_behind_the_checks_are_the_schedules_of_the_project():
    for name, schedule in (("linear", grader.linear_schedule), ("cosine", grader.cosine_schedule)):
        for T in (100, 1000):
            torch.testing.assert_close(schedule(T), DiffusionProcess(T, name).alpha_bar,
                                       rtol=1e-9, atol=0)


# ---- Execute

def test_what_the_commands_print_is_what_is_asked_for(capsys, tmp_path):
    """The answers, read off the commands that the exercise names."""
    import visualize_diffusion
    import visualize_model
    visualize_diffusion.main(["--figure", "schedules", "--output_dir", str(tmp_path)])
    table = capsys.readouterr().out.splitlines()
    crossing = next(int(part.split()[-1]) for line in table if "first below 0 dB" in line
                    for part in line.split(", ") if "cosine" in part)
    left = next(float(line.split()[1]) for line in table if line.split()[:1] == ["250"])
    visualize_model.main(["--figure", "table", "--channels", "64", "128", "256",
                          "--output_dir", str(tmp_path)])
    memory = [int(line.split()[4].replace(",", "")) for line in capsys.readouterr().out.splitlines()
              if line.startswith("encoder")]
    answers = dict(
        first_t_below_0_dB_cosine=crossing, factor_of_the_image_at_250=round(left ** 0.5, 2),
        calls_without_and_with_guidance=[10, 20], the_same_picture_whatever_the_batch=True,
        memory_of_the_second_level_over_the_first=memory[1] / memory[0],
        loss_of_zero_and_of_the_copy=(1, 0))
    code, said, out = graded("execute", answers, capsys)
    assert code == 0 and set(said.values()) == {"right"} and "6 of 6 are right; well done" in out
    wrong = dict(
        first_t_below_0_dB_cosine=crossing + 1, factor_of_the_image_at_250=left,
        calls_without_and_with_guidance=10, the_same_picture_whatever_the_batch=False,
        memory_of_the_second_level_over_the_first=0.25, loss_of_zero_and_of_the_copy=("1", "0"))
    code, said, _ = graded("execute", wrong, capsys)
    assert code == 1 and "take its root" in said["factor_of_the_image_at_250"]
    assert "(a, b)" in said["calls_without_and_with_guidance"] and "twice the channels" in str(said)
    assert ("quotation marks" in said["loss_of_zero_and_of_the_copy"]
            and "right" not in said.values())


# ---- Modify

def cosine(T):
    t = torch.arange(T + 1, dtype=torch.float64)
    curve = torch.cos((t / T + 0.008) / 1.008 * torch.pi / 2) ** 2
    return torch.cumprod(1 - (1 - curve[1:] / curve[:-1]).clamp(max=0.999), 0)


def ddim(x_t, eps, ab_t, ab_prev, fresh):
    return (ab_prev ** 0.5 * (x_t - (1 - ab_t) ** 0.5 * eps) / ab_t ** 0.5
            + (1 - ab_prev) ** 0.5 * eps)


MODIFIED = dict(alpha_bar=cosine,
                target=lambda x_0, noise, ab: ab ** 0.5 * noise - (1 - ab) ** 0.5 * x_0,
                levels=lambda T, steps: DiffusionProcess(T).timesteps(steps), step=ddim,
                guided=lambda c, u, g: (1 - g) * u + g * c)


def test_the_right_changes_are_right(capsys):
    code, said, _ = graded("modify", MODIFIED, capsys)
    assert code == 0 and set(said.values()) == {"right"}


@pytest.mark.parametrize("task, wrong, words", [
    ("alpha_bar", lambda T: torch.cat([torch.ones(1), cosine(T)[:-1]]), "belongs to t + 1 steps"),
    ("alpha_bar", lambda T: cosine(T)[:-1], "its shape is (99,), not (100,)"),
    ("alpha_bar", lambda T: [1.0] * T, "a tensor is wanted"),
    ("alpha_bar", lambda T: torch.cumprod(
        1 - (1 - cosine(T) / torch.cat([torch.ones(1), cosine(T)[:-1]])).clamp(max=0.99), 0),
     "the last beta is 0.99"),
    ("alpha_bar", lambda T: cosine(100), "its shape is (100,), not (250,)"),
    ("alpha_bar", lambda T: cosine(T) + 1j, "complex"),
    ("alpha_bar", lambda T: sys.exit(0), "SystemExit"),
    ("target", lambda x_0, noise, ab: (1 - ab) ** 0.5 * x_0 - ab ** 0.5 * noise, "other way round"),
    ("target", lambda x_0, noise, ab: (1 - ab) ** 0.5 * noise - ab ** 0.5 * x_0, "exchanged"),
    ("levels", lambda T, steps: [*range(T - 1, -1, -(T // steps)), -1], "makes 31 steps"),
    ("levels", lambda T, steps: [T - 1] * steps + [-1], "does not fall"),
    ("levels", lambda T, steps: [*range(T - 1, -1, -round(T / steps))][:steps] + [-1],
     "has strides of 33 and of 43"),
    ("levels", lambda T, steps: torch.linspace(T - 1, -1, steps + 1), "no list of integers"),
    ("levels", lambda T, steps: np.arange(T), "no list of integers"),
    ("levels", lambda T, steps: [*range(T - 1, T - 1 - steps, -1), -1], "strides of"),
    ("step", lambda *args: modify.step(*args[:4], 0.0), "part of the old one is still taken away"),
    ("step", lambda *args: 1 / 0, "ZeroDivisionError: division by zero"),
    ("guided", lambda c, u, g: c + g * (c - u), "counts from the answer with the class"),
    ("guided", lambda c, u, g: u + g * c, "the difference of the two answers"),
    ("guided", lambda c, u, g: c - u, "wrong: up to"),
    ("alpha_bar", lambda T: 1 - cosine(T) / torch.cat([torch.ones(1), cosine(T)[:-1]]),
     "those are the betas"),
    ("step", lambda x_t, eps, ab, ab_prev, fresh: ab_prev * (
        x_t - (1 - ab) ** 0.5 * eps) / ab ** 0.5 + (1 - ab_prev) * eps, "the factors are roots"),
])
def test_a_usual_mistake_is_named(task, wrong, words, capsys):
    code, said, _ = graded("modify", {**MODIFIED, task: wrong}, capsys)
    assert code == 1 and words in said.pop(task) and set(said.values()) == {"right"}


# ---- Create

def factors(alpha_bar, t):
    left = alpha_bar[t].view(-1, 1, 1, 1)
    return left.sqrt(), (1 - left).sqrt()


def noisy(x_0, t, noise, alpha_bar):
    image, other = factors(alpha_bar, t)
    return image * x_0 + other * noise


def loss(model, x_0, t, noise, alpha_bar):
    return (model(noisy(x_0, t, noise, alpha_bar), t) - noise).square().mean()


def learn(model, images, alpha_bar, steps, rate=2e-3, batch=32, most=1000, noise=None,
          together=False, zero=True):
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for _ in range(steps):
        x_0, t = images[torch.randint(len(images), (batch,))], torch.randint(most, (batch,))
        t = (_ * 7 % 1000 + 0 * t) if together else t
        if zero:
            optimizer.zero_grad()
        loss(model, x_0, t, torch.randn_like(x_0) if noise is None else noise, alpha_bar).backward()
        optimizer.step()


def draw(model, x, alpha_bar, steps, clean=1.0):
    levels = [*range(len(alpha_bar) - 1, -1, -len(alpha_bar) // steps)]
    for now, left in zip(levels, [*alpha_bar[levels[1:]], torch.tensor(clean)]):
        t = torch.full((len(x),), now)
        image, other = factors(alpha_bar, t)
        eps = model(x, t)
        x = left.sqrt() * (x - other * eps) / image + (1 - left).sqrt() * eps
    return x


CREATED = dict(noisy=noisy, loss=loss, learn=learn, draw=draw)


def test_a_model_of_ones_own_is_right_and_draws_digits(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(grader, "ROOT", tmp_path)
    code, said, out = graded("create", CREATED, capsys)
    assert (code == 0 and set(said.values()) == {"right"}
            and "64 digits by a sampler of yours" in out)
    assert (tmp_path / "outputs" / "exercises" / "my_digits.png").is_file()


@pytest.mark.parametrize("task, wrong, words", [
    ("noisy", lambda x_0, t, noise, ab: ab[t].sqrt() * x_0 + (1 - ab[t]).sqrt() * noise,
     "shape [B, 1, 1, 1]"),
    ("noisy", lambda x_0, t, noise, ab: noisy(x_0, t, noise, ab ** 2), "wrong: up to"),
    ("noisy", lambda x_0, t, noise, ab: noisy(noise, t, x_0, ab), "image and noise are exchanged"),
    ("noisy", lambda x_0, t, noise, ab: noisy(noise, t, x_0, 1 - ab), "right"),
    ("loss", lambda model, x_0, t, noise, ab: (model(x_0, t) - noise).square().mean(),
     "shown the clean images"),
    ("loss", lambda model, x_0, t, noise, ab: loss(model, x_0, t, noise, ab) * noise.numel(),
     "not the sum"),
    ("loss", lambda model, x_0, t, noise, ab: noise.mean(), "is asked 0 times"),
    ("loss", lambda model, x_0, t, noise, ab: loss(
        lambda x, t: model(x, 0 * t), x_0, t, noise, ab), "is told t ="),
    ("loss", lambda *args: loss(*args) + 0 * loss(*args), "asked 2 times"),
    ("loss", lambda *args: loss(*args).detach(), "no gradient"),
    ("learn", lambda *args: learn(*args, rate=0.0), "no weight has changed"),
    ("learn", lambda model, images, *rest: learn(model, images[:32], *rest), "few images"),
    ("learn", lambda *args: learn(*args, noise=torch.randn(32, 1, 16, 16)),
     "the same noise comes twice"),
    ("learn", lambda *args: learn(*args, together=True), "same t"),
    ("learn", lambda *args: learn(*args[:3], 5), "5 times"),
    ("learn", lambda *args: learn(*args, batch=8), "32 images a step"),
    ("learn", lambda *args: learn(*args, most=10), "t took 10 values"),
    ("learn", lambda *args: learn(*args, rate=1e-6), "below 0.1 is usual"),
    ("learn", lambda *args: learn(*args, zero=False), "set to zero before each step"),
    ("draw", lambda model, x, ab, steps: draw(model, x, ab, steps, clean=float(ab[-1])),
     "takes for the noisiest"),
    ("draw", lambda model, x, ab, steps: draw(model, x, ab, steps, clean=float(ab[0])),
     "a little noise is left"),
    ("draw", lambda model, x, ab, steps: draw(model, x, ab, 10), "called 10 times"),
    ("draw", lambda model, x, ab, steps: draw(lambda x, t: model(x, t[:1]), x, ab, steps),
     "of shape (1,)"),
    ("draw", lambda model, x, ab, steps: draw(lambda x, t: model(x, t - 1), x, ab, steps),
     "the levels are [998"),
])
def test_a_usual_mistake_in_a_model_of_ones_own_is_named(task, wrong, words, capsys):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(grader.EXERCISES, "create", {task: grader.CREATE[task]})
        patch.setattr(grader, "draw_digits", lambda draw: None)
        if words not in ("few images", "set to zero before each step"):    # these need time to show
            patch.setattr(grader, "LEARN_STEPS", 40)
        _, said, _ = graded("create", {"draw": None, task: wrong}, capsys)
    assert words in said[task]


def test_inputs_may_be_changed_in_place(capsys):
    in_place = dict(MODIFIED,
                    target=lambda x, noise, ab: noise.mul_(ab ** 0.5).sub_(x * (1 - ab) ** 0.5),
                    guided=lambda with_class, without, g: without.lerp_(with_class, g))
    code, said, _ = graded("modify", in_place, capsys)
    assert code == 0 and set(said.values()) == {"right"}
    cheat = dict(MODIFIED, target=lambda x, noise, ab: (noise.zero_(), x.zero_())[0])
    assert "wrong" in graded("modify", cheat, capsys)[1]["target"]


def test_digits_that_cannot_be_drawn_are_a_line(capsys, monkeypatch, tmp_path):
    (tmp_path / "outputs").write_text("a file")
    monkeypatch.setattr(grader, "ROOT", tmp_path)
    monkeypatch.setitem(grader.EXERCISES, "create", {"draw": grader.CREATE["draw"]})
    code, _, out = graded("create", CREATED, capsys)
    assert code == 0 and "but no 64 digits can be drawn by it" in out
