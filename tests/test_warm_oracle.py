"""warm.samplers on Gaussian data, where all is known: orders of accuracy, variances, EDM's sampler at BNR 0."""

import math

import pytest
import torch
from click.testing import CliRunner

from dnnlib import UserError
from training.samplers import StackedRandomGenerator, edm_sampler
from training.system import Option
from warm import oracle
from warm.blur import blur, blur_mask, dct2, filter_bands, idct2, marginal_variance, prior_spectrum, rest
from warm.oracle import (COMPARED, GaussianOracle, deterministic_factor, last_step_factor, ode_factor, ode_solvers,
                         sampler_factors)
from warm.path import PATHS, BlurringSchedule, ConstantBNR, parse_path
from warm.samplers import (SAMPLER_DEFAULTS, SOLVERS, add_churn, dpmpp2m_step, options_of, warm_sampler,
                           with_defaults)
from warm.steps import Level, Solver, transition

N = 16
S = prior_spectrum(N)
PATHS_HERE = list(dict.fromkeys([*COMPARED, *(parse_path(schedule=name) for name in PATHS)]))
ALL_PATHS = pytest.mark.parametrize('path', PATHS_HERE, ids=str)
BLURRED_PATHS = pytest.mark.parametrize('path', [path for path in PATHS_HERE if not path.is_hot], ids=str)
# Solvers that add noise, with the options that make them do so.
STOCHASTIC = [('euler', dict(eta=0.5)), ('euler', dict(eta=1)),
              *((name, {}) for name, solver in SOLVERS.items() if solver.order is None)]
MULTISTEP = [name for name, solver in SOLVERS.items() if solver.multistep]


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# -- the oracle itself

@ALL_PATHS
def test_is_the_conditional_mean(path):
    """D + R is E[x₀|x], per band Cov(x₀, x)/Var(x)·x, here estimated from samples; D is its blur and R its rest."""
    white = noise(4000, 1, 4, 4)
    spectrum = prior_spectrum(4)
    x_0 = filter_bands(white, spectrum.sqrt())
    for beta in (0.1, 2.0):
        alpha = path.alpha(beta)
        x = blur(x_0, alpha) + beta * noise(4000, 1, 4, 4, seed=1)
        D, R = GaussianOracle(spectrum).denoise_deblur(x, beta, alpha=alpha)
        bands, noisy = dct2(x_0), dct2(x)
        regression = (bands * noisy).mean(0) / noisy.square().mean(0)
        assert_close(dct2(D + R), regression * noisy, 0.2)
        assert_close(D, blur(D + R, alpha), 1e-12)
        assert_close(R, rest(D + R, alpha), 1e-12)


def test_works_as_a_network():
    net, x = GaussianOracle(S), noise(2, 3, N, N)
    assert_close(net(x, 0.5), filter_bands(x, S / (S + 0.25)), 1e-12)
    per_image = net(x, torch.tensor([0.5, 2.0]), alpha=torch.tensor([0.0, 1.0]))
    assert_close(per_image[1:], net(x[1:], 2.0, alpha=1.0), 1e-12)
    assert net.calls == 3


@BLURRED_PATHS
def test_ode_solution(path):
    """Many tiny Euler steps of dx/dβ = (x − D)/β + V [Ṁ/(1−M)] Vᵀ R, Ṁ by differences, tend to `ode_factor`."""
    betas = torch.logspace(0, -0.5, 4001, dtype=torch.float64)
    factor = torch.ones([N, N], dtype=torch.float64)
    for beta, beta_next in zip(betas, betas[1:]):
        M, M_next = (blur_mask(path.alpha(b), N) for b in (beta, beta_next))
        gain = M * S / (M ** 2 * S + beta ** 2)
        # Ṁ/(1−M)·R with R = (1−M)·x̂₀ is Ṁ·x̂₀.
        factor = factor * (1 + (beta_next - beta) * (1 - M * gain) / beta + (M_next - M) * gain)
    assert_close(factor, ode_factor(S, path, betas[0], betas[-1]), 2e-3)


# -- deterministic sampling

