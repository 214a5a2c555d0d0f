"""A data set decoded once: all its pixels in one memory-mapped file of the cache folder, shared by all processes.

The file is an ordinary .npy, uint8 [N, C, H, W], the images in the order of their names. Its own name identifies the
path and the content it was made from; when the content changes, a new file is made and the old one removed.
"""

import contextlib
import glob
import hashlib
import math
import os
import shutil

import numpy as np

from dnnlib import UserError
from dnnlib.download import cache_dir
from dnnlib.files import ABANDONED_SEC, atomic_write, make_dirs, remove_temporary_files
from torch_utils import distributed as dist

MAX_BYTES = 32 << 30  # sets that would be larger than this are read from their files by worker processes
MIN_BYTES = 16 << 20  # below this a file isn't worth it: every process decodes the set for itself
SPARE_BYTES = 1 << 30  # left free on the disk of the cache folder


def decoded_images(dataset, max_bytes=MAX_BYTES, min_bytes=MIN_BYTES):
    """The pixels of all images at `dataset`'s path, read-only uint8 [N, C, H, W]; None if they should be streamed.

    Rank 0 makes the file first; the other ranks find it, or make it if on another machine. Call on all ranks.

    Raises:
        UserError: an image that does not decode.
    """
    size = num_bytes(dataset)
    if size > max_bytes:
        return None
    if size < min_bytes:
        return np.stack([dataset.decode_file(i) for i in range(dataset.num_files)])
    return dist.first_on_rank0(lambda: _open_or_make(dataset))


class DamagedImage(UserError):
    """An image that does not decode, as opposed to a file of decoded images that cannot be written."""


def _open_or_make(dataset):
    path = decoded_path(dataset)
    images = _open(path, dataset)
    if images is not None:
        return images
    try:
        make_dirs(path.parent)
        remove_temporary_files(path.parent, ABANDONED_SEC)
        _check_space(path.parent, num_bytes(dataset))
        _remove_former(path)
        with atomic_write(path) as f:
            _write(f, dataset)
    except DamagedImage:
        raise
    except UserError as e:
        print(f'Warning: the data set is not decoded in advance: {e.message} (DNNLIB_CACHE_DIR names the folder).')
        return None
    return _open(path, dataset)


def decoded_path(dataset):
    """Where the decoded images of a data set are kept: DNNLIB_CACHE_DIR/decoded/NAME-PATH-CONTENT.npy."""
    path = os.path.abspath(dataset.path)
    where = hashlib.sha256(os.fsencode(path)).hexdigest()[:12]
    what = hashlib.sha256(repr((dataset.image_shape, dataset.fingerprint())).encode()).hexdigest()[:16]
    return cache_dir() / 'decoded' / f'{dataset.name[:60]}-{where}-{what}.npy'


def num_bytes(dataset):
    """Size of the decoded images."""
    return dataset.num_files * math.prod(dataset.image_shape)


def _check_space(folder, size):
    free = shutil.disk_usage(folder).free
    if free < size + SPARE_BYTES:
        raise UserError(f'{folder} has {free >> 20} MiB of free space, but {size >> 20} MiB are needed')


def _write(f, dataset):
    """Write the .npy file; DamagedImage for an error in the images themselves."""
    np.lib.format.write_array_header_1_0(f, dict(descr='|u1', fortran_order=False,
                                                 shape=(dataset.num_files, *dataset.image_shape)))
    for i in range(dataset.num_files):
        try:
            image = dataset.decode_file(i)
        except UserError as e:
            raise DamagedImage(e.message) from e
        f.write(image.tobytes())


def _open(path, dataset):
    """The memory-mapped array; None if there is no such file, or it has the wrong type or shape."""
    try:
        mapped = np.load(path, mmap_mode='r', allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return mapped if mapped.dtype == np.uint8 and mapped.shape == (dataset.num_files, *dataset.image_shape) else None


def _remove_former(path):
    """Delete files made from the same path with other content. Memory maps in use stay valid."""
    stem = path.name.rsplit('-', 1)[0]
    for former in path.parent.glob(f'{glob.escape(stem)}-*.npy'):
        if former != path:  # another rank may just have made this one
            with contextlib.suppress(OSError):
                former.unlink()
