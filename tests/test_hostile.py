"""What a hostile tester broke once, each with its story. Nothing is lost; bad input is one line."""

import importlib
import json
import os
import signal
import struct
import subprocess
import sys
import zlib
from types import SimpleNamespace

import pytest
import torch
import torchvision
from PIL import Image

import benchmark
import checkpoint
import data
import diagnose
import edit
import evaluate
import export
import folders
import interpolate
import run_figures
import sample
import visualize_diffusion as figures
import visualize_model
from classifier import Classifier
from command_line import command, speaks
from conftest import ROOT, TINY, fails, sheets, write_model
from data import Batches, split_held_out
from diffusion import DiffusionProcess
from drawing import card_recipe, choose_labels
from files import write_file
from images import as_text, read_note, save_gif, save_images
from load import PRETRAINED, find_by_digest, find_model, load_model
from models import create_model, model_defaults
from models.attention_unet import SelfAttention
from plan import Plan
from reference import load_reference
from running import Signals, Stopped
from session import sample_images
from train import main as train_main
from train import train


# ---- Nothing is lost

def test_a_run_that_fails_at_once_has_replaced_nothing(few_digits, tmp_path):
    """The files of a finished run were deleted before the first step of the next one, which then
    failed, and said that earlier checkpoints were untouched."""
    train(**few_digits, **TINY, steps=4, output_dir=tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.pt")}
    with pytest.raises(ValueError, match="earlier checkpoints are untouched"):
        train(**few_digits, **TINY, steps=4, learning_rate=1e30, sample_every=4, save_every=4,
              output_dir=tmp_path, overwrite=True)
    assert len(before) > 1 and before == {path: path.read_bytes()
                                          for path in tmp_path.rglob("*.pt")}


def test_a_run_that_goes_well_replaces_all_of_the_earlier_one(few_digits, tmp_path):
    train(**few_digits, **TINY, steps=4, save_every=1, output_dir=tmp_path)
    train(**few_digits, **TINY, steps=2, save_every=2, output_dir=tmp_path, overwrite=True)
    names = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.pt"))
    assert names == ["checkpoints/model_step_0000002.pt", "model_final.pt"]


def test_single_images_of_other_places_and_of_other_people_stay(two_shades, tmp_path):
    """--first_index 4 deleted images 0 to 3, and whatever else began with a digit."""
    flags = ["--checkpoint", str(two_shades), "--output_dir", str(tmp_path), "--device", "cpu",
             "--num_images", "4", "--steps", "1", "--single_images"]
    sample.main(flags)
    (tmp_path / "generated_samples" / "2024_my_favourite.png").write_bytes(b"mine")
    sample.main([*flags, "--first_index", "4"])
    names = sorted(path.name for path in (tmp_path / "generated_samples").iterdir())
    assert names == [*(f"{k:04d}.png" for k in range(8)), "2024_my_favourite.png"]


def test_what_is_read_is_not_written_over(two_shades, tmp_path, capsys):
    flags = ["--checkpoint", two_shades, "--output_dir", tmp_path, "--device", "cpu"]
    sample.main([*map(str, flags), "--num_images", "4", "--steps", "1"])
    capsys.readouterr()
    picture = (tmp_path / "generated_samples.png").rename(tmp_path / "recreated.png")
    Image.new("L", (8, 8)).save(tmp_path / "edited_only.png")
    before = [path.read_bytes() for path in (picture, tmp_path / "edited_only.png")]
    assert "written over" in fails(capsys, sample.main, *flags, "--recreate", picture)
    assert "written over" in fails(capsys, edit.main, *flags,
                                   "--images", tmp_path / "edited_only.png")
    assert before == [path.read_bytes() for path in (picture, tmp_path / "edited_only.png")]


def test_a_full_disk_ends_the_making_of_a_cache_in_good_order(tmp_path, monkeypatch):
    """A mapped page without room on disk ended the process (a bus error) and left half a file."""
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folders.os, "posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match="No space"):
        folders.load_folder(sheets(tmp_path / "in", 3), cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_a_closed_terminal_saves_and_nohup_goes_on():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)               # or nohup pytest decides
    try:
        with Signals(), pytest.raises(Stopped, match="SIGHUP"):
            signal.raise_signal(signal.SIGHUP)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)                    # as nohup does
        with Signals():
            signal.raise_signal(signal.SIGHUP)
    except Stopped:
        pytest.fail("a closed terminal stopped what nohup had started")
    finally:
        signal.signal(signal.SIGHUP, before)


# ---- Nothing is silently wrong

@pytest.mark.parametrize("text, count", [("1,2,3,4", 100), ("1,2,3", 20), ("all", 221)])
def test_a_sheet_of_several_labels_remembers_what_was_asked_for(text, count, two_shades, tmp_path,
                                                                monkeypatch):
    """It remembered the number drawn, 104 for 100, and 104 asked for makes 108."""
    classes = list("0123456789")
    y, columns = choose_labels(text, classes, count)
    # the number drawn will not do
    assert len(choose_labels(text, classes, len(y))[0]) != len(y)
    drawn = []
    monkeypatch.setattr(sample, "load_model", lambda *args, **settings: (
        *load_model(two_shades)[:2], {**load_model(two_shades)[2], "classes": classes}))
    monkeypatch.setattr(
        sample, "generate", lambda model, diffusion, num_images, *args, **settings: (
            drawn.append(settings["y"]) or torch.zeros(num_images, 1, 8, 8), []))
    monkeypatch.setattr(sample, "seconds_for", lambda *args: 0.0)
    flags = ["--checkpoint", str(two_shades), "--device", "cpu"]
    sample.main([*flags, "--label", text, "--num_images", str(count),
                 "--output_dir", str(tmp_path)])
    sample.main([*flags, "--recreate", str(tmp_path / "generated_samples.png"),
                 "--output_dir", str(tmp_path / "b")])
    assert torch.equal(drawn[0], y) and torch.equal(drawn[1], y)


