"""Paths through the (α, β) plane: how many pixels of blur go with each noise level (Eq. 7, Table 4, Fig. 6).

A path gives α for each β. A network is trained on a *family* of paths: a single one, a list of constant
BNRs, or a range of them; training draws from it per image, sampling takes any path inside it.

To add a schedule: one class here and one line in PATHS. The class is a frozen dataclass (paths are compared) whose
fields are numbers with defaults, which --bnr-schedule=NAME:NUMBER,… sets in their order, and has what
`BlurringSchedule` has: `alpha`, which increases with β, `bnr_bounds`, `is_hot` and `__str__`.
"""

import dataclasses
import math
import re

import torch

from dnnlib import UserError, chosen

PAPER_BNR = 0.5  # the paper's choice (Table 3), and the default everywhere
MAX_BNR = 1000  # the paper tries up to 10; at 1000 even EDM's lowest noise level, 0.002, comes with two pixels of blur


@dataclasses.dataclass(frozen=True)
class ConstantBNR:
    """α = BNR·β (Eq. 7); BNR = 0 is hot diffusion."""

    bnr: float

    def __post_init__(self):
        if not 0 <= self.bnr <= MAX_BNR:
            raise UserError(f'the Blur-to-Noise Ratio --bnr={self.bnr:g} is out of range; '
                            f'give a number from 0 to {MAX_BNR}, such as {PAPER_BNR}')

    @property
    def is_hot(self):
        """Whether there is no blur anywhere on the path."""
        return self.bnr == 0

    def alpha(self, beta):
        """Blur in pixels at noise level β (number or tensor of any shape, in image units, ≥ 0)."""
        return beta * self.bnr

    def bnr_bounds(self, beta_min, beta_max):
        """Smallest and largest α/β between two noise levels."""
        return self.bnr, self.bnr

    def __str__(self):
        return f'constant BNR {self.bnr:g}'


@dataclasses.dataclass(frozen=True)
class BlurringSchedule:
    """α = σ_B,max·β²/(1+β²): Blurring Diffusion's cosine schedule in this parametrisation (Table 4).

    There β = tan(πt/2) and σ_B = σ_B,max·sin²(πt/2). This is the ideal form, without d_min and without the
    rescaled log-SNR: the original's α is ten times smaller at β = 0.01, and equal within 0.3 % from β = 1 on.
    """

    sigma_b_max: float = 20.0
    is_hot = False

    def __post_init__(self):
        if not 0 < self.sigma_b_max <= 2 * MAX_BNR:  # α/β peaks at half of it
            raise UserError(f'the largest blur {self.sigma_b_max:g} of --bnr-schedule=blurring must be > 0 and '
                            f'≤ {2 * MAX_BNR} pixels; for no blur use --bnr=0')

    def alpha(self, beta):
        """Blur in pixels at noise level β (number or tensor of any shape, in image units, ≥ 0)."""
        square = beta * beta
        return self.sigma_b_max * (square / (1 + square))

    def bnr_bounds(self, beta_min, beta_max):
        """Smallest and largest α/β between two noise levels; α/β = σ_B,max·β/(1+β²) peaks at β = 1."""
        ends = [self.alpha(b) / b for b in (beta_min, beta_max)]
        return min(ends), self.sigma_b_max / 2 if beta_min <= 1 <= beta_max else max(ends)

    def __str__(self):
        return f'blurring schedule up to {self.sigma_b_max:g} pixels'


PATHS = {'constant': ConstantBNR, 'blurring': BlurringSchedule}


# Families: what a network was trained on. `draw_alpha` draws the blur in training, `contains` says which paths sampling
# may follow. `flags` gives the texts of --bnr and --bnr-schedule, one of them None, from which `parse_family` makes the
# family; they are the same however the user wrote it.

@dataclasses.dataclass(frozen=True)
class OnePath:
    """Training along a single path."""

    path: object

    @property
    def is_hot(self):
        """Whether the network is EDM's: no blur conditioning, one output."""
        return self.path.is_hot

    def draw_alpha(self, beta):
        """α for β [B, 1, 1, 1]; draws no random numbers."""
        return self.path.alpha(beta)

    def contains(self, path, beta_min, beta_max):
        """Whether `path` is the trained one."""
        return path == self.path

    @property
    def default(self):
        """The path that sampling takes by default."""
        return self.path

    @property
    def flags(self):
        """{'bnr', 'bnr_schedule'}."""
        name = next(name for name, kind in PATHS.items() if type(self.path) is kind)
        if name == 'constant':
            return dict(bnr=_text(self.path.bnr), bnr_schedule=None)
        numbers = _join(getattr(self.path, field.name) for field in arguments_of(name))
        return dict(bnr=None, bnr_schedule=f'{name}:{numbers}' if numbers else name)

    def __str__(self):
        return str(self.path)


@dataclasses.dataclass(frozen=True)
class BNRList:
    """Training on several constant BNRs, one drawn uniformly per image."""

    values: tuple
    is_hot = False

    def __post_init__(self):
        if len(set(self.values)) < len(self.values):
            raise UserError(f'the list --bnr={_join(self.values)} repeats a value; give each value once')
        for bnr in self.values:
            ConstantBNR(bnr)

    def draw_alpha(self, beta):
        """α for β [B, 1, 1, 1]; draws an index [B, 1, 1, 1] from the global generator."""
        index = torch.randint(len(self.values), beta.shape, device=beta.device)
        values = torch.stack([beta.new_full([], bnr) for bnr in self.values])  # filled on the device: a copy would wait
        return beta * values[index]

    def contains(self, path, beta_min, beta_max):
        """Whether `path` is one of the trained BNRs."""
        return isinstance(path, ConstantBNR) and path.bnr in self.values

    @property
    def default(self):
        """The trained BNR nearest to the paper's 0.5."""
        return ConstantBNR(min(self.values, key=lambda bnr: abs(bnr - PAPER_BNR)))

    @property
    def flags(self):
        """{'bnr', 'bnr_schedule'}."""
        return dict(bnr=_join(self.values), bnr_schedule=None)

    def __str__(self):
        return f'the constant BNRs {_join(self.values)}'


