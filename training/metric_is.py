"""Inception Score (Salimans et al. 2016): exp of the mean KL divergence of p(y|x) from p(y), over splits."""

import numpy as np

NUM_SPLITS = 10


def score_is(stats, ref=None, seed=0):
    """{'IS': mean, 'IS_std': standard deviation} over consecutive splits of the images.

    A split's sums are all that is needed: mean KL = mean Σ_y p·ln p − Σ_y p̄·ln p̄, with p̄ the split's mean. Images
    sorted by class, as data sets often are, score far too low, because each split then shows one class.

    Args:
        stats: `split_count` [S], `split_p` [S, K]: sums of probabilities, `split_plogp` [S]: sums of
            Σ_y p·ln p; float64.
    """
    count = stats['split_count']
    mean_p = stats['split_p'] / count[:, None]
    entropy = (mean_p * np.log(np.where(mean_p > 0, mean_p, 1))).sum(axis=1)
    scores = np.exp(stats['split_plogp'] / count - entropy)
    return {'IS': float(scores.mean()), 'IS_std': float(scores.std())}
