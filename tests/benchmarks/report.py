"""Shared by the benchmarks: choosing rows, alternating measurements, a report with hardware, versions and commit."""

import gc
import json
import os
import pathlib
import platform
import statistics
import sys
import threading
import time
import traceback

import click
import numpy as np
import torch

from dnnlib.files import atomic_write
from training.provenance import code_version, processor

ROOT = pathlib.Path(__file__).resolve().parents[2]
GPU_WARM_UP = 3  # untimed steps at the start
GPU_IN_A_ROW = 5  # steps between two synchronisations with the GPU


def select(names, words):
    """The names that contain one of the words, in the order of `names`; all names if there are no words.

    Args:
        names: What there is to measure.
        words: The value of --only: words separated by commas, or '=' and one whole name, which may contain commas
            ('=bf16, compiled'). A word after '-' leaves out the names that contain it ('-fp16').

    Raises:
        click.BadParameter: no name contains one of the words.
    """
    if (words or '').startswith('='):
        words, found = [words[1:]], [name for name in names if name == words[1:]]
    else:
        words = [word.strip() for word in (words or '').split(',') if word.strip()]
        for word in [word for word in words if word.startswith('-')]:
            words.remove(word)
            names = [name for name in names if word[1:] not in name]
        found = [name for name in names if not words or any(word in name for word in words)]
    for word in words:
        if not any(word in name for name in found):
            raise click.BadParameter(f"'{word}' is in none of the names; choose from: {'; '.join(names)}",
                                     param_hint='--only')
    return found


def alternate(tasks, repeats, device='cpu', warm_up=1, in_a_row=1):
    """Median seconds per run of each task {name: seconds}: `warm_up` runs of each, then `repeats` turns of all tasks.

    Since the tasks take turns, a change in the machine's load affects all of them alike. On a CPU, processor time
    (summed over threads) is measured, since others may be using the machine.

    Args:
        tasks: {name: callable without arguments}.
        repeats: Number of turns; the median counts.
        device: Where the tasks run; a GPU is synchronised after each turn.
        warm_up: Untimed runs of each task at the start.
        in_a_row: Runs per turn; the seconds are per run.
    """
    cuda = torch.device(device).type == 'cuda'
    clock = time.perf_counter if cuda else time.process_time

    def seconds(task, count):
        start = clock()
        for _ in range(count):
            task()
        if cuda:
            torch.cuda.synchronize(device)
        return (clock() - start) / count

    for task in tasks.values():
        seconds(task, warm_up)
    rounds = [{name: seconds(task, in_a_row) for name, task in tasks.items()} for _ in range(repeats)]
    return {name: statistics.median(r[name] for r in rounds) for name in tasks}


def alternate_steps(steps, repeats, device='cpu'):
    """`alternate` for the steps of a loop, such as training steps: median seconds per step.

    On a GPU the host runs some kernels ahead. Synchronising after each step would end that and add the launch of its
    first kernels to the time, so several steps are timed together. More are run untimed, since the first steps choose
    algorithms and fill the memory pool.
    """
    cuda = torch.device(device).type == 'cuda'
    return alternate(steps, repeats, device, **(dict(warm_up=GPU_WARM_UP, in_a_row=GPU_IN_A_ROW) if cuda else {}))


def compiled_whole(options):
    """{} for options of `accelerate` without compile, else what was not compiled since the last call: should be zeros.

    A fast path that was not taken gives a row that looks right but is slow.
    """
    if not (options or {}).get('compile'):
        return {}
    from torch._dynamo.utils import counters  # importing it takes seconds
    found = dict(graph_breaks=sum(counters['graph_break'].values()),
                 cuda_graphs_skipped=counters['inductor']['cudagraph_skips'])
    counters.clear()
    return found


def environment(device='cpu'):
    """Hardware, versions and commit, as plain JSON values."""
    gpu = torch.cuda.get_device_name(device) if torch.device(device).type == 'cuda' else None
    return dict(processor=processor(), cores=os.cpu_count(), threads=torch.get_num_threads(), gpu=gpu,
                python=platform.python_version(), torch=torch.__version__, numpy=np.__version__, commit=code_version())


class Table:
    """A report whose rows are printed and written as they are measured: what is measured outlives whatever comes next.

    The file is JSON; `complete` in it is false until `finish`.

    Args:
        title, settings: What is measured, in words and as plain JSON values.
        out: Path of the file, or None.
        device: Where it is measured.
        arrange: Function of the rows that returns those to write.
    """

    def __init__(self, title, settings, out=None, device='cpu', arrange=list):
        self.title, self.settings, self.out, self.arrange = title, settings, out, arrange
        self.environment, self.rows, self.lock = environment(device), [], threading.Lock()

    def write(self, complete=False):
        """Write the file anew."""
        if self.out is not None:
            with atomic_write(self.out, 'w') as f:
                json.dump(dict(title=self.title, complete=complete, rows=self.arrange(self.rows),
                               settings=self.settings, environment=self.environment), f, indent=2)

    def add(self, *rows):
        """Add rows, dicts of plain JSON values; threads may do so at the same time."""
        with self.lock:
            for row in rows:
                print(json.dumps(row), flush=True)
            self.rows += rows
            self.write()

    def attempt(self, labels, measure):
        """Add the rows {**label, **numbers}, with one dict of numbers per label, as measure(labels) returns them.

        If it raises, each label is measured by itself; one that fails alone gets an `error` in place of numbers.
        """
        try:
            if torch.cuda.is_initialized():
                gc.collect()  # networks and optimizers refer to themselves
                torch.cuda.empty_cache()
            numbers = measure(labels)
        except Exception as e:  # no memory, no compiler, a bug: the other rows are still worth measuring
            traceback.print_exc()
            numbers = [dict(error=f'{type(e).__name__}: {e}'[:500])]
        if len(numbers) == len(labels):
            self.add(*({**label, **found} for label, found in zip(labels, numbers)))
        else:
            for label in labels:
                self.attempt([label], measure)

    def finish(self):
        """Print all rows as a table, and complete the file.

        Raises:
            click.ClickException: rows have failed.
        """
        rows = self.arrange(self.rows)
        keys = list(dict.fromkeys(key for row in rows for key in row))
        shown = [{key: key for key in keys}, *({key: in_words(row.get(key, '')) for key in keys} for row in rows)]
        print(self.title)
        for row in shown:
            print('  '.join(f'{row[key]:<{max(len(other[key]) for other in shown)}}' for key in keys).rstrip())
        print(json.dumps({**self.settings, **self.environment}))
        self.write(complete=True)
        failed = sum('error' in row for row in self.rows)
        if failed:
            raise click.ClickException(f'{failed} of {len(self.rows)} rows failed; their column `error` says why')


def in_words(value):
    """A value as a cell of the table; of an error, its first line."""
    return f'{value:.4g}' if isinstance(value, float) else (str(value).splitlines() or [''])[0]


def report(title, rows, settings, out=None, device='cpu'):
    """Print `rows` (dicts) as a table; with `out`, also write a report as JSON."""
    table = Table(title, settings, out, device)
    table.rows = list(rows)
    table.finish()


def dying_with_parent(command):
    """The command line that runs `command` so that it is killed as soon as this process ends, however it ends (Linux).

    A process in a session of its own would otherwise survive, and share the GPU with the next measurement.
    """
    if sys.platform != 'linux':
        return command
    code = ('import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); '  # PR_SET_PDEATHSIG, SIGKILL; survives exec
            f'os.getppid() == {os.getpid()} or sys.exit(1); os.execv(sys.argv[1], sys.argv[1:])')
    return [sys.executable, '-I', '-S', '-c', code, *command]
