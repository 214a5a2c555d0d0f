"""Statistics of scalars over a tick: count, mean and standard deviation, over all ranks.

`report` may be called from anywhere (a loss reports its own terms). The sums stay on the device until
a `Collector` reads them, so reporting never makes the host wait.
"""

import math

import torch

from torch_utils import distributed as dist

_moments = {}  # name → float64 tensor [count, sum, sum of squares] on the device of its first report


def report(name, value):
    """Add the elements of `value` (tensor, array or number) to statistic `name`; returns `value`.

    All ranks must report the same names within a tick.
    """
    x = torch.as_tensor(value, dtype=torch.float64).detach()
    total = x.sum()
    moments = torch.stack([torch.full_like(total, x.numel()), total, x.square().sum()])
    if name in _moments:
        _moments[name] += moments.to(_moments[name].device)
    else:
        _moments[name] = moments
    return value


def unread():
    """What this rank has reported since the last `Collector.update`, for `restore`: {name: CPU tensor}."""
    return {name: moments.cpu().clone() for name, moments in _moments.items()}


def restore(moments):
    """Continue from what `unread` returned."""
    _moments.clear()
    _moments.update({name: m.to(dist.device(), copy=True) for name, m in moments.items()})


class Collector:
    """Reads what was reported since its last `update`."""

    def __init__(self):
        self._values = {}

    def update(self):
        """Collect the sums over all ranks and start new ones. Call on every rank."""
        names = sorted(_moments)
        if names:
            sums = torch.stack([_moments[n].to(dist.device()) for n in names])
            table = dist.all_reduce_sum(sums).cpu().tolist()
            self._values = {n: _summary(*row) for n, row in zip(names, table)}
        else:
            self._values = {}
        _moments.clear()

    def as_dict(self):
        """{name: {'num', 'mean', 'std'}} of the last update."""
        return dict(self._values)

    def mean(self, name):
        """Mean of one statistic of the last update, NaN if it was not reported."""
        return self._values.get(name, {}).get('mean', float('nan'))


def _summary(num, total, squares):
    mean = total / num if num else float('nan')
    variance = squares / num - mean ** 2 if num else float('nan')
    return {'num': int(num), 'mean': mean, 'std': math.nan if math.isnan(variance) else math.sqrt(max(variance, 0))}
