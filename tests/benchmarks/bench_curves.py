"""Does a faster precision train as well? Loss curves of the same run in each precision, against float32.

    python tests/benchmarks/bench_curves.py --data=datasets/cifar10-32x32.zip --kimg=2000 --outdir=curves [--minutes=9]

The runs share seed, images, noise levels and augmentation, so that their curves can be compared tick by tick. Two more
float32 runs say how large a difference means something: one in channels-last memory, which differs in the order of
summation alone (training amplifies rounding errors, so even such runs drift apart), and one with another seed. Losses
are means over a tick. Flags after -- are passed to every train.py, such as `-- --precond=warm`.

After --minutes, the current training is told to stop, saves its state, and the command ends with code 75; the same
command continues with the runs in --outdir, as it does after an interruption. An unfinished run is compared as far as
it has got. States are compact: a stopped run resumes closely, not bit for bit.
"""

import json
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time

import click
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from dnnlib.json_files import read_lines  # noqa: E402
from tests.benchmarks.report import ROOT, report  # noqa: E402
from torch_utils.precision import PRECISIONS, effective_precision  # noqa: E402
from torch_utils.signals import EXIT_STOPPED  # noqa: E402
from warm.study.plan import CIFAR10_REF  # noqa: E402

REFERENCE = 'fp32'
YARDSTICKS = {'fp32 in channels-last': '--channels-last=1', 'fp32 with another seed': '--seed=1'}
CPU_FLAGS = ('--cbase=32', '--cres=1,2', '--batch=64', '--lr=1e-3', '--lr-rampup=0.01', '--ema=0.01', '--dropout=0',
             '--augment=0')
SHARED_FLAGS = ('--seed=0', '--grid=0', '--snap=0', '--dump=5', '--keep=1', '--compact-state')
START_SECONDS = 30  # with less time left, no training is started


def train(folder, data, kimg, tick, flags, end):
    """Start or continue a run until it is finished or time.monotonic() is `end`; returns whether it is finished."""
    if finished(folder, kimg):
        return True
    if time.monotonic() > end - START_SECONDS:
        return False
    command = [sys.executable, str(ROOT / 'train.py'), f'--outdir={folder}', '--nosubdir', '--auto-resume',
               *([f'--data={data}'] if data else []), f'--duration={kimg / 1000:g}', f'--tick={tick:g}',
               *SHARED_FLAGS, *flags]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        process.wait(None if end == float('inf') else max(end - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        process.wait()
    # Before its first step, a training has nothing to save, and the signal kills it.
    if process.returncode not in (0, EXIT_STOPPED, -signal.SIGTERM):
        raise subprocess.CalledProcessError(process.returncode, command)
    return process.returncode == 0


def curve_of(folder):
    """[(kimg, mean loss), …] of the run's ticks; [] before the first."""
    return [(line['Progress/kimg']['mean'], line['Loss/loss']['mean']) for line in read_lines(folder / 'stats.jsonl')]


def finished(folder, kimg):
    """Whether a run has a tick at its end, after `kimg`."""
    curve = curve_of(folder)
    return bool(curve) and curve[-1][0] > kimg * (1 - 1e-6)


def compare(curve, reference):
    """Compare a curve with the reference tick by tick, in relative differences; returns values of the table's row."""
    pairs = [(loss, ref) for (_, loss), (_, ref) in zip(curve, reference)]
    last = pairs[-max(len(pairs) // 5, 1):]
    return dict(ticks=len(pairs), mean_difference=f'{statistics.mean(abs(a / b - 1) for a, b in pairs):.2%}',
                largest=f'{max(abs(a / b - 1) for a, b in pairs):.2%}',
                mean_loss=statistics.mean(a for a, _ in pairs),
                last_fifth=f'{statistics.mean(a for a, _ in last) / statistics.mean(b for _, b in last) - 1:+.2%}')


@click.command(context_settings=dict(show_default=True, max_content_width=120))
@click.option('--data', metavar='ZIP|DIR', default=None, help='Data set  [default: the embedded digits]')
@click.option('--kimg', type=float, default=8, help='Length of each run, in thousands of images')
@click.option('--tick', metavar='KIMG', type=float, default=None, help='Length of a tick  [default: a 32nd of the run]')
@click.option('--precisions', metavar='LIST', default=None,
              help='Precisions to compare  [default: all that this machine has]')
@click.option('--minutes', type=click.FloatRange(min=0, min_open=True), default=None,
              help='Time limit of this call; saving takes some seconds more; needs --outdir')
@click.option('--outdir', metavar='DIR', default=None, help='Where to save the runs  [default: a temporary folder]')
@click.option('--out', metavar='FILE.json', default=None, help='Also write the report here, with the curves')
@click.argument('flags', nargs=-1)
def main(data, kimg, tick, precisions, minutes, outdir, out, flags):
    """Compare loss curves."""
    if minutes is not None and outdir is None:
        raise click.UsageError('--minutes needs --outdir, or what is trained until then would be lost')
    cuda, end = torch.cuda.is_available(), time.monotonic() + 60 * (minutes or float('inf'))
    names = precisions.split(',') if precisions else [
        name for name in PRECISIONS
        if name != REFERENCE and effective_precision(name, torch.device('cuda' if cuda else 'cpu')) == name]
    unknown = [name for name in names if name not in PRECISIONS]
    if unknown:
        raise click.BadParameter(f"{', '.join(unknown)}: choose from {', '.join(PRECISIONS)}",
                                 param_hint='--precisions')
    flags = (*(CIFAR10_REF if cuda else CPU_FLAGS), *flags)
    runs = {name: (f'--precision={name}',) for name in (REFERENCE, *names)}
    runs.update({name: (f'--precision={REFERENCE}', flag) for name, flag in YARDSTICKS.items()})
    curves, done = {}, {}
    with tempfile.TemporaryDirectory() as temporary:
        for name, own_flags in runs.items():
            folder = pathlib.Path(outdir or temporary) / name.replace(' ', '-')
            done[name] = train(folder, data, kimg, tick or kimg / 32, (*flags, *own_flags), end)
            curves[name] = curve_of(folder)
    rows = [dict(precision=name, run='complete' if done[name] else f'partial: {curve[-1][0]:g} kimg',
                 **compare(curve, curves[REFERENCE])) for name, curve in curves.items() if curve]
    settings = dict(flags=flags, data=data and pathlib.Path(data).name, complete=all(done.values()))
    if rows:
        report(f'Losses against {REFERENCE}, {kimg:g} kimg', rows, settings, out, 'cuda' if cuda else 'cpu')
    if rows and out is not None:
        content = json.loads(pathlib.Path(out).read_text())
        pathlib.Path(out).write_text(json.dumps({**content, 'curves': curves}, indent=1))
    if not all(done.values()):
        left = ', '.join(name for name in done if not done[name])
        click.echo(f'The time is up before the end of: {left}. The same command goes on from there.', err=True)
        sys.exit(EXIT_STOPPED)


if __name__ == '__main__':
    main()
