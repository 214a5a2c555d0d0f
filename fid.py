"""Score images: Frechet Inception Distance (FID), Inception Score, KID, precision and recall."""

import click
import tqdm

from torch_utils import distributed
from training import metrics as m
from training.detectors import DETECTORS, load_detector
from training.metric_images import image_batches, open_images


def rank0_first(load, *args):
    """load(*args) on every rank; rank 0 downloads what it names first, the others find the cached copy."""
    if distributed.get_rank() > 0:
        distributed.barrier()
    loaded = load(*args)
    if distributed.get_rank() == 0:
        distributed.barrier()
    return loaded


def dataset_statistics(dataset, detector, metrics, batch, num_features=None):
    """Statistics of all images of a dataset (see `training.metrics.accumulate`), with a progress bar."""
    total = len(dataset)
    m.check_images(metrics, total, detector)
    share = m.rank_share(total)
    shown = tqdm.tqdm(total=len(share), unit='image', disable=None if distributed.get_rank() == 0 else True)

    def batches():
        for images in image_batches(dataset, share, batch):
            yield images
            shown.update(len(images))

    with shown:
        return m.accumulate(batches(), detector, metrics, total, num_features)


def calc(images, ref, num, seed, batch, detector, metrics):
    """Scores of a folder or zip of images, {name: value}; {} on ranks other than 0."""
    names = m.parse_metrics(metrics)
    m.check_reference_given(names, ref)
    detector = rank0_first(load_detector, detector, distributed.device())
    reference = rank0_first(m.load_reference, ref, names, detector) if ref else None
    dataset = open_images(images, num, seed)
    distributed.print0(f'Scoring {len(dataset)} images of {images} ...')
    stats = dataset_statistics(dataset, detector, names, batch, m.num_features_of(reference or {}))
    if distributed.get_rank() > 0:
        return {}
    return {m.label(k, detector): v for k, v in m.score(names, stats, reference, seed).items()}


def ref(data, dest, batch, detector, metrics):
    """Write reference statistics of a folder or zip of images to an .npz file."""
    names = [name for name in m.parse_metrics(metrics) if m.METRICS[name].ref_arrays]
    m.check_destination(dest)
    detector = rank0_first(load_detector, detector, distributed.device())
    dataset = open_images(data)
    distributed.print0(f'Reference statistics of {len(dataset)} images of {data} ...')
    stats = dataset_statistics(dataset, detector, names, batch)
    if distributed.get_rank() == 0:
        m.save_statistics(dest, stats)
    distributed.barrier()
    distributed.print0(f'Wrote {dest}')


# ---- Flags.

METRICS_HELP = 'Comma-separated: ' + ', '.join(f'{name} ({metric.title})' for name, metric in m.METRICS.items())
DETECTOR_HELP = f'{", ".join(DETECTORS)}, or a TorchScript or .pth file'

common = [
    click.option('--batch', help='Images per batch and process', metavar='INT', type=click.IntRange(min=1),
                 default=64, show_default=True),
    click.option('--detector', help=DETECTOR_HELP, metavar='NAME|PATH|URL', default=next(iter(DETECTORS)),
                 show_default=True),
    click.option('--metrics', help=METRICS_HELP, metavar='LIST', default=next(iter(m.METRICS)), show_default=True),
]


def with_common(command):
    for option in reversed(common):
        command = option(command)
    return command


def under_ranks(work):
    """Run `work` inside the process group, and leave the group whatever happens."""
    distributed.init()
    try:
        return work()
    finally:
        distributed.cleanup()


@click.group()
def main():
    """Score images: Frechet Inception Distance (FID), Inception Score, KID, precision and recall.

    Examples:

    \b
    # Reference statistics of a dataset, then the FID of 50,000 images. (With --num, torchrun needs "--" before fid.py.)
    python fid.py ref --data=datasets/cifar10-32x32.zip --dest=fid-refs/cifar10-32x32.npz
    torchrun --standalone --nproc_per_node=1 fid.py calc --images=fid-tmp --ref=fid-refs/cifar10-32x32.npz

    \b
    # Without network: distance of plain pixel features, printed as FD-pixels.
    python fid.py ref --data=DIR --dest=pixels.npz --detector=pixels
    python fid.py calc --images=out --ref=pixels.npz --detector=pixels --num=1000
    """


@main.command('calc')
@click.option('--images', help='Images to score', metavar='PATH|ZIP', required=True)
@click.option('--ref', help='Reference statistics', metavar='NPZ|URL')
@click.option('--num', help='Number of images to score; a random subset if there are more', metavar='INT',
              type=click.IntRange(min=2), default=50_000, show_default=True)
@click.option('--seed', help='Chooses the random subsets', metavar='INT', type=click.IntRange(min=0), default=0,
              show_default=True)
@with_common
def calc_command(**options):
    """Score a folder or zip of images."""
    def work():
        for name, value in calc(**options).items():
            print(f'{name}: {value:.8g}')
        distributed.barrier()
    under_ranks(work)


@main.command('ref')
@click.option('--data', help='Images of the reference', metavar='PATH|ZIP', required=True)
@click.option('--dest', help='File to write', metavar='NPZ', required=True)
@with_common
def ref_command(**options):
    """Compute reference statistics of a folder or zip of images."""
    under_ranks(lambda: ref(**options))


if __name__ == '__main__':
    main()
