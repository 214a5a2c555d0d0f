"""Measuring a spectrum, the rule for the BNR, its command and figures."""

import json
import os
import re
import subprocess
import sys
import zipfile

import numpy as np
import PIL.Image
import pytest
import torch
from click.testing import CliRunner

from dnnlib import UserError
from tests.commands import ROOT
from training.dataset import EMBEDDED, ImageFolderDataset
from warm import bnr, spectrum
from warm.blur import blur_mask, dct2, frequencies, idct2, prior_spectrum
from warm.bnr import band_power, fit_power_law, recommended_bnr, spectral_gap, undominated
from warm.figures import draw
from warm.path import BlurringSchedule, parse_path
from warm.spectrum import TABLE, middle_beta, ring_mean, spectra


def power_law(n, c, gamma):
    k = torch.arange(n, dtype=torch.float64).square()
    return c * (k[:, None] + k + 1) ** -gamma


def write_images(folder, images):
    """uint8 [B, H, W] or [B, H, W, 3] as PNG files."""
    os.makedirs(folder, exist_ok=True)
    for i, image in enumerate(images):
        PIL.Image.fromarray(image).save(os.path.join(folder, f'{i:05d}.png'))
    return str(folder)


@pytest.fixture(scope='module')
def synthetic(tmp_path_factory):
    """Colour images with the power law of natural ones (as far as 8 bits and clipping leave it): (folder, S)."""
    S = power_law(16, 1.0, 1.2)
    white = torch.randn([400, 3, 16, 16], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images = ((idct2(S.sqrt() * white) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return write_images(tmp_path_factory.mktemp('data') / 'images', images.permute(0, 2, 3, 1).numpy()), S


def naive_gap(S, bnr):
    """`spectral_gap` in plain NumPy, over every band."""
    n = len(S)
    k = np.pi * np.arange(n) / n
    beta = np.geomspace(0.002, 80, 1500)[:, None, None]
    M2 = np.exp(-(k[:, None] ** 2 + k ** 2) * (bnr * beta) ** 2)
    return (10 * np.log10((S.numpy() + beta ** 2) / (M2 * S.numpy() + beta ** 2))).max()


def run(*args):
    return CliRunner().invoke(spectrum.main, list(args))


# -- measuring

def test_power_is_the_mean_square_of_the_bands():
    dataset = ImageFolderDataset(EMBEDDED)
    images = torch.from_numpy(np.stack([image for image, _ in dataset])).double() / 127.5 - 1
    torch.testing.assert_close(band_power(dataset), dct2(images).square().mean((0, 1)), rtol=1e-6, atol=0)


def test_recovers_the_spectrum_that_made_the_images(synthetic):
    folder, S = synthetic
    power = band_power(ImageFolderDataset(folder))
    used = S > 1e-3  # below, rounding to 8 bits (power 1/(12·127.5²)) counts
    ratio = power[used] / S[used]
    assert ratio.mean().item() == pytest.approx(1, abs=0.02) and ratio.std() < 0.06
    c, gamma = fit_power_law(power)
    assert gamma == pytest.approx(1.2, abs=0.03) and c == pytest.approx(1, rel=0.1)


def test_batches_do_not_matter(synthetic, monkeypatch):
    dataset = ImageFolderDataset(synthetic[0])
    whole = band_power(dataset)
    monkeypatch.setattr(bnr, 'BATCH_ELEMENTS', 7 * 3 * 16 * 16)
    torch.testing.assert_close(band_power(dataset), whole, rtol=1e-12, atol=0)
    monkeypatch.setattr(bnr, 'BATCH_ELEMENTS', 1)
    torch.testing.assert_close(band_power(dataset), whole, rtol=1e-12, atol=0)


def test_mirrored_images_have_the_same_spectrum(synthetic):
    torch.testing.assert_close(band_power(ImageFolderDataset(synthetic[0], xflip=True)),
                               band_power(ImageFolderDataset(synthetic[0])), rtol=1e-6, atol=0)


def test_subsets_are_random_and_repeatable(synthetic):
    dataset = ImageFolderDataset(synthetic[0])
    first, again, other = (band_power(dataset, 50, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first, band_power(ImageFolderDataset(synthetic[0], max_size=50)))
    assert torch.equal(band_power(dataset, 400), band_power(dataset)) and torch.equal(band_power(dataset, 10 ** 9),
                                                                                      band_power(dataset))


# -- the rule

@pytest.mark.parametrize('bnr', TABLE)
@pytest.mark.parametrize('n', [8, 32])
def test_gap_over_all_bands(n, bnr):
    """Leaving out bands that cannot have the largest gap, and taking only 400 noise levels, changes nothing."""
    uneven = prior_spectrum(n) * torch.rand([n, n], generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    for S in (prior_spectrum(n), uneven):
        assert spectral_gap(S, bnr) == pytest.approx(naive_gap(S, bnr), rel=2e-3, abs=1e-4)


def test_bands_that_another_surpasses_do_not_count():
    """Of the bands that are kept, those blurred more slowly have more power; each one left out has a rival in both."""
    power = torch.rand([16, 16], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    S, rate = undominated(power)
    assert len(S) < 40 and (S.diff() >= 0).all() and (rate.diff() <= 0).all()
    rivals = (S >= power.flatten()[:, None]) & (rate >= frequencies(16).flatten()[:, None])
    assert rivals.any(1).all()


def test_gap_grows_with_the_bnr():
    gaps = [spectral_gap(prior_spectrum(32), bnr) for bnr in (0, 0.01, *TABLE, 100)]
    assert gaps[0] == 0 and gaps == sorted(gaps)


@pytest.mark.parametrize('bnr, gap, digit', [(0.1, 0.03, 0.01), (0.3, 0.21, 0.01), (0.5, 0.48, 0.01),
                                             (0.65, 0.72, 0.01), (1, 1.33, 0.01), (2, 3.1, 0.1), (10, 11.6, 0.1)])
def test_gaps_of_cifar_10_are_the_known_ones(golden, bnr, gap, digit):
    """Within one of the last digit, as the recorded spectrum is of a JPEG copy (it gives 0.205 at BNR 0.3)."""
    S = torch.tensor(golden('cifar10-spectrum').power)
    assert spectral_gap(S, bnr) == pytest.approx(gap, abs=digit)


def test_cifar_10_gives_the_papers_bnr(golden):
    assert recommended_bnr(torch.tensor(golden('cifar10-spectrum').power)) == 0.51


def test_images_with_the_spectrum_of_cifar_10_give_the_papers_bnr(golden, tmp_path):
    """Drawn, rounded to 8 bits (which clips a few), written, and measured by the command."""
    S = torch.tensor(golden('cifar10-spectrum').power)
    white = torch.randn([1500, 3, 32, 32], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images = ((idct2(S.sqrt() * white) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    result = run(f"--data={write_images(tmp_path, images.permute(0, 2, 3, 1).numpy())}")
    assert 0.45 <= float(result.output.split()[-1]) <= 0.55


def test_rings_would_hide_the_gap(golden):
    """Why the rule looks at every band: with its power spread evenly over rings, CIFAR-10 would allow much more."""
    S = torch.tensor(golden('cifar10-spectrum').power)
    c, gamma = fit_power_law(S)
    assert recommended_bnr(power_law(32, c, gamma)) > 0.7


@pytest.mark.parametrize('tolerance', [0.1, 0.5, 2.0])
def test_recommended_bnr_is_the_largest_within_the_tolerance(tolerance):
    bnr = recommended_bnr(prior_spectrum(32), tolerance)
    assert spectral_gap(prior_spectrum(32), bnr) <= tolerance < spectral_gap(prior_spectrum(32), bnr + 0.01)
    assert round(bnr, 2) == bnr > 0


def test_white_images_allow_no_blur():
    assert recommended_bnr(torch.full([32, 32], 25.0, dtype=torch.float64), 0.01) == 0


@pytest.mark.parametrize('contrast', [0.25, 0.5, 2])
def test_contrast_scales_the_bnr(contrast):
    """c·x₀ at noise c·β is the same picture, so the same blur is c times less in units of the noise."""
    expected = recommended_bnr(prior_spectrum(32)) / contrast
    assert recommended_bnr(prior_spectrum(32) * contrast ** 2) == pytest.approx(expected, abs=0.011 / min(contrast, 1))


@pytest.mark.parametrize('c, gamma', [(52.33, 1.291), (0.1, 2.0)])
def test_fit_is_exact_on_a_power_law(c, gamma):
    assert fit_power_law(power_law(32, c, gamma)) == pytest.approx((c, gamma))


def test_fit_leaves_out_the_mean_and_empty_bands():
    S = power_law(32, 2.0, 1.5)
    S[0, 0], S[31, 31] = 1e9, 0
    assert fit_power_law(S) == pytest.approx((2.0, 1.5))


# -- figures

def test_ring_means():
    k = torch.arange(8, dtype=torch.float64)
    rings = ring_mean((k[:, None] ** 2 + k ** 2).sqrt())
    assert rings.shape == (7,) and rings.tolist() == pytest.approx(range(1, 8), abs=0.25)


def test_curves_of_figure_3():
    S = prior_spectrum(32)
    beta = middle_beta(S)
    assert ring_mean(S)[0] > beta ** 2 > ring_mean(S)[-1]
    hot = spectra(S, 0, beta)
    assert torch.equal(hot['denoising target M²S'], hot['signal S']) and not hot['deblurring target (1−M)²S'].any()
    assert torch.equal(hot['observed M²S + β²'], hot['hot diffusion S + β²'])
    warm = spectra(S, 2, beta)
    M = blur_mask(2 * beta, 32)
    torch.testing.assert_close(warm['observed M²S + β²'], ring_mean(M ** 2 * S + beta ** 2))
    torch.testing.assert_close(warm['deblurring target (1−M)²S'], ring_mean((1 - M) ** 2 * S))
    assert len(warm) == len(spectrum.LOOKS)


def test_files_depend_on_what_they_show_alone(tmp_path):
    for folder in ('a', 'b'):
        files = draw(str(tmp_path / folder / 'x'), (3, 2), lambda figure: figure.subplots().plot([1, 2], label='α'))
        assert [os.path.basename(file) for file in files] == ['x.png', 'x.svg']
    for name in ('x.png', 'x.svg'):
        content = (tmp_path / 'a' / name).read_bytes()
        assert content == (tmp_path / 'b' / name).read_bytes()
        assert not re.search(rb'dc:date|Software|matplotlib v|Matplotlib', content)


def test_figure_6_shows_every_schedule():
    import matplotlib.figure
    figure = matplotlib.figure.Figure()
    spectrum.draw_schedules(figure, 0.33)
    labels = figure.axes[0].get_legend_handles_labels()[1]
    assert len(labels) == len(spectrum.PATHS) + 1 + len(spectrum.other_diffusions())
    assert any('0.33' in label for label in labels)


def test_figure_6_has_a_line_for_a_fifth_schedule(monkeypatch):
    import matplotlib.figure
    more = {f'{i}': BlurringSchedule for i in range(1, 6)}
    monkeypatch.setattr(spectrum, 'PATHS', {**spectrum.PATHS, **more})
    monkeypatch.setattr(spectrum, 'parse_path', lambda bnr, name: BlurringSchedule(float(name)) if name in more
                        else parse_path(bnr, name))
    figure = matplotlib.figure.Figure()
    spectrum.draw_schedules(figure)
    labels = figure.axes[0].get_legend_handles_labels()[1]
    assert len(labels) == len(spectrum.PATHS) + len(spectrum.other_diffusions())


def test_blurring_diffusion_follows_its_schedule_from_beta_1_on():
    """What the docstring of warm.path.BlurringSchedule says of the rescaled log-SNR."""
    beta, alpha, _ = spectrum.other_diffusions()['Blurring Diffusion with its own noise']
    ideal = BlurringSchedule(20).alpha(beta)
    assert (alpha[beta >= 1] / ideal[beta >= 1] - 1).abs().max() < 0.01
    near = (beta - 0.01).abs().argmin()
    assert alpha[near] < 0.2 * ideal[near]


# -- the command

def test_command(tmp_path, synthetic):
    result = run(f'--data={synthetic[0]}', f'--outdir={tmp_path / "new"}')
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    bnr = recommended_bnr(band_power(ImageFolderDataset(synthetic[0])))
    assert lines[-1] == f'recommended BNR {bnr:.2f}' and re.fullmatch(r'recommended BNR \d+\.\d\d', lines[-1])
    assert lines[0] == 'images: all 400 images of 16x16 pixels'
    rows = {float(line.split()[0]): float(line.split()[1]) for line in lines if re.fullmatch(r' +[\d.]+ +[\d.]+', line)}
    assert tuple(rows) == TABLE
    assert sorted(os.listdir(tmp_path / 'new')) == ['schedules.png', 'schedules.svg', 'spectrum.png', 'spectrum.svg']


def test_the_bnr_is_looked_for_once(tmp_path, synthetic, monkeypatch):
    calls = []
    monkeypatch.setattr(spectrum, 'recommended_bnr', lambda power, tolerance, rates: calls.append(tolerance) or 0.3)
    assert run(f'--data={synthetic[0]}', '--max-images=30', f'--outdir={tmp_path}').output.endswith(' 0.30\n')
    assert calls == [0.5]


def test_embedded_digits_are_the_default(root):
    output = subprocess.run([sys.executable, '-W', 'error', '-m', 'warm.spectrum'], cwd=root, capture_output=True,
                            text=True, check=True).stdout
    assert output.startswith('digits-8x8: all 1797 images of 8x8 pixels')
    assert re.search(r'\nrecommended BNR 0\.\d\d\n$', output)


def test_command_names_the_subset(synthetic):
    lines = run(f'--data={synthetic[0]}', '--max-images=30', '--seed=5').output.splitlines()
    assert lines[0] == 'images: a random subset (seed 5) of 30 of the 400 images of 16x16 pixels'


def test_tolerance(synthetic):
    narrow, wide = (float(run(f'--data={synthetic[0]}', f'--tolerance={t}').output.split()[-1]) for t in (0.2, 2))
    assert narrow < wide


def bad_inputs(folder):
    (folder / 'empty').mkdir()
    write_images(folder / 'tiny', np.zeros([2, 2, 2], np.uint8))
    write_images(folder / 'grey', np.full([2, 8, 8], 128, np.uint8))
    damaged = folder / 'damaged.zip'
    with zipfile.ZipFile(EMBEDDED) as source, zipfile.ZipFile(damaged, 'w') as target:
        names = [name for name in source.namelist() if name.endswith('.png')][:3]
        for name in names:
            target.writestr(name, source.read(name)[:-40 if name == names[-1] else None])
        target.writestr('dataset.json', json.dumps({'labels': None}))
    return {'missing': ([f'--data={folder}/none'], 'no folder or zip'),
            'empty': ([f'--data={folder}/empty'], 'no images'),
            'tiny': ([f'--data={folder}/tiny'], 'too small'),
            'grey': ([f'--data={folder}/grey'], 'more detail'),
            'damaged': ([f'--data={damaged}'], 'decode'),
            'tolerance': (['--tolerance=0'], '0.0 dB'), 'negative': (['--tolerance=-1'], '-1.0 dB'),
            'nan': (['--tolerance=nan'], 'nan'), 'loose': (['--tolerance=100'], 'every BNR'),
            'subset': (['--max-images=0'], '--max-images'),
            'outdir': ([f'--outdir={damaged}/x'], 'damaged.zip')}


@pytest.mark.parametrize('name', ['missing', 'empty', 'tiny', 'grey', 'damaged', 'tolerance', 'negative', 'nan',
                                  'loose', 'subset', 'outdir'])
def test_bad_input_is_refused_in_a_sentence(tmp_path, name):
    args, said = bad_inputs(tmp_path)[name]
    result = run(*args)
    assert name != 'outdir' or 'images of' not in result.output  # before anything is measured
    assert result.exit_code == 1 and said in result.output and isinstance(result.exception, SystemExit)
    error = result.output[result.output.index('Error: '):]
    assert error.count('\n') == 1 and 'recommended' not in result.output


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='a device that is full')
def test_a_full_disk_behind_stdout_gets_a_sentence():
    """As all tools of this package (dnnlib.flags.Tool)."""
    with open('/dev/full', 'w') as full:
        done = subprocess.run([sys.executable, '-m', 'warm.spectrum'], stdout=full, stderr=subprocess.PIPE, text=True,
                              cwd=ROOT, timeout=120)
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    assert 'Error: standard output cannot be written (No space left on device); send it elsewhere' in done.stderr


def test_library_refuses_too():
    with pytest.raises(UserError, match='allows no blur'):
        recommended_bnr(prior_spectrum(8), 0)
    with pytest.raises(UserError, match='--max-images'):
        band_power(ImageFolderDataset(EMBEDDED), 0)


def test_blank_data_is_refused():
    """An unset variable of the shell must not measure the embedded digits."""
    result = run('--data=')
    assert result.exit_code != 0 and '--data' in result.output
