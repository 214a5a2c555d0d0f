"""What the results page knows: the lines of results/SCALE.jsonl, looked up and compared over seeds."""

import dataclasses
import math
import statistics

from training.metrics import STD
from warm.report_data import DISTANCES, read_lines
from warm.study_plan import drawn, run_name


@dataclasses.dataclass
class Scores:
    """All scores of a scale.

    Attributes:
        scale: The Scale.
        lines: The results, of one detector and number of images.
    """

    scale: object
    lines: list

    @classmethod
    def read(cls, scale, path):
        """The file's scores that have the scale's number of images; one that occurs twice counts once, the last.

        Spreads over an Inception Score's parts are left out.
        """
        lines = {}
        for line in read_lines(path):
            counts = line.get('num_images') == scale.num and isinstance(line.get('value'), (int, float))
            if counts and not line['metric'].endswith(STD):
                lines[line['run'], line['point'], str(line['options']), line['metric'].split('-')[0]] = line
        return cls(scale, list(lines.values()))

    def label(self, kinds=DISTANCES):
        """'FD-cifar' or the like: how the scores of these kinds are called; None without any."""
        return next((line['metric'] for line in self.lines if line['metric'].split('-')[0] in kinds), None)

    def lookup(self, what, kimg, seed=0, cond=False, kinds=DISTANCES, **options):
        """The line of a run's score, drawn in some way, or None."""
        wanted = [list(pair) for pair in sorted(options.items())]
        return next((line for line in self.lines if line['run'] == run_name(what, cond, seed) and line['point'] == kimg
                     and line['options'] == wanted and line['metric'].split('-')[0] in kinds), None)

    def values(self, what, kimg, cond=False, kinds=DISTANCES, **options):
        """{seed: score} over the seeds of training."""
        found = {seed: self.lookup(what, kimg, seed, cond, kinds, **options) for seed in self.scale.main_seeds}
        return {seed: line['value'] for seed, line in found.items() if line}

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
        """'better', 'worse' or 'undecided': decided by at least 2 seeds of one sign, and 2 standard errors."""
        if self.spread is None:
            return 'undecided (one seed)'
        if abs(self.mean) <= 2 * self.spread / math.sqrt(len(self.pairs)) or len({d > 0 for d in self.pairs}) > 1:
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
    """'0.65 ± 0.02' of {seed: distance}; '–' of none."""
    if not values:
        return '–'
    spread = f' ± {statistics.stdev(values.values()):.2g}' if len(values) > 1 else ''
    return f'{statistics.mean(values.values()):.3g}{spread}'


