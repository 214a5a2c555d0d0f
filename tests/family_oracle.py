"""Exact oracles for Gaussian data with covariance diag(S) in the DCT basis, exact covariances of samplers, and
the steps of the family in their plainest form, as references for the systems' own.

With such an oracle, every sampler of the family is linear in its random numbers and diagonal in the DCT basis, so the
covariance of its output is found without sampling: run it on a batch in which each image has one source of randomness
alone (the first the latents, the next the noise of the first step, …), set to 1 in every band, and add the squares.
"""

import math

import torch

from warm.bands import posterior
from warm.blur import dct2, idct2, prior_spectrum


class LinearOracle:
    """A network that predicts V (gain ∘ Vᵀx), with gain(level) [N, N]; `process` and others become its attributes."""

    sigma_min, sigma_max, label_dim = 0, math.inf, 0

    def __init__(self, gain, **attributes):
        self.gain, self.calls = gain, 0
        self.__dict__.update(attributes)

    @staticmethod
    def round_sigma(sigma):
        return torch.as_tensor(sigma)

    def __call__(self, x, level, class_labels=None):
        self.calls += 1
        return idct2(self.gain(level) * dct2(x))


def clean_gain(at, S):
    """E[x₀|x] = V [a S/(a² S + s²)] Vᵀ x."""
    return at.signal * S / (at.signal ** 2 * S + at.noise ** 2)


def noise_gain(at, S):
    """E[ε|x] = V [s/(a² S + s²)] Vᵀ x."""
    return at.noise / (at.signal ** 2 * S + at.noise ** 2)


def ancestral_step(x, x0, here, there, z=None):
    """Draw from q(z_there|z_here, x̂₀), or take its mean where z is None (Blurring Diffusion, Eq. 22); float64.

    Args:
        x, x0: State and estimate of the clean image [B, C, N, N].
        here, there: warm.bands.Bands now and at an earlier time.
        z: Standard normal noise like x.
    """
    weight_x, weight_0, var = posterior(here, there)
    u = weight_x * dct2(x) + weight_0 * there.signal * dct2(x0)
    return idct2(u if z is None else u + var.sqrt() * dct2(z))


def implicit_step(x, x0, here, there, sigma=0, z=None):
    """DDIM's step: V (a′ ∘ Vᵀx̂₀ + √(s′² − σ²) ∘ Vᵀε̂ + σ ∘ Vᵀz), float64.

    σ = 0 is deterministic, the Euler step of EDM and of Warm; σ² = the posterior's variance is `ancestral_step`.

    Args:
        x, x0, here, there, z: As in `ancestral_step`.
        sigma: Standard deviation of the fresh noise, 0 ≤ σ ≤ s′: a number, or one per band.
    """
    sigma = torch.as_tensor(sigma, dtype=torch.float64)
    clean = dct2(x0)
    share = (there.noise.square() - sigma.square()).clamp(min=0).sqrt() / here.noise
    u = there.signal * clean + share * (dct2(x) - here.signal * clean)
    return idct2(u if z is None else u + sigma * dct2(z))


def variance(sampler, num_draws, n=8, start=1.0):
    """Variance per band [n, n] of what `sampler(latents, randn_like)` returns when it draws noise num_draws times."""
    unit = idct2(torch.ones(n, n, dtype=torch.float64))
    latents = torch.zeros(1 + num_draws, 1, n, n, dtype=torch.float64)
    latents[0] = start * unit
    drawn = [0]

    def randn_like(x):
        drawn[0] += 1
        z = torch.zeros_like(x)
        z[drawn[0]] = unit
        return z

    out = dct2(sampler(latents, randn_like))
    assert drawn[0] == num_draws
    return out.square().sum(dim=(0, 1))


def spectrum(n=8):
    return prior_spectrum(n)


def worst(variance, S):
    """Largest relative error of a variance per band."""
    return ((variance - S) / S).abs().max().item()
