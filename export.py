"""Make a small file to share from a checkpoint: the averaged weights in half precision, and a card.

    python export.py --evaluation outputs/evaluation.json --output my_model.pt

sample.py and all that draws reads it like any checkpoint; a new training can start from it, but its
own cannot be resumed. The card says how the model was trained and what evaluate.py found or, where
nothing was measured, how its preset is best drawn: python export.py --card pretrained/mnist.pt
prints it. If it was measured with --weak, the card names that file, and sample.py takes it where it
lies beside the small one.
"""

import json
import math
from pathlib import Path

from checkpoint import half_precision, load_checkpoint, save_checkpoint, told_of
from command_line import Parser, command, make_output_dir, spare
from data import DATASETS
from load import OWN, load_model

KEPT = ("model_name", "model_config", "diffusion_config", "data")


def without_path(name):
    """A folder's last part, for a shared file, and not as if it were a named data set."""
    last = Path(name).resolve().name
    return name if name in DATASETS else f"folder {last}" if last in DATASETS else last


def export(checkpoint, output, evaluation=None, **card):
    """Write the small file.

    evaluation: what evaluate.py wrote, for this very checkpoint.  card: plain values.
    A checkpoint that is small already keeps its weights and gets a newer card. Returns the card.
    Raises ValueError for a checkpoint that nothing can draw from, and another one's evaluation.
    """
    spare([checkpoint, *([evaluation] if evaluation else [])], output, flag="--output")
    if Path(output).exists() and not {"card", "ema"} <= load_checkpoint(output).keys():
        raise ValueError(f"{output} is the checkpoint of a training, or a classifier: "
                         "give another --output")
    entries, data = load_checkpoint(checkpoint), load_model(checkpoint)[2]
    try:
        if "card" in entries:
            card = {**entries["card"], **card}
        else:
            settings = {name: value for name, value in entries["settings"].items()
                        if value is not None}
            card = {**card, "settings": settings, "training_steps": entries["step"]}
            if told_of(entries, "draw_with"):
                drawn = {name: data[name] for name in ("sampler", "spacing", "eta", "guidance")}
                card = {**drawn, "sampler_steps": data["steps"], **card}
            if told_of(entries, "started_from"):
                card["started_from"] = entries["started_from"]
        weights = half_precision(entries["ema"])
        kept = {name: entries[name] for name in KEPT}
        kept["data"] = {**kept["data"],
                        **{key: without_path(kept["data"][key]) for key in ("name", "val_dir")
                           if kept["data"].get(key)}}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{checkpoint} is not what train.py or export.py writes") from error
    if not all(value.isfinite().all() for value in weights.values()):
        raise ValueError(f"{checkpoint}: not all weights are numbers that half precision can hold")
    if evaluation:
        card.update(read_evaluation(evaluation, checkpoint, data["digest"]))
    save_checkpoint(output, {**kept, "ema": weights, "card": card})
    return card


def read_evaluation(path, checkpoint, digest):
    """What a card says of evaluate.py's results. ValueError for another model's or another file."""
    if not Path(path).is_file():
        raise FileNotFoundError(2, "No such file", str(path))
    try:
        found = json.loads(Path(path).read_text())
        measured, samples, dataset = found["digest"], found["samples"], found.get("dataset")
        facts = {"fd": samples["fd"], "fd_error": samples["fd_error"],
                 "fd_floor": found["floor"]["fd"],
                 "agreement": samples.get("agreement"), "copied": found["copies"]["copied"],
                 **{name: found[name] for name in ("num_images", "held_out", "sampler", "guidance",
                                                   "label", "seed")},
                 **{name: found.get(name) for name in ("num_held_out", "precision", "features",
                                                       "guidance_interval", "spacing", "eta")},
                 "sampler_steps": found["steps"], "weak": found.get("weak_file"),
                 "dataset": dataset and without_path(str(dataset))}
        numbers = [facts["fd"], facts["fd_error"], facts["fd_floor"],
                   facts["copied"], facts["guidance"]]
        if not all(type(number) in (int, float) and math.isfinite(number) for number in numbers):
            raise ValueError("not all of its numbers are numbers")
        if len(repr(facts)) > 10_000:
            raise ValueError("its words are too many")
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError,
            RecursionError) as error:
        raise ValueError(f"{path} is no evaluation.json of evaluate.py") from error
    if found.get("weak") and not isinstance(facts["weak"], str):
        raise ValueError(f"{path} was measured with --weak and does not name its file: "
                         "measure anew")
    if measured != digest:
        raise ValueError(f"{path} measures another checkpoint than {checkpoint}")
    return facts


def for_eyes(card):
    """A card as JSON that one likes to read: four digits, and nothing of what it does not have."""
    known = {name: value for name, value in card.items() if value is not None}
    text = json.dumps(known, default=str, skipkeys=True)
    known = json.loads(text, parse_float=lambda digits: float(f"{float(digits):.4g}"))
    return json.dumps(known, indent=1)


@command
def main(argv=None):
    parser = Parser(description="Make a small file to share out of a checkpoint.")
    add = parser.add
    add("--checkpoint",
        "a file written by train.py, or by this command: that one gets a newer card", OWN)
    add("--evaluation", "the evaluation.json of evaluate.py for it", metavar="FILE")
    add("--training", "how long it took and where, in words, for the card", metavar="TEXT")
    add("--output", "the file to write", "outputs/exported.pt")
    add("--card", "print the card of this file, and do nothing else", metavar="FILE")
    args = parser.parse_args(argv)
    if args.card:
        parser.refuse({"checkpoint", "evaluation", "training", "output"},
                      "--card, which only prints")
        entries = load_checkpoint(args.card)
        card = entries.get("card")
        if not isinstance(card, dict):
            raise ValueError(f"{args.card} has no card: export.py did not write it")
        card["network"] = entries.get("model_config")           # what --start_from has to be told
        print(for_eyes(card))
        return
    output = Path(args.output)
    make_output_dir(output.parent, output.name)
    card = export(args.checkpoint, output, args.evaluation,
                  **({"training": args.training} if args.training else {}))
    print(f"wrote {output}, {output.stat().st_size / 1e6:.1f} MB")
    if isinstance(card.get("weak"), str) and not (output.parent / card["weak"]).exists():
        print(f"put {card['weak']}, the weak model it was measured with, beside it")


if __name__ == "__main__":
    main()
