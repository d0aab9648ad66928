"""A run that is stopped, killed or broken loses nothing, and goes on as if nothing had happened."""

import copy
import enum
import math
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
import data
import loop
import session
import train as train_module
from checkpoint import check_settings, load_checkpoint, save_checkpoint
from conftest import ROOT, fails, make_small, same
from diffusion import DiffusionProcess
from export import export
from loop import train_step
from muon import is_inner
from running import FINAL, LATEST, Signals, Stopped, find_checkpoint, only_run
from train import main, train

# 64 images, 48 of them trained on, 12 of them at a time: 4 steps an epoch. Everything random is on.
RUN = dict(dataset_name="synthetic_digits", image_size=8, batch_size=6, accumulate=2, num_epochs=3,
           learning_rate=1e-3, model_name="attention", base_channels=8, multipliers=(1, 2),
           num_blocks=1, attention_levels=(1,), heads=2, groups=4, time_emb_dim=16, dropout=0.2,
           flip=True, val_fraction=0.25, optimizer="adamw", weight_decay=0.01, lr_schedule="cosine",
           warmup=3, grad_clip=1.0, ema_every=2, num_samples=2, save_every=2, seed=7, device="cpu",
           precision="float32")


Colour = enum.Enum("Colour", {"RED": "red"}, type=str)
Size = enum.IntEnum("Size", {"SMALL": 1})


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These networks are too small to be shared by threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    make_small(monkeypatch)


def stop_before(step, monkeypatch, error=Stopped(signal.SIGTERM)):
    """Let train() meet `error` before this step of the run, not where only speed is measured."""
    steps, plain = [], loop.train_step

    def stopping(model, x_0, y, optimizer, *args, **settings):
        if optimizer.param_groups[0]["lr"] > 0:
            steps.append(1)
            if len(steps) == step + 1:
                raise error
        return plain(model, x_0, y, optimizer, *args, **settings)
    monkeypatch.setattr(loop, "train_step", stopping)


def after(step):
    """What find_checkpoint looks at in a checkpoint after so many steps."""
    return {"step": step, "losses": torch.arange(step) / 7}


def is_folder(descriptor):
    """Is an open file a folder?"""
    return stat.S_ISDIR(os.fstat(descriptor).st_mode)


