"""Images of a dataset as batches for scoring, decoded by threads while the detector works."""

import collections
import concurrent.futures

import numpy as np
import torch

from dnnlib import UserError
from training.dataset import ImageFolderDataset

THREADS = 4


def open_images(path, num=None, seed=0):
    """Open exactly `num` images of a folder or zip, a random subset chosen by `seed`; None opens all.

    Raises:
        UserError: fewer than `num` images, `num` below 2, or whatever ImageFolderDataset finds wrong.
    """
    if num is not None and num < 2:
        raise UserError(f'--num={num} is too few for a covariance; give at least 2')
    dataset = ImageFolderDataset(path, max_size=num, random_seed=seed)
    if num is not None and len(dataset) < num:
        raise UserError(f'{path} has {len(dataset)} images where {num} are to be scored; '
                        f'make more, or give --num={len(dataset)}')
    return dataset


def image_batches(dataset, indices, batch_size):
    """Yield the images of `indices` in order, as uint8 tensors [≤ batch_size, C, H, W].

    Threads, not processes: decoders release the GIL, nothing is forked beside CUDA or a process group,
    and errors keep their messages.
    """
    starts = iter(range(0, len(indices), batch_size))
    pool = concurrent.futures.ThreadPoolExecutor(THREADS)
    pending = collections.deque()
    try:
        while True:
            while len(pending) < 2 * THREADS and (start := next(starts, None)) is not None:
                pending.append(pool.submit(_load, dataset, indices[start:start + batch_size]))
            if not pending:
                return
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _load(dataset, indices):
    return torch.from_numpy(np.stack([dataset[i][0] for i in indices]))
