"""EDM's samplers: the recorded samples, orders of accuracy on an exact oracle, seeds, and refusals."""

import itertools
import math

import numpy as np
import pytest
import torch

from dnnlib import UserError
from training.samplers import (DISCRETIZATIONS, SCALINGS, SCHEDULES, SOLVERS, StackedRandomGenerator, ablation_sampler,
                               churned, edm_sampler, edm_sigma_steps)
from training.schedules import iddpm_noise_levels

CASES = ['edm18', 'edm5', 'edm_range', 'edm_churn', 'edm_churn_all', 'abl_euler_vp_vp_vp', 'abl_heun_vp_vp_vp',
         'abl_heun_edm_vp_vp', 'abl_heun_edm_linear_none', 'abl_euler_ve_ve_none', 'abl_heun_ve_ve_none',
         'abl_heun_iddpm_linear_none', 'abl_euler_iddpm_ve_none', 'abl_heun_edm_ve_none', 'abl_heun_vp_linear_none',
         'abl_churn_vp', 'abl_alpha']


class Denoiser:
    """D(x; σ) = f(x, σ) for every noise level; notes the level of each call."""

    sigma_min, sigma_max = 0, math.inf

    def __init__(self, f):
        self.f, self.sigmas = f, []

    def round_sigma(self, sigma):
        return torch.as_tensor(sigma)

    def __call__(self, x, sigma, class_labels=None):
        self.sigmas.append(float(sigma))
        return self.f(x.to(torch.float64), sigma)


def toy():
    return Denoiser(lambda x, sigma: x * 0.25 / (0.25 + sigma ** 2) + 0.05 * torch.tanh(x))


def gaussian(std=0.5):
    """The exact denoiser of normal data: E[y | y + σn] = x·std²/(std² + σ²)."""
    return Denoiser(lambda x, sigma: x * std ** 2 / (std ** 2 + sigma ** 2))


def latents(count=2):
    return torch.randn([count, 1, 4, 4], generator=torch.Generator().manual_seed(5))


# -- recorded values

# On CPUs without AVX2, PyTorch computes float32 functions such as tanh, and normal variates, by other formulas.
RECORDERS_CPU = torch.backends.cpu.get_cpu_capability() in ('AVX2', 'AVX512')


def test_every_recorded_case_is_tested(golden):
    assert list(golden('samplers').meta['cases']) == CASES


@pytest.mark.parametrize('name', CASES)
def test_samples_equal_the_recorded_ones(golden, name):
    record = golden('samplers')
    rnd = StackedRandomGenerator('cpu', record.meta['seeds'])
    x = rnd.randn([4, 3, 8, 8])
    label_index = rnd.randint(10, size=[4])
    np.testing.assert_allclose(x, record.latents, rtol=0, atol=0 if RECORDERS_CPU else 1e-5)
    np.testing.assert_array_equal(label_index, record.label_index)
    sampler = edm_sampler if name.startswith('edm') else ablation_sampler
    samples = sampler(toy(), x, randn_like=rnd.randn_like, **record.meta['cases'][name])
    assert samples.dtype == torch.float64
    np.testing.assert_allclose(samples, record.arrays[name], rtol=0, atol=1e-12 if RECORDERS_CPU else 1e-4)


# -- orders of accuracy

def exact_sample(x, std=0.5, sigma_min=0.02, sigma_max=10):
    """The ODE's solution for normal data down to sigma_min, then the samplers' last Euler step, which is D."""
    x = x.to(torch.float64) * sigma_max * math.sqrt((std ** 2 + sigma_min ** 2) / (std ** 2 + sigma_max ** 2))
    return x * std ** 2 / (std ** 2 + sigma_min ** 2)


def measured_order(errors):
    """Exponents p of errors ∝ h^p, where h halves from one to the next."""
    return [math.log2(a / b) for a, b in zip(errors, errors[1:])]


@pytest.mark.parametrize('solver, alpha, order', [('euler', 1, 1), ('heun', 1, 2), ('heun', 0.7, 2), ('heun', 0.5, 3)])
def test_solvers_have_their_order_on_the_exact_oracle(solver, alpha, order):
    """The midpoint rule gains an order on normal data: with u = std² + t², its h³ term −t/2u² + t³/2u³ is exact."""
    x = latents()
    errors = [(ablation_sampler(gaussian(), x, num_steps=n + 1, sigma_min=0.02, sigma_max=10, solver=solver,
                                alpha=alpha) - exact_sample(x)).abs().max() for n in (64, 128, 256)]
    assert measured_order(errors) == pytest.approx([order] * 2, abs=0.15)


