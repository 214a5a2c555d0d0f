"""The questions put to Warm Diffusion, as a list of training runs and scores: the plan that `warm.study` carries out.

Both sides of every comparison have the same data, network, seeds, steps and images; only the method changes. A `Scale`
sets how large all of these are. To ask something else, add a function that yields `Run`s to QUESTIONS.
"""

import dataclasses
import math

from training.schedules import SOLVER
from training.system import flag_of
from warm.blur import BLUR_RATES
from warm.choices import BLUR_EMBEDDINGS, DEFAULTS, REST_LOSSES, REST_SCALES
from warm.path import PAPER_BNR
from warm.report.tables import BNR_SCORES
from warm.samplers import SAMPLER_DEFAULTS
from warm.targets import PAPER_TARGETS, TARGETS

PAPER_BNRS = tuple(BNR_SCORES)  # Table 3
STEPS = (5, 10, 18, 40)  # Heun's steps n for NFE 2n − 1 = 9, 19, 35, 79 (Fig. 5)
EVALUATIONS = (9, 18, 35, 79)  # steps of the solvers with one network evaluation per step
FIGURE_5_BNRS = ('0', '0.5', '1', '2')  # sampled from one network trained on all BNRs
SCHEDULE_STEPS = (18, 40, 80)  # Heun's steps for NFE 35, 79, 159 of Table 4
REAL = 'real-images'  # stands for a run's name where images of the training set are scored
REAL_DRAWS = 5
ONE_NETWORK = ','.join(map(str, PAPER_BNRS))


@dataclasses.dataclass(frozen=True)
class Scale:
    """The size of a study: data, network, length of training, seeds, number of images.

    Attributes:
        name: Its name for --scale, folders and files.
        title, note: For the page; the note says what its numbers can decide.
        prepare: Commands that make its data and detector, in order.
        data: Data set as for train.py; None = the embedded digits.
        detector: As for fid.py; its name is part of the scores' labels.
        metrics: As for fid.py.
        train: Flags of train.py that all runs share.
        draw: Sampler options for all scores, besides a score's own.
        start_sec: Seconds until a run's first training step, compilation included; with less left, none is started.
        timed: Whether each run had its processor to itself, so that training times are comparable.
        unseen: Images that no run is trained on, for warm.errors; None measures no errors.
        main: Thousands of images seen at which the main comparison is scored.
        side: The same for all other questions; one of `main`.
        transfer: Thousands of images after which a transferred network is scored.
        main_seeds, side_seeds: Training seeds of the main comparison, and of all other questions.
        longer: Names of runs of other questions that are scored at all of `main`, as their lead at `side` may not last.
        num: Images per score.
        batch: Batch size for sampling.
    """

    name: str
    title: str
    note: str
    prepare: tuple
    data: str | None
    detector: str
    metrics: tuple
    train: tuple
    main: tuple
    side: float
    transfer: tuple
    main_seeds: tuple
    side_seeds: tuple
    num: int
    batch: int
    longer: tuple = ()
    draw: tuple = ()
    start_sec: float = 0
    timed: bool = True
    unseen: str | None = None


@dataclasses.dataclass(frozen=True)
class Score:
    """One score of a run.

    Attributes:
        kimg: Thousands of images seen.
        options: ((sampler option, value), …); () = the defaults, NFE 35 with Heun's solver.
    """

    kimg: float
    options: tuple = ()


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run and the scores to measure on it.

    Attributes:
        name: Name of its folder; ends in the seed.
        seed: Training seed.
        flags: Flags of train.py, besides the scale's.
        scores: The `Score`s to measure.
        parent: Name of the run whose last network it starts from, if any.
    """

    name: str
    seed: int
    flags: tuple
    scores: tuple
    parent: str | None = None

    @property
    def kimg(self):
        """Length of training, in thousands of images."""
        return max(score.kimg for score in self.scores)

    @property
    def kimg_between(self):
        """The largest interval that divides every scored length of training, in thousands of images."""
        return math.gcd(*(round(score.kimg * 1000) for score in self.scores)) / 1000


def bnr_name(bnr):
    """Name of the run at one BNR: 'edm' and 'warm', which are question 1's, or 'warm-bnr2' and so on."""
    return {0: 'edm', PAPER_BNR: 'warm'}.get(bnr, f'warm-bnr{bnr:g}')


def targets_name(targets):
    """Name of the run with a parametrisation at the paper's BNR, such as 'warm-clean'."""
    return f'warm-{targets}'


def run_name(what, cond=False, seed=0):
    """Full name of a run, such as 'warm-uncond-s0'."""
    return f"{what}-{'cond' if cond else 'uncond'}-s{seed}"


def choice_name(*flags):
    """Name of the run with alternative choices at the paper's BNR, such as 'warm-rest-weight-4'."""
    return '-'.join(['warm', *(flag.strip('-').replace('=', '-') for flag in flags)])


