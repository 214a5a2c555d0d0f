"""Noise levels: constants and formulas of the VP, VE, iDDPM and EDM processes, and a sampler's choices about time.

Karras et al. 2022, table 1 and appendix C. The choices (noise schedule σ(t), signal scaling s(t), discretisation) take
and return float64 tensors on the CPU.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from dnnlib import UserError

NUM_STEPS, SIGMA_MIN, SIGMA_MAX, RHO = 18, 0.002, 80, 7  # EDM's time grid (Karras et al. 2022, Table 1)
SOLVER = 'heun'  # EDM's, and the paper's
VP_BETA_D, VP_BETA_MIN, VP_EPSILON_T = 19.9, 0.1, 1e-5
VE_SIGMA_MIN, VE_SIGMA_MAX = 0.02, 100
IDDPM_C_1, IDDPM_C_2, IDDPM_M = 0.001, 0.008, 1000


# -- the processes that networks are trained on

def vp_sigma(t, beta_d=VP_BETA_D, beta_min=VP_BETA_MIN):
    """Noise level of the VP process at time t (a tensor, 0…1): σ(t) = √(e^{β_d t²/2 + β_min t} − 1).

    With expm1 and log1p, which networks and losses need in float32; samplers use `vp_schedule`, which must do
    without.
    """
    return torch.expm1(0.5 * beta_d * t ** 2 + beta_min * t).sqrt()


def vp_sigma_inv(sigma, beta_d=VP_BETA_D, beta_min=VP_BETA_MIN):
    """Time at which the VP process reaches noise level σ (a tensor): the inverse of `vp_sigma`."""
    return ((beta_min ** 2 + 2 * beta_d * torch.log1p(sigma ** 2)).sqrt() - beta_min) / beta_d


def iddpm_noise_levels(C_1, C_2, M, dtype=torch.float32):
    """iDDPM's noise levels u_0 > … > u_M = 0, [M + 1] on the CPU (Karras et al. 2022, Table 1).

    u_{j−1} = √((u_j² + 1) / max(ᾱ_{j−1}/ᾱ_j, C_1) − 1) in `dtype`, ᾱ_j = sin²(½π·j/M/(C_2 + 1)). The ratios of ᾱ are
    in float32 whatever the dtype, as in iDDPM's training.
    """
    j = torch.arange(M + 1, dtype=torch.float32, device='cpu')
    alpha_bar = (0.5 * torch.pi * j / M / (C_2 + 1)).sin() ** 2
    ratio = (alpha_bar[:-1] / alpha_bar[1:]).clamp(min=C_1).to(dtype)
    u = torch.zeros(M + 1, dtype=dtype, device='cpu')
    for i in range(M, 0, -1):
        u[i - 1] = ((u[i] ** 2 + 1) / ratio[i - 1] - 1).sqrt()
    return u


# -- noise schedules σ(t)

class Schedule(NamedTuple):
    """σ(t), its derivative dσ/dt and its inverse t(σ)."""

    sigma: Callable
    sigma_deriv: Callable
    sigma_inv: Callable


def vp_schedule(beta_d, beta_min):
    """σ(t) = √(exp(½β_d t² + β_min t) − 1).

    Not written with expm1 and log1p: σ⁻¹(σ(t)) differs from t by round-off, the square root of which
    determines how much noise a step without churn adds, and the recorded samples contain that noise.
    """
    def sigma(t):
        return ((0.5 * beta_d * t ** 2 + beta_min * t).exp() - 1).sqrt()

    def sigma_deriv(t):
        return 0.5 * (beta_min + beta_d * t) * (sigma(t) + 1 / sigma(t))

    def sigma_inv(sigma):
        return ((beta_min ** 2 + 2 * beta_d * (sigma ** 2 + 1).log()).sqrt() - beta_min) / beta_d

    return Schedule(sigma, sigma_deriv, sigma_inv)


def fitted_vp_schedule(sigma_min, sigma_max, epsilon_s):
    """The VP schedule with σ(epsilon_s) = sigma_min and σ(1) = sigma_max."""
    log_min, log_max = math.log(sigma_min ** 2 + 1), math.log(sigma_max ** 2 + 1)
    beta_d = 2 * (log_min / epsilon_s - log_max) / (epsilon_s - 1)
    return vp_schedule(beta_d, log_max - 0.5 * beta_d)


def ve_schedule(*_):
    """σ(t) = √t."""
    return Schedule(lambda t: t.sqrt(), lambda t: 0.5 / t.sqrt(), lambda sigma: sigma ** 2)


def linear_schedule(*_):
    """σ(t) = t."""
    return Schedule(lambda t: t, lambda t: torch.ones_like(t), lambda sigma: sigma)


# Each makes a Schedule from the floats (sigma_min, sigma_max, epsilon_s).
SCHEDULES = {'vp': fitted_vp_schedule, 've': ve_schedule, 'linear': linear_schedule}


# -- signal scalings s(t)

class Scaling(NamedTuple):
    """s as a function of σ, and ds/dt as one of (σ, dσ/dt)."""

    s: Callable
    s_deriv: Callable


SCALINGS = {
    # Data of variance 1, plus noise, keep variance 1.
    'vp': Scaling(lambda sigma: 1 / (1 + sigma ** 2).sqrt(),
                  lambda sigma, sigma_deriv: -sigma * sigma_deriv / (1 + sigma ** 2) ** 1.5),
    'none': Scaling(torch.ones_like, lambda sigma, sigma_deriv: torch.zeros_like(sigma)),
}


# -- discretisations: noise levels decreasing from sigma_max to sigma_min, without the final 0

class Discretization(NamedTuple):
    """How the noise levels are spaced, and over which range by default.

    `levels`(num_steps, sigma_min, sigma_max, *, rho, epsilon_s, C_1, C_2, M) → [num_steps], each using
    what it needs; `default_range`(epsilon_s) → floats (sigma_min, sigma_max).
    """

    levels: Callable
    default_range: Callable


def _fractions(num_steps):
    """num_steps evenly spaced numbers from 0 to 1; a single one is 0."""
    return torch.arange(num_steps, dtype=torch.float64) / max(num_steps - 1, 1)


def edm_sigmas(num_steps, sigma_min, sigma_max, *, rho, **_):
    """Evenly spaced in σ^(1/rho) (equation 5)."""
    try:
        high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    except OverflowError as e:
        raise UserError(f'rho is {rho}, too small for noise levels up to {sigma_max:g}; give a larger one') from e
    return (high + _fractions(num_steps) * (low - high)) ** rho


def vp_sigmas(num_steps, sigma_min, sigma_max, *, epsilon_s, **_):
    """Evenly spaced in the time of the VP schedule, from 1 to epsilon_s."""
    schedule = fitted_vp_schedule(sigma_min, sigma_max, epsilon_s)
    return schedule.sigma(1 + _fractions(num_steps) * (epsilon_s - 1))


def ve_sigmas(num_steps, sigma_min, sigma_max, **_):
    """Evenly spaced in ln σ."""
    return sigma_max * (sigma_min / sigma_max) ** _fractions(num_steps)


def iddpm_sigmas(num_steps, sigma_min, sigma_max, *, C_1, C_2, M, **_):
    """Chosen at even intervals from those of iDDPM's levels u_0…u_M that lie between sigma_min and sigma_max.

    Raises:
        UserError: no level is in the range.
    """
    kept = [u for u in iddpm_noise_levels(C_1, C_2, M, torch.float64).tolist() if sigma_min <= u <= sigma_max]
    if not kept:
        raise UserError(f'none of the {M} noise levels of iDDPM lies between sigma_min {sigma_min} and '
                        f'sigma_max {sigma_max}; widen the range')
    chosen = [round((len(kept) - 1) * i / max(num_steps - 1, 1)) for i in range(num_steps)]
    return torch.tensor([kept[j] for j in chosen], dtype=torch.float64)


def _vp_range(epsilon_s):
    """σ(epsilon_s)…σ(1) of the VP model of Song et al. 2021."""
    ends = vp_schedule(VP_BETA_D, VP_BETA_MIN).sigma(torch.tensor([epsilon_s, 1], dtype=torch.float64))
    return tuple(ends.tolist())


DISCRETIZATIONS = {
    'vp': Discretization(vp_sigmas, _vp_range),
    've': Discretization(ve_sigmas, lambda epsilon_s: (VE_SIGMA_MIN, VE_SIGMA_MAX)),
    'iddpm': Discretization(iddpm_sigmas, lambda epsilon_s: (0.002, 81.0)),
    'edm': Discretization(edm_sigmas, lambda epsilon_s: (SIGMA_MIN, SIGMA_MAX)),
}
