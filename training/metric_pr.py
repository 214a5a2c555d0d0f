"""Precision and recall by k-nearest-neighbour manifolds (Kynkäänniemi et al. 2019)."""

import numpy as np

NEIGHBOURS = 3
BLOCK = 2048  # rows at a time: two float64 blocks of 2,048 features and one of distances are 96 MiB


def squared_distances(x, y):
    """|x_i − y_j|² of two blocks of rows, float64 [N, M].

    By |x|² + |y|² − 2·x·y, whose rounding leaves about 1e-15·(|x|² + |y|²) for equal rows: anything
    below 1e-12 of it counts as zero, so that copies have the distance 0.
    """
    norms = np.square(x).sum(axis=1)[:, None] + np.square(y).sum(axis=1)
    d2 = norms - 2 * (x @ y.T)
    return np.where(d2 > 1e-12 * norms, d2, 0)


def blocks(x, size=BLOCK):
    """(slice, float64 copy) of consecutive rows: only one block at a time is held in double precision."""
    for start in range(0, len(x), size):
        rows = slice(start, min(start + size, len(x)))
        yield rows, x[rows].astype(np.float64)


def squared_radii(x, k=NEIGHBOURS, block=BLOCK):
    """Squared distance of every row of x to its k-th nearest other row: [N]."""
    radii = np.empty(len(x))
    for rows, a in blocks(x, block):
        nearest = np.full([len(a), k], np.inf)
        for columns, b in blocks(x, block):
            d2 = squared_distances(a, b)
            if rows == columns:
                np.fill_diagonal(d2, np.inf)
            nearest = np.partition(np.concatenate([nearest, d2], axis=1), k - 1, axis=1)[:, :k]
        radii[rows] = nearest.max(axis=1)
    return radii


def coverage(points, centres, radii2, block=BLOCK):
    """Fraction of `points` that lie in at least one ball: centre `centres[j]`, squared radius `radii2[j]`."""
    inside = np.zeros(len(points), dtype=bool)
    for rows, a in blocks(points, block):
        for columns, b in blocks(centres, block):
            inside[rows] |= (squared_distances(a, b) <= radii2[columns]).any(axis=1)
    return float(inside.mean())


def precision_recall(generated, real, k=NEIGHBOURS, block=BLOCK):
    """(precision, recall): how much of each set lies on the other's manifold.

    Args:
        generated, real: Features [N, D], [M, D], more than k rows each.
    """
    return (coverage(generated, real, squared_radii(real, k, block), block),
            coverage(real, generated, squared_radii(generated, k, block), block))


def score_pr(stats, ref, seed=0):
    """{'precision': …, 'recall': …} of two statistics with `features`."""
    precision, recall = precision_recall(stats['features'], ref['features'])
    return {'precision': precision, 'recall': recall}
