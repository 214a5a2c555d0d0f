"""From seeds to images: latents and classes per seed, batches over ranks, PNG files that survive an interruption."""

import concurrent.futures
import contextlib
import json
import os
import pathlib
import re

import numpy as np
import PIL.Image
import torch

from dnnlib import UserError
from dnnlib.files import atomic_write, make_dirs
from dnnlib.text import excerpt, format_int_list
from training.image_archive import find_images, open_archive
from training.image_codec import PNG_HEADER_BYTES, png_shape
from training.pixels import to_uint8
from training.samplers import StackedRandomGenerator
from torch_utils import distributed as dist


def check_class(net, class_idx, name='--class'):
    """Refuse a class index that the network does not have (UserError); `name` is what the user calls it."""
    if class_idx is None:
        return
    if not net.label_dim:
        raise UserError(f'{name}={class_idx} needs a class-conditional network, but this one is unconditional; '
                        f'leave {name} out')
    if not 0 <= class_idx < net.label_dim:
        raise UserError(f'{name}={class_idx} is out of range: this network has the classes 0 to {net.label_dim - 1}')


@torch.no_grad()
def generate_batch(net, seeds, sampler, class_idx=None, **extra):
    """Images of `seeds` [B]: latents, class and sampler noise come from each seed's own generator.

    Args:
        net: Preconditioned network on its device, in evaluation mode.
        seeds: B integers.
        sampler: callable(latents, class_labels, randn_like, **extra) (System.make_sampler).
        class_idx: Class of all images, or None for one drawn per seed; drawn in either case.

    Returns:
        Floating-point images [B, C, H, W], nominally in [−1, 1].
    """
    device = next(net.parameters()).device
    rnd = StackedRandomGenerator(device, seeds)
    latents = rnd.randn([len(seeds), net.img_channels, net.img_resolution, net.img_resolution], device=device)
    class_labels = None
    if net.label_dim:
        index = rnd.randint(net.label_dim, size=[len(seeds)], device=device)
        if class_idx is not None:
            index = torch.full_like(index, class_idx)
        class_labels = torch.nn.functional.one_hot(index, net.label_dim).to(torch.float32)
    return sampler(latents, class_labels, rnd.randn_like, **extra)


BATCH = 64  # images at a time, where nothing else is said
GPU_BATCH = 512  # likewise on a GPU with memory to spare; more is no faster there
GPU_SHARE = 0.25  # of its memory that the features of a batch may take


def default_batch(net):
    """Images at a time that suit the network's device: BATCH, or on a large GPU a power of two up to GPU_BATCH.

    It depends on the network and the kind of GPU alone, not on what else the GPU holds: an image's last bits
    depend on the batch it is drawn in.
    """
    device = next(net.parameters()).device
    if device.type != 'cuda':
        return BATCH
    features = net.model.features_per_image()
    if features is None:
        return BATCH
    image_bytes = 4 * 2 * features  # what is kept, in float32, and about as much again for what is being computed
    fitting = GPU_SHARE * torch.cuda.get_device_properties(device).total_memory / image_bytes
    return max(BATCH, min(GPU_BATCH, 1 << int(np.log2(max(fitting, 1)))))


def generate_images(net, seeds, sampler, max_batch=BATCH, class_idx=None, wanted=None):
    """Yield (seeds, uint8 images [B, C, H, W]) for this rank's share of `seeds`, in batches.

    With `wanted` (a set), only those of the seeds. The batches stay those of all seeds, and are drawn whole: the
    rounding of an image depends on the batch it is in, and what is drawn later shall equal an uninterrupted run's.
    """
    batches = [seeds[i:i + max_batch] for i in range(0, len(seeds), max_batch)]
    if wanted is not None:
        batches = [batch for batch in batches if not wanted.isdisjoint(batch)]
    for batch in batches[dist.get_rank()::dist.get_world_size()]:
        images = to_uint8(generate_batch(net, batch, sampler, class_idx))
        rows = [i for i, seed in enumerate(batch) if wanted is None or seed in wanted]
        yield [batch[i] for i in rows], images[rows]


def gather_images(net, seeds, sampler, max_batch=BATCH, class_idx=None):
    """All images of `seeds` as one uint8 array [N, C, H, W] in the order of `seeds`, on every rank."""
    share = -(-len(seeds) // dist.get_world_size())  # every rank works, however few the seeds
    parts = [(s, x.cpu().numpy()) for s, x in
             generate_images(net, seeds, sampler, max(min(max_batch, share), 1), class_idx)]
    images = {seed: image for rank in dist.gather_objects(parts) for s, x in rank for seed, image in zip(s, x)}
    return np.stack([images[seed] for seed in seeds])


def as_hwc(image):
    """uint8 image [C, H, W] → [H, W] with one channel, [H, W, 3] with three."""
    return image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0))


def to_pil(image):
    """uint8 image [C, H, W] → Pillow image: one channel as L, three as RGB."""
    return PIL.Image.fromarray(as_hwc(image))


