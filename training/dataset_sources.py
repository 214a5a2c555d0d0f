"""What dataset_tool.py reads: folders and zips of images, CIFAR-10, MNIST, LSUN."""

import dataclasses
import gzip
import math
import os
import struct
import tarfile
import zlib
from collections.abc import Callable, Sequence

import numpy as np
import PIL.Image

from dnnlib import UserError
from dnnlib.download import fetch
from training.image_archive import folder_labels, image_names, labels_of, open_archive, other_types, read_labels
from training.image_codec import open_image
from training.pickle_machine import Buildable, Machine, StandIn, require

CIFAR10_URL = 'https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz'
CIFAR10_SHA256 = '6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce'
CIFAR10_MD5 = 'c58f30108f718f92721af3b95e74349a'
CIFAR10_MAX_BYTES = 200 << 20
CIFAR10_BATCHES = [f'cifar-10-batches-py/data_batch_{i}' for i in range(1, 6)]
CIFAR10_TEST = ['cifar-10-batches-py/test_batch']
CIFAR10_PARTS = {'cifar10': CIFAR10_BATCHES, 'cifar10-test': CIFAR10_TEST}  # by their names for --source
MAX_BATCH_BYTES = 64 << 20  # CIFAR-10's pickles are 31 MB each
MAX_TAR_BYTES = 400 << 20  # unpacked; CIFAR-10's is 186 MB
MAX_MNIST_IMAGES = 300_000


@dataclasses.dataclass
class Source:
    """Images to convert, in order.

    Attributes:
        path: Where they come from, for messages.
        items: One entry per image, its name or its pixels: what a worker process is sent.
        load: Picklable function from an item to a Pillow image of mode L or RGB.
        labels: Class number or list of floats for each image; None without labels.
        left_out: {ending: number} of other files that may be images, but of a kind that cannot be read.
    """

    path: str
    items: Sequence
    load: Callable
    labels: list | None = None
    left_out: dict = dataclasses.field(default_factory=dict)

    def describe(self, i):
        """The i-th image in words."""
        item = self.items[i]
        return f'{item if isinstance(item, str) else f"image {i}"} in {self.path}'


def open_source(path):
    """The `Source` at `path`, of one of the kinds in `READERS`, or downloaded by a name in `CIFAR10_PARTS`.

    Raises:
        UserError: nothing there, an unknown kind, or damaged.
    """
    path = os.fspath(path)
    if path in CIFAR10_PARTS and not os.path.exists(path):
        return read_cifar10(fetch(CIFAR10_URL, CIFAR10_SHA256, CIFAR10_MD5, max_bytes=CIFAR10_MAX_BYTES),
                            CIFAR10_PARTS[path])
    path = path.rstrip('/') or '/'
    if not os.path.exists(path):
        raise UserError(f'there is no {path}; check --source')
    for _, matches, read in READERS:
        if matches(path):
            return read(path)
    kinds = ', '.join(kind for kind, _, _ in READERS)
    raise UserError(f'{path} is not a known kind of source ({kinds}); rename it or put its images into a folder')


def read_archive(path):
    """Images of a folder or zip, labelled by its dataset.json, or else by its top-level folders."""
    archive = open_archive(path)
    names = image_names(archive)
    if archive.has('dataset.json'):
        labels = read_labels(archive)
        labels = None if labels is None else labels_of(names, labels, path)
    else:
        labels = folder_labels(names, path)
    return Source(path, names, _ArchiveLoader(archive), labels, other_types(archive))


class _ArchiveLoader:
    def __init__(self, archive):
        self.archive = archive

    def __call__(self, name):
        return open_image(self.archive.read(name), f'{name} in {self.archive.path}')


