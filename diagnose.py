"""Why are my samples bad? Checks a checkpoint in under a minute; names likely causes, worst first.

    python diagnose.py                                            # outputs/model_final.pt
    python diagnose.py --checkpoint my.pt --dataset path/to/photos

The main instrument is a comparison. For every noise level there is a best linear denoiser, a filter
whose error follows from the spectrum of the images alone (Wiener 1949). A trained network beats it.
If this one does not, it is asked under other assumptions: other schedules, another meaning of its
output, images in [0, 1]. Where one of them suits it much better, the network was trained with that
one, and is asked for something else now.
Prints a table, then the causes with what to do next. Exit code 0, also if there are some.
"""

import math
import statistics
from pathlib import Path
from typing import NamedTuple

import torch

from checkpoint import load_checkpoint
from command_line import Parser, command, format_seconds
from diffusion import OBJECTIVES, evaluating, seeded_noise
from images import to_signed, to_uint8
from load import CHECKPOINT_HELP, find_model, load_model
from measures import copied_share, nearest_images, nearest_of_both
from reference import load_reference, note_other_images, positions_of, same_classes
from sample import generate, seconds_for
from schedules import SCHEDULES, linear_alpha_bar
from utils import describe_device, get_device, measure, shuffled

DECIBELS = (10, 5, 0, -5, -10, -15)  # signal over noise: the levels at which a network is asked
IMAGES = 32
SEARCHED = 500  # so many held-out images at most are looked for among the training images
FEW_STEPS = 300  # with less no preset draws anything that can be read
LEARNT = 0.75  # below this share of the filter's error it has learnt something; trained ones: half

# Every cause that can be found: what it is, and what to do next. The first make the later ones
# meaningless, so this is the order in which they are told.
CAUSES = {
    "diverged": ("the training diverged", "python train.py --lr 1e-4 --grad_clip 1"),
    "cold average": (
        "the averaged weights (EMA) lag far behind the trained ones",
        "train longer, or average over fewer steps: python train.py --ema_decay 0.99 "
        "(an average of a fixed decay still holds the random start; utils.EMA warms up)"),
    "assumption": (
        "it was trained with another assumption",
        "sample with the schedule and objective of the training, "
        "which a checkpoint of train.py holds; images in [-1, 1] (images.to_signed); "
        "x_t from DiffusionProcess.forward_diffusion"),
    "no noise at the end": (
        "the schedule does not end in noise",
        "build the process without beta_start and beta_end: "
        "by default the betas are scaled with T"),
    "deaf": (
        "the network does not listen to the time",
        "pass t to the network, in training too, and see that it reaches every block "
        "(DownBlock in models/unet.py, ResBlock in models/attention_unet.py)"),
    "labels": (
        "the classes say nothing to it",
        "look whether images and labels still belong together where they are loaded: "
        "python visualize_diffusion.py --figure dataset"),
    "rate": ("the learning rate is too high", "python train.py --lr 2e-4 --grad_clip 1"),
    "few steps": (
        "it is not trained enough",
        "more --epochs or --steps; with a constant rate, --resume goes on with the run, "
        "and after one that fell to zero a new run with --start_from its last checkpoint"),
    "copies": (
        "it has learnt training images by heart",
        "fewer steps, more images, --flip, or --dropout 0.1 with --model attention; "
        "python evaluate.py shows the copies"),
    "tint": (
        "brightness, colour or contrast is not that of the data",
        "often a consequence of other causes; else train longer, "
        "or python sample.py --sampler ddpm"),
}


class Cause(NamedTuple):
    key: str  # of CAUSES
    evidence: str  # what was seen
    which: str = ""  # more exactly

    @property
    def what(self):
        return CAUSES[self.key][0] + (f": {self.which}" if self.which else "")

    @property
    def advice(self):
        return CAUSES[self.key][1]


class Reading(NamedTuple):
    """A way to make noisy images and to understand the answer; a network was trained with one."""
    name: str
    signal: torch.Tensor  # weight of the image in x_t, float64 [T]
    noise: torch.Tensor  # weight of the noise
    objective: str
    clip: bool = False
    zero_to_one: bool = False  # images in [0, 1] instead of [-1, 1]


