"""Network snapshots: the weights and what is needed to rebuild the network around them, as pure data.

A snapshot is one safetensors file. The key `HEADER_KEY` of its metadata holds a JSON object: format
(version), system, network_kwargs (constructor arguments), dataset (facts about the training data),
kimg, extra, and checksum (of the other entries and the tensors). Unknown entries are ignored, so that a later
version may add some without a new format.
EDM's .pkl snapshots are read too (training.edm_pickle).
"""

import contextlib
import dataclasses
import json
import os
import pathlib

import safetensors.torch
import torch
from torch.overrides import TorchFunctionMode

from dnnlib import UserError
from dnnlib.download import local_path
from dnnlib.files import atomic_write
from dnnlib.text import excerpt
from training.edm_pickle import load_edm_pickle
from training.run_files import SNAPSHOT, parse_kimg, saved_files
from training.state import content_digest

SNAPSHOT_FORMAT = 1
HEADER_KEY = 'warm_diffusion'
MAX_HEADER_BYTES = 8 << 20  # a thousand tensors take about 0.1 MB
SYSTEM_OF_EDM_CLASS = {'VPPrecond': 'vp', 'VEPrecond': 've', 'iDDPMPrecond': 'iddpm', 'EDMPrecond': 'edm'}


@dataclasses.dataclass
class Snapshot:
    """The content of a snapshot file.

    Attributes:
        system: Name in the registry of systems, e.g. 'edm'.
        network_kwargs: Constructor arguments of the system's network.
        state_dict: {name: CPU tensor}; from EDM's files they may be views, so copy before changing them.
        dataset: Facts about the training data, plain values.
        kimg: Thousands of images trained on, or None.
        extra: Whatever else the writer recorded, plain values.
        path: The file that was read, a local path.
    """

    system: str
    network_kwargs: dict
    state_dict: dict
    dataset: dict
    kimg: float | None
    extra: dict
    path: pathlib.Path


def save_snapshot(path, net, system, *, dataset=None, kimg=None, extra=None):
    """Write `net`'s weights with the header; `path` keeps its old content unless all of it reaches the disk.

    Args:
        path: Usually network-snapshot-KIMG.safetensors in the run folder.
        net: Preconditioned network (bare, not wrapped) with `init_kwargs`.
        system: Name of its system.
        dataset, extra: Dicts of plain JSON values.
        kimg: Thousands of images trained on.

    Raises:
        TypeError: a value that JSON cannot hold (a programming error).
        UserError: the disk is full or not writable.
    """
    write_snapshot(path, net.state_dict(), net.init_kwargs, system, dataset=dataset, kimg=kimg, extra=extra)


def write_snapshot(path, tensors, network_kwargs, system, *, dataset=None, kimg=None, extra=None):
    """As `save_snapshot`, for a state dict {name: tensor} and the matching constructor arguments."""
    header = {'format': SNAPSHOT_FORMAT, 'system': system, 'network_kwargs': network_kwargs,
              'dataset': dataset or {}, 'kimg': kimg, 'extra': extra or {}}
    header = json.loads(json.dumps(header))  # as a reader will see it: the checksum is of this form
    tensors = _separate(tensors)
    header['checksum'] = _checksum(header, tensors)
    content = safetensors.torch.save(tensors, metadata={HEADER_KEY: json.dumps(header)})
    with atomic_write(path) as f:
        f.write(content)


def _separate(tensors):
    """The tensors as safetensors needs them, copied only where they are not: on the host, contiguous, not shared."""
    separate, used = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in used or storage.nbytes() > tensor.nbytes:
            tensor = tensor.clone()
        used.add(tensor.untyped_storage().data_ptr())
        separate[name] = tensor
    return separate


def _checksum(header, tensors):
    """Of the header but for its own entry, and the tensors sorted by name, since safetensors has its own order."""
    facts = {key: value for key, value in header.items() if key != 'checksum'}
    return 'sha256:' + content_digest([facts, dict(sorted(tensors.items()))])


