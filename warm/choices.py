"""Choices in Warm that are ours, since the paper is silent, each with alternatives to try it against.

What is on offer, and what speaks for the defaults:

- `rest_weight`, the factor of R's term in the loss, 1. At small blur and constant BNR an error of R enters the
  sampler like one of D: the ODE's coefficient of R, Ṁ/(1−M), tends to −2/β there, D's is 1/β. Squared, that may be
  read as a factor of 4; at strong blur R's coefficient vanishes, which asks for less than 1.
- `rest_scale`, the scale of R's output, 'prior'. Its target R is very small at little blur (0.010 at α = 0.15,
  N = 32), where EDM's c_out is 0.26 on the path of BNR 0.5; with s_R(α) the network's F_R has 0.5 to 1 of unit scale
  at every blur on CIFAR-10. Heun's corrector amplifies R′ by (α/α′)², so R has to be right relative to its own scale.
- `blur_embedding`, how the network is told the blur, 'log': as EDM tells it the noise, by a logarithm / 4, since β
  and with it α span orders of magnitude.

Each has its effect on networks that know blur only, the first two only where a branch estimates the rest.
None of the defaults is written into `init_kwargs`: headers and states from before there was a choice stay valid.
"""

import math

import torch

from dnnlib import UserError, chosen
from training.system import flag_of
from warm.blur import rest_magnitude
from warm.path import OnePath

DEFAULTS = dict(rest_weight=1.0, rest_scale='prior', blur_embedding='log')
REST = 'deblur'  # the name of the branch that estimates the rest (warm.targets)
BLUR_UNIT = 1.0  # pixels; at BNR 0.5 α/BLUR_UNIT then spreads in training (by 0.55) about as ln(α)/4 does (by 0.3)


# Scales of R, [B or 1, 1, 1, 1], where the network is evaluated (warm.targets.Point). All are 0 at α = 0, where R is.

def prior_scale(point):
    """s_R(α), the rest's magnitude under a natural-image prior (warm.blur.rest_magnitude)."""
    return rest_magnitude(point.alpha, point.x.shape[-1], point.sigma_data)


def edm_scale(point):
    """EDM's c_out(β), as D has it."""
    return (point.alpha > 0) * point.c_out


def unit_scale(point):
    """σ_data at any blur."""
    return (point.alpha > 0) * point.sigma_data


REST_SCALES = {'prior': prior_scale, 'edm': edm_scale, 'unit': unit_scale}


# What the blur's positional embedding is of: a float tensor like α [B] in pixels, ≥ 0.

def log_blur(alpha):
    """ln(α)/4, finite at α = 0."""
    return alpha.clamp(min=torch.finfo(alpha.dtype).tiny).log() / 4


def linear_blur(alpha):
    """α/BLUR_UNIT."""
    return alpha / BLUR_UNIT


BLUR_EMBEDDINGS = {'log': log_blur, 'linear': linear_blur, 'none': None}


def checked_choices(choices, family, targets, branches):
    """Those of `choices` that differ from the defaults, checked.

    Args:
        choices: {name: value} with the names of DEFAULTS.
        family: The paths that the network is trained on (warm.path).
        targets: Its name in warm.targets.TARGETS, for messages.
        branches: Names of its branches.

    Raises:
        UserError: an unknown or impossible value; one without effect on this network.
    """
    chosen('rest_scale', choices['rest_scale'], REST_SCALES)
    feature = chosen('blur_embedding', choices['blur_embedding'], BLUR_EMBEDDINGS)
    if not 0 < choices['rest_weight'] < math.inf:
        raise UserError(f"--rest-weight={choices['rest_weight']} is no factor of a loss; give a number > 0, such as "
                        f"{DEFAULTS['rest_weight']:g}")
    others = {name: value for name, value in choices.items() if value != DEFAULTS[name]}
    for flag, name in zip(flags_of(others), others):
        if family.is_hot:
            raise UserError(f"{flag} has no effect at BNR 0, where the network is EDM's; leave it out or choose "
                            'another BNR')
        if name.startswith('rest_') and REST not in branches:
            raise UserError(f"{flag} is about the branch for the rest, which --targets={targets} doesn't have; "
                            'leave it out or choose --targets=residual')
    if feature is None and not isinstance(family, OnePath):
        raise UserError(f"--blur-embedding={choices['blur_embedding']} would leave a network for {family} without "
                        'knowledge of its blur; choose log or linear, or a single BNR')
    return others


def flags_of(choices):
    """['--rest-scale=edm', …] for {name: value}."""
    return [f'{flag_of(name)}={value:g}' if isinstance(value, float) else f'{flag_of(name)}={value}'
            for name, value in choices.items()]
