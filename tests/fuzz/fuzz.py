"""Damage files in many ways and read them: nothing but a UserError may come of it.

    python -m tests.fuzz.fuzz --cases 10000

prints a line per reader: how many files were refused, how many could be read all the same, and what failed. Each case
is one damaged file, decided by its number. A case fails if it gives anything but a result or a UserError, if it takes
5 seconds of processor time, if the process grows beyond 1 GiB, if code runs that is not a Python module's, or if a file
is written elsewhere. A crash or an endless case is noticed from outside. The test suite runs a few hundred cases
(tests/test_untrusted.py).
"""

import collections
import concurrent.futures
import json
import os
import pathlib
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
import warnings

import click

from dnnlib import UserError
from tests.fuzz.targets import TARGETS

ROOT = pathlib.Path(__file__).resolve().parents[2]
MAX_SEC, MAX_BYTES = 5, 1 << 30
MEMORY = '/dev/shm'  # where the files are, if it exists: a disk takes longer than all else
STALL_SEC = 120  # without a finished case, even on a busy machine
FORBIDDEN = {'os.system', 'os.exec', 'os.posix_spawn', 'os.spawn', 'os.fork', 'os.forkpty', 'pty.spawn',
             'socket.connect', 'subprocess.Popen', 'ctypes.dlopen', 'shutil.rmtree', 'pickle.find_class'}


class Tripwire:
    """Notes every audit event of Python's that only code in a file could have caused. It cannot be removed again.

    Attributes:
        armed: Whether it takes notes.
        folder: Where files may be written.
    """

    def __init__(self):
        self.armed, self.folder, self.events = False, '', []
        sys.addaudithook(self.hook)

    def hook(self, event, args):
        if not self.armed:
            return
        if event == 'exec' and not os.path.exists(getattr(args[0], 'co_filename', '')):  # a Python module is fine
            self.events.append(f'exec of {args[0]}')
        elif event == 'open' and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and not self.may_write(args[0]):
            self.events.append(f'writing {args[0]}')
        elif event in FORBIDDEN and not str(args[:1]).startswith("('torch"):
            self.events.append(f'{event}{args}')

    def may_write(self, path):
        return isinstance(path, int) or os.path.abspath(os.fsdecode(path)).startswith((self.folder, os.devnull))


def peak_memory():
    """Peak memory of this program, in bytes. (getrusage would also count its parent's before the exec.)"""
    status = pathlib.Path('/proc/self/status')
    if status.is_file():
        return int(re.search(r'VmHWM:\s+(\d+) kB', status.read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def run_cases(name, first, count, tripwire, tell=lambda i: None):
    """Run the cases of a target; returns ({outcome: number}, sentences about what failed)."""
    outcomes, failures = collections.Counter(), []
    with tempfile.TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else None) as tmp:
        target = TARGETS[name](pathlib.Path(tmp))
        warnings.simplefilter('ignore')
        tripwire.armed, tripwire.folder = False, os.path.abspath(tmp)
        for i in [*range(-20, 0), *range(first, first + count)]:  # negative ones only load what is loaded on first use
            data = target.damage(random.Random(f'{name} {i}'))
            tripwire.armed = i >= 0
            started, outcome = time.process_time(), 'read'
            try:
                target.read(data)
            except UserError as e:
                outcome = 'refused'
                if len(str(e)) > 2000 or '\n' in str(e):
                    failures.append(f'{name} {i}: not one sentence: {str(e)[:300]!r}')
            except Exception as e:
                outcome = 'failed'
                failures.append(f'{name} {i}: {type(e).__name__}: {str(e)[:300]}')
            seconds = time.process_time() - started
            tripwire.armed = False
            outcomes[outcome] += i >= 0
            if seconds > MAX_SEC:
                failures.append(f'{name} {i}: {seconds:.1f} s')
            if peak_memory() > MAX_BYTES:
                failures.append(f'{name} {i}: the process has grown beyond 1 GiB')
                break
            tell(i)
        failures += [f'{name}: {event}' for event in tripwire.events]
        tripwire.events.clear()
    return dict(outcomes), failures


def watched(name, first, count):
    """`run_cases` in a process of its own, so that a crash or a hang is noticed; the same result."""
    with tempfile.NamedTemporaryFile('r') as progress, tempfile.TemporaryFile('w+') as said:
        command = [sys.executable, '-m', 'tests.fuzz.fuzz', '--child', progress.name, '--target', name,
                   '--first', str(first), '--cases', str(count)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT,
                                   env={**os.environ, 'OMP_NUM_THREADS': '1'})
        while process.poll() is None:
            try:
                process.wait(1)
            except subprocess.TimeoutExpired:
                if time.time() - os.stat(progress.name).st_mtime > STALL_SEC:
                    process.kill()
        said.seek(0)
        said = said.read()
        if process.returncode:
            last = progress.read().split()[-1:]
            return {}, [f'{name}: ended with code {process.returncode} after case {last}: {said[-1000:]}']
        return json.loads(said.splitlines()[-1])


def told(name, first, count):
    """Print what `watched` found; returns the numbers of files and of failures."""
    started = time.monotonic()
    outcomes, failures = watched(name, first, count)
    lines = [f'{name:10} {outcomes}, {len(failures)} failures, {time.monotonic() - started:.0f} s']
    print('\n  '.join([*lines, *failures[:20]]), flush=True)
    return sum(outcomes.values()), len(failures)


@click.command()
@click.option('--cases', default=10_000, help='Files to read per target')
@click.option('--first', default=0, help='Number of the first')
@click.option('--target', 'names', type=click.Choice(list(TARGETS)), multiple=True, help='[default: all]')
@click.option('--jobs', default=1, help='Readers that are tried at the same time')
@click.option('--child', metavar='FILE', hidden=True)
def main(cases, first, names, jobs, child):
    """Damage files in many ways and read them."""
    if child:
        with open(child, 'w') as f:
            print(json.dumps(run_cases(names[0], first, cases, Tripwire(), lambda i: print(i, file=f, flush=True))))
        return
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        counts, failures = zip(*pool.map(lambda name: told(name, first, cases), names or TARGETS))
    print(f'{sum(counts)} files for {len(counts)} readers, {sum(failures)} failures')
    sys.exit(int(any(failures)))


if __name__ == '__main__':
    main()
