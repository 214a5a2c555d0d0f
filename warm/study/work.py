"""Work on the runs of a study: train up to each network to be scored, score it, record, keep what is still needed.

A run belongs to one worker at a time (`claimed`), and stops and continues at any point.
"""

import contextlib
import dataclasses
import functools
import pathlib
import shlex
import statistics
import subprocess
import sys
import time

import numpy as np
import torch

from dnnlib import UserError
from dnnlib.files import file_sha256, make_dirs
from dnnlib.json_files import append_line, read_lines
from torch_utils import distributed as dist
from training import provenance
from training.dataset import EMBEDDED, name_of
from training.metric_images import open_images
from training.metrics import label
from training.run_files import LOG_NAME, SNAPSHOT, STATE, STATS_NAME, parse_kimg, saved_files
from training.scoring import ImageFiles, NetworkImages, load_scorer, open_detector, write_reference
from warm.api import load
from warm.errors import BETAS, network_errors, record_of, sample_images
from warm.sources import open_network
from warm.study.data import errors_file
from warm.study.pieces import Clock, OutOfTime, claimed
from warm.study.plan import REAL, REAL_DRAWS, plan

ROOT = pathlib.Path(__file__).resolve().parents[2]
TICKS = 8  # per `Run.kimg_between`, the interval at which networks can be scored
SAVE_SEC = 20  # of a piece's time, reserved for a stopped training to save its state
STOP_SEC = 120  # a training that has not stopped after this is killed
POLL_SEC = 0.2
ERROR_IMAGES, NOISE_SEED = 1000, 0  # for warm.errors
KEPT = 'networks'  # subfolder of a run with the networks to score
NEAR = 0.03  # a snapshot may be this much later than the planned number of images, relative to it


@dataclasses.dataclass
class Study:
    """One worker's view of a scale.

    Attributes:
        scale: The Scale.
        outdir: Folder of its runs.
        results: File of its scores.
        clock: Time left.
        launcher: Words of the command line before train.py, such as torchrun's.
        speed: Seconds per image and evaluation of the last sampling and scoring; 0 while unknown.
    """

    scale: object
    outdir: pathlib.Path
    results: pathlib.Path
    clock: Clock
    launcher: tuple = (sys.executable,)
    speed: float = 0.0

    def folder(self, run_name):
        """Folder of a run."""
        return self.outdir / run_name

    def recorded(self):
        """The scores {(run, kimg, options)} in the results that have the scale's number of images."""
        return {key_of(line) for line in read_lines(self.results) if line.get('num_images') == self.scale.num}

    def missing(self, run):
        """The scores of a run that are not in the results yet."""
        done = self.recorded()
        return [score for score in run.scores if (run.name, score.kimg, score.options) not in done]

    def unmeasured(self, run):
        """Thousands of images after which the run has a network whose errors are not recorded (warm.errors)."""
        if not self.scale.unseen:
            return []
        done = {(line.get('run'), line.get('point'), line.get('network_sha256'))
                for line in read_lines(errors_file(self.results, self.scale))}
        found = {score.kimg: self.snapshot(run.name, score.kimg) for score in run.scores}
        return [kimg for kimg, path in found.items() if path and (run.name, kimg, file_sha256(path)) not in done]

    def snapshot(self, run_name, kimg):
        """Path of the run's network set aside for `kimg`, or None."""
        return first_after(self.folder(run_name) / KEPT, kimg)

    def images(self):
        """The training images, as a dataset."""
        return open_images(self.scale.data or EMBEDDED)

    @functools.cached_property
    def scorer(self):
        """The `Scorer`; first makes reference statistics and scores real images (`score_real_images`), if not done."""
        detector = open_detector(self.scale.detector)
        reference = self.outdir / f'reference{detector.suffix}.npz'
        with claimed(self.outdir / 'reference.lock', wait=True):
            if not reference.is_file():
                self.clock.need(self.scale.start_sec)  # takes about as long as starting a training
                write_reference(reference, ImageFiles(self.images()), detector, self.scale.metrics, self.scale.batch,
                                progress=False)
            scorer = load_scorer(list(self.scale.metrics), detector, reference)
            score_real_images(self, scorer)
        return scorer


