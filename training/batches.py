"""From the data set to the device: the training order, cut into batches that are prepared in advance.

Three ways give the same images in the same order: decoded images gathered by a thread, decoded images kept on the GPU,
and, for sets too large for either, worker processes that decode the files.
"""

import contextlib
import gc
import itertools
import queue
import re
import threading
import time

import numpy as np
import torch

from dnnlib import UserError
from dnnlib.text import excerpt
from torch_utils import distributed as dist
from torch_utils.misc import InfiniteSampler
from torch_utils.signals import shield_worker
from training.pixels import to_float

AHEAD = 3  # batches made in advance
DATA_DEVICES = ('cpu', 'cuda')
COPY_IMAGES = 4096  # images copied to the GPU at a time
MAX_WAIT = 0.02  # share of a tick that training may wait for data without a word
GPU_SHARE = 0.5  # largest share of the GPU's free memory that a data set may take


class Batches:
    """Endless iterator of (images [B, C, H, W] float32 in [−1, 1], labels [B, label_dim] float32) on `device`.

    Args:
        dataset: An ImageFolderDataset.
        batch: Images per batch.
        seed: Seed of the order, the same on all ranks.
        start_nimg: Images that all ranks together have already seen.
        loader_kwargs: Arguments of torch.utils.data.DataLoader, used if the set is not decoded.
        device: Where the batches go.
        data_device: 'cuda' keeps the decoded set on the GPU.

    Raises:
        UserError: `data_device` is 'cuda' and the set does not fit, is not decoded, or there is no GPU.
    """

    def __init__(self, dataset, batch, seed, start_nimg, loader_kwargs, device, data_device='cpu'):
        rank, ranks = dist.get_rank(), dist.get_world_size()
        had = (start_nimg - rank + ranks - 1) // ranks  # how many of the first start_nimg were this rank's
        sampler = InfiniteSampler(dataset, rank=rank, num_replicas=ranks, seed=seed, start_idx=had)
        self._workers = None  # processes that load data; None if it is decoded in advance, or after `report_wait`
        check_data_device(data_device)
        if data_device == 'cuda':
            self._source = resident_batches(dataset, sampler, batch, device)
        elif dataset.decoded is not None:
            self._source = gathered_batches(dataset, sampler, batch, device)
        else:
            self._source = loaded_batches(dataset, sampler, batch, device, loader_kwargs)
            self._workers = loader_kwargs.get('num_workers', 0)
        self._waited = 0.0

    def __iter__(self):
        return self

    def __next__(self):
        start = time.perf_counter()
        images, labels = next(self._source)
        self._waited += time.perf_counter() - start
        return to_float(images), labels

    def take_wait(self):
        """Seconds that the host has spent waiting for data since the last call."""
        waited, self._waited = self._waited, 0.0
        return waited

    def report_wait(self, share):
        """Say, once, that data loading holds up training, if the `share` of time spent waiting is large.

        Only where more processes would help: decoded data is never waited for longer than memory takes.
        """
        if share > MAX_WAIT and self._workers is not None:
            dist.print0(f'Training waited for data {share:.0%} of this tick; with CPU cores to spare, '
                        f'--workers={2 * self._workers or 1} (now {self._workers}) may help.')
            self._workers = None

    def close(self):
        """Stop the threads and processes."""
        self._source.close()


def loaded_batches(dataset, sampler, batch, device, loader_kwargs):
    """Generator of (uint8 images, labels) on `device` from a DataLoader, whose workers start at once."""
    # Its own generator: the loader must not draw from the one that supplies the training noise.
    loader = torch.utils.data.DataLoader(_Items(dataset), sampler=sampler, batch_size=batch, collate_fn=_collate,
                                         generator=torch.Generator(), pin_memory=device.type == 'cuda',
                                         worker_init_fn=start_worker, **loader_kwargs)
    return _on_device(iter(loader), device)


class _Items(torch.utils.data.Dataset):
    """The items of a data set, or the UserErrors in their place: a worker that raised one would bury its sentence."""

    def __init__(self, dataset):
        self._dataset = dataset

    def __getitem__(self, idx):
        try:
            return self._dataset[idx]
        except UserError as e:
            return e


def _collate(items):
    error = next((item for item in items if isinstance(item, UserError)), None)
    return error or torch.utils.data.default_collate(items)


def start_worker(worker_id):
    """Prepare a data-loading process, which shares the data set's million names with the training process."""
    gc.freeze()  # a collection writes into every object, and so would copy them all
    shield_worker()