@dataclasses.dataclass(frozen=True)
class BNRRange:
    """Training on a range of BNRs, drawn log-uniformly per image."""

    low: float
    high: float
    is_hot = False

    def __post_init__(self):
        if not 0 < self.low < self.high <= MAX_BNR:
            raise UserError(f'the range --bnr={self.low:g}-{self.high:g} is empty, starts at 0 or goes beyond '
                            f'{MAX_BNR}; give 0 < low < high ≤ {MAX_BNR}, such as 0.1-2, or a list that includes 0')

    def draw_alpha(self, beta):
        """α for β [B, 1, 1, 1]; draws a uniform variate [B, 1, 1, 1] from the global generator."""
        u = torch.rand(beta.shape, device=beta.device)
        return beta * (self.low * (self.high / self.low) ** u)

    def contains(self, path, beta_min, beta_max):
        """Whether α/β stays inside the trained range all along `path`."""
        low, high = path.bnr_bounds(beta_min, beta_max)
        return self.low <= low and high <= self.high

    @property
    def default(self):
        """The trained BNR nearest to the paper's 0.5."""
        return ConstantBNR(min(max(PAPER_BNR, self.low), self.high))

    @property
    def flags(self):
        """{'bnr', 'bnr_schedule'}."""
        return dict(bnr=f'{_text(self.low)}-{_text(self.high)}', bnr_schedule=None)

    def __str__(self):
        return f'BNRs from {self.low:g} to {self.high:g}'


def _join(values):
    return ','.join(map(_text, values))


def _text(number):
    """The shortest exact text of a number: 0.5, 2, 1e-05."""
    return repr(float(number)).removesuffix('.0')


def _number(text, flag, what):
    """The text's number; if it is none, `what` ends the error "'…' in FLAG is not …"."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isnan(value):
        raise UserError(f"'{text}' in {flag} is not {what}")
    return value


ONE_BNR = f'a single Blur-to-Noise Ratio, which a path needs; give a number ≥ 0, such as {PAPER_BNR}'
ANY_BNR = (f'a Blur-to-Noise Ratio; give a number ≥ 0 such as {PAPER_BNR}, a list such as 0,0.1,0.5 or, without '
           'exponents, a range such as 0.1-2')


def parse_path(bnr=None, schedule=None, expected=ONE_BNR):
    """One path from the texts of --bnr (a number) and --bnr-schedule (a name in PATHS, some with `:NUMBER,…`).

    `expected` says, in the error, what --bnr should be if it is not a number.

    Raises:
        UserError: unknown schedule, bad number, or a BNR together with a schedule that takes none.
    """
    name, colon, argument = (schedule or 'constant').partition(':')
    make_path = chosen('--bnr-schedule', name, PATHS)
    if name == 'constant':
        if argument:
            raise UserError(f'--bnr-schedule={schedule} takes no argument; give the ratio as --bnr={PAPER_BNR}')
        return ConstantBNR(PAPER_BNR if bnr is None else _number(bnr, '--bnr', expected))
    if bnr is not None:
        raise UserError(f'--bnr={bnr} does not go with --bnr-schedule={schedule}, which sets α itself; give one')
    if not colon:
        return make_path()
    fields, texts = arguments_of(name), argument.split(',')
    example = ':'.join([name, *([','.join(f'{field.default:g}' for field in fields)] if fields else [])])
    remedy = f'of the schedule {name}; give a number, such as --bnr-schedule={example}'
    numbers = [_number(text, '--bnr-schedule', f'{field.name} {remedy}') for field, text in zip(fields, texts)]
    if len(texts) > len(fields):
        takes = {0: 'no number', 1: 'one number'}.get(len(fields), f'up to {len(fields)} numbers')
        raise UserError(f'--bnr-schedule={schedule}: {name} takes {takes}; give --bnr-schedule={example}')
    return make_path(*numbers)


def arguments_of(name):
    """The dataclass fields that --bnr-schedule=NAME:NUMBER,… sets; none where another flag sets them."""
    return () if name == 'constant' else dataclasses.fields(PATHS[name])


def schedule_texts():
    """What --bnr-schedule accepts: 'constant', 'blurring[:SIGMA_B_MAX]' and so on."""
    return [name + (f"[:{','.join(field.name.upper() for field in fields)}]" if (fields := arguments_of(name)) else '')
            for name in PATHS]


def parse_family(bnr=None, schedule=None):
    """The family of paths from the texts of --bnr (number, list or range) and --bnr-schedule.

    Raises:
        UserError: as `parse_path`; also duplicates in a list and an empty range.
    """
    if (schedule or 'constant') == 'constant' and bnr is not None:
        text = str(bnr).strip()
        if ',' in text:
            return BNRList(tuple(_number(part, '--bnr', ANY_BNR) for part in text.split(',')))
        if 'e-' not in text.lower() and (a_range := re.fullmatch(r'([^-,]+?)-([^-,]+)', text)):
            return BNRRange(*(_number(part, '--bnr', ANY_BNR) for part in a_range.groups()))
    return OnePath(parse_path(bnr, schedule, ANY_BNR))
