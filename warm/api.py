"""The library interface: load a snapshot and sample images. For D and R of a noisy image, see WarmPrecond."""

import contextlib
import dataclasses
import numbers
import operator

import torch

from dnnlib import UserError
from dnnlib.text import check_once, excerpt
from torch_utils import distributed as dist
from training.generation import check_class, default_batch, generate_batch
from training.pixels import to_uint8
from training.snapshot import build_network, read_snapshot
from training.system import System
from warm.sources import check_max_steps
from warm.starts import data_for
from warm.systems import SYSTEMS


def load(path_or_url, device=None):
    """Load the network of a snapshot (.safetensors, or EDM's .pkl), ready to sample.

    Args:
        path_or_url: A file or an https address.
        device: Where it runs, such as 'cpu' or 'cuda:1'; by default the GPU if there is one.

    Returns:
        The preconditioned network in evaluation mode. `net.system` is the name of its system, and `net.snapshot` has
        the file's other contents (training.snapshot.Snapshot, without tensors). Only Warm networks have
        `net.denoise_deblur(x, sigma, class_labels=None, alpha=None)` → (D, R).

    Raises:
        UserError: the file is missing, damaged, or of an unknown system; this machine has no such device.
    """
    device = _device(device)
    snapshot = read_snapshot(path_or_url)
    net = build_network(snapshot, SYSTEMS, device)
    net.system, net.snapshot = snapshot.system, dataclasses.replace(snapshot, state_dict={})
    return net


def sample(net, seeds, class_idx=None, batch=None, system=None, **options):
    """Generate the images that generate.py writes for the same seeds.

    Args:
        net: From `load`, or any network of a system; sampled in evaluation mode even if it is in training mode.
        seeds: At least one integer ≥ 0, one per image, without duplicates.
        class_idx: Class of all images; None draws one per seed.
        batch: Batch size; by default what suits the device, as in generate.py.
        system: Name of the network's system, or a training.system.System; by default `net.system`, set by `load`.
        options: Sampler options by name, such as num_steps=18, solver='heun', bnr=0.5. Systems whose samples start
            from training images (ihdm, cold) take them from `data`, a folder or zip; by default from the embedded
            digits, if the network was trained on them.

    Returns:
        uint8 [N, C, H, W] on the CPU.

    Raises:
        UserError: an option that the network's sampler does not have; training images that are needed but not given;
            no seeds, invalid or repeated seeds, or an invalid batch size; more than warm.sources.MAX_STEPS steps; a
            network of no known system.
    """
    system = _system_of(net, system)
    seeds = _integers(seeds)
    batch = default_batch(net) if batch is None else batch
    if not isinstance(batch, numbers.Integral) or batch < 1:
        raise UserError(f'batch is {batch}; give a whole number of at least 1')
    check_class(net, class_idx, 'class_idx')
    system.check_options(options, shown=str)
    check_max_steps(options, 'num_steps')
    if system.starts_from_data and hasattr(net, 'snapshot'):
        options['data'] = _start_data(net.snapshot, options.get('data'))
    sampler = system.make_sampler(net, options)
    with _evaluating(net):
        batches = [generate_batch(net, seeds[i:i + batch], sampler, class_idx) for i in range(0, len(seeds), batch)]
    return torch.cat([to_uint8(images).cpu() for images in batches])


@contextlib.contextmanager
def _evaluating(net):
    """Context in which the whole network is in evaluation mode, since dropout would change the images."""
    training = [module for module in net.modules() if module.training]
    try:
        net.eval()
        yield
    finally:
        for module in training:
            module.training = True


def _device(device):
    """`device` as a torch.device that this machine has; None is its GPU, or the CPU if it has none."""
    if device is None:
        return dist.device()
    try:
        device = torch.device(device)
        torch.empty(0, device=device)  # makes PyTorch look for it
    except (RuntimeError, AssertionError, TypeError, ImportError) as e:
        raise UserError(f"this machine has no device '{excerpt(device)}' for PyTorch; give 'cpu' or, where there is a "
                        "GPU, 'cuda'") from e
    return device


def _system_of(net, system):
    """The System given as an instance or by name; None takes the name recorded in `net`."""
    if isinstance(system, System):
        return system
    name = getattr(net, 'system', None) if system is None else system
    if name not in SYSTEMS:
        problem = ('the network does not say which system it belongs to' if name is None else
                   f"there is no system '{name}'")
        raise UserError(f"{problem}; name it, as in sample(net, seeds, system='warm'): one of {', '.join(SYSTEMS)}")
    return SYSTEMS[name]


def _integers(seeds):
    """The seeds of any iterable as a list of ints, checked."""
    try:
        integers = [operator.index(seed) for seed in seeds]
    except TypeError as e:
        raise UserError(f'the seeds {excerpt(seeds)} are not integers; give one per image, such as range(16)') from e
    if not integers:
        raise UserError('no seeds were given; give one per image, such as range(16)')
    if min(integers) < 0:
        raise UserError(f'the seed {min(integers)} is negative; give seeds from 0 on, such as range(16)')
    check_once(integers, 'the seeds')
    return integers


def _start_data(snapshot, path):
    """`data_for`, but its error names the argument to pass here instead of a command-line flag."""
    try:
        return data_for(snapshot, path)
    except UserError as e:
        if path is not None:
            raise
        raise UserError(f"{snapshot.path} starts from blurred training images; pass the data set it was trained on "
                        f"({snapshot.dataset.get('name', 'unknown')}), as in sample(net, seeds, data='ZIP|DIR')") from e
