"""How fast do the networks train and sample here? One table from one run, so that its rows compare.

    python benchmark.py                                 # SimpleUNet at 28x28, and --preset quick's
    python benchmark.py --networks simple fabrics       # and the 34 M network at 64x64
    python benchmark.py --networks quick ddpm_pytorch diffusers  # other libraries', once installed

Every row is one way to run a network: float32 or bf16, plain or channels_last memory, eager or
compiled. TFLOP/s counts the multiplications and additions of convolutions and matrix products in
one forward and backward pass (torch.utils.flop_counter), divided by the seconds of a whole training
step; its share is that of the fastest single convolution found in the same run.
"""

import importlib.util
import itertools

import torch
import torch.nn as nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from command_line import Parser, command, positive_int
from diffusion import DiffusionProcess
from interop import Foreign
from loop import train_step
from models import MODEL_FLAGS, create_model
from presets import PRESETS
from utils import (EMA, PRECISIONS, autocast, count_parameters, describe_device, get_device,
                   has_bfloat16, measure, peak_memory)


# ---- The networks: (image size, a function that builds one)

def ours(preset):
    row = PRESETS[preset]
    config = {flag: row[flag] for flag in MODEL_FLAGS if flag in row}
    return row.get("image_size", 28), lambda: create_model(
        row.get("model", "simple"), **config, image_channels=row.get("channels", 1))


def unet_of_ddpm_pytorch():
    """denoising-diffusion-pytorch's default Unet, narrowed to about SimpleUNet's size: 2.6 M."""
    from denoising_diffusion_pytorch import Unet
    return Foreign(Unet(dim=32, dim_mults=(1, 2, 4), channels=1), image_channels=1, multiple=4)


def unet_of_diffusers():
    """diffusers' UNet2DModel, with its default blocks and three levels: about 4 M."""
    from diffusers import UNet2DModel
    unet = UNet2DModel(sample_size=28, in_channels=1, out_channels=1,
                       block_out_channels=(32, 64, 128),
                       down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
                       up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"))
    return Foreign(unet, image_channels=1, multiple=4)


# network: package
PEERS = {"ddpm_pytorch": "denoising_diffusion_pytorch", "diffusers": "diffusers"}
NETWORKS = {"simple": ours("mnist"), "quick": ours("quick"), "ct": ours("ct"),
            "fabrics": ours("fabrics_100k"), "fabrics_laptop": ours("fabrics_laptop"),
            "ddpm_pytorch": (28, unet_of_ddpm_pytorch), "diffusers": (28, unet_of_diffusers)}


# ---- Measuring

def training_flops(build, image_size):
    """Floating-point operations for one image, forward and backward. Attention is written out for
    it: torch does not count what a CPU's fused kernel does."""
    model = build()
    x = torch.zeros(1, model.image_channels, image_size, image_size)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x, torch.zeros(1, dtype=torch.long)).sum().backward()
    return counter.get_total_flops()


def best_convolution(device, precision, batch_size):
    """FLOP/s of the fastest of a few 3x3 convolutions, forward and backward: a network's limit."""
    best = 0.0
    for channels, size in ((64, 28), (64, 14), (128, 28), (128, 14), (256, 14), (256, 32)):
        convolution = nn.Conv2d(channels, channels, 3, padding=1).to(device)
        x = torch.randn(batch_size, channels, size, size, device=device, requires_grad=True)

        def work():
            with autocast(device, precision):
                out = convolution(x)
            out.backward(out.detach())

        flops = 3 * 2 * batch_size * channels**2 * 9 * size**2  # forward, and back to x and weights
        best = max(best, flops / measure(work, device, repeats=5))
    return best


