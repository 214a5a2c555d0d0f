"""What the benchmarks share: selection, alternating measurement, and a report with hardware, versions and commit."""

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
GPU_WARM_UP = 3  # steps before any is timed
GPU_IN_A_ROW = 5  # steps between two waits for the GPU


def select(names, words):
    """Those of `names` that hold one of the words, in their order; all without words.

    Args:
        names: What there is to measure.
        words: As typed after --only, separated by commas. A name may have some ('bf16, compiled'), a word has none.

    Raises:
        click.BadParameter: a word that no name holds.
    """
    words = [word.strip() for word in (words or '').split(',') if word.strip()]
    for word in words:
        if not any(word in name for name in names):
            raise click.BadParameter(f"'{word}' is in none of the names; choose from: {'; '.join(names)}",
                                     param_hint='--only')
    return [name for name in names if not words or any(word in name for word in words)]


def alternate(tasks, repeats, device='cpu', warm_up=1, in_a_row=1):
    """Median seconds of each of {name: callable}: `warm_up` runs of each, then all in turn, `repeats` times.

    Taking turns lets a change in the machine's load reach all of them alike. On a CPU it is processor time,
    of all threads together, that counts: others may be using the machine.

    Args:
        tasks: {name: callable without arguments}.
        repeats: Turns; the median counts.
        device: Where the tasks work; after a turn on a GPU it is waited for.
        warm_up: Runs of each before any is timed.
        in_a_row: Runs of a turn; the seconds are those of one.
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
    """`alternate` for steps that follow one another in a loop, as those of a training do: seconds of one step.

    On a GPU the host is some kernels ahead as long as nobody waits. A wait after each step would end that, and count
    the launch of its first kernels; the first steps also choose algorithms and fill the memory pool.
    """
    cuda = torch.device(device).type == 'cuda'
    return alternate(steps, repeats, device, **(dict(warm_up=GPU_WARM_UP, in_a_row=GPU_IN_A_ROW) if cuda else {}))


def environment(device='cpu'):
    """Hardware, versions and commit, as plain values."""
    gpu = torch.cuda.get_device_name(device) if torch.device(device).type == 'cuda' else None
    return dict(processor=processor(), cores=os.cpu_count(), threads=torch.get_num_threads(), gpu=gpu,
                python=platform.python_version(), torch=torch.__version__, numpy=np.__version__, commit=code_version())


def report(title, rows, settings, out=None, device='cpu'):
    """Print `rows` (dicts of the same keys, at least one) as a table and, to `out`, write all of it as JSON."""
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
