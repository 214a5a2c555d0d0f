"""Scores of images from files or straight from a network: a source of images, one resumable pass, the numbers.

    stats = statistics(ImageFiles(dataset), detector, metrics, batch)       on all ranks
    stats = statistics(NetworkImages(net, sampler, seeds), …)               the same, without files
"""

import hashlib
import os
import pathlib
import re
import time

import click
import numpy as np
import torch
import tqdm

from dnnlib.download import local_path
from dnnlib.files import file_sha256
from dnnlib.text import NUMBER, check_once, excerpt, format_int_list
from torch_utils import distributed as dist
from training import metrics as m
from training.detectors import Detector, load_detector
from training.generation import BATCH, generate_batch
from training.metric_images import image_batches
from training.metric_resume import Unfinished
from training.pixels import to_uint8


class ImageFiles:
    """The images of a dataset, in its order.

    Args:
        dataset: An ImageFolderDataset.
        name: What messages call it.
        facts: Plain values that go into the record of the scores.

    Attributes:
        total: Number of images.
        size: (channels, resolution) of each.
        record: What the record says about them.
    """

    def __init__(self, dataset, name='', facts=None):
        self.dataset, self.name = dataset, name
        self.total, self.size = len(dataset), (dataset.num_channels, dataset.resolution)
        self.record = {**(facts or {}), 'images': name, 'seeds': self._seeds()}

    def _seeds(self):
        """The seeds that generate.py's file names tell; None for other names."""
        stems = [pathlib.PurePosixPath(name).stem for name, *_ in self.dataset.file_stamps()]
        return seeds_text(map(int, stems)) if all(re.fullmatch(NUMBER, stem) for stem in stems) else None

    def batches(self, indices, batch):
        """Yield the images of `indices` in batches, uint8 [≤ batch, C, H, W]."""
        return image_batches(self.dataset, indices, batch)

    def identity(self):
        """What tells these images from others, without reading them: their names, sizes and times of change."""
        digest = hashlib.sha256()
        for name, *stamp in self.dataset.file_stamps():
            digest.update(f'{name}\0{stamp}\n'.encode('utf-8', 'surrogateescape'))
        return {'files': digest.hexdigest()}


class NetworkImages:
    """The images that a network makes of seeds: those that generate.py with the same batch size would write.

    Args:
        net: Preconditioned network on its device, in evaluation mode.
        sampler: As for `generate_batch`.
        seeds: Each once; sorted here, as the names of the files would be.
        class_idx: As for `generate_batch`.
        facts: Plain values that tell the network and its sampler from others (`training.provenance`).

    Raises:
        UserError: a seed twice.
    """

    def __init__(self, net, sampler, seeds, class_idx=None, facts=None):
        self.seeds = sorted(seeds)
        check_once(self.seeds)
        self.net, self.sampler, self.class_idx, self.facts = net, sampler, class_idx, facts or {}
        self.total, self.name = len(self.seeds), f'seeds {seeds_text(self.seeds)}'
        self.size = net.img_channels, net.img_resolution
        self.record = {**self.facts, 'images': None, 'seeds': seeds_text(self.seeds)}

    def batches(self, indices, batch):
        """Yield the images of `indices` in batches, uint8 [≤ batch, C, H, W], on the network's device."""
        for start in range(0, len(indices), batch):
            seeds = [self.seeds[i] for i in indices[start:start + batch]]
            yield to_uint8(generate_batch(self.net, seeds, self.sampler, self.class_idx, size=min(batch, self.total)))

    def identity(self):
        """Network, sampler and seeds."""
        return {'network': self.facts, 'seeds': self.seeds}


def seeds_text(seeds):
    """'0-49999' for increasing seeds; long lists without order are cut off."""
    return excerpt(format_int_list(seeds), 200)


def scoring_batch(device):
    """Images of files at a time that suit a detector's device: BATCH, on a GPU four times as many."""
    return 4 * BATCH if torch.device(device).type == 'cuda' else BATCH


def statistics(source, detector, metrics, batch, num_features=None, unfinished=None, progress=True):
    """Statistics (see `training.metrics`) of all images of a source. On all ranks together; complete on rank 0.

    Args:
        source: `ImageFiles` or `NetworkImages`.
        detector, metrics, num_features: As for `Accumulator`.
        batch: Images at a time; also what a rank's share is made of.
        unfinished: Where to store the work and to continue it from (`unfinished_pass`), or None.
        progress: Whether rank 0 shows a bar.
    """
    accumulator = m.Accumulator(detector, metrics, source.total, batch, num_features)
    stored = unfinished.load() if unfinished else None
    if stored is not None:
        accumulator.restore(stored)
        if dist.get_rank() == 0 and len(accumulator.share):
            done = accumulator.index - accumulator.share.start
            print(f'Continuing an interrupted run after {done} of {len(accumulator.share)} images per process.')
    shown = progress and dist.get_rank() == 0
    with tqdm.tqdm(total=len(accumulator.share), initial=accumulator.index - accumulator.share.start, unit='image',
                   disable=None if shown else True) as bar:
        for images in source.batches(range(accumulator.index, accumulator.share.stop), batch):
            accumulator.add(images)
            bar.update(len(images))
            if unfinished:
                unfinished.save_if_due(accumulator)
    if unfinished:
        unfinished.save(accumulator)  # other ranks, other rounds and the scores are still to come
    return {**accumulator.statistics(), **dict(zip(m.SIZE, map(np.int64, source.size)))}


