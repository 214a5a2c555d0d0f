"""What metrics keep of the images: sums and features of one rank's share, merged over ranks.

A collector is made with the number of images over all ranks and the batch size, `update`d with every
batch of this rank's share in order, and asked once for its `result`, on all ranks together. Its `state`
between two batches can be stored, and `restore`d in a new one.
"""

import numpy as np
import torch

from torch_utils import distributed as dist
from training.metric_is import NUM_SPLITS

FEATURE_LIMIT = 50_000


def rank_share(total, batch=1, rank=None):
    """Indices of the images that `rank` (default: this one) takes: whole batches, contiguous, in rank order.

    The batches are those of a single process, so that a score does not depend on the number of ranks: what
    the network and the detector make of an image depends, in the last digit, on the batch it is in.
    """
    rank = dist.get_rank() if rank is None else rank
    batches = -(-total // batch)  # rounded up
    world = dist.get_world_size()
    first, last = (min(-(-batches * r // world) * batch, total) for r in (rank, rank + 1))
    return range(first, last)


def rank_shares(total, batch=1):
    """`rank_share` of every rank. Rank 0's is never empty; others may be."""
    return [rank_share(total, batch, rank) for rank in range(dist.get_world_size())]


class ExactSum:
    """Sum of float64 tensors of one shape, accumulated in twice the precision (Knuth's two-sum).

    It is rounded to float64 only at the end, so it does not depend on how the terms were spread over ranks.
    """

    def __init__(self):
        self.high = self.low = None

    def add(self, term):
        """Add a tensor."""
        if self.high is None:
            self.high, self.low = torch.zeros_like(term), torch.zeros_like(term)
        total = self.high + term
        added = total - self.high
        self.low += (self.high - (total - added)) + (term - added)
        self.high = total

    def state(self):
        """Both parts as one array [2, …]; empty before the first term."""
        return np.empty(0) if self.high is None else torch.stack([self.high, self.low]).cpu().numpy()

    def restore(self, state, device):
        """Continue from a `state`."""
        if len(state):
            self.high, self.low = torch.from_numpy(state).to(device)

    def over_ranks(self, shares):
        """On rank 0 the sum over all ranks whose share is not empty, as a float64 array; None on the others."""
        rank = dist.get_rank()
        if rank > 0:
            if len(shares[rank]):
                for part in (self.high, self.low):
                    torch.distributed.send(part.to(dist.device()), dst=0)
            return None
        for source in range(1, len(shares)):
            for _ in range(2 if len(shares[source]) else 0):
                part = torch.empty_like(self.high, device=dist.device())
                torch.distributed.recv(part, src=source)
                self.add(part.to(self.high.device))
        return (self.high + self.low).cpu().numpy()


class Moments:
    """Mean and covariance of the features, from sums in float64."""

    uses = 'features'

    def __init__(self, total, batch=1):
        self.total = total
        self.shares = rank_shares(total, batch)
        self.sum, self.outer = ExactSum(), ExactSum()

    def update(self, features):
        x = features.to(torch.float64)
        self.sum.add(x.sum(dim=0))
        self.outer.add(x.T @ x)

    def state(self):
        return {'sum': self.sum.state(), 'outer': self.outer.state()}

    def restore(self, state, count, device):
        self.sum.restore(state['sum'], device)
        self.outer.restore(state['outer'], device)

    def result(self):
        """{'mu': [D], 'sigma': [D, D] with n − 1 in the denominator}, float64, on rank 0; {} on the others."""
        total, outer = self.sum.over_ranks(self.shares), self.outer.over_ranks(self.shares)
        if total is None:
            return {}
        mu = total / self.total
        sigma = outer - self.total * np.outer(mu, mu)
        return {'mu': mu, 'sigma': (sigma + sigma.T) / 2 / (self.total - 1)}


class Features:
    """The features themselves: of all images in order, or of a random subset of `limit` of them."""

    uses = 'features'

    def __init__(self, total, batch=1, limit=FEATURE_LIMIT):
        self.kept = np.arange(total)
        if total > limit:
            self.kept = np.sort(np.random.RandomState(0).choice(total, limit, replace=False))
        self.next = rank_share(total, batch).start
        self.shares = [self._kept_in(share) for share in rank_shares(total, batch)]
        self.filled = 0
        self.rows = None

    def _kept_in(self, share):
        return int(np.searchsorted(self.kept, share.stop) - np.searchsorted(self.kept, share.start))

    def _allocate(self, dim):
        """Allocate this rank's rows; rank 0 allocates everyone's, so that they are never held twice."""
        rank = dist.get_rank()
        self.rows = torch.empty([sum(self.shares) if rank == 0 else self.shares[rank], dim])

    def update(self, features):
        if self.rows is None:
            self._allocate(features.shape[1])
        first, last = np.searchsorted(self.kept, [self.next, self.next + len(features)])
        chosen = torch.from_numpy(self.kept[first:last] - self.next).to(features.device)
        self.rows[self.filled:self.filled + last - first] = features[chosen].to('cpu')
        self.filled += last - first
        self.next += len(features)

    def state(self):
        return {'rows': np.empty([0, 0], np.float32) if self.rows is None else self.rows[:self.filled].numpy()}

    def restore(self, state, count, device):
        self._allocate(state['rows'].shape[1])
        self.filled = len(state['rows'])
        self.rows[:self.filled] = torch.from_numpy(state['rows'])
        self.next += count

    def result(self):
        """{'features': [min(total, limit), D] float32} on rank 0, {} on the others."""
        if dist.get_rank() > 0:
            if self.shares[dist.get_rank()]:
                torch.distributed.send(self.rows.to(dist.device()), dst=0)
            return {}
        for rank, count in enumerate(self.shares):
            if rank == 0 or count == 0:
                continue
            part = torch.empty([count, self.rows.shape[1]], device=dist.device())
            torch.distributed.recv(part, src=rank)
            self.rows[self.filled:self.filled + count] = part.cpu()
            self.filled += count
        return {'features': self.rows.numpy()}


class SplitProbabilities:
    """Sums of class probabilities p, and of Σ p·ln p, over contiguous splits of all images: see `metric_is`."""

    uses = 'probs'

    def __init__(self, total, batch=1):
        self.bounds = np.array([total * i // NUM_SPLITS for i in range(NUM_SPLITS + 1)])
        self.shares = rank_shares(total, batch)
        self.next = rank_share(total, batch).start
        self.p, self.plogp = ExactSum(), ExactSum()

    def update(self, probs):
        p = probs.to(torch.float64)
        index = np.arange(self.next, self.next + len(p))
        split = torch.from_numpy(np.searchsorted(self.bounds, index, side='right') - 1).to(p.device)
        self.p.add(p.new_zeros([NUM_SPLITS, p.shape[1]]).index_add_(0, split, p))
        self.plogp.add(p.new_zeros([NUM_SPLITS]).index_add_(0, split, torch.special.xlogy(p, p).sum(dim=1)))
        self.next += len(p)

    def state(self):
        return {'p': self.p.state(), 'plogp': self.plogp.state()}

    def restore(self, state, count, device):
        self.p.restore(state['p'], device)
        self.plogp.restore(state['plogp'], device)
        self.next += count

    def result(self):
        """`split_count` [S], `split_p` [S, K], `split_plogp` [S], float64, on rank 0; {} on the others."""
        p, plogp = self.p.over_ranks(self.shares), self.plogp.over_ranks(self.shares)
        if p is None:
            return {}
        return {'split_count': np.diff(self.bounds).astype(np.float64), 'split_p': p, 'split_plogp': plogp}
