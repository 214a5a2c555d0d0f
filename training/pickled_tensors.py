"""Tensors as torch.save pickles them, in EDM's snapshots and training states: rebuilt for training.pickle_machine."""

import dataclasses
import math

import torch

from training.pickle_machine import StandIn, require


@dataclasses.dataclass(frozen=True, eq=False)
class Storage:
    """The flat 1-D tensor that tensors are views of."""
    flat: torch.Tensor


STORAGE_DTYPES = {
    'DoubleStorage': torch.float64, 'FloatStorage': torch.float32, 'HalfStorage': torch.float16,
    'BFloat16Storage': torch.bfloat16, 'LongStorage': torch.int64, 'IntStorage': torch.int32,
    'ShortStorage': torch.int16, 'CharStorage': torch.int8, 'ByteStorage': torch.uint8, 'BoolStorage': torch.bool,
}


def _is_count(value):
    return type(value) is int and 0 <= value < 1 << 62


def rebuild_tensor(storage, offset, size, stride, *_ignored):
    """A view of `storage` (all in elements), refused if it reaches outside or has more elements."""
    sound = isinstance(storage, Storage) and type(size) is tuple and type(stride) is tuple
    require(sound, 'a tensor in it is malformed')
    require(all(map(_is_count, (offset, *size, *stride))), 'a tensor in it has an impossible size')
    require(len(size) == len(stride) <= 16, 'a tensor in it has an impossible number of dimensions')
    numel, room = math.prod(size), storage.flat.numel()
    if numel == 0:
        return torch.empty(0, dtype=storage.flat.dtype, device=storage.flat.device).reshape(size)
    last = offset + sum((n - 1) * s for n, s in zip(size, stride))
    require(numel <= room and last < room, 'a tensor in it reaches outside its storage')
    return torch.as_strided(storage.flat, size, stride, offset)


def parse_storage_id(pid):
    """torch.save's persistent id ('storage', type, key, device, length, …) → (dtype, length in elements)."""
    sound = (type(pid) is tuple and len(pid) >= 5 and pid[0] == 'storage' and isinstance(pid[1], torch.dtype)
             and _is_count(pid[4]))
    require(sound, 'a storage in it is malformed')
    return pid[1], pid[4]


TENSOR_GLOBALS = {
    ('collections', 'OrderedDict'): StandIn(lambda: {}),
    ('torch._utils', '_rebuild_tensor_v2'): StandIn(rebuild_tensor),
    **{('torch', name): dtype for name, dtype in STORAGE_DTYPES.items()},
}
