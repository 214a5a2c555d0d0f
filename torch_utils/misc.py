"""The endless training order."""

import array

import numpy as np
import torch

CHUNK = 1 << 14  # positions whose random numbers are drawn at once; small enough to stay in the CPU's cache


class InfiniteSampler(torch.utils.data.Sampler):
    """EDM's endless, slowly reshuffled order of a dataset, dealt out to the ranks in turn.

    The order starts shuffled with ``RandomState(seed)``. At position i = idx mod n the rank whose turn it
    is gets ``order[i]``; then ``order[i]`` is swapped with ``order[(i − randint(window)) mod n]``.

    Args:
        dataset: Anything with a length n.
        rank, num_replicas: This process's rank, and the number of ranks.
        shuffle: False keeps the dataset's own order for ever.
        seed: Must be the same on all ranks.
        window_size: Reach of the reshuffling as a fraction of n.
        start_idx: How many samples this rank has already drawn. The order continues exactly where it stopped;
            the start_idx·num_replicas earlier swaps are redone, about 0.2 s per million, 0.3 s for a million images.

    Raises:
        ValueError: an empty dataset or an argument out of range.
    """

    def __init__(self, dataset, rank=0, num_replicas=1, shuffle=True, seed=0, window_size=0.5, start_idx=0):
        if len(dataset) == 0:
            raise ValueError('cannot sample from an empty dataset')
        if not 0 <= rank < num_replicas:
            raise ValueError(f'rank {rank} of {num_replicas} replicas')
        if not 0 <= window_size <= 1:
            raise ValueError(f'window_size {window_size} lies outside [0, 1]')
        if start_idx < 0:
            raise ValueError(f'start_idx {start_idx} is negative')
        super().__init__()
        self.size = len(dataset)
        self.rank = rank
        self.num_replicas = num_replicas
        self.shuffle = shuffle
        self.seed = seed
        self.window = int(np.rint(self.size * window_size)) if shuffle else 0
        self.start_idx = start_idx

    def __iter__(self):
        rnd = np.random.RandomState(self.seed)
        order = np.arange(self.size)
        if self.shuffle:
            rnd.shuffle(order)
        order = array.array('i', order.astype(np.int32).tobytes())  # a list of a million numbers outgrows the caches
        now = self.start_idx * self.num_replicas
        if self.window >= 2:
            for start in range(0, now, CHUNK):
                for i, j in self._swaps(rnd, start, min(start + CHUNK, now)):
                    order[i], order[j] = order[j], order[i]
        while True:
            for idx, (i, j) in enumerate(self._swaps(rnd, now, now + CHUNK), now):
                if idx % self.num_replicas == self.rank:
                    yield order[i]
                order[i], order[j] = order[j], order[i]
            now += CHUNK

    def _swaps(self, rnd, start, stop):
        """Pairs of indices that are swapped at positions start…stop−1.

        Drawing many numbers at once gives the same stream as drawing them one by one.
        """
        i = np.arange(start, stop) % self.size
        j = i if self.window < 2 else (i - rnd.randint(self.window, size=stop - start)) % self.size
        return zip(i.tolist(), j.tolist())
