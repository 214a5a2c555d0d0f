"""Training states on disk: everything `--resume` needs, as tensors and plain values, never as code."""

import hashlib
import itertools
import os
import re
import zipfile

import torch

from dnnlib import UserError
from dnnlib.files import atomic_write
from dnnlib.text import excerpt
from training.pickle_machine import MAX_STEPS, SCALARS, Machine, Refused, require
from training.pickled_tensors import TENSOR_GLOBALS, Storage, parse_storage_id
from training.run_files import SNAPSHOT, STATE

STATE_FORMAT = 1
MAX_REPEATS = 4  # a state's values may total this many times its file's size, since tensors can share storage
KIND = 'warm-diffusion training state'
REMEDY = 'resume from another training-state-*.pt'
EDM_WORDS = (b'optimizer_state', b'torch_utils.persistence')  # a key and a module found in every EDM state


class StateOfEdm(Refused):
    """A training state of EDM's code: it pickles the network as an object, which only that code can load."""


def save_state(path, state):
    """Write a training state atomically: `path` keeps its previous content unless the write completes.

    Args:
        path: Usually training-state-KIMG.pt in the run folder.
        state: Tree of dicts (plain keys), lists, tuples, tensors, str, int, float, bool and None. Long tables of
            numbers belong in tensors.

    Raises:
        TypeError: anything else in the tree, or a tree too large to be read back (a bug in the caller).
        UserError: the disk is full or not writable.
    """
    state = _checked_copy(state, 'state')
    content = {'kind': KIND, 'format': STATE_FORMAT, 'sha256': content_digest(state), 'state': state}
    with atomic_write(path, 'w+b') as f:  # not into memory first: a copy may take gigabytes
        disk = _Disk(f)
        torch.save(content, disk)
        if disk.error is not None:
            raise disk.error
        total_bytes = f.tell()
        try:
            with zipfile.ZipFile(f) as archive:
                _check_archive(archive, total_bytes)
        except Refused as e:
            raise TypeError(f'this training state could not be read back: {e}') from e


class _Disk:
    """A file whose first error waits in `error`: torch.save would end with an error of its own that names no cause."""

    def __init__(self, f):
        self.f, self.error = f, None

    def write(self, data):
        if self.error is None:
            try:
                self.f.write(data)
            except OSError as e:
                self.error = e
        return len(data)

    def flush(self):
        """For torch.save; `atomic_write` flushes."""


