"""Where a network errs: mean squared errors of D, R and x̂₀ = D + R at each noise level, on images it has not seen.

A distance such as FID says which of two networks draws better, if there are enough seeds to tell. These errors say at
which noise level and in which branch one is better, and differ less between seeds (docs/results.md). Each is divided by
that of the linear filter that is best for every DCT band of every channel by itself: it knows the mean power of the
bands, and nothing of how bands or colours go together. Below 1, a network has learned more than that. None reaches 0,
since no estimate can restore all that noise and blur have hidden.

Networks of the same path and kind of blur see the same noisy images, and their errors can be compared as they are. Of
others, the images hide something else, and only the errors' relation to the filter's can, roughly.

    python -m warm.errors --network=warm.safetensors --network=edm.safetensors --data=datasets/cifar10-test-32x32.zip
"""

import math
import os

import click
import torch

from dnnlib import UserError
from dnnlib.files import make_dirs
from dnnlib.flags import Text, Tool
from dnnlib.json_files import append_line, check_json_lines
from torch_utils import distributed as dist
from torch_utils.precision import effective_precision
from training import provenance
from training.dataset import EMBEDDED, ImageFolderDataset, name_of
from training.generation import default_batch
from training.pixels import to_float
from training.precond import EDMPrecond, VEPrecond, VPPrecond, iDDPMPrecond
from training.progress import MAX_SEED
from warm.api import load
from warm.blur import blur_and_rest, dct2, frequencies
from warm.figures import draw
from warm.oracle import GaussianOracle
from warm.path import parse_path
from warm.samplers import default_path, make_denoiser
from warm.steps import Level, transition
from warm.systems import SYSTEMS
from warm.systems.warm import chosen_path

BETAS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)
SMALL_STEP = 1e-3  # how much lower the next noise level is, relatively, in the error of a step
QUANTITIES = {'D': 'D', 'R': 'R', 'clean': 'D + R', 'step': 'step'}  # {what is measured: how it is shown}
DENOISERS = EDMPrecond, VPPrecond, VEPrecond, iDDPMPrecond  # of x₀ + σε; Warm's networks have `denoise_deblur`


@torch.no_grad()
def network_errors(net, images, labels=None, path=None, betas=BETAS, seed=0, batch=None):
    """Mean squared errors of a network and of the best linear filter on noisy, blurred versions of images.

    Every noise level has the same noise, so that the levels differ in nothing else. The filter is the
    `GaussianOracle` of these images' own mean power in each band.

    Args:
        net: A Warm network, or any that denoises x₀ + βε, in evaluation mode.
        images: uint8 [N, C, n, n].
        labels: float32 [N, label_dim]; needed if the network is class-conditional.
        path: α for each β (warm.path); by default `default_path`.
        betas: Noise levels β > 0.
        seed: Seed of the noise.
        batch: Images at a time; by default what suits the network's device.

    Returns:
        A list of {'beta', 'alpha', 'D', 'R', 'clean', 'step'}, one per noise level. The last four are pairs (the
        network's error, the filter's): of D against V M Vᵀ x₀, of R against V (I−M) Vᵀ x₀, of D + R against x₀, and
        of β dx/dβ, the direction in which a sampler steps, where D and R count as much as they do there. They are
        means over images and pixels, in units of the images' [−1, 1], squared.

    Raises:
        UserError: images or labels that do not fit the network; a network that is no such denoiser.
    """
    check_denoiser(net)
    device, batch = next(net.parameters()).device, batch or default_batch(net)
    path = default_path(net) if path is None else path
    x_0 = to_float(torch.as_tensor(images))
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(seed))
    rates = getattr(net, 'rates', frequencies)
    power = sum(dct2(part).square().sum((0, 1)) for part in x_0.split(batch)) / (x_0.shape[0] * x_0.shape[1])
    linear = GaussianOracle(power.to(device), rates)

    def level(beta):
        return Level(torch.tensor(path.alpha(beta), dtype=torch.float64, device=device), beta, path.is_hot, rates)

    filtered = make_denoiser(linear)
    levels = []
    for beta in betas:
        here, there = level(beta), level((1 - SMALL_STEP) * beta)
        sums = torch.zeros([2, len(QUANTITIES)], dtype=torch.float64, device=device)  # of the network, of the filter
        for i in range(0, len(x_0), batch):
            clean, eps = (t[i:i + batch].to(device, torch.float64) for t in (x_0, noise))
            classes = None if labels is None else torch.as_tensor(labels[i:i + batch]).to(device)
            blurred, rest = (clean, torch.zeros_like(clean)) if here.hot else blur_and_rest(clean, here.alpha, rates)
            for own, denoise in zip(sums, (make_denoiser(net, classes), filtered)):
                D, R = denoise(blurred + beta * eps, here)
                own += squares(D - blurred, R - rest, here, there)
        own, filters = (sums / x_0.numel()).tolist()
        errors = {name: pair for name, *pair in zip(QUANTITIES, own, filters)}
        levels.append(dict(beta=beta, alpha=here.alpha.item(), **errors))
    return levels