class DrawnImages(ImageFiles):
    """`num` images of a dataset drawn with replacement, as a perfect model of it would draw them."""

    def __init__(self, dataset, num, seed):
        super().__init__(dataset, dataset.name)
        self.total, self.drawn = num, np.random.RandomState(seed).randint(len(dataset), size=num)

    def batches(self, indices, batch):
        """Yield the draws with these indices (below `num`) in batches, uint8 [≤ batch, C, H, W]."""
        return super().batches(self.drawn[list(indices)], batch)


def first_after(folder, kimg):
    """The folder's first network at or just after `kimg` (within NEAR, at least 1 kimg), or None."""
    late = [path for path in saved_files(folder, SNAPSHOT)
            if 0 <= parse_kimg(path) - int(kimg) <= max(NEAR * kimg, 1)]
    return min(late, key=parse_kimg, default=None)


def keep_network(study, run, kimg):
    """Move the run's network after `kimg` to its KEPT folder, if there is one; returns whether it is there now."""
    path = first_after(study.folder(run.name), kimg)
    if path is not None and study.snapshot(run.name, kimg) is None:
        make_dirs(study.folder(run.name) / KEPT)
        path.replace(study.folder(run.name) / KEPT / path.name)
    return study.snapshot(run.name, kimg) is not None


def key_of(line):
    """(run, kimg, options) that a line of the results is a score of, in the plan's form."""
    return line.get('run'), line.get('point'), tuple((name, value) for name, value in line.get('options', ()))


# -- one run

def work_on(study, run):
    """Train a run as far as its missing scores need, scoring on the way; returns False if there was nothing to do.

    Of networks that are there, the errors are measured too; no run is trained again for them.

    Raises:
        OutOfTime: time is up; the same call continues from here.
    """
    if not (study.missing(run) and parent_ready(study, run) or study.unmeasured(run)):
        return False
    make_dirs(study.folder(run.name))
    with claimed(study.folder(run.name) / 'lock') as lock:
        if lock is None or not (study.missing(run) or study.unmeasured(run)):
            return False
        measure_errors(study, run)
        for kimg in sorted({score.kimg for score in study.missing(run)}) if parent_ready(study, run) else ():
            train(study, run, kimg, lock)
            measure_errors(study, run)  # before the scores, after which `tidy` may delete the network
            for score in study.missing(run):
                if score.kimg == kimg:
                    measure(study, run, score)
    return True


def parent_ready(study, run):
    """Whether the network that a run starts from exists, if it needs one."""
    return run.parent is None or study.snapshot(run.parent, study.scale.main[-1]) is not None


def train_command(study, run, kimg):
    """The train.py command line that trains the run up to `kimg`."""
    parent = run.parent and study.snapshot(run.parent, study.scale.main[-1])
    return [*study.launcher, str(ROOT / 'train.py'), f'--outdir={study.folder(run.name)}', '--nosubdir',
            *([f'--data={study.scale.data}'] if study.scale.data else []), *study.scale.train, *run.flags,
            f'--seed={run.seed}', f'--duration={kimg / 1000:g}', f'--tick={run.kimg_between / TICKS:g}', '--snap=0',
            f'--dump={TICKS}', '--keep=1', '--auto-resume', *([f'--transfer={parent}'] if parent else [])]


def train(study, run, kimg, lock):
    """Train the run up to `kimg`, unless its network there exists already.

    A stopped run resumes bit for bit (on a CPU, without --compact-state), so interruptions do not change its scores.
    The training process inherits the run's `lock`: if this process is killed, no other worker trains the run meanwhile.

    Raises:
        OutOfTime: too little time is left to start, or time ran out.
        UserError: the training failed.
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
    """Wait for a training and return its exit code; it is told to stop after `seconds`, or when this process is.

    Raises:
        OutOfTime: the seconds are over; the training was stopped, and its last state has what it had done.
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
    """Generate and score the images of one network with one set of sampler options, and record the result."""
    scale, path = study.scale, study.snapshot(run.name, score.kimg)
    if path is None:
        raise UserError(f'{study.folder(run.name)} has no network near {score.kimg:g} thousand images; delete that '
                        'folder to train it again')
    opened = open_network(path, {**dict(scale.draw), **dict(score.options)})
    study.clock.need(1.2 * study.speed * scale.num * opened.facts['nfe'])
    source = NetworkImages(opened.net, opened.sampler, range(scale.num), facts=opened.facts)
    values, facts = study.scorer(source, scale.batch, progress=False)
    study.speed = facts['seconds'] / scale.num / opened.facts['nfe']
    log(study, study.scorer, values, facts, run=run.name, seed=run.seed, point=score.kimg, options=score.options,
        flags=run.flags, parent=run.parent,
        train_seconds=training_seconds(study.folder(run.name), opened.snapshot.kimg), **source.record,
        hardware=hardware())
    shown = ', '.join(f'{label(name, study.scorer.detector)} {value:.4g}' for name, value in values.items())
    print(f'{run.name} at {score.kimg:g} kimg {dict(score.options) or ""}: {shown}', flush=True)


