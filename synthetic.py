"""Digits and fabrics drawn by code: data sets that need no download and never run out.

    python synthetic.py                     # writes a sheet of each into outputs/

    from synthetic import digits, fabrics
    images, labels = digits(10_000)         # uint8 [10000, 1, 28, 28], a few seconds
    images, labels = fabrics(10_000)        # uint8 [10000, 3, 64, 64], about half a minute

Image i of seed s depends on (s, i) and nothing else, so digits(100) is the beginning of
digits(10_000), and the global random generators are never touched.

A digit is a pen path: a few control points joined by a smooth curve, bent and slanted the way
hands do, then inked with a round nib. A fabric is a map that says which of five dyes each point
of the cloth has, then coloured, woven and lit.
"""

import numpy as np
import torch
from tqdm import tqdm

from command_line import Parser, command, make_output_dir, seed_number
from distributed import speaks
from images import save_images, to_signed

# The ways of writing each digit: (how common, path). A path is "x,y" points in a box of about
# 100 x 100, y downwards; "*" after an inner point makes it a corner, "/" lifts the pen.
DIGITS = {
    0: [(4, "50,0 22,12 10,50 24,88 50,100 76,88 90,50 78,12 50,0"),
        (3, "62,6 40,2 15,25 10,60 28,95 55,98 82,72 86,35 70,8 48,4 38,14"),
        (2, "45,4 20,20 10,55 25,92 52,98 80,75 85,35 68,10 55,8")],
    1: [(8, "50,0 50,50 50,100"),
        (2, "32,20 52,0* 52,50 52,100"),
        (2, "34,18 54,0* 54,50 52,98 / 26,99 52,98 78,99")],
    2: [(3, "15,25 30,5 60,2 80,22 68,50 40,78 12,98* 45,96 88,98"),
        (3, "15,25 30,5 60,2 78,22 62,55 35,85 14,94 10,84 22,78 45,88 70,98 92,90"),
        (3, "12,30 25,6 55,0 76,16 72,48 50,80 22,96 6,86 14,66 40,66 66,84 94,94"),
        (2, "15,12 45,3 80,8 70,35 40,68 10,95* 50,92 92,95"),
        (2, "22,30 22,12 48,0 74,12 74,38 50,68 15,98* 88,98")],
    3: [(3, "15,12 40,0 72,10 70,35 38,46* 72,56 80,80 50,100 12,88"),
        (3, "15,15 42,0 74,14 66,38 40,46 48,50 74,58 80,80 50,100 10,86"),
        (1, "15,4 75,4* 42,42* 72,52 82,76 55,99 12,90"),
        (2, "10,10 50,0 78,12 60,34 30,44* 70,48 86,70 60,96 8,98"),
        (2, "20,8 55,0 76,14 58,36 44,42 70,58 74,80 44,100 14,94"),
        (2, "26,20 34,3 58,0 72,16 62,38 44,46* 66,54 74,76 58,98 34,98 16,82"),
        (2, "18,15 45,0 74,15 62,38 38,48 34,42 50,44 76,60 76,86 45,100 10,86")],
    4: [(3, "25,3 18,30 12,55* 50,54 90,52 / 72,5 66,50 60,100"),
        (3, "20,5 12,40 20,58 50,56 78,48 / 75,2 72,50 68,100"),
        (1, "62,2 35,30 8,66* 50,66 92,64 / 62,2 62,50 60,100"),
        (1, "72,8 38,28 12,56* 45,58 80,50 / 76,4 70,50 62,100"),
        (2, "18,8 15,45* 70,45 / 70,8 68,60 64,100")],
    5: [(3, "80,3 28,3* 22,42* 50,36 78,52 78,80 48,100 12,88"),
        (3, "30,8 24,45* 52,40 78,56 76,84 45,99 12,92 / 30,6 60,5 92,2"),
        (2, "100,0 40,6* 28,36* 52,38 66,56 58,82 34,98 8,92"),
        (2, "82,5 45,8 24,26 40,46 68,58 72,80 45,98 10,92"),
        (2, "88,0 40,8* 30,42 58,48 66,70 48,92 8,100")],
    6: [(3, "62,0 32,28 14,64 26,94 56,98 76,76 60,54 34,60 18,78"),
        (3, "48,0 22,35 14,72 35,98 68,92 76,68 55,54 26,66 18,80"),
        (2, "70,2 40,30 18,66 30,96 60,95 72,72 52,58 22,74"),
        (2, "88,0 45,30 18,66 30,96 60,92 66,72 44,64 22,80"),
        (2, "50,0 18,40 12,76 38,100 78,86 78,56 48,46 20,60 14,72")],
    7: [(4, "10,8 45,6 82,4* 62,45 42,100"),
        (3, "12,15 20,5 50,5 80,4 84,14 60,50 48,100"),
        (2, "10,8 45,6 82,4* 62,45 42,100 / 30,52 80,48"),
        (3, "12,28 14,6* 50,8 82,4* 55,50 45,100")],
    8: [(4, "74,12 48,0 22,14 28,38 58,54 80,76 54,100 22,82 36,58 68,38 78,14"),
        (3, "84,6 52,0 26,14 34,36 62,56 66,82 44,100 28,84 44,58 68,34 88,8"),
        (3, "50,48 22,28 30,4 50,0 72,6 74,28 50,48 22,70 22,92 50,100 78,92 76,68 50,48"),
        (1, "50,46 26,38 24,10 50,0 76,10 74,38 50,46 22,58 18,86 50,100 80,86 78,58 50,46")],
    9: [(3, "76,14 50,0 20,12 16,38 40,52 70,36 78,10* 74,55 70,100"),
        (2, "76,16 52,0 22,12 18,40 44,52 74,34 78,10 78,55 68,90 40,100 16,88"),
        (3, "74,10 42,4 18,28 26,48 52,44 76,14* 62,60 46,100"),
        (3, "80,20 55,0 22,10 12,40 36,60 66,50 80,20 76,60 66,100"),
        (2, "68,12 40,6 18,24 20,42 44,48 66,26 70,8* 70,50 66,100"),
        (2, "70,10 40,2 18,26 34,50 64,38 74,8 70,50 58,98")],
}
CONTROLS = 18                               # no path has more control points than this
POINTS = 80                                 # dots of ink along a path: less than a pixel apart