def test_classes_are_compared_by_name(two_shades, tmp_path):
    """Ten folders (one, two, ...) were held against digits in alphabetical order: 8 % agreement."""
    for name in ("light", "night"):
        sheets(tmp_path / "in" / name, 60, 8)
    evaluate.main(["--checkpoint", str(two_shades), "--dataset", str(tmp_path / "in"),
                   "--num_images", "100", "--steps", "2", "--device", "cpu",
                   "--output_dir", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert "agreement" not in found["samples"] and "set aside here" in found["held_out"]


def test_a_model_is_held_against_the_folder_that_was_held_out_beside_its_own(tmp_path):
    """--val_dir was forgotten: the floor was that of images that were trained on."""
    own, others = sheets(tmp_path / "train", 30), sheets(tmp_path / "test", 12, seed=1)
    images, held = folders.load_folder(own)[0], folders.load_folder(others)[0]
    about = {"name": str(own), "image_size": 16, "channels": 1, "classes": None,
             "val_fraction": 0.0, "seed": 0, "val_dir": str(others),
             "images": Batches(images, None).fingerprint(),
             "held_out": Batches(held, None).fingerprint()}
    found, labels, aside, _, what = load_reference(about, "data")
    assert torch.equal(found, images) and labels is None and what == f"images of {others}"
    assert torch.equal(aside.flatten(1).double().mean(1).sort().values,
                       held.flatten(1).double().mean(1).sort().values)
    assert "lies elsewhere" in load_reference({**about, "val_dir": "nowhere"}, "data").what
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=f"--val_dir {tmp_path / 'empty'}: .*no images found"):
        load_reference({**about, "val_dir": str(tmp_path / "empty")}, "data")
    assert load_reference({**about, "val_dir": "nowhere"}, "data",
                          str(others)).what.endswith("set aside here")


def test_held_out_images_of_other_classes_have_none_of_the_model_s(two_shades, tmp_path):
    """They serve as a floor of distances; what asks for a class leaves them out."""
    for part, names in (("in", "ab"), ("val", "cd")):
        for seed, name in enumerate(names):
            sheets(tmp_path / part / name, 12, size=8, seed=seed)
    own, others = str(tmp_path / "in"), str(tmp_path / "val")
    images = Batches(*folders.load_folder(own, with_labels=True)).fingerprint()
    about = {"name": own, "image_size": 8, "channels": 1, "classes": ["a", "b"], "seed": 0,
             "val_fraction": 0.0, "val_dir": others, "images": images,
             "held_out": Batches(folders.load_folder(others)[0]).fingerprint()}
    real = load_reference(about, "data")
    assert real.labels.tolist() == [0] * 12 + [1] * 12 and real.held_labels is None
    assert real.what == f"images of {others}"
    model, diffusion, _ = load_model(two_shades)
    found, _ = evaluate.evaluate(real.images[:20], model, diffusion, about, real.labels[:20], real,
                                 Classifier(1, 8, 2).eval(), torch.device("cpu"))
    assert "agreement" in found["samples"] and "agreement" not in found["floor"]
    assert len(found["loss_by_timestep"]) == 10


def test_held_out_images_of_a_folder_that_has_grown_are_not_called_held_out(tmp_path):
    """One more picture, and another fifth of them was taken for the images not trained on."""
    folder = sheets(tmp_path / "in", 60)
    images, _ = folders.load_folder(folder)
    told = Batches(images, None, indices=split_held_out(60, 0.2, 0)[1]).fingerprint()
    about = {"name": str(folder), "image_size": 16, "channels": 1, "classes": None,
             "val_fraction": 0.2, "seed": 0, "held_out": told}
    assert load_reference(about, "data").what == "held-out images"
    sheets(tmp_path / "more", 61, seed=1)
    (tmp_path / "more" / "060.png").rename(folder / "0.png")           # before all others
    assert "trained on some" in load_reference(about, "data").what


@pytest.mark.parametrize("share", [0.2, 0.0])
def test_the_first_held_out_images_of_a_folder_are_like_all_of_them(share, tmp_path):
    """The floor of 100 was that of the first sub-folder alone."""
    for k, name in enumerate(("dark", "light")):
        sheets(tmp_path / name, 150, seed=k)
    about = {"name": str(tmp_path), "image_size": 16, "channels": 1, "classes": ["dark", "light"],
             "val_fraction": share, "seed": 0}
    images, _, held, labels, _ = load_reference(about, "data")
    half = len(held) // 2
    assert 0.2 < labels[:half].double().mean() < 0.8 and len(images) + len(held) == 300
    assert all((held != image).flatten(1).any(1).all() for image in images)
    _, _, again, same, _ = load_reference(about, "data")
    assert torch.equal(held, again) and torch.equal(labels, same)


def test_an_average_that_never_begins_is_refused(few_digits, tmp_path, capsys):
    """The model drawn with was then the untrained one."""
    with pytest.raises(ValueError, match="nothing would be averaged"):
        train(**few_digits, **TINY, steps=4, ema_every=10, output_dir=tmp_path)


def test_what_is_given_empty_is_not_taken_for_not_given(tmp_path, capsys):
    """--recreate "$NOT_SET" drew 64 new pictures over the old sheet."""
    assert "--recreate is given, but empty" in fails(capsys, sample.main, "--recreate", "",
                                                     "--output_dir", tmp_path)
    assert "--images is given, but empty" in fails(capsys, edit.main, "--images", "",
                                                   "--output_dir", tmp_path)


def test_the_weights_that_made_a_picture_are_found():
    digest = load_model(PRETRAINED / "synthetic_digits.pt")[2]["digest"]
    assert find_by_digest(digest) == PRETRAINED / "synthetic_digits.pt"
    with pytest.raises(ValueError, match="name with --checkpoint"):
        find_by_digest("0")


def test_the_model_of_a_run_that_was_stopped_is_named(tmp_path):
    (tmp_path / "model_latest.pt").touch()
    with pytest.raises(ValueError, match=f"there is {tmp_path}/model_latest.pt, of a run that"):
        find_model(tmp_path / "model_final.pt")


def test_a_flag_is_not_taken_for_a_longer_one(tmp_path, capsys):
    """--seed 5 was read as --seeds 5, and the walk then lacked a second end."""
    error = fails(capsys, interpolate.main, "--seed", 5, "--output_dir", tmp_path)
    assert "unrecognized arguments: --seed 5" in error


@pytest.mark.parametrize("flag", ["--dataset", "--val_dir", "--seed"])
def test_two_dashes_are_no_value(flag, tmp_path, capsys):
    """Python 3.11 makes an empty list of them, and a traceback came of that; 3.13 takes them."""
    assert "--" in fails(capsys, train_main, "--dataset", "synthetic_digits", f"{flag}=--",
                         "--steps", 1, "--output_dir", tmp_path)


@pytest.mark.parametrize("flag", ["--dataset", "--val_dir", "--cache_dir"])
def test_a_link_to_itself_is_one_line(flag, few_digits, tmp_path, capsys):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    more = ["--dataset", sheets(tmp_path / "in", 8)] if flag == "--cache_dir" else []
    fails(capsys, train_main, *more, flag, tmp_path / "loop", "--steps", 1,
          "--output_dir", tmp_path / "out")


def test_the_beginning_of_a_long_name_is_shown():
    assert as_text("n" * 200, most=30) == "n" * 27 + "..." and as_text("$x") == r"\$x"


def test_every_command_explains_itself(capsys):
    """A "70% of" in sample.py's help ended it in a traceback of argparse."""
    commands = [path.stem for path in ROOT.glob("*.py") if "\n@command\n" in path.read_text()]
    assert len(commands) > 10
    for name in commands:
        with pytest.raises(SystemExit) as end:
            importlib.import_module(name).main(["--help"])
        said = capsys.readouterr().out
        assert not end.value.code and said.startswith("usage:")
        assert ("noisier 70% of" in " ".join(said.split())) == (name in ("sample", "evaluate"))


def test_where_an_error_arose_is_shown_to_whoever_asks(tmp_path):
    """To others it is not: see conftest.fails."""
    run = subprocess.run([sys.executable, "-X", "dev", ROOT / "export.py", "--checkpoint", "no.pt"],
                         cwd=tmp_path, capture_output=True, text=True)
    assert "no.pt" in run.stderr and "Traceback" in run.stderr


@pytest.mark.parametrize("change, reason", [
    ({"heads": 4.0}, "heads is 4.0"), ({"scale_shift": "no"}, "scale_shift is 'no'"),
    ({"dropout": float("nan")}, "dropout"),
    ({"grad_checkpoint": torch.ones(3)}, "no setting 'grad_checkpoint'"),
    ({"multipliers": (1, True)}, "multipliers is"), ({"num_classes": "3"}, "num_classes is '3'")])
def test_settings_of_another_kind_do_not_make_a_network(tmp_path, change, reason):
    config = dict(model_defaults("attention"), base_channels=8, multipliers=(1, 2),
                  attention_levels=(1,), groups=4, time_emb_dim=16, num_classes=3)
    entries = checkpoint.load_checkpoint(write_model(tmp_path / "simple.pt"))
    entries.update(model_name="attention", ema=create_model("attention", **config).state_dict())
    checkpoint.save_checkpoint(tmp_path / "model.pt", {**entries, "model_config": config})
    load_model(tmp_path / "model.pt")
    checkpoint.save_checkpoint(tmp_path / "other.pt",
                               {**entries, "model_config": {**config, **change}})
    with pytest.raises(ValueError, match=f"do not fit together.*{reason}"):
        load_model(tmp_path / "other.pt")


@pytest.mark.parametrize("levels", [[900, 3], [-5, -1], [10, 1001], [0, 10**40]])
def test_levels_that_no_flag_could_name_are_not_taken_from_a_card(levels):
    """A picture drawn so could not be made again."""
    assert card_recipe({"guidance_interval": [3, 900]}, 1000)["guidance_interval"] == (3, 900)
    assert card_recipe({"guidance_interval": levels}, 1000)["guidance_interval"] is None


def test_weak_weights_are_no_data_set():
    """They lie beside the others, for --weak; alone they draw worse."""
    with pytest.raises(ValueError, match="choose from african_fabrics, fashion_mnist, mnist, "
                                         "synthetic_digits, or"):
        find_model(dataset="african_fabrics_weak")


def test_images_are_mended_with_the_shipped_weights_that_know_them(tmp_path, monkeypatch, capsys):
    """edit.py --dataset fashion_mnist drew garments out of strokes of digits."""
    monkeypatch.chdir(tmp_path)
    assert find_model(images="fashion_mnist") == PRETRAINED / "fashion_mnist.pt"
    assert "fashion_mnist.pt" in capsys.readouterr().out
    assert (find_model(images="cifar10") == find_model(images="african_fabrics_weak")
            == PRETRAINED / "mnist.pt")
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "model_final.pt").touch()
    assert find_model(images="fashion_mnist") == "outputs/model_final.pt"            # your own


