"""Train a U-Net to undo noise.

    python train.py                                                 # MNIST, 20 epochs
    python train.py --epochs 50 --dataset fashion_mnist
    python train.py --dataset DIR --verify                          # look at a folder first
    python train.py --dataset DIR --preset fabrics_laptop
    python train.py --dataset DIR --preset fabrics_laptop --resume  # after Ctrl-C, or a crash
    python train.py --dataset DIR --preset fabrics_laptop --start_from pretrained/african_fabrics.pt
    torchrun --nproc_per_node=4 train.py --preset cifar10           # one process for each GPU

Writes into outputs/: samples/epoch_001.png ... (64 images after each epoch),
checkpoints/model_epoch_005.pt ... (every 5 epochs), training_loss.png and .csv, model_best.pt (by
the loss of held-out images, if there are any), model_latest.pt as long as it runs and, at the end,
model_final.pt. A run that is counted in --steps numbers its files by steps.
"""

import argparse
import contextlib
import functools
import math
import sys
import time

import torch
from torch.nn.parallel import DistributedDataParallel

import distributed
from checkpoint import FLAGS, State, existing, plain, take_weights
from command_line import (Parser, command, format_seconds, fraction, int_tuple, make_output_dir,
                          positive_float, positive_int, seed_number, spare, whole_number)
from data import DATASETS, DATASET_HELP, keep_apart, keep_unseen
from diffusion import OBJECTIVES, DiffusionProcess
from drawing import check_draw_with
from folders import FITS
from loop import LR_SCHEDULES, OPTIMIZERS, measure_seconds, rate_at, train_epoch  # noqa: F401
from models import ACTIVATIONS, MODEL_FLAGS, MODELS, create_model, model_defaults
from plan import check_disk, make_plan, print_cost
from presets import PRESETS, parse
from running import BEST, FINAL, LATEST, Signals, find_checkpoint, only_run, run_files
from schedules import SCHEDULES
from session import Keeper, follow, report, restore, sample_images  # noqa: F401
from training_data import load_training_data
from utils import (DENSITIES, EMA, PRECISIONS, count_parameters, describe_device, get_device,
                   get_precision, peak_memory)
from verify import verify

# train_epoch and sample_images are imported for `from train import train_epoch`: many look here.

# What may be different when a run is resumed; everything else decides what it becomes. Of the data,
# the images count and not where they lie.
MAY_CHANGE = ("num_epochs", "steps", "dataset_name", "data_dir", "val_dir", "output_dir", "device",
              "cache_dir", "grad_checkpoint", "compile", "num_samples", "sample_every",
              "save_every", "resume", "overwrite", "start_from", "draw_with")


def build_model(name, config, image_size, seed, device, grad_checkpoint):
    """A network with the initial weights of the seed, for images of this size."""
    torch.manual_seed(seed)
    model = create_model(name, **config, grad_checkpoint=grad_checkpoint).to(device)
    if image_size % model.multiple:
        fitting = math.ceil(image_size / model.multiple) * model.multiple
        raise ValueError(f"the images are {image_size}x{image_size} pixels, "
                         f"and the U-Net needs a multiple of {model.multiple}: "
                         f"give --image_size {fitting}, for instance")
    return model


def tell_cost(plan, done, network, data, diffusion, num_samples, optimizer, compiled, **settings):
    """Measure how fast this is here, and print the training's cost. Returns the seconds of a step,
    or None where none is left to do.

    done: the steps behind a resumed run.  data: a TrainingData.
    compiled: does the first step wait for torch.compile?
    settings: as train_step takes them.
    """
    if done >= plan.total_steps:
        print("no step is left to do: this run is finished; if its rate was constant, "
              "more --epochs or --steps prolong it")
        return None
    device, held_out = next(network.parameters()).device, data.held_out
    batch = tuple(part.to(device) for part in next(data.batches.stream()))
    print("compiling, and " * compiled + "measuring how fast this is here ...", flush=True)
    step_seconds, call_seconds = measure_seconds(
        network, EMA(getattr(network, "module", network)), batch, diffusion,
        (num_samples, *batch[0].shape[1:]), optimizer, **settings)
    step_seconds = float(distributed.mean_over_ranks(torch.tensor(step_seconds, device=device)))
    calls = len(diffusion.sampling_levels("ddim")) - 1
    check_seconds = held_out.num_images / num_samples * call_seconds if held_out else 0
    print_cost(plan, done, data.batches, step_seconds, calls * call_seconds, check_seconds,
               peak_memory(device))
    return step_seconds


