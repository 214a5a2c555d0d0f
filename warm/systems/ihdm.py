"""IHDM, generative modelling with inverse heat dissipation (Rissanen, Heinonen and Solin, 2022; ICLR 2023).

Images in [0, 1] are blurred over levels k = 0 … K, with noise of σ = 0.01 on the network's input only. The network
learns to predict the previous level, without noise, as its input plus a correction, with a plain squared error.
Sampling adds noise of δ = 0.0125 after each level; the result is the last mean.

As a member of the family (`warm.bands`) it has a_k = exp(−λα_k²/2) and s = σ, but its sampler is not the one that would
follow from these: its noise is the same at all levels and in all bands. Even with exact predictions the samples do not
have the data's covariance (tests/test_family_cold.py measures this); Section 3 of Blurring Diffusion is about that.

Notes:
- Sampling starts from blurred training images, without noise (as in the authors' code): the prior comes from the
  training set, and so does part of every score.
- Levels: 0, then 200 from 0.5 to 24 pixels, evenly spaced in the logarithm (CIFAR-10). There is no --steps, since the
  network only goes from each level to the one before.
- k goes into the U-Net's embedding unscaled. Their network for CIFAR-10: 128 channels at 32×32, 256 at 16, 8 and 4,
  4 blocks per resolution: --arch=ddpmpp --cbase=128 --cres=1,2,2,2 --augment=0.
"""

import dataclasses
import functools
import math

import torch

from dnnlib import UserError
from torch_utils.constants import constant
from torch_utils.distributed import unwrapped
from training.loss import augment
from training.precond import Precond
from training.samplers import evaluate
from training.system import Option, System
from warm.bands import MAX_BLUR, MAX_LEVELS, Bands, diffuse, spread_blurs
from warm.blur import blur, log_blur_mask
from warm.starts import BLURRED_IMAGES, DATA, TrainingImages

DELTA = 0.0125


@dataclasses.dataclass(frozen=True)
class HeatLevels:
    """The levels of blur.

    Attributes:
        num_levels: K.
        blur_min, blur_max: Blur at levels 1 and K, in pixels.
        noise: σ, for images in [0, 1].
    """

    num_levels: int = 200
    blur_min: float = 0.5
    blur_max: float = 24.0
    noise: float = 0.01

    def __post_init__(self):
        if not 2 <= self.num_levels <= MAX_LEVELS:
            raise UserError(f'--ihdm-levels={self.num_levels} is too few or too many; give 2 to {MAX_LEVELS}')
        if not self.blur_min < self.blur_max <= MAX_BLUR:
            raise UserError(f'--ihdm-blur-max={self.blur_max} must be more than the {self.blur_min:g} pixels of the '
                            f'first level, and at most {MAX_BLUR}')

    @constant
    def alphas(self, device=torch.device('cpu')):
        """Blur in pixels of levels 0 … K, float64."""
        return spread_blurs(self.blur_min, self.blur_max, self.num_levels).to(device)

    def alpha(self, k):
        """Blur in pixels at levels k, an integer tensor; same shape and device."""
        return self.alphas(k.device).take(k)

    def at(self, k, n):
        """`Bands` of N×N images at levels k ([] or [B, 1, 1, 1])."""
        alpha = self.alpha(k)
        return Bands(log_blur_mask(alpha, n), torch.full_like(alpha, self.noise))


class IHDMPrecond(Precond):
    """Level k − 1 from level k: net(u_k, k) = u_k + F(u_k, k), in units of [0, 1]; k takes the place of σ.

    Args:
        ihdm_levels, ihdm_blur_max: `HeatLevels`' num_levels and blur_max.
    """

    def __init__(self, *args, ihdm_levels=HeatLevels.num_levels, ihdm_blur_max=HeatLevels.blur_max, **network):
        process = HeatLevels(num_levels=ihdm_levels, blur_max=ihdm_blur_max)
        super().__init__(dict(ihdm_levels=ihdm_levels, ihdm_blur_max=ihdm_blur_max), 1, ihdm_levels, 1,
                         *args, **network)
        self.process = process

    def scalings(self, sigma):
        return 1, 1, 1, sigma


def ihdm_loss(net, images, labels=None, augment_pipe=None):
    """(net(blurred + noise, k) − image at level k − 1)², k uniform in 1…K, in units of [0, 1]; `net` may be wrapped.

    Draws k [B, 1, 1, 1], the augmentation, the noise.
    """
    process = unwrapped(net).process
    k = torch.randint(1, process.num_levels + 1, [len(images), 1, 1, 1], device=images.device)
    y, augment_labels = augment(images, augment_pipe)
    u = (y + 1) / 2
    u_k = diffuse(u, torch.randn_like(u), process.at(k, u.shape[-1]))
    return (net(u_k, k, labels, augment_labels=augment_labels) - blur(u, process.alpha(k - 1))) ** 2


def ihdm_sampler(net, latents, class_labels=None, randn_like=torch.randn_like, images=None, delta=DELTA):
    """Sample from blurred training images at level K down to level 0, one evaluation per level.

    Args:
        net: Predictor of the previous level with a `process`.
        latents: [B, C, N, N]; only its shape and device matter.
        class_labels: [B, label_dim], or None.
        randn_like: Source of the noise, called once for the start and once per level.
        images: `TrainingImages` to start from.
        delta: Standard deviation of the noise added after each level, for images in [0, 1].

    Returns:
        float64 images [B, C, N, N] in [−1, 1].
    """
    process = net.process
    u = (images.draw(latents, class_labels, randn_like) + 1) / 2
    u = blur(u, process.alphas()[-1].item())
    for k in range(process.num_levels, 0, -1):
        mean = evaluate(net, u, k, class_labels)
        u = mean + delta * randn_like(u)
    return 2 * mean - 1


def make_ihdm_sampler(net, data=None, ihdm_delta=DELTA):
    """`ihdm_sampler` with its options checked."""
    if not (math.isfinite(ihdm_delta) and ihdm_delta >= 0):
        raise UserError(f'--ihdm-delta={ihdm_delta} is not a valid noise level; give a number ≥ 0, such as {DELTA}')
    return functools.partial(ihdm_sampler, images=TrainingImages(data, net), delta=ihdm_delta)


IHDM = System(
    name='ihdm',
    title='IHDM',
    paper='Rissanen et al. 2022',
    network_class=IHDMPrecond,
    loss=lambda net: ihdm_loss,
    sampler=make_ihdm_sampler,
    sample_options=(),
    describe=lambda net, options: {'prior': BLURRED_IMAGES},
    own_sample_options=(
        DATA,
        Option('ihdm_delta', DELTA, "IHDM's noise in sampling, for images in [0, 1]", type=float),
    ),
    network_options=(
        Option('ihdm_levels', HeatLevels.num_levels, 'Number of blur levels', type=int),
        Option('ihdm_blur_max', HeatLevels.blur_max, 'Blur of the last level, in pixels', type=float),
    ),
    predicts_images=False,
)
