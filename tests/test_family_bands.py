"""warm.bands: what follows from a and s alone, and that EDM and Warm are members of the family."""

import math

import pytest
import torch

from tests.family_oracle import ancestral_step, implicit_step
from training.samplers import ablation_sampler, edm_sigma_steps
from warm.bands import Bands, ancestral_noise_step, diffuse, posterior, spread_levels, transition_moments
from warm.blur import blur_and_rest, dct2, frequencies, idct2
from warm.steps import Level, transition
from warm.systems.blurring import BlurringProcess
from warm.systems.lee import LeeChain

N = 8


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def number(x):
    return torch.tensor(x, dtype=torch.float64)


def warm_bands(alpha, beta, n=N):
    """Warm as a member: a = M_α, s = β; EDM is α = 0."""
    return Bands(-frequencies(n) * alpha ** 2 / 2, number(beta))


x, x0, eps, z = (normal(2, 3, N, N, seed=i) for i in range(4))
PAIRS = {
    'edm': (warm_bands(0, 3.0), warm_bands(0, 1.0)),
    'warm': (warm_bands(1.5, 3.0), warm_bands(0.5, 1.0)),
    'blurring': tuple(BlurringProcess().at(number(t), N) for t in (0.6, 0.5)),
    'lee': tuple(LeeChain().at(torch.tensor(i), N) for i in (500, 450)),
}


@pytest.mark.parametrize('name', PAIRS)
def test_transition_leads_from_marginal_to_marginal(name):
    later, earlier = PAIRS[name]
    ratio, added = transition_moments(earlier, later)
    torch.testing.assert_close(ratio * earlier.signal, later.signal * torch.ones_like(ratio))
    torch.testing.assert_close(ratio ** 2 * earlier.noise ** 2 + added, (later.noise ** 2) * torch.ones_like(ratio))


@pytest.mark.parametrize('name', PAIRS)
def test_posterior_is_bayes_rule(name):
    """It is the conditional of the joint Gaussian of (z_s, z_t) given x₀, worked out from its covariance."""
    later, earlier = PAIRS[name]
    ratio, added = transition_moments(earlier, later)
    weight_x, weight_0, variance = posterior(later, earlier)
    gain = earlier.noise ** 2 * ratio / later.noise ** 2  # Cov(z_s, z_t)/Var(z_t)
    torch.testing.assert_close(weight_x, gain * torch.ones_like(weight_x))
    torch.testing.assert_close(weight_0 * earlier.signal, earlier.signal - gain * later.signal)
    torch.testing.assert_close(variance, earlier.noise ** 2 - gain * ratio * earlier.noise ** 2)


@pytest.mark.parametrize('name', PAIRS)
def test_one_step_in_three_forms(name):
    """The step from x̂₀, the one from ε̂, and DDIM's step with the posterior's noise are the same."""
    here, there = PAIRS[name]
    x = diffuse(x0, eps, here)
    step = ancestral_step(x, x0, here, there, z)
    torch.testing.assert_close(ancestral_noise_step(x, eps, here, there, z), step, rtol=1e-8, atol=1e-8)
    sigma = posterior(here, there)[2].sqrt()
    torch.testing.assert_close(implicit_step(x, x0, here, there, sigma, z), step, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize('name', PAIRS)
def test_a_step_to_no_noise_returns_the_estimate(name):
    here, clean = PAIRS[name][0], Bands(number(0.0), number(0.0))
    torch.testing.assert_close(ancestral_step(x, x0, here, clean, z), x0)
    torch.testing.assert_close(implicit_step(x, x0, here, clean), x0)


def test_strong_blur_neither_overflows_nor_loses_the_estimate():
    here, there = warm_bands(40.0, 80.0), warm_bands(20.0, 40.0)
    assert (here.signal == 0).any()
    step = ancestral_step(x, x0, here, there, z)
    high = here.signal == 0  # bands of which x holds nothing: their mean is the estimate's part, the noise is all of s
    torch.testing.assert_close(dct2(step)[..., high], (there.signal * dct2(x0) + 40 * dct2(z))[..., high])


# -- Warm and EDM

@pytest.mark.parametrize('alpha', [0.0, 0.4, 3.0])
def test_warms_marginal(alpha):
    blurred, _ = blur_and_rest(x0, alpha)
    torch.testing.assert_close(diffuse(x0, eps, warm_bands(alpha, 0.7)), blurred + 0.7 * eps, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('alpha, alpha_next', [(0.0, 0.0), (0.4, 0.1), (3.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize('sigma', [0, 0.3])
def test_warms_steps(alpha, alpha_next, sigma):
    """Euler's step (σ = 0) and Eq. 4's are the implicit step, with D and R of one estimate x̂₀ and no mean in R."""
    D, R = blur_and_rest(x0, alpha)
    here, there = Level(alpha, 2.0, alpha == alpha_next == 0), Level(alpha_next, 0.5)
    expected = transition(x, D, R, here, there, sigma, z)
    step = implicit_step(x, x0, warm_bands(alpha, 2.0), warm_bands(alpha_next, 0.5), sigma, z)
    torch.testing.assert_close(step, expected, rtol=1e-9, atol=1e-9)


class Denoiser:
    """D(x; σ) = x/(1 + 4σ²)."""

    sigma_min, sigma_max = 0, math.inf
    round_sigma = staticmethod(torch.as_tensor)

    def __call__(self, x, sigma, class_labels=None):
        return x / (1 + 4 * sigma ** 2)


def test_edms_euler_sampler_is_the_implicit_step_all_along():
    net, latents = Denoiser(), normal(2, 1, N, N)
    sigmas = edm_sigma_steps(6, 0.002, 80, 7, net).tolist()
    x = latents * sigmas[0]
    for sigma, sigma_next in zip(sigmas, sigmas[1:]):
        x = implicit_step(x, net(x, sigma), warm_bands(0, sigma), warm_bands(0, sigma_next))
    expected = ablation_sampler(net, latents, num_steps=6, solver='euler')
    torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-9)


def test_diffuse_takes_one_time_per_image():
    t = torch.tensor([0.2, 0.9], dtype=torch.float64).reshape(2, 1, 1, 1)
    both = diffuse(x0, eps, BlurringProcess().at(t, N))
    for i in range(2):
        torch.testing.assert_close(diffuse(x0[i:i + 1], eps[i:i + 1], BlurringProcess().at(t[i, 0, 0, 0], N)),
                                   both[i:i + 1])
    i = torch.tensor([20, 700]).reshape(2, 1, 1, 1)
    both = diffuse(x0, eps, LeeChain().at(i, N))
    coloured = LeeChain().at(torch.tensor(700), N)
    expected = idct2(coloured.signal * dct2(x0[1:]) + coloured.noise * dct2(eps[1:]))
    torch.testing.assert_close(both[1:], expected)


@pytest.mark.parametrize('num_steps, last', [(1, 50), (7, 50), (50, 50), (1000, 1000)])
def test_spread_levels(num_steps, last):
    levels = spread_levels(num_steps, last)
    assert len(levels) == num_steps + 1 and levels[0] == last and levels[-1] == 0
    assert all(a > b for a, b in zip(levels, levels[1:]))
