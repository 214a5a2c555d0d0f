"""EDM's network pickles as plain data: read without importing or executing anything they name.

A pickle is a program for a small stack machine. Python's own machine can be told which globals to
refuse, yet it can still be crashed or starved by the program alone (a tuple nested a million deep is
hashed recursively until the C stack ends; a memo index of 2^31 is an allocation). So the machine here
is ours: the binary opcodes and nothing else, at most `MAX_STEPS` of them, and every callable is one of
the stand-ins below. The Python source that EDM embeds in its files stays an unread string.
"""

import contextlib
import dataclasses
import math
import mmap
import os
import re
import struct

import numpy as np
import torch

from dnnlib import UserError

MAX_STEPS = 1_000_000  # opcodes and copied values; EDM's largest networks take about a tenth of it
MAX_DEPTH = 64  # modules or plain values within one another
SCALARS = (str, int, float, bool, type(None))


class Refused(Exception):
    """What is wrong with a pickle, as the second half of a sentence."""


# ---------------------------------------------------------------------------------------------------
# What a pickle may build

@dataclasses.dataclass(frozen=True, eq=False)
class StandIn:
    """Takes the place of a global that a pickle calls."""
    call: object


@dataclasses.dataclass(eq=False)
class Object:
    """An object of some class, reduced to its name and its attributes."""
    class_name: str
    state: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class Storage:
    """The flat 1-D tensor that tensors are views of."""
    flat: torch.Tensor


@dataclasses.dataclass(eq=False)
class Dtype:
    """NumPy's description of a number: name such as 'f8', byte order '<', '>' or '|'."""
    name: str
    order: str = '<'


STORAGE_DTYPES = {
    'DoubleStorage': torch.float64, 'FloatStorage': torch.float32, 'HalfStorage': torch.float16,
    'BFloat16Storage': torch.bfloat16, 'LongStorage': torch.int64, 'IntStorage': torch.int32,
    'ShortStorage': torch.int16, 'CharStorage': torch.int8, 'ByteStorage': torch.uint8, 'BoolStorage': torch.bool,
}


def shown(text, limit=80):
    """Text out of a file as a sentence may show it: short, on one line, without control characters."""
    return str(text)[:limit].encode('unicode_escape').decode('ascii')


def _need(condition, reason):
    if not condition:
        raise Refused(reason)


def _is_count(value):
    return type(value) is int and 0 <= value < 1 << 62


def rebuild_tensor(storage, offset, size, stride, *_ignored):
    """A view of `storage` (in elements), refused where it would reach outside or repeat elements."""
    _need(isinstance(storage, Storage) and type(size) is tuple and type(stride) is tuple, 'a tensor in it is malformed')
    _need(all(map(_is_count, (offset, *size, *stride))), 'a tensor in it has an impossible size')
    _need(len(size) == len(stride) <= 16, 'a tensor in it has an impossible number of dimensions')
    numel, room = math.prod(size), storage.flat.numel()
    if numel == 0:
        return torch.empty(0, dtype=storage.flat.dtype, device=storage.flat.device).reshape(size)
    last = offset + sum((n - 1) * s for n, s in zip(size, stride))
    _need(numel <= room and last < room, 'a tensor in it reaches outside its storage')
    return torch.as_strided(storage.flat, size, stride, offset)


def _rebuild_persistent(meta):
    """EDM's entry for its own objects: class name, attributes, and source that nobody runs."""
    _need(type(meta) is dict and meta.get('type') == 'class' and type(meta.get('class_name')) is str
          and type(meta.get('state')) is dict, 'an object in it is malformed')
    return Object(meta['class_name'], meta['state'])


def _numpy_dtype(name, *_flags):
    _need(type(name) is str and re.fullmatch('[iu][1248]|f[248]|b1', name), 'a NumPy number in it has an unknown type')
    return Dtype(name)


def _numpy_scalar(dtype, raw):
    _need(isinstance(dtype, Dtype) and type(raw) is memoryview, 'a NumPy number in it is malformed')
    return np.frombuffer(raw, np.dtype(dtype.order + dtype.name), count=1)[0].item()


