"""Draw from other people's checkpoints: thin adapters to the contract `model(x_t, t, y=None)`.

    python sample.py --checkpoint results/model-100.pt    # by denoising-diffusion-pytorch's Trainer
    python sample.py --checkpoint folder                  # an unconditional pipeline of diffusers

The library has to be installed, for its network is what computes. The noise levels come from the
files; the samplers and all else are ours. Only the averaged weights of a Trainer are used. Nothing
in the files is run.
"""

import hashlib
import json
from pathlib import Path

import torch
import torch.nn as nn

from checkpoint import digest_of
from diffusion import DiffusionProcess
from images import MAX_SIZE
from schedules import MAX_TIMESTEPS

UNKNOWN = "unknown"  # the data set that such a model was trained on
UNKNOWN_SIZE = 64  # denoising-diffusion-pytorch does not write down the size of its images
PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}  # diffusers' words for ours
SCHEDULERS = ("DDPMScheduler", "DDIMScheduler")
MAX_CONFIG = 1_000_000  # bytes


class Foreign(nn.Module):
    """Another library's network behind our contract; it knows no classes."""

    num_classes = None

    def __init__(self, network, image_channels, multiple):
        super().__init__()
        self.network, self.image_channels, self.multiple = network, image_channels, multiple

    def forward(self, x_t, t, y=None):
        out = self.network(x_t, t)
        return getattr(out, "sample", out)              # diffusers wraps its answer


def load_foreign(path, entries=None, image_size=None):
    """A model to sample from, out of another library's checkpoint: what load.load_model returns.

    entries: what checkpoint.read_container found in a Trainer's file; None for a diffusers folder.
    image_size: in pixels, for a checkpoint that does not tell it; default UNKNOWN_SIZE.
    Raises ValueError with one line for what cannot be used, or if the library is not installed.
    """
    network, levels, channels, diffusion, size, digest = (
        load_pipeline(Path(path)) if entries is None else load_trainer(path, entries))
    if channels not in (1, 3):
        raise ValueError(f"{path}: it makes images of {channels} channels; a picture has 1 or 3")
    if not all(value.isfinite().all() for value in network.state_dict().values()):
        raise ValueError(f"{path}: not all weights are finite numbers")
    if size and image_size:
        raise ValueError(f"--image_size {image_size}: {path} tells its own, {size}")
    if not size and not image_size:
        print(f"{path} does not tell the size of its images: {UNKNOWN_SIZE} is assumed "
              "(--image_size of sample.py and evaluate.py)")
    size, multiple = size or image_size or UNKNOWN_SIZE, 2 ** (levels - 1)
    if type(size) is not int or not 4 <= size <= MAX_SIZE or size % multiple:
        raise ValueError(f"{path}: it makes square images of a size from 4 to {MAX_SIZE}, "
                         f"a multiple of {multiple}, not {str(size)[:40]}")
    model = Foreign(network, channels, multiple).eval().requires_grad_(False)
    return model, diffusion, {"name": UNKNOWN, "image_size": size, "channels": channels,
                              "classes": None, "digest": digest}


def missing(path, library, package):
    return ValueError(f"{path} was written by {library}, which is not installed: "
                      f"pip install {package}")


def unusable(path, what, error):
    return ValueError(f"{path}: {what} ({' '.join(str(error).split())[:200]})")


# ---- denoising-diffusion-pytorch

def averaged_of(entries):
    """The averaged weights of its Trainer's checkpoint, or of its average alone: {} for others."""
    ema = (entries.get("ema", entries) if isinstance(entries, dict) and "format" not in entries
           else None)
    return {str(key).removeprefix("ema_model."): value for key, value in ema.items()
            if str(key).startswith("ema_model.")} if isinstance(ema, dict) else {}


def objective_of(loss_weight, alpha_bar):
    """What its network predicts. The library does not write that down, but how it weighs the loss:
    eps by 1, x_0 by SNR, v by SNR / (SNR + 1), below its limit. Compared where SNR is about 1/2,
    where all differ."""
    snr = alpha_bar / (1 - alpha_bar)
    k = int((snr - 0.5).abs().argmin())
    weights = {"eps": 1.0, "x0": float(snr[k]), "v": float(snr[k] / (snr[k] + 1))}
    name, weight = min(weights.items(), key=lambda item: abs(item[1] - float(loss_weight[k])))
    if not abs(weight - float(loss_weight[k])) < 0.01:
        raise ValueError("an unknown weighting of the loss")
    return name


