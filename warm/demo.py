"""The whole pipeline in miniature: train Warm and EDM on the embedded digits, generate, score and plot.

    python -m warm.demo --outdir=demo

It runs the project's own commands and prints each before it starts, so every step can be repeated by hand.
"""

import os
import pathlib
import shlex
import subprocess
import sys

import click
import numpy as np
import torch

from dnnlib import UserError
from dnnlib.files import cpu_cores, make_dirs
from dnnlib.flags import NumberRange, Tool
from training.dataset import EMBEDDED, load_embedded
from training.generation import generate_batch
from training.pictures import tile
from training.pixels import to_uint8
from training.run_files import SNAPSHOT, parse_kimg, saved_files
from training.schedules import NUM_STEPS
from training.snapshot import build_network, read_snapshot
from warm.figures import draw
from warm.path import PAPER_BNR
from warm.presets import PRESETS
from warm.systems import SYSTEMS
from warm.trajectory import ROWS, pick, visible, watch

ROOT = pathlib.Path(__file__).resolve().parent.parent
RUNS = {'edm': ['--precond=edm'], 'warm': ['--precond=warm', f'--bnr={PAPER_BNR:g}']}
TRAINING = ['--preset=digits', '--seed=0', '--grid=0']
SHOWN = 4  # rows of digits in the picture
STEPS_SHOWN = 9
NFE = 2 * NUM_STEPS - 1  # of Heun's solver, the default: two evaluations per step, one in the last


@click.command(cls=Tool)
@click.option('--outdir', metavar='DIR', default='demo', help='Where to save everything')
@click.option('--duration', metavar='MIMG', type=NumberRange(min=0, min_open=True),
              default=PRESETS['digits'].train['duration'], help='Length of each training, in millions of images')
@click.option('--num', metavar='INT', type=click.IntRange(min=20), default=1797, help='Images to generate and score')
def main(outdir, duration, num):
    """Train a Warm model (BNR 0.5) and an EDM baseline on the embedded digits and compare them."""
    outdir = pathlib.Path(outdir)
    make_dirs(outdir)
    train(outdir, duration)
    lines = [score(outdir, name, num) for name in RUNS]
    picture, *_ = draw_outcome(outdir / 'demo', outdir)
    print('\n' + '\n'.join(lines))
    print(f'\nReal digits, EDM, Warm and the reverse process: {picture}')


def last_snapshot(outdir, name):
    """Path of a run's newest snapshot, or None."""
    return next(iter(saved_files(outdir / name, SNAPSHOT)), None)


def is_trained(outdir, name, duration):
    """Whether a run's newest snapshot is from its end, after `duration` Mimg: a stopped run has a snapshot as well."""
    path = last_snapshot(outdir, name)
    return path is not None and parse_kimg(path) >= int(round(1000 * duration, 3))


