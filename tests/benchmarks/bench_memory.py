"""The GPU memory of a training step, counted without a GPU.

    python tests/benchmarks/bench_memory.py [--batch=64] [--preset=ffhq] [--out=FILE.json]

The step runs on tensors that have shapes and lifetimes but no values (PyTorch's FakeTensorMode), and the live ones are
added up: weights, gradients, Adam's moments, EMA, activations. The operations are those of the CPU, whose fused
attention does not keep the attention weights either. Not counted: PyTorch's CUDA context, fragmentation of the
allocator, workspaces of convolutions and matrix products, and what torch.compile saves by fusing operations. The
reference way is that of bench_train.py; a row's `of_reference` is its peak over the reference's.
"""

import itertools
import pathlib
import sys
import weakref

import click
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from tests.benchmarks.bench_presets import network_of, options_of  # noqa: E402
from tests.benchmarks.bench_train import Trainer  # noqa: E402
from tests.benchmarks.report import report  # noqa: E402
from warm.presets import PRESETS  # noqa: E402

WAYS = {
    'reference': ('edm', None),
    'fp32': ('edm', dict(precision='fp32')),
    'bf16': ('edm', dict(precision='bf16')),
    'bf16, Warm': ('warm', dict(precision='bf16')),
    'bf16, --checkpoint-activations': ('edm', dict(precision='bf16', recompute=True)),
}


class Peak(TorchDispatchMode):
    """Adds up the bytes of all live tensors: `now`, and `peak`, the largest sum so far."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.alive = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return out

    def count(self, storage):
        """Count a storage, once, until it is freed."""
        key = storage._cdata
        if key not in self.alive:
            self.alive[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, key)

    def forget(self, key):
        """Stop counting a storage that was freed."""
        self.now -= self.alive.pop(key)


class FakeTrainer(Trainer):
    """bench_train.py's training steps on fake images."""

    def open_batches(self, data):
        return itertools.repeat((torch.zeros(data, device=self.device), None))


def peak_of(system, options, network_kwargs, batch):
    """(bytes between steps, peak bytes during a step), for the second step: the first creates Adam's moments."""
    size = network_kwargs['img_resolution']
    with Peak() as count:
        trainer = FakeTrainer(system, options, network_kwargs, [batch, 3, size, size], batch, 'cpu')
        trainer.step()
        trainer.optimizer.zero_grad(set_to_none=True)
        between = count.peak = count.now
        trainer.step()
    return between, count.peak


@click.command(context_settings=dict(show_default=True, max_content_width=120))
@click.option('--preset', type=click.Choice([name for name in PRESETS if name != 'digits']), default='cifar10',
              help='Preset whose network to count')
@click.option('--batch', metavar='INT', type=int, default=64, help='Images per GPU')
@click.option('--out', metavar='FILE.json', default=None, help='Also write the report here')
def main(preset, batch, out):
    """Count the memory of a training step."""
    rows = []
    networks = {system: network_of(options_of(preset, system)) for system in ('edm', 'warm')}
    with FakeTensorMode():  # one for all networks: cached constants are made once, in this mode
        counted = {name: peak_of(system, options, networks[system], batch)
                   for name, (system, options) in WAYS.items()}
    for name, (between, peak) in counted.items():
        rows.append(dict(way=name, between_steps_gib=between / 2 ** 30, peak_gib=peak / 2 ** 30,
                         of_reference=peak / counted['reference'][1]))
    report(f'Memory of a training step, counted: {preset}, batch {batch}', rows, dict(preset=preset, batch=batch), out)


if __name__ == '__main__':
    main()
