"""Generate images from a snapshot: EDM's command, for EDM and Warm networks alike."""

import os
import pathlib

import click
import numpy as np
import PIL.Image
import tqdm

from dnnlib import UserError
from dnnlib.files import check_writable, interruptible
from dnnlib.flags import Text
from dnnlib.text import parse_seeds
from torch_utils import distributed as dist
from training.generated import check_kept, code_change_warning, image_path, remaining_seeds, write_images
from training.generation import BATCH, GPU_BATCH, default_batch, generate_images
from training.pictures import save_grid
from training.provenance import code_version
from training.samplers import StackedRandomGenerator, ablation_sampler, edm_sampler  # noqa: F401  (as in EDM)
from warm.flags import class_flag, sampler_flags
from warm.sources import open_network
from warm.trajectory import check_writer, save_trajectory, watch

MAX_GRID = 1024  # images in a contact sheet
MAX_WATCHED = 4  # images whose reverse process is shown


@click.command(context_settings=dict(show_default=True, max_content_width=120))
@click.option('--network', 'network_path', metavar='FILE|URL', type=Text(), required=True,
              help='Snapshot to sample from')
@click.option('--outdir', metavar='DIR', type=Text(), required=True, help='Where to save the images')
@click.option('--seeds', metavar='LIST', type=parse_seeds, default='0-63', help='Random seeds, such as 1,2,5-10')
@click.option('--subdirs', is_flag=True, help='Make a subfolder for every 1000 seeds')
@class_flag
@click.option('--batch', 'max_batch', metavar='INT', type=click.IntRange(min=1), default=None,
              help=f'Largest batch per rank  [default: {BATCH}; up to {GPU_BATCH} on a GPU, depending on its memory]')
@click.option('--grid', metavar='FILE.png', type=Text(), default=None, help='Also write a contact sheet of the images')
@click.option('--trajectory', metavar='FILE', type=Text(), default=None,
              help='Also show x, D, R and D + R through the reverse process: .png, .gif or .mp4')
@click.option('--overwrite', is_flag=True,
              help='Replace existing images instead of keeping them. Images made with other options are replaced '
                   'all or none: --seeds has to include all of them')
@sampler_flags
def main(**options):
    """Generate images as OUTDIR/SEED.png. An image depends only on its seed, not on the batch or the number of ranks.

    \b
    # 64 images and a contact sheet
    python generate.py --network=training-runs/00000-…/network-snapshot-000200.safetensors --outdir=out --grid=out.png

    \b
    # 50,000 images on 8 GPUs; after an interruption the same command continues
    torchrun --standalone --nproc_per_node=8 generate.py --network=… --outdir=out --seeds=0-49999 --subdirs
    """
    again = 'the same command without --overwrite' if options['overwrite'] else 'the same command'
    kept = f"the finished images in {options['outdir']} are kept, and {again} continues from there"
    with interruptible(kept), dist.process_group():
        run(**options)


def run(network_path, outdir, seeds, subdirs, class_idx, max_batch, grid, trajectory, overwrite, **sampler_options):
    """Generate the images of `seeds` that `outdir` lacks, over all ranks."""
    if grid is not None and pathlib.Path(grid).suffix.lower() != '.png':
        raise UserError(f'--grid={grid} does not end in .png; a contact sheet is written in this format only')
    if trajectory is not None:
        check_writer(trajectory)
    check_outside(outdir, {'--grid': grid, '--trajectory': trajectory})
    dist.print0(f'Loading network from {network_path}...')
    opened = open_network(network_path, sampler_options, class_idx)
    net, sampler = opened.net, opened.sampler
    if trajectory is not None and not opened.system.predicts_images:
        raise UserError(f'--trajectory shows estimates of the image, which a {opened.system.title} network does not '
                        'make; leave it out')
    for path in (grid, trajectory):
        if path is not None:
            dist.on_rank0(lambda: check_writable(path))
    version = dist.on_rank0(code_version)
    record = {**opened.facts, 'commit': version}
    missing = dist.on_rank0(lambda: remaining_seeds(outdir, seeds, subdirs, record, opened.difference, overwrite))
    dist.on_rank0(lambda: check_kept(outdir, set(seeds).difference(missing), subdirs, net))
    if len(missing) < len(seeds):
        dist.print0(f'{len(seeds) - len(missing)} of {len(seeds)} images already exist and are kept.')
        warning = dist.on_rank0(lambda: code_change_warning(outdir, version))
        if warning:
            dist.print0(f'Warning: {warning}.')
    dist.print0(f'Generating {len(missing)} images to {outdir}...')
    with tqdm.tqdm(total=len(missing), unit='img', disable=None if dist.get_rank() == 0 else True) as bar:
        batches = generate_images(net, seeds, sampler, max_batch or default_batch(net), class_idx, set(missing),
                                  must_be_finite=True)
        ranks = dist.get_world_size()
        write_images(outdir, batches, subdirs, progress=lambda n: bar.update(min(n * ranks, bar.total - bar.n)))
    dist.barrier()
    if grid is not None and dist.get_rank() == 0:
        save_grid(grid, read_images(outdir, seeds[:MAX_GRID], subdirs))
    if trajectory is not None and dist.get_rank() == 0:
        save_trajectory(trajectory, watch(net, opened.system, seeds[:MAX_WATCHED], opened.options, class_idx))
    dist.print0('Done.')


def check_outside(outdir, pictures):
    """Raise UserError for a picture {flag: path or None} inside `outdir`, where it would count as a generated image."""
    for flag, path in pictures.items():
        if path is not None and os.path.realpath(path).startswith(os.path.join(os.path.realpath(outdir), '')):
            raise UserError(f'{flag}={path} lies inside --outdir={outdir}, where every picture counts as an image; '
                            'put it beside that folder')


def read_images(outdir, seeds, subdirs):
    """The images of `seeds` as written, uint8 [N, C, H, W]."""
    images = []
    for seed in seeds:
        with PIL.Image.open(image_path(outdir, seed, subdirs)) as picture:
            pixels = np.asarray(picture)
        images.append(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))
    return np.stack(images)


if __name__ == '__main__':
    main()
