"""SUMMARY.md and README.md against the code: cited names exist, commands parse, numbers are right.

A number is recomputed here from the formula, without the project's own functions where that is
possible, and must agree with what is printed in every printed digit.
"""

import importlib
import importlib.util
import itertools
import math
import re
import shlex

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import presets
import sample
import train
import visualize_diffusion
from conftest import ROOT, kept_bytes
from convergence import MIXTURES, solver_errors
from data import get_dataset
from diffusion import SAMPLERS, DiffusionProcess
from load import load_model
from models import create_model

SUMMARY = (ROOT / "SUMMARY.md").read_text()
PROSE = " ".join(SUMMARY.split())                       # so that a line break hides no sentence
PLACEHOLDER = "file.py"                                 # SUMMARY.md explains citations by this name
DOCUMENTS = [path for path in (ROOT / "SUMMARY.md", ROOT / "README.md") if path.exists()]


def agrees(text, value):
    """Is `text` the value, rounded to the digits it shows? "2.43e-9" shows three, "0.0033" two."""
    text = text.replace(",", "").strip()
    mantissa, _, exponent = text.partition("e")
    places = len(mantissa.partition(".")[2]) - int(exponent or 0)
    return abs(float(text) - value) <= 0.5 * 10.0 ** -places * (1 + 1e-9)


def table(first_heading):
    """The rows of the markdown table whose first column has this heading, as lists of cells."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in SUMMARY.split(
        f"\n| {first_heading} |", 1)[1].split("\n\n", 1)[0].splitlines()]
    return rows[2:]                                     # after the heading's rest and the ruler


# ---- Names

def citations():
    return [(document.name, *match) for document in DOCUMENTS
            for match in sorted(set(re.findall(r"`([\w/]+\.py): ([\w.]+)`", document.read_text())))
            if match[0] != PLACEHOLDER]


@pytest.mark.parametrize("document, file, name", citations())
def test_a_cited_name_exists(document, file, name):
    assert (ROOT / file).is_file(), f"{document} cites {file}, which is not there"
    found = importlib.import_module(
        file.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    for part in name.split("."):
        found = getattr(found, part)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_what_the_documents_import_is_there(document):
    blocks = re.findall(r"^```python\n(.*?)^```", document.read_text(), re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines()
             if re.match("(from|import) ", line)]
    assert lines or document.name != "README.md"
    exec("\n".join(lines), {})


def test_the_use_from_python_that_is_shown_works(tmp_path, monkeypatch, capsys):
    """README's blocks as they stand, but for one batch of digits and two steps."""
    text = (ROOT / "README.md").read_text()
    first, second = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    monkeypatch.setattr("data.SYNTHETIC_SIZE", 130)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()                              # a clone has it
    (tmp_path / "pretrained").symlink_to(ROOT / "pretrained")
    names = {}
    exec(first.replace("steps=50", "steps=2") + second.replace("y=7", "y=7, steps=2"), names)
    assert names["sneakers"].shape == (8, 1, 28, 28)
    assert 0 < float(capsys.readouterr().out) < 2
    with Image.open(tmp_path / "outputs" / "from_python.png") as picture:
        assert picture.width > 500


def test_the_summary_cites_the_code():
    assert len(citations()) > 30


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_a_mentioned_file_exists(document):
    for file in set(re.findall(r"`([\w/]+\.py)[`:]", document.read_text())) - {PLACEHOLDER}:
        assert (ROOT / file).is_file(), f"{document.name} mentions {file}, which is not there"


# ---- Commands

class Parsed(Exception):
    """Raised in place of running a command whose flags were understood."""


def commands():
    """Every python command in the documents' sh blocks, as the list of words after `python`."""
    found = []
    for document in DOCUMENTS:
        for block in re.findall(r"^```(?:sh|bash)\n(.*?)^```", document.read_text(), re.M | re.S):
            for line in block.replace("\\\n", " ").splitlines():
                for part in re.split(r"&&|;", line):
                    words = shlex.split(part, comments=True)
                    while words and re.fullmatch(r"\w+=\S*", words[0]):     # OMP_NUM_THREADS=2
                        words.pop(0)
                    if words and words[0] == "torchrun":
                        words = ["python", *(word for word in words[1:]
                                             if not word.startswith("--nproc"))]
                    if words and re.fullmatch(r"python3?", words[0]):
                        found.append(pytest.param(
                            words[1:], id=f"{document.stem}: {' '.join(words[1:])}"))
    return found