def test_a_shared_file_does_not_tell_where_the_images_lay(two_shades, tmp_path):
    entries = checkpoint.load_checkpoint(two_shades)
    entries["data"] = {**entries["data"], "name": "/home/me/private/photos"}
    checkpoint.save_checkpoint(tmp_path / "own.pt", entries)
    export.export(tmp_path / "own.pt", tmp_path / "small.pt")
    assert b"private" not in (tmp_path / "small.pt").read_bytes()
    assert load_model(tmp_path / "small.pt")[2]["name"] == "photos"


# ---- Bad input is one line

def test_a_class_without_pictures_is_named(tmp_path):
    sheets(tmp_path / "in" / "a", 3)
    (tmp_path / "in" / "b").mkdir()
    with pytest.raises(ValueError, match="no usable image of b"):
        train(str(tmp_path / "in"), labels=True, steps=1, output_dir=tmp_path / "out", **TINY)


def test_a_picture_that_confuses_its_decoder_is_named_and_skipped(tmp_path):
    """An empty colour profile makes PIL raise IndexError: the whole folder could not be read."""
    sheets(tmp_path, 3)
    raw = (tmp_path / "000.png").read_bytes()
    chunk = struct.pack(">I", 0) + b"iCCP" + struct.pack(">I", zlib.crc32(b"iCCP"))
    (tmp_path / "bad.png").write_bytes(raw[:-12] + chunk + raw[-12:])
    with pytest.raises(IndexError):
        Image.open(tmp_path / "bad.png").load()
    assert len(folders.load_folder(tmp_path)[0]) == 3
    with pytest.raises(ValueError, match="does not tell"):
        read_note(tmp_path / "bad.png")


