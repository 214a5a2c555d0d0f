"""EDM's samplers: the stochastic second-order one, and the general one that covers earlier methods.

Karras et al. 2022, algorithms 1 to 3. All that depends on time alone is computed on the CPU in float64;
inside the loop nothing is read back from the device. Gradients are recorded if the caller's context
enables them.
"""

import math
import numbers

import torch

from dnnlib import UserError, chosen
from training.schedules import (DISCRETIZATIONS, IDDPM_C_1, IDDPM_C_2, IDDPM_M, NUM_STEPS, RHO, SCALINGS, SCHEDULES,
                                SIGMA_MAX, SIGMA_MIN, SOLVER, edm_sigmas)


class StackedRandomGenerator:
    """One random generator per image, so that an image depends on its own seed and not on its batch.

    Args:
        device: Where the numbers are drawn.
        seeds: One integer per image, taken modulo 2^32.
    """

    def __init__(self, device, seeds):
        self.device = torch.device(device)
        self.generators = [torch.Generator(self.device).manual_seed(int(seed) % (1 << 32)) for seed in seeds]

    def randn(self, size, **kwargs):
        """Standard normal tensor of shape `size`, whose first dimension is the number of seeds.

        Keywords (dtype, device, …) as in torch.randn; the device defaults to the generators'.

        Raises:
            UserError: the number of images is not that of the seeds.
        """
        return self._stack(torch.randn, size, kwargs)

    def randn_like(self, input):
        """Standard normal tensor of the shape, dtype and device of `input`."""
        return self.randn(input.shape, dtype=input.dtype, layout=input.layout, device=input.device)

    def randint(self, *bounds, size, **kwargs):
        """Uniform integers: randint(high, size=…) or randint(low, high, size=…), otherwise as `randn`."""
        return self._stack(lambda shape, **kw: torch.randint(*bounds, size=shape, **kw), size, kwargs)

    def _stack(self, draw, size, kwargs):
        if size[0] != len(self.generators):
            raise UserError(f'random numbers were requested for {size[0]} images, but there are '
                            f'{len(self.generators)} generators; give one seed per image')
        kwargs = {'device': self.device, **kwargs}
        return torch.stack([draw(list(size[1:]), generator=generator, **kwargs) for generator in self.generators])


# -- solver steps for dx/dt = slope(x, t), times as floats

def euler_step(slope, x, t, t_next, alpha=1):
    """First-order step from t to t_next; `alpha`, the second-order step's, has no effect."""
    return x + (t_next - t) * slope(x, t)


def heun_step(slope, x, t, t_next, alpha=1):
    """Second-order step from t to t_next: Heun's for alpha = 1, the midpoint rule for ½ (algorithm 3).

    The last step, to t_next = 0 where the slope is not defined, is Euler's.
    """
    if t_next == 0:
        return euler_step(slope, x, t, t_next)
    h = t_next - t
    d = slope(x, t)
    d_prime = slope(x + alpha * h * d, t_next if alpha == 1 else t + alpha * h)  # t + h may miss t_next by an ulp
    return x + h * ((1 - 1 / (2 * alpha)) * d + 1 / (2 * alpha) * d_prime)


SOLVERS = {'euler': euler_step, 'heun': heun_step}


# -- noise levels

def edm_sigma_steps(num_steps, sigma_min, sigma_max, rho, net):
    """EDM's time grid (equation 5) within the network's range, decreasing to a final 0.

    A single step leads from sigma_max to 0.

    Returns:
        float64 [num_steps + 1] on the CPU.

    Raises:
        UserError: a setting out of range, or no overlap with the network's range.
    """
    _check_grid(num_steps, rho)
    sigma_min, sigma_max = _clipped(net, sigma_min, sigma_max)
    sigmas = _rounded_grid(net, edm_sigmas(num_steps, sigma_min, sigma_max, rho=rho))
    return torch.cat([sigmas, sigmas.new_zeros([1])])


def churned(net, sigmas, num_steps, S_churn, S_min, S_max):
    """The noise levels σ + γσ that steps start from after churn, `rounded`: tensor to tensor."""
    gamma = min(S_churn / num_steps, math.sqrt(2) - 1)
    raised = [sigma + gamma * sigma if S_min <= sigma <= S_max else sigma for sigma in sigmas.tolist()]
    return rounded(net, torch.tensor(raised, dtype=torch.float64))


