"""The command that recommends a Blur-to-Noise Ratio for a data set and draws the paper's Fig. 3 and Fig. 6 for it.

The measurement and the rule are in warm.bnr.

    python -m warm.spectrum --data=datasets/cifar10-32x32.zip --outdir=spectrum
"""

import math
import os

import click
import numpy as np
import torch

from dnnlib.files import make_dirs
from dnnlib.flags import Key, Text, Tool
from training.dataset import EMBEDDED, ImageFolderDataset
from training.schedules import SIGMA_MAX, SIGMA_MIN
from warm.blur import BLUR_RATES, PAPER_BLUR, blur_mask, frequencies, marginal_variance, rest_mask
from warm.bnr import BETAS, TOLERANCE, band_power, fit_power_law, radius, recommended_bnr, spectral_gap
from warm.figures import draw
from warm.path import PAPER_BNR, PATHS, ConstantBNR, parse_path
from warm.report.tables import BNR_SCORES
from warm.systems.blurring import BLUR_SCHEDULES, BlurringProcess
from warm.systems.ihdm import HeatLevels

TABLE = tuple(bnr for bnr in BNR_SCORES if bnr)  # the BNRs of the paper's Table 3
SHOWN = (0, 0.5, 2, 10)  # the first two are columns of Fig. 3, the others ours
GUIDES = (0.1, 1, 10)  # the thin lines of Fig. 6


# -- figures

def ring_mean(bands):
    """Mean of bands [N, N] over rings k² + l² ≈ r², r = 1…N−1: float64 [N−1]."""
    n = len(bands)
    ring = radius(n).round().long().flatten()
    return (torch.bincount(ring, bands.flatten()) / torch.bincount(ring))[1:n]


def middle_beta(power):
    """The noise level, to two digits, whose power equals the signal's in the ring at the middle of a log scale."""
    rings = ring_mean(power)
    return float(f'{rings[round(math.sqrt(len(rings))) - 1].clamp(min=1e-6).sqrt().item():.2g}')


def spectra(power, bnr, beta, rates=frequencies):
    """The curves of Fig. 3 at one noise level: {name: float64 [N−1]}, power in rings of DCT bands."""
    n = len(power)
    M, gone = (mask(bnr * beta, n, rates) for mask in (blur_mask, rest_mask))
    curves = {'signal S': power, 'noise β²': torch.full_like(power, beta ** 2),
              'hot diffusion S + β²': power + beta ** 2, 'observed M²S + β²': marginal_variance(M, beta, power),
              'denoising target M²S': M ** 2 * power, 'deblurring target (1−M)²S': gone ** 2 * power}
    return {name: ring_mean(bands) for name, bands in curves.items()}


# The curves of `spectra`, in its order.
LOOKS = (dict(color='0.45', ls='--'), dict(color='0.45', ls=':'), dict(color='tab:orange', lw=4, alpha=0.35),
         dict(color='black'), dict(color='tab:red'), dict(color='tab:blue'))


def draw_spectra(figure, power, rates=frequencies):
    """Draw Fig. 3: spectra of the observation and of the two branches' targets, for several BNRs at one noise level."""
    beta, n = middle_beta(power), len(power)
    cycles = np.arange(1, n) / (2 * n)
    levels = 10 * ring_mean(power).clamp(min=1e-30).log10()
    top, bottom = levels.max().item() + 8, min(levels.min().item(), 20 * math.log10(beta)) - 12
    axes = figure.subplots(1, len(SHOWN), sharey=True)
    for ax, bnr in zip(axes, SHOWN):
        for (name, values), look in zip(spectra(power, bnr, beta, rates).items(), LOOKS, strict=True):
            # Exact zeros cannot be shown in dB.
            ax.plot(cycles, 10 * values.where(values > 0, math.nan).log10(), label=name, **look)
        ax.set(xscale='log', ylim=(bottom, top), xlabel='frequency (cycles per pixel)', title=f'BNR {bnr:g}')
        ticks = [f for f in (0.02, 0.05, 0.1, 0.2, 0.5) if cycles[0] <= f <= 0.5]
        ax.set_xticks(ticks, [f'{f:g}' for f in ticks])
        ax.set_xticks([], minor=True)
    axes[0].set_ylabel('mean power per DCT band (dB)')
    figure.suptitle(f'Spectra at noise level β = {beta:g}; the blur is BNR·β pixels')
    figure.legend(*axes[-1].get_legend_handles_labels(), loc='outside lower center', ncols=6)


