"""Whose errors matter: scores of images drawn with D or R taken from another network, at some noise levels or all.

Two networks differ in score, and by `warm.errors` in both branches at many noise levels. Taking one branch, or some
levels, from the other shows which of these differences the score comes from: all else stays, latents included.

    python -m warm.crossed --network=default.safetensors --other=unit.safetensors --take=R --low=0.3 \\
        --ref=fid-refs/cifar10-32x32.npz

The page of results (warm.study.page) shows what `--log=results/crossed-SCALE.jsonl` records with the scale's detector
and number of images.
"""

import math
import pathlib

import click
import torch

from dnnlib import UserError
from dnnlib.flags import Key, NumberRange, Text, Tool
from dnnlib.json_files import check_json_lines
from training import provenance
from training.detectors import DETECTORS
from training.generation import default_batch
from training.metrics import METRICS, label, parse_metrics
from training.samplers import edm_sigma_steps
from training.scoring import NetworkImages, load_scorer
from warm.api import load
from warm.samplers import grid_options
from warm.systems import SYSTEMS

TAKEN = {'none': (False, False), 'D': (True, False), 'R': (False, True), 'both': (True, True)}  # of (D, R)
ALIKE = {'img_channels': 'channels', 'img_resolution': 'resolution', 'label_dim': 'number of classes',
         'family': 'path', 'rates': 'kind of blur'}  # what both networks must have in common


class Crossed(torch.nn.Module):
    """A Warm network, but for D or R of another at the noise levels low ≤ β < high.

    Args:
        net, other: The networks, on the same device, for the same images, paths and kind of blur.
        take: What is the other's, a name in TAKEN.
        low, high: Noise levels β at which it is.

    Raises:
        UserError: a network that does not deblur; two that do not go together.
    """

    def __init__(self, net, other, take='R', low=0.0, high=math.inf):
        super().__init__()
        for shown, one in dict(network=net, other=other).items():
            if not hasattr(one, 'denoise_deblur'):
                raise UserError(f'--{shown} is of {type(one).__name__}, which has no D and R to exchange; give two '
                                'networks of --precond=warm')
        for name, shown in ALIKE.items():
            if getattr(net, name) != getattr(other, name):
                raise UserError(f'the two networks do not have the same {shown}; give two of the same path, kind of '
                                'blur, image size and classes')
        self.net, self.other, self.take, self.low, self.high = net, other, TAKEN[take], low, high
        for name in (*ALIKE, 'sigma_min', 'sigma_max', 'round_sigma', 'model'):  # for samplers and generation
            setattr(self, name, getattr(net, name))

    def crosses(self, beta):
        """Whether anything is taken from the other network at the noise level β."""
        return any(self.take) and self.low <= beta < self.high

    def denoise_deblur(self, x, sigma, class_labels=None, alpha=None):
        """(D, R) as of warm.precond.WarmPrecond; `sigma` is a single noise level."""
        take_D, take_R = self.take if self.crosses(float(sigma)) else (False, False)
        if not (take_D and take_R):
            D, R = self.net.denoise_deblur(x, sigma, class_labels, alpha=alpha)
        if take_D or take_R:
            other_D, other_R = self.other.denoise_deblur(x, sigma, class_labels, alpha=alpha)
        return other_D if take_D else D, other_R if take_R else R


def record_of(net, other, take, low, high, levels):
    """What the images are drawn from, as plain JSON values: both networks, which parts are the other's, the sampler.

    Args:
        net, other, take, low, high: As for `Crossed`; the networks as `warm.load` returns them.
        levels: At how many of the sampler's noise levels something is taken.
    """
    def facts(one):
        return provenance.snapshot_facts(one.snapshot, one, SYSTEMS[one.system])
    system = SYSTEMS[net.system]
    return dict(**facts(net), other=facts(other), take=take, low=low, high=None if math.isinf(high) else high,
                levels=levels, **provenance.sampling_facts(net, system, {}, system.make_sampler(net, {})))


@click.command(cls=Tool)
@click.option('--network', metavar='FILE|URL', required=True, type=Text(), help='Snapshot of a Warm network')
@click.option('--other', metavar='FILE|URL', default=None, type=Text(),
              help='Snapshot of another, of the same path, kind of blur, image size and classes')
@click.option('--take', type=Key(TAKEN), default='R',
              help='What is taken from the other; none scores the network by itself')
@click.option('--low', metavar='BETA', type=NumberRange(min=0), default=0, help='From which noise level on')
@click.option('--high', metavar='BETA', type=NumberRange(min=0, infinite=True), default=math.inf,
              show_default='no limit', help='Below which noise level')
@click.option('--num', metavar='INT', type=click.IntRange(min=2), default=1000, help='Images, of the seeds 0, 1, …')
@click.option('--batch', metavar='INT', type=click.IntRange(min=1), default=None, show_default='by device',
              help='Images at a time')
@click.option('--ref', metavar='NPZ|URL', required=True, type=Text(), help='Reference statistics, as of fid.py')
@click.option('--detector', metavar='NAME|PATH|URL', type=Text(), default=next(iter(DETECTORS)), help='As for fid.py')
@click.option('--metrics', metavar='LIST', type=Text(), default=next(iter(METRICS)), help='As for fid.py')
@click.option('--log', metavar='JSONL', default=None, type=Text(), help='File to append the scores to')
def main(network, other, take, low, high, num, batch, ref, detector, metrics, log):
    """Score images drawn with D or R taken from another network, at some noise levels or all.

    Shows which branch, and which noise levels, make the scores of two networks differ. Where a single branch is taken,
    both networks are evaluated.
    """
    if log is not None:
        check_json_lines(log)
    if other is None and take != 'none':
        what = 'D and R' if take == 'both' else take
        raise UserError(f'--take={take} takes {what} from another network; give it as --other, or choose --take=none')
    net = load(network)
    theirs = net if other is None else load(other)
    crossed = Crossed(net, theirs, take, low, high).eval()
    betas = edm_sigma_steps(**grid_options(crossed, {}), net=crossed)[:-1].tolist()
    levels = sum(map(crossed.crosses, betas))
    if take != 'none' and not levels:
        raise UserError(f'the sampler visits no noise level from --low={low:g} to below --high={high:g}; it visits '
                        + ', '.join(f'{beta:.3g}' for beta in betas))
    record = record_of(net, theirs, take, low, high, levels)
    if other is not None and record['network_sha256'] == record['other']['network_sha256']:
        raise UserError(f'--network={network} and --other={other} are the same network; give two that differ')
    scorer = load_scorer(parse_metrics(metrics), detector, ref)
    scorer.check(num)
    source = NetworkImages(crossed, SYSTEMS[net.system].make_sampler(crossed, {}), range(num), facts=record)
    scorer.warn_of_size(source)
    click.echo(f'{take} of {other} at {levels} of {len(betas)} noise levels ...' if levels else 'nothing taken ...')
    values, facts = scorer(source, batch or default_batch(net))
    if log is not None:  # before a full disk or a closed pipe behind stdout can end this
        facts = {**facts, 'ref': pathlib.Path(facts['ref']).name}  # the records travel; the SHA-256 identifies it
        provenance.log_scores(log, values, scorer.detector, {**source.record, **facts})
    for name, value in values.items():
        click.echo(f'{label(name, scorer.detector)}: {value:.8g}')


if __name__ == '__main__':
    main()
