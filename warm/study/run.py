"""Carry out the plan of `warm.study.plan`: train, score, record; in pieces, by as many workers as there are.

    python -m warm.study --scale=digits                    everything, in order of worth
    python -m warm.study --scale=cifar10 --minutes=9       what fits into 9 minutes; the same command goes on
    python -m warm.study --scale=cifar10 --prepare         make the data and the detector first, if they are missing
    python -m warm.study --scale=digits -n                 what is done and what is left

Each run has a folder in --outdir, each score a line in SCALE.jsonl in --results, from which `python -m warm.study.page`
makes the page. A run is trained from one scored network to the next, and scored in between. It is one worker's at a
time, so the command may be started several times at once, also on several machines that share the folder.

With --tidy, a folder keeps only what is still needed, so that an unfinished study is small enough to be moved: a state
of the run under way (of --scale=cifar10 52 MB), a network of 20 MB if time ran out before it was scored, and another
while question 6 is left, whose trainings start from it.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
import shlex
import statistics
import subprocess
import sys
import time

import click
import numpy as np
import torch

from dnnlib import UserError, chosen
from dnnlib.files import make_dirs, sigterm_exits
from dnnlib.flags import NumberRange
from dnnlib.json_files import read_lines
from torch_utils import distributed as dist
from torch_utils.signals import EXIT_STOPPED
from training import provenance
from training.dataset import EMBEDDED
from training.metric_images import open_images
from training.metrics import label
from training.run_files import LOG_NAME, SNAPSHOT, STATE, STATS_NAME, parse_kimg, saved_files
from training.scoring import ImageFiles, NetworkImages, load_scorer, open_detector, write_reference
from warm.sources import open_network
from warm.study.pieces import Clock, OutOfTime, claimed
from warm.study.plan import QUESTIONS, REAL, REAL_DRAWS, SCALES, plan

ROOT = pathlib.Path(__file__).resolve().parents[2]
TICKS = 8  # of a training between two networks that may be scored
SAVE_SEC = 20  # of the piece's time left for a stopped training to save its state
STOP_SEC = 120  # after which a training that does not stop is killed
POLL_SEC = 0.2
KEPT = 'networks'  # folder of a run's networks that are to be scored
NEAR = 0.03  # a snapshot counts for a number of images if it is this near, relatively


@dataclasses.dataclass
class Study:
    """One worker's view of a scale.

    Attributes:
        scale: The Scale.
        outdir: Folder of its runs.
        results: File of its scores.
        clock: Time left.
        launcher: Words before train.py, such as those of torchrun.
        speed: Seconds that drawing and scoring took per image and evaluation, the last time; 0 before it is known.
    """

    scale: object
    outdir: pathlib.Path
    results: pathlib.Path
    clock: Clock
    launcher: tuple = (sys.executable,)
    speed: float = 0.0

    def folder(self, run_name):
        """Of a run."""
        return self.outdir / run_name

    def recorded(self):
        """{(run, kimg, options)} that have a line in the results, of the scale's number of images."""
        return {key_of(line) for line in read_lines(self.results) if line.get('num_images') == self.scale.num}

    def missing(self, run):
        """Scores of a run that have no line yet."""
        done = self.recorded()
        return [score for score in run.scores if (run.name, score.kimg, score.options) not in done]

    def snapshot(self, run_name, kimg):
        """The run's network after that many images, None if it is not there."""
        return first_after(self.folder(run_name) / KEPT, kimg)

    def images(self):
        """Dataset of the training images."""
        return open_images(self.scale.data or EMBEDDED)

    @functools.cached_property
    def scorer(self):
        """Detector and reference statistics of the training data, made once; with them, what the data itself scores."""
        detector = open_detector(self.scale.detector)
        reference = self.outdir / f'reference{detector.suffix}.npz'
        with claimed(self.outdir / 'reference.lock', wait=True):
            if not reference.is_file():
                self.clock.need(self.scale.start_sec)  # about as much as a start
                write_reference(reference, ImageFiles(self.images()), detector, self.scale.metrics, self.scale.batch,
                                progress=False)
            scorer = load_scorer(list(self.scale.metrics), detector, reference)
            score_real_images(self, scorer)
        return scorer


