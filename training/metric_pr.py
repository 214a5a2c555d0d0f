"""Precision and recall by k-nearest-neighbour manifolds (Kynkäänniemi et al. 2019)."""

import torch

from torch_utils import distributed as dist

NEIGHBOURS = 3
BLOCK = 2048  # rows at a time: two float64 blocks of 2,048 features and a few of distances take 200 MiB


def squared_distances(x, y):
    """|x_i − y_j|² of two blocks of rows, float64 [N, M].

    As |x|² + |y|² − 2·x·y, where rounding leaves about 1e-15·(|x|² + |y|²) for equal rows: anything
    below 1e-12 of that sum counts as zero, so that copies have distance 0.
    """
    norms = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1)
    d2 = torch.addmm(norms, x, y.T, alpha=-2)
    return d2.masked_fill_(d2 <= 1e-12 * norms, 0)


def blocks(x, size, device):
    """(slice, float64 copy) of consecutive rows: only one block at a time is held in double precision."""
    for start in range(0, len(x), size):
        rows = slice(start, min(start + size, len(x)))
        yield rows, x[rows].to(device, torch.float64)


def squared_radii(x, k=NEIGHBOURS, block=BLOCK, device='cpu'):
    """Squared distance of every row of x [N, D] to its k-th nearest other row: float64 [N]."""
    radii = torch.empty(len(x), dtype=torch.float64, device=device)
    for rows, a in blocks(x, block, device):
        nearest = torch.full([len(a), k], torch.inf, dtype=torch.float64, device=device)
        for columns, b in blocks(x, block, device):
            d2 = squared_distances(a, b)
            if rows == columns:
                d2.fill_diagonal_(torch.inf)
            nearest = torch.cat([nearest, d2], dim=1).topk(k, dim=1, largest=False).values
        radii[rows] = nearest.amax(dim=1)
    return radii


def precision_recall(generated, real, k=NEIGHBOURS, block=BLOCK, device='cpu'):
    """(precision, recall): the fraction of each set that lies in a ball around a member of the other set.

    A member's ball reaches to its k-th nearest neighbour in its own set. Computed in blocks, so that memory
    grows with the features alone; float64 on `device`.

    Args:
        generated, real: Features [N, D], [M, D], tensors with more than k rows each.
    """
    radii_generated = squared_radii(generated, k, block, device)
    radii_real = squared_radii(real, k, block, device)
    precise = torch.zeros(len(generated), dtype=torch.bool, device=device)
    recalled = torch.zeros(len(real), dtype=torch.bool, device=device)
    for rows, a in blocks(generated, block, device):
        for columns, b in blocks(real, block, device):
            d2 = squared_distances(a, b)
            precise[rows] |= (d2 <= radii_real[columns]).any(dim=1)
            recalled[columns] |= (d2 <= radii_generated[rows, None]).any(dim=0)
    return precise.double().mean().item(), recalled.double().mean().item()


def score_pr(stats, ref, seed=0):
    """{'precision': …, 'recall': …} of two statistics with `features`."""
    precision, recall = precision_recall(*(torch.from_numpy(s['features']) for s in (stats, ref)),
                                         device=dist.device())
    return {'precision': precision, 'recall': recall}
