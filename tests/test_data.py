"""Data sets: what comes out, and what happens when files are missing, odd or broken."""

import gzip
import hashlib
import http.server
import pickle
import socket
import struct
import threading
from functools import partial

import numpy as np
import pytest
import torch
import torchvision
from torchvision.transforms.functional import to_pil_image

import data
from data import DatasetUnavailable, class_names, get_dataset, get_default_dataset, keep_unseen


# ---- Named sets

@pytest.mark.parametrize("name, mean, std", [
    ("mnist", 33.318, 78.567), ("fashion_mnist", 72.940, 90.021)])
def test_real_sets_load_as_they_lie(data_dir, name, mean, std):
    images, labels = get_dataset(name, data_dir)
    assert images.shape == (60_000, 1, 28, 28) and images.dtype == torch.uint8
    assert labels.shape == (60_000,) and labels.dtype == torch.int64
    assert float(images.float().mean()) == pytest.approx(mean, abs=0.001)
    assert float(images.float().std()) == pytest.approx(std, abs=0.001)
    assert len(get_dataset(name, data_dir, train=False)[0]) == 10_000
    assert len(class_names(name)) == 10


def test_a_named_set_made_smaller_averages_instead_of_skipping_pixels(monkeypatch):
    stripes = torch.zeros(3, 1, 32, 32, dtype=torch.uint8)
    stripes[..., ::4] = 255
    monkeypatch.setitem(data.DATASETS, "synthetic_digits", data.Dataset(
        lambda count, seed: (stripes, torch.zeros(3, dtype=torch.int64)), tuple("0123456789")))
    images, _ = get_dataset("synthetic_digits", image_size=8)
    assert 40 < images.min() and images.max() < 90              # a fourth; skipping would give 0


def test_cifar10_loads_from_torchvisions_layout(tmp_path, monkeypatch):
    """Five pickled batches and a test batch, rows of 3 x 32 x 32 bytes. torchvision checks their
    md5 sums also when it does not download, so a subclass brings those of this small archive."""
    folder, random = tmp_path / "cifar-10-batches-py", np.random.default_rng(0)
    folder.mkdir()

    def write(name, entry):
        (folder / name).write_bytes(pickle.dumps(entry))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    names = [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]
    rows = {name: random.integers(0, 256, (4, 3072), dtype=np.uint8) for name in names}
    sums = [[name, write(name, {"data": rows[name], "labels": [k, 1, 2, 3]})]
            for k, name in enumerate(names)]
    meta = {"filename": "batches.meta", "key": "label_names",
            "md5": write("batches.meta", {"label_names": class_names("cifar10")})}
    tiny = type("Tiny", (torchvision.datasets.CIFAR10,),
                dict(train_list=sums[:5], test_list=sums[5:], meta=meta))
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", tiny)
    images, labels = get_dataset("cifar10", tmp_path)
    assert images.shape == (20, 3, 32, 32) and labels.tolist()[::4] == [0, 1, 2, 3, 4]
    assert torch.equal(images.flatten(1),
                       torch.from_numpy(np.concatenate([rows[name] for name in names[:5]])))
    assert get_dataset("cifar10", tmp_path, train=False)[0].shape == (4, 3, 32, 32)
    grey, _ = get_dataset("cifar10", tmp_path, channels=1, image_size=16)
    assert grey.shape == (20, 1, 16, 16)
    (folder / "data_batch_3").write_bytes(b"damaged")
    with pytest.raises(ValueError):
        get_dataset("cifar10", tmp_path)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_named_set_can_be_made_grey_or_colour(channels, monkeypatch):
    monkeypatch.setattr(data, "SYNTHETIC_SIZE", 3)
    for name in ("synthetic_digits", "synthetic_fabrics"):
        images, _ = get_dataset(name, channels=channels)
        plain, _ = get_dataset(name)
        assert images.shape[1] == channels
        as_pil = [np.asarray(to_pil_image(x).convert("L" if channels == 1 else "RGB"))
                  for x in plain]
        expected = torch.from_numpy(np.stack(as_pil)).view(
            3, *images.shape[-2:], channels).permute(0, 3, 1, 2)
        assert (images.int() - expected.int()).abs().max() <= 1               # PIL rounds down