# What differs from hand to hand: standard normal draws of these shapes, one set per image.
HAND = {"tremor": (CONTROLS, 2), "lift": (3, 2), "wave": (2, 4), "balance": 1, "width": 1,
        "slant": 1, "turn": 1, "nib": 1, "pressure": 2, "size": 1, "place": 2, "edge": 1}


def pen_path(text):
    """Read one path of DIGITS.

    The curve is a Catmull-Rom spline: it passes through its control points and is linear in
    them, curve = basis @ control. So moving control points costs one matrix product, for many
    digits at once.

    Returns (control [CONTROLS, 2] in 0..1, basis [POINTS, CONTROLS], stroke [CONTROLS], the
    number of pen lifts before each control point); unused control points are zero.
    """
    control, stroke = np.zeros((CONTROLS, 2)), np.zeros(CONTROLS, int)
    k, basis, travelled = 0, [], []
    for lifts, words in enumerate(text.split("/")):
        curves = [[]]
        for word in words.split():
            control[k], stroke[k] = np.array(word.strip("*").split(","), float) / 100, lifts
            curves[-1].append(k)
            if word.endswith("*"):
                curves.append([k])          # a corner ends one smooth curve and starts another
            k += 1
        rows = np.concatenate([catmull_rom(knots) for knots in curves])
        steps = np.linalg.norm(np.diff(rows @ control, axis=0), axis=1)
        basis.append(rows)
        travelled.append(np.append(0, steps))       # the leap between strokes leaves no ink
    travelled = np.cumsum(np.concatenate(travelled))
    even = np.searchsorted(travelled, np.linspace(0, travelled[-1], POINTS) - 1e-9)
    return control, np.concatenate(basis)[even], stroke


def catmull_rom(knots):
    """Weights [60 spans, CONTROLS] of the spline through the control points `knots`."""
    eye = np.eye(CONTROLS)[knots]
    # phantom points that run straight on at both ends
    eye = np.concatenate([2 * eye[:1] - eye[1:2], eye, 2 * eye[-1:] - eye[-2:-1]])
    s = np.linspace(0, 1, 60)[:, None]
    return np.concatenate([(-s**3 + 2 * s**2 - s) * a + (3 * s**3 - 5 * s**2 + 2) * b
                           + (-3 * s**3 + 4 * s**2 + s) * c + (s**3 - s**2) * d
                           for a, b, c, d in zip(eye, eye[1:], eye[2:], eye[3:])]) / 2


