"""The relatives of EDM: STF, PFGM++, epsilon scaling, Soft Diffusion."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from dnnlib import UserError
from tests.family_oracle import LinearOracle, clean_gain, spectrum, variance, worst
from training.loss import EDMLoss
from training.samplers import ablation_sampler, edm_sampler
from warm.bands import Bands, diffuse
from warm.blur import blur, dct2, idct2
from warm.path import ConstantBNR
from warm.systems import SYSTEMS
from warm.systems.epsilon_scaling import parse_scale, scaled_sampler
from warm.systems.pfgmpp import (PFGMPPLoss, PFGMPPPrecond, chi_square_of, heavy_tailed, make_pfgmpp_sampler,
                         with_heavy_tails)
from warm.systems.soft import SoftLoss, SoftPrecond, momentum_step, soft_bands, soft_sampler
from warm.systems.stf import STFLoss, posterior_mean

S = spectrum()


def number(x):
    return torch.tensor(x, dtype=torch.float64)


def uniform_images(count, seed=0):
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def half(x, sigma, labels=None, augment_labels=None):
    """A network for losses."""
    return 0.5 * x


# -- STF

def test_stf_target_is_the_posterior_mean_of_the_reference():
    """It equals Bayes' rule written out image by image, in double precision."""
    images, sigma = uniform_images(6), torch.tensor([0.1, 0.5, 2, 4, 8, 80.0]).reshape(6, 1, 1, 1)
    x = images + sigma * torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    for i in range(6):
        logs = torch.stack([-((x[i].double() - y.double()) ** 2).sum() / (2 * sigma[i].double() ** 2) for y in images])
        weights = (logs - logs.max()).exp().flatten()
        expected = sum(w * y.double() for w, y in zip(weights / weights.sum(), images))
        torch.testing.assert_close(posterior_mean(x, sigma, images)[i], expected.float())


def test_stf_target_survives_every_noise_level():
    images, sigma = uniform_images(3), torch.tensor([1e-4, 0.002, 1e5]).reshape(3, 1, 1, 1)
    target = posterior_mean(images + 0.5 * sigma, sigma, images)
    torch.testing.assert_close(target[:2], images[:2])
    torch.testing.assert_close(target[2], images.mean(dim=0), rtol=1e-3, atol=1e-3)


def test_stf_keeps_labels_apart():
    images, sigma = uniform_images(4), torch.full([4, 1, 1, 1], 1e4)
    labels = torch.eye(2)[[0, 1, 0, 1]]
    target = posterior_mean(images, sigma, images, labels)
    torch.testing.assert_close(target[0], images[::2].mean(dim=0), rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(target[1], images[1::2].mean(dim=0), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize('images', [uniform_images(1), uniform_images(1).repeat(5, 1, 1, 1)])
def test_stf_of_one_image_is_edm(images):
    losses = []
    for loss in (STFLoss(), EDMLoss()):
        torch.manual_seed(3)
        losses.append(loss(half, images))
    torch.testing.assert_close(*losses)


def test_stf_differs_from_edm_in_a_batch():
    losses = []
    for loss in (STFLoss(P_mean=2), EDMLoss(P_mean=2)):
        torch.manual_seed(3)
        losses.append(loss(half, uniform_images(5)))
    assert (losses[0] - losses[1]).abs().max() > 0.1


def test_stf_target_has_the_same_mean_and_less_variance():
    """It does so over many draws, which makes it both right and stable."""
    images = uniform_images(4)
    generator, sigma = torch.Generator().manual_seed(2), torch.full([4, 1, 1, 1], 3.0)
    draws = torch.stack([posterior_mean(images + sigma * torch.randn(images.shape, generator=generator), sigma, images)
                         for _ in range(4000)])
    torch.testing.assert_close(draws.mean(dim=(0, 1)), images.mean(dim=0), rtol=0, atol=0.03)
    assert draws.var(dim=0).mean() < 0.5 * images.var(dim=0).mean()


def test_stf_of_augmented_images_is_edm():
    """Augmentation labels that no other image has leave each its own image as target."""
    losses = []
    for loss in (STFLoss(P_mean=2), EDMLoss(P_mean=2)):
        torch.manual_seed(3)
        losses.append(loss(half, uniform_images(5), augment_pipe=lambda x: (x, torch.arange(5.0)[:, None])))
    torch.testing.assert_close(*losses)


# -- PFGM++

@pytest.mark.parametrize('aug_dim', [8, 128])
def test_pfgmpp_perturbation_has_the_papers_radius(aug_dim):
    """R = σ√D·√(Beta-prime(N/2, D/2)), by a Kolmogorov–Smirnov test of both ways to draw χ²_D; directions are kept."""
    N, count, sigma = 64, 4000, 3.0
    generator = torch.Generator().manual_seed(0)
    n = torch.randn(count, 1, 8, 8, dtype=torch.float64, generator=generator)
    by_quantile = chi_square_of(torch.randn(count, 1, 1, 1, dtype=torch.float64, generator=generator), aug_dim)
    torch.manual_seed(1)
    by_gamma = torch.distributions.Chi2(torch.full([count, 1, 1, 1], float(aug_dim), dtype=torch.float64)).sample()
    for chi_square in (by_quantile, by_gamma):
        noise = sigma * heavy_tailed(n, chi_square, aug_dim)
        R = noise.flatten(1).norm(dim=1).numpy()
        law = scipy.stats.betaprime(N / 2, aug_dim / 2)
        assert scipy.stats.kstest((R / sigma) ** 2 / aug_dim, law.cdf).pvalue > 0.01
        torch.testing.assert_close(noise / noise.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1),
                                   n / n.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1))


