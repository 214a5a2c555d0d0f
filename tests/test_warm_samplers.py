"""warm.samplers against the recorded values (its laws: test_warm_oracle.py)."""

import json
import math
import pathlib

import numpy as np
import pytest
import torch

from dnnlib import UserError
from training.samplers import edm_sigma_steps
from warm.blur import prior_spectrum
from warm.oracle import GaussianOracle
from warm.path import BlurringSchedule, ConstantBNR
from warm.precond import WarmPrecond
from warm.samplers import SOLVERS, warm_sampler
from warm.steps import Level, transition

PATHS = {'bnr0': ConstantBNR(0), 'bnr0.1': ConstantBNR(0.1), 'bnr0.5': ConstantBNR(0.5), 'bnr1': ConstantBNR(1),
         'bnr2': ConstantBNR(2), 'blurring20': BlurringSchedule(20)}


class Uneven(GaussianOracle):
    """A network whose D and R do not fit together; R has a mean, which the sampler must ignore."""

    def denoise_deblur(self, x, sigma, class_labels=None, alpha=None):
        self.calls += 1
        R = 0.1 * torch.tanh(x) + 0.02 if alpha > 0 else torch.zeros_like(x)
        return 0.25 * x / (0.25 + sigma ** 2), R


@pytest.fixture(scope='module')
def record(golden):
    return golden('warm-sampler')


def recorded_cases():
    with np.load(pathlib.Path(__file__).parent / 'golden' / 'warm-sampler.npz') as z:
        return json.loads(str(z['meta']))['cases']


@pytest.mark.parametrize('name', recorded_cases())
def test_recorded(record, name):
    case = dict(record.meta['cases'][name])
    path, steps, nfe = PATHS[case.pop('path')], case.pop('steps'), case.pop('nfe')
    net = (Uneven if case.pop('net', None) else GaussianOracle)(torch.tensor(record.spectrum))
    noise = iter(torch.tensor(record.churn_noise)) if 'S_churn' in case else None
    draw = (lambda x: next(noise)) if noise is not None else torch.randn_like
    out = warm_sampler(net, torch.tensor(record.latents), randn_like=draw, num_steps=steps, path=path, **case)
    torch.testing.assert_close(out, torch.tensor(record.arrays[name]), rtol=1e-9, atol=1e-9)
    assert net.calls == nfe


def test_recorded_transition(golden):
    r = golden('warm-transition')
    m = r.meta
    x, D, R, z = (torch.tensor(r.arrays[k]) for k in 'xDRz')
    here, there = Level(m['alpha'], m['beta']), Level(m['alpha_next'], m['beta_next'])
    torch.testing.assert_close(transition(x, D, R, here, there, m['sigma'], z), torch.tensor(r.x_next),
                               rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('sigma', [-0.1, 0.71, math.nan])
def test_a_step_with_more_noise_than_its_goal_is_refused(sigma):
    x = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match='not between 0 and the noise level 0.7'):
        transition(x, x, x, Level(0.5, 1.0), Level(0.35, 0.7), sigma, x)
    transition(x, x, x, Level(0.5, 1.0), Level(0.35, 0.7), 0.7, x)


def test_recorded_spectrum_is_the_prior(record):
    torch.testing.assert_close(prior_spectrum(16), torch.tensor(record.spectrum), rtol=1e-9, atol=0)


@pytest.mark.parametrize('solver', SOLVERS)
@pytest.mark.parametrize('path', ['bnr0', 'bnr0.5'])
def test_levels_that_are_rounded_to_one(record, path, solver):
    """A grid may be finer than the network's levels: samples stay finite through steps between equal levels."""
    class Coarse(GaussianOracle):
        def round_sigma(self, sigma):
            return torch.where(sigma > 0, (2 * sigma.log2()).round().div(2).exp2(), 0)

    net, latents = Coarse(torch.tensor(record.spectrum)), torch.tensor(record.latents)
    many = warm_sampler(net, latents, num_steps=100, path=PATHS[path], solver=solver)
    assert torch.isfinite(many).all()
    levels = edm_sigma_steps(100, 0.002, 80, 7, net)[:-1].unique()
    assert len(levels) < 50
    if solver == 'heun':
        assert net.calls == 2 * len(levels) - 1  # a step between equal levels takes no evaluation


def test_network_without_blur_refuses_a_path_with_blur():
    net = WarmPrecond(img_resolution=8, img_channels=1, model_channels=8, channel_mult=[1], bnr='0')
    assert warm_sampler(net, torch.randn([1, 1, 8, 8]), num_steps=2).shape == (1, 1, 8, 8)
    with pytest.raises(UserError, match='only denoises'):
        warm_sampler(net, torch.randn([1, 1, 8, 8]), num_steps=2, path=PATHS['bnr2'])


@pytest.mark.parametrize('path', ['bnr0', 'bnr0.5'])
def test_churn_keeps_to_the_networks_levels(record, path):
    """Levels raised by churn are rounded like the grid's, so a network meets no level that it does not have."""
    seen = []

    class Coarse(GaussianOracle):
        def round_sigma(self, sigma):
            return torch.as_tensor(sigma).round(decimals=1)

        def denoise_deblur(self, x, sigma, class_labels=None, alpha=None):
            seen.append(float(sigma))
            return super().denoise_deblur(x, sigma, class_labels, alpha)
    warm_sampler(Coarse(torch.tensor(record.spectrum)), torch.tensor(record.latents), num_steps=6, sigma_min=0.4,
                 sigma_max=20.2, S_churn=2, path=PATHS[path])
    np.testing.assert_allclose(seen, np.round(seen, 1), rtol=0, atol=1e-12)


def test_a_path_needs_no_more_than_alpha():
    """Such as a script's own, that is none of the classes here."""
    class Half:
        def alpha(self, beta):
            return 0.5 * beta
    net, x = GaussianOracle(prior_spectrum(8)), torch.randn([2, 3, 8, 8], dtype=torch.float64)
    assert torch.equal(warm_sampler(net, x, path=Half(), num_steps=3),
                       warm_sampler(net, x, path=ConstantBNR(0.5), num_steps=3))
