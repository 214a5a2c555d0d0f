"""Steps from level to level along a path: Eq. 4, and what a solver made of such steps has to be.

A solver is a function

    step(denoise, x, D, R, here, there, z, memory) → x′

described by a `Solver` in SOLVERS (warm.samplers). Unprimed symbols belong to the current level (α, β), primed ones to
the next, whose noise level is lower (equal levels, which arise where the network rounds them, are skipped). D and R are
the network's output at x, `here`; a step that needs more evaluations calls `denoise(x, level) → (D, R)`. R's mean is
zero. At β′ = 0 a step returns x̂₀ = D + R.
- Noise: z is the step's own, standard normal like x; `adds_noise` says when the solver uses it.
- Options: each Option in `options` is a keyword of the step and a flag of generate.py, refused by the other solvers.
- Multistep: `memory` is a dict, empty at first, that the step may write to; a solver that does is `multistep`.
"""

import dataclasses
import math
from collections.abc import Callable

import torch

from warm.blur import filter_bands, frequencies, mask_difference, rest_mask


@dataclasses.dataclass(frozen=True)
class Level:
    """A point of a path.

    Attributes:
        alpha: Blur in pixels: a number, or a 0-d tensor on the images' device, which saves a copy.
        beta: Noise level, a float, so that nothing is read back from the device.
        hot: Whether the path has no blur at all.
        rates: The blur's, one of warm.blur.BLUR_RATES.
    """

    alpha: float | torch.Tensor
    beta: float
    hot: bool = False
    rates: Callable = frequencies


def blur_fraction(here, there, n):
    """(M′ − M)/(1 − M) per band [n, n]: the share of the rest R that a step restores (Eq. 4).

    0 at λ = 0, since R has zero mean, and at α = 0. Negative for a step backwards, towards more blur.
    """
    missing = rest_mask(here.alpha, n, here.rates)
    gained = mask_difference(here.alpha, there.alpha, n, here.rates)
    return torch.where(missing > 0, gained / missing.clamp(min=torch.finfo(missing.dtype).tiny), 0)


def deblur(R, here, there):
    """V [(M′−M)/(1−M)] Vᵀ R: the detail that a step from `here` to `there` adds (Eq. 4, first term); 0 without blur."""
    if here.hot:
        return 0
    return filter_bands(R, blur_fraction(here, there, R.shape[-1]))


def transition(x, D, R, here, there, sigma=0, z=None):
    """One step of Eq. 4: x + V [(M′−M)/(1−M)] Vᵀ R + (β − √(β′²−σ²))·(D−x)/β + σz.

    Args:
        x, D, R: State, denoised image and rest [B, C, N, N].
        here, there: Levels before and after.
        sigma: The paper's σ_t, 0 ≤ σ ≤ β′; 0 is the deterministic step (Euler, DDIM).
        z: Standard normal noise like x; needed where σ > 0.

    Raises:
        ValueError: σ outside its range, which would leave more noise than the next level has.
    """
    if not 0 <= sigma <= there.beta * (1 + 1e-9):  # a σ computed as β′ may be rounded up
        raise ValueError(f'σ_t = {sigma:g} is not between 0 and the noise level {there.beta:g} that the step leads to')
    kept = math.sqrt(max(there.beta ** 2 - sigma ** 2, 0))
    x_next = x + (kept - here.beta) * ((x - D) / here.beta) + deblur(R, here, there)
    return x_next if z is None else x_next + sigma * z


@dataclasses.dataclass(frozen=True)
class Solver:
    """A step from level to level, and the properties of it that users and tests rely on.

    Attributes:
        step: step(denoise, x, D, R, here, there, z, memory, **options) → x′, explained above.
        order: Order of accuracy on the ODE with default options, of the whole solution, a multistep solver's start
            included; None if these add noise.
        multistep: Whether it reuses earlier steps' evaluations: if so, churn and num_steps=1 are refused.
        options: Option objects of its own, with the defaults that the step receives.
        adds_noise: adds_noise(**options) → whether the step uses z; if so, churn, which uses the same z, is refused.
        check: check(**options) raises UserError for invalid values.
    """

    step: Callable
    order: int | None
    multistep: bool = False
    options: tuple = ()
    adds_noise: Callable = lambda **options: False
    check: Callable = lambda **options: None
