"""Sampling images/s: the reference way, each faster one, and a whole set of images as generate.py writes it.

    python tests/benchmarks/bench_sample.py [--cbase=128] [--compile] [--total=50000] [--out=FILE.json]

Samples a randomly initialised network of EDM's CIFAR-10 size with Heun's sampler and a float64 state. The reference way
is EDM's: float32 without TF32, NCHW, attention with an explicit softmax, resampling by convolutions, at most 64 images
at a time (EDM's default, used for all fp32 rows; the others use --batch), and a sampler that waits for each PNG file.
`ratio` is a row's images/s over the reference's. `times_floor` is the time relative to images × NFE × FLOPs of an
evaluation / FLOP/s, that of the network's products alone at the measured peak of bf16; the target for 50,000 images is
at most 2. Their row uses the fastest of EDM's ways above it, writes in the background, and is elapsed time. The other
rows are processor time on a CPU, so that the cost of background writers shows in full.
"""

import contextlib
import json
import pathlib
import sys
import tempfile
import time
import typing

import click
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from dnnlib.text import parse_int_list  # noqa: E402
from tests.benchmarks.bench_train import (backend_option, chosen_ways, forward_flops, matrix_peak,  # noqa: E402
                                          reference_layers, reference_option)
from tests.benchmarks.report import Table, alternate, compiled_whole  # noqa: E402
from torch_utils.precision import PRECISIONS, effective_precision  # noqa: E402
from training.acceleration import accelerate  # noqa: E402
from training.generated import save_png, write_images  # noqa: E402
from training.generation import BATCH, generate_images  # noqa: E402
from warm.config import ARCHITECTURES  # noqa: E402
from warm.systems import SYSTEMS  # noqa: E402

BATCHES = 2  # per measurement
SYSTEM_KWARGS = {'warm': dict(bnr='0.5')}


def draw_only(folder, batches):
    """Draw the images without writing them."""
    for _ in batches:
        pass


def write_waiting(folder, batches):
    """Write the images as the reference does: the sampler waits for each file."""
    for seeds, images in batches:
        for seed, image in zip(seeds, images.cpu().numpy()):
            save_png(pathlib.Path(folder) / f'{seed}.png', image)


class Way(typing.NamedTuple):
    """A system, arguments of `accelerate` (None = the reference way), and what is done with the images."""

    system: str
    options: dict | None
    consume: typing.Callable = draw_only


def ways(device, compile, backend='inductor'):
    """{name: Way}, EDM's first; with `compile` also the compiled ones, using that backend of torch.compile."""
    plain = dict(precision='bf16')
    found = {'reference': Way('edm', None, write_waiting)}
    found.update({name: Way('edm', dict(precision=name)) for name in PRECISIONS
                  if effective_precision(name, torch.device(device)) == name})
    found['bf16, written by the sampler'] = Way('edm', plain, write_waiting)
    found['bf16, written behind it'] = Way('edm', plain, write_images)
    if compile:
        fast = dict(plain, compile=True, backend=backend)
        graphs = dict(fast, cuda_graphs=True)
        found['bf16, compiled'] = Way('edm', fast)
        found['bf16, compiled, CUDA graphs'] = Way('edm', graphs)
        found['bf16, compiled, CUDA graphs, written behind it'] = Way('edm', graphs, write_images)
        found['bf16, compiled, CUDA graphs, Warm'] = Way('warm', graphs)
    found['bf16, Warm'] = Way('warm', plain)
    return found


class Drawer:
    """Draws images in each way at one batch size; ways with the same system and options share a network."""

    def __init__(self, network_kwargs, steps, batch, device):
        self.network_kwargs, self.steps, self.batch, self.device = network_kwargs, steps, batch, device
        self.made = {}

    def images(self, way, count):
        """The batches of `generate_images` for `count` seeds."""
        net, sampler = self.network(way)
        return generate_images(net, range(count), sampler, self.batch_of(way))

    def batch_of(self, way):
        """Images at a time; few for float32 without TF32, where a large batch is no faster and takes a minute."""
        slow = way.options is None or way.options['precision'] == 'fp32'
        return min(self.batch, BATCH) if slow else self.batch

    def count(self, way):
        """Images per measurement."""
        return BATCHES * self.batch_of(way)

    def draw(self, way, count, folder, **options):
        """Draw `count` images and consume them as the way does; `options` are passed on to `write_images`."""
        with reference_layers() if way.options is None else contextlib.nullcontext():
            way.consume(folder, self.images(way, count), **options)

    def network(self, way):
        """(network with random weights, sampler) of a way, made once."""
        key = way.system, json.dumps(way.options, sort_keys=True)
        if key not in self.made:
            torch.manual_seed(0)
            net = SYSTEMS[way.system].network_class(img_channels=3, **self.network_kwargs,
                                                    **SYSTEM_KWARGS.get(way.system, {}))
            net.eval().requires_grad_(False).to(self.device)
            accelerate(net, **(way.options or {}))
            self.made[key] = net, SYSTEMS[way.system].make_sampler(net, {'num_steps': self.steps})
        return self.made[key]


