"""A small network that looks at finished pictures: which class is it, and what is it like?

    classifier = train_classifier(images, labels, num_classes)
    probabilities, features = look(classifier, images)

evaluate.py measures samples in its features, [N, 128]. Those of MNIST and Fashion-MNIST are shipped
in pretrained/; another set's is trained when it is needed, in a minute or two. Images without
classes train it to tell by how much a picture was turned (Gidaris et al. 2018).

    python classifier.py --dataset mnist            # make pretrained/classifier_mnist.pt again
"""

from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import distributed
from checkpoint import (PRETRAINED, check_weights, half_precision, load_checkpoint, save_checkpoint,
                        whole_precision)
from command_line import Parser, command, make_output_dir, positive_int, seed_number
from data import Batches, get_dataset
from images import to_signed
from utils import autocast, get_device, get_precision, seed_step

TURNS = 4
FEWEST_STEPS = 100  # with less, four epochs of some hundred images, it has learnt next to nothing


class Classifier(nn.Module):
    """Four convolutions, then the mean over the picture: 128 features. A linear layer makes logits.

    x: [B, image_channels, H, W] in [-1, 1].  Images above 32x32 are halved once more on the way.
    """

    def __init__(self, image_channels=1, image_size=28, outputs=10):
        super().__init__()
        self.settings = dict(image_channels=image_channels, image_size=image_size, outputs=outputs)
        widths, strides = (image_channels, 32, 64, 128, 128), (1 + (image_size > 32), 2, 2, 1)
        layers = [
            nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
            for i, o, stride in zip(widths, widths[1:], strides)]
        self.layers = nn.Sequential(*layers)
        self.linear = nn.Linear(widths[-1], outputs)

    def forward(self, x):
        """(logits [B, outputs], features [B, 128])"""
        features = self.layers(x).mean((2, 3))
        return self.linear(features), features


def turned(x_0):
    """Every image in its four directions, and which one it is: [4B, C, H, W], [4B]."""
    return (torch.cat([x_0.rot90(k, (2, 3)) for k in range(TURNS)]),
            torch.arange(TURNS).repeat_interleave(len(x_0)))


def train_classifier(images, labels=None, num_classes=None, epochs=4, batch_size=128, seed=0):
    """Train on uint8 [N, C, H, W] and labels [N] of num_classes; without labels, on turned images.

    Returns the Classifier, in eval mode, on the CPU.
    """
    if labels is None:
        num_classes, batch_size = TURNS, batch_size // TURNS
    device = get_device()
    precision, _ = get_precision("auto", device)
    seed_step(seed, 0)
    classifier = Classifier(images.shape[1], images.shape[-1], num_classes).to(device).train()
    batches = Batches(images, labels, batch_size, seed)
    steps = max(epochs * len(batches), FEWEST_STEPS)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=1e-2)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    bar = tqdm(zip(range(steps), batches.stream()), total=steps, desc="classifier", unit="step",
               disable=not distributed.speaks())
    for _, (x_0, y) in bar:
        x_0, y = turned(x_0) if labels is None else (x_0, y)
        with autocast(device, precision):
            logits, _ = classifier(x_0.to(device))
        loss = F.cross_entropy(logits.float(), y.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    return classifier.eval().requires_grad_(False).cpu()


@torch.no_grad()
def look(classifier, images, batch_size=500):
    """(probabilities [N, outputs], features [N, 128]) of uint8 images [N, C, H, W], in float32."""
    pairs = [classifier(to_signed(part)) for part in images.split(batch_size)]
    return (torch.cat([logits for logits, _ in pairs]).softmax(1),
            torch.cat([features for _, features in pairs]))


def save_classifier(path, classifier, **card):
    """Write it in half precision. card: plain values that tell how it was made."""
    weights = half_precision(classifier.state_dict())
    save_checkpoint(path, {"classifier": weights, "settings": classifier.settings, "card": card})


def load_classifier(path):
    """(Classifier, its card with the file's digest). Raises FileNotFoundError, or ValueError for an
    unusable file."""
    entries = load_checkpoint(path)
    try:
        classifier = Classifier(**entries["settings"])
        weights = whole_precision(entries["classifier"])
        check_weights(path, weights, classifier)
        classifier.load_state_dict(weights)
        card = dict(entries["card"])
        words, accuracy = (card["data"], card["trained_to"]), card.get("accuracy", 0.0)
        if not all(isinstance(word, str) for word in words) or type(accuracy) is not float:
            raise TypeError("its card is damaged")
        return classifier.eval().requires_grad_(False), {**card, "digest": entries["digest"]}
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} holds no classifier of this project") from error


