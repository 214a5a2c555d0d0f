"""The CUDA tests and the speed benchmarks on a GPU, in six calls of at most nine minutes each.

    python tests/benchmarks/gpu_all.py --call=1 --out=gpu-1.json [--commit=REV] [--seconds=540] [--only=fid] [--tiny]

The first call runs the commands and the tests and measures each target once; the others measure what the choices
between fast paths rest on. Time that a run leaves unused goes to those after it. What no longer fits is skipped and
named in the file; another call with --only makes up for it. Beside the file lies all that each run has printed
(gpu-1-fid.log), and while a run goes on, its report (gpu-1-fid.json), with all rows until then; both are left if the
call is killed. For a copy without .git, work out the commit in the checkout: --commit=$(git describe --always --tags).

With --tiny, everything runs at a small size, on the CPU too, to try the script itself; networks are then compiled by a
backend that compiles fast but does not speed them up. The cost of the presets goes to results/cost.json as well.
"""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import click
import psutil

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from dnnlib.files import atomic_write, sigterm_exits  # noqa: E402
from tests.benchmarks.report import ROOT, dying_with_parent, environment  # noqa: E402
from training.provenance import COMMIT_VARIABLE  # noqa: E402

HERE = pathlib.Path(__file__).resolve().parent
CUDA_TESTS = ['tests/test_precision.py', 'tests/test_speed_paths.py', 'tests/test_warm_blur.py']
TINY = ['--cbase=16', '--cres=1,1', '--batch=4', '--repeats=1']
TINY_TRAIN = [*TINY, '--images=64', '--size=8', '--blocks=1']
TINY_SAMPLE = ['--cbase=16', '--cres=1,1', '--blocks=1', '--batch=4', '--repeats=1', '--size=8']
TINY_COMPILE = ['--compile', '--backend=aot_eager']
SAMPLE_ROWS = '--only=-fp16,-tf32,-by the sampler'

# name → (script, options, options with --tiny, seconds it is sure to have); compiling a network takes minutes
RUNS = {
    'smoke': ('smoke.py', [], ['--tiny'], 90),
    'train-target': ('bench_train.py', ['--compile', '--only==bf16, compiled, channels-last'],
                     [*TINY_TRAIN, *TINY_COMPILE, '--only==bf16, compiled, channels-last'], 170),
    'sample-target': ('bench_sample.py', ['--compile', '--only==bf16, compiled, CUDA graphs', '--repeats=1',
                                          '--no-reference', '--total=5120'],
                      [*TINY_SAMPLE, *TINY_COMPILE, '--only==bf16, compiled, CUDA graphs', '--total=10',
                       '--no-reference'], 120),
    'fid-target': ('bench_fid.py', ['--dims=64', '--images=256', '--repeats=1', '--total=20000'],
                   ['--images=8', '--dims=32', '--repeats=1', '--total=8'], 50),
    'train': ('bench_train.py', [], TINY_TRAIN, 190),
    'warm': ('bench_warm.py', ['--precision=bf16'], [*TINY, '--resolution=8'], 90),
    'data': ('bench_data.py', ['--images=8000', '--repeats=2'], ['--images=64', '--repeats=1', '--size=8'], 50),
    'train-compiled': ('bench_train.py', ['--compile', '--only=compiled', '--no-reference'],
                       [*TINY_TRAIN, *TINY_COMPILE, '--only=compiled', '--no-reference'], 520),
    'sample': ('bench_sample.py', ['--compile', '--repeats=1', '--total=50000', SAMPLE_ROWS],
               [*TINY_SAMPLE, *TINY_COMPILE, '--total=10', SAMPLE_ROWS], 520),
    'fid': ('bench_fid.py', ['--images=2048', '--repeats=1', '--total=50000'],
            ['--images=8', '--dims=32', '--repeats=1', '--total=8'], 130),
    'train-64-a-gpu': ('bench_train.py', ['--batch=64', '--only=bf16'], [*TINY_TRAIN, '--only=bf16'], 110),
    'sample-64': ('bench_sample.py', ['--batch=64', '--compile', '--only=compiled', '--total=0'],
                  [*TINY_SAMPLE, *TINY_COMPILE, '--only=compiled', '--total=0'], 330),
    'presets': ('bench_presets.py', ['--only=cifar10'], ['--only=ffhq', '--tiny'], 520),
}
TESTS = 'tests', 110  # name of the CUDA tests, and the seconds they are sure to have
SECONDS = 540  # time limit of a call; where commands end after ten minutes, what was started still has to end itself
CALLS = {'1': ('smoke', 'tests', 'train-target', 'sample-target', 'fid-target'), '2': ('train', 'warm', 'data', 'fid'),
         '3': ('train-compiled',), '4': ('sample',), '5': ('train-64-a-gpu', 'sample-64'), '6': ('presets',)}
