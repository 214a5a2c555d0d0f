"""Kernel Inception Distance (Bińkowski et al. 2018): unbiased squared MMD with a cubic kernel, over subsets."""

import numpy as np

NUM_SUBSETS = 100
SUBSET_SIZE = 1000


def kernel(x, y):
    """(x·y/d + 1)³ of every pair of rows: [N, d], [M, d] → [N, M]."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def mmd2_unbiased(x, y):
    """Unbiased estimate of the squared maximum mean discrepancy of two sets of rows; can be negative."""
    def mean_of_pairs(k):
        return (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))
    return mean_of_pairs(kernel(x, x)) + mean_of_pairs(kernel(y, y)) - 2 * kernel(x, y).mean()


def kernel_distance(x, y, seed=0, num_subsets=NUM_SUBSETS, subset_size=SUBSET_SIZE):
    """(mean, standard deviation) of `mmd2_unbiased` over random subsets, computed in float64.

    The paper leaves the draws open; here each subset draws its rows of `x`, then of `y`, without
    replacement from RandomState(seed).

    Args:
        x, y: Features [N, d], [M, d] with N, M ≥ subset_size.
    """
    rng = np.random.RandomState(seed % (1 << 31))
    values = []
    for _ in range(num_subsets):
        rows = [rng.choice(len(f), subset_size, replace=False) for f in (x, y)]
        values.append(mmd2_unbiased(*(f[r].astype(np.float64) for f, r in zip((x, y), rows))))
    return float(np.mean(values)), float(np.std(values))


def score_kid(stats, ref, seed=0):
    """{'KID': mean, 'KID_std': standard deviation} of two statistics with `features`."""
    mean, std = kernel_distance(stats['features'], ref['features'], seed)
    return {'KID': mean, 'KID_std': std}
