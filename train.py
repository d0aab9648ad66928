"""Train a U-Net to undo noise.

    python train.py                                       # MNIST, 20 epochs
    python train.py --epochs 50 --dataset fashion_mnist
    python train.py --dataset path/to/photos --image_size 32

Writes into outputs/: samples/epoch_001.png ... (64 images after each epoch), checkpoints/
model_epoch_005.pt ... (every 5 epochs), training_loss.png and, at the end, model_final.pt.
"""

import copy
import itertools
import math
import shutil
import time

import torch
from tqdm import tqdm

from checkpoint import save_checkpoint
from data import DATASET_HELP, Batches, class_names, get_dataset, get_default_dataset
from diffusion import OBJECTIVES, SCHEDULES, DiffusionProcess
from models import MODELS, create_model
from utils import (EMA, PRECISIONS, Parser, command, count_parameters, describe_device, format_seconds,
                   fraction, get_device, get_precision, get_timesteps, make_output_dir, measure,
                   plot_losses, positive_float, positive_int, save_images, seed_number, seed_step)

CHECKPOINT_EPOCHS = 5


def train_step(model, x_0, y, optimizer, diffusion, precision=torch.float32, grad_clip=None):
    """One update: noise a batch, compare the model's prediction with the truth, step downhill."""
    t = get_timesteps(len(x_0), diffusion.num_timesteps, x_0.device)
    with torch.autocast(x_0.device.type, torch.bfloat16, enabled=precision == torch.bfloat16):
        loss = diffusion.training_loss(model, x_0, y, t)
    optimizer.zero_grad()
    loss.backward()
    if grad_clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    optimizer.step()
    return loss.detach()


def train_epoch(model, dataloader, optimizer, diffusion, device, *, ema=None, precision=torch.float32,
                grad_clip=None, seed=None, first_step=0, max_steps=None, losses=None, title="training"):
    """One pass over the data, with a progress bar. Returns the mean loss.

    dataloader:  yields (images [B, C, H, W] in [-1, 1], labels [B]): data.Batches or any DataLoader.
    ema:         an EMA to update after each step.     grad_clip: the largest gradient norm.
    seed:        step k of the run then follows from (seed, k); None uses the global generator.
    first_step:  how many steps the run has behind it.   max_steps: stop after so many.
    losses:      a list that the loss of each step is appended to.
    """
    model.train()
    epoch_losses = []       # kept on the device: reading a number there would make it wait
    steps = min(len(dataloader), max_steps or len(dataloader))
    start = time.perf_counter()
    bar = tqdm(itertools.islice(dataloader, steps), total=steps, desc=title, unit="step")
    for k, (x_0, y) in enumerate(bar):
        if seed is not None:
            seed_step(seed, first_step + k)
        loss = train_step(model, x_0.to(device), y.to(device), optimizer, diffusion, precision, grad_clip)
        if ema is not None:
            ema.update(model)
        epoch_losses.append(loss)
        if k % 10 == 9 or k == steps - 1:
            rate = (k + 1) * len(x_0) / (time.perf_counter() - start)
            bar.set_postfix_str(f"loss {loss.item():.4f}, {rate:.0f} images/s")
    epoch_losses = torch.stack(epoch_losses).tolist()
    if losses is not None:
        losses.extend(epoch_losses)
    return sum(epoch_losses) / len(epoch_losses)


def sample_images(model, diffusion, device, num_images=64, image_size=28):
    """Pictures for a look at the training: from the same noises each time, so that epochs compare, and by
    DDIM in 50 steps, because the full chain would take minutes.

    Returns [num_images, C, image_size, image_size] in [-1, 1].
    """
    return diffusion.sample(model, image_size, num_images, model.image_channels, seed=0, device=device,
                            sampler="ddim")