KEPT = {'presets': ROOT / 'results' / 'cost.json'}  # reports kept in the repository; --tiny does not touch them


def run_one(command, limit, log):
    """Run a command for at most `limit` seconds; what it prints is written to the file `log` and, as it comes, shown.

    Returns:
        {'rc' (None after a time-out), 'seconds', 'output' (its end)}.
    """
    start, paths = time.monotonic(), os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    with open(log, 'wb') as written, open(log, encoding='utf-8', errors='replace') as read:
        process = subprocess.Popen(dying_with_parent([sys.executable, *command]), cwd=ROOT, stdin=subprocess.DEVNULL,
                                   stdout=written, stderr=subprocess.STDOUT, start_new_session=True,
                                   env={**os.environ, 'PYTHONPATH': paths, 'PYTHONUNBUFFERED': '1',
                                        'PYTEST_DISABLE_PLUGIN_AUTOLOAD': '1'})  # plugins we do not know may warn
        try:
            while (rc := process.poll()) is None and time.monotonic() < start + limit:
                time.sleep(0.1)
                print(read.read(), end='', flush=True)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with its child processes, such as compilers and data loaders
            process.wait()
            print(read.read(), end='', flush=True)
    return dict(rc=rc, seconds=round(time.monotonic() - start, 1),
                output=pathlib.Path(log).read_text(encoding='utf-8', errors='replace')[-6000:])


def run_benchmark(command, limit, file, kept=None):
    """`run_one` for a benchmark: its result with the `report`, None if it has written none.

    Args:
        command: Its command line, without --out.
        file: Path of its report, and with the ending .log of its output.
        kept: The same report in the repository, of which rows that are not measured anew stay.
    """
    file.unlink(missing_ok=True)
    if kept and kept.is_file():
        shutil.copyfile(kept, file)
    former = file.read_bytes() if file.is_file() else None
    result = run_one([*command, f'--out={file}'], limit, file.with_suffix('.log'))
    content = file.read_bytes() if file.is_file() else None
    if content == former:
        return dict(result, report=None)
    if kept:
        shutil.copyfile(file, kept)
    return dict(result, report=json.loads(content))


def sure_seconds(name):
    """Seconds that a run is sure to have, if those before it keep to theirs."""
    return TESTS[1] if name == TESTS[0] else RUNS[name][-1]


def seconds_old():
    """Age of this process, as importing PyTorch can take long; at most a minute, should the clocks disagree."""
    return min(max(time.time() - psutil.Process().create_time(), 0), 60)


@click.command()
@click.option('--out', metavar='FILE.json', required=True, help='Where to write all results')
@click.option('--seconds', type=float, default=SECONDS, show_default=True,
              help='Time limit for everything, from the start of this command')
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
    end = time.monotonic() + seconds - seconds_old()
    out, device = pathlib.Path(out).resolve(), 'cuda' if torch.cuda.is_available() else 'cpu'
    if commit:
        os.environ[COMMIT_VARIABLE] = commit  # inherited by everything that is started
    results = dict(environment=environment(device), tiny=tiny, runs={})
    if device == 'cuda' and not results['environment']['commit']:
        raise click.ClickException('nothing tells which commit this is, and numbers without it are of no use; add '
                                   '--commit=REV, what `git describe --always` says in the checkout')
    for i, name in enumerate(names):
        left, file = end - time.monotonic(), out.with_name(f'{out.stem}-{name}.json')
        granted = min(left, max(sure_seconds(name), left - sum(map(sure_seconds, names[i + 1:]))))
        if left < 20:
            result = dict(rc=None, left_out='no time left')
        elif name == TESTS[0]:
            # A warning is an error in the tests. Here, where versions differ, it should not hide what they are for.
            result = run_one(['-m', 'pytest', '-q', '-p', 'tests.benchmarks.at_once', '--tb=short', '--durations=5',
                              '-W', 'default', *CUDA_TESTS, '-k', 'near_float32' if tiny else 'cuda or gpu'],
                             granted, file.with_suffix('.log'))
        else:
            script, options, tiny_options, _ = RUNS[name]
            result = run_benchmark([str(HERE / script), *(tiny_options if tiny else options)], granted, file,
                                   None if tiny else KEPT.get(name))
        results['runs'][name] = result
        with atomic_write(out, 'w') as f:
            json.dump(results, f, indent=2)  # kept whatever happens next
        file.unlink(missing_ok=True)  # it is in there now
        print(f'== {name}: rc {result["rc"]}, {result.get("seconds", 0)} s', flush=True)


if __name__ == '__main__':
    with sigterm_exits(128 + signal.SIGTERM):
        main()
