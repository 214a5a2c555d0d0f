"""What the results page knows: the lines of results/SCALE.jsonl, looked up and compared over seeds."""

import dataclasses
import math
import statistics

import scipy.special

from dnnlib.json_files import read_lines
from training.metrics import STD, kind_of
from warm.report.data import DISTANCES
from warm.study.plan import REAL, drawn, run_name

LEVEL = 0.05  # of the test that decides a difference


@dataclasses.dataclass
class Scores:
    """All scores of a scale.

    Attributes:
        scale: The Scale.
        lines: The results, of one detector and number of images.
        real: Distances of as many images of the training set itself, of several draws.
    """

    scale: object
    lines: list
    real: tuple = ()

    @classmethod
    def read(cls, scale, path):
        """The file's scores that have the scale's number of images; one that occurs twice counts once, the last.

        Spreads over an Inception Score's parts are left out.
        """
        lines = {}
        for line in read_lines(path):
            counts = line.get('num_images') == scale.num and isinstance(line.get('value'), (int, float))
            if counts and not line['metric'].endswith(STD):
                kind = kind_of(line['metric'])
                lines[line['run'], line['seed'], line['point'], str(line['options']), kind] = line
        real = tuple(line['value'] for line in lines.values()
                     if line['run'] == REAL and kind_of(line['metric']) in DISTANCES)
        return cls(scale, [line for line in lines.values() if line['run'] != REAL], real)

    def label(self, kinds=DISTANCES):
        """'FD-cifar' or the like: how the scores of these kinds are called; None without any."""
        return next((line['metric'] for line in self.lines if kind_of(line['metric']) in kinds), None)

    def lookup(self, what, kimg, seed=0, cond=False, kinds=DISTANCES, **options):
        """The line of a run's score, drawn in some way, or None."""
        wanted = [list(pair) for pair in sorted(options.items())]
        return next((line for line in self.lines if line['run'] == run_name(what, cond, seed) and line['point'] == kimg
                     and line['options'] == wanted and kind_of(line['metric']) in kinds), None)

    def values(self, what, kimg, cond=False, kinds=DISTANCES, **options):
        """{seed: score} over the seeds of training."""
        found = {seed: self.lookup(what, kimg, seed, cond, kinds, **options) for seed in self.scale.main_seeds}
        return {seed: line['value'] for seed, line in found.items() if line}

    def longest(self, options):
        """The largest number of images in `main` at which seed 0 was drawn with these options; else its last."""
        found = [line['point'] for line in self.lines if line['seed'] == 0 and line['point'] in self.scale.main
                 and line['options'] == [list(pair) for pair in sorted(options.items())]]
        return max(found, default=self.scale.main[-1])

    def solved(self, what, kimg, solver, steps, **fixed):
        """`values` with a solver and its number of steps."""
        return self.values(what, kimg, **drawn(solver, steps, **fixed))

    def seconds(self, what, kimg, cond=False):
        """Mean seconds of training up to a number of images, over the seeds; None without, or if they don't compare."""
        if not self.scale.timed:
            return None
        found = [self.lookup(what, kimg, seed, cond) for seed in self.scale.main_seeds]
        known = [line['train_seconds'] for line in found if line and line.get('train_seconds')]
        return statistics.mean(known) if known else None


@dataclasses.dataclass(frozen=True)
class Difference:
    """A method minus its reference, pairwise over the seeds that both have.

    Attributes:
        pairs: The differences; negative is better.
        reference: Mean of the reference.
    """

    pairs: tuple
    reference: float

    @property
    def mean(self):
        """Mean difference."""
        return statistics.mean(self.pairs)

    @property
    def spread(self):
        """Standard deviation over the seeds, None of one seed."""
        return statistics.stdev(self.pairs) if len(self.pairs) > 1 else None

    @property
    def verdict(self):
        """'better', 'worse' or 'undecided', by Student's paired t-test at LEVEL, two-sided."""
        n = len(self.pairs)
        if n == 1:
            return 'undecided (one seed)'
        if abs(self.mean) <= scipy.special.stdtrit(n - 1, 1 - LEVEL / 2) * self.spread / math.sqrt(n):
            return 'undecided'
        return 'better' if self.mean < 0 else 'worse'

    def __str__(self):
        spread = '' if self.spread is None else f' ± {self.spread:.2g}'
        return f'{self.mean:+.3g}{spread} ({self.mean / self.reference:+.0%})'


def compare(values, reference):
    """The `Difference` of two {seed: distance}, None without a common seed."""
    seeds = sorted(set(values) & set(reference))
    if not seeds:
        return None
    return Difference(tuple(values[s] - reference[s] for s in seeds), statistics.mean(reference[s] for s in seeds))


def shown(values):
    """'0.65 ± 0.02 (3)' of {seed: distance}: mean, standard deviation, number of seeds; '–' of none."""
    if not values:
        return '–'
    return mean_and_spread(values.values()) + (f' ({len(values)})' if len(values) > 1 else '')


def mean_and_spread(numbers):
    """'0.65 ± 0.02'; '0.65' of one."""
    numbers = list(numbers)
    spread = f' ± {statistics.stdev(numbers):.2g}' if len(numbers) > 1 else ''
    return f'{statistics.mean(numbers):.3g}{spread}'
