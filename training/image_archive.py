"""Where images are stored: a folder or a zip, read in the same way, and the labels in its dataset.json."""

import collections
import hashlib
import json
import math
import os
import re
import struct
import zipfile
import zlib

from dnnlib import UserError
from dnnlib.text import excerpt
from training.image_codec import is_image_name

MAX_FILE_BYTES = 1 << 28  # no image of a dataset is near this; a zip may claim anything
MAX_LABEL_BYTES = 16 << 20  # for dataset.json, plus LABEL_BYTES_PER_IMAGE; parsed JSON takes 20 times its text
LABEL_BYTES_PER_IMAGE = 256
OUTSIDE = re.compile(r'[/\\]|[A-Za-z]:[/\\]|(.*[/\\])?\.\.([/\\]|$)', re.DOTALL)  # names of places outside an archive
MAX_CLASSES = 100_000  # a one-hot vector longer than this means a wrong label
NO_IMAGES = ('.csv', '.db', '.html', '.ini', '.json', '.jsonl', '.log', '.md', '.txt', '.tsv', '.xml', '.yaml', '.yml')


def open_archive(path):
    """The folder or zip `path` as a `FolderArchive` or `ZipArchive`.

    Raises:
        UserError: no such path, or neither a folder nor a readable zip.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        return FolderArchive(path)
    if os.path.isfile(path):
        return ZipArchive(path)
    raise UserError(f'there is no folder or zip {path}; check the path, or make the dataset with dataset_tool.py')


class FolderArchive:
    """Files in a folder by their relative names, parts joined with '/'."""

    def __init__(self, path):
        self.path = path

    def names(self):
        """All files below the folder, including those in linked folders."""
        return list(self._below('', ()))

    def _below(self, inside, parents):
        """Files below the folder with the relative name `inside` ('' or ending in '/').

        Args:
            parents: (device, inode) of the folders around it; a link back to one of them is not followed.
        """
        folder = os.path.join(self.path, inside)
        try:
            status = os.stat(folder)
            here = status.st_dev, status.st_ino
            with os.scandir(folder) as entries:
                found = [] if here in parents else [(entry.name, entry.is_dir()) for entry in entries]
        except OSError as e:
            raise UserError(f'could not read {folder}: {e.strerror}; check its permissions') from e
        for name, is_dir in found:
            if is_dir:
                yield from self._below(f'{inside}{name}/', (*parents, here))
            else:
                yield inside + name

    def has(self, name):
        return os.path.isfile(os.path.join(self.path, name))

    def stamp(self, name):
        """What changes with the file's content, without reading it: its size and modification time."""
        try:
            status = os.stat(os.path.join(self.path, name))
        except OSError as e:
            raise self._unreadable(name, e) from e
        return status.st_size, status.st_mtime_ns

    def read(self, name):
        """The bytes of one file. Raises UserError when it cannot be read."""
        try:
            with open(os.path.join(self.path, name), 'rb') as f:
                data = f.read(MAX_FILE_BYTES + 1)
        except OSError as e:
            raise self._unreadable(name, e) from e
        if len(data) > MAX_FILE_BYTES:
            raise _too_large(name, self.path)
        return data

    def _unreadable(self, name, error):
        path = os.path.join(self.path, name)
        if os.path.islink(path) and not os.path.exists(path):
            return UserError(f'{name} in {self.path} is a broken link; remove it')
        return UserError(f'could not read {name} in {self.path}: {error.strerror}; check the file and its permissions')


class ZipArchive:
    """Files in a zip. Picklable and safe across fork: every process opens the file for itself."""

    def __init__(self, path):
        self.path = path
        self._zip = self._pid = None
        self._open()

    def __getstate__(self):
        return {'path': self.path, '_zip': None, '_pid': None}

    def _open(self):
        if self._zip is None or self._pid != os.getpid():
            try:
                if self._zip is None:
                    self._zip = zipfile.ZipFile(self.path)
                else:  # after a fork, parent and child would share one file position; the directory they may share
                    self._zip.fp = open(self.path, 'rb')
                self._pid = os.getpid()
            except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as e:
                raise UserError(f'{self.path} is not a readable zip ({e}); '
                                'copy it again, or recreate it with dataset_tool.py') from e
        return self._zip

    def names(self):
        """All files of the zip. Names are keys only: nothing is ever extracted to them.

        Raises:
            UserError: an absolute name or one with '..', which no proper archive has.
        """
        names = [name for info in self._open().infolist() if (name := info.filename) and not name.endswith('/')]
        for name in names:
            if OUTSIDE.match(name):
                raise UserError(f'{self.path} holds a file named {excerpt(name, 100)}, a place outside of it; remove '
                                'that file, or make the zip again from a folder')
        return names

    def has(self, name):
        return name in self._open().NameToInfo

    def stamp(self, name):
        """What changes with the file's content, without reading it: its size and checksum."""
        info = self._open().getinfo(name)
        return info.file_size, info.CRC

    def read(self, name):
        """The bytes of one file. Raises UserError when it is missing or damaged."""
        return self._read(name, -1)

    def head(self, name, size):
        """The first `size` bytes of one file, unchecked; for uncompressed files faster than zipfile, which checks."""
        z = self._open()
        info, file = z.getinfo(name), z.fp.fileno()
        if info.compress_type != zipfile.ZIP_STORED:
            return self._read(name, size)
        try:
            lengths = struct.unpack('<HH', os.pread(file, 4, info.header_offset + 26))  # of the name, of what follows
            return os.pread(file, min(size, info.file_size), info.header_offset + 30 + sum(lengths))
        except (struct.error, OSError, OverflowError):
            return b''

    def _read(self, name, size):
        try:
            with self._open().open(name) as f:
                file_size = self._open().getinfo(name).file_size
                if file_size > MAX_FILE_BYTES:
                    raise _too_large(name, self.path)
                # Never read without a size: zipfile would unpack up to 2 GiB at once, whatever the file's entry says.
                return f.read(file_size if size < 0 else min(size, file_size))
        except KeyError as e:
            raise UserError(f'there is no {name} in {self.path}; recreate the zip with dataset_tool.py') from e
        except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, ValueError, OverflowError) as e:
            raise UserError(f'could not read {name} in {self.path} ({e}); '
                            'copy the zip again, or recreate it with dataset_tool.py') from e


