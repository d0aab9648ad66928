"""The three commands as a user meets them: what they write, and a clear line for every mistake."""

import importlib
import math
import pickle
import re
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import data
import images
import plan
import sample
import train
import visualize_diffusion
from checkpoint import load_checkpoint, save_checkpoint
from command_line import one_line
from conftest import ROOT, fails
from diffusion import DiffusionProcess
from files import write_file
from images import image_grid, save_images, save_strip, to_uint8
from models import create_model


@pytest.fixture
def checkpoint(tmp_path):
    """What train.py writes, for an untrained model of 8x8 images."""
    torch.manual_seed(0)
    config = dict(image_channels=1, base_channels=8)
    model = create_model(**config)
    path = tmp_path / "model.pt"
    save_checkpoint(path, {
        "model_name": "simple", "model_config": config,
        "diffusion_config": DiffusionProcess(40).config,
        "data": {"name": "mnist", "image_size": 8, "channels": 1, "classes": None},
        "model": model.state_dict(), "ema": model.state_dict()})
    return path


# ---- What they write

@pytest.mark.parametrize("shape", [(1, 1, 5, 4), (2, 3, 4, 4), (7, 1, 6, 5), (9, 3, 5, 5)])
@pytest.mark.parametrize("columns, padding", [(None, 2), (3, 0), (20, 1)])
def test_a_grid_is_that_of_torchvision(shape, columns, padding):
    from torchvision.utils import make_grid
    images = torch.randint(0, 256, shape, dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(0))
    want = make_grid(images, nrow=columns or math.ceil(len(images)**0.5), padding=padding,
                     pad_value=255)
    assert torch.equal(image_grid(images, columns, padding), want.permute(1, 2, 0))


def test_one_image_of_each_class_comes_before_a_second_of_any():
    labels = torch.tensor([0] * 50 + [1] * 5 + [2] * 2)
    order = visualize_diffusion.different_ones(labels, 57, seed=3)
    assert sorted(order.tolist()) == list(range(57))
    assert [sorted(labels[order[k:k + 3]].tolist()) for k in (0, 3)] == [[0, 1, 2]] * 2
    assert (sorted(labels[order[6:12]].tolist()) == [0, 0, 0, 1, 1, 1]
            and set(labels[order[12:]].tolist()) == {0})
    assert not torch.equal(order, visualize_diffusion.different_ones(labels, 57, seed=4))
    assert len(set(visualize_diffusion.different_ones(None, 57).tolist())) == 57


def test_the_forward_figure_is_clean_at_the_left_and_static_at_the_right(tmp_path, monkeypatch):
    """And of a row only the share of its noise grows: the noise is the same in all columns."""
    seen = {}
    monkeypatch.setattr(visualize_diffusion, "save_strip",
                        lambda rows, labels, path, title: seen.update(rows=rows, labels=labels))
    # From a generator of its own: one seeded like the figure's noise would correlate with it.
    images = torch.randint(256, (8, 1, 28, 28),
                           generator=torch.Generator().manual_seed(5)).to(torch.uint8)
    visualize_diffusion.forward_figure(images, DiffusionProcess(), tmp_path / "x.png")
    assert seen["rows"].shape == (8, 8, 1, 28, 28)
    assert [int(re.search(r"t = (\d+)", label)[1]) for label in seen["labels"]] == [
        0, 50, 100, 200, 400, 600, 800, 999]
    x_0 = images.float() / 127.5 - 1
    correlation = [float(torch.corrcoef(torch.stack(
        [x_0.flatten(), seen["rows"][:, k].flatten()]))[0, 1]) for k in range(8)]
    assert correlation[0] > 0.99 and abs(correlation[7]) < 0.05
    assert correlation == sorted(correlation, reverse=True)
    alpha_bar = DiffusionProcess().alpha_bar
    noises = [(seen["rows"][:, k] - alpha_bar[t]**0.5 * x_0) / (1 - alpha_bar[t])**0.5
              for k, t in ((3, 200), (5, 600), (7, 999))]
    assert all((noise - noises[0]).abs().max() < 1e-4 for noise in noises)