def read_cifar10(path, names=CIFAR10_BATCHES):
    """The 50,000 training images (or other batches) of cifar-10-python.tar.gz, with labels; nothing is extracted.

    Raises:
        UserError: the file is damaged, incomplete, or its pickles ask for anything but arrays.
    """
    remedy = f'download it again from {CIFAR10_URL}'
    batches = {}
    try:
        with gzip.open(path) as unpacked, tarfile.open(fileobj=_Bounded(unpacked, path), mode='r|') as tar:
            for member in tar:
                if member.isfile() and member.name in names:
                    if member.size > MAX_BATCH_BYTES:
                        raise UserError(f'{member.name} in {path} is larger than {MAX_BATCH_BYTES} bytes; {remedy}')
                    batches[member.name] = _read_batch(tar.extractfile(member).read(), f'{member.name} in {path}')
    except UserError:
        raise
    except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError, OverflowError) as e:
        raise UserError(f'{path} is not a readable tar.gz file ({e}); {remedy}') from e
    missing = [name for name in names if name not in batches]
    if missing:
        raise UserError(f'{path} lacks {missing[0]}; {remedy}')
    images = np.concatenate([batches[name][0] for name in names])
    labels = [label for name in names for label in batches[name][1]]
    return Source(str(path), images, PIL.Image.fromarray, labels)


class _Bounded:
    """A stream that ends in a UserError after MAX_TAR_BYTES, however small the compressed file is."""

    def __init__(self, stream, path):
        self.stream, self.path, self.left = stream, path, MAX_TAR_BYTES

    def read(self, size):
        data = self.stream.read(min(size, self.left + 1))
        self.left -= len(data)
        if self.left < 0:
            raise UserError(f'{self.path} unpacks to more than {MAX_TAR_BYTES} bytes; download it again from '
                            f'{CIFAR10_URL}')
        return data


def _read_batch(data, what):
    """(uint8 [N, 32, 32, 3], list of N labels) from the content of one batch file."""
    try:
        batch = _BatchMachine(data).load()
        images = batch['data'].pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        labels = list(batch['labels'])
        require(len(labels) == len(images) and all(type(v) is int and 0 <= v < 10 for v in labels),
                'its labels do not match its images')
        return images, labels
    except Exception as e:  # a damaged pickle raises nearly anything
        raise UserError(f'{what} is not a batch of CIFAR-10 ({e}); download the file again from {CIFAR10_URL}') from e


class _PickledArray(Buildable):
    """A NumPy array, or its dtype, which is not looked at: a batch's pixels are bytes."""

    def set_state(self, state):
        """Take the pixels, the last part of an array's state."""
        if len(state) == 5:
            require(not state[3], 'its array is stored column by column')
            self.pixels = np.frombuffer(state[4], np.uint8)


def _array_of_buffer(pixels, dtype, shape, order):
    """An array as protocol 5 has it."""
    array = _PickledArray()
    array.set_state((1, shape, dtype, order != 'C', pixels))
    return array


ARRAY = StandIn(lambda *_: _PickledArray())
BATCH_GLOBALS = {**{(f'numpy.{core}.multiarray', '_reconstruct'): ARRAY for core in ('core', '_core')},
                 **{(f'numpy.{core}.numeric', '_frombuffer'): StandIn(_array_of_buffer) for core in ('core', '_core')},
                 ('numpy', 'ndarray'): None, ('numpy', 'dtype'): ARRAY}


class _BatchMachine(Machine):
    """Accepts byte strings as keys too, as Python 2 wrote them, and bytes as Python 3 writes them in protocol 2."""

    def __init__(self, data):
        super().__init__(data, {**BATCH_GLOBALS, ('_codecs', 'encode'): StandIn(self.encode)})

    def encode(self, text, _latin1):
        """The text as bytes; all texts together are no longer than the file, or a short one could fill the memory."""
        self.bytes_left -= len(text)
        require(self.bytes_left >= 0, 'it repeats its own content')
        return memoryview(text.encode('latin1'))

    def set_items(self, values):
        keys = [str(key, 'latin1') if type(key) is memoryview else key for key in values[::2]]
        super().set_items([item for pair in zip(keys, values[1::2], strict=True) for item in pair])