def squares(D, R, here, there):
    """Sums of squares [4] of the QUANTITIES' errors, from the errors of D and R."""
    step = transition(torch.zeros_like(D), D, R, here, there) / SMALL_STEP  # linear, so that of errors is the error
    return torch.stack([error.square().sum() for error in (D, R, D + R, step)])


def check_denoiser(net):
    """Raise UserError for a network that estimates something else than an image, or from other than noise and blur."""
    if not (hasattr(net, 'denoise_deblur') or isinstance(net, DENOISERS)):
        raise UserError(f'a {type(net).__name__} estimates no image from x₀ + βε, nor from blur and noise as Warm '
                        'does; give a network of --precond=warm or edm')


def path_of(net, bnr=None):
    """The path on which a network is measured: the one that --bnr selects, else `default_path`.

    Raises:
        UserError: no BNR, or one that the network was not trained for.
    """
    if hasattr(net, 'family'):
        return chosen_path(net, BETAS[0], BETAS[-1], bnr)
    path = default_path(net) if bnr is None else parse_path(bnr)
    if not path.is_hot:
        raise UserError(f'--bnr={bnr} does not suit a network of {type(net).__name__}, which knows no blur; leave it '
                        'out, or measure such networks by a command of their own')
    return path


def relative(level, name):
    """A level's error of one of QUANTITIES relative to the filter's.

    None where the filter's is 0, as R's is without blur, and where the network's is not finite (in a file: null).
    """
    own, linear = level[name]
    return own / linear if linear and own is not None and math.isfinite(own) else None


def table(levels):
    """The lines of a table of errors relative to the filter's."""
    lines = [f"{'β':>6} {'α':>8}" + ''.join(f'{shown:>9}' for shown in QUANTITIES.values())]
    for level in levels:
        cells = (relative(level, name) for name in QUANTITIES)
        lines.append(f"{level['beta']:6g} {level['alpha']:8.3g}"
                     + ''.join(f"{'–' if cell is None else f'{cell:.3f}':>9}" for cell in cells))
    return lines


def draw_errors(figure, curves):
    """Draw the errors relative to the filter's over β.

    Args:
        figure: An empty figure.
        curves: {label: levels}.
    """
    deblurs = any(relative(level, 'R') is not None for levels in curves.values() for level in levels)
    panels = {name: shown for name, shown in QUANTITIES.items() if name != 'R' or deblurs}
    betas = [level['beta'] for levels in curves.values() for level in levels]
    axes = figure.subplots(1, len(panels), sharex=True, squeeze=False)[0]
    for ax, (name, shown) in zip(axes, panels.items()):
        for label, levels in curves.items():
            points = [(level['beta'], value) for level in levels if (value := relative(level, name)) is not None]
            ax.plot(*zip(*points) if points else ([], []), marker='.', label=label)
        ax.axhline(1, color='0.6', lw=0.9)
        # Of R, at little blur, a network may leave a hundred times the filter's error.
        ax.set(xscale='log', yscale='log' if name == 'R' else 'linear', xlim=(min(betas) / 1.5, max(betas) * 1.5),
               title=f'error of {shown}', xlabel='noise level β')
    axes[0].set_ylabel("relative to the linear filter's")
    figure.legend(*axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=3)


