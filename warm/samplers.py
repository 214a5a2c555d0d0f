"""Samplers along a path through the (α, β) plane: Euler, Heun, per-frequency DPM-Solver++(2M), stochastic.

The deterministic limit of Eq. 4 is the probability-flow ODE of the process:

    dx/dβ = (x − D)/β + V [Ṁ/(1−M)] Vᵀ R.

Unprimed symbols belong to the current level (α, β), primed ones to the next. Grid, churn and NFE are EDM's
(training.samplers), except that steps between equal levels, to which a network may round its grid, are skipped; at
BNR 0 every step here does the same arithmetic as EDM's sampler, without a DCT.

To add a solver: one function here, or in a file of its own, and one line in SOLVERS; warm.steps says what it is given
and has to return.
"""

import inspect
import math

import torch

from dnnlib import UserError, chosen
from training.samplers import check_churn, churned, edm_sigma_steps, evaluate
from training.schedules import NUM_STEPS, RHO, SIGMA_MAX, SIGMA_MIN, SOLVER
from training.system import GRID_OPTIONS, Option, flag_of
from warm.blur import blur_mask, dct2, frequencies, idct2, log_mask_ratio
from warm.path import ConstantBNR
from warm.steps import Level, Solver, deblur, transition


def add_churn(x, here, there, z, S_noise=1):
    """Raise the state from `here` to a noisier `there`: x̂ = V (M̂/M) Vᵀ x + V √(β̂² − (M̂/M)² β²) Vᵀ S_noise z (ours).

    The blur rises with the noise, so that the marginal stays exactly that of the path (for S_noise = 1); at BNR 0
    it is EDM's churn.

    Args:
        x: State at `here`, float64 [B, C, N, N].
        here, there: Levels before and after, there.beta ≥ here.beta.
        z: Standard normal noise like x.
        S_noise: Standard deviation of the noise added, relative to the exact one.
    """
    if here.hot:
        return x + S_noise * math.sqrt(max(there.beta ** 2 - here.beta ** 2, 0)) * z
    ratio = torch.exp(log_mask_ratio(here.alpha, there.alpha, x.shape[-1], here.rates))
    return idct2(ratio * dct2(x) + (there.beta ** 2 - (ratio * here.beta) ** 2).sqrt() * dct2(S_noise * z))


def euler_step(denoise, x, D, R, here, there, z, memory, eta):
    """Eq. 4, first order, one evaluation: DDIM's step for η = 0, stochastic with σ_t = η·β′·√(1 − β′²/β²) (ours).

    η = 1 at BNR 0 is DDPM's noise. With blur, σ_t is still the same in all bands: at η = 1, the largest that every
    band's posterior allows.
    """
    sigma = eta * there.beta * math.sqrt(1 - (there.beta / here.beta) ** 2)
    return transition(x, D, R, here, there, sigma, z if sigma > 0 else None)


def check_eta(eta):
    """Raise UserError for an η outside [0, 1]."""
    if not 0 <= eta <= 1:
        raise UserError(f'--eta={eta:g} is not between 0 (deterministic) and 1; choose a number there')


def heun_step(denoise, x, D, R, here, there, z, memory):
    """Heun's step, second order on any path, two evaluations; the last step is Euler's (the paper's and EDM's solver).

    The corrector averages the noise slopes (x−D)/β and (x′−D′)/β′, and the blur increments
    (M′−M)/(1−M)·R and (M′−M)/(1−M′)·R′.
    """
    x_next = transition(x, D, R, here, there)
    if there.beta == 0:
        return x_next
    D_next, R_next = denoise(x_next, there)
    slope, slope_next = (x - D) / here.beta, (x_next - D_next) / there.beta
    corrected = x + (there.beta - here.beta) * (0.5 * slope + 0.5 * slope_next)
    # Seen from the next level the step runs backwards, hence the minus sign.
    return corrected + 0.5 * (deblur(R, here, there) - deblur(R_next, there, here))


