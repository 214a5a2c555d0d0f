"""Does a faster precision train as well? Loss curves of the same run in each, against float32.

    python tests/benchmarks/bench_curves.py --data=datasets/cifar10-32x32.zip --kimg=2000 --outdir=curves

The runs share seed, images, noise levels and augmentation, so that their curves can be compared tick by tick; one more
in float32 with another seed shows what would be a small difference. Losses are means over a tick. The same command goes
on with runs in --outdir that were interrupted. Flags after -- go to every train.py, such as `-- --precond=warm`.
"""

import json
import pathlib
import statistics
import subprocess
import sys
import tempfile

import click
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from tests.benchmarks.report import ROOT, report  # noqa: E402
from torch_utils.precision import PRECISIONS  # noqa: E402
from warm.report.data import read_lines  # noqa: E402
from warm.study.plan import CIFAR10_REF  # noqa: E402

REFERENCE, YARDSTICK = 'fp32', 'fp32, another seed'
CPU_FLAGS = ('--cbase=32', '--cres=1,2', '--batch=64', '--lr=1e-3', '--lr-rampup=0.01', '--ema=0.01', '--dropout=0',
             '--augment=0')
SHARED_FLAGS = ('--grid=0', '--snap=0', '--dump=5')


def train(folder, data, kimg, tick, seed, precision, flags):
    """Losses of the run's ticks: [(kimg, mean loss)]."""
    command = [sys.executable, str(ROOT / 'train.py'), f'--outdir={folder}', '--nosubdir', '--auto-resume',
               *([f'--data={data}'] if data else []), f'--duration={kimg / 1000:g}', f'--tick={tick:g}',
               f'--seed={seed}', f'--precision={precision}', *SHARED_FLAGS, *flags]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return [(line['Progress/kimg']['mean'], line['Loss/loss']['mean']) for line in read_lines(folder / 'stats.jsonl')]


def compare(curve, reference):
    """How far the losses are from the reference's, tick by tick and relative to it."""
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
@click.option('--precisions', metavar='LIST', default=None, help='Which  [default: all that this machine has]')
@click.option('--outdir', metavar='DIR', default=None, help='Folder of the runs  [default: a temporary one]')
@click.option('--out', metavar='FILE.json', default=None, help='Also write the report here, with the curves')
@click.argument('flags', nargs=-1)
def main(data, kimg, tick, precisions, outdir, out, flags):
    """Compare loss curves."""
    cuda = torch.cuda.is_available()
    names = precisions.split(',') if precisions else [
        name for name, p in PRECISIONS.items() if name != REFERENCE and (cuda or not (p.cuda_only or p.tf32))]
    flags = (*(CIFAR10_REF if cuda else CPU_FLAGS), *flags)
    curves, temporary = {}, tempfile.TemporaryDirectory()
    for name, precision, seed in ((REFERENCE, REFERENCE, 0), *((name, name, 0) for name in names),
                                  (YARDSTICK, REFERENCE, 1)):
        folder = pathlib.Path(outdir or temporary.name) / f'{precision}-s{seed}'
        curves[name] = train(folder, data, kimg, tick or kimg / 32, seed, precision, flags)
    rows = [dict(precision=name, **compare(curve, curves[REFERENCE])) for name, curve in curves.items()]
    report(f'Losses against {REFERENCE}, {kimg:g} kimg', rows, dict(flags=flags, data=data and pathlib.Path(data).name),
           out, 'cuda' if cuda else 'cpu')
    if out is not None:
        content = json.loads(pathlib.Path(out).read_text())
        pathlib.Path(out).write_text(json.dumps({**content, 'curves': curves}, indent=1))


if __name__ == '__main__':
    main()
