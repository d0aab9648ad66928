"""Digits and fabrics drawn by code: data sets that need no download and never run out.

    python synthetic.py                     # writes outputs/synthetic_digits.png and outputs/synthetic_fabrics.png

    from synthetic import digits, fabrics
    images, labels = digits(10_000)         # uint8 [10000, 1, 28, 28], a few seconds
    images, labels = fabrics(10_000)        # uint8 [10000, 3, 64, 64], about half a minute

Image i of seed s depends on (s, i) and nothing else, so digits(100) is the beginning of
digits(10_000), and the global random generators are never touched.

A digit is a pen path: a few control points, joined by a smooth curve, bent and slanted the way
hands do, then inked with a round nib. A fabric is a map that says which colour of a palette each
point of the cloth has, then dyed, woven and lit.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

# Every way of writing a digit: (how common, path). A path is "x,y" points, y downwards, in a
# box of about 100 x 100; "*" after a point makes it a corner, "/" lifts the pen.
DIGITS = {
    0: [(4, "50,0 22,12 10,50 24,88 50,100 76,88 90,50 78,12 50,0"),
        (3, "62,6 40,2 15,25 10,60 28,95 55,98 82,72 86,35 70,8 48,4 38,14"),
        (2, "45,4 20,20 10,55 25,92 52,98 80,75 85,35 68,10 55,8")],
    1: [(8, "50,0 50,50 50,100"),
        (2, "28,22 52,0* 52,50 52,100"),
        (1, "28,22 52,0* 52,50 52,100 / 20,100 50,99 82,99")],
    2: [(3, "15,25 30,5 60,2 80,22 68,50 40,78 12,98* 45,96 88,98"),
        (4, "15,25 30,5 60,2 78,22 62,55 35,85 14,94 10,84 22,78 45,88 70,98 92,90"),
        (2, "15,12 45,3 80,8 70,35 40,68 10,95* 50,92 92,95"),
        (2, "22,30 22,12 48,0 74,12 74,38 50,68 15,98* 88,98")],
    3: [(3, "15,12 40,0 72,10 70,35 38,46* 72,56 80,80 50,100 12,88"),
        (3, "15,15 42,0 74,14 66,38 40,46 48,50 74,58 80,80 50,100 10,86"),
        (1, "15,4 75,4* 42,42* 72,52 82,76 55,99 12,90"),
        (2, "18,15 45,0 74,15 62,38 38,48 34,42 50,44 76,60 76,86 45,100 10,86")],
    4: [(3, "25,3 18,30 12,55* 50,54 90,52 / 72,5 66,50 60,100"),
        (3, "20,5 12,40 20,58 50,56 78,48 / 75,2 72,50 68,100"),
        (1, "62,2* 35,30 8,66* 50,66 92,64 / 62,2 62,50 60,100"),
        (2, "72,8* 38,28 12,56* 45,58 80,50 / 76,4 70,50 62,100"),
        (2, "18,8 15,45* 70,45 / 70,8 68,60 64,100")],
    5: [(3, "80,3 28,3* 22,42* 50,36 78,52 78,80 48,100 12,88"),
        (3, "30,8 24,45* 52,40 78,56 76,84 45,99 12,92 / 30,6 60,5 92,2"),
        (2, "82,5 45,8 24,26 40,46 68,58 72,80 45,98 10,92"),
        (2, "88,0 40,8* 30,42 58,48 66,70 48,92 8,100")],
    6: [(3, "62,0 32,28 14,64 26,94 56,98 76,76 60,54 34,60 18,78"),
        (3, "48,0 22,35 14,72 35,98 68,92 76,68 55,54 26,66 18,80"),
        (2, "70,2 40,30 18,66 30,96 60,95 72,72 52,58 22,74"),
        (2, "50,0 18,40 12,76 38,100 78,86 78,56 48,46 20,60 14,72")],
    7: [(4, "10,8 45,6 82,4* 62,45 42,100"),
        (3, "12,15 20,5 50,5 80,4 84,14 60,50 48,100"),
        (2, "10,8 45,6 82,4* 62,45 42,100 / 30,52 80,48"),
        (2, "12,25 14,6* 82,6* 55,50 45,100")],
    8: [(4, "74,12 48,0 22,14 28,38 58,54 80,76 54,100 22,82 36,58 68,38 78,14"),
        (3, "50,48 22,28 30,4 50,0 72,6 74,28 50,48 22,70 22,92 50,100 78,92 76,68 50,48"),
        (2, "50,46 26,38 24,10 50,0 76,10 74,38 50,46 22,58 18,86 50,100 80,86 78,58 50,46")],
    9: [(4, "76,14 50,0 20,12 16,38 40,52 70,36 78,10* 74,55 70,100"),
        (2, "76,16 52,0 22,12 18,40 44,52 74,34 78,10 78,55 68,90 40,100 16,88"),
        (3, "74,10 42,4 18,28 26,48 52,44 76,14* 62,60 46,100"),
        (2, "70,10 40,2 18,26 34,50 64,38 74,8 70,50 58,98")],
}
CONTROLS = 18                               # most control points in one path
POINTS = 80                                 # dots of ink along a path: less than a pixel apart


def pen_path(text):
    """Read one path of DIGITS.

    The curve is a Catmull-Rom spline, which passes through its control points and is linear in
    them: curve = basis @ control. So moving control points costs one matrix product, for
    thousands of digits at once.

    Returns (control [CONTROLS, 2] in 0..1, basis [POINTS, CONTROLS], stroke [CONTROLS]), padded
    with zeros; stroke counts pen lifts before a control point.
    """
    control, stroke, basis, length = np.zeros((CONTROLS, 2)), np.zeros(CONTROLS, int), [], []
    k = 0
    for lifts, piece in enumerate(text.split("/")):
        pieces = [[]]
        for word in piece.split():
            control[k], stroke[k] = np.array(word.strip("*").split(","), float) / 100, lifts
            pieces[-1].append(k)
            if word.endswith("*"):
                pieces.append([k])          # a corner ends one smooth curve and starts another
            k += 1
        rows = np.concatenate([catmull_rom(p) for p in pieces if len(p) > 1])
        steps = np.linalg.norm(np.diff(rows @ control, axis=0), axis=1)
        basis.append(rows)
        length.append(np.append(0, steps))  # the leap between strokes has no length: no ink
    basis, travelled = np.concatenate(basis), np.cumsum(np.concatenate(length))
    even = np.searchsorted(travelled, np.linspace(0, travelled[-1], POINTS) - 1e-9)
    return control, basis[even], stroke


def catmull_rom(knots, per_span=60):
    """Weights [spans * per_span, CONTROLS] of the spline through the control points `knots`."""
    eye = np.eye(CONTROLS)[knots]
    eye = np.concatenate([2 * eye[:1] - eye[1:2], eye, 2 * eye[-1:] - eye[-2:-1]])
    s = np.linspace(0, 1, per_span)[:, None]
    spans = [(-s**3 + 2 * s**2 - s) * a + (3 * s**3 - 5 * s**2 + 2) * b
             + (-3 * s**3 + 4 * s**2 + s) * c + (s**3 - s**2) * d
             for a, b, c, d in zip(eye, eye[1:], eye[2:], eye[3:])]
    return np.concatenate(spans) / 2


def digits(n=10_000, seed=0):
    """Handwritten-looking digits, bright on black like MNIST; image i shows the digit i % 10.

    n: how many.  seed: any integer >= 0.
    Returns (images uint8 [n, 1, 28, 28], labels int64 [n]).  Raises ValueError for negative n or seed.
    """
    check(n, seed)
    labels = np.arange(n) % 10
    images = np.empty((n, 1, 28, 28), np.uint8)
    writers = {d: [np.stack(a) for a in zip(*(pen_path(text) for _, text in ways))]
               for d, ways in DIGITS.items()}
    chance = {d: np.cumsum([w for w, _ in ways]) / sum(w for w, _ in ways)
              for d, ways in DIGITS.items()}
    for start in range(0, n, 250):          # a chunk of 250 keeps the distances under 70 MB
        chunk = np.arange(start, min(start + 250, n))
        z = np.stack([np.random.default_rng([seed, i]).standard_normal(64) for i in chunk])
        luck = np.stack([np.random.default_rng([seed, i, 1]).random(8) for i in chunk])
        way = [np.searchsorted(chance[d], u) for d, u in zip(labels[chunk], luck[:, 0])]
        control, basis, stroke = (np.stack([writers[d][part][w] for d, w in zip(labels[chunk], way)])
                                  for part in range(3))
        path = handwriting(control, basis, stroke, z, luck)
        images[chunk, 0] = ink(path, z[:, 54:], luck)
    return torch.from_numpy(images), torch.from_numpy(labels)


def handwriting(control, basis, stroke, z, luck):
    """Bend clean paths the way hands do.  z: normal [N, 64], luck: uniform [N, 8].  Returns [N, POINTS, 2]."""
    control = control + 0.028 * z[:, :36].reshape(-1, CONTROLS, 2)
    lifted = np.stack([z[:, 36:39], z[:, 39:42]], -1)                     # [N, 3 strokes, 2]
    control += 0.025 * np.take_along_axis(lifted, stroke[..., None], 1)
    path = basis @ control - 0.5                                          # [N, POINTS, 2], centred
    x, y = path[..., 0], path[..., 1]
    for k in (42, 45):                                                    # two slow waves bend the page
        angle, phase = z[:, k, None] * 2, z[:, k + 1, None] * 3
        wave = np.sin(4 * (x * np.cos(angle) + y * np.sin(angle)) + phase)
        x, y = x + 0.04 * z[:, k + 2, None] * wave, y + 0.03 * z[:, k, None] * wave
    y = y + 0.12 * z[:, 48, None] * (y**2 - 0.25)                         # loops grow, tails shrink
    x = x * 0.8 * np.exp(0.22 * z[:, 49, None])                           # narrow or wide
    x = x - y * (0.18 + 0.25 * z[:, 50, None])                            # slant, mostly rightwards
    turn = 0.1 * z[:, 51, None]
    return np.stack([x * np.cos(turn) - y * np.sin(turn), x * np.sin(turn) + y * np.cos(turn)], -1)


def ink(path, z, luck):
    """Ink paths [N, POINTS, 2] with a round nib, sized and placed as in MNIST.  Returns uint8 [N, 28, 28]."""
    nib = np.clip(1.3 * np.exp(0.27 * z[:, 0, None]), 0.75, 2.4)          # radius in pixels
    low, high = path.min(1, keepdims=True), path.max(1, keepdims=True)
    box = 19.8 - 1.2 * luck[:, 1, None] ** 2
    scale = (box - 2 * nib) / (high - low).max(-1)                        # the longer side fills the box
    path = (path - (low + high) / 2) * scale[..., None]
    shift = -path.mean(1, keepdims=True) + 0.3 * z[:, None, 1:3]          # MNIST centres the mass,
    reach = 12.2 - nib[..., None] - np.abs(path).max(1, keepdims=True)    # but nothing leaves the frame
    path = path + np.clip(shift, -reach, reach)

    s = np.linspace(0, 1, POINTS)
    radius = nib * (1 + 0.15 * np.sin(2 * np.pi * ((0.5 + 2 * luck[:, 2, None]) * s + luck[:, 3, None])))
    # Squared distance minus squared radius, for all pixels and dots, is one matrix product:
    # |q - p|^2 - r^2 = [q.q, q.x, q.y, 1] . [1, -2 p.x, -2 p.y, p.p - r^2]
    qy, qx = np.mgrid[:28, :28].reshape(2, -1) - 13.5
    pixels = np.stack([qx**2 + qy**2, qx, qy, np.ones(784)], -1).astype(np.float32)
    dots = np.stack([np.ones_like(radius), -2 * path[..., 0], -2 * path[..., 1],
                     (path**2).sum(-1) - radius**2], 1).astype(np.float32)
    power = (pixels @ dots).min(-1)                                       # [N, 784], 0 on the outline
    outside = np.sqrt(np.maximum(power + nib**2, 0)) - nib                # pixels from the outline
    soft = 1.0 + 0.9 * luck[:, 4, None]
    grey = np.clip(0.5 - outside / soft, 0, 1) * np.minimum(1, 0.8 + 0.6 * luck[:, 5, None])
    return np.round(255 * grey).astype(np.uint8).reshape(-1, 28, 28)


def check(n, seed):
    if n < 0 or seed < 0:
        raise ValueError(f"n and seed must not be negative; got n={n}, seed={seed}")
