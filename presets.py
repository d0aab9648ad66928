"""Settings for a training, by name: python train.py --preset quick.
"""

import textwrap

import distributed
from utils import get_device

# A row is a set of flags; those on the command line win. dataset=None: it has to be given.
FABRICS = dict(
    dataset="synthetic_fabrics", image_size=64, channels=3, model="attention", base_channels=64,
    multipliers=(1, 2, 4, 8), num_blocks=1, attention_levels=(2, 3),
    schedule="sigmoid", objective="v", batch_size=32, accumulate=2, beta2=0.99,
    ema_decay=0.995, ema_every=10, grad_clip=1.0, flip=True, num_samples=16)
PRESETS = {
    "mnist":         dict(dataset="mnist", epochs=20, batch_size=128, lr=2e-4),
    "fashion_mnist": dict(dataset="fashion_mnist", epochs=50, batch_size=128, lr=2e-4),
    "mnist_short":   dict(dataset="mnist", epochs=5, batch_size=64, lr=1e-3, timesteps=200,
                          base_channels=32, time_emb_dim=128),
    # Readable digits or garments in minutes on two cores: 2x2 pixels as one, rate falling to zero.
    "quick":         dict(epochs=6, batch_size=64, lr=3e-3, lr_schedule="cosine", warmup=100,
                          optimizer="muon", beta2=0.99, model="attention", patch_size=2,
                          base_channels=48, multipliers=(1, 2), num_blocks=1,
                          attention_levels=(1,), groups=16, time_emb_dim=128, scale_shift=True,
                          schedule="cosine", objective="v", clip_loss=True, density="logit_normal",
                          grad_clip=1.0, ema_decay=0.999),
    "cifar10":       dict(dataset="cifar10", epochs=200, batch_size=128, lr=2e-4, warmup=1000,
                          model="attention", multipliers=(1, 2, 4), num_blocks=2,
                          attention_levels=(1, 2), dropout=0.1, schedule="cosine", objective="v",
                          grad_clip=1.0, ema_decay=0.9995, flip=True),
    "ct":            dict(dataset=None, image_size=64, channels=1, epochs=60, batch_size=32,
                          lr=2e-4, lr_schedule="cosine", optimizer="adamw", weight_decay=1e-4,
                          timesteps=400, schedule="cosine", model="attention", base_channels=64,
                          multipliers=(1, 2, 4), num_blocks=2, attention_levels=(1, 2),
                          time_emb_dim=256, groups=32, dropout=0.05, ema_decay=0.9995,
                          grad_clip=1.0, val_fraction=0.05, without_gpu=dict(batch_size=8)),
    "fabrics_500k":  dict(FABRICS, steps=500_000, lr=8e-5, sample_every=25_000, save_every=25_000),
    "fabrics_100k":  dict(FABRICS, steps=100_000, lr=2e-4, sample_every=1000, save_every=1000),
    # 4.8 M parameters and, with 2x2 pixels as one and few channels there, little work where the
    # pixels are many. For two cores and an evening.
    "fabrics_laptop": dict(FABRICS, patch_size=2, base_channels=32, multipliers=(1, 3, 6),
                           num_blocks=1, attention_levels=(1, 2), heads=2, groups=8,
                           time_emb_dim=128, accumulate=1, steps=11_000, batch_size=16, lr=2e-3,
                           lr_schedule="cosine", warmup=100, optimizer="muon", ema_decay=0.999,
                           ema_every=1, val_fraction=0.05, sample_every=1000, save_every=4000),
}
# How their pictures are best drawn (EXPERIMENTS.md). The checkpoint tells it, as a card does, and
# who draws from it need not type it (drawing.py: card_recipe).
DRAW_WITH = {
    "quick":          dict(sampler="dpmpp_2m", guidance=1.15),
    "fabrics_laptop": dict(sampler="dpmpp_2m_sde", sampler_steps=100, spacing="tapered", eta=1.6),
}


def as_flags(row):
    """A row of settings as one would type it."""
    words = []
    for flag, value in row.items():
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else value
            words.append(f"--{flag} {text}")
    return " ".join(words)


def parse(parser, argv):
    """The settings as a dict: flags that were given, then the row of --preset, then defaults."""
    given = parser.parse_args(argv)
    if given.epochs and given.steps:
        raise ValueError(f"--epochs {given.epochs} and --steps {given.steps}: give one of them")
    if given.preset:
        row = dict(PRESETS[given.preset])
        without_gpu = row.pop("without_gpu", {})
        if get_device(distributed.join(given.device)).type == "cpu":
            row.update(without_gpu)
        if given.epochs or given.steps:
            if bool(given.steps) != ("steps" in row):                  # what is counted changes
                row = {flag: value for flag, value in row.items()
                       if flag not in ("sample_every", "save_every")}
            row = {flag: value for flag, value in row.items() if flag not in ("epochs", "steps")}
        if given.steps and row.get("warmup", 0) >= given.steps:            # a short trial
            row["warmup"] = given.steps // 10
        if given.steps and 10 * row.get("ema_every", 1) > given.steps:
            row["ema_every"] = 1
        if row.get("dataset", "mnist") is None and given.dataset is None:
            raise ValueError(f"--preset {given.preset} is for a folder of your own: "
                             "add --dataset FOLDER")
        parser.set_defaults(**row)
    settings = vars(parser.parse_args(argv))        # once more: what was typed wins over the row
    if settings.pop("preset") and distributed.speaks():
        row = {flag: settings[flag] for flag in ("epochs", "steps", *row)}
        print(*textwrap.wrap(
            f"preset {given.preset}: {as_flags(row)}", 110,
            subsequent_indent="  ", break_on_hyphens=False, break_long_words=False), sep="\n")
    settings["epochs"] = settings["epochs"] or 20                      # --steps goes before it
    return {**settings, "draw_with": DRAW_WITH.get(given.preset)}
