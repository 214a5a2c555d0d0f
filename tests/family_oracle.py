"""Exact oracles for Gaussian data with covariance diag(S) in the DCT basis, and exact covariances of samplers.

With such an oracle every sampler of the family is linear in its random numbers and diagonal in the DCT basis. So its
output's covariance is found without sampling: run it on a batch in which each image holds one of the random numbers
alone (the first the latents, the next the noise of the first step, …), one in every band, and add the squares.
"""

import math

import torch

from warm.blur import dct2, idct2, prior_spectrum


class LinearOracle:
    """Calls `gain(level) → [N, N]`: the prediction is V (gain ∘ Vᵀx). `process` and others are passed through."""

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