@pytest.mark.parametrize("words", commands())
def test_a_command_parses(words, monkeypatch):
    """Up to where its work begins, so that a flag of no use to the others is found, too."""
    if words[0] == "-m":
        assert importlib.util.find_spec(words[1]), f"no module {words[1]}"
        return

    def stop(*args, **settings):
        raise Parsed

    script = importlib.import_module(words[0].removesuffix(".py").replace("/", "."))
    for name in ("get_device", "train", "verify", "load_checkpoint"):
        if hasattr(script, name):
            monkeypatch.setattr(script, name, stop)
    if words[0] == "sample.py":                         # there is no picture to make again
        monkeypatch.setattr(script, "read_recipe", lambda path: {})
    with pytest.raises(Parsed):                         # a flag that is refused raises SystemExit
        script.main(words[1:])


def test_runs_do_not_overwrite_each_other():
    """Within the experiments, no two commands write to one folder, and none to the default one."""
    experiments = SUMMARY.split("## Experiments", 1)[1].split("\n## ", 1)[0]
    lines = re.findall(r"^python .*$", experiments, re.M)
    folders = [re.search(r"--output_dir (\S+)", line).group(1) for line in lines]
    assert len(lines) > 20 and len(set(folders)) == len(folders) and "outputs" not in folders


# ---- What the three commands do

@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The three commands on 16 tiny images: a folder for a run of 5 epochs, one for a run of 1."""
    photos = tmp_path_factory.mktemp("photos")
    pixels = np.random.default_rng(0).integers(0, 256, (16, 8, 8), dtype=np.uint8)
    for k, picture in enumerate(pixels):
        Image.fromarray(picture).save(photos / f"{k}.png")
    long, short = folders = [tmp_path_factory.mktemp(name) for name in ("long", "short")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SAMPLERS, "ddim", SAMPLERS["ddim"]._replace(steps=5))         # for speed
        for folder, epochs in ((long, 5), (short, 1)):
            train.train(str(photos), batch_size=8, num_epochs=epochs, base_channels=8, device="cpu",
                        precision="float32", output_dir=folder)
        visualize_diffusion.main(["--dataset", str(photos), "--output_dir", str(long)])
        sample.main(["--checkpoint", str(long / "model_final.pt"), "--show_intermediate",
                     "--device", "cpu", "--output_dir", str(long)])
    return folders


@pytest.mark.parametrize("file", [
    "forward_diffusion.png", "samples/epoch_001.png", "checkpoints/model_epoch_005.pt",
    "training_loss.png", "model_final.pt", "generated_samples.png", "generation_strip.png",
    "generation.gif", "generation_frames/"])
def test_the_commands_write_the_files_of_the_summary(runs, file):
    assert f"outputs/{file}" in SUMMARY
    assert (runs[0] / file).exists()


def test_a_long_run_passes_through_the_short_one(runs):
    assert "passes through the short ones" in PROSE
    long, short = ((folder / "samples" / "epoch_001.png").read_bytes() for folder in runs)
    assert long == short


def test_sampling_with_seed_0_repeats_the_last_pictures_of_training(runs):
    assert "the 64 images are those of the last `samples/epoch_*.png`" in PROSE
    model, diffusion, data = sample.load_model(runs[0] / "model_final.pt")
    images, _ = sample.generate(model, diffusion, 64, data["image_size"])
    assert torch.equal(images, train.sample_images(model, diffusion, torch.device("cpu"),
                                                   image_size=8))


# ---- The tables

def linear(num_timesteps=1000, start=1e-4, end=0.02):
    return np.cumprod(1 - np.linspace(start, end, num_timesteps))


def cosine(num_timesteps=1000, s=0.008):
    """The betas' product telescopes to f(t + 1) / f(0); only the last beta meets its cap, 0.999."""
    f = np.cos((np.arange(num_timesteps + 1) / num_timesteps + s) / (1 + s) * math.pi / 2) ** 2
    return np.append(f[1:-1], f[-2] * 0.001) / f[0]


