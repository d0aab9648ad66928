"""The drawn data sets: reproducible, varied, and close enough to the real thing to learn from."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import synthetic
from conftest import fails
from data import get_dataset
from synthetic import FABRIC_FAMILIES, digits, fabrics


@pytest.fixture(scope="module")
def ten_thousand_digits():
    return digits(10_000, seed=0)


@pytest.fixture(scope="module")
def thousand_fabrics():
    return fabrics(1_000, seed=0)


def distinct(images):
    return len({image.numpy().tobytes() for image in images})


def test_digits_are_grey_28x28_bytes_with_all_ten_classes_in_balance(ten_thousand_digits):
    images, labels = ten_thousand_digits
    assert images.shape == (10_000, 1, 28, 28) and images.dtype == torch.uint8
    assert labels.shape == (10_000,) and labels.dtype == torch.int64
    assert labels.bincount().tolist() == [1_000] * 10


def test_fabrics_are_colour_64x64_bytes_with_every_family_in_balance(thousand_fabrics):
    images, labels = thousand_fabrics
    assert images.shape == (1_000, 3, 64, 64) and images.dtype == torch.uint8
    assert labels.shape == (1_000,) and labels.dtype == torch.int64
    assert labels.bincount().tolist() == [1_000 // len(FABRIC_FAMILIES)] * len(FABRIC_FAMILIES)


@pytest.mark.parametrize("draw", [digits, fabrics])
def test_image_depends_only_on_seed_and_index(draw):
    """251 and 260 straddle the chunk of 250 in which digits are drawn."""
    images, labels = draw(260, seed=3)
    for n in (0, 1, 7, 251):
        fewer_images, fewer_labels = draw(n, seed=3)
        assert torch.equal(fewer_images, images[:n]) and torch.equal(fewer_labels, labels[:n])


@pytest.mark.parametrize("draw", [digits, fabrics])
def test_another_seed_gives_other_images(draw):
    here, there = draw(50, seed=0)[0], draw(50, seed=1)[0]
    assert (here != there).flatten(1).any(1).all()


@pytest.mark.parametrize("draw", [digits, fabrics])
def test_global_generators_are_neither_read_nor_moved(draw):
    np.random.seed(1)
    torch.manual_seed(1)
    first = draw(20)[0]
    numpy_state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()
    again = draw(20)[0]
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert torch.equal(first, again)


@pytest.mark.parametrize("draw", [digits, fabrics])
def test_negative_arguments_are_refused(draw):
    with pytest.raises(ValueError):
        draw(-5)
    with pytest.raises(ValueError):
        draw(1, seed=-2)


def test_no_two_of_ten_thousand_digits_are_alike(ten_thousand_digits):
    assert distinct(ten_thousand_digits[0]) == 10_000


def test_no_two_fabrics_are_alike(thousand_fabrics):
    assert distinct(thousand_fabrics[0]) == 1_000


def test_every_digit_has_ink_and_paper(ten_thousand_digits):
    bright = (ten_thousand_digits[0] > 128).flatten(1).float().mean(1)
    assert bright.min() > 0.02              # a thin upright 1 covers 20 of 784 pixels
    assert bright.max() < 0.45


def test_no_ink_touches_the_frame(ten_thousand_digits):
    inside = ten_thousand_digits[0].clone()
    inside[..., 1:-1, 1:-1] = 0
    assert inside.max() == 0


def test_digits_are_sized_and_centred_as_in_mnist(ten_thousand_digits):
    """MNIST fits the ink into 20 x 20 and puts its centre of mass in the middle of 28 x 28."""
    images = ten_thousand_digits[0][:, 0].float()
    mass = images.sum((1, 2))
    for axis in (1, 2):
        centre = (images.sum(3 - axis) * torch.arange(28)).sum(1) / mass
        assert (centre - 13.5).abs().median() < 0.6
    height = (images.amax(2) > 64).sum(1)
    assert 18 <= height.float().median() <= 21


def test_paths_of_digits_fit_the_table_of_control_points():
    for ways in synthetic.DIGITS.values():
        for common, path in ways:
            control, basis, stroke = synthetic.pen_path(path)
            words = path.replace("/", " ").split()
            assert common > 0 and len(words) <= synthetic.CONTROLS
            assert np.allclose(basis.sum(1), 1)         # the curve moves along when all points move
            first, last = (np.array(words[k].strip("*").split(","), float) / 100 for k in (0, -1))
            ends = (basis @ control)[[0, -1]]
            assert np.allclose(ends, [first, last], atol=0.02)  # atol: half a step along the path


def test_fabrics_are_colourful_and_not_flat(thousand_fabrics):
    images = thousand_fabrics[0].float()
    assert images.std((2, 3)).amax(1).min() > 8         # every cloth shows a pattern, of 255 levels
    spread = images.amax(1) - images.amin(1)            # grey has none
    assert spread.mean((1, 2)).median() > 60
    assert (images[:, 0] != images[:, 2]).float().mean((1, 2)).min() > 0.25


def test_fabrics_come_in_warm_cool_light_and_dark(thousand_fabrics):
    red, green, blue = thousand_fabrics[0].float().mean((2, 3)).T
    assert (red - blue > 40).float().mean() > 0.1 and (blue - red > 20).float().mean() > 0.1
    assert green.min() < 50 and green.max() > 180


def test_main_writes_two_sheets_and_prints_their_paths(tmp_path, capsys):
    synthetic.main(["--output_dir", str(tmp_path / "new"), "--seed", "1"])
    printed = capsys.readouterr().out.replace("wrote ", "").split()
    assert printed == [str(tmp_path / "new" / f"synthetic_{name}.png")
                       for name in ("digits", "fabrics")]
    sheet = np.asarray(Image.open(printed[0]))[..., 0]
    assert sheet.shape == (1120, 1120)
    third = digits(100, seed=1)[0][12, 0].numpy()       # second row, third column
    assert np.array_equal(sheet[112:224:4, 224:336:4], third)
    assert np.asarray(Image.open(printed[1])).shape == (1280, 1280, 3)


def test_main_refuses_a_negative_seed_in_one_line(capsys):
    assert "-1" in fails(capsys, synthetic.main, "--seed", -1)


def train_reader(images, labels, epochs=4, batch=100):
    """A small CNN trained to read digits.  images: float [N, 1, 28, 28] in 0..1."""
    torch.manual_seed(0)
    reader = nn.Sequential(
        nn.Conv2d(1, 12, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(12, 24, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(24 * 49, 10))
    optimizer = torch.optim.Adam(reader.parameters(), lr=2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(batch):
            loss = F.cross_entropy(reader(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return reader


def test_a_reader_of_synthetic_digits_reads_most_of_real_mnist(ten_thousand_digits, data_dir):
    """The drawn digits cover real handwriting: 0.70 is promised, about 0.88 is usual."""
    real, truth = get_dataset("mnist", data_dir, train=False)
    images, labels = ten_thousand_digits
    reader = train_reader(images.float() / 255, labels)
    with torch.no_grad():
        read = torch.cat([reader(part.float() / 255) for part in real.split(1000)])
    accuracy = (read.argmax(1) == truth).float().mean().item()
    assert accuracy >= 0.70, f"read {accuracy:.1%} of the real test digits"
