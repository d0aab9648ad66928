"""Break trainings and files on purpose, again and again, and count what was lost.

    python tests/torture.py --kills 200 --save_kills 1000 --signals 50
    python tests/torture.py --peer_kills 20 --peer_save_kills 100

The second command does the same to denoising-diffusion-pytorch. Each try is a process forked from
this one, which has everything loaded, and its result one line of outputs/torture/results.jsonl.
Started again, it goes on where it was stopped; at the end it prints one table of all that ran. The
exit code is 1 if anything was lost. The runs train a small network with dropout, two parts a step,
bfloat16 and the real digits of $DIFFUSION_DATA, else ./data, else synthetic ones.
"""

import argparse
import contextlib
import hashlib
import io
import json
import mmap
import os
import pickle
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
import zlib
from collections import Counter, defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import data
import loop
import training_data
from checkpoint import load_checkpoint, save_checkpoint
from conftest import same
from diffusion import SAMPLERS, DiffusionProcess
from folders import load_folder
from running import FINAL, LATEST, Stopped
from train import train

STEPS = 30
# 192 images of 8x8, 10 of them held out, 16 in a step: an epoch is 11 steps.
RUN = dict(dataset_name="mnist", steps=STEPS, batch_size=8, accumulate=2, learning_rate=1e-3,
           model_name="attention", base_channels=16, multipliers=(1, 2), num_blocks=1,
           attention_levels=(1,), heads=2, groups=8, time_emb_dim=16, dropout=0.2,
           val_fraction=0.05, optimizer="adamw", lr_schedule="cosine", warmup=3, grad_clip=1.0,
           ema_every=2, num_samples=2, sample_every=15, save_every=15, seed=5, device="cpu",
           precision="bf16")


def prepare(data_dir):
    """What every forked child finds in memory: the images, and pictures in 3 steps."""
    torch.set_num_threads(1)                            # threads do not survive a fork
    try:
        images, labels = data.get_dataset("mnist", data_dir)
    except data.DatasetUnavailable:
        print("no MNIST there: using synthetic digits")
        images, labels = data.get_dataset("synthetic_digits")
    images, labels = data._resize(images[:192], 8), labels[:192]
    training_data.get_dataset = lambda *args, **settings: (images, labels)
    SAMPLERS["ddim"] = SAMPLERS["ddim"]._replace(steps=3)


class Child:
    """work() in a forked process, whose output goes to a file."""

    def __init__(self, work, log):
        sys.stdout.flush()
        self.log = log
        self.start = time.perf_counter()
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(out, 1)
                os.dup2(out, 2)
                work()
                code = 0
            except Stopped as stop:
                code = 128 + stop.number
            except KeyboardInterrupt:
                code = 130
            except (ValueError, OSError) as error:
                print("error:", error)
                code = 2
            except BaseException:
                traceback.print_exc()
            finally:
                with contextlib.suppress(OSError, ValueError):
                    sys.stdout.flush()
                os._exit(code)

    def wait(self):
        """(exit code, or minus the signal; seconds; peak memory in bytes)"""
        _, status, usage = os.wait4(self.pid, 0)
        return (os.waitstatus_to_exitcode(status), time.perf_counter() - self.start,
                usage.ru_maxrss * 1024)

    def send(self, number, after):
        time.sleep(after)
        with contextlib.suppress(ProcessLookupError):   # it is not waited for, but may have ended
            os.kill(self.pid, number)


def run(folder, **settings):
    """Train in `folder`, going on with what is there."""
    there = (folder / LATEST).exists() or (folder / FINAL).exists()
    train(**{**RUN, "output_dir": folder, "resume": "latest" if there else None, **settings})


def outcome(folder):
    """What a finished run comes to: its checkpoint and its table."""
    return load_checkpoint(folder / FINAL), (folder / "training_loss.csv").read_text()


class Reference:
    """The run that nobody disturbs."""

    def __init__(self, folder):
        begun = time.perf_counter()
        Child(lambda: run(folder), folder.with_suffix(".log")).wait()
        self.seconds = time.perf_counter() - begun
        self.outcome = outcome(folder)
        self.path = folder / FINAL
        count = sum(value.numel() for value in self.outcome[0]["model"].values())
        print(f"the undisturbed run: {STEPS} steps, {self.seconds:.1f} s, {count:,} parameters, "
              f"checkpoints of {self.path.stat().st_size / 1e6:.1f} MB")


