"""What all tests share: the repository on the import path, the folder of real data, a tiny model."""

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture
def data_dir():
    """The folder with real MNIST and Fashion-MNIST: $DIFFUSION_DATA, else ./data; skips where absent."""
    folder = Path(os.environ.get("DIFFUSION_DATA", ROOT / "data"))
    if not (folder / "MNIST" / "raw").is_dir():
        pytest.skip(f"no MNIST under {folder}; set DIFFUSION_DATA to the folder that holds MNIST/raw")
    return str(folder)


@pytest.fixture
def tiny_model():
    """A U-Net small enough for a test, with the same random weights each time."""
    from models import create_model
    torch.manual_seed(0)
    return create_model(base_channels=8, time_emb_dim=16).eval()
