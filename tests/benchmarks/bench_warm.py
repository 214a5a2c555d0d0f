"""What Warm costs over EDM, in one run: a training step, sampling, and the computation that it adds to each.

    python tests/benchmarks/bench_warm.py [--arch=ddpmpp] [--cbase=128] [--batch=512] [--device=cuda] [--out=FILE.json]

The default is EDM's CIFAR-10 network (DDPM++, 55.7 million parameters). Whole steps are measured in turns, but their
difference is smaller than the noise of a shared machine. So the added computation is also measured by itself, with the
same loss and samplers around a network of one multiplication: Warm's time minus EDM's, over the time of EDM's whole
step. The target is at most 3 % for both training and sampling. On a CPU, times are processor time of one thread.
"""

import pathlib
import sys

import click
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from dnnlib.text import parse_int_list  # noqa: E402
from tests.benchmarks.report import Table, alternate_steps  # noqa: E402
from torch_utils.precision import PRECISIONS  # noqa: E402
from training.loss import EDMLoss  # noqa: E402
from training.networks import EDMPrecond  # noqa: E402
from training.samplers import edm_sampler  # noqa: E402
from warm.config import ARCHITECTURES  # noqa: E402
from warm.loss import WarmLoss  # noqa: E402
from warm.precond import WarmPrecond  # noqa: E402
from warm.samplers import warm_sampler  # noqa: E402

SYSTEMS = {'edm': (EDMPrecond, EDMLoss, edm_sampler), 'warm': (WarmPrecond, WarmLoss, warm_sampler)}


class Trivial(torch.nn.Module):
    """Stands in for a U-Net to measure only what surrounds it."""

    def __init__(self, channels, noise_channels):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones([]))
        self.copies, self.noise_channels = channels, noise_channels

    def forward(self, x, noise_labels, class_labels=None, augment_labels=None, extra_embedding=None):
        out = torch.cat([x] * self.copies, 1) * self.scale
        return out if extra_embedding is None else out + extra_embedding.sum() * 0


def build(name, network_kwargs, device, precision='fp32', trivial=False):
    """The network of system `name`; with `trivial`, its U-Net is replaced by `Trivial`."""
    net = SYSTEMS[name][0](img_channels=3, **network_kwargs)
    net.precision = precision
    if trivial:
        net.model = Trivial(2 if name == 'warm' else 1, net.model.noise_channels)
    return net.to(device)


def training_step(name, net, images):
    """Make a function without arguments that does one training step: forward, loss, backward, Adam."""
    loss = SYSTEMS[name][1]()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, betas=(0.9, 0.999), eps=1e-8)

    def step():
        net.train()
        optimizer.zero_grad(set_to_none=True)
        total = loss(net, images).mean()
        with net.products():
            total.backward()
        optimizer.step()
    return step


def sampling(name, net, latents, steps):
    """Make a function without arguments that runs Heun's sampler."""
    @torch.no_grad()
    def draw():
        net.eval()
        SYSTEMS[name][2](net, latents, num_steps=steps)
    return draw


def measure(make, network_kwargs, device, precision, repeats):
    """Values of the row for one kind of work, as a dict; make(name, net) returns the function to time."""
    def timed(kwargs, repeats, **options):
        nets = {name: build(name, kwargs, device, precision, **options) for name in SYSTEMS}
        return alternate_steps({name: make(name, net) for name, net in nets.items()}, repeats, device)
    whole = timed(network_kwargs, repeats)
    # A network whose U-Net gets replaced can just as well be small.
    around = timed(dict(network_kwargs, model_channels=32, channel_mult=[1], num_blocks=1), max(repeats, 20),
                   trivial=True)
    return dict(edm_seconds=whole['edm'], warm_seconds=whole['warm'], ratio=whole['warm'] / whole['edm'],
                edm_around_ms=1e3 * around['edm'], warm_around_ms=1e3 * around['warm'],
                added_percent=100 * (around['warm'] - around['edm']) / whole['edm'])


@click.command(context_settings=dict(show_default=True, max_content_width=120))
@click.option('--arch', type=click.Choice(list(ARCHITECTURES)), default='ddpmpp', help='Network architecture')
@click.option('--cbase', metavar='INT', type=int, default=None,
              help="Base number of channels  [default: the architecture's]")
@click.option('--cres', metavar='LIST', type=parse_int_list, default=None,
              help="Channels per resolution, times --cbase  [default: the architecture's]")
@click.option('--resolution', metavar='INT', type=int, default=32, help='Image resolution')
@click.option('--batch', metavar='INT', type=int, default=None, help='Training batch  [default: CPU 4, CUDA 512]')
@click.option('--sample-batch', metavar='INT', type=int, default=None,
              help='Images drawn at a time  [default: CPU 4, CUDA 512]')
@click.option('--steps', metavar='INT', type=int, default=None, help="Heun's steps  [default: CPU 2, CUDA 18]")
@click.option('--repeats', metavar='INT', type=int, default=5, help='Repeats per measurement; the median counts')
@click.option('--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='Where to run')
@click.option('--precision', type=click.Choice(list(PRECISIONS)), default='fp32', help='Precision of the networks')
@click.option('--out', metavar='FILE.json', default=None, help='Also write the report here')
def main(arch, cbase, cres, resolution, batch, sample_batch, steps, repeats, device, precision, out):
    """Measure what Warm costs over EDM."""
    cuda = torch.device(device).type == 'cuda'
    torch.backends.cudnn.benchmark = True  # as train.py does
    torch.set_num_threads(1)  # time that threads spend waiting for each other would count as processor time
    batch, sample_batch = batch or (512 if cuda else 4), sample_batch or (512 if cuda else 4)
    steps = steps or (18 if cuda else 2)
    network_kwargs = dict(ARCHITECTURES[arch], img_resolution=resolution, dropout=0.13)
    network_kwargs.update({'model_channels': cbase} if cbase else {}, **({'channel_mult': cres} if cres else {}))
    torch.manual_seed(0)
    parameters = sum(p.numel() for p in build('edm', network_kwargs, 'meta').parameters())
    images = torch.rand([batch, 3, resolution, resolution], device=device) * 2 - 1
    latents = torch.randn([sample_batch, 3, resolution, resolution], device=device)
    settings = dict(network=network_kwargs, parameters=parameters, batch=batch, sample_batch=sample_batch,
                    steps=steps, repeats=repeats, device=device, precision=precision)
    table = Table(f'Warm against EDM, {arch}, {parameters / 1e6:.1f} M parameters, {device}', settings, out, device)
    kinds = {f'training step, batch {batch}': lambda name, net: training_step(name, net, images),
             f'sampling, batch {sample_batch}, {steps} steps': lambda name, net: sampling(name, net, latents, steps)}
    for work, make in kinds.items():
        table.add(dict(work=work, **measure(make, network_kwargs, device, precision, repeats)))
    table.finish()


if __name__ == '__main__':
    main()
