"""Training further: rates, accumulation, flips, presets, held-out images, several processes."""

import contextlib
import csv
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from PIL import Image

import distributed
import presets
import session
import train as train_module
from checkpoint import load_checkpoint
from conftest import ROOT, TINY, fails, sheets, weights
from data import Batches, get_dataset, split_held_out
from diffusion import DiffusionProcess
from folders import FITS
from images import to_signed
from load import load_model
from loop import held_out_loss, rate_at, train_epoch, train_step
from models import MODEL_FLAGS, create_model
from plan import make_plan
from presets import PRESETS, as_flags
from reference import load_reference
from sample import generate
from train import main, train
from training_data import TrainingData, load_training_data
from utils import count_parameters, seed_step, shuffled


@pytest.fixture
def settings_of(monkeypatch):
    """What train() is called with for given flags."""
    def settings_of(*argv):
        seen = {}
        monkeypatch.setattr(train_module, "train", lambda **settings: seen.update(settings))
        main(list(argv))
        return seen
    return settings_of


def furthest(a, b):
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


# ---- Rates

@pytest.mark.parametrize("warmup", [0, 10])
def test_the_cosine_rate_is_torchs(warmup):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50 - warmup)]
    if warmup:
        rise = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, 1.0, total_iters=warmup - 1)
        schedules = [rise, *schedules]
    reference = torch.optim.lr_scheduler.SequentialLR(optimizer, schedules,
                                                      milestones=[warmup] if warmup else [])
    for step in range(50):
        assert rate_at(step, 50, 0.3, "cosine", warmup) == pytest.approx(
            optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        reference.step()


def test_the_constant_rate_is_constant_after_the_warm_up():
    assert [rate_at(k, 9, 1.0, warmup=4) for k in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert {rate_at(k, 9, 0.5) for k in range(9)} == {0.5}


def test_the_optimizer_steps_at_the_rate_of_its_step(tiny_model):
    """SGD at rate 0 stands still; only step 12 of the run has another."""
    before, batches = weights(tiny_model), Batches(torch.zeros(24, 1, 8, 8, dtype=torch.uint8),
                                                   batch_size=8)
    optimizer = torch.optim.SGD(tiny_model.parameters(), lr=1.0)
    train_epoch(tiny_model, batches, optimizer, DiffusionProcess(), "cpu", rate=lambda k: 0.0,
                first_step=10)
    assert furthest(before, weights(tiny_model)) == 0
    train_epoch(tiny_model, batches, optimizer, DiffusionProcess(), "cpu",
                rate=lambda k: float(k == 12), first_step=10)
    assert furthest(before, weights(tiny_model)) > 0 and optimizer.param_groups[0]["lr"] == 1.0


# ---- Steps

@pytest.mark.parametrize("accumulate", [2, 3, 8])
def test_accumulating_gradients_changes_memory_and_not_the_step(accumulate):
    """Also when the parts are unequal: 8 images in 3 parts."""
    results = []
    for parts in (1, accumulate):
        torch.manual_seed(0)
        model = create_model(base_channels=8)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(3):
            seed_step(0, step)
            loss = train_step(model, torch.rand(8, 1, 8, 8), torch.zeros(8).long(), optimizer,
                              DiffusionProcess(), accumulate=parts)
        results.append((float(loss), weights(model)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert furthest(results[0][1], results[1][1]) < 1e-6


def test_the_optimizer_sees_batch_size_times_accumulation(few_digits, tmp_path):
    *_, losses = train(**few_digits, **TINY, accumulate=2, num_epochs=1, output_dir=tmp_path)
    assert len(losses) == 64 // (16 * 2)


def test_the_average_can_be_updated_every_few_steps(few_digits, tmp_path):
    train(**few_digits, **TINY, steps=7, ema_every=3, output_dir=tmp_path)
    assert load_checkpoint(tmp_path / "model_final.pt")["ema_updates"] == 2


@pytest.mark.parametrize("name, decays", [("adam", False), ("adamw", True)])
def test_adamw_pulls_the_weights_towards_zero(name, decays, few_digits, tmp_path):
    """Decoupled decay shrinks by lr * decay a step, whatever the gradient; 0 leaves Adam alone."""
    runs = [weights(train(**few_digits, **TINY, optimizer=name, weight_decay=decay,
                          learning_rate=1e-3, steps=1, output_dir=tmp_path / str(decay))[0])
            for decay in (0.0, 0.1)]
    torch.manual_seed(0)
    initial = weights(create_model(base_channels=8, time_emb_dim=16, num_classes=10))
    shrunk = [free - 1e-4 * start for free, start in zip(runs[0], initial)]
    assert (furthest(runs[1], shrunk) < 1e-6) == decays


@pytest.mark.slow
def test_compiling_changes_no_name_and_hardly_a_number(few_digits, tmp_path):
    _, _, plain = train(**few_digits, **TINY, steps=2, output_dir=tmp_path / "a")
    _, _, compiled = train(**few_digits, **TINY, steps=2, compile=True, output_dir=tmp_path / "b")
    assert compiled == pytest.approx(plain, rel=1e-4)
    entries = [load_checkpoint(tmp_path / run / "model_final.pt") for run in "ab"]
    assert list(entries[0]["model"]) == list(entries[1]["model"])


@pytest.mark.parametrize("name, settings", [("simple", {}), ("attention", {"groups": 8})])
def test_a_network_with_classes_is_compiled_in_one_piece(name, settings):
    """It looked at the classes to refuse those that there are not: the graph was cut in two, and
    torch said so in seventeen lines."""
    model = create_model(name, base_channels=16, num_classes=3, **settings)
    x, t, y = torch.randn(2, 1, 28, 28), torch.tensor([5, 900]), torch.tensor([-1, 2])
    compiled = torch.compile(model, fullgraph=True, backend="eager")        # raises at a cut graph
    torch.testing.assert_close(compiled(x, t, y), model(x, t, y))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("compile", [False, True])
def test_a_gpu_trains_with_everything_switched_on(compile, few_digits, tmp_path):
    settings = dict(TINY, device="cuda", precision="bf16", model_name="attention", base_channels=16,
                    groups=8)
    *_, losses = train(**few_digits, **settings, accumulate=2, flip=True, val_fraction=0.25,
                       grad_clip=1.0, dropout=0.1, steps=3, compile=compile, output_dir=tmp_path)
    model, diffusion, facts = load_model(tmp_path / "model_best.pt", "cuda")
    images, _ = generate(model, diffusion, 3, facts["image_size"], steps=5, device="cuda")
    assert len(losses) == 3 and images.isfinite().all() and images.device.type == "cuda"


# ---- Batches

def test_flips_mirror_about_half_and_depend_on_the_step_alone():
    images = torch.zeros(400, 1, 1, 2, dtype=torch.uint8)
    images[..., 0] = 255
    runs = [torch.cat([x[torch.argsort(y)] for x, y in Batches(
        images, torch.arange(400), batch_size=40, seed=1, flip=True)]) for _ in range(2)]
    mirrored = sum(int((x[..., 0] == -1).sum()) for x in runs[:1])
    assert torch.equal(*runs) and 160 < mirrored < 240
    assert {tuple(row.flatten().tolist()) for row in runs[0]} == {(1.0, -1.0), (-1.0, 1.0)}
    plain = Batches(images, batch_size=40, seed=1)
    assert all((x[..., 0] == 1).all() for x, _ in plain)


def test_turns_show_all_eight_positions_equally_often_and_keep_images_whole():
    image = torch.tensor([[0, 100], [255, 50]], dtype=torch.uint8)
    images = image.expand(4000, 1, 2, 2).contiguous()
    shown = torch.cat([x for x, _ in Batches(images, batch_size=400, seed=1, turn=True)])
    counts = Counter(tuple(x.flatten().tolist()) for x in (shown[:, 0] + 1) * 127.5)
    corners = [(0, 0), (0, 1), (1, 1), (1, 0)]                      # once around the square
    around = [int(image[corner]) for corner in corners]
    wanted = set()
    for ring in (around, around[::-1]):
        for k in range(4):
            turned = dict(zip(corners, ring[k:] + ring[:k]))
            wanted.add(tuple(turned[corner] for corner in ((0, 0), (0, 1), (1, 0), (1, 1))))
    assert {tuple(map(round, x)) for x in counts} == wanted and len(wanted) == 8
    assert all(420 < count < 580 for count in counts.values())      # 500 +- 21
    again = torch.cat([x for x, _ in Batches(images, batch_size=400, seed=1, turn=True)])
    assert torch.equal(shown, again)


def test_a_stream_can_be_entered_at_any_step():
    images = torch.arange(20, dtype=torch.uint8).view(20, 1, 1, 1)

    def labels(first, count):
        stream = Batches(images, torch.arange(20), batch_size=6, seed=3).stream(first)
        return [next(stream)[1].tolist() for _ in range(count)]
    whole = labels(0, 9)
    assert labels(4, 5) == whole[4:] and labels(3, 6) == whole[3:]
    assert all(len({*a, *b, *c}) == 18 for a, b, c in (whole[0:3], whole[3:6], whole[6:9]))
    assert whole[0:3] != whole[3:6]


# ---- Held-out images

def test_held_out_images_are_taken_from_the_set_and_kept_apart():
    kept, held = split_held_out(100, 0.2, seed=5)
    assert len(held) == 20 and sorted([*kept.tolist(), *held.tolist()]) == list(range(100))
    assert torch.equal(held, split_held_out(100, 0.2, seed=5)[1])
    assert not torch.equal(held, split_held_out(100, 0.2, seed=6)[1])
    assert len(split_held_out(100, 0.0)[1]) == 0
    with pytest.raises(ValueError, match="--val_fraction 0"):
        split_held_out(9, 0.05)
    images = torch.arange(100, dtype=torch.uint8).view(100, 1, 1, 1)
    batches = Batches(images, torch.arange(100), batch_size=10, indices=held)
    labels = torch.cat([y for _, y in batches])
    assert len(batches) == 2 and sorted(labels.tolist()) == held.tolist()
    again = torch.cat([y for _, y in batches])                  # another epoch
    assert sorted(again.tolist()) == held.tolist() and not torch.equal(again, labels)
    x_0, y = next(iter(batches))
    assert torch.equal(to_signed(images[y]), x_0)


def test_the_held_out_loss_of_simple_predictors_is_known(tiny_model):
    """Zero misses unit noise by 1; the noise itself by 0 (FACTS: whatever the timestep)."""
    images = (torch.rand(50, 1, 8, 8) * 255).to(torch.uint8)
    batches, diffusion = Batches(images, batch_size=16), DiffusionProcess()
    seen = []

    def zero(x_t, t, y=None):
        seen.append(t)
        return torch.zeros_like(x_t)

    def perfect(x_t, t, y=None):
        first = 16 * (len(seen) - 4)
        seen.append(t)
        signal, noise = diffusion._weights(t)
        return (x_t - signal * to_signed(images[first:first + 16])) / noise
    assert held_out_loss(zero, batches, diffusion, "cpu") == pytest.approx(1.0, abs=0.05)
    met = torch.cat(seen).tolist()                              # evenly over 0..999
    assert sorted(met) == [10 + 20 * k for k in range(50)] and met != sorted(met)
    assert held_out_loss(perfect, batches, diffusion, "cpu") == pytest.approx(0.0, abs=1e-6)
    assert (held_out_loss(tiny_model, batches, diffusion, "cpu")
            == held_out_loss(tiny_model, batches, diffusion, "cpu"))


def test_the_best_weights_by_the_held_out_loss_are_kept(few_digits, tmp_path, monkeypatch, capsys):
    values = iter([0.5, 0.2, 0.4, 0.3])
    monkeypatch.setattr(session, "held_out_loss", lambda *args: next(values))
    train(**few_digits, **TINY, val_fraction=0.25, num_epochs=4, output_dir=tmp_path)
    best = load_checkpoint(tmp_path / "model_best.pt")
    assert best["epoch"] == 2 and best["step"] == 6
    assert best["held_out_losses"].tolist() == [[3, 0.5], [6, 0.2]]
    assert "48 images" in capsys.readouterr().out
    rows = list(csv.DictReader(open(tmp_path / "training_loss.csv")))
    assert [row["held_out_loss"] for row in rows] == [
        "", "", "0.5", "", "", "0.2", "", "", "0.4", "", "", "0.3"]


def test_held_out_images_can_come_from_a_folder(few_digits, tmp_path):
    (tmp_path / "in").mkdir()
    for k in range(5):
        Image.new("RGB", (40, 30), (40 * k, 0, 0)).save(tmp_path / "in" / f"{k}.png")
    train(**few_digits, **TINY, val_dir=str(tmp_path / "in"), num_epochs=1,
          output_dir=tmp_path / "out")
    assert len(load_checkpoint(tmp_path / "out" / "model_best.pt")["held_out_losses"]) == 1


@pytest.mark.parametrize("labels", [None, True])
@pytest.mark.parametrize("sorted_into, same", [
    (None, False), (tuple("0123456789"), True), (("a", "b"), False)])
def test_held_out_images_keep_their_classes_where_those_are_the_models(few_digits, tmp_path, labels,
                                                                       sorted_into, same):
    for k in range(20):
        folder = tmp_path / "val" / (sorted_into[k % len(sorted_into)] if sorted_into else "")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (40, 30), 10 * k).save(folder / f"{k}.png")
    found = load_training_data("synthetic_digits", labels=labels, val_dir=tmp_path / "val",
                               image_size=16)
    assert len(found.classes) == 10 and found.held_out.num_images == 20
    assert sorted(found.held_out.labels.tolist()) == (
        sorted([*range(10)] * 2) if same else [-1] * 20)


def test_the_held_out_images_of_a_named_set_are_its_test_set(few_digits, tmp_path):
    """Those of --val_dir, also where evaluate.py looks for them; never the training images."""
    folder = str(sheets(tmp_path / "in", 10))
    found = load_training_data(folder, val_dir="synthetic_digits", image_size=16)
    test_images, _ = get_dataset("synthetic_digits", train=False, image_size=16)
    assert torch.equal(found.held_out.images, test_images)
    facts = found.facts(dict(fit="crop", flip=False, turn=False, seed=0))
    told = {**facts["data"], **{key: facts["settings"][key] for key in ("images", "held_out")}}
    real = load_reference(told, "data")
    assert torch.equal(real.held, test_images[shuffled(len(test_images))])
    assert real.what == "images of synthetic_digits"


@pytest.mark.parametrize("setting", ["model_name", "optimizer", "lr_schedule", "fit"])
def test_an_unknown_word_is_refused_with_the_choices(setting, tmp_path):
    with pytest.raises(ValueError, match=f"unknown {setting} 'best'; choose from .*, "):
        train(**{setting: "best"}, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- The table of losses, and when things are written

def test_the_table_holds_every_step_once(few_digits, tmp_path):
    *_, losses = train(**few_digits, **TINY, steps=10, sample_every=3, lr_schedule="cosine",
                       output_dir=tmp_path)
    rows = list(csv.DictReader(open(tmp_path / "training_loss.csv")))
    assert [int(row["step"]) for row in rows] == list(range(1, 11))
    assert [float(row["loss"]) for row in rows] == pytest.approx(losses, rel=1e-5)
    assert [float(row["learning_rate"]) for row in rows] == pytest.approx(
        [rate_at(k, 10, 2e-4, "cosine") for k in range(10)], rel=1e-5)


def test_a_run_by_steps_writes_by_steps(few_digits, tmp_path):
    train(**few_digits, **TINY, steps=10, sample_every=4, save_every=6, output_dir=tmp_path)
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == [
        "step_0000004.png", "step_0000008.png", "step_0000010.png"]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["model_step_0000006.pt"]


def test_a_run_by_epochs_writes_by_epochs(few_digits, tmp_path):
    train(**few_digits, **TINY, num_epochs=5, sample_every=2, save_every=3, output_dir=tmp_path)
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == [
        "epoch_002.png", "epoch_004.png", "epoch_005.png"]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["model_epoch_003.pt"]


def test_the_number_of_steps_does_not_depend_on_what_is_written(few_digits, tmp_path):
    runs = [train(**few_digits, **TINY, steps=7, sample_every=every,
                  output_dir=tmp_path / str(every)) for every in (1, 3, 7)]
    assert all(furthest(weights(runs[0][0]), weights(run[0])) == 0 for run in runs)


def test_a_plan_counts_its_pictures():
    plan = make_plan(468, 20)
    assert (plan.total_steps, plan.count(plan.sample_every),
            plan.count(plan.save_every)) == (9360, 20, 4)
    plan = make_plan(468, 20, steps=100_000, sample_every=1000, save_every=1500)
    assert (plan.count(plan.sample_every), plan.name(2000)) == (100, "step_0002000")
    assert [plan.next_report(step) for step in (0, 1000, 1500, 99_999)] == [
        1000, 1500, 2000, 100_000]
    assert plan.num_reports() == 100 + 66 - 33
    for steps, apart in ((150, 150), (250, 200), (1000, 200), (8000, 1600)):
        assert make_plan(468, 20, steps=steps)[:3] == (steps, apart, apart)


def test_an_odd_number_of_steps_is_not_reported_on_at_every_one():
    """A common divisor of the intervals would be 1: a plot and a held-out loss after every step."""
    plan = make_plan(468, 20, steps=1001)
    assert plan.num_reports() == 5


def test_the_cost_that_is_told_adds_up(tiny_model, monkeypatch, capsys):
    """A fourth of 40 steps is done. Of those left each takes 2 s, every tenth draws a set of
    pictures (50 calls of 3 s) and looks at half as many held-out images as that set has (1.5 s):
    30 * 2 + 3 * (150 + 1.5) = 514.5 s."""
    monkeypatch.setattr(train_module, "measure_seconds", lambda *args, **settings: (2.0, 3.0))
    monkeypatch.setattr(train_module, "peak_memory", lambda device: 5e9)
    data = TrainingData("zeros", None, None, *(
        Batches(torch.zeros(count, 1, 8, 8, dtype=torch.uint8), batch_size=16)
        for count in (160, 32)))
    train_module.tell_cost(make_plan(10, 4), 10, tiny_model, data, DiffusionProcess(),
                           num_samples=64, optimizer="adam", compiled=False)
    said = capsys.readouterr().out
    for words in ("an epoch is 10 steps of 16 images, about 20 s here (8 images/s)",
                  "the 30 steps left about 8.6 min", "2.5 min for each set of pictures",
                  "5.0 GB of memory"):
        assert words in said


# ---- Presets

def has(settings, **wanted):
    return {name: settings[name] for name in wanted} == wanted


def test_the_defaults_are_the_documented_ones(settings_of):
    assert has(settings_of(), dataset_name=None, num_epochs=20, steps=None, batch_size=128,
               learning_rate=2e-4, timesteps=1000, schedule="linear", objective="eps",
               optimizer="adam", lr_schedule="constant", grad_clip=None, num_samples=64)


def test_the_presets_have_the_documented_numbers(settings_of, monkeypatch):
    """Written out: beside the table itself any typing error is right."""
    fabrics = dict(batch_size=32, accumulate=2, optimizer="adam", beta2=0.99, ema_decay=0.995,
                   ema_every=10, grad_clip=1.0, flip=True, schedule="sigmoid", objective="v",
                   timesteps=1000, image_size=64, channels=3)
    assert has(settings_of("--preset", "fabrics_500k"), **fabrics, steps=500_000,
               learning_rate=8e-5, sample_every=25_000, save_every=25_000)
    assert has(settings_of("--preset", "fabrics_100k"), **fabrics, steps=100_000,
               learning_rate=2e-4, sample_every=1000, save_every=1000)
    for device, batch_size in (("cpu", 8), ("cuda", 32)):
        monkeypatch.setattr(presets, "get_device", lambda name: torch.device(device))
        assert has(settings_of("--preset", "ct", "--dataset", "x"), batch_size=batch_size,
                   num_epochs=60, optimizer="adamw", learning_rate=2e-4, weight_decay=1e-4,
                   lr_schedule="cosine", ema_decay=0.9995, grad_clip=1.0, image_size=64, channels=1)


def test_the_length_of_a_run_is_told_with_its_preset(settings_of, capsys):
    for flag, other in (("--steps", "--epochs"), ("--epochs", "--steps")):
        settings_of("--preset", "quick", flag, "60")
        words = capsys.readouterr().out.split()
        assert words[:2] == ["preset", "quick:"] and words[words.index(flag) + 1] == "60"
        assert other not in words


def test_every_preset_is_what_its_flags_say(settings_of, tmp_path):
    for name, row in PRESETS.items():
        row = {k: v for k, v in row.items() if k != "without_gpu"}
        if row.setdefault("dataset", "mnist") is None:
            row["dataset"] = str(tmp_path)
        by_flags = settings_of(*as_flags(row).split(), "--device", "cpu")
        by_name = settings_of("--preset", name, "--dataset", row["dataset"], "--device", "cpu")
        assert by_name == {**by_flags, **PRESETS[name].get("without_gpu", {}),
                           "draw_with": presets.DRAW_WITH.get(name)}, name


@pytest.mark.parametrize("name, count", [
    ("mnist", 1_971_137), ("fashion_mnist", 1_971_137), ("ct", 12_356_161),
    ("fabrics_500k", 34_146_243), ("fabrics_100k", 34_146_243)])
def test_presets_build_the_networks_of_the_documents(name, count, settings_of, tmp_path):
    settings = settings_of("--preset", name, "--dataset", str(tmp_path))
    config = {flag: settings[flag] for flag in MODEL_FLAGS if flag in settings}
    with torch.device("meta"):
        model = create_model(settings["model_name"], image_channels=settings["channels"] or 1,
                             **config)
    assert count_parameters(model) == count


def test_explicit_flags_win_over_the_preset(settings_of):
    settings = settings_of("--preset", "fabrics_100k", "--lr", "1e-3", "--no-flip",
                           "--multipliers", "1,2,2,2")
    assert (settings["learning_rate"] == 1e-3 and settings["flip"] is False
            and settings["batch_size"] == 32)
    assert settings["multipliers"] == (1, 2, 2, 2) and settings["steps"] == 100_000
    settings = settings_of("--preset", "fabrics_100k", "--epochs", "2")
    assert (settings["steps"] is None and settings["num_epochs"] == 2
            and settings["sample_every"] is None)
    settings = settings_of("--preset", "fabrics_500k", "--steps", "400000")
    assert settings["steps"] == 400_000 and settings["save_every"] == 25_000
    settings = settings_of("--preset", "ct", "--dataset", "x", "--steps", "9", "--device", "cpu")
    assert settings["steps"] == 9 and settings["batch_size"] == 8                 # 32 with a GPU
    assert settings_of("--preset", "fabrics_100k", "--steps", "20")["ema_every"] == 1
    assert settings_of("--preset", "quick", "--steps", "60")["warmup"] == 6


@pytest.mark.parametrize("argv, words", [
    (["--preset", "nonsense"], "invalid choice"), (["--preset", "ct"], "--dataset FOLDER"),
    (["--epochs", "3", "--steps", "9"], "give one of them"),
    (["--multipliers", "1,x"], "list of numbers"),
    (["--dropout", "0.1"], "dropout"), (["--model", "attention", "--groups", "7"], "groups"),
    (["--channels", "2"], "channels"), (["--beta2", "1"], "beta2"), (["--fit", "bend"], FITS[0]),
    (["--warmup", "500", "--epochs", "2"], "shorter than the run of"),
    (["--val_fraction", "1"], "leaves nothing"),
    (["--val_dir", "no/such/folder"], "no/such/folder")])
def test_bad_settings_are_one_line(argv, words, few_digits, tmp_path, capsys):
    if "--preset" not in argv:
        argv = ["--dataset", "synthetic_digits", *argv]
    assert words in fails(capsys, main, *argv, "--output_dir", tmp_path)


# ---- Several processes

SHARED = dict(dataset_name="synthetic_digits", batch_size=16, image_size=8, steps=20, accumulate=2,
              grad_clip=1.0, base_channels=16, device="cpu", precision="float32", num_samples=4,
              ema_decay=0.9)
WORKER = f"""
import sys, torch, data, distributed
data.SYNTHETIC_SIZE = 64
from diffusion import DiffusionProcess
from train import train
seen, plain = [], DiffusionProcess.training_loss
def note(self, model, x_0, *args):
    seen.extend(hash(tuple(row.flatten().tolist())) for row in x_0)
    return plain(self, model, x_0, *args)
DiffusionProcess.training_loss = note
out = sys.argv[1]
model, ema, losses = train(**{SHARED}, output_dir=out)
rank, world = distributed.place()
torch.save(dict(model=model.state_dict(), ema=ema.state_dict(), losses=losses, seen=seen),
           out + "/rank" + str(rank) + ".pt")
distributed.leave()
"""


@pytest.mark.usefixtures("few_digits")
def test_two_processes_train_the_same_model_as_one(tmp_path):
    """torchrun, gloo: equal weights in both, those of one process to 1e-4; rank 0 alone speaks."""
    model, ema, losses = train(**SHARED, output_dir=tmp_path / "alone")
    alone, out = {"model": model.state_dict(), "ema": ema.state_dict()}, tmp_path / "out"
    (tmp_path / "worker.py").write_text(WORKER)
    run = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                          "--nproc_per_node=2", str(tmp_path / "worker.py"), str(out)],
                         capture_output=True, text=True, timeout=300,
                         env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr[-2000:]
    first, second = (torch.load(out / f"rank{rank}.pt") for rank in range(2))
    for part in ("model", "ema"):
        for name, value in first[part].items():
            assert torch.equal(value, second[part][name])
            torch.testing.assert_close(value, alone[part][name], atol=1e-4, rtol=0)
    assert first["losses"] == second["losses"] == pytest.approx(losses, abs=1e-4)
    per_epoch = 64 // 32 * 32 // 2                              # what each of two sees of 64 images
    for part in (first, second):
        del part["seen"][:-10 * per_epoch]                      # the steps that measured the speed
    for epoch in range(10):
        here = slice(epoch * per_epoch, (epoch + 1) * per_epoch)
        images = first["seen"][here] + second["seen"][here]
        assert len(images) == len(set(images)) == 64            # every image once
    assert run.stdout.count("device: cpu") == 1 and "2 processes" in run.stdout
    assert run.stdout.count("model_final.pt") == 1


@pytest.mark.parametrize("rank, order", [(0, ["reads", "waits"]), (1, ["waits", "reads"])])
def test_the_first_process_reads_and_the_others_find_it_done(rank, order, monkeypatch):
    """They also meet after an error, which would else leave the others waiting for hours."""
    seen = []
    monkeypatch.setattr(distributed, "place", lambda: (rank, 2))
    monkeypatch.setattr(distributed.dist, "barrier", lambda: seen.append("waits"))
    with pytest.raises(ValueError):
        with distributed.first_rank_first():
            seen.append("reads")
            raise ValueError
    assert seen == order


def test_a_batch_that_cannot_be_shared_equally_is_refused(tmp_path, monkeypatch, few_digits):
    monkeypatch.setattr(distributed, "place", lambda: (0, 3))
    monkeypatch.setattr(distributed, "first_rank_first", contextlib.nullcontext)
    with pytest.raises(ValueError, match="shared equally by 3"):
        train(**few_digits, **TINY, num_epochs=1, output_dir=tmp_path)