def sigmoid(num_timesteps=1000):
    f = 1 / (1 + np.exp(-3 + 6 * np.arange(num_timesteps + 1) / num_timesteps))
    f = (f - f[-1]) / (f[0] - f[-1])
    return np.append(f[1:-1], f[-2] * 0.001)            # as in cosine(), the last beta is capped


def decibels(alpha_bar):
    return 10 * math.log10(alpha_bar / (1 - alpha_bar))


ALPHA_BAR = {"linear": linear(), "cosine": cosine()}
LINEAR, COSINE = ALPHA_BAR.values()


@pytest.mark.parametrize("schedule", ALPHA_BAR)
def test_the_coefficients_are_right(schedule):
    rows = table(f"t ({schedule})")
    assert [row[0] for row in rows] == ["0", "100", "250", "400", "500", "750", "900", "999"]
    for t, *cells in rows:
        ab = ALPHA_BAR[schedule][int(t)]
        for cell, value in zip(cells, (ab, math.sqrt(ab), math.sqrt(1 - ab), decibels(ab)),
                               strict=True):
            assert agrees(cell, value), f"{schedule}, t = {t}: {cell} should be {value:.6g}"


@pytest.mark.parametrize("schedule", ALPHA_BAR)
def test_the_code_has_the_schedule_of_the_summary(schedule):
    np.testing.assert_allclose(DiffusionProcess(schedule=schedule).alpha_bar.numpy(),
                               ALPHA_BAR[schedule], rtol=1e-9)


def test_the_error_factors_are_right():
    rows = {row[0]: row[2:] for row in table("objective")}
    for column, t in enumerate((0, 500, 999)):
        ab = LINEAR[t]
        factors = {"eps": math.sqrt((1 - ab) / ab), "x0": 1.0, "v": math.sqrt(1 - ab)}
        for objective, value in factors.items():
            assert agrees(rows[objective][column], value), (
                f"{objective}, t = {t}: should be {value:.6g}")


@pytest.mark.parametrize("objective", ["eps", "x0", "v"])
def test_predict_x0_has_the_error_factor_of_the_summary(objective):
    diffusion = DiffusionProcess(objective=objective)
    x_t = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    ab = LINEAR[500]
    factor = {"eps": math.sqrt((1 - ab) / ab), "x0": 1.0, "v": math.sqrt(1 - ab)}[objective]
    answers = [diffusion.predict_x0(lambda x, t, y: torch.full_like(x, output), x_t, 500,
                                    clip=False)
               for output in (0.0, 1.0)]
    # the tables are float32
    assert abs(answers[1] - answers[0]).item() == pytest.approx(factor, rel=1e-6)


def conv(kernel, inputs, outputs):
    return kernel * kernel * inputs * outputs + outputs


def block(inputs, outputs, time=256):
    return (conv(3, inputs, outputs) + conv(3, outputs, outputs) + 4 * outputs
            + time * outputs + outputs)


def parts(b):
    """(name, parameters, output) of the network of width b, by arithmetic."""
    return [("time_mlp", 2 * (256 * 256 + 256), "256"),
            ("conv_in", conv(3, 1, b), f"{b}x28x28"),
            ("down1", block(b, b), f"{b}x28x28"),
            ("down2", block(b, 2 * b), f"{2 * b}x14x14"),
            ("bottleneck", block(2 * b, 2 * b), f"{2 * b}x7x7"),
            ("upsample1", conv(4, 2 * b, 2 * b), f"{2 * b}x14x14"),
            ("up1", block(4 * b, 2 * b), f"{2 * b}x14x14"),
            ("upsample2", conv(4, 2 * b, 2 * b), f"{2 * b}x28x28"),
            ("up2", block(3 * b, b), f"{b}x28x28"),
            ("conv_out", conv(1, b, 1), "1x28x28")]


def parameters(b):
    return sum(count for _, count, _ in parts(b))


def test_the_table_of_the_network_is_right():
    *rows, total = table("part")
    assert [(name, int(count.replace(",", "")), output)
            for name, _, output, count in rows] == parts(64)
    assert total[0] == "total" and int(total[-1].replace(",", "")) == parameters(64)


