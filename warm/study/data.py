"""The data behind the results page: the lines of results/SCALE.jsonl, looked up and compared across seeds."""

import dataclasses
import itertools
import math
import statistics

import scipy.special

from dnnlib.json_files import read_lines
from training.metrics import STD, kind_of
from warm.errors import relative
from warm.report.data import DISTANCES
from warm.study.plan import REAL, drawn, run_name

LEVEL = 0.05  # significance level of the test for a difference
POWER = 0.8  # probability to decide a true difference, where a number of seeds is recommended


def errors_file(results, scale):
    """Where the errors of a scale's networks are recorded, beside `results`, the path of its scores."""
    return results.with_name(f'errors-{scale.name}.jsonl')


def crossed_file(results, scale):
    """Where scores of images drawn with parts of two networks are recorded (warm.crossed), as `errors_file`."""
    return results.with_name(f'crossed-{scale.name}.jsonl')


@dataclasses.dataclass
class Scores:
    """All scores of a scale.

    Attributes:
        scale: The Scale.
        lines: The results, all from one detector and number of images.
        real: Distances of as many images drawn from the training set itself, one per draw.
        errors: {(run, thousands of images seen): levels}, the networks' errors (warm.errors).
        crossed: Distances of images drawn with parts of two networks (warm.crossed), as recorded, with this detector.
    """

    scale: object
    lines: list
    real: tuple = ()
    errors: dict = dataclasses.field(default_factory=dict)
    crossed: tuple = ()

    @classmethod
    def read(cls, scale, path):
        """Read the scores with the scale's number of images from a file; of a score that occurs twice, the last.

        Standard deviations over the splits of an Inception Score are left out.
        """
        lines = {}
        for line in read_lines(path):
            counts = line.get('num_images') == scale.num and isinstance(line.get('value'), (int, float))
            if counts and not line['metric'].endswith(STD):
                kind = kind_of(line['metric'])
                lines[line['run'], line['seed'], line['point'], str(line['options']), kind] = line
        real = tuple(line['value'] for line in lines.values()
                     if line['run'] == REAL and kind_of(line['metric']) in DISTANCES)
        errors = {(line['run'], line['point']): line['levels'] for line in read_lines(errors_file(path, scale))
                  if {'run', 'point', 'levels'} <= line.keys()}
        known = {line['metric'] for line in lines.values() if kind_of(line['metric']) in DISTANCES}
        crossed = {}
        for line in read_lines(crossed_file(path, scale)):
            if (line.get('metric') in known and line.get('num_images') == scale.num and {'other', 'take'} <= line.keys()
                    and isinstance(line.get('value'), (int, float))):
                crossed[line['network_sha256'], line['other']['network_sha256'], line['take'], line['low'],
                        line['high']] = line
        return cls(scale, [line for line in lines.values() if line['run'] != REAL], real, errors,
                   tuple(crossed.values()))

    def label(self, kinds=DISTANCES):
        """Label of the scores of these kinds, such as 'FD-cifar'; None if there are none."""
        return next((line['metric'] for line in self.lines if kind_of(line['metric']) in kinds), None)

    def lookup(self, what, kimg, seed=0, cond=False, kinds=DISTANCES, **options):
        """The line of a run's score after `kimg` with these sampler options, or None."""
        wanted = [list(pair) for pair in sorted(options.items())]
        return next((line for line in self.lines if line['run'] == run_name(what, cond, seed) and line['point'] == kimg
                     and line['options'] == wanted and kind_of(line['metric']) in kinds), None)

    def values(self, what, kimg, cond=False, kinds=DISTANCES, **options):
        """{training seed: score}, for the seeds that have one."""
        found = {seed: self.lookup(what, kimg, seed, cond, kinds, **options) for seed in self.scale.main_seeds}
        return {seed: line['value'] for seed, line in found.items() if line}

    def errors_of(self, what, kimg, quantity, beta):
        """{training seed: error of a quantity at a noise level, relative to the filter's} (warm.errors.relative)."""
        found = {seed: relative(level, quantity) for seed in self.scale.main_seeds
                 for level in self.errors.get((run_name(what, seed=seed), kimg), ()) if level['beta'] == beta}
        return {seed: error for seed, error in found.items() if error is not None}

    def longest(self, options):
        """The last point of `scale.main` at which seed 0 has a score with these options; else the end of `main`."""
        found = [line['point'] for line in self.lines if line['seed'] == 0 and line['point'] in self.scale.main
                 and line['options'] == [list(pair) for pair in sorted(options.items())]]
        return max(found, default=self.scale.main[-1])

    def solved(self, what, kimg, solver, steps, **fixed):
        """`values` for a solver and a number of steps."""
        return self.values(what, kimg, **drawn(solver, steps, **fixed))

    def log_ratios(self, what, reference):
        """[(kimg, ln(score / reference's score))] of each pair of runs, labels or not, at the last kimg that both have.

        Logarithms, since scores with labels, without, and after other lengths are of other sizes.
        """
        last = {}
        for cond in (False, True):
            for kimg in self.scale.main:  # later ones replace earlier ones
                ours, theirs = self.values(what, kimg, cond), self.values(reference, kimg, cond)
                last |= {(cond, seed): (kimg, math.log(ours[seed] / theirs[seed])) for seed in ours if seed in theirs}
        return list(last.values())

    def seconds(self, what, kimg, cond=False):
        """Training time up to `kimg` in seconds, averaged over the seeds; None if unknown or not comparable."""
        if not self.scale.timed:
            return None
        found = [self.lookup(what, kimg, seed, cond) for seed in self.scale.main_seeds]
        known = [line['train_seconds'] for line in found if line and line.get('train_seconds')]
        return statistics.mean(known) if known else None


