"""How good are a checkpoint's pictures, and are they its own?

    python evaluate.py                      # outputs/model_final.pt, against what it was trained on
    python evaluate.py --num_images 10000 --sampler dpmpp_2m
    python evaluate.py --race               # the samplers beside one another: quality and seconds
    python evaluate.py --stages             # at which noise levels the distance arises

The distance is the Frechet distance in the features of our own small classifier ("FD, small
classifier"): it is not the FID of the literature, and no other project's number compares with it.
What does stands beside it: the floor, the distance of as many real images that nobody trained on.
Prints a table; writes evaluation.json and nearest.png (samples above the training images they are
most like), or a .json and a .png named race or stages.
"""

import functools
from pathlib import Path

import torch
from tqdm import tqdm

from classifier import get_classifier, look
from command_line import Parser, command, format_seconds, make_output_dir, positive_int, seed_number
from comparisons import race, stage_lengths, stages, write_comparison, write_facts
from data import keep_apart, keep_apart_from_own
from drawing import add_drawing_flags, choose_labels, take_guidance, take_sampler, thinned
from images import save_strip, to_signed, to_uint8
from load import CHECKPOINT_HELP, find_model, load_model, load_weak
from measures import (SAME, SURE, copied_by_chance, copied_share, copy_limit, fine_power,
                      in_positions, in_sets, kernel_distance, mean_distance, nearest,
                      nearest_images, nearest_of_both, precision_recall, share_sure, single_share)
from predictors import loss_by_timestep
from reference import (FEWEST, as_shown, classes_like, load_reference, note_other_images,
                       positions_of, same_classes)
from sample import calls_in_words, drawing_words, generate, model_calls, seconds_for
from utils import PRECISIONS, describe_device, get_device, get_precision, measure, shuffled

MAX_MEASURED = 200_000
FEW_TO_MEASURE = 20  # images in a set: with fewer, distances can hardly tell noise from pictures
SEARCHED = 2000  # so many samples, and held-out images, at most are looked for in the training set
RACE = {"ddpm": (50, 250, 1000), "ddim": (5, 10, 20, 50, 250), "dpmpp_2m": (5, 10, 20, 50),
        "dpmpp_2m_sde": (10, 20, 50), "ipndm": (5, 10, 20, 50)}


# ---- Measures of one set of samples

def quality(probabilities, features, reference, size, labels=None):
    """What the classifier makes of some images, as a dict of plain numbers.

    probabilities [N, K], features [N, D]: of the images.
    reference [M, D]: features of the training images.
    size: FD, precision and recall depend on the number of images: means over sets of so many.
    labels: [N] the classes that were asked for, -1 for none.
    """
    classes = probabilities.argmax(1)
    shares = torch.bincount(classes, minlength=probabilities.shape[1]) / len(classes)
    distance, error = mean_distance(features, reference, size)
    kid, kid_error = kernel_distance(features, reference)
    precision, recall = in_sets(lambda part: precision_recall(part, reference),
                                features, size).mean(0).tolist()
    found = {"fd": distance, "fd_error": error, "kid": kid, "kid_error": kid_error,
             "precision": precision, "recall": recall, "confident": share_sure(probabilities),
             "classes": shares.tolist()}
    if labels is not None and (labels >= 0).all():
        found["agreement"] = float((classes == labels).double().mean())
    return found


def copies(samples, held, training, features_of, reference, positions=1):
    """Are the samples copies of training images? In pixels (moved by up to one) and in features,
    in any of the positions in which the training showed them.

    samples, held, training: uint8 images; held-out ones that the training set has, too, are no
    yardstick (nearest_of_both).  features_of: images -> [N, D].  reference: that of training.
    Returns (a dict of plain numbers, the index of the most similar training image of each).
    """
    def in_features(images):
        return torch.stack([nearest(features_of(view), reference)[0][0]
                            for view in in_positions(images, positions)]).amin(0)

    (pixels, index), pixels_held, counts = nearest_of_both(samples, held, training, positions)
    in_both = int((pixels_held[0] <= SAME).sum())
    pixels_held = pixels_held[:, counts]
    return {"searched": len(samples), "in_both": in_both, "held_out": len(held) - in_both,
            "copied": copied_share(pixels[0], pixels_held[0]),
            "copied_by_chance": copied_by_chance(len(held) - in_both),
            "copied_in_features": copied_share(in_features(samples), in_features(held[counts])),
            "single": single_share(pixels), "single_held_out": single_share(pixels_held),
            "median_distance": float(pixels[0].median()),
            "median_distance_held_out": float(pixels_held[0].median())}, index[0]