# ---- Each try returns "" or what went wrong; `note` is a number worth its maximum in the table.

def kill_training(rng, folder, reference):
    """kill -9 at a random moment, half of the times twice, then resume to the end."""
    for _ in range(rng.choice((1, 2))):
        child = Child(lambda: run(folder), folder / "log")
        child.send(signal.SIGKILL, rng.uniform(0, reference.seconds))
        child.wait()
        if (folder / LATEST).exists():
            load_checkpoint(folder / LATEST)
    code, *_ = Child(lambda: run(folder), folder / "log").wait()
    if code:
        return f"resume ended with {code}: {(folder / 'log').read_text()[-300:]}", None
    return "" if same(outcome(folder), reference.outcome) else "another result", None


def kill_save(rng, folder, reference):
    """kill -9 within the save call: the latest checkpoint is the old or the new one, and whole."""
    entries = reference.outcome[0]

    def work():
        for number in range(10_000):
            save_checkpoint(folder / LATEST, {**entries, "step": number})
    save_checkpoint(folder / LATEST, {**entries, "step": -1})
    child = Child(work, folder / "log")
    child.send(signal.SIGKILL, rng.uniform(0, 0.15))
    child.wait()
    found = {**load_checkpoint(folder / LATEST), "step": entries["step"],
             "digest": entries["digest"]}
    return "" if same(found, entries) else "other entries", None


def fill_disk(rng, folder, reference):
    """A save that the disk has no room for: a clear error, and the old checkpoint stays."""
    size = reference.path.stat().st_size
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={2 * size + 300_000}", "none",
                            folder], capture_output=True, text=True)
    if mount.returncode:
        return f"skipped: {mount.stderr.strip()}", None
    try:
        save_checkpoint(folder / LATEST, reference.outcome[0])
        (folder / "filler").write_bytes(bytes(rng.randrange(400_000, size)))
        try:
            save_checkpoint(folder / LATEST, {**reference.outcome[0], "step": 99})
            return "no error", None
        except OSError as error:
            if error.errno != 28:
                return f"another error: {error}", None
        if any(path.suffix == ".tmp" for path in folder.iterdir()):
            return "half a file left", None
        return ("" if same(load_checkpoint(folder / LATEST), reference.outcome[0])
                else "other entries"), None
    finally:
        subprocess.run(["umount", folder], check=True)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


class Huge:
    def __reduce__(self):
        return bytearray, (2**31 - 1,)


class EvilBuild:
    def __setstate__(self, state):
        os.mkdir("pwned")


def _bare_zip(path, members):
    with zipfile.ZipFile(path, "w") as container:
        for name, content, method in members:
            container.writestr(f"archive/{name}", content, method)


def _repickle(path, raw, old, new):
    """A copy of a checkpoint with other bytes in its pickle."""
    with zipfile.ZipFile(io.BytesIO(raw)) as container:
        members = [(m.filename.split("/", 1)[1], container.read(m), zipfile.ZIP_STORED)
                   for m in container.infolist()]
    _bare_zip(path, [(n, c.replace(old, new) if n == "data.pkl" else c, method)
                     for n, c, method in members])


def _nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def _laughs():
    value = ["ha"] * 10
    for _ in range(12):
        value = [value] * 10
    return value


