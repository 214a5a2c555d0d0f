"""The family of blur–noise processes that the systems here share: x_t = V (a_t ∘ Vᵀx₀) + V (s_t ∘ Vᵀε).

a and s are per DCT band. Each blurring system defines its `Bands` (a_t, s_t) at each time; Cold Diffusion has s = 0.
Here is what they derive from these: the marginal that their losses draw from and, for ancestral sampling, the
transition q(z_t|z_s) and the posterior q(z_s|z_t, x₀). EDM is a = 1, s = σ, and Warm is a = M_α, s = β, but both have
their own losses and samplers, which tests/test_family_bands.py checks against the family's. Equation numbers are
those of Blurring Diffusion (Hoogeboom and Salimans 2023).

a is stored as its logarithm: at strong blur it underflows, and then only ratios of it matter.
"""

import dataclasses
import math

import torch

from warm.blur import dct2, idct2

MAX_LEVELS = 10_000  # of a process with levels; a mistyped number, or a hostile file's, would fill the memory
MAX_BLUR = 10_000  # pixels; far beyond any image, and finite when squared


@dataclasses.dataclass(frozen=True)
class Bands:
    """Scales of signal and noise at one time, or at one time per image; float64, on the images' device.

    Attributes:
        log_signal: ln a ≤ 0: [N, N] or [B, 1, N, N]; [] or [B, 1, 1, 1] if all bands are equal.
        noise: s ≥ 0, shaped likewise.
    """

    log_signal: torch.Tensor
    noise: torch.Tensor

    @property
    def signal(self):
        """a = exp(ln a)."""
        return self.log_signal.exp()

    @property
    def is_white(self):
        """Whether all bands have the same noise, so that it needs no DCT."""
        return self.noise.shape[-1:] in ((), (1,))


def diffuse(x0, eps, at):
    """The marginal: V (a ∘ Vᵀx₀) + V (s ∘ Vᵀε) for images x0 and noise eps [B, C, N, N]; x0's dtype (Eq. 20)."""
    signal = at.signal * dct2(x0)
    if at.is_white:
        return (idct2(signal) + at.noise * eps).to(x0.dtype)
    return idct2(signal + at.noise * dct2(eps)).to(x0.dtype)


def transition_moments(earlier, later):
    """Moments (a_{t|s}, σ²_{t|s}) of q(z_later|z_earlier) per band: the state's factor, the variance added (Eq. 15).

    a_{t|s} = a_t/a_s and σ²_{t|s} = s_t² − a²_{t|s} s_s² are given, unnumbered, below Eq. 15.
    """
    ratio = (later.log_signal - earlier.log_signal).exp()
    return ratio, (later.noise.square() - (ratio * earlier.noise).square()).clamp(min=0)


def posterior(here, there, delta=0):
    """Weights and variance of q(z_there|z_here, x₀) per band; its mean is w_x·Vᵀx + w_0·(a_s Vᵀx₀) (Eq. 18).

    σ² = (1/s_s² + a²_{t|s}/σ²_{t|s})⁻¹, w_x = a_{t|s} σ²/σ²_{t|s}, w_0 = σ²/s_s², written so that s_s = 0 and
    a_{t|s} = 0 need no special case.

    Args:
        here, there: Bands at t and at s < t.
        delta: Guard of Blurring Diffusion's appendix A.1: lower bound of s_s² and of σ²_{t|s}/a²_{t|s}, also added to
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
    """Draw from q(z_there|z_here, x̂₀) given an estimate ε̂, or return its mean if z is None (Eq. 22, 23); float64.

    x̂₀ itself is never computed, since it overflows at strong blur.

    Args:
        x, eps: State and estimate of its noise [B, C, N, N].
        here, there: Bands at the current and at an earlier time.
        z: Standard normal noise like x.
        delta: As in `posterior`.
    """
    weight_x, weight_0, variance = posterior(here, there, delta)
    ratio, _ = transition_moments(there, here)
    u = dct2(x)
    u = weight_x * u + weight_0 / ratio * (u - here.noise * dct2(eps))
    return idct2(u if z is None else u + variance.sqrt() * dct2(z))


def spread_levels(num_steps, last):
    """num_steps + 1 integers, evenly spaced (rounded up) from `last` down to 0."""
    return [-(-last * i // num_steps) for i in range(num_steps, -1, -1)]


def spread_blurs(first, last, count):
    """0, then `count` blurs from `first` to `last` pixels, evenly spaced in the logarithm: float64 on the CPU."""
    blurs = torch.linspace(math.log(first), math.log(last), count, dtype=torch.float64, device='cpu').exp()
    return torch.cat([blurs.new_zeros([1]), blurs])