def load_state(path):
    """The tree that `save_state` wrote, with its tensors on the CPU.

    The archive is checked before PyTorch reads it (checksums, and that each tensor matches the bytes stored for it),
    since PyTorch up to 2.9 trusts the sizes written there.

    Raises:
        UserError: no such file, not a training state, damaged or truncated, or of a newer format.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            _check_archive(archive, os.path.getsize(path))
            damaged = archive.testzip()
        if damaged is None:
            content = torch.load(path, map_location='cpu', weights_only=True)
            intact = isinstance(content, dict) and content.get('sha256') == content_digest(content.get('state'))
    except FileNotFoundError as e:
        raise UserError(f'there is no training state {path}; check the path') from e
    except StateOfEdm as e:
        snapshot = re.sub(rf'{STATE}-(\d+)\.pt$', rf'{SNAPSHOT}-\1.pkl', str(path))
        snapshot = snapshot if snapshot != str(path) else f'{SNAPSHOT}-KIMG.pkl'
        raise UserError(f"{path} is a training state of EDM's own program, which cannot be continued here; start from "
                        f'the snapshot beside it with --transfer={snapshot}') from e
    except Refused as e:
        raise UserError(f'{path} was refused as a training state: {e}; {REMEDY}') from e
    except OSError as e:
        raise UserError(f'{path} cannot be read ({e.strerror or e}); {REMEDY}') from e
    except Exception as e:  # a damaged file makes zipfile and torch raise many kinds of errors
        raise UserError(f'{path} is not a training state, or it is damaged or cut off; {REMEDY}') from e
    if damaged is not None:
        raise UserError(f'{path} is damaged: the checksum of its part {excerpt(damaged)} is wrong; {REMEDY}')
    state = _unwrap(content, path)
    if not intact:
        raise UserError(f'{path} is damaged: the checksum of its content is wrong; {REMEDY}')
    return state


def _unwrap(content, path):
    if not isinstance(content, dict) or content.get('kind') != KIND or not isinstance(content.get('format'), int):
        raise UserError(f'{path} is not a training state of this program; {REMEDY}')
    if content['format'] > STATE_FORMAT:
        raise UserError(f"{path} was written by a newer version of this program (format {content['format']}, "
                        f'this one reads up to {STATE_FORMAT}); update it')
    if 'state' not in content:
        raise UserError(f'{path} is damaged; {REMEDY}')
    return content['state']


def content_digest(tree):
    """Hexadecimal SHA-256 of a tree of dicts, lists, tuples, plain values and tensors; order matters."""
    digest = hashlib.sha256()
    _add_to_digest(digest, tree)
    return digest.hexdigest()


def _add_to_digest(digest, value):
    if isinstance(value, torch.Tensor):
        digest.update(f'{value.dtype}{list(value.shape)}'.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, (dict, list, tuple)):
        digest.update(f'{type(value).__name__}{len(value)}:'.encode())
        items = itertools.chain.from_iterable(value.items()) if isinstance(value, dict) else value
        for item in items:
            _add_to_digest(digest, item)
    else:
        digest.update(f'{value!r},'.encode())


def _checked_copy(value, where):
    """The tree with tensors detached, and cloned if not contiguous or views of a larger storage.

    Raises:
        TypeError: a key or value that a training state cannot hold.
    """
    if isinstance(value, dict):
        for key in value:
            if type(key) not in SCALARS:
                raise TypeError(f'{where} has a key of type {type(key).__name__}, which a training state cannot hold')
        return {key: _checked_copy(item, f'{where}[{key!r}]') for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_checked_copy(item, f'{where}[{i}]') for i, item in enumerate(value))
    if isinstance(value, torch.Tensor) and value.layout == torch.strided:
        value = value.detach()
        fits = value.untyped_storage().nbytes() == value.nbytes and value.is_contiguous()
        return value if fits else value.clone(memory_format=torch.contiguous_format)
    if type(value) not in SCALARS:
        raise TypeError(f'{where} is a {type(value).__name__}, which a training state cannot hold')
    return value


def _check_archive(archive, total_bytes):
    """Refuse an archive that torch.save could not have made from tensors and plain values."""
    infos = archive.infolist()
    sizes = {info.filename: info.file_size for info in infos}
    require(len(sizes) == len(infos), 'it has two parts of the same name')
    stored = all(i.compress_type == zipfile.ZIP_STORED and i.compress_size == i.file_size for i in infos)
    require(stored, 'its parts are compressed')
    require(sum(sizes.values()) <= total_bytes, 'its parts overlap')
    pickles = [name for name in sizes if name.endswith('/data.pkl')]
    require(len(pickles) == 1, 'it has no description of its content')
    prefix = pickles[0].removesuffix('data.pkl')

    def check_storage(pid):
        dtype, length = parse_storage_id(pid)
        require(sizes.get(f'{prefix}data/{pid[2]}') == length * dtype.itemsize, 'a tensor in it has a wrong size')
        return Storage(torch.empty(length, dtype=dtype, device='meta'))

    program = archive.read(pickles[0])
    try:
        tree = Machine(program, TENSOR_GLOBALS, check_storage).load()
    except Refused as e:
        if all(word in program for word in EDM_WORDS):
            raise StateOfEdm from e
        raise
    _check_size(tree, MAX_REPEATS * total_bytes)


def _check_size(tree, max_bytes):
    """Refuse a tree that is small only through sharing: a few nested lists can stand for 2⁴⁰ numbers."""
    waiting, parts, size = [tree], 0, 0
    while waiting:
        value = waiting.pop()
        parts += 1
        if isinstance(value, (dict, list, tuple)):
            waiting.extend(value)  # a dict's keys, or the items
            waiting.extend(value.values() if isinstance(value, dict) else ())
        elif isinstance(value, torch.Tensor):
            size += value.nbytes
        elif isinstance(value, str):
            size += len(value)
        require(parts + len(waiting) <= MAX_STEPS and size <= max_bytes, 'it repeats its own content')
