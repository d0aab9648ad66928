"""How fast do the networks train and sample here? One table from one run, so that its rows compare.

    python benchmark.py                                   # SimpleUNet at 28x28
    python benchmark.py --networks simple fabrics         # and the 34 M network at 64x64

Every row is one way to run a network: float32 or bf16, plain or channels_last memory, eager or compiled.
TFLOP/s counts the multiplications and additions of convolutions and matrix products in one forward and
backward pass (torch.utils.flop_counter), divided by the seconds of a whole training step.
"""

import itertools

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from diffusion import DiffusionProcess
from models import create_model
from train import MODEL_FLAGS, PRESETS, train_step
from utils import (EMA, PRECISIONS, Parser, command, count_parameters, describe_device, get_device, measure,
                   peak_memory, positive_int)



def network_of(preset):
    """(image size, settings of create_model) of a row of train.py's PRESETS."""
    row = PRESETS[preset]
    config = {flag: row[flag] for flag in MODEL_FLAGS if flag in row}
    return row.get("image_size", 28), dict(config, name=row.get("model", "simple"),
                                           image_channels=row.get("channels", 1))


NETWORKS = {"simple": network_of("mnist"), "ct": network_of("ct"), "fabrics": network_of("fabrics_100k"),
            "fabrics_laptop": network_of("fabrics_laptop")}


def training_flops(config, image_size):
    """Floating-point operations for one image, forward and backward. Computed without any memory or time."""
    with torch.device("meta"):
        model = create_model(**config)
        x = torch.zeros(1, model.image_channels, image_size, image_size)
        with FlopCounterMode(display=False) as counter:
            model(x, torch.zeros(1, dtype=torch.long)).sum().backward()
    return counter.get_total_flops()


def time_network(config, image_size, batch_size, device, precision, channels_last, compiled):
    """(seconds of a training step, seconds of a forward pass, peak bytes of a GPU or 0)"""
    torch.compiler.reset()      # it compiles a function for a few shapes only, and then goes on without
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = create_model(**config).to(device, memory_format=layout)
    ema = EMA(model)
    if compiled:
        model.compile()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    x_0 = torch.rand(batch_size, model.image_channels, image_size, image_size, device=device) * 2 - 1
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
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == torch.bfloat16):
            model(x_0, t)

    repeats = 20 if device.type == "cuda" else 5
    step = measure(update, device, repeats)
    call = measure(forward, device, repeats)
    return step, call, peak_memory(device) if device.type == "cuda" else 0


@command
def main(argv=None):
    parser = Parser(description="Measure how fast the networks train and sample here.")
    add = parser.add
    add("--networks", f"which: {', '.join(NETWORKS)}", ["simple"], nargs="+", choices=list(NETWORKS),
        metavar="NAME")
    add("--batch_size", "images at a time; default: 128 on a GPU, 32 elsewhere", type=positive_int)
    add("--modes", "plain: float32 and bf16 only; all: also channels_last and compiled", "plain",
        choices=("plain", "all"))
    add("--device", "auto, cpu, cuda, cuda:1, mps", "auto")
    args = parser.parse_args(argv)
    device = get_device(args.device)
    batch_size = args.batch_size or (128 if device.type == "cuda" else 32)
    print(f"device: {describe_device(device, args.device)}; torch {torch.__version__}; "
          f"batches of {batch_size}")
    switches = (False, True) if args.modes == "all" else (False,)
    modes = list(itertools.product(PRECISIONS, switches, switches))
    print(f"cost: {len(args.networks) * len(modes)} rows of some seconds each"
          + ", the compiled ones a minute or more" * (args.modes == "all"), flush=True)

    rows, first = [], None
    flops_per_image = {name: training_flops(config, size) for name, (size, config) in NETWORKS.items()
                       if name in args.networks}
    runs = list(itertools.product(args.networks, modes))
    for name, (precision, channels_last, compiled) in tqdm(runs, unit="row"):
        image_size, config = NETWORKS[name]
        step, call, memory = time_network(config, image_size, batch_size, device, PRECISIONS[precision],
                                          channels_last, compiled)
        if first is None or first[0] != name:
            first = name, step
        flops = flops_per_image[name] * batch_size
        rows.append([name, precision, "channels_last" if channels_last else "plain",
                     "compiled" if compiled else "eager", f"{batch_size / step:.1f}",
                     f"{batch_size / call:.1f}", f"{first[1] / step:.2f}x", f"{flops / step / 1e12:.3f}",
                     f"{memory / 1e9:.2f}" if memory else "-"])
    titles = ["network", "precision", "memory format", "mode", "train images/s", "forward images/s",
              "against row 1", "TFLOP/s", "GPU GB"]
    for cells in [titles, *rows]:
        print("| " + " | ".join(f"{cell:>{max(len(t), 13)}}" for cell, t in zip(cells, titles)) + " |")
    for name in args.networks:
        image_size, config = NETWORKS[name]
        with torch.device("meta"):
            parameters = count_parameters(create_model(**config))
        print(f"{name}: {image_size}x{image_size}, {parameters:,} parameters, "
              f"{flops_per_image[name] / 1e9:.2f} GFLOP a training image")


if __name__ == "__main__":
    main()