def evaluate(drawn, model, diffusion, data, y, real, classifier, device):
    """Measure all that this file knows of the pictures drawn.

    real: a Reference.  y: the classes asked for, if its labels are of the same ones.
    Returns (a dict of plain numbers, the index of the training image next to each).
    """
    with tqdm(total=4, desc="measuring", unit="part") as bar:
        images, held, held_y = real.images, real.held, real.held_labels
        size = min(len(drawn), len(held))
        positions = positions_of(data)
        _, reference = look(classifier, as_shown(images, data))
        held_probabilities, held_features = look(classifier, as_shown(held, data))
        probabilities, features = look(classifier, drawn)
        bar.update()
        found = quality(probabilities, features, reference, size, y)
        floor = quality(held_probabilities, held_features, reference, size, held_y)
        usual = fine_power(images) or 1.0       # 0 where all images are plain
        found["detail"], floor["detail"] = fine_power(drawn) / usual, fine_power(held) / usual
        bar.update()
        searched = min(len(drawn), SEARCHED)
        copied, index = copies(drawn[:searched], held[:searched], images,
                               lambda some: look(classifier, some)[1],
                               reference if positions == 1 else look(classifier, images)[1],
                               positions)
        bar.update()
        _, losses = loss_by_timestep(model, diffusion, to_signed(held[:256]).to(device),
                                     None if y is None or held_y is None
                                     else held_y[:256].to(device))
        bar.update()
    return {"samples": found, "floor": floor, "held_out": real.what, "copies": copied,
            "loss_by_timestep": losses, "num_images": len(drawn), "num_held_out": len(held),
            "in_sets_of": size, "tells_classes": real.labels is not None}, index


def seconds_to_measure(classifier, images, num_held, num_images, sets=1, copies_too=True,
                       positions=1):
    """How long it will take here to measure so many sets of num_images samples, from timing the two
    longest parts on a few of the training images."""
    some, looks = images[:100], len(images) + num_held + sets * num_images
    searches = (min(num_images, SEARCHED) + min(num_held, num_images, SEARCHED)) * positions
    if copies_too:
        looks += searches + len(images) * (positions > 1)
    seconds = looks * measure(lambda: look(classifier, some), torch.device("cpu"))
    if copies_too:
        seconds += searches * measure(lambda: nearest_images(some, images), torch.device("cpu"))
    return seconds / len(some)


# ---- Tables and pictures

def print_quality(measured):
    """Print what `evaluate` measured of the quality, and what to beware of."""
    found, floor, held_name, size = (
        measured[name] for name in ("samples", "floor", "held_out", "in_sets_of"))
    count, held_count = measured["num_images"], measured["num_held_out"]

    def line(title, value, limit):
        print(f"  {title:<38}{value:>20}{limit:>20}")

    print(f"{count} samples".rjust(60) + "floor".rjust(20))
    line("FD, small classifier", f"{found['fd']:.3f} +- {found['fd_error']:.3f}",
         f"{floor['fd']:.3f} +- {floor['fd_error']:.3f}")
    line("  in units of the floor",
         f"{found['fd'] / floor['fd']:.2f}" if floor["fd"] > 0 else "-", "1")
    line("KID, small classifier, x 1000",
         f"{1000 * found['kid']:.2f} +- {1000 * found['kid_error']:.2f}",
         f"{1000 * floor['kid']:.2f} +- {1000 * floor['kid_error']:.2f}")
    tells_classes = measured["tells_classes"]   # else it tells quarter turns, of which there is one
    for key, title in (("precision", "precision: looks real"),
                       ("recall", "recall: has the variety"),
                       ("detail", "fine detail, of the training images'"),
                       ("confident", f"classifier surer than {SURE}"),
                       ("agreement", "classifier sees what was asked")):
        if key in found and (tells_classes or key != "confident"):
            line(title, f"{found[key]:.1%}", f"{floor[key]:.1%}" if key in floor else "")
    if tells_classes:
        line("smallest share of a class",
             f"{min(found['classes']):.1%}", f"{min(floor['classes']):.1%}")
    if found["recall"] < 0.1 * floor["recall"]:
        print("  where recall is so low the samples lie at one place of the features: "
              "precision then says nothing")
    if size < FEW_TO_MEASURE:
        print(f"  in sets of {size} a distance says little: noise may lie as near as real images; "
              "hold out more of them (train.py --val_fraction or --val_dir)")
    if abs(found["fd"] - floor["fd"]) < found["fd_error"] + floor["fd_error"]:
        print("  the two distances lie within their errors: only more images can tell them apart")
    print(f"  floor: {held_count} {held_name}, measured in the same way"
          + f"; FD, precision and recall are means over sets of {size}"
            * (size < max(held_count, count)))