def test_chi_square_keeps_both_tails():
    z = torch.tensor([-6.0, -1, 0, 1, 6], dtype=torch.float64)
    expected = [scipy.stats.chi2.ppf(scipy.stats.norm.cdf(v), 5) if v < 3 else
                scipy.stats.chi2.isf(scipy.stats.norm.sf(v), 5) for v in z.tolist()]
    torch.testing.assert_close(chi_square_of(z, 5), torch.tensor(expected, dtype=torch.float64))


def test_pfgmpp_with_many_dimensions_is_edm():
    losses = []
    for loss in (PFGMPPLoss(aug_dim=10 ** 12), EDMLoss()):
        torch.manual_seed(3)
        losses.append(loss(half, uniform_images(4)))
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)


class StudentOracle(LinearOracle):
    """E[x₀|x] for Gaussian data under PFGM++'s noise, a mixture over w = D/χ²_D of Gaussians; by quadrature over w."""

    def __init__(self, aug_dim, nodes=64):
        super().__init__(None, aug_dim=aug_dim)
        shares = (torch.arange(nodes, dtype=torch.float64) + 0.5) / nodes
        self.w = aug_dim / torch.tensor(scipy.stats.chi2.ppf(shares.numpy(), aug_dim))

    def __call__(self, x, sigma, class_labels=None):
        u = dct2(x).flatten(1)
        total = S.flatten() + float(sigma) ** 2 * self.w[:, None]  # [nodes, N]
        logs = -0.5 * (u.square() @ (1 / total).T + total.log().sum(dim=1))
        gain = logs.softmax(dim=1) @ (S.flatten() / total)
        return idct2((gain * u).reshape(x.shape))


def test_pfgmpp_sampler_gives_the_datas_covariance():
    """D = 4, where the prior has heavy tails: exact posterior means, 2000 samples, statistical error 3 % per band.

    The error is of second order (0.13 with 18 steps, 0.027 with 40). EDM's Gaussian prior in place of the
    heavy-tailed one must give too little variance.
    """
    count, net = 2000, StudentOracle(aug_dim=4)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(count, 1, 8, 8, dtype=torch.float64, generator=generator)

    def randn_like(x):
        return torch.randn(x.shape, dtype=x.dtype, generator=generator)

    def errors(samples):
        return dct2(samples).square().mean(dim=(0, 1)) / S - 1

    sample = errors(make_pfgmpp_sampler(net, num_steps=80)(net, latents, None, randn_like))
    assert sample.abs().max() < 0.15 and sample.mean().abs() < 0.02
    gaussian = errors(edm_sampler(net, latents, num_steps=80))
    assert gaussian.mean() < -0.03


def test_pfgmpp_has_the_papers_best_dimensions_by_default():
    assert PFGMPPPrecond(8, 1, model_channels=8, channel_mult=[1], num_blocks=1).aug_dim == PFGMPPLoss().aug_dim == 2048


def test_pfgmpp_refuses_senseless_dimensions():
    for aug_dim in (0, 10 ** 400):
        with pytest.raises(UserError, match='--aug-dim'):
            PFGMPPPrecond(8, 1, aug_dim=aug_dim)


# -- epsilon scaling

class Denoiser(LinearOracle):
    def __init__(self):
        super().__init__(lambda sigma: S / (S + sigma ** 2))