def _set_state(obj, state):
    """What pickle calls BUILD, for the only stand-ins that need it."""
    if isinstance(obj, Object) and type(state) is dict:
        obj.state = state
    elif isinstance(obj, Dtype) and type(state) is tuple and len(state) > 1 and state[1] in ('<', '>', '|'):
        obj.order = state[1]
    else:
        raise Refused('an object in it is malformed')


# Tensors as torch.save names them, in snapshots and in training states alike.
TENSOR_GLOBALS = {
    ('collections', 'OrderedDict'): StandIn(lambda: {}),
    ('torch._utils', '_rebuild_tensor_v2'): StandIn(rebuild_tensor),
    **{('torch', name): dtype for name, dtype in STORAGE_DTYPES.items()},
}


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
        ('torch.storage', '_load_from_bytes'): StandIn(machine.load_storage),
        ('torch_utils.persistence', '_reconstruct_persistent_obj'): StandIn(_rebuild_persistent),
    }


# ---------------------------------------------------------------------------------------------------
# The machine

class Machine:
    """Runs the pickle programs in `data`, one per `load()`, and keeps the budget they share.

    Args:
        data: Buffer with the program(s); byte strings in it become memoryviews, never copies.
        find_global: Mapping (module, name) → stand-in or constant.
        persistent_load: Function of a persistent id, where the format has them.

    Raises Refused for what is not allowed; a damaged program may raise any ordinary exception.
    """

    def __init__(self, data, find_global, persistent_load=None):
        self.data, self.pos = memoryview(data), 0
        self.find_global, self.persistent_load = find_global, persistent_load
        self.steps_left, self.bytes_left = MAX_STEPS, len(self.data)

    def take(self, n):
        """The next n bytes, in place."""
        _need(n <= len(self.data) - self.pos, 'it is cut off or damaged')
        self.pos += n
        return self.data[self.pos - n:self.pos]

    def number(self, fmt):
        return struct.unpack(fmt, self.take(struct.calcsize(fmt)))[0]

    def line(self):
        end = bytes(self.data[self.pos:self.pos + 256]).find(b'\n')
        _need(end >= 0, 'it is cut off or damaged')
        return str(self.take(end + 1)[:-1], 'utf-8')

    def spend(self, steps=1):
        self.steps_left -= steps
        _need(self.steps_left >= 0, f'it has more than {MAX_STEPS} parts')

    def load(self):
        """Run one program up to its STOP and return what it leaves on the stack."""
        self.stack, self.marks, self.memo = [], [], {}
        while True:
            self.spend()
            code = self.take(1)[0]
            if code == STOP:
                return self.stack.pop()
            _need(code in OPCODES, f'its byte {self.pos - 1} is not an instruction that such files have')
            OPCODES[code](self)

    def push(self, value):
        self.stack.append(value)

    def pop(self, n):
        """The top n values, as a tuple, removed."""
        _need(len(self.stack) >= n, 'it is damaged')
        values = tuple(self.stack[len(self.stack) - n:])
        del self.stack[len(self.stack) - n:]
        return values

    def pop_mark(self):
        """All values above the last mark, removed with it."""
        values, self.stack = self.stack, self.marks.pop()
        return values

    def set_mark(self):
        self.marks.append(self.stack)
        self.stack = []

    def memoize(self, index):
        self.memo[index] = self.stack[-1]

    def push_global(self, module, name):
        known = type(module) is str and type(name) is str and (module, name) in self.find_global
        _need(known, f'it names the Python global {shown(module)}.{shown(name)}, which no such file needs')
        self.push(self.find_global[module, name])

    def call(self):
        target, args = self.pop(2)
        _need(isinstance(target, StandIn) and type(args) is tuple, 'it calls something that is not callable')
        self.push(target.call(*args))

    def build(self):
        state, = self.pop(1)
        _set_state(self.stack[-1], state)

    def append(self, values):
        _need(type(self.stack[-1]) is list, 'it is damaged')
        self.stack[-1].extend(values)

    def set_items(self, values):
        target = self.stack[-1]
        _need(type(target) is dict and len(values) % 2 == 0, 'it is damaged')
        _need(all(type(k) in SCALARS for k in values[::2]), 'a key in it is not a plain value')
        target.update(zip(values[::2], values[1::2]))

    def fill_set(self, target, values):
        _need(type(target) is set and type(values) in (list, tuple), 'it is damaged')
        _need(all(type(v) in SCALARS for v in values), 'a member of a set in it is not a plain value')
        self.spend(len(values))
        target.update(values)
        return target

    def add_items(self):
        values = self.pop_mark()
        self.fill_set(self.stack[-1], values)

    def push_persistent(self):
        _need(self.persistent_load is not None, 'it refers to data outside itself')
        self.push(self.persistent_load(*self.pop(1)))

    def load_storage(self, raw):
        """A storage as torch.save wrote it before its zip format: five pickles, a length, the bytes.

        Four of the pickles are formalities; the one before the last is a persistent id
        ('storage', type, key, device, length, None).
        """
        _need(type(raw) is memoryview, 'a storage in it is malformed')
        inner = Machine(raw, TENSOR_GLOBALS, persistent_load=lambda pid: pid)
        inner.steps_left = self.steps_left
        magic, protocol, system, pid, _keys = (inner.load() for _ in range(5))
        self.steps_left = inner.steps_left
        _need((magic, protocol) == (0x1950a86a20f9469cfc6c, 1001), 'a storage in it has an unknown format')
        _need(type(system) is dict and system.get('little_endian') is True, 'it is from a big-endian machine')
        dtype, length = parse_storage_id(pid)
        _need(inner.number('<q') == length, 'a storage in it has the wrong length')
        content = inner.take(length * dtype.itemsize)
        self.bytes_left -= len(content)
        _need(self.bytes_left >= 0, 'it repeats its own content')
        return Storage(torch.frombuffer(bytearray(content), dtype=dtype) if length else torch.empty(0, dtype=dtype))


