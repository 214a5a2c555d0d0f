"""What is kept of the images as they pass by: sums and features, of one rank's share, merged over ranks.

A collector is made with the number of images over all ranks, `update`d with every batch of this
rank's share in order, and asked once for its `result` on all ranks together.
"""

import numpy as np
import torch

from torch_utils import distributed
from training.metric_is import NUM_SPLITS

FEATURE_LIMIT = 50_000


def rank_share(total, rank=None):
    """Indices of the images that `rank` (default: this one) takes: contiguous, in rank order, even to ±1."""
    rank = distributed.get_rank() if rank is None else rank
    world = distributed.get_world_size()
    return range(total * rank // world, total * (rank + 1) // world)


class Moments:
    """Mean and covariance of the features: sums in float64, so batches and ranks leave no trace."""

    uses = 'features'

    def __init__(self, total):
        self.total = total
        self.sum = self.outer = None

    def update(self, features):
        x = features.to(torch.float64)
        if self.sum is None:
            self._allocate(x.shape[1], x.device)
        self.sum += x.sum(dim=0)
        self.outer.addmm_(x.T, x)

    def _allocate(self, dim, device):
        self.sum = torch.zeros(dim, dtype=torch.float64, device=device)
        self.outer = torch.zeros([dim, dim], dtype=torch.float64, device=device)

    def result(self):
        """{'mu': [D], 'sigma': [D, D] with n − 1 in the denominator}, float64."""
        mu = distributed.all_reduce_sum(self.sum) / self.total
        sigma = distributed.all_reduce_sum(self.outer) - self.total * torch.outer(mu, mu)
        sigma = (sigma + sigma.T) / 2 / (self.total - 1)
        return {'mu': mu.cpu().numpy(), 'sigma': sigma.cpu().numpy()}


class Features:
    """The features themselves: of all images in order, or of a random subset of `limit` of them."""

    uses = 'features'

    def __init__(self, total, limit=FEATURE_LIMIT):
        self.kept = np.arange(total)
        if total > limit:
            self.kept = np.sort(np.random.RandomState(0).choice(total, limit, replace=False))
        self.next = rank_share(total).start
        self.shares = [self._kept_in(rank_share(total, r)) for r in range(distributed.get_world_size())]
        self.filled = 0
        self.rows = None

    def _kept_in(self, share):
        return int(np.searchsorted(self.kept, share.stop) - np.searchsorted(self.kept, share.start))

    def update(self, features):
        if self.rows is None:  # rank 0 has room for everyone's, so that they are never held twice
            rank = distributed.get_rank()
            self.rows = torch.empty([sum(self.shares) if rank == 0 else self.shares[rank], features.shape[1]])
        first, last = np.searchsorted(self.kept, [self.next, self.next + len(features)])
        chosen = torch.from_numpy(self.kept[first:last] - self.next).to(features.device)
        self.rows[self.filled:self.filled + last - first] = features[chosen].to('cpu')
        self.filled += last - first
        self.next += len(features)

    def result(self):
        """{'features': [min(total, limit), D] float32} on rank 0, {} on the others."""
        if distributed.get_rank() > 0:
            torch.distributed.send(self.rows.to(distributed.device()), dst=0)
            return {}
        for rank, count in list(enumerate(self.shares))[1:]:
            part = torch.empty([count, self.rows.shape[1]], device=distributed.device())
            torch.distributed.recv(part, src=rank)
            self.rows[self.filled:self.filled + count] = part.cpu()
            self.filled += count
        return {'features': self.rows.numpy()}


class SplitProbabilities:
    """Sums of class probabilities p, and of Σ p·ln p, over contiguous splits of all images: see `metric_is`."""

    uses = 'probs'

    def __init__(self, total, num_splits=NUM_SPLITS):
        self.bounds = np.array([total * i // num_splits for i in range(num_splits + 1)])
        self.next = rank_share(total).start
        self.p = self.plogp = None

    def update(self, probs):
        p = probs.to(torch.float64)
        if self.p is None:
            self._allocate(p.shape[1], p.device)
        index = np.arange(self.next, self.next + len(p))
        split = torch.from_numpy(np.searchsorted(self.bounds, index, side='right') - 1).to(p.device)
        self.p.index_add_(0, split, p)
        self.plogp.index_add_(0, split, torch.special.xlogy(p, p).sum(dim=1))
        self.next += len(p)

    def _allocate(self, classes, device):
        splits = len(self.bounds) - 1
        self.p = torch.zeros([splits, classes], dtype=torch.float64, device=device)
        self.plogp = torch.zeros(splits, dtype=torch.float64, device=device)

    def result(self):
        """`split_count` [S], `split_p` [S, K], `split_plogp` [S], float64."""
        return {'split_count': np.diff(self.bounds).astype(np.float64),
                'split_p': distributed.all_reduce_sum(self.p).cpu().numpy(),
                'split_plogp': distributed.all_reduce_sum(self.plogp).cpu().numpy()}
