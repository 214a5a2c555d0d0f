"""Kill training runs again and again, let them continue, and compare their ends with an undisturbed run's bit for bit.

    python -m tests.kills --ranks 20 --jobs 50

kills one of two ranks with SIGKILL 20 times at random moments (torchrun restarts the run), and a whole job of
two ranks 50 times while it is writing. The test suite does a few of each (tests/test_stopping.py).
"""

import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import click
import psutil
import torch

from tests.commands import ROOT, SMALL, json_lines
from training.run_files import saved_files
from training.state import load_state

RUN = [*SMALL, '--batch=32', '--grid=0', '--augment=0.12', '--dropout=0.1', '--tick=0.256', '--snap=1', '--dump=1',
       '--seed=5', '--duration=0.002048', '--nosubdir', '--auto-resume', '--keep=2']
ENV = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
TORCHRUN = [sys.executable, '-m', 'torch.distributed.run', '--standalone']
LIFE_SEC = 200  # longer than a run from start to end takes on a busy machine


def start(folder, ranks, *options, restarts=0):
    """Start the run in `folder` as a process in a session of its own; its output goes to FOLDER.txt."""
    torchrun = [*TORCHRUN, f'--nproc_per_node={ranks}', f'--max-restarts={restarts}', '--monitor-interval=0.1', '--']
    launcher = [sys.executable] if ranks == 1 else torchrun
    with open(f'{folder}.txt', 'ab') as out:
        return subprocess.Popen([*launcher, str(ROOT / 'train.py'), *RUN, f'--outdir={folder}', *options], env=ENV,
                                stdout=out, stderr=subprocess.STDOUT, start_new_session=True)


def wait(process):
    """Wait for a process to end, kill what it leaves behind, and return its exit code."""
    try:
        return process.wait(LIFE_SEC)
    finally:
        kill_all(process)


def kill_all(process):
    """Send SIGKILL to a process and to all that it has started."""
    with_children = []
    for _ in range(2):  # the second pass is for what was started meanwhile
        try:
            parent = psutil.Process(process.pid)
            with_children = [*parent.children(recursive=True), parent]
        except psutil.NoSuchProcess:
            pass
        for p in with_children:
            try:
                p.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                pass
    process.wait()
    psutil.wait_procs([p for p in with_children if p.pid != process.pid], timeout=10)


def log_of(folder):
    """All that the run has printed, over all its starts."""
    return pathlib.Path(f'{folder}.txt').read_text(errors='replace')


def until(condition, process):
    """Wait until condition() is true; False if the process ends first."""
    end = time.monotonic() + LIFE_SEC
    while not condition():
        if process.poll() is not None:
            return False
        assert time.monotonic() < end, 'it hangs'
        time.sleep(0.0005)
    return True


def kill_ranks(folder, kills, rng):
    """Run two ranks under torchrun and kill one of them up to `kills` times; returns how often that was done."""
    process = start(folder, 2, restarts=kills)
    done = 0
    try:
        for life in range(1, kills + 1):
            if not until(lambda: log_of(folder).count('Constructing network') >= life, process):
                break
            time.sleep(rng.uniform(0, 6))
            victims = [p for p in psutil.Process(process.pid).children() if is_rank(p)]
            if len(victims) < 2:
                break
            rng.choice(victims).send_signal(signal.SIGKILL)
            done += 1
        assert wait(process) == 0, log_of(folder)
    finally:
        kill_all(process)
    return done


def is_rank(process):
    try:
        return any(part.endswith('train.py') for part in process.cmdline())
    except psutil.Error:
        return False


def kill_jobs(folder, kills, ranks, rng):
    """Kill a whole run while it writes and start it again, up to `kills` times.

    Returns:
        How often it was killed, and how often that left a file half written.
    """
    done = halves = 0
    while done < kills:
        left = being_written(folder)  # by earlier starts
        process = start(folder, ranks)
        try:
            # A run that is always killed at its first save would get nowhere.
            if not until_save(folder, process, rng.randint(1, 4), left):
                assert process.returncode == 0, log_of(folder)
                break  # it has reached its end
            time.sleep(rng.uniform(0, 0.004))
        finally:
            kill_all(process)
        done += 1
        halves += bool(being_written(folder) - left)
    assert wait(start(folder, ranks)) == 0, log_of(folder)
    return done, halves


def until_save(folder, process, number, left):
    """Wait until a run writes for the `number`-th time, ignoring the files `left` before; False if it ends first."""
    for i in range(number):
        if i and not until(lambda: not being_written(folder) - left, process):
            return False
        if not until(lambda: being_written(folder) - left, process):
            return False
    return True


def being_written(folder):
    """Names of the states and snapshots being written in `folder`, or left half written by a kill."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return {name for name in names if name.startswith('.tmp-') and name.endswith(('.pt', '.safetensors'))}


def final_state(folder):
    """The last state, without the time spent, which differs from run to run."""
    state = load_state(saved_files(folder, 'training-state')[0])
    state['progress'].pop('seconds')
    return {name: state[name] for name in ('net', 'ema', 'optimizer', 'ranks', 'progress', 'settings')}


def equal(a, b):
    """Whether two states are the same bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def losses(folder):
    """[(tick, statistics of the loss)] in stats.jsonl."""
    lines = json_lines(pathlib.Path(folder) / 'stats.jsonl')
    return [(line['Progress/tick']['mean'], line['Loss/loss']) for line in lines]


def check_same(folder, reference):
    """Assert that a run ended exactly as the reference did, with each tick once in its records."""
    assert equal(final_state(folder), final_state(reference)), 'its final state differs'
    assert losses(folder) == losses(reference), 'its statistics differ'
    ticks = [line.split()[1] for line in (pathlib.Path(folder) / 'log.txt').read_text().splitlines()
             if line.startswith('tick ')]
    assert ticks == [str(i) for i in range(len(ticks))] and len(ticks) == len(losses(reference)), ticks
    assert not list(pathlib.Path(folder).glob('.tmp-*')), 'a temporary file was left'


@click.command()
@click.option('--ranks', default=20, help='How often a rank is killed, two times a run')
@click.option('--jobs', default=50, help='How often a job is killed while it writes')
@click.option('--seed', default=0)
def main(ranks, jobs, seed):
    """Kill runs and compare their ends with an undisturbed run's."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as tmp:
        reference = f'{tmp}/reference'
        assert wait(start(reference, 2)) == 0, log_of(reference)
        killed = runs = 0
        while killed < ranks:
            folder = f'{tmp}/ranks-{runs}'
            killed += kill_ranks(folder, min(2, ranks - killed), rng)
            check_same(folder, reference)
            runs += 1
            print(f'ranks killed: {killed} in {runs} runs, all ended like the undisturbed one', flush=True)
        killed = halves = runs = 0
        while killed < jobs:
            folder = f'{tmp}/jobs-{runs}'
            more, left = kill_jobs(folder, jobs - killed, 2, rng)
            check_same(folder, reference)
            killed, halves, runs = killed + more, halves + left, runs + 1
            print(f'jobs killed while writing: {killed} in {runs} runs, all ended like the undisturbed one; '
                  f'{halves} times a file was half written', flush=True)


if __name__ == '__main__':
    main()
