"""Training images/s: the reference way, the plain float32 path, and each faster one, in one run.

    python tests/benchmarks/bench_train.py [--cbase=128] [--batch=512] [--compile] [--out=FILE.json]

The reference way is EDM's: float32 without TF32, NCHW, attention with an explicit softmax, resampling by convolutions,
EMA and gradient cleaning tensor by tensor, one worker decoding PNG files. A row's `ratio` is its images/s over the
reference's. MFU is the network's FLOP/s (FLOPs as counted by PyTorch) over the measured peak of a matrix product in the
row's own precision; what --checkpoint-activations recomputes is not counted twice. `peak_gib` is the peak GPU memory
allocated during a step. On a CPU, times are processor time of one thread, without worker processes.
"""

import contextlib
import pathlib
import sys
import tempfile
import time
import typing
import zipfile

import click
import numpy as np
import PIL.Image
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from dnnlib.text import parse_int_list  # noqa: E402
from tests.benchmarks.report import Table, alternate, alternate_steps, compiled_whole, select  # noqa: E402
from torch_utils.precision import PRECISIONS, effective_precision, float32_products  # noqa: E402
from training import layers  # noqa: E402
from training import training_loop as tl  # noqa: E402
from training.acceleration import accelerate  # noqa: E402
from training.augment import TRAIN_AUGMENT, AugmentPipe  # noqa: E402
from training.batches import Batches  # noqa: E402
from training.dataset import ImageFolderDataset  # noqa: E402
from training.image_codec import encode_png  # noqa: E402
from warm.config import ARCHITECTURES  # noqa: E402
from warm.systems import SYSTEMS  # noqa: E402


def explicit_attention(qkv, num_heads):
    """Reference attention: the whole matrix of attention weights is in memory."""
    batch, channels, height, width = qkv.shape
    a = layers.plain_attention(*layers.split_heads(qkv, num_heads))
    return a.transpose(-1, -2).reshape(batch, channels // 3, height, width)


@contextlib.contextmanager
def reference_layers():
    """Context in which attention is an explicit softmax and resampling a convolution on every device, as in EDM."""
    former = layers.attend, layers.Conv2d._as_pixels
    layers.attend, layers.Conv2d._as_pixels = explicit_attention, lambda self, x: False
    try:
        yield
    finally:
        layers.attend, layers.Conv2d._as_pixels = former


@torch.no_grad()
def ema_one_by_one(ema, net, beta):
    """Reference EMA update, tensor by tensor."""
    for p_ema, p in zip(ema.parameters(), net.parameters()):
        p_ema.copy_(p.detach().lerp(p_ema, beta))


def clean_one_by_one(net):
    """Reference gradient cleaning, tensor by tensor."""
    for p in net.parameters():
        torch.nan_to_num(p.grad, nan=0, posinf=1e5, neginf=-1e5, out=p.grad)


class Way(typing.NamedTuple):
    """A system, arguments of `accelerate` (None = the reference way), and where the decoded images are kept."""

    system: str = 'edm'
    options: dict | None = None
    data_device: str = 'cpu'


def ways(device, compile, backend='inductor'):
    """{name: Way}; with `compile` also the compiled ones, using that backend of torch.compile."""
    cuda = device == 'cuda'
    found = {'reference': Way()}
    found.update({name: Way('edm', dict(precision=name)) for name in PRECISIONS
                  if effective_precision(name, torch.device(device)) == name})
    if cuda:
        found['bf16, --data-device=cuda'] = Way('edm', dict(precision='bf16'), 'cuda')
    found['bf16, channels-last'] = Way('edm', dict(precision='bf16', channels_last=True))
    if compile:
        fast = dict(precision='bf16', compile=True, backend=backend)
        found['bf16, compiled, channels-last'] = Way('edm', dict(fast, channels_last=True))
        found['bf16, compiled'] = Way('edm', dict(fast, channels_last=False))
        found['bf16, compiled, channels-last, Warm'] = Way('warm', dict(fast, channels_last=True))
    found['bf16, Warm'] = Way('warm', dict(precision='bf16'))
    found['bf16, --checkpoint-activations'] = Way('edm', dict(precision='bf16', recompute=True))
    return found


class Trainer:
    """One way of training: `step()` is a whole step; `parts` holds the seconds of each part of the timed steps."""

    def __init__(self, system, options, network_kwargs, data, batch, device, data_device='cpu'):
        self.reference, self.batch, self.device = options is None, batch, torch.device(device)
        self.data_device = data_device
        self.pipe = AugmentPipe(p=0.12, **TRAIN_AUGMENT)
        torch.manual_seed(0)
        network_kwargs = {'augment_dim': self.pipe.label_dim, **network_kwargs}
        with torch.device(device):
            self.net, self.ema = (SYSTEMS[system].network_class(img_channels=3, **network_kwargs) for _ in range(2))
        self.net.train()
        self.ema.requires_grad_(False)
        accelerate(self.net, **(options or {}))
        self.loss = SYSTEMS[system].make_loss(self.net)
        adam = dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-8)
        self.optimizer = (torch.optim.Adam(self.net.parameters(), **adam) if self.reference
                          else tl.make_optimizer(self.net, **adam))
        self.batches = self.open_batches(data)
        self.parts = {}

    def open_batches(self, data):
        """The batches to train on: the data set as PNG files for the reference, else decoded in advance."""
        dataset = ImageFolderDataset(data) if self.reference else tl.open_dataset(path=data)
        return Batches(dataset, self.batch, 0, 0, dict(num_workers=1, prefetch_factor=2), self.device,
                       self.data_device)

    @contextlib.contextmanager
    def part(self, name):
        """Context that times a part of a timed step; on a GPU this synchronises, so such steps are slower."""
        clock = time.perf_counter if self.device.type == 'cuda' else time.process_time
        if self.timed and self.device.type == 'cuda':
            torch.cuda.synchronize()
        start = clock()
        yield
        if self.timed:
            if self.device.type == 'cuda':
                torch.cuda.synchronize()
            self.parts[name] = self.parts.get(name, 0) + clock() - start

    def step(self, timed=False):
        """One training step: data, loss, gradients, Adam, EMA; returns the loss [B, C, H, W]."""
        self.timed = timed
        with reference_layers() if self.reference else contextlib.nullcontext():
            with self.part('data'):
                images, labels = next(self.batches)
            with self.part('augmentation'):
                augmented = self.pipe(images)
            self.optimizer.zero_grad(set_to_none=True)
            with self.part('forward'):
                loss = self.loss(self.net, images, None, lambda _: augmented)
                tl.training_stats.report('Loss/loss', loss)
            with self.part('backward'), self.net.products():
                loss.sum().mul(1 / self.batch).backward()
        with self.part('gradient cleaning'):
            (clean_one_by_one if self.reference else tl.clean_gradients)(self.net)
        with self.part('Adam'):
            self.optimizer.step()
        with self.part('moving average'):
            (ema_one_by_one if self.reference else tl.update_ema)(self.ema, self.net, 0.99)
        return loss.detach()

    def peak_memory(self):
        """Peak GPU memory allocated during a step, in GiB; None on a CPU."""
        if self.device.type != 'cuda':
            return None
        torch.cuda.reset_peak_memory_stats()
        self.step()
        return torch.cuda.max_memory_allocated() / 2 ** 30