def tile(images, columns=None, min_cell=64, gap=2):
    """uint8 images [N, C, H, W] → one [C, H', W'], row by row on grey.

    Images narrower than `min_cell` are enlarged by a whole factor; `gap` pixels of grey stand around each.
    """
    zoom = max(min_cell // images.shape[-1], 1)
    images = images.repeat(zoom, axis=2).repeat(zoom, axis=3)
    n, c, h, w = images.shape
    columns = columns or int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    cells = np.full([rows * columns, c, h + gap, w + gap], 128, dtype=np.uint8)
    cells[:n, :, :h, :w] = images
    sheet = cells.reshape(rows, columns, c, h + gap, w + gap).transpose(2, 0, 3, 1, 4)
    sheet = sheet.reshape(c, rows * (h + gap), columns * (w + gap))
    return np.pad(sheet, [(0, 0), (gap, 0), (gap, 0)], constant_values=128)


def save_grid(path, images, columns=None):
    """Write uint8 images [N, C, H, W] as one contact sheet (`tile`)."""
    with atomic_write(path) as f:
        to_pil(tile(images, columns)).save(f, format='PNG')


def image_path(outdir, seed, subdirs=False):
    """OUTDIR/SEED.png with six digits; with `subdirs` in a folder for each 1000 seeds."""
    folder = pathlib.Path(outdir) / f'{seed - seed % 1000:06d}' if subdirs else pathlib.Path(outdir)
    return folder / f'{seed:06d}.png'


def save_png(path, image):
    """Write uint8 image [C, H, W] as PNG; the file appears only when it is complete."""
    tmp = path.with_name(f'.tmp-{path.name}')
    try:
        to_pil(image).save(tmp, format='PNG')
        os.replace(tmp, path)
    except OSError as e:
        tmp.unlink(missing_ok=True)
        raise UserError(f'could not write {path}: {e.strerror or e}; free some space and run the same command again, '
                        'finished images are kept') from e


RECORD = 'generation.json'
SEED_NAME = re.compile(r'(?:\d{6,}/)?(\d{6,18})\.png')  # of `image_path`, in its folder


def remaining_seeds(outdir, seeds, subdirs, settings, difference, overwrite=False):
    """The seeds whose images OUTDIR still lacks, after checking that all images there were made in the same way.

    `settings` (plain JSON values: everything that decides the images) is kept in OUTDIR/generation.json, and holds for
    every image of the folder: fid.py copies it beside their score. A record of the same images is kept as it is.

    Args:
        outdir, subdirs: As for `image_path`.
        seeds: Those asked for, each once.
        settings: What goes into a new record.
        difference: difference(record, a dict) → in words, what sets its images apart from those of `settings`, or None.
        overwrite: Draw all seeds anew. Where the images are of other settings, all of them have to be among the seeds;
            they are deleted before the new record is written, so that after an interruption no old one passes for new.

    Raises:
        UserError: OUTDIR holds images of other or unknown settings; a seed that it holds under --subdirs or without.
    """
    make_dirs(outdir)
    record = pathlib.Path(outdir) / RECORD
    recorded = _read_json(record)
    present = _images_in(outdir, only_seeds=record.exists())
    wanted = {_name(s, subdirs): s for s in seeds}
    _check_layout(outdir, present, seeds, subdirs)
    reason = difference(recorded) if isinstance(recorded, dict) else f'unknown options (no readable {RECORD})'
    if present and reason:
        _check_all_replaced(outdir, present, wanted, reason, overwrite)
        _delete(outdir, present)
        present = set()
    if reason:
        with atomic_write(record, 'w') as f:
            json.dump(settings, f, indent=2)
    return [s for name, s in wanted.items() if overwrite or name not in present]


def check_kept(outdir, seeds, subdirs, net):
    """Raise UserError if the image that is there of one of the seeds is not of the network's size."""
    shape = [net.img_channels, net.img_resolution, net.img_resolution]
    for seed in sorted(seeds):
        path = image_path(outdir, seed, subdirs)
        try:
            with open(path, 'rb') as f:
                found = png_shape(f.read(PNG_HEADER_BYTES))
        except OSError as e:
            raise UserError(f'could not read {path}: {e.strerror or e}; check its permissions') from e
        if found != shape:
            raise UserError(f'{path} is not an image of this network, which are {shape[2]}x{shape[1]} pixels with '
                            f'{shape[0]} channel(s); remove it, and run the same command again')


def _read_json(path):
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError):
        return None


def _name(seed, subdirs):
    """`image_path` within its folder."""
    return image_path('', seed, subdirs).as_posix()


def _images_in(outdir, only_seeds):
    """Names of the images that fid.py would count in a folder; of those that a seed names, if so asked."""
    names = find_images(open_archive(outdir))
    return {name for name in names if not only_seeds or SEED_NAME.fullmatch(name)}


def _check_layout(outdir, present, seeds, subdirs):
    """Raise UserError if an image of the seeds is there, but where --subdirs, or its absence, would not put it."""
    for seed in seeds:
        if _name(seed, not subdirs) in present:
            remedy = 'leave --subdirs out' if subdirs else 'add --subdirs'
            raise UserError(f'{outdir} holds the image of seed {seed} as {_name(seed, not subdirs)} already, and a '
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


WRITERS = 2  # threads; what they wait for, disk and compression, leaves the sampler's thread alone
QUEUED = 4  # batches that may wait to be written


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
    """(images in CPU memory, event): from a GPU the copy is under way until the event, which nobody waits for here."""
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