def test_edm_sampler_is_second_order_on_the_exact_oracle():
    x = latents()
    errors = [(edm_sampler(gaussian(), x, num_steps=n + 1, sigma_min=0.02, sigma_max=10) - exact_sample(x)).abs().max()
              for n in (64, 128, 256)]
    assert measured_order(errors) == pytest.approx([2] * 2, abs=0.15)


@pytest.mark.parametrize('schedule, scaling', list(itertools.product(SCHEDULES, SCALINGS)))
@pytest.mark.parametrize('solver, order', [('euler', 1), ('heun', 2)])
def test_every_schedule_and_scaling_keeps_the_order(schedule, scaling, solver, order):
    """Differences between successive halvings shrink as the errors do, whatever the time variable."""
    x = latents(1)
    runs = [ablation_sampler(gaussian(), x, randn_like=torch.zeros_like, num_steps=n + 1, sigma_min=0.1, sigma_max=10,
                             solver=solver, schedule=schedule, scaling=scaling) for n in (128, 256, 512, 1024)]
    differences = [(a - b).abs().max() for a, b in zip(runs, runs[1:])]
    assert measured_order(differences) == pytest.approx([order] * 2, abs=0.25)


@pytest.mark.parametrize('choice', list(itertools.product(SOLVERS, DISCRETIZATIONS, SCHEDULES, SCALINGS)))
def test_every_combination_samples_normal_data(choice):
    """All paths lead to the data's distribution: for normal data of std 0.5, to half the latents.

    On the worst path (unscaled, in VE's time), 512 steps leave an error of up to 15 % with Euler and 3 % with Heun.
    """
    solver, discretization, schedule, scaling = choice
    x = latents(1)
    samples = ablation_sampler(gaussian(), x, num_steps=512, solver=solver, discretization=discretization,
                               schedule=schedule, scaling=scaling)
    np.testing.assert_allclose(samples, 0.5 * x, rtol={'euler': 0.15, 'heun': 0.03}[solver])


def test_edm_sampler_is_the_ablation_sampler_at_its_defaults():
    options = dict(num_steps=7, S_churn=10, S_min=0.1, S_max=20, S_noise=1.01)
    a, b = (sampler(toy(), latents(), randn_like=StackedRandomGenerator('cpu', [1, 2]).randn_like, **options)
            for sampler in (edm_sampler, ablation_sampler))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


# -- the time grid

def test_network_is_called_2n_minus_1_times():
    net = toy()
    edm_sampler(net, latents(), num_steps=6)
    assert len(net.sigmas) == 11
    net = toy()
    ablation_sampler(net, latents(), num_steps=6, solver='euler')
    assert len(net.sigmas) == 6


