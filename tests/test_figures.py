"""The figures show what was computed, and the samplers' errors are those against the truth."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

import convergence
import data
import edit
import evaluate
import interpolate
import run_figures
import sample
import sampling_figures
import visualize_diffusion as figures
from checkpoint import save_checkpoint
from conftest import LEVELS, fails, write_model
from convergence import MIXTURES, even_noise, exact_denoiser, exact_flow, solver_errors
from diffusion import DiffusionProcess, seeded_noise
from figures import step_rows
from images import save_images, to_uint8, wrapped
from load import load_model
from predictors import NO_PREDICTION, predictor_errors
from schedules import SPACINGS


# Another weight and spread for each, so that none can be left out.
LOPSIDED = [(0.3, -0.5, 0.1), (0.7, 0.6, 0.25)]


@pytest.fixture
def checkpoint(tmp_path):
    return write_model(tmp_path / "model.pt")


@pytest.fixture
def drawn(monkeypatch):
    """What is handed to save_strip: a dict of its arguments, of the last call."""
    seen = {}

    def spy(rows, labels, path, row_labels=None, title=None):
        seen.update(rows=rows, labels=labels, row_labels=row_labels, title=title)
    for module in (figures, run_figures, sampling_figures):
        monkeypatch.setattr(module, "save_strip", spy)
    return seen


@pytest.fixture
def run(tmp_path):
    """A run's folder: sheets, a grey for each epoch and image; losses; a model that answers 0."""
    folder = tmp_path / "run"
    for name in ("samples", "checkpoints"):
        (folder / name).mkdir(parents=True)
    for epoch in (1, 2, 10):
        grey = torch.linspace(-1, 0.8, 9).view(9, 1, 1, 1) + epoch / 100
        save_images(grey.expand(9, 1, 8, 8), folder / "samples" / f"epoch_{epoch:03d}.png")
        write_model(folder / "checkpoints" / f"model_epoch_{epoch:03d}.pt", zero=epoch == 1)
    write_model(folder / "model_final.pt")
    (folder / "training_loss.csv").write_text(
        "step,loss,learning_rate,held_out_loss\n1,0.5,0.1,\n2,0.25,0.1,0.75\n")
    return folder


def sampled(checkpoint, count=3, **settings):
    model, diffusion, _ = load_model(checkpoint)
    return diffusion.sample(model, 8, count, y=torch.arange(count) % 3, **settings)


# ---- Schedules

def test_a_title_keeps_within_its_figure():
    assert max(map(len, wrapped("word " * 60, 4).splitlines())) <= 48 and wrapped(None, 4) == ""