def unfinished_pass(source, detector, metrics, batch):
    """Where the statistics of this source with this detector are stored while they are unfinished. On all ranks."""
    identity = dist.on_rank0(source.identity)
    collectors = sorted({c for name in metrics for c in m.METRICS[name].collectors})
    return Unfinished([identity, detector.name, detector.digest, collectors, source.total, batch])


class Scorer:
    """A detector and a reference, ready to score sources of images. Made on all ranks together.

    Args:
        metrics: Names in `METRICS`.
        detector: A loaded detector.
        reference: Statistics (`load_reference`), or None if no metric needs any.
        ref, ref_sha256: Name and digest of the reference, for the record.
        seed: Chooses KID's subsets.
    """

    def __init__(self, metrics, detector, reference=None, ref=None, ref_sha256=None, seed=0):
        self.metrics, self.detector, self.reference, self.seed = metrics, detector, reference, seed
        self.facts = {'detector': detector.name, 'detector_sha256': detector.digest, 'ref': ref,
                      'ref_sha256': ref_sha256, 'metric_seed': seed}

    def check(self, total):
        """Raise UserError if that many images cannot be scored, before any is made."""
        m.check_images(self.metrics, total, self.detector)

    def warn_of_size(self, source):
        """Print a line on rank 0 if the reference is known to be of images of another size; the detector allows that.

        Detectors bring all images to one size, and so the scores look like any others.
        """
        known = m.size_of(self.reference or {})
        if known is not None and known != tuple(source.size) and dist.get_rank() == 0:
            sizes = ['{1}x{1} pixels with {0} channel(s)'.format(*size) for size in (source.size, known)]
            click.echo(f"Warning: the images have {sizes[0]}, those of {self.facts['ref']} {sizes[1]}; make "
                       'sure that this comparison is intended', err=True)

    def __call__(self, source, batch, unfinished=None, progress=True):
        """(scores {name: value}, facts for the record) of a source, on all ranks together; {}, {} beside rank 0."""
        started = time.monotonic()
        stats = statistics(source, self.detector, self.metrics, batch, m.num_features_of(self.reference or {}),
                           unfinished, progress)
        if dist.get_rank() > 0:
            return {}, {}
        values = m.score(self.metrics, stats, self.reference, self.seed)
        seconds = unfinished.seconds() if unfinished else time.monotonic() - started
        return values, {**self.facts, 'num_images': source.total, 'batch': batch, 'seconds': round(seconds, 3)}


def open_detector(spec):
    """`load_detector` on every rank; what it downloads, rank 0 downloads first."""
    return dist.first_on_rank0(lambda: load_detector(spec, dist.device()))


def load_scorer(metrics, detector, ref=None, seed=0):
    """A `Scorer`.

    Args:
        metrics: Names in `METRICS`.
        detector: As for `load_detector`, or a loaded one.
        ref: Path or address of the reference statistics; None if no metric needs any.

    Raises:
        UserError: an unsuitable one of these.
    """
    m.check_reference_given(metrics, ref)
    if not isinstance(detector, Detector):
        detector = open_detector(detector)
    if not ref:
        return Scorer(metrics, detector, seed=seed)
    reference = dist.first_on_rank0(lambda: m.load_reference(ref, metrics, detector))
    return Scorer(metrics, detector, reference, os.fspath(ref), file_sha256(local_path(ref)), seed)


def write_reference(dest, source, detector, metrics, batch, progress=True):
    """Write the statistics that `metrics` need as a reference to an .npz file. On all ranks together.

    Raises:
        UserError: too few images, or `dest` cannot be written.
    """
    m.check_destination(dest)
    metrics = [name for name in metrics if m.METRICS[name].ref_arrays]
    unfinished = unfinished_pass(source, detector, metrics, batch)
    stats = statistics(source, detector, metrics, batch, unfinished=unfinished, progress=progress)
    if dist.get_rank() == 0:
        m.save_statistics(dest, stats)
    dist.barrier()
    unfinished.remove()