def draw_schedules(figure, recommended=None):
    """Draw Fig. 6: blur against noise for every schedule in PATHS at its default, and for other papers' diffusions."""
    ax = figure.subplots()
    low, high = BETAS[0].item(), BETAS[-1].item()
    alpha_low, alpha_high = 1e-4, 1e3
    for bnr in GUIDES:
        ax.plot(BETAS, ConstantBNR(bnr).alpha(BETAS), color='0.75', lw=0.9)
        ax.text(high, bnr * high, f' BNR {bnr:g}', color='0.45', va='center', fontsize=7.5)
    for i, name in enumerate(PATHS):
        path = parse_path(None, name)
        label = f'{path} (Warm Diffusion)' if path == ConstantBNR(PAPER_BNR) else str(path)
        ax.plot(BETAS, path.alpha(BETAS), color=f'C{i}', lw=2.4, label=label)
    if recommended:
        ax.plot(BETAS, ConstantBNR(recommended).alpha(BETAS), color='black', ls=':',
                label=f'recommended for this data: BNR {recommended:.2f}')
    for name, (beta, alpha, look) in other_diffusions().items():
        ax.plot(beta.clamp(min=low), alpha.clamp(min=alpha_low), label=name, **look)
    ax.set(xscale='log', yscale='log', xlim=(low, high), ylim=(alpha_low, alpha_high),
           xlabel='noise β (standard deviation, images in [−1, 1])', ylabel='blur α (standard deviation in pixels)',
           title='Blur and noise of the schedules')
    ax.legend(loc='center left', bbox_to_anchor=(1.1, 0.5))


def other_diffusions():
    """{label: (β, α, look)} of other papers' processes in these units; drawn along an edge where β or α is 0."""
    # Colours from the end of matplotlib's cycle, since the schedules take those from its start.
    levels, process = HeatLevels(), BlurringProcess()
    t = torch.linspace(0, 1, 200, dtype=torch.float64).reshape(-1, 1, 1, 1)
    bands = process.at(t, 1)  # a single pixel has no detail, so its gain is the process's a
    beta = 2 * levels.noise  # its images are in [0, 1]
    heat = levels.alphas()[1:]
    return {
        'Blurring Diffusion with its own noise': (
            (bands.noise / bands.signal).flatten(), process.sigma_blur_max * BLUR_SCHEDULES['sin2'](t).flatten(),
            dict(color=f"C{list(PATHS).index('blurring')}", ls='--')),  # as for its schedule
        f'IHDM: noise {beta:g}, blur {levels.blur_min:g} to {levels.blur_max:g} pixels': (
            torch.full_like(heat, beta), heat, dict(color='C6', lw=2.4)),
        'hot diffusion (EDM): no blur, along the lower edge': (
            BETAS, torch.zeros_like(BETAS), dict(color='C8', lw=4, solid_capstyle='butt', clip_on=False)),
        'cold diffusion: no noise, along the left edge': (
            torch.zeros(2), torch.tensor([0, 1e3]), dict(color='C9', lw=4, solid_capstyle='butt', clip_on=False)),
    }


# -- command

def report(power, tolerance, recommended, rates=frequencies):
    """The lines to print: power law, table of gaps, and last the recommended BNR."""
    c, gamma = fit_power_law(power)
    lines = [f'mean power {power.mean():.4f} (EDM takes 0.5² = 0.25)',
             f'power law S = {c:.4g}·(k² + l² + 1)^−{gamma:.3f}, at high frequencies 1/f^{2 * gamma:.2f}',
             '', f'largest gap between M²S + β² and S + β² over all DCT bands and β in {SIGMA_MIN}…{SIGMA_MAX}:',
             '   BNR  gap (dB)']
    lines += [f'{bnr:6g} {spectral_gap(power, bnr, rates):9.3f}' for bnr in TABLE]
    return [*lines, '', f'the largest gap within {tolerance:g} dB is '
            f'{spectral_gap(power, recommended, rates):.3f} dB', f'recommended BNR {recommended:.2f}']


@click.command(cls=Tool)
@click.option('--data', metavar='ZIP|DIR', type=Text(), default=None,
              help='Images to measure  [default: the embedded digits]')
@click.option('--outdir', metavar='DIR', default=None, help='Also draw spectrum and schedules here, as PNG and SVG')
@click.option('--tolerance', metavar='DB', type=float, default=TOLERANCE, help='Largest gap to hot diffusion, in dB')
@click.option('--blur', type=Key(BLUR_RATES), default=PAPER_BLUR, help='Kind of blur, as for train.py')
@click.option('--max-images', metavar='INT', type=int, default=None, help='Measure a random subset  [default: all]')
@click.option('--seed', metavar='INT', type=click.IntRange(min=0), default=0, help='Random seed of the subset')
def main(data, outdir, tolerance, blur, max_images, seed):
    """Measure a data set's spectrum and recommend a Blur-to-Noise Ratio for it."""
    if outdir is not None:
        make_dirs(outdir)
    dataset = ImageFolderDataset(EMBEDDED if data is None else data)
    rates = BLUR_RATES[blur]
    power = band_power(dataset, max_images, seed)
    taken = min(max_images or len(dataset), len(dataset))
    subset = f'a random subset (seed {seed}) of {taken} of the' if taken < len(dataset) else 'all'
    recommended = recommended_bnr(power, tolerance, rates)
    lines = report(power, tolerance, recommended, rates)
    click.echo(f'{dataset.name}: {subset} {len(dataset)} images of {dataset.resolution}x{dataset.resolution} pixels')
    click.echo('\n'.join(lines[:-1]))
    if outdir is not None:
        files = draw(os.path.join(outdir, 'spectrum'), (13, 4), lambda figure: draw_spectra(figure, power, rates))
        files += draw(os.path.join(outdir, 'schedules'), (10, 5), lambda figure: draw_schedules(figure, recommended))
        click.echo('drawn: ' + ', '.join(files))
    click.echo(lines[-1])


if __name__ == '__main__':
    main()