def parse_storage_id(pid):
    """torch.save's persistent id ('storage', type, key, device, length, …) → (dtype, length in elements)."""
    _need(type(pid) is tuple and len(pid) >= 5 and pid[0] == 'storage' and isinstance(pid[1], torch.dtype)
          and _is_count(pid[4]), 'a storage in it is malformed')
    return pid[1], pid[4]


def _text(fmt):
    return lambda m: m.push(str(m.take(m.number(fmt)), 'utf-8'))


def _bytes(fmt):
    return lambda m: m.push(m.take(m.number(fmt)))


STOP = ord('.')
OPCODES = {  # the names in pickletools.opcodes; text opcodes of protocol 0 are left out
    0x80: lambda m: m.take(1),  # PROTO
    0x95: lambda m: m.take(8),  # FRAME
    ord('N'): lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    ord('K'): lambda m: m.push(m.number('<B')),
    ord('M'): lambda m: m.push(m.number('<H')),
    ord('J'): lambda m: m.push(m.number('<i')),
    0x8a: lambda m: m.push(int.from_bytes(m.take(m.number('<B')), 'little', signed=True)),  # LONG1
    ord('G'): lambda m: m.push(m.number('>d')),
    0x8c: _text('<B'), ord('X'): _text('<I'), 0x8d: _text('<Q'),
    ord('C'): _bytes('<B'), ord('B'): _bytes('<I'), 0x8e: _bytes('<Q'),
    ord('('): Machine.set_mark,
    ord(']'): lambda m: m.push([]),
    ord('}'): lambda m: m.push({}),
    0x8f: lambda m: m.push(set()),
    ord(')'): lambda m: m.push(()),
    0x85: lambda m: m.push(m.pop(1)),
    0x86: lambda m: m.push(m.pop(2)),
    0x87: lambda m: m.push(m.pop(3)),
    ord('t'): lambda m: m.push(tuple(m.pop_mark())),
    ord('a'): lambda m: m.append(m.pop(1)),
    ord('e'): lambda m: m.append(m.pop_mark()),
    ord('s'): lambda m: m.set_items(m.pop(2)),
    ord('u'): lambda m: m.set_items(m.pop_mark()),
    0x90: Machine.add_items,
    0x94: lambda m: m.memoize(len(m.memo)),
    ord('q'): lambda m: m.memoize(m.number('<B')),
    ord('r'): lambda m: m.memoize(m.number('<I')),
    ord('h'): lambda m: m.push(m.memo[m.number('<B')]),
    ord('j'): lambda m: m.push(m.memo[m.number('<I')]),
    ord('c'): lambda m: m.push_global(m.line(), m.line()),
    0x93: lambda m: m.push_global(*m.pop(2)),
    ord('R'): Machine.call,
    0x81: Machine.call,  # NEWOBJ
    ord('b'): Machine.build,
    ord('Q'): Machine.push_persistent,
}


