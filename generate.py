"""Generate images from a snapshot: EDM's command, for EDM and Warm networks alike."""

import pathlib

import click
import numpy as np
import PIL.Image
import tqdm

from dnnlib.files import file_sha256
from dnnlib.text import parse_int_list
from torch_utils import distributed as dist
from training.generation import (check_class, generate_images, image_path, remaining_seeds, save_grid,
                                 write_images)
from training.samplers import (DISCRETIZATIONS, SCALINGS, SCHEDULES, StackedRandomGenerator,  # noqa: F401
                               ablation_sampler, edm_sampler)
from training.snapshot import build_network, read_snapshot
from warm.flags import system_flags
from warm.samplers import SOLVERS
from warm.systems import SYSTEMS
from warm.trajectory import check_writer, save_trajectory, watch

MAX_GRID = 1024  # images in a contact sheet
MAX_WATCHED = 4  # images whose reverse process is shown


@click.command(context_settings=dict(show_default=True, max_content_width=120))
@click.option('--network', 'network_path', metavar='FILE|URL', required=True, help='Snapshot to draw from')
@click.option('--outdir', metavar='DIR', required=True, help='Where to save the images')
@click.option('--seeds', metavar='LIST', type=parse_int_list, default='0-63', help='Random seeds, such as 1,2,5-10')
@click.option('--subdirs', is_flag=True, help='A folder for every 1000 seeds')
@click.option('--class', 'class_idx', metavar='INT', type=click.IntRange(min=0), default=None,
              help='Class of all images  [default: random]')
@click.option('--batch', 'max_batch', metavar='INT', type=click.IntRange(min=1), default=64,
              help='Largest batch per rank')
@click.option('--grid', metavar='FILE.png', default=None, help='Also write a contact sheet of the images')
@click.option('--trajectory', metavar='FILE', default=None,
              help='Also show x, D, R and D + R through the reverse process: .png, .gif or .mp4')
@click.option('--overwrite', is_flag=True, help='Replace images that are there; otherwise they are kept')
# Sampler.
@click.option('--steps', 'num_steps', metavar='INT', type=click.IntRange(min=1), default=None,
              help='Number of steps  [default: 18]')
@click.option('--sigma_min', metavar='FLOAT', type=click.FloatRange(min=0, min_open=True), default=None,
              help='Lowest noise level  [default: 0.002, or of the ablation]')
@click.option('--sigma_max', metavar='FLOAT', type=click.FloatRange(min=0, min_open=True), default=None,
              help='Highest noise level  [default: 80, or of the ablation]')
@click.option('--rho', metavar='FLOAT', type=click.FloatRange(min=0, min_open=True), default=None,
              help='Exponent of the time steps  [default: 7]')
@click.option('--S_churn', 'S_churn', metavar='FLOAT', type=click.FloatRange(min=0), default=None,
              help='Stochasticity strength  [default: 0]')
@click.option('--S_min', 'S_min', metavar='FLOAT', type=click.FloatRange(min=0), default=None,
              help='Lowest noise level with stochasticity  [default: 0]')
@click.option('--S_max', 'S_max', metavar='FLOAT', type=click.FloatRange(min=0), default=None,
              help='Highest noise level with stochasticity  [default: inf]')
@click.option('--S_noise', 'S_noise', metavar='FLOAT', type=float, default=None,
              help='Inflation of the noise  [default: 1]')
@click.option('--solver', type=click.Choice(list(SOLVERS)), default=None,
              help='ODE solver; on EDM networks euler and heun select the ablation sampler  [default: heun]')
@click.option('--disc', 'discretization', type=click.Choice(list(DISCRETIZATIONS)), default=None,
              help='Ablation: time steps')
@click.option('--schedule', type=click.Choice(list(SCHEDULES)), default=None, help='Ablation: noise schedule')
@click.option('--scaling', type=click.Choice(list(SCALINGS)), default=None, help='Ablation: signal scaling')
@system_flags('own_sample_options')
def main(**options):
    """Generate images as OUTDIR/SEED.png. An image depends on its seed alone, whatever the batch and the ranks.

    \b
    # 64 images and a contact sheet
    python generate.py --network=training-runs/00000-…/network-snapshot-000200.safetensors --outdir=out --grid=out.png

    \b
    # 50,000 images on 8 GPUs; after an interruption the same command continues
    torchrun --standalone --nproc_per_node=8 generate.py --network=… --outdir=out --seeds=0-49999 --subdirs
    """
    dist.init()
    try:
        run(**options)
    finally:
        dist.cleanup()


def run(network_path, outdir, seeds, subdirs, class_idx, max_batch, grid, trajectory, overwrite, **sampler_options):
    """Generate what is missing of `seeds` in `outdir`, over all ranks."""
    sampler_options = {name: value for name, value in sampler_options.items() if value is not None}
    if trajectory is not None:
        check_writer(trajectory)
    dist.print0(f'Loading network from {network_path}...')
    snapshot = dist.first_on_rank0(lambda: read_snapshot(network_path))
    net = build_network(snapshot, SYSTEMS, dist.device())
    system = SYSTEMS[snapshot.system]
    sampler = system.make_sampler(net, sampler_options)
    check_class(net, class_idx)
    settings = dict(network=pathlib.Path(snapshot.path).name, sha256=file_sha256(snapshot.path), class_idx=class_idx,
                    sampler=sampler_options)
    missing = dist.on_rank0(lambda: remaining_seeds(outdir, seeds, subdirs, settings, overwrite))
    if len(missing) < len(seeds):
        dist.print0(f'{len(seeds) - len(missing)} of {len(seeds)} images are there already and kept.')
    dist.print0(f'Generating {len(missing)} images to {outdir}...')
    with tqdm.tqdm(total=len(missing), unit='img', disable=None if dist.get_rank() == 0 else True) as bar:
        write_images(outdir, generate_images(net, missing, sampler, max_batch, class_idx), subdirs,
                     progress=lambda n: bar.update(n * dist.get_world_size()))
    dist.barrier()
    if grid is not None and dist.get_rank() == 0:
        save_grid(grid, read_images(outdir, seeds[:MAX_GRID], subdirs))
    if trajectory is not None and dist.get_rank() == 0:
        save_trajectory(trajectory, watch(net, system, seeds[:MAX_WATCHED], sampler_options, class_idx))
    dist.print0('Done.')


def read_images(outdir, seeds, subdirs):
    """The images of `seeds` as written, uint8 [N, C, H, W]."""
    images = [np.asarray(PIL.Image.open(image_path(outdir, seed, subdirs))) for seed in seeds]
    return np.stack([x[None] if x.ndim == 2 else x.transpose(2, 0, 1) for x in images])


if __name__ == '__main__':
    main()
