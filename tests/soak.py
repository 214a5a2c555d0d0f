"""Two ranks train for a while, with images generated and scored from their snapshots alongside: does anything grow?

    python -m tests.soak --minutes 30

prints a table of each rank's memory and file handles after the first minute and at the end, and what was left behind.
It fails if memory has grown by 2 % or more, if handles, threads or child processes have become more, or if a process
is left. With `--workers 1`, a process per rank decodes the images anew; otherwise a thread takes them from the decoded
set.
"""

import contextlib
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import click
import psutil

from tests.commands import ROOT, SMALL
from tests.kills import ENV, kill_all
from training.dataset import EMBEDDED
from training.run_files import saved_files

TRAIN = [*SMALL, '--batch=64', '--precond=warm', '--cond=1', '--grid=4', '--tick=1.28', '--snap=1', '--dump=2',
         '--duration=1000', '--nosubdir', '--auto-resume', '--keep=3', '--seed=0']
WARM_UP_SEC = 60
MAX_GROWTH = 0.02


def command(script, *args):
    """Run one of the commands to its end; it must succeed."""
    done = subprocess.run([sys.executable, str(ROOT / script), *args], env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def ranks_of(process):
    """The training processes under torchrun, by rank."""
    found = {}
    for p in psutil.Process(process.pid).children():
        if any(part.endswith('train.py') for part in p.cmdline()):
            found[int(p.environ()['RANK'])] = p
    return [found[rank] for rank in sorted(found)]


def measure(p):
    """(RSS in MiB, open files and sockets, threads, child processes) of a process."""
    return p.memory_info().rss / 2 ** 20, p.num_fds(), p.num_threads(), len(p.children())


class Customer:
    """Generates and scores from the newest snapshot, again and again, one command at a time."""

    def __init__(self, folder, tmp):
        self.folder, self.tmp, self.finished, self.process = folder, tmp, {'generate.py': 0, 'fid.py': 0}, None
        self.failed = []

    def step(self):
        """Start the next command when the last one is done."""
        if self.process is not None and self.process.poll() is None:
            return
        self.collect()
        snapshots = saved_files(self.folder, 'network-snapshot')
        if not snapshots:
            return
        scores = sum(self.finished.values()) % 2
        self.script = 'fid.py' if scores else 'generate.py'
        # Copied, since training will soon delete it.
        snapshot = shutil.copy(snapshots[0], self.tmp)
        args = ['calc', f'--network={snapshot}', f'--ref={self.tmp}/ref.npz', '--seeds=0-31', '--detector=pixels',
                f'--log={self.tmp}/metrics.jsonl'] if scores else \
            [f'--network={snapshot}', f'--outdir={self.tmp}/images', '--seeds=0-15', '--overwrite']
        with open(f'{self.tmp}/customer.txt', 'w') as out:
            self.process = subprocess.Popen([sys.executable, str(ROOT / self.script), *args, '--steps=4'], env=ENV,
                                            stdout=out, stderr=subprocess.STDOUT)

    def collect(self):
        """Wait for the command under way, if any, and note how it ended."""
        if self.process is not None:
            self.finished[self.script] += 1
            if self.process.wait():
                self.failed.append(pathlib.Path(self.tmp, 'customer.txt').read_text())
            self.process = None


@click.command()
@click.option('--minutes', type=click.FloatRange(min=3), default=30, help='How long the training runs')
@click.option('--workers', default=0, help='Processes of a rank that decode images; 0: they are decoded in advance')
def main(minutes, workers):
    """Train, generate and score for a while, and watch memory, handles and processes."""
    with tempfile.TemporaryDirectory() as tmp, contextlib.ExitStack() as at_exit:
        command('fid.py', 'ref', f'--data={EMBEDDED}', f'--dest={tmp}/ref.npz', '--detector=pixels')
        folder = f'{tmp}/run'
        with open(f'{tmp}/train.txt', 'w') as out:
            process = subprocess.Popen([sys.executable, '-m', 'torch.distributed.run', '--standalone',
                                        '--nproc_per_node=2', '--', str(ROOT / 'train.py'), *TRAIN,
                                        f'--outdir={folder}', f'--workers={workers}', f'--cache={int(not workers)}'],
                                       env=ENV, stdout=out, stderr=subprocess.STDOUT)
        at_exit.callback(kill_all, process)
        while not saved_files(folder, 'training-state'):  # the first save is part of warming up
            assert process.poll() is None, pathlib.Path(tmp, 'train.txt').read_text()
            time.sleep(0.2)
        ranks, customer, samples, began = ranks_of(process), Customer(folder, tmp), [], time.monotonic()
        assert len(ranks) == 2
        while time.monotonic() < began + minutes * 60:
            assert process.poll() is None, pathlib.Path(tmp, 'train.txt').read_text()
            customer.step()
            samples.append((time.monotonic() - began, [measure(p) for p in ranks]))
            if len(samples) % 60 == 0:
                memory = ', '.join(f'{rss:.1f} MiB' for rss, *_ in samples[-1][1])
                print(f'after {samples[-1][0] / 60:.1f} minutes: {memory}', flush=True)
            time.sleep(2)
        customer.collect()
        helpers = [child for p in ranks for child in p.children(recursive=True)]
        process.terminate()
        process.wait(120)
        left = [p for p in [*ranks, *helpers] if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        for p in left:
            p.kill()
        report(samples, minutes, customer, folder, left)


def report(samples, minutes, customer, folder, left):
    """Print the table and fail where something grew or was left."""
    window = max(60, minutes * 6)  # a minute, or a tenth of the whole
    first = [ranks for t, ranks in samples if WARM_UP_SEC <= t < WARM_UP_SEC + window]
    last = [ranks for t, ranks in samples if t >= minutes * 60 - window]
    ticks = sum(1 for _ in open(f'{folder}/stats.jsonl'))
    print(f'{minutes:g} minutes, {ticks} ticks, {customer.finished["generate.py"]} times generated and '
          f'{customer.finished["fid.py"]} times scored, {len(customer.failed)} of them failed')
    print('medians of the window after the first minute → of the last window')
    bad = [*customer.failed, *(f'process left: {p}' for p in left)]
    bad += [f'{script} has never been run' for script, times in customer.finished.items() if not times]
    for rank in range(2):
        before, after = ([statistics.median(s[rank][i] for s in part) for i in range(4)] for part in (first, last))
        growth = after[0] / before[0] - 1
        print(f'rank {rank}: memory {before[0]:.1f} → {after[0]:.1f} MiB ({growth:+.2%}), handles {before[1]:g} → '
              f'{after[1]:g}, threads {before[2]:g} → {after[2]:g}, child processes {before[3]:g} → {after[3]:g}')
        if growth >= MAX_GROWTH or any(b < a for b, a in zip(before[1:], after[1:])):
            bad.append(f'rank {rank} has grown')
    states, snapshots = (len(saved_files(folder, kind)) for kind in ('training-state', 'network-snapshot'))
    print(f'kept: {states} states, {snapshots} snapshots; processes left: {len(left)}')
    if bad:
        sys.exit('\n'.join(bad))


if __name__ == '__main__':
    main()
