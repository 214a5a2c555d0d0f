"""What a score or an image belongs to: the network, how it was sampled, the version of the program."""

import json
import pathlib
import platform
import subprocess
import time

import torch

from dnnlib.files import file_sha256
from torch_utils import distributed
from training import metrics as m
from training.generation import generate_batch
from training.status import append_line

LOG_NAME = 'metrics.jsonl'


class CountedModel(torch.nn.Module):
    """Stands in for a U-Net: counts its calls and answers zeros."""

    def __init__(self, model, out_channels):
        super().__init__()
        self.model, self.out_channels, self.calls = model, out_channels, 0

    def forward(self, x, *args, **kwargs):
        self.calls += 1
        return x.new_zeros([len(x), self.out_channels, *x.shape[2:]])


def count_evaluations(net, sampler):
    """NFE: how often the sampler calls the U-Net for an image. The U-Net itself doesn't run."""
    model = net.model
    net.model = CountedModel(model, model.out_channels)
    try:
        generate_batch(net, [0], sampler)
        return net.model.calls
    finally:
        net.model = model


def network_facts(snapshot, net, system, options, sampler, class_idx=None):
    """What decides the image of a seed, and what a table of results says about it: plain JSON values.

    Args:
        snapshot, net, system: The network as read, as built, and its System.
        options: The sampler's options that the user gave; `sampler` is what they made.
    """
    return dict(
        network=pathlib.Path(snapshot.path).name,
        network_sha256=file_sha256(snapshot.path),
        kimg=snapshot.kimg,
        **training_facts(net, system, snapshot.dataset.get('name')),
        **sampling_facts(net, system, options, sampler),
        class_idx=class_idx,
    )


def training_facts(net, system, dataset_name):
    """What the network was trained for."""
    return dict(system=system.name, dataset=dataset_name, resolution=net.img_resolution, label_dim=net.label_dim)


def sampling_facts(net, system, options, sampler):
    """How it is sampled: NFE, solver, precision, the system's own facts (Warm's BNR), all options given."""
    solver = options.get('solver', 'heun') if 'solver' in system.sample_options else None
    return dict(nfe=count_evaluations(net, sampler), solver=solver, precision=net.precision,
                **system.describe(net, options), sampler=options)


def code_version():
    """`git describe` of the program's own repository, None where there is none."""
    root = pathlib.Path(__file__).resolve().parents[1]
    if not (root / '.git').exists():
        return None
    try:
        done = subprocess.run(['git', 'describe', '--always', '--tags', '--dirty'], cwd=root, capture_output=True,
                              text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def processor():
    """The processor's name, as far as the system tells."""
    try:
        lines = pathlib.Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines()
        return next(line.split(':', 1)[1].strip() for line in lines if line.startswith('model name'))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def hardware(device):
    """Name of the GPU, or of the processor."""
    return torch.cuda.get_device_name(device) if torch.device(device).type == 'cuda' else processor()


def log_scores(path, values, detector, facts):
    """Append a line for each score to a metrics.jsonl.

    Args:
        values: {name: value} as `training.metrics.score` gives them.
        detector: The detector, whose name is part of the metric's.
        facts: Plain JSON values that go into every line.

    Raises:
        UserError: the file cannot be written.
    """
    common = dict(facts, commit=code_version(), torch=torch.__version__, device=distributed.device().type,
                  ranks=distributed.get_world_size(), timestamp=round(time.time(), 3))
    for name, value in values.items():
        append_line(path, {'metric': m.label(name, detector), 'value': value, **common},
                    remedy='choose another file')


def read_facts(path):
    """The JSON object in a file, {} without one."""
    try:
        facts = json.loads(pathlib.Path(path).read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}
