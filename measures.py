"""How close are two sets of images, and does one copy the other? Plain functions of arrays.

    frechet_distance(a, b)              two clouds of features as two Gaussians (gaussian_of)
    mean_distance(a, b, size)           its mean over sets of so many of a (in_sets)
    kernel_distance(a, b)               the same question without assuming Gaussians (KID)
    precision_recall(samples, real)     are the samples among the real ones, and vice versa?
    nearest(a, b)                       the two rows of b that each row of a is nearest to
    nearest_images(images, training)    the training images that each image is most like
    nearest_of_both(samples, held, ..)  those of samples and of held-out images
    copied_share(distances, held_out)   how many are closer to one than unseen images are
    copied_by_chance(num_held_out)      and how many unseen images would be
    single_share(distances)             how many are far closer to one than to any other
    share_sure(probabilities)           of how many is the classifier sure?
    fine_power(images)                  how much fine detail is there?
    psnr(images, reference)             how near is each pixel to what it should be?

Features are [N, D]; classifier.py makes them out of images.
"""

import math

import torch

SAME = 0.5 / 255  # half a grey level: a held-out image nearer to a training image is one
SURE = 0.9  # a classifier that gives so much to one class is called sure of it


def gaussian_of(features):
    """(mean [D], covariance [D, D]) in float64. ValueError for fewer than two."""
    if len(features) < 2:
        raise ValueError(f"a covariance needs at least two images, got {len(features)}")
    features = features.double()
    return features.mean(0), torch.cov(features.T)


def frechet_between(mean_a, cov_a, mean_b, cov_b):
    """The Frechet distance of two Gaussians, squared as is the custom (Dowson & Landau 1982; Heusel
    et al. 2017, eq. 6):  |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)).  0 for equal ones."""
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # C_a C_b has the eigenvalues of this matrix, which is symmetric: no complex numbers on the way.
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def frechet_distance(features, reference, repeats=20):
    """(distance, bootstrap error) of features [N, D] from reference features [M, D], or from what
    gaussian_of says of them.

    The error is the standard deviation over `repeats` draws of N of the features, with replacement
    (Efron 1979). Fewer images give a larger distance, so only equal numbers compare.
    """
    target = reference if isinstance(reference, tuple) else gaussian_of(reference)
    generator = torch.Generator().manual_seed(0)
    draws = [frechet_between(*gaussian_of(features[torch.randint(len(features), (len(features),),
                                                                 generator=generator)]), *target)
             for _ in range(repeats)]
    return frechet_between(*gaussian_of(features), *target), float(torch.tensor(draws).std())


def in_sets(measure, features, size):
    """The two numbers that `measure` finds in each of the disjoint sets of `size` features: [K, 2].
    """
    return torch.tensor([measure(part) for part in features.split(size) if len(part) == size],
                        dtype=torch.float64)


def mean_distance(features, reference, size):
    """(distance, error): the mean of frechet_distance over the disjoint sets of `size` features.

    So many images compare with `size` others, and their error is smaller than that of one set.
    """
    target = gaussian_of(reference)             # once, and not for each set
    distances, errors = in_sets(lambda part: frechet_distance(part, target), features, size).T
    return float(distances.mean()), float(errors.square().sum().sqrt() / len(errors))


def kernel_distance(features, reference, size=2000, parts=20):
    """(KID, its error): the squared distance of means in the space of a cubic kernel (Binkowski et
    al. 2018, eq. 3 and 4), of at most `size` of each. It does not grow with fewer images, and may
    be a little below zero.

    The error is the jackknife's (Efron & Stein 1981): from how much the distance moves when each of
    `parts` parts of both is left out in turn.
    """
    generator = torch.Generator().manual_seed(0)
    a, b = (x[torch.randperm(len(x), generator=generator)[:size]].double()
            for x in (features, reference))
    aa, bb, ab = ((x @ y.T / x.shape[1] + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))

    aa.fill_diagonal_(0)                        # nothing is compared with itself
    bb.fill_diagonal_(0)

    def distance(u, v):
        """Of some rows of a and b.  u, v: 1.0 for those that take part, else 0.0."""
        n, m = u.sum(), v.sum()
        return u @ aa @ u / (n * (n - 1)) + v @ bb @ v / (m * (m - 1)) - 2 * (u @ ab @ v) / (n * m)

    parts = min(parts, len(a), len(b))
    left_out = torch.stack([distance(*((torch.arange(len(x)) % parts != k).double()
                                       for x in (a, b))) for k in range(parts)])
    error = ((parts - 1) / parts * (left_out - left_out.mean()).square().sum()).sqrt()
    return float(distance(*(x.new_ones(len(x)) for x in (a, b)))), float(error)


def _inside(points, centres, k):
    """The share of points closer to some centre than its k-th neighbour among the centres is."""
    radii = torch.cat([torch.cdist(part, centres).kthvalue(k + 1).values
                       for part in centres.split(1000)])
    return float(torch.cat([(torch.cdist(part, centres) <= radii).any(1)
                            for part in points.split(1000)]).double().mean())


def precision_recall(features, reference, k=3):
    """(precision, recall), each 0 to 1 (Kynkaanniemi et al. 2019, eq. 1 and 2). Precision falls
    with bad samples, recall with missing variety. Of a larger reference as many are taken as there
    are samples, at random: a folder's first ones may be all of one kind."""
    order = torch.randperm(len(reference), generator=torch.Generator().manual_seed(0))
    reference = reference[order[:len(features)]]
    return _inside(features, reference, k), _inside(reference, features, k)