def read_snapshot(path_or_url):
    """Read a snapshot, this project's or EDM's (told apart by content); executes nothing in it.

    Raises:
        UserError: no such file or failed download; damaged or cut off; not a snapshot; of a newer format.
    """
    if os.path.isdir(path_or_url) and (snapshots := saved_files(path_or_url, SNAPSHOT)):
        raise UserError(f'{path_or_url} is a folder; give one of its snapshots, of which {snapshots[0]} is the newest')
    path = pathlib.Path(local_path(path_or_url))
    try:
        with open(path, 'rb') as f:
            start = f.read(9)
    except OSError as e:
        raise UserError(f'{path} cannot be read ({e.strerror or e}); check its permissions') from e
    if start[8:] == b'{':  # safetensors: length of the header in eight bytes, then the header
        return _read_safetensors(path, int.from_bytes(start[:8], 'little'))
    if start[:1] == b'\x80':  # pickle: the opcode for its protocol
        return _read_edm_pickle(path)
    raise UserError(f'{path} is not a network snapshot; give a network-snapshot-*.safetensors or a .pkl of EDM')


def _read_safetensors(path, header_bytes):
    damaged = f'{path} is damaged or cut off; copy or download it again, or use another snapshot'
    if header_bytes > min(MAX_HEADER_BYTES, os.path.getsize(path)):
        raise UserError(damaged)
    try:
        # Not safetensors.safe_open: it takes no path that isn't UTF-8, and its get_tensor leaks some memory with each
        # tensor (safetensors 0.8), while training reads often.
        with open(path, 'rb') as f:
            f.seek(8)
            text = json.loads(f.read(header_bytes)).get('__metadata__', {}).get(HEADER_KEY)
        if text is None:
            raise UserError(f'{path} holds tensors but is not a network snapshot of this project; '
                            'give a network-snapshot-*.safetensors or a .pkl of EDM')
        header = _check_header(text, path)
        state_dict = safetensors.torch.load(path.read_bytes())
        if header.pop('checksum') not in (None, _checksum(json.loads(text), state_dict)):
            raise UserError(f'the checksum of {path} is wrong, so it is damaged; copy or download it again, or use '
                            'another snapshot')
    except UserError:
        raise
    except Exception as e:  # SafetensorError, but also what torch raises for dtypes it lacks or sizes it cannot map
        raise UserError(damaged) from e
    return Snapshot(**header, state_dict=state_dict, path=path)


def _check_header(text, path):
    """The header's entries, by name, with their types checked; `checksum` is None if there is none."""
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise UserError(f'the header of {path} is not valid JSON; copy or download the file again') from e
    if not isinstance(header, dict) or type(header.get('format')) is not int or header['format'] < 1:
        raise UserError(f'the header of {path} names no format; it is not a network snapshot of this project')
    if header['format'] > SNAPSHOT_FORMAT:
        raise UserError(f"{path} was written by a newer version of this program (format {header['format']}, "
                        f'this one reads up to {SNAPSHOT_FORMAT}); update it')
    header.setdefault('extra', {})
    header.setdefault('checksum', None)  # other writers may leave it out
    types = {'system': str, 'network_kwargs': dict, 'dataset': dict, 'kimg': (int, float, type(None)), 'extra': dict,
             'checksum': (str, type(None))}
    for name, kind in types.items():
        if name not in header or not isinstance(header[name], kind):
            raise UserError(f"the header of {path} has no proper entry '{name}'; copy or download the file again")
    return {name: header[name] for name in types}