def task_of(labels):
    """What a classifier learns from such labels, or from None."""
    return "tell how a picture was turned" if labels is None else "tell classes"


def make_classifier(path, images, labels, held, held_labels, epochs=4, seed=0, **card):
    """Train one, measure it on images that it has not seen, and write it.

    images, held: uint8 [N, C, H, W].  labels: [N], or None to learn how a picture was turned.
    held_labels: [N], or None where those images have no such classes.
    Returns (Classifier, its card).
    """
    classes = None if labels is None else int(labels.max()) + 1
    classifier = train_classifier(images, labels, classes, epochs, seed=seed)
    # In the file's half precision, as it will be used.
    classifier.load_state_dict(whole_precision(half_precision(classifier.state_dict())))
    card.update(data=Batches(images, labels).fingerprint(), trained_to=task_of(labels))
    if labels is None:
        held, held_labels = turned(held)
    if held_labels is not None:
        card["accuracy"] = float(
            (look(classifier, held)[0].argmax(1) == held_labels).double().mean())
    save_classifier(path, classifier, **card)
    return load_classifier(path)


def warn_of_guesses(classifier, card):
    """Say so where a classifier hardly does better than a guess: its features then tell nothing."""
    outputs, accuracy = classifier.settings["outputs"], card.get("accuracy")
    if accuracy is not None and outputs > 1 and accuracy < 1.2 / outputs:
        print(f"note: this classifier is right {accuracy:.0%} of the time, and a guess among "
              f"{outputs} would be {1 / outputs:.0%}: distances in its features say little")


def get_classifier(name, images, labels, held, held_labels, folder):
    """The classifier of a data set: shipped, found in `folder`, or trained now and kept there.

    name: of the data set.  images, labels, held, held_labels: see make_classifier.
    Returns (Classifier, a phrase that says which).
    """
    own, fingerprint = Path(folder) / "classifier.pt", Batches(images, labels).fingerprint()
    for path in (PRETRAINED / f"classifier_{name}.pt", own):
        if path.is_file():
            classifier, card = load_classifier(path)
            if card["data"] == fingerprint:             # which tells the size and the channels, too
                break
    else:
        path = make_output_dir(folder) / own.name
        print(f"no classifier for these images yet: training one to {task_of(labels)}, "
              "a minute or two on two cores", flush=True)
        classifier, card = make_classifier(path, images, labels, held, held_labels)
        print(f"wrote {path}")
    warn_of_guesses(classifier, card)
    accuracy = f", test accuracy {card['accuracy']:.2%}" if "accuracy" in card else ""
    return classifier, (f"{path.name} (digest {card['digest'][:8]}), "
                        f"trained to {card['trained_to']}{accuracy}")


@command
def main(argv=None):
    parser = Parser(
        description="Train the classifier of a data set that has classes and a test set.")
    add = parser.add
    add("--dataset", "mnist, fashion_mnist, cifar10", "mnist")
    add("--data_dir")
    add("--epochs", "passes over the data", 4, type=positive_int)
    add("--seed", "the same seed trains the same classifier", 0, type=seed_number)
    add("--output_dir", "where classifier_DATASET.pt goes", str(PRETRAINED))
    args = parser.parse_args(argv)
    images, labels = get_dataset(args.dataset, args.data_dir)
    if labels is None:
        raise ValueError(f"{args.dataset} has no classes; "
                         "evaluate.py trains what it needs by itself")
    test = get_dataset(args.dataset, args.data_dir, train=False)
    path = make_output_dir(args.output_dir) / f"classifier_{args.dataset}.pt"
    _, card = make_classifier(
        path, images, labels, *test, args.epochs, args.seed,
        command=f"classifier.py --dataset={args.dataset} --epochs={args.epochs} --seed={args.seed}")
    size, share = path.stat().st_size / 1e6, card["accuracy"]
    print(f"wrote {path}, {size:.2f} MB: {share:.2%} of {len(test[0])} test images")


if __name__ == "__main__":
    main()
