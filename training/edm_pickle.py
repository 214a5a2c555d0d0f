"""EDM's network pickles as plain data: read without importing or executing anything they name.

The program in such a file is run by training.pickle_machine, and every callable in it is one of the stand-ins below.
The Python source that EDM embeds in its files stays an unread string.
"""

import contextlib
import dataclasses
import mmap
import os
import re

import numpy as np
import torch

from dnnlib import UserError
from dnnlib.text import excerpt
from training.pickle_machine import SCALARS, Buildable, Machine, Refused, StandIn, require
from training.pickled_tensors import TENSOR_GLOBALS, Storage, parse_storage_id

MAX_DEPTH = 64  # nesting of modules, or of plain values
POSITIONAL = ('img_resolution', 'img_channels', 'label_dim', 'use_fp16')  # the first arguments of EDM's networks


# -- what an EDM pickle may build

@dataclasses.dataclass(eq=False)
class Object(Buildable):
    """An object of some class, reduced to the class name and the attributes."""
    class_name: str
    state: dict = dataclasses.field(default_factory=dict)

    def set_state(self, state):
        """Take its attributes."""
        require(type(state) is dict, 'an object in it is malformed')
        self.state = state


@dataclasses.dataclass(eq=False)
class Dtype(Buildable):
    """A NumPy dtype: name such as 'f8', byte order '<', '>' or '|'."""
    name: str
    order: str = '<'

    def set_state(self, state):
        """Take the byte order, the second part of a dtype's state."""
        sound = type(state) is tuple and len(state) > 1 and state[1] in ('<', '>', '|')
        require(sound, 'an object in it is malformed')
        self.order = state[1]


def _rebuild_persistent(meta):
    """An `Object` from EDM's entry for one: class name, attributes, and source code, which is never run."""
    sound = (type(meta) is dict and meta.get('type') == 'class' and type(meta.get('class_name')) is str
             and type(meta.get('state')) is dict)
    require(sound, 'an object in it is malformed')
    return Object(meta['class_name'], meta['state'])


def _numpy_dtype(name, *_flags):
    known = type(name) is str and re.fullmatch('[iu][1248]|f[248]|b1', name)
    require(known, 'a NumPy number in it has an unknown type')
    return Dtype(name)


def _numpy_scalar(dtype, raw):
    require(isinstance(dtype, Dtype) and type(raw) is memoryview, 'a NumPy number in it is malformed')
    return np.frombuffer(raw, np.dtype(dtype.order + dtype.name), count=1)[0].item()


def _load_storage(machine, raw):
    """A storage in torch.save's format before zip: five pickles, a length, the bytes.

    The fourth pickle is the persistent id ('storage', type, key, device, length, None); the others are
    formalities.
    """
    require(type(raw) is memoryview, 'a storage in it is malformed')
    inner = Machine(raw, TENSOR_GLOBALS, persistent_load=lambda pid: pid)
    inner.steps_left = machine.steps_left
    magic, protocol, system, pid, _keys = (inner.load() for _ in range(5))
    machine.steps_left = inner.steps_left
    require((magic, protocol) == (0x1950a86a20f9469cfc6c, 1001), 'a storage in it has an unknown format')
    require(type(system) is dict and system.get('little_endian') is True, 'it is from a big-endian machine')
    dtype, length = parse_storage_id(pid)
    require(inner.number('<q') == length, 'a storage in it has the wrong length')
    content = inner.take(length * dtype.itemsize)
    machine.bytes_left -= len(content)
    require(machine.bytes_left >= 0, 'it repeats its own content')
    return Storage(torch.frombuffer(bytearray(content), dtype=dtype) if length else torch.empty(0, dtype=dtype))


def _edm_globals(machine):
    """The globals of an EDM snapshot; storages count against the budget of `machine`."""
    numpy_globals = {(f'numpy.{core}.multiarray', 'scalar'): StandIn(_numpy_scalar) for core in ('core', '_core')}
    return {
        **TENSOR_GLOBALS, **numpy_globals,
        ('builtins', 'set'): StandIn(lambda items=(): machine.fill_set(set(), items)),
        ('numpy', 'dtype'): StandIn(_numpy_dtype),
        ('dnnlib.util', 'EasyDict'): StandIn(lambda: {}),
        ('torch._utils', '_rebuild_parameter'): StandIn(lambda data, *_ignored: data),
        ('torch.nn.modules.container', 'ModuleDict'): StandIn(lambda: Object('ModuleDict')),
        ('torch.storage', '_load_from_bytes'): StandIn(lambda raw: _load_storage(machine, raw)),
        ('torch_utils.persistence', '_reconstruct_persistent_obj'): StandIn(_rebuild_persistent),
    }


# -- EDM's snapshot

