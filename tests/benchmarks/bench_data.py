"""Speed of data: conversion by one and two processes, and loading decoded, memory-mapped images against zip and PNG.

    python tests/benchmarks/bench_data.py [--images=10000] [--data=ZIP] [--out=FILE.json]

Conversion is measured in elapsed time, since several processes are compared (a lower bound on the speed if the machine
is in use), and in processor time. Loading is processor time, of batches gathered in this process. The last row is the
share of time that a loop taking 6,200 images/s, the limit of an H200 with the CIFAR-10 model, spends waiting for data.
"""

import functools
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import click
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from tests.benchmarks.bench_train import write_zip  # noqa: E402
from tests.benchmarks.report import ROOT, Table, alternate  # noqa: E402
from training.batches import Batches  # noqa: E402
from training.dataset import ImageFolderDataset  # noqa: E402
from training.decoded import decoded_images  # noqa: E402

NETWORK_RATE = 6200  # images/s
IN_A_ROW = 10  # batches per measurement; more than are prefetched


def conversion(data, folder, repeats):
    """Rows for conversion, the ways taking turns: elapsed time and processor time.

    Two conversions at once, of all images each, share nothing: no way of dividing the work of one can gain more.
    """
    ways = {'1 process': [1], '2 processes': [2], 'twice at once, 1 process each': [1, 1]}  # --workers of each command
    best = {}
    for _ in range(repeats):
        for way, commands in ways.items():
            start, cpu = time.perf_counter(), children_seconds()
            running = [subprocess.Popen([sys.executable, str(ROOT / 'dataset_tool.py'), f'--source={data}',
                                         f'--workers={workers}', f'--dest={folder}/out-{i}.zip'],
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                       for i, workers in enumerate(commands)]
            if any([process.wait() for process in running]):
                raise subprocess.SubprocessError(f'a conversion failed ({way})')
            times = [seconds / len(commands) for seconds in (time.perf_counter() - start, children_seconds() - cpu)]
            best[way] = min(best.get(way, times), times)  # the run least disturbed by other load
    count, alone = len(ImageFolderDataset(data)), best['1 process']
    return [dict(work=f'conversion, {way}', unit=unit, images_per_second=count / times[i], ratio=alone[i] / times[i])
            for i, unit in enumerate(('elapsed', 'processor, of all processes')) for way, times in best.items()]


def children_seconds():
    """Processor time in seconds of the child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def mapped_dataset(path):
    """The data set with its decoded images memory-mapped from the cache folder."""
    dataset = ImageFolderDataset(path)
    dataset.use_decoded(decoded_images(dataset, min_bytes=0))
    return dataset


def in_a_row(take):
    """Take batches and let go of each before the next, as training does: keeping them would time new memory instead."""
    for _ in range(IN_A_ROW):
        take()


def loading(data, batch, repeats):
    """Rows for each way of loading, images alone and batches ready to train on; `ratio` is speed over zip and PNG's."""
    plain, mapped = ImageFolderDataset(data), mapped_dataset(data)
    cpu = torch.device('cpu')
    batches, slow_batches = (Batches(dataset, batch, 0, 0, {}, cpu) for dataset in (mapped, plain))
    order = torch.randperm(len(plain), generator=torch.Generator().manual_seed(0)).tolist()
    reference = 'zip and PNG'
    ways = {('images', reference): lambda: plain.batch(order[:batch]),
            ('images', 'decoded map'): lambda: mapped.batch(order[:batch]),
            ('batches', reference): lambda: next(slow_batches), ('batches', 'decoded map'): lambda: next(batches)}
    seconds = alternate({way: functools.partial(in_a_row, take) for way, take in ways.items()}, repeats)
    batches.close(), slow_batches.close()
    titles = {'images': '', 'batches': ', with the order and conversion to float'}
    return [dict(work=f'loading, {way}{titles[kind]}', unit='processor', images_per_second=batch * IN_A_ROW / s,
                 ratio=seconds[kind, reference] / s) for (kind, way), s in seconds.items()]


def waiting(data, batch, device):
    """A row with the share of time that a loop waits for data when it takes NETWORK_RATE images/s."""
    batches = Batches(mapped_dataset(data), batch, 0, 0, {}, device)
    next(batches), batches.take_wait()
    start = time.perf_counter()
    for _ in range(20):
        next(batches)
        time.sleep(batch / NETWORK_RATE)
    share = batches.take_wait() / (time.perf_counter() - start)
    batches.close()
    return dict(work=f'waiting, at {NETWORK_RATE} images/s', unit='share of elapsed', images_per_second=NETWORK_RATE,
                ratio=share)


@click.command(context_settings=dict(show_default=True, max_content_width=120))
@click.option('--images', metavar='INT', type=int, default=4096, help='Images in the synthetic data set')
@click.option('--size', metavar='INT', type=int, default=32, help='Image resolution')
@click.option('--data', metavar='ZIP', default=None, help='Use this data set instead')
@click.option('--batch', metavar='INT', type=int, default=512, help='Images per batch')
@click.option('--repeats', metavar='INT', type=int, default=3, help='Repeats per measurement')
@click.option('--out', metavar='FILE.json', default=None, help='Also write the report here')
def main(images, size, data, batch, repeats, out):
    """Measure conversion and loading."""
    device = torch.device('cuda', 0) if torch.cuda.is_available() else torch.device('cpu')
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ['DNNLIB_CACHE_DIR'] = f'{folder}/cache'
        if data is None:
            data = f'{folder}/data.zip'
            write_zip(data, images, size)
        dataset = ImageFolderDataset(data)
        table = Table(f'Data, {dataset.num_files} images of {dataset.resolution}×{dataset.resolution}, batch {batch}',
                      dict(images=dataset.num_files, size=dataset.resolution, batch=batch, repeats=repeats,
                           load=os.getloadavg()[0]), out, device.type)
        table.add(*conversion(data, folder, repeats))
        start = time.process_time()
        decoded_images(dataset, min_bytes=0)
        decoding = time.process_time() - start
        table.add(dict(work='decoding into the cache, once', unit='processor',
                       images_per_second=dataset.num_files / decoding, ratio=1.0))
        table.add(*loading(data, batch, max(repeats, 5)))
        table.add(waiting(data, batch, device))
    table.finish()


if __name__ == '__main__':
    main()
