"""Blurs other than the Gaussian: the same mathematics at other rates, through every part and every command."""

import json
import math

import numpy as np
import pytest
import scipy.fft
import scipy.ndimage
import torch

from dnnlib import UserError
from dnnlib.flags import Key
from tests.commands import SMALL, invoke, refused, succeed
from tests.warm_examples import batch, by_hand, images_of, outputs_of, warm_net
from torch_utils.constants import constant
from training.loss import edm_loss_weight
from training.precond import edm_scalings
from training.snapshot import build_network, read_snapshot
from warm.blur import BLUR_RATES, blur, blur_and_rest, blur_mask, natural_rates, prior_spectrum, rest
from warm.bnr import recommended_bnr, spectral_gap
from warm.loss import WarmLoss
from warm.oracle import GaussianOracle, deterministic_factor, ode_solvers, sampler_factors
from warm.path import ConstantBNR
from warm.samplers import SOLVERS, add_churn
from warm.spectrum import ring_mean, spectra
from warm.steps import Level
from warm.systems import SYSTEMS
from warm.targets import TARGETS, BlurredOnly

N = 8
EVERY_BLUR = pytest.mark.parametrize('rates', BLUR_RATES.values(), ids=BLUR_RATES)


@constant
def horizontal_rates(n, device=torch.device('cpu')):
    """A user's own blur, along rows alone: λ[k,l] = (πl/n)²."""
    return (torch.arange(n, dtype=torch.float64) * math.pi / n).square().expand(n, n).to(device)


@pytest.fixture
def horizontal(monkeypatch):
    monkeypatch.setitem(BLUR_RATES, 'horizontal', horizontal_rates)


def along_rows(x, alpha):
    """x [B, C, N, N] blurred along its rows by α [B], by SciPy's one-dimensional DCT."""
    bands = scipy.fft.dct(np.float64(x), axis=-1, norm='ortho')
    rate = (math.pi / N * np.arange(N)) ** 2
    bands *= np.exp(-rate * np.float64(alpha).reshape(-1, 1, 1, 1) ** 2 / 2)
    return torch.tensor(scipy.fft.idct(bands, axis=-1, norm='ortho'))


# -- blurs

@EVERY_BLUR
@pytest.mark.parametrize('n', [2, 8, 32])
def test_rates(rates, n):
    """They are finite, ≥ 0, and 0 for the mean alone."""
    values = rates(n)
    assert values.shape == (n, n) and values.dtype == torch.float64 and values.isfinite().all()
    assert values[0, 0] == 0 and (values.flatten()[1:] > 0).all()


