"""The measures against independent computations and sets of known faults; the classifier."""

import argparse
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch

import classifier as classifier_module
import data
import evaluate
import export
import sample
from checkpoint import PRETRAINED, load_checkpoint, save_checkpoint
from classifier import (Classifier, get_classifier, load_classifier, look, save_classifier,
                        train_classifier)
from conftest import ROOT, fails
from data import get_dataset
from diffusion import seeded_noise
from images import read_note, to_signed, to_uint8
from load import load_model
from measures import (copied_by_chance, copied_share, fine_power, frechet_between,
                      frechet_distance, in_sets, kernel_distance, mean_distance, nearest,
                      nearest_images, precision_recall, psnr, share_sure, single_share)
from reference import Reference, as_shown, classes_like, load_reference
from sample import generate
from synthetic import digits
from utils import shuffled

WHOLE = data.SYNTHETIC_SIZE  # what conftest.py makes small


def test_the_distance_of_one_dimensional_gaussians_is_the_closed_form():
    """In one dimension it is (m_a - m_b)^2 + (s_a - s_b)^2."""
    one = torch.ones(1, 1, dtype=torch.float64)
    assert frechet_between(torch.tensor([0.3]).double(), 4 * one, torch.tensor([-0.7]).double(),
                           9 * one) == pytest.approx(1 + 1)


def test_the_distance_equals_an_independent_matrix_root():
    """The trace of (C_a C_b)^(1/2) is the sum of the roots of the eigenvalues of C_a C_b, here by
    NumPy, and the covariances are summed one by one."""
    random = np.random.default_rng(0)
    a, b = (random.normal(size=(400, 5)) @ random.normal(size=(5, 5)),
            random.normal(size=(300, 5)) + 0.5)
    covariances = []
    for x in (a, b):
        mean = sum(x) / len(x)
        covariances.append(sum(np.outer(row - mean, row - mean) for row in x) / (len(x) - 1))
    roots = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]).real.clip(0))
    expected = (((a.mean(0) - b.mean(0)) ** 2).sum()
                + np.trace(covariances[0] + covariances[1]) - 2 * roots.sum())
    assert frechet_distance(torch.tensor(a), torch.tensor(b))[0] == pytest.approx(
        expected, rel=1e-9)


def test_samples_of_known_gaussians_come_near_their_distance_and_within_the_error():
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(20_000, 4, generator=generator),
            1.5 * torch.randn(20_000, 4, generator=generator) + 0.2)
    found, error = frechet_distance(a, b)
    expected = 4 * (0.2**2 + 0.5**2)
    assert abs(found - expected) < 4 * error and error < 0.05 * expected


def test_a_covariance_without_full_rank_gives_a_number():
    flat = torch.randn(50, 1, generator=torch.Generator().manual_seed(0)) * torch.ones(1, 6)
    assert frechet_distance(flat, flat)[0] == pytest.approx(0, abs=1e-6)