def error_towards_sigma_min(solver, path, num_steps):
    """RMS error against the exact solution down to σ_min, from where both take the same last step."""
    options = dict(sigma_min=0.02, sigma_max=80)
    factor = deterministic_factor(GaussianOracle(S), num_steps, path=path, solver=solver, **options)
    exact = 80 * ode_factor(S, path, 80, 0.02) * last_step_factor(S, path, 0.02)
    return (factor - exact).square().mean().sqrt().item()


def assert_falls(errors, order):
    """Assert that the second error, at half the step width, is smaller by 2^order; a high order may do better."""
    assert math.log2(errors[0] / errors[1]) > order - 0.3


@ALL_PATHS
@pytest.mark.parametrize('solver', ode_solvers())
def test_order_of_accuracy(solver, path):
    """Halving the step width divides the error by 2^order; of n + 1 steps, n lead to σ_min."""
    assert_falls([error_towards_sigma_min(solver, path, n + 1) for n in (128, 256)], SOLVERS[solver].order)


@ALL_PATHS
@pytest.mark.parametrize('solver', ode_solvers())
def test_covariance_tends_to_its_law(solver, path):
    """The law is 6400·S/(M²S + 6400) × M²S/(M²S + σ_min²), each M at its own end of the path."""
    start, end = (blur_mask(path.alpha(beta), N) ** 2 * S for beta in (80.0, 0.002))
    law = 6400 * S / (start + 6400) * end / (end + 0.002 ** 2)
    errors = [(deterministic_factor(GaussianOracle(S), steps, path=path, solver=solver).square() / law - 1).abs().max()
              for steps in (200, 400)]
    assert_falls(errors, SOLVERS[solver].order)
    assert errors[1] < 0.1
    assert (law / S).min() > 0.9 and (law / S).max() <= 1, 'a path has to end near the data'


@ALL_PATHS
def test_samples_are_linear_in_the_latents(path):
    """A factor per band describes the deterministic sampler, whatever the latents; `sampler_factors` relies on it."""
    z = noise(2, 3, N, N)
    samples = warm_sampler(GaussianOracle(S), z, num_steps=5, path=path)
    factor = deterministic_factor(GaussianOracle(S), 5, path=path)
    assert_close(samples, filter_bands(z, factor), 1e-9)


# -- noise that is added

@ALL_PATHS
def test_churn_keeps_the_marginal(path):
    """From any level to any noisier one, the variance of each band becomes that of the path there."""
    one = idct2(torch.ones([1, 1, N, N], dtype=torch.float64))
    for beta, raised in ((0.002, 0.0028), (0.5, 0.6), (80.0, 113.0), (1.0, 1.0)):
        here, there = (Level(path.alpha(b), b, path.is_hot) for b in (beta, raised))
        signal = dct2(add_churn(one, here, there, torch.zeros_like(one)))[0, 0]
        added = dct2(add_churn(torch.zeros_like(one), here, there, one))[0, 0]
        before, after = (marginal_variance(blur_mask(path.alpha(b), N), b, S) for b in (beta, raised))
        assert_close((signal ** 2 * before + added ** 2) / after, torch.ones_like(S), 1e-10)


def test_churn_scales_its_noise():
    one = idct2(torch.ones([1, 1, N, N], dtype=torch.float64))
    for path in PATHS_HERE:
        here, there = (Level(path.alpha(b), b, path.is_hot) for b in (0.5, 0.6))
        once, twice = (add_churn(torch.zeros_like(one), here, there, one, S_noise) for S_noise in (1, 2))
        assert_close(twice, 2 * once, 1e-12)


@ALL_PATHS
def test_churned_samples_tend_to_the_spectrum_of_the_data(path):
    """The error falls with second order, as without churn; the floor that the last step sets is far below."""
    spectrum, errors = prior_spectrum(8), []
    for num_steps in (120, 240):
        factors = sampler_factors(GaussianOracle(spectrum), num_steps, path=path, S_churn=20)
        assert factors[1:-1].abs().max() > 0.1, 'no noise was added'
        errors.append((factors.square().sum(0) / spectrum - 1).abs().max().item())
    assert errors[1] < errors[0] / 3 and errors[1] < 0.05


