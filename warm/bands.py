"""The family of blur–noise processes that the systems here share: x_t = V (a_t ∘ Vᵀx₀) + V (s_t ∘ Vᵀε).

a and s are per DCT band. Systems that blur say what their `Bands` (a_t, s_t) are at each time; cold ones have s = 0.
What they need of them stands here once: the marginal that their losses draw from, and for ancestral sampling the
transition q(z_t|z_s) and the posterior q(z_s|z_t, x₀). EDM is a = 1, s = σ, and Warm is a = M_α, s = β, but both have
losses and samplers of their own, which tests/test_family_bands.py holds against the family's. Equation numbers are
Blurring Diffusion's (Hoogeboom and Salimans 2023).

a is kept as its logarithm: at strong blur it underflows, and only ratios of it matter then.
"""

import dataclasses

import torch

from warm.blur import dct2, idct2


@dataclasses.dataclass(frozen=True)
class Bands:
    """Signal and noise of the state at one time, or at one time per image; float64, on the images' device.

    Attributes:
        log_signal: ln a ≤ 0: [N, N] or [B, 1, N, N]; a single number ([] or [B, 1, 1, 1]) where all bands are alike.
        noise: s ≥ 0, likewise.
    """

    log_signal: torch.Tensor
    noise: torch.Tensor

    @property
    def signal(self):
        """a = exp(ln a)."""
        return self.log_signal.exp()

    @property
    def is_white(self):
        """Whether all bands have the same noise, which then needs no DCT."""
        return self.noise.shape[-1:] in ((), (1,))


def diffuse(x0, eps, at):
    """The marginal: V (a ∘ Vᵀx₀) + V (s ∘ Vᵀε) for images x0 and noise eps [B, C, N, N]; x0's dtype (Eq. 20)."""
    signal = at.signal * dct2(x0)
    if at.is_white:
        return (idct2(signal) + at.noise * eps).to(x0.dtype)
    return idct2(signal + at.noise * dct2(eps)).to(x0.dtype)


def transition_moments(earlier, later):
    """q(z_later|z_earlier): (a_{t|s}, σ²_{t|s}) per band, the factor of the state and the variance added (Eq. 15).

    a_{t|s} = a_t/a_s and σ²_{t|s} = s_t² − a²_{t|s} s_s² stand below Eq. 15, without a number of their own.
    """
    ratio = (later.log_signal - earlier.log_signal).exp()
    return ratio, (later.noise.square() - (ratio * earlier.noise).square()).clamp(min=0)


def posterior(here, there, delta=0):
    """q(z_there|z_here, x₀) at an earlier time: its mean is w_x·Vᵀx + w_0·(a_s Vᵀx₀), both per band (Eq. 18).

    σ² = (1/s_s² + a²_{t|s}/σ²_{t|s})⁻¹, w_x = a_{t|s} σ²/σ²_{t|s}, w_0 = σ²/s_s², written so that s_s = 0 and
    a_{t|s} = 0 need no exception.

    Args:
        here, there: Bands at t and at s < t.
        delta: Guard of Blurring Diffusion's appendix A.1: lower clip of s_s² and of σ²_{t|s}/a²_{t|s}, and added to
            σ²_{t|s} in w_x; 0 is Eq. 18 itself.

    Returns:
        (w_x, w_0, σ²), float64.
    """
    ratio, increment = transition_moments(there, here)
    prior = there.noise.square().clamp(min=delta)
    odds = prior / (increment / ratio.square()).clamp(min=delta)
    variance = prior / (1 + odds)
    return ratio * variance / (increment + delta), 1 / (1 + odds), variance


def ancestral_noise_step(x, eps, here, there, z=None, delta=0):
    """Draw from q(z_there|z_here, x̂₀) for an estimate ε̂, or take its mean where z is None (Eq. 22, 23); float64.

    There is no detour over x̂₀, which overflows at strong blur.

    Args:
        x, eps: State and estimate of its noise [B, C, N, N].
        here, there: Bands now and at an earlier time.
        z: Standard normal noise like x.
        delta: As in `posterior`.
    """
    weight_x, weight_0, variance = posterior(here, there, delta)
    ratio, _ = transition_moments(there, here)
    u = dct2(x)
    u = weight_x * u + weight_0 / ratio * (u - here.noise * dct2(eps))
    return idct2(u if z is None else u + variance.sqrt() * dct2(z))


def spread_levels(num_steps, last):
    """num_steps whole levels evenly spread from `last` down to above 0, then 0: a list of num_steps + 1 integers."""
    return [-(-last * i // num_steps) for i in range(num_steps, -1, -1)]
