"""What is asked of Warm Diffusion, as a list of trainings and of scores: the plan that `warm.study` carries out.

The same data, network, seeds, steps and images for both sides of every comparison; only the method changes. A `Scale`
says how large all of that is. To ask something else: a function that returns `Run`s, in QUESTIONS.
"""

import dataclasses
import math

from training.schedules import SOLVER
from training.system import flag_of
from warm.choices import BLUR_EMBEDDINGS, DEFAULTS, REST_SCALES
from warm.path import PAPER_BNR
from warm.report.tables import BNR_SCORES
from warm.samplers import SAMPLER_DEFAULTS
from warm.targets import PAPER_TARGETS, TARGETS

PAPER_BNRS = tuple(BNR_SCORES)  # Table 3
STEPS = (5, 10, 18, 40)  # Heun's steps n for NFE 2n − 1 = 9, 19, 35, 79 (Fig. 5)
EVALUATIONS = (9, 18, 35, 79)  # steps of the solvers that evaluate the network once a step
FIGURE_5_BNRS = ('0', '0.5', '1', '2')  # by one network for all
SCHEDULE_STEPS = (18, 40, 80)  # NFE 35, 79, 159 of Table 4
REAL = 'real-images'  # stands for a run's name where images of the training set are scored
REAL_DRAWS = 5
ONE_NETWORK = ','.join(map(str, PAPER_BNRS))


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large everything is.

    Attributes:
        name: For --scale, folders and files.
        title, note: For the page; the note says what its numbers can decide.
        prepare: Commands that make its data and detector, in order.
        data: Data set as for train.py; None: the embedded digits.
        detector: As for fid.py, by whose name the scores are labelled.
        metrics: As for fid.py.
        train: Flags of train.py that all runs share.
        draw: Options with which all networks are drawn from besides a score's own.
        start_sec: Seconds until a training's first step, compilation included: no piece starts one with less left.
        timed: Whether each training had its processor to itself, so that their seconds compare.
        main: Thousands of images seen at which the main comparison is scored.
        side: The same for all other questions; one of `main`.
        transfer: Thousands of images after which a transferred network is scored.
        main_seeds, side_seeds: Seeds of training.
        num: Images per score.
        batch: Images drawn at once.
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
    draw: tuple = ()
    start_sec: float = 0
    timed: bool = True


@dataclasses.dataclass(frozen=True)
class Score:
    """One score of a run.

    Attributes:
        kimg: Thousands of images seen.
        options: ((option of the sampler, value), …); () its defaults, which are NFE 35 with Heun's solver.
    """

    kimg: float
    options: tuple = ()


@dataclasses.dataclass(frozen=True)
class Run:
    """One training and what is measured of it.

    Attributes:
        name: Of its folder; ends in the seed.
        seed: Of training.
        flags: Of train.py, besides the scale's.
        scores: What is measured.
        parent: Name of the run from whose last network it starts, if any.
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
        """The largest interval, in thousands of images, that leads to every scored network."""
        return math.gcd(*(round(score.kimg * 1000) for score in self.scores)) / 1000


def bnr_name(bnr):
    """What the run at one BNR is called: 'edm' and 'warm' are question 1's, then there are 'warm-bnr2' and so on."""
    return {0: 'edm', PAPER_BNR: 'warm'}.get(bnr, f'warm-bnr{bnr:g}')


def targets_name(targets):
    """The same of a parametrisation, at the paper's BNR: 'warm-clean' and so on."""
    return f'warm-{targets}'


def run_name(what, cond=False, seed=0):
    """'warm-uncond-s0' and so on."""
    return f"{what}-{'cond' if cond else 'uncond'}-s{seed}"


METHODS = {'edm': ('--precond=edm',), 'warm': ('--precond=warm', f'--bnr={PAPER_BNR:g}')}
SOLVERS = {'heun': STEPS, 'euler': EVALUATIONS, 'dpmpp2m': EVALUATIONS}


def at(kimg, *options):
    """A `Score` for each of the options dicts; their order is that of their names."""
    return tuple(Score(kimg, tuple(sorted(o.items()))) for o in options)


def over_evaluations(kimg, solvers=SOLVERS, **fixed):
    """Fig. 5: the solvers at every number of evaluations; the default, 18 steps of Heun, is not among them."""
    return at(kimg, *(drawn(solver, steps, **fixed) for solver in solvers for steps in SOLVERS[solver]
                      if drawn(solver, steps)))