def test_synthetic_sets_differ_between_training_and_test(monkeypatch):
    monkeypatch.setattr(data, "SYNTHETIC_SIZE", 20)
    a, labels = get_dataset("synthetic_digits")
    b, _ = get_dataset("synthetic_digits", train=False)
    assert a.shape == (20, 1, 28, 28) and len(labels) == 20 and not torch.equal(a, b)
    fabrics, labels = get_dataset("synthetic_fabrics", image_size=32)
    assert fabrics.shape == (20, 3, 32, 32) and labels.max() < len(class_names("synthetic_fabrics"))


def test_an_unknown_name_lists_the_choices():
    with pytest.raises(ValueError, match="unknown dataset 'mnits'.*fashion_mnist.*folder"):
        get_dataset("mnits")


# ---- Downloads

def idx(array):
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def mnist_server(monkeypatch):
    """A small MNIST of 30 images behind a real web server on this machine."""
    rng = np.random.default_rng(0)
    files = {}
    for split, n in (("train", 30), ("t10k", 10)):
        files[f"{split}-images-idx3-ubyte.gz"] = gzip.compress(
            idx(rng.integers(0, 256, (n, 28, 28))))
        files[f"{split}-labels-idx1-ubyte.gz"] = gzip.compress(idx(rng.integers(0, 10, n)))

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = files.get(self.path.strip("/"))
            self.send_response(404 if body is None else 200)
            self.end_headers()
            if body and self.command == "GET":
                self.wfile.write(body)
        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/"
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [url])
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources",
                        [(name, hashlib.md5(body).hexdigest()) for name, body in files.items()])
    yield files
    server.shutdown()


def test_a_download_works_and_is_done_once(mnist_server, tmp_path):
    images, labels = get_dataset("mnist", tmp_path)
    assert images.shape == (30, 1, 28, 28) and len(labels) == 30
    mnist_server.clear()                                      # the server has nothing any more
    assert torch.equal(get_dataset("mnist", tmp_path)[0], images)


def test_a_failed_download_says_where_to_put_the_files(mnist_server, tmp_path):
    mnist_server.popitem()
    with pytest.raises(DatasetUnavailable, match="MNIST.raw.*--data_dir"):
        get_dataset("mnist", tmp_path)


@pytest.fixture
def silent_server():
    """A server that takes the call and never says a word, as some firewalls do."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/"


@pytest.mark.parametrize("kind", ["refused", "silent"])
def test_without_a_network_the_answer_comes_within_seconds(kind, silent_server, monkeypatch,
                                                           tmp_path, capsys):
    mirror = {"refused": "http://127.0.0.1:9/", "silent": silent_server}[kind]
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [mirror])
    monkeypatch.setattr(data, "SYNTHETIC_SIZE", 20)
    seconds, = data._any_reachable.__defaults__
    assert seconds < 15
    monkeypatch.setattr(data, "_any_reachable", partial(data._any_reachable, seconds=1))
    with pytest.raises(DatasetUnavailable, match="cannot be downloaded.*--data_dir"):
        get_dataset("mnist", tmp_path)
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    name, images, _ = get_default_dataset(tmp_path)
    assert name == "synthetic_digits" and len(images) == 20
    said = capsys.readouterr().out.strip()
    assert "synthetic digits" in said and "\n" not in said


def test_a_folder_with_braces_is_named_as_it_is(monkeypatch, tmp_path):
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    with pytest.raises(DatasetUnavailable, match="x{y}"):
        get_dataset("mnist", tmp_path / "x{y}")


def test_damaged_files_are_called_damaged(mnist_server, tmp_path):
    get_dataset("mnist", tmp_path)
    path = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    whole = path.read_bytes()
    for length in (1000, len(whole) - 784, 3, 0):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="damaged") as error:
            get_default_dataset(tmp_path)                       # and no synthetic digits instead
        assert not isinstance(error.value, DatasetUnavailable)


@pytest.mark.parametrize("name, val_dir", [("a", "a"), ("a", "a/b"), ("a/b", "a")])
def test_images_that_are_trained_on_cannot_be_held_out(name, val_dir, tmp_path):
    with pytest.raises(ValueError, match="one holds the other"):
        keep_unseen(str(tmp_path / name), str(tmp_path / val_dir))
    keep_unseen(str(tmp_path / "a"), str(tmp_path / "b"))
    keep_unseen("mnist", "mnist")
    keep_unseen(None, str(tmp_path))
