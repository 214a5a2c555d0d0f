"""The exact network for Gaussian data, and with it the error of every solver against its network evaluations.

For data with covariance diag(S) in the DCT basis, E[x₀|x] = V [M S/(M² S + β²)] Vᵀ x. With that, the
probability-flow ODE of warm.samplers reads, in each band,

    dx/dβ = ½ x·d ln(M²S + β²)/dβ,    so    x ∝ √(M²S + β²)

along any path, so the solution is known without a reference run. Every sampler is then linear and acts on
each band separately, so one run on an image whose bands are all 1 gives its factor on every band, and
errors and variances are expectations over all noise, not estimates from samples.

    python -m warm.oracle --outdir=docs
"""

import itertools
import os

import click
import torch

from dnnlib.files import atomic_write
from dnnlib.flags import Tool
from training.dataset import ImageFolderDataset
from training.schedules import SIGMA_MAX, SIGMA_MIN
from warm.blur import blur_mask, dct2, frequencies, idct2, marginal_variance, prior_spectrum, rest_mask, wiener_filter
from warm.bnr import band_power
from warm.figures import draw
from warm.path import BlurringSchedule, ConstantBNR
from warm.samplers import SOLVERS, warm_sampler

RESOLUTION = 32
COMPARED = (*map(ConstantBNR, (0, 0.1, 0.5, 1, 2)), BlurringSchedule())
CURVE_NFE = (7, 9, 13, 19, 25, 35, 51, 79, 113, 159)
TABLE_NFE = (19, 35, 79, 159)  # 35 and 79 are the paper's
CIFAR10_NOTE = '''With CIFAR-10's own spectrum (`--data=datasets/cifar10-32x32.zip`) the two ratios are 0.97
and 0.25 without blur, 0.57 and 0.15 at BNR 0.5, 0.39 and 0.11 at BNR 1, 1.13 and 0.33 at BNR 2, 1.84 and 0.84 on the
blurring schedule.'''


class GaussianOracle:
    """E[x₀|x] for Gaussian data, with a network's interface; counts its `calls`.

    Args:
        spectrum: S, float64 [N, N]: variance of the data in each DCT band of an N×N channel.
        rates: The blur's, one of warm.blur.BLUR_RATES.
    """

    sigma_min, sigma_max = 0, float('inf')

    def __init__(self, spectrum, rates=frequencies):
        self.spectrum, self.rates, self.calls = spectrum, rates, 0

    def round_sigma(self, sigma):
        return torch.as_tensor(sigma)

    def denoise_deblur(self, x, sigma, class_labels=None, alpha=0):
        """(V M Vᵀ x̂₀, V (I−M) Vᵀ x̂₀), float64, for x [B, C, N, N]; sigma and alpha a number or one per image."""
        self.calls += 1
        gain, _ = wiener_filter(alpha, sigma, self.spectrum, self.rates)
        clean = gain * dct2(x)
        return tuple(idct2(mask(alpha, x.shape[-1], self.rates) * clean) for mask in (blur_mask, rest_mask))

    def __call__(self, x, sigma, class_labels=None, alpha=0):
        """x̂₀ = D + R."""
        D, R = self.denoise_deblur(x, sigma, class_labels, alpha)
        return D + R


def ode_factor(spectrum, path, beta, beta_next):
    """Factor by which the exact ODE solution scales each band from noise level β to β′: float64 [N, N]."""
    before, after = (marginal_variance(blur_mask(path.alpha(b), len(spectrum)), b, spectrum) for b in (beta, beta_next))
    return (after / before).sqrt()


def last_step_factor(spectrum, path, beta):
    """Factor by which the last step (β′ = 0), x′ = x̂₀, scales each band: M S/(M² S + β²), float64 [N, N]."""
    return wiener_filter(path.alpha(beta), beta, spectrum)[0][0, 0]


def sampler_factors(net, num_steps, **options):
    """Factors by which `warm_sampler` with a `GaussianOracle` scales each of its sources of noise.

    Image j of one batch has all bands 1 in the j-th source and 0 in all others. The sources are the
    latents and the noise drawn at each step; in real sampling they are independent and standard normal.

    Args:
        net: The oracle.
        num_steps, options: For `warm_sampler`.

    Returns:
        float64 [num_steps + 1, N, N]: factors on the bands of the latents, then of each step's noise. The
        samples' variance in each band is the sum of their squares.
    """
    n = len(net.spectrum)
    ones = idct2(torch.ones([n, n], dtype=torch.float64))
    sources = iter(torch.eye(num_steps + 1, dtype=torch.float64)[:, :, None, None, None] * ones)
    samples = warm_sampler(net, next(sources), randn_like=lambda x: next(sources), num_steps=num_steps, **options)
    return dct2(samples)[:, 0]


