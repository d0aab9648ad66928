"""The command for figures of the network: network_figures.py plots the numbers of inside.py.

    python visualize_model.py                     # its feature maps, level by level
    python visualize_model.py --figure attention  # where each head looks while a picture is sampled
    python visualize_model.py --figure time       # what the network is told of t
    python visualize_model.py --figure features   # what the bottleneck knows of the class, as a map
    python visualize_model.py --figure table      # parameters and memory, level by level
    python visualize_model.py --figure table --channels 64 128 256  # of a plain U-Net with these

Writes outputs/activations.png, or the file that FIGURES names.
"""

from pathlib import Path
from typing import Callable, NamedTuple

from tqdm import tqdm

from command_line import (Parser, choose_timesteps, command, few_numbers, format_seconds,
                          make_output_dir, positive_int, seed_number, whole_number)
from data import DATASET_HELP, class_names, keep_apart
from diffusion import SAMPLERS
from drawing import choose_one_label
from images import as_text
from inside import (PlainUNet, activations, attention_maps, bottleneck_features, busiest,
                    choose_layer, find_tsne, model_table, parts, pca, sampled, table_lines,
                    time_embeddings, tsne)
from load import CHECKPOINT_HELP, open_model, refuse_other_images
from models import MODELS, create_model
from network_figures import (activations_figure, attention_figure, features_figure,
                             table_figure, time_figure)
from reference import unseen_images
from sample import seconds_for
from utils import get_device, shuffled

# Noise levels of T = 1000; for another T they are scaled.
TIMESTEPS = {"activations": (250,), "attention": (999, 800, 600, 400, 200, 50),
             "time": (0, 100, 250, 500, 750, 999), "features": (0, 200, 400, 600, 800)}


# ---- From the flags to a figure. Each draw_... makes one of FIGURES and prints what it found.

def open_own(args, device):
    """(model, diffusion, what the checkpoint tells of its data, the noise levels to show, a title
    that names the network and its data set)."""
    _, model, diffusion, data = open_model(args, device)
    refuse_other_images(args, data)
    timesteps = choose_timesteps(args.timesteps, TIMESTEPS[args.figure], diffusion.num_timesteps)
    title = f"{type(model).__name__}, {as_text(Path(data['name']).name)}"
    return model, diffusion, data, timesteps, title


def picture_settings(args, model, diffusion, data, device):
    """(the settings for inside.sampled, words for the title that name the class). Prints what it
    will cost."""
    y = choose_one_label(args.label, data["classes"])
    calls = len(diffusion.sampling_levels(args.sampler, args.steps)) - 1
    cost = format_seconds(seconds_for(model, diffusion, 1, data["image_size"], calls))
    print(f"{args.figure}: {calls} calls of the model on one image, about {cost} here", flush=True)
    settings = dict(seed=args.seed, sampler=args.sampler, steps=args.steps, device=device,
                    y=None if y is None else y.to(device))
    of_class = "" if y is None or y < 0 else f", class {as_text(data['classes'][y])}"
    return settings, of_class


def draw_activations(args, path, device):
    model, diffusion, data, timesteps, title = open_own(args, device)
    settings, of_class = picture_settings(args, model, diffusion, data, device)
    (t, x_t, _), *_, (_, picture, _) = sampled(model, diffusion, timesteps[:1],
                                               data["image_size"], **settings)
    boxes = parts(model)
    seen = [(part, output) for part, output in activations(model, x_t, t, settings["y"])
            if any(True for _ in boxes[part].parameters())]     # a pool repeats what came before
    activations_figure(x_t[0].cpu(), seen, picture[0].cpu(), path,
                       "the feature maps of each part that vary most, each on its own scale, "
                       f"at t = {t}: {title}{of_class}")