@ALL_PATHS
def test_stochastic_transition_keeps_the_marginal(path):
    """Eq. 2: with D and R of the true image, x′ = V M′ Vᵀ x₀ + √(β′² − σ²)·ε + σz."""
    x_0, eps, z = noise(2, 3, N, N), noise(2, 3, N, N, seed=1), noise(2, 3, N, N, seed=2)
    here, there = (Level(path.alpha(b), b, path.is_hot) for b in (1.3, 0.8))
    x = blur(x_0, here.alpha) + here.beta * eps
    for sigma in (0, 0.3, 0.8):
        x_next = transition(x, blur(x_0, here.alpha), rest(x_0, here.alpha), here, there, sigma, z)
        expected = blur(x_0, there.alpha) + math.sqrt(0.8 ** 2 - sigma ** 2) * eps + sigma * z
        assert_close(x_next, expected, 1e-12)


@ALL_PATHS
@pytest.mark.parametrize('solver, options', STOCHASTIC)
def test_stochastic_samples_tend_to_the_spectrum_of_the_data(path, solver, options):
    errors = []
    for num_steps in (60, 120):
        factors = sampler_factors(GaussianOracle(S), num_steps, path=path, solver=solver, **options)
        assert factors[1:-1].abs().max() > 0.05, 'no noise was added'
        errors.append((factors.square().sum(0) / S - 1).abs().max().item())
    assert errors[1] < 0.6 * errors[0] < 0.4, 'the error should halve with the steps'


def test_sampler_factors_speak_for_drawn_noise():
    """With drawn noise, the samples are the sum of all noise sources, each through its factor."""
    net, path, steps = GaussianOracle(S), ConstantBNR(0.5), 6
    options = dict(path=path, S_churn=3, S_noise=1.01)
    factors = sampler_factors(net, steps, **options)
    latents, *draws = noise(steps + 1, 2, 1, N, N)
    queue = iter(draws)
    samples = warm_sampler(net, latents, randn_like=lambda x: next(queue), num_steps=steps, **options)
    expected = sum(filter_bands(source, factor) for source, factor in zip([latents, *draws], factors))
    assert_close(samples, expected, 1e-9)


# -- BNR 0

class Toy:
    """The denoiser of samplers.npz; an EDM network, without `denoise_deblur`."""

    sigma_min, sigma_max = 0, math.inf

    def round_sigma(self, sigma):
        return torch.as_tensor(sigma)

    def __call__(self, x, sigma, class_labels=None):
        x = x.to(torch.float64)
        return x * 0.25 / (0.25 + sigma ** 2) + 0.05 * torch.tanh(x)


class WarmToy(Toy):
    """`Toy` with a Warm network's interface."""

    def denoise_deblur(self, x, sigma, class_labels=None, alpha=None):
        assert not alpha
        return self(x, sigma), torch.zeros_like(x)


@pytest.mark.parametrize('net', [Toy(), WarmToy()])
@pytest.mark.parametrize('case', ['edm18', 'edm5', 'edm_range', 'edm_churn', 'edm_churn_all'])
def test_bnr_0_equals_the_edm_sampler(golden, case, net):
    record = golden('samplers')

    def draw(sampler, **options):
        rnd = StackedRandomGenerator('cpu', record.meta['seeds'])
        latents = rnd.randn([4, 3, 8, 8])
        rnd.randint(10, size=[4])
        return sampler(net, latents, randn_like=rnd.randn_like, **record.meta['cases'][case], **options)

    # test_samplers.py compares EDM's with the record.
    assert torch.equal(draw(warm_sampler, path=ConstantBNR(0), solver='heun'), draw(edm_sampler))


@pytest.mark.parametrize('solver', ode_solvers())
def test_slight_blur_tends_to_no_blur(solver):
    """BNR 0, which takes the path without DCT, is the limit of small BNRs, which take the one with it."""
    hot, slight = (deterministic_factor(GaussianOracle(S), 10, path=ConstantBNR(bnr), solver=solver)
                   for bnr in (0, 1e-6))
    assert_close(slight, hot, 1e-8)


# -- what the samplers do with options