class DrawnImages(ImageFiles):
    """`num` images of a dataset, drawn at random as a perfect model of it would: some may come twice."""

    def __init__(self, dataset, num, seed):
        super().__init__(dataset, dataset.name)
        self.total, self.drawn = num, np.random.RandomState(seed).randint(len(dataset), size=num)

    def batches(self, indices, batch):
        """Yield the images at these of the `num` places in batches, uint8 [≤ batch, C, H, W]."""
        return super().batches(self.drawn[list(indices)], batch)


def first_after(folder, kimg):
    """The folder's first network after that many images, if it is near; else None."""
    late = [path for path in saved_files(folder, SNAPSHOT)
            if 0 <= parse_kimg(path) - int(kimg) <= max(NEAR * kimg, 1)]
    return min(late, key=parse_kimg, default=None)


def keep_network(study, run, kimg):
    """Put the run's network after that many images aside, if there is one; returns whether it is there."""
    path = first_after(study.folder(run.name), kimg)
    if path is not None and study.snapshot(run.name, kimg) is None:
        make_dirs(study.folder(run.name) / KEPT)
        path.replace(study.folder(run.name) / KEPT / path.name)
    return study.snapshot(run.name, kimg) is not None


def key_of(line):
    """What a line of the results is a score of, comparable with the plan."""
    return line.get('run'), line.get('point'), tuple((name, value) for name, value in line.get('options', ()))


# -- one run

def work_on(study, run):
    """Train a run as far as its missing scores need, scoring on the way. Returns whether anything was done.

    Raises:
        OutOfTime: the same call will go on from here.
    """
    if not study.missing(run) or not parent_ready(study, run):
        return False
    make_dirs(study.folder(run.name))
    with claimed(study.folder(run.name) / 'lock') as lock:
        if lock is None or not study.missing(run):
            return False
        for kimg in sorted({score.kimg for score in study.missing(run)}):
            train(study, run, kimg, lock)
            for score in study.missing(run):
                if score.kimg == kimg:
                    measure(study, run, score)
    return True


def parent_ready(study, run):
    """Whether the network that a run starts from is there."""
    return run.parent is None or study.snapshot(run.parent, study.scale.main[-1]) is not None


def train_command(study, run, kimg):
    """The words of the train.py that brings the run to so many images."""
    parent = run.parent and study.snapshot(run.parent, study.scale.main[-1])
    return [*study.launcher, str(ROOT / 'train.py'), f'--outdir={study.folder(run.name)}', '--nosubdir',
            *([f'--data={study.scale.data}'] if study.scale.data else []), *study.scale.train, *run.flags,
            f'--seed={run.seed}', f'--duration={kimg / 1000:g}', f'--tick={run.kimg_between / TICKS:g}', '--snap=0',
            f'--dump={TICKS}', '--keep=1', '--auto-resume', *([f'--transfer={parent}'] if parent else [])]


def train(study, run, kimg, lock):
    """Bring the run to so many images, unless its network after them is there.

    Where it stops, it goes on bit for bit (on a CPU, without --compact-state), so that stops change no score. The
    training has the run's `lock` too: if this process is killed, no other worker trains beside it.
    """
    if keep_network(study, run, kimg):
        return
    study.clock.need(study.scale.start_sec + 2 * SAVE_SEC)
    command = train_command(study, run, kimg)
    print(f'\n$ {shlex.join(command)}', flush=True)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, pass_fds=[lock.fileno()])
    code = wait_for(process, study.clock.left() - SAVE_SEC)
    keep_network(study, run, kimg)
    if code != 0:
        raise UserError(f'the training {run.name} failed with exit code {code}; see the message above and '
                        f"{study.folder(run.name) / LOG_NAME}")


def wait_for(process, seconds):
    """Exit code of a training, which is asked to stop after `seconds`, or when this process is.

    Raises:
        OutOfTime: it was asked; what it had done is in its last state.
    """
    end = time.monotonic() + seconds
    try:
        while process.poll() is None:
            if time.monotonic() > end:
                raise OutOfTime
            time.sleep(POLL_SEC)
        return process.returncode
    finally:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SEC)
            process.kill()