def files(folder):
    """What a run has left: tables and pictures as bytes, checkpoints as their entries."""
    return {str(p.relative_to(folder)): load_checkpoint(p) if p.suffix == ".pt" else p.read_bytes()
            for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What the run leaves that never stops."""
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        folder = tmp_path_factory.mktemp("whole")
        train(**RUN, output_dir=folder)
    return files(folder)


# ---- Going on

@pytest.mark.parametrize("step", [4, 11])
def test_a_run_resumed_at_any_step_is_bit_for_bit_the_run_that_never_stopped(step, whole, tmp_path,
                                                                             monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_before(step, patch)
        train(**RUN, output_dir=tmp_path)
    assert load_checkpoint(tmp_path / LATEST)["step"] == step
    train(**RUN, output_dir=tmp_path, resume="latest")
    assert same(files(tmp_path), whole)


@pytest.mark.parametrize("optimizer, base_channels", [("adam", 8), ("muon", 32)])
def test_a_run_of_every_optimizer_is_resumed_bit_for_bit(optimizer, base_channels, tmp_path,
                                                         monkeypatch):
    """Muon moves matrices of 32 rows and more in a way of its own; a smaller network has none."""
    settings = {**RUN, "optimizer": optimizer, "base_channels": base_channels, "num_epochs": 1,
                "weight_decay": 0.0}
    model, _, _ = train(**settings, output_dir=tmp_path / "whole")
    assert any(map(is_inner, model.parameters())) == (optimizer == "muon")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_before(2, patch)
        train(**settings, output_dir=tmp_path / "stopped")
    train(**settings, output_dir=tmp_path / "stopped", resume="latest")
    assert same(files(tmp_path / "stopped"), files(tmp_path / "whole"))


def test_a_run_stopped_twice_and_between_its_files_is_still_the_same(whole, tmp_path, monkeypatch):
    """Once while the picture of epoch 1 is drawn, once in epoch 3."""
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        def stopping(*args):
            raise Stopped(signal.SIGINT)
        patch.setattr(session, "sample_images", stopping)
        train(**RUN, output_dir=tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_before(5, patch)
        train(**RUN, output_dir=tmp_path, resume="latest")
    assert load_checkpoint(tmp_path / LATEST)["step"] == 9
    train(**RUN, output_dir=tmp_path, resume="latest")
    assert same(files(tmp_path), whole)


def test_a_finished_run_can_be_prolonged(tmp_path):
    plain = {**RUN, "lr_schedule": "constant"}
    train(**plain, output_dir=tmp_path / "long")
    train(**{**plain, "num_epochs": 1}, output_dir=tmp_path / "short")
    train(**plain, output_dir=tmp_path / "short", resume="latest")
    a, b = (load_checkpoint(tmp_path / name / "model_final.pt") for name in ("long", "short"))
    assert same(a, b)


def test_the_mean_loss_that_is_told_is_that_of_the_steps_since_the_last_report(tmp_path, capsys):
    settings = {**RUN, "lr_schedule": "constant", "save_every": None, "val_fraction": 0.0}
    losses = train(**settings, steps=6, output_dir=tmp_path)[2]
    assert f"step 6/6: mean loss {np.mean(losses):.4f}" in capsys.readouterr().out
    losses = train(**settings, steps=10, output_dir=tmp_path, resume="latest")[2]
    assert f"step 10/10: mean loss {np.mean(losses[6:]):.4f}" in capsys.readouterr().out


def test_changed_settings_are_refused_with_both_values(whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_before(2, patch)
        train(**RUN, output_dir=tmp_path)
    for change in (dict(learning_rate=5e-4), dict(batch_size=4), dict(num_epochs=9), dict(seed=8),
                   dict(dropout=0.1)):
        with pytest.raises(ValueError, match="other settings") as error:
            train(**{**RUN, **change}, output_dir=tmp_path, resume="latest")
        (name, value), = change.items()
        # a cosine's length is part of it
        name = {"num_epochs": "total_steps", "learning_rate": "lr"}.get(name, name)
        assert name in str(error.value) and (name == "total_steps"
                                             or f"{value!r} now" in str(error.value))
    train(**{**RUN, "num_samples": 3}, output_dir=tmp_path, resume="latest")
    assert same(load_checkpoint(tmp_path / "model_final.pt")["model"],
                whole["model_final.pt"]["model"])


def test_fewer_epochs_than_are_done_are_refused(tmp_path):
    plain = {**RUN, "lr_schedule": "constant"}
    train(**{**plain, "num_epochs": 2}, output_dir=tmp_path)
    with pytest.raises(ValueError, match="is at step 8, beyond the 4"):
        train(**{**plain, "num_epochs": 1}, output_dir=tmp_path, resume="latest")


def test_losses_and_weights_agree_when_the_signal_comes_after_the_last_step(tiny_model,
                                                                            monkeypatch):
    """The step is counted when taken: a signal while the losses are fetched must not lose it."""
    losses, images, plain = [], torch.zeros(16, 1, 8, 8, dtype=torch.uint8), torch.stack

    def stopping(values, *args):
        if len(values) == 2:                # the losses; the norms of the gradients are more
            raise Stopped(signal.SIGINT)
        return plain(values, *args)
    monkeypatch.setattr(torch, "stack", stopping)
    with pytest.raises(Stopped):
        loop.train_epoch(tiny_model, data.Batches(images, batch_size=8), torch.optim.SGD(
            tiny_model.parameters(), lr=0.1), DiffusionProcess(), "cpu", losses=losses)
    assert len(losses) == 2


# ---- Whose folder it is

def test_an_unfinished_run_is_not_replaced_unasked(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_before(5, patch)
        train(**RUN, output_dir=tmp_path)
    assert "--resume" in capsys.readouterr().out
    with pytest.raises(ValueError, match="unfinished run.*--resume.*--overwrite"):
        train(**RUN, output_dir=tmp_path)
    train(**{**RUN, "num_epochs": 1}, output_dir=tmp_path, overwrite=True)
    assert [p.name for p in (tmp_path / "samples").iterdir()] == ["epoch_001.png"]


def test_a_run_killed_between_its_saves_goes_on_from_its_last_checkpoint(whole, tmp_path,
                                                                         monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_before(9, patch)
        train(**RUN, output_dir=tmp_path)
    (tmp_path / LATEST).unlink()
    with pytest.raises(ValueError, match="unfinished run"):
        train(**RUN, output_dir=tmp_path)
    train(**RUN, output_dir=tmp_path, resume="latest")
    assert same(files(tmp_path), whole)


@pytest.mark.parametrize("latest, numbers, goes_on_from", [
    (4, (8,), "model_step_0000008.pt"), (9, (8,), LATEST),
    (None, (995, 1000), "model_step_1000.pt")])
def test_the_checkpoint_that_came_farthest_is_the_one_to_go_on_from(latest, numbers, goes_on_from,
                                                                    tmp_path):
    """After kill -9 the latest may be five minutes older than a numbered one; 995 precedes 1000."""
    (tmp_path / "checkpoints").mkdir()
    if latest:
        save_checkpoint(tmp_path / LATEST, after(latest))
    for number in numbers:
        width = 7 if latest else 3
        save_checkpoint(tmp_path / "checkpoints" / f"model_step_{number:0{width}d}.pt",
                        after(number))
    assert find_checkpoint(tmp_path, "latest", False)[0].name == goes_on_from


def test_a_damaged_checkpoint_does_not_hide_a_good_one_and_units_are_not_mixed(tmp_path, capsys):
    """50 steps were lost to a number of another unit, and all to a truncated file by a good one."""
    (tmp_path / "checkpoints").mkdir()
    for name, step in {LATEST: 4, "checkpoints/model_step_0000300.pt": 300,
                       "checkpoints/model_epoch_050.pt": 350, "model_best.pt": 360}.items():
        save_checkpoint(tmp_path / name, after(step))
    assert find_checkpoint(tmp_path, "latest", False)[0].name == "model_best.pt"
    (tmp_path / "model_best.pt").write_bytes((tmp_path / "model_best.pt").read_bytes()[:200])
    (tmp_path / "checkpoints" / "model_epoch_051.pt").mkdir()
    assert find_checkpoint(tmp_path, "latest", False)[0].name == "model_epoch_050.pt"
    assert "passed over" in capsys.readouterr().out
    for path in [*tmp_path.glob("*.pt"), *tmp_path.glob("checkpoints/*.pt")]:
        if path.is_file():
            path.write_bytes(b"no")
    with pytest.raises(ValueError, match="model_(best|step|epoch|latest)"):
        find_checkpoint(tmp_path, "latest", False)


@pytest.mark.parametrize("value, wanted", [
    (np.float32(1.5), 1.5), (np.int64(3), 3), (np.bool_(True), True), (Colour.RED, "red"),
    (Size.SMALL, 1), (torch.Size([1, 2]), (1, 2)), ({np.int64(1): 2.0}, {1: 2.0}),
    ([np.float64(2)], [2.0])])
def test_what_is_saved_is_plain_and_can_be_read_again(value, wanted, tmp_path):
    save_checkpoint(tmp_path / "x.pt", {"step": value})
    assert load_checkpoint(tmp_path / "x.pt")["step"] == wanted


@pytest.mark.parametrize("value", [np.longdouble(1), np.complex64(1j), np.datetime64("2026-01-01"),
                                   1j, b"x", {1}])
def test_what_could_not_be_read_again_is_not_saved(value, tmp_path):
    with pytest.raises(TypeError, match="plain values"):
        save_checkpoint(tmp_path / "x.pt", {"step": [value]})
    assert not (tmp_path / "x.pt").exists()


def test_a_setting_that_cannot_be_saved_is_told_before_the_training(tmp_path, monkeypatch):
    stop_before(0, monkeypatch, AssertionError("it trains"))
    with pytest.raises(TypeError, match="grad_clip"):
        train(**{**RUN, "grad_clip": np.array(1.0)}, output_dir=tmp_path)


def test_numbers_of_numpy_are_saved_as_numbers(tmp_path):
    """A sweep over np.geomspace trained to the end and wrote files that nothing could read."""
    rate, = np.geomspace(1e-3, 1e-2, 1)
    train(**{**RUN, "num_epochs": 1, "learning_rate": rate, "seed": np.int64(3),
             "multipliers": [1, 2], "base_channels": np.int64(8), "grad_clip": np.float32(1)},
          output_dir=tmp_path)
    saved = load_checkpoint(tmp_path / FINAL)
    assert (saved["settings"]["learning_rate"] == 1e-3
            and type(saved["settings"]["learning_rate"]) is float)
    assert saved["data"]["seed"] == 3 and saved["model_config"]["multipliers"] == (1, 2)
    with pytest.raises(TypeError, match="checkpoint\\['step'\\] is <object"):
        save_checkpoint(tmp_path / "x.pt", {"step": object()})


def test_a_run_without_memory_is_saved_and_resumed_bit_for_bit(whole, tmp_path, monkeypatch,
                                                               capsys):
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        stop_before(6, patch, torch.OutOfMemoryError("CUDA out of memory"))
        train(**RUN, output_dir=tmp_path)
    assert "OutOfMemoryError after step 6 of 12" in capsys.readouterr().out
    train(**RUN, output_dir=tmp_path, resume="latest")
    assert same(load_checkpoint(tmp_path / FINAL)["model"], whole[FINAL]["model"])


def test_a_step_that_stopped_half_way_is_not_saved(whole, tmp_path, monkeypatch, capsys):
    """An optimizer without memory for a weight has changed others: the run resumed was another."""
    calls, step = [], torch.optim.AdamW.step

    def fails(self, *args, **settings):
        step(self, *args, **settings)
        calls.append(self.param_groups[0]["lr"] > 0)    # not where only the speed is measured
        if sum(calls) == 6:
            raise RuntimeError("can't allocate memory")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(torch.optim.AdamW, "step", fails)
        train(**RUN, output_dir=tmp_path)
    assert "saved to" not in capsys.readouterr().out
    train(**RUN, output_dir=tmp_path, resume="latest" if (tmp_path / LATEST).exists() else None)
    assert same(load_checkpoint(tmp_path / FINAL)["model"], whole[FINAL]["model"])


def test_a_finished_run_is_not_replaced_unasked(whole, tmp_path, capsys):
    """A command typed once more into outputs/ took the run of a night with it."""
    train(**RUN, output_dir=tmp_path)
    with pytest.raises(ValueError, match="a finished run: --resume.*--overwrite.*--output_dir"):
        train(**{**RUN, "seed": 8}, output_dir=tmp_path)
    assert same(files(tmp_path), whole)


def test_what_is_left_of_a_run_is_not_replaced_unasked(tmp_path):
    """Somebody had moved the weights away, and a new run deleted the pictures."""
    picture = tmp_path / "samples" / "epoch_001.png"
    picture.parent.mkdir()
    picture.write_bytes(b"x")
    with pytest.raises(ValueError, match=r"has left \(samples/epoch_001.png\), --overwrite"):
        train(**RUN, output_dir=tmp_path)
    assert picture.read_bytes() == b"x"


def test_a_finished_run_is_replaced_and_nothing_else(tmp_path, capsys):
    train(**RUN, output_dir=tmp_path)
    for name in ("mine.png", "step_by_step.png", "epoch_of_art.png"):
        (tmp_path / "samples" / name).write_bytes(b"x")
    for name in ("model_keep.pt", "checkpoints/model_step_notes.pt"):
        save_checkpoint(tmp_path / name, {})
    train(**{**RUN, "num_epochs": 1, "val_fraction": 0.0}, output_dir=tmp_path, overwrite=True)
    assert "replaced an earlier run" in capsys.readouterr().out
    assert sorted(Path(name).name for name in files(tmp_path)) == [
        "epoch_001.png", "epoch_of_art.png", "mine.png", "model_final.pt", "model_keep.pt",
        "model_step_notes.pt", "step_by_step.png", "training_loss.csv", "training_loss.png"]


@pytest.mark.parametrize("change", [{"seed": 8}, {"ema_decay": 0.5}])
def test_a_run_killed_while_it_replaces_another_is_the_one_to_go_on_with(change, tmp_path,
                                                                         monkeypatch, capsys):
    """The folder then holds the new run's latest and a finished one that came farther: --resume
    took that for its own end, and deleted the new run. With another average its losses are the
    same."""
    new = {**RUN, "num_epochs": 2, **change}
    train(**new, output_dir=tmp_path / "whole")
    train(**RUN, output_dir=tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(session, "clear_run", lambda *args, **settings: {}["killed"])
        train(**new, output_dir=tmp_path / "run", overwrite=True)
    capsys.readouterr()
    train(**new, output_dir=tmp_path / "run", resume="latest")
    assert "model_final.pt is of an earlier run" in capsys.readouterr().out
    a, b = (load_checkpoint(tmp_path / name / FINAL) for name in ("whole", "run"))
    assert same(a, b)


def test_a_full_disk_is_told_with_what_is_left_to_go_on_from(whole, tmp_path, monkeypatch, capsys):
    plain = session.save_checkpoint

    def full(path, entries):
        if entries["step"] > 4:
            raise OSError(28, "No space left on device", str(path))
        plain(path, entries)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(session, "save_checkpoint", full)
        train(**RUN, output_dir=tmp_path)
    out = capsys.readouterr().out
    assert "after step 8 of 12: it cannot be saved (No space left on device); " in out
    assert "model_latest.pt has the first 4, and --resume goes on from there" in out
    train(**RUN, output_dir=tmp_path, resume="latest")
    assert same(files(tmp_path), whole)


def test_what_cannot_be_deleted_of_an_earlier_run_stops_no_training(tmp_path, monkeypatch, capsys):
    """Nor does a folder that is named like a sheet, or a pipe that was closed meanwhile."""
    train(**RUN, output_dir=tmp_path)
    (tmp_path / "samples" / "epoch_900.png").mkdir()
    plain = Path.unlink

    def unlink(self, *args, **settings):
        if self.name == "epoch_002.png":
            raise PermissionError(1, "Operation not permitted", str(self))
        plain(self, *args, **settings)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        train(**{**RUN, "num_epochs": 1}, output_dir=tmp_path, overwrite=True)
    assert "it still has " in capsys.readouterr().out
    assert load_checkpoint(tmp_path / FINAL)["step"] == 4

    def closed(*args, **settings):
        raise BrokenPipeError(32, "Broken pipe")
    with monkeypatch.context() as patch, pytest.raises(BrokenPipeError):
        patch.setattr(session, "clear_run", closed)
        train(**RUN, output_dir=tmp_path, overwrite=True)
    assert load_checkpoint(tmp_path / LATEST)["step"] == 4


@pytest.mark.parametrize("error", [Stopped(signal.SIGINT), OSError(28, "full"), MemoryError()])
def test_a_run_stopped_before_its_first_save_is_saved(error, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(type(error)):
        stop_before(2, patch, error)
        train(**RUN, output_dir=tmp_path)
    assert "after step 2 of 12: saved to" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / LATEST)["step"] == 2


def test_the_lock_takes_nothing_that_is_not_a_run_s(tmp_path):
    (tmp_path / ".lock").write_text("a list of locks")
    with only_run(tmp_path):
        pass
    assert (tmp_path / ".lock").read_text() == "a list of locks"
    (tmp_path / ".lock").unlink()
    (tmp_path / "thesis.txt").write_text("chapter one")
    (tmp_path / ".lock").symlink_to("thesis.txt")
    with pytest.raises(ValueError, match="in the way"), only_run(tmp_path):
        pass
    assert (tmp_path / "thesis.txt").read_text() == "chapter one"


def test_a_folder_in_use_is_refused(tmp_path):
    with only_run(tmp_path), pytest.raises(ValueError, match="still going on"):
        train(**RUN, output_dir=tmp_path)
    train(**{**RUN, "num_epochs": 1}, output_dir=tmp_path)


def test_a_run_resumed_from_another_folder_leaves_this_one_s_unfinished_run_alone(whole, tmp_path,
                                                                                  monkeypatch):
    train(**{**RUN, "lr_schedule": "constant", "num_epochs": 1}, output_dir=tmp_path / "first")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_before(2, patch)
        train(**RUN, output_dir=tmp_path / "second")
    again = {**RUN, "lr_schedule": "constant", "resume": str(tmp_path / "first" / FINAL),
             "output_dir": tmp_path / "second"}
    with pytest.raises(ValueError, match="unfinished run"):
        train(**again)
    assert load_checkpoint(tmp_path / "second" / LATEST)["step"] == 2
    train(**again, overwrite=True)
    assert load_checkpoint(tmp_path / "second" / FINAL)["step"] == 12
    assert load_checkpoint(tmp_path / "first" / FINAL)["step"] == 4


def test_a_run_can_go_back_to_an_earlier_checkpoint_of_its_own(whole, tmp_path):
    plain = {**RUN, "num_epochs": 3}
    train(**plain, output_dir=tmp_path)
    train(**plain, output_dir=tmp_path, resume=str(tmp_path / "checkpoints" / "model_epoch_002.pt"))
    assert same(files(tmp_path), whole)


def test_other_images_are_named_and_moved_ones_are_not_minded(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (13, 8, 8), dtype=np.uint8)
    for name, count in (("a", 12), ("b", 12), ("c", 13)):
        (tmp_path / name).mkdir()
        for k in range(count):
            Image.fromarray(images[k] ^ (name == "b" and k == 5)).save(tmp_path / name / f"{k}.png")
    run = {**RUN, "val_fraction": 0.0, "lr_schedule": "constant", "warmup": 0, "ema_every": 1,
           "output_dir": tmp_path / "out"}
    train(**{**run, "dataset_name": str(tmp_path / "a"), "num_epochs": 1})
    for name in "bc":
        with pytest.raises(ValueError, match="images: '12 of 1x8x8, digest .* then, "
                                             "'1[23] of 1x8x8, digest"):
            train(**{**run, "dataset_name": str(tmp_path / name), "resume": "latest"})
    (tmp_path / "a").rename(tmp_path / "moved")
    train(**{**run, "dataset_name": str(tmp_path / "moved"), "resume": "latest"})


def test_what_a_killed_run_left_half_written_is_deleted(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    halves = [tmp_path / f".{LATEST}.77.tmp",
              tmp_path / "checkpoints" / ".model_epoch_005.pt.77.tmp"]
    for path in (*halves, tmp_path / ".other.77.tmp"):
        path.write_bytes(b"x")
    with only_run(tmp_path):
        assert not any(path.exists() for path in halves) and (tmp_path / ".other.77.tmp").exists()


def test_a_file_system_without_locks_or_folder_syncs_will_do(tmp_path, monkeypatch):
    def refused(*args):
        raise OSError(95, "not supported")
    monkeypatch.setattr("fcntl.flock", refused)
    plain = os.fsync
    monkeypatch.setattr(os, "fsync", lambda f: refused() if is_folder(f) else plain(f))
    train(**{**RUN, "num_epochs": 1}, output_dir=tmp_path)
    assert load_checkpoint(tmp_path / FINAL)["step"] == 4


@pytest.mark.parametrize("argv, words", [
    (["--resume"], "nothing to resume"), (["--resume="], "empty"),
    (["--resume", "no.pt"], "no such")])
def test_nothing_to_resume_is_one_line(argv, words, tmp_path, capsys):
    assert words in fails(capsys, main, *argv, "--dataset", "synthetic_digits",
                          "--output_dir", tmp_path)


def test_a_checkpoint_for_sampling_only_cannot_be_resumed(tmp_path):
    save_checkpoint(tmp_path / "x.pt", {"model": {}})
    with pytest.raises(ValueError, match="cannot be resumed"):
        train(**RUN, output_dir=tmp_path, resume=str(tmp_path / "x.pt"))


@pytest.mark.parametrize("spoil, words", [
    (lambda e: e["model"].pop("conv_in.bias"), r"another model: 1 of .* conv_in.bias \(missing"),
    (lambda e: e["ema"].update(more=torch.zeros(2)),
     r"another model: .* more \(float32 \(2,\), not expected"),
    (lambda e: e["model"].update({"conv_in.bias": torch.zeros(8).double()}),
     r"float64 \(8,\), not float32 \(8,\)"),
    (lambda e: e["optimizer"]["state"][0].update(exp_avg=torch.zeros(3)),
     "optimizer was one of another model"),
    (lambda e: e["optimizer"]["state"][0].update(
        exp_avg=e["optimizer"]["state"][0]["exp_avg"].long()), "other kinds of numbers"),
    (lambda e: next(iter(e["ema"].values())).fill_(math.nan), "not all of its weights are finite"),
    (lambda e: e.pop("data"), "does not tell its data"),
    (lambda e: e["held_out_losses"].fill_(math.inf), "cannot be resumed: cannot convert"),
    (lambda e: e.update(losses=torch.tensor(3.0)), "losses of shape"),
    (lambda e: e["optimizer"].pop("state"), "cannot be resumed: 'state'"),
    (lambda e: e.pop("losses"), "cannot be resumed: 'losses'")])
def test_a_checkpoint_that_does_not_fit_is_one_line(spoil, words, whole, tmp_path):
    entries = copy.deepcopy(whole["checkpoints/model_epoch_002.pt"])
    spoil(entries)
    save_checkpoint(tmp_path / "x.pt", entries)
    with pytest.raises(ValueError, match=words) as error:
        train(**RUN, output_dir=tmp_path / "out", resume=str(tmp_path / "x.pt"))
    assert "\n" not in str(error.value) and not (tmp_path / "out" / LATEST).exists()


# ---- Starting from the weights of another run

def start_from(path, folder, **changes):
    """One step at a rate that is as good as zero: (averaged weights before, after)."""
    settings = {**RUN, "num_epochs": 1, "learning_rate": 1e-12, "weight_decay": 0.0, "warmup": 0,
                **changes}
    train(**settings, output_dir=folder, start_from=path)
    before = torch.load(path, weights_only=True)["ema"]
    return before, torch.load(folder / FINAL, weights_only=True)["ema"]


@pytest.fixture(scope="module")
def finished(whole, tmp_path_factory):
    path = tmp_path_factory.mktemp("finished") / "model.pt"
    save_checkpoint(path, whole[FINAL])
    return path


def test_a_run_starts_from_the_averaged_weights_of_another(finished, tmp_path, capsys):
    before, after = start_from(finished, tmp_path, dropout=0.0, clip_loss=True, seed=1)
    assert before.keys() == after.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, atol=1e-6, rtol=0)
    assert (load_checkpoint(tmp_path / FINAL)["step"] == 4
            and len(load_checkpoint(tmp_path / FINAL)["losses"]) == 4)
    assert f"starting from the weights of {finished}, after 12 steps" in capsys.readouterr().out


def test_a_run_starts_from_the_small_file_to_share(finished, tmp_path):
    export(finished, tmp_path / "small.pt")
    before, after = start_from(tmp_path / "small.pt", tmp_path)
    for name, value in before.items():
        assert value.dtype == torch.float16 and after[name].dtype == torch.float32
        torch.testing.assert_close(after[name], value.float(), atol=1e-6, rtol=0)


def test_a_file_older_than_a_setting_of_the_network_is_of_use(whole, tmp_path, capsys):
    """Shipped weights are older than --scale_shift: what they do not tell is the default, be that
    a switch that is off or a word."""
    entries = {**whole[FINAL], "model_config": {**whole[FINAL]["model_config"]}}
    assert entries["model_config"].pop("scale_shift") is False
    assert entries["model_config"].pop("activation") == "silu"
    save_checkpoint(tmp_path / "older.pt", entries)
    train(**RUN, output_dir=tmp_path / "resumed", resume=tmp_path / "older.pt")
    assert "going on from" in capsys.readouterr().out
    start_from(tmp_path / "older.pt", tmp_path / "run")
    with pytest.raises(ValueError, match="scale_shift: False then, True now"):
        start_from(tmp_path / "older.pt", tmp_path / "other", scale_shift=True)


def test_without_classes_or_with_others_all_else_is_taken_over(finished, tmp_path):
    before, after = start_from(finished, tmp_path / "none", labels=False)
    assert before.keys() - after.keys() == {"class_emb.weight"}
    torch.testing.assert_close(after["conv_in.weight"], before["conv_in.weight"], atol=1e-6, rtol=0)
    bare = tmp_path / "none" / FINAL
    before, after = start_from(bare, tmp_path / "ten")
    assert (after.keys() - before.keys() == {"class_emb.weight"}
            and after["class_emb.weight"].std() > 0.5)
    torch.testing.assert_close(after["conv_in.weight"], before["conv_in.weight"], atol=1e-6, rtol=0)


def test_a_run_that_started_from_another_is_resumed_bit_for_bit_without_it(finished, tmp_path,
                                                                           monkeypatch):
    start = shutil.copy(finished, tmp_path / "start.pt")
    train(**RUN, output_dir=tmp_path / "whole", start_from=start)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_before(3, patch)
        train(**RUN, output_dir=tmp_path / "stopped", start_from=start)
    start.unlink()
    train(**RUN, output_dir=tmp_path / "stopped", start_from=start, resume="latest")
    assert same(files(tmp_path / "stopped"), files(tmp_path / "whole"))


def test_a_run_remembers_what_it_started_from(whole, finished, tmp_path, capsys):
    start_from(finished, tmp_path / "child")
    entries = load_checkpoint(tmp_path / "child" / FINAL)
    assert entries["started_from"] == {
        "file": "model.pt", "steps": 12, "images": whole[FINAL]["settings"]["images"],
        "digest": checkpoint.drawing_digest(whole[FINAL])}
    assert "may have seen what is held out" not in capsys.readouterr().out
    export(tmp_path / "child" / FINAL, tmp_path / "child.pt")
    assert load_checkpoint(tmp_path / "child.pt")["card"]["started_from"] == entries["started_from"]
    start_from(tmp_path / "child.pt", tmp_path / "grandchild", seed=8)  # which holds out others
    assert load_checkpoint(tmp_path / "grandchild" / FINAL)["started_from"]["steps"] == 12 + 4
    out = capsys.readouterr().out
    assert "after 16 steps" in out and "may have seen what is held out" in out
    # as the one before, but not the first
    start_from(tmp_path / "grandchild" / FINAL, tmp_path / "next", seed=8)
    assert "may have seen what is held out" in capsys.readouterr().out


@pytest.mark.parametrize("name", [FINAL, "checkpoints/model_epoch_002.pt", "link.pt"])
def test_a_run_does_not_replace_what_it_starts_from(name, whole, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for path in (FINAL, "checkpoints/model_epoch_002.pt"):
        save_checkpoint(tmp_path / path, whole[FINAL])
    (tmp_path / "link.pt").symlink_to(tmp_path / FINAL)
    with pytest.raises(ValueError, match="would be written over: give another --output_dir"):
        train(**RUN, output_dir=tmp_path, start_from=tmp_path / name, overwrite=True)
    assert same(load_checkpoint(tmp_path / FINAL)["ema"], whole[FINAL]["ema"])


@pytest.mark.parametrize("changes, words", [
    (dict(objective="v"),
     r"objective: 'eps' then, 'v' now\): --start_from needs the --preset and the flags"),
    (dict(heads=1), "heads: 2 then, 1 now"),
    (dict(base_channels=16), "base_channels: 8 then, 16 now"),
    (dict(schedule="cosine", timesteps=100),
     "num_timesteps: 1000 then, 100 now; schedule: 'linear' then, 'cosine'"),
])
def test_weights_of_another_network_or_process_are_refused_by_name(changes, words, finished,
                                                                   tmp_path):
    with pytest.raises(ValueError, match=words):
        train(**{**RUN, **changes}, output_dir=tmp_path, start_from=finished)
    assert not any(p.is_file() and p.name != ".lock" for p in tmp_path.rglob("*"))


@pytest.mark.parametrize("spoil, words", [
    (lambda e: e["ema"].pop("conv_in.bias"), r"another model: 1 of .* conv_in.bias \(missing"),
    (lambda e: e["ema"]["conv_in.bias"].fill_(np.nan), "not all of its weights are finite"),
    (lambda e: e.pop("diffusion_config"), "not a checkpoint to start from"),
    (lambda e: e.update(ema=[1]), "not a checkpoint to start from"),
    (lambda e: e.pop("data"), "not a checkpoint to start from"),
    (lambda e: e.pop("step"), "not a checkpoint to start from"),
    (lambda e: e["model_config"].update(heads=torch.zeros(2)), "heads: tensor.* then, 2 now"),
    (lambda e: e.update(model_name="x" * 10**6), "model: 'x{199} then, 'attention' now"),
])
def test_weights_that_cannot_be_started_from_are_one_line(spoil, words, whole, tmp_path):
    entries = copy.deepcopy(whole[FINAL])
    spoil(entries)
    save_checkpoint(tmp_path / "spoilt.pt", entries)
    with pytest.raises(ValueError, match=words):
        train(**RUN, output_dir=tmp_path / "new", start_from=tmp_path / "spoilt.pt")


# ---- Signals

def start(folder, *argv):
    script = "import data; data.SYNTHETIC_SIZE = 96; import train; train.main()"
    return subprocess.Popen(
        [sys.executable, "-c", script, "--dataset", "synthetic_digits", "--image_size", "8",
         "--base_channels", "8", "--batch_size", "8", "--epochs", "400", "--num_samples", "2",
         "--sample_every", "400", "--device", "cpu", "--precision", "float32",
         "--output_dir", str(folder), *argv],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(path, process, seconds=60):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.02)


def test_a_signal_saves_and_says_how_to_go_on(tmp_path):
    process = start(tmp_path)
    wait_for(tmp_path / LATEST, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "--resume" in out and "Traceback" not in err
    entries = load_checkpoint(tmp_path / LATEST)
    assert entries["step"] == len(entries["losses"]) > 0
    with only_run(tmp_path):
        pass                                                    # the folder is free again


def test_a_signal_waits_until_a_save_is_done(tmp_path, monkeypatch):
    """Raised inside torch.save, it sometimes became a RuntimeError: exit code 1, a traceback."""
    done, whole = [], session.save_checkpoint

    def interrupted(path, entries):
        if not done:
            os.kill(os.getpid(), signal.SIGTERM)
        whole(path, entries)
        done.append(path.name)

    monkeypatch.setattr(session, "save_checkpoint", interrupted)
    monkeypatch.setattr("data.SYNTHETIC_SIZE", 32)
    with pytest.raises(KeyboardInterrupt, match="SIGTERM"):
        train("synthetic_digits", image_size=8, batch_size=8, num_epochs=3, base_channels=8,
              labels=False, device="cpu", precision="float32", num_samples=1, output_dir=tmp_path)
    # after the epoch; and on stopping
    assert load_checkpoint(tmp_path / LATEST)["step"] == 4 and len(done) == 2


@pytest.mark.skipif(sys.platform == "linux", reason="tests/torture.py does it, and compares bits")
def test_kill_9_leaves_a_whole_checkpoint_and_no_lock(tmp_path):
    process = start(tmp_path)
    wait_for(tmp_path / LATEST, process)
    process.kill()
    process.communicate()
    step = load_checkpoint(tmp_path / LATEST)["step"]
    process = start(tmp_path, "--resume")
    out = ""
    while "going on" not in out:
        out = process.stdout.readline()
        assert out or process.poll() is None
    process.kill()
    process.communicate()
    assert f"after {step} of" in out


def test_a_signal_while_the_data_are_read_ends_the_run_at_once(tmp_path, monkeypatch):
    def reading(*args, **settings):
        os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(train_module, "load_training_data", reading)
    with pytest.raises(SystemExit) as exit_:
        main(["--dataset", "synthetic_digits", "--output_dir", str(tmp_path)])
    assert exit_.value.code == 143


def test_a_signal_while_the_final_checkpoint_is_written_loses_no_step(whole, tmp_path, monkeypatch):
    plain = session.save_checkpoint

    def stopping(path, entries):
        if path.name == FINAL:
            raise Stopped(signal.SIGTERM)
        plain(path, entries)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(session, "save_checkpoint", stopping)
        train(**RUN, output_dir=tmp_path)
    assert load_checkpoint(tmp_path / LATEST)["step"] == 12
    train(**RUN, output_dir=tmp_path, resume="latest")
    assert same(files(tmp_path), whole)


def test_a_signal_while_the_state_is_saved_after_a_full_disk_does_not_stop_that(whole, tmp_path,
                                                                                monkeypatch):
    """A closed terminal can give both: an OSError for what is printed, and SIGHUP."""
    plain = session.save_checkpoint

    def signalled(path, entries):
        if path.name == LATEST and entries["step"] == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        plain(path, entries)
    with monkeypatch.context() as patch, pytest.raises((OSError, Stopped)) as stop:
        patch.setattr(session, "save_checkpoint", signalled)
        stop_before(6, patch, OSError(28, "No space left on device"))
        train(**RUN, output_dir=tmp_path)
    assert isinstance(stop.value, OSError)
    assert load_checkpoint(tmp_path / LATEST)["step"] == 6
    train(**RUN, output_dir=tmp_path, resume="latest")
    assert same(files(tmp_path), whole)


def test_a_signal_within_a_step_waits_for_its_end_and_a_second_does_not():
    done = []
    with pytest.raises(Stopped), Signals() as signals:
        with signals.postponed():
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("the step came to its end")
    assert done
    script = ("import os, signal, running\n"
              "clock = [0.0]\n"
              "running.time.monotonic = lambda: clock[0]\n"
              "with running.Signals() as signals, signals.postponed():\n"
              "    for clock[0] in (5, 5.9, 6.1):\n"    # the second is an echo of the first
              "        os.kill(os.getpid(), signal.SIGINT)\n"
              "        print(clock[0], flush=True)")
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True)
    assert run.returncode == -signal.SIGINT and run.stdout.split() == [b"5", b"5.9"]


def test_signals_are_given_back():
    before = signal.getsignal(signal.SIGTERM)
    with Signals():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


# ---- Numbers that are none, and disks

def test_a_step_that_is_not_a_number_is_not_taken(tiny_model):
    before = [p.detach().clone() for p in tiny_model.parameters()]
    optimizer = torch.optim.SGD(tiny_model.parameters(), lr=1.0)
    x_0 = torch.full((2, 1, 8, 8), float("nan"))
    with pytest.raises(FloatingPointError):
        train_step(tiny_model, x_0, torch.zeros(2).long(), optimizer, DiffusionProcess())
    assert all(torch.equal(a, b) for a, b in zip(before, tiny_model.parameters()))


def test_a_gradient_that_is_not_a_number_is_not_taken(tiny_model):
    """Beside a loss that is one."""
    before = [p.detach().clone() for p in tiny_model.parameters()]
    tiny_model.conv_out.weight.register_hook(lambda grad: grad * math.inf)
    optimizer = torch.optim.SGD(tiny_model.parameters(), lr=1.0)
    with pytest.raises(FloatingPointError, match="gradient norm"):
        train_step(tiny_model, torch.zeros(2, 1, 8, 8), torch.zeros(2).long(), optimizer,
                   DiffusionProcess())
    assert all(torch.equal(a, b) for a, b in zip(before, tiny_model.parameters()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_that_meets_a_nan_names_the_step(tiny_model):
    """In an image of step 6, and in the first gradient beside a loss that is a number."""
    images = torch.zeros(64, 1, 8, 8)
    images[40] = float("nan")
    batches = [(part, torch.full((8,), -1)) for part in images.split(8)]
    for given, bad_gradient, step in ((batches, False, 6), (batches[:4], True, 1)):
        model = copy.deepcopy(tiny_model).cuda()
        if bad_gradient:
            model.conv_out.weight.register_hook(lambda grad: grad * math.inf)
        optimizer = torch.optim.Adam(model.parameters(), fused=True)
        with pytest.raises(ValueError, match=f"in step {step}: "):
            loop.train_epoch(model, given, optimizer, DiffusionProcess(), "cuda")


def test_a_broken_run_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(ValueError,
                                                       match="in step 7: try a lower --lr"):
        stop_before(6, patch, FloatingPointError("loss nan"))
        train(**RUN, output_dir=tmp_path)
    assert load_checkpoint(tmp_path / LATEST)["step"] == 4


def test_a_checkpoint_is_on_the_disk_before_its_name_is(tmp_path, monkeypatch):
    """Temporary file, fsync, rename, folder fsync: in this order, or a power cut can lose both."""
    calls, real = [], {name: getattr(os, name) for name in ("fsync", "replace")}

    def note(name):
        def noted(*args):
            kind = "folder" if name == "fsync" and is_folder(args[0]) else ""
            calls.append(f"{name} {kind}".strip())
            return real[name](*args)
        return noted
    for name in real:
        monkeypatch.setattr(os, name, note(name))
    checkpoint.save_checkpoint(tmp_path / "x.pt", {"n": 1})
    assert calls == ["fsync", "replace", "fsync folder"]


def test_a_run_that_is_older_than_a_switch_goes_on_while_it_is_off():
    """A run begun before --turn was refused as one with other settings."""
    check_settings("m.pt", {"seed": 1}, {"seed": 1, "turn": False})
    with pytest.raises(ValueError, match="turn"):
        check_settings("m.pt", {"seed": 1}, {"seed": 1, "turn": True})
    with pytest.raises(ValueError, match="turn"):
        check_settings("m.pt", {"seed": 1, "turn": True}, {"seed": 1, "turn": False})