def time_network(build, image_size, batch_size, device, precision, channels_last, compiled):
    """(seconds of a training step, seconds of a forward pass, peak bytes of a GPU or 0)"""
    torch.compiler.reset()  # it compiles a function for a few shapes only, and then goes on without
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = build().to(device, memory_format=layout)
    ema = EMA(model)
    if compiled:
        model.compile()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    x_0 = torch.rand(batch_size, model.image_channels, image_size, image_size,
                     device=device) * 2 - 1
    x_0, y = x_0.to(memory_format=layout), torch.full((batch_size,), -1, device=device)
    t = torch.zeros(batch_size, dtype=torch.long, device=device)
    diffusion = DiffusionProcess()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    def update():
        train_step(model, x_0, y, optimizer, diffusion, precision)
        ema.update(model)

    @torch.no_grad()
    def forward():
        with autocast(device, precision):
            model(x_0, t)

    repeats = 20 if device.type == "cuda" else 5
    step = measure(update, device, repeats)
    model.eval()
    call = measure(forward, device, repeats)
    return step, call, peak_memory(device) if device.type == "cuda" else 0


@command
def main(argv=None):
    parser = Parser(description="Measure how fast the networks train and sample here.")
    add = parser.add
    add("--networks", f"which: {', '.join(NETWORKS)}", ["simple", "quick"], nargs="+",
        choices=list(NETWORKS), metavar="NAME")
    add("--batch_size", "images at a time; default: 128 on a GPU, 32 elsewhere", type=positive_int)
    add("--modes", "plain: float32, and bf16 where the device has it; "
        "all: also channels_last and compiled", "plain", choices=("plain", "all"))
    add("--device")
    args = parser.parse_args(argv)
    for name in args.networks:
        if name in PEERS and not importlib.util.find_spec(PEERS[name]):
            raise ValueError(f"--networks {name} needs another library: pip install {PEERS[name]}")
    device = get_device(args.device)
    batch_size = args.batch_size or (128 if device.type == "cuda" else 32)
    print(f"device: {describe_device(device, args.device)}; torch {torch.__version__}; "
          f"batches of {batch_size}")
    switches = (False, True) if args.modes == "all" else (False,)
    precisions = {name: precision for name, precision in PRECISIONS.items()
                  if name != "bf16" or has_bfloat16(device)}
    if "bf16" not in precisions:
        print("no bf16 rows: the device has no instructions for it")
    modes = list(itertools.product(precisions, switches, switches))
    print(f"cost: {len(args.networks) * len(modes)} rows of some seconds each"
          + ", the compiled ones a minute or more" * (args.modes == "all"), flush=True)

    rows, first = [], None
    flops_per_image = {name: training_flops(build, size) for name, (size, build) in NETWORKS.items()
                       if name in args.networks}
    limits = {name: best_convolution(device, precision, batch_size)
              for name, precision in precisions.items()}
    rates = ", ".join(f"{limit / 1e12:.3f} TFLOP/s in {name}" for name, limit in limits.items())
    print(f"fastest convolution: {rates}")
    runs = list(itertools.product(args.networks, modes))
    for name, (precision, channels_last, compiled) in tqdm(runs, unit="row"):
        image_size, build = NETWORKS[name]
        step, call, memory = time_network(build, image_size, batch_size, device,
                                          PRECISIONS[precision], channels_last, compiled)
        if first is None or first[0] != name:
            first = name, step
        flops = flops_per_image[name] * batch_size
        rows.append([name, precision, "channels_last" if channels_last else "plain",
                     "compiled" if compiled else "eager", f"{batch_size / step:.1f}",
                     f"{batch_size / call:.1f}", f"{first[1] / step:.2f}x",
                     f"{flops / step / 1e12:.3f}", f"{flops / step / limits[precision]:.0%}",
                     f"{memory / 1e9:.2f}" if memory else "-"])
    titles = ["network", "precision", "memory format", "mode", "train images/s", "forward images/s",
              "against row 1", "TFLOP/s", "of the fastest", "GPU GB"]
    for cells in [titles, *rows]:
        print("| " + " | ".join(f"{cell:>{max(len(t), 13)}}"
                                for cell, t in zip(cells, titles)) + " |")
    for name in args.networks:
        image_size, build = NETWORKS[name]
        print(f"{name}: {image_size}x{image_size}, {count_parameters(build()):,} parameters, "
              f"{flops_per_image[name] / 1e9:.2f} GFLOP a training image")


if __name__ == "__main__":
    main()
