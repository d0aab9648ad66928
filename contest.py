"""Some minutes of our quick preset against as many of other libraries' recipes, on the same images.

    pip install denoising-diffusion-pytorch diffusers
    python contest.py --minutes 5             # three trainings of five minutes, and their pictures

Each library trains a network of its own, made about as large as ours, with the loss, optimizer,
batch, rate and average of its own training code. What is not theirs: bf16 where the device has it,
images from memory instead of a disk, no mirrored images (a mirrored digit is none), and no classes
for anyone. To be known: our preset was tuned on MNIST, and by this measure. Every one then draws as
many pictures by its own DDIM in 50 steps (of its averaged weights), and evaluate.py's distance
tells how far they are from real ones. Prints a table; writes contest.json and contest.png (the
first ten of each).
"""

import importlib.util
import itertools
import math
import tempfile
import time
from typing import NamedTuple

import torch
from tqdm import tqdm

import benchmark
from benchmark import PEERS, ours
from classifier import get_classifier, look
from command_line import (Parser, command, format_seconds, make_output_dir, positive_float,
                          positive_int, seed_number)
from comparisons import distance_row, write_facts
from data import Batches
from diffusion import DiffusionProcess
from images import save_strip, to_signed, to_uint8
from load import load_model
from loop import measure_seconds
from presets import PRESETS
from reference import load_reference
from sample import generate
from train import ARGUMENTS, train
from utils import EMA, autocast, count_parameters, describe_device, get_device, get_precision

STEPS = 50  # of DDIM, for all


class Entry(NamedTuple):
    """What became of one training."""
    parameters: int
    images: int  # that it looked at
    seconds: float
    samples: torch.Tensor  # [N, C, H, W] in [-1, 1]


def train_for(seconds, batch_size, images, device, precision, title, step):
    """Call step(a batch in [-1, 1], the share of the time that is over) until the time is up, epoch
    after epoch in shuffled order. Returns (images seen, seconds)."""
    seen, start = 0, time.perf_counter()
    with tqdm(desc=title, unit="image") as bar:
        for x_0, _ in Batches(images.to(device), None, batch_size).stream():
            share = (time.perf_counter() - start) / seconds
            if share >= 1:
                break
            with autocast(device, precision):
                loss = step(x_0, share)
            seen += len(x_0)
            bar.update(len(x_0))
            # with .item() a GPU has done the step
            bar.set_postfix_str(f"loss {loss.item():.4f}", refresh=False)
    return seen, time.perf_counter() - start


def enter_quick(args, images, device, precision):
    """Ours: train.py with --preset quick --no-labels, and as many steps as fit, since its rate
    falls to zero at the last one. Its seconds count all that train.py does, from reading the data
    to a sheet of pictures."""
    row, (_, build) = PRESETS["quick"], ours("quick")
    process = DiffusionProcess(1000, row["schedule"], row["objective"], clip_loss=row["clip_loss"])
    model = build().to(device)
    x_0 = to_signed(images[:row["batch_size"]]).to(device)
    no_class = torch.full((len(x_0),), -1, device=device)
    step_seconds, _ = measure_seconds(
        model, EMA(model), (x_0, no_class), process, x_0.shape, row["optimizer"],
        precision=precision, grad_clip=row["grad_clip"])
    steps = int(60 * args.minutes / step_seconds)
    if steps <= row["warmup"]:
        raise ValueError(f"--minutes {args.minutes:g} are {steps} steps here, "
                         "fewer than the preset takes to warm up")
    settings = {ARGUMENTS.get(flag, flag): value for flag, value in row.items() if flag != "epochs"}
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        train(args.dataset, steps=steps, sample_every=steps, save_every=steps, labels=False,
              seed=args.seed, data_dir=args.data_dir, output_dir=folder,
              device=args.device, **settings)
        seconds = time.perf_counter() - start
        model, diffusion, data = load_model(f"{folder}/model_final.pt", device)
    samples, _ = generate(
        model, diffusion, args.num_images, data["image_size"], seed=args.seed, sampler="ddim",
        steps=STEPS, batch_size=100, device=device, precision=precision)
    parameters = sum(p.numel() for p in model.parameters())  # a loaded model asks for no gradients
    return Entry(parameters, steps * row["batch_size"], seconds, samples.cpu())