@pytest.fixture
def latents():
    return torch.randn(2, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def test_epsilon_scaling_by_one_is_edm(latents):
    net = Denoiser()
    assert torch.equal(scaled_sampler(net, latents, num_steps=7), edm_sampler(net, latents, num_steps=7))
    assert net.calls == 26


@pytest.mark.parametrize('scale', [(1.01, 1.01), (1.0, 1.05)])
def test_epsilon_scaling_divides_the_noise_in_both_slopes(latents, scale):
    """It equals Heun's rule written out, with the noise (x − D)/σ divided by the step's factor."""
    net, steps = Denoiser(), 5
    sigmas = [(80 ** (1 / 7) + i / (steps - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(steps)] + [0]
    x = latents * 80
    for i in range(steps):
        factor = scale[0] + (scale[1] - scale[0]) * i / (steps - 1)
        eps = (x - net(x, sigmas[i])) / sigmas[i] / factor
        x_next = x + (sigmas[i + 1] - sigmas[i]) * eps
        if sigmas[i + 1]:
            eps_next = (x_next - net(x_next, sigmas[i + 1])) / sigmas[i + 1] / factor
            x_next = x + (sigmas[i + 1] - sigmas[i]) * (eps + eps_next) / 2
        x = x_next
    torch.testing.assert_close(scaled_sampler(net, latents, num_steps=steps, scale=scale), x, rtol=1e-9, atol=1e-9)


def test_epsilon_scaling_starts_pfgmpp_from_its_prior(latents):
    net = Denoiser()
    net.aug_dim = 3
    draws = []

    def randn_like(x):
        draws.append(torch.zeros_like(x))
        return draws[-1]

    out = with_heavy_tails(lambda net, x, *args: scaled_sampler(net, x, num_steps=4))(net, latents, None, randn_like)
    median = scipy.stats.chi2.ppf(0.5, 3)
    assert [d.shape for d in draws] == [(2, 1, 1, 1)]
    torch.testing.assert_close(out, scaled_sampler(net, latents / math.sqrt(median / 3), num_steps=4))


@pytest.mark.parametrize('text, ends', [('1.0006', (1.0006, 1.0006)), ('1.0002:1.001', (1.0002, 1.001))])
def test_parse_scale(text, ends):
    assert parse_scale(text) == ends


@pytest.mark.parametrize('text', ['', 'x', '0', '-1', 'nan', 'inf', '1:2:3', '1:'])
def test_parse_scale_refuses(text):
    with pytest.raises(UserError, match='--epsilon-scale'):
        parse_scale(text)


# -- Soft Diffusion

def soft_error(bnr, num_steps):
    path = ConstantBNR(bnr)
    net = LinearOracle(lambda sigma: clean_gain(soft_bands(path, sigma, 8), S), path=path)
    out = variance(lambda latents, randn_like: soft_sampler(net, latents, None, randn_like, num_steps), num_steps)
    assert net.calls == num_steps
    return worst(out, S)


@pytest.mark.parametrize('bnr', [0, 0.5, 2])
def test_soft_sampler_is_first_order(bnr):
    """The covariance tends to the data's, with blur as without; its error halves with the step."""
    coarse, fine = soft_error(bnr, 100), soft_error(bnr, 200)
    assert 1.9 < coarse / fine < 2.2
    assert fine < 0.07


def test_soft_step_by_its_formula():
    x, x0, z = torch.randn(3, 1, 1, 8, 8, dtype=torch.float64)
    step = momentum_step(x, x0, number(1.5), 3.0, number(0.5), 1.0, z)
    blurred, blurred_next = blur(x0, 1.5), blur(x0, 0.5)
    torch.testing.assert_close(
        step, x + blurred_next - blurred + (9 - 1) / 9 * (blurred - x) + math.sqrt(9 - 1) * z)


def test_softs_last_step_returns_the_prediction(latents):
    """Without noise, from whatever state: here 0."""
    net = LinearOracle(lambda sigma: torch.zeros(8, 8), path=ConstantBNR(0.5))
    torch.testing.assert_close(soft_sampler(net, latents, num_steps=3, sigma_min=1), torch.zeros_like(latents))


class Wrong:
    """A network for losses that is off by σ·wrong."""

    path = ConstantBNR(50.0)

    def __init__(self, images, wrong):
        self.images, self.wrong = images, wrong

    def __call__(self, x, sigma, labels=None, augment_labels=None):
        return self.images + sigma * self.wrong


@pytest.mark.parametrize('sigma', [1.0, 3.0])
@pytest.mark.parametrize('k, cost', [(0, 1.0), (7, 0.0)])
def test_soft_loss_sees_what_the_blur_leaves(k, cost, sigma):
    """A wrong detail far beyond the blur costs nothing, a wrong mean costs its square over σ²."""
    images, bands = uniform_images(2), torch.zeros(8, 8, dtype=torch.float64)
    bands[k, k] = 1
    loss = SoftLoss(P_mean=math.log(sigma), P_std=0)(Wrong(images, idct2(bands).float()), images)
    torch.testing.assert_close(loss.sum(dim=(1, 2, 3)), torch.full([2], cost), atol=1e-5, rtol=0)


def test_soft_network_is_its_input_plus_a_correction():
    net = SoftPrecond(8, 1, model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[])
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        F = net.run_model(x / np.sqrt(4.25), torch.tensor([2.0]).log() / 4)
        torch.testing.assert_close(net(x, 2.0), x + 2 * F)


# -- all of these reduce to EDM's marginal

def test_soft_without_blur_has_edms_marginal():
    x0, eps = torch.randn(2, 1, 1, 8, 8, dtype=torch.float64)
    at = soft_bands(ConstantBNR(0), number(2.0), 8)
    assert isinstance(at, Bands)
    torch.testing.assert_close(diffuse(x0, eps, at), x0 + 2 * eps)


def test_stf_samples_as_edm(latents):
    """Nothing of STF is left at sampling; the registry gives it EDM's sampler."""
    net = Denoiser()
    assert torch.equal(SYSTEMS['stf'].make_sampler(net, {'num_steps': 5})(latents),
                       edm_sampler(net, latents, num_steps=5))
    assert torch.equal(SYSTEMS['edm'].make_sampler(net, {'num_steps': 5, 'solver': 'euler'})(latents),
                       ablation_sampler(net, latents, num_steps=5, solver='euler'))