def measure(table, drawer, choices, chosen, total, repeats):
    """Add the rows of one batch size: EDM's ways, with `total` the whole set in the fastest of them, then Warm's."""
    cuda, rates = torch.device(drawer.device).type == 'cuda', {}

    def numbers(count, seconds, unit):
        rate = count / seconds
        return dict(images=count, seconds=seconds, unit=unit, images_per_second=rate,
                    ratio=rate / rates['reference'] if 'reference' in rates else None,
                    times_floor=seconds / (count * table.settings['flops'] / (1e12 * table.settings['matrix_tflops'])))

    def draw(labels):
        names = [label['way'] for label in labels]
        with tempfile.TemporaryDirectory() as folder:
            seconds = alternate({name: lambda way=choices[name]: drawer.draw(way, drawer.count(way), folder)
                                 for name in names}, repeats, drawer.device)
        rates.update({name: drawer.count(choices[name]) / seconds[name] for name in names})
        return [{**numbers(drawer.count(choices[name]), seconds[name], 'elapsed' if cuda else 'processor'),
                 **compiled_whole(choices[name].options)} for name in names]

    def draw_all(_):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            drawer.draw(choices[best]._replace(consume=write_images), total, folder, subdirs=True)
            return [numbers(total, time.perf_counter() - start, 'elapsed')]

    # Warm comes last: if time runs out, the whole set matters more.
    of_edm = [name for name in chosen if choices[name].system == 'edm']
    for names in (of_edm, [name for name in chosen if name not in of_edm]):
        # On a GPU one way after the other, on a CPU in turns.
        for group in ([[name] for name in names] if cuda else [names] if names else []):
            table.attempt([dict(batch=drawer.batch_of(choices[name]), way=name) for name in group], draw)
        if names is of_edm and total and rates:
            best = max([name for name in rates if choices[name].consume is draw_only] or rates, key=rates.get)
            table.attempt([dict(batch=drawer.batch_of(choices[best]),
                                way=f'{total} images: {best}, written behind it')], draw_all)


@click.command(context_settings=dict(show_default=True, max_content_width=120))
@click.option('--arch', type=click.Choice(list(ARCHITECTURES)), default='ddpmpp', help='Network architecture')
@click.option('--cbase', metavar='INT', type=int, default=None,
              help="Base number of channels  [default: CPU 32, CUDA the architecture's]")
@click.option('--cres', metavar='LIST', type=parse_int_list, default=None,
              help="Channels per resolution, times --cbase  [default: the architecture's]")
@click.option('--blocks', metavar='INT', type=int, default=None,
              help="Blocks per resolution  [default: the architecture's]")
@click.option('--size', metavar='INT', type=int, default=32, help='Image resolution')
@click.option('--batch', 'batches', metavar='LIST', type=parse_int_list, default=None,
              help='Images at a time  [default: CPU 8, CUDA 512]')
@click.option('--steps', metavar='INT', type=int, default=None, help="Heun's steps  [default: CPU 2, CUDA 18]")
@click.option('--total', metavar='INT', type=int, default=None,
              help='Images in the whole set; 0 = skip it  [default: CPU 20, CUDA 5000]')
@click.option('--repeats', metavar='INT', type=int, default=3, help='Repeats per measurement')
@click.option('--compile', is_flag=True, help='Also measure compiled networks')
@backend_option
@click.option('--only', metavar='LIST', default=None,
              help='Only rows that contain one of these words (a,b,-c: without c), or the row =NAME, and the reference')
@reference_option
@click.option('--out', metavar='FILE.json', default=None, help='Also write the report here')
def main(arch, cbase, cres, blocks, size, batches, steps, total, repeats, compile, backend, only, reference, out):
    """Measure sampling speed."""
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    cuda = device == 'cuda'
    choices = ways(device, compile, backend)
    chosen = chosen_ways(choices, only, reference)
    if not cuda:
        torch.set_num_threads(1)
    steps, batches = steps or (18 if cuda else 2), batches or ([512] if cuda else [8])
    total = (5000 if cuda else 20) if total is None else total
    network_kwargs = dict(ARCHITECTURES[arch], img_resolution=size)
    chosen_sizes = dict(model_channels=cbase or (None if cuda else 32), channel_mult=cres, num_blocks=blocks)
    network_kwargs.update({name: value for name, value in chosen_sizes.items() if value})
    flops = (2 * steps - 1) * forward_flops(network_kwargs)
    table = Table(f'Sampling, {arch}, {steps} steps (NFE {2 * steps - 1}), {flops / 1e9:.4g} GFLOP per image',
                  dict(network=network_kwargs, steps=steps, flops=flops, repeats=repeats, backend=backend,
                       matrix_tflops=matrix_peak('bf16', device) / 1e12), out, device)
    for batch in batches:
        measure(table, Drawer(network_kwargs, steps, batch, device), choices, chosen, total, repeats)
    table.finish()


if __name__ == '__main__':
    main()