@dataclasses.dataclass(frozen=True)
class Difference:
    """A method's distance minus its reference's, paired over the seeds that both have.

    Attributes:
        pairs: The differences, one per seed; negative is better.
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
        """Standard deviation over the seeds; None for a single seed."""
        return statistics.stdev(self.pairs) if len(self.pairs) > 1 else None

    @property
    def margin(self):
        """Half the width of the confidence interval of the mean, at 1 − LEVEL by Student's t; None for one seed."""
        n = len(self.pairs)
        return scipy.special.stdtrit(n - 1, 1 - LEVEL / 2) * self.spread / math.sqrt(n) if n > 1 else None

    @property
    def verdict(self):
        """'better', 'worse' or 'undecided' by a two-sided paired t-test at LEVEL; 'undecided (one seed)' for one."""
        if self.margin is None:
            return 'undecided (one seed)'
        if abs(self.mean) <= self.margin:
            return 'undecided'
        return 'better' if self.mean < 0 else 'worse'

    def pairs_to_find(self, size):
        """How many pairs with this spread the test needs to decide a true difference of ±size with probability POWER.

        By t(1 − LEVEL/2) + t(POWER) ≤ size · √n / spread, the usual approximation.
        """
        return next(n for n in itertools.count(2) if self.spread * sum(
            scipy.special.stdtrit(n - 1, p) for p in (1 - LEVEL / 2, POWER)) <= size * math.sqrt(n))

    def __str__(self):
        spread = '' if self.spread is None else f' ± {self.spread:.2g}'
        return f'{self.mean:+.3g}{spread} ({self.mean / self.reference:+.0%})'


def compare(values, reference):
    """The `Difference` of two {seed: distance}, or None if they share no seed."""
    seeds = sorted(set(values) & set(reference))
    if not seeds:
        return None
    return Difference(tuple(values[s] - reference[s] for s in seeds), statistics.mean(reference[s] for s in seeds))


def shown(values):
    """{seed: distance} as text, '0.65 ± 0.02 (3)': mean, standard deviation, number of seeds; '–' if empty."""
    if not values:
        return '–'
    return mean_and_spread(values.values()) + (f' ({len(values)})' if len(values) > 1 else '')


def mean_and_spread(numbers):
    """Mean and standard deviation as text, '0.65 ± 0.02'; '0.65' for one number."""
    numbers = list(numbers)
    spread = f' ± {statistics.stdev(numbers):.2g}' if len(numbers) > 1 else ''
    return f'{statistics.mean(numbers):.3g}{spread}'