def test_the_code_has_the_network_of_the_summary():
    model = create_model()
    found = {}
    for name, module in model.named_children():
        module.register_forward_hook(lambda _, inputs, output, name=name: found.__setitem__(
            name, "x".join(str(size) for size in output.shape[1:])))
    with torch.no_grad():
        model(torch.zeros(1, 1, 28, 28), torch.zeros(1, dtype=torch.long))
    for name, count, output in parts(64):
        assert sum(p.numel() for p in getattr(model, name).parameters()) == count
        assert found[name] == output


# ---- Sentences with numbers

def operations(b):
    """Floating-point operations of a forward pass on a 28x28 image, a multiply-add being two."""
    def both(inputs, outputs, pixels):                  # the convolutions and the time of one block
        return (9 * inputs * outputs + 9 * outputs * outputs) * pixels + 256 * outputs
    sizes = [2 * 256 * 256, 9 * b * 784,
             both(b, b, 784), both(b, 2 * b, 196), both(2 * b, 2 * b, 49),
             16 * 4 * b * b * 49,                       # each input meets all of the 4x4 kernel
             both(4 * b, 2 * b, 196), 16 * 4 * b * b * 196, both(3 * b, b, 784), b * 784]
    return 2 * sum(sizes)


def reach():
    """Width of what a bottleneck value has seen: each layer adds (kernel - 1) * stride pixels."""
    layers = [(3, 1)] * 3 + [(2, 1)] + [(3, 2)] * 2 + [(2, 2)] + [(3, 4)] * 2
    return 1 + sum((kernel - 1) * stride for kernel, stride in layers)


def warm_up(n):
    return (1 + n) / (10 + n)


def mean_age(updates):
    """How many updates the average looks back, as a share of all of them."""
    weight, age = 1.0, 0.0
    for n in reversed(range(updates)):
        age += weight * (1 - warm_up(n)) * (updates - 1 - n)
        weight *= warm_up(n)
    return age / updates


def unscaled(num_timesteps):
    return linear(num_timesteps)[-1]


def scaled(num_timesteps):
    return linear(num_timesteps, 0.1 / num_timesteps, 20 / num_timesteps)[-1]


def float32_error(t):
    """Relative error of 1 - ab_t / ab_prev in float32."""
    exact = 1 - LINEAR[t] / LINEAR[t - 1]
    single = np.float32(1) - np.float32(LINEAR[t]) / np.float32(LINEAR[t - 1])
    return abs(float(single) - exact) / exact


def posterior_share(t, t_prev):
    return (1 - LINEAR[t_prev]) / (1 - LINEAR[t])


def copying(alpha_bar):
    """The loss of answering with x_t; the mean square of MNIST's pixels is 0.925."""
    return (alpha_bar * 0.925 + (1 - np.sqrt(1 - alpha_bar)) ** 2).mean()


A, B = math.sqrt(LINEAR[400]), math.sqrt(1 - LINEAR[400])           # the pixel worked by hand
A_PREV, B_PREV = math.sqrt(LINEAR[380]), math.sqrt(1 - LINEAR[380])
X_T = A * 0.8 + B * -0.5
X_0 = (X_T + B * 0.4) / A
STEP, TRUE_STEP = A_PREV * X_0 - B_PREV * 0.4, A_PREV * 0.8 - B_PREV * 0.5
BETA = 1 - LINEAR[400] / LINEAR[399]
HO_MEAN = (X_T + BETA / B * 0.4) / math.sqrt(1 - BETA)  # Ho et al. 2020, eq. 11, with eps = -0.4
SHORT = linear(200)
DISTANCES = ((1 - np.sqrt(SHORT)) ** 2 * 0.925 + 1 - SHORT).reshape(4, 50).mean(1)
EPOCH = 468 * 128 * 3 * operations(64)
CLASSES = 11 * 256
BYTES = 4 * parameters(64)