def noise_spread(sigma, sigma_hat):
    """Standard deviation of the noise that raises the level from sigma to sigma_hat (tensors)."""
    return (sigma_hat ** 2 - sigma ** 2).clamp(min=0).sqrt()


def rounded(net, sigmas):
    """Noise levels rounded to those the network supports: float64 on the CPU, in and out.

    Call it once with all levels: looking them up on a GPU makes the host wait.
    """
    return net.round_sigma(sigmas).to('cpu', torch.float64)


def _rounded_grid(net, sigmas):
    """`rounded`, but UserError where a level is 0 or infinite in float32, in which networks take it."""
    sigmas = rounded(net, sigmas)
    levels = sigmas.to(torch.float32)
    if not ((levels > 0) & levels.isfinite()).all():
        raise UserError('some of the noise levels are 0 or infinite in float32; choose sigma_min, sigma_max and rho '
                        'that are less extreme')
    return sigmas


def evaluate(net, x, level, class_labels=None):
    """The network's output for x [B, C, H, W] at the number `level`, such as σ: float64 like x.

    The level is filled in on the device: a copy would make the host wait.
    """
    return net(x, x.new_full([], level), class_labels).to(torch.float64)


# -- samplers

def edm_sampler(net, latents, class_labels=None, randn_like=torch.randn_like, num_steps=NUM_STEPS,
                sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX, rho=RHO, S_churn=0, S_min=0, S_max=float('inf'), S_noise=1):
    """EDM's stochastic sampler (algorithm 2).

    Args:
        net: Denoiser D(x; σ), with attributes sigma_min, sigma_max and round_sigma.
        latents: Standard normal [B, C, H, W].
        class_labels: [B, label_dim], or None.
        randn_like: Source of the noise, drawn at every step whether it is used or not.
        num_steps: Number of steps n; the network is called 2n − 1 times.
        sigma_min, sigma_max, rho: Range and curvature of the time grid (equation 5).
        S_churn, S_min, S_max, S_noise: Amount of churn over all steps, the noise levels between which it
            applies, and the standard deviation of the noise it adds.

    Returns:
        Images [B, C, H, W], float64.

    Raises:
        UserError: a setting out of range.
    """
    t_steps = edm_sigma_steps(num_steps, sigma_min, sigma_max, rho, net)
    check_churn(S_churn, S_noise)
    t_hats = churned(net, t_steps[:-1], num_steps, S_churn, S_min, S_max)
    noise_stds = S_noise * noise_spread(t_steps[:-1], t_hats)

    def slope(x, t):
        return (x - evaluate(net, x, t, class_labels)) / t

    x = latents.to(torch.float64) * t_steps[0].item()
    for t_hat, t_next, noise_std in zip(t_hats.tolist(), t_steps[1:].tolist(), noise_stds.tolist()):
        x = x + noise_std * randn_like(x)
        x = heun_step(slope, x, t_hat, t_next)
    return x