def print_copies(copied, num_images, held_name):
    """num_images: among how many they were looked for, those that the model was trained on."""
    if not copied["held_out"]:
        print(f"  copies: all of the {held_name} are in the training set, too, "
              "so that nothing tells how near a copy is")
        return
    than = (f"any of the {copied['held_out']} {held_name} is"
            if copy_limit(copied["held_out"]) == 1 else f"99.5 % of the {held_name} are")
    print(f"  copies: of {copied['searched']} samples {copied['copied']:.1%} are closer to one "
          f"of the {num_images} images than {than} ({copied['copied_in_features']:.1%} "
          f"in features); by chance {copied['copied_by_chance']:.1%} would be\n"
          f"          {copied['single']:.1%} are less than a third as far from one of them "
          f"as from any other ({copied['single_held_out']:.1%} of the {held_name})"
          + f"\n          {copied['in_both']} of the {held_name} are in the training set, too, and "
            "left out" * bool(copied["in_both"]))


def print_found(found, num_images):
    """Print what `evaluate` measured of samples of a model with num_images training images."""
    held_name = found["held_out"]
    print_quality(found)
    print_copies(found["copies"], num_images, held_name)
    losses = " ".join(f"{loss:.4f}" for loss in found["loss_by_timestep"])
    print(f"  loss in {len(found['loss_by_timestep'])} equal ranges of t, {held_name}: {losses}")


def to_show(y, count=10):
    """Which images to show: the first of each class, in order, or if they are too few the first."""
    firsts = [] if y is None else [(y == k).nonzero()[0, 0] for k in y.unique()][:count]
    return torch.stack(firsts) if len(firsts) == count else torch.arange(count)


def save_nearest(images, training, index, path):
    """Samples above their nearest training images: uint8 [K, C, H, W], [N, C, H, W] and [K]."""
    rows = [to_signed(images), to_signed(training[index])]
    save_strip(rows, [""] * len(images), path,
               row_labels=["sample", "most similar\ntraining image"])


# ---- The command

def choose_ways(args, diffusion):
    """What is going to be drawn by: ([(sampler, steps)], the levels of each way down).

    With --race there are many samplers, with --stages many ways, the last steps of one.
    args.steps becomes a number, where there is one sampler.
    """
    if args.race:
        entrants = [(sampler, steps) for sampler, counts in RACE.items() for steps in counts
                    if steps <= diffusion.num_timesteps]
        if not entrants:
            raise ValueError("--race begins with 5 steps, "
                             f"and this model has {diffusion.num_timesteps}")
    else:
        args.steps = len(diffusion.sampling_levels(args.sampler, args.steps)) - 1
        entrants = [(args.sampler, args.steps)]
    return entrants, [diffusion.sampling_levels(sampler, steps, args.spacing, last_steps)
                      for sampler, steps in entrants
                      for last_steps in (stage_lengths(steps) if args.stages else [None])]


def choose_classes(args, data, real, known):
    """The classes of the samples, [num_images], or None for a model without; args.label becomes
    what evaluation.json tells of them.

    data: what the checkpoint says.  real: a Reference.
    known: are its labels classes of the model's own?
    """
    if args.label is None and known:
        args.label = "as the held-out images"
        return classes_like(real, args.num_images)
    y = thinned(choose_labels(args.label, data["classes"], args.num_images)[0], args.num_images)
    # In random order: what looks at the first of them sees all classes.
    return None if y is None else y[shuffled(len(y))]


def parse(argv):
    parser = Parser(description="Measure a checkpoint's pictures beside real ones.")
    add = parser.add
    add("--checkpoint", CHECKPOINT_HELP)
    add("--dataset", "what to compare with; default: what the model was trained on", metavar="NAME")
    add("--data_dir")
    add("--num_images", "samples; the floor is the mean over sets of as many real images", 2000,
        type=positive_int)
    add("--race", "several samplers from the same noises, instead of one", False,
        action="store_true")
    add("--stages", "noise real images little or much and undo it: "
        "at which levels samples get worse", False, action="store_true")
    add("--seed", "of the samples", 0, type=seed_number)
    add("--label", "as in sample.py; default: the classes of the held-out images, sample i that of "
        "image i (in turn where they have none of the model's)")
    add_drawing_flags(add)
    add("--batch_size", "images at a time", 100, type=positive_int)
    add("--output_dir", "where the results go", "outputs")
    add("--device")
    add("--precision", "bf16 is faster on some devices", "float32", choices=list(PRECISIONS))
    args = parser.parse_args(argv)
    if args.num_images < 100:
        raise ValueError(f"--num_images {args.num_images}: "
                         "fewer than 100 say nothing about a distribution")
    if args.race and (args.sampler or args.steps or args.spacing or args.eta is not None):
        raise ValueError("--race takes each sampler as it is: "
                         "leave out --sampler, --steps, --eta and --spacing")
    if args.stages and (args.race or args.label is not None):
        raise ValueError("--stages takes real images, and their classes: "
                         "leave out --race and --label")
    if args.num_images > MAX_MEASURED:
        raise ValueError(f"--num_images {args.num_images}: at most {MAX_MEASURED}")
    return args


