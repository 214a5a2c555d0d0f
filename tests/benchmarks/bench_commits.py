"""What a change costs: training with this working tree against an older commit, in turns.

    python tests/benchmarks/bench_commits.py [--before=REV] [--kimg=8] [--repeats=3] [--out=FILE.json]

Measures the processor time of whole train.py processes on the embedded digits, for two lengths: their difference is the
cost of training, the rest that of starting up, imports of all systems included. Then that of a generate.py which
samples one image in one step. The older commit is checked out into a temporary folder.
"""

import os
import pathlib
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile

import click

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from tests.benchmarks.report import ROOT, report  # noqa: E402

OPTIONS = ['--cbase=32', '--cres=1,2', '--batch=64', '--dropout=0', '--augment=0', '--lr-rampup=0.005', '--workers=0',
           '--snap=0', '--dump=0', '--seed=0']


def seconds(tree, *command):
    """Processor time of one command with the code in `tree`, in seconds."""
    def spent():
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime
    start = spent()
    done = subprocess.run([sys.executable, *command], cwd=tree, capture_output=True, text=True,
                          env={**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''})
    if done.returncode:
        raise click.ClickException(f'`{shlex.join(command)}` failed in {tree}:\n{done.stdout}{done.stderr}')
    return spent() - start


def measure(tree, system, kimg, folder):
    """Seconds per thousand images of training, to start a training run, and to generate one image in one step.

    Args:
        kimg: Length of the longer training run, in thousands of images; the shorter is an eighth of it.
        folder: Where the run folders go.
    """
    short, long = (seconds(tree, 'train.py', f'--outdir={folder}', f'--precond={system}', *OPTIONS,
                           f'--duration={length / 1000:g}') for length in (kimg / 8, kimg))
    network = max(folder.glob('*/network-snapshot-*.safetensors'), key=os.path.getmtime)
    image = seconds(tree, 'generate.py', f'--network={network}', f'--outdir={folder / "out"}', '--seeds=0', '--steps=1',
                    '--overwrite')
    step = (long - short) / (kimg * 7 / 8)
    return step, short - step * kimg / 8, image


@click.command(context_settings=dict(show_default=True, max_content_width=120))
@click.option('--before', metavar='REV', default='HEAD',
              help='Commit to compare with; HEAD measures the uncommitted changes')
@click.option('--systems', default='edm,warm', help='Values of --precond to train, known to both')
@click.option('--kimg', type=click.FloatRange(min=0, min_open=True), default=8,
              help='Length of the longer training, in thousands of images; the shorter is an eighth of it')
@click.option('--repeats', type=click.IntRange(min=1), default=3, help='Repeats of each; the median counts')
@click.option('--out', metavar='FILE.json', default=None, help='Also write the report here')
def main(before, systems, kimg, repeats, out):
    """Measure this tree against an older commit."""
    times, load = {}, os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        old = pathlib.Path(folder) / 'before'
        subprocess.run(['git', 'worktree', 'add', '--detach', old, before], cwd=ROOT, check=True, capture_output=True)
        try:
            for _ in range(repeats):
                for system in systems.split(','):
                    for name, tree in (('before', old), ('now', ROOT)):
                        measured = measure(tree, system, kimg, pathlib.Path(folder) / 'runs')
                        times.setdefault((system, name), []).append(measured)
        finally:
            subprocess.run(['git', 'worktree', 'remove', '--force', old], cwd=ROOT, check=True, capture_output=True)
    median = {key: [statistics.median(values) for values in zip(*pairs)] for key, pairs in times.items()}
    rows = [dict(system=system, code=name, seconds_per_kimg=step, ratio=step / median[system, 'before'][0],
                 seconds_to_start=start, seconds_for_an_image=image)
            for (system, name), (step, start, image) in median.items()]
    report(f'Training {kimg:g} kimg, {before} against now', rows,
           dict(before=before, kimg=kimg, repeats=repeats, load=load), out)


if __name__ == '__main__':
    main()