@pytest.mark.parametrize("suffix, damage", [
    (".json", b"{}"), (".json", b"[1]"), (".json", b""),
    (".npy", b""), (".npy", b"\x93NUMPY\x01\x00"),
    (".json", json.dumps({"names": ["a"], "problems": []}).encode()),
    (".json", json.dumps({"names": ["a", 5, "x/b"], "problems": []}).encode())])
def test_a_damaged_cache_is_one_line(suffix, damage, tmp_path):
    folder = sheets(tmp_path / "in", 3)
    folders.load_folder(folder, cache_dir=tmp_path / "cache")
    path, = (tmp_path / "cache").glob(f"*{suffix}")
    path.write_bytes(damage)
    with pytest.raises(ValueError, match="delete both"):
        folders.load_folder(folder, cache_dir=tmp_path / "cache")


def test_a_cache_among_the_images_is_refused(tmp_path):
    """With --labels it became a class without images, and the next run failed."""
    folder = sheets(tmp_path / "in", 3)
    for cache in (folder, folder / "a" / "cache"):
        with pytest.raises(ValueError, match="within"):
            folders.load_folder(folder, cache_dir=cache)
    assert len(list(folder.iterdir())) == 3


def test_an_error_names_the_file_that_was_asked_for(tmp_path):
    """It named the temporary file, which nobody where that could not be deleted either."""
    (tmp_path / "taken").write_bytes(b"")
    with pytest.raises(OSError) as error:
        write_file(tmp_path / "taken" / "sheet.png", b"x")
    assert error.value.filename == str(tmp_path / "taken" / "sheet.png")


def test_labels_beyond_the_classes_are_damage(monkeypatch):
    class Source:
        def __init__(self, *args, **settings):
            self.data, self.targets = (torch.zeros(3, 28, 28, dtype=torch.uint8),
                                       torch.tensor([0, 9, 20]))

    monkeypatch.setattr(torchvision.datasets, "MNIST", Source)
    with pytest.raises(ValueError, match="one is 20"):
        data.get_dataset("mnist")


def test_too_few_images_to_measure_is_said_before_anything_is_drawn(tmp_path, capsys, monkeypatch):
    """It was a traceback after all had been drawn."""
    folder = sheets(tmp_path / "in", 8, 8)
    write_model(tmp_path / "model.pt")
    monkeypatch.setattr(evaluate, "generate", None)
    assert "need 5 of each" in fails(capsys, evaluate.main, "--checkpoint", tmp_path / "model.pt",
                                     "--dataset", folder, "--output_dir", tmp_path)


def test_reports_are_counted_without_counting_to_a_billion():
    for plan in (Plan(17, 3, 5, 1, "step"), Plan(30, 3, 5, 1, "step"),
                 Plan(12, 4, 20, 4, "epoch"), Plan(7, 7, 7, 1, "step")):
        step, count = 0, 0
        while step < plan.total_steps:
            step, count = plan.next_report(step), count + 1
        assert plan.num_reports() == count, plan
    assert Plan(10**9, 1, 10**9, 1, "step").num_reports() == 10**9


def test_names_from_outside_are_no_formulas():
    assert as_text("$^$") == r"\$^\$" and as_text("lat\udce9in") == r"lat\udce9in"


def test_sheets_of_different_lengths_share_a_figure(tmp_path, monkeypatch):
    """A resumed run may draw more pictures than before."""
    (tmp_path / "samples").mkdir()
    for epoch, count in ((1, 4), (2, 16)):
        save_images(torch.zeros(count, 1, 16, 16), tmp_path / "samples" / f"epoch_{epoch:03d}.png")
    drawn = []
    monkeypatch.setattr(run_figures, "save_strip", lambda rows, *args, **kwargs: drawn.extend(rows))
    run_figures.epochs_figure(tmp_path, tmp_path / "epochs.png", 16, 6)
    assert [tuple(row.shape) for row in drawn] == [(2, 3, 16, 16)] * 4


def test_the_operations_of_attention_count_on_a_cpu():
    """Its fused kernel went uncounted. N places, C channels: 2 N C 3C for queries, keys and values,
    2 N N C for their products and as many for the mean, 2 N C C at the end; back twice as many."""
    class Attending(SelfAttention):
        image_channels = 64

        def forward(self, x, t):
            return super().forward(x)

    C, N = 64, 32 * 32
    assert benchmark.training_flops(lambda: Attending(64, heads=4, groups=32), 32) == 3 * (
        2 * N * C * 3 * C + 2 * 2 * N * N * C + 2 * N * C * C)


def test_a_picture_that_rests_too_long_is_one_line(tmp_path):
    frames = [Image.new("RGB", (8, 8))] * 80
    with pytest.raises(ValueError, match="rest"):
        save_gif(frames, tmp_path / "long.gif", seconds=10)


@pytest.mark.parametrize("fps", [8, 15, 30])
def test_a_gif_keeps_its_pace(fps, tmp_path):
    """Its clock counts hundredths of a second; each frame was cut to 120 ms in place of 125."""
    frames = [Image.new("L", (4, 4), k) for k in range(25)]
    save_gif(frames, tmp_path / "x.gif", 1 / fps, 1 / fps)
    with Image.open(tmp_path / "x.gif") as gif:
        times = [(gif.seek(k), gif.info["duration"])[1] for k in range(gif.n_frames)]
    assert sum(times[:-1]) == pytest.approx(24_000 / fps, abs=5) and max(times) - min(times) <= 10