@command
def main(argv=None):
    args = parse(argv)
    device = get_device(args.device)
    args.checkpoint = find_model(args.checkpoint, images=args.dataset)
    model, diffusion, data = load_model(args.checkpoint, device, image_size=args.image_size)
    keep_apart(args.dataset, args.output_dir)
    keep_apart_from_own(data, args.output_dir)
    output_dir = make_output_dir(args.output_dir, "classifier.pt", "evaluation.json", "nearest.png",
                                 "race.json", "race.png", "stages.json", "stages.png")
    known = same_classes(data, args.dataset)
    real = load_reference(data, args.data_dir, args.dataset)
    images, labels, held, held_labels, held_name = real
    if args.stages and not (known and held_labels is not None):
        args.label = "none"
    if not args.race:
        take_sampler(args, data)
    take_guidance(args, data, diffusion)
    weak, weak_digest = load_weak(args.weak, model, diffusion, data, device, args.image_size)
    entrants, ways = choose_ways(args, diffusion)
    if args.stages or args.race:                            # the floor has to be of as many
        args.num_images = min(args.num_images, len(held))
    y = choose_classes(args, data, real, known)
    if min(len(images), len(held)) < FEWEST:
        raise ValueError(f"{len(images)} images and {len(held)} to hold them against: "
                         f"distances need {FEWEST} of each; name more with --dataset, "
                         "or train with a larger --val_fraction")
    precision, precision_reason = get_precision(args.precision, device)
    print(f"device: {describe_device(device, args.device)}; precision: {precision_reason}")
    how = "; away from " if args.guidance else "; drawn by "
    print(f"model: {args.checkpoint}; data: {args.dataset or data['name']}, "
          f"{len(images)} images and {len(held)} {held_name}" + (how + args.weak if weak else ""))
    note_other_images(data, args.dataset)
    classifier, features = get_classifier(args.dataset or data["name"], images, labels, held,
                                          held_labels, output_dir)
    print(f"features: {features}")
    calls, weak_calls = map(sum, zip(*(model_calls(levels, args.guidance, args.guidance_interval)
                                       for levels in ways)))
    seconds = seconds_for(model, diffusion, args.num_images, data["image_size"], calls,
                          args.batch_size, precision, weak, weak_calls)
    measuring = seconds_to_measure(classifier, images, len(held), args.num_images, len(ways),
                                   copies_too=not (args.race or args.stages),
                                   positions=positions_of(data))
    print(f"cost: {args.num_images} images"
          + ("" if args.race else f" in {args.steps} steps of {args.sampler}")
          + drawing_words(args.guidance, args.guidance_interval, args.eta, args.spacing)
          + f", {calls_in_words(calls, weak_calls, weak)} for each, about "
          f"{format_seconds(seconds)} here, and {format_seconds(measuring)} to measure", flush=True)

    settings = {name: value for name, value in vars(args).items()
                if name not in ("output_dir", "data_dir", "weak")}
    settings.update(digest=data["digest"], checkpoint=Path(args.checkpoint).name,
                    features=features,
                    torch=torch.__version__, weak=weak_digest,
                    weak_file=Path(args.weak).name if weak else None)
    draw = functools.partial(generate, model, diffusion, args.num_images, data["image_size"],
                             seed=args.seed, eta=args.eta, spacing=args.spacing, y=y,
                             guidance=args.guidance, guidance_interval=args.guidance_interval,
                             weak=weak, batch_size=args.batch_size, device=device,
                             precision=precision)
    shown = to_show(y, min(10, args.num_images))
    if args.race:
        found = race(draw, as_shown(held, data), held_name, as_shown(images, data),
                     classifier, entrants, shown,
                     keep=lambda facts: write_facts(output_dir / "race", {**facts, **settings}))
        write_comparison(output_dir / "race", {**found[0], **settings}, *found[1:],
                         title="the same ten noises, several samplers")
        return
    draw = functools.partial(draw, sampler=args.sampler, steps=args.steps)
    if args.stages:
        found = stages(draw, as_shown(held[:args.num_images], data), as_shown(images, data),
                       classifier, ways[-1], shown)
        write_comparison(output_dir / "stages", {**found[0], **settings}, *found[1:],
                         title="real images, noised to a level and drawn on from there")
        return
    drawn = to_uint8(draw()[0])
    found, index = evaluate(drawn, model, diffusion, data, y if known else None, real, classifier,
                            device)
    print_found(found, len(images))
    write_facts(output_dir / "evaluation", {**found, **settings})
    shown = to_show(None if y is None else y[:len(index)])
    save_nearest(drawn[shown], images, index[shown], output_dir / "nearest.png")
    print(f"wrote {output_dir / 'evaluation.json'}\nwrote {output_dir / 'nearest.png'}")


if __name__ == "__main__":
    main()
