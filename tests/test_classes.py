"""Training with classes, asking for one of them, and guidance towards it."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import data
import drawing
import sample
import train as train_module
from checkpoint import load_checkpoint, save_checkpoint
from conftest import TINY, fails
from diffusion import DiffusionProcess
from drawing import choose_labels, thinned
from images import png_bytes, read_note
from load import load_model
from loop import train_step
from models import create_model
from sample import generate
from train import train

SMALL = dict(TINY, image_size=8, sample_every=1000)


class Watching(torch.nn.Module):
    """A model that notes which classes it is told."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.told = []

    def forward(self, x_t, t, y=None):
        self.told.append(y)
        return x_t * self.scale


def test_the_class_asked_for_is_the_class_drawn(two_shades):
    model, diffusion, about = load_model(two_shades)
    assert about["classes"] == ["dark", "bright"] and model.num_classes == 2
    for guidance in (1.0, 2.0):
        images, _ = generate(model, diffusion, 16, 8, y=torch.arange(16) // 8, guidance=guidance)
        dark, bright = images[:8].mean((1, 2, 3)), images[8:].mean((1, 2, 3))
        # the data: -0.69 and 0.69
        assert dark.max() < -0.15 and bright.min() > 0.15, (dark, bright)


def test_without_a_class_both_are_drawn(two_shades):
    model, diffusion, _ = load_model(two_shades)
    images, _ = generate(model, diffusion, 32, 8, y=torch.full((32,), -1))
    bright = (images.mean((1, 2, 3)) > 0).sum()
    assert 4 <= bright <= 28


def test_each_class_takes_its_turn_when_none_is_asked_for(two_shades):
    model, diffusion, _ = load_model(two_shades)
    y, _ = choose_labels(None, ["dark", "bright"], 8, first_index=3)
    images, _ = generate(model, diffusion, 8, 8, y=y, first_index=3, batch_size=3)
    assert ((images.mean((1, 2, 3)) > 0).tolist()) == [True, False] * 4
    pictures = train_module.sample_images(model, diffusion, torch.device("cpu"), 8, 8)
    assert ((pictures.mean((1, 2, 3)) > 0).tolist()) == [False, True] * 4


def test_one_image_in_ten_is_trained_on_without_its_class():
    model, y = Watching(), torch.arange(4000) % 10
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    train_step(model, torch.zeros(4000, 1, 4, 4), y, optimizer, DiffusionProcess(), label_drop=0.1)
    told, = model.told
    dropped = told == -1
    assert 0.08 < dropped.float().mean() < 0.12
    assert torch.equal(told[~dropped], y[~dropped])
    train_step(model, torch.zeros(4000, 1, 4, 4), y, optimizer, DiffusionProcess())
    assert torch.equal(model.told[1], y)


@pytest.mark.parametrize("labels, classes", [(None, 10), (True, 10), (False, None)])
def test_a_labelled_set_is_trained_with_its_classes_unless_asked_otherwise(labels, classes,
                                                                           tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SYNTHETIC_SIZE", 32)
    model, *_ = train("synthetic_digits", steps=1, labels=labels, output_dir=tmp_path, **SMALL)
    entries = load_checkpoint(tmp_path / "model_final.pt")
    assert model.num_classes == classes == entries["model_config"]["num_classes"]
    assert entries["data"]["classes"] == (list("0123456789") if classes else None)


# ---- What --label asks for

CLOTHES = ["shirt", "sneaker", "bag"]


@pytest.mark.parametrize("text, classes, labels, columns", [
    (None, CLOTHES, [0, 1, 2, 0, 1, 2, 0], None), (None, None, None, None),
    ("none", CLOTHES, [-1] * 7, None),
    ("1", CLOTHES, [1] * 7, None), ("sneaker", CLOTHES, [1] * 7, None),
    ("bag, shirt", CLOTHES, [2, 2, 2, 2, 0, 0, 0, 0], 4), ("bag,bag", CLOTHES, [2] * 8, 4),
    ("all", CLOTHES, [0, 0, 0, 1, 1, 1, 2, 2, 2], 3),
    ("none", None, None, None),
    ("3", ["3", "4"], [0] * 7, None), ("all", ["1", "2"], [0, 0, 0, 0, 1, 1, 1, 1], 4)])
def test_labels_are_names_or_numbers_and_have_rows_of_their_own(text, classes, labels, columns):
    y, got = choose_labels(text, classes, 7)
    assert (y if y is None else y.tolist()) == labels and got == columns


@pytest.mark.parametrize("text, num_images, rows, columns", [
    ("0,1", 64, 4, 8), ("0,1,2", 64, 3, 8), ("all", 64, 3, 8), ("0,1", 10, 2, 3), ("1,0", 2, 1, 1)])
def test_the_grid_of_several_labels_is_nearly_square_and_full(text, num_images, rows, columns):
    y, got = choose_labels(text, CLOTHES, num_images)
    assert (got == columns and len(y)
            == rows * columns * (3 if text == "all" else text.count(",") + 1) >= num_images)
    assert all(len(row.unique()) == 1 for row in y.view(-1, columns))


@pytest.mark.parametrize("text, count, counts", [
    ("0,1", 2000, [1000, 1000]), ("0,1", 10, [5, 5]), ("all", 1000, [334, 333, 333]),
    ("2", 7, [0, 0, 7])])
def test_where_there_is_no_sheet_each_label_is_drawn_as_often(text, count, counts):
    """The rows of a sheet are full and hold more; what was over came off the last label alone."""
    y, _ = choose_labels(text, CLOTHES, count)
    assert torch.bincount(thinned(y, count)).tolist() == counts
    assert thinned(None, 5) is None


@pytest.mark.parametrize("argv, words", [
    (["--label", "purple"], "unknown class 'purple'; choose from all, none, 0 (dark), 1 (bright)"),
    (["--label", "2"], "unknown class '2'"), (["--label", ""], "--label is given, but empty"),
    (["--guidance", "2", "--label", "none"], "needs classes to guide towards"),
    (["--guidance", "-1"], "is no number from 0 to 100"),
    (["--guidance", "nan"], "'nan' is no number")])
def test_a_class_that_is_not_there_is_one_line(argv, words, two_shades, tmp_path, capsys):
    assert words in fails(capsys, sample.main, "--checkpoint", two_shades,
                          "--output_dir", tmp_path, *argv)


def test_a_network_without_classes_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "SYNTHETIC_SIZE", 32)
    train("synthetic_digits", steps=1, labels=False, output_dir=tmp_path, **SMALL)
    capsys.readouterr()
    for argv in (["--label", "7"], ["--guidance", "2"]):
        assert "trained without" in fails(capsys, sample.main, "--checkpoint",
                                          tmp_path / "model_final.pt", "--output_dir", tmp_path,
                                          *argv)


# ---- A picture tells how it was made

def drawn(two_shades, folder, *argv):
    sample.main(["--checkpoint", str(two_shades), "--output_dir", str(folder), "--device", "cpu",
                 *argv])


@pytest.mark.parametrize("argv", [
    ["--num_images", "5"],
    ["--sampler", "ddpm_beta", "--steps", "7", "--seed", "3", "--label", "bright, dark"],
    ["--sampler", "dpmpp_2m_sde", "--guidance", "2.5", "--first_index", "6", "--batch_size", "3",
     "--num_images", "8", "--upscale", "2", "--spacing", "karras", "--eta", "0.7"]])
def test_a_picture_is_made_again_byte_for_byte(argv, two_shades, tmp_path, capsys):
    drawn(two_shades, tmp_path, *argv)
    picture = tmp_path / "generated_samples.png"
    drawn(two_shades, tmp_path / "again", "--recreate", str(picture))
    assert "byte for byte the same" in capsys.readouterr().out
    assert (tmp_path / "again" / "recreated.png").read_bytes() == picture.read_bytes()


def test_a_call_of_the_weak_model_is_counted_as_its_own(monkeypatch):
    """It costs a quarter here; 6 images in batches of 2, 5 calls of the one and 3 of the other."""
    model, weak = Watching(), Watching()
    model.image_channels = 1

    def measure(work, device):
        before = len(model.told)
        work()
        return 1.0 if len(model.told) > before else 0.25

    monkeypatch.setattr(sample, "measure", measure)
    known = (model, DiffusionProcess(), 6, 8, 5, 2, torch.float32)
    assert sample.seconds_for(*known, weak, 3) == (5 * 1 + 3 * 0.25) * 3
    assert sample.seconds_for(*known, None, 3) == 8 * 3


def test_a_weak_model_belongs_to_the_picture(two_shades, tmp_path, capsys):
    """Away from its like a model goes nowhere; only the same weak model makes the picture again."""
    entries = load_checkpoint(two_shades)
    weight = next(iter(entries["ema"].values()))
    entries["ema"] = {**entries["ema"], next(iter(entries["ema"])): weight + 1e-7}
    weak = tmp_path / "weak.pt"
    save_checkpoint(weak, entries)
    drawn(two_shades, tmp_path, "--num_images", "4", "--guidance", "1")
    with Image.open(tmp_path / "generated_samples.png") as picture:
        plain = np.asarray(picture).astype(int)
    drawn(two_shades, tmp_path, "--num_images", "4", "--weak", str(weak))
    picture = tmp_path / "generated_samples.png"
    assert read_note(picture)["guidance"] == drawing.WEAK_GUIDANCE
    with Image.open(picture) as guided:
        assert np.abs(np.asarray(guided).astype(int) - plain).max() <= 1
    drawn(two_shades, tmp_path, "--recreate", str(picture), "--weak", str(weak))
    assert "byte for byte the same" in capsys.readouterr().out
    assert "name it" in fails(capsys, sample.main, "--checkpoint", two_shades,
                              "--output_dir", tmp_path, "--recreate", picture)


@pytest.mark.parametrize("change", [
    {"diffusion_config": {"schedule": "cosine"}}, {"diffusion_config": {"objective": "v"}},
    {"data": {"classes": ["light", "shade"]}}])
def test_a_weak_model_of_another_process_or_of_other_classes_is_refused(change, two_shades,
                                                                        tmp_path, capsys):
    entries = load_checkpoint(two_shades)
    weights = {name: value + 1e-3 for name, value in entries["ema"].items()}
    entries.update({part: {**entries[part], **new} for part, new in change.items()}, ema=weights)
    save_checkpoint(tmp_path / "other.pt", entries)
    assert "another schedule" in fails(capsys, sample.main, "--checkpoint", two_shades,
                                       "--output_dir", tmp_path, "--weak", tmp_path / "other.pt")


def test_the_weights_that_lie_beside_a_picture_are_found(two_shades, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    shutil.copy(two_shades, tmp_path / "run" / "model_final.pt")
    drawn(tmp_path / "run" / "model_final.pt", tmp_path / "run", "--num_images", "2")
    sample.main(["--recreate", "run/generated_samples.png", "--device", "cpu"])
    assert "byte for byte the same" in capsys.readouterr().out


def test_a_sheet_larger_than_memory_is_refused_before_it_is_drawn(two_shades, tmp_path, capsys):
    assert "million pixels" in fails(capsys, sample.main, "--checkpoint", two_shades,
                                     "--output_dir", tmp_path, "--upscale", 10**9)


@pytest.mark.parametrize("change, verdict", [
    (2, "by 2 of 255 at most, as rounding on another machine may make it"),
    (90, "by 90 of 255 at most")])
def test_a_picture_that_is_made_again_otherwise_is_told_so(change, verdict, two_shades, tmp_path,
                                                           capsys):
    """With numpy 2.4 the sentence ended in a traceback: it multiplies no text by its own True."""
    drawn(two_shades, tmp_path, "--num_images", "4", "--steps", "5")
    picture = tmp_path / "generated_samples.png"
    with Image.open(picture) as image:
        pixels, text = np.asarray(image.convert("RGB")).copy(), image.text
    pixels[10, 10] = np.where(pixels[10, 10] > 127, pixels[10, 10] - change,
                              pixels[10, 10] + change)
    note = PngInfo()
    for name, value in text.items():
        note.add_text(name, value)
    Image.fromarray(pixels).save(picture, pnginfo=note)
    with pytest.raises(SystemExit) as exit_:
        drawn(two_shades, tmp_path / "again", "--recreate", str(picture))
    said = capsys.readouterr().out
    assert exit_.value.code == 1 and "NOT the same pixels" in said and verdict in said
    assert ("rounding" in said) == (change == 2)


def test_a_single_image_is_made_again_byte_for_byte(two_shades, tmp_path, capsys):
    drawn(two_shades, tmp_path, "--num_images", "4", "--batch_size", "2", "--single_images",
          "--steps", "5")
    singles = sorted((tmp_path / "generated_samples").iterdir())
    assert [path.name for path in singles] == ["0000.png", "0001.png", "0002.png", "0003.png"]
    drawn(two_shades, tmp_path / "again", "--recreate", str(singles[3]))
    assert (tmp_path / "again" / "recreated.png").read_bytes() == singles[3].read_bytes()


@pytest.mark.parametrize("change, flags", [
    ({}, ["--image_size", "32", "--label", "dark", "--guidance_interval", "1,9"]),
    (dict(seed=None, batch_size=None, first_index=None), [])])
def test_a_picture_s_own_settings_go_before_flags_and_a_null_is_no_setting(change, flags,
                                                                           two_shades, tmp_path,
                                                                           capsys):
    """--image_size was refused, as the checkpoint tells its own; a null ended in a traceback."""
    drawn(two_shades, tmp_path, "--num_images", "4", "--steps", "3")
    picture = tmp_path / "generated_samples.png"
    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("RGB"))
    picture.write_bytes(png_bytes(pixels, note={**read_note(picture), **change}))
    drawn(two_shades, tmp_path / "again", "--recreate", str(picture), *flags)
    assert "the same" in capsys.readouterr().out.rsplit("beside", 1)[1]


def test_the_note_tells_all_that_decides_the_pixels_and_nothing_private(two_shades, tmp_path):
    drawn(two_shades, tmp_path, "--steps", "3")
    raw = (tmp_path / "generated_samples.png").read_bytes()
    note = read_note(tmp_path / "generated_samples.png")
    assert (note["weights"] == load_model(two_shades)[2]["digest"] and note["steps"] == 3
            and note["eta"] == 0)
    assert (note["command"].startswith("sample.py --num_images=64")
            and note["threads"] == torch.get_num_threads())
    assert str(tmp_path).encode() not in raw and "/" not in str(note)


def test_another_checkpoint_and_other_pictures_are_refused(two_shades, tmp_path, capsys):
    drawn(two_shades, tmp_path, "--steps", "3")
    entries = load_checkpoint(two_shades)
    entries["ema"] = {name: value * 1.001 for name, value in entries["ema"].items()}
    save_checkpoint(tmp_path / "other.pt", entries)
    Image.new("L", (8, 8)).save(tmp_path / "plain.png")
    (tmp_path / "real.png").write_bytes(
        png_bytes(np.zeros((8, 8, 3), np.uint8), note={"made_from": "a photo"}))
    (tmp_path / "half.png").write_bytes(png_bytes(np.zeros((8, 8, 3), np.uint8), note={"seed": 1}))
    (tmp_path / "text.png").write_text("no picture")
    picture = str(tmp_path / "generated_samples.png")
    capsys.readouterr()
    for path, checkpoint, words in (
            (picture, tmp_path / "other.pt", "was not made with"),
            (tmp_path / "plain.png", two_shades, "does not tell"),
            (tmp_path / "real.png", two_shades, "made from 'a photo'"),
            (tmp_path / "half.png", two_shades, "does not tell its num_images"),
            (tmp_path / "text.png", two_shades, "does not tell"),
            (tmp_path / "no.png", two_shades, "No such file")):
        assert words in fails(capsys, sample.main, "--checkpoint", checkpoint, "--recreate", path,
                              "--output_dir", tmp_path / "again", "--device", "cpu")
    assert not (tmp_path / "again" / "recreated.png").exists()


@pytest.mark.parametrize("y", [-2, 2])
def test_a_class_that_there_is_not_is_named(y):
    """It was an IndexError out of the depths of torch."""
    model = create_model(base_channels=8, time_emb_dim=16, num_classes=2)
    with pytest.raises(ValueError, match=rf"y must lie in -1..1, got {y}..{y}"):
        model(torch.zeros(1, 1, 8, 8), torch.zeros(1, dtype=torch.long), torch.tensor([y]))