def measure(study, run, score):
    """Draw and score the images of one network in one way, and record it."""
    scale, path = study.scale, study.snapshot(run.name, score.kimg)
    if path is None:
        raise UserError(f'{study.folder(run.name)} has no network near {score.kimg:g} thousand images; delete that '
                        'folder to train it again')
    drawn = open_network(path, {**dict(scale.draw), **dict(score.options)})
    study.clock.need(1.2 * study.speed * scale.num * drawn.facts['nfe'])
    source = NetworkImages(drawn.net, drawn.sampler, range(scale.num), facts=drawn.facts)
    values, facts = study.scorer(source, scale.batch, progress=False)
    study.speed = facts['seconds'] / scale.num / drawn.facts['nfe']
    log(study, study.scorer, values, facts, run=run.name, seed=run.seed, point=score.kimg, options=score.options,
        flags=run.flags, parent=run.parent, **training_cost(study.folder(run.name), drawn), **source.record,
        hardware=hardware())
    shown = ', '.join(f'{label(name, study.scorer.detector)} {value:.4g}' for name, value in values.items())
    print(f'{run.name} at {score.kimg:g} kimg {dict(score.options) or ""}: {shown}', flush=True)


def hardware():
    """What the scores are drawn on, in words."""
    return f'{provenance.hardware(dist.device())}, {torch.get_num_threads()} thread(s)'


def recorded_speed(study):
    """`Study.speed` by the last score that was drawn on such hardware; 0 without one."""
    lines = [line for line in read_lines(study.results) if line.get('hardware') == hardware() and line.get('nfe')]
    return lines[-1]['seconds'] / lines[-1]['num_images'] / lines[-1]['nfe'] if lines else 0.0


def score_real_images(study, scorer):
    """Record what images of the training set score, as many as are drawn of a network, in several draws.

    A network can hardly do better, and their spread is what chance does in drawing the images alone.
    """
    done = {line['seed'] for line in read_lines(study.results)
            if line.get('run') == REAL and line.get('num_images') == study.scale.num}
    for seed in sorted(set(range(REAL_DRAWS)) - done):
        source = DrawnImages(study.images(), study.scale.num, seed)
        values, facts = scorer(source, study.scale.batch, progress=False)
        log(study, scorer, values, facts, run=REAL, point=0, options=(), seed=seed, **source.record)


def log(study, scorer, values, facts, **record):
    """Append scores to the results with what `record` says of them; of the reference, its file's name alone."""
    facts = {**facts, 'ref': pathlib.Path(facts['ref']).name}
    provenance.log_scores(study.results, values, scorer.detector, dict(study=study.scale.name, **record, **facts))


def training_cost(folder, drawn):
    """Parameters of the network, and the seconds of training up to it by the median tick.

    So neither starting and compiling count, which depend on where a piece ended, nor saving; None without a tick.
    """
    rates = [line['Timing/sec_per_kimg']['mean'] for line in read_lines(folder / STATS_NAME)
             if line.get('Progress/tick', {}).get('mean')]  # the first, 0, is one step
    return dict(parameters=sum(p.numel() for p in drawn.net.parameters()),
                train_seconds=round(drawn.snapshot.kimg * statistics.median(rates), 1) if rates else None)


# -- all runs

def tidy(study, runs):
    """Delete networks that are scored and start no run that is left, and of runs that are measured the states too.

    Runs that another worker is at stay as they are.
    """
    parents = {run.parent for run in plan(study.scale) if study.missing(run)}
    for run in runs:
        folder = study.folder(run.name)
        if folder.is_dir():
            with claimed(folder / 'lock') as lock:
                if lock is not None:
                    left = {score.kimg for score in study.missing(run)}
                    for kimg in left:  # time may have run out, or the worker died, just when the training was done
                        keep_network(study, run, kimg)
                    needed = left | {study.scale.main[-1]} if run.name in parents else left
                    delete_but(folder, {study.snapshot(run.name, kimg) for kimg in needed}, bool(left))


