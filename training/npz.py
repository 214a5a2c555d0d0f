"""Reads .npz files from untrusted sources: arrays, never code, and no more memory than its size justifies."""

import math
import zipfile

import numpy as np

MAX_UNPACKED = 64 << 20  # bytes that any compressed file may unpack to
MAX_RATIO = 4  # largest ratio of unpacked to packed size above that; real statistics hardly compress


def read_npz(path, names):
    """{name: array} for those of `names` that the file has.

    Sizes are checked before NumPy allocates what an array's header asks for.

    Raises:
        ValueError: not an .npz file, damaged, or unpacking to an implausible size.
        OSError: it cannot be read.
    """
    if not zipfile.is_zipfile(path):  # np.load would return a single array for an .npy file
        raise ValueError('it is not an .npz file')
    try:
        with zipfile.ZipFile(path) as archive:
            infos = {info.filename.removesuffix('.npy'): info for info in archive.infolist()}
            wanted = [name for name in names if name in infos]
            unpacked = sum(infos[name].file_size for name in wanted)
            packed = sum(infos[name].compress_size for name in wanted)
            if unpacked > max(MAX_UNPACKED, MAX_RATIO * packed):
                raise ValueError('it unpacks to far more than it holds')
            return {name: _read_array(archive, infos[name]) for name in wanted}
    except (OSError, ValueError):
        raise
    except Exception as e:  # zipfile, zlib and NumPy's header parser fail in many ways
        raise ValueError(f'it is damaged ({type(e).__name__})') from e


def _read_array(archive, info):
    with archive.open(info) as f:
        version = np.lib.format.read_magic(f)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in read_header:
            raise ValueError('an array in it has an unknown format')
        shape, _, dtype = read_header[version](f)
        if dtype.hasobject or math.prod(shape) * dtype.itemsize > info.file_size:
            raise ValueError('an array in it is larger than its content, or holds objects')
    with archive.open(info) as f:
        return np.lib.format.read_array(f, allow_pickle=False)
