"""Images and labels for training: uint8 pixels in [C, H, W], one-hot float32 labels, as EDM reads them."""

import copy
import operator
import os
import pathlib
import shlex
import types

import numpy as np
import torch

from dnnlib import UserError
from training.image_archive import ZipArchive, fingerprint, image_names, labels_of, open_archive, read_labels
from training.image_codec import PNG_HEADER_BYTES, decode, png_shape

EMBEDDED = str(pathlib.Path(__file__).resolve().parent / 'data' / 'digits-8x8.zip')


def load_embedded(**kwargs):
    """The handwritten digits that come with the project: 1797 grey 8×8 images in 10 classes.

    Args:
        kwargs: Further arguments of `ImageFolderDataset`; labels are used unless ``use_labels=False``.
    """
    return ImageFolderDataset(EMBEDDED, **{'use_labels': True, **kwargs})


class ImageFolderDataset(torch.utils.data.Dataset):
    """Square images of one size in a folder or zip, read recursively and sorted by name.

    Items are ``(image, label)``: a uint8 array [C, H, W] and a float32 vector [label_dim] (length 0
    without labels). Objects can be pickled and forked: each process opens the zip for itself.
    After `use_decoded`, pixels come from an array of all images (training.decoded), which `batch` reads fastest.

    Args:
        path: Folder or zip, as made by dataset_tool.py; any square images of one size will do.
        resolution: Size the images must have; None accepts any.
        use_labels: Use the labels of dataset.json, if it has any (`has_labels`): class numbers become one-hot vectors
            whose length is the highest number plus one, float vectors stay as they are.
        max_size: Keep a random subset of this many images, in their original order; None keeps all.
        xflip: Append the mirrored copy of every image.
        random_seed: Chooses the subset.
        cache: EDM's argument, without effect here: training.training_loop.decode_in_advance decodes.

    Raises:
        UserError: missing, damaged or inconsistent images or labels. PNG files in a zip all have their
            sizes compared here, other files when they are read.
    """

    def __init__(self, path, resolution=None, use_labels=False, max_size=None, xflip=False, random_seed=0,
                 cache=False):
        self._archive = open_archive(path)
        self.name = name_of(path)
        names = image_names(self._archive)
        self._labels = self._load_labels(names) if use_labels else np.zeros([len(names), 0], np.float32)
        self._label_dim = int(self._labels.max()) + 1 if self._labels.ndim == 1 else self._labels.shape[1]
        self._raw_idx = _subset(len(names), max_size, random_seed)
        self._names = names
        self._xflip = bool(xflip)
        self._first = names[self._raw_idx[0]]
        self._shape = list(decode(self._archive.read(self._first), self._what(self._first)).shape)
        self._check_resolution(resolution)
        if isinstance(self._archive, ZipArchive):
            self._check_png_headers()
        self._decoded = None

    @property
    def image_shape(self):
        """[C, H, W] of every image."""
        return list(self._shape)

    @property
    def num_channels(self):
        return self._shape[0]

    @property
    def resolution(self):
        return self._shape[1]

    @property
    def label_dim(self):
        """Length of a label vector; 0 without labels."""
        return self._label_dim

    @property
    def label_shape(self):
        return [self.label_dim]

    @property
    def has_labels(self):
        return self.label_dim > 0

    @property
    def has_onehot_labels(self):
        """Whether labels are class numbers in dataset.json."""
        return self._labels.ndim == 1

    @property
    def path(self):
        """The folder or zip."""
        return self._archive.path

    @property
    def num_files(self):
        """Number of images at the path, whether in the subset or not."""
        return len(self._names)

    @property
    def decoded(self):
        """The array given to `use_decoded`, or None."""
        return self._decoded

    def decode_file(self, raw_idx):
        """Pixels of file number `raw_idx` at the path, uint8 [C, H, W], checked; read from the file in any case."""
        name = self._names[raw_idx]
        image = decode(self._archive.read(name), self._what(name))
        self._check_shape(name, list(image.shape))
        return image

    def use_decoded(self, images):
        """Take pixels from `images` from now on: uint8 [num_files, C, H, W], all at the path in order."""
        self._decoded = images

    def batch(self, indices):
        """The items `indices`: images uint8 [B, C, H, W] and labels float32 [B, label_dim], both as copies."""
        raw_idx, flipped = self.locate(indices)
        if self._decoded is not None:
            images = np.asarray(self._decoded[raw_idx])  # a copy, in memory
        else:
            images = np.stack([self._load(i) for i in raw_idx])
        images[flipped] = images[flipped][..., ::-1]
        return images, self.labels_of_files(raw_idx)

    def locate(self, indices):
        """(file number, whether mirrored) of each of the items `indices`, as arrays [B].

        Mirrored copies follow the originals; negative indices count from the end.
        """
        indices = np.asarray(indices, np.int64)
        if len(indices) and not -len(self) <= indices.min() <= indices.max() < len(self):
            raise IndexError(f'indices {indices.min()} to {indices.max()} in a dataset of {len(self)} items')
        return self._place(indices)

    def _place(self, indices):
        """`locate` for indices known to be in range, an array or a single one."""
        flipped, k = divmod(indices % len(self), len(self._raw_idx))
        return self._raw_idx[k], flipped > 0

    def labels_of_files(self, raw_idx):
        """Labels of the files with these numbers, float32 [B, label_dim]; for a single number [label_dim]."""
        labels = self._labels[raw_idx]
        if not self.has_onehot_labels:
            return labels.copy()
        return (labels[..., None] == np.arange(self.label_dim)).astype(np.float32)

    def __len__(self):
        return len(self._raw_idx) * (2 if self._xflip else 1)

    def __getitem__(self, idx):
        idx = operator.index(idx)  # of a tensor, too, as torch.randperm gives
        if not -len(self) <= idx < len(self):
            raise IndexError(f'index {idx} in a dataset of {len(self)} items')
        raw_idx, flipped = self._place(idx)  # `batch` takes 40 % longer for one item, and data loaders ask for one
        image = self._load(raw_idx)
        return (image[..., ::-1] if flipped else image).copy(), self.labels_of_files(raw_idx)

    def get_label(self, idx):
        """Label of item `idx`: float32 vector [label_dim]."""
        return self.labels_of_files(self.locate([operator.index(idx)])[0])[0]

    @property
    def file_names(self):
        """Names of the image files in order."""
        return [self._names[i] for i in self._raw_idx]

    def unmirrored(self):
        """The same data set without `xflip`'s mirrored copies, read from the files."""
        dataset = copy.copy(self)
        dataset._xflip = False
        return dataset

    def fingerprint(self, names=None):
        """A digest that changes with the content of the files `names` (None: all at the path), without reading it."""
        return fingerprint(self._archive, self._names if names is None else names)

    def get_details(self, idx):
        """`raw_idx` (index among all images of the path), `xflip` and `raw_label` of item `idx`."""
        raw_idx, flipped = (int(a[0]) for a in self.locate([idx]))
        return types.SimpleNamespace(raw_idx=raw_idx, xflip=bool(flipped), raw_label=self._labels[raw_idx].copy())

    def __getstate__(self):
        return {**self.__dict__, '_decoded': None}

    def _load(self, raw_idx):
        """Pixels of file number `raw_idx` at the path, from the decoded images if there are any."""
        return self.decode_file(raw_idx) if self._decoded is None else self._decoded[raw_idx]

    def _what(self, name):
        return f'{name} in {self._archive.path}'

    def _load_labels(self, names):
        labels = read_labels(self._archive) if self._archive.has('dataset.json') else None
        if labels is None:
            return np.zeros([len(names), 0], np.float32)
        ordered = labels_of(names, labels, self._archive.path)
        return np.array(ordered, np.float32 if isinstance(ordered[0], list) else np.int64)

    def _check_resolution(self, resolution):
        c, h, w = self._shape
        what = f'{self._what(self._first)} is {w}x{h} pixels'
        if h != w:
            size = 1 << (min(w, h).bit_length() - 1)  # a power of two, as dataset_tool.py makes; enlarges nothing
            raise UserError(f'{what}, not square; crop the images, to this size or another, with '
                            f'`{self._conversion(size)} --transform=center-crop`')
        if resolution is not None and h != resolution:
            raise UserError(f'{what} where {resolution}x{resolution} is needed; '
                            f'convert the images with `{self._conversion(resolution)}`')

    def _conversion(self, size):
        """The command that converts these images into a zip of square ones of that size."""
        path = os.path.normpath(self._archive.path)
        dest = os.path.join(os.path.dirname(path), f'{self.name}-{size}x{size}.zip')
        return (f'python dataset_tool.py --source={shlex.quote(path)} --dest={shlex.quote(dest)} '
                f'--resolution={size}x{size}')

    def _check_shape(self, name, shape):
        if shape != self._shape:
            sizes = [f'{s[2]}x{s[1]} with {s[0]} channel{"s" if s[0] > 1 else ""}' for s in (self._shape, shape)]
            raise UserError(f'{self._first} in {self._archive.path} is {sizes[0]} but {name} is {sizes[1]}; '
                            'make all images alike with dataset_tool.py --resolution=WxH --transform=center-crop')

    def _check_png_headers(self):
        """Compare the sizes of all PNG files with the first image's: half a second for 50,000 of them."""
        for i in self._raw_idx:
            name = self._names[i]
            if name.lower().endswith('.png'):
                shape = png_shape(self._archive.head(name, PNG_HEADER_BYTES))
                if shape is None:
                    self.decode_file(i)
                else:
                    self._check_shape(name, shape)


def name_of(path):
    """A zip's file name without its ending, or a folder's name."""
    name = os.path.basename(os.path.abspath(path))
    return name if os.path.isdir(path) else os.path.splitext(name)[0]


def _subset(size, max_size, random_seed):
    """Sorted indices of the images kept, the same as in EDM."""
    if max_size is not None and max_size < 1:
        raise UserError(f'a dataset of {max_size} images cannot be used; give a size of at least 1')
    raw_idx = np.arange(size, dtype=np.int64)
    if max_size is not None and max_size < size:
        np.random.RandomState(random_seed % (1 << 31)).shuffle(raw_idx)
        raw_idx = np.sort(raw_idx[:max_size])
    return raw_idx