def test_the_kernel_distance_equals_a_slow_loop():
    random = torch.Generator().manual_seed(0)
    a, b = (torch.randn(30, 3, generator=random).double(),
            torch.randn(30, 3, generator=random).double() + 1)
    kernel = lambda x, y: (float(x @ y) / 3 + 1) ** 3                                   # noqa: E731
    n = len(a)
    within = sum(kernel(x[i], x[j]) for x in (a, b)
                 for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    across = sum(kernel(x, y) for x in a for y in b) / n**2
    assert kernel_distance(a, b)[0] == pytest.approx(within - 2 * across, rel=1e-9)


@pytest.mark.parametrize("far", [0.0, 0.5])
def test_the_error_of_the_kernel_distance_is_how_far_other_samples_come_out(far):
    """It once knew only of the choice among the reference, and was three times too small."""
    random = torch.Generator().manual_seed(0)
    reference = torch.randn(1000, 4, generator=random)
    found = torch.tensor([kernel_distance(torch.randn(60, 4, generator=random) + far, reference)
                          for _ in range(40)])
    assert 0.7 < found[:, 1].mean() / found[:, 0].std() < 2         # 40 draws tell a spread to 11 %


def test_the_error_of_the_distance_is_how_far_other_samples_come_out():
    random = torch.Generator().manual_seed(0)
    reference = torch.randn(5000, 4, generator=random)
    found = torch.tensor([frechet_distance(torch.randn(500, 4, generator=random) + 0.5, reference)
                          for _ in range(60)])
    assert 0.8 < found[:, 1].mean() / found[:, 0].std() < 1.25


def test_a_distance_in_sets_is_their_mean_and_its_error_that_of_the_mean():
    """200 features in sets of 60: three whole ones, and twenty that take no part."""
    random = torch.Generator().manual_seed(0)
    features, reference = (torch.randn(n, 4, generator=random) for n in (200, 500))
    found = [frechet_distance(features[k:k + 60], reference) for k in (0, 60, 120)]
    expected = [sum(value for value, _ in found) / 3, sum(e**2 for _, e in found)**0.5 / 3]
    assert mean_distance(features, reference, 60) == pytest.approx(expected)
    assert mean_distance(features, reference, 200) == pytest.approx(
        frechet_distance(features, reference))
    assert in_sets(lambda part: (len(part), part[0, 0]), features, 60)[:, 1].tolist() == (
        pytest.approx(features[[0, 60, 120], 0].tolist()))


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_equal_a_slow_loop(k):
    """Kynkaanniemi et al. 2019, eq. 1 and 2: is a point within the reach of the k-th neighbour of
    some point of the other set?"""
    random = torch.Generator().manual_seed(0)
    a, b = (torch.randn(40, 2, generator=random), torch.randn(40, 2, generator=random) + 0.7)

    def share_inside(points, centres):
        reach = [sorted(math.dist(one, other) for other in centres)[k] for one in centres]
        return sum(any(math.dist(point, centre) <= far for centre, far in zip(centres, reach))
                   for point in points) / len(points)

    lists = a.tolist(), b.tolist()
    assert precision_recall(a, b, k) == (share_inside(*lists), share_inside(*lists[::-1]))


def test_precision_falls_with_strangers_and_recall_with_missing_variety():
    random = torch.Generator().manual_seed(0)
    left, right = (torch.randn(200, 2, generator=random) - 10,
                   torch.randn(200, 2, generator=random) + 10)
    real = torch.cat([left, right])[torch.randperm(400, generator=random)]
    again = torch.randn(400, 2, generator=random) + torch.tensor([-10.0, 10.0]).repeat(200)[:, None]
    strangers = torch.cat([again[:200],
                           again[:200] * 0 + 100 * torch.randn(200, 2, generator=random)])
    assert min(precision_recall(again, real)) > 0.9
    assert precision_recall(strangers, real)[0] < 0.6
    assert precision_recall(left.repeat(2, 1), real)[1] < 0.6
    in_order = torch.cat([left, right])                                 # as a folder has them
    assert precision_recall(again[:200], in_order)[0] > 0.8


def test_nearest_equals_a_plain_loop():
    random = torch.Generator().manual_seed(0)
    queries, references = torch.randn(7, 3, generator=random), torch.randn(40, 3, generator=random)
    distances, indices = nearest(queries, references)
    for query, distance, index in zip(queries, distances.T, indices.T):
        all_distances = [math.dist(query.tolist(), reference.tolist()) for reference in references]
        assert distance.tolist() == pytest.approx(sorted(all_distances)[:2], abs=1e-4)
        assert index.tolist() == np.argsort(all_distances)[:2].tolist()


def test_sets_of_a_few_images_are_told_to_say_little(capsys):
    """A network of 5 steps stood nearer to 95 photographs than the 5 that were held out."""
    numbers = dict(fd=2.0, fd_error=0.1, kid=0.1, kid_error=0.1, precision=1.0, recall=1.0,
                   detail=1.0, confident=1.0, classes=[1.0])
    for size in (5, 50):
        evaluate.print_quality({"samples": numbers, "floor": numbers, "held_out": "test images",
                                "num_images": 100, "num_held_out": size, "in_sets_of": size,
                                "tells_classes": True})
        assert ("says little" in capsys.readouterr().out) == (size == 5)


def test_the_two_nearest_are_found_in_different_blocks():
    references = torch.randn(50_000, 4, generator=torch.Generator().manual_seed(0)) + 9  # 3 blocks
    references[[100, 25_000, 45_000]] = torch.tensor([[0.2], [0.0], [-0.1]]).expand(3, 4)
    distances, indices = nearest(torch.zeros(30, 4), references)
    assert (indices[0] == 25_000).all() and (indices[1] == 45_000).all()
    assert distances[:, 0].tolist() == pytest.approx([0, 0.2], abs=1e-3)        # float32


def test_planted_copies_are_counted_also_those_moved_by_a_pixel():
    """10 % copies, half shifted, among images that the training set lacks; and none among those."""
    images, _ = digits(3000, seed=5)
    training, held, others = images[:2000], images[2000:2500], images[2500:].clone()
    others[:25] = training[100:125]
    others[25:38] = torch.roll(training[200:213], 1, dims=-1)
    others[38:50] = torch.roll(training[213:225], 1, dims=-2)
    limit = nearest_images(held, training)[0][0]
    (distances, second), (index, _) = nearest_images(others, training)
    assert 0.08 <= copied_share(distances, limit) <= 0.12
    assert (index[:50].tolist() == [*range(100, 125), *range(200, 225)]
            and distances[:50].max() < 0.02)
    assert copied_share(distances[50:], limit) <= 0.02
    assert single_share(torch.stack([distances, second])) == 0.1


def test_a_moved_picture_repeats_its_border():
    """One whose ground is bright: beside it no black line comes in."""
    images, _ = digits(40, seed=1)
    images = 255 - images
    moved = torch.cat([images[:10, ..., :1], images[:10, ..., :-1]], -1)
    assert nearest_images(moved, images)[0][0].max() < 0.01


@pytest.mark.parametrize("num_held_out", [20, 47, 201, 500, 2000])
def test_what_chance_copies_is_told(num_held_out):
    """Cloth with 47 held-out images: chance was said to copy 0.5 % of the samples; it is 2.1 %.
    Distances here are even, as any are by their ranks, which alone count."""
    random = torch.Generator().manual_seed(0)
    samples = (torch.arange(10_000) + 0.5) / 10_000    # every quantile once: without chance
    shares = torch.tensor([copied_share(samples, torch.rand(num_held_out, generator=random))
                           for _ in range(2000)])
    assert abs(shares.mean() - copied_by_chance(num_held_out)) < 4 * shares.std() / 2000**0.5
    assert (copied_by_chance(47) == 1 / 48
            and copied_by_chance(10**7) == pytest.approx(0.005, rel=1e-4))


def test_plain_images_are_no_copies_of_one_image():
    """An even grey is close to all nearly even greys, closer than any held-out image need be, and
    to none alone; so is a copy of what the training set has twice. One image counts once, however
    it is moved."""
    random = torch.Generator().manual_seed(0)
    plain = torch.randint(126, 131, (300, 1, 16, 16), generator=random, dtype=torch.uint8)
    busy = torch.randint(0, 256, (300, 1, 16, 16), generator=random, dtype=torch.uint8)
    training = torch.cat([plain[:200], busy[:200], busy[:1]])
    distances, index = nearest_images(plain[200:], training)
    assert copied_share(distances[0], nearest_images(busy[200:], training)[0][0]) == 1
    assert single_share(distances) == 0 and (index[0] != index[1]).all()
    assert single_share(nearest_images(busy[1:3], training)[0]) == 1
    assert single_share(nearest_images(busy[:1], training)[0]) == 0


def test_turned_copies_are_found_when_asked_for():
    images, _ = digits(60, seed=1)
    for turns in range(4):
        for copies in (images[:9].rot90(turns, (2, 3)), images[:9].flip(-1).rot90(turns, (2, 3))):
            assert nearest_images(copies, images, positions=8)[0][0].max() < 1e-3
    assert nearest_images(images[:9].rot90(1, (2, 3)), images, positions=2)[0][0].max() > 0.05


def test_samples_are_asked_for_the_classes_of_the_held_out_images():
    """As often as there are samples; without any, each class as often as in the training set."""
    labels = torch.tensor([0] * 50 + [1] * 50)
    real = Reference(None, labels, None, torch.tensor([2, 0, 2, 1]), "photographs")
    assert classes_like(real, 3).tolist() == [2, 0, 2]
    assert classes_like(real, 10).tolist() == [2, 0, 2, 1, 2, 0, 2, 1, 2, 0]
    without = classes_like(real._replace(held_labels=None), 150)
    assert torch.bincount(without[:100]).tolist() == [50, 50]
    assert 10 < without[:50].sum() < 40                                 # in random order
    assert torch.equal(without[100:], without[:50])


def test_pictures_are_shown_in_the_order_of_their_classes():
    y = torch.tensor([3, 1, 3, 0, 2, 1, 0])
    assert evaluate.to_show(y, 4).tolist() == [3, 1, 4, 0]
    for few in (None, torch.full((20,), 7), torch.full((20,), -1)):
        assert evaluate.to_show(few, 4).tolist() == [0, 1, 2, 3]


def test_test_images_come_in_random_order_with_their_labels(monkeypatch):
    """MNIST's are sorted by who wrote them: the first 2,000 were taken for a floor, and it was
    three times too high."""
    monkeypatch.setattr(data, "SYNTHETIC_SIZE", 200)
    plain, plain_labels = data.get_dataset("synthetic_digits", train=False)
    like = {"name": "synthetic_digits", "image_size": 28, "channels": 1, "classes": None}
    _, _, held, labels, _ = load_reference(like, "data")
    place = (held[:, None].int() - plain[None].int()).abs().sum((2, 3, 4)).argmin(1)
    assert torch.equal(held, plain[place]) and torch.equal(labels, plain_labels[place])
    assert len(place.unique()) == len(plain)
    half = len(plain) // 2
    assert 0.35 * half < (place[:half] < half).sum() < 0.65 * half
    assert torch.equal(held, load_reference(like, "data").held)


def small_digits(count):
    """Of 14x14 pixels, which a classifier learns in a fourth of the time."""
    images, labels = digits(count, seed=0)
    return torch.nn.functional.avg_pool2d(images.float(), 2).round().to(torch.uint8), labels


def test_a_classifier_learns_and_survives_its_file(tmp_path):
    images, labels = small_digits(1500)
    trained = train_classifier(images[:1200], labels[:1200], 10, epochs=3, batch_size=32)
    save_classifier(tmp_path / "c.pt", trained, data="these", trained_to="test")
    loaded, card = load_classifier(tmp_path / "c.pt")
    found = look(loaded, images[1200:])[0].argmax(1)
    assert (found == labels[1200:]).double().mean() > 0.8
    assert card["data"] == "these"


def test_turned_images_are_told_apart_without_labels():
    images, _ = small_digits(900)
    trained = train_classifier(images[:800], epochs=4)
    turns, directions = classifier_module.turned(to_signed(images[800:]))
    assert (trained(turns)[0].argmax(1) == directions).double().mean() > 0.5    # a guess: 0.25


def test_a_classifier_of_other_data_is_not_taken(tmp_path, monkeypatch, capsys):
    images, labels = digits(300, seed=0)
    monkeypatch.setattr(classifier_module, "PRETRAINED", tmp_path / "none")
    calls = []
    monkeypatch.setattr(classifier_module, "train_classifier",
                        lambda *args, **settings: calls.append(1) or Classifier(1, 28, 10).eval())
    get_classifier("x", images, labels, images, labels, tmp_path)
    get_classifier("x", images, labels, images, labels, tmp_path)
    assert len(calls) == 1
    get_classifier("x", images[1:], labels[1:], images, None, tmp_path)
    assert len(calls) == 2


@pytest.mark.parametrize("classes, right", [(True, 0.3), (False, 0.25), (None, None)])
def test_a_classifier_is_measured_on_images_that_it_has_not_seen(classes, right, tmp_path,
                                                                 monkeypatch):
    """This one answers 0 to all; three in ten are of class 0, a fourth of the turned upright."""
    class Zero(Classifier):
        def forward(self, x):
            return torch.eye(10)[torch.zeros(len(x), dtype=torch.long)], torch.zeros(len(x), 128)

    images, labels = digits(20, seed=0)
    monkeypatch.setattr(classifier_module, "Classifier", Zero)
    monkeypatch.setattr(classifier_module, "train_classifier",
                        lambda *args, **settings: Zero(1, 28, 10).eval())
    held_labels = torch.tensor([0, 0, 0, 1, 2, 3, 4, 5, 6, 7]) if classes else None
    phrases = [get_classifier("x", images, None if classes is False else labels, images[:10],
                              held_labels, tmp_path)[1] for _ in range(2)]
    assert phrases[0] == phrases[1]
    assert (f"test accuracy {right:.2%}" in phrases[0]) if right else "accuracy" not in phrases[0]


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_shipped_files_know_the_real_images(name, data_dir, tmp_path, monkeypatch):
    """The fingerprint of images once changed, and the shipped classifiers carried the old one:
    evaluate.py trained its own, in whose features no distance of README is told. Nothing failed."""
    images, labels = get_dataset(name, data_dir)
    monkeypatch.delattr(classifier_module, "train_classifier")
    assert get_classifier(name, images, labels, images, labels,
                          tmp_path)[1].startswith(f"classifier_{name}.pt")
    card = load_checkpoint(PRETRAINED / f"{name}.pt")["card"]
    assert card["settings"]["images"] == data.Batches(images, labels).fingerprint()


def test_the_shipped_weights_of_digits_know_what_the_code_draws(monkeypatch):
    monkeypatch.setattr(data, "SYNTHETIC_SIZE", WHOLE)
    card = load_checkpoint(PRETRAINED / "synthetic_digits.pt")["card"]
    assert card["settings"]["images"] == data.Batches(
        *get_dataset("synthetic_digits")).fingerprint()


def test_the_shipped_digits_are_read_as_what_was_asked_for():
    model, diffusion, _ = load_model(PRETRAINED / "mnist.pt")
    network, _ = load_classifier(PRETRAINED / "classifier_mnist.pt")
    y = torch.arange(20) % 10
    drawn = diffusion.sample(model, 28, 20, seed=0, sampler="dpmpp_2m", steps=8, y=y)
    assert (look(network, to_uint8(drawn))[0].argmax(1) == y).sum() >= 17       # 19


@pytest.mark.parametrize("name", ["fashion_mnist", "african_fabrics"])
def test_shipped_weights_are_led_away_from_the_weak_ones_beside_them(name, tmp_path):
    sample.main(["--dataset", name, "--num_images", "2", "--steps", "3", "--device", "cpu",
                 "--output_dir", str(tmp_path)])
    weak = load_model(PRETRAINED / f"{name}_weak.pt")[2]["digest"]
    assert read_note(tmp_path / "generated_samples.png")["weak"] == weak


def test_a_classifier_of_few_images_has_learnt_them_nevertheless(tmp_path, capsys):
    """Four epochs of 60 images were four steps: it guessed, and coloured noise was near to real."""
    images, labels = digits(200, seed=0)
    some = labels < 2
    images, labels = images[some], labels[some]
    half = len(images) // 2
    phrase = get_classifier("x", images[:half], labels[:half], images[half:], labels[half:],
                            tmp_path)[1]
    assert "note: " not in capsys.readouterr().out
    assert float(re.search(r"accuracy (\d+)", phrase)[1]) > 80


def test_a_classifier_that_guesses_is_told_so(tmp_path, capsys):
    images = torch.randint(256, (300, 1, 8, 8), generator=torch.Generator().manual_seed(0),
                           dtype=torch.uint8)
    labels = torch.arange(300) % 2                              # which noise knows nothing of
    get_classifier("x", images[:100], labels[:100], images[100:], labels[100:], tmp_path)
    assert "a guess among 2 would be 50%" in capsys.readouterr().out


def test_a_foreign_file_is_no_classifier(tmp_path):
    save_checkpoint(tmp_path / "c.pt",
                    {"classifier": {"a": torch.zeros(2)}, "settings": {}, "card": {}})
    with pytest.raises(ValueError, match="another model"):
        load_classifier(tmp_path / "c.pt")
    save_checkpoint(tmp_path / "c.pt", {"model": {}})
    with pytest.raises(ValueError, match="no classifier"):
        load_classifier(tmp_path / "c.pt")


def test_spoilt_sets_score_worse_than_real_images(data_dir):
    """Blurred, of one class only, and each image ten times: all worse than the test set,
    by the shipped classifier."""
    images, labels = get_dataset("mnist", data_dir)
    held, held_labels = get_dataset("mnist", data_dir, train=False)
    shipped, card = load_classifier(PRETRAINED / "classifier_mnist.pt")
    assert card["accuracy"] > 0.99
    reference = look(shipped, images[:6000])[1]

    def score(some):
        return frechet_distance(look(shipped, some)[1], reference)

    floor, error = score(held[:1000])
    blurred = torch.nn.functional.avg_pool2d(held[:1000].float(), 3, 1, 1).to(torch.uint8)
    spoilt = {"blurred": score(blurred), "one class": score(held[held_labels == 3][:1000]),
              "each ten times": score(held[:100].repeat(10, 1, 1, 1))}
    assert all(value > floor + 2 * (error + own) for value, own in spoilt.values()), (
        floor, error, spoilt)


@pytest.fixture
def shades(monkeypatch):
    """The data set of two_shades, with three dark squares to a bright one."""
    images = torch.cat([torch.full((48, 1, 8, 8), 40),
                        torch.full((16, 1, 8, 8), 215)]).to(torch.uint8)
    images = (images + torch.randint(
        0, 9, images.shape, generator=torch.Generator().manual_seed(0))).to(torch.uint8)
    drawn = images.repeat(4, 1, 1, 1), (torch.arange(64) // 48).repeat(4)
    monkeypatch.setitem(data.DATASETS, "shades", data.Dataset(
        lambda count, seed: drawn, ("dark", "bright")))


@pytest.mark.usefixtures("shades")
def test_the_command_writes_its_numbers_and_tells_them_again(two_shades, tmp_path, capsys):
    """A model of dark and bright squares: the classifier agrees with the labels asked for."""
    flags = ["--checkpoint", str(two_shades), "--num_images", "100", "--steps", "5",
             "--output_dir", str(tmp_path), "--device", "cpu"]
    evaluate.main(flags)
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert found["samples"]["agreement"] > 0.9
    assert found["samples"]["classes"][0] == pytest.approx(0.75, abs=0.05)
    assert ("FD, small classifier" in capsys.readouterr().out
            and (tmp_path / "nearest.png").is_file())
    evaluate.main(flags)
    again = json.loads((tmp_path / "evaluation.json").read_text())
    assert again["samples"] == found["samples"]


def test_too_few_images_are_refused(capsys):
    assert "fewer than 100" in fails(capsys, evaluate.main, "--num_images", 5)


@pytest.fixture(scope="module")
def their_classifier(two_shades, tmp_path_factory):
    """What evaluate.py trains for `command`."""
    folder = tmp_path_factory.mktemp("classifier")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "SYNTHETIC_SIZE", 120)
        real = load_reference(load_model(two_shades)[2], "data", "synthetic_digits")
        get_classifier("synthetic_digits", *real[:4], folder)
    return folder / "classifier.pt"


@pytest.fixture
def command(two_shades, their_classifier, tmp_path, monkeypatch):
    """evaluate.py on a tiny model, beside few digits."""
    monkeypatch.setattr(data, "SYNTHETIC_SIZE", 120)
    shutil.copy(their_classifier, tmp_path)
    return ["--checkpoint", two_shades, "--output_dir", tmp_path, "--dataset", "synthetic_digits",
            "--device", "cpu"]


@pytest.mark.parametrize("argv, message", [
    (["--race", "--sampler", "ddim"], "--race takes each sampler"),
    (["--race", "--eta", "0"], "--race takes each"),
    (["--stages", "--label", "dark"], "--stages takes"),
    (["--stages", "--race"], "leave out --race"),
    (["--label", "north"], "unknown class 'north'"), (["--steps", "5000"], "5000")])
def test_what_cannot_be_evaluated_is_refused_before_anything_is_drawn(argv, message, command,
                                                                      capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "generate", None)
    assert message in fails(capsys, evaluate.main, *command, "--num_images", 100, *argv)


def test_what_looks_at_the_first_samples_sees_every_class_that_was_asked_for():
    """With --label all they came sorted: the 2,000 of 10,000 searched for copies were 0s and 1s."""
    args = argparse.Namespace(stages=False, label="all", num_images=1000, seed=0)
    y = evaluate.choose_classes(args, {"classes": list("0123456789")}, None, known=True)
    assert torch.bincount(y).tolist() == [100] * 10
    assert torch.bincount(y[:200], minlength=10).min() >= 8


def test_the_race_compares_as_many_samples_as_there_are_real_images(command, tmp_path, monkeypatch,
                                                                    capsys):
    monkeypatch.setattr(evaluate, "RACE", {"ddim": (1,)})
    evaluate.main([*map(str, command), "--race", "--num_images", "150"])    # and 120 test digits
    assert json.loads((tmp_path / "race.json").read_text())["num_images"] == 120
    assert "cost: 120 images" in capsys.readouterr().out


@pytest.mark.usefixtures("shades")
def test_stages_ask_for_the_class_of_each_image(two_shades, tmp_path, monkeypatch):
    def spy(draw, x_0, *rest):
        seen.update(y=draw.keywords["y"], bright=x_0.float().mean((1, 2, 3)) > 128)
        return {}, [], []

    seen = {}
    monkeypatch.setattr(evaluate, "stages", spy)
    monkeypatch.setattr(evaluate, "write_comparison", lambda *found, **settings: None)
    monkeypatch.setattr(evaluate, "get_classifier", lambda *given: (Classifier(1, 8, 2).eval(), ""))
    evaluate.main(["--checkpoint", str(two_shades), "--stages", "--num_images", "100", "--steps",
                   "2", "--output_dir", str(tmp_path), "--device", "cpu"])
    assert len(seen["y"]) == 100 and 0 < seen["y"].sum() < 100
    assert torch.equal(seen["y"], seen["bright"].long())


def test_a_race_that_is_stopped_keeps_what_it_has_found(command, tmp_path, monkeypatch):
    """All of it may take hours."""
    def stopped_in_the_second(*args, steps, **settings):
        if steps == 2:
            raise KeyboardInterrupt
        return generate(*args, steps=steps, **settings)

    monkeypatch.setattr(evaluate, "RACE", {"ddim": (1, 2)})
    monkeypatch.setattr(evaluate, "generate", stopped_in_the_second)
    with pytest.raises(SystemExit):
        evaluate.main([*map(str, command), "--race", "--num_images", "100"])
    found = json.loads((tmp_path / "race.json").read_text())
    assert [(row["sampler"], row["steps"]) for row in found["rows"]] == [("ddim", 1)]
    assert found["rows"][0]["fd"] > 0 and found["num_images"] == 100


def test_stages_of_other_classes_take_guidance_from_none(tmp_path, monkeypatch):
    """The shipped digits' card asks for guidance, and garments have no class for it to follow."""
    monkeypatch.setattr(evaluate, "same_classes", lambda *given: False)
    monkeypatch.setattr(evaluate, "get_classifier",
                        lambda *given: (Classifier(1, 28, 10).eval(), "no matter which"))
    evaluate.main(["--checkpoint", str(ROOT / "pretrained" / "synthetic_digits.pt"), "--stages",
                   "--num_images", "100", "--steps", "2", "--sampler", "ddim",
                   "--output_dir", str(tmp_path), "--device", "cpu"])
    found = json.loads((tmp_path / "stages.json").read_text())
    assert (found["guidance"] == 1 and found["guidance_interval"] is None
            and found["label"] == "none")


def test_several_labels_and_more_samples_than_held_out_images(command, tmp_path, capsys):
    """Labels come in full rows, 202 for 201 pictures; and distances are those of as many samples
    as real images."""
    evaluate.main([*map(str, command), "--num_images", "201", "--label", "dark,bright",
                   "--steps", "2"])
    found = json.loads((tmp_path / "evaluation.json").read_text())
    held = found["num_held_out"]
    assert (found["num_images"] == 201 and held < 201
            and f"means over sets of {held}" in capsys.readouterr().out)


def test_a_card_says_what_the_command_found(command, two_shades, tmp_path):
    """The cards' own tests read a JSON that is written by hand."""
    entries = load_checkpoint(two_shades)
    entries["ema"]["conv_out.weight"] *= 0.5
    save_checkpoint(tmp_path / "weak.pt", entries)
    evaluate.main([*map(str, command), "--num_images", "100", "--steps", "5",
                   "--weak", str(tmp_path / "weak.pt")])
    found = json.loads((tmp_path / "evaluation.json").read_text())
    card = export.export(two_shades, tmp_path / "small.pt", tmp_path / "evaluation.json")
    assert card["fd"] == found["samples"]["fd"] and card["fd_floor"] == found["floor"]["fd"]
    assert (card["sampler"], card["sampler_steps"], card["num_images"]) == ("ddim", 5, 100)
    assert (card["weak"], card["guidance"], card["guidance_interval"]) == ("weak.pt", 2, [15, 49])
    assert card["dataset"] == "synthetic_digits" and card["held_out"] == "test images"


@pytest.mark.parametrize("num_images", [100, 250])
def test_samples_and_floor_are_measured_each_by_its_own_images(num_images, command, tmp_path):
    """All by hand, of the digits that were drawn and of the 120 real ones; those that depend on the
    number of images are the mean over sets of 100, or over two sets of 120 samples."""
    evaluate.main([*map(str, command), "--num_images", str(num_images), "--steps", "2",
                   "--label", "all", "--seed", "3"])
    found = json.loads((tmp_path / "evaluation.json").read_text())
    model, diffusion, facts = load_model(command[1])
    images, _, held, *_ = load_reference(facts, "data", "synthetic_digits")
    size = min(num_images, 120)
    y = (torch.arange(num_images) * 2 // num_images)[shuffled(num_images)]
    drawn = to_uint8(generate(model, diffusion, num_images, 8, seed=3, steps=2, y=y,
                              batch_size=100)[0])
    network = load_classifier(tmp_path / "classifier.pt")[0]
    training = look(network, images)[1]
    for key, some in (("samples", drawn), ("floor", held)):
        probabilities, features = look(network, some)
        sets = [features[k:k + size] for k in range(0, len(features) - size + 1, size)]
        assert len(sets) == (2 if num_images == 250 and key == "samples" else 1)
        assert found[key]["fd"] == pytest.approx(
            sum(frechet_distance(part, training)[0] for part in sets) / len(sets), rel=1e-6)
        for k, name in enumerate(("precision", "recall")):
            assert found[key][name] == pytest.approx(
                sum(precision_recall(part, training)[k] for part in sets) / len(sets))
        assert found[key]["kid"] == pytest.approx(kernel_distance(features, training)[0], rel=1e-6)
        sure = sum(max(row) > 0.9 for row in probabilities.tolist()) / len(some)
        assert found[key]["confident"] == pytest.approx(sure) and share_sure(probabilities) == sure
        assert found[key]["detail"] == pytest.approx(fine_power(some) / fine_power(images))
    held = held[:num_images]                    # as many are looked for as there are samples
    near, near_held = (nearest_images(some, images)[0] for some in (drawn, held))
    in_features, held_in_features = (nearest(look(network, some)[1], training)[0][0]
                                     for some in (drawn, held))
    copies = found["copies"]
    assert copies["copied"] == pytest.approx(copied_share(near[0], near_held[0]))
    assert copies["copied_in_features"] == copied_share(in_features, held_in_features)
    assert copies["median_distance"] == pytest.approx(float(near[0].median()))
    assert copies["median_distance_held_out"] == pytest.approx(float(near_held[0].median()))
    assert copies["single"] == single_share(near)


def test_an_image_of_both_sets_is_no_yardstick_for_copies(capsys):
    """One duplicate among 53 held-out images made the limit zero, and no copy was a copy."""
    images, held = digits(60, seed=1)[0], digits(20, seed=2)[0]
    both = torch.cat([images[:19], held])
    known = (images, lambda some: torch.zeros(len(some), 3), torch.zeros(60, 3))
    found = evaluate.copies(images[:9], both, *known)[0]
    assert (found["copied"], found["held_out"], found["in_both"]) == (1, 20, 19)
    assert found["copied_by_chance"] == pytest.approx(1 / 21)
    of_held = nearest_images(held, images)[0]
    assert found["single_held_out"] == single_share(of_held)
    assert found["median_distance_held_out"] == pytest.approx(float(of_held[0].median()))
    found = evaluate.copies(held[:9], images[:20], *known)[0]
    assert (found["copied"], found["held_out"], found["in_both"]) == (0, 0, 20)
    evaluate.print_copies(found, 60, "held-out images")
    assert "all of the held-out images are in the training set, too" in capsys.readouterr().out


def test_mirrored_copies_are_looked_for_where_the_training_showed_them(two_shades):
    images, _ = digits(60, seed=1)
    held = digits(60, seed=2)[0]
    network = Classifier(1, 28, 10).eval()
    parts = (images[:20].flip(-1), held, images, lambda some: look(network, some)[1],
             look(network, images)[1])
    for kind in ("copied", "copied_in_features"):
        found = [evaluate.copies(*parts, positions)[0][kind] for positions in (1, 2)]
        assert found[0] < 0.5 < found[1] == 1, kind
    data = {"flip": True, "turn": False}
    real = Reference(images, None, held, None, "held-out images")
    model, diffusion, _ = load_model(two_shades)

    def answers(x_t, t, y=None):
        return torch.zeros_like(x_t)

    told, _ = evaluate.evaluate(images[:20].flip(-1), answers, diffusion, data, None, real, network,
                                torch.device("cpu"))
    assert told["copies"]["copied"] == told["copies"]["copied_in_features"] == 1


def test_samples_of_a_mirrored_training_are_held_against_mirrored_images(two_shades):
    """A perfect sampler of --flip stood at 180 times the floor, for its mirrored half alone."""
    images, drawn, held = (digits(count, seed=seed)[0] for count, seed in
                           ((2000, 1), (500, 2), (500, 3)))
    drawn[::2] = drawn[::2].flip(-1)
    torch.manual_seed(0)
    network, (_, diffusion, _) = Classifier(1, 28, 10).eval(), load_model(two_shades)
    real = Reference(images, None, held, None, "held-out images")
    found = [evaluate.evaluate(drawn, lambda x_t, t, y=None: torch.zeros_like(x_t), diffusion,
                               {"flip": flip}, None, real, network, torch.device("cpu"))[0]
             for flip in (True, False)]
    as_trained, upright = (numbers["samples"]["fd"] for numbers in found)
    assert as_trained < 3 * found[0]["floor"]["fd"] and as_trained < 0.7 * upright


@pytest.mark.parametrize("data, positions", [({}, 1), ({"flip": True}, 2), ({"turn": True}, 8)])
def test_real_images_are_shown_in_the_positions_of_the_training(data, positions):
    image = torch.arange(9, dtype=torch.uint8).view(1, 1, 3, 3)
    shown = as_shown(image.repeat(800, 1, 1, 1), data).flatten(1)
    kinds, counts = shown.unique(dim=0, return_counts=True)
    assert len(kinds) == positions and counts.min() > 0.7 * 800 / positions


def test_psnr_is_the_mean_of_that_of_each_image():
    """Of the pooled error, as it was, one bad picture makes the number: 15.0 here."""
    reference = torch.zeros(2, 1, 4, 4)
    images = reference + torch.tensor([0.01, 0.5]).view(2, 1, 1, 1)
    assert psnr(images, reference) == pytest.approx(
        (10 * math.log10(4e4) + 10 * math.log10(16)) / 2, abs=1e-4)
    assert psnr(reference, reference) == pytest.approx(100, abs=1e-3)


def test_fine_power_tells_waves_of_three_pixels_from_waves_of_six():
    """A cosine of amplitude a has the mean square a^2 / 2, all of it (Parseval) at two of
    12 x 12 frequencies."""
    x = torch.arange(12)
    short, long = ((128 + 90 * torch.cos(2 * math.pi * x / wave)).round().to(torch.uint8)
                   for wave in (3, 6))
    cycles = [min(k, 12 - k) / 12 for k in range(12)]
    fine = sum(math.hypot(u, v) > 1 / 4 for u in cycles for v in cycles)
    for images in (short.expand(2, 3, 12, 12), short[:, None].expand(2, 3, 12, 12)):
        assert fine_power(images) == pytest.approx(90**2 / 2 * 144 / fine, rel=0.01)
    assert fine_power(long.expand(2, 3, 12, 12)) < 1


def test_stages_noise_real_images_and_take_the_last_steps(command, tmp_path):
    """Rows are the held-out images, then what a plain loop over the last levels makes of them."""
    evaluate.main([*map(str, command), "--stages", "--num_images", "100", "--steps", "5",
                   "--sampler", "ddim", "--seed", "3", "--batch_size", "40"])
    found = json.loads((tmp_path / "stages.json").read_text())
    assert ([row["steps"] for row in found["rows"]] == [0, 1, 2, 4, 5]
            and (tmp_path / "stages.png").is_file())
    model, diffusion, data = load_model(command[1])
    images, _, held, *_ = load_reference(data, "data", "synthetic_digits")
    network = load_classifier(tmp_path / "classifier.pt")[0]
    count = min(100, len(held))
    noise = seeded_noise(3, range(count), 0, (1, 8, 8))
    for row, levels in zip(found["rows"], ([], [9, -1], [19, 9, -1], [39, 29, 19, 9, -1],
                                           [49, 39, 29, 19, 9, -1])):
        x = to_signed(held[:count])
        if levels:
            ab = diffusion.alpha_bar[levels[0]].float()
            x = ab.sqrt() * x + (1 - ab).sqrt() * noise
        for t, t_prev in zip(levels, levels[1:]):
            with torch.no_grad():
                x, _ = diffusion.reverse_diffusion_step(model, x, t, t_prev, eta=0)
        distance = frechet_distance(look(network, to_uint8(x))[1], look(network, images)[1])[0]
        assert row["fd"] == pytest.approx(distance, rel=1e-3)
        assert row["detail"] == pytest.approx(fine_power(to_uint8(x)) / fine_power(images),
                                              rel=1e-3)


def test_the_race_draws_the_same_noises_by_every_sampler(command, tmp_path, monkeypatch):
    """Each row's distance is that of what sample.py would draw; numbers of calls beyond the
    timesteps are left out."""
    monkeypatch.setattr(evaluate, "RACE", {"ddim": (1, 50, 1000)})      # the model has 50 timesteps
    evaluate.main([*map(str, command), "--race", "--num_images", "100", "--seed", "3"])
    found = json.loads((tmp_path / "race.json").read_text())
    assert [(row["sampler"], row["steps"]) for row in found["rows"]] == [("ddim", 1), ("ddim", 50)]
    assert found["sampler"] is None and (tmp_path / "race.png").is_file()
    model, diffusion, data = load_model(command[1])
    images, _, held, *_ = load_reference(data, "data", "synthetic_digits")
    network = load_classifier(tmp_path / "classifier.pt")[0]
    floor = frechet_distance(*(look(network, part)[1] for part in (held[:100], images)))[0]
    assert found["floor"] == pytest.approx(floor, rel=1e-6)
    for row in found["rows"]:
        drawn, _ = generate(model, diffusion, 100, 8, seed=3, steps=row["steps"],
                            y=(torch.arange(100) % 2)[shuffled(100)], batch_size=100)
        features = [look(network, part)[1] for part in (to_uint8(drawn), images)]
        assert row["fd"] == pytest.approx(frechet_distance(*features)[0], rel=1e-6)
