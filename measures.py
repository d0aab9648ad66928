"""How close are two sets of images, and does one copy the other? Plain functions of arrays.

    frechet_distance(a, b)              two clouds of features as two Gaussians: mean and spread
    kernel_distance(a, b)               the same question without assuming Gaussians (KID)
    precision_recall(samples, real)     are the samples among the real ones, and the real among the samples?
    nearest(images, training)           the training image that each image is most like
    copied_share(distances, held_out)   how many are suspiciously close to one

Features are [N, D]; classifier.py makes them out of images.
"""

import torch


def gaussian_of(features):
    """(mean [D], covariance [D, D]) in float64."""
    features = features.double()
    return features.mean(0), torch.cov(features.T)


def frechet_between(mean_a, cov_a, mean_b, cov_b):
    """The Frechet distance of two Gaussians, squared as is the custom (Dowson & Landau 1982; Heusel et al. 2017,
    eq. 6):  |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)).  0 for equal ones."""
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # C_a C_b has the eigenvalues of this matrix, which is symmetric: no complex numbers on the way.
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def frechet_distance(features, reference, repeats=20):
    """(distance, bootstrap error) of features [N, D] from reference features [M, D].

    The error is the standard deviation over `repeats` draws of N of the features, with replacement
    (Efron 1979). Fewer images give a larger distance, so only equal numbers compare.
    """
    if len(features) < 2 or len(reference) < 2:
        raise ValueError(f"a covariance needs at least two images, got {len(features)} and {len(reference)}")
    target = gaussian_of(reference)
    generator = torch.Generator().manual_seed(0)
    draws = [frechet_between(*gaussian_of(features[torch.randint(len(features), (len(features),),
                                                                 generator=generator)]), *target)
             for _ in range(repeats)]
    return frechet_between(*gaussian_of(features), *target), float(torch.tensor(draws).std())


def kernel_distance(features, reference, size=1000, repeats=20):
    """(KID, its standard error): the squared distance of means in the space of a cubic kernel (Binkowski et al.
    2018, eq. 3 and 4), over `repeats` draws of `size` from each. It may be a little below zero."""
    size = min(size, len(features), len(reference))
    generator = torch.Generator().manual_seed(0)
    values = []
    for _ in range(repeats):
        a, b = (x[torch.randperm(len(x), generator=generator)[:size]].double() for x in (features, reference))
        aa, bb, ab = ((x @ y.T / x.shape[1] + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
        within = (aa.sum() - aa.trace() + bb.sum() - bb.trace()) / (size * (size - 1))     # without itself
        values.append(within - 2 * ab.mean())
    values = torch.stack(values)
    return float(values.mean()), float(values.std() / repeats**0.5)


def _inside(points, centres, k):
    """The share of points that lie closer to some centre than that centre's k-th neighbour among the centres."""
    radii = torch.cat([torch.cdist(part, centres).kthvalue(k + 1).values for part in centres.split(1000)])
    return float(torch.cat([(torch.cdist(part, centres) <= radii).any(1) for part in points.split(1000)])
                 .double().mean())


def precision_recall(features, reference, k=3):
    """(precision, recall), each 0 to 1 (Kynkaanniemi et al. 2019, eq. 1 and 2). Precision falls with bad samples,
    recall with missing variety. Equal numbers of both, please: the first N of the reference are taken."""
    reference = reference[:len(features)]
    return _inside(features, reference, k), _inside(reference, features, k)


# ---- Copies

def _shifted(images, pixels=1):
    """The images moved by up to so many pixels in each direction, unmoved first; the border repeats."""
    padded = torch.nn.functional.pad(images, (pixels,) * 4, mode="replicate")
    reach = range(-pixels, pixels + 1)
    moves = sorted((abs(i) + abs(j), i, j) for i in reach for j in reach)
    height, width = images.shape[-2:]
    for _, i, j in moves:
        yield padded[..., pixels + i:pixels + i + height, pixels + j:pixels + j + width]


def nearest(queries, references):
    """(distances [N], indices [N]) of the closest row of references [M, D] to each of queries [N, D]."""
    found = [torch.stack([torch.stack(torch.cdist(part, block).min(1)) for block in references.split(20_000)])
             for part in queries.split(1000)]
    distances, indices = torch.cat(found, dim=2).unbind(1)                      # each [blocks, N]
    best = distances.argmin(0)
    pick = torch.arange(len(queries))
    return distances[best, pick], indices[best, pick].long() + best * 20_000


def nearest_images(images, training, mirrored=False):
    """(distances [N], indices [N]) of the most similar training image, which may have been moved by one pixel.

    images, training: uint8 [N, C, H, W].  mirrored: look at the mirror images, too (training with flips).
    The distance is the root of the mean squared difference, 0 to 1.
    """
    flat = training.flatten(1).float() / 255
    variants = [image for view in ([images, images.flip(-1)] if mirrored else [images])
                for image in _shifted(view.float() / 255)]
    found = [nearest(variant.flatten(1), flat) for variant in variants]
    distances = torch.stack([d for d, _ in found])
    best, pick = distances.argmin(0), torch.arange(len(images))
    indices = torch.stack([i for _, i in found])[best, pick]
    return distances[best, pick] / flat.shape[1] ** 0.5, indices


def copied_share(distances, held_out, quantile=0.005):
    """The share of images that are closer to a training image than all but `quantile` of the held-out images.

    About `quantile` for images that the training set knows nothing of; more means that it was learnt by heart.
    """
    return float((distances < torch.quantile(held_out, quantile)).double().mean())