def measure_errors(study, run):
    """Record the errors of those networks of the run whose errors are not recorded yet (warm.errors)."""
    scale = study.scale
    for kimg in study.unmeasured(run):
        study.clock.need(1.2 * study.speed * ERROR_IMAGES * len(BETAS))
        net = load(study.snapshot(run.name, kimg))
        images, labels = sample_images(scale.unseen, ERROR_IMAGES, NOISE_SEED, net)
        levels = network_errors(net, images, labels, seed=NOISE_SEED)
        append_line(errors_file(study.results, scale), dict(
            study=scale.name, run=run.name, seed=run.seed, point=kimg, flags=run.flags,
            **record_of(net, levels, data=name_of(scale.unseen), num_images=len(images), noise_seed=NOISE_SEED)),
            remedy='make room and repeat the command')


def hardware():
    """The hardware that images are generated and scored on, in words."""
    return f'{provenance.hardware(dist.device())}, {torch.get_num_threads()} thread(s)'


def recorded_speed(study):
    """`Study.speed` according to the last recorded score on this hardware; 0 without one."""
    lines = [line for line in read_lines(study.results) if line.get('hardware') == hardware() and line.get('nfe')]
    return lines[-1]['seconds'] / lines[-1]['num_images'] / lines[-1]['nfe'] if lines else 0.0


def score_real_images(study, scorer):
    """Score images drawn from the training set, as many as from a network, and record the result of each draw.

    A network can hardly do better, and the spread over the draws is the effect of chance in drawing images alone.
    """
    done = {line['seed'] for line in read_lines(study.results)
            if line.get('run') == REAL and line.get('num_images') == study.scale.num}
    for seed in sorted(set(range(REAL_DRAWS)) - done):
        source = DrawnImages(study.images(), study.scale.num, seed)
        values, facts = scorer(source, study.scale.batch, progress=False)
        log(study, scorer, values, facts, run=REAL, point=0, options=(), seed=seed, **source.record)


def log(study, scorer, values, facts, **record):
    """Append scores to the results together with `record`; the reference is recorded by its file name only."""
    facts = {**facts, 'ref': pathlib.Path(facts['ref']).name}
    provenance.log_scores(study.results, values, scorer.detector, dict(study=study.scale.name, **record, **facts))


def training_seconds(folder, kimg):
    """The time it took to train a run up to `kimg`, from the median speed of its ticks; None before the second tick.

    The median leaves out start-up and compilation, which depend on how the run was split, and saving.
    """
    rates = [line['Timing/sec_per_kimg']['mean'] for line in read_lines(folder / STATS_NAME)
             if line.get('Progress/tick', {}).get('mean')]  # tick 0 is a single step
    return round(kimg * statistics.median(rates), 1) if rates else None


# -- what is kept

def tidy(study, runs):
    """Delete scored networks that no remaining run starts from, and the states of fully scored runs.

    Runs that another worker is busy with are left alone.
    """
    parents = {run.parent for run in plan(study.scale) if study.missing(run)}
    for run in (run for run in runs if study.folder(run.name).is_dir()):
        with claimed(study.folder(run.name) / 'lock') as lock:
            if lock is not None:
                tidy_run(study, run, starts_others=run.name in parents)


def tidy_run(study, run, starts_others):
    """`tidy` for one run, whose lock is held; `starts_others` keeps its last network."""
    left = {score.kimg for score in study.missing(run)}
    for kimg in left:  # time may have run out, or the worker died, just after the training ended
        keep_network(study, run, kimg)
    needed = left | {study.scale.main[-1]} if starts_others else left
    delete_but(study.folder(run.name), {study.snapshot(run.name, kimg) for kimg in needed}, bool(left))


def delete_but(folder, networks, unfinished):
    """Delete all networks of a run except `networks`, and its states too unless it is unfinished."""
    for path in (*saved_files(folder / KEPT, SNAPSHOT), *saved_files(folder, SNAPSHOT),
                 *([] if unfinished else saved_files(folder, STATE))):
        if path not in networks:
            path.unlink()