# ---- The yardstick

def spectrum(images):
    """Mean power at each frequency, [C, H, W], of uint8 [N, C, H, W] as [-1, 1] less their mean."""
    x = to_signed(images).double()
    return torch.fft.fft2(x - x.mean(dim=0), norm="ortho").abs().square().mean(dim=0)


def linear_error(power, signal, noise):
    """The mean squared error in x_0 of the best linear filter: P b^2 / (a^2 P + b^2) at each
    frequency, where P is the power of the images, a and b the weights of image and noise."""
    return float((power * noise**2 / (signal**2 * power + noise**2)).mean())


def estimate(reading, out, x_t, t):
    """The clean image that an answer means, cut to its range after a training with --clip_loss."""
    a, b = reading.signal[t], reading.noise[t]
    if reading.objective == "eps":
        x_0 = (x_t - b * out) / a
    elif reading.objective == "x0":
        x_0 = out
    else:
        x_0 = (a * x_t - b * out) / (a**2 + b**2)
    return x_0.clamp(0 if reading.zero_to_one else -1, 1) if reading.clip else x_0


@torch.no_grad()
def errors(model, reading, images, power, y=None, device="cpu"):
    """The network's squared error in x_0 over the best linear filter's, at all of DECIBELS: a list.

    images: uint8 [N, C, H, W], which it was not trained on.  power: what `spectrum` returns.
    """
    x_0 = to_signed(images)
    if reading.zero_to_one:
        x_0, power = (x_0 + 1) / 2, power / 4
    noise, ratios = seeded_noise(0, range(len(x_0)), 0, x_0.shape[1:]), []
    for decibel in DECIBELS:
        wanted = 10 ** (decibel / 20)
        t = int((reading.signal / reading.noise / wanted).log().abs().argmin())
        a, b = float(reading.signal[t]), float(reading.noise[t])
        x_t = a * x_0 + b * noise
        out = model(x_t.to(device), torch.full((len(x_t),), t, device=device), y).float().cpu()
        wrong = float((estimate(reading, out, x_t, t) - x_0).square().mean())
        ratios.append(wrong / max(linear_error(power, a, b), 1e-12))  # 0 where all images are equal
    return ratios


def typical(ratios):
    """Their geometric mean."""
    return math.exp(statistics.fmean(math.log(max(ratio, 1e-9)) for ratio in ratios))


def readings(diffusion):
    """What the checkpoint says, first, and what it could have been trained with instead."""
    def reading(name, alpha_bar, objective=diffusion.objective, **settings):
        return Reading(name, alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), objective,
                       clip=diffusion.clip_loss, **settings)

    own, T = diffusion.alpha_bar, diffusion.num_timesteps
    found = [reading("as the checkpoint says", own)]
    curves = {f"the {name} schedule": schedule(T) for name, schedule in SCHEDULES.items()}
    curves["the linear schedule, betas not scaled with T"] = linear_alpha_bar(T, 1e-4, 0.02)
    for name, curve in curves.items():
        if all(float((curve - other.signal**2).abs().max()) > 0.05 for other in found):
            found.append(reading(name, curve))
    others = [objective for objective in OBJECTIVES if objective != diffusion.objective]
    found += [reading(f"the objective {objective}", own, objective) for objective in others]
    found.append(reading("images in [0, 1]", own, zero_to_one=True))
    found.append(Reading("alpha_bar without its square roots", own, 1 - own, diffusion.objective,
                         clip=diffusion.clip_loss))
    return found


# ---- The checks. Each returns a list of Causes, empty if it finds nothing.

def check_schedule(diffusion):
    """Does the chain end in noise, which is what sampling starts from?"""
    last = float(diffusion.alpha_bar[-1])
    if last < 0.005:
        return []
    return [Cause("no noise at the end",
                  f"alpha_bar of the last level is {last:.3f}: {math.sqrt(last):.0%} of the "
                  "image's amplitude is still there, and sampling starts without it")]


