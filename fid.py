"""Score images: Frechet Inception Distance (FID), Inception Score, KID, precision and recall."""

import contextlib
import os
import pathlib
import sys

import click

from dnnlib import UserError
from dnnlib.download import is_url
from dnnlib.files import interruptible
from dnnlib.flags import Text
from dnnlib.json_files import check_json_lines, read_object
from dnnlib.text import parse_seeds
from torch_utils import distributed as dist
from training.detectors import DETECTORS, scoring_batch
from training.generated import RECORD
from training.generation import BATCH, GPU_BATCH, default_batch
from training.metric_images import open_images
from training.metrics import METRICS, best_scores, check_destination, check_reference, label, parse_metrics
from training.provenance import log_scores
from training.run_files import SCORES_NAME
from training.scoring import (ImageFiles, NetworkImages, load_scorer, open_detector, say, unfinished_pass,
                              write_reference)
from training.system import flag_of
from warm.flags import class_flag, sampler_flags
from warm.sources import open_network

NUM = 50_000  # images by default
KEPT = 'what was scored so far is kept: the same command continues from there'


def calc(images, network, ref, num, seed, seeds, rounds, log, batch, detector, metrics, class_idx, **sampler_options):
    """Score images in files or from a network, print the scores and append them to metrics.jsonl.

    Returns:
        {name: value}, the best of several rounds; {} on ranks other than 0.
    """
    network_only = {'seeds': seeds, 'rounds': rounds, 'class': class_idx, **sampler_options}
    check_exclusive(images, network, {flag_of(k): v for k, v in network_only.items()}, {'--num': num})
    if log:
        check_json_lines(log)
    metrics = parse_metrics(metrics)
    check_reference(metrics, ref)
    if images:
        sources, usual_batch, usual_log = file_sources(images, num, seed)
    else:
        sources, usual_batch, usual_log = network_sources(network, seeds, rounds, class_idx, sampler_options)
    scorer = load_scorer(metrics, detector, ref, seed)  # after the images, since it may have to be downloaded
    return score_rounds(scorer, sources, batch or usual_batch, log, usual_log)


def file_sources(images, num, seed):
    """([source], batch size, log) for a folder or zip of images."""
    source = ImageFiles(open_images(images, num or NUM, seed), images, read_object(pathlib.Path(images) / RECORD))
    return [source], scoring_batch(dist.device()), pathlib.Path(os.path.abspath(images)).parent / SCORES_NAME


def network_sources(network, seeds, rounds, class_idx, sampler_options):
    """(a source for each round, batch size, log) for a network."""
    seeds = seeds or list(range(NUM))
    say(f'Loading network from {network} ...')
    opened = open_network(network, sampler_options, class_idx)
    sources = [NetworkImages(opened.net, opened.sampler, [seed + shift for seed in seeds], class_idx, opened.facts)
               for shift in shifts(seeds, rounds or 1)]
    folder = pathlib.Path() if is_url(network) else opened.snapshot.path.parent
    return sources, default_batch(opened.net), folder / SCORES_NAME


def check_exclusive(images, network, network_only, images_only):
    """Raise UserError unless there is one source of images, without the other's flags ({flag: value or None})."""
    if bool(images) == bool(network):
        raise UserError('give either --images=PATH (images in files) or --network=FILE (a network that generates them)')
    kind, other = ('--images', '--network') if images else ('--network', '--images')
    wrong = [flag for flag, value in (network_only if images else images_only).items() if value is not None]
    if wrong:
        raise UserError(f'{wrong[0]} goes with {other}, not with {kind}; leave it out')


def shifts(seeds, rounds):
    """What to add to the seeds in each round, so that the rounds use consecutive ranges of the same length."""
    length = max(seeds) - min(seeds) + 1
    return [i * length for i in range(rounds)]


def score_rounds(scorer, sources, batch, log, usual_log):
    """Score each source, print all scores and the best, and append all to the file `log`, or else `usual_log`."""
    passes, results = [], []
    scorer.warn_of_size(sources[0])
    for i, source in enumerate(sources, 1):
        scorer.check(source.total)
        prior = f", which start from {source.record['prior']}" if source.record.get('prior') else ''
        say(f'Scoring {source.total} images of {source.name}{prior} ...')
        passes.append(unfinished_pass(source, scorer.detector, scorer.metrics, batch))
        results.append(scorer(source, batch, passes[-1]))
        if len(sources) > 1:
            print_scores(scorer, results[-1][0], f'Round {i} of {len(sources)}, ')
    best = {}
    if dist.get_rank() == 0:
        best = best_scores(scorer.metrics, [values for values, _ in results])
        try:
            for i, (source, (values, facts)) in enumerate(zip(sources, results), 1):
                log_scores(log or usual_log, values, scorer.detector,
                           {**source.record, **facts, 'round': i, 'rounds': len(sources)})
        except UserError as e:
            if log:
                raise
            click.echo(f'Warning: the scores were not recorded: {e.message} with --log', err=True)
        finally:
            print_scores(scorer, best)
    for done in passes:
        done.remove()
    return {label(name, scorer.detector): value for name, value in best.items()}


