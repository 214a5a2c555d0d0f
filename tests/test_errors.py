"""Errors of D, R, x̂₀ and the sampler's direction by noise level (warm.errors)."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from dnnlib import UserError
from tests.small_networks import TRAINABLE, tiny_network
from training.dataset import EMBEDDED, ImageFolderDataset
from training.pixels import to_float
from training.snapshot import save_snapshot
from warm import errors
from warm.blur import blur_mask, dct2, frequencies, natural_rates, rest_mask
from warm.errors import BETAS, QUANTITIES, draw_errors, network_errors, relative, sample_images, table
from warm.figures import draw
from warm.oracle import GaussianOracle
from warm.path import BlurringSchedule, ConstantBNR
from warm.precond import WarmPrecond
from warm.systems import SYSTEMS


KNOWN = [name for name, system in SYSTEMS.items() if issubclass(system.network_class, (WarmPrecond, *errors.DENOISERS))]


@pytest.fixture(scope='module')
def digits():
    """(uint8 [N, 1, 8, 8], their mean power in each band)."""
    dataset = ImageFolderDataset(EMBEDDED, max_size=300)
    images, _ = dataset.batch(range(len(dataset)))
    return images, dct2(to_float(torch.as_tensor(images))).square().mean((0, 1))


class Known(torch.nn.Module):
    """A network that is a function (x, β, α) → (D, R), or also of labels."""

    def __init__(self, function, rates=frequencies):
        super().__init__()
        self.function, self.rates, self.nothing = function, rates, torch.nn.Parameter(torch.zeros([]))
        self.model, self.label_dim = torch.nn.Identity(), 0

    def denoise_deblur(self, x, sigma, class_labels=None, alpha=0):
        return self.function(x, sigma, alpha=alpha, **({} if class_labels is None else dict(labels=class_labels)))


def zero(x, sigma, alpha):
    return torch.zeros_like(x), torch.zeros_like(x)


@pytest.mark.parametrize('path', [ConstantBNR(0), ConstantBNR(0.5), BlurringSchedule()], ids=str)
@pytest.mark.parametrize('rates', [frequencies, natural_rates])
def test_the_linear_filter_is_1(digits, path, rates):
    images, power = digits
    net = Known(GaussianOracle(power, rates).denoise_deblur, rates)
    for level in network_errors(net, images, path=path, betas=(0.02, 0.5, 20)):
        for name in QUANTITIES:
            expected = None if path.is_hot and name == 'R' else pytest.approx(1, abs=1e-9)
            assert relative(level, name) == expected


@pytest.mark.parametrize('bnr', [0, 0.5, 2])
def test_errors_of_nothing_are_the_targets_power(digits, bnr):
    """A network that returns 0 errs by the targets themselves, whose power per band is known."""
    images, S = digits
    lam = frequencies(8)
    for level in network_errors(Known(zero), images, path=ConstantBNR(bnr), betas=(0.05, 1, 5)):
        alpha = bnr * level['beta']
        assert level['alpha'] == pytest.approx(alpha)
        M, gone = blur_mask(alpha, 8), rest_mask(alpha, 8)
        # β dx/dβ = (x − D) + V [β Ṁ/(1−M)] Vᵀ R with Ṁ = −λ α BNR M at constant BNR.
        slope = M + lam * alpha ** 2 * M
        expected = {'D': M.square() * S, 'R': gone.square() * S, 'clean': S, 'step': slope.square() * S}
        for name, bands in expected.items():
            assert level[name][0] == pytest.approx(bands.mean().item(), rel=3e-3 if name == 'step' else 1e-9)


def test_the_filter_errs_as_theory_says(digits):
    """E‖x̂₀ − x₀‖² per band is S β²/(M²S + β²), up to chance in the noise."""
    images, S = digits
    for level in network_errors(Known(zero), images, path=ConstantBNR(0.5), betas=(0.1, 1)):
        M = blur_mask(level['alpha'], 8)
        variance = S * level['beta'] ** 2 / (M.square() * S + level['beta'] ** 2)
        assert level['clean'][1] == pytest.approx(variance.mean().item(), rel=0.05)
        assert level['D'][1] == pytest.approx((M.square() * variance).mean().item(), rel=0.05)


@pytest.mark.parametrize('name', KNOWN)
def test_networks(digits, name):
    images, _ = digits
    net = tiny_network(name)
    one, other = (network_errors(net, images[:20], betas=(0.1, 1), batch=batch) for batch in (20, 7))
    for level, again in zip(one, other, strict=True):
        assert (level['alpha'] > 0) == isinstance(net, WarmPrecond)
        for quantity in QUANTITIES:
            assert level[quantity] == pytest.approx(again[quantity], rel=1e-4)
            assert np.isfinite(level[quantity]).all()
    assert network_errors(net, images[:20], betas=(1,), seed=1)[0]['D'] != one[1]['D']


@pytest.mark.parametrize('name', sorted({*TRAINABLE} - {*KNOWN}))
def test_other_systems_are_refused(digits, name):
    with pytest.raises(UserError, match='estimates no image'):
        network_errors(tiny_network(name), digits[0])


def test_labels_reach_the_network(digits):
    """Classes by turns; a network told of them errs otherwise than one told of another class."""
    def class_of(x, sigma, alpha, labels):
        return (x * 0 + labels.argmax(1).reshape(-1, 1, 1, 1),) * 2
    images, net = digits[0][:16], Known(class_of)
    labels = np.eye(3, dtype=np.float32)[np.arange(16) % 3]
    classes = to_float(torch.as_tensor(images)).double() - torch.as_tensor(labels).argmax(1).reshape(-1, 1, 1, 1)
    level, = network_errors(net, images, labels, path=ConstantBNR(0), betas=(1,), batch=5)
    assert level['D'][0] == pytest.approx(classes.square().mean().item(), rel=1e-9)


def snapshot(folder, name):
    net = tiny_network(name)
    save_snapshot(folder / f'{name}.safetensors', net, name, kimg=1, dataset=dict(name='digits-8x8'))
    return folder / f'{name}.safetensors'


def test_command(tmp_path):
    paths = [snapshot(tmp_path, name) for name in ('edm', 'warm')]
    out = tmp_path / 'errors.jsonl'
    result = CliRunner().invoke(errors.main, [f'--network={path}' for path in paths]
                                + ['--num=10', f'--out={out}', f'--outdir={tmp_path}/drawn'], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line['system'] for line in lines] == ['edm', 'warm']
    assert all(line['num_images'] == 10 for line in lines)
    assert all([level['beta'] for level in line['levels']] == list(BETAS) for line in lines)
    assert (tmp_path / 'drawn/errors.png').stat().st_size > 10_000 and (tmp_path / 'drawn/errors.svg').is_file()
    rows = [row.split() for row in result.output.splitlines()]
    at_1 = [row for row in rows if row[:1] == ['1']]
    assert [row[1] for row in at_1] == ['0', '0.5'] and at_1[0][3] == '–'
    assert float(at_1[1][3]) == pytest.approx(relative(lines[1]['levels'][BETAS.index(1)], 'R'), abs=1e-3)


def test_command_at_one_of_several_bnrs(tmp_path):
    """--bnr selects the path, the file says which, and it is not the default's."""
    net = tiny_network('warm', bnr='0.5,1')
    save_snapshot(tmp_path / 'both.safetensors', net, 'warm', kimg=1, dataset=dict(name='digits-8x8'))
    out = tmp_path / 'errors.jsonl'
    for options in ([], ['--bnr=1'], ['--bnr=0.5']):
        result = CliRunner().invoke(errors.main, [f'--network={tmp_path}/both.safetensors', '--num=5', f'--out={out}',
                                                  *options], catch_exceptions=False)
        assert result.exit_code == 0, result.output
    default, one, half = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line['path'] for line in (default, one, half)] == [f'constant BNR {bnr}' for bnr in (0.5, 1, 0.5)]
    assert one['levels'][-1]['alpha'] == BETAS[-1] and one['levels'] != default['levels'] == half['levels']