def deterministic_factor(net, num_steps, **options):
    """The factor of the latents alone, [N, N], as in `sampler_factors`, for options that use no other noise."""
    ones = idct2(torch.ones([1, 1, *net.spectrum.shape], dtype=torch.float64))
    return dct2(warm_sampler(net, ones, randn_like=torch.zeros_like, num_steps=num_steps, **options))[0, 0]


def solver_error(spectrum, path, solver, num_steps):
    """(error, NFE): root mean square difference per pixel between samples and the exact solution at β = 0.

    The expectation is over latents, on the default grid. The last step leaves a small error even if all
    others are exact: `last_step_error`.
    """
    net = GaussianOracle(spectrum)
    factor = deterministic_factor(net, num_steps, path=path, solver=solver)
    exact = SIGMA_MAX * ode_factor(spectrum, path, SIGMA_MAX, 0)
    return (factor - exact).square().mean().sqrt().item(), net.calls


def last_step_error(spectrum, path):
    """What `solver_error` tends to with many steps: the last step goes from σ_min to 0 at once."""
    start = SIGMA_MAX * ode_factor(spectrum, path, SIGMA_MAX, SIGMA_MIN)
    missed = last_step_factor(spectrum, path, SIGMA_MIN) - ode_factor(spectrum, path, SIGMA_MIN, 0)
    return (start * missed).square().mean().sqrt().item()


# -- the page

def ode_solvers():
    """Names of the solvers that add no noise unless asked to, and so have an error against the ODE."""
    return [name for name, solver in SOLVERS.items() if solver.order is not None]


def steps_for(solver, nfe):
    """The largest number of steps that needs at most `nfe` evaluations; n steps need a·n + b."""
    spectrum = prior_spectrum(2)
    few, more = (solver_error(spectrum, ConstantBNR(0), solver, n)[1] for n in (4, 5))
    per_step = more - few
    return 4 + (nfe - few) // per_step


def errors(spectrum, budgets):
    """{path: {solver: {NFE: error}}} for all in COMPARED and `ode_solvers`; the true NFE may be below the budget."""
    steps = {(solver, nfe): steps_for(solver, nfe) for solver in ode_solvers() for nfe in budgets}
    return {path: {solver: {nfe: solver_error(spectrum, path, solver, steps[solver, nfe])[0] for nfe in budgets}
                   for solver in ode_solvers()} for path in COMPARED}


def draw_errors(figure, table, floors):
    """A panel per path: error against NFE of each solver, and the last step's error."""
    panels = figure.subplots(2, 3, sharex=True, sharey=True)
    ticks = (10, 20, 35, 79, 159)
    for ax, (path, solvers) in zip(panels.flat, table.items()):
        for solver, marker, values in zip(solvers, itertools.cycle('o^sDvP'), solvers.values()):
            ax.plot(values.keys(), values.values(), marker=marker, ms=4, label=solver)
        ax.axhline(floors[path], color='0.45', ls=':', label='last step alone')
        ax.set(xscale='log', yscale='log', title=str(path))
        ax.set_xticks(ticks, ticks)
        ax.set_xticks([], minor=True)
    for ax in panels[-1]:
        ax.set_xlabel('network evaluations (NFE)')
    for ax in panels[:, 0]:
        ax.set_ylabel('RMS error of a pixel')
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc='outside lower center', ncols=len(ode_solvers()) + 1)


def error_rows(table):
    """Markdown rows: path, solver, error at each NFE of TABLE_NFE, the best of a path in bold."""
    rows = [f"| path | solver | {' | '.join(f'NFE {nfe}' for nfe in TABLE_NFE)} |",
            f"|---|---|{'---|' * len(TABLE_NFE)}"]
    for path, solvers in table.items():
        best = {nfe: min(solvers, key=lambda solver: solvers[solver][nfe]) for nfe in TABLE_NFE}
        for solver, values in solvers.items():
            cells = [f'**{values[nfe]:#.2g}**' if best[nfe] == solver else f'{values[nfe]:#.2g}' for nfe in TABLE_NFE]
            rows.append(f"| {path} | {solver} | {' | '.join(cells)} |")
    return rows