def print_scores(scorer, values, prefix=''):
    """Print a line for each score; ranks other than 0 have none.

    Raises:
        UserError: stdout is a full disk, or gone.
    """
    try:
        for name, value in values.items():
            print(f'{prefix}{label(name, scorer.detector)}: {value:.8g}', flush=True)
    except OSError as e:
        with contextlib.suppress(OSError):
            sys.stdout.close()  # or the interpreter would try again at its end, and say so
        raise UserError(f'could not print the scores: {e.strerror or e}; run the same command again with its output '
                        'elsewhere: it does not draw or score these images again') from e


def ref(data, dest, batch, detector, metrics):
    """Write reference statistics of a folder or zip of images to an .npz file."""
    metrics = parse_metrics(metrics)
    check_destination(dest, data)
    source = ImageFiles(open_images(data), data)
    detector = open_detector(detector)
    say(f'Reference statistics of {source.total} images of {data} ...')
    write_reference(dest, source, detector, metrics, batch or scoring_batch(detector.device))
    say(f'Wrote {dest}')


# -- flags

NAMES = ', '.join(f'{name} ({metric.title})' for name, metric in METRICS.items())
COMMON = (
    click.option('--batch', metavar='INT', type=click.IntRange(min=1), default=None,
                 help=f'Images per batch and process  [default: {BATCH}; up to {GPU_BATCH} on a GPU]'),
    click.option('--detector', metavar='NAME|PATH|URL', type=Text(), default=next(iter(DETECTORS)), show_default=True,
                 help=f'{", ".join(DETECTORS)}, or a TorchScript or .pth file'),
    click.option('--metrics', metavar='LIST', type=Text(), default=next(iter(METRICS)), show_default=True,
                 help=f'Comma-separated: {NAMES}'),
)


def with_common(command):
    """Decorator that adds the flags of both commands."""
    for option in reversed(COMMON):
        command = option(command)
    return command


@click.group()
def main():
    """Score images: Frechet Inception Distance (FID), Inception Score, KID, precision and recall.

    Examples:

    \b
    # Reference statistics of a dataset, then the FID of 50,000 images. (With --num, torchrun needs "--" before fid.py.)
    python fid.py ref --data=datasets/cifar10-32x32.zip --dest=fid-refs/cifar10-32x32.npz
    torchrun --standalone --nproc_per_node=1 fid.py calc --images=fid-tmp --ref=fid-refs/cifar10-32x32.npz

    \b
    # Straight from a network, as the paper reports it: 50,000 images, the best of three rounds.
    torchrun --standalone --nproc_per_node=8 fid.py calc --network=RUN/network-snapshot-200000.safetensors \\
        --ref=fid-refs/cifar10-32x32.npz --metrics=fid,is --rounds=3

    \b
    # Without internet: distance of plain pixel features, printed as FD-pixels.
    python fid.py ref --data=DIR --dest=pixels.npz --detector=pixels
    python fid.py calc --images=out --ref=pixels.npz --detector=pixels --num=1000
    """


@main.command('calc', context_settings=dict(max_content_width=120))
@click.option('--images', metavar='PATH|ZIP', type=Text(), help='Images to score')
@click.option('--network', metavar='FILE|URL', type=Text(), help='Snapshot whose images to score, without writing them')
@click.option('--ref', metavar='NPZ|URL', type=Text(), help='Reference statistics')
@click.option('--num', metavar='INT', type=click.IntRange(min=2),
              help=f'Number of images of --images to score; a random subset if there are more  [default: {NUM}]')
@click.option('--seed', metavar='INT', type=click.IntRange(min=0), default=0, show_default=True,
              help='Random seed of the subsets')
@click.option('--seeds', metavar='LIST', type=parse_seeds,
              help=f'Random seeds of the images of --network  [default: 0-{NUM - 1}]')
@click.option('--rounds', metavar='INT', type=click.IntRange(min=1),
              help='Score this many consecutive ranges of seeds and print the best  [default: 1]')
@click.option('--log', metavar='JSONL', type=Text(),
              help=f'File to append the scores to  [default: {SCORES_NAME} beside the images or the snapshot]')
@with_common
@class_flag
@sampler_flags
def calc_command(**options):
    """Score a folder or zip of images, or a network.

    The score of a network is that of the images that generate.py writes with the same --batch (and, on the CPU, the
    same OMP_NUM_THREADS). An interrupted run continues with the same command.
    """
    with interruptible(KEPT), dist.process_group():
        calc(**options)
        dist.barrier()


@main.command('ref')
@click.option('--data', metavar='PATH|ZIP', type=Text(), required=True, help='Reference images')
@click.option('--dest', metavar='NPZ', type=Text(), required=True, help='File to write, ending in .npz')
@with_common
def ref_command(**options):
    """Compute reference statistics of a folder or zip of images."""
    with interruptible(KEPT), dist.process_group():
        ref(**options)
        dist.barrier()


if __name__ == '__main__':
    main()
