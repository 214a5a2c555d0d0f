"""The files of generate.py: where each seed's image goes, what its folder may hold, writing in the background."""

import concurrent.futures
import contextlib
import json
import os
import pathlib
import re

import torch

from dnnlib import UserError
from dnnlib.files import ABANDONED_SEC, atomic_write, make_dirs, remove_temporary_files
from dnnlib.json_files import read_object
from dnnlib.text import excerpt, format_int_list
from training.image_archive import find_images, open_archive
from training.image_codec import PNG_END, PNG_HEADER_BYTES, png_shape
from training.pictures import to_pil

RECORD = 'generation.json'
SEED_NAME = re.compile(r'(?:\d{6,}/)?(\d{6,18})\.png')  # what `image_path` gives, relative to OUTDIR
WRITERS = 2  # threads; their work, compression and disk writes, does not block the sampler's thread
QUEUED = 4  # batches that may wait to be written


def image_path(outdir, seed, subdirs=False):
    """OUTDIR/SEED.png, the seed with six digits; with `subdirs`, in a folder for each 1000 seeds."""
    folder = pathlib.Path(outdir) / f'{seed - seed % 1000:06d}' if subdirs else pathlib.Path(outdir)
    return folder / f'{seed:06d}.png'


def save_png(path, image):
    """Write uint8 image [C, H, W] as PNG; the file appears only when it is complete."""
    tmp = path.with_name(f'.tmp-{os.getpid()}-{path.name}')  # another process may be writing the same image
    try:
        to_pil(image).save(tmp, format='PNG')
        os.replace(tmp, path)
    except OSError as e:
        tmp.unlink(missing_ok=True)
        raise UserError(f'could not write {path}: {e.strerror or e}; free some space and run the same command again '
                        '(finished images are kept)') from e


def remaining_seeds(outdir, seeds, subdirs, settings, difference, overwrite=False):
    """The seeds whose images OUTDIR lacks, or holds cut off, after checking that all there were made in the same way.

    `settings` (plain JSON values: everything that determines the images) is kept in OUTDIR/generation.json and applies
    to every image in the folder: fid.py copies it beside their score. A record of equal images is kept as it is.

    Args:
        outdir, subdirs: As for `image_path`.
        seeds: The seeds requested, each once.
        settings: What goes into a new record.
        difference: difference(record), of a dict → how its images differ from those of `settings`, in words, or None.
        overwrite: Draw all seeds again. If existing images are of other settings, all must be among the seeds; they are
            deleted before the new record is written, so that after an interruption no old one passes for new.

    Raises:
        UserError: OUTDIR holds images of other or unknown settings, or a seed's image in the other --subdirs layout.
    """
    make_dirs(outdir)
    for folder in {image_path(outdir, seed, subdirs).parent for seed in seeds}:
        remove_temporary_files(folder, ABANDONED_SEC)
    record = pathlib.Path(outdir) / RECORD
    recorded = read_object(record)
    present = _images_in(outdir, only_seeds=record.exists())
    wanted = {_name(s, subdirs): s for s in seeds}
    _check_layout(outdir, present, seeds, subdirs)
    reason = difference(recorded) if recorded is not None else f'unknown options (no readable {RECORD})'
    if overwrite and not reason and present <= wanted.keys() and recorded.get('commit') != settings.get('commit'):
        reason = 'another version of the code'  # what replaces them all is of this one, and recorded so
    if present and reason:
        _check_all_replaced(outdir, present, wanted, reason, overwrite)
        _delete(outdir, present)
        present = set()
    if reason:
        with atomic_write(record, 'w') as f:
            json.dump(settings, f, indent=2)
    return [s for name, s in wanted.items()
            if overwrite or name not in present or not _is_complete(pathlib.Path(outdir) / name)]


def code_change_warning(outdir, version):
    """A sentence if the code may have changed since the images of `outdir` were recorded, as far as that is known.

    Args:
        outdir: Folder with images.
        version: Today's `training.provenance.code_version`.
    """
    before = (read_object(pathlib.Path(outdir) / RECORD) or {}).get('commit')
    if not before or not version or before == version and '-dirty' not in version:
        return None
    return (f'the images in {outdir} were begun by version {excerpt(before)} of the code, and this is {version}: if '
            'what draws them has changed, replace them with --overwrite')


