"""A training as one file: written whole or not at all, read without running anything in it.

    save_checkpoint("model.pt", {"model": model.state_dict(), ...})
    entries = load_checkpoint("model.pt")
"""

import dataclasses
import hashlib
import io
import math
import pickle
import pickletools
import re
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch

from files import write_file
from models import model_defaults
from muon import Muon, is_inner
from utils import EMA

PRETRAINED = Path(__file__).resolve().parent / "pretrained"  # weights that come with the project
CHECKPOINT_FORMAT = "readable-diffusion"
CHECKPOINT_VERSION = 1
MAX_DEPTH, MAX_ENTRIES = 20, 200_000  # a few bytes of pickle can stand for billions of entries
MAX_PICKLE = 10_000_000
NAMES = re.compile(r"collections OrderedDict|torch\._utils _rebuild_tensor_v2|torch \w+Storage")
# Other ways to name things; torch.save uses none.
INDIRECT = ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4")
ENCRYPTED = 1  # a flag in a zip file
SAFE_TORCH = (2, 10)  # before it, weights_only=True could be got round


def _walk(entry, depth=0):
    """Every value in a nest of dicts and lists, with what tells its place: pairs (kind, value)."""
    if depth > MAX_DEPTH:
        raise ValueError("values nested too deep")
    if isinstance(entry, dict):
        yield "dict", len(entry)
        for key, value in entry.items():
            yield "key", key
            yield from _walk(value, depth + 1)
    elif isinstance(entry, (list, tuple)):
        yield "list", len(entry)
        for value in entry:
            yield from _walk(value, depth + 1)
    else:
        yield "value", entry


def _digest(entries, max_bytes=math.inf):
    """A hash over everything in `entries`.

    max_bytes: the size of the file they came from; a tensor beyond that (one value shown a billion
    times, say) or of an unusual kind raises ValueError before it costs memory.
    """
    sha, seen = hashlib.sha256(), 0
    for count, (kind, value) in enumerate(_walk(entries)):
        if count > MAX_ENTRIES:
            raise ValueError("too many entries")
        if not isinstance(value, torch.Tensor):
            sha.update(f"{kind} {value!r}\n".encode())
            continue
        if value.layout != torch.strided or value.is_meta or value.is_complex():
            raise ValueError("an unusual kind of tensor")
        size = value.numel() * value.element_size()
        seen += size
        if size > max_bytes or seen > 10 * max_bytes:       # a few entries may share one tensor
            raise ValueError("tensors larger than the file")
        sha.update(f"{value.dtype} {tuple(value.shape)}\n".encode())
        sha.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def plain(value, name="checkpoint"):
    """What a checkpoint may hold, tensors and plain values, as it will be read again: a number of
    numpy's becomes one of Python's, an enum's member what it stands for. TypeError for anything
    else, which load_checkpoint would refuse."""
    if isinstance(value, dict):
        kind = OrderedDict if isinstance(value, OrderedDict) else dict
        return kind((plain(key, f"a key of {name}"), plain(one, f"{name}[{key!r}]"))
                    for key, one in value.items())
    if isinstance(value, (list, tuple)):
        return (list if isinstance(value, list) else tuple)(plain(one, name) for one in value)
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, torch.Tensor)):
        return value
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind.__str__(value) if kind is str else kind(value)
    raise TypeError(f"{name} is {value!r:.50}: a checkpoint holds tensors and plain values only")


def save_checkpoint(path, entries):
    """Write a dict of tensors and plain values as one .pt file, with a digest over all of them."""
    entries = plain({"format": CHECKPOINT_FORMAT, "version": CHECKPOINT_VERSION, **entries})
    entries.pop("digest", None)                 # of the checkpoint that they were read from
    entries["digest"] = _digest(entries)
    buffer = io.BytesIO()       # in memory first: a full disk is then an OSError, not torch's own
    torch.save(entries, buffer)
    write_file(path, buffer.getbuffer())