def matrix_peak(precision, device, repeats=10):
    """Measured FLOP/s of a large matrix product of random numbers in this precision."""
    n = 8192 if device == 'cuda' else 1024
    p = PRECISIONS[precision]
    a, b = (torch.randn([n, n], device=device).to(p.dtype_on(torch.device(device))) for _ in range(2))
    with float32_products(p.tf32):
        seconds = alternate({'product': lambda: [a @ b for _ in range(repeats)]}, 5, device)['product'] / repeats
    return 2 * n ** 3 / seconds


def step_flops(network_kwargs, system='edm'):
    """FLOPs of a training step per image: the network's matrix products and convolutions, forward and backward."""
    return _count(network_kwargs, system,
                  lambda net, images: SYSTEMS[system].make_loss(net)(net, images).sum().backward())


def forward_flops(network_kwargs, system='edm'):
    """FLOPs of one network evaluation per image."""
    return _count(network_kwargs, system, lambda net, images: net(images, 1.0))


def _count(network_kwargs, system, work):
    size = network_kwargs['img_resolution']
    with torch.device('meta'):  # counting needs only shapes
        net = SYSTEMS[system].network_class(img_channels=3, **network_kwargs)
        with FlopCounterMode(display=False) as counter:
            work(net, torch.zeros([1, 3, size, size]))
    return counter.get_total_flops()


def write_zip(path, count, size):
    """Write a zip of `count` smooth random images as uncompressed PNG files, like those of dataset_tool.py."""
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, 'w') as z:
        for i in range(count):
            small = PIL.Image.fromarray(rng.integers(0, 256, [8, 8, 3], dtype=np.uint8))
            z.writestr(f'{i:08d}.png', encode_png(small.resize([size, size], PIL.Image.Resampling.BICUBIC)))


def chosen_ways(choices, only, reference):
    """The names in `choices` that --only selects, after the reference; without it unless `reference`."""
    names = [name for name in select(choices, only) if name != 'reference']
    return ['reference', *names] if reference else names


backend_option = click.option(
    '--backend', default='inductor', help='Backend of torch.compile; aot_eager takes seconds, to try the script')
