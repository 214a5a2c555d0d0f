"""Where a score or an image comes from: the network, how it was sampled, the code version, the machine."""

import math
import os
import pathlib
import platform
import subprocess
import sys
import time

import torch

from dnnlib.files import file_sha256
from dnnlib.json_files import append_line
from torch_utils import distributed as dist
from torch_utils.precision import effective_precision
from training.metrics import label
from training.schedules import SOLVER
from training.stand_ins import count_evaluations, trace
from training.system import as_flags

COMMIT_VARIABLE = 'WARM_COMMIT'  # environment variable with the code version, for a copy without git


def network_facts(snapshot, net, system, options, sampler, class_idx=None):
    """Everything that determines a seed's image or that a table of results shows, as plain JSON values.

    Args:
        snapshot, net, system: The network as read, as built, and its System.
        options, sampler: The sampler options that the user gave, and the sampler made from them.
        class_idx: Class of all images, or None.
    """
    return dict(**snapshot_facts(snapshot, net, system), **sampling_facts(net, system, options, sampler),
                class_idx=class_idx)


def snapshot_facts(snapshot, net, system):
    """What the network is and was trained for, and the file it is from; arguments as for `network_facts`."""
    return dict(network=pathlib.Path(snapshot.path).name, network_sha256=file_sha256(snapshot.path),
                kimg=snapshot.kimg,
                **training_facts(net, system, snapshot.dataset.get('name'), snapshot.extra.get('loss')))


def training_facts(net, system, dataset_name, loss):
    """What the network is and was trained for; `loss`: options of its loss (System.changed_loss)."""
    return dict(system=system.name, dataset=dataset_name, resolution=net.img_resolution, label_dim=net.label_dim,
                architecture=type(net.model).__name__, parameters=sum(p.numel() for p in net.parameters()),
                network_options=system.changed_network(net.init_kwargs), loss=loss)


def sampling_facts(net, system, options, sampler):
    """How the network is sampled: NFE, solver, precision, the system's own facts (Warm's BNR), all options given."""
    solver = options.get('solver', SOLVER) if 'solver' in system.sample_options else None
    precision = effective_precision(net.precision, next(net.parameters()).device)
    return dict(nfe=count_evaluations(net, sampler), solver=solver, precision=precision,
                **system.describe(net, options), sampler=options)


def difference(recorded, facts, net, system):
    """How recorded images differ from those of `facts`, in words; None if they do not.

    The network's content counts, not its file name, and what the sampler does, not which options were given:
    `--steps=18` makes no difference where 18 steps are the default.

    Args:
        recorded: A record as read from a file, perhaps written by another version.
        facts: The `network_facts` of `net` and `system`.
    """
    if recorded.get('network_sha256') != facts['network_sha256']:
        return 'another network'
    if recorded.get('class_idx') != facts['class_idx']:
        return 'other options (another --class)'
    if recorded.get('precision') != facts['precision']:
        return f"other options (--precision={recorded.get('precision')}, now {facts['precision']})"
    there, now = recorded.get('sampler'), facts['sampler']
    if there == now or _draws_alike(net, system, there, now, facts['nfe']):
        return None
    return f'other options ({_as_typed(there)}, now {_as_typed(now)})'


def _draws_alike(net, system, there, now, nfe):
    """Whether two sets of sampler options make the same sampler; `there` comes from a file and may be anything."""
    steps = there.get('num_steps') if isinstance(there, dict) else math.inf
    try:
        # No sampler takes more steps than asked for, or by default than evaluations; an absurd number takes for ever.
        if (steps or 0) > max(nfe, now.get('num_steps') or 0):
            return False
        samplers = [system.make_sampler(net, options) for options in (there, now)]
        return trace(net, samplers[0]) == trace(net, samplers[1])
    except Exception:  # malformed values can raise anything
        return False


def _as_typed(options):
    """Sampler options as flags: '--steps=3 --bnr=0.5'."""
    if not isinstance(options, dict):
        return 'unknown ones'
    return ' '.join(as_flags(options)) or 'the defaults'


def code_version():
    """The version of the code: that of this repository, then '+NAME@SHA256' for a script outside that started it.

    The repository's is `git describe`, '-dirty' with uncommitted changes; without git $WARM_COMMIT, else None. Changes
    in results/ do not count, since a study appends to its files there while it runs; nor do untracked files.
    """
    root = pathlib.Path(__file__).resolve().parents[1]
    version = _repository_version(root)
    script = getattr(sys.modules['__main__'], '__file__', None)
    if script is None or not os.path.isfile(script) or _is_below(script, (root, sys.prefix, sys.base_prefix)):
        return version
    return f'{version}+{pathlib.Path(script).name}@{file_sha256(script)[:12]}'


def _is_below(path, folders):
    path = pathlib.Path(path).resolve()
    return any(path.is_relative_to(pathlib.Path(folder).resolve()) for folder in folders)


def _repository_version(root):
    told = os.environ.get(COMMIT_VARIABLE) or None
    if not (root / '.git').exists():
        return told
    try:
        name, changes = (
            subprocess.run(['git', *args], cwd=root, capture_output=True, text=True, timeout=20).stdout.strip()
            for args in (['describe', '--always', '--tags'], ['status', '--porcelain', '-uno', ':!results']))
    except (OSError, subprocess.SubprocessError):
        return told
    return f"{name}{'-dirty' if changes else ''}" if name else told


def processor():
    """The CPU's model name, or the best that the platform reports."""
    try:
        lines = pathlib.Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines()
        return next(line.split(':', 1)[1].strip() for line in lines if line.startswith('model name'))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def hardware(device):
    """Name of the GPU, or of the CPU."""
    return torch.cuda.get_device_name(device) if torch.device(device).type == 'cuda' else processor()


def log_scores(path, values, detector, facts):
    """Append one line per score to a metrics.jsonl.

    Args:
        path: The file.
        values: {name: value} as `training.metrics.score` returns them.
        detector: The detector, whose name becomes part of the metric's label.
        facts: Plain JSON values for every line.

    Raises:
        UserError: the file cannot be written.
    """
    common = dict(facts, commit=code_version(), torch=torch.__version__, device=dist.device().type,
                  ranks=dist.get_world_size(), timestamp=round(time.time(), 3))
    for name, value in values.items():
        append_line(path, {'metric': label(name, detector), 'value': value, **common}, remedy='choose another file')
