"""Several sets of samples beside one another: a row of numbers and a row of pictures for each.

evaluate.py --race draws from the same noises by several samplers; evaluate.py --stages from real
images, noised little or much.
"""

import json
import time

from tqdm import tqdm

from classifier import look
from command_line import format_seconds
from files import write_file
from images import save_strip, to_signed, to_uint8
from measures import fine_power, mean_distance, share_sure


def distance_row(drawn, classifier, reference, size=None):
    """What tells uint8 images [N, C, H, W] from real ones.

    reference: features of the training images.  size: FD is the mean over sets of so many.
    """
    probabilities, features = look(classifier, drawn)
    distance, error = mean_distance(features, reference, size or len(features))
    return {"fd": distance, "fd_error": error, "confident": share_sure(probabilities)}


def race(draw, held, held_name, images, classifier, entrants, shown, keep):
    """The same noises through each (sampler, steps) of `entrants`.

    draw: generate, with all else decided.  held: real images for the floor, in sets of as many as
    are drawn, and what they are.
    images: the training images.  shown: the indices of the pictures to keep.
    keep: called with what is known after each entrant, as all of them may take hours.
    Returns (facts, a row of pictures each, their labels).
    """
    _, reference = look(classifier, images)
    rows, pictures = [], []
    for sampler, steps in entrants:
        start = time.perf_counter()
        drawn = to_uint8(draw(sampler=sampler, steps=steps)[0])     # a GPU is waited for here
        seconds = time.perf_counter() - start
        row = distance_row(drawn, classifier, reference)
        rows.append({"sampler": sampler, "steps": steps, **row, "seconds": seconds})
        pictures.append(to_signed(drawn[shown]))
        tqdm.write(f"  {sampler:<14}{steps:>5} steps   "
                   f"FD {row['fd']:9.3f} +- {row['fd_error']:6.3f}   {seconds:8.1f} s")
        keep({"rows": rows})
    floor = distance_row(held, classifier, reference, len(drawn))
    print(f"  floor: {floor['fd']:.3f} +- {floor['fd_error']:.3f} "
          f"({len(held)} {held_name}, in sets of {len(drawn)})")
    titles = [f"{row['sampler']} {row['steps']}\n"
              f"FD {row['fd']:.3f}, {format_seconds(row['seconds'])}" for row in rows]
    return {"rows": rows, "floor": floor["fd"]}, pictures, titles


def stages(draw, x_0, images, classifier, levels, shown):
    """Real images, noised so far that the last 1, 2, 4, ... and all of the steps have to undo it:
    at which noise levels do samples get worse than real images?

    draw: generate, with all else decided.  x_0: uint8 [N, C, H, W], not trained on.
    images: the training images.  levels: of all steps, from T - 1 to -1.
    shown: the indices of the pictures to keep.
    Returns (facts, a row of pictures each, their labels); the first row is x_0 itself.
    """
    _, reference = look(classifier, images)
    x_0_signed, usual, rows, pictures = to_signed(x_0), fine_power(images) or 1.0, [], []
    for count in [0, *stage_lengths(len(levels) - 1)]:
        drawn = to_uint8(draw(begin=(x_0_signed, count))[0]) if count else x_0
        row = distance_row(drawn, classifier, reference)
        rows.append({"steps": count, "t": levels[-1 - count], **row,
                     "detail": fine_power(drawn) / usual})
        pictures.append(to_signed(drawn[shown]))
        where = f"t = {levels[-1 - count]:>4}, {count:>4} steps" if count else "real images"
        tqdm.write(f"  {where:<20}   FD {row['fd']:9.3f} +- {row['fd_error']:6.3f}   "
                   f"fine detail {rows[-1]['detail']:6.1%}")
    print("  all rows are made from the same images, so that their differences, but for those from "
          "the last row, are surer than the errors")
    return ({"rows": rows}, pictures,
            ["real", *(f"t = {row['t']}\nsteps: {row['steps']}" for row in rows[1:])])


def stage_lengths(steps):
    """How many steps are taken: 1, 2, 4, ... and all."""
    return [*(2**k for k in range(steps.bit_length()) if 2**k < steps), steps]


def write_facts(path, facts):
    """As path.json."""
    write_file(path.with_suffix(".json"), json.dumps(facts, indent=1).encode())


def write_comparison(path, facts, pictures, row_labels, title):
    """What race or stages has found, as path.json and path.png."""
    write_facts(path, facts)
    save_strip(pictures, [""] * len(pictures[0]), path.with_suffix(".png"), title=title,
               row_labels=row_labels)
    print(f"wrote {path.with_suffix('.json')}\nwrote {path.with_suffix('.png')}")