def ablation_sampler(net, latents, class_labels=None, randn_like=torch.randn_like, num_steps=NUM_STEPS,
                     sigma_min=None, sigma_max=None, rho=RHO, solver=SOLVER, discretization='edm', schedule='linear',
                     scaling='none', epsilon_s=1e-3, C_1=IDDPM_C_1, C_2=IDDPM_C_2, M=IDDPM_M, alpha=1, S_churn=0,
                     S_min=0, S_max=float('inf'), S_noise=1):
    """The general sampler (algorithm 1 with the steps of algorithm 3), churn included.

    Args, beyond those of `edm_sampler`:
        sigma_min, sigma_max: None for the discretisation's own range.
        solver, discretization, schedule, scaling: Keys of SOLVERS, DISCRETIZATIONS, SCHEDULES, SCALINGS.
        epsilon_s: Smallest time of the VP schedule.
        C_1, C_2, M: Constants of iDDPM's noise levels.
        alpha: Where the second-order step takes its second slope: 1 at its end, ½ in the middle.

    Returns:
        Images [B, C, H, W], float64.

    Raises:
        UserError: a setting out of range or a choice that is not in its table.
    """
    step = chosen('solver', solver, SOLVERS)
    grid = chosen('discretization', discretization, DISCRETIZATIONS)
    make_schedule = chosen('schedule', schedule, SCHEDULES)
    scaling = chosen('scaling', scaling, SCALINGS)
    _check_grid(num_steps, rho)
    check_churn(S_churn, S_noise)
    _check_constants(epsilon_s, alpha, M)
    default_min, default_max = grid.default_range(epsilon_s)
    sigma_min, sigma_max = _clipped(net, default_min if sigma_min is None else sigma_min,
                                    default_max if sigma_max is None else sigma_max)

    sigma, sigma_deriv, sigma_inv = make_schedule(sigma_min, sigma_max, epsilon_s)
    t_steps = sigma_inv(_rounded_grid(net, grid.levels(num_steps, sigma_min, sigma_max, rho=rho, epsilon_s=epsilon_s,
                                                        C_1=C_1, C_2=C_2, M=M)))
    sigmas = sigma(t_steps)
    t_hats = sigma_inv(churned(net, sigmas, num_steps, S_churn, S_min, S_max))
    sigma_hats = sigma(t_hats)
    s, s_hats = scaling.s(sigmas), scaling.s(sigma_hats)
    noise_stds = S_noise * s_hats * noise_spread(sigmas, sigma_hats)

    def slope(x, t):
        t = torch.tensor(t, dtype=torch.float64)
        sigma_t, deriv_t = sigma(t), sigma_deriv(t)
        s_t, s_deriv_t = scaling.s(sigma_t), scaling.s_deriv(sigma_t, deriv_t)
        D_x = evaluate(net, x / s_t, sigma_t.item(), class_labels)
        return (deriv_t / sigma_t + s_deriv_t / s_t) * x - (deriv_t * s_t / sigma_t) * D_x

    x = latents.to(torch.float64) * (sigmas[0] * s[0]).item()
    for t_hat, t_next, rescale, noise_std in zip(t_hats.tolist(), [*t_steps[1:].tolist(), 0], (s_hats / s).tolist(),
                                                 noise_stds.tolist()):
        x = rescale * x + noise_std * randn_like(x)
        x = step(slope, x, t_hat, t_next, alpha)
    return x


# -- checks

def check_steps(num_steps, at_most=None):
    """Raise UserError unless the number of sampling steps is a whole number from 1 up to `at_most`."""
    if not isinstance(num_steps, numbers.Integral) or num_steps < 1:
        raise UserError(f'the number of sampling steps is {num_steps}; give a whole number of at least 1')
    if at_most is not None and num_steps > at_most:
        raise UserError(f'{num_steps} sampling steps are more than the {at_most} that this network was trained for; '
                        f'give --steps={at_most} or fewer')


def _check_grid(num_steps, rho):
    check_steps(num_steps)
    if not (math.isfinite(rho) and rho > 0):
        raise UserError(f'rho is {rho}; give a positive number')


def check_churn(S_churn, S_noise):
    """Raise UserError unless both are finite and not negative."""
    for name, value in dict(S_churn=S_churn, S_noise=S_noise).items():
        if not (math.isfinite(value) and value >= 0):
            raise UserError(f'{name} is {value}; give a number of at least 0')


def _check_constants(epsilon_s, alpha, M):
    if not 0 < epsilon_s < 1:
        raise UserError(f'epsilon_s is {epsilon_s}; give a number between 0 and 1')
    if not 0 < alpha <= 1:
        raise UserError(f'alpha is {alpha}; give a number above 0 and up to 1, such as 1 or 0.5')
    if not isinstance(M, numbers.Integral) or M < 1:
        raise UserError(f"M, iDDPM's number of noise levels, is {M}; give a whole number of at least 1")


def _clipped(net, sigma_min, sigma_max):
    """The given range of noise levels, clipped to the network's: two floats."""
    if not (sigma_min > 0 and math.isfinite(sigma_max) and sigma_min < sigma_max):
        raise UserError(f'--sigma_min={sigma_min:g} and --sigma_max={sigma_max:g} do not form a range; '
                        'give 0 < sigma_min < sigma_max')
    low, high = max(float(sigma_min), float(net.sigma_min)), min(float(sigma_max), float(net.sigma_max))
    if not low < high:
        raise UserError(f'the noise levels from --sigma_min={sigma_min:g} to --sigma_max={sigma_max:g} are outside the '
                        f'range of the network, {float(net.sigma_min):g} to {float(net.sigma_max):g}; '
                        'choose a range that overlaps it')
    return low, high
