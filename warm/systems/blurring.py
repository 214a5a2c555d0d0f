"""Blurring Diffusion (Hoogeboom and Salimans, ICLR 2023): blur and white noise, ε-prediction, ancestral sampling.

At time t ∈ [0, 1] the signal's scale is a_t·d_t, with d_t = (1−d_min) exp(−λτ_t) + d_min and τ = σ_B²/2; the noise's
scale s_t is the same in all bands (Eq. 25–27). --sigma-blur-max=0 gives d = 1: the paper's Denoising Diffusion, a DDPM
with cosine schedule.

What the paper leaves open, and our choice:
- Algorithm 1's loop runs over t = 1, …, 1/T, and in A.1 `dissipation_time` is the blur's σ_B²/2: both are misprinted.
- The text clips the log-SNR to ±10, the pseudo-code of A.1 rescales it; we follow the pseudo-code. a_t and s_t are
  then the cos and sin of one angle, while the blur keeps the plain sin²(πt/2).
- To guard divisions, A.1 adds δ = 1e-8 in one coefficient and clips in the others; so do we (`warm.bands.posterior`).
  With exact predictions at T = 1000, this costs 1.8 % of the samples' variance in the lowest band and about half of
  that in the average one, growing with T²; `delta=0` of `blurring_sampler` turns it off.
- The time embedding is not described: we feed 1000·t to the U-Net's embedding, the range of DDPM's.
- x̂₀ is not clipped (the authors have no way of doing so either), and the last state is returned as it is: it still
  contains noise of s_0 = 0.0067, below one grey level.
- The closest match to their U-Net for CIFAR-10 (256 channels at all of 32, 16, 8; 3 blocks; dropout 0.2) is
  --arch=ddpmpp --cbase=256 --cres=1,1,1 --dropout=0.2 --batch=128 --lr=2e-4 --lr-rampup=0
  --augment=0 (no warm-up of the learning rate is mentioned).
"""

import dataclasses
import functools
import math

import click
import torch

from dnnlib import UserError, chosen
from torch_utils.distributed import unwrapped
from training.loss import augment
from training.precond import Precond
from training.samplers import check_steps, evaluate
from training.system import Option, System
from warm.bands import MAX_BLUR, Bands, ancestral_noise_step, diffuse
from warm.blur import blur_mask

NUM_STEPS = 1000
LOGSNR_MAX = 10
DELTA = 1e-8
# σ_B/σ_B,max at time t (Eq. 25 and Table 4).
BLUR_SCHEDULES = {
    'sin2': lambda t: torch.sin(math.pi / 2 * t).square(),
    'sin': lambda t: torch.sin(math.pi / 2 * t),
}


@dataclasses.dataclass(frozen=True)
class BlurringProcess:
    """The forward process.

    Attributes:
        sigma_blur_max: Blur at t = 1, in pixels.
        blur_schedule: A name in BLUR_SCHEDULES.
        d_min: Smallest factor by which the blur scales a band.
    """

    sigma_blur_max: float = 20.0
    blur_schedule: str = 'sin2'
    d_min: float = 0.001

    def __post_init__(self):
        if not 0 <= self.sigma_blur_max <= MAX_BLUR:
            raise UserError(f'--sigma-blur-max={self.sigma_blur_max} is not a valid blur; give a number of pixels from '
                            f'0 to {MAX_BLUR}')
        chosen('--blur-schedule', self.blur_schedule, BLUR_SCHEDULES)
        if not 0 < self.d_min <= 1:
            raise UserError(f'--d-min={self.d_min} must be above 0 and at most 1, since sampling divides by it')

    def at(self, t, n):
        """`Bands` of N×N images at time t, a float64 tensor ([] or [B, 1, 1, 1]) in 0…1 on their device."""
        margin = math.atan(math.exp(-LOGSNR_MAX / 2))
        angle = margin + (math.pi / 2 - 2 * margin) * t  # logSNR = −2 ln tan(angle), so a = cos(angle), s = sin(angle)
        alpha = self.sigma_blur_max * BLUR_SCHEDULES[self.blur_schedule](t)
        d = (1 - self.d_min) * blur_mask(alpha, n) + self.d_min
        return Bands(angle.cos().log() + d.log(), angle.sin())


class BlurringPrecond(Precond):
    """ε̂ = net(z_t, t): the second argument, σ in other networks, is the time t in 0…1.

    Args:
        sigma_blur_max, blur_schedule, d_min: See `BlurringProcess`.
    """

    def __init__(self, *args, sigma_blur_max=BlurringProcess.sigma_blur_max,
                 blur_schedule=BlurringProcess.blur_schedule, d_min=BlurringProcess.d_min, **network):
        constants = dict(sigma_blur_max=sigma_blur_max, blur_schedule=blur_schedule, d_min=d_min)
        process = BlurringProcess(**constants)
        super().__init__(constants, 0, 1, 1, *args, **network)
        self.process = process

    def scalings(self, sigma):
        return 0, 1, 1, 1000 * sigma


def blurring_loss(net, images, labels=None, augment_pipe=None):
    """Unweighted (ε̂ − ε)², t uniform (Eq. 24); `net` may be wrapped. Draws t [B, 1, 1, 1], augmentation, ε."""
    process = unwrapped(net).process
    t = torch.rand([len(images), 1, 1, 1], device=images.device)
    y, augment_labels = augment(images, augment_pipe)
    eps = torch.randn_like(y)
    z_t = diffuse(y, eps, process.at(t.to(torch.float64), y.shape[-1]))
    return (net(z_t, t, labels, augment_labels=augment_labels) - eps) ** 2


def blurring_sampler(net, latents, class_labels=None, randn_like=torch.randn_like, num_steps=NUM_STEPS, delta=DELTA):
    """Ancestral sampling at t = 1, 1 − 1/T, …, 1/T (Algorithm 1, Eq. 18 and 23, guards of A.1).

    Args:
        net: ε-predictor with a `process`.
        latents: Standard normal [B, C, N, N].
        class_labels: [B, label_dim], or None.
        randn_like: Source of the noise, called once per step.
        num_steps: T, also the number of network evaluations.
        delta: δ of A.1, which guards divisions.

    Returns:
        float64 images [B, C, N, N].
    """
    x = latents.to(torch.float64)
    for i in range(num_steps, 0, -1):
        here, there = (net.process.at(x.new_full([], j / num_steps), x.shape[-1]) for j in (i, i - 1))
        eps = evaluate(net, x, i / num_steps, class_labels)
        x = ancestral_noise_step(x, eps, here, there, randn_like(x), delta)
    return x


def make_blurring_sampler(net, num_steps=NUM_STEPS):
    """`blurring_sampler` with its options checked."""
    check_steps(num_steps)
    return functools.partial(blurring_sampler, num_steps=num_steps)


BLURRING = System(
    name='blurring',
    title='Blurring Diffusion',
    paper='Hoogeboom and Salimans 2023',
    network_class=BlurringPrecond,
    loss=lambda net: blurring_loss,
    sampler=make_blurring_sampler,
    sample_options=('num_steps',),
    network_options=(
        Option('sigma_blur_max', BlurringProcess.sigma_blur_max, "Blur at t = 1, in pixels; 0 is the paper's DDPM",
               type=float),
        Option('blur_schedule', BlurringProcess.blur_schedule, 'How the blur rises with time',
               type=click.Choice(list(BLUR_SCHEDULES))),
        Option('d_min', BlurringProcess.d_min, 'Smallest factor by which the blur scales a band', type=float),
    ),
    predicts_images=False,
)
