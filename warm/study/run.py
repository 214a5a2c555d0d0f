"""Carry out the plan of `warm.study.plan`: train, score, record; piece by piece, with any number of workers.

    python -m warm.study --scale=digits                    everything, the most worthwhile first
    python -m warm.study --scale=cifar10 --minutes=9       what fits into 9 minutes; repeat to continue
    python -m warm.study --scale=cifar10 --prepare         make the data and the detector first, if they are missing
    python -m warm.study --scale=digits -n                 show what is done and what is left

Each run has a folder in --outdir. In --results, each score is a line in SCALE.jsonl, and each network's errors
(warm.errors) are one in errors-SCALE.jsonl; `python -m warm.study.page` builds the page from these. A run is trained up
to each network to be scored in turn, and scored there. A run belongs to one worker at a time, so the command can be
started several times at once, also on several machines that share the folder.

With --tidy, only files that are still needed are kept, so that an unfinished study is small enough to move: a state of
the current run (52 MB with --scale=cifar10), a network of 20 MB if time ran out before it was scored, and another as
long as question 6 is open, whose runs start from it.
"""

import dataclasses
import os
import pathlib
import shlex
import subprocess
import sys

import click

from dnnlib import UserError, chosen
from dnnlib.files import make_dirs, sigterm_exits
from dnnlib.flags import NumberRange, Tool
from torch_utils import distributed as dist
from torch_utils.signals import EXIT_STOPPED
from warm.study.pieces import Clock, OutOfTime
from warm.study.plan import QUESTIONS, SCALES, plan
from warm.study.work import ROOT, Study, parent_ready, recorded_speed, tidy, work_on


def overview(study, runs):
    """The progress of the study as text: a line per run with its number of recorded scores."""
    lines = []
    for run in runs:
        done = len(run.scores) - len(study.missing(run))
        waits = '' if parent_ready(study, run) or not study.missing(run) else f'   (waits for {run.parent})'
        lines.append(f'{done:3d} of {len(run.scores):3d} scores   {run.kimg:6g} kimg   {run.name}{waits}')
    return '\n'.join(lines)


@click.command(cls=Tool)
@click.option('--scale', 'scale_name', type=click.Choice(list(SCALES)), required=True, help='Size of the study')
@click.option('--outdir', metavar='DIR', default='study', help='Where to save the runs, in a subfolder named SCALE')
@click.option('--results', metavar='DIR', default='results',
              help='Where to record scores, in SCALE.jsonl, and errors, in errors-SCALE.jsonl')
@click.option('--detector', metavar='NAME|PATH', default=None,
              help="As for fid.py, such as inception; its scores go to SCALE--DETECTOR.jsonl  [default: the scale's]")
@click.option('--questions', metavar='LIST', default=','.join(QUESTIONS), help='Questions to answer; 1 includes 3')
@click.option('--only', metavar='TEXT', default='', help='Only runs whose name contains this', show_default=False)
@click.option('--prepare', 'prepares', is_flag=True,
              help="Make the scale's data and detector first where they are missing")
@click.option('--minutes', type=NumberRange(min=0), default=0, help='Stop after this time; 0 = when everything is done')
@click.option('--gpus', type=click.IntRange(min=1), default=1, help='Number of GPUs of this machine to train on')
@click.option('--tidy', 'tidies', is_flag=True,
              help='Delete networks and states that no run needs any more, once scored with this detector')
@click.option('-n', '--dry-run', is_flag=True, help='Print what is done and what is left, and exit')
def main(scale_name, outdir, results, detector, questions, only, prepares, minutes, gpus, tidies, dry_run):
    """Train and score what the results page needs; after a stop, the same command continues."""
    scale, file = SCALES[scale_name], scale_name
    if detector not in (None, scale.detector):
        scale, file = dataclasses.replace(scale, detector=detector), f'{file}--{pathlib.Path(detector).stem}'
    study = Study(scale, pathlib.Path(outdir) / scale.name, pathlib.Path(results) / f'{file}.jsonl', Clock(minutes),
                  launcher(gpus))
    runs = [run for run in plan(scale, parse_questions(questions)) if only in run.name]
    if not runs:
        raise UserError(f'no run of these questions has --only={only} in its name; --dry-run without it lists them')
    if not dry_run:
        if prepares:
            prepare(scale)
        check_prepared(scale)
        make_dirs(study.outdir)
        make_dirs(results)
        study.speed = recorded_speed(study)
        try:
            with sigterm_exits(EXIT_STOPPED), dist.process_group():
                while any([work_on(study, run) for run in runs]):  # again for runs that were locked or lacked a parent
                    pass
        except OutOfTime:
            print('Time is up; the same command continues from here.')
        if tidies:
            tidy(study, runs)
    print(overview(study, runs))


def parse_questions(text):
    """Parse a list of questions, '1,5' → ['1', '5'].

    Raises:
        UserError: there is no such question.
    """
    return [chosen('question', number, tuple(QUESTIONS)) for number in text.split(',')]


def launcher(gpus):
    """The words of the command line before train.py, with torchrun for several GPUs."""
    torchrun = ('-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={gpus}')
    return (sys.executable, *(torchrun if gpus > 1 else ()))


def prepare(scale):
    """Run the scale's preparation commands whose --dest is missing.

    Raises:
        UserError: one of them failed.
    """
    for command in scale.prepare:
        _, script, *words = shlex.split(command)
        dest = next(word.removeprefix('--dest=') for word in words if word.startswith('--dest='))
        if os.path.exists(dest):
            continue
        print(f'\n$ {command}', flush=True)
        path = [script] if script == '-m' else [str(ROOT / script)]
        done = subprocess.run([sys.executable, *path, *words], env={**os.environ, 'PYTHONPATH': str(ROOT)})
        if done.returncode:
            raise UserError(f'`{command}` failed with exit code {done.returncode}; see the message above')


def check_prepared(scale):
    """Raise UserError unless the scale's data sets and detector exist."""
    for path in (scale.data, scale.unseen, scale.detector if '/' in scale.detector else None):
        if path and not os.path.exists(path):
            commands = ', '.join(f'`{command}`' for command in scale.prepare)
            raise UserError(f'{path} is missing; make it with --prepare, or by hand: {commands}')