def measure_seconds(model, batch, diffusion, device, precision, image_size, num_images=64):
    """(seconds for a training step, seconds for one set of pictures), measured on copies: nothing changes."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, fused=True)
    ema = EMA(model)
    x_0, y = (part.to(device) for part in batch)

    def update():
        train_step(model, x_0, y, optimizer, diffusion, precision)
        ema.update(model)

    x_T = torch.zeros(num_images, model.image_channels, image_size, image_size, device=device)
    step = measure(update, device, repeats=3)
    one_call = measure(lambda: diffusion.sample(model, x_T=x_T, sampler="ddim", steps=1), device)
    return step, one_call * (len(diffusion.sampling_levels("ddim")) - 1)


def print_cost(model, batches, diffusion, device, precision, image_size, total_steps, num_epochs):
    """Say before the training how long it will take here."""
    step, pictures = measure_seconds(model, next(iter(batches)), diffusion, device, precision, image_size)
    print(f"cost: an epoch is {len(batches)} steps of {batches.batch_size} images, about "
          f"{format_seconds(len(batches) * step)} here ({batches.batch_size / step:.0f} images/s); the whole "
          f"run of {total_steps} steps about {format_seconds(total_steps * step + num_epochs * pictures)}, "
          f"with {format_seconds(pictures)} for the pictures of each epoch", flush=True)


def train(dataset_name="mnist", batch_size=128, num_epochs=20, learning_rate=2e-4, *, steps=None,
          timesteps=1000, schedule="linear", objective="eps", model_name="simple", base_channels=64,
          image_size=None, grad_clip=None, grad_checkpoint=False, ema_decay=0.9995, seed=0, data_dir="data",
          output_dir="outputs", device="auto", precision="auto"):
    """Train from nothing and write pictures, checkpoints and the loss plot; main() documents the settings.

    dataset_name: a key of DATASETS, a folder of images, or None for MNIST with synthetic digits to
    fall back on.  steps: optimizer steps, instead of num_epochs.
    Returns (model, ema_model, losses). Raises ValueError for bad settings, OSError for bad folders.
    """
    # What can be wrong is found before the training begins.
    if num_epochs < 1 or (steps is not None and steps < 1):
        raise ValueError(f"num_epochs and steps must be at least 1, got {num_epochs} and {steps}")
    diffusion = DiffusionProcess(timesteps, schedule, objective)
    device_asked, device = device, get_device(device)
    precision, precision_reason = get_precision(precision, device)
    output_dir = make_output_dir(output_dir, "model_final.pt", "training_loss.png")
    samples_dir, checkpoints_dir = (make_output_dir(output_dir / name) for name in ("samples", "checkpoints"))
    if dataset_name is None:
        dataset_name, images, labels = get_default_dataset(data_dir, image_size)
    else:
        images, labels = get_dataset(dataset_name, data_dir, image_size=image_size)
    channels, image_size = images.shape[1], images.shape[-1]
    if image_size % 4:
        raise ValueError(f"the images are {image_size}x{image_size} pixels, and the U-Net needs a multiple of "
                         f"4: give --image_size {image_size // 4 * 4 + 4}, for instance")
    batches = Batches(images, labels, batch_size, seed)
    if steps is not None:
        num_epochs = math.ceil(steps / len(batches))
    total_steps = steps or num_epochs * len(batches)

    torch.manual_seed(seed)                                             # the initial weights
    model_config = dict(image_channels=channels, base_channels=base_channels)
    model = create_model(model_name, **model_config, grad_checkpoint=grad_checkpoint).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, fused=True)
    ema = EMA(model, ema_decay)
    losses = []
    need = 2 * 16 * count_parameters(model)       # two checkpoints of weights, average, Adam's two moments
    if shutil.disk_usage(output_dir).free < need:
        raise OSError(28, f"a checkpoint needs {need // 2 / 1e6:.0f} MB, the disk has not twice that free",
                      str(output_dir))

    print(f"device: {describe_device(device, device_asked)}")
    print(f"precision: {precision_reason}; samples are drawn in float32")
    print(f"data: {dataset_name}, {len(images)} images of {channels}x{image_size}x{image_size}; "
          f"model: {count_parameters(model):,} parameters")
    print_cost(model, batches, diffusion, device, precision, image_size, total_steps, num_epochs)

    def save(path, epoch):
        save_checkpoint(path, {
            "model_name": model_name, "model_config": model_config, "diffusion_config": diffusion.config,
            "data": {"name": str(dataset_name), "image_size": image_size, "channels": channels,
                     "classes": class_names(dataset_name)},
            "model": model.state_dict(), "ema": ema.model.state_dict(), "ema_updates": ema.updates,
            "optimizer": optimizer.state_dict(), "epoch": epoch, "step": len(losses),
            "losses": torch.tensor(losses)})
        print(f"wrote {path}")

    for epoch in range(1, num_epochs + 1):
        batches.epoch = epoch
        start = time.perf_counter()
        mean_loss = train_epoch(
            model, batches, optimizer, diffusion, device, ema=ema, precision=precision,
            grad_clip=grad_clip, seed=seed, first_step=len(losses), max_steps=total_steps - len(losses),
            losses=losses, title=f"epoch {epoch}/{num_epochs}")
        seconds = time.perf_counter() - start
        if not math.isfinite(mean_loss):
            raise ValueError(f"the loss became {mean_loss} in epoch {epoch}: try a lower --lr, --grad_clip 1 "
                             "or --precision float32; earlier checkpoints are untouched")
        picture = samples_dir / f"epoch_{epoch:03d}.png"
        save_images(sample_images(ema.model, diffusion, device, image_size=image_size), picture,
                    upscale=max(1, 84 // image_size))
        plot_losses(losses, output_dir / "training_loss.png")
        print(f"epoch {epoch}: mean loss {mean_loss:.4f}, {seconds:.0f} s; wrote {picture}", flush=True)
        if epoch % CHECKPOINT_EPOCHS == 0:
            save(checkpoints_dir / f"model_epoch_{epoch:03d}.pt", epoch)
    save(output_dir / "model_final.pt", num_epochs)
    return model, ema.model, losses


@command
def main(argv=None):
    parser = Parser(description="Train a U-Net to undo noise.")
    add = parser.add
    add("--dataset", DATASET_HELP, metavar="NAME")
    add("--data_dir", "where the data sets of torchvision lie, or go", "data")
    add("--output_dir", "where pictures and checkpoints go", "outputs")
    add("--epochs", "passes over the data", 20, type=positive_int)
    add("--steps", "optimizer steps, instead of --epochs", type=positive_int)
    add("--batch_size", "images per step", 128, type=positive_int)
    add("--lr", "learning rate of Adam", 2e-4, type=positive_float)
    add("--timesteps", "number of noise levels T", 1000, type=positive_int)
    add("--schedule", "how alpha_bar falls", "linear", choices=sorted(SCHEDULES))
    add("--objective", "what the model predicts", "eps", choices=OBJECTIVES)
    add("--model", "simple is small; attention has residual blocks and self-attention, 12 M parameters",
        "simple", choices=sorted(MODELS))
    add("--base_channels", "width of the U-Net: 32 is small, 128 for quality", 64, type=positive_int)
    add("--image_size", "resize to this many pixels, a multiple of 4", type=positive_int)
    add("--grad_clip", "largest gradient norm; off unless given", type=positive_float)
    add("--grad_checkpoint", "less memory, about a third slower", False, action="store_true")
    add("--ema_decay", "averaging of the weights for samples; 0 is off", 0.9995, type=fraction)
    add("--seed", "the same seed trains the same model", 0, type=seed_number)
    add("--device", "auto, cpu, cuda, cuda:1, mps", "auto")
    add("--precision", "arithmetic while training", "auto", choices=["auto", *PRECISIONS])
    args = vars(parser.parse_args(argv))
    renamed = dict(dataset_name=args.pop("dataset"), num_epochs=args.pop("epochs"),
                   learning_rate=args.pop("lr"), model_name=args.pop("model"))
    train(**renamed, **args)


if __name__ == "__main__":
    main()
