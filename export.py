"""Make a small file to share out of a checkpoint: the averaged weights in half precision, and a card.

    python export.py --checkpoint outputs/model_final.pt --evaluation outputs/evaluation.json --output my_model.pt

sample.py and all that draws reads it like any checkpoint; a training cannot go on from it. The card says how the
model was trained and what evaluate.py found: print it with python export.py --card pretrained/mnist.pt
"""

import json
import sys
from pathlib import Path

from checkpoint import load_checkpoint, save_checkpoint
from utils import Parser, command, make_output_dir

KEPT = ("model_name", "model_config", "diffusion_config", "data")


def export(checkpoint, output, evaluation=None, **card):
    """Write the small file. evaluation: what evaluate.py wrote, for this very checkpoint.  card: plain values.

    Raises ValueError if the evaluation is another checkpoint's.
    """
    entries = load_checkpoint(checkpoint)
    card = {**card, "settings": {name: value for name, value in entries["settings"].items() if value is not None},
            "steps": entries["step"]}
    if evaluation:
        found = json.loads(Path(evaluation).read_text())
        if found.get("digest") != entries["digest"]:
            raise ValueError(f"{evaluation} measures another checkpoint than {checkpoint}")
        samples = found["samples"]
        card.update({"fd": samples["fd"], "fd_error": samples["fd_error"], "fd_floor": found["floor"]["fd"],
                     "agreement": samples.get("agreement"), "copied": found["copies"]["copied"],
                     **{name: found[name] for name in ("num_images", "held_out", "sampler", "steps", "guidance", "seed")}})
    weights = {name: value.half() if value.is_floating_point() else value for name, value in entries["ema"].items()}
    save_checkpoint(output, {**{name: entries[name] for name in KEPT}, "ema": weights, "card": card})


@command
def main(argv=None):
    parser = Parser(description="Make a small file to share out of a checkpoint.")
    add = parser.add
    add("--checkpoint", "a file written by train.py", "outputs/model_final.pt")
    add("--evaluation", "the evaluation.json of evaluate.py for it", metavar="FILE")
    add("--training", "how long it took and where, in words, for the card", metavar="TEXT")
    add("--output", "the file to write", "outputs/exported.pt")
    add("--card", "print the card of this file, and do nothing else", metavar="FILE")
    args = parser.parse_args(argv)
    if args.card:
        card = load_checkpoint(args.card).get("card")
        if not isinstance(card, dict):
            raise ValueError(f"{args.card} has no card: export.py did not write it")
        json.dump(card, sys.stdout, indent=1)
        print()
        return
    output = Path(args.output)
    make_output_dir(output.parent, output.name)
    export(args.checkpoint, output, args.evaluation, **({"training": args.training} if args.training else {}))
    print(f"wrote {output}, {output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