N = r"(-?[\d,]*\.?\d+(?:e-\d+)?)"                                   # a number, as group
CLAIMS = [
    (f"at t = 400, `x_t` is {N} times the image plus {N} times noise", A, B),
    (f"is t = {N} for linear and t = {N} for cosine",
     (LINEAR < 0.5).argmax(), (COSINE < 0.5).argmax()),
    (rf"x_t = {N} \* 0.8 \+ {N} \* \(-0.5\) = {N}", A, B, X_T),
    (rf"`x_0 = \({N} \+ {N} \* 0.4\) / {N} = {N}`", X_T, B, A, X_0),
    (f"to t = 380, where the factors are {N} and {N},", A_PREV, B_PREV),
    (rf"`{N} \* {N} \+ {N} \* \(-0.4\) = {N}`", A_PREV, X_0, B_PREV, STEP),
    (f"true pixel would stand at {N}[.] ", TRUE_STEP),
    (f"wrong by {N} about the image, and the step by {N}[.] ", 0.8 - X_0, TRUE_STEP - STEP),
    (f"grow from {N} to {N} steps", 2 * math.pi, 2 * math.pi * 10_000 ** (127 / 128)),
    # a corner cell's window is centred on 4x4 pixels
    (f"square {N} pixels wide: in the middle that is the whole 28-pixel image, in a corner {N} of",
     reach(), (reach() + 4) / 2),
    (f"where beta is {N}: ", BETA),
    (rf"`\({N} \+ {N} \* 0.4\) / {N} = {N}`[.] The four",
     X_T, BETA / B, math.sqrt(1 - BETA), HO_MEAN),
    (f"it is {N}, {N}, {N} and {N} on MNIST, in the four ranges", *DISTANCES),
    (f"`base_channels` 32 makes {N} parameters, 128 makes {N}[.] ",
     parameters(32), parameters(128)),
    (f"Width: {N}, {N} and {N} million", *(parameters(b) / 1e6 for b in (32, 64, 128))),
    (f"batches of 128 are {N} steps", 60_000 // 128),
    (f"default 20 epochs are {N} steps", 20 * (60_000 // 128)),
    (f"make {N}, {N}, {N}, {N} and {N} steps an epoch",
     *(60_000 // b for b in (32, 64, 128, 256, 512))),
    (rf"0.9995\^2000 = {N} ", 0.9995 ** 2000),
    (f"after 2,000 steps {N} of it is still", 0.9995 ** 2000),
    (f"takes {N} updates until", next(n for n in itertools.count() if warm_up(n) >= 0.9995)),
    (f"the last `alpha_bar` is {N}, so {N} of", unscaled(200), math.sqrt(unscaled(200))),
    (f"With T = 500 it is {N}[.] ", unscaled(500)),
    (f"alpha_bar ends at {N} and {N}[.] ", unscaled(200), unscaled(500)),
    (f"T = 500 then ends at {N} and T = 2000 at {N},", scaled(500), scaled(2000)),
    (f"that one is off by {N} % at t = 1", 100 * float32_error(1)),
    (f"it is {N} at t = 1 and {N} at t = 100", posterior_share(1, 0), posterior_share(100, 99)),
    (f"In 50 steps it is {N} in the jump from 39 to 19", posterior_share(39, 19)),
    (f"the estimate divides by {N},", math.sqrt(COSINE[999])),
    (f"with the linear schedule {N} and {N}; {N} and {N} belong", math.sqrt(LINEAR[500]),
     math.sqrt(1 - LINEAR[500]), A, B),
    (f"{N} % of its variance, {N} % of its amplitude",
     100 * LINEAR[500], 100 * math.sqrt(LINEAR[500])),
    (f"alpha_bar is {N}; it passes one half at t = {N} ", LINEAR[250], (LINEAR < 0.5).argmax()),
    (f"For our pixel it would give {N} in place of {N} ", X_T + 0.4, X_0),
    (f"beta reaches {N} at T = 20 and {N} at T = 10", 0.02 * 1000 / 20, 0.02 * 1000 / 10),
    (f"ten classes and \"no class\" add 11 x 256 = {N} parameters", CLASSES),
    (f"copies of {N} float32 numbers \\(the {N} above, and {N} for the classes\\) "
     f"make it about {N} MB",
     parameters(64) + CLASSES, parameters(64), CLASSES, 16 * (parameters(64) + CLASSES) / 1e6),
    (f"here {N} MB for a model of {N} MB", 16 * (parameters(64) + CLASSES) / 1e6, BYTES / 1e6),
    (f"five times {N} MB", BYTES / 1e6),
    (f"one 28x28 image takes {N} GFLOP", operations(64) / 1e9),
    (f"An MNIST epoch is therefore about {N} TFLOP", EPOCH / 1e12),
    (f"costs {N} TFLOP by DDIM", 64 * 50 * operations(64) / 1e12),
    (f"and {N} TFLOP by the full DDPM chain", 64 * 1000 * operations(64) / 1e12),
    (f"32` needs {N} GFLOP an image", operations(32) / 1e9),
    (f"takes about {N} times the work of a 28x28", (64 / 28) ** 2),
    (f"at every t, and ends at {N}[.] ", sigmoid()[-1]),
    (f"at 16x16 a head has {N} weights, at 64x64 it would have {N}[.] ", 256**2, 4096**2),
    (f"copy of the 34 M network is {N} MB; with average and Adam's moments a checkpoint is {N} MB",
     34_146_243 * 4 / 1e6, 34_146_243 * 16 / 1e6),
    (f"with 1,000 pictures, 950 of them trained on, about {N} times",
     presets.PRESETS["fabrics_laptop"]["steps"]
     * presets.PRESETS["fabrics_laptop"]["batch_size"] / 950),
    (f"`fabrics_100k` keeps {N} of them, {N} GB; ", 100, 100 * 34_146_243 * 16 / 1e9),
    (f"for one of 34 M parameters {N} MB and {N} MB: average",
     34_146_243 * 16 / 1e6, 34_146_243 * 4 / 1e6),
]


def test_the_table_of_presets_is_right():
    """Parameters counted and operations measured by torch, both on a network without memory."""
    named = set()
    for names, _, count, gflop, length in table("preset"):
        for name in re.findall(r"`(\w+)`", names):
            row = presets.PRESETS[name]
            named.add(name)
            config = {flag: row[flag] for flag in train.MODEL_FLAGS if flag in row}
            size = row.get("image_size") or (32 if name == "cifar10" else 28)
            channels = row.get("channels") or (3 if name == "cifar10" else 1)
            with torch.device("meta"), FlopCounterMode(display=False) as counter:
                model = create_model(row.get("model", "simple"), image_channels=channels, **config)
                model(torch.zeros(1, channels, size, size), torch.zeros(1, dtype=torch.long))
            assert int(count.replace(",", "")) == sum(p.numel() for p in model.parameters()), name
            assert agrees(gflop, counter.get_total_flops() / 1e9), name
            assert f"{row.get('steps', row.get('epochs')):,}" in length, name
    assert named == set(presets.PRESETS)


@pytest.mark.parametrize("pattern, values", [
    pytest.param(pattern, values, id=pattern.replace(N, "#").replace("\\", ""))
    for pattern, *values in CLAIMS])
def test_a_stated_number_is_right(pattern, values):
    found = re.findall(pattern, PROSE)
    assert len(found) == 1, f"expected the sentence once, found {found}"
    texts = found[0] if isinstance(found[0], tuple) else found
    for text, value in zip(texts, values, strict=True):
        assert agrees(text, value), f"{text} should be {value:.6g}"


@pytest.mark.parametrize("sentence, holds", [
    ("almost three quarters of its levels", 0.7 < (1000 - (LINEAR < 0.5).argmax()) / 1000 < 0.75),
    ("copying the input to the output already scores at most 0.00004.",      # if E[x_0^2] <= 1
     LINEAR[999] + (1 - math.sqrt(1 - LINEAR[999])) ** 2 < 4.05e-5),
    ("less than 1e-24 of the initial weights", math.prod(map(warm_up, range(2000))) < 1e-24),
    ("looks back about a tenth of the run so far", 0.095 < mean_age(9360) < 0.105),
    ("multiplied by 20,000", 19_500 < 1 / math.sqrt(COSINE[999]) < 20_500),
    ("more than three times the variance", 1 / posterior_share(39, 19) > 3),
    ("more than a third of an epoch", 1 / 3 < 64 * 1000 * operations(64) / EPOCH < 0.4),
    ("GFLOP an image, about a quarter", 0.24 < operations(32) / operations(64) < 0.26),
    ("has 0.37 on MNIST, averaged over t, with the linear schedule (and 0.68 with the cosine)",
     abs(copying(LINEAR) - 0.37) < 0.005 and abs(copying(COSINE) - 0.68) < 0.005),
    ("1.6 times as often as the average",               # logit(t / T) = 0
     abs(1 / math.sqrt(2 * math.pi) / 0.25 - 1.6) < 0.01),
    ("stays within 0.02 of the cosine", np.abs(sigmoid() - COSINE).max() < 0.02),
    ("of 1,059, in batches of 32, about 3,000", abs(100_000 * 32 / 1059 - 3000) < 50),
])
def test_a_rounded_statement_holds(sentence, holds):
    assert sentence in PROSE
    assert holds


def test_the_errors_of_the_samplers_are_right():
    """Two Gaussians, no network: what the sentence about --figure solvers says of four cells."""
    mixture = MIXTURES["two Gaussians"]
    found = [solver_errors(mixture, solvers=[sampler], spacings=[spacing],
                           evaluations=[steps])[sampler, spacing][0]
             for sampler, spacing, steps in (("dpmpp_2m", "log_snr", 20), ("ddim", "uniform", 50),
                                             ("ipndm", "log_snr", 20))]
    sentence = re.search(rf"after 20 calls \({N}\) than DDIM on its own uniform levels after "
                         rf"50 \({N}\), and `ipndm` nearer still \({N}\)", PROSE)
    for text, value in zip(sentence.groups(), found, strict=True):
        assert agrees(text, value), (text, value)


def test_the_errors_of_the_shipped_digits_are_right(data_dir):
    """By other noises and images than the figure's, and formulas written out for v."""
    model = load_model(ROOT / "pretrained" / "mnist.pt")[0]
    images, labels = (part[:500] for part in get_dataset("mnist", data_dir, train=False))
    x_0, random = images.double() / 127.5 - 1, torch.Generator().manual_seed(1)
    found = []
    for low in (0, 250, 500, 750):
        t = torch.randint(low, low + 250, (len(x_0),), generator=random)
        a = torch.tensor(COSINE)[t].sqrt()[:, None, None, None]
        b, noise = (1 - a**2).sqrt(), torch.randn(x_0.shape, generator=random)
        x_t = a * x_0 + b * noise
        with torch.no_grad():
            v = model(x_t.float(), t, labels)
        eps = (x_t - a * (a * x_t - b * v).clamp(-1, 1)) / b    # trained with --clip_loss
        found.append(float((eps - noise).square().mean()))
    sentence = re.search(rf"errs by {N}, {N}, {N} and {N} in the four ranges", PROSE)
    assert [float(text) for text in sentence.groups()] == pytest.approx(found, rel=0.05, abs=0.0005)


def test_what_is_said_of_the_pixels_of_mnist_holds(data_dir):
    images = get_dataset("mnist", data_dir)[0]
    assert "four fifths of MNIST that are background" in PROSE
    assert 0.78 < (images == 0).double().mean() < 0.82


def test_the_loop_visits_the_levels_of_the_diagram():
    assert "(999, 979), (979, 959), ..., (39, 19), (19, -1)" in PROSE
    levels = DiffusionProcess().timesteps(50)
    assert levels[:3] == [999, 979, 959] and levels[-3:] == [39, 19, -1]


def test_zero_has_a_loss_of_one_and_random_noise_of_two():
    torch.manual_seed(0)
    x_0 = torch.rand(200, 1, 32, 32) * 2 - 1
    losses = [float(DiffusionProcess().training_loss(answer, x_0)) for answer in (
        lambda x_t, t, y: torch.zeros_like(x_t), lambda x_t, t, y: torch.randn_like(x_t))]
    assert losses == pytest.approx([1, 2], rel=0.02)        # 200,000 draws: +- 0.003 of the first
    assert "a loss of 1.0, at every t" in PROSE and "random noise has 2.0" in PROSE


@pytest.mark.parametrize("grad_checkpoint, claim", [(False, f"about {N} MB for each image"),
                                                    (True, f"keeps about {N} MB an image")],
                         ids=["plain", "checkpointed"])
def test_memory_of_the_backward_pass(grad_checkpoint, claim):
    megabytes = kept_bytes(create_model(grad_checkpoint=grad_checkpoint),
                           torch.zeros(1, 1, 28, 28), torch.zeros(1, dtype=torch.long)) / 1e6
    (text,) = re.findall(claim, PROSE)
    assert agrees(text, megabytes)
    if not grad_checkpoint:
        (text,) = re.findall(f"{N} MB for 128 of them", PROSE)
        assert agrees(text, 128 * megabytes)
