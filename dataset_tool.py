"""Convert images into a dataset for training: a thin command over training.dataset_sources and .dataset_convert."""

import os
import re

import click

from dnnlib.files import cpu_cores, escape_on_stdout, interruptible, sigterm_exits
from dnnlib.flags import Text
from training.dataset_convert import TRANSFORMS, convert
from training.dataset_sources import open_source
from training.workers import Workers

MAX_WORKERS = 16  # one process writes the output; more than this would only wait for it


def parse_resolution(ctx, param, text):
    """'64x48' → (64, 48); None stays None; anything else raises click's `BadParameter`."""
    match = re.fullmatch(r'(\d{1,6})x(\d{1,6})', text or '')
    if text is not None and not match:
        raise click.BadParameter(f"'{text}' is not of the form WxH, such as 64x64")
    return match and (int(match[1]), int(match[2]))


@click.command()
@click.option('--source', required=True, metavar='PATH', type=Text(),
              help='Folder or zip of images, cifar-10-python.tar.gz, train-images-idx3-ubyte.gz (MNIST), '
                   'a folder ending in _lmdb (LSUN), or cifar10 to download CIFAR-10 (cifar10-test: its test set).')
@click.option('--dest', required=True, metavar='PATH', type=Text(),
              help='New or empty folder, or a file ending in .zip, which is replaced if it exists.')
@click.option('--max-images', type=click.IntRange(min=1), metavar='INT', help='Read at most this many images. [all]')
@click.option('--transform', type=click.Choice(list(TRANSFORMS)), help='How to crop; needs --resolution. [none]')
@click.option('--resolution', metavar='WxH', callback=parse_resolution,
              help='Size to resize to; without --transform, proportions are not kept. [unchanged]')
@click.option('--workers', type=click.IntRange(min=1), metavar='INT', default=lambda: min(cpu_cores(), MAX_WORKERS),
              help='Processes that decode and encode; does not change the result. [CPU cores]')
def main(source, dest, max_images, transform, resolution, workers):
    """Convert images into a dataset: square PNG files of one size and dataset.json with their labels.

    Labels come from the source's dataset.json; without one, from the sorted names of its top-level folders.
    Both transforms give RGB images: center-crop takes the largest centred square; center-crop-wide puts the full
    width, as WxH, on a black WxW square, and leaves out images that are too small. Resizing uses Lanczos.
    """
    if 'WORLD_SIZE' in os.environ and int(os.environ.get('RANK') or 0) > 0:
        return  # under torchrun, rank 0 does everything, with its own --workers
    escape_on_stdout()
    with (interruptible(f'nothing was changed at {dest}: run the same command again to create it'),
          Workers(workers) as workers):
        images = open_source(source)
        summary = convert(images, dest, transform, resolution, max_images, workers)
    skipped = f', {summary.num_skipped} too small and left out' if summary.num_skipped else ''
    stretched = (f', {summary.num_stretched} of them stretched to a square (--transform=center-crop keeps proportions)'
                 if summary.num_stretched else '')
    others = images.left_out
    unread = f'; {sum(others.values())} file(s) of other types left out ({", ".join(sorted(others))})' if others else ''
    click.echo(f'{dest}: {summary.num_images} images of {summary.size}x{summary.size}, {summary.channels} channel(s), '
               f'{in_words(summary.labels)}{stretched}{skipped}{unread}')


def in_words(labels):
    """Whether there are labels and, if they are class numbers, of how many classes."""
    if labels is None:
        return 'no labels'
    if isinstance(labels[0], list):
        return 'with labels'
    classes = len(set(labels))
    return f'with labels of {classes} class{"es" if classes > 1 else ""}'


if __name__ == '__main__':
    # A job stopped by SIGTERM removes its temporary files, as one stopped by Ctrl-C does.
    with sigterm_exits(143):
        main()
