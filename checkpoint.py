"""Checkpoints: one .pt file of tensors and plain values, written whole or not at all, read with suspicion.

    save_checkpoint("model.pt", {"model": model.state_dict(), ...})
    entries = load_checkpoint("model.pt")
"""

import hashlib
import io
import pickle
import zipfile
from pathlib import Path

import torch

from utils import write_file

CHECKPOINT_FORMAT = "readable-diffusion"
CHECKPOINT_VERSION = 1


def _digest(entry, sha):
    """Feed a nest of dicts, lists, tensors and plain values to a hash."""
    if isinstance(entry, torch.Tensor):
        sha.update(f"{entry.dtype}{tuple(entry.shape)}".encode())
        sha.update(entry.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(entry, dict):
        for key, value in entry.items():
            sha.update(f"key {key!r}".encode())
            _digest(value, sha)
    elif isinstance(entry, (list, tuple)):
        sha.update(f"list of {len(entry)}".encode())
        for value in entry:
            _digest(value, sha)
    else:
        sha.update(repr(entry).encode())
    return sha.hexdigest()


def save_checkpoint(path, entries):
    """Write a dict of tensors and plain values as one .pt file, with a digest over all of them."""
    entries = {"format": CHECKPOINT_FORMAT, "version": CHECKPOINT_VERSION, **entries}
    entries["digest"] = _digest(entries, hashlib.sha256())
    buffer = io.BytesIO()       # in memory first: a full disk is then an OSError and not torch's own error
    torch.save(entries, buffer)
    write_file(path, buffer.getbuffer())


def load_checkpoint(path):
    """Read what save_checkpoint wrote; the tensors are on the CPU.

    A checkpoint from a stranger must not be able to run code or fill the memory: it is read with
    weights_only=True, and its container is looked at before anything is unpacked.
    Raises FileNotFoundError, or ValueError with one line that says what is wrong with the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(2, "no such checkpoint", str(path))
    try:
        with zipfile.ZipFile(path) as container:
            members = container.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise ValueError(f"{path}: truncated, or not a checkpoint at all") from error
    # torch.save stores without compression, so a member larger than the file is a bomb or a lie.
    if any(m.compress_type != zipfile.ZIP_STORED for m in members) or (
            sum(m.file_size for m in members) > path.stat().st_size):
        raise ValueError(f"{path}: not a checkpoint of this project (its container is compressed or broken)")
    try:
        entries = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path}: refused, it holds more than tensors and plain values "
                         "(a foreign checkpoint, or one that would run code)") from error
    except OSError:
        raise
    except Exception as error:  # the unpickler meets damaged bytes in many ways; all mean the same
        raise ValueError(f"{path}: damaged, it cannot be read ({type(error).__name__})") from error
    if not isinstance(entries, dict) or entries.get("format") != CHECKPOINT_FORMAT:
        raise ValueError(f"{path}: a foreign checkpoint, not written by this project")
    if entries.get("version") != CHECKPOINT_VERSION:
        raise ValueError(f"{path}: format version {entries.get('version')}, "
                         f"this code reads version {CHECKPOINT_VERSION}")
    digest = entries.pop("digest", None)
    if digest != _digest(entries, hashlib.sha256()):
        raise ValueError(f"{path}: altered or damaged since it was written (its digest does not match)")
    return entries