def _check_pickle(path, container, member):
    """Refuse a pickle that names anything but tensors: weights_only=True would still make
    bytearrays of any size, for instance."""
    if member.file_size > MAX_PICKLE:
        raise ValueError(f"{path}: refused, {member.file_size / 1e6:.0f} MB of it are not tensors")
    try:
        operations = pickletools.genops(container.read(member))
        names = [(opcode.name, argument) for opcode, argument, _ in operations]
    except (ValueError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path}: damaged, it cannot be read ({type(error).__name__})") from error
    for opcode, argument in names:
        if opcode in INDIRECT or opcode == "GLOBAL" and not NAMES.fullmatch(argument):
            raise ValueError(f"{path}: refused, it holds more than tensors and plain values "
                             "(a foreign checkpoint, or one that would run code): "
                             f"{str(argument)[:60]!r}")


def existing(path):
    """The Path of a checkpoint. FileNotFoundError where there is no such file."""
    if not Path(path).is_file():
        raise FileNotFoundError(2, "no such checkpoint", str(path))
    return Path(path)


def read_container(path):
    """What torch.save wrote into a file, whoever wrote it; the tensors are on the CPU.

    A checkpoint from a stranger must not be able to run code or fill the memory: it is read with
    weights_only=True, and its container is looked at before anything is unpacked.
    Raises FileNotFoundError, or ValueError with one line that says what is wrong with the file.
    """
    if tuple(map(int, torch.__version__.split(".")[:2])) < SAFE_TORCH:
        raise ValueError(f"torch {torch.__version__} cannot read checkpoints safely; install "
                         f"{'.'.join(map(str, SAFE_TORCH))} or newer")
    path = existing(path)
    try:
        with open(path, "rb") as file:  # zipfile looks at the end of a file, torch at its beginning
            if file.read(4) != b"PK\x03\x04":
                raise zipfile.BadZipFile
        with zipfile.ZipFile(path) as container:
            members = container.infolist()
            # torch.save does not compress, so a member larger than the file is a bomb or a lie.
            if (any(m.compress_type != zipfile.ZIP_STORED or m.flag_bits & ENCRYPTED
                    for m in members)
                    or sum(m.file_size for m in members) > path.stat().st_size):
                raise ValueError(f"{path}: not a checkpoint of this project "
                                 "(its container is compressed, encrypted or broken)")
            # torch finds members in any case of letters, and one of another name may be a program.
            pickles = [m for m in members if m.filename.lower().endswith(".pkl")]
            if len(pickles) != 1 or not pickles[0].filename.endswith("/data.pkl"):
                raise ValueError(f"{path}: not a checkpoint of this project "
                                 f"(it holds {len(pickles)} pickles, or one of another name)")
            _check_pickle(path, container, pickles[0])
    except (zipfile.BadZipFile, NotImplementedError, EOFError, struct.error) as error:
        raise ValueError(f"{path}: truncated, or not a checkpoint at all") from error
    try:
        entries = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path}: refused, it holds more than tensors and plain values "
                         "(a foreign checkpoint, or one that would run code)") from error
    except OSError:
        raise
    except Exception as error:  # the unpickler meets damaged bytes in many ways; all mean the same
        raise ValueError(f"{path}: damaged, it cannot be read ({type(error).__name__})") from error
    return entries


def digest_of(path, entries):
    """A hash over the entries of a file. Raises ValueError for more tensors than it can hold."""
    try:
        return _digest(entries, Path(path).stat().st_size)
    except ValueError as error:
        raise ValueError(f"{path}: refused, it holds {error}") from error


def drawing_digest(entries):
    """A hash over what decides the pictures of a checkpoint: averaged weights, network, process
    and size. Optimizer, losses and card do not count."""
    kept = ("ema", "model_name", "model_config", "diffusion_config")
    return _digest({**{name: entries[name] for name in kept},
                    "image_size": entries["data"]["image_size"]})


def load_checkpoint(path, entries=None):
    """Read what save_checkpoint wrote: its entries, with their digest.

    entries: what read_container found there, if it has been read already.
    Raises as read_container does, and ValueError for a foreign, newer or altered file.
    """
    entries = read_container(path) if entries is None else entries
    if not isinstance(entries, dict) or entries.get("format") != CHECKPOINT_FORMAT:
        raise ValueError(f"{path}: a foreign checkpoint, not written by this project")
    version, digest = entries.get("version"), entries.get("digest")
    entries = {name: value for name, value in entries.items() if name != "digest"}
    if type(version) is not int or version != CHECKPOINT_VERSION:
        newer = type(version) is int and version > CHECKPOINT_VERSION
        raise ValueError(f"{path}: {'written by a newer version of this project: ' * newer}"
                         f"format version {str(version)[:40]}, "
                         f"this code reads {CHECKPOINT_VERSION}")
    if digest_of(path, entries) != digest:
        raise ValueError(f"{path}: altered or damaged since it was written "
                         "(its digest does not match)")
    return {**entries, "digest": digest}