def delete_but(folder, networks, unfinished):
    """Delete all networks of a run but these, and its states too unless it is unfinished."""
    for path in (*saved_files(folder / KEPT, SNAPSHOT), *saved_files(folder, SNAPSHOT),
                 *([] if unfinished else saved_files(folder, STATE))):
        if path not in networks:
            path.unlink()


def overview(study, runs):
    """A line for each run: how many of its scores are there."""
    lines = []
    for run in runs:
        done = len(run.scores) - len(study.missing(run))
        waits = '' if parent_ready(study, run) or not study.missing(run) else f'   (waits for {run.parent})'
        lines.append(f'{done:3d} of {len(run.scores):3d} scores   {run.kimg:6g} kimg   {run.name}{waits}')
    return '\n'.join(lines)


@click.command(context_settings=dict(show_default=True, max_content_width=120))
@click.option('--scale', 'scale_name', type=click.Choice(list(SCALES)), required=True, help='How large everything is')
@click.option('--outdir', metavar='DIR', default='study', help='Where the runs are, in a folder of the scale')
@click.option('--results', metavar='DIR', default='results', help='Where the scores are recorded, in SCALE.jsonl')
@click.option('--detector', metavar='NAME|PATH', default=None,
              help="As for fid.py, such as inception; its scores go to SCALE--DETECTOR.jsonl  [default: the scale's]")
@click.option('--questions', metavar='LIST', default=','.join(QUESTIONS), help='Which questions; 1 answers 3 too')
@click.option('--only', metavar='TEXT', default='', help='Only runs whose name contains this', show_default=False)
@click.option('--prepare', 'prepares', is_flag=True,
              help="Make the scale's data and detector first where they are missing")
@click.option('--minutes', type=NumberRange(min=0), default=0, help='Stop after so long; 0: when all is done')
@click.option('--gpus', type=click.IntRange(min=1), default=1, help='GPUs of this machine to train on')
@click.option('--tidy', 'tidies', is_flag=True,
              help='Delete networks and states that are scored, with this detector, and that no run starts from')
@click.option('-n', '--dry-run', is_flag=True, help='Print what is done and exit')
def main(scale_name, outdir, results, detector, questions, only, prepares, minutes, gpus, tidies, dry_run):
    """Train and score what the results page needs; the same command goes on where it stopped."""
    scale, file = SCALES[scale_name], scale_name
    if detector not in (None, scale.detector):
        scale, file = dataclasses.replace(scale, detector=detector), f'{file}--{pathlib.Path(detector).stem}'
    study = Study(scale, pathlib.Path(outdir) / scale.name, pathlib.Path(results) / f'{file}.jsonl', Clock(minutes),
                  launcher(gpus))
    runs = [run for run in plan(scale, parse_questions(questions)) if only in run.name]
    if not dry_run:
        if prepares:
            prepare(scale)
        check_prepared(scale)
        make_dirs(study.outdir)
        make_dirs(results)
        study.speed = recorded_speed(study)
        try:
            with sigterm_exits(EXIT_STOPPED), dist.process_group():
                while any([work_on(study, run) for run in runs]):  # again: what others held, parents that became ready
                    pass
        except OutOfTime:
            print('Time is up; the same command continues from here.')
        if tidies:
            tidy(study, runs)
    print(overview(study, runs))


def parse_questions(text):
    """'1,5' → ['1', '5'].

    Raises:
        UserError: there is no such question.
    """
    return [chosen('question', number, tuple(QUESTIONS)) for number in text.split(',')]


def launcher(gpus):
    """The words before train.py."""
    torchrun = ('-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={gpus}')
    return (sys.executable, *(torchrun if gpus > 1 else ()))


def prepare(scale):
    """Run those of the scale's commands whose --dest is missing.

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
    """Raise UserError unless the data and the detector of a scale are there."""
    for path in (scale.data, scale.detector if '/' in scale.detector else None):
        if path and not os.path.exists(path):
            commands = ', '.join(f'`{command}`' for command in scale.prepare)
            raise UserError(f'{path} is missing; make it with --prepare, or by hand: {commands}')
