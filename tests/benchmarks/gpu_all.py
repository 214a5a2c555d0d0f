"""All that needs a GPU, in three commands of at most ten minutes each: the CUDA tests and every benchmark.

    python tests/benchmarks/gpu_all.py --call=1 --out=gpu-1.json [--commit=REV] [--seconds=570] [--only=fid] [--tiny]

What no longer fits into the time is left out and named in the file; another call with --only makes up for it. With
--tiny everything runs at a small size, on the CPU too, to try the script itself.
"""

import json
import os
import pathlib
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

# name → (script, options, options of --tiny, seconds it may take)
RUNS = {
    'train': ('bench_train.py', [], TINY + ['--images=64', '--size=8'], 200),
    'warm': ('bench_warm.py', ['--precision=bf16'], TINY + ['--resolution=8'], 90),
    'data': ('bench_data.py', ['--images=20000'], ['--images=64', '--repeats=1', '--size=8'], 60),
    'train-compiled': ('bench_train.py', ['--compile', '--only=compiled'], None, 540),
    'sample': ('bench_sample.py', ['--compile', '--repeats=1'],
               ['--cbase=16', '--batch=4', '--repeats=1', '--size=8'], 240),
    'fid': ('bench_fid.py', ['--images=2048', '--repeats=1'], ['--images=8', '--dims=32', '--repeats=1'], 90),
    'train-64-a-gpu': ('bench_train.py', ['--batch=64', '--only=bf16'], None, 90),
    'presets': ('bench_presets.py', ['--repeats=5', '--only=cifar10'], ['--only=ffhq', '--tiny'], 540),
}
TESTS = 'tests', 240  # the CUDA part of the suite, and its seconds
# Most wanted first; a compiled network takes minutes to compile.
CALLS = {'1': ('tests', 'train', 'warm', 'data'), '2': ('train-compiled',),
         '3': ('sample', 'fid', 'train-64-a-gpu', 'presets')}


def run_one(command, limit):
    """What a command said and whether it ended in time: {'rc', 'seconds', 'output'}."""
    start = time.monotonic()
    try:
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=limit,
                              env={**os.environ, 'PYTHONPATH': str(ROOT), 'PYTHONUNBUFFERED': '1'})
        rc, output = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as e:
        rc, output = None, (e.stdout or b'').decode(errors='replace')
    return dict(rc=rc, seconds=round(time.monotonic() - start, 1), output=output[-6000:])


@click.command()
@click.option('--out', metavar='FILE.json', required=True, help='Where all results go')
@click.option('--seconds', type=float, default=570, show_default=True, help='Time for everything')
@click.option('--tiny', is_flag=True, help='Small sizes, on the CPU too')
@click.option('--call', type=click.Choice(list(CALLS)), default='1', show_default=True, help='Which of the commands')
@click.option('--only', metavar='LIST', default=None, help=f'These instead: some of tests, {", ".join(RUNS)}')
@click.option('--commit', metavar='REV', default=None, help='What is measured, where this is no git checkout')
def main(out, seconds, tiny, call, only, commit):
    """Measure everything."""
    import torch
    names = only.split(',') if only else CALLS[call]
    unknown = [name for name in names if name not in (*RUNS, TESTS[0])]
    if unknown:
        raise click.BadParameter(f"{', '.join(unknown)}: choose from tests, {', '.join(RUNS)}", param_hint='--only')
    end, device = time.monotonic() + seconds, 'cuda' if torch.cuda.is_available() else 'cpu'
    if commit:
        os.environ[COMMIT_VARIABLE] = commit  # all that is started has it too
    results = dict(environment=environment(device), tiny=tiny, runs={})
    if device == 'cuda' and not results['environment']['commit']:
        raise click.ClickException('nothing tells which commit this is, and numbers without it are of no use; add '
                                   '--commit=REV, what `git describe --always` says in the checkout')

    def record(name, result):
        results['runs'][name] = result
        pathlib.Path(out).write_text(json.dumps(results, indent=2))  # whatever happens next, this is kept
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
            options = tiny_options if tiny else options
            if options is None or left < 20:
                record(name, dict(rc=None, left_out='no tiny form' if options is None else 'no time left'))
                continue
            file = pathlib.Path(folder) / f'{name}.json'
            result = run_one([str(HERE / script), *options, f'--out={file}'], min(limit, left))
            record(name, {**result, 'report': json.loads(file.read_text()) if file.exists() else None})


if __name__ == '__main__':
    main()
