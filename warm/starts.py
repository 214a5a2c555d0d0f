"""Where systems without initial noise start sampling: from blurred training images, or from colours like theirs.

Such a prior comes from the training set, and any score of such samples must be read with that in mind. Sampling
therefore needs the data set (--data of generate.py), of which a snapshot only records the name, size and so on.
"""

import functools
import os
import pathlib

import numpy as np
import torch

from dnnlib import UserError
from dnnlib.json_files import read_object
from dnnlib.text import excerpt
from torch_utils import distributed as dist
from training.dataset import EMBEDDED, ImageFolderDataset, name_of
from training.pixels import to_float
from training.run_files import OPTIONS_NAME
from training.system import Option

DATA = Option('data', None, 'Data set whose blurred images sampling starts from', shown='the embedded digits, '
              'if the network was trained on them')
BLURRED_IMAGES = 'blurred training images'  # the prior, in records of scores


class TrainingImages:
    """The images that sampling starts from.

    Args:
        path: Folder or zip, as ImageFolderDataset takes them.
        net: The network that the images are for.

    Raises:
        UserError: no path; images that do not fit the network; a class without images.
    """

    def __init__(self, path, net):
        if path is None:
            raise UserError('this system starts from blurred training images; give the data set with --data=ZIP|DIR')
        self.dataset = ImageFolderDataset(path, use_labels=net.label_dim > 0)
        d = self.dataset
        if (d.num_channels, d.resolution, d.label_dim) != (net.img_channels, net.img_resolution, net.label_dim):
            raise UserError(f'the images of {path} ({d.num_channels} channels, {d.resolution} pixels, {d.label_dim} '
                            f'classes) do not match those that the network was trained on ({net.img_channels}, '
                            f'{net.img_resolution}, {net.label_dim}); give that data set with --data')
        # Checked now, since any class may be drawn later, even in the middle of training.
        absent = sorted(set(range(d.label_dim)) - set(self._classes)) if d.has_onehot_labels else []
        if absent:
            raise UserError(f"{path} has no images of class {', '.join(map(str, absent[:5]))}"
                            f"{', …' if len(absent) > 5 else ''} from which sampling of that class could start; number "
                            'the classes in its dataset.json from 0 on without gaps, or train without classes '
                            '(--cond=0)')

    def draw(self, latents, class_labels, randn_like):
        """Draw one image per element of `latents` [B, C, N, N], uniformly, from its class if there are classes.

        A label vector stands for the class of its largest element; if that class has no images, which only happens
        with vectors that are not one-hot, any image may be drawn. `randn_like` gives one normal variate per image.
        Returns float64 in [−1, 1], on the device of `latents`.
        """
        z = randn_like(latents.new_empty([len(latents), 1, 1, 1], dtype=torch.float64))
        share = torch.special.ndtr(z).flatten().tolist()
        classes = [None] * len(latents) if class_labels is None else class_labels.argmax(dim=1).tolist()
        images = [self.dataset[self._pick(u, c)][0] for u, c in zip(share, classes)]
        return _scaled(np.stack(images)).to(latents.device)

    def _pick(self, share, class_idx):
        """Index of the image at the fraction `share` (0…1) of all images, or of those of one class."""
        everything = range(len(self.dataset))
        members = everything if class_idx is None else self._classes.get(class_idx, everything)
        return members[min(int(share * len(members)), len(members) - 1)]

    @functools.cached_property
    def _classes(self):
        """{class: indices of its images}."""
        members = {}
        for i in range(len(self.dataset)):
            members.setdefault(int(self.dataset.get_label(i).argmax()), []).append(i)
        return members

    def colours(self):
        """Mean [C] and covariance [C, C] of the images' mean colours, float64 in units of [−1, 1]."""
        means = torch.stack([_scaled(self.dataset[i][0]).mean(dim=(1, 2)) for i in range(len(self.dataset))])
        centred = means - means.mean(dim=0)
        return means.mean(dim=0), centred.T @ centred / len(means)


def _scaled(pixels):
    return to_float(torch.from_numpy(pixels), torch.float64)


def data_for(snapshot, path=None):
    """The data set that a snapshot's sampler starts from: `path`, by default the one that it was trained on.

    That is known where the options of its run lie beside it, and for the embedded digits. Prints a warning if the data
    set has another name than the one trained on: scores would say that they start from the training images.

    Args:
        snapshot: training.snapshot.Snapshot, whose `dataset` says what it was trained on.
        path: What the user gave, or None.

    Raises:
        UserError: no path, and the data set is not found; a data set of another size than it was trained on.
    """
    facts = snapshot.dataset
    path = path or _recorded_path(snapshot)
    if path is None:
        embedded = ImageFolderDataset(EMBEDDED)
        if (facts.get('name'), facts.get('resolution')) != (embedded.name, embedded.resolution):
            raise UserError(f"{snapshot.path} starts from blurred training images; give the data set it was trained on "
                            f"({facts.get('name', 'unknown')}) with --data=ZIP|DIR")
        return EMBEDDED
    count, expected = len(ImageFolderDataset(path)), facts.get('num_images')
    if expected is not None and expected not in (count, 2 * count):  # twice as many with --xflip
        raise UserError(f'{path} has {count} images, but {snapshot.path} was trained on {expected}; '
                        'give that data set with --data')
    if facts.get('name') not in (None, name_of(path)):
        dist.print0(f"Warning: {snapshot.path} was trained on {excerpt(facts['name'])}, and its samples start from "
                    f'{path}, a data set of another name.')
    return path


def _recorded_path(snapshot):
    """The training data according to the options beside a snapshot, if it is still there under its name; or None."""
    options = (read_object(pathlib.Path(snapshot.path).parent / OPTIONS_NAME) or {}).get('dataset_kwargs')
    path = options.get('path') if isinstance(options, dict) else None
    found = isinstance(path, str) and os.path.exists(path) and name_of(path) == snapshot.dataset.get('name')
    return path if found else None