def drawn(solver, steps, **fixed):
    """Options of a solver; the defaults are left out, so that a score has one name."""
    return {**fixed, **({'solver': solver} if solver != SOLVER else {}),
            **({'num_steps': steps} if (solver, steps) != (SOLVER, SAMPLER_DEFAULTS['num_steps']) else {})}


def question_1(scale):
    """Warm at BNR 0.5 against EDM: score against images seen and time. Seed 0 also answers question 3."""
    for seed in scale.main_seeds:
        for cond in (False, True):
            for name, flags in METHODS.items():
                scores = tuple(Score(kimg) for kimg in scale.main)
                if seed == 0 and not cond:
                    scores += over_evaluations(scale.main[-1])
                    if name == 'warm':  # Table 4's other half: constant BNR over NFE
                        scores += at(scale.side, *(drawn('heun', n) for n in SCHEDULE_STEPS))
                scores = tuple(dict.fromkeys(scores))  # where `side` is the end of `main`, some are asked for twice
                yield Run(run_name(name, cond, seed), seed, (*flags, f'--cond={cond:d}'), scores)


def question_2(scale):
    """Table 3: a network for each BNR, and one network for all of them. Seed 0 of the latter answers question 3."""
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
    """A run of the length of the smaller questions, scored once."""
    return Run(run_name(what, seed=seed), seed, flags, (Score(scale.side),))


OTHER_TARGETS = tuple(name for name in TARGETS if name != PAPER_TARGETS)  # Table 5's (a), (b), (c); (d) is question 1's


def question_4(scale):
    """Table 5's parametrisations, and Table 4's schedule of Blurring Diffusion over NFE."""
    for seed in scale.side_seeds:
        for targets in OTHER_TARGETS:
            yield side(scale, targets_name(targets), seed, *METHODS['warm'], f'--targets={targets}')
        scores = at(scale.side, *(drawn('heun', n) for n in SCHEDULE_STEPS))
        yield Run(run_name('warm-blurring', seed=seed), seed, ('--precond=warm', '--bnr-schedule=blurring'), scores)


# What we chose where the paper is silent: {flag: (our choice, its alternatives)}.
CHOICES = {'--rest-weight': (f"{DEFAULTS['rest_weight']:g}", ('0.25', '4')),
           **{flag_of(name): (DEFAULTS[name], tuple(value for value in values if value != DEFAULTS[name]))
              for name, values in (('rest_scale', REST_SCALES), ('blur_embedding', BLUR_EMBEDDINGS))}}


def choice_name(flag, value):
    """'warm-rest-weight-4' and so on."""
    return f"warm-{flag.strip('-')}-{value}"


def question_5(scale):
    """Our own choices, each against its alternatives, alone."""
    for seed in scale.side_seeds:
        for flag, (_, alternatives) in CHOICES.items():
            for value in alternatives:
                yield side(scale, choice_name(flag, value), seed, *METHODS['warm'], f'{flag}={value}')


def question_6(scale):
    """Warm from the weights of EDM's longest run: when does it beat its parent, and EDM that goes on likewise?"""
    for seed in scale.side_seeds:
        for what, method in (('transfer', 'warm'), ('transfer-edm', 'edm')):
            yield Run(run_name(what, seed=seed), seed, METHODS[method], tuple(Score(k) for k in scale.transfer),
                      parent=run_name('edm', seed=seed))


QUESTIONS = {'1': question_1, '2': question_2, '4': question_4, '5': question_5, '6': question_6}


def plan(scale, questions=QUESTIONS):
    """All `Run`s of the questions at a scale, the most worthwhile first: all of one seed before the next."""
    runs = [run for number in questions for run in QUESTIONS[number](scale)]
    return sorted(runs, key=lambda run: run.seed)  # sorting keeps the questions' order inside a seed


CIFAR10_REF = ('--cbase=64', '--cres=1,1,1,1', '--batch=512', '--lr=1e-3', '--lr-rampup=0.25', '--ema=0.1',
               '--dropout=0', '--augment=0', '--xflip=1', '--grid=0')  # bench_curves.py's network too
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
        side_seeds=(0,), num=10_000, batch=2000, start_sec=120),
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
        batch=250),
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