def train(outdir, duration):
    """Train both systems, in parallel on the CPU, one after the other on a GPU; finished runs are kept."""
    threads = None if torch.cuda.is_available() else str(max(cpu_cores() // len(RUNS), 1))
    running = []
    for name, options in RUNS.items():
        if is_trained(outdir, name, duration):
            print(f'{name} is already trained; delete {outdir / name} to train it again')
            continue
        # In parallel, only the last one prints to the terminal; each has its output in its log.txt.
        last = name == list(RUNS)[-1]
        running.append(start(['train.py', f'--outdir={outdir / name}', '--nosubdir', '--auto-resume', *options,
                              *TRAINING, f'--duration={duration}', f'--tick={max(duration * 50, 0.064):g}'],
                             stdout=None if last or not threads else subprocess.DEVNULL, threads=threads))
        if threads is None:
            finish([running.pop()])
    finish(running)


def start(command, stdout=None, threads=None):
    """Print and start one of the project's commands; returns (command, process)."""
    print('\n$ python ' + shlex.join(map(str, command)), flush=True)
    env = {**os.environ, **({'OMP_NUM_THREADS': threads} if threads else {})}
    return command, subprocess.Popen([sys.executable, str(ROOT / command[0]), *map(str, command[1:])], env=env,
                                     stdout=stdout)


def finish(running):
    """Wait for all (command, process) pairs; if one fails, stop the others and raise UserError."""
    try:
        for command, process in running:
            if process.wait() != 0:
                raise UserError(f'`python {shlex.join(map(str, command))}` failed with exit code {process.returncode}; '
                                'see the message above or the log.txt in its folder')
    finally:
        for _, process in running:
            if process.poll() is None:
                process.terminate()


def score(outdir, name, num):
    """Generate `num` images and score them, with the commands; returns the line for the comparison."""
    snapshot = last_snapshot(outdir, name)
    reference = outdir / 'digits-pixels.npz'
    finish([start(['generate.py', f'--network={snapshot}', f'--outdir={outdir / name / "images"}',
                   f'--seeds=0-{num - 1}', '--batch=256', f'--grid={outdir / name}/grid.png', '--overwrite'])])
    if not reference.is_file():
        finish([start(['fid.py', 'ref', f'--data={EMBEDDED}', f'--dest={reference}', '--detector=pixels'])])
    calc = start(['fid.py', 'calc', f'--images={outdir / name / "images"}', f'--ref={reference}', '--detector=pixels',
                  f'--num={num}'], stdout=subprocess.PIPE)
    printed = calc[1].stdout.read().decode()
    finish([calc])
    print(printed, end='')
    return f'{SYSTEMS[name].title:<5s}{printed.strip().splitlines()[-1]}   ({num} images, NFE {NFE})'


def samples_by_class(net, name, rows):
    """Generated images, uint8 [rows·label_dim, C, H, W]: `rows` of each class, a class per column."""
    seeds = list(range(rows * net.label_dim))
    columns = []
    for k in range(net.label_dim):
        sampler = SYSTEMS[name].make_sampler(net)
        columns.append(to_uint8(generate_batch(net, seeds[k::net.label_dim], sampler, class_idx=k)).cpu().numpy())
    return np.stack(columns, axis=1).reshape(-1, *columns[0].shape[1:])


def reals_by_class(rows):
    """Embedded digits, uint8 [rows·10, 1, 8, 8]: the first `rows` of each class, a class per column."""
    dataset = load_embedded()
    classes = [[] for _ in range(dataset.label_dim)]
    for i in range(len(dataset)):
        image, label = dataset[i]
        classes[int(label.argmax())].append(image)
    return np.stack([images[row] for row in range(rows) for images in classes])


def draw_outcome(path, outdir):
    """Draw the samples and reverse process of the runs in `outdir` to `path`.png and `path`.svg; returns both paths."""
    nets = {name: build_network(read_snapshot(last_snapshot(outdir, name)), SYSTEMS) for name in RUNS}
    digits = {'Real digits': reals_by_class(SHOWN), 'EDM': samples_by_class(nets['edm'], 'edm', SHOWN),
              f'Warm, BNR {PAPER_BNR:g}': samples_by_class(nets['warm'], 'warm', SHOWN)}
    frames = pick(watch(nets['warm'], SYSTEMS['warm'], [0], class_idx=3), STEPS_SHOWN)
    return draw(str(path), (11, 5.6), lambda figure: draw_panels(figure, digits, frames))


def draw_panels(figure, digits, frames):
    """Draw the four panels: digits with a class per column, and the reverse process.

    Args:
        figure: `matplotlib.figure.Figure` to draw on.
        digits: {title: uint8 [10·rows, 1, N, N]} for three panels.
        frames: `warm.trajectory.Frame`s of one image, from noise to data, for the fourth.
    """
    *axes, last = figure.subplots(2, 2).flat
    for axis, (title, images) in zip(axes, digits.items()):
        draw_digits(axis, title, images)
    draw_process(last, frames)


def draw_digits(axis, title, images):
    """Draw a panel of images, a class per column."""
    show_grey(axis, title, tile(images, columns=10)[0])
    axis.set(xticks=[], yticks=[])


def draw_process(axis, frames):
    """Draw a panel of the reverse process: a column per noise level, a row each for x, D, R and D + R."""
    columns = [visible(frame) for frame in frames]
    cells = np.stack([column[row][0] for row in range(len(ROWS)) for column in columns])
    sheet = tile(cells, columns=len(columns))[0]
    show_grey(axis, "Warm's reverse process: state x, denoised D, rest R, clean D + R", sheet)
    height, width = sheet.shape[0] / len(ROWS), sheet.shape[1] / len(columns)  # of a cell, in pixels
    axis.set_xticks([(i + 0.5) * width for i in range(len(columns))],
                    [f'β={frame.beta:.2g}\nα={frame.alpha:.2g}' for frame in frames], fontsize=7)
    axis.set_yticks([(i + 0.5) * height for i in range(len(ROWS))], ROWS)
    axis.tick_params(length=0)


def show_grey(axis, title, sheet):
    """Show a sheet of images, uint8 [H, W], without frame or grid."""
    axis.imshow(sheet, cmap='gray', vmin=0, vmax=255)
    axis.set_title(title)
    axis.grid(False)
    axis.spines[:].set_visible(False)


if __name__ == '__main__':
    main()
