"""Draw from other people's checkpoints: thin adapters to the contract `model(x_t, t, y=None)`.

    python sample.py --checkpoint results/model-100.pt     # a Trainer of denoising-diffusion-pytorch wrote it
    python sample.py --checkpoint folder                   # an unconditional pipeline of diffusers: unet/, scheduler/

The library has to be installed, for its network is what computes; the noise levels, the samplers and all else are
ours. Only the averaged weights are used. Nothing in the files is run.
"""

import hashlib
import json
from pathlib import Path

import torch
import torch.nn as nn

from checkpoint import digest_of
from diffusion import DiffusionProcess

UNKNOWN_SIZE = 64  # denoising-diffusion-pytorch does not write down the size of its images
PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}  # diffusers' words for our objectives
SCHEDULERS = ("DDPMScheduler", "DDIMScheduler")


class Foreign(nn.Module):
    """Another library's network behind our contract; it knows no classes."""

    num_classes = None

    def __init__(self, network, image_channels, multiple):
        super().__init__()
        self.network, self.image_channels, self.multiple = network, image_channels, multiple

    def forward(self, x_t, t, y=None):
        if x_t.shape[-1] % self.multiple or x_t.shape[-2] % self.multiple:
            raise ValueError(f"this network takes images whose size is a multiple of {self.multiple}, not "
                             f"{x_t.shape[-2]}x{x_t.shape[-1]}")
        out = self.network(x_t, t)
        return getattr(out, "sample", out)              # diffusers wraps its answer


def triple(path, network, channels, multiple, diffusion, image_size, digest):
    """What sample.load_model returns."""
    model = Foreign(network, channels, multiple).eval().requires_grad_(False)
    data = {"name": Path(path).name, "image_size": image_size, "channels": channels, "classes": None, "digest": digest}
    return model, diffusion, data


def missing(path, library, package):
    return ValueError(f"{path} was written by {library}, which is not installed: pip install {package}")


# ---- denoising-diffusion-pytorch

def is_trainer(entries):
    """Are these the entries of a checkpoint that its Trainer wrote?"""
    ema = entries.get("ema") if isinstance(entries, dict) else None
    return isinstance(ema, dict) and "format" not in entries and any(
        str(key).startswith("ema_model.") for key in ema)


def objective_of(loss_weight, alpha_bar):
    """What its network predicts. The library does not write that down, but how it weighs the loss: eps by 1, x_0 by
    SNR, v by SNR / (SNR + 1), where no limit applies. Compared where SNR is about 1/2, where all three differ."""
    snr = alpha_bar / (1 - alpha_bar)
    k = int((snr - 0.5).abs().argmin())
    weights = {"eps": 1.0, "x0": float(snr[k]), "v": float(snr[k] / (snr[k] + 1))}
    name, weight = min(weights.items(), key=lambda item: abs(item[1] - float(loss_weight[k])))
    if abs(weight - float(loss_weight[k])) > 0.01:
        raise ValueError("an unknown weighting of the loss")
    return name


def load_trainer(path, entries, image_size=UNKNOWN_SIZE):
    """A default Unet of any dim, dim_mults and channels, found from its weights. Returns what load_model returns.

    Raises ValueError for what is not the default Unet.
    """
    digest = digest_of(path, entries)                   # which also refuses tensors larger than the file
    try:
        from denoising_diffusion_pytorch import Unet
    except ImportError as error:
        raise missing(path, "denoising-diffusion-pytorch", "denoising_diffusion_pytorch") from error
    averaged = {key.removeprefix("ema_model."): value for key, value in entries["ema"].items()
                if key.startswith("ema_model.")}
    weights = {key.removeprefix("model."): value for key, value in averaged.items() if key.startswith("model.")}
    try:
        dim, inputs = weights["init_conv.weight"].shape[:2]
        channels = weights["final_conv.weight"].shape[0]
        levels = len({key.split(".")[1] for key in weights if key.startswith("downs.")})
        widths = [weights.get(f"downs.{k}.3.1.weight", weights.get(f"downs.{k}.3.weight")).shape[0]
                  for k in range(levels)]
        if inputs != channels:
            raise ValueError("it is self-conditioned or learns its variance")
        if not 1 <= levels <= 8 or max(widths) > 8192 or any(width % dim for width in widths):
            raise ValueError(f"levels of {widths} channels")
        with torch.device("meta"):
            network = Unet(dim=dim, dim_mults=tuple(width // dim for width in widths), channels=channels)
        network.load_state_dict(weights, assign=True)
        alpha_bar = averaged["alphas_cumprod"].double()
        objective = objective_of(averaged["loss_weight"].double(), alpha_bar)
        diffusion = DiffusionProcess(schedule=alpha_bar, objective=objective)
    except (KeyError, AttributeError, IndexError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: not a default Unet of denoising-diffusion-pytorch ({reason})") from error
    return triple(path, network, channels, 2 ** (levels - 1), diffusion, image_size, digest)


# ---- diffusers

def read_json(path):
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: missing or damaged; a pipeline folder of diffusers has it") from error
    return found if isinstance(found, dict) else {}


def load_pipeline(folder):
    """An unconditional pipeline folder: a UNet2DModel and its scheduler. Returns what load_model returns.

    Only safetensors weights are read. Raises ValueError for another kind of network or scheduler.
    """
    folder = Path(folder)
    network_config, schedule = (read_json(folder / name) for name in ("unet/config.json",
                                                                     "scheduler/scheduler_config.json"))
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    kind, scheduler = network_config.get("_class_name"), schedule.get("_class_name")
    prediction = schedule.get("prediction_type", "epsilon")
    channels = network_config.get("in_channels", 3)
    if kind != "UNet2DModel" or network_config.get("out_channels", 3) != channels or (
            network_config.get("class_embed_type") or network_config.get("num_class_embeds")):
        raise ValueError(f"{folder}: only unconditional UNet2DModels that predict one image are understood, not "
                         f"{str(kind)[:60]!r} with {channels} channels in and {network_config.get('out_channels')} out")
    if scheduler not in SCHEDULERS or prediction not in PREDICTIONS:
        raise ValueError(f"{folder}: scheduler {str(scheduler)[:60]!r} that predicts {str(prediction)[:60]!r}; understood are "
                         f"{', '.join(SCHEDULERS)} and {', '.join(PREDICTIONS)}")
    if not weights.is_file():
        raise ValueError(f"{weights}: missing; weights in other formats are not read, for they could run code")
    try:
        import diffusers
    except ImportError as error:
        raise missing(folder, "diffusers", "diffusers") from error
    try:
        network = diffusers.UNet2DModel.from_pretrained(folder / "unet", use_safetensors=True, local_files_only=True)
        table = getattr(diffusers, scheduler).from_config(schedule).alphas_cumprod
        diffusion = DiffusionProcess(schedule=table.double(), objective=PREDICTIONS[prediction])
    except Exception as error:      # the library meets a damaged folder in many ways; all mean the same
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{folder}: diffusers cannot read it ({reason})") from error
    size = network_config.get("sample_size") or UNKNOWN_SIZE
    multiple = 2 ** (len(network.config.block_out_channels) - 1)
    return triple(folder, network, channels, multiple, diffusion, size if isinstance(size, int) else size[0],
                  hashlib.sha256(weights.read_bytes()).hexdigest())