def read_mnist(path):
    """Images of MNIST's *-images-idx3-ubyte.gz, padded with black to 32×32, with labels from the file beside it.

    Raises:
        UserError: either file is missing or damaged.
    """
    folder, name = os.path.split(path)
    labels_path = os.path.join(folder, name.replace('-images-idx3-', '-labels-idx1-'))
    if not os.path.isfile(labels_path):
        raise UserError(f'there is no labels file {labels_path} beside {path}; download it to that folder')
    images = _read_idx(path, 3)
    labels = _read_idx(labels_path, 1)
    if images.shape[1:] != (28, 28):
        raise UserError(f'{path} holds {images.shape[2]}x{images.shape[1]} images where MNIST has 28x28; '
                        'download it again')
    if len(images) != len(labels):
        raise UserError(f'{path} holds {len(images)} images but {labels_path} {len(labels)} labels; '
                        'download both again')
    images = np.pad(images, [(0, 0), (2, 2), (2, 2)])
    return Source(path, images, PIL.Image.fromarray, labels.tolist())


def _read_idx(path, ndim):
    """uint8 array of a gzipped IDX file with `ndim` dimensions."""
    try:
        with gzip.open(path, 'rb') as f:
            magic, *shape = struct.unpack(f'>{1 + ndim}I', f.read(4 * (1 + ndim)))
            if magic != 0x800 + ndim or shape[0] > MAX_MNIST_IMAGES or max(shape[1:], default=0) > 1024:
                raise ValueError('its header is not that of such a file')
            size = math.prod(shape)
            if size > MAX_MNIST_IMAGES * 28 * 28:
                raise ValueError('its header declares too much data')
            data = f.read(size)
            if len(data) != size:
                raise ValueError(f'it ends after {len(data)} of {size} bytes')
    except (OSError, EOFError, zlib.error, struct.error, ValueError) as e:
        raise UserError(f'{path} is not a readable IDX file of MNIST ({e}); download it again') from e
    return np.frombuffer(data, np.uint8).reshape(shape)


def read_lsun(path):
    """Images of an LSUN database, a folder ending in _lmdb; no labels.

    Raises:
        UserError: the package lmdb is not installed, or the database cannot be read.
    """
    loader = _LmdbLoader(path)
    keys = loader.read(lambda txn: [bytes(key) for key in txn.cursor().iternext(values=False)])
    if not keys:
        raise UserError(f'there are no images in {path}; download it again')
    return Source(path, keys, loader)


class _LmdbLoader:
    """Reads the database by key; picklable: every process opens it for itself."""

    def __init__(self, path):
        self.path = path
        self._env = None

    def __getstate__(self):
        return {'path': self.path, '_env': None}

    def read(self, query):
        """The result of ``query(transaction)``."""
        try:
            import lmdb  # optional: only LSUN needs it
        except ImportError as e:
            raise UserError(f'reading {self.path} needs the package lmdb; install it with pip install lmdb') from e
        try:
            if self._env is None:
                self._env = lmdb.open(self.path, readonly=True, lock=False, create=False)
            with self._env.begin() as txn:
                return query(txn)
        except lmdb.Error as e:
            raise UserError(f'{self.path} is not a readable LMDB database ({e}); download it again') from e

    def __call__(self, key):
        data = self.read(lambda txn: txn.get(key))
        return open_image(data, f'{key.decode("ascii", "replace")} in {self.path}')


READERS = [
    ('a folder ending in _lmdb', lambda path: path.endswith('_lmdb') and os.path.isdir(path), read_lsun),
    ('a folder of images', os.path.isdir, read_archive),
    ('cifar-10-python.tar.gz', lambda path: os.path.basename(path) == 'cifar-10-python.tar.gz', read_cifar10),
    ('train-images-idx3-ubyte.gz', lambda path: path.endswith('-images-idx3-ubyte.gz'), read_mnist),
    ('a zip of images', lambda path: path.lower().endswith('.zip'), read_archive),
]
