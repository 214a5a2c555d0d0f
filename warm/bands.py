"""The one family that all these systems belong to: x_t = V (a_t ∘ Vᵀx₀) + V (s_t ∘ Vᵀε), a and s per DCT band.

A system says what its `Bands` (a_t, s_t) are at each time. What follows from them stands here once: the
marginal, the conversions between ε and x₀, the transition q(z_t|z_s), the posterior q(z_s|z_t, x₀) and the
steps of a sampler. EDM is a = 1, s = σ; Warm is a = M_α, s = β; cold systems have s = 0. Equation numbers are
Blurring Diffusion's (Hoogeboom and Salimans 2023).

a is kept as its logarithm: at strong blur it underflows, and only ratios of it matter then.
"""

import dataclasses

import torch

from training.samplers import edm_sigma_steps
from training.system import GRID_OPTIONS
from warm.blur import dct2, idct2
from warm.samplers import SAMPLER_DEFAULTS


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


def clean_from_noise(x, eps, at):
    """x̂₀ = V ((Vᵀx − s ∘ Vᵀε̂)/a), float64 (Eq. 21); a must not underflow."""
    return idct2((dct2(x) - at.noise * dct2(eps)) / at.signal)


def noise_from_clean(x, x0, at):
    """ε̂ = V ((Vᵀx − a ∘ Vᵀx̂₀)/s), float64: the inverse of `clean_from_noise`; s > 0."""
    return idct2((dct2(x) - at.signal * dct2(x0)) / at.noise)


def transition_moments(earlier, later):
    """q(z_later|z_earlier): (a_{t|s}, σ²_{t|s}) per band, the factor of the state and the variance added (Eq. 15)."""
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
    ratio, added = transition_moments(there, here)
    known = there.noise.square().clamp(min=delta)
    share = known / (added / ratio.square()).clamp(min=delta)
    variance = known / (1 + share)
    return ratio * variance / (added + delta), 1 / (1 + share), variance


def ancestral_step(x, x0, here, there, z=None):
    """Draw from q(z_there|z_here, x̂₀), or take its mean where z is None (Eq. 22); float64.

    Args:
        x, x0: State and estimate of the clean image [B, C, N, N].
        here, there: Bands now and at an earlier time.
        z: Standard normal noise like x.
    """
    weight_x, weight_0, variance = posterior(here, there)
    u = weight_x * dct2(x) + weight_0 * there.signal * dct2(x0)
    return idct2(u if z is None else u + variance.sqrt() * dct2(z))


def ancestral_noise_step(x, eps, here, there, z=None, delta=0):
    """`ancestral_step` for an estimate ε̂ (Eq. 23), without the detour over x̂₀, which overflows at strong blur.

    Args:
        delta: As in `posterior`.
    """
    weight_x, weight_0, variance = posterior(here, there, delta)
    ratio, _ = transition_moments(there, here)
    u = dct2(x)
    u = weight_x * u + weight_0 / ratio * (u - here.noise * dct2(eps))
    return idct2(u if z is None else u + variance.sqrt() * dct2(z))


def implicit_step(x, x0, here, there, sigma=0, z=None):
    """DDIM's step: V (a′ ∘ Vᵀx̂₀ + √(s′² − σ²) ∘ Vᵀε̂ + σ ∘ Vᵀz), float64.

    σ = 0 is deterministic, the Euler step of EDM and of Warm; σ² = the posterior's variance is `ancestral_step`.

    Args:
        x, x0, here, there, z: As in `ancestral_step`.
        sigma: Standard deviation of the fresh noise, 0 ≤ σ ≤ s′: a number, or one per band.
    """
    sigma = torch.as_tensor(sigma, dtype=torch.float64, device=x.device)
    clean = dct2(x0)
    kept = (there.noise.square() - sigma.square()).clamp(min=0).sqrt() / here.noise
    u = there.signal * clean + kept * (dct2(x) - here.signal * clean)
    return idct2(u if z is None else u + sigma * dct2(z))


# -- what the samplers of these systems share

def predict(net, x, level, class_labels=None):
    """The network's prediction in float64; the number `level` is filled in on the device, without a copy."""
    return net(x, x.new_full([], level), class_labels).to(torch.float64)


def grid_options(net, given):
    """Options of EDM's grid of noise levels, defaults filled in, after checking that they suit `net` (UserError)."""
    options = {**{name: SAMPLER_DEFAULTS[name] for name in GRID_OPTIONS}, **given}
    edm_sigma_steps(**options, net=net, device='cpu')
    return options


def spread_levels(num_steps, last):
    """num_steps whole levels evenly spread from `last` down to above 0, then 0: a list of num_steps + 1 integers."""
    return [-(-last * i // num_steps) for i in range(num_steps, -1, -1)]
