"""Options of Warm that the paper leaves open (and the blur, which it does not), their defaults, and the reasons.

- `blur`, how fast each DCT band fades (warm.blur.BLUR_RATES): 'gaussian', the paper's.
- `rest_weight`, a constant factor of R's term in the loss: 1. At small blur and constant BNR an error in R enters the
  sampler like one in D: the ODE's coefficient of R, Ṁ/(1−M), tends to −2/β there, and D's is −1/β. Squared, this
  could suggest a factor of 4; at strong blur R's coefficient vanishes, which suggests less than 1.
- `rest_scale`, the scale of R's output: 'prior'. The target of R is very small at small blur (0.010 at α = 0.15,
  N = 32), where EDM's c_out is 0.26 along the path of BNR 0.5; with s_R(α) the network's F_R has a scale of 0.5 to 1 at
  every blur on CIFAR-10. Heun's corrector amplifies R′ by (α/α′)², so R must be accurate relative to its own scale.
  With 'wiener', R starts from what a linear filter knows of the rest (99 % of its power at β = 0.01, 64 % at 0.1, 7 %
  at 0.5, under the prior at BNR 0.5, N = 32), and F_R has the scale of the filter's error.
- `rest_loss`, how R's squared error is weighted at each noise level: 'edm', by λ(β) like D's, for the reason above. But
  λ = 1/c_out² gives errors of F_D the same weight at all noise levels, and those of F_R then have the weight λ·s_R²:
  0.03 at β = 1, 10⁻⁴ at 0.1 (BNR 0.5, N = 32). With 'unit', 1/s_R² does for F_R what λ does for F_D.
- `blur_embedding`, how the blur is embedded: 'log', the logarithm / 4, as EDM embeds the noise level, since β and with
  it α span orders of magnitude.

All only affect networks that are trained with blur, and those named after the rest only such with a branch for it.
Defaults are not written into `init_kwargs`, so snapshots and states from before these options existed stay valid.
"""

import dataclasses
import math
from collections.abc import Callable

import torch

from dnnlib import UserError, chosen
from training.system import as_flags
from warm.blur import BLUR_RATES, PAPER_BLUR, filter_bands, prior_spectrum, rest_magnitude, rest_mask, wiener_filter
from warm.path import OnePath

DEFAULTS = dict(blur=PAPER_BLUR, rest_weight=1.0, rest_scale='prior', rest_loss='edm', blur_embedding='log')
REST = 'deblur'  # the name of the branch that estimates the rest (warm.targets)
BLUR_UNIT = 1.0  # pixels; at BNR 0.5 the spread of α/BLUR_UNIT in training (0.55) is then similar to ln(α)/4's (0.3)


# How R is made of the network's output, at the point of evaluation (warm.targets.Point). Scales are [B or 1, 1, 1, 1],
# and 0 at α = 0, like R.

@dataclasses.dataclass(frozen=True)
class RestScale:
    """R = skip(point) + scale(point)·F_R, minus its mean; `skip` gives images like point.x, or 0."""

    scale: Callable
    skip: Callable = lambda point: 0


def prior_scale(point):
    """s_R(α), the rest's magnitude under a natural-image prior (warm.blur.rest_magnitude)."""
    return rest_magnitude(point.alpha, point.x.shape[-1], point.sigma_data, point.rates)


def edm_scale(point):
    """EDM's c_out(β), as for D."""
    return (point.alpha > 0) * point.c_out


def unit_scale(point):
    """σ_data at any blur above 0."""
    return (point.alpha > 0) * point.sigma_data


def wiener_rest(point):
    """V (I−M) Vᵀ x̂₀, x̂₀ the best linear estimate from x under the prior: a c_skip for each band."""
    gain, _ = _prior_filter(point)
    return filter_bands(point.x, rest_mask(point.alpha, point.x.shape[-1], point.rates) * gain)


def wiener_scale(point):
    """The magnitude of this estimate's error under the prior, as s_R(α) is the rest's own."""
    _, unknown = _prior_filter(point)
    gone = rest_mask(point.alpha, point.x.shape[-1], point.rates)
    return (gone.square() * unknown).mean(dim=(-2, -1), keepdim=True).sqrt()


def _prior_filter(point):
    spectrum = prior_spectrum(point.x.shape[-1], point.sigma_data, point.x.device)
    return wiener_filter(point.alpha, point.beta, spectrum, point.rates)


REST_SCALES = {'prior': RestScale(prior_scale), 'edm': RestScale(edm_scale), 'unit': RestScale(unit_scale),
               'wiener': RestScale(wiener_scale, wiener_rest)}


# Weights of R's squared error in the loss, [B, 1, 1, 1], from D's weight λ(β) and the warm.targets.Point; None: D's.

def unit_weight(weight, point):
    """1/s², s being the scale of F_R; 0 without blur, where R is 0 whatever F_R is."""
    square = REST_SCALES[point.rest_scale].scale(point).to(weight.dtype).square()
    return torch.where(square >= torch.finfo(square.dtype).tiny, 1 / square, 0)  # of less, 1/s² would be infinite


REST_LOSSES = {'edm': None, 'unit': unit_weight}


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
    chosen('rest_loss', choices['rest_loss'], REST_LOSSES)
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
    if (choices['rest_loss'], choices['rest_scale']) == ('unit', 'edm'):
        raise UserError('--rest-loss=unit has no effect with --rest-scale=edm, whose weight it is; leave one out')
    if feature is None and not isinstance(family, OnePath):
        raise UserError(f"--blur-embedding={choices['blur_embedding']} would leave a network for {family} unaware "
                        'of the blur; choose log or linear, or a single BNR')
    return others


def flags_of(choices):
    """['--rest-scale=edm', …] for {name: value}."""
    return as_flags({name: f'{value:g}' if isinstance(value, float) else value for name, value in choices.items()})
