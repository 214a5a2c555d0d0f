"""Two ranks on one machine against one: images/s of whole training runs, one core per rank.

    python tests/benchmarks/bench_scaling.py [--cbase=32] [--batch=32] [--kimg=0.5] [--out=FILE.json]

Each rank is pinned to its own core and has one thread; the ranks communicate by gloo. Elapsed time is measured, so the
machine must be otherwise idle: `load` in the report is its load average before the first run. The target ratio is 1.6.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

import click

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from tests.benchmarks.bench_train import write_zip  # noqa: E402
from tests.benchmarks.report import ROOT, report  # noqa: E402

PINNED = '''
import os, runpy, sys
cores = sorted(os.sched_getaffinity(0))
os.sched_setaffinity(0, {cores[int(os.environ.get('LOCAL_RANK', '0')) % len(cores)]})
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name='__main__')
'''


def seconds_per_kimg(ranks, options, folder):
    """Train with `ranks` ranks and return the seconds per kimg of the fastest tick after the first (warm-up)."""
    script = pathlib.Path(folder) / 'pinned.py'
    script.write_text(PINNED)
    launcher = [] if ranks == 1 else ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}', '--']
    outdir = pathlib.Path(folder) / f'{ranks}-{len(list(pathlib.Path(folder).iterdir()))}'
    subprocess.run([sys.executable, *launcher, str(script), str(ROOT / 'train.py'), *options, f'--outdir={outdir}'],
                   check=True, stdout=subprocess.DEVNULL,
                   env={**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''})
    stats, = outdir.glob('*/stats.jsonl')
    lines = [json.loads(line) for line in stats.read_text().splitlines()][1:]
    return min(line['Timing/sec_per_kimg']['mean'] for line in lines)  # the tick least disturbed by other load


@click.command(context_settings=dict(show_default=True, max_content_width=120))
@click.option('--cbase', metavar='INT', type=int, default=32, help='Base number of channels')
@click.option('--size', metavar='INT', type=int, default=32, help='Image resolution')
@click.option('--batch', metavar='INT', type=int, default=32, help='Images per step, over all ranks')
@click.option('--kimg', metavar='FLOAT', type=float, default=0.5, help='Length of each run, in thousands of images')
@click.option('--ranks', metavar='INT', type=int, default=2, help='Number of ranks of the second run')
@click.option('--precision', default='fp32', help='Precision of the network')
@click.option('--repeats', metavar='INT', type=int, default=1, help='Repeats of each run; the best counts')
@click.option('--out', metavar='FILE.json', default=None, help='Also write the report here')
def main(cbase, size, batch, kimg, ranks, precision, repeats, out):
    """Measure how training speed scales with the number of ranks."""
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        write_zip(f'{folder}/data.zip', 1024, size)
        options = [f'--data={folder}/data.zip', f'--cbase={cbase}', f'--batch={batch}', f'--duration={kimg / 1000}',
                   f'--tick={kimg / 3}', '--grid=0', '--snap=0', '--dump=0', '--seed=0', f'--precision={precision}']
        best = {}
        for _ in range(repeats):
            for n in (1, ranks):
                best[n] = min(best.get(n, float('inf')), seconds_per_kimg(n, options, folder))
    rows = [dict(ranks=n, images_per_second=1000 / s, ratio=best[1] / s) for n, s in best.items()]
    report(f'Ranks, {cbase} channels, batch {batch} in all', rows,
           dict(cbase=cbase, size=size, batch=batch, kimg=kimg, precision=precision, repeats=repeats, load=load), out)


if __name__ == '__main__':
    main()