# What question 1 compares: EDM, Warm, and Warm with the alternative that was ahead of both in all three seeds after 64
# kimg of CIFAR-10 at 16×16, followed to the end.
PLAIN, UNIT_LOSS = ('--precond=warm', f'--bnr={PAPER_BNR:g}'), '--rest-loss=unit'
METHODS = {'edm': ('--precond=edm',), 'warm': PLAIN, choice_name(UNIT_LOSS): (*PLAIN, UNIT_LOSS)}
SOLVERS = {'heun': STEPS, 'euler': EVALUATIONS, 'dpmpp2m': EVALUATIONS}


def at(kimg, *options):
    """A `Score` at `kimg` for each dict of sampler options, which it sorts by name."""
    return tuple(Score(kimg, tuple(sorted(o.items()))) for o in options)


def over_evaluations(kimg, **fixed):
    """Scores for Fig. 5: each solver at each NFE, except the default (Heun, 18 steps), which is planned elsewhere."""
    return at(kimg, *(drawn(solver, steps, **fixed) for solver, counts in SOLVERS.items() for steps in counts
                      if drawn(solver, steps)))


def drawn(solver, steps, **fixed):
    """Sampler options for a solver and its steps; defaults are left out, so that each score has one name."""
    return {**fixed, **({'solver': solver} if solver != SOLVER else {}),
            **({'num_steps': steps} if (solver, steps) != (SOLVER, SAMPLER_DEFAULTS['num_steps']) else {})}


def question_1(scale):
    """Warm at BNR 0.5, with either --rest-loss, against EDM: score over images seen. Seed 0 also answers question 3."""
    order = [(name, cond) for names in (('edm', 'warm'), (choice_name(UNIT_LOSS),)) for cond in (False, True)
             for name in names]  # the most worthwhile first
    for seed in scale.main_seeds:
        for name, cond in order:
            scores = tuple(Score(kimg) for kimg in scale.main)
            if seed == 0 and not cond:
                scores += over_evaluations(scale.main[-1])
                if name == 'warm':  # the other half of Table 4: constant BNR over NFE
                    scores += at(scale.side, *(drawn('heun', n) for n in SCHEDULE_STEPS))
            scores = tuple(dict.fromkeys(scores))  # some occur twice, as `side` is one of `main`
            yield Run(run_name(name, cond, seed), seed, (*METHODS[name], f'--cond={cond:d}'), scores)


def question_2(scale):
    """Table 3: a network for each BNR, and one network for all. Seed 0 of the latter also answers question 3."""
    for seed in scale.side_seeds:
        for bnr in PAPER_BNRS:
            if bnr_name(bnr) not in METHODS:  # question 1 has these
                yield side(scale, bnr_name(bnr), seed, '--precond=warm', f'--bnr={bnr:g}')
        scores = at(scale.side, *({'bnr': f'{bnr:g}'} for bnr in PAPER_BNRS))
        if seed == 0:
            for bnr in FIGURE_5_BNRS:
                scores += over_evaluations(scale.side, bnr=bnr)
        yield Run(run_name('warm-all', seed=seed), seed, ('--precond=warm', f'--bnr={ONE_NETWORK}'), scores)


def side(scale, what, seed, *flags):
    """A run of the smaller questions' length, scored once, at its end; or of the main one's (`Scale.longer`)."""
    kimgs = scale.main if what in scale.longer else (scale.side,)
    return Run(run_name(what, seed=seed), seed, flags, tuple(Score(kimg) for kimg in kimgs))


OTHER_TARGETS = tuple(name for name in TARGETS if name != PAPER_TARGETS)  # Table 5's (a), (b), (c); (d) is question 1's


def question_4(scale):
    """Table 5's parametrisations, and Table 4's schedule of Blurring Diffusion over NFE."""
    for seed in scale.side_seeds:
        for targets in OTHER_TARGETS:
            yield side(scale, targets_name(targets), seed, *PLAIN, f'--targets={targets}')
        scores = at(scale.side, *(drawn('heun', n) for n in SCHEDULE_STEPS))
        yield Run(run_name('warm-blurring', seed=seed), seed, ('--precond=warm', '--bnr-schedule=blurring'), scores)


# Choices with alternatives: {flag: (our choice, its alternatives)}.
CHOICES = {'--rest-weight': (f"{DEFAULTS['rest_weight']:g}", ('0.25', '4')),
           **{flag_of(name): (DEFAULTS[name], tuple(value for value in values if value != DEFAULTS[name]))
              for name, values in (('rest_scale', REST_SCALES), ('rest_loss', REST_LOSSES),
                                   ('blur_embedding', BLUR_EMBEDDINGS), ('blur', BLUR_RATES))}}


# Alternatives: (flags, what they are instead of). Each by itself, and two that mend the same weakness (warm.choices).
ALTERNATIVES = (*(((f'{flag}={value}',), chosen) for flag, (chosen, values) in CHOICES.items() for value in values),
                (('--rest-scale=wiener', UNIT_LOSS), f"{DEFAULTS['rest_scale']}, {DEFAULTS['rest_loss']}"))