def test_a_bnr_that_the_network_does_not_know():
    assert errors.path_of(tiny_network('edm'), '0').is_hot
    with pytest.raises(UserError, match='--bnr=0.5 does not suit a network of EDMPrecond, which knows no blur'):
        errors.path_of(tiny_network('edm'), '0.5')
    with pytest.raises(UserError, match='this network knows constant BNR 0.5, not constant BNR 2'):
        errors.path_of(tiny_network('warm'), '2')


def test_images_unlike_the_networks_are_refused():
    net = tiny_network('warm')
    net.label_dim = 7
    with pytest.raises(UserError, match='10 classes, the network 7'):
        sample_images(EMBEDDED, 10, 0, net)
    net.label_dim, net.img_resolution = 0, 16
    with pytest.raises(UserError, match='1 × 8 × 8 .* the network.s 1 × 16 × 16'):
        sample_images(EMBEDDED, 10, 0, net)


@pytest.mark.parametrize('options, words', [
    (['--network=missing.safetensors'], 'missing.safetensors'), (['--data=missing.zip'], 'missing.zip'),
    (['--out=warm.safetensors'], 'not a file of JSON lines'), (['--out=no/errors.jsonl'], 'cannot be written'),
    (['--outdir=warm.safetensors'], 'could not create the folder'), (['--seed=99999999999999'], 'not in the range'),
    (['--network=cold.safetensors'], 'estimates no image')], ids=str)
def test_bad_input_is_found_before_any_work(tmp_path, monkeypatch, options, words):
    """One sentence, and nothing is written; files that exist keep their content."""
    paths = [snapshot(tmp_path, name) for name in ('warm', 'cold')]
    before = [path.read_bytes() for path in paths]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(errors, 'network_errors', None)
    result = CliRunner().invoke(errors.main, ['--network=warm.safetensors', '--out=errors.jsonl', *options])
    assert result.exit_code and words in result.output and isinstance(result.exception, SystemExit), result.output
    assert [path.read_bytes() for path in paths] == before and not (tmp_path / 'errors.jsonl').exists()


def test_a_network_that_diverged(tmp_path):
    """Its errors are no numbers: there is a dash in the table, null in the file, and the figure leaves it out."""
    level = dict(beta=1, alpha=0.5, **{name: [float('nan'), 1.0] for name in QUANTITIES})
    assert table([level])[1].split() == ['1', '0.5', '–', '–', '–', '–']
    assert all(relative(dict(level, R=pair), 'R') is None for pair in ([None, 1.0], [float('inf'), 1.0]))
    draw(str(tmp_path / 'errors'), (6, 3), lambda figure: draw_errors(figure, {'nan': [level]}))
    assert (tmp_path / 'errors.png').is_file()
