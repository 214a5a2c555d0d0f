"""Soft Diffusion (Daras, Delbracio, Talebi, Dimakis and Milanfar, 2022): blur and noise, momentum sampler.

x = C x₀ + σε with C = V M_α Vᵀ. The network predicts the clean image as its input plus a correction, and only needs
to be right where the corruption left something: the loss compares C x̂₀ with C x₀. The sampler's step is

    x′ = x + (C′ − C) x̂₀ + (σ²−σ′²)/σ²·(C x̂₀ − x) + √(σ²−σ′²) z.

The paper itself was not available, so these are ours:
- The schedule of blur and noise: Warm's constant BNR, α = BNR·σ, over EDM's noise levels in training and EDM's grid
  in sampling. The step above was checked on the Gaussian oracle: it converges to the data's covariance, at first order.
- The correction is σ·F with EDM's c_in and ln(σ)/4, so that F has unit scale where noise dominates; the loss is
  weighted by 1/σ², as for VP and VE, which gives it unit scale there.
- The last step (σ′ = 0) adds no noise z: it returns x̂₀.
- 200 steps: on the oracle the covariance is then within 7 % (EDM's 18 steps are for second-order solvers).
"""

import dataclasses
import functools
import math

import torch

from torch_utils.distributed import unwrapped
from training.loss import P_MEAN, P_STD, augment, sample_edm_sigma
from training.precond import SIGMA_DATA, Precond, edm_scalings
from training.samplers import edm_sigma_steps, evaluate
from training.schedules import RHO, SIGMA_MAX, SIGMA_MIN
from training.system import GRID_OPTIONS, Option, System
from warm.bands import Bands, diffuse
from warm.blur import blur, blur_mask, dct2, idct2, log_blur_mask, mask_difference
from warm.path import PAPER_BNR, ConstantBNR
from warm.samplers import grid_options

NUM_STEPS = 200


class SoftPrecond(Precond):
    """x̂₀ = net(x, σ) = x + σ·F(c_in·x; ln(σ)/4).

    Args:
        sigma_min, sigma_max: Supported noise levels.
        sigma_data: Standard deviation of the data.
        soft_bnr: Pixels of blur per unit of noise.
    """

    def __init__(self, *args, sigma_min=0, sigma_max=float('inf'), sigma_data=SIGMA_DATA, soft_bnr=PAPER_BNR,
                 **network):
        path = ConstantBNR(soft_bnr)
        super().__init__(dict(sigma_min=sigma_min, sigma_max=sigma_max, sigma_data=sigma_data, soft_bnr=soft_bnr),
                         sigma_min, sigma_max, 1, *args, **network)
        self.path = path

    def scalings(self, sigma):
        _, _, c_in, c_noise = edm_scalings(sigma, self.sigma_data)
        return 1, sigma, c_in, c_noise


def soft_bands(path, sigma, n):
    """`Bands` of N×N images at noise level σ, a float64 tensor ([] or [B, 1, 1, 1])."""
    return Bands(log_blur_mask(path.alpha(sigma), n), sigma)


@dataclasses.dataclass
class SoftLoss:
    """(C x̂₀ − C x₀)²/σ², ln σ ~ N(P_mean, P_std²). Draws σ's variate [B, 1, 1, 1], the augmentation, the noise."""

    P_mean: float = P_MEAN
    P_std: float = P_STD

    def __call__(self, net, images, labels=None, augment_pipe=None):
        """Loss of each element, float32 like `images` [B, C, N, N] in [−1, 1]; `net` may be wrapped in DDP."""
        path = unwrapped(net).path
        sigma = sample_edm_sigma(len(images), images.device, self.P_mean, self.P_std)
        y, augment_labels = augment(images, augment_pipe)
        x = diffuse(y, torch.randn_like(y), soft_bands(path, sigma.to(torch.float64), y.shape[-1]))
        clean = net(x, sigma, labels, augment_labels=augment_labels)
        return (blur(clean - y, path.alpha(sigma)) / sigma) ** 2


def momentum_step(x, x0, alpha, sigma, alpha_next, sigma_next, z=None):
    """The sampler's step (see the top) from (α, σ) to (α′, σ′).

    Args:
        x: State [B, C, N, N], in the units of images in [−1, 1] plus noise.
        x0: The network's x̂₀, shaped like x.
        alpha, alpha_next: Blurs α and α′ in pixels, ≥ 0: 0-d float64 tensors on x's device.
        sigma, sigma_next: Noise levels, 0 ≤ σ′ < σ, as numbers in the units of x. They are not checked: the grid
            descends.
        z: Standard normal noise shaped like x; None adds no noise.

    Returns:
        The next state, float64 [B, C, N, N].
    """
    n, share = x.shape[-1], 1 - (sigma_next / sigma) ** 2
    u, clean = dct2(x), dct2(x0)
    u = u + mask_difference(alpha, alpha_next, n) * clean + share * (blur_mask(alpha, n) * clean - u)
    return idct2(u if z is None else u + math.sqrt(sigma ** 2 - sigma_next ** 2) * dct2(z))


def soft_sampler(net, latents, class_labels=None, randn_like=torch.randn_like, num_steps=NUM_STEPS,
                 sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX, rho=RHO):
    """Momentum sampling on EDM's grid, one evaluation per step.

    Args:
        net: x̂₀-predictor with a `path`.
        latents, class_labels, num_steps, sigma_min, sigma_max, rho: As in training.samplers.edm_sampler.
        randn_like: Source of the noise, called once per step.

    Returns:
        float64 images [B, C, N, N].
    """
    sigmas = edm_sigma_steps(num_steps, sigma_min, sigma_max, rho, net).tolist()
    x = latents.to(torch.float64) * sigmas[0]
    for sigma, sigma_next in zip(sigmas, sigmas[1:]):
        alpha, alpha_next = (x.new_full([], net.path.alpha(s)) for s in (sigma, sigma_next))
        z = randn_like(x)
        x = momentum_step(x, evaluate(net, x, sigma, class_labels), alpha, sigma, alpha_next, sigma_next,
                          z if sigma_next else None)
    return x


def make_soft_sampler(net, **options):
    """`soft_sampler` with its options checked."""
    return functools.partial(soft_sampler, **grid_options(net, {'num_steps': NUM_STEPS, **options}))


SOFT = System(
    name='soft',
    title='Soft Diffusion',
    paper='Daras et al. 2022',
    network_class=SoftPrecond,
    loss=lambda net: SoftLoss(),
    sampler=make_soft_sampler,
    sample_options=GRID_OPTIONS,
    network_options=(
        Option('soft_bnr', PAPER_BNR, 'Blur-to-Noise Ratio of Soft Diffusion', type=float),
    ),
)
