"""Scoring of images from files or straight from a network: a source of images, one resumable pass, the scores.

    stats = statistics(ImageFiles(dataset), detector, metrics, batch)       on all ranks
    stats = statistics(NetworkImages(net, sampler, seeds), …)               the same, without files
"""

import contextlib
import os
import pathlib
import re
import signal
import time

import click
import numpy as np
import tqdm

from dnnlib.download import local_path
from dnnlib.files import file_sha256
from dnnlib.text import NUMBER, check_once, excerpt, format_int_list
from torch_utils import distributed as dist
from torch_utils.signals import defer_signal
from training import metrics as m
from training.detectors import Detector, load_detector
from training.generation import check_finite, generate_batch
from training.metric_images import image_batches
from training.metric_resume import Unfinished
from training.pixels import to_uint8


class ImageFiles:
    """The images of a dataset, in its order.

    Args:
        dataset: An ImageFolderDataset.
        name: Its name in messages and records.
        facts: Plain values for the record of the scores.

    Attributes:
        total: Number of images.
        size: (channels, resolution) of each.
        record: What the record of the scores says about the images.
    """

    def __init__(self, dataset, name='', facts=None):
        self.dataset, self.name = dataset, name
        self.total, self.size = len(dataset), (dataset.num_channels, dataset.resolution)
        self.record = {**(facts or {}), 'images': name, 'seeds': self._seeds()}

    def _seeds(self):
        """The seeds in generate.py's file names, as text; None if the files are named otherwise."""
        stems = [pathlib.PurePosixPath(name).stem for name in self.dataset.file_names]
        return seeds_text(map(int, stems)) if all(re.fullmatch(NUMBER, stem) for stem in stems) else None

    def batches(self, indices, batch):
        """Yield the images of `indices` in batches, uint8 [≤ batch, C, H, W]."""
        return image_batches(self.dataset, indices, batch)

    def identity(self):
        """What identifies these images without reading them: a digest of names, sizes and file times or checksums."""
        return {'files': self.dataset.fingerprint(self.dataset.file_names)}


class NetworkImages:
    """The images that a network generates from seeds: those that generate.py with the same batch size would write.

    Args:
        net: Preconditioned network on its device, in evaluation mode.
        sampler: As for `generate_batch`.
        seeds: Distinct integers; they are sorted, as the file names would be.
        class_idx: As for `generate_batch`.
        facts: Plain values that identify the network and its sampler (`training.provenance`).
        must_be_finite: Whether `batches` raises UserError for an image with NaN or infinite values.

    Raises:
        UserError: a seed occurs twice.
    """

    def __init__(self, net, sampler, seeds, class_idx=None, facts=None, must_be_finite=True):
        self.seeds = sorted(seeds)
        check_once(self.seeds)
        self.net, self.sampler, self.class_idx, self.facts = net, sampler, class_idx, facts or {}
        self.must_be_finite = must_be_finite
        self.total, self.name = len(self.seeds), f'seeds {seeds_text(self.seeds)}'
        self.size = net.img_channels, net.img_resolution
        self.record = {**self.facts, 'images': None, 'seeds': seeds_text(self.seeds)}

    def batches(self, indices, batch):
        """Yield the images of `indices` in batches, uint8 [≤ batch, C, H, W], on the network's device."""
        for start in range(0, len(indices), batch):
            seeds = [self.seeds[i] for i in indices[start:start + batch]]
            images = generate_batch(self.net, seeds, self.sampler, self.class_idx, size=min(batch, self.total))
            if self.must_be_finite:
                check_finite(images, seeds)
            yield to_uint8(images)

    def identity(self):
        """What identifies these images: network, sampler and seeds."""
        return {'network': self.facts, 'seeds': self.seeds}


def seeds_text(seeds):
    """Seeds as text, such as '0-49999' for consecutive ones; long lists are truncated."""
    return excerpt(format_int_list(seeds), 200)


def say(text):
    """Print a line on rank 0. A full disk or a closed pipe behind stdout ends no work: the scores are recorded too."""
    with contextlib.suppress(OSError):
        dist.print0(text)