# ---------------------------------------------------------------------------------------------------
# EDM's snapshot

def load_edm_pickle(source):
    """Read a network snapshot that EDM wrote, network-snapshot-KIMG.pkl.

    Args:
        source: Path of the file, or its bytes.

    Returns:
        {'class_name': 'EDMPrecond', 'kwargs': its constructor arguments, 'state_dict': {name: CPU tensor},
        'dataset_kwargs': dict or None, 'augment_kwargs': dict or None, 'loss_class': name or None,
        'loss_kwargs': dict or None}; all but the tensors are plain JSON-like values.

    Raises:
        UserError: not a pickle of this kind, damaged, or asking for a global that EDM's files have no need of.
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
    """The file's content, read by the system as it is needed."""
    file = stack.enter_context(open(path, 'rb'))
    _need(os.fstat(file.fileno()).st_size > 0, 'it is empty')
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _load_edm(data):
    machine = Machine(data, {})
    machine.find_global = _edm_globals(machine)
    content = machine.load()
    machine.find_global = {}  # ends the reference cycle, so that the file is let go at once
    _need(type(content) is dict and isinstance(content.get('ema'), Object), "it has no network under the key 'ema'")
    net, loss, augment = content['ema'], content.get('loss_fn'), content.get('augment_pipe')
    _need(not net.state.get('_init_args'), 'its network was made with unnamed arguments')
    state_dict = {}
    _collect_tensors(net, '', state_dict, machine)
    _need(sum(t.nbytes for t in state_dict.values()) <= len(data), 'it repeats its own content')
    return {
        'class_name': net.class_name,
        'kwargs': _init_kwargs(net, machine),
        'state_dict': state_dict,
        'dataset_kwargs': _plain(content.get('dataset_kwargs'), machine),
        'augment_kwargs': _init_kwargs(augment, machine),
        'loss_class': getattr(loss, 'class_name', None),
        'loss_kwargs': _init_kwargs(loss, machine),
    }


def _init_kwargs(obj, machine):
    """The named constructor arguments of an object, None for what is not one."""
    if not isinstance(obj, Object):
        return None
    kwargs = _plain(obj.state.get('_init_kwargs', {}), machine)
    _need(type(kwargs) is dict and all(type(k) is str for k in kwargs), 'the arguments of an object are malformed')
    return kwargs


def _plain(value, machine, depth=0):
    """A copy of a tree of plain values; refuses all else, and trees that only sharing keeps small."""
    machine.spend()
    _need(depth < MAX_DEPTH, 'its values are nested too deeply')
    if type(value) is dict:
        return {k: _plain(v, machine, depth + 1) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(v, machine, depth + 1) for v in value)
    _need(type(value) in SCALARS, f'an argument in it is not a plain value but a {type(value).__name__}')
    return value


def _collect_tensors(module, prefix, out, machine, depth=0):
    """Fill `out` with what torch.nn.Module.state_dict() would hold for this module."""
    machine.spend()
    _need(isinstance(module, Object) and depth < MAX_DEPTH, 'its modules are malformed or nested too deeply')
    own = _entries(module, '_parameters') | _entries(module, '_buffers')
    passing = module.state.get('_non_persistent_buffers_set', ())
    for name, tensor in own.items():
        machine.spend()
        if tensor is not None and name not in passing:
            _need(isinstance(tensor, torch.Tensor), f'its parameter {shown(prefix + name)} is not a tensor')
            out[prefix + name] = tensor
    for name, child in _entries(module, '_modules').items():
        if child is not None:
            _collect_tensors(child, f'{prefix}{name}.', out, machine, depth + 1)


def _entries(module, key):
    entries = module.state.get(key, {})
    # Names add up along nested modules: without a limit a long one would be copied over and over.
    names_fit = type(entries) is dict and all(type(k) is str and len(k) < 200 for k in entries)
    _need(names_fit, 'a module in it is malformed')
    return entries