def dpmpp2m_step(denoise, x, D, R, here, there, z, memory):
    """DPM-Solver++(2M) band by band in L = ln(M/β), one evaluation (ours).

    With h = L′ − L: x′ = (β′/β)·x − V M′ expm1(−h) Vᵀ X, X = x̂₀ + h/(2h_old)·(x̂₀ − x̂₀,old).
    The first step has no history (X = x̂₀); the last returns x̂₀.
    """
    clean = D if here.hot else D + R
    if there.beta == 0:
        return clean
    n = x.shape[-1]
    h = torch.as_tensor(math.log(here.beta / there.beta), dtype=x.dtype)
    if not here.hot:
        clean, h = dct2(clean), h + log_mask_ratio(here.alpha, there.alpha, n, here.rates)
    X = clean
    if memory:
        X = clean + h / (2 * memory['h']) * (clean - memory['clean'])
    memory.update(clean=clean, h=h)
    drift = torch.expm1(-h) * X
    if not here.hot:
        drift = idct2(blur_mask(there.alpha, n, there.rates) * drift)
    return (there.beta / here.beta) * x - drift


ETA = Option('eta', 0, 'Stochasticity of the solver euler (Eq. 4), 0 to 1', type=float)

SOLVERS = {
    'euler': Solver(euler_step, order=1, options=(ETA,), adds_noise=lambda eta: eta > 0, check=check_eta),
    'heun': Solver(heun_step, order=2),
    'dpmpp2m': Solver(dpmpp2m_step, order=2, multistep=True),
}


def options_of(solvers):
    """The Options of the named solvers that only some solvers have, each once."""
    return tuple(dict.fromkeys(option for name in solvers for option in SOLVERS[name].options))


def make_denoiser(net, class_labels=None):
    """Make denoise(x, level) → (D, R) in float64, R with zero mean; for Warm networks and, on hot paths, any other.

    Raises:
        UserError: from denoise, if a network that cannot deblur is given a level with blur.
    """
    has_parts = hasattr(net, 'denoise_deblur')
    knows_blur = has_parts and not (hasattr(net, 'family') and net.family.is_hot)

    def denoise(x, level):
        if not (level.hot or knows_blur):
            raise UserError('this network only denoises (its BNR is 0) and cannot be sampled with blur; use --bnr=0')
        if not has_parts:
            return evaluate(net, x, level.beta, class_labels), torch.zeros_like(x)
        D, R = net.denoise_deblur(x, x.new_full([], level.beta), class_labels, alpha=level.alpha)
        R = R.to(torch.float64)
        return D.to(torch.float64), R - R.mean(dim=(2, 3), keepdim=True)
    return denoise


def default_path(net):
    """The path that a network is sampled along by default: its own, an EDM network's being BNR 0."""
    return net.family.default if hasattr(net, 'family') else ConstantBNR(0)