reference_option = click.option(
    '--reference/--no-reference', default=True, help='Without the reference, which is slow, there are no ratios')


@click.command(context_settings=dict(show_default=True, max_content_width=120))
@click.option('--arch', type=click.Choice(list(ARCHITECTURES)), default='ddpmpp', help='Network architecture')
@click.option('--cbase', metavar='INT', type=int, default=None,
              help="Base number of channels  [default: CPU 64, CUDA the architecture's]")
@click.option('--cres', metavar='LIST', type=parse_int_list, default=None,
              help="Channels per resolution, times --cbase  [default: the architecture's]")
@click.option('--blocks', metavar='INT', type=int, default=None,
              help="Blocks per resolution  [default: the architecture's]")
@click.option('--size', metavar='INT', type=int, default=32, help='Image resolution')
@click.option('--batch', metavar='INT', type=int, default=None, help='Images per step  [default: CPU 8, CUDA 512]')
@click.option('--images', metavar='INT', type=int, default=2048, help='Images in the synthetic data set')
@click.option('--repeats', metavar='INT', type=int, default=None,
              help='Repeats per measurement (of 5 steps on CUDA)  [default: CPU 3, CUDA 5]')
@click.option('--compile', is_flag=True, help='Also measure compiled networks; each takes minutes to compile')
@backend_option
@click.option('--only', metavar='LIST', default=None,
              help='Only rows that contain one of these words (a,b,-c: without c), or the row =NAME, and the reference')
@reference_option
@click.option('--out', metavar='FILE.json', default=None, help='Also write the report here')
def main(arch, cbase, cres, blocks, size, batch, images, repeats, compile, backend, only, reference, out):
    """Measure training speed."""
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    cuda = device == 'cuda'
    choices = ways(device, compile, backend)
    chosen = chosen_ways(choices, only, reference)
    if not cuda:
        torch.set_num_threads(1)
    torch.backends.cudnn.benchmark = True
    batch, repeats = batch or (512 if cuda else 8), repeats or (5 if cuda else 3)
    network_kwargs = dict(ARCHITECTURES[arch], img_resolution=size, dropout=0.13)
    chosen_sizes = dict(model_channels=cbase or (None if cuda else 64), channel_mult=cres, num_blocks=blocks)
    network_kwargs.update({name: value for name, value in chosen_sizes.items() if value})
    flops = step_flops(network_kwargs)
    peaks = {name: matrix_peak(name, device) for name in PRECISIONS}
    parameters = sum(p.numel() for p in SYSTEMS['edm'].network_class(img_channels=3, **network_kwargs).parameters())
    table = Table(
        f'Training, {arch}, {parameters / 1e6:.1f} M parameters, batch {batch}, {flops / 1e9:.1f} GFLOP per image',
        dict(network=network_kwargs, parameters=parameters, batch=batch, repeats=repeats, flops=flops, backend=backend,
             matrix_tflops={k: v / 1e12 for k, v in peaks.items()}), out, device)
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        data = f'{folder}/data.zip'
        write_zip(data, images, size)

        def measure(labels):
            names = [label['way'] for label in labels]
            with contextlib.ExitStack() as stack:
                trainers = {}
                for name in names:
                    system, options, data_device = choices[name]
                    trainers[name] = Trainer(system, options, network_kwargs, data, batch, device, data_device)
                    stack.callback(trainers[name].batches.close)
                steps = {name: trainer.step for name, trainer in trainers.items()}
                if cuda and precision_of(choices[names[0]]) == 'fp32':  # over a second per step
                    seconds.update(alternate(steps, 1, device, warm_up=2, in_a_row=2))
                else:
                    seconds.update(alternate_steps(steps, repeats, device))
                return [{**numbers(name, trainers[name], precision_of(choices[name]), seconds, flops, peaks),
                         **compiled_whole(choices[name].options)} for name in names]

        # On a GPU one after the other: together they would need too much memory.
        for group in ([[name] for name in chosen] if cuda else [chosen]):
            table.attempt([dict(way=name) for name in group], measure)
    table.finish()


def precision_of(way):
    """Name of the precision that a way trains in."""
    return (way.options or {}).get('precision', 'fp32')


def numbers(name, trainer, precision, seconds, flops, peaks):
    """A row of the table: speed, MFU, memory, and the milliseconds of each part of a step."""
    per_second = trainer.batch / seconds[name]
    memory = trainer.peak_memory()
    trainer.parts = {}
    trainer.step(timed=True)
    return dict(images_per_second=per_second,
                ratio=seconds['reference'] / seconds[name] if 'reference' in seconds else None,
                mfu=per_second * flops / peaks[precision], **({'peak_gib': memory} if memory else {}),
                **{part: f'{1e3 * t:.1f} ms' for part, t in trainer.parts.items()})


if __name__ == '__main__':
    main()