def half_precision(weights):
    """Weights as they are shared: half the size."""
    return {name: value.half() if value.is_floating_point() else value
            for name, value in weights.items()}


def whole_precision(weights):
    """And back again, as a network has them."""
    return {name: value.float() if value.dtype == torch.float16 else value
            for name, value in weights.items()}


def check_weights(path, weights, model):
    """Raise ValueError unless `weights` has exactly the model's own names, shapes and dtypes, and
    finite numbers only."""
    def kinds(state):
        return {name: f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
                for name, value in state.items()}

    saved, own = kinds(weights), kinds(model.state_dict())
    wrong = [name for name in [*own, *(saved.keys() - own)] if saved.get(name) != own.get(name)]
    if wrong:
        name = wrong[0]
        raise ValueError(f"{path} is for another model: {len(wrong)} of its entries differ, "
                         f"first {name} ({saved.get(name, 'missing')}, "
                         f"not {own.get(name, 'expected at all')})")
    if not all(value.isfinite().all() for value in weights.values()):
        raise ValueError(f"{path} is of no use: not all of its weights are finite numbers")


@dataclasses.dataclass
class State:
    """What a training changes. With settings, data and seed it decides all that follows."""
    model: torch.nn.Module
    ema: EMA
    optimizer: torch.optim.Optimizer
    losses: list = dataclasses.field(default_factory=list)  # of each step; len counts the steps
    held_out_losses: dict = dataclasses.field(default_factory=dict)  # by step
    reported: int = 0  # the last step whose pictures and tables are written

    def entries(self):
        """For a checkpoint."""
        return {"model": self.model.state_dict(), "ema": self.ema.model.state_dict(),
                "ema_updates": self.ema.updates, "optimizer": self.optimizer.state_dict(),
                "step": len(self.losses), "losses": torch.tensor(self.losses),
                "held_out_losses": torch.tensor([*self.held_out_losses.items()],
                                                dtype=torch.float64).view(-1, 2),
                "reported": self.reported}

    def restore(self, path, saved):
        """Take over the entries of a checkpoint. Raises ValueError if they do not fit."""
        own = dict(self.optimizer.defaults)     # load_state_dict adds to them
        try:
            for weights, model in ((saved["model"], self.model), (saved["ema"], self.ema.model)):
                check_weights(path, weights, model)
                model.load_state_dict(weights)
            kinds = {value.dtype for entries in saved["optimizer"]["state"].values()
                     for value in entries.values()}
            if kinds - {torch.float32}:             # load_state_dict would convert them
                raise ValueError("its optimizer has other kinds of numbers")
            self.optimizer.load_state_dict(saved["optimizer"])
            for p in self.model.parameters():       # the fused optimizers trust these sizes
                moments = {name: value.shape for name, value in self.optimizer.state[p].items()}
                wanted = {"step": (), "exp_avg": p.shape, "exp_avg_sq": p.shape}
                if isinstance(self.optimizer, Muon) and is_inner(p):
                    wanted = {"exp_avg": p.shape}
                entries = self.optimizer.state[p].values()
                if moments != wanted or not all(value.is_contiguous() for value in entries):
                    raise ValueError("its optimizer was one of another model")
            if saved["losses"].shape != (saved["step"],):
                raise ValueError(f"{saved['step']} steps, "
                                 f"but losses of shape {tuple(saved['losses'].shape)}")
            self.ema.updates, self.losses = saved["ema_updates"], saved["losses"].tolist()
            self.held_out_losses = {int(step): loss
                                    for step, loss in saved["held_out_losses"].tolist()}
            self.reported = saved["reported"]
            now = self.optimizer.param_groups
            if not all(type(number) is int and 0 <= number < 2**53
                       for number in (self.ema.updates, self.reported)):
                raise ValueError("its counts are no numbers")
            if any(type(group.get("lr")) is not float for group in now) or any(
                    group.get(name) != value for group in now
                    for name, value in own.items() if name != "lr"):
                raise ValueError("its optimizer had other settings")
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError,
                RuntimeError) as error:
            reason = " ".join(str(error).removeprefix(str(path)).split())[:200]
            raise ValueError(f"{path} cannot be resumed: {reason}") from error


