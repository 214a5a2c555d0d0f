"""EDM-ES, epsilon scaling (Ning et al. 2023): in sampling, the predicted noise is divided by a factor just above 1.

A network meets its own errors only in sampling, where its predicted noise (x − D)/σ then comes out slightly too large.
Nothing is retrained: this is an option of the samplers of EDM-like systems, applied to both slopes of Heun's step.

What is ours: the value. The published ones for CIFAR-10 at 35 evaluations are near 1.0006, and 1.0002 to 1.001 is
the range worth scanning; there is no default. A factor that changes linearly over the steps is given by its two ends.
Churn and the ablation sampler cannot be combined with it.
"""

import dataclasses
import functools
import math

import torch

from dnnlib import UserError
from training.samplers import edm_sigma_steps, evaluate, heun_step
from training.schedules import NUM_STEPS, RHO, SIGMA_MAX, SIGMA_MIN
from training.system import GRID_OPTIONS, Option, flag_of
from warm.samplers import grid_options

EPSILON_SCALE = Option('epsilon_scale', None, 'Epsilon scaling: divide the predicted noise by this, such as 1.0006, '
                                              'or 1.0002:1.001 from the first to the last step', shown='none')


def parse_scale(text):
    """(first, last) factor from '1.0006' or '1.0002:1.001'.

    Raises:
        UserError: not one or two positive numbers.
    """
    try:
        ends = [float(part) for part in str(text).split(':')]
    except ValueError:
        ends = []
    if len(ends) not in (1, 2) or not all(math.isfinite(f) and f > 0 for f in ends):
        raise UserError(f"--epsilon-scale={text} is not a factor; give one such as 1.0006, or the first and the last "
                        'such as 1.0002:1.001')
    return ends[0], ends[-1]


def scaled_sampler(net, latents, class_labels=None, randn_like=torch.randn_like, num_steps=NUM_STEPS,
                   sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX, rho=RHO, scale=(1, 1)):
    """EDM's deterministic sampler with the slope (x − D)/(σ·factor).

    Args:
        net, latents, class_labels, num_steps, sigma_min, sigma_max, rho: As in training.samplers.edm_sampler.
        randn_like: Not used; no noise is drawn.
        scale: Factors of the first and the last step, linear in between; both slopes of a step have the same.

    Returns:
        float64 images [B, C, H, W].
    """
    sigmas = edm_sigma_steps(num_steps, sigma_min, sigma_max, rho, net).tolist()
    factors = torch.linspace(*scale, num_steps, dtype=torch.float64).tolist()
    x = latents.to(torch.float64) * sigmas[0]
    for sigma, sigma_next, factor in zip(sigmas, sigmas[1:], factors):
        def slope(x, t, factor=factor):
            return (x - evaluate(net, x, t, class_labels)) / t / factor
        x = heun_step(slope, x, sigma, sigma_next)
    return x


def with_epsilon_scaling(system, around=lambda sampler: sampler):
    """A copy of `system` whose sampler also takes --epsilon-scale.

    Args:
        system: A System whose network is an EDM-like denoiser D(x; σ).
        around: around(sampler) → sampler, to wrap the sampler, for example to start it from another prior.
    """
    def sampler(net, epsilon_scale=None, **options):
        if epsilon_scale is None:
            return system.sampler(net, **options)
        for name in options:
            if name not in GRID_OPTIONS:
                raise UserError(f'--epsilon-scale does not go with {flag_of(name)}; leave one of them out')
        return around(functools.partial(scaled_sampler, scale=parse_scale(epsilon_scale),
                                        **grid_options(net, options)))
    return dataclasses.replace(system, sampler=sampler,
                               own_sample_options=(*system.own_sample_options, EPSILON_SCALE))
