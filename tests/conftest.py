"""What tests share: the repository on the import path, real data, models, files, a failing command.
"""

import math
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def same(a, b):
    """Are two checkpoints' entries equal, every tensor bit for bit?"""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.fixture(autouse=True)
def nothing_of_this_machine(monkeypatch):
    """Keep from each test what a cluster or an office sets in the environment. Let it begin with
    the same random numbers, and a synthetic set be 200 images, as 10,000 take three seconds. Give
    back the number of threads, which --recreate takes from a picture, and Ctrl-C, which a command
    that was interrupted leaves to the system."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID", "PYTHONDEVMODE",
                 "http_proxy", "https_proxy", "HTTP_PROXY",
                 "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("data.SYNTHETIC_SIZE", 200)
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def data_dir():
    """The folder of real MNIST and Fashion-MNIST, $DIFFUSION_DATA or ./data; skips where absent."""
    folder = Path(os.environ.get("DIFFUSION_DATA", ROOT / "data"))
    if not (folder / "MNIST" / "raw").is_dir():
        pytest.skip(f"no MNIST under {folder}; "
                    "set DIFFUSION_DATA to the folder that holds MNIST/raw")
    return str(folder)


@pytest.fixture
def tiny_model():
    """A U-Net small enough for a test, with the same random weights each time."""
    from models import create_model
    torch.manual_seed(0)
    return create_model(base_channels=8, time_emb_dim=16).eval()


def awake(module):
    """The module with something random in layers that begin with zeros, as after some training."""
    for p in module.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.2)
    return module


# A run of train() that takes a second on any machine.
TINY = dict(base_channels=8, time_emb_dim=16, batch_size=16, device="cpu", precision="float32",
            num_samples=4)


def make_small(patch):
    """Make a run take a second: synthetic sets are 64 images, pictures are drawn in 3 steps, and
    the losses are written and not drawn."""
    from diffusion import SAMPLERS
    from files import write_file
    patch.setattr("data.SYNTHETIC_SIZE", 64)
    patch.setitem(SAMPLERS, "ddim", SAMPLERS["ddim"]._replace(steps=3))
    patch.setattr("session.plot_losses", lambda losses, path, held_out=None:
                  write_file(path, repr((losses, held_out)).encode()))


@pytest.fixture
def few_digits(monkeypatch):
    """A small run's data, digits of 16x16 pixels."""
    make_small(monkeypatch)
    return dict(dataset_name="synthetic_digits", image_size=16)


def write_model(path, T=40, zero=False, **data_facts):
    """The checkpoint of an untrained network of 8x8 images, three classes; zero: it answers 0."""
    from checkpoint import save_checkpoint
    from diffusion import DiffusionProcess
    from models import create_model
    torch.manual_seed(0)
    config = dict(image_channels=1, base_channels=8, time_emb_dim=16, num_classes=3,
                  add_input=not zero)
    model = create_model(**config)
    for p in model.conv_out.parameters():
        p.data *= 0 if zero else 20
    save_checkpoint(path, {
        "model_name": "simple", "model_config": config,
        "diffusion_config": DiffusionProcess(T).config,
        "data": {"name": "synthetic_digits", "image_size": 8, "channels": 1,
                 "classes": ["a", "b", "c"], **data_facts},
        "model": model.state_dict(), "ema": model.state_dict()})
    return path


@pytest.fixture(scope="session")
def two_shades(tmp_path_factory):
    """The checkpoint of a network trained on dark images of class 0 and bright ones of class 1."""
    import data
    import train
    folder = tmp_path_factory.mktemp("shades")
    images = torch.cat([torch.full((32, 1, 8, 8), 40),
                        torch.full((32, 1, 8, 8), 215)]).to(torch.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(data.DATASETS, "shades", data.Dataset(
            lambda count, seed: (images, torch.arange(64) // 32), ("dark", "bright")))
        train.train("shades", steps=250, learning_rate=2e-3, ema_decay=0.95, objective="x0",
                    timesteps=50, label_drop=0.5, base_channels=16, time_emb_dim=16, batch_size=16,
                    device="cpu", precision="float32", num_samples=4, sample_every=1000,
                    output_dir=folder)
    return folder / "model_final.pt"


# ---- What tests do

def fails(capsys, main, *argv):
    """Run a command that must fail with exit code 2 and one line; returns the line."""
    with pytest.raises(SystemExit) as exit_:
        main([str(arg) for arg in argv])
    error = capsys.readouterr().err.strip()
    assert exit_.value.code == 2
    assert "\n" not in error and "error: " in error and "Traceback" not in error, error
    return error


def sheets(folder, count, size=16, seed=0):
    """A folder of that many noisy grey pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (count, size, size), dtype=np.uint8)
    for k, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{k:03d}.png")
    return folder


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def kept_bytes(model, image, t):
    """What the network keeps of a picture for its backward pass, weights aside."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(image, t)
    return sum(kept.values())


# ---- Data and schedules whose exact answer is known

LEVELS = {  # t: (linear alpha_bar, dB, cosine alpha_bar, dB) at T = 1000, computed elsewhere
    0: (0.9999, 40.00, 0.99996, 43.84), 100: (0.895, 9.31, 0.972, 15.34),
    250: (0.521, 0.37, 0.846, 7.39), 500: (0.078, -10.74, 0.492, -0.13),
    750: (0.0033, -24.80, 0.143, -7.77), 900: (2.7e-4, -35.68, 0.0236, -16.16),
    999: (4.04e-5, -43.94, 2.4e-9, -86.15)}

MEAN, STD = -0.2, 0.25


def exact_flow(x_T, ab_T, ab=1.0):
    """Where the flow of data N(MEAN, STD^2) carries x_T, from alpha_bar = ab_T to ab."""
    z = (x_T - math.sqrt(ab_T) * MEAN) / math.sqrt(STD**2 * ab_T + 1 - ab_T)
    return math.sqrt(ab) * MEAN + math.sqrt(STD**2 * ab + 1 - ab) * z


class GaussianModel:
    """The exact answer for data N(MEAN, STD^2): E[x_0 | x_t], in the form the process asks for.

    Written from numpy's own tables, so that it shares no schedule code with what it tests.
    """

    def __init__(self, diffusion):
        self.ab = diffusion.alpha_bar.numpy()
        self.objective = diffusion.objective

    def __call__(self, x_t, t, y=None):
        ab = float(self.ab[int(t[0])])
        a, b = math.sqrt(ab), math.sqrt(1 - ab)
        x_0 = MEAN + STD**2 * a * (x_t - a * MEAN) / (STD**2 * ab + b**2)
        eps = (x_t - a * x_0) / b
        return {"eps": eps, "x0": x_0, "v": a * eps - b * x_0}[self.objective]