def check_choices(num_epochs, steps, beta2, model_config, **settings):
    """Raise ValueError for settings of train() that are wrong whatever the data are."""
    for name in ("image_channels", "add_input", "num_classes"):
        if name in model_config:
            raise ValueError(f"{name} follows from the data and the objective: leave it out")
    if num_epochs < 1 or (steps is not None and steps < 1):
        raise ValueError(f"num_epochs and steps must be at least 1, got {num_epochs} and {steps}")
    for name, known in (("model_name", MODELS), ("optimizer", OPTIMIZERS),
                        ("lr_schedule", LR_SCHEDULES), ("fit", FITS), ("density", DENSITIES)):
        if settings[name] not in known:
            raise ValueError(f"unknown {name} {settings[name]!r}; choose from {', '.join(known)}")
    for name, value in (("beta2", beta2), ("ema_decay", settings["ema_decay"])):
        if not 0 <= value < 1:
            raise ValueError(f"{name} must lie in [0, 1), got {value}")
    if not 0 <= settings["seed"] < 2**32:
        raise ValueError(f"seed must lie in 0..{2**32 - 1}, got {settings['seed']}")
    for name in ("num_samples", "sample_every", "save_every", "ema_every",
                 "accumulate", "batch_size"):
        if settings[name] is not None and settings[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {settings[name]}")
    for name in ("warmup", "weight_decay"):
        if not 0 <= settings[name] < math.inf:
            raise ValueError(f"{name} must be a number from 0, got {settings[name]}")
    for name in ("grad_clip", "min_snr", "learning_rate"):
        if settings[name] is not None and not 0 < settings[name] < math.inf:
            raise ValueError(f"{name} must be a number above 0, got {settings[name]}")
    if not 0 < settings["label_drop"] < 1:
        raise ValueError("label_drop must lie between 0 and 1, or the network never learns to draw "
                         f"without a class, or with one; got {settings['label_drop']}")
    if not 0 <= settings["val_fraction"] <= 1:
        raise ValueError(f"val_fraction must lie in [0, 1], got {settings['val_fraction']}")


def train(dataset_name="mnist", batch_size=128, num_epochs=20, learning_rate=2e-4, *, steps=None,
          seed=0, data_dir="data", output_dir="outputs", device="auto", precision="auto",
          image_size=None, channels=None, fit="crop", labels=None, label_drop=0.1, cache_dir=None,
          flip=False, turn=False, val_dir=None, val_fraction=0.0,
          timesteps=1000, schedule="linear", objective="eps", clip_loss=False,
          model_name="simple", grad_checkpoint=False, compile=False,
          optimizer="adam", beta2=0.999, weight_decay=0.0, lr_schedule="constant", warmup=0,
          accumulate=1, grad_clip=None, min_snr=None, density="uniform", ema_decay=0.9995,
          ema_every=1, num_samples=64, sample_every=None, save_every=None, resume=None,
          overwrite=False, start_from=None, draw_with=None, **model_config):
    """Train and write pictures, checkpoints and the loss; main() documents the settings.

    dataset_name: a key of DATASETS, a folder of images, or None for MNIST with synthetic digits to
    fall back on.  steps: optimizer steps, instead of num_epochs; sample_every and save_every then
    count steps, else epochs.  model_config: base_channels and whatever else create_model takes.
    resume: "latest" or the path of a checkpoint to go on from: the result is bit for bit that of a
    run that never stopped (on a CPU, with as many processes).
    overwrite: replace a run that lies in output_dir, as soon as this one is saved for the first
    time; without it such a folder is refused.
    start_from: the path of a checkpoint whose averaged weights replace random ones (take_weights).
    draw_with: how sample.py draws from the checkpoints unless told, as presets.DRAW_WITH has it.
    Returns (model, ema_model, losses). Raises ValueError for bad settings, OSError for bad folders,
    and Stopped (a KeyboardInterrupt) after a signal, with the state saved.
    """
    arguments = dict(locals())                  # the first line: these, and nothing else
    settings = {name: value for name, value in arguments.items()
                if name not in (*MAY_CHANGE, "model_config")}
    model_config = {name: tuple(value) if isinstance(value, list) else value
                    for name, value in model_config.items()}
    # ---- What can be wrong is found before the training begins.
    check_choices(num_epochs, steps, model_config=model_config, num_samples=num_samples,
                  sample_every=sample_every, save_every=save_every, **settings)
    check_draw_with(draw_with)
    diffusion = DiffusionProcess(timesteps, schedule, objective, clip_loss=clip_loss)
    with torch.device("meta"):                  # without memory: can there be such a network?
        create_model(model_name, **model_config)
    device_asked, device = device, get_device(distributed.join(device))
    rank, world = distributed.place()
    precision, precision_reason = get_precision(precision, device)
    for name in (dataset_name, val_dir):
        keep_apart(name, output_dir)
    keep_unseen(dataset_name, val_dir)
    output_dir = make_output_dir(output_dir, FINAL, LATEST, BEST,
                                 "training_loss.png", "training_loss.csv")
    make_output_dir(output_dir / "samples")
    make_output_dir(output_dir / "checkpoints")
    with (Signals(ignore=rank > 0) as signals,
          only_run(output_dir) if rank == 0 else contextlib.nullcontext()):
        origin, same_run = find_checkpoint(output_dir, resume, overwrite)
        if origin and start_from:
            print(f"a run that goes on has weights of its own: {start_from} plays no part any more")
            start_from = None
        elif start_from:
            spare([existing(start_from)], *run_files(output_dir))
        data = load_training_data(
            dataset_name, batch_size=batch_size * accumulate, seed=seed, flip=flip, turn=turn,
            labels=labels, data_dir=data_dir, val_dir=val_dir, val_fraction=val_fraction,
            device=device, image_size=image_size, channels=channels, fit=fit, cache_dir=cache_dir)
        classes, batches, held_out = data.classes, data.batches, data.held_out
        if world > 1 and batches.batch_size % (world * accumulate):
            raise ValueError(f"a step of {batches.batch_size} images cannot be shared equally "
                             f"by {world} processes in {accumulate} parts")
        plan = make_plan(len(batches), num_epochs, steps, sample_every, save_every,
                         warmup, ema_every)
        model_config = dict(model_defaults(model_name), **model_config,
                            image_channels=data.channels, add_input=objective == "eps",
                            num_classes=classes and len(classes))
        model = build_model(model_name, model_config, data.image_size, seed, device,
                            grad_checkpoint)
        started = start_from and take_weights(start_from, model, model_name, model_config,
                                              diffusion.config, classes)
        state = State(model, EMA(model, ema_decay), OPTIMIZERS[optimizer](
            model.parameters(), lr=learning_rate, betas=(0.9, beta2), weight_decay=weight_decay))
        # A checkpoint holds at most four numbers for each weight: itself, its average, Adam's two
        # moments (Muon has one).
        if origin is None:
            check_disk(output_dir, plan.count(plan.save_every) + 3, 16 * count_parameters(model),
                       sum(path.stat().st_size for path in run_files(output_dir)))
        settings["precision"] = "bf16" if precision == torch.bfloat16 else "float32"
        if lr_schedule != "constant":  # then the length of the run changes every step
            settings["total_steps"] = plan.total_steps
        facts = {"model_name": model_name, "model_config": model_config,
                 "diffusion_config": diffusion.config, "started_from": started,
                 "draw_with": draw_with, **data.facts(settings)}
        facts = plain(facts, "the run")         # what cannot be saved is told before the training

        # ---- What is going to happen
        print(f"device: {describe_device(device, device_asked)}"
              + f", {world} processes" * (world > 1))
        print(f"precision: {precision_reason}; samples are drawn in float32")
        print(f"data: {data}")
        print(f"model: {count_parameters(model):,} parameters")
        if origin:
            restore(state, origin, facts, plan)
        elif started:
            print(f"starting from the weights of {start_from}, after {started['steps']} steps")
            if held_out and started["images"] != facts["settings"]["images"]:
                print("note: those steps may have seen what is held out here, "
                      "so that its loss says less")
        start = time.perf_counter()             # compiling is part of what it takes
        if compile:
            model.compile()
        network = DistributedDataParallel(model) if world > 1 else model
        step_settings = dict(precision=precision, grad_clip=grad_clip, accumulate=accumulate,
                             label_drop=label_drop if classes else 0.0,
                             min_snr=min_snr, density=density)
        step_seconds = tell_cost(plan, len(state.losses), network, data, diffusion, num_samples,
                                 optimizer, compile, **step_settings)

        # ---- Training
        rate = functools.partial(rate_at, total_steps=plan.total_steps, peak=learning_rate,
                                 schedule=lr_schedule, warmup=warmup)
        keeper = Keeper(output_dir, state, facts, len(batches), signals, replacing=not same_run)
        look = functools.partial(
            report, plan=plan, keeper=keeper, data=data, rate=rate, diffusion=diffusion,
            precision=precision, num_samples=num_samples, min_snr=min_snr)
        with keeper.saved_if_stopped(plan.total_steps) if rank == 0 else contextlib.nullcontext():
            follow(plan, keeper, look, network, batches, diffusion, device,
                   step_seconds=step_seconds, ema_every=ema_every, rate=rate, seed=seed,
                   **step_settings)
            if rank == 0:
                keeper.save(FINAL)
        if rank == 0:
            (output_dir / LATEST).unlink(missing_ok=True)
        print(f"took {format_seconds(time.perf_counter() - start)}"
              + " since it was resumed" * bool(origin)
              + f" and {peak_memory(device) / 1e9:.1f} GB of memory")
    return model, state.ema.model, state.losses


# Flags, and keys of PRESETS, that train() knows by a longer name.
ARGUMENTS = {flag: name for name, flag in FLAGS.items()}
SWITCH = argparse.BooleanOptionalAction      # --flip, --no-flip: a flag can undo what a preset sets


def refuse_idle(parser, settings):
    """Raise ValueError for typed flags that would be passed over. settings: the command's."""
    sets = [settings["dataset"] or "mnist", *filter(None, [settings["val_dir"]])]
    if all(name in DATASETS for name in sets):
        parser.refuse({"cache_dir", "fit"}, f"{' and '.join(sets)}: no folder")
    if not any(name in DATASETS and not DATASETS[name].drawn for name in sets):
        parser.refuse({"data_dir"}, f"{' and '.join(sets)}, which torchvision knows nothing of")
    if settings["labels"] is False or settings["labels"] is None and sets[0] not in DATASETS:
        parser.refuse({"label_drop"}, "a training without classes")
    if settings["resume"] == "latest":
        parser.refuse({"overwrite"}, "--resume, which goes on with the run: give one of them")
    if settings["val_dir"] and settings["val_fraction"]:
        parser.refuse({"val_fraction"},
                      f"a training with --val_dir {settings['val_dir']}: give one of them")


@command
def main(argv=None):
    parser = Parser(description="Train a U-Net to undo noise.")
    add = parser.add
    add("--preset", f"a row of settings, which flags override: {', '.join(PRESETS)}",
        choices=list(PRESETS), metavar="NAME")
    parser.group("data")
    add("--dataset", DATASET_HELP, metavar="NAME")
    add("--data_dir")
    add("--verify", "look at the data set (MNIST unless --dataset or --preset names one), "
        "and at a folder of "
        "--val_dir, and stop: exit code 0 if they can be used, else 2", False, action="store_true")
    add("--image_size", "height and width in pixels; default: a named set's own, "
        "for a folder 64 or the pictures' common size below that", type=positive_int)
    add("--channels", "1 for grey, 3 for colour; default: as the data are",
        type=positive_int, choices=(1, 3))
    add("--fit", "of pictures that are not square: the central square, or all of it stretched",
        "crop", choices=FITS)
    add("--flip", "mirror each image with probability 1/2: not for digits or writing",
        False, action=SWITCH)
    add("--turn", "show each image in one of its eight positions, turned by quarters and mirrored "
        "or not: for what has no upright, as tissue or pictures from above", False, action=SWITCH)
    add("--labels", "train with classes, so that one can ask for a 7; default: if the data set "
        "has them; of a folder, its sub-folders are classes if this is given", action=SWITCH)
    add("--label_drop", "share of images whose class is withheld, which guidance needs: above 0",
        0.1, type=fraction)
    add("--cache_dir", "keep the decoded images of a folder there, for a set larger than memory")
    add("--val_dir", "for the held-out loss: a folder that is not trained on, "
        "or the test set of a named set")
    add("--val_fraction", "without --val_dir: hold out this share of the images",
        0.0, type=fraction)
    parser.group("process and network")
    add("--timesteps", "number of noise levels T", 1000, type=positive_int)
    add("--schedule", "how alpha_bar falls", "linear", choices=sorted(SCHEDULES))
    add("--objective", "what the model predicts", "eps", choices=OBJECTIVES)
    add("--model",
        "simple is small; attention has residual blocks and self-attention, 12 M parameters",
        "simple", choices=sorted(MODELS))
    add("--base_channels", "width of the U-Net: 32 is small, 64 the default, 128 for quality",
        type=positive_int)
    add("--time_emb_dim", "length of the time embedding; default: 256", type=positive_int)
    add("--multipliers", "attention: channels of each level in units of base_channels; "
        "default: 1,2,4", type=int_tuple)
    add("--num_blocks", "attention: residual blocks per level; default: 2", type=positive_int)
    add("--attention_levels", "attention: levels that attend, 0 = full resolution; default: 1,2",
        type=int_tuple)
    add("--heads", "attention: heads; default: 4", type=positive_int)
    add("--groups", "attention: groups of GroupNorm; default: 32", type=positive_int)
    add("--dropout", "attention: share of values dropped while training; default: 0", type=fraction)
    add("--activation", "attention: the nonlinearity; default: silu", choices=sorted(ACTIVATIONS))
    add("--patch_size", "attention: pixels by pixels that become channels; 2 costs a quarter; "
        "default: 1", type=positive_int)
    add("--scale_shift", "attention: time and class also scale the channels, "
        "instead of only being added; default: no", action=SWITCH)
    parser.group("training")
    add("--epochs", "passes over the data; default: 20", type=positive_int)
    add("--steps", "optimizer steps, instead of --epochs", type=positive_int)
    add("--batch_size", "images at a time, over all processes", 128, type=positive_int)
    add("--accumulate", "so many batches make one step", 1, type=positive_int)
    add("--optimizer", "how to step", "adam", choices=sorted(OPTIMIZERS))
    add("--lr", "learning rate", 2e-4, type=positive_float)
    add("--lr_schedule", "constant, or falling to zero along a cosine",
        "constant", choices=LR_SCHEDULES)
    add("--warmup", "steps in which the learning rate rises from zero", 0, type=whole_number)
    add("--beta2", "Adam's memory of squared gradients", 0.999, type=fraction)
    add("--weight_decay", "pull towards zero", 0.0, type=fraction)
    add("--min_snr", "weigh the error of x_0 by min(SNR, this), usually 5; "
        "default: as the objective does", type=positive_float)
    add("--clip_loss", "ask of black and white pixels no more than to be right once cut to "
        "their range, as sampling does", False, action=SWITCH)
    add("--density", "which noise levels are met how often: all alike, the middle ones more "
        "(logit_normal), or the low ones (quadratic)", "uniform", choices=DENSITIES)
    add("--grad_clip", "largest gradient norm; off unless given", type=positive_float)
    add("--grad_checkpoint", "less memory, about a third slower", False, action=SWITCH)
    add("--ema_decay", "averaging of the weights for samples; 0 is off", 0.9995, type=fraction)
    add("--ema_every", "steps between two updates of the average", 1, type=positive_int)
    add("--seed", "the same seed trains the same model", 0, type=seed_number)
    add("--device")
    add("--precision", "arithmetic while training", "auto", choices=["auto", *PRECISIONS])
    add("--compile", "torch.compile: a minute or more at the start, faster steps on a GPU", False,
        action=SWITCH)
    parser.group("results")
    add("--resume", "go on with the run in --output_dir, or from this checkpoint",
        nargs="?", const="latest", metavar="FILE")
    add("--start_from", "begin a new run with the averaged weights of this checkpoint, "
        "of the same network, process and objective, in place of random ones; "
        "--resume goes on with a run instead", metavar="FILE")
    add("--overwrite", "replace the run that lies in --output_dir", False, action="store_true")
    add("--output_dir", "where pictures and checkpoints go", "outputs")
    add("--num_samples", "pictures drawn while training", 64, type=positive_int)
    add("--sample_every", "epochs between two sets of pictures (default: 1); "
        "with --steps, steps (default: a fifth of them, 200 at least)", type=positive_int)
    add("--save_every", "epochs between two checkpoints (default: 5); "
        "with --steps, steps (default: a fifth of them, 200 at least)", type=positive_int)
    try:
        settings = parse(parser, argv)          # which joins the processes, if there are several
        refuse_idle(parser, settings)
        model_config = {flag: settings.pop(flag) for flag in MODEL_FLAGS}
        model_config = {flag: value for flag, value in model_config.items() if value is not None}
        if settings.pop("verify"):
            sys.exit(0 if verify(settings, model_config) else 2)
        for flag, name in ARGUMENTS.items():
            settings[name] = settings.pop(flag)
        train(**settings, **model_config)
    finally:
        distributed.leave()


if __name__ == "__main__":
    main()