@EVERY_BLUR
def test_laws(rates):
    """Two blurs make one, the mean stays, and what is blurred away is the rest."""
    x = torch.randn([2, 3, N, N], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    both = blur(blur(x, 3.0, rates), 4.0, rates)
    torch.testing.assert_close(both, blur(x, 5.0, rates), rtol=0, atol=1e-12)
    torch.testing.assert_close(both.mean((2, 3)), x.mean((2, 3)))
    blurred, left = blur_and_rest(x, torch.tensor([0.3, 2.0]), rates)
    torch.testing.assert_close(blurred + left, x)
    assert torch.equal(left[1:], rest(x[1:], 2.0, rates))


def test_natural_rates_by_definition():
    k = np.arange(32.0)
    power = (k[:, None] ** 2 + k ** 2 + 1) ** 1.2 - 1
    expected = power * (2 * (31 * math.pi / 32) ** 2 / power[-1, -1])
    torch.testing.assert_close(natural_rates(32), torch.tensor(expected))


def test_natural_rates_follow_the_signal():
    """Where noise has a given share of a band's power, all but the lowest have faded alike; not so the Gaussian's."""
    S = prior_spectrum(32)

    def faded(rates, k):
        return 1 - blur_mask(0.5 * S[k, k].sqrt(), 32, rates)[k, k].item()
    natural, gaussian = ([faded(rates, k) for k in (2, 5, 12, 31)] for rates in (natural_rates, BLUR_RATES['gaussian']))
    assert max(natural) < 1.1 * min(natural) and max(gaussian) > 2 * min(gaussian)


def test_a_blur_of_rows():
    x = torch.randn([1, 3, 32, 32], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = scipy.ndimage.gaussian_filter1d(x.numpy(), 2.5, mode='reflect', truncate=8)
    torch.testing.assert_close(blur(x, 2.5, horizontal_rates), torch.tensor(expected), rtol=0, atol=1e-7)


# -- the network and its loss

class OwnBlur(BlurredOnly):
    """The blurred image once more, from what an example says of the blur."""

    def targets(self, example):
        return (blur(example.images, example.alpha, example.rates),)


@pytest.mark.parametrize('targets', ['residual', 'clean', 'blurred', 'clean-blurred', 'own'])
def test_loss(horizontal, targets, monkeypatch):
    """The state is blurred along rows, and so is what each branch learns."""
    monkeypatch.setitem(TARGETS, 'own', OwnBlur())
    net, images = warm_net(blur='horizontal', targets=targets), images_of()
    torch.manual_seed(7)
    loss = WarmLoss()(net, images)
    torch.manual_seed(7)
    sigma, alpha, y, _, noise = by_hand('0.5', images)
    blurred = along_rows(y, alpha).float()
    learnt = {'residual': (blurred, y - blurred), 'clean': (y,), 'clean-blurred': (blurred, y)}
    estimates = net(blurred + noise * sigma, sigma, alpha=alpha, return_estimates=True)
    pairs = zip(estimates, learnt.get(targets, (blurred,)), strict=True)
    expected = sum(edm_loss_weight(sigma) * (a - b) ** 2 for a, b in pairs)
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('targets', ['clean', 'clean-blurred'])
def test_parts(horizontal, targets):
    """D and R follow from what the branches estimate by the network's own blur."""
    net = warm_net(blur='horizontal', targets=targets)
    x, sigma, _ = batch()
    alpha = 0.5 * sigma
    estimates = net(x, sigma, alpha=alpha, return_estimates=True)
    D, R = net.denoise_deblur(x, sigma, alpha=alpha)
    blurred = along_rows(estimates[-1].detach(), alpha)
    torch.testing.assert_close(R.double(), estimates[-1] - blurred, rtol=0, atol=1e-5 * R.abs().max().item())
    expected = blurred.float() if targets == 'clean' else estimates[0]
    torch.testing.assert_close(D, expected, rtol=0, atol=1e-5 * D.abs().max().item())


def test_parts_of_the_blurred_branch(horizontal):
    net = warm_net(blur='horizontal', targets='blurred')
    x, sigma, _ = batch()
    alpha = torch.full_like(sigma, 0.4)  # so little that no band is lost
    D, R = net.denoise_deblur(x, sigma, alpha=alpha)
    torch.testing.assert_close(along_rows((D + R).detach(), alpha).float(), D, rtol=0, atol=1e-5 * D.abs().max().item())


def test_scale_of_the_rest(horizontal):
    """s_R is the magnitude of what this blur removes from the prior's images."""
    net = warm_net(blur='horizontal')
    x, sigma, _ = batch()
    alpha = 0.5 * sigma
    gone = 1 - np.exp(-(math.pi / N * np.arange(N)) ** 2 * np.float64(alpha).reshape(-1, 1, 1) ** 2 / 2)
    s_R = np.sqrt((gone ** 2 * prior_spectrum(N).numpy()).mean((1, 2)))
    F_D, F_R = outputs_of(net, x, sigma, alpha)
    R = torch.tensor(s_R, dtype=torch.float32).reshape(-1, 1, 1, 1) * F_R
    D, R_net = net.denoise_deblur(x, sigma, alpha=alpha)
    torch.testing.assert_close(R_net, R - R.mean((2, 3), keepdim=True), rtol=1e-4, atol=1e-7)
    c_skip, c_out, _, _ = edm_scalings(sigma.reshape(-1, 1, 1, 1))
    torch.testing.assert_close(D, c_skip * x + c_out * F_D)


# -- sampling

@pytest.mark.parametrize('solver', ode_solvers())
def test_solvers_tend_to_the_solution(solver):
    """With a user's blur, in each band x ∝ √(M²S + β²), and x̂₀ at the end, with each solver's order."""
    S, path = prior_spectrum(N), ConstantBNR(1)
    start, end = (np.exp(-horizontal_rates(N).numpy() * beta ** 2) * S.numpy() for beta in (80, 0.002))  # M²S
    law = 6400 * S.numpy() / (start + 6400) * end / (end + 0.002 ** 2)
    errors = [np.abs(deterministic_factor(GaussianOracle(S, horizontal_rates), n, path=path, solver=solver).numpy() ** 2
                     / law - 1).max() for n in (100, 200)]
    assert errors[1] < 0.1 and math.log2(errors[0] / errors[1]) > SOLVERS[solver].order - 0.3


def test_churn_keeps_the_marginal():
    S = prior_spectrum(N)
    here, there = (Level(beta, beta, rates=horizontal_rates) for beta in (0.5, 0.6))
    eye = torch.ones([1, 1, N, N], dtype=torch.float64)
    M, M_next = (np.exp(-horizontal_rates(N).numpy() * beta ** 2 / 2) for beta in (0.5, 0.6))

    def bands(x):
        return scipy.fft.dctn(x.numpy()[0, 0], norm='ortho')
    ones = torch.tensor(scipy.fft.idctn(eye.numpy(), axes=(2, 3), norm='ortho'))
    kept, added = bands(add_churn(ones, here, there, 0 * ones)), bands(add_churn(0 * ones, here, there, ones))
    np.testing.assert_allclose(kept ** 2 * (M ** 2 * S.numpy() + 0.25) + added ** 2, M_next ** 2 * S.numpy() + 0.36,
                               rtol=1e-9)


def test_churn_in_the_sampler():
    """The samples' variance with churn is near the data's, which a Gaussian's churn on this path would miss."""
    S = prior_spectrum(N)
    factors = sampler_factors(GaussianOracle(S, horizontal_rates), 60, path=ConstantBNR(0.5), S_churn=20)
    assert (factors.square().sum(0) / S - 1).abs().max() < 0.1


# -- commands

def test_key_is_read_when_the_command_runs():
    registry = {'a': 1}
    key = Key(registry)
    registry['b'] = 2
    assert key.choices == ('a', 'b') and key.convert('b', None, None) == 'b'


def test_a_blur_registered_later(horizontal, monkeypatch, tmp_path):
    """It is trained, recorded, sampled by its own rates, and missed with a sentence where it is not registered."""
    succeed('train.py', '--precond=warm', '--blur=horizontal', f'--outdir={tmp_path}', '--nosubdir',
            '--duration=0.000016', '--seed=0', *SMALL)
    snapshot = tmp_path / 'network-snapshot-000000.safetensors'
    assert build_network(read_snapshot(str(snapshot)), SYSTEMS).rates is horizontal_rates
    draw = ('generate.py', f'--network={snapshot}', '--seeds=0', '--steps=3')
    succeed(*draw, f'--outdir={tmp_path}/out', f'--trajectory={tmp_path}/steps.png')
    assert '--blur=horizontal' in (tmp_path / 'out' / 'generation.json').read_text()
    monkeypatch.delitem(BLUR_RATES, 'horizontal')
    refused(invoke(*draw, f'--outdir={tmp_path}/out2'), "blur 'horizontal'")
    refused(invoke('train.py', '-n', '--precond=warm', '--blur=horizontal'), "'horizontal' is not one of")


def test_a_blur_without_blurring_is_refused():
    with pytest.raises(UserError, match='--blur=natural has no effect at BNR 0'):
        warm_net(blur='natural', bnr='0')


def test_auto_measures_with_the_blur(tmp_path):
    """The natural blur leaves more of what decides, so the rule allows more of it."""
    def chosen(*flags):
        output = succeed('train.py', '-n', '--precond=warm', '--bnr=auto', f'--outdir={tmp_path}', *flags)
        assert 'The spectrum of digits-8x8 recommends BNR 0.' in output
        return float(json.loads(output[output.index('{'):output.rindex('}') + 1])['network_kwargs']['bnr'])
    def measured(*flags):
        return float(succeed('warm.spectrum', *flags).split()[-1])
    assert measured('--blur=natural') == chosen('--blur=natural') > measured() == chosen() == 0.13


def test_figure_3():
    """Its curves, too, are of the blur that was asked for."""
    S = prior_spectrum(16)
    curves = spectra(S, 2, 0.3, natural_rates)
    M = torch.exp(-natural_rates(16) * 0.6 ** 2 / 2)
    torch.testing.assert_close(curves['denoising target M²S'], ring_mean(M ** 2 * S))
    torch.testing.assert_close(curves['deblurring target (1−M)²S'], ring_mean((1 - M) ** 2 * S))


def test_rule_by_hand():
    S, bnr, beta = prior_spectrum(16), 0.7, np.logspace(-3, 2, 2000)[:, None, None]
    squared_mask = np.exp(-natural_rates(16).numpy() * (bnr * beta) ** 2)
    gap = 10 * np.log10((S.numpy() + beta ** 2) / (squared_mask * S.numpy() + beta ** 2)).max()
    assert spectral_gap(S, bnr, natural_rates) == pytest.approx(gap, rel=1e-3)
    found = recommended_bnr(S, 0.5, natural_rates)
    assert spectral_gap(S, found, natural_rates) <= 0.5 < spectral_gap(S, found + 0.01, natural_rates)
