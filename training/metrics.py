"""Scores of images against reference statistics: one pass over the images serves all metrics.

    accumulator = Accumulator(detector, metrics, total, batch)    on all ranks, one `add` per batch
    stats = accumulator.statistics()                              on all ranks
    scores = score(metrics, stats, ref, seed)                     on rank 0

Statistics are dicts of NumPy arrays: mu, sigma, num, detector, detector_hash and whatever
else the metrics need (see `metric_collectors`), and the images' channels and resolution. As .npz files
they can be read by EDM, and EDM's are read here.
"""

import dataclasses
import os
from collections.abc import Callable

import numpy as np
import torch

from dnnlib import UserError
from dnnlib.download import is_url, local_path
from dnnlib.files import atomic_write, check_writable
from training import metric_fid, metric_is, metric_kid, metric_pr
from training.detectors import scoring_batch
from training.metric_collectors import Features, Moments, SplitProbabilities, rank_share
from training.npz import read_npz


@dataclasses.dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        title: In words, for help texts.
        scores: Names of its values; one that ends in `STD` is the standard deviation of the one before.
        best: `min` or `max`: which of several rounds' values counts.
        collectors: Names in `COLLECTORS` of what it needs from the images.
        ref_arrays: Arrays that it needs from the reference statistics; empty if it needs no reference.
        min_images: Fewest images, on either side, for which it is defined.
        score: (stats, ref, seed) → {name: value}.
    """

    title: str
    scores: tuple
    best: Callable
    collectors: tuple
    ref_arrays: tuple
    min_images: int
    score: Callable


STD = '_std'
COLLECTORS = {'moments': Moments, 'features': Features, 'splits': SplitProbabilities}

METRICS = {
    'fid': Metric('Frechet distance', ('FID',), min, ('moments',), ('mu', 'sigma'), 2, metric_fid.score_fid),
    'is': Metric('Inception Score', ('IS', 'IS_std'), max, ('splits',), (), metric_is.NUM_SPLITS, metric_is.score_is),
    'kid': Metric('kernel distance', ('KID', 'KID_std'), min, ('features',), ('features',), metric_kid.SUBSET_SIZE,
                  metric_kid.score_kid),
    'pr': Metric('precision and recall', ('precision', 'recall'), max, ('features',), ('features',),
                 metric_pr.NEIGHBOURS + 1, metric_pr.score_pr),
}


def parse_metrics(text):
    """'fid,is' → ['fid', 'is'], each once, in the order given.

    Raises:
        UserError: an unknown metric, or none.
    """
    names = list(dict.fromkeys(part.strip() for part in text.split(',')))
    unknown = [n for n in names if n not in METRICS]
    if unknown:
        raise UserError(f"there is no metric '{unknown[0]}'; choose from {','.join(METRICS)}")
    return names


# -- one pass over the images

class Accumulator:
    """Accumulates the statistics that `metrics` need, batch by batch; mu and sigma always. Made on all ranks together.

    Args:
        detector: A `training.detectors.Detector`.
        metrics: Names in `METRICS`.
        total: Number of images over all ranks, at least 2.
        batch: Size of all batches but the last; it determines the ranks' shares.
        num_features: Number of features that the detector must give (the reference's), or None.

    Attributes:
        share: Indices of this rank's images (`rank_share`).
        index: Index of the next image expected.

    Raises:
        UserError: too few images, a detector without class probabilities.
    """

    def __init__(self, detector, metrics, total, batch=1, num_features=None):
        check_images(metrics, total, detector)
        wanted = dict.fromkeys(('moments', *(c for m in metrics for c in METRICS[m].collectors)))
        self.collectors = {name: COLLECTORS[name](total, batch) for name in wanted}
        self.need_probs = any(c.uses == 'probs' for c in self.collectors.values())
        self.detector, self.total, self.num_features = detector, total, num_features
        self.share = rank_share(total, batch)
        self.index = self.share.start

    def add(self, images):
        """Take the next images of this rank's share, uint8 [B, C, H, W].

        Raises:
            UserError: features that are not finite, or not `num_features` of them.
        """
        # In parts of one size, however images are drawn or read: the last bits of features depend on it.
        parts = [self.detector(part, features=True, probs=self.need_probs)
                 for part in images.split(scoring_batch(self.detector.device))]
        features, probs = (torch.cat(part) if part[0] is not None else None for part in zip(*parts))
        _check_features(features, self.index, self.detector, self.num_features)
        for c in self.collectors.values():
            c.update(features if c.uses == 'features' else probs)
        self.index += len(images)

    def state(self):
        """What `restore` needs to continue from here: {name: array}."""
        arrays = {f'{name}.{key}': a for name, c in self.collectors.items() for key, a in c.state().items()}
        return {'index': np.int64(self.index), **arrays}

    def restore(self, state):
        """Continue from the `state` of an accumulator with the same arguments and rank."""
        for name, c in self.collectors.items():
            arrays = {key.removeprefix(f'{name}.'): a for key, a in state.items() if key.startswith(f'{name}.')}
            c.restore(arrays, int(state['index']) - self.index, self.detector.device)
        self.index = int(state['index'])

    def statistics(self):
        """Statistics of the images of all ranks, complete on rank 0. Call once, on all ranks."""
        if self.index != self.share.stop:
            raise ValueError(f'got {self.index - self.share.start} images where {len(self.share)} were announced')
        stats = {'num': np.int64(self.total), 'detector': np.str_(self.detector.name),
                 'detector_hash': np.str_(self.detector.digest)}
        for c in self.collectors.values():
            stats.update(c.result())
        return stats


def accumulate(batches, detector, metrics, total):
    """Statistics of an iterable of batches, those of `rank_share(total)` in order; see `Accumulator`."""
    accumulator = Accumulator(detector, metrics, total)
    for images in batches:
        accumulator.add(images)
    return accumulator.statistics()


def check_images(metrics, total, detector=None, flags='--'):
    """Raise UserError unless `metrics` are defined for that many images and this detector, if it is known.

    `flags` is the prefix of the flags that the message names: train.py's are --eval-metrics and --eval-detector.
    """
    for name in metrics:
        _check_enough(name, total, 'images', flags)
        if detector is not None and 'splits' in METRICS[name].collectors and not detector.has_probs:
            raise UserError(f"the metric '{name}' needs class probabilities, which the detector "
                            f"'{detector.name}' does not give; use {flags}detector=inception or leave '{name}' out")
    if total < 2:
        raise UserError(f'statistics need at least 2 images and there are {total}; give more')


def _check_enough(name, count, what, flags='--'):
    least = METRICS[name].min_images
    if count < least:
        raise UserError(f"the metric '{name}' needs at least {least} {what} and there are {count}; "
                        f"give more, or leave '{name}' out of {flags}metrics")


def _check_features(features, index, detector, num_features):
    if num_features is not None and features.shape[1] != num_features:
        raise UserError(f"the detector '{detector.name}' gives {features.shape[1]} features and the reference has "
                        f'{num_features}; make the reference with the same --detector (fid.py ref)')
    finite = torch.isfinite(features).all(dim=1)
    if not finite.all():
        bad = index + int(torch.nonzero(~finite)[0])
        raise UserError(f"the detector '{detector.name}' gave NaN or infinite features for image number {bad} "
                        '(counted from 0); check that image and the detector file')


# -- scores

def score(metrics, stats, ref=None, seed=0):
    """{name: value} of all metrics in order, e.g. {'FID': 1.97, 'IS': 9.8, 'IS_std': 0.1}.

    Args:
        stats: Statistics of the images scored.
        ref: Statistics of the reference; None if no metric needs one.
        seed: Chooses KID's subsets.
    """
    values = {}
    for name in metrics:
        values.update(METRICS[name].score(stats, ref, seed))
    return values


def best_scores(metrics, rounds):
    """The best of several rounds' `score`s, separately for each; a deviation is that of the round chosen.

    Args:
        metrics: Names in `METRICS`.
        rounds: A list of dicts with the same names in the same order.
    """
    best = {}
    for metric in metrics:
        for name in METRICS[metric].scores:
            if not name.endswith(STD):
                chosen = METRICS[metric].best(rounds, key=lambda values: values[name])
            best[name] = chosen[name]
    return best


def label(name, detector):
    """A score's name with its detector: 'FID' for Inception, 'FD-pixels', 'KID-pixels_std' for others."""
    base, mark, rest = name.partition('_')
    if base == 'FID' and detector.suffix:
        base = 'FD'
    return base + detector.suffix + mark + rest


def kind_of(label):
    """The kind of score that a `label` names: 'FD' for 'FD-pixels'; a name without a detector is its own kind."""
    return label.split('-')[0]


# -- statistics as files

SIZE = ('channels', 'resolution')  # arrays that `size_of` reads


def check_destination(path, data=None):
    """Raise UserError if `save_statistics` could not write `path`, before the slow part of the work.

    It must not replace anything but statistics, least of all the images themselves (`data`).
    """
    check_writable(path, 'an .npz file')
    if data is not None and os.path.exists(data) and os.path.exists(path) and os.path.samefile(data, path):
        raise UserError(f'{path} is the data set itself, which the statistics would replace; give another --dest, '
                        'such as ref.npz')
    if not os.fspath(path).lower().endswith('.npz'):
        raise UserError(f'{path} does not end in .npz, as files of statistics do; give another --dest, such as '
                        f'{os.path.splitext(path)[0]}.npz')
    if os.path.exists(path) and not _holds_statistics(path):
        raise UserError(f'{path} exists and does not hold statistics; give another --dest, or remove that file first')


def _holds_statistics(path):
    try:
        return bool(read_npz(path, {'mu', 'features'}))
    except (ValueError, OSError):
        return False


def save_statistics(path, stats):
    """Write statistics as .npz, atomically; EDM can read its mu and sigma."""
    check_destination(path)
    with atomic_write(path) as f:
        np.savez(f, **stats)


def load_reference(path_or_url, metrics, detector):
    """Load reference statistics and check that they suit `metrics` and `detector`.

    A file with only mu and sigma (EDM's layout) suffices for FID; it does not record its detector, so only
    the number of features is checked.

    Raises:
        UserError: no such file, not an .npz, arrays missing or malformed, made by another detector.
    """
    path = local_path(path_or_url)
    needed = dict.fromkeys(a for m in metrics for a in METRICS[m].ref_arrays)
    try:
        ref = read_npz(path, {'mu', 'sigma', 'num', 'detector', 'detector_hash', *SIZE, *needed})
    except (ValueError, OSError) as e:
        if is_url(path_or_url):
            path.unlink(missing_ok=True)  # otherwise the cache would serve the bad file for ever
        raise UserError(f'{path_or_url} is not an .npz file of statistics, or it is damaged (if it was downloaded, '
                        'it may be a web page); make one with fid.py ref, or get it again') from e
    _check_arrays(ref, metrics, path_or_url)
    _check_detector(ref, detector, path_or_url)
    for name in metrics:
        if 'features' in METRICS[name].ref_arrays:
            _check_enough(name, len(ref['features']), f'images in {path_or_url}')
    return ref


def _check_arrays(ref, metrics, what):
    for name in metrics:
        for array in METRICS[name].ref_arrays:
            if array not in ref:
                needs = {other: set(metric.ref_arrays) for other, metric in METRICS.items() if metric.ref_arrays}
                wanted = ','.join(other for other in needs if other in metrics or needs[other] <= ref.keys())
                raise UserError(f"{what} has no array '{array}', which {name} needs; recreate the reference "
                                f'with fid.py ref --metrics={wanted}')
    dim = num_features_of(ref)
    shapes = {'mu': (dim,), 'sigma': (dim, dim), 'features': (*np.shape(ref.get('features'))[:1], dim)}
    for name in (n for n in shapes if n in ref):
        a = ref[name]
        if a.shape != shapes[name] or a.dtype.kind != 'f' or not np.isfinite(a).all():
            raise UserError(f"the array '{name}' of {what} ({a.dtype}, {list(a.shape)}) is not finite numbers of "
                            f'shape {list(shapes[name])}; recreate the reference with fid.py ref')


def size_of(stats):
    """(channels, resolution) of the images behind statistics; None if they do not record it, as EDM's."""
    values = [stats[name] for name in SIZE if name in stats]
    plain = len(values) == len(SIZE) and all(np.ndim(v) == 0 and np.asarray(v).dtype.kind in 'iu' for v in values)
    return tuple(map(int, values)) if plain else None


def num_features_of(ref):
    """Number of features D of statistics, from whichever array is there; None without any."""
    return next((ref[a].shape[-1] for a in ('mu', 'features', 'sigma') if a in ref and ref[a].ndim), None)


def _check_detector(ref, detector, what):
    if 'detector' in ref:
        name, digest = str(ref['detector']), str(ref.get('detector_hash', ''))
        if not detector.made(name, digest):
            raise UserError(f"{what} was made with the detector '{name}', not with '{detector.name}' (or with another "
                            'file of that name); give the same --detector, or recreate the reference with fid.py ref')
    if None not in (detector.num_features, num_features_of(ref)) and detector.num_features != num_features_of(ref):
        raise UserError(f'{what} has {num_features_of(ref)} features and the detector '
                        f"'{detector.name}' gives {detector.num_features}; give the --detector it was made with, "
                        'or recreate the reference with fid.py ref')


def check_reference(metrics, ref):
    """Raise UserError if `metrics` need a reference and there is none, or if `ref` is a file that does not exist."""
    names = [m for m in metrics if METRICS[m].ref_arrays]
    if names and not ref:
        raise UserError(f"the metric '{names[0]}' compares with a reference; give --ref=NPZ (fid.py ref makes one)")
    if ref and not is_url(ref):
        local_path(ref)
