"""Samplers along a path through the (α, β) plane: Euler, Heun, per-frequency DPM-Solver++(2M), stochastic.

The deterministic limit of Eq. 4 is the probability-flow ODE of the process:

    dx/dβ = (x − D)/β + V [Ṁ/(1−M)] Vᵀ R.

Unprimed symbols belong to the present level (α, β), primed ones to the next. Grid, churn and NFE are EDM's
(training.samplers); at BNR 0 every step here does the same arithmetic as EDM's sampler, without a DCT.
To add a solver: one function `step(denoise, x, D, R, here, there, memory)` and one line in SOLVERS.
"""

import dataclasses
import inspect
import math

import torch

from dnnlib import UserError
from training.samplers import check_churn, churned, edm_sigma_steps, rounded
from warm.blur import blur_mask, dct2, filter_bands, idct2, log_mask_ratio, mask_difference, rest_mask
from warm.path import ConstantBNR


@dataclasses.dataclass(frozen=True)
class Level:
    """A point of a path.

    alpha: Blur in pixels: a number, or a 0-d tensor on the device of the images, which spares it a copy.
    beta: Noise level, a float, so that nothing is read back from the device.
    hot: Whether the path has no blur at all.
    """

    alpha: float | torch.Tensor
    beta: float
    hot: bool = False


def blur_fraction(here, there, n):
    """(M′ − M)/(1 − M) per band [n, n]: the share of the rest R that a step restores (Eq. 4).

    0 at λ = 0, where R has no mean, and at α = 0. Backwards, towards more blur, it is negative.
    """
    missing = rest_mask(here.alpha, n)
    gained = mask_difference(here.alpha, there.alpha, n)
    return torch.where(missing > 0, gained / missing.clamp(min=torch.finfo(missing.dtype).tiny), 0)


def deblur(R, here, there):
    """V [(M′−M)/(1−M)] Vᵀ R: the detail that a step from `here` to `there` adds (Eq. 4, first term)."""
    return filter_bands(R, blur_fraction(here, there, R.shape[-1]))


def transition(x, D, R, here, there, sigma=0, z=None):
    """One step of Eq. 4: x + V [(M′−M)/(1−M)] Vᵀ R + (β − √(β′²−σ²))·(D−x)/β + σz.

    Args:
        x, D, R: State, denoised and rest [B, C, N, N].
        here, there: Levels before and after.
        sigma: The paper's σ_t, 0 ≤ σ ≤ β′; 0 is the deterministic step (Euler, DDIM).
        z: Standard normal noise like x; needed where σ > 0.
    """
    kept = math.sqrt(max(there.beta ** 2 - sigma ** 2, 0))
    x_next = x + (kept - here.beta) * ((x - D) / here.beta)
    if not here.hot:
        x_next = x_next + deblur(R, here, there)
    return x_next if z is None else x_next + sigma * z


def add_churn(x, here, there, z, S_noise=1):
    """Raise the state from `here` to a noisier `there`: x̂ = V (M̂/M) Vᵀ x + V √(β̂² − (M̂/M)² β²) Vᵀ S_noise z (ours).

    Blur rises with the noise, so that the marginal stays exactly that of the path (for S_noise = 1); at BNR 0
    it is EDM's churn.
    """
    if here.hot:
        return x + S_noise * math.sqrt(max(there.beta ** 2 - here.beta ** 2, 0)) * z
    ratio = torch.exp(log_mask_ratio(here.alpha, there.alpha, x.shape[-1]))
    return idct2(ratio * dct2(x) + (there.beta ** 2 - (ratio * here.beta) ** 2).sqrt() * dct2(S_noise * z))


def euler_step(denoise, x, D, R, here, there, memory):
    """First order, one evaluation; DDIM's step (Eq. 4 with σ_t = 0)."""
    return transition(x, D, R, here, there)


def heun_step(denoise, x, D, R, here, there, memory):
    """Second order on any path, two evaluations; the last step is Euler's (the paper's and EDM's solver).

    The corrector averages the noise slopes (x−D)/β and (x′−D′)/β′, and the blur increments
    (M′−M)/(1−M)·R and (M′−M)/(1−M′)·R′.
    """
    x_next = transition(x, D, R, here, there)
    if there.beta == 0:
        return x_next
    D_next, R_next = denoise(x_next, there)
    slope, slope_next = (x - D) / here.beta, (x_next - D_next) / there.beta
    corrected = x + (there.beta - here.beta) * (0.5 * slope + 0.5 * slope_next)
    if here.hot:
        return corrected
    # Seen from the far end the step runs backwards, hence the minus sign.
    return corrected + 0.5 * (deblur(R, here, there) - deblur(R_next, there, here))


def dpmpp2m_step(denoise, x, D, R, here, there, memory):
    """DPM-Solver++(2M) band by band in L = ln(M/β), one evaluation (ours).

    With h = L′ − L: x′ = (β′/β)·x − V M′ expm1(−h) Vᵀ X, X = x̂₀ + h/(2h_old)·(x̂₀ − x̂₀,old).
    The first step has no history (X = x̂₀); the last returns x̂₀.
    """
    clean = D if here.hot else D + R
    if there.beta == 0:
        return clean
    if there.beta == here.beta:  # two levels that the network rounds to one: h would be 0 in the next step's slope
        return x
    n = x.shape[-1]
    h = torch.as_tensor(math.log(here.beta / there.beta), dtype=x.dtype)
    if not here.hot:
        clean, h = dct2(clean), h + log_mask_ratio(here.alpha, there.alpha, n)
    X = clean
    if memory.clean is not None:
        X = clean + h / (2 * memory.h) * (clean - memory.clean)
    memory.clean, memory.h = clean, h
    drift = torch.expm1(-h) * X
    if not here.hot:
        drift = idct2(blur_mask(there.alpha, n) * drift)
    return (there.beta / here.beta) * x - drift