def load_edm_pickle(source):
    """Read a network snapshot that EDM wrote, network-snapshot-KIMG.pkl.

    Args:
        source: Path of the file, or its bytes.

    Returns:
        {'class_name': 'EDMPrecond', 'kwargs': its constructor arguments, 'state_dict': {name: CPU tensor},
        'dataset_kwargs': dict or None, 'augment_kwargs': dict or None, 'loss_class': name or None,
        'loss_kwargs': dict or None}; all but the tensors are plain JSON-like values.

    Raises:
        UserError: not a pickle of this kind, damaged, or asking for a global that EDM's files do not need.
    """
    is_path = isinstance(source, (str, os.PathLike))
    name = os.fspath(source) if is_path else 'the EDM pickle'
    with contextlib.ExitStack() as stack:
        try:
            return _load_edm(_map_file(source, stack) if is_path else source)
        except Refused as e:
            reason = str(e)
        except OSError as e:
            reason = f'it cannot be read ({e.strerror or e})'
        except Exception as e:  # a damaged program can fail in any way, and all of them mean the same
            reason = f'it is damaged ({type(e).__name__})'
    raise UserError(f'{name} was refused as an EDM network snapshot: {reason}; '
                    'get the file again from a source you trust')


def _map_file(path, stack):
    """The file's content, memory-mapped."""
    file = stack.enter_context(open(path, 'rb'))
    require(os.fstat(file.fileno()).st_size > 0, 'it is empty')
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _load_edm(data):
    machine = Machine(data, {})
    machine.find_global = _edm_globals(machine)
    content = machine.load()
    machine.find_global = {}  # ends the reference cycle, so that the file is released at once
    require(type(content) is dict and isinstance(content.get('ema'), Object), "it has no network under the key 'ema'")
    net, loss, augment = content['ema'], content.get('loss_fn'), content.get('augment_pipe')
    state_dict = {}
    _collect_tensors(net, '', state_dict, machine)
    require(sum(t.nbytes for t in state_dict.values()) <= len(data), 'it repeats its own content')
    return {
        'class_name': net.class_name,
        'kwargs': _network_kwargs(net, machine),
        'state_dict': state_dict,
        'dataset_kwargs': _plain(content.get('dataset_kwargs'), machine),
        'augment_kwargs': _init_kwargs(augment, machine),
        'loss_class': getattr(loss, 'class_name', None),
        'loss_kwargs': _init_kwargs(loss, machine),
    }


def _network_kwargs(net, machine):
    """All arguments that made a network, by name; EDM's own training passes none by position."""
    args = _plain(net.state.get('_init_args') or (), machine)
    kwargs = _init_kwargs(net, machine)
    require(type(args) is tuple, 'the arguments of its network are malformed')
    require(len(args) <= len(POSITIONAL),
            f"its network was made with more positional arguments than {', '.join(POSITIONAL)}")
    named = dict(zip(POSITIONAL, args))
    require(not named.keys() & kwargs.keys(), 'its network was made with an argument given twice')
    return {**named, **kwargs}


def _init_kwargs(obj, machine):
    """The keyword arguments that made an object; None if `obj` is not an `Object`."""
    if not isinstance(obj, Object):
        return None
    kwargs = _plain(obj.state.get('_init_kwargs', {}), machine)
    require(type(kwargs) is dict and all(type(k) is str for k in kwargs), 'the arguments of an object are malformed')
    return kwargs


def _plain(value, machine, depth=0):
    """A copy of a tree of plain values; refuses all else, and trees that are small only because they share parts."""
    machine.spend()
    require(depth < MAX_DEPTH, 'its values are nested too deeply')
    if type(value) is dict:
        return {k: _plain(v, machine, depth + 1) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(v, machine, depth + 1) for v in value)
    require(type(value) in SCALARS, f'an argument in it is not a plain value but a {type(value).__name__}')
    return value


def _collect_tensors(module, prefix, out, machine, depth=0):
    """Fill `out` with what torch.nn.Module.state_dict() would hold for this module."""
    machine.spend()
    require(isinstance(module, Object) and depth < MAX_DEPTH, 'its modules are malformed or nested too deeply')
    own = _entries(module, '_parameters') | _entries(module, '_buffers')
    passing = module.state.get('_non_persistent_buffers_set', ())
    for name, tensor in own.items():
        machine.spend()
        if tensor is not None and name not in passing:
            require(isinstance(tensor, torch.Tensor), f'its parameter {excerpt(prefix + name)} is not a tensor')
            out[prefix + name] = tensor
    for name, child in _entries(module, '_modules').items():
        if child is not None:
            _collect_tensors(child, f'{prefix}{name}.', out, machine, depth + 1)


def _entries(module, key):
    entries = module.state.get(key, {})
    # Names are joined along nested modules: without a limit a long one would be copied over and over.
    names_fit = type(entries) is dict and all(type(k) is str and len(k) < 200 for k in entries)
    require(names_fit, 'a module in it is malformed')
    return entries