def test_the_printed_table_has_the_known_numbers(tmp_path, capsys):
    figures.main(["--figure", "schedules", "--output_dir", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    rows = {int(line.split()[0]): [float(word) for word in line.split()[1:5]]
            for line in lines[1:8]}
    assert list(rows) == list(LEVELS)
    for t, want in LEVELS.items():
        assert rows[t] == [pytest.approx(want[0], rel=0.02), pytest.approx(want[1], abs=0.006),
                           pytest.approx(want[2], rel=0.02), pytest.approx(want[3], abs=0.006)]
    assert "linear t = 259, cosine t = 496, sigmoid t = 499" in lines[8]
    assert Image.open(tmp_path / "schedules.png").width > 1000


# ---- Solvers against the exact flow

def test_the_exact_flow_of_one_gaussian_is_the_closed_form():
    x_T, ((_, mean, std),), ab = even_noise(200), MIXTURES["one Gaussian"], 0.3
    want = mean + std * (x_T - math.sqrt(ab) * mean) / math.sqrt(std**2 * ab + 1 - ab)
    torch.testing.assert_close(exact_flow(MIXTURES["one Gaussian"], x_T, ab), want,
                               atol=1e-12, rtol=0)


def test_the_exact_flow_of_two_gaussians_is_what_runge_and_kutta_find():
    """The probability-flow equation for y = x / sqrt(alpha_bar) at noise s is
    dy / ds = -s grad log p (Karras et al. 2022, eq. 1); here along u = log s, in 600 steps of
    fourth order, the gradient taken by autograd."""
    mixture, ab = LOPSIDED, 0.01

    def slope(y, u):
        y = y.detach().requires_grad_()
        logs = [math.log(w) - 0.5 * math.log(s**2 + math.exp(2 * u))
                - (y - m)**2 / (2 * (s**2 + math.exp(2 * u))) for w, m, s in mixture]
        grad, = torch.autograd.grad(torch.logsumexp(torch.stack(logs), 0).sum(), y)
        return -math.exp(2 * u) * grad

    x_T = even_noise(40)
    first, last, steps = 0.5 * math.log((1 - ab) / ab), math.log(1e-4), 600
    y, h = x_T / math.sqrt(ab), (last - first) / steps
    for k in range(steps):
        u = first + k * h
        a = slope(y, u)
        b = slope(y + h / 2 * a, u + h / 2)
        c = slope(y + h / 2 * b, u + h / 2)
        y = y + h / 6 * (a + 2 * b + 2 * c + slope(y + h * c, u + h))
    torch.testing.assert_close(exact_flow(mixture, x_T, ab), y, atol=1e-6, rtol=0)  # left: s = 1e-4


def test_the_exact_denoiser_is_the_mean_of_what_could_have_been():
    """E[x_0 | x_t] by Bayes' rule, summed over a fine grid of x_0."""
    mixture, diffusion = LOPSIDED, DiffusionProcess(1000, objective="x0")
    grid = np.linspace(-3, 3, 20001)
    prior = sum(w / s * np.exp(-(grid - m)**2 / (2 * s**2)) for w, m, s in mixture)
    for t in (5, 200, 600, 999):
        ab = float(diffusion.alpha_bar[t])
        for x_t in (-1.5, 0.1, 0.9):
            weight = prior * np.exp(-(x_t - math.sqrt(ab) * grid)**2 / (2 * (1 - ab)))
            x = torch.tensor([[[[x_t]]]], dtype=torch.float64)
            got = exact_denoiser(mixture, diffusion)(x, torch.tensor([t]))
            assert float(got) == pytest.approx((weight * grid).sum() / weight.sum(), abs=1e-9)


def test_errors_fall_with_the_order_of_the_sampler():
    """Against a Gaussian's exact flow DDIM's error halves from 10 to 20, 40, 80 steps."""
    errors = solver_errors(MIXTURES["one Gaussian"], solvers=("ddim", "dpmpp_2m"),
                           spacings=("log_snr",), evaluations=(10, 20, 40, 80), count=100)
    ddim, fast = errors["ddim", "log_snr"], errors["dpmpp_2m", "log_snr"]
    assert all(1.7 < a / b < 2.3 for a, b in zip(ddim, ddim[1:])), ddim
    assert all(a < b / 5 for a, b in zip(fast, ddim))


@pytest.mark.parametrize("spacing", sorted(SPACINGS))
def test_an_error_is_the_distance_of_a_plain_loop_of_ddim(spacing):
    """Song et al. 2021, eq. 12, on the Gaussian, with its denoiser and its flow written out."""
    diffusion, ((_, mean, std),) = DiffusionProcess(), MIXTURES["one Gaussian"]
    ab, x = diffusion.alpha_bar.numpy(), even_noise(50).numpy()
    want = mean + std * (x - math.sqrt(ab[-1]) * mean) / math.sqrt(std**2 * ab[-1] + 1 - ab[-1])
    levels = diffusion.timesteps(7, spacing)
    for a, b in zip(ab[levels[:-1]], [*ab[levels[1:-1]], 1.0]):
        eps = math.sqrt(1 - a) * (x - math.sqrt(a) * mean) / (std**2 * a + 1 - a)
        x = math.sqrt(b / a) * (x - math.sqrt(1 - a) * eps) + math.sqrt(1 - b) * eps
    errors = solver_errors(MIXTURES["one Gaussian"], solvers=("ddim",), spacings=(spacing,),
                           evaluations=(7,), count=50)
    assert errors["ddim", spacing] == [pytest.approx(np.abs(x - want).mean(), rel=1e-6)]


def test_the_solvers_table_has_a_row_for_each_sampler_and_spacing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figures, "EVALUATIONS", (5, 10))
    figures.main(["--figure", "solvers", "--num_timesteps", "60", "--output_dir", str(tmp_path)])
    said = capsys.readouterr().out
    want = solver_errors(MIXTURES["two Gaussians"], 60, solvers=("ipndm",), evaluations=(5, 10))
    for spacing in SPACINGS:
        for sampler in convergence.SOLVERS:
            assert said.count(f"\n{sampler:10}{spacing:10}") == 2
        assert (f"ipndm     {spacing:10}" + "".join(f"{e:>9.1e}" for e in want["ipndm", spacing])
                in said)
    assert Image.open(tmp_path / "solvers.png").height > 800


# ---- Figures of a model

def test_the_reverse_figure_has_the_loops_own_levels_and_ends_with_the_sample(checkpoint, tmp_path,
                                                                              monkeypatch):
    seen = []
    monkeypatch.setattr(sampling_figures, "save_generation_strip",
                        lambda frames, *args, **settings: seen.extend(frames))
    figures.main(["--figure", "reverse", "--checkpoint", str(checkpoint), "--steps", "10",
                  "--seed", "5", "--num_images", "3", "--timesteps", "39", "30", "12", "0",
                  "--output_dir", str(tmp_path)])
    assert [t for t, _, _ in seen] == [39, 31, 11, 3, -1]    # ddim in 10 steps: 39, 35, 31, ... 3
    assert torch.equal(seen[-1][1], sampled(checkpoint, seed=5, sampler="ddim", steps=10))
    assert torch.equal(seen[0][1], seeded_noise(5, range(3), 0, (1, 8, 8)))
    with Image.open(tmp_path / "reverse_process.gif") as gif:
        assert gif.n_frames == 5


def test_the_step_explained_is_equation_7_of_ho_and_the_step_that_the_loop_makes(checkpoint):
    """The mean from betas and products in numpy, as the paper has them."""
    model, diffusion, _ = load_model(checkpoint)
    step = figures.explain_step(model, diffusion, 25, image_size=8, seed=3, y=torch.tensor([1]))
    betas = np.linspace(1e-4 * 25, 0.02 * 25, 40)
    ab = np.cumprod(1 - betas)
    assert (step["t"], step["t_prev"]) == (25, 24)
    eps = model(step["x_t"][None], torch.tensor([25]), torch.tensor([1]))[0]
    torch.testing.assert_close(step["eps"], eps, atol=1e-4, rtol=1e-4)
    x_0 = ((step["x_t"] - math.sqrt(1 - ab[25]) * eps) / math.sqrt(ab[25])).clamp(-1, 1)
    mean = (math.sqrt(ab[24]) * betas[25] / (1 - ab[25]) * x_0
            + math.sqrt(1 - betas[25]) * (1 - ab[24]) / (1 - ab[25]) * step["x_t"])
    torch.testing.assert_close(step["mean"], mean, atol=1e-5, rtol=0)
    assert step["sigma"] == pytest.approx(math.sqrt((1 - ab[24]) / (1 - ab[25]) * betas[25]))
    torch.testing.assert_close(step["x_prev"], mean + step["sigma"] * step["noise"],
                               atol=1e-5, rtol=0)
    assert 0.7 < float(step["noise"].std()) < 1.3


def test_the_numbers_printed_for_one_pixel_add_up(checkpoint, tmp_path, capsys):
    figures.main(["--figure", "one_step", "--checkpoint", str(checkpoint), "--timesteps", "20",
                  "--label", "c", "--output_dir", str(tmp_path)])
    sums = [line.split("  ")[-1].split(" = ")
            for line in capsys.readouterr().out.splitlines() if " * " in line]
    assert len(sums) == 3
    for how, value in sums:
        assert eval(how) == pytest.approx(float(value), abs=5e-4)   # of numbers with four digits
    assert Image.open(tmp_path / "one_step.png").height > 1000


def test_steps_are_compared_from_the_same_noise(checkpoint, tmp_path, drawn, capsys):
    figures.main(["--figure", "steps", "--checkpoint", str(checkpoint),
                  "--steps_list", "4", "20", "40", "--seed", "2", "--num_images", "3",
                  "--output_dir", str(tmp_path)])
    found = torch.stack(list(drawn["rows"]), dim=1)
    for steps, images, label in zip((4, 20, 40), found, drawn["labels"], strict=True):
        assert torch.equal(images, sampled(checkpoint, seed=2, sampler="ddim", steps=steps))
        assert label.startswith(f"{steps} steps\n") and label.endswith(" s")
    said = capsys.readouterr().out
    assert "64 calls of the model on 3 images" in said and "0.0000 (root mean square)" in said


def test_default_steps_end_with_all_that_the_process_has(tmp_path, drawn):
    path = write_model(tmp_path / "t.pt", T=60)
    figures.main(["--figure", "steps", "--checkpoint", str(path), "--num_images", "1",
                  "--output_dir", str(tmp_path)])
    assert [label.split()[0] for label in drawn["labels"]] == ["50", "60"]


def test_a_seed_gives_the_same_pictures_twice_and_other_seeds_give_others(checkpoint, tmp_path,
                                                                          drawn, capsys):
    figures.main(["--figure", "seeds", "--checkpoint", str(checkpoint), "--seeds", "7", "8",
                  "--steps", "5", "--num_images", "3", "--output_dir", str(tmp_path)])
    a, again, b, _ = drawn["rows"]
    assert (torch.equal(a, again)
            and torch.equal(b, sampled(checkpoint, seed=8, sampler="ddim", steps=5)))
    assert drawn["row_labels"] == ["seed 7", "again: equal", "seed 8", "again: equal"]
    apart = math.sqrt(float(((a - b)**2).mean()))
    assert apart > 0.1 and f"seeds 7 and 8 are nearest, {apart:.4f}" in capsys.readouterr().out


def test_a_seed_that_gives_other_pictures_the_second_time_is_told(checkpoint, tmp_path, drawn,
                                                                  monkeypatch, capsys):
    monkeypatch.setattr(sampling_figures, "generate",
                        lambda *args, **settings: (torch.randn(8, 1, 8, 8), []))
    figures.main(["--figure", "seeds", "--checkpoint", str(checkpoint),
                  "--output_dir", str(tmp_path)])
    assert "again: NOT equal" in drawn["row_labels"] and "NOT equal" in capsys.readouterr().out


def test_explore_writes_the_four_explorations(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "SYNTHETIC_SIZE", 12)
    out = tmp_path / "out"
    figures.main(["--figure", "explore", "--checkpoint", str(checkpoint),
                  "--steps_list", "2", "4", "--steps", "4", "--num_images", "2",
                  "--output_dir", str(out)])
    names = ["forward_diffusion.png", "reverse_process.gif", "reverse_process.png",
             "seeds_compared.png", "steps_compared.png"]
    said = capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == names
    assert all(f"wrote {out / name}\n" in said for name in names)


# ---- Figures of data and of a run

def test_the_dataset_figure_has_a_row_for_each_class(tmp_path, drawn):
    images = torch.arange(30).view(30, 1, 1, 1).expand(30, 1, 4, 4).to(torch.uint8)
    figures.dataset_figure(images, torch.arange(30) % 3, ["a", "b", "c"], tmp_path / "x.png",
                           columns=11)
    assert drawn["row_labels"] == ["a", "b", "c"]
    for k, row in enumerate(drawn["rows"]):
        shades = to_uint8(row)[:, 0, 0, 0].tolist()
        # a class of ten: one blank
        assert sorted(shades[:10]) == list(range(k, 30, 3)) and shades[10] == 255
    figures.dataset_figure(images, None, None, tmp_path / "x.png", columns=4)
    assert len(drawn["rows"]) == 8 and drawn["row_labels"] is None


def test_the_epochs_figure_shows_the_pixels_of_the_runs_own_sheets(run, tmp_path, drawn):
    figures.main(["--figure", "epochs", "--run", str(run), "--num_images", "3",
                  "--output_dir", str(tmp_path)])
    assert drawn["labels"] == ["epoch 1", "epoch 2", "epoch 10"] and len(drawn["rows"]) == 3
    for i, row in enumerate(drawn["rows"]):
        for epoch, image in zip((1, 2, 10), row):
            want = round((torch.linspace(-1, 0.8, 9)[i].item() + epoch / 100 + 1) * 127.5)
            assert image.shape == (3, 8, 8) and set(to_uint8(image).flatten().tolist()) == {want}


@pytest.mark.parametrize("num_images, shown", [(12, 12), (16, 14)])
def test_epochs_take_more_than_a_row_of_a_sheet_and_no_gap_of_its_last(num_images, shown, run,
                                                                       tmp_path, drawn, capsys):
    """14 pictures lie in four rows of four."""
    greys = torch.linspace(-1, 0.8, 14)
    for sheet in (run / "samples").iterdir():
        save_images(greys.view(14, 1, 1, 1).expand(14, 1, 8, 8), sheet)
    figures.main(["--figure", "epochs", "--run", str(run), "--num_images", str(num_images),
                  "--output_dir", str(tmp_path)])
    assert torch.equal(to_uint8(torch.stack([row[0, 0, 0, 0] for row in drawn["rows"]])),
                       to_uint8(greys[:shown]))
    assert ("the sheets hold 14 pictures" in capsys.readouterr().out) == (num_images > 14)


def test_a_device_that_nobody_asked_for_is_not_as_asked(checkpoint, tmp_path, capsys):
    for flags, asked in (([], False), (["--device", "cpu"], True)):
        figures.main(["--figure", "one_step", "--checkpoint", str(checkpoint), *flags,
                      "--steps", "2", "--output_dir", str(tmp_path)])
        assert ("as asked" in capsys.readouterr().out) == asked


def test_a_stranger_in_the_folder_of_a_run_is_no_file_of_it(run):
    (run / "model_fine.pt").write_bytes(b"x")
    (run / "samples" / "epoch_by_epoch.png").write_bytes(b"x")
    assert run_figures.found_in(run, "model_final.pt", "model_latest.pt") == [
        run / "model_final.pt"]
    assert [path.name for path in run_figures.found_in(run, "samples/*.png")] == [
        "epoch_001.png", "epoch_002.png", "epoch_010.png"]


def test_the_predictors_of_a_process_without_a_model(data_dir, tmp_path, capsys):
    figures.main(["--figure", "predictors", "--dataset", "mnist", "--data_dir", data_dir,
                  "--num_timesteps", "200", "--beta_start", "1e-4", "--beta_end", "0.02",
                  "--image_size", "32", "--num_images", "50", "--output_dir", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    found = [float(word) for word in next(
        line for line in lines if line.startswith(NO_PREDICTION)).split()[-4:]]
    # of 28x28, computed elsewhere
    assert found == pytest.approx([0.04, 0.27, 0.65, 1.06], abs=0.03)
    assert (tmp_path / "predictors.png").is_file() and not any(
        "the model" in line for line in lines)


def test_many_sheets_are_thinned_out_towards_the_end():
    assert run_figures.spread_out(list(range(5)), 8) == [0, 1, 2, 3, 4]
    few = run_figures.spread_out(list(range(100)), 8)
    assert len(few) <= 8 and few[0] == 0 and few[-1] == 99 and few == sorted(few) and few[2] < 10


def test_the_loss_figure_reads_what_train_wrote(run, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(run_figures, "plot_losses", lambda *args: seen.extend(args))
    figures.main(["--figure", "loss", "--run", str(run), "--output_dir", str(tmp_path)])
    assert seen == [[0.5, 0.25], tmp_path / "loss.png", {2: 0.75}]


def test_epochs_of_a_single_picture_are_shown(run, tmp_path):
    for sheet in (run / "samples").iterdir():
        save_images(torch.zeros(1, 1, 8, 8), sheet)
    figures.main(["--figure", "epochs", "--run", str(run), "--output_dir", str(tmp_path)])
    assert (tmp_path / "epochs.png").is_file()


@pytest.mark.parametrize("end, names", [
    ({"model_final.pt": 6}, ["step 4", "the end"]), ({"model_final.pt": 4}, ["step 4"]),
    ({"model_final.pt": 2, "model_latest.pt": 5}, ["step 4", "the end"]),       # prolonged
    ({"model_final.pt": 2}, ["step 4"]), ({}, ["step 4"])])
def test_a_map_of_losses_ends_where_the_run_does(end, names, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    numbered = tmp_path / "checkpoints" / "model_step_0000004.pt"
    for path, step in ((numbered, 4), *((tmp_path / name, step) for name, step in end.items())):
        save_checkpoint(path, {"step": step, "losses": torch.arange(step) / 7})
    assert [*map(run_figures.when, run_figures.with_the_end([numbered], tmp_path))] == names


def test_a_model_that_predicts_no_noise_has_loss_one_at_every_level(run, tmp_path, monkeypatch):
    """The target is unit Gaussian; and the other checkpoints' losses are those of a plain loop."""
    seen = {}
    monkeypatch.setattr(data, "SYNTHETIC_SIZE", 200)
    monkeypatch.setattr(figures, "timestep_loss_figure", lambda edges, losses, names, *rest:
                        seen.update(edges=edges, losses=losses, names=names))
    figures.main(["--figure", "loss_by_timestep", "--run", str(run), "--num_images", "130",
                  "--output_dir", str(tmp_path)])
    assert (seen["edges"] == list(range(0, 41, 2))
            and seen["names"] == ["epoch 1", "epoch 2", "epoch 10"])
    # 130 x 64 numbers: 0.016 and more
    assert seen["losses"][0] == pytest.approx([1.0] * 20, abs=0.08)
    assert seen["losses"][1] == seen["losses"][2] != seen["losses"][0]
    model, diffusion, _ = load_model(run / "model_final.pt")
    random, x_0 = torch.Generator().manual_seed(9), torch.zeros(6, 1, 8, 8)
    _, losses = figures.loss_by_timestep(model, diffusion, x_0, ranges=2, seed=9)
    for low, loss in zip((0, 20), losses):
        noise, total = torch.randn(x_0.shape, generator=random), 0.0
        for k, t in enumerate(np.round(np.linspace(low, low + 19, 6)).astype(int)):
            x_t = math.sqrt(1 - float(diffusion.alpha_bar[t])) * noise[k:k + 1]
            total += float(((model(x_t, torch.tensor([t])) - noise[k:k + 1])**2).mean()) / 6
        assert loss == pytest.approx(total, rel=1e-4)


def test_the_heat_map_is_drawn(tmp_path):
    figures.timestep_loss_figure([0, 500, 1000], [[0.5, 0.1], [0.2, 0.01]], ["epoch 5", "epoch 10"],
                                 tmp_path / "x.png", "a title")
    assert Image.open(tmp_path / "x.png").width > 500


# ---- Predictors

POWER = 0.925  # the mean square of MNIST's pixels in [-1, 1]


def shades(count=50, size=32):
    """Images of as many pixels above zero as below, with the mean square of MNIST."""
    signs = torch.rand(count, 1, size, size, generator=torch.Generator().manual_seed(1)) - 0.5
    return signs.sign() * math.sqrt(POWER)


def test_simple_predictors_score_what_the_formulas_say():
    """Of 50 images of 1x32x32, T = 200, betas not scaled, in four ranges, as in a known lesson."""
    diffusion = DiffusionProcess(200, beta_start=1e-4, beta_end=0.02)
    edges, errors = predictor_errors(diffusion, shades())
    assert edges == [0, 50, 100, 150, 200]
    a2 = np.cumprod(1 - np.linspace(1e-4, 0.02, 200))
    copy = ((1 - np.sqrt(1 - a2))**2 + a2 * POWER).reshape(4, 50).mean(1)
    for name, want in {"zero": [1] * 4, "random noise": [2] * 4, "the noise itself": [0] * 4,
                       "the input, x_t": copy, NO_PREDICTION: [0.04, 0.27, 0.65, 1.06]}.items():
        assert errors[name] == pytest.approx(list(want), abs=0.025), name   # 51,200 draws: +- 0.01
    assert "the model" not in errors


@pytest.mark.parametrize("objective", ["eps", "x0", "v"])
def test_the_noise_that_a_model_sees_follows_from_its_objective(objective):
    """A model that answers 0 says: no noise; x_0 = 0, so all of x_t is noise; or that v is 0."""
    diffusion = DiffusionProcess(200, "cosine", objective)
    _, errors = predictor_errors(diffusion, shades(), lambda x_t, t, y=None: torch.zeros_like(x_t),
                                 ranges=2)
    a2 = DiffusionProcess(200, "cosine").alpha_bar.numpy()
    want = {"eps": np.ones(200), "v": a2**2 + a2 * (1 - a2) * POWER}
    if objective == "x0":                       # a^2 / (1 - a^2) grows without end towards t = 0
        last = slice(100, 200)
        assert errors["the model"][1] == pytest.approx(
            (a2 / (1 - a2) * POWER)[last].mean(), rel=0.02)
    else:
        assert errors["the model"] == pytest.approx(
            list(want[objective].reshape(2, 100).mean(1)), abs=0.025)


def test_the_predictors_are_printed_and_drawn(checkpoint, tmp_path, capsys):
    figures.main(["--figure", "predictors", "--checkpoint", str(checkpoint),
                  "--dataset", "synthetic_digits", "--output_dir", str(tmp_path),
                  "--num_images", "100"])
    printed = capsys.readouterr().out
    assert ("100 images of synthetic_digits" in printed
            or "100 test images of synthetic_digits" in printed)
    rows = {line[:22].strip(): line[22:].split()
            for line in printed.splitlines() if line[22:].strip()}
    assert rows["t"] == ["0-9", "10-19", "20-29", "30-39"]
    assert (all(abs(float(error) - 1) < 0.05 for error in rows["zero"])
            and len(rows["the model"]) == 4)
    assert Image.open(tmp_path / "predictors.png").width > 600


# ---- Mistakes

@pytest.mark.parametrize("argv, words", [
    (["--figure", "heads"], "invalid choice: 'heads'"),
    (["--timesteps", "1000"], "--timesteps 1000: there are 0 to 999"),
    (["--timesteps", "5", "5"], "each once"), (["--timesteps", "-1"], "no whole number"),
    (["--figure", "seeds", "--seeds", "1", "1"],
     "--seeds takes up to 20 numbers, each once; got 2: 1 1"),
    (["--num_images", "65"], "at most 64"),
    (["--figure", "solvers", "--num_timesteps", "4"], "fewest evaluations compared are 5"),
    (["--figure", "reverse", "--checkpoint", "no.pt"], "no checkpoint at no.pt"),
    (["--figure", "reverse", "--label", "7"], "unknown class '7'"),
    (["--figure", "steps", "--steps_list", "41"], "from 1 to 40 (the number of timesteps), got 41"),
    (["--figure", "one_step", "--steps", "1"], "--steps 2 or more"),
    (["--figure", "explore", "--timesteps", "40"], "--timesteps 40: there are 0 to 39"),
    (["--figure", "loss", "--run", "nowhere"], "no training_loss.csv of a training in nowhere"),
    (["--figure", "epochs", "--run", "nowhere"],
     "no model_final.pt or model_latest.pt of a training in nowhere"),
    (["--figure", "loss_by_timestep", "--run", "nowhere"],
     "no checkpoints/*.pt of a training in nowhere")])
def test_what_cannot_be_drawn_is_one_line(argv, words, checkpoint, tmp_path, capsys):
    figure = argv[1] if argv[0] == "--figure" else "forward"
    used = figures.FIGURES[figure].flags if figure in figures.FIGURES else "checkpoint dataset"
    flags = (["--checkpoint", checkpoint] * ("checkpoint" in used)
             + ["--dataset", "synthetic_digits"] * ("dataset" in used))
    assert words in fails(capsys, figures.main, *flags, *argv, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_explore_shows_the_folder_that_a_model_was_trained_on(tmp_path, capsys, monkeypatch):
    (tmp_path / "photos").mkdir()
    for k in range(3):
        Image.new("L", (8, 8), 80 * k).save(tmp_path / "photos" / f"{k}.png")
    path, shown = write_model(tmp_path / "model.pt", name=str(tmp_path / "photos")), []
    monkeypatch.setattr(figures, "forward_figure",
                        lambda images, *rest, **settings: shown.append(images))
    monkeypatch.setattr(figures, "EXPLORE", ("forward", "one_step"))
    figures.main(["--figure", "explore", "--checkpoint", str(path),
                  "--output_dir", str(tmp_path / "o")])
    assert sorted(shown[0][:, 0, 0, 0].tolist()) == [0, 80, 160]
    capsys.readouterr()
    path = write_model(tmp_path / "model.pt", name="no/such/photos")
    assert "'no/such/photos'" in fails(capsys, figures.main, "--figure", "explore",
                                       "--checkpoint", path, "--output_dir", tmp_path / "o")
    # then others will do: the noise that they sink into is the same
    figures.main(["--figure", "explore", "--checkpoint", str(path),
                  "--dataset", str(tmp_path / "photos"), "--output_dir", str(tmp_path / "o")])
    assert len(shown) == 2


def test_a_step_is_told_in_figures_that_are_not_rounded_away():
    """The first of two steps divides by 0.0064, by 4e-5 with other schedules: it read 0.0000."""
    step = {name: torch.zeros(1, 2, 2) for name in ("x_t", "eps", "x_0", "mean", "noise", "x_prev")}
    numbers = dict(signal_weight=4e-5, noise_weight=1.0, to_x_0=0.5, to_x_t=0.5, sigma=0.1)
    rows = step_rows({**step, **numbers, "t": 999, "t_prev": 499, "objective": "v"})[1]
    assert "/ 4e-05" in rows[2][3]


def test_a_foreign_table_or_sheet_is_one_line(run, tmp_path, capsys):
    (run / "training_loss.csv").write_text("a,b\n1,2\n")
    assert "not a table that train.py wrote" in fails(capsys, figures.main, "--figure", "loss",
                                                      "--run", run, "--output_dir", tmp_path)
    Image.new("RGB", (500, 300)).save(run / "samples" / "epoch_002.png")
    assert "is no sheet of 8x8 images" in fails(capsys, figures.main, "--figure", "epochs",
                                                "--run", run, "--output_dir", tmp_path)


def test_nothing_is_written_among_the_images_that_a_model_was_trained_on(tmp_path, capsys):
    """A figure would be one image more, and the run could not be resumed. Nor is a folder made
    there: it would count as a class."""
    (tmp_path / "photos").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "photos" / "a.png")
    write_model(tmp_path / "x.pt", name=str(tmp_path / "photos"))
    for command, flags in ((figures, ["--figure", "reverse"]), (sample, ["--single_images"]),
                           (interpolate, ["--frames", "2"]), (edit, []), (evaluate, [])):
        for output in ("photos", "photos/new"):
            said = fails(capsys, command.main, *flags, "--checkpoint", tmp_path / "x.pt",
                         "--device", "cpu", "--output_dir", tmp_path / output)
            assert "are not apart" in said
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["a.png"]