def warm_sampler(net, latents, class_labels=None, randn_like=torch.randn_like, num_steps=NUM_STEPS,
                 sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX, rho=RHO, S_churn=0, S_min=0, S_max=float('inf'), S_noise=1,
                 solver=SOLVER, path=None, **solver_options):
    """Draw images by running a network from noise to data along a path.

    Args:
        net: A Warm network (`denoise_deblur`), or any EDM network for paths with BNR 0.
        latents: Standard normal noise [B, C, N, N].
        class_labels: One-hot labels [B, label_dim], or None.
        randn_like: Source of the sampler's noise; called once per step, whether the noise is used or not.
        num_steps, sigma_min, sigma_max, rho: EDM's grid of noise levels β.
        S_churn, S_min, S_max, S_noise: EDM's churn, along the path (`add_churn`).
        solver: A name in SOLVERS.
        path: Anything with alpha(β), the blur in pixels (warm.path); by default `default_path`.
        solver_options: The solver's own, such as euler's `eta`.

    Returns:
        float64 images [B, C, N, N], nominally in [−1, 1].

    Raises:
        UserError: unknown solver, options that do not go together, an invalid grid.
    """
    own = checked_solver_options(num_steps, S_churn, S_noise, solver, solver_options)
    path = default_path(net) if path is None else path
    betas = edm_sigma_steps(num_steps, sigma_min, sigma_max, rho, net)
    beta_hats = churned(net, betas[:-1], num_steps, S_churn, S_min, S_max)
    denoise = make_denoiser(net, class_labels)
    step = SOLVERS[solver].step
    memory = {}
    rates = getattr(net, 'rates', frequencies)  # the Gaussian's where a network names none

    def level(beta):
        return Level(latents.new_full([], path.alpha(beta), dtype=torch.float64), beta,
                     getattr(path, 'is_hot', False), rates)

    x = latents.to(torch.float64) * betas[0].item()
    for beta, beta_hat, beta_next in zip(betas[:-1].tolist(), beta_hats.tolist(), betas[1:].tolist()):
        here, there = level(beta), level(beta_next)
        z = randn_like(x)  # drawn at every step, used or not, as in EDM
        if beta_hat > beta:
            churned_level = level(beta_hat)
            x = add_churn(x, here, churned_level, z, S_noise)
            here = churned_level
        if there.beta == here.beta:  # the network rounded two levels to one
            continue
        D, R = denoise(x, here)
        x = step(denoise, x, D, R, here, there, z, memory, **own)
    return x


def checked_solver_options(num_steps, S_churn, S_noise, solver, solver_options):
    """The solver's own options, defaults filled in; raises UserError for options that do not go together."""
    check_churn(S_churn, S_noise)
    kind = chosen('solver', solver, SOLVERS)
    defaults = {option.name: option.default for option in kind.options}
    for name in solver_options.keys() - defaults.keys():
        check_foreign(name, solver_options[name], solver)
    own = {name: solver_options.get(name, default) for name, default in defaults.items()}
    kind.check(**own)
    if kind.multistep and S_churn > 0:
        others = [name for name, other in SOLVERS.items() if not other.multistep and other.order is not None]
        raise UserError(f'{solver} carries its last evaluation from step to step, which churn would make stale; '
                        f"use --solver={' or '.join(others)} with --S_churn")
    if kind.multistep and num_steps < 2:
        raise UserError(f'{solver} needs at least 2 steps; raise --steps')
    if kind.adds_noise(**own) and S_churn > 0:
        source = [flag_of(name) for name in own if own[name] != defaults[name]] or [f'--solver={solver}']
        raise UserError(f"{' and '.join([*source, '--S_churn'])} both add noise; give one of them")
    return own


def check_foreign(name, value, solver):
    """Raise UserError for an option that `solver` does not have, unless it is another solver's and at its default."""
    owners = {owner: option for owner, known in SOLVERS.items() if owner != solver
              for option in known.options if option.name == name}
    if not owners:
        raise UserError(f'{flag_of(name)} is not an option of any solver; leave it out')
    if value not in [option.default for option in owners.values()]:
        raise UserError(f"{flag_of(name)} is not an option of the solver {solver}; use it with "
                        f"--solver={' or '.join(owners)}, or leave it out")


SAMPLER_DEFAULTS = {name: p.default for name, p in inspect.signature(warm_sampler).parameters.items()
                    if p.default is not inspect.Parameter.empty}


def with_defaults(options):
    """All options of `warm_sampler`, defaults filled in; raises UserError if they do not go together."""
    full = {name: options.get(name, default) for name, default in SAMPLER_DEFAULTS.items()}
    solver_options = {name: value for name, value in options.items() if name not in full}
    own = checked_solver_options(full['num_steps'], full['S_churn'], full['S_noise'], full['solver'], solver_options)
    return {**full, **own}


def grid_options(net, options):
    """Options of EDM's grid of noise levels, defaults filled in; raises UserError if they do not suit `net`."""
    options = {**{name: SAMPLER_DEFAULTS[name] for name in GRID_OPTIONS}, **options}
    edm_sigma_steps(**options, net=net)
    return options