def test_the_last_state_is_the_clean_estimate():
    """A step to β′ = 0 returns x̂₀; with a single step, which multistep solvers do not take, that is the sample."""
    z = noise(1, 3, N, N)
    for solver in SOLVERS.keys() - MULTISTEP:
        samples = warm_sampler(GaussianOracle(S), z, num_steps=1, path=ConstantBNR(0.5), solver=solver)
        assert_close(samples, GaussianOracle(S)(80 * z, 80.0, alpha=40.0), 1e-12)


@pytest.mark.parametrize('options, said', [
    *((dict(solver=solver, S_churn=10), 'with --S_churn') for solver in MULTISTEP),
    *((dict(solver=solver, num_steps=1), 'at least 2 steps') for solver in MULTISTEP),
    (dict(solver='rk4'), ', '.join(SOLVERS)), (dict(eta=0.5), '--solver=euler'), (dict(zeta=1), '--zeta'),
    (dict(eta=0.5, solver='dpmpp2m'), '--solver=euler'), (dict(eta=1.5, solver='euler'), 'between 0'),
    (dict(eta=-0.1, solver='euler'), 'between 0'), (dict(eta=math.nan, solver='euler'), 'between 0'),
    (dict(eta=0.5, solver='euler', S_churn=3), '--S_churn'), (dict(num_steps=0), 'at least 1'),
    (dict(num_steps=2.5), 'whole number'), (dict(S_churn=-1), 'S_churn'), (dict(S_churn=math.nan), 'S_churn'),
    (dict(S_noise=math.inf), 'S_noise'), (dict(sigma_min=5, sigma_max=1), 'sigma_min'), (dict(rho=0), 'rho'),
])
def test_options_are_refused_in_a_sentence(options, said):
    net = GaussianOracle(S)
    with pytest.raises(UserError) as e:
        warm_sampler(net, noise(1, 1, N, N), path=ConstantBNR(0.5), **options)
    assert said in str(e.value) and '\n' not in str(e.value) and net.calls == 0


@pytest.mark.parametrize('option', options_of(SOLVERS), ids=lambda option: option.name)
def test_options_of_solvers(option):
    """Each option has one meaning and a name of its own; solvers without it accept its default and drop it."""
    assert option.name not in SAMPLER_DEFAULTS
    for name, solver in SOLVERS.items():
        full = with_defaults({'solver': name, option.name: option.default})
        assert (option.name in full) == (option in solver.options)


def test_a_new_solver_is_one_function_and_one_line(monkeypatch):
    """That holds with noise and an option too: here a step keeps a share of the old noise and draws the rest."""
    def step(denoise, x, D, R, here, there, z, memory, kept):
        return transition(x, D, R, here, there, math.sqrt(1 - kept ** 2) * there.beta, z)
    monkeypatch.setitem(SOLVERS, 'renewing', Solver(
        step, order=None, options=(Option('kept', 0.9, 'Share', type=float),), adds_noise=lambda kept: kept < 1))

    def factors(**options):
        return sampler_factors(GaussianOracle(S), 120, path=ConstantBNR(0.5), solver='renewing', **options)
    assert factors()[1:-1].abs().max() > 0.05 and (factors().square().sum(0) / S - 1).abs().max() < 0.3
    assert torch.equal(factors(), factors(kept=0.9)) and not torch.equal(factors(), factors(kept=0.8))
    assert_close(factors(kept=1)[0], deterministic_factor(GaussianOracle(S), 120, path=ConstantBNR(0.5),
                                                          solver='euler'), 1e-12)
    assert factors(kept=1, S_churn=20)[1:-1].abs().max() > 0.05
    assert options_of(SOLVERS)[-1].name == 'kept' and 'renewing' not in ode_solvers()
    for refused, said in ((dict(kept=0.8), '--kept is not an option of the solver heun; use it with --solver=renewing'),
                          (dict(solver='renewing', S_churn=1), '--solver=renewing and --S_churn both add noise'),
                          (dict(solver='renewing', kept=0.8, S_churn=1), '--kept and --S_churn both add noise'),
                          (dict(solver='renewing', eta=0.5), '--eta is not an option of the solver renewing')):
        with pytest.raises(UserError, match=said):
            with_defaults(refused)


