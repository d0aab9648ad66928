"""What tests share: the repository on the import path, the folder of real data, a tiny model."""

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def same(a, b):
    """Are two checkpoints' entries equal, every tensor bit for bit?"""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


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


@pytest.fixture(scope="session")
def two_shades(tmp_path_factory):
    """The checkpoint of a network trained on dark images of class 0 and bright ones of class 1."""
    import data
    import train
    folder = tmp_path_factory.mktemp("shades")
    images = torch.cat([torch.full((32, 1, 8, 8), 40),
                        torch.full((32, 1, 8, 8), 215)]).to(torch.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(data.DATASETS, "shades", data.Dataset(None, ("dark", "bright")))
        patch.setattr(train, "get_dataset",
                      lambda *args, **settings: (images, torch.arange(64) // 32))
        train.train("shades", steps=250, learning_rate=2e-3, ema_decay=0.95, objective="x0",
                    timesteps=50, label_drop=0.5, base_channels=16, time_emb_dim=16, batch_size=16,
                    device="cpu", precision="float32", num_samples=4, sample_every=1000,
                    output_dir=folder)
    return folder / "model_final.pt"