def digits(n: int = 10_000, seed: int = 0):
    """Handwritten-looking digits, bright on black like MNIST; image i shows the digit i % 10.

    n: how many.  seed: any integer >= 0.
    Returns (images uint8 [n, 1, 28, 28], labels int64 [n]).
    Raises ValueError if n or seed is negative.
    """
    table = [(digit, common, pen_path(path))
             for digit, ways in DIGITS.items() for common, path in ways]
    control, basis, stroke = (np.stack(parts) for parts in zip(*(path for _, _, path in table)))
    choices = [[k for k, (digit, common, _) in enumerate(table) if digit == d
                for _ in range(common)] for d in range(10)]

    labels = np.arange(n) % 10
    images = np.empty((n, 1, 28, 28), np.uint8)
    for start in range(0, n, 250):          # the distances of 250 images fill 63 MB
        ways, hands = [], []
        for i in range(start, min(start + 250, n)):
            rng = np.random.default_rng([seed, i])
            ways.append(rng.choice(choices[i % 10]))
            hands.append({name: rng.standard_normal(shape) for name, shape in HAND.items()})
        # two sigma is odd enough: a 3 both very wide and very slanted is a blot
        hand = {name: np.stack([h[name] for h in hands]).clip(-2, 2) for name in HAND}
        path = handwriting(control[ways], basis[ways], stroke[ways], hand)
        images[start:start + 250, 0] = ink(path, hand)
    return torch.from_numpy(images), torch.from_numpy(labels)


def handwriting(control, basis, stroke, hand):
    """Bend N clean paths the way hands do.

    control, basis, stroke: as from `pen_path`, stacked.  hand: N draws of every row of HAND.
    Returns paths [N, POINTS, 2], about 1 high, y downwards.
    """
    control = control + 0.034 * hand["tremor"]
    control = control + 0.025 * np.take_along_axis(hand["lift"], stroke[..., None], 1)
    x, y = np.moveaxis(basis @ control - 0.5, -1, 0)                      # each [N, POINTS]
    for angle, phase, dx, dy in np.moveaxis(hand["wave"], 0, -1)[..., None]:
        wave = np.sin(4 * (x * np.cos(2 * angle) + y * np.sin(2 * angle)) + 3 * phase)
        x, y = x + 0.04 * dx * wave, y + 0.03 * dy * wave                 # a wave exceeds the digit
    y = y + 0.2 * hand["balance"] * (y**2 - 0.25)                         # head or belly larger
    x = x * 0.8 * np.exp(0.24 * hand["width"])
    x = x - y * (0.18 + 0.23 * hand["slant"])                             # most hands lean right
    cos, sin = np.cos(0.1 * hand["turn"]), np.sin(0.1 * hand["turn"])
    return np.stack([x * cos - y * sin, x * sin + y * cos], -1)


def ink(path, hand):
    """Ink N paths with a round nib, sized and placed as in MNIST.  Returns uint8 [N, 28, 28]."""
    nib = 1.3 * np.exp(0.27 * hand["nib"])                                # radius, 0.76 to 2.23 px
    low, high = path.min(1), path.max(1)
    box = 19.8 - 0.4 * np.abs(hand["size"])                               # MNIST fits a 20x20 box,
    scale = (box - 2 * nib) / (high - low).max(-1, keepdims=True)
    path = (path - (low + high)[:, None] / 2) * scale[..., None]
    shift = 0.3 * hand["place"] - path.mean(1)                            # centres the mass of ink,
    room = 12.2 - nib - np.abs(path).max(1)                               # and stays in the frame
    path = path + np.clip(shift, -room, room)[:, None]

    # Distance from every pixel to the nearest dot of ink. Squared distance minus squared radius
    # is one matrix product: |q - p|^2 - r^2 = [q.q, q_x, q_y, 1] . [1, -2 p_x, -2 p_y, p.p - r^2]
    speed, phase = 2 * hand["pressure"][:, :1], 3 * hand["pressure"][:, 1:]
    radius = nib * (1 + 0.15 * np.sin(speed * np.linspace(0, np.pi, POINTS) + phase))
    q_y, q_x = np.mgrid[:28, :28].reshape(2, -1) - 13.5
    pixels = np.stack([q_x**2 + q_y**2, q_x, q_y, np.ones(784)], -1)
    dots = np.stack([np.ones_like(radius), -2 * path[..., 0], -2 * path[..., 1],
                     (path**2).sum(-1) - radius**2], 1)
    power = (pixels.astype(np.float32) @ dots.astype(np.float32)).min(-1)           # [N, 784]
    outside = np.sqrt(np.maximum(power + nib**2, 0)) - nib                # pixels from the outline
    edge = 1.2 + 0.2 * hand["edge"]                                       # px it fades over
    grey = np.clip(0.5 - outside / edge, 0, 1)
    return np.round(255 * grey).astype(np.uint8).reshape(-1, 28, 28)