def test_a_new_multistep_solver_says_so_in_its_line(monkeypatch):
    monkeypatch.setitem(SOLVERS, 'twin', Solver(dpmpp2m_step, order=2, multistep=True))
    z = noise(1, 1, N, N)
    twins = [warm_sampler(GaussianOracle(S), z, num_steps=5, path=ConstantBNR(0.5), solver=solver)
             for solver in ('dpmpp2m', 'twin')]
    assert torch.equal(*twins)
    for refused, said in ((dict(S_churn=10), 'twin carries'), (dict(num_steps=1), 'twin needs at least 2 steps')):
        with pytest.raises(UserError, match=said):
            with_defaults(dict(refused, solver='twin'))


def test_an_edm_network_is_not_sampled_with_blur():
    with pytest.raises(UserError, match='--bnr=0'):
        warm_sampler(Toy(), noise(1, 1, 8, 8), path=ConstantBNR(0.5))


# -- the page

@pytest.mark.parametrize('path, half, same', [(ConstantBNR(0), 0.97, 0.25), (ConstantBNR(0.5), 0.57, 0.15),
                                              (ConstantBNR(1), 0.39, 0.11), (ConstantBNR(2), 1.13, 0.33),
                                              (BlurringSchedule(20), 1.84, 0.84)], ids=str)
def test_ratios_with_the_spectrum_of_cifar_10(golden, path, half, same):
    """The page's note states DPM-Solver++(2M)'s error over Heun's, with half as many evaluations and with as many."""
    S = torch.tensor(golden('cifar10-spectrum').power)
    heun = oracle.solver_error(S, path, 'heun', 18)[0]
    ratios = [oracle.solver_error(S, path, 'dpmpp2m', steps)[0] / heun for steps in (19, 35)]
    assert ratios == pytest.approx([half, same], abs=0.006)
    assert f'{half:.2f} and {same:.2f}' in ' '.join(oracle.CIFAR10_NOTE.split())


def test_last_step_error_is_the_spec_s_floor(golden):
    S = torch.tensor(golden('cifar10-spectrum').power)
    assert oracle.last_step_error(S, ConstantBNR(0.5)) == pytest.approx(4e-5, rel=0.1)


def test_the_page_has_the_numbers_of_the_code(root):
    text = (root / 'docs' / 'solvers.md').read_text()
    table = oracle.errors(prior_spectrum(oracle.RESOLUTION), oracle.TABLE_NFE)
    for row in (*oracle.error_rows(table), *oracle.ratio_rows(table)):
        assert row in text, 'make the page anew: python -m warm.oracle --outdir=docs'


def test_solver_error_is_that_of_drawn_samples():
    spectrum, path = prior_spectrum(8), ConstantBNR(0.5)
    error, nfe = oracle.solver_error(spectrum, path, 'heun', 6)
    z = noise(3000, 1, 8, 8)
    exact = filter_bands(80 * z, (spectrum / marginal_variance(blur_mask(path.alpha(80), 8), 80, spectrum)).sqrt())
    drawn = (warm_sampler(GaussianOracle(spectrum), z, num_steps=6, path=path) - exact).square().mean().sqrt().item()
    assert error == pytest.approx(drawn, rel=0.05) and nfe == 11


@pytest.mark.parametrize('solver, nfe, steps', [('euler', 19, 19), ('heun', 35, 18), ('heun', 36, 18),
                                                ('dpmpp2m', 79, 79)])
def test_steps_for_a_budget(solver, nfe, steps):
    assert oracle.steps_for(solver, nfe) == steps


def test_the_command_makes_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(oracle, 'RESOLUTION', 4)
    monkeypatch.setattr(oracle, 'CURVE_NFE', oracle.TABLE_NFE)
    result = CliRunner().invoke(oracle.main, [f'--outdir={tmp_path / "new"}'])
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / 'new').iterdir()) == ['solvers.md', 'solvers.png', 'solvers.svg']
    assert '4×4 bands' in (tmp_path / 'new' / 'solvers.md').read_text()
