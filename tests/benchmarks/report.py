"""Shared by the benchmarks: choosing rows, alternating measurements, a report with hardware, versions and commit."""

import json
import os
import pathlib
import platform
import statistics
import time

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
            ('=bf16, compiled').

    Raises:
        click.BadParameter: no name contains one of the words.
    """
    if (words or '').startswith('='):
        words, found = [words[1:]], [name for name in names if name == words[1:]]
    else:
        words = [word.strip() for word in (words or '').split(',') if word.strip()]
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


def environment(device='cpu'):
    """Hardware, versions and commit, as plain JSON values."""
    gpu = torch.cuda.get_device_name(device) if torch.device(device).type == 'cuda' else None
    return dict(processor=processor(), cores=os.cpu_count(), threads=torch.get_num_threads(), gpu=gpu,
                python=platform.python_version(), torch=torch.__version__, numpy=np.__version__, commit=code_version())


def report(title, rows, settings, out=None, device='cpu'):
    """Print `rows` (at least one dict, all with the same keys) as a table; with `out`, also write a report as JSON."""
    shown = [{key: f'{value:.4g}' if isinstance(value, float) else str(value) for key, value in row.items()}
             for row in rows]
    width = {key: max(len(key), *(len(row[key]) for row in shown)) for key in shown[0]}
    print(title)
    for row in ({key: key for key in width}, *shown):
        print('  '.join(f'{row[key]:<{width[key]}}' for key in width).rstrip())
    content = dict(title=title, rows=rows, settings=settings, environment=environment(device))
    print(json.dumps({**content['settings'], **content['environment']}))
    if out is not None:
        with atomic_write(out, 'w') as f:
            json.dump(content, f, indent=2)