def share_sure(probabilities):
    """The share of images of whose class the classifier is sure. probabilities: [N, K]."""
    return float((probabilities.max(1).values > SURE).double().mean())


def fine_power(images):
    """The mean power of the fine half of the frequencies (fewer than four pixels to a wave) in
    uint8 images [N, C, H, W]. Blurred samples have less of it than real ones, speckled more."""
    cycles = [torch.fft.fftfreq(size) for size in images.shape[-2:]]
    fine = torch.hypot(cycles[0][:, None], cycles[1]) > 0.25
    power = sum(torch.fft.fft2(part.double(), norm="ortho").abs().square().sum((0, 1))
                for part in images.split(max(1, 2**22 // images[0].numel())))    # 0.1 GB at a time
    return float(power[fine].mean()) / (len(images) * images.shape[1])


def psnr(images, reference):
    """Peak signal-to-noise ratio in dB, of images [N, C, H, W] in [-1, 1], the mean over the
    images: 20 is poor, 30 good, at 40 hardly an error can be seen. Equal ones count as 100."""
    errors = (images - reference).square().mean((1, 2, 3))
    return float(10 * torch.log10(4 / errors.clamp(min=4e-10)).mean())


# ---- Copies

def _shifted(images, pixels=1):
    """The images moved by up to `pixels` in each direction, unmoved first; the border repeats."""
    padded = torch.nn.functional.pad(images, (pixels,) * 4, mode="replicate")
    reach = range(-pixels, pixels + 1)
    moves = sorted((abs(i) + abs(j), i, j) for i in reach for j in reach)
    height, width = images.shape[-2:]
    for _, i, j in moves:
        yield padded[..., pixels + i:pixels + i + height, pixels + j:pixels + j + width]


def nearest(queries, references):
    """(distances [2, N], indices [2, N]) of the closest and the second closest row of references
    [M, D] to each of queries [N, D]; those in uint8 count as 0 to 1."""
    distances, indices = [], []
    for start in range(0, len(references), 20_000):
        block = references[start:start + 20_000]
        if block.dtype == torch.uint8:          # not all at once: that is four times as much
            block = block.float() / 255
        found = [torch.cdist(part, block).topk(min(2, len(block)), largest=False)
                 for part in queries.split(1000)]
        distances.append(torch.cat([values for values, _ in found]))
        indices.append(torch.cat([places for _, places in found]) + start)
    best, pick = torch.cat(distances, dim=1).topk(min(2, len(references)), largest=False)   # [N, 2]
    return best.T, torch.cat(indices, dim=1).gather(1, pick).T


def in_positions(images, positions):
    """The images [N, C, H, W] as they are, and in the other positions in which a training may have
    shown them. positions: 1; 2: mirrored, too (--flip), 8: and turned by quarters (--turn)."""
    views = [images, images.flip(-1)][:positions]
    turns = range(4 if positions == 8 else 1)
    return [view.rot90(k, (-2, -1)) for k in turns for view in views]


def nearest_images(images, training, positions=1):
    """(distances [2, N], indices [2, N]) of the most similar training image, which may have been
    moved by one pixel, and of the second.

    images, training: uint8 [N, C, H, W].  positions: in which to look at each, see in_positions.
    The distance is the root of the mean squared difference, 0 to 1.
    """
    flat = training.flatten(1)
    variants = [image for view in in_positions(images, positions)
                for image in _shifted(view.float() / 255)]
    found = [nearest(variant.flatten(1), flat) for variant in variants]
    distances, indices = (torch.cat(parts) for parts in zip(*found))            # [2 * variants, N]
    first, pick = distances.min(0)
    index = indices.gather(0, pick[None])                                       # [1, N]
    # The second is the closest of the other training images.
    second, other = distances.masked_fill(indices == index, math.inf).min(0)
    return (torch.stack([first, second]) / flat.shape[1] ** 0.5,
            torch.cat([index, indices.gather(0, other[None])]))


def nearest_of_both(samples, held, training, positions=1):
    """nearest_images of samples and of held-out images, the yardstick: ((distances [2, N], indices
    [2, N]), distances [2, M] of the held-out ones, which of those count [M]). Images that the
    training set has, too, do not count, unless there are no others."""
    distances, _ = nearest_images(held, training, positions)
    in_both = distances[0] <= SAME
    return nearest_images(samples, training, positions), distances, ~in_both | in_both.all()


def copy_limit(num_held_out):
    """Which of the held-out images, counted from the closest one to a training image, is the limit
    for a copy: one in 200, and of fewer the first."""
    return 1 + (num_held_out - 1) // 200


def copied_share(distances, held_out):
    """The share of images closer to a training image than all but 0.5 % of the held-out images.

    Clearly more than copied_by_chance means that training images were learnt by heart.
    """
    limit = held_out.kthvalue(copy_limit(len(held_out))).values
    return float((distances < limit).double().mean())


def copied_by_chance(num_held_out):
    """copied_share of images that the training set knows nothing of, as one may expect it: 0.5 %
    where the held-out images are many, but 2.1 % beside 47, the closest of which then is the limit.

    The k-th smallest of N draws has k / (N + 1) of its distribution below it on average, whatever
    that is (David & Nagaraja 2003, section 2.1).
    """
    return copy_limit(num_held_out) / (num_held_out + 1)


def single_share(distances):
    """The share of images that are less than a third as far from one training image as from any
    other: the usual measure of what was learnt by heart (Yoon et al. 2023). Plain images, which are
    near to many, do not count, nor do copies of what the training set has twice.
    distances: [2, N], of the two nearest.
    """
    return float((distances[0] < distances[1] / 3).double().mean())
