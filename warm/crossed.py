"""Whose errors matter: scores of images drawn with D or R of another network, at some noise levels or all.

Two networks differ in score, and by `warm.errors` in both branches at many noise levels. Which of these differences
makes the score is seen by exchanging one at a time: the rest of the network, the sampler and the latents stay.

    python -m warm.crossed --network=default.safetensors --other=unit.safetensors --take=R --low=0.3 \\
        --ref=fid-refs/cifar10-32x32.npz
"""

import math

import click
import torch

from dnnlib import UserError
from dnnlib.flags import Key, NumberRange, Text
from dnnlib.json_files import check_json_lines
from training import provenance
from training.detectors import DETECTORS
from training.generation import default_batch
from training.metrics import METRICS, label, parse_metrics
from training.scoring import NetworkImages, load_scorer
from warm.api import load
from warm.warm import WARM

TAKEN = {'none': (False, False), 'D': (True, False), 'R': (False, True), 'both': (True, True)}  # of (D, R)
ALIKE = {'img_channels': 'channels', 'img_resolution': 'resolution', 'label_dim': 'the number of classes',
         'family': 'the BNR', 'rates': 'the kind of blur'}  # what both networks must have in common


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
        for one in (net, other):
            if not hasattr(one, 'denoise_deblur'):
                raise UserError(f'a {type(one).__name__} has no D and R to exchange; give networks of --precond=warm')
        for name, shown in ALIKE.items():
            if getattr(net, name) != getattr(other, name):
                raise UserError(f'the networks differ in {shown}; give two that are trained alike')
        self.net, self.other, self.take, self.low, self.high = net, other, TAKEN[take], low, high
        for name in (*ALIKE, 'sigma_min', 'sigma_max', 'round_sigma', 'model'):  # for samplers and generation
            setattr(self, name, getattr(net, name))

    def denoise_deblur(self, x, sigma, class_labels=None, alpha=None):
        """(D, R) as of warm.precond.WarmPrecond; `sigma` is a single noise level."""
        crosses = self.low <= float(sigma) < self.high
        taken = self.take if crosses else (False, False)
        parts = {of: net.denoise_deblur(x, sigma, class_labels, alpha=alpha)
                 for of, net in ((False, self.net), (True, self.other)) if of in taken}
        return tuple(parts[of][i] for i, of in enumerate(taken))


def record_of(net, other, take, low, high):
    """What the images are drawn from, as plain JSON values: both networks, which parts are the other's, the sampler."""
    def facts(one):
        return provenance.snapshot_facts(one.snapshot, one, WARM)
    return dict(**facts(net), other=facts(other), take=take, low=low, high=None if math.isinf(high) else high,
                **provenance.sampling_facts(net, WARM, {}, WARM.make_sampler(net, {})))


@click.command(context_settings=dict(show_default=True, max_content_width=120))
@click.option('--network', metavar='FILE|URL', required=True, type=Text(), help='Snapshot of a Warm network')
@click.option('--other', metavar='FILE|URL', required=True, type=Text(), help='Snapshot of another like it')
@click.option('--take', type=Key(TAKEN), default='R', help="Which of D and R are the other network's")
@click.option('--low', metavar='BETA', type=NumberRange(min=0), default=0, help='From which noise level on')
@click.option('--high', metavar='BETA', type=NumberRange(min=0, infinite=True), default=math.inf,
              help='Below which noise level')
@click.option('--num', metavar='INT', type=click.IntRange(min=2), default=1000, help='Images, of the seeds 0, 1, …')
@click.option('--batch', metavar='INT', type=click.IntRange(min=1), default=None, show_default='by device',
              help='Images at a time')
@click.option('--ref', metavar='NPZ|URL', required=True, type=Text(), help='Reference statistics, as of fid.py')
@click.option('--detector', metavar='NAME|PATH|URL', type=Text(), default=next(iter(DETECTORS)), help='As for fid.py')
@click.option('--metrics', metavar='LIST', type=Text(), default=next(iter(METRICS)), help='As for fid.py')
@click.option('--log', metavar='JSONL', default=None, type=Text(), help='File to append the scores to')
def main(network, other, take, low, high, num, batch, ref, detector, metrics, log):
    """Score images drawn with D or R of another network, at some noise levels or all.

    Where only one branch is exchanged, each evaluation takes as long as two.
    """
    if log is not None:
        check_json_lines(log)
    if not low < high:
        raise UserError(f'no noise level lies from --low={low:g} to --high={high:g}; give a larger --high')
    net, other = load(network), load(other)
    crossed = Crossed(net, other, take, low, high).eval()
    scorer = load_scorer(parse_metrics(metrics), detector, ref)
    scorer.check(num)
    source = NetworkImages(crossed, WARM.make_sampler(crossed, {}), range(num),
                           facts=record_of(net, other, take, low, high))
    scorer.warn_of_size(source)
    values, facts = scorer(source, batch or default_batch(net))
    for name, value in values.items():
        click.echo(f'{label(name, scorer.detector)}: {value:.8g}')
    if log is not None:
        provenance.log_scores(log, values, scorer.detector, {**source.record, **facts})


if __name__ == '__main__':
    main()