def test_sigma_steps_follow_equation_5():
    steps = edm_sigma_steps(5, 0.002, 80, 7, toy())
    assert steps.dtype == torch.float64 and steps.shape == (6,)
    expected = [(80 ** (1 / 7) + i / 4 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(5)] + [0]
    np.testing.assert_allclose(steps, expected, rtol=1e-13)


def test_sigma_steps_keep_to_the_network():
    net = toy()
    net.sigma_min, net.sigma_max = 0.4, 20.2
    net.round_sigma = lambda sigma: torch.as_tensor(sigma).round(decimals=1)
    steps = edm_sigma_steps(4, 0.002, 80, 7, net)
    assert steps[0] == 20.2 and steps[-2] == 0.4 and torch.equal(steps, steps.round(decimals=1))
    ablation_sampler(net, latents(), num_steps=4, S_churn=3)
    edm_sampler(net, latents(), num_steps=4, S_churn=3)
    np.testing.assert_allclose(net.sigmas, np.round(net.sigmas, 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize('discretization', DISCRETIZATIONS)
def test_levels_decrease_over_the_default_range(discretization):
    grid = DISCRETIZATIONS[discretization]
    low, high = grid.default_range(1e-3)
    levels = grid.levels(18, low, high, rho=7, epsilon_s=1e-3, C_1=0.001, C_2=0.008, M=1000)
    assert levels.dtype == torch.float64 and levels.shape == (18,)
    assert (levels.diff() < 0).all() and levels[0] <= high * (1 + 1e-9) and levels[-1] >= low * (1 - 1e-6)
    if discretization != 'iddpm':  # which picks from given levels
        np.testing.assert_allclose(levels[[0, -1]], [high, low], rtol=1e-6)


def test_a_single_step_denoises_the_latents():
    x = latents()
    assert edm_sigma_steps(1, 0.002, 80, 7, toy()).tolist() == pytest.approx([80, 0])
    samples = edm_sampler(gaussian(), x, num_steps=1)
    np.testing.assert_allclose(samples, 80 * x.double() * 0.25 / (0.25 + 80 ** 2), rtol=1e-9)
    for discretization in DISCRETIZATIONS:
        net = toy()
        ablation_sampler(net, x, num_steps=1, discretization=discretization)
        assert len(net.sigmas) == 1


@pytest.mark.parametrize('schedule', SCHEDULES)
def test_schedules_agree_with_their_inverse_and_derivative(schedule):
    sigma, sigma_deriv, sigma_inv = SCHEDULES[schedule](0.002, 80, 1e-3)
    levels = torch.tensor([0.01, 0.3, 1, 40], dtype=torch.float64)
    t = sigma_inv(levels).clone().requires_grad_()
    np.testing.assert_allclose(sigma(t.detach()), levels, rtol=1e-9)
    slope, = torch.autograd.grad(sigma(t).sum(), t)
    np.testing.assert_allclose(sigma_deriv(t.detach()), slope, rtol=1e-9)


@pytest.mark.parametrize('scaling', SCALINGS)
def test_scalings_agree_with_their_derivative(scaling):
    t = torch.tensor([0.01, 0.3, 1, 40], dtype=torch.float64, requires_grad=True)
    s, sigma_deriv = SCALINGS[scaling].s(t ** 2), 2 * t.detach()
    slope, = torch.autograd.grad(s.sum() + 0 * t.sum(), t)
    np.testing.assert_allclose(SCALINGS[scaling].s_deriv(t.detach() ** 2, sigma_deriv), slope, rtol=1e-9)


def test_iddpm_levels_include_both_ends():
    u = iddpm_noise_levels(0.001, 0.008, 1000, torch.float64)
    levels = DISCRETIZATIONS['iddpm'].levels(3, u[900].item(), u[500].item(), C_1=0.001, C_2=0.008, M=1000)
    assert levels.tolist() == u[[500, 700, 900]].tolist()


# -- churn and random numbers

def test_churn_raises_the_level_inside_its_window_only():
    def raised(*churn):
        return churned(toy(), torch.tensor([1.0, 3.0], dtype=torch.float64), 10, *churn).tolist()

    assert raised(2, 0.5, 2) == raised(2, 1, 1) == [pytest.approx(1.2), 3]
    assert raised(1000, 0.5, 3) == pytest.approx([math.sqrt(2), 3 * math.sqrt(2)])
    assert raised(2, 1.5, 2) == raised(2, 0.1, 0.5) == raised(0, 0, math.inf) == [1, 3]


@pytest.mark.parametrize('sampler', [edm_sampler, ablation_sampler])
def test_noise_is_float64_and_drawn_at_every_step(sampler):
    drawn = []

    def randn_like(x):
        drawn.append(x.dtype)
        return torch.randn_like(x)

    sampler(toy(), latents(), randn_like=randn_like, num_steps=5)
    assert drawn == [torch.float64] * 5


@pytest.mark.parametrize('sampler', [edm_sampler, ablation_sampler])
def test_an_image_depends_on_its_seed_alone(sampler):
    def images(seeds):
        rnd = StackedRandomGenerator('cpu', seeds)
        x = rnd.randn([len(seeds), 3, 4, 4])
        rnd.randint(10, size=[len(seeds)])
        return sampler(toy(), x, randn_like=rnd.randn_like, num_steps=4, S_churn=2)

    together = images([5, 6, 7])
    assert torch.equal(together[1:2], images([6])) and torch.equal(together[[2, 0]], images([7, 5]))


def test_generators_take_seeds_modulo_2_to_the_32():
    a, b = (StackedRandomGenerator('cpu', seeds).randn([2, 3]) for seeds in ([7, 2 ** 32 + 1], [2 ** 32 + 7, 1]))
    assert torch.equal(a, b) and not torch.equal(a[0], a[1])


def test_generators_offer_what_torch_does():
    rnd = StackedRandomGenerator('cpu', [1, 2])
    assert rnd.randn([2, 3], dtype=torch.float64, device='cpu').dtype == torch.float64
    assert rnd.randn_like(torch.zeros([2, 5], dtype=torch.float16)).dtype == torch.float16
    labels = rnd.randint(3, 5, size=[2, 100])
    assert labels.dtype == torch.int64 and set(labels.flatten().tolist()) == {3, 4}
    with pytest.raises(UserError, match='3 images, but there are 2 generators'):
        rnd.randn([3, 1])


@pytest.mark.parametrize('sampler', [edm_sampler, ablation_sampler])
def test_global_random_state_is_left_alone(sampler):
    before = torch.get_rng_state()
    sampler(toy(), latents(), randn_like=StackedRandomGenerator('cpu', [1, 2]).randn_like, num_steps=2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize('sampler', [edm_sampler, ablation_sampler])
def test_gradients_flow_to_the_latents(sampler):
    x = latents().requires_grad_()
    sampler(gaussian(), x, num_steps=3).sum().backward()
    assert (x.grad > 0).all()


def test_seeds_count_modulo_2_to_the_32():
    a, b, c = (StackedRandomGenerator('cpu', [seed]).randn([1, 4]) for seed in (7, 7 + (1 << 32), 7 + (1 << 31)))
    assert torch.equal(a, b) and not torch.equal(a, c)


# -- refusals

BAD_OPTIONS = [(dict(num_steps=0), 'number of sampling steps is 0'), (dict(num_steps=2.5), 'sampling steps is 2.5'),
               (dict(rho=0), 'rho is 0'), (dict(rho=math.nan), 'rho is nan'), (dict(sigma_min=0), 'sigma_min=0'),
               (dict(sigma_min=-1), 'sigma_min=-1'), (dict(sigma_min=90), 'sigma_min=90 and --sigma_max=80'),
               (dict(sigma_max=math.inf), 'sigma_max=inf'), (dict(sigma_min=1, sigma_max=1), 'sigma_min=1'),
               (dict(sigma_min=1e-46), '0 or infinite in float32'),
               (dict(sigma_max=1e39), '0 or infinite in float32'), (dict(rho=0.008), '0 or infinite in float32'),
               (dict(rho=0.004), 'rho is 0.004'),
               (dict(S_churn=-1), 'S_churn is -1'), (dict(S_noise=math.nan), 'S_noise is nan')]
BAD_CHOICES = [(dict(solver='rk4'), "no solver 'rk4'; choose one of euler, heun"),
               (dict(discretization='x'), "no discretization 'x'"), (dict(schedule='x'), "no schedule 'x'"),
               (dict(scaling='x'), "no scaling 'x'"), (dict(alpha=0), 'alpha is 0'), (dict(alpha=1.5), 'alpha is 1.5'),
               (dict(epsilon_s=0), 'epsilon_s is 0'), (dict(M=0), 'is 0'),
               (dict(discretization='iddpm', sigma_min=50, sigma_max=50.01), 'none of the 1000 noise levels')]


@pytest.mark.parametrize('sampler, options, message',
                         [(sampler, *bad) for sampler in (edm_sampler, ablation_sampler) for bad in BAD_OPTIONS]
                         + [(ablation_sampler, *bad) for bad in BAD_CHOICES])
def test_bad_settings_are_refused_before_the_network_runs(sampler, options, message):
    net = toy()
    with pytest.raises(UserError, match=message) as error:
        sampler(net, latents(), **options)
    assert ';' in str(error.value) and not net.sigmas  # the message says what is wrong; what to do


def test_a_range_outside_that_of_the_network_is_refused():
    net = toy()
    net.sigma_min = 100
    with pytest.raises(UserError, match='outside the range of the network, 100 to inf'):
        edm_sampler(net, latents())