@pytest.mark.parametrize("rank, world", [("5", "1"), ("-1", "2"), ("0", "0"), ("0", "x"), ("", "")])
def test_a_place_that_there_is_not_is_one_line(rank, world, few_digits, tmp_path, monkeypatch,
                                               capsys):
    """RANK=5 of 1 waited for six hours; WORLD_SIZE=0 divided the memory by zero."""
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    assert "no place among several processes" in fails(
        capsys, train_main, "--dataset", "synthetic_digits", "--output_dir", tmp_path)
    assert len(folders.load_folder(sheets(tmp_path / "in", 6))[0]) == 6


def test_an_error_is_told_also_where_RANK_is_set_without_torchrun(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for torchrun, told in (("", True), ("1", False)):
        if torchrun:
            monkeypatch.setenv("TORCHELASTIC_RUN_ID", torchrun)
        with pytest.raises(SystemExit):
            sample.main(["--label", "no such class", "--dataset", "synthetic_digits",
                         "--output_dir", str(tmp_path)])
        assert ("unknown class" in capsys.readouterr().err) == told


@pytest.mark.parametrize("dataset, output", [
    ("run/samples", "run"), ("in", "in"), ("in", "in/out"),
    ("run/samples/more", "run"), ("run/checkpoints", "run")])
@pytest.mark.parametrize("flag", ["--dataset", "--val_dir", "--verify"])
def test_a_run_keeps_apart_from_the_images_that_it_learns_from(flag, dataset, output, tmp_path,
                                                               capsys):
    """Six pictures samples/epoch_*.png, the data set, were deleted as those of an earlier run."""
    folder = sheets(tmp_path / dataset, 6)
    for k, path in enumerate(sorted(folder.iterdir())):
        path.rename(folder / f"epoch_{k:03d}.png")
    other = ["--dataset", "synthetic_digits"] if flag == "--val_dir" else []
    assert "are not apart" in fails(
        capsys, train_main, *other, "--dataset" if flag == "--verify" else flag, folder,
        *["--verify"] * (flag == "--verify"), "--steps", 2, "--output_dir", tmp_path / output)
    assert len(list(folder.iterdir())) == 6
    data.keep_apart(str(folder), tmp_path / "elsewhere")
    data.keep_apart("mnist", "mnist/out")                               # a name and no folder


def test_pictures_are_not_mended_into_the_set_that_they_come_from(two_shades, tmp_path, capsys):
    """edited.png, one of the set, was written over."""
    folder = sheets(tmp_path / "in", 3)
    assert "are not apart" in fails(capsys, edit.main, "--checkpoint", two_shades, "--dataset",
                                    folder, "--output_dir", folder)
    assert len(list(folder.iterdir())) == 3


def test_a_class_with_another_name_is_another_run(tmp_path):
    for name in ("cat", "dog"):
        sheets(tmp_path / "in" / name, 8)
    settings = dict(TINY, dataset_name=str(tmp_path / "in"), labels=True,
                    output_dir=tmp_path / "out", batch_size=4)
    train(**settings, num_epochs=1)
    (tmp_path / "in" / "cat").rename(tmp_path / "in" / "bat")
    with pytest.raises(ValueError, match=r"other classes \(\['cat', 'dog'\] then, "
                                         r"\['bat', 'dog'\] now"):
        train(**settings, num_epochs=2, resume="latest")


def test_classes_that_are_called_by_numbers_are_asked_for_by_their_names():
    """The error offered "0 (1), 1 (2)", and --label 1 then drew the first."""
    assert choose_labels("2", ["1", "2", "3"], 4)[0].tolist() == [1] * 4
    with pytest.raises(ValueError, match="choose from all, none, 1, 2, 3$"):
        choose_labels("0", ["1", "2", "3"], 4)
    with pytest.raises(ValueError, match="choose from all, none, 0 .cat., 1 .dog.$"):
        choose_labels("9" * 5000, ["cat", "dog"], 4)


def test_the_other_processes_leave_quietly_when_the_first_has_stopped():
    """They printed a traceback: connection closed by peer."""
    with pytest.raises(Stopped) as stop, Signals(ignore=True) as signals:
        signal.raise_signal(signal.SIGTERM)
        with signals.postponed():
            pass                                                        # nothing stops here
        raise RuntimeError("Connection closed by peer")
    assert stop.value.told and stop.value.number == signal.SIGTERM
    with pytest.raises(RuntimeError), Signals(ignore=True):             # no signal: a fault of ours
        raise RuntimeError("Connection closed by peer")


def test_a_rank_without_a_world_still_speaks(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert speaks()


def test_altered_counts_of_a_checkpoint_are_refused(few_digits, tmp_path):
    train(**few_digits, **TINY, steps=2, output_dir=tmp_path / "run")
    entries = checkpoint.load_checkpoint(tmp_path / "run" / "model_final.pt")
    groups = [{**entries["optimizer"]["param_groups"][0], **changed} for changed in (
        {"eps": "x"}, {"amsgrad": True}, {"betas": (0.9,)}, {"maximize": True},
        {"weight_decay": -1.0}, {"lr": "x"})]
    spoilt = [{"optimizer": {**entries["optimizer"], "param_groups": [group]}} for group in groups]
    for change in ({"ema_updates": "x"}, {"ema_updates": -10}, {"reported": "x"},
                   {"held_out_losses": None}, {"held_out_losses": torch.zeros(3)}, *spoilt):
        checkpoint.save_checkpoint(tmp_path / "bad.pt", {**entries, **change})
        with pytest.raises(ValueError, match="cannot be resumed"):
            train(**few_digits, **TINY, steps=2, resume=str(tmp_path / "bad.pt"),
                  output_dir=tmp_path / "other")


# ---- Taken for something else than it is

def test_half_of_a_large_set_exchanged_is_another_set():
    images = torch.randint(256, (2500, 1, 4, 4), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(0))
    before = Batches(images).fingerprint()
    images[1::2] = 0
    assert Batches(images).fingerprint() != before


@pytest.mark.parametrize("images, labels, words", [
    (torch.rand(8, 1, 4, 4) * 2 - 1, None, "must be uint8"),
    (torch.zeros(8, 1, 4, 4, dtype=torch.uint8), torch.zeros(5, dtype=torch.long),
     "8 class indices"),
    (torch.zeros(8, 1, 4, 4, dtype=torch.uint8), [0] * 8, "8 class indices")])
def test_batches_of_the_wrong_kind_are_refused(images, labels, words):
    """Floats in [-1, 1] became black pictures."""
    with pytest.raises(ValueError, match=words):
        Batches(images, labels)


def test_a_mask_is_cut_as_the_picture_is(tmp_path):
    """The picture lost its sides and the mask was squeezed, so that the hole lay elsewhere."""
    mask = Image.new("L", (24, 8), 255)
    mask.paste(0, (8, 0, 12, 8))                            # the left half of the central square
    mask.save(tmp_path / "mask.png")
    assert torch.equal(edit.read_mask(str(tmp_path / "mask.png"), 8), edit.read_mask("left", 8))


@pytest.mark.parametrize("folder", ["generated_samples", "generation_frames", "samples"])
def test_what_sample_writes_does_not_replace_what_the_model_learnt_from(folder, tmp_path, capsys):
    path = write_model(tmp_path / "m.pt", name=str(tmp_path / "out" / folder))
    assert "not apart" in fails(capsys, sample.main, "--checkpoint", path,
                                "--output_dir", tmp_path / "out")


def test_only_frames_of_ours_are_cleared_away(tmp_path):
    folder = tmp_path / "generation_frames"
    folder.mkdir()
    for name in ("frame_000_mine.png", "frame_007_t0100.png", "frame_008_finished.png"):
        (folder / name).write_bytes(b"x")
    x = torch.zeros(1, 1, 8, 8)
    sample.save_intermediate([(9, x, x), (-1, x, x)], tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == [
        "frame_000_mine.png", "frame_000_t009.png", "frame_001_finished.png"]


def test_a_model_is_not_led_away_from_itself(tmp_path, capsys):
    path = write_model(tmp_path / "m.pt")
    error = fails(capsys, sample.main, "--checkpoint", path, "--weak", path,
                  "--output_dir", tmp_path)
    assert "is the model itself" in error
    other = write_model(tmp_path / "other.pt", zero=True)
    assert "--guidance 1 is none" in fails(capsys, sample.main, "--checkpoint", path,
                                           "--weak", other, "--guidance", 1,
                                           "--output_dir", tmp_path)


@pytest.mark.parametrize("flags, words", [
    (["--guidance", 3, "--guidance_interval", "40,50"], "go from 0 to 39"),
    (["--guidance", 3, "--guidance_interval", "10,41"], "go from 0 to 39"),
    (["--guidance", 3, "--guidance_interval", "1,5", "--steps", 2], "none of the 2 levels"),
    (["--label", "none", "--guidance_interval", "10,20"], "no class is asked for"),
    (["--guidance", 1, "--guidance_interval", "10,20"], "--guidance 1 is none")])
def test_guidance_that_cannot_act_is_refused_for_what_was_typed(flags, words, tmp_path, capsys):
    assert words in fails(capsys, sample.main, "--checkpoint", write_model(tmp_path / "m.pt"),
                          *flags, "--output_dir", tmp_path)


def test_export_writes_over_no_classifier(tmp_path, two_shades):
    output = tmp_path / "classifier.pt"
    output.write_bytes((PRETRAINED / "classifier_mnist.pt").read_bytes())
    with pytest.raises(ValueError, match="a classifier"):
        export.export(two_shades, output)


def test_a_linked_folder_is_named_and_is_no_class(tmp_path, capsys):
    sheets(tmp_path / "set" / "a", 3)
    sheets(tmp_path / "elsewhere", 3)
    (tmp_path / "set" / "b").symlink_to(tmp_path / "elsewhere")
    assert folders.class_folders(tmp_path / "set") == ["a"]
    assert len(folders.load_folder(tmp_path / "set")[0]) == 3
    assert "not followed:\n  b" in capsys.readouterr().out


def test_a_figure_of_a_folder_is_not_written_into_it(tmp_path, capsys):
    sheets(tmp_path / "set", 8)
    assert "not apart" in fails(capsys, visualize_model.main, "--figure", "features",
                                "--dataset", tmp_path / "set", "--output_dir", tmp_path / "set")


def test_the_bare_name_that_a_card_has_is_no_folder(tmp_path, monkeypatch):
    """A shipped model of african_fabrics would not draw into a folder of that name."""
    monkeypatch.chdir(tmp_path)
    data.keep_apart_from_own({"name": "african_fabrics"}, "african_fabrics")
    with pytest.raises(ValueError, match="not apart"):
        data.keep_apart_from_own({"name": str(tmp_path / "photos")}, "photos")


def test_a_picture_that_is_not_there_is_called_so(tmp_path, capsys):
    error = fails(capsys, edit.main, "--checkpoint", write_model(tmp_path / "m.pt"),
                  "--images", "no.png", "--output_dir", tmp_path / "out")
    assert error.strip().endswith("no.png: no such file")


@pytest.mark.parametrize("name", ["none", "all"])
def test_a_class_of_the_name_of_a_choice_is_refused(name, tmp_path):
    for folder in ("b", name):
        sheets(tmp_path / "set" / folder, 8)
    with pytest.raises(ValueError, match="cannot be called none or all"):
        train(str(tmp_path / "set"), steps=1, labels=True, output_dir=tmp_path / "out", **TINY)


def test_a_name_with_a_comma_is_one_name():
    assert choose_labels("red, blue", ["red", "red, blue", "7"], 4)[0].tolist() == [1] * 4
    assert choose_labels("red,7", ["red", "blue", "7"], 4)[0].tolist() == [0, 0, 2, 2]


@pytest.mark.parametrize("main, flags, words", [
    (interpolate.main, ["--compare", "--loop", "--fps", "3"],
     "--fps, --loop would be of no use to --compare"),
    (figures.main, ["--sampler", "ddpm", "--timesteps", "1"],
     "--sampler would be of no use to --figure forward"),
    (figures.main, ["--figure", "explore", "--schedule", "cosine"],
     "--schedule would be of no use"),
    (figures.main, ["--figure", "predictors", "--image_size", "8"],
     "--image_size would be of no use"),
    (visualize_model.main, ["--figure", "time", "--label", "7"],
     "--label would be of no use to --figure time"),
    (figures.main, ["--figure", "one_step", "--sampler", "ddim"],       # its default
     "--sampler would be of no use"),
    (train_main, ["--dataset", "synthetic_digits", "--steps", 1, "--fit", "crop",     # or it trains
                  "--cache_dir", "c"],
     "--fit, --cache_dir would be of no use to synthetic_digits: no folder"),
    (train_main, ["--dataset", "synthetic_digits", "--val_dir", "mnist", "--fit", "crop"],
     "--fit would be of no use"),
    (train_main, ["--dataset", "photos", "--data_dir", "d"],
     "--data_dir would be of no use to photos"),
    (train_main, ["--dataset", "photos", "--label_drop", 0.5],
     "--label_drop would be of no use to a training without"),
    (train_main, ["--no-labels", "--label_drop", 0.1],
     "--label_drop would be of no use to a training without"),
    (train_main, ["--dataset", "photos", "--val_dir", "others", "--val_fraction", 0.2],
     "give one of them"),
    (train_main, ["--dataset", "synthetic_digits", "--steps", 1, "--resume", "--overwrite"],
     "give one of them"),
    (interpolate.main, ["--compare", "--frames", 10], "--compare draws 9 at most"),
    (visualize_model.main, ["--figure", "table", "--model", "simple", "--checkpoint", "x.pt"],
     "give one of them")])
def test_flags_that_would_be_passed_over_are_refused(main, flags, words, tmp_path, capsys):
    assert words in fails(capsys, main, *flags, "--output_dir", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_card_is_only_printed(tmp_path, capsys):
    error = fails(capsys, export.main, "--card", PRETRAINED / "mnist.pt", "--training", "two hours",
                  "--output", tmp_path / "x.pt")
    assert "--training, --output would be of no use" in error or "--output, --training" in error


def test_a_share_of_nothing_goes_with_a_held_out_folder(tmp_path, capsys):
    """--val_fraction 0, which takes a preset's share away, was refused as of no use."""
    error = fails(capsys, train_main, "--dataset", "photos", "--val_dir", "others",
                  "--val_fraction", 0, "--output_dir", tmp_path)
    assert "unknown dataset 'photos'" in error


def test_more_classes_than_pictures_are_refused(tmp_path, capsys):
    path = write_model(tmp_path / "m.pt")
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    assert "2 classes for 1 pictures" in fails(capsys, edit.main, "--checkpoint", path,
                                               "--images", tmp_path / "a.png", "--label", "a,b",
                                               "--output_dir", tmp_path / "out")
    for main, *flags in ((figures.main, "--figure", "one_step"), (interpolate.main,),
                         (visualize_model.main,)):
        assert "2 classes, where one is drawn" in fails(
            capsys, main, *flags, "--checkpoint", path, "--label", "a,b",
            "--output_dir", tmp_path / "out")


def test_an_interrupt_that_python_has_wrapped_is_still_one(capsys):
    """In __set_name__, run by torch's late imports, Python 3.11 makes a signal a RuntimeError."""
    @command
    def main(argv=None):
        raise RuntimeError("Error calling __set_name__") from Stopped(signal.SIGINT)

    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 130 and "stopped by SIGINT" in capsys.readouterr().err


def test_a_model_whose_size_does_not_fit_its_network_is_named(tmp_path, capsys):
    path = write_model(tmp_path / "m.pt", image_size=30)
    assert str(path) in fails(capsys, sample.main, "--checkpoint", path, "--output_dir", tmp_path)


def test_a_set_of_which_only_the_weights_come_with_the_project_is_told_apart(tmp_path, capsys):
    told = [fails(capsys, figures.main, "--dataset", name, "--output_dir", tmp_path)
            for name in ("african_fabrics", "asian_fabrics")]
    assert ["the pictures do not" in line for line in told] == [True, False]


@pytest.mark.parametrize("settings, words", [
    (dict(sample_every=-1), "sample_every"), (dict(save_every=0), "save_every"),
    (dict(ema_every=0), "ema_every"), (dict(warmup=-5), "warmup"),
    (dict(weight_decay=-1.0), "weight_decay"), (dict(grad_clip=-1.0), "grad_clip"),
    (dict(min_snr=-1.0), "min_snr"), (dict(label_drop=0.0), "without a class"),
    (dict(label_drop=1.0), "or with one")])
def test_settings_without_sense_are_refused_from_python_too(settings, words, tmp_path):
    """A negative grad_clip turned the gradient round; a negative sample_every never ended."""
    with pytest.raises(ValueError, match=words):
        train("synthetic_digits", steps=1, output_dir=tmp_path, **{**TINY, **settings})


def test_numbers_without_sense_are_refused_by_process_and_network(tiny_model):
    for settings in (dict(guidance=float("nan"), y=0),
                     dict(guidance=2.0, y=0, guidance_interval=(5, 1))):
        with pytest.raises(ValueError, match="must be a number|must be .low, high"):
            DiffusionProcess(10).sample(tiny_model, 8, 1, **settings)
    with pytest.raises(ValueError, match="3 classes for 2 images"):
        DiffusionProcess(10).sample(tiny_model, 8, 2, y=[0, 1, 2])
    with pytest.raises(ValueError, match="seed must lie in"):
        DiffusionProcess(10).sample(tiny_model, 8, 2, seed=2**32)
    for schedule in ([], [[0.9], [0.5]]):
        with pytest.raises(ValueError, match="row of numbers"):
            DiffusionProcess(schedule=schedule)
    with pytest.raises(ValueError, match="belong to the linear schedule"):
        DiffusionProcess(schedule=[0.9, 0.5, 0.1], beta_start=0.3)
    for settings in (dict(num_classes=0), dict(num_classes=-1), dict(image_channels=0)):
        with pytest.raises(ValueError, match="at least 1"):
            create_model(base_channels=8, **settings)


@pytest.mark.parametrize("shape", [(4, 2, 8, 8), (4, 1, 1, 1)])
def test_an_answer_of_another_shape_is_refused(shape):
    """It was stretched to fit: a second channel (a learned variance, say) became another image."""
    def model(x_t, t, y=None):
        return torch.zeros(shape, requires_grad=True)

    with pytest.raises(ValueError, match="the model answers"):
        DiffusionProcess(10).training_loss(model, torch.zeros(4, 1, 8, 8))
    with pytest.raises(ValueError, match="the model answers"):
        DiffusionProcess(10).sample(model, 8, 4)


def test_a_seed_has_32_bits(tmp_path, capsys):
    """Of a longer one the noise was that of another seed's other image."""
    assert "2^32 - 1" in fails(capsys, sample.main, "--seed", 3 + 7 * 2**32,
                               "--output_dir", tmp_path)


def test_a_picture_is_sampled_from_a_network_that_tells_nothing_of_itself():
    class Own(torch.nn.Linear):
        def forward(self, x_t, t, y=None):
            return 0 * x_t

    assert sample_images(Own(1, 1), DiffusionProcess(50), "cpu", 2, 8).shape == (2, 1, 8, 8)


@pytest.mark.parametrize("main", [visualize_model.main, diagnose.main])
def test_shipped_weights_are_those_of_the_images_they_are_shown(main, tmp_path, capsys,
                                                                monkeypatch):
    """Garments were shown to the digits' weights, without a word."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "SYNTHETIC_SIZE", 64)
    if main is diagnose.main:
        monkeypatch.setattr(diagnose, "diagnose", lambda *args: ([], {}))
        main(["--dataset", "synthetic_digits"])
    else:
        main(["--figure", "features", "--dataset", "synthetic_digits",
              "--num_images", "8", "--timesteps", "500"])
    assert "pretrained/synthetic_digits.pt" in capsys.readouterr().out


def test_another_library_s_network_is_built_with_all_it_needs(monkeypatch):
    """The benchmark broke off at the first of them, and no test ran without the libraries."""
    class Stub(torch.nn.Identity):
        def __init__(self, **settings):
            super().__init__()

    monkeypatch.setitem(sys.modules, "denoising_diffusion_pytorch", SimpleNamespace(Unet=Stub))
    monkeypatch.setitem(sys.modules, "diffusers", SimpleNamespace(UNet2DModel=Stub))
    for name in benchmark.PEERS:
        network = benchmark.NETWORKS[name][1]()
        assert (network.image_channels, network.multiple) == (1, 4)


def test_two_folders_of_the_same_names_sizes_and_times_have_a_cache_each(tmp_path):
    for place, grey in (("a", 40), ("b", 220)):
        (tmp_path / place / "images").mkdir(parents=True)
        for k in range(6):
            path = tmp_path / place / "images" / f"{k}.bmp"
            Image.new("L", (8, 8), grey).save(path)
            os.utime(path, (0, 0))
    greys = [folders.load_folder(tmp_path / place / "images", cache_dir=tmp_path / "cache")[0]
             .float().mean().item() for place in "ab"]
    assert greys == [40, 220]


def test_a_folder_called_like_a_data_set_is_not_taken_for_it_once_exported(two_shades, tmp_path):
    entries = checkpoint.load_checkpoint(two_shades)
    for name, want in ((str(tmp_path / "mnist"), "folder mnist"), ("mnist", "mnist"),
                       (str(tmp_path / "x"), "x")):
        entries["data"] = {**entries["data"], "name": name}
        checkpoint.save_checkpoint(tmp_path / "m.pt", entries)
        export.export(tmp_path / "m.pt", tmp_path / "small.pt")
        assert checkpoint.load_checkpoint(tmp_path / "small.pt")["data"]["name"] == want


def test_classes_are_taken_over_by_their_names(tmp_path, capsys):
    """A new class took the vector of whatever class had stood in its place; and a --val_dir with
    fewer classes was measured without any, in silence."""
    for place, names in (("old", ("cat", "dog")), ("new", ("ant", "cat"))):
        for name in names:
            sheets(tmp_path / place / name, 8)
    (tmp_path / "val").mkdir()
    sheets(tmp_path / "val" / "cat", 8)
    settings = dict(TINY, labels=True, steps=1, learning_rate=1e-9, ema_decay=0.0)
    old = train(str(tmp_path / "old"), output_dir=tmp_path / "a", seed=1,
                **settings)[1].class_emb.weight
    assert "without a class" not in capsys.readouterr().out
    new = train(str(tmp_path / "new"), output_dir=tmp_path / "b", val_dir=str(tmp_path / "val"),
                start_from=tmp_path / "a" / "model_final.pt", **settings)[1].class_emb.weight
    assert "without a class" in capsys.readouterr().out
    assert torch.allclose(new[[0, 2]], old[[0, 1]], atol=1e-6)                 # "no class", and cat
    assert (not torch.allclose(new[1], old[1], atol=1e-2)
            and not torch.allclose(new[1], old[2], atol=1e-2))
    told = checkpoint.load_checkpoint(tmp_path / "b" / "model_final.pt")["data"]
    assert told["name"] == str((tmp_path / "new").resolve())


def test_a_named_set_larger_than_the_memory_is_refused_before_it_is_made(monkeypatch):
    monkeypatch.setattr(folders.os, "sysconf", lambda name: 1000)       # a million bytes
    with pytest.raises(ValueError, match="more than half of the memory"):
        data.get_dataset("synthetic_digits", image_size=64, channels=3)


def test_a_reader_that_has_seen_enough_is_no_error():
    """| head -1: "Broken pipe" stood under it or, where the text was short, Python's traceback."""
    for lines in (2, 100_000):
        code = ("from command_line import command\n@command\n"
                f"def main(argv): print(*range({lines}), sep='\\n')\nmain()")
        process = subprocess.Popen([sys.executable, "-c", f"import sys; sys.stdin.read()\n{code}"],
                                   cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE)
        process.stdout.close()
        process.stdin.close()                   # now it may begin
        said = process.stderr.read()
        assert b"Broken pipe" not in said and b"Traceback" not in said and process.wait() == 141
