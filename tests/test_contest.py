"""The contest is long; here is what can be seen of it in seconds."""

import argparse

import pytest
import torch

import contest
from conftest import fails


def test_a_training_ends_with_its_time(monkeypatch):
    """On a clock of its own, which a step moves on by a sixteenth of a second."""
    images = torch.randint(256, (50, 1, 8, 8), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(0))
    batches, shares, now = [], [], [5.0]
    monkeypatch.setattr(contest.time, "perf_counter", lambda: now[0])

    def step(x_0, share):
        now[0] += 1 / 16
        batches.append(x_0)
        shares.append(share)
        return torch.zeros(())

    seen, seconds = contest.train_for(0.25, 20, images, torch.device("cpu"), torch.float32, "test",
                                      step)
    assert seconds == 0.25 and seen == sum(map(len, batches))
    assert shares == [0, 0.25, 0.5, 0.75]
    epoch = torch.cat(batches[:2])                  # no image twice, in [-1, 1]
    assert (len(epoch.flatten(1).unique(dim=0)) == 40 and -1 <= epoch.min() < -0.9
            and 0.9 < epoch.max() <= 1)


@pytest.mark.parametrize("name, package", [
    ("ddpm_pytorch", "denoising_diffusion_pytorch"), ("diffusers", "diffusers")])
def test_another_library_trains_and_draws_or_is_named(name, package, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(contest.importlib.util, "find_spec", lambda wanted: None)
    assert f"pip install {package}" in fails(capsys, contest.main, "--entrants", name,
                                             "--output_dir", tmp_path)
    monkeypatch.undo()
    pytest.importorskip(package)
    monkeypatch.setattr(contest, "STEPS", 2)
    images = torch.randint(256, (40, 1, 28, 28), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(0))
    args = argparse.Namespace(minutes=0.02, num_images=3, seed=0)
    entry = contest.ENTRANTS[name](args, images, torch.device("cpu"), torch.float32)
    assert entry.images > 0 and entry.seconds >= 1.2 and entry.samples.shape == (3, 1, 28, 28)
    assert entry.samples.isfinite().all() and entry.samples.abs().max() < 1.5


def test_too_few_minutes_for_our_preset_are_refused(monkeypatch):
    monkeypatch.setattr(contest, "measure_seconds", lambda *given, **settings: (0.1, 0.1))
    images = torch.zeros(64, 1, 28, 28, dtype=torch.uint8)
    with pytest.raises(ValueError, match="fewer than the preset takes to warm up"):
        contest.enter_quick(argparse.Namespace(minutes=0.01, num_images=3, seed=0), images,
                            torch.device("cpu"), torch.float32)
