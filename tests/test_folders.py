"""Folders of images: what comes out, what is skipped and named, --verify's report, the cache."""

import re
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import folders
import train
from conftest import fails
from data import class_names, get_dataset
from verify import verify_folder


def picture(mode, size=(16, 16), value=100):
    colour = {"L": value, "1": 1, "P": 3, "I;16": value * 257, "LA": (value, 255),
              "RGB": (value, 0, 50), "RGBA": (value, 0, 50, 128)}[mode]
    return Image.new(mode, size, colour)


def save_numbered(folder, values, size=(16, 16)):
    """One grey picture for each value, named 0.png, 1.png, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for k, value in enumerate(values):
        picture("L", size, value).save(folder / f"{k}.png")


# ---- What comes out

def test_grey_pictures_stored_as_colour_stay_grey(tmp_path):
    Image.new("RGB", (16, 16), (9, 9, 9)).save(tmp_path / "x.png")
    assert get_dataset(str(tmp_path))[0].shape == (1, 1, 16, 16)
    Image.new("RGB", (16, 16), (9, 9, 8)).save(tmp_path / "y.png")
    assert get_dataset(str(tmp_path))[0].shape == (2, 3, 16, 16)


def test_a_folder_is_read_nested_and_in_order(tmp_path):
    (tmp_path / "b" / "c").mkdir(parents=True)
    for k, name in enumerate(["a.png", "b/x.bmp", "b/c/y.webp"]):
        Image.new("L", (16, 16), 10 + 100 * k).save(tmp_path / name, lossless=True)
    (tmp_path / "notes.txt").write_text("not an image")
    images, labels = get_dataset(str(tmp_path))
    assert images.shape == (3, 1, 16, 16) and labels is None
    assert images[:, 0, 0, 0].tolist() == [10, 210, 110]        # a.png, b/c/y.webp, b/x.bmp


@pytest.mark.parametrize("mode, suffix, channels, pixel", [
    ("L", "png", 1, [100]), ("1", "png", 1, [255]),
    ("I;16", "png", 1, [100]), ("LA", "png", 1, [100]),
    ("RGB", "png", 3, [100, 0, 50]), ("RGB", "bmp", 3, [100, 0, 50]),
    ("RGBA", "png", 3, [177, 127, 152])])                       # half transparent: shown on white
def test_every_mode_becomes_grey_or_colour(tmp_path, mode, suffix, channels, pixel):
    picture(mode).save(tmp_path / f"x.{suffix}")
    images, _ = get_dataset(str(tmp_path))
    assert images.shape == (1, channels, 16, 16) and images[0, :, 5, 5].tolist() == pixel


def test_a_transparent_colour_of_a_palette_is_shown_on_white(tmp_path):
    drawing = Image.new("P", (16, 16), 1)
    drawing.putpalette([0, 0, 0, 200, 0, 0])
    drawing.paste(0, (0, 0, 8, 16))
    drawing.save(tmp_path / "x.png", transparency=0)
    images, _ = get_dataset(str(tmp_path))
    assert images[0, :, 5, 3].tolist() == [255] * 3 and images[0, :, 5, 12].tolist() == [200, 0, 0]


def test_hidden_files_are_no_pictures(tmp_path, capsys):
    """macOS lays ._photo.jpg beside photo.jpg on other file systems."""
    save_numbered(tmp_path, [10, 20])
    picture("L").save(tmp_path / "._0.png")
    (tmp_path / "._1.png").write_bytes(b"not a picture")
    assert len(get_dataset(str(tmp_path))[0]) == 2
    assert "cannot be used" not in capsys.readouterr().out


def test_jpegs_of_unequal_size_are_cut_square_and_scaled(tmp_path):
    wide = np.zeros((100, 300, 3), np.uint8)
    wide[:, 100:200] = 255                                      # the central square is white
    Image.fromarray(wide).save(tmp_path / "wide.JPG", format="JPEG", quality=95)
    picture("RGB", (200, 200)).save(tmp_path / "square.jpg")
    images, _ = get_dataset(str(tmp_path), image_size=32)
    assert images.shape == (2, 3, 32, 32)
    assert images[1, :, 4:28, 4:28].min() > 240
    assert get_dataset(str(tmp_path))[0].shape[-1] == 64        # no common small size: 64


def test_scaling_down_averages_instead_of_skipping_pixels(tmp_path):
    stripes = np.zeros((256, 256), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "x.png")
    images, _ = get_dataset(str(tmp_path), image_size=32)
    assert 115 < images.min() and images.max() < 140            # grey; skipping would give 0 or 255


def huge_png(path, side=40_000):
    """A valid header that claims 1.6 gigapixels, in under a hundred bytes."""
    def chunk(kind, body):
        return (struct.pack(">I", len(body)) + kind + body
                + struct.pack(">I", zlib.crc32(kind + body)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n"
                     + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
                     + chunk(b"IDAT", zlib.compress(b"\0" * 10)) + chunk(b"IEND", b""))


def test_files_that_cannot_be_used_are_skipped_and_named(tmp_path, capsys):
    picture("RGB").save(tmp_path / "good.png")
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.jpg").write_bytes(b"")
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[:len(whole) // 2])
    picture("L", (3, 3)).save(tmp_path / "tiny.png")
    huge_png(tmp_path / "huge.png")
    picture("L").save(tmp_path / "disguised.gif")
    (tmp_path / "disguised.gif").rename(tmp_path / "disguised.png")   # a format we do not name
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nothing")
    (tmp_path / "linked.png").symlink_to(tmp_path / "good.png")
    images, _ = get_dataset(str(tmp_path))
    assert len(images) == 1
    said = capsys.readouterr().out
    for name in ("text.png", "empty.jpg", "half.png", "tiny.png", "huge.png", "disguised.png",
                 "dangling.png", "linked.png"):
        assert said.count(name) == 1
    assert "8 of 9" in said and str(tmp_path / "text.png") not in said


def test_a_folder_without_images_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no images found"):
        get_dataset(str(tmp_path))
    (tmp_path / "x.png").write_text("hello")
    with pytest.raises(ValueError, match="none of its 1 images can be used"):
        get_dataset(str(tmp_path))


def test_a_picture_that_is_not_square_is_cropped_or_stretched(tmp_path):
    wide = np.zeros((32, 64), np.uint8)
    wide[:, 16:48] = 255                                        # the central square is white
    Image.fromarray(wide).save(tmp_path / "x.png")
    cropped, _ = get_dataset(str(tmp_path), image_size=32)
    stretched, _ = get_dataset(str(tmp_path), image_size=32, fit="stretch")
    assert cropped.min() == 255
    assert stretched[0, 0, :, :5].max() == 0 and stretched[0, 0, :, 10:22].min() > 250


def test_a_photo_that_lies_on_its_side_is_set_upright(tmp_path):
    """Phones store pixels as the sensor has them and note in the EXIF data which side was up."""
    lying = np.zeros((16, 16, 3), np.uint8)
    lying[:, :8] = 255                                          # white at the left; turned, on top
    exif = Image.Exif()
    exif[0x0112] = 6
    for suffix, settings in (("jpg", dict(quality=95)), ("png", {})):
        Image.fromarray(lying).save(tmp_path / f"x.{suffix}", exif=exif, **settings)
    images, _ = get_dataset(str(tmp_path))
    assert images[:, 0, :7].min() > 240 and images[:, 0, 9:].max() < 15


@pytest.mark.parametrize("side", range(1, 9))
def test_every_side_is_turned_as_pil_turns_it(side, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = side
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(tmp_path / "x.png"))
    assert np.array_equal(get_dataset(str(tmp_path))[0][0].permute(1, 2, 0).numpy(),
                          np.asarray(expected))


@pytest.mark.parametrize("notes", [b"Exif\0\0II*\0", b"Exif\0\0nonsense", b"Exif\0\0"])
def test_damaged_notes_do_not_cost_the_picture(notes, tmp_path):
    picture("RGB").save(tmp_path / "x.jpg", exif=notes, dpi=(72, 72))
    picture("RGB").save(tmp_path / "y.png", exif=notes)
    assert len(get_dataset(str(tmp_path))[0]) == 2


@pytest.mark.parametrize("channels", [1, 3])
def test_the_number_of_channels_can_be_asked_for(channels, tmp_path):
    picture("RGB").save(tmp_path / "colour.png")
    picture("L").save(tmp_path / "grey.png")
    images, _ = get_dataset(str(tmp_path), channels=channels)
    assert images.shape == (2, channels, 16, 16)
    assert images[1].unique().tolist() == [100]
    if channels == 1:
        assert int(images[0, 0, 0, 0]) == round(0.299 * 100 + 0.114 * 50)


def test_the_sub_folders_are_the_classes(tmp_path):
    for label, values in (("silk", [10, 20]), ("cotton", [30])):
        save_numbered(tmp_path / label / "deeper", values)
    save_numbered(tmp_path / ".hidden", [40])
    images, labels = get_dataset(str(tmp_path), with_labels=True)
    assert class_names(str(tmp_path), with_labels=True) == ["cotton", "silk"]
    assert labels.tolist() == [0, 1, 1] and images[:, 0, 0, 0].tolist() == [30, 10, 20]
    assert get_dataset(str(tmp_path))[1] is None and class_names(str(tmp_path)) is None
    picture("L").save(tmp_path / "stray.png")
    with pytest.raises(ValueError, match="stray.png"):
        get_dataset(str(tmp_path), with_labels=True)


def test_few_pictures_are_told_to_be_few(tmp_path, capsys):
    for count in (199, 200):
        save_numbered(tmp_path / str(count), range(count))
        assert verify_folder(tmp_path / str(count), tmp_path / "sheet.png", image_size=16)
        assert ("pictures are few" in capsys.readouterr().out) == (count == 199)


# ---- The cache

def test_another_cut_has_a_cache_of_its_own(tmp_path):
    pixels = np.zeros((16, 32), np.uint8)
    pixels[:, 8:24] = 255                                       # the central square is white
    (tmp_path / "in").mkdir()
    Image.fromarray(pixels).save(tmp_path / "in" / "x.png")
    cut = {fit: get_dataset(str(tmp_path / "in"), image_size=16, fit=fit,
                            cache_dir=tmp_path / "cache")[0].min() for fit in ("crop", "stretch")}
    assert cut == {"crop": 255, "stretch": 0}


@pytest.mark.parametrize("colour", [False, True])
def test_the_cache_gives_the_same_images_and_is_made_once(colour, tmp_path, capsys, monkeypatch):
    source = tmp_path / "images"
    save_numbered(source, range(0, 250, 10))
    if colour:
        picture("RGB").save(source / "z.png")
    (source / "broken.png").write_text("hello")
    plain, _ = get_dataset(str(source))
    cached, _ = get_dataset(str(source), cache_dir=tmp_path / "cache")
    assert torch.equal(plain, cached) and cached.shape[1] == (3 if colour else 1)
    assert sum(path.suffix == ".npy" for path in (tmp_path / "cache").iterdir()) == 1
    assert len(list((tmp_path / "cache").iterdir())) == 2       # the array and its notes, no more
    capsys.readouterr()

    def decode(*args):
        raise AssertionError("read again")
    with monkeypatch.context() as patch:
        patch.setattr(folders, "_decode", decode)
        again, _ = get_dataset(str(source), cache_dir=tmp_path / "cache")
    assert torch.equal(plain, again) and "broken.png" in capsys.readouterr().out
    picture("L", value=7).save(source / "new.png")              # a changed folder is read anew
    assert len(get_dataset(str(source), cache_dir=tmp_path / "cache")[0]) == len(plain) + 1


def test_a_file_that_could_not_be_read_for_a_while_is_not_missing_from_the_cache_for_ever(
        tmp_path, monkeypatch):
    save_numbered(tmp_path / "images", [1, 2, 3])
    with monkeypatch.context() as patch:
        opens = folders._open

        def forbidden(path):
            if path.name.startswith("1"):
                raise PermissionError(13, "Permission denied", str(path))
            return opens(path)
        patch.setattr(folders, "_open", forbidden)
        assert len(get_dataset(str(tmp_path / "images"), cache_dir=tmp_path / "cache")[0]) == 2
    assert len(get_dataset(str(tmp_path / "images"), cache_dir=tmp_path / "cache")[0]) == 3


def test_a_cache_that_was_cut_short_is_made_anew(tmp_path, monkeypatch):
    save_numbered(tmp_path / "images", [1, 2, 3])

    def killed(*args):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(folders, "write_file", killed)
        with pytest.raises(KeyboardInterrupt):
            get_dataset(str(tmp_path / "images"), cache_dir=tmp_path / "cache")
    images, _ = get_dataset(str(tmp_path / "images"), cache_dir=tmp_path / "cache")
    assert images[:, 0, 0, 0].tolist() == [1, 2, 3]


def test_a_set_larger_than_the_memory_is_told_of_the_cache(tmp_path, monkeypatch):
    save_numbered(tmp_path, [1, 2])
    monkeypatch.setattr(folders.os, "sysconf", lambda name: 30)
    with pytest.raises(ValueError, match="--cache_dir"):
        get_dataset(str(tmp_path))


# ---- train.py --verify

def verify(capsys, folder, out, *argv):
    """(exit code, what was printed)"""
    with pytest.raises(SystemExit) as exit_:
        train.main(["--dataset", str(folder), "--verify", "--output_dir", str(out), *argv])
    return exit_.value.code, capsys.readouterr().out


def test_verify_counts_every_defect_exactly(tmp_path, capsys):
    source = tmp_path / "images"
    save_numbered(source, range(20))                            # 20 good ones of 16x16
    save_numbered(source / "again", [3, 4, 5])                  # 3 duplicates
    for k in range(4):
        (source / f"broken_{k}.jpg").write_bytes(b"\xff\xd8" + bytes(k))
    (source / "empty.png").write_bytes(b"")
    for k in range(2):
        picture("L", (5, 40)).save(source / f"tiny_{k}.png")
    picture("L", (12, 12), 200).save(source / "small.png")
    picture("RGB", (30, 20)).save(source / "wide.webp", lossless=True)
    for name in ("notes.txt", "a.heic", "b.HEIC"):
        (source / name).write_text("not an image")
    code, said = verify(capsys, source, tmp_path / "out", "--image_size", "16")
    assert code == 0 and "Found 25 images in dataset" in said
    counts = {title.split(",")[0].split(" (")[0]: int(count)
              for title, count in re.findall(r"^(.*): (\d+)(?:, .*)?$", said, re.M)}
    assert counts == {"unreadable": 5, "tiny": 2, "small": 1, "duplicates": 3, "other files": 3}
    assert "other files, ignored: 3, .heic (2), .txt (1)" in said
    for name in ("broken_3.jpg", "empty.png", "tiny_1.png: 5x40", "small.png: 12x12",
                 "again/0.png = 3.png"):
        assert name in said or name.replace("again/0.png = 3.png", "3.png = again/0.png") in said
    assert "16x16 (23)" in said and "L (24), RGB (1)" in said
    assert Image.open(tmp_path / "out" / "dataset_sheet.png").width > 300
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["dataset_sheet.png"]


def test_verify_refuses_a_folder_with_nothing_to_train_on(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "x.png").write_text("hello")
    code, said = verify(capsys, tmp_path / "images", tmp_path / "out")
    assert code == 2 and "Found 0 images" in said and "x.png" in said


def test_verify_names_a_size_that_the_network_takes(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    Image.new("L", (60, 60)).save(tmp_path / "in" / "a.png")
    for flags, code in (([], 0), (["--preset", "fabrics_laptop"], 2)):
        got, said = verify(capsys, tmp_path / "in", tmp_path / "out", "--image_size", "60", *flags)
        assert got == code and ("multiples of 8: train with --image_size 64" in said) == bool(code)


def test_verify_names_images_without_a_class_where_classes_are_asked_for(tmp_path, capsys):
    source = tmp_path / "images"
    save_numbered(source / "dark", range(3))
    code, said = verify(capsys, source, tmp_path / "out", "--image_size", "16", "--labels")
    assert code == 0 and "without a class" not in said
    save_numbered(source, [7])
    assert verify(capsys, source, tmp_path / "out", "--image_size", "16")[0] == 0
    code, said = verify(capsys, source, tmp_path / "out", "--image_size", "16", "--labels")
    assert code == 2 and "\n  0.png\n" in said.split("without a class")[1]


def test_verify_tells_all_classes_and_names_the_empty_ones(tmp_path, capsys):
    for k in range(10):
        save_numbered(tmp_path / "images" / f"kind{k}", range(k + 1))
    code, said = verify(capsys, tmp_path / "images", tmp_path / "out", "--image_size", "16",
                        "--labels")
    assert code == 0 and "kind0 (1), kind1 (2)" in said and "kind9 (10)" in said
    (tmp_path / "images" / "notes").mkdir()
    code, said = verify(capsys, tmp_path / "images", tmp_path / "out", "--image_size", "16",
                        "--labels")
    assert code == 2 and "\n  notes\n" in said.split("without a usable image")[1]


def test_verify_looks_at_the_held_out_folder_too(tmp_path, capsys):
    """Its files were first read when the training began."""
    save_numbered(tmp_path / "images", range(3))
    (tmp_path / "held").mkdir()
    argv = ["--val_dir", str(tmp_path / "held"), "--image_size", "16"]
    assert verify(capsys, tmp_path / "images", tmp_path / "out", *argv)[0] == 2
    save_numbered(tmp_path / "held", [7])
    code, said = verify(capsys, tmp_path / "images", tmp_path / "out", *argv)
    assert code == 0 and "Found 3 images" in said and "Found 1 images" in said
    assert (tmp_path / "out" / "val_dir_sheet.png").is_file()
    argv = ["--val_dir", str(tmp_path / "images")]
    assert verify(capsys, tmp_path / "images", tmp_path / "out", *argv)[0] == 2


def test_verify_looks_at_named_sets_too(tmp_path, capsys, monkeypatch):
    import data
    monkeypatch.setattr(data, "SYNTHETIC_SIZE", 30)
    code, said = verify(capsys, "synthetic_fabrics", tmp_path)
    assert code == 0 and "Found 30 images" in said and "duplicates: 0" in said


def test_looking_at_a_folder_refuses_what_a_training_would(tmp_path, capsys):
    """It said that all was well of a class called "all", and of a share that leaves nothing."""
    for label, count in (("all", 3), ("b", 3)):
        save_numbered(tmp_path / "images" / label, range(count))
    for argv, words in ((["--labels"], "cannot be called"), (["--val_fraction", "0.05"], "of 6")):
        assert words in fails(capsys, train.main, "--dataset", tmp_path / "images", "--verify",
                              "--output_dir", tmp_path / "out", *argv)


def test_held_out_pictures_are_cut_to_the_size_of_the_others(tmp_path, capsys):
    """They were judged at their own size, and as if they were trained on."""
    save_numbered(tmp_path / "images", range(3), size=(32, 32))
    save_numbered(tmp_path / "held", range(100, 102), size=(30, 30))
    code, said = verify(capsys, tmp_path / "images", tmp_path / "out",
                        "--val_dir", str(tmp_path / "held"))
    assert code == 0 and said.count("cut to 32x32") == 2 and said.count("are few") == 1


def test_a_mistyped_setting_of_a_named_set_is_no_setting():
    with pytest.raises(TypeError):
        get_dataset("synthetic_digits", chanels=3)