def test_sample_shows_the_way_and_ends_with_the_sample_itself(checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    sample.main(["--checkpoint", str(checkpoint), "--num_images", "5", "--batch_size", "3",
                 "--steps", "6", "--show_intermediate", "--output_dir", str(out)])
    assert Image.open(out / "generation.gif").n_frames == 7
    frames = sorted(p.name for p in (out / "generation_frames").iterdir())
    assert (len(frames) == 7 and frames[0] == "frame_000_t039.png"
            and frames[-1] == "frame_006_finished.png")
    assert Image.open(out / "generation_strip.png").width > 500
    said = capsys.readouterr().out
    assert "about" in said and "generated_samples.png" in said and "generation.gif" in said


def test_frames_carry_the_loops_own_levels_and_the_finished_sample_bit_for_bit(checkpoint):
    model, diffusion, _ = sample.load_model(checkpoint)
    images, frames = sample.generate(model, diffusion, 4, 8, sampler="ddpm", steps=10,
                                     keep=sample.moments(10, 51))
    assert [t for t, _, _ in frames] == diffusion.timesteps(10)
    assert torch.equal(frames[-1][1], images)
    for t, x_t, x_0 in frames[:-1]:
        torch.testing.assert_close(x_0, diffusion.predict_x0(model, x_t, t), atol=1e-4, rtol=0)
    few = sample.generate(model, diffusion, 4, 8, sampler="ddpm",
                          keep=sample.moments(diffusion.num_timesteps, 5))[1]
    assert [t for t, _, _ in few] == [39, 29, 19, 9, -1]


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmpp_2m_sde"])
def test_the_same_seed_gives_the_same_picture_in_other_batches(sampler, checkpoint, tmp_path):
    """Also where each step adds noise of its own."""
    pixels = []
    for k, extra in enumerate((["--batch_size", "2"], ["--batch_size", "7"], ["--seed", "1"])):
        out = tmp_path / str(k)
        sample.main(["--checkpoint", str(checkpoint), "--num_images", "7", "--steps", "4", *extra,
                     "--sampler", sampler, "--output_dir", str(out)])
        pixels.append(np.asarray(Image.open(out / "generated_samples.png")).astype(int))
    assert abs(pixels[0] - pixels[1]).max() <= 1 and abs(pixels[0] - pixels[2]).max() > 20


def test_saved_pixels_are_the_images_range(tmp_path):
    assert to_uint8(torch.tensor([-1.0, 0.0, 1.0, 7.0])).tolist() == [0, 128, 255, 255]
    save_images(torch.full((5, 1, 4, 4), -1.0), tmp_path / "x.png", padding=2, upscale=1)
    grid = np.asarray(Image.open(tmp_path / "x.png"))
    assert grid.shape == (2 + 2 * 6, 2 + 3 * 6, 3)              # 5 images: 3 columns, 2 rows
    assert (grid[2:6, 2:6] == 0).all() and (grid[:2] == 255).all()


def test_a_strip_has_its_labels_beside_their_rows_and_above_their_columns(monkeypatch):
    """Two rows of three images, 4 pixels high and 5 wide, each of a grey of its own."""
    seen = []
    monkeypatch.setattr(images, "save_figure", lambda figure, path: seen.append(figure))
    greys = torch.tensor([[0, 50, 100], [150, 200, 250]])
    rows = greys.view(2, 3, 1, 1, 1).expand(2, 3, 1, 4, 5) / 127.5 - 1
    save_strip(list(rows), ["a", "b", "c"], "x.png", row_labels=["first", "second"], title="all")
    axes = seen[0].axes[0]
    shown = axes.images[0].get_array()
    for ticks, names, size in ((axes.xaxis, ["a", "b", "c"], 5),
                               (axes.yaxis, ["first", "second"], 4)):
        assert [label.get_text() for label in ticks.get_ticklabels()] == names
        assert ticks.get_ticklocs().tolist() == [
            2 + k * (size + 2) + size / 2 for k in range(len(names))]
    for i, top in enumerate((2, 8)):
        for j, left in enumerate((2, 9, 16)):
            assert (shown[top:top + 4, left:left + 5] == int(greys[i, j])).all()
    assert axes.get_title() == "all"


# ---- Mistakes in numbers and names

@pytest.mark.parametrize("said", [
    "CUDA out of memory. Tried to allocate 2.00 GiB.",
    "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried",
    "Storage size calculation overflowed with sizes=[1152921504606846976]",
    "could not create a primitive"])
def test_whatever_torch_says_of_full_memory_is_advice(said):
    assert one_line(RuntimeError(said)).startswith("out of memory; try fewer")
    assert one_line(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None


@pytest.mark.parametrize("argv", [
    ["--dataset", "mnits"], ["--schedule", "quadratic"], ["--objective", "noise"],
    ["--epochs", "0"], ["--epochs", "-1"], ["--batch_size", "0"], ["--lr", "nan"], ["--lr", "0"],
    ["--lr", "-1"], ["--lr", "inf"], ["--timesteps", "0"], ["--ema_decay", "1"],
    ["--ema_decay", "nan"], ["--base_channels", "12"], ["--image_size", "30"],
    ["--grad_clip", "-1"], ["--seed", "-1"], ["--device", "abacus"], ["--precision", "int8"],
    ["--steps", "0"], ["--no_such_flag"]])
def test_train_refuses_impossible_settings(argv, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data, "SYNTHETIC_SIZE", 30)
    argv = argv if "--dataset" in argv else ["--dataset", "synthetic_digits", *argv]
    error = fails(capsys, train.main, *argv, "--output_dir", tmp_path / "out")
    assert argv[-1] in error or argv[-2].strip("-") in error
    assert not list(tmp_path.rglob("*.p*"))                     # no checkpoint, no picture


@pytest.mark.parametrize("argv", [
    ["--sampler", "euler"], ["--steps", "0"], ["--steps", "41"], ["--steps", "nan"],
    ["--num_images", "0"], ["--eta", "11"], ["--sampler", "ddpm_beta", "--eta", "1.5"],
    ["--eta", "nan"], ["--seed", "-3"], ["--batch_size", "0"], ["--precision", "int8"],
    ["--device", "abacus"]])
def test_sample_refuses_impossible_settings(argv, checkpoint, tmp_path, capsys):
    error = fails(capsys, sample.main, "--checkpoint", checkpoint, *argv,
                  "--output_dir", tmp_path / "out")
    assert argv[1] in error
    assert not list((tmp_path / "out").rglob("*.png"))


# ---- Broken and hostile checkpoints

class Evil:
    def __reduce__(self):
        return (open, ("pwned.txt", "w"))


def make_bad(kind, good, path):
    if kind == "missing":
        return "no checkpoint"
    if kind == "a folder":
        path.mkdir()
        return "no such checkpoint"
    if kind == "empty":
        path.write_bytes(b"")
        return "truncated"
    if kind == "truncated":
        path.write_bytes(good.read_bytes()[:-3000])
        return "truncated"
    if kind == "altered":
        raw = good.read_bytes()
        at = raw.index(load_checkpoint(good)["ema"]["conv_in.weight"].numpy().tobytes()[:64])
        path.write_bytes(raw[:at] + b"\x01" + raw[at + 1:])
        return "altered|damaged"
    if kind == "text":
        path.write_text("these are not weights")
        return "truncated, or not a checkpoint"
    if kind == "bare weights":
        torch.save({"weight": torch.zeros(3)}, path)
        return "foreign"
    if kind == "old pickle":
        path.write_bytes(pickle.dumps(Evil()))
        return "not a checkpoint"
    if kind == "malicious":
        torch.save({"model": Evil()}, path)
        return "refused"
    if kind == "zip bomb":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
            z.writestr("archive/data.pkl", b"\0" * 200_000_000)
        return "compressed, encrypted or broken"
    if kind == "marked as encrypted":
        torch.save({"a": torch.zeros(3)}, path)
        raw = bytearray(path.read_bytes())
        with zipfile.ZipFile(path) as z:
            start, count = z.start_dir, len(z.infolist())
        for _ in range(count):                          # the flags of each entry of the directory
            raw[start + 8] |= 1
            start += 46 + sum(int.from_bytes(raw[start + k:start + k + 2], "little")
                              for k in (28, 30, 32))
        path.write_bytes(raw)
        return "encrypted or broken"
    if kind == "an endless pickle":
        with zipfile.ZipFile(path, "w") as z:
            z.writestr("archive/data.pkl", b"\x80\x02]")
        return "damaged, it cannot be read"
    entries = load_checkpoint(good)
    if kind == "newer":
        entries["version"] = 99
        save_checkpoint(path, entries)
        return "version 99"
    if kind == "another network":
        entries["model_config"]["base_channels"] = 16
    if kind == "monstrous network":
        entries["model_config"]["base_channels"] = 8_000_000
    if kind == "unknown network":
        entries["model_name"] = "transformer"
    if kind == "no weights":
        del entries["ema"]
    if kind == "no size":
        entries["data"] = {}
    if kind == "a huge size":
        entries["data"]["image_size"] = 10**9
    if kind == "double precision":
        entries["ema"] = {k: v.double() for k, v in entries["ema"].items()}
    if kind == "not a number":
        entries["ema"]["conv_in.bias"] = entries["ema"]["conv_in.bias"] * float("nan")
    if kind == "endless chain":
        entries["diffusion_config"]["num_timesteps"] = float("inf")
    save_checkpoint(path, entries)
    return "do not fit together"


@pytest.mark.parametrize("kind", [
    "missing", "a folder", "empty", "truncated", "altered", "text", "bare weights", "old pickle",
    "malicious", "zip bomb", "marked as encrypted", "an endless pickle", "newer",
    "another network", "monstrous network", "unknown network", "no weights", "no size",
    "a huge size", "double precision", "not a number", "endless chain"])
def test_a_bad_checkpoint_is_named_for_what_it_is(kind, checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bad.pt"
    expected = make_bad(kind, checkpoint, path)
    error = fails(capsys, sample.main, "--checkpoint", path, "--output_dir", tmp_path / "out")
    assert re.search(expected, error) and "bad.pt" in error
    assert not (tmp_path / "pwned.txt").exists()


@pytest.mark.parametrize("name", ["Data.pkl", "constants.pkl"])
def test_a_pickle_of_another_name_is_not_read(name, tmp_path):
    """torch finds data.pkl in any case of letters: Data.pkl passed the check, and filled memory."""
    path = tmp_path / "bad.pt"
    torch.save({"a": torch.zeros(3)}, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(path, "w") as bad:
        for member in good.infolist():
            bad.writestr(member.filename.replace("data.pkl", name), good.read(member))
    with pytest.raises(ValueError, match="not a checkpoint of this project"):
        load_checkpoint(path)


def test_a_zip_behind_something_else_is_not_read(tmp_path):
    """torch reads a file from its beginning, zipfile from its end."""
    torch.save({"a": torch.zeros(3)}, tmp_path / "x.pt")
    (tmp_path / "x.pt").write_bytes(pickle.dumps(Evil()) + (tmp_path / "x.pt").read_bytes())
    with pytest.raises(ValueError, match="truncated, or not a checkpoint"):
        load_checkpoint(tmp_path / "x.pt")


def test_a_pipe_is_not_replaced_by_a_file(checkpoint, tmp_path, capsys):
    import os
    import export
    os.mkfifo(tmp_path / "pipe")
    assert "in the way" in fails(capsys, export.main, "--checkpoint", checkpoint,
                                 "--output", tmp_path / "pipe")
    with pytest.raises(OSError, match="neither a file"):
        write_file(tmp_path / "pipe", b"x")
    assert (tmp_path / "pipe").is_fifo() and not list(tmp_path.glob(".*"))


def test_a_billion_images_are_refused_before_anything_is_made_for_them(tmp_path, capsys):
    assert "at most" in fails(capsys, sample.main, "--num_images", 10**9,
                              "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("protocol", [2, 4])
def test_what_is_no_tensor_is_refused_before_torch_reads_it(protocol, tmp_path, monkeypatch):
    """torch would make a bytearray of any size; protocol 2 names it by GLOBAL, 4 from the stack."""
    torch.save({"model": bytearray(10)}, tmp_path / "bad.pt", pickle_protocol=protocol)
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(ValueError, match="refused"):
        load_checkpoint(tmp_path / "bad.pt")


def test_as_many_classes_are_named_as_the_network_knows(checkpoint, tmp_path, capsys):
    entries = load_checkpoint(checkpoint)
    model = create_model(image_channels=1, base_channels=8, num_classes=3)
    entries.update(model_config=dict(image_channels=1, base_channels=8, num_classes=3),
                   ema=model.state_dict(), data={**entries["data"], "classes": ["a", "b"]})
    save_checkpoint(tmp_path / "bad.pt", entries)
    assert "do not fit together" in fails(capsys, sample.main, "--checkpoint", tmp_path / "bad.pt",
                                          "--output_dir", tmp_path / "out")


def test_a_malicious_checkpoint_that_passes_for_tensors_runs_no_code(tmp_path, monkeypatch):
    """Two locks on one door: with the first one open, the second must hold."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("checkpoint._check_pickle", lambda *given: None)
    torch.save({"model": Evil()}, "bad.pt")
    with pytest.raises(ValueError, match="refused"):
        load_checkpoint("bad.pt")
    assert not (tmp_path / "pwned.txt").exists()


@pytest.mark.parametrize("tool", ["mutate", "broken"])          # torture has a test of its own
def test_the_tools_beside_the_tests_say_what_they_take(tool):
    run = subprocess.run([sys.executable, ROOT / "tests" / f"{tool}.py", "--help"],
                         capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.startswith("usage"), run.stderr


# ---- Folders and disks

@pytest.mark.parametrize("name", ["model_final.pt", "training_loss.png"])
def test_a_folder_in_the_way_of_a_result_is_found_before_the_training(name, tmp_path, capsys):
    (tmp_path / name).mkdir()
    error = fails(capsys, train.main, "--dataset", "synthetic_digits", "--output_dir", tmp_path)
    assert name in error and "in the way" in error


def test_a_disk_too_small_for_a_checkpoint_is_found_before_the_training(tmp_path, capsys,
                                                                        monkeypatch):
    monkeypatch.setattr(data, "SYNTHETIC_SIZE", 30)
    monkeypatch.setattr(plan.shutil, "disk_usage",
                        lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    error = fails(capsys, train.main, "--dataset", "synthetic_digits", "--output_dir", tmp_path)
    assert "32 MB" in error and not list(tmp_path.rglob("*.png"))


def test_a_folder_with_a_broken_image_trains_without_it(tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for k in range(9):
        Image.new("RGB", (8, 8), (25 * k, 10, 90)).save(folder / f"{k}.png")
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:40])
    train.main(["--dataset", str(folder), "--steps", "1", "--base_channels", "8", "--device", "cpu",
                "--output_dir", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "1 of 10" in said and "broken.png" in said
    entries = load_checkpoint(tmp_path / "out" / "model_final.pt")
    assert entries["data"]["channels"] == 3 and entries["model"]["conv_out.weight"].shape[0] == 3


@pytest.mark.parametrize("main", [train.main, sample.main, visualize_diffusion.main])
def test_an_output_folder_that_cannot_be_written_is_found_first(main, checkpoint, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    argv = (["--checkpoint", checkpoint] if main is sample.main
            else ["--dataset", "synthetic_digits"])
    error = fails(capsys, main, *argv, "--output_dir", tmp_path / "file" / "out")
    assert "file" in error


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("unshare"),
                    reason="needs Linux's unshare")
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(checkpoint, tmp_path):
    """A real one: a tmpfs of 16 kB in a mount namespace of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    script = (f"mount -t tmpfs -o size=16k none {disk} && cd {ROOT} && {sys.executable} sample.py "
              f"--checkpoint {checkpoint} --num_images 2000 --steps 1 --output_dir {disk}; "
              f"echo code $?; ls -A {disk}")
    run = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True)
    if "unshare" in run.stderr or "mount" in run.stderr:
        pytest.skip("this machine allows no mount namespace: " + run.stderr.strip())
    error = [line for line in run.stderr.splitlines() if "error" in line]
    assert (len(error) == 1 and "No space left on device" in error[0]
            and "Traceback" not in run.stderr)
    assert run.stdout.rstrip().endswith("code 2")               # and ls shows nothing after it


# ---- The house

def test_imports_run_one_way():
    """A file knows only files of lines above; train and sample do not know each other (README)."""
    storeys = ("distributed files models muon measures schedules", "diffusion images", "utils",
               "checkpoint command_line",
               "convergence folders inside interop plan predictors synthetic",
               "data drawing figures loop presets recipe running",
               "classifier load network_figures reference session training_data verify", "train",
               "comparisons export sample",
               "benchmark evaluate interpolate run_figures sampling_figures",
               "contest diagnose edit visualize_diffusion", "visualize_model")
    below, everything = set(), set(" ".join(storeys).split())
    assert everything == {path.stem for path in ROOT.glob("*.py")} | {"models"}
    for storey in storeys:
        for name in storey.split():
            for path in ((ROOT / "models").glob("*.py") if name == "models"
                         else [ROOT / f"{name}.py"]):
                found = set(re.findall(
                    r"^\s*(?:from|import) (\w+)", path.read_text(), re.M)) & everything
                assert found - {name} <= below, path
        below.update(storey.split())


def test_every_wrong_edit_finds_its_line_once():
    """A line that was rewritten left its edit behind, unseen until the whole table was run."""
    from mutate import EDITS
    lost = [(edit.name, edit.file) for edit in EDITS
            if (ROOT / edit.file).read_text().count(edit.right) != 1]
    assert not lost


def test_drawing_does_not_wait_for_libraries_that_it_does_not_need():
    """torchvision and torch's compiler were a third of the ten seconds that 64 digits took."""
    code = ("import sys, load, sample\nload.load_model(load.PRETRAINED / 'mnist.pt')\n"
            "sys.exit(' '.join({'torchvision', 'torch._dynamo'} & set(sys.modules)) or 0)")
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and "Traceback" not in run.stderr, run.stderr


def test_importing_a_file_runs_nothing(tmp_path):
    names = [path.stem for path in ROOT.glob("*.py")]
    code = "import " + ", ".join(names) + "; import torch; torch.manual_seed(0)"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                         env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"})
    assert run.returncode == 0 and run.stdout == "" and not list(tmp_path.iterdir())


# ---- Names that readers of the tutorials look for

@pytest.mark.parametrize("file, names", [
    ("diffusion", "DiffusionProcess SAMPLERS"), ("models", "create_model"),
    ("models.unet", "TimeEmbedding DownBlock UpBlock SimpleUNet"),
    ("train", "train_epoch sample_images train main"),
    ("utils", "save_images plot_losses count_parameters get_device get_timesteps"),
    ("sample", "main load_model")])
def test_a_fixed_name_is_in_its_fixed_file(file, names):
    module = importlib.import_module(file)
    assert all(callable(getattr(module, name)) or name == "SAMPLERS" for name in names.split())