def draw_attention(args, path, device):
    model, diffusion, data, timesteps, title = open_own(args, device)
    size = data["image_size"]
    layer_name, layer, side = choose_layer(model, args.layer, size)
    if args.query and not max(args.query) < size:
        raise ValueError(f"--query {args.query[0]} {args.query[1]}: "
                         f"rows and columns go from 0 to {size - 1}")
    settings, of_class = picture_settings(args, model, diffusion, data, device)
    moments, picture = attention_maps(model, diffusion, layer, timesteps, size, **settings)
    query = (tuple(place * side // size for place in args.query) if args.query
             else busiest(picture, side))
    rows, columns = (f"{place * size // side} to {(place + 1) * size // side - 1}"
                     for place in query)
    print(f"layer {layer_name}, {side}x{side}, asked by the cell of "
          f"rows {rows} and columns {columns} (--query takes one pixel of it)")
    attention_figure(moments, query, path,
                     f"where {layer_name} ({side}x{side}) looks from the framed cell; "
                     f"reach: the mean of all cells. {title}{of_class}")


def draw_time(args, path, device):
    model, diffusion, _, timesteps, title = open_own(args, device)
    sines, learned = time_embeddings(model, diffusion.num_timesteps)
    time_figure(sines, learned, timesteps, path, f"time embedding: {title}")


def draw_features(args, path, device):
    if args.projection == "tsne":
        find_tsne()                                             # better now than after the features
    _, model, diffusion, data = open_model(args, device)
    timesteps = choose_timesteps(args.timesteps, TIMESTEPS["features"], diffusion.num_timesteps)
    dataset, images, labels, _ = unseen_images(data, args.data_dir, args.dataset)
    count = min(args.num_images, len(images))
    if count < 4:
        raise ValueError(f"--num_images {args.num_images}: {count} images make no map; 4 or more")
    pick = shuffled(len(images), args.seed)[:count]
    cost = format_seconds(
        seconds_for(model, diffusion, count, data["image_size"], len(timesteps), batch_size=100))
    print(f"features: {count} images of {dataset} at {len(timesteps)} noise levels, "
          f"about {cost} here"
          + (", and as long again for t-SNE or longer" if args.projection == "tsne" else ""),
          flush=True)

    def project(features):
        if args.projection == "tsne":
            return tsne(features, args.seed), "t-SNE"
        points, shares = pca(features)
        return points, (f"PCA; the axes: {100 * shares[0]:.0f} and {100 * shares[1]:.0f} % "
                        "of the variance")

    features = {t: bottleneck_features(model, diffusion, images[pick], t, seed=args.seed,
                                       flatten=args.flatten)
                for t in tqdm(timesteps, desc="noise levels")}
    title = (f"the bottleneck's features of {count} pictures: "
             f"{type(model).__name__}, {as_text(dataset)}")
    names = None if labels is None else class_names(dataset, True)
    labels = None if labels is None else labels[pick]
    print(*features_figure(
        features, labels, names and [as_text(name, most=14) for name in names], path, project,
        title), sep="\n")


def draw_table(args, path, device):
    if args.channels:
        if len(args.channels) > 8 or max(args.channels) > 4096:
            raise ValueError(f"--channels {' '.join(map(str, args.channels))}: "
                             "up to 8 levels of up to 4096 channels")
        size, multiple = args.image_size or 64, 2 ** len(args.channels)
        model, name = PlainUNet(args.channels), f"plain U-Net {args.channels}"
    elif args.model:
        model, name = create_model(args.model), f"{args.model} with its default settings"
        size, multiple = args.image_size or {"simple": 28}.get(args.model, 64), model.multiple
    else:
        checkpoint, model, _, data = open_model(args, device)
        refuse_other_images(args, data)
        name = Path(checkpoint).name
        size, multiple = args.image_size or data["image_size"], model.multiple
    if size % multiple or size > 512:
        raise ValueError(f"--image_size {size}: "
                         f"this network takes multiples of {multiple} up to 512")
    title = f"{name}, {model.image_channels}x{size}x{size}"
    levels, peak = model_table(model.to(device), size)
    print(f"{title}, one image, float32", *table_lines(levels, peak), sep="\n")
    table_figure(levels, path, as_text(title))


# ---- The command

class Row(NamedTuple):
    draw: Callable  # (args, path, device) -> None
    file: str  # what it is called in --output_dir
    # What it looks at, beside --figure, --checkpoint, --dataset, --output_dir and --device.
    flags: str
    help: str


FIGURES = {
    "activations": Row(draw_activations, "activations.png", "timesteps seed label sampler steps",
                       "feature maps of each level while a picture is sampled"),
    "attention":   Row(draw_attention, "attention.png",
                       "timesteps seed label sampler steps layer query",
                       "where each head looks meanwhile"),
    "time":        Row(draw_time, "time_embedding.png", "timesteps",
                       "what the network is told of t"),
    "features":    Row(draw_features, "features.png",
                       "timesteps seed data_dir num_images flatten projection",
                       "the bottleneck's features of real pictures"),
    "table":       Row(draw_table, "model_table.png", "channels model image_size",
                       "channels, parameters and memory of each level"),
}


@command
def main(argv=None):
    parser = Parser(description="Figures of the network. --figure: " + "; ".join(
        f"{name}: {row.help}" for name, row in FIGURES.items()))
    add = parser.add
    add("--figure", "what to draw", "activations", choices=list(FIGURES))
    add("--checkpoint", CHECKPOINT_HELP)
    add("--timesteps", "the noise levels shown, 0 to T - 1 (activations: the first); "
        "default: each figure's own", type=whole_number, nargs="+", metavar="t")
    add("--seed", "picks the noise and the real pictures", 0, type=seed_number)
    add("--output_dir", "where the figure goes", "outputs")
    add("--device")
    parser.group("activations and attention, of a picture that is sampled")
    add("--label", "its class, as a number or name; none: without a class; default: the first")
    add("--sampler", "how to step down", "ddim", choices=sorted(SAMPLERS))
    add("--steps", "model calls; default: the sampler's own number", type=positive_int)
    add("--layer", "which attention layer; default: of those with the finest map the last")
    add("--query", "row and column, in pixels, of the place that asks; "
        "default: where the picture is busiest",
        type=whole_number, nargs=2, metavar=("ROW", "COLUMN"))
    parser.group("features, of real pictures (of the test set where there is one)")
    add("--dataset", DATASET_HELP.split(";")[0] + "; default: what the model was trained on",
        metavar="NAME")
    add("--data_dir")
    add("--num_images", "how many", 500, type=positive_int)
    add("--flatten", "keep the bottleneck's positions apart instead of taking their mean", False,
        action="store_true")
    add("--projection", "from many numbers to two; tsne needs scikit-learn", "pca",
        choices=("pca", "tsne"))
    parser.group("table, of --checkpoint or instead of")
    add("--channels", "a plain U-Net with these channels, one level each: conv 3x3 down, "
        "conv 3x3 at the bottom, transposed conv 4x4 and conv 3x3 up; 3 channels in",
        type=positive_int, nargs="+", metavar="C")
    add("--model", "a network with its default settings, untrained", choices=sorted(MODELS))
    add("--image_size", "height and width in pixels; "
        "default: the checkpoint's, 28 for simple, else 64", type=positive_int)
    args = parser.parse_args(argv)
    used = {"figure", "checkpoint", "dataset", "output_dir", "device",
            *FIGURES[args.figure].flags.split()}
    if args.channels or args.model:
        used.remove("dataset")
    parser.refuse(vars(args).keys() - used, f"--figure {args.figure}")
    few_numbers("timesteps", args.timesteps, most=8)
    if args.num_images > 20_000:
        raise ValueError(f"--num_images {args.num_images}: at most 20000 in a figure")
    given = [f"--{flag}" for flag in ("channels", "model", "checkpoint") if getattr(args, flag)]
    if (args.channels or args.model) and len(given) > 1:
        raise ValueError(f"{' and '.join(given)}: give one of them")

    keep_apart(args.dataset, args.output_dir)
    device = get_device(args.device)
    row = FIGURES[args.figure]
    path = make_output_dir(args.output_dir, row.file) / row.file
    row.draw(args, path, device)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
