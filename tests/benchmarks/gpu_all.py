"""The CUDA tests and the speed benchmarks on a GPU, in six calls of at most ten minutes each.

    python tests/benchmarks/gpu_all.py --call=1 --out=gpu-1.json [--commit=REV] [--seconds=570] [--only=fid] [--tiny]

The first call runs the tests and measures each target once; the others measure what the choices between fast paths
rest on. What no longer fits into the time is skipped and named in the file; another call with --only makes up for it.
With --tiny, everything runs at a small size, on the CPU too, to try the script itself; networks are then compiled by a
backend that compiles fast but does not speed them up. The cost of the presets goes to results/cost.json as well.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import click

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from tests.benchmarks.report import ROOT, environment  # noqa: E402
from training.provenance import COMMIT_VARIABLE  # noqa: E402

HERE = pathlib.Path(__file__).resolve().parent
CUDA_TESTS = ['tests/test_precision.py', 'tests/test_speed_paths.py', 'tests/test_warm_blur.py']
TINY = ['--cbase=16', '--cres=1,1', '--batch=4', '--repeats=1']
TINY_TRAIN = [*TINY, '--images=64', '--size=8', '--blocks=1']
TINY_SAMPLE = ['--cbase=16', '--cres=1,1', '--blocks=1', '--batch=4', '--repeats=1', '--size=8']
TINY_COMPILE = ['--compile', '--backend=aot_eager']

# name → (script, options, options with --tiny, time limit in seconds); compiling a network takes minutes
RUNS = {
    'train-target': ('bench_train.py', ['--compile', '--only==bf16, compiled, channels-last'],
                     [*TINY_TRAIN, *TINY_COMPILE, '--only==bf16, compiled, channels-last'], 170),
    'sample-target': ('bench_sample.py', ['--compile', '--only==bf16, compiled, CUDA graphs', '--repeats=1'],
                      [*TINY_SAMPLE, *TINY_COMPILE, '--only==bf16, compiled, CUDA graphs', '--total=10'], 150),
    'fid-target': ('bench_fid.py', ['--dims=64', '--images=256', '--repeats=1', '--total=50000'],
                   ['--images=8', '--dims=32', '--repeats=1', '--total=8'], 70),
    'train': ('bench_train.py', [], TINY_TRAIN, 190),
    'warm': ('bench_warm.py', ['--precision=bf16'], [*TINY, '--resolution=8'], 90),
    'data': ('bench_data.py', ['--images=20000'], ['--images=64', '--repeats=1', '--size=8'], 50),
    'train-compiled': ('bench_train.py', ['--compile', '--only=compiled'],
                       [*TINY_TRAIN, *TINY_COMPILE, '--only=compiled'], 560),
    'sample': ('bench_sample.py', ['--compile', '--repeats=1', '--total=50000'],
               [*TINY_SAMPLE, *TINY_COMPILE, '--total=10'], 560),
    'fid': ('bench_fid.py', ['--images=2048', '--repeats=1', '--total=50000'],
            ['--images=8', '--dims=32', '--repeats=1', '--total=8'], 130),
    'train-64-a-gpu': ('bench_train.py', ['--batch=64', '--only=bf16'], [*TINY_TRAIN, '--only=bf16'], 110),
    'sample-64': ('bench_sample.py', ['--batch=64', '--compile', '--only=compiled', '--total=0'],
                  [*TINY_SAMPLE, *TINY_COMPILE, '--only=compiled', '--total=0'], 330),
    'presets': ('bench_presets.py', ['--only=cifar10'], ['--only=ffhq', '--tiny'], 560),
}
TESTS = 'tests', 180  # name of the CUDA tests, and their time limit in seconds
SECONDS = 570  # time limit of a call
CALLS = {'1': ('tests', 'train-target', 'sample-target', 'fid-target'), '2': ('train', 'warm', 'data', 'fid'),
         '3': ('train-compiled',), '4': ('sample',), '5': ('train-64-a-gpu', 'sample-64'), '6': ('presets',)}
KEPT = {'presets': ROOT / 'results' / 'cost.json'}  # reports kept in the repository; --tiny does not touch them


def run_one(command, limit):
    """Run a command for at most `limit` seconds: {'rc' (None after a time-out), 'seconds', 'output' (its end)}."""
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, start_new_session=True,
                               env={**os.environ, 'PYTHONPATH': str(ROOT), 'PYTHONUNBUFFERED': '1'})
    try:
        output, _ = process.communicate(timeout=limit)
        rc = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with its child processes, such as compilers and data loaders
        output, rc = process.communicate()[0], None
    return dict(rc=rc, seconds=round(time.monotonic() - start, 1), output=output[-6000:])


@click.command()
@click.option('--out', metavar='FILE.json', required=True, help='Where to write all results')
@click.option('--seconds', type=float, default=SECONDS, show_default=True, help='Time limit for everything')
@click.option('--tiny', is_flag=True, help='Small sizes, on the CPU too')
@click.option('--call', type=click.Choice(list(CALLS)), default='1', show_default=True, help='Which of the six calls')
@click.option('--only', metavar='LIST', default=None, help=f'Run these instead: some of tests, {", ".join(RUNS)}')
@click.option('--commit', metavar='REV', default=None, help='Commit that is measured, if this is not a git checkout')
def main(out, seconds, tiny, call, only, commit):
    """Run one call's tests and benchmarks."""
    import torch
    names = only.split(',') if only else CALLS[call]
    unknown = [name for name in names if name not in (*RUNS, TESTS[0])]
    if unknown:
        raise click.BadParameter(f"{', '.join(unknown)}: choose from tests, {', '.join(RUNS)}", param_hint='--only')
    end, device = time.monotonic() + seconds, 'cuda' if torch.cuda.is_available() else 'cpu'
    if commit:
        os.environ[COMMIT_VARIABLE] = commit  # inherited by everything that is started
    results = dict(environment=environment(device), tiny=tiny, runs={})
    if device == 'cuda' and not results['environment']['commit']:
        raise click.ClickException('nothing tells which commit this is, and numbers without it are of no use; add '
                                   '--commit=REV, what `git describe --always` says in the checkout')

    def record(name, result):
        results['runs'][name] = result
        pathlib.Path(out).write_text(json.dumps(results, indent=2))  # kept whatever happens next
        print(f'== {name}: rc {result.get("rc")}, {result.get("seconds", 0)} s\n{result.get("output", "")}', flush=True)

    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            left = end - time.monotonic()
            if name == TESTS[0]:
                words = 'near_float32' if tiny else 'cuda or gpu'
                record(name, run_one(['-m', 'pytest', '-q', '--durations=5', *CUDA_TESTS, '-k', words],
                                     min(TESTS[1], left)))
                continue
            script, options, tiny_options, limit = RUNS[name]
            if left < 20:
                record(name, dict(rc=None, left_out='no time left'))
                continue
            file = (not tiny and KEPT.get(name)) or pathlib.Path(folder) / f'{name}.json'
            result = run_one([str(HERE / script), *(tiny_options if tiny else options), f'--out={file}'],
                             min(limit, left))
            ready = result['rc'] == 0 and file.exists()
            record(name, {**result, 'report': json.loads(file.read_text()) if ready else None})


if __name__ == '__main__':
    main()