def question_5(scale):
    """Our own choices, and the kind of blur, against their alternatives."""
    for seed in scale.side_seeds:
        for flags, _ in ALTERNATIVES:
            if choice_name(*flags) not in METHODS:  # question 1 has these
                yield side(scale, choice_name(*flags), seed, *PLAIN, *flags)


def question_6(scale):
    """Warm started from EDM's final weights: when does it beat its parent, and EDM continued in the same way?"""
    for seed in scale.side_seeds:
        for what, method in (('transfer', 'warm'), ('transfer-edm', 'edm')):
            yield Run(run_name(what, seed=seed), seed, METHODS[method], tuple(Score(k) for k in scale.transfer),
                      parent=run_name('edm', seed=seed))


QUESTIONS = {'1': question_1, '2': question_2, '4': question_4, '5': question_5, '6': question_6}


def plan(scale, questions=QUESTIONS):
    """All `Run`s of the questions at a scale, most worthwhile first: all of one seed before the next seed."""
    runs = [run for number in questions for run in QUESTIONS[number](scale)]
    return sorted(runs, key=lambda run: run.seed)  # a stable sort keeps the order of the questions within a seed


CIFAR10_REF = ('--cbase=64', '--cres=1,1,1,1', '--batch=512', '--lr=1e-3', '--lr-rampup=0.25', '--ema=0.1',
               '--dropout=0', '--augment=0', '--xflip=1', '--grid=0')  # bench_curves.py uses these too
SCALES = {scale.name: scale for scale in (
    Scale(
        name='cifar10', title='CIFAR-10, 32×32, on a GPU',
        note='A network of 5.1 M parameters and 8 Mimg stand for the paper’s 55.7 M and 200 Mimg.',
        prepare=('python dataset_tool.py --source=cifar10 --dest=datasets/cifar10-32x32.zip',
                 'python dataset_tool.py --source=cifar10-test --dest=datasets/cifar10-test-32x32.zip',
                 'python -m training.classifier --data=datasets/cifar10-32x32.zip '
                 '--test=datasets/cifar10-test-32x32.zip --dest=detectors/cifar.ts'),
        data='datasets/cifar10-32x32.zip', detector='detectors/cifar.ts', metrics=('fid', 'is'),
        train=(*CIFAR10_REF, '--precision=bf16', '--compile', '--channels-last=1', '--data-device=cuda',
               '--compact-state'),
        draw=(('precision', 'bf16'),),
        main=(1024, 2048, 4096, 8192), side=2048, transfer=(128, 256, 512, 1024, 2048), main_seeds=(0, 1),
        side_seeds=(0,), num=10_000, batch=2000, start_sec=120, unseen='datasets/cifar10-test-32x32.zip'),
    Scale(
        name='cifar10-16', title='CIFAR-10 at 16×16, on a CPU',
        note='A network of 1.5 M parameters that has seen every photograph five times at most: far from its '
             'best, so this says how the methods begin, not how they end.',
        prepare=('python dataset_tool.py --source=datasets/cifar10-32x32.zip --resolution=16x16 '
                 '--dest=datasets/cifar10-16x16.zip',
                 'python dataset_tool.py --source=datasets/cifar10-test-32x32.zip --resolution=16x16 '
                 '--dest=datasets/cifar10-test-16x16.zip',
                 'python -m training.classifier --data=datasets/cifar10-16x16.zip '
                 '--test=datasets/cifar10-test-16x16.zip --dest=detectors/cifar16.ts --width=24 --epochs=10 '
                 '--batch=128 --cutout=0'),
        data='datasets/cifar10-16x16.zip', detector='detectors/cifar16.ts', metrics=('fid', 'is'),
        train=('--cbase=32', '--cres=1,2', '--batch=64', '--lr=1e-3', '--lr-rampup=0.01', '--ema=0.01',
               '--dropout=0', '--augment=0', '--xflip=1', '--grid=0'),
        main=(32, 64, 128, 256), side=64, transfer=(8, 16, 32), main_seeds=(0, 1, 2), side_seeds=(0, 1, 2), num=1000,
        batch=250, unseen='datasets/cifar10-test-16x16.zip', longer=(bnr_name(0.1), targets_name('clean-blurred'))),
    Scale(
        name='digits', title='The embedded digits, 8×8, on a CPU',
        note='Images so small and simple that they say whether the scripts work and which effects are large; what '
             'they say about photographs is unknown.',
        prepare=(), data=None, detector='pixels', metrics=('fid',),
        train=('--cbase=32', '--cres=1,2', '--batch=64', '--lr=2e-3', '--lr-rampup=0.005', '--ema=0.005',
               '--dropout=0', '--augment=0', '--workers=0', '--grid=0'),
        main=(20, 40, 80), side=40, transfer=(5, 10, 20, 40), main_seeds=(0, 1, 2), side_seeds=(0, 1, 2),
        num=1000, batch=250, timed=False),
)}