def _on_device(batches, device):
    for loaded in batches:
        if isinstance(loaded, UserError):
            raise loaded
        yield [tensor.to(device, non_blocking=True) for tensor in loaded]


@contextlib.contextmanager
def report_lost_workers():
    """Context that turns PyTorch's errors about a loader's processes into UserErrors. It raises them at any place."""
    try:
        yield
    except RuntimeError as e:
        reason = (str(e).strip().splitlines() or [''])[-1]
        if not re.search('allocate shared memory|DataLoader worker .*(killed|exited)', reason):
            raise
        raise UserError(f'a data-loading process failed ({excerpt(reason, 200)}); give it more memory (a container: '
                        'more shared memory, with docker run --shm-size=8g), or train with --workers=0') from e


def gathered_batches(dataset, sampler, batch, device):
    """Generator of (uint8 images, labels) on `device`: a thread gathers, pins and copies them in advance."""
    cuda = device.type == 'cuda'
    stream = torch.cuda.Stream(device) if cuda else None

    def gather(indices):
        tensors = [torch.from_numpy(array) for array in dataset.batch(indices)]
        if not cuda:
            return tensors, None
        # A new thread is on GPU 0: without this, leaving the stream's context would create a CUDA context there too.
        with torch.cuda.device(device), torch.cuda.stream(stream):
            tensors = [tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors]
            event = torch.cuda.Event()
            event.record()
        return tensors, event

    with contextlib.closing(ahead(map(gather, _chunks(sampler, batch)))) as results:
        for tensors, event in results:
            if cuda:
                current = torch.cuda.current_stream(device)
                current.wait_event(event)  # the GPU waits, not the host
                for tensor in tensors:
                    tensor.record_stream(current)
            yield tensors


def resident_batches(dataset, sampler, batch, device):
    """Generator of (uint8 images, labels) gathered on the GPU, which holds the whole set from this call on."""
    images = _to_gpu(dataset, device)

    def places(indices):
        raw_idx, flipped = dataset.locate(indices)
        tensors = map(torch.from_numpy, (raw_idx, flipped, dataset.labels_of_files(raw_idx)))
        return [tensor.pin_memory() if device.type == 'cuda' else tensor for tensor in tensors]

    def gather():
        for tensors in map(places, _chunks(sampler, batch)):
            raw_idx, flipped, labels = (tensor.to(device, non_blocking=True) for tensor in tensors)
            chosen = images.index_select(0, raw_idx)
            yield torch.where(flipped[:, None, None, None], chosen.flip(3), chosen), labels

    return gather()


def check_data_device(data_device):
    """Raise UserError if `data_device` is 'cuda' and there is no GPU."""
    if data_device == 'cuda' and not torch.cuda.is_available():
        raise UserError('--data-device=cuda needs a GPU, and PyTorch finds none here; leave it out')


def _to_gpu(dataset, device):
    if dataset.decoded is None:
        raise UserError('--data-device=cuda needs a data set decoded in advance, but --cache=0, its size or the cache '
                        'folder prevents that; leave it out')
    size = dataset.decoded.nbytes
    if device.type == 'cuda' and size > GPU_SHARE * torch.cuda.mem_get_info(device)[0]:
        raise UserError(f'the decoded data set of {size >> 20} MiB is more than half of the free memory of the GPU; '
                        'leave --data-device=cuda out')
    images = torch.empty(dataset.decoded.shape, dtype=torch.uint8, device=device)
    for start in range(0, len(images), COPY_IMAGES):
        images[start:start + COPY_IMAGES] = torch.from_numpy(np.array(dataset.decoded[start:start + COPY_IMAGES]))
    return images


def _chunks(sampler, batch):
    """Endless lists of `batch` indices."""
    indices = iter(sampler)
    while True:
        yield list(itertools.islice(indices, batch))


def ahead(items, depth=AHEAD):
    """Yield an endless iterator's items, made up to `depth` in advance by a thread; its errors are raised here."""
    results, closed = queue.Queue(depth), threading.Event()

    def put(result):
        while not closed.is_set():
            with contextlib.suppress(queue.Full):
                results.put(result, timeout=0.1)
                return

    def work():
        try:
            for item in items:
                put((item, None))
                if closed.is_set():
                    return
        except BaseException as e:  # raised again by the generator below
            put((None, e))

    thread = threading.Thread(target=work, name='batches', daemon=True)
    thread.start()
    try:
        while True:
            item, error = results.get()
            if error is not None:
                raise error
            yield item
    finally:
        closed.set()
        thread.join()