def load_trainer(path, entries):
    """A default Unet of any dim, dim_mults and channels, found from its weights.

    Returns (network, levels, channels, DiffusionProcess, None for the unknown size, digest).
    """
    digest = digest_of(path, entries)           # which also refuses tensors larger than the file
    try:
        from denoising_diffusion_pytorch import Unet
    except ImportError as error:
        raise missing(path, "denoising-diffusion-pytorch", "denoising_diffusion_pytorch") from error
    averaged = averaged_of(entries)
    try:
        weights = {key.removeprefix("model."): value.float() for key, value in averaged.items()
                   if key.startswith("model.")}
        dim, inputs = weights["init_conv.weight"].shape[:2]
        channels = weights["final_conv.weight"].shape[0]
        if inputs != channels:
            raise ValueError("it is self-conditioned or learns its variance")
        levels = len({key.split(".")[1] for key in weights if key.startswith("downs.")})
        # A level ends in a convolution that widens it, after a rearrangement if it halves the size.
        widths = [weights.get(f"downs.{k}.3.1.weight", weights.get(f"downs.{k}.3.weight")).shape[0]
                  for k in range(levels)]
        if not 1 <= levels <= 8 or max(widths) > 8192 or any(width % dim for width in widths):
            raise ValueError(f"{dim} channels, then levels of {widths}")
        with torch.device("meta"):              # shapes but no memory, until the weights are put in
            network = Unet(dim=dim, dim_mults=tuple(width // dim for width in widths),
                           channels=channels)
        network.load_state_dict(weights, assign=True)
        alpha_bar = averaged["alphas_cumprod"].double()
        diffusion = DiffusionProcess(
            schedule=alpha_bar, objective=objective_of(averaged["loss_weight"].double(), alpha_bar))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError,
            RuntimeError) as error:
        what = "not a default Unet of the denoising-diffusion-pytorch that is installed"
        raise unusable(path, what, error) from error
    return network, levels, channels, diffusion, None, digest


# ---- diffusers

def read_config(path):
    """(The settings in a file, its bytes). Raises ValueError for all but a table of settings."""
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_CONFIG + 1)
        config = json.loads(text)
        if len(text) > MAX_CONFIG or not isinstance(config, dict):
            raise ValueError("not a table of settings")
    except (OSError, ValueError, RecursionError) as error:
        what = "missing or damaged; a folder is read as a pipeline of diffusers"
        raise unusable(path, what, error) from error
    return config, text


def load_pipeline(folder):
    """An unconditional pipeline: a UNet2DModel and its scheduler, in two folders or side by side.

    Only safetensors weights are read.
    Returns (network, levels, channels, DiffusionProcess, image size or None, digest).
    """
    if not any((place / "config.json").is_file() for place in (folder, folder / "unet")):
        raise ValueError(f"{folder}: no such checkpoint: a folder, and not one of diffusers "
                         "(it has no config.json)")
    unet, scheduler = (sub if sub.is_dir() else folder
                       for sub in (folder / "unet", folder / "scheduler"))
    config, config_text = read_config(unet / "config.json")
    schedule, schedule_text = read_config(scheduler / "scheduler_config.json")
    kind, channels, outputs = (config.get(key, 3)
                               for key in ("_class_name", "in_channels", "out_channels"))
    if kind != "UNet2DModel" or outputs != channels or any(
            config.get(key) for key in ("class_embed_type", "num_class_embeds")):
        raise ValueError(
            f"{folder}: only unconditional UNet2DModels that predict one image are understood, "
            f"not {str(kind)[:60]!r} from {str(channels)[:60]} channels to {str(outputs)[:60]}")
    kind, prediction = schedule.get("_class_name"), schedule.get("prediction_type", "epsilon")
    if kind not in SCHEDULERS or prediction not in list(PREDICTIONS):
        raise ValueError(
            f"{folder}: scheduler {str(kind)[:60]!r} that predicts {str(prediction)[:60]!r}; "
            f"understood are {', '.join(SCHEDULERS)} and {', '.join(PREDICTIONS)}")
    weights = unet / "diffusion_pytorch_model.safetensors"
    if not weights.is_file():
        raise ValueError(f"{weights}: missing; weights in other formats are not read "
                         "(they could run code)")
    try:
        import diffusers
    except ImportError as error:
        raise missing(folder, "diffusers", "diffusers") from error
    try:
        if not schedule.get("num_train_timesteps", 1000) <= MAX_TIMESTEPS:
            raise ValueError(f"{schedule['num_train_timesteps']} timesteps")
        network, levels = read_network(diffusers.UNet2DModel, config, weights)
        table = getattr(diffusers, kind).from_config(schedule).alphas_cumprod
        diffusion = DiffusionProcess(schedule=table.double(), objective=PREDICTIONS[prediction])
        digest = hashlib.sha256(config_text + schedule_text + weights.read_bytes()).hexdigest()
    except Exception as error:  # the library meets a damaged folder in many ways; all mean the same
        raise unusable(folder, "diffusers cannot use it", error) from error
    size = config.get("sample_size")
    if isinstance(size, list) and len(size) == 2 and size[0] == size[1]:
        size = size[0]
    return network, levels, channels, diffusion, size, digest


def read_network(UNet2DModel, config, weights):
    """(The network of these settings and weights, levels). Raises ValueError if they do not fit."""
    levels = len(config.get("block_out_channels", range(4)))
    if levels > 8 or config.get("layers_per_block", 2) > 16:
        raise ValueError(f"{levels} levels of {config.get('layers_per_block')} layers")
    with torch.device("meta"):    # shapes but no memory: a monstrous network fails here at no cost
        count = sum(p.numel() for p in UNet2DModel.from_config(config).parameters())
    if 2 * count > weights.stat().st_size:              # at least two bytes each
        raise ValueError(f"{count} parameters, more than the weights hold")
    # It would fill what the file lacks with random numbers, and only warn.
    network, told = UNet2DModel.from_pretrained(
        weights.parent, use_safetensors=True, local_files_only=True, output_loading_info=True)
    wrong = [*told["missing_keys"], *told["unexpected_keys"], *told["mismatched_keys"]]
    if wrong:
        raise ValueError(f"{len(wrong)} of its weights do not fit, first {str(wrong[0])[:80]}")
    return network, levels