FOREIGN = [  # (what it is, a function that writes it)
    ("pickle gadget", lambda path, raw: path.write_bytes(pickle.dumps(Evil()))),
    ("gadget in a checkpoint", lambda path, raw: torch.save({"model": Evil()}, path)),
    ("gadget in __setstate__", lambda path, raw: torch.save([EvilBuild()], path)),
    ("gadget in the old format", lambda path, raw: torch.save(
        {"model": Evil()}, path, _use_new_zipfile_serialization=False)),
    ("zip bomb", lambda path, raw: _bare_zip(
        path, [("data.pkl", bytes(10**8), zipfile.ZIP_DEFLATED)])),
    ("zip bomb, bzip2", lambda path, raw: _bare_zip(
        path, [("data/0", bytes(10**8), zipfile.ZIP_BZIP2)])),
    ("a tensor shown a billion times", lambda path, raw: save_checkpoint_like(
        path, {"model": {"w": torch.zeros(1).expand(10**9)}})),
    ("a shape of 2^40", lambda path, raw: save_checkpoint_like(
        path, {"model": {"w": torch.zeros(1).as_strided((2**40,), (0,))}})),
    ("billion laughs", lambda path, raw: save_checkpoint_like(path, {"model": _laughs()})),
    ("nested 100 deep", lambda path, raw: save_checkpoint_like(path, {"model": _nested(100)})),
    ("a sparse tensor", lambda path, raw: save_checkpoint_like(
        path, {"model": {"w": torch.sparse_coo_tensor([[0]], [1.0], (10**9,))}})),
    ("a meta tensor", lambda path, raw: save_checkpoint_like(
        path, {"model": {"w": torch.empty(10**9, device="meta")}})),
    ("another name in its pickle", lambda path, raw: _repickle(
        path, raw, b"collections", b"subprocess_")),
    ("gigabytes of bytearrays", lambda path, raw: torch.save([Huge(), Huge(), Huge()], path)),
    ("one tensor a hundred thousand times", lambda path, raw: save_checkpoint_like(
        path, {"model": [torch.zeros(1_000_000)] * 100_000})),
    ("another storage size", lambda path, raw: _repickle(
        path, raw, b"FloatStorage", b"LongStorage_")),
    ("bare weights", lambda path, raw: torch.save({"w": torch.zeros(3)}, path)),
    ("denoising-diffusion-pytorch's", lambda path, raw: torch.save(
        {"step": 1, "model": {}, "ema": {}}, path)),
    ("safetensors", lambda path, raw: path.write_bytes(struct.pack("<Q", 2) + b"{}")),
    ("safetensors with a huge header", lambda path, raw: path.write_bytes(
        struct.pack("<Q", 2**62) + b"{}")),
    ("numpy's npz", lambda path, raw: np.savez(path.open("wb"), w=np.zeros(3))),
    ("an image", lambda path, raw: Image.new("RGB", (9, 9)).save(path, "PNG")),
    ("text", lambda path, raw: path.write_text("weights")),
    ("an empty file", lambda path, raw: path.write_bytes(b"")),
    ("zeros", lambda path, raw: path.write_bytes(bytes(100_000))),
    ("an empty zip", lambda path, raw: _bare_zip(path, [])),
    ("a checkpoint within a zip", lambda path, raw: _bare_zip(
        path, [("model.pt", raw, zipfile.ZIP_STORED)])),
]


def save_checkpoint_like(path, entries):
    torch.save({"format": "readable-diffusion", "version": 1, "digest": "0" * 64, **entries}, path)


def memory(kind):
    """Bytes of memory of this process: VmRSS now, VmHWM at most."""
    return int(Path("/proc/self/status").read_text().split(f"{kind}:")[1].split()[0]) * 1024