def ratio_rows(table):
    """Markdown rows: the error of dpmpp2m after 19 and 35 evaluations over that of Heun after 35."""
    rows = ['| path | dpmpp2m at NFE 19 ÷ heun at NFE 35 | both at NFE 35 |', '|---|---|---|']
    for path, solvers in table.items():
        ratios = [solvers['dpmpp2m'][nfe] / solvers['heun'][35] for nfe in (19, 35)]
        rows.append(f"| {path} | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |")
    return rows


def page(table, floors, data, command, rms, note=''):
    """The Markdown page; all that it says follows from the numbers, except the `note`."""
    hot, *others = table

    def where(better, worse, paths=None):
        """The paths on which one (solver, NFE) has a smaller error than another."""
        return _names([path for path in paths or table if better(path) < worse(path)])

    def error(solver, nfe, path=None):
        return lambda at: table[path or at][solver][nfe]

    return '\n'.join([
        '# Solvers: error against network evaluations',
        '',
        f'Made by `{command}`.',
        '',
        f'Data: Gaussian, with {data}.',
        '',
        'For such data the best possible network is known in closed form, and so is the exact solution of the',
        'probability-flow ODE along any path (`warm/oracle.py`). The numbers are the root mean square difference per',
        "pixel between a solver's samples and that solution, expected over all latents; images are in [−1, 1] and",
        f"have a root mean square of {rms:.2g}. The noise levels are EDM's, {SIGMA_MAX} to {SIGMA_MIN}; the last step,",
        f'from there to 0, alone contributes {max(floors.values()):.1e} (the dotted line).',
        '',
        '![Error against evaluations for each path and solver](solvers.png)',
        '',
        *error_rows(table),
        '',
        'Bold: the smallest error on each path with that number of evaluations.',
        '',
        *ratio_rows(table),
        '',
        f"- With 35 evaluations each, dpmpp2m beats Heun on {where(error('dpmpp2m', 35), error('heun', 35))}.",
        f"- With 19 evaluations, dpmpp2m beats Heun with 35 on {where(error('dpmpp2m', 19), error('heun', 35))}.",
        f"- With 19 evaluations each, even Euler beats Heun on {where(error('euler', 19), error('heun', 19))}.",
        '- With 35 evaluations, compared with the same solver without blur, dpmpp2m is better on '
        f"{where(error('dpmpp2m', 35), error('dpmpp2m', 35, hot), others)}; "
        f"Heun is better on {where(error('heun', 35), error('heun', 35, hot), others)}.",
        '',
        *([note, ''] if note else []),
        'What this does not show: a trained network also makes errors, and images are not Gaussian, so reducing the',
        "solver's error below the network's gains nothing. And it compares ODE solvers, not image quality at different",
        'BNRs.',
        ''])


def _names(paths):
    return ', '.join(map(str, paths)) or 'none of the paths'


@click.command(cls=Tool)
@click.option('--outdir', metavar='DIR', required=True, help='Where to write solvers.md, solvers.png and solvers.svg')
@click.option('--data', metavar='ZIP|DIR', default=None,
              help='Use the spectrum of these images  [default: the natural-image prior at 32x32]')
def main(outdir, data):
    """Compare the solvers on Gaussian data, where the exact answer is known."""
    spectrum, what, note = prior_spectrum(RESOLUTION), 'the natural-image prior S ∝ (k² + l² + 1)^−1.2', CIFAR10_NOTE
    if data is not None:
        dataset = ImageFolderDataset(data)
        spectrum, what, note = band_power(dataset), f'the spectrum of {dataset.name}', ''
    table = errors(spectrum, CURVE_NFE)
    floors = {path: last_step_error(spectrum, path) for path in COMPARED}
    files = draw(os.path.join(outdir, 'solvers'), (10, 6), lambda figure: draw_errors(figure, table, floors))
    path = os.path.join(outdir, 'solvers.md')
    command = 'python -m warm.oracle --outdir=docs' + (f' --data={data}' if data else '')
    what += f', {len(spectrum)}×{len(spectrum)} bands'
    with atomic_write(path, 'w') as f:
        f.write(page(table, floors, what, command, spectrum.mean().sqrt().item(), note))
    click.echo('\n'.join([path, *files]))


if __name__ == '__main__':
    main()