# Dyes that belong together, darkest first.
PALETTES = [palette.split() for palette in (
    "101030 1d2f6f 3f6fb5 a8c8e6 f4f1e4",   # indigo
    "1a1020 8c1c3a d8432f f29f1f f7e6b5",   # wax print
    "14110f 0f6b3a c8202c f5b81c f8efcf",   # kente
    "22140c 6b3418 b5682a dba45a f2e2c0",   # earth
    "120e0d 2e2420 5b4636 cdbb9a efe6d2",   # mudcloth
    "2a0f3d 7a1f7d e0308c f79b3b fdf0c8",   # orchid
    "0b2b33 0e6f73 2bb3a3 f0b23c fbeed5",   # lagoon
    "102a16 2f6b1e 8fb82a f2d822 fffbe0",   # lime
    "1b0d12 6e1423 b3263a e8879a fbe4e0",   # rose
    "0d1b2a 14549c 19a0c9 e9502f ffe9c9",   # harbour
    "20123a 3b3fa0 8a5cc9 f0c419 f3f3f3",   # iris
    "25100a 9c3a10 ef7d1a 2a8f86 f6e9d0",   # rust
)]


def fold(x):
    """A triangle wave: 0 at even x, 1 at odd x.  Folding a plane mirrors what is drawn on it."""
    return np.abs((x + 1) % 2 - 1)


def run_of_dyes(rng, *shape):
    """Random dyes 0..4 of which neighbours along the first axis always differ."""
    return rng.integers(1, 5, shape).cumsum(0) % 5