def open_hostile(rng, folder, reference):
    """A truncated, altered or hostile file: an error of one line, quickly, and no code is run."""
    raw, path = reference.path.read_bytes(), folder / "hostile.pt"
    index = rng.index
    if index % 5 == 0:
        what = f"cut at {index // 5 % 100} %"
        path.write_bytes(raw[:len(raw) * (index // 5 % 100) // 100])
    elif index % 5 == 1:
        what, write = FOREIGN[index // 5 % len(FOREIGN)]
        write(path, raw)
    else:
        damaged = bytearray(raw)
        # Tensors are most of the file; its head and directory are hit more often than by chance.
        where = [rng.randrange(len(raw)), rng.randrange(6000),
                 len(raw) - 1 - rng.randrange(6000)][index % 5 - 2]
        what = f"bit flipped at {where} of {len(raw)}"
        damaged[where] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)

    def work():
        os.chdir(folder)
        start = time.perf_counter()
        with contextlib.suppress(ValueError, OSError):      # a warm-up: code that is paged in stays
            load_checkpoint(path)
        seconds, before = time.perf_counter() - start, memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")       # the peak counts from here
        try:
            if not same(load_checkpoint(path), reference.outcome[0]):
                raise AssertionError("other values were loaded")
        finally:
            Path("cost").write_text(f"{seconds} {memory('VmHWM') - before}")
    code, *_ = Child(work, folder / "log").wait()
    told, size = (folder / "log").read_text(), path.stat().st_size
    seconds, grown = map(float, (folder / "cost").read_text().split())
    grown /= max(size, 1_000_000)
    if (folder / "pwned").exists():
        return f"{what}: ran code", grown
    if code not in (0, 2) or code == 2 and len(told.strip().splitlines()) != 1:
        return f"{what}: {told[-300:]}", grown
    if code == 0 and not what.startswith("bit"):
        return f"{what}: loaded", grown
    if seconds > reference.patience or grown > 2:
        return f"{what}: {seconds:.1f} s, {grown:.1f} times the file's memory", grown
    return "", grown


def _png_claiming(width, height):
    """A valid header that promises a picture of this size."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + head
            + struct.pack(">I", zlib.crc32(b"IHDR" + head)))


def read_folder(rng, folder, reference, count=10_000):
    """A folder of which every 20th file is hostile: all the others are read, those are counted."""
    images, expected = folder / "images", Counter()
    images.mkdir()
    png, gif, noise = io.BytesIO(), io.BytesIO(), np.random.default_rng(rng.index)
    Image.new("L", (16, 16)).save(gif, "GIF")
    hostile = {
        "empty": lambda p: p.write_bytes(b""), "a link": lambda p: p.symlink_to(images / "0.png"),
        "image": lambda p: p.write_text("not an image"),
        "too many": lambda p: p.write_bytes(_png_claiming(60_000, 60_000)),
        "too few": lambda p: Image.new("L", (4, 4)).save(p),
        "other format": lambda p: p.write_bytes(gif.getvalue()),
        "truncated": lambda p: p.write_bytes(png.getvalue()[:-40])}
    for k in range(count):
        path = images / f"{k}.png"
        if k % 20 == 7:
            kind = list(hostile)[k // 20 % len(hostile)]
            hostile[kind](path)
            expected[kind] += 1
        else:
            png = io.BytesIO()
            Image.fromarray(noise.integers(0, 256, (16, 16), dtype=np.uint8)).save(png, "PNG")
            path.write_bytes(png.getvalue())

    def work():
        kept, _ = load_folder(images, 16)
        print("kept", len(kept))
    code, seconds, memory = Child(work, folder / "log").wait()
    told = (folder / "log").read_text()
    bad = sum(expected.values())
    right = (f"{bad} of {count} files" in told and f"kept {count - bad}" in told
             and code == 0 and memory < 1e9)
    return "" if right else f"{code}, {memory / 1e6:.0f} MB: {told[-400:]}", memory / 1e6


def inject_nan(rng, folder, reference):
    """NaN in data, loss, a gradient or a weight: found in that very step, and nothing is lost."""
    where, at = ("data", "loss", "gradient", "weights")[rng.index % 4], rng.randrange(STEPS)
    plain, steps = loop.train_step, []

    def spoiled(model, x_0, y, optimizer, diffusion, *args, **settings):
        hook = None
        if optimizer.param_groups[0]["lr"] > 0:                 # not while the speed is measured
            steps.append(1)
        if len(steps) == at + 1:
            parameter = next(model.parameters())
            if where == "data":
                x_0 = x_0.where(torch.rand_like(x_0) < 0.9, torch.nan)
            elif where == "loss":
                diffusion = DiffusionProcess(diffusion.num_timesteps)
                loss = diffusion.training_loss
                diffusion.training_loss = lambda *inputs: loss(*inputs) * torch.nan
            elif where == "gradient":
                hook = parameter.register_hook(lambda grad: grad * torch.nan)
            else:
                with torch.no_grad():
                    parameter[0] = torch.nan
        try:
            return plain(model, x_0, y, optimizer, diffusion, *args, **settings)
        finally:
            if hook:
                hook.remove()

    def work():
        loop.train_step = spoiled
        run(folder)
    code, *_ = Child(work, folder / "log").wait()
    told = (folder / "log").read_text()
    if code != 2 or f"in step {at + 1}:" not in told:
        return f"{where}, step {at + 1}: exit code {code}, {told[-300:]}", None
    if (folder / LATEST).exists():
        state = load_checkpoint(folder / LATEST)["model"]
        if not all(value.isfinite().all() for value in state.values()):
            return f"{where}: the last checkpoint is spoiled", None
    Child(lambda: run(folder), folder / "log").wait()
    return "" if same(outcome(folder), reference.outcome) else "another result after resuming", None


def send_signal(rng, folder, reference):
    """SIGTERM or SIGINT at a random moment: ends in time, and no step is lost."""
    number = rng.choice((signal.SIGTERM, signal.SIGINT))
    counter = mmap.mmap(-1, 8)                                          # shared with the child
    plain = loop.train_step

    def counting(model, x_0, y, optimizer, *args, **settings):
        loss = plain(model, x_0, y, optimizer, *args, **settings)
        if optimizer.param_groups[0]["lr"] > 0:
            counter[:8] = struct.pack("q", struct.unpack("q", counter[:8])[0] + 1)
        return loss

    def work():
        loop.train_step = counting
        run(folder)
    child = Child(work, folder / "log")
    child.send(number, rng.uniform(0.05, reference.seconds))
    sent = time.perf_counter()
    code, *_ = child.wait()
    seconds = time.perf_counter() - sent
    taken, = struct.unpack("q", counter[:8])
    if code == 0:
        return ("" if (folder / FINAL).exists() else "no result"), seconds    # it was done already
    if code not in (128 + number, -number):
        return f"exit code {code}: {(folder / 'log').read_text()[-300:]}", seconds
    saved = next((load_checkpoint(folder / name)["step"] for name in (LATEST, FINAL)
                  if (folder / name).exists()), 0)
    if saved != taken or seconds > 2.5 * reference.patience:
        return f"{taken} steps, {saved} saved, {seconds:.1f} s", seconds
    Child(lambda: run(folder), folder / "log").wait()
    return ("" if same(outcome(folder), reference.outcome)
            else "another result after resuming"), seconds


# ---- The same for the Trainer of denoising-diffusion-pytorch

def peer_trainer(folder):
    from denoising_diffusion_pytorch import GaussianDiffusion, Trainer, Unet
    images = folder.parent / "peer_images"
    if not images.exists():
        images.mkdir()
        pixels, _ = training_data.get_dataset()
        for k, image in enumerate(pixels):
            Image.fromarray(np.pad(image[0].numpy(), 2)).save(images / f"{k}.png")
    torch.manual_seed(5)
    unet = Unet(dim=8, dim_mults=(1, 2), channels=1)
    diffusion = GaussianDiffusion(unet, image_size=16, timesteps=100, sampling_timesteps=3)
    return Trainer(diffusion, str(images), train_batch_size=8, gradient_accumulate_every=2,
                   train_num_steps=STEPS, save_and_sample_every=10, num_samples=4,
                   results_folder=str(folder / "results"), calculate_fid=False,
                   convert_image_to="L", num_fid_samples=4)


def peer_run(folder):
    trainer = peer_trainer(folder)
    saved = sorted((folder / "results").glob("model-*.pt"), key=lambda p: int(p.stem.split("-")[1]))
    if saved:
        trainer.load(int(saved[-1].stem.split("-")[1]))
    trainer.train()
    torch.save(trainer.model.state_dict(), folder / "weights.pt")


def peer_kill(rng, folder, reference):
    whole = folder.parent / "peer_whole"
    if not (whole / "weights.pt").exists():
        whole.mkdir(exist_ok=True)
        start = time.perf_counter()
        Child(lambda: peer_run(whole), whole / "log").wait()
        (whole / "seconds").write_text(str(time.perf_counter() - start))
    child = Child(lambda: peer_run(folder), folder / "log")
    child.send(signal.SIGKILL, rng.uniform(0, float((whole / "seconds").read_text())))
    child.wait()
    code, *_ = Child(lambda: peer_run(folder), folder / "log").wait()
    if code:
        return f"cannot be resumed: {(folder / 'log').read_text()[-200:]}", None
    weights = [torch.load(f / "weights.pt", weights_only=True) for f in (folder, whole)]
    return "" if same(*weights) else "another result", None


def peer_kill_save(rng, folder, reference):
    trainer = peer_trainer(folder)
    trainer.save(1)

    def work():
        while True:
            trainer.save(1)
    child = Child(work, folder / "log")
    child.send(signal.SIGKILL, rng.uniform(0, 0.15))
    child.wait()
    try:
        torch.load(folder / "results" / "model-1.pt", weights_only=True)
        return "", None
    except Exception as error:  # whatever it is: the checkpoint is gone
        return f"unreadable: {type(error).__name__}", None


ROWS = {  # flag: (what is done, number of tries by default, function, what its note is)
    "kills": ("kill -9 while training, then resumed", 50, kill_training, ""),
    "save_kills": ("kill -9 while saving", 300, kill_save, ""),
    "full_disks": ("disk full while saving", 100, fill_disk, ""),
    "hostile": ("hostile checkpoint files", 500, open_hostile, "times the file's size in memory"),
    "folders": ("10,000 files, 5 % hostile", 1, read_folder, "MB of memory"),
    "nans": ("NaN in data, loss, gradient, weights", 20, inject_nan, ""),
    "signals": ("SIGTERM or SIGINT, then resumed", 20, send_signal, "s from signal to end"),
    "peer_kills": ("denoising-diffusion-pytorch: kill -9", 0, peer_kill, ""),
    "peer_save_kills": ("denoising-diffusion-pytorch: while saving", 0, peer_kill_save, ""),
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for flag, (title, default, *_) in ROWS.items():
        parser.add_argument(f"--{flag}", type=int, default=default,
                            help=f"{title} (default: {default})".replace("%", "%%"))
    parser.add_argument("--patience", type=float, default=2,
                        help="seconds that a hostile file may take to read (default: 2)")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/torture"))
    parser.add_argument("--data_dir", default=os.environ.get("DIFFUSION_DATA", "data"))
    args = parser.parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    results = args.output_dir / "results.jsonl"
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(
        [*ROOT.glob("*.py"), *ROOT.glob("models/*.py"), Path(__file__)]))).hexdigest()[:12]
    done = defaultdict(dict)
    for line in results.read_text().splitlines() if results.exists() else []:
        with contextlib.suppress(ValueError):               # the last line may be half a line
            row = json.loads(line)
            if row["code"] == code:                         # tries of other code prove nothing
                done[row["row"]][row["index"]] = row
    prepare(args.data_dir)
    with tempfile.TemporaryDirectory() as scratch:
        reference = Reference(Path(scratch) / "whole")
        reference.patience = args.patience
        for flag, (title, _, attempt, _) in ROWS.items():
            todo = [index for index in range(getattr(args, flag)) if index not in done[flag]]
            for index in tqdm(todo, desc=title, disable=not todo):
                rng = random.Random(f"{flag} {index}")
                rng.index = index
                folder = Path(scratch) / f"{flag}_{index}"
                folder.mkdir()
                try:
                    problem, note = attempt(rng, folder, reference)
                except (ValueError, OSError) as error:      # a file that should be whole is not
                    problem, note = str(error), None
                shutil.rmtree(folder)
                done[flag][index] = dict(row=flag, index=index, problem=problem, note=note,
                                         code=code)
                with open(results, "a") as file:
                    file.write("\n" + json.dumps(done[flag][index]))
    failures = 0
    print(f"\n{'':44}{'tries':>7}{'failed':>8}   worst")
    for flag, (title, _, _, unit) in ROWS.items():
        tries = done[flag].values()
        if not tries:
            continue
        failed = [row["problem"] for row in tries
                  if row["problem"] and not row["problem"].startswith("skipped")]
        notes = [row["note"] for row in tries if row["note"] is not None]
        print(f"{title:44}{len(tries):7}{len(failed):8}   "
              + (f"{max(notes):.2f} {unit}" if notes else ""))
        skipped = [row["problem"] for row in tries if row["problem"].startswith("skipped")]
        for problem, count in Counter(failed + skipped).most_common(3):
            print(f"    {count}: {' '.join(problem.split())[-220:]}")
        failures += 0 if flag.startswith("peer") else len(failed)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