def enter_ddpm_pytorch(args, images, device, precision):
    """denoising-diffusion-pytorch, whose Trainer takes Adam 1e-4 (0.9, 0.99), EMA 0.995 every tenth
    step and clipping at 1; the batch of 32 is its README's; the v objective and the sigmoid
    schedule are GaussianDiffusion's."""
    from denoising_diffusion_pytorch import GaussianDiffusion
    from ema_pytorch import EMA as Average
    unet = benchmark.unet_of_ddpm_pytorch().network
    diffusion = GaussianDiffusion(unet, image_size=images.shape[-1],
                                  sampling_timesteps=STEPS).to(device)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-4, betas=(0.9, 0.99))
    ema = Average(diffusion, beta=0.995, update_every=10)

    def step(x_0, share):
        loss = diffusion(x_0 / 2 + 0.5)             # it takes [0, 1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
        return loss

    seen, seconds = train_for(60 * args.minutes, 32, images, device, precision,
                              "ddpm_pytorch", step)
    samples = sample_in_batches(lambda count: ema.ema_model.sample(batch_size=count) * 2 - 1,
                                args.num_images, device, precision)
    return Entry(count_parameters(unet), seen, seconds, samples)


def enter_diffusers(args, images, device, precision):
    """diffusers, with the recipe of its example train_unconditional.py: batch 16, AdamW 1e-4
    (0.95, 0.999), weight decay 1e-6, 500 steps of warm-up (here at most a tenth of the time) and a
    cosine to zero, EMA, clipping at 1; eps, linear schedule."""
    from diffusers import DDIMScheduler, DDPMScheduler
    from diffusers.training_utils import EMAModel
    unet = benchmark.unet_of_diffusers().network.to(device)
    schedule = DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, betas=(0.95, 0.999),
                                  weight_decay=1e-6)
    taken = itertools.count(1)
    ema = EMAModel(unet.parameters(), use_ema_warmup=True, inv_gamma=1.0, power=0.75)

    def step(x_0, share):
        noise = torch.randn_like(x_0)
        t = torch.randint(1000, (len(x_0),), device=device)
        loss = torch.nn.functional.mse_loss(
            unet(schedule.add_noise(x_0, noise, t), t).sample.float(), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        cosine = (1 + math.cos(math.pi * share)) / 2
        warm = min(1.0, max(next(taken) / 500, 10 * share))     # of few steps 500 would be all
        optimizer.param_groups[0]["lr"] = 1e-4 * warm * cosine
        optimizer.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
        return loss

    seen, seconds = train_for(60 * args.minutes, 16, images, device, precision, "diffusers", step)
    ema.copy_to(unet.parameters())
    ddim = DDIMScheduler.from_config(schedule.config)

    def draw(count):
        ddim.set_timesteps(STEPS)
        x = torch.randn(count, *images.shape[1:], device=device)
        for t in ddim.timesteps:
            x = ddim.step(unet(x, t.to(device)).sample.float(), t, x).prev_sample
        return x

    samples = sample_in_batches(draw, args.num_images, device, precision)
    return Entry(count_parameters(unet), seen, seconds, samples)


@torch.no_grad()
def sample_in_batches(draw, num_images, device, precision, batch_size=100):
    counts = [min(batch_size, num_images - first) for first in range(0, num_images, batch_size)]
    with autocast(device, precision):
        return torch.cat([draw(count).float().cpu()
                          for count in tqdm(counts, desc="sampling", unit="batch")])


ENTRANTS = {"quick": enter_quick, "ddpm_pytorch": enter_ddpm_pytorch, "diffusers": enter_diffusers}


@command
def main(argv=None):
    parser = Parser(
        description="Train our quick preset and other libraries' recipes for equal times.")
    add = parser.add
    add("--entrants", f"which: {', '.join(ENTRANTS)}", list(ENTRANTS), nargs="+",
        choices=list(ENTRANTS), metavar="NAME")
    add("--minutes", "of training for each", 5.0, type=positive_float)
    add("--dataset", "mnist or fashion_mnist", "mnist", choices=("mnist", "fashion_mnist"))
    add("--data_dir")
    add("--num_images", "that each draws at the end", 1000, type=positive_int)
    add("--seed", "of all of them", 0, type=seed_number)
    add("--output_dir", "where contest.json and contest.png go", "outputs")
    add("--device")
    args = parser.parse_args(argv)
    if args.num_images < 100:
        raise ValueError(f"--num_images {args.num_images}: "
                         "fewer than 100 say nothing about a distribution")
    if args.minutes > 10_000:
        raise ValueError(f"--minutes {args.minutes:g}: at most 10000, a week")
    for name in args.entrants:
        if name in PEERS and not importlib.util.find_spec(PEERS[name]):
            raise ValueError(f"--entrants {name} needs another library: pip install {PEERS[name]}")
    device = get_device(args.device)
    precision, _ = get_precision("auto", device)
    output_dir = make_output_dir(args.output_dir, "contest.json", "contest.png")
    images, labels, held, held_labels, _ = load_reference(
        {"name": args.dataset, "image_size": None}, args.data_dir)
    if args.num_images > len(held):
        raise ValueError(f"--num_images {args.num_images}: the floor is that of as many of "
                         f"the {len(held)} test images")
    classifier, features = get_classifier(args.dataset, images, labels, held, held_labels,
                                          output_dir)
    print(f"device: {describe_device(device, args.device)}; features: {features}")
    print(f"cost: {format_seconds(60 * args.minutes * len(args.entrants))} of training, and then "
          f"{args.num_images} pictures each in {STEPS} calls, which may take as long again",
          flush=True)
    _, reference = look(classifier, images)
    floor = distance_row(held, classifier, reference, args.num_images)

    rows, pictures = [], []
    found = {"rows": rows, "floor": floor["fd"], "minutes": args.minutes,
             "num_images": args.num_images, "seed": args.seed, "dataset": args.dataset,
             "features": features, "threads": torch.get_num_threads(), "torch": torch.__version__}
    for name in args.entrants:
        torch.manual_seed(args.seed)
        entry = ENTRANTS[name](args, images, device, precision)
        row = distance_row(to_uint8(entry.samples), classifier, reference)
        rows.append({"name": name, "parameters": entry.parameters, "images": entry.images,
                     "seconds": entry.seconds, **row})
        pictures.append(entry.samples[:10])
        write_facts(output_dir / "contest", found)
    print(f"{'':16}{'parameters':>12}{'images seen':>13}{'seconds':>9}{'FD':>18}{'in floors':>11}")
    for row in rows:
        print(f"{row['name']:16}{row['parameters']:>12,}{row['images']:>13,}{row['seconds']:>9.0f}"
              f"{row['fd']:>10.2f} +- {row['fd_error']:<5.2f}{row['fd'] / floor['fd']:>10.1f}")
    print(f"floor: {floor['fd']:.2f} +- {floor['fd_error']:.2f}, "
          f"{len(held)} test images in sets of {args.num_images}")
    save_strip(pictures, [""] * 10, output_dir / "contest.png",
               row_labels=[row["name"] for row in rows],
               title=f"after {args.minutes:g} minutes of training each")
    print(f"wrote {output_dir / 'contest.json'}\nwrote {output_dir / 'contest.png'}")


if __name__ == "__main__":
    main()
