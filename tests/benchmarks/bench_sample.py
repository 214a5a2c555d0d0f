"""Sampling images/s by precision, and what writing PNG files adds.

    python tests/benchmarks/bench_sample.py [--cbase=128] [--batch=64,512] [--compile] [--out=FILE.json]

A random network of EDM's CIFAR-10 size is drawn from with Heun's sampler, float64 state. `ratio` is against float32
without TF32 at the first batch size (larger ones leave it out: it takes minutes), `floor` the network's arithmetic at
the measured peak of a matrix product over the time taken. On a CPU, times are processor time, so that what writers in
the background take is seen in full.
"""

import json
import pathlib
import sys
import tempfile

import click
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from dnnlib.text import parse_int_list  # noqa: E402
from tests.benchmarks.bench_train import matrix_peak  # noqa: E402
from tests.benchmarks.report import alternate, report  # noqa: E402
from torch_utils.precision import PRECISIONS  # noqa: E402
from training.acceleration import accelerate  # noqa: E402
from training.generated import save_png, write_images  # noqa: E402
from training.generation import generate_batch, generate_images  # noqa: E402
from training.pixels import to_uint8  # noqa: E402
from warm.config import ARCHITECTURES  # noqa: E402
from warm.systems import SYSTEMS  # noqa: E402


def build(network_kwargs, system, device, **options):
    """A network with random weights, ready to draw."""
    torch.manual_seed(0)
    net = SYSTEMS[system].network_class(img_channels=3, **network_kwargs)
    return accelerate(net.eval().requires_grad_(False).to(device), cuda_graphs=True, **options)


def image_flops(network_kwargs):
    """Floating-point operations of one evaluation of the network for one image."""
    net = build(network_kwargs, 'edm', 'cpu')
    size = network_kwargs['img_resolution']
    with FlopCounterMode(display=False) as counter:
        net(torch.zeros([1, 3, size, size]), 1.0)
    return counter.get_total_flops()


def write_waiting(folder, batches):
    """The reference: the sampler waits for each file."""
    for seeds, images in batches:
        for seed, image in zip(seeds, images.cpu().numpy()):
            save_png(pathlib.Path(folder) / f'{seed}.png', image)


@click.command(context_settings=dict(show_default=True, max_content_width=120))
@click.option('--arch', type=click.Choice(list(ARCHITECTURES)), default='ddpmpp', help='Network')
@click.option('--cbase', metavar='INT', type=int, default=None, help='Channels  [default: CPU 32, CUDA of the network]')
@click.option('--size', metavar='INT', type=int, default=32, help='Resolution')
@click.option('--batch', 'batches', metavar='LIST', type=parse_int_list, default=None,
              help='Images at a time  [default: CPU 8, CUDA 64,512]')
@click.option('--steps', metavar='INT', type=int, default=None, help="Heun's steps  [default: CPU 2, CUDA 18]")
@click.option('--repeats', metavar='INT', type=int, default=3, help='Of each measurement')
@click.option('--compile', is_flag=True, help='Compiled networks too')
@click.option('--out', metavar='FILE.json', default=None, help='Also write the report here')
def main(arch, cbase, size, batches, steps, repeats, compile, out):
    """Measure sampling."""
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    cuda = device == 'cuda'
    if not cuda:
        torch.set_num_threads(1)
    cbase, steps, batches = cbase or (None if cuda else 32), steps or (18 if cuda else 2), batches or (
        [64, 512] if cuda else [8])
    network_kwargs = dict(ARCHITECTURES[arch], img_resolution=size, **({'model_channels': cbase} if cbase else {}))
    flops = image_flops(network_kwargs) * (2 * steps - 1)
    names = [name for name, p in PRECISIONS.items() if cuda or not (p.cuda_only or p.tf32)]
    options = {name: dict(precision=name) for name in names}
    if compile:
        options['bf16, compiled'] = dict(precision='bf16', compile=True)
    peaks = {name: matrix_peak(name, device) for name in names}
    rows = []
    for batch in batches:
        seeds = list(range(2 * batch))
        nets = {('edm', name): build(network_kwargs, 'edm', device, **o) for name, o in options.items()
                if name != 'fp32' or batch == batches[0]}
        nets['warm', 'bf16'] = build(network_kwargs, 'warm', device, precision='bf16')
        samplers = {key: SYSTEMS[key[0]].make_sampler(net, {'num_steps': steps}) for key, net in nets.items()}

        def drawing(key):
            return lambda: [to_uint8(generate_batch(nets[key], seeds[i:i + batch], samplers[key]))
                            for i in range(0, len(seeds), batch)]
        with tempfile.TemporaryDirectory() as folder:
            tasks = {f'{system}, {name}': drawing((system, name)) for system, name in nets}
            key = 'edm', 'bf16'
            tasks['edm, bf16, written by the sampler'] = lambda: write_waiting(
                folder, generate_images(nets[key], seeds, samplers[key], batch))
            tasks['edm, bf16, written behind it'] = lambda: write_images(
                folder, generate_images(nets[key], seeds, samplers[key], batch))
            seconds = alternate(tasks, repeats, device)
        for name, s in seconds.items():
            precision = name.split(', ')[1]
            rows.append(dict(batch=batch, way=name, images_per_second=len(seeds) / s,
                             ratio=len(seeds) / s / (rows[0]['images_per_second'] if rows else len(seeds) / s),
                             floor=flops * len(seeds) / peaks[precision] / s))
            if cuda:
                print(json.dumps(rows[-1]), flush=True)  # kept even if the time for the next batch does not suffice
    report(f'Sampling, {arch}, {steps} steps (NFE {2 * steps - 1})', rows,
           dict(network=network_kwargs, steps=steps, flops=flops, repeats=repeats,
                matrix_tflops={k: v / 1e12 for k, v in peaks.items()}), out, device)


if __name__ == '__main__':
    main()
