"""What a change costs: trainings of this tree against the same trainings of an older commit, in turns.

    python tests/benchmarks/bench_commits.py [--before=REV] [--kimg=8] [--repeats=3] [--out=FILE.json]

Processor time of whole train.py processes on the embedded digits, start included, so that what a new system adds to
importing shows too; the older commit is checked out into a temporary folder.
"""

import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile

import click

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from tests.benchmarks.report import ROOT, report  # noqa: E402

OPTIONS = ['--cbase=32', '--cres=1,2', '--batch=64', '--dropout=0', '--augment=0', '--lr-rampup=0.005', '--workers=0',
           '--snap=0', '--dump=0', '--seed=0']


def seconds(tree, system, kimg, folder):
    """Processor time of one training with the code in `tree`."""
    def spent():
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime
    start = spent()
    done = subprocess.run([sys.executable, 'train.py', f'--outdir={folder}', f'--precond={system}', *OPTIONS,
                           f'--duration={kimg / 1000:g}'], cwd=tree, capture_output=True, text=True,
                          env={**os.environ, 'OMP_NUM_THREADS': '1'})
    if done.returncode:
        raise click.ClickException(f'the training in {tree} failed:\n{done.stdout}{done.stderr}')
    return spent() - start


@click.command(context_settings=dict(show_default=True, max_content_width=120))
@click.option('--before', metavar='REV', default='HEAD', help='Commit to compare with; HEAD: what is not committed')
@click.option('--systems', default='edm,warm', help='Values of --precond that both have')
@click.option('--kimg', type=click.FloatRange(min=0, min_open=True), default=8, help='Length of each training')
@click.option('--repeats', type=click.IntRange(min=1), default=3, help='Of each; the median counts')
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
                        run = seconds(tree, system, kimg, pathlib.Path(folder) / 'runs')
                        times.setdefault((system, name), []).append(run)
        finally:
            subprocess.run(['git', 'worktree', 'remove', '--force', old], cwd=ROOT, check=True, capture_output=True)
    median = {key: statistics.median(values) for key, values in times.items()}
    rows = [dict(system=system, code=name, seconds=median[system, name],
                 ratio=median[system, name] / median[system, 'before']) for system, name in median]
    report(f'Training {kimg:g} kimg, {before} against now', rows,
           dict(before=before, kimg=kimg, repeats=repeats, load=load), out)


if __name__ == '__main__':
    main()
