"""The commands as a user runs them, with a tiny network on the embedded digits, and attention at CIFAR-10's shapes.

    python tests/benchmarks/smoke.py [--tiny] [--out=FILE.json]

Training is stopped by a signal and continued; the score of the drawn images must be that of the network, digit for
digit; attention must equal the explicit softmax in float32. Prints a line per step and goes on after a failure, which
makes the exit code 1. On a GPU, steps that do not need each other run at the same time, since each spends seconds on
starting. With --tiny nothing is compiled, which takes minutes on a CPU.
"""

import concurrent.futures
import contextlib
import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import click
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from dnnlib.json_files import read_lines  # noqa: E402
from tests.benchmarks.report import ROOT, Table, alternate, dying_with_parent  # noqa: E402
from torch_utils.signals import EXIT_STOPPED  # noqa: E402
from training import layers  # noqa: E402
from training.dataset import EMBEDDED  # noqa: E402
from training.run_files import SNAPSHOT, saved_files  # noqa: E402

KIMG = 2.048
TRAINING = ['--cbase=16', '--cres=1,2', '--batch=64', '--precision=bf16', '--lr-rampup=0.001', '--seed=0',
            '--grid=0', '--nosubdir', '--auto-resume']
SEEDS = ['--seeds=0-63', '--batch=64']
TOLERANCE = 0.02  # ‖difference‖/‖value‖ of attention in bfloat16, which rounds to 8 bits, its gradients included
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]


# -- commands, in a folder

def start(*command):
    """Start one of the project's commands."""
    print('$ python', *command, flush=True)
    return subprocess.Popen(dying_with_parent([sys.executable, *map(str, command)]), cwd=ROOT)


def succeed(*command, rc=0, process=None):
    """Run a command, or wait for it if it has been started; its exit code must be `rc`."""
    found = (process or start(*command)).wait()
    if found != rc:
        raise RuntimeError(f'{" ".join(command[:2])} ended with code {found}, not {rc}')


def training(folder, device):
    """Command line of a training in bfloat16 with the images on the device."""
    return ['train.py', f'--outdir={folder}/run', *TRAINING, f'--data-device={device}', f'--duration={KIMG / 1000}',
            '--tick=0.256']


def ticks(folder):
    """The kimg of all ticks of the training so far."""
    path = folder / 'run' / 'stats.jsonl'
    return [line['Progress/kimg']['mean'] for line in read_lines(path)]


def stop_training(folder, device):
    """Train and send SIGTERM after the first ticks."""
    command = training(folder, device)
    process = start(*command)
    while process.poll() is None and len(ticks(folder)) < 2:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    succeed(*command, rc=EXIT_STOPPED, process=process)
    return dict(stopped_at_kimg=ticks(folder)[-1])


def resume_training(folder, device):
    """The same command goes on to the end."""
    before = ticks(folder)
    succeed(*training(folder, device))
    after = ticks(folder)
    assert after[:len(before) - 1] == before[:-1] and abs(after[-1] - KIMG) < 0.1 and before[-1] < KIMG, after


def draw(folder, device):
    """64 images of the trained network."""
    succeed('generate.py', f'--network={snapshot(folder / "run")}', f'--outdir={folder}/images', *SEEDS)
    assert len(list((folder / 'images').glob('*.png'))) == 64


def score(folder, device):
    """Score the drawn images, and the network; both must have the same score."""
    succeed('fid.py', 'ref', f'--data={EMBEDDED}', f'--dest={folder}/digits.npz', '--detector=pixels')
    scored = {'images': [f'--images={folder}/images', '--num=64'],
              'network': [f'--network={snapshot(folder / "run")}', *SEEDS]}
    values = {}
    for what, options in scored.items():
        succeed('fid.py', 'calc', *options, f'--ref={folder}/digits.npz', '--detector=pixels',
                f'--log={folder}/{what}.jsonl')
        values[what] = json.loads((folder / f'{what}.jsonl').read_text())['value']
    assert values['images'] == values['network'], values
    return dict(score=values['images'])


def train_classifier(folder, device):
    """Train a classifier of the digits."""
    succeed('-m', 'training.classifier', f'--data={EMBEDDED}', f'--test={EMBEDDED}', f'--dest={folder}/digits.ts',
            '--epochs=1', '--width=8', '--flip=0')


def train_compiled(folder, device):
    """Train a few steps compiled, at one resolution, which halves the time to compile."""
    succeed('train.py', f'--outdir={folder}/compiled', *TRAINING, '--cres=1', '--compile', '--duration=0.001024')