def fingerprint(archive, names):
    """A hexadecimal digest that changes with the content of the files `names`, without reading them.

    Copies of a zip have the same, so that machines with one each share what is made from it.
    """
    digest = hashlib.sha256()
    for name in names:
        digest.update(repr((name, *archive.stamp(name))).encode())
    return digest.hexdigest()


def _too_large(name, path):
    return UserError(f'{name} in {path} is larger than {MAX_FILE_BYTES} bytes; remove it from the dataset')


def image_names(archive):
    """`find_images` of an archive that must have some.

    Raises:
        UserError: there are none.
    """
    names = find_images(archive)
    if not names:
        raise UserError(f'there are no images in {archive.path}; give a folder or zip with PNG or JPEG files')
    return names


def find_images(archive):
    """Sorted names of the images in an archive, without hidden files and macOS's `__MACOSX`."""
    return sorted({name for name in archive.names() if is_image_name(name) and not _hidden(name)})


def other_types(archive):
    """A Counter of the endings, such as '.heic', of files in an archive that may be images of a kind unknown here.

    Hidden files are not among them, nor those with endings in `NO_IMAGES`, with none, or with what is no word.
    """
    endings = (os.path.splitext(name)[1].lower() for name in archive.names()
               if not is_image_name(name) and not _hidden(name))
    return collections.Counter(end for end in endings if end[1:].isalnum() and end.isascii() and end not in NO_IMAGES)


def _hidden(name):
    return any(part == '__MACOSX' or (part.startswith('.') and part not in ('.', '..')) for part in name.split('/'))


def read_labels(archive):
    """Labels of dataset.json: {image name: class number or list of floats}, or None for `{"labels": null}`.

    Raises:
        UserError: dataset.json is missing, too long, not valid JSON, or not of the form
            ``{"labels": [["00000/img00000000.png", 6], …]}``.
    """
    where = f'dataset.json in {archive.path}'
    remedy = 'correct it, or recreate the dataset with dataset_tool.py'
    try:
        text = archive.read('dataset.json')
        if len(text) > MAX_LABEL_BYTES + LABEL_BYTES_PER_IMAGE * len(archive.names()):
            raise UserError(f'{where} is far too long for the images there; {remedy}')
        content = json.loads(text)
    except (ValueError, RecursionError) as e:
        reason = 'nested too deeply' if isinstance(e, RecursionError) else e
        raise UserError(f'{where} is not valid JSON ({reason}); {remedy}') from e
    if not isinstance(content, dict) or 'labels' not in content:
        raise UserError(f'{where} is not an object with the key "labels"; {remedy}')
    if content['labels'] is None:
        return None
    if not isinstance(content['labels'], list):
        raise UserError(f'"labels" in {where} is neither a list nor null; {remedy}')
    for i, entry in enumerate(content['labels']):
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)):
            raise UserError(f'entry {i} of "labels" in {where} is not a pair ["name", label]; {remedy}')
        if not (_is_class(entry[1]) or _is_vector(entry[1])):
            raise UserError(f'the label of {entry[0]} in {where} is neither a class number '
                            f'from 0 to {MAX_CLASSES - 1} nor a list of finite numbers; {remedy}')
    return dict(content['labels'])


def _is_class(label):
    return type(label) is int and 0 <= label < MAX_CLASSES


def _is_vector(label):
    return isinstance(label, list) and len(label) > 0 and all(
        type(v) in (int, float) and math.isfinite(v) and abs(v) < 3e38 for v in label)


def labels_of(names, labels, path):
    """The labels of `names` in their order, all of one kind and length (`labels` as from `read_labels`).

    Raises:
        UserError: an image without a label, or labels of different kinds; both name the image.
    """
    remedy = 'correct it, or recreate the dataset with dataset_tool.py'
    missing = next((name for name in names if name not in labels), None)
    if missing is not None:
        raise UserError(f'dataset.json in {path} has no label for the image {missing}; {remedy}')
    ordered = [labels[name] for name in names]
    lengths = [len(label) if isinstance(label, list) else 0 for label in ordered]
    odd = next((i for i, length in enumerate(lengths) if length != lengths[0]), None)
    if odd is not None:
        raise UserError(f'the labels of {names[0]} and {names[odd]} in dataset.json in {path} differ in '
                        f'length or kind; {remedy}')
    return ordered


def folder_labels(names, path):
    """Class numbers from the top-level folders of `names`, sorted; None with fewer than two folders.

    Raises:
        UserError: some images lie in folders and some in none.
    """
    folders = [name.split('/')[0] if '/' in name else None for name in names]
    classes = sorted({folder for folder in folders if folder is not None})
    if len(classes) < 2:
        return None
    if None in folders:
        raise UserError(f'{names[folders.index(None)]} in {path} lies in no folder while other images do, so its '
                        'class is unknown; move it, or add a dataset.json with {"labels": null}')
    numbers = {folder: i for i, folder in enumerate(classes)}
    return [numbers[folder] for folder in folders]