def sample_images(path, num, seed, net):
    """`num` random images of a data set, all if it has fewer, and the labels that the network needs or None.

    Raises:
        UserError: no such data set; images or labels unlike the network's; a network without such errors.
    """
    check_denoiser(net)
    dataset = ImageFolderDataset(path, use_labels=net.label_dim > 0, max_size=num, random_seed=seed)
    needed = [net.img_channels, net.img_resolution, net.img_resolution]
    if list(dataset.image_shape) != needed:
        raise UserError(f"the images of {path} are {' × '.join(map(str, dataset.image_shape))} (channels × height × "
                        f"width), the network's {' × '.join(map(str, needed))}; give --data of its resolution")
    if dataset.label_dim != net.label_dim:
        raise UserError(f'{path} has {dataset.label_dim or "no"} classes, the network {net.label_dim}; give --data '
                        'with its labels')
    images, labels = dataset.batch(range(len(dataset)))
    return images, labels if net.label_dim else None


def record_of(net, levels, bnr=None, **facts):
    """One line of JSON about a network's errors: what it is, how they were measured, and the errors."""
    system = SYSTEMS[net.system]
    return dict(**provenance.snapshot_facts(net.snapshot, net, system), **system.describe(net, {'bnr': bnr}),
                precision=effective_precision(net.precision, next(net.parameters()).device), **facts,
                commit=provenance.code_version(), torch=torch.__version__,
                hardware=provenance.hardware(dist.device()), levels=levels)


@click.command(cls=Tool)
@click.option('--network', 'networks', multiple=True, required=True, metavar='FILE|URL', type=Text(),
              help='Snapshot of Warm or of EDM (vp, ve, iddpm, stf); may be given several times')
@click.option('--data', metavar='ZIP|DIR', default=EMBEDDED, type=Text(),
              show_default='the embedded digits, which networks may have been trained on',
              help='Images unseen in training')
@click.option('--bnr', metavar='FLOAT', default=None, type=Text(), show_default='as for generate.py',
              help='Blur-to-Noise Ratio of the path, for networks that are trained on several')
@click.option('--num', metavar='INT', type=click.IntRange(min=1), default=1000, help='Images, chosen at random')
@click.option('--seed', metavar='INT', type=click.IntRange(0, MAX_SEED), default=0,
              help='Seed of choice and noise')
@click.option('--batch', metavar='INT', type=click.IntRange(min=1), default=None, show_default='by device',
              help='Images at a time')
@click.option('--out', metavar='FILE', default=None, type=Text(),
              help='Append the numbers here, a line of JSON for each network')
@click.option('--outdir', metavar='DIR', default=None, type=Text(),
              help='Also draw them here, as errors.png and errors.svg')
def main(networks, data, bnr, num, seed, batch, out, outdir):
    """Measure where networks err: mean squared errors of D, R and D + R at each noise level.

    They are relative to those of the best linear filter of each DCT band: below 1, a network knows more about images
    than their spectrum. `step` is the direction in which a sampler goes, to which D and R both contribute.
    """
    if outdir is not None:
        make_dirs(outdir)
    if out is not None:
        check_json_lines(out)
    nets = {path: load(path) for path in networks}  # a path given twice counts once
    images = {path: sample_images(data, num, seed, net) for path, net in nets.items()}
    paths = {path: path_of(net, bnr) for path, net in nets.items()}
    curves = {}
    for path, net in nets.items():
        curves[path] = levels = network_errors(net, *images[path], path=paths[path], seed=seed, batch=batch)
        click.echo('\n'.join([f'{path}: {len(images[path][0])} images of {name_of(data)}', *table(levels), '']))
        if out is not None:
            append_line(out, record_of(net, levels, bnr, data=name_of(data), num_images=len(images[path][0]),
                                       noise_seed=seed), remedy='choose another --out')
    if outdir is not None:
        shared = len(os.path.commonprefix([path.split('/')[:-1] for path in curves]))  # folders that all lie in
        curves = {'/'.join(path.split('/')[shared:]): levels for path, levels in curves.items()}
        files = draw(os.path.join(outdir, 'errors'), (13, 4.2), lambda figure: draw_errors(figure, curves))
        click.echo('drawn: ' + ', '.join(files))


if __name__ == '__main__':
    main()