def draw_compiled(folder, device):
    """64 images with the network compiled."""
    succeed('generate.py', f'--network={snapshot(folder / "run")}', f'--outdir={folder}/compiled-images', *SEEDS,
            '--compile')
    assert len(list((folder / 'compiled-images').glob('*.png'))) == 64


def snapshot(run):
    """Path of the newest snapshot."""
    found = saved_files(run, SNAPSHOT)
    assert found, f'no snapshot in {run}'
    return found[0]


# name → (function of folder and device, the steps whose results it needs)
STEPS = {
    'train, stopped': (stop_training, []),
    'train.py --compile': (train_compiled, []),
    'generate.py --compile': (draw_compiled, ['train, stopped']),
    'train, resumed': (resume_training, ['train, stopped']),
    'generate.py': (draw, ['train, resumed']),
    'fid.py': (score, ['generate.py']),
    'classifier': (train_classifier, []),
}


# -- attention

def attention(backend, size, batch, channels, device):
    """Time forward and backward with a backend of PyTorch, None for its own choice, and compare with `explicit`."""
    torch.manual_seed(0)
    qkv, grad = (torch.randn([batch, count, size, size], device=device).to(torch.bfloat16)
                 for count in (3 * channels, channels))

    def run(attend, dtype):
        x = qkv.detach().to(dtype).requires_grad_()
        out = attend(x, 1)
        return out.detach(), *torch.autograd.grad(out, x, grad.to(dtype))
    expected = run(explicit, torch.float32)
    try:
        with sdpa_kernel(backend) if backend else contextlib.nullcontext():
            found = run(layers.attend, torch.bfloat16)
            seconds = alternate({'': lambda: run(layers.attend, torch.bfloat16)}, 3, device, warm_up=2, in_a_row=5)['']
    except RuntimeError as e:
        if backend is None or 'No available kernel' not in str(e) and 'No viable backend' not in str(e):
            raise
        return dict(refused=str(e)[:200])
    difference = max(float((a.float() - b).norm() / b.norm()) for a, b in zip(found, expected))
    assert difference < TOLERANCE, difference
    return dict(milliseconds=1e3 * seconds, difference=difference)


def explicit(qkv, num_heads):
    """The same as `layers.attend` by the definition."""
    out = layers.plain_attention(*layers.split_heads(qkv, num_heads)).transpose(-1, -2)
    return out.reshape(qkv.shape[0], -1, *qkv.shape[2:])


# -- all

def measured(step, name):
    """The numbers that step() returns and its seconds, after a line that says how it went."""
    begin, outcome = time.perf_counter(), 'failed'
    try:
        found = step() or {}
        outcome = 'ok'
    finally:
        seconds = round(time.perf_counter() - begin, 1)
        print(f'-- {name}: {outcome}, {seconds} s', flush=True)
    return [dict(seconds=seconds, **found)]


@click.command()
@click.option('--tiny', is_flag=True, help='Compile nothing, and attention of few channels')
@click.option('--out', metavar='FILE.json', default=None, help='Also write the report here')
def main(tiny, out):
    """Run the commands once."""
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    small = tiny or device == 'cpu'
    steps = {name: step for name, step in STEPS.items() if not (tiny and '--compile' in name)}
    table = Table('The commands, once', dict(kimg=KIMG, left_out=[name for name in STEPS if name not in steps]), out,
                  device)

    def attempt(name, step):
        table.attempt([dict(step=name)], lambda _: measured(step, name))

    for size in (16, 8):  # before the rest, which would disturb the timing
        for backend in (None, *BACKENDS):
            attempt(f'attention, {size * size} pixels, {backend.name if backend else "as chosen"}',
                    functools.partial(attention, backend, size, *((4, 16) if small else (512, 256)), device))
    with tempfile.TemporaryDirectory() as folder:
        os.environ['DNNLIB_CACHE_DIR'] = f'{folder}/cache'
        with concurrent.futures.ThreadPoolExecutor(len(steps) if device == 'cuda' else 1) as pool:
            submitted = {}

            def run(name):
                function, needed = steps[name]
                concurrent.futures.wait([submitted[other] for other in needed])
                attempt(name, functools.partial(function, pathlib.Path(folder), device))
            for name in steps:
                submitted[name] = pool.submit(run, name)
    table.finish()


if __name__ == '__main__':
    main()