def _read_edm_pickle(path):
    content = load_edm_pickle(path)
    if content['class_name'] not in SYSTEM_OF_EDM_CLASS:
        raise UserError(f"{path} holds a network of the class {excerpt(content['class_name'])}; "
                        f"EDM snapshots of {', '.join(SYSTEM_OF_EDM_CLASS)} can be read")
    kimg = None
    with contextlib.suppress(UserError):  # published networks have other names
        kimg = parse_kimg(path)
    extra = {name: content[name] for name in ('class_name', 'loss_class', 'loss_kwargs', 'augment_kwargs')}
    return Snapshot(system=SYSTEM_OF_EDM_CLASS[content['class_name']], network_kwargs=content['kwargs'],
                    state_dict=content['state_dict'], dataset=content['dataset_kwargs'] or {}, kimg=kimg,
                    extra=extra, path=path)


def build_network(snapshot, systems, device='cpu'):
    """Build the snapshot's network, in evaluation mode, without gradients.

    The arguments in a file may ask for a network of any size. So it is first built without memory (device
    'meta') and compared with the tensors in the file, and only then built for real.

    Args:
        snapshot: From `read_snapshot`.
        systems: Registry {name: object with `network_class`}.

    Raises:
        UserError: unknown system; arguments that its network does not accept; tensors that do not fit it.
    """
    if snapshot.system not in systems:
        raise UserError(f"{snapshot.path} is of the system '{excerpt(snapshot.system)}', which this version does not "
                        f"know; it knows {', '.join(systems)}. If a script of yours defines it, run the command "
                        'through that script')
    network_class = systems[snapshot.system].network_class
    with torch.device('meta'), _Bounded(snapshot.state_dict):
        outline = _construct(network_class, snapshot.network_kwargs, snapshot.path)
    _check_tensors(snapshot, outline)
    with torch.random.fork_rng(devices=[]):  # initial weights are drawn, but not from the caller's generator
        net = _construct(network_class, snapshot.network_kwargs, snapshot.path)
    net.load_state_dict(snapshot.state_dict)
    return net.eval().requires_grad_(False).to(device)


def _construct(network_class, kwargs, path):
    """network_class(**kwargs); the arguments come from a file, which is blamed for any error."""
    try:
        return network_class(**kwargs)
    except Exception as e:
        reason = excerpt((str(e).splitlines() or [type(e).__name__])[0], 200)
        raise UserError(f'the network arguments in {path} do not fit {network_class.__name__} ({reason}); '
                        'use another snapshot, or the version that wrote this one') from e


class _Bounded(TorchFunctionMode):
    """Ends a construction that makes far more tensors, or far larger ones, than the given weights need."""

    def __init__(self, state_dict):
        super().__init__()
        self.calls_left = 15_000 + 20 * len(state_dict)  # U-Nets take four per tensor, iDDPM's table 10,000 in all
        # Drawing and scaling the initial weights makes five tensors for each weight; the constant is for tables.
        self.elements_left = (1 << 24) + 16 * sum(t.numel() for t in state_dict.values())

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if kwargs.get('device') is not None:  # a table that insists on real memory: count its size first
            self.count(func(*args, **{**kwargs, 'device': 'meta'}))
        result = func(*args, **kwargs)
        self.count(result)
        return result

    def count(self, result):
        self.calls_left -= 1
        if isinstance(result, torch.Tensor):
            self.elements_left -= result.numel()
        if self.calls_left < 0 or self.elements_left < 0:
            raise ValueError('they ask for a network much larger than the file')


def _check_tensors(snapshot, net):
    """Raise UserError unless names and shapes match; the sentence names the first difference."""
    expected, found = net.state_dict(), snapshot.state_dict
    problems = {
        'lacks the tensor': [name for name in expected if name not in found],
        'has the unexpected tensor': [name for name in found if name not in expected],
        'has the wrong shape for the tensor': [
            f'{name} ({list(found[name].shape)} instead of {list(expected[name].shape)})'
            for name in expected if name in found and found[name].shape != expected[name].shape],
    }
    for problem, names in problems.items():
        if names:
            others = f' and {len(names) - 1} more' if len(names) > 1 else ''
            raise UserError(f'{snapshot.path} {problem} {excerpt(names[0], 200)}{others}: its weights are not those of '
                            f'the {type(net).__name__} that it describes; use another snapshot')