def check_kept(outdir, seeds, subdirs, net):
    """Raise UserError if an existing image of one of the seeds does not have the network's size."""
    shape = [net.img_channels, net.img_resolution, net.img_resolution]
    for seed in sorted(seeds):
        path = image_path(outdir, seed, subdirs)
        try:
            with open(path, 'rb') as f:
                found = png_shape(f.read(PNG_HEADER_BYTES))
        except OSError as e:
            raise UserError(f'could not read {path}: {e.strerror or e}; check its permissions') from e
        if found != shape:
            raise UserError(f"{path} does not match this network's images, which are {shape[2]}x{shape[1]} pixels "
                            f'with {shape[0]} channel(s); remove it, and run the same command again')


def _is_complete(path):
    """Whether a PNG file has its end, which one that was being written when the power failed may lack."""
    try:
        with open(path, 'rb') as f:
            f.seek(-min(len(PNG_END), os.fstat(f.fileno()).st_size), os.SEEK_END)
            return f.read() == PNG_END
    except OSError:
        return True  # `check_kept` names the reason


def _name(seed, subdirs):
    """`image_path` relative to OUTDIR."""
    return image_path('', seed, subdirs).as_posix()


def _images_in(outdir, only_seeds):
    """Names of the images that fid.py would count in a folder; with `only_seeds`, of those named by a seed."""
    names = find_images(open_archive(outdir))
    return {name for name in names if not only_seeds or SEED_NAME.fullmatch(name)}


def _check_layout(outdir, present, seeds, subdirs):
    """Raise UserError if a seed's image is there already in the other layout, with --subdirs or without."""
    for seed in seeds:
        if _name(seed, not subdirs) in present:
            remedy = 'leave --subdirs out' if subdirs else 'add --subdirs'
            raise UserError(f'{outdir} already holds the image of seed {seed} as {_name(seed, not subdirs)}, and a '
                            f'second one would count it twice; {remedy}, or choose another --outdir')


def _check_all_replaced(outdir, present, wanted, reason, overwrite):
    """Raise UserError unless --overwrite is given and would replace every image of the folder."""
    left = sorted(present - wanted.keys())
    if overwrite and not left:
        return
    if not left:
        remedy = ', or replace them with --overwrite'
    elif all(SEED_NAME.fullmatch(name) for name in left):
        text = format_int_list(sorted(int(SEED_NAME.fullmatch(name)[1]) for name in left))
        remedy = f', or replace all of them: --overwrite with --seeds that include {excerpt(text, 100)}'
    else:
        remedy = f', one without such images as {left[0]}'
    raise UserError(f'{outdir} holds {len(present)} images that were made with {reason}; '
                    f'choose another --outdir{remedy}')


def _delete(outdir, names):
    for name in names:
        path = pathlib.Path(outdir) / name
        try:
            path.unlink()
        except OSError as e:
            raise UserError(f'could not replace {path}: {e.strerror or e}; choose another --outdir') from e


def write_images(outdir, batches, subdirs=False, progress=lambda n: None):
    """Write the batches of `generate_images` as PNG files while the next ones are drawn.

    `progress` is called with the size of each batch that has been written.

    Raises:
        UserError: a file cannot be written; those before it are kept.
    """
    with contextlib.closing(batches), concurrent.futures.ThreadPoolExecutor(WRITERS, 'png') as pool:
        pending = []

        def finish(left):
            while len(pending) > left:
                progress(pending.pop(0).result())
        try:
            for seeds, images in batches:
                pending.append(pool.submit(_write_batch, outdir, seeds, *to_host(images), subdirs))
                finish(QUEUED)
            finish(0)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def to_host(images):
    """(images in CPU memory, event): from a GPU, the copy is complete only at the event, not on return."""
    if not images.is_cuda:
        return images, None
    copy = torch.empty(images.shape, dtype=images.dtype, pin_memory=True).copy_(images, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return copy, event


def _write_batch(outdir, seeds, images, event, subdirs):
    if event is not None:
        event.synchronize()
    for seed, image in zip(seeds, images.numpy()):
        path = image_path(outdir, seed, subdirs)
        if subdirs:
            make_dirs(path.parent)
        save_png(path, image)
    return len(seeds)