GO_ON = "give those it began with, --epochs or --steps among them, or another --output_dir"


# Settings that the command line knows by a shorter name.
FLAGS = {"dataset_name": "dataset", "num_epochs": "epochs", "learning_rate": "lr",
         "model_name": "model"}


def equal(a, b):
    """Are two settings the same? What a file holds may be of any kind."""
    try:
        return bool(a == b)
    except RuntimeError:                # a stranger's tensor in place of a number
        return False


def check_settings(path, saved, now, advice=GO_ON):
    """Raise ValueError if a run is to go on with other settings, naming each with both values."""
    if not isinstance(saved, dict):
        raise ValueError(f"{path} cannot be resumed: it was written by an earlier version, "
                         "or only for sampling")
    # It may be older than a switch that is off.
    saved = {**{name: False for name, value in now.items() if value is False}, **saved}
    changed = [f"{FLAGS.get(name, name)}: {saved.get(name)!r:.200} then, {now.get(name)!r:.200} now"
               for name in sorted({*saved, *now}, key=str)
               if not equal(saved.get(name), now.get(name))]
    if changed:
        raise ValueError(f"{path} belongs to a run with other settings "
                         f"({'; '.join(changed)}): {advice}")


def told_of(entries, name="settings"):
    """What a checkpoint, or its card (export.py), tells under this name: the settings of its
    training, started_from, draw_with, or the card itself. A dict, empty where it tells nothing."""
    card = entries.get("card")
    told = entries.get(name, card.get(name) if isinstance(card, dict) else None)
    return told if isinstance(told, dict) else {}


def class_vectors(own, vectors, known, classes):
    """The class table of a new model, with the rows of "no class" and of the classes that an old
    one knows by name.

    own: the new model's, [1 + classes, C].  vectors: the old one's, or None.  known, classes: the
    names of the classes in the old one and in the new one.
    """
    table = own.clone()
    if vectors is not None:
        table[0] = vectors[0]                   # "no class"
        for k, label in enumerate(classes, start=1):
            if label in known:
                table[k] = vectors[known.index(label) + 1]
    return table


def take_weights(path, model, name, config, process, classes=None):
    """Give a new model the averaged weights of a checkpoint, to learn on from there.

    name, config: of the model.  process: the config of its DiffusionProcess.  They must be those of
    the checkpoint, but for dropout, clip_loss and the classes.
    classes: their names; for one that the checkpoint knows its vector is taken, others stay random.
    Returns what is to be remembered: file name, digest, steps behind it, images of its training.
    Raises as load_checkpoint does, and ValueError for another network or process.
    """
    entries = load_checkpoint(path)

    def what_counts(*parts):
        free = ("dropout", "clip_loss", "num_classes")
        return {key: value for part in parts for key, value in part.items() if key not in free}

    try:
        # What a network could not yet be told when the file was written, it was not told.
        saved = {**model_defaults(name), **entries["model_config"]}
        check_settings(
            path, what_counts({"model": entries["model_name"]}, saved, entries["diffusion_config"]),
            what_counts({"model": name}, config, process),
            "--start_from needs the --preset and the flags that it was trained with")
        weights = whole_precision(entries["ema"])
        vectors, known = weights.pop("class_emb.weight", None), entries["data"].get("classes") or []
        if ((0 if vectors is None else len(vectors) - 1) != (saved["num_classes"] or 0)
                or vectors is not None and len(known) != len(vectors) - 1):
            raise ValueError(f"{path}: its classes and the vectors that stand for them "
                             "do not fit together")
        if config["num_classes"]:
            weights["class_emb.weight"] = class_vectors(
                model.state_dict()["class_emb.weight"], vectors, known, classes or [])
        check_weights(path, weights, model)
        steps = entries["step"] if "step" in entries else entries["card"]["training_steps"]
        before, images = told_of(entries, "started_from"), told_of(entries).get("images")
        if before and before.get("images") != images:
            images = None                       # it, too, began with weights that know others
        origin = {"file": Path(path).name, "digest": drawing_digest(entries),
                  "steps": steps + before.get("steps", 0), "images": images}
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} is not a checkpoint to start from ({error!r:.100})") from error
    model.load_state_dict(weights)
    return origin
