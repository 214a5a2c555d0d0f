"""Convert any source of images into a dataset: cropped, resized, checked, written completely or not at all."""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import shutil
import zipfile

import PIL.Image
import tqdm

from dnnlib import UserError
from dnnlib.files import atomic_write, make_dirs
from torch_utils.signals import defer_signals
from training.image_codec import encode_png
from training.workers import ALONE

CHUNK = 64  # images handed to a worker process at once
ARCHIVES = ('.tar', '.gz', '.tgz', '.bz2', '.xz', '.7z', '.rar')  # endings of archives that cannot be written
ZIP_TIME = (1980, 1, 1, 0, 0, 0)  # the earliest a zip can record; fixed, so that equal input gives equal output


def resize(image, size):
    """The whole image, resized to `size` (width, height)."""
    return image if image.size == size else image.resize(size, PIL.Image.LANCZOS)


def center_crop(image, size):
    """The largest centred square, resized to `size`; RGB, as a set may mix grey and colour photographs."""
    crop = min(image.size)
    left, top = (image.width - crop) // 2, (image.height - crop) // 2
    return resize(image.convert('RGB').crop((left, top, left + crop, top + crop)), size)


def center_crop_wide(image, size):
    """The image at full width, cropped above and below to the proportions of `size`, on a black square of that width.

    RGB; None for an image that would have to be enlarged, or whose proportions are wider.
    """
    width, height = size
    crop = round(image.width * height / width)
    if image.width < width or image.height < crop:
        return None
    top = (image.height - crop) // 2
    wide = resize(image.convert('RGB').crop((0, top, image.width, top + crop)), size)
    canvas = PIL.Image.new('RGB', (width, width))
    canvas.paste(wide, (0, (width - height) // 2))
    return canvas


TRANSFORMS = {'center-crop': center_crop, 'center-crop-wide': center_crop_wide}


def make_transform(transform, resolution):
    """A picklable function that converts an image, or returns None if the image is to be skipped.

    Args:
        transform: A key of `TRANSFORMS`; None only resizes.
        resolution: (width, height) in pixels; None, allowed only without a transform, keeps sizes.

    Raises:
        UserError: the output would not be a square with a power of two as its side, or a transform has no size.
    """
    if resolution is None:
        if transform is not None:
            raise UserError(f'--transform={transform} needs a size; add --resolution=WxH')
        return _unchanged
    width, height = resolution
    wide = transform == 'center-crop-wide'
    if not _is_power_of_two(width) or (height != width and not wide) or not 0 < height <= width:
        shape = ('a width that is a power of two and a height up to that' if wide
                 else 'a square whose side is a power of two')
        raise UserError(f'--resolution={width}x{height} is not {shape}; choose another such as '
                        + ('64x48' if wide else '64x64'))
    return functools.partial(TRANSFORMS[transform] if transform else resize, size=(width, height))


def _unchanged(image):
    return image


@dataclasses.dataclass
class Summary:
    """What `convert` wrote."""

    num_images: int
    num_skipped: int
    num_stretched: int  # not square before, and resized without a crop
    size: int
    channels: int
    labels: list | None


def convert(source, dest, transform=None, resolution=None, max_images=None, workers=ALONE):
    """Write the images of a `training.dataset_sources.Source` as a dataset.

    Args:
        source: Images and labels.
        dest: Folder, new or empty, or a file ending in .zip (replaced if it exists). It appears once all is done.
        transform, resolution: See `make_transform`.
        max_images: Read only this many images of the source.
        workers: An entered `training.workers.Workers` to decode and encode; the output is the same for any number.

    Returns:
        A `Summary`.

    Raises:
        UserError: an image that does not decode or fit, or a destination that cannot be written.
    """
    check_apart(source.path, dest)
    job = functools.partial(_convert_chunk, source.load, make_transform(transform, resolution))
    total = len(source.items) if max_images is None else min(max_images, len(source.items))
    chunks = (source.items[i:min(i + CHUNK, total)] for i in range(0, total, CHUNK))
    labels, first = [], None
    skipped = stretched = 0
    with open_dest(dest) as add, contextlib.closing(workers.map(job, chunks)) as results, \
            tqdm.tqdm(total=total, unit='img', disable=None) as progress:
        for i, result in enumerate(itertools.chain.from_iterable(results)):
            progress.update()
            if isinstance(result, UserError):
                raise result
            if result is None:
                skipped += 1
                continue
            png, kind, reshaped = result
            stretched += reshaped and transform is None
            first = first or (source.describe(i), kind)
            _check(source.describe(i), kind, *first)
            name = image_name(len(labels))
            add(name, png)
            labels.append([name, source.labels[i] if source.labels is not None else None])
        if not labels:
            raise UserError(f'none of the {total} images in {source.path} is large enough for '
                            f'--resolution={resolution[0]}x{resolution[1]}; choose a smaller one')
        labels = labels if source.labels is not None else None
        add('dataset.json', json.dumps({'labels': labels}).encode())
    (size, _), mode = first[1]
    return Summary(total - skipped, skipped, stretched, size, _channels(mode),
                   labels and [label for _, label in labels])


def _check(what, kind, first, first_kind):
    """Raise UserError if an image is not square, not a power of two, or unlike the first. `kind` is (size, mode)."""
    (width, height), mode = kind
    if width != height:
        raise UserError(f'{what} is {width}x{height} pixels, not square; '
                        'crop with --transform=center-crop --resolution=WxH')
    if not _is_power_of_two(width):
        raise UserError(f'{what} is {width}x{height} pixels, not a power of two; resize with --resolution=WxH')
    if kind[0] != first_kind[0]:
        raise UserError(f'{what} is {width}x{height} pixels but {first} is {first_kind[0][0]}x{first_kind[0][1]}; '
                        'make them alike with --resolution=WxH, adding --transform=center-crop to keep proportions')
    if mode != first_kind[1]:
        raise UserError(f'{what} has {_channels(mode)} channel(s) but {first} has {_channels(first_kind[1])}; '
                        'make all of them RGB with --transform=center-crop --resolution=WxH')


def _channels(mode):
    return {'L': 1, 'RGB': 3}[mode]


def _is_power_of_two(n):
    return n > 0 and n & (n - 1) == 0


def _convert_chunk(load, transform, items):
    """For each item: (PNG bytes, (size, mode), other proportions?), None if skipped, or the UserError that ends it."""
    results = []
    for item in items:
        try:
            original = load(item)
            image = transform(original)
        except UserError as e:
            return [*results, e]
        results.append(image and (encode_png(image), (image.size, image.mode),
                                  original.width * image.height != original.height * image.width))
    return results


def check_apart(source, dest):
    """Raise UserError if writing `dest` would replace the source or put files inside it."""
    source, real = os.path.realpath(source), os.path.realpath(dest)
    if source == real or os.path.exists(source) and os.path.exists(dest) and os.path.samefile(source, dest):
        raise UserError(f'{dest} is the source itself, which the result would replace; give another --dest')
    if os.path.isdir(source) and real.startswith(os.path.join(source, '')):
        raise UserError(f'{dest} lies inside the source {source}, whose images it would join; give a --dest elsewhere')


def image_name(idx):
    """Name of the idx-th image in a dataset, with a folder for each thousand: 00001/img00001234.png."""
    return f'{idx // 1000:05d}/img{idx:08d}.png'


def open_dest(dest, compress=False):
    """Context manager for writing a dataset; yields ``add(name, data)``.

    `dest` appears, complete, when the block ends; after an exception it is unchanged. (An existing folder, which may be
    a link or a mount point, gets its content by several renames then, dataset.json last.)

    Args:
        dest: A file ending in .zip, or a folder that is new or empty.
        compress: Deflate the members of a zip.

    Raises:
        UserError: something is in the way at `dest`, or it cannot be written.
    """
    dest = os.path.abspath(dest)
    if dest.lower().endswith('.zip'):
        if os.path.isdir(dest):
            raise UserError(f'{dest} is a folder; choose another name for the zip')
        return _zip_dest(dest, zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED)
    if dest.lower().endswith(ARCHIVES):
        raise UserError(f'{dest} names a kind of archive that cannot be written; give a name ending in .zip, or that '
                        'of a folder')
    if os.path.lexists(dest) and not os.path.isdir(dest):
        raise UserError(f'{dest} is a file or a broken link; choose another folder, or a name ending in .zip')
    if os.path.isdir(dest) and (there := os.listdir(dest)):
        raise UserError(f'the folder {dest} is not empty (it holds {there[0]}); choose a new one, or a name ending in '
                        '.zip')
    return _folder_dest(dest)


@contextlib.contextmanager
def _zip_dest(dest, compression):
    make_dirs(os.path.dirname(dest))
    with atomic_write(dest) as f, zipfile.ZipFile(f, 'w', compression) as z:
        def add(name, data):
            info = zipfile.ZipInfo(name, ZIP_TIME)
            info.create_system, info.external_attr = 3, 0o644 << 16  # an ordinary Unix file, on whatever system
            z.writestr(info, data, compression)
        yield add


@contextlib.contextmanager
def _folder_dest(dest):
    exists = os.path.isdir(dest)
    folder = dest if exists else os.path.dirname(dest)
    make_dirs(folder)
    stage = os.path.join(folder, f'.tmp-{os.path.basename(dest)}-{os.getpid()}')

    def add(name, data):
        path = os.path.join(stage, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, 'wb') as f:
            f.write(data)
    try:
        os.mkdir(stage)
        yield add
        if exists:
            with defer_signals():
                for name in sorted(os.listdir(stage)):
                    os.rename(os.path.join(stage, name), os.path.join(dest, name))
        else:
            os.rename(stage, dest)
    except OSError as e:
        raise UserError(f'could not write {dest}: {e.strerror or e} (nothing was changed there); '
                        'free some space or choose another folder, and run the command again') from e
    finally:
        shutil.rmtree(stage, ignore_errors=True)
