"""Choices in Warm, each with alternatives to compare it with; all but the first are ours, as the paper is silent.

The options, their defaults, and the reasons for these:

- `blur`, how fast each DCT band fades (warm.blur.BLUR_RATES): 'gaussian', the paper's.
- `rest_weight`, the weight of R's term in the loss: 1. At small blur and constant BNR an error in R enters the
  sampler like one in D: the ODE's coefficient of R, Ṁ/(1−M), tends to −2/β there, and D's is −1/β. Squared, this
  could suggest a factor of 4; at strong blur R's coefficient vanishes, which suggests less than 1.
- `rest_scale`, the scale of R's output: 'prior'. The target of R is very small at small blur (0.010 at α = 0.15,
  N = 32), where EDM's c_out is 0.26 along the path of BNR 0.5; with s_R(α) the network's F_R has a scale of 0.5 to 1 at
  every blur on CIFAR-10. Heun's corrector amplifies R′ by (α/α′)², so R must be accurate relative to its own scale.
- `blur_embedding`, how the blur is embedded: 'log', the logarithm / 4, as EDM embeds the noise level, since β and with
  it α span orders of magnitude.

All only affect networks that are trained with blur, and `rest_weight` and `rest_scale` only those with a branch for
the rest. Defaults are not written into `init_kwargs`, so snapshots and states from before these options existed stay
valid.
"""

import math

import torch

from dnnlib import UserError, chosen
from training.system import as_flags
from warm.blur import BLUR_RATES, PAPER_BLUR, rest_magnitude
from warm.path import OnePath

DEFAULTS = dict(blur=PAPER_BLUR, rest_weight=1.0, rest_scale='prior', blur_embedding='log')
REST = 'deblur'  # the name of the branch that estimates the rest (warm.targets)
BLUR_UNIT = 1.0  # pixels; at BNR 0.5 the spread of α/BLUR_UNIT in training (0.55) is then similar to ln(α)/4's (0.3)


# Scales of R, [B or 1, 1, 1, 1], at the point of evaluation (warm.targets.Point). All are 0 at α = 0, like R.

def prior_scale(point):
    """s_R(α), the rest's magnitude under a natural-image prior (warm.blur.rest_magnitude)."""
    return rest_magnitude(point.alpha, point.x.shape[-1], point.sigma_data, point.rates)


def edm_scale(point):
    """EDM's c_out(β), as for D."""
    return (point.alpha > 0) * point.c_out


def unit_scale(point):
    """σ_data at any blur above 0."""
    return (point.alpha > 0) * point.sigma_data


REST_SCALES = {'prior': prior_scale, 'edm': edm_scale, 'unit': unit_scale}


# Inputs of the blur's positional embedding, from α [B] in pixels, ≥ 0: float tensors like it.

def log_blur(alpha):
    """ln(α)/4, finite at α = 0."""
    return alpha.clamp(min=torch.finfo(alpha.dtype).tiny).log() / 4


def linear_blur(alpha):
    """α/BLUR_UNIT."""
    return alpha / BLUR_UNIT


BLUR_EMBEDDINGS = {'log': log_blur, 'linear': linear_blur, 'none': None}


def checked_choices(choices, family, targets, branches):
    """Check `choices` and return those that differ from the defaults.

    Args:
        choices: {name: value} with the names of DEFAULTS.
        family: The paths that the network is trained on (warm.path).
        targets: Name of the parametrisation in warm.targets.TARGETS, for messages.
        branches: Names of its branches.

    Raises:
        UserError: an unknown or invalid value; one that has no effect on this network.
    """
    chosen('blur', choices['blur'], BLUR_RATES)
    chosen('rest_scale', choices['rest_scale'], REST_SCALES)
    feature = chosen('blur_embedding', choices['blur_embedding'], BLUR_EMBEDDINGS)
    if not 0 < choices['rest_weight'] < math.inf:
        raise UserError(f"--rest-weight={choices['rest_weight']} is not a valid loss weight; give a number > 0, such "
                        f"as {DEFAULTS['rest_weight']:g}")
    others = {name: value for name, value in choices.items() if value != DEFAULTS[name]}
    for flag, name in zip(flags_of(others), others):
        if family.is_hot:
            raise UserError(f"{flag} has no effect at BNR 0, where the network is EDM's; leave it out or choose "
                            'another BNR')
        if name.startswith('rest_') and REST not in branches:
            raise UserError(f"{flag} applies to the branch for the rest, which --targets={targets} doesn't have; "
                            'leave it out or choose --targets=residual')
    if feature is None and not isinstance(family, OnePath):
        raise UserError(f"--blur-embedding={choices['blur_embedding']} would leave a network for {family} unaware "
                        'of the blur; choose log or linear, or a single BNR')
    return others


def flags_of(choices):
    """['--rest-scale=edm', …] for {name: value}."""
    return as_flags({name: f'{value:g}' if isinstance(value, float) else value for name, value in choices.items()})