def figure(kind, s, t, fine):
    """A small woven figure: stripes, bars, checks, a stepped diamond or a cross.

    kind: 0..4, one or an array.  s, t in 0..1.  fine: its number of threads.  Returns values 0..2.
    """
    steps = 2 * fine + 1
    a, b = np.abs(np.floor(s * steps) - fine), np.abs(np.floor(t * steps) - fine)
    stripes, bars = (2 * fine * s).astype(int), (2 * fine * t).astype(int)
    check = (stripes // 2 + bars // 2) % 2
    diamond = ((a + b) // 2 % 3).astype(int)
    cross = (np.minimum(a, b) < fine / 3).astype(int) + (np.maximum(a, b) < fine / 2)
    return np.choose(kind, [stripes % 2, bars % 3, check, diamond, cross])


def strips(rng, x, y):
    """Kente: narrow strips sewn side by side, each with its own run of blocks."""
    x = rng.integers(3, 9) * x
    strip = np.floor(x).astype(int) % 16
    y = y * rng.integers(2, 6) * rng.choice([1, 1, 2], 16)[strip] + rng.random(16)[strip]
    block = np.floor(y).astype(int)
    kinds = rng.integers(0, 5, (4, 2))[strip % rng.integers(2, 5), block % rng.integers(1, 3)]
    dyes = run_of_dyes(rng, 3, 2, 5)
    value = figure(kinds, x % 1, y % 1, rng.integers(2, 5))
    return np.where(x % 1 < 0.06, 0, dyes[value, strip % rng.integers(1, 3), kinds])  # 0: the seam


def checks(rng, x, y):
    """Blocks of four woven figures, two by two."""
    size = rng.integers(2, 6)
    x, y = size * x, size * y
    four = rng.permutation(5)[:4].reshape(2, 2)
    kind = four[np.floor(x).astype(int) % 2, np.floor(y).astype(int) % 2]
    return run_of_dyes(rng, 3, 5)[figure(kind, x % 1, y % 1, rng.integers(3, 7)), kind]


def diamonds(rng, x, y):
    """Nested diamonds, sharp or round."""
    a, b = fold(rng.integers(3, 8) * x), fold(rng.integers(3, 8) * y)
    level = (a + b) / 2 if rng.random() < 0.7 else 0.6 * np.maximum(a, b) + 0.4 * np.minimum(a, b)
    rings, repeat = rng.integers(3, 8), rng.integers(2, 6)
    return rng.permutation(5)[(rings * level).astype(int) % repeat]


def zigzags(rng, x, y):
    """Chevron bands of different widths."""
    bands = np.repeat(run_of_dyes(rng, 14), rng.integers(1, 4, 14))[:rng.integers(9, 28)]
    y = y + rng.uniform(0.05, 0.3) * fold(rng.integers(3, 9) * x)
    return bands[(y / rng.uniform(0.4, 1.0) % 1 * len(bands)).astype(int)]


def lattice(rng, x, y, size):
    """Cut the plane into cells, in rows or like bricks.  Returns cell coordinates in -0.5..0.5."""
    y = size * y + rng.random()
    x = size * x + rng.random() + 0.5 * (np.floor(y) % 2) * (rng.random() < 0.6)
    return x % 1 - 0.5, y % 1 - 0.5


def dots(rng, x, y):
    """Ringed dots, with small ones between."""
    x, y = lattice(rng, x, y, rng.integers(2, 8))
    rings = np.sort(rng.uniform(0.08, 0.48, rng.integers(1, 5)))
    rings[-1] = max(rings[-1], 0.22)
    dyes = rng.permutation(5)
    small = np.hypot(fold(2 * x + 1), 2 * y) < rng.uniform(0, 0.25)
    return np.where(small, dyes[4], dyes[len(rings) - np.searchsorted(rings, np.hypot(x, y))])


def medallions(rng, x, y):
    """The great petalled suns of wax prints."""
    x, y = lattice(rng, x, y, rng.choice([1, 1.5, 2, 3]))
    edges = np.sort(rng.uniform(0.06, 0.5, rng.integers(3, 7)))
    edges[-1] = max(edges[-1], 0.4)
    ring = np.searchsorted(edges, np.hypot(x, y))
    petals = 2 * rng.integers(3, 13, 7) * (np.arange(7) < len(edges))     # none outside the rings
    petal = fold(petals[ring] * np.arctan2(y, x) / np.pi) > rng.uniform(0.3, 0.7)
    return run_of_dyes(rng, 2, 7)[petal.astype(int), ring]


def mudcloth(rng, x, y):
    """Bogolan: pale hand-drawn marks, row by row, on a dark cloth."""
    x, y = rng.integers(3, 7) * x, rng.integers(3, 8) * y
    row = np.floor(y).astype(int)
    s, t = x % 1 - 0.5, y % 1 - 0.5
    a, b, r = np.abs(s), np.abs(t), np.hypot(s, t)
    marks = [np.abs(a - b), np.minimum(a, b), np.abs(a + b - 0.5),    # distance to x, +, diamond,
             np.abs(r - 0.28), r - 0.06, fold(4 * s) / 4,             # ring, dot, strokes,
             np.abs(t + 0.25 - 0.5 * fold(2 * s))]                    # zigzag
    line = (np.choose(rng.integers(0, 7, 8)[row % rng.integers(1, 5)], marks)
            < rng.uniform(0.05, 0.12))
    rule = (b > 0.46) & (rng.random() < 0.6)
    dark, band, pale = rng.integers(0, 2), rng.integers(0, 3), rng.integers(3, 5)
    return np.where(line | rule, pale, np.where(row % 4 == 0, band, dark))


def mirrors(rng, x, y):
    """A free drawing folded into a symmetric repeat, with the dark outlines of batik."""
    size = rng.integers(2, 5)
    x, y = fold(size * x), fold(size * y)
    if rng.random() < 0.5:
        x, y = np.maximum(x, y), np.minimum(x, y)                         # fold the diagonal too
    level = rng.random()
    for angle, phase, k in rng.uniform([0, 0, 3], [6.28, 6.28, 11], (6, 3)):
        level = level + 1.2 * np.sin(k * (x * np.cos(angle) + y * np.sin(angle)) + phase) / k**0.5
    dyes, repeat = rng.permutation(5), rng.integers(3, 6)
    return np.where(level % 1 < 0.14, 0, dyes[np.floor(level).astype(int) % repeat])


FAMILIES = {"strips": strips, "diamonds": diamonds, "zigzags": zigzags, "dots": dots,
            "medallions": medallions, "checks": checks, "mudcloth": mudcloth, "mirrors": mirrors}
FABRIC_FAMILIES = tuple(FAMILIES)           # label k is the family FABRIC_FAMILIES[k]


def fabrics(n: int = 10_000, seed: int = 0):
    """Woven and printed cloth in colour; image i belongs to family i % len(FABRIC_FAMILIES).

    n: how many.  seed: any integer >= 0.
    Returns (images uint8 [n, 3, 64, 64], labels int64 [n]).
    Raises ValueError if n or seed is negative.
    """
    labels = np.arange(n) % len(FABRIC_FAMILIES)
    images = np.empty((n, 3, 64, 64), np.uint8)
    for i in tqdm(range(n), desc="drawing fabrics", unit="image", disable=n < 2000 or not speaks()):
        images[i] = cloth(np.random.default_rng([seed, i]), FAMILIES[FABRIC_FAMILIES[labels[i]]])
    return torch.from_numpy(images), torch.from_numpy(labels)


def cloth(rng, family, size=64):
    """One piece of cloth, uint8 [3, size, size].  family: (rng, x, y) -> dyes 0..4."""
    y, x = np.mgrid[:2 * size, :2 * size] / (2 * size)       # four samples a pixel: smooth edges
    turn = np.pi / 4 * rng.choice([0, 0, 0, 1, 2]) + 0.04 * rng.normal()
    sag_x, sag_y = (0.015 * np.sin(2 * np.pi * (along + rng.random()))
                    for along in (y[:, :1], x[:1]))
    u = x * np.cos(turn) - y * np.sin(turn) + sag_x + 4      # 4: families may count on u, v > 0
    v = x * np.sin(turn) + y * np.cos(turn) + sag_y + 4
    dye = family(rng, u, v)
    if rng.random() < 0.4:                                   # wax prints have speckled grounds
        one, other = rng.permutation(5)[:2]
        fine = rng.integers(18, 30)
        dye = np.where((dye == one) & (fold(fine * u) * fold(fine * v) > 0.4), other, dye)

    palette = PALETTES[rng.integers(len(PALETTES))]
    palette = np.array([list(bytes.fromhex(colour)) for colour in palette]) / 255
    # no two dye baths are alike
    palette = palette * rng.normal(1, 0.08, (5, 3)) + rng.normal(0, 0.02, (5, 3))
    image = palette.astype(np.float32)[dye]                  # [2 size, 2 size, 3]
    image = (image[::2, ::2] + image[1::2, ::2] + image[::2, 1::2] + image[1::2, 1::2]) / 4

    x, y = x[::2, ::2], y[::2, ::2]                          # from here one pixel is one thread
    warp, weft = rng.normal(1, 0.04, (2, size))
    over = 1 + 0.03 * (-1) ** np.add.outer(np.arange(size), np.arange(size))
    a, b, c, d = rng.normal(size=4)
    light = 1 + 0.08 * a * np.sin(4 * (b * x + c * y) + d)   # soft folds
    shade = np.outer(weft, warp) * over * light + rng.normal(0, 0.02, (size, size))
    return (np.round(255 * np.clip(image * shade[..., None], 0, 1))
            .astype(np.uint8).transpose(2, 0, 1))


@command
def main(argv=None):
    parser = Parser(description="Draw sheets of 100 synthetic digits and 100 synthetic fabrics.")
    parser.add("--output_dir", "where the sheets go", "outputs")
    parser.add("--seed", "image i of a seed is always the same", 0, type=seed_number)
    args = parser.parse_args(argv)
    folder = make_output_dir(args.output_dir)
    for name, draw, zoom in (("digits", digits, 4), ("fabrics", fabrics, 2)):
        path = folder / f"synthetic_{name}.png"
        images = draw(100, args.seed)[0]
        save_images(to_signed(images), path, columns=10, padding=0, upscale=zoom)
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