def statistics(source, detector, metrics, batch, num_features=None, unfinished=None, progress=True):
    """Statistics (see `training.metrics`) of all images of a source. Call on all ranks; complete on rank 0.

    Args:
        source: `ImageFiles` or `NetworkImages`.
        detector, metrics, num_features: As for `Accumulator`.
        batch: Batch size; a rank's share consists of whole batches.
        unfinished: Where to save the pass and continue it from (`unfinished_pass`), or None.
        progress: Whether rank 0 shows a progress bar.
    """
    accumulator = m.Accumulator(detector, metrics, source.total, batch, num_features)
    stored = unfinished.load() if unfinished else None
    if stored is not None:
        accumulator.restore(stored)
        done = accumulator.index - accumulator.share.start
        say(f'Continuing an interrupted run after {done} of {len(accumulator.share)} images per process.')
    shown = progress and dist.get_rank() == 0
    with (tqdm.tqdm(total=len(accumulator.share), initial=accumulator.index - accumulator.share.start, unit='image',
                    disable=None if shown else True) as bar,
          unfinished.saved_on_ctrl_c(accumulator) if unfinished else contextlib.nullcontext()):
        for images in source.batches(range(accumulator.index, accumulator.share.stop), batch):
            with defer_signal(signal.SIGINT) if unfinished else contextlib.nullcontext():
                accumulator.add(images)
            bar.update(len(images))
            if unfinished:
                unfinished.save_if_due(accumulator)
    if unfinished:
        unfinished.save(accumulator)  # other ranks, other rounds or the scores may still be interrupted
    return {**accumulator.statistics(), **dict(zip(m.SIZE, map(np.int64, source.size)))}


def unfinished_pass(source, detector, metrics, batch):
    """The `Unfinished` that saves and continues a pass over this source with this detector. Call on all ranks."""
    identity = dist.on_rank0(source.identity)
    collectors = sorted({c for name in metrics for c in m.METRICS[name].collectors})
    return Unfinished([identity, detector.name, detector.digest, collectors, source.total, batch])


class Scorer:
    """A detector and reference statistics, ready to score sources of images. Create it on all ranks.

    Args:
        metrics: Names in `METRICS`.
        detector: A loaded detector.
        reference: Statistics (`load_reference`), or None if no metric needs any.
        ref, ref_sha256: Name and digest of the reference, for the record.
        seed: Seed of KID's subsets.
    """

    def __init__(self, metrics, detector, reference=None, ref=None, ref_sha256=None, seed=0):
        self.metrics, self.detector, self.reference, self.seed = metrics, detector, reference, seed
        self.facts = {'detector': detector.name, 'detector_sha256': detector.digest, 'ref': ref,
                      'ref_sha256': ref_sha256, 'metric_seed': seed}

    def check(self, total):
        """Raise UserError if `total` images cannot be scored; meant to be called before generating any."""
        m.check_images(self.metrics, total, self.detector)

    def warn_of_size(self, source):
        """Print a warning on rank 0 if the reference is known to come from images of another size.

        Detectors resize all images to one size, so nothing fails and the scores look like any others.
        """
        known = m.size_of(self.reference or {})
        if known is not None and known != tuple(source.size) and dist.get_rank() == 0:
            sizes = ['{1}x{1} pixels with {0} channel(s)'.format(*size) for size in (source.size, known)]
            click.echo(f"Warning: the images have {sizes[0]}, those of {self.facts['ref']} {sizes[1]}; make "
                       'sure that this comparison is intended', err=True)

    def __call__(self, source, batch, unfinished=None, progress=True):
        """Score a source: (scores {name: value}, facts for the record), both {} on ranks above 0. Call on all ranks."""
        started = time.monotonic()
        stats = statistics(source, self.detector, self.metrics, batch, m.num_features_of(self.reference or {}),
                           unfinished, progress)
        if dist.get_rank() > 0:
            return {}, {}
        values = m.score(self.metrics, stats, self.reference, self.seed)
        seconds = unfinished.seconds() if unfinished else time.monotonic() - started
        return values, {**self.facts, 'num_images': source.total, 'batch': batch, 'seconds': round(seconds, 3)}


def open_detector(spec):
    """Load a detector (`load_detector`) on every rank; rank 0 goes first, so a download happens once."""
    return dist.first_on_rank0(lambda: load_detector(spec, dist.device()))


def load_scorer(metrics, detector, ref=None, seed=0):
    """Load detector and reference statistics into a `Scorer`. Call on all ranks.

    Args:
        metrics: Names in `METRICS`.
        detector: As for `load_detector`, or a loaded one.
        ref: Path or URL of the reference statistics; None if no metric needs any.
        seed: Seed of KID's subsets.

    Raises:
        UserError: any of these is unsuitable.
    """
    m.check_reference(metrics, ref)
    if not isinstance(detector, Detector):
        detector = open_detector(detector)
    if not ref:
        return Scorer(metrics, detector, seed=seed)
    reference = dist.first_on_rank0(lambda: m.load_reference(ref, metrics, detector))
    return Scorer(metrics, detector, reference, os.fspath(ref), file_sha256(local_path(ref)), seed)


def write_reference(dest, source, detector, metrics, batch, progress=True):
    """Write the reference statistics that `metrics` need to an .npz file. Call on all ranks.

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