def check_divergence(weights, losses):
    """Are the weights numbers, and did the loss stay near its lowest? weights: {name: tensor}."""
    if not all(value.isfinite().all() for value in weights.values()):
        return [Cause("diverged", "some weights are not finite numbers")]
    if len(losses) < 50:
        return []
    tenth = max(10, len(losses) // 10)
    means = [statistics.fmean(losses[k:k + tenth])
             for k in range(0, len(losses) - tenth + 1, tenth // 2)]
    last = statistics.fmean(losses[-tenth:])
    if math.isfinite(last) and last < max(2 * min(means), 0.15):
        return []
    return [Cause("diverged", f"the loss fell to {min(means):.3f} and ended at {last:.3f}")]


def check_average(ratio_average, ratio_raw):
    """Is the averaged network much worse than that of the last step?

    ratio_average, ratio_raw: their errors over the linear filter's; ratio_raw may be None.
    """
    if ratio_raw is None or ratio_average < 1.5 * ratio_raw:
        return []
    return [Cause("cold average", f"their error is {ratio_average:.2f} times the linear filter's, "
                                  f"that of the last weights {ratio_raw:.2f}")]


def check_readings(ratios):
    """ratios: {name: list of ratios}, what the checkpoint says first."""
    (_, own), *others = ratios.items()
    name, best = min(others, key=lambda item: typical(item[1]))
    if typical(own) < 1.3 * typical(best) or typical(own) < 0.5:
        return []
    return [Cause("assumption",
                  f"so understood, its error is {typical(best):.2f} times the linear filter's; "
                  f"as the checkpoint says, {typical(own):.2f}", name)]


@torch.no_grad()
def check_time(model, diffusion, images, device="cpu"):
    """Does the answer depend on t? Asked for the same noisy images, told right and wrong t."""
    x_0 = to_signed(images).to(device)
    levels = [int((diffusion.alpha_bar - share).abs().argmin()) for share in (0.9, 0.5, 0.1)]
    if len(set(levels)) < 2:                                # T = 1: there is no other t
        return []
    noise, changes = seeded_noise(0, range(len(x_0)), 0, x_0.shape[1:]).to(device), []
    for t, wrong in zip(levels, levels[1:] + levels[:1]):
        right_t, wrong_t = (torch.full((len(x_0),), level, device=device) for level in (t, wrong))
        x_t, _ = diffusion.forward_diffusion(x_0, right_t, noise)
        right, other = model(x_t, right_t, None).float(), model(x_t, wrong_t, None).float()
        changes.append(float((right - other).square().mean() / right.square().mean()))
    if max(changes) > 0.003:
        return []
    return [Cause("deaf", f"told a wrong t, its answer changes by {math.sqrt(max(changes)):.1%}")]


@torch.no_grad()
def check_labels(model, diffusion, images, labels, device="cpu"):
    """With its own class an image should be easier to guess than with another, if there is one."""
    if model.num_classes < 2:
        return []
    x_0, y = to_signed(images).to(device), labels.to(device)
    shift = 1 + torch.arange(len(y), device=device) % (model.num_classes - 1)
    noise, gains = seeded_noise(0, range(len(x_0)), 1, x_0.shape[1:]).to(device), []
    for share in (0.3, 0.1, 0.03):
        level = int((diffusion.alpha_bar - share).abs().argmin())
        t = torch.full((len(x_0),), level, device=device)
        x_t, _ = diffusion.forward_diffusion(x_0, t, noise)
        own, other = ((diffusion.predict_x0(model, x_t, t, told) - x_0).square().mean((1, 2, 3))
                      for told in (y, (y + shift) % model.num_classes))
        gains.append(2 * (other - own) / (own + other))
    gains = torch.stack(gains).mean(0)
    gain, error = float(gains.mean()), float(gains.std() / len(gains)**0.5)
    if gain > max(0.02, 3 * error):
        return []
    return [Cause("labels", "told the right class instead of a wrong one, "
                            f"its error falls by {gain:.1%} +- {error:.1%}")]


def has_hardly_begun(losses, settings):
    """Was it random weights a few steps ago? Not if the steps are unknown."""
    start = settings.get("started_from") or {"steps": 0}
    before = start.get("steps") if isinstance(start, dict) else None
    return 0 < len(losses) and type(before) is int and before + len(losses) < FEW_STEPS


def check_training(ratio, losses, settings):
    """Did it learn enough, and if not, for want of steps or because the steps were too large?"""
    steps, hardly_begun = len(losses), has_hardly_begun(losses, settings)
    if steps == 0 or ratio < LEARNT and not hardly_begun:
        return []
    early = (f"; but {steps} steps are few: pictures take shape within the first thousand"
             * hardly_begun)
    if ratio < LEARNT or steps < 4:
        return [Cause("few steps", f"its error is {ratio:.2f} times that of the best linear filter"
                      + early)]
    rate = settings.get("learning_rate")
    rate = rate if isinstance(rate, float) else 0.0
    third, fourth = (statistics.fmean(part) for part in torch.tensor(losses).tensor_split(4)[2:])
    falling = (third - fourth) / max(third, 1e-9)
    seen = (f"its error is {ratio:.2f} times that of the best linear filter (a trained network "
            f"reaches half of it or less) after {steps} steps at a rate of {rate:g}; "
            f"in their last quarter the loss was {falling:.0%} lower than in the one before{early}")
    few = [Cause("few steps", seen)]
    usual = 1e-2 if settings.get("optimizer") == "muon" else 2e-3
    return ([Cause("rate", seen), *few]
            if rate > usual or falling < 0.02 and rate > usual / 2 else few)


def check_samples(samples, images, held, positions=1):
    """Copies of training images, and colours or contrast that the data do not have. All uint8.

    positions: see measures.in_positions.
    """
    found = []
    ((near, _), _), (usual, _), counts = nearest_of_both(samples, held, images, positions)
    usual = usual[counts]
    # Where all images are equally far from each other, the second condition is the one that tells.
    copied = copied_share(near, usual) if float(near.median() / usual.median()) < 0.8 else 0.0
    if copied > 0.15:
        found.append(Cause("copies", f"{copied:.0%} of {len(samples)} samples are closer to "
                                     "a training image than nearly all held-out images are"))
    drawn, real = to_signed(samples), to_signed(held)
    means = (drawn.mean((0, 2, 3)) - real.mean((0, 2, 3))).tolist()
    # Two grey levels beside both, or a constant channel would be judged by its rounding.
    spreads = ((drawn.std((0, 2, 3)) + 0.02) / (real.std((0, 2, 3)) + 0.02)).tolist()
    if max(map(abs, means)) > 0.15 or not 0.75 < min(spreads) <= max(spreads) < 1.3:
        found.append(Cause("tint", "means off by " + ", ".join(f"{mean:+.2f}" for mean in means)
                           + ", contrast " + ", ".join(f"{spread:.0%}" for spread in spreads)
                           + " of the data's, by channel"))
    return found


# ---- All of them

def diagnose(average, raw, diffusion, images, held, labels=None, losses=(), settings=None,
             device="cpu", positions=1):
    """Everything that is wrong with a model, worst first: (list of Causes, {reading: ratios}).

    average: the network that pictures are drawn with.  raw: that of the last step, or None.
    images, held: uint8 [N, C, H, W], trained on and not.
    labels: of held, if the model knows classes.  losses: of each step.
    settings: of the training, and what it started from, if not from random weights.
    positions: in how many the training showed each image.
    """
    settings, weights = settings or {}, getattr(average, "state_dict", dict)()
    images = images[shuffled(len(images))[:20_000]]     # a folder begins with the first sub-folder
    # No loss is so large; and the mean of such a list would be an error.
    losses = [loss if abs(loss) < 1e30 else math.nan for loss in losses]
    power, some = spectrum(images[:2000]), held[:IMAGES]
    with evaluating(average), evaluating(raw):
        y = None if labels is None else labels[:IMAGES].to(device)
        own, *others = readings(diffusion)
        best, ratio = average, errors(average, own, some, power, y, device)
        causes = check_schedule(diffusion) + check_divergence(weights, losses)
        if raw is not None:
            ratio_raw = errors(raw, own, some, power, y, device)
            lag = check_average(typical(ratio), typical(ratio_raw))
            if lag:                         # what a cold average hides is seen in the last weights
                causes, best, ratio = causes + lag, raw, ratio_raw
        ratios = {own.name: ratio}
        ratios.update((other.name, errors(best, other, some, power, y, device)) for other in others)
        # How well it has learnt what it was trained for, be that what is asked of it now or not.
        learnt = min(map(typical, ratios.values()))
        hardly_begun = has_hardly_begun(losses, settings)
        # Where all answers are bad, which question suits them best says nothing yet.
        lost = hardly_begun and learnt >= LEARNT
        unlearnt = check_training(typical(ratio) if lost else learnt, losses, settings)
        causes += unlearnt if lost else unlearnt + check_readings(ratios)
        if not hardly_begun:                                # what t is for is learnt later
            causes += check_time(best, diffusion, some, device)
        # One that has learnt little has not learnt the classes either.
        if labels is not None and not unlearnt:
            causes += check_labels(best, diffusion, held[:8 * IMAGES], labels[:8 * IMAGES], device)
        classes = getattr(average, "num_classes", None)
        y = torch.arange(64) % classes if classes else None
        samples, _ = generate(average, diffusion, 64, held.shape[-1], y=y, device=device)
        causes += check_samples(to_uint8(samples), images, held[:SEARCHED], positions)
    return sorted(causes, key=lambda cause: list(CAUSES).index(cause.key)), ratios


@command
def main(argv=None):
    parser = Parser(description="Why are my samples bad? Looks for causes, worst first.")
    add = parser.add
    add("--checkpoint", CHECKPOINT_HELP)
    add("--dataset", "images like those it was trained on; default: those themselves",
        metavar="NAME")
    add("--data_dir")
    add("--device")
    args = parser.parse_args(argv)
    device, path = get_device(args.device), find_model(args.checkpoint, images=args.dataset)
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder: "
                         "diagnose.py reads the checkpoints that train.py writes")
    entries = load_checkpoint(path)
    average, diffusion, data = load_model(path, device)
    raw = load_model(path, device, ema=False)[0] if "model" in entries else None
    real = load_reference(data, args.data_dir, args.dataset)
    labels = real.held_labels if same_classes(data, args.dataset) else None
    print(f"device: {describe_device(device, args.device)}; model: {path}")
    print(f"data: {args.dataset or data['name']}, {len(real.images)} images "
          f"and {len(real.held)} {real.what}")
    note_other_images(data, args.dataset)
    calls = len(diffusion.sampling_levels("ddim")) - 1
    drawing = seconds_for(average, diffusion, 64, real.held.shape[-1], calls)
    some = real.held[:20]
    searching = ((64 + min(len(real.held), SEARCHED)) / len(some) * positions_of(data)
                 * measure(lambda: nearest_images(some, real.images[:20_000]), torch.device("cpu")))
    print(f"cost: about {format_seconds(drawing)} here to draw 64 pictures, and "
          f"{format_seconds(searching)} to look for them among the training images", flush=True)
    losses, settings = entries.get("losses"), entries.get("settings")
    # Of any other form they are a stranger's.
    losses = losses.tolist() if torch.is_tensor(losses) and losses.ndim == 1 else []
    settings = {**(settings if isinstance(settings, dict) else {}),
                "started_from": data.get("started_from")}
    causes, ratios = diagnose(average, raw, diffusion, real.images, real.held, labels, losses,
                              settings, device, positions_of(data))

    print("squared error over that of the best linear filter (of a trained network well below 1), "
          "at a signal-to-noise ratio of")
    print(" " * 47 + "".join(f"{decibel:>6} dB" for decibel in DECIBELS))
    for name, row in ratios.items():
        print(f"  {name:<45}" + "".join(f"{ratio:>9.2f}" for ratio in row))
    print("  a row other than the first is suspected only if its errors are at least 1.3 times "
          "lower, on average")
    if not causes:
        print("found nothing broken" + f" after {len(losses)} steps" * bool(losses)
              + ": python evaluate.py measures how good the pictures are, "
                "and more training makes them better")
    for k, cause in enumerate(causes, start=1):
        print(f"{k}. {cause.what}\n   seen: {cause.evidence}\n   next: {cause.advice}")


if __name__ == "__main__":
    main()