SOLVERS = {'euler': euler_step, 'heun': heun_step, 'dpmpp2m': dpmpp2m_step}


class Memory:
    """What a multistep solver carries from step to step."""

    def __init__(self):
        self.clean, self.h = None, None


def sampling_path(net, path=None):
    """The path to sample `net` along: `path`, else the one it was trained on, else (an EDM network) BNR 0."""
    if path is not None:
        return path
    family = getattr(net, 'family', None)
    return family.default if family is not None else ConstantBNR(0)


def make_denoiser(net, class_labels=None):
    """denoise(x, level) → (D, R) in float64, R without its mean; for Warm networks and, on hot paths, any other.

    Raises:
        UserError: a network that cannot deblur is asked for a level with blur.
    """
    family = getattr(net, 'family', None)
    has_parts = hasattr(net, 'denoise_deblur')
    knows_blur = has_parts and not (family is not None and family.is_hot)

    def denoise(x, level):
        if not (level.hot or knows_blur):
            raise UserError('this network only denoises (its BNR is 0) and cannot be sampled with blur; use --bnr=0')
        beta = x.new_full([], level.beta)
        if has_parts:
            D, R = net.denoise_deblur(x, beta, class_labels, alpha=level.alpha)
            R = R.to(torch.float64)
            return D.to(torch.float64), R - R.mean(dim=(2, 3), keepdim=True)
        return net(x, beta, class_labels).to(torch.float64), torch.zeros_like(x)
    return denoise


def warm_sampler(net, latents, class_labels=None, randn_like=torch.randn_like, num_steps=18, sigma_min=0.002,
                 sigma_max=80, rho=7, S_churn=0, S_min=0, S_max=float('inf'), S_noise=1, solver='heun', path=None,
                 eta=0):
    """Draw images by running a network from noise to data along a path.

    Args:
        net: A Warm network (`denoise_deblur`), or any EDM network for paths with BNR 0.
        latents: Standard normal noise [B, C, N, N].
        class_labels: One-hot labels [B, label_dim], or None.
        randn_like: Source of the sampler's noise; called once per step, whether the noise is used or not.
        num_steps, sigma_min, sigma_max, rho: EDM's grid of noise levels β.
        S_churn, S_min, S_max, S_noise: EDM's churn, along the path (`add_churn`).
        solver: A name in SOLVERS.
        path: α for each β (warm.path); by default the network's own.
        eta: σ_t = η·β′·√(1 − β′²/β²) in Eq. 4, from 0, deterministic, to 1, which at BNR 0 is DDPM's noise. With blur
            it is the same in all bands, the most that every band's posterior admits. For solver euler.

    Returns:
        float64 images [B, C, N, N], nominally in [−1, 1].

    Raises:
        UserError: unknown solver, options that do not go together, a grid that makes no sense.
    """
    check_options(num_steps, S_churn, S_noise, solver, eta)
    path = sampling_path(net, path)
    betas = edm_sigma_steps(num_steps, sigma_min, sigma_max, rho, net, 'cpu').tolist()
    raised = [churned(beta, num_steps, S_churn, S_min, S_max) for beta in betas[:-1]]
    raised = rounded(net, torch.tensor(raised, dtype=torch.float64)).tolist()
    denoise, memory = make_denoiser(net, class_labels), Memory()

    def level(beta):
        return Level(latents.new_full([], path.alpha(beta), dtype=torch.float64), beta, path.is_hot)

    x = latents.to(torch.float64) * betas[0]
    for i, (beta, beta_next) in enumerate(zip(betas[:-1], betas[1:])):
        here, there, z = level(beta), level(beta_next), randn_like(x)
        if raised[i] > beta:
            x, here = add_churn(x, here, level(raised[i]), z, S_noise), level(raised[i])
        D, R = denoise(x, here)
        if eta > 0 and beta_next > 0:
            sigma = eta * there.beta * math.sqrt(1 - (there.beta / here.beta) ** 2)
            x = transition(x, D, R, here, there, sigma, z)
        else:
            x = SOLVERS[solver](denoise, x, D, R, here, there, memory)
    return x


def check_options(num_steps, S_churn, S_noise, solver, eta):
    """Refuse solver options that do not go together (UserError)."""
    check_churn(S_churn, S_noise)
    if solver not in SOLVERS:
        raise UserError(f"'{solver}' is not a solver for these networks; choose one of {', '.join(SOLVERS)}")
    if solver == 'dpmpp2m' and S_churn > 0:
        raise UserError('dpmpp2m carries its last evaluation from step to step, which churn would make stale; '
                        'use --solver=heun or euler with --S_churn')
    if solver == 'dpmpp2m' and num_steps < 2:
        raise UserError('dpmpp2m needs at least 2 steps; raise --steps')
    if not 0 <= eta <= 1:
        raise UserError(f'eta is {eta}, but it must lie between 0 and 1')
    if eta > 0 and solver != 'euler':
        raise UserError(f'--eta makes the steps of Eq. 4 stochastic, which are first order; '
                        f'use it with --solver=euler, not {solver}')
    if eta > 0 and S_churn > 0:
        raise UserError('--eta and --S_churn both add noise; give one of them')


SAMPLER_DEFAULTS = {name: p.default for name, p in inspect.signature(warm_sampler).parameters.items()
                    if p.default is not inspect.Parameter.empty}


def with_defaults(options):
    """All options of `warm_sampler`, defaults filled in, after checking that they go together (UserError)."""
    full = {**SAMPLER_DEFAULTS, **options}
    check_options(full['num_steps'], full['S_churn'], full['S_noise'], full['solver'], full['eta'])
    return full
