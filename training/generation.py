"""From seeds to images: latents and classes per seed, batches over ranks."""

import numpy as np
import torch

from dnnlib import UserError
from torch_utils import distributed as dist
from training.acceleration import is_compiled
from training.pixels import to_uint8
from training.samplers import StackedRandomGenerator

BATCH = 64  # images at a time by default
GPU_BATCH = 512  # the same on a GPU with memory to spare; more is no faster there
GPU_SHARE = 0.25  # share of its memory that the features of a batch may take


def check_class(net, class_idx, name='--class'):
    """Raise UserError for a class index that the network does not have; `name` is the user's name for it."""
    if class_idx is None:
        return
    if not net.label_dim:
        raise UserError(f'{name}={class_idx} needs a class-conditional network, but this one is unconditional; '
                        f'leave {name} out')
    if not 0 <= class_idx < net.label_dim:
        raise UserError(f'{name}={class_idx} is out of range: this network has the classes 0 to {net.label_dim - 1}')


@torch.no_grad()
def generate_batch(net, seeds, sampler, class_idx=None, size=None):
    """Images of `seeds` [B]: latents, class and sampler noise come from each seed's own generator.

    Args:
        net: Preconditioned network on its device, in evaluation mode.
        seeds: B integers.
        sampler: callable(latents, class_labels, randn_like) (System.make_sampler).
        class_idx: Class of all images, or None for one drawn per seed; the draw is made in either case.
        size: Batch size for a compiled network, at least B: it would recompile for B images. Seeds are repeated to
            fill the batch, and the surplus is dropped. Other networks draw B.

    Returns:
        Floating-point images [B, C, H, W], nominally in [−1, 1].
    """
    if size is not None and size > len(seeds) and is_compiled(net):
        filled = [seeds[i % len(seeds)] for i in range(size)]
        return generate_batch(net, filled, sampler, class_idx)[:len(seeds)]
    device = next(net.parameters()).device
    rnd = StackedRandomGenerator(device, seeds)
    # An explicit dtype: a seed gives the same image whatever PyTorch's default is.
    latents = rnd.randn([len(seeds), net.img_channels, net.img_resolution, net.img_resolution], device=device,
                        dtype=torch.float32)
    class_labels = None
    if net.label_dim:
        index = rnd.randint(net.label_dim, size=[len(seeds)], device=device)
        if class_idx is not None:
            index = torch.full_like(index, class_idx)
        class_labels = torch.nn.functional.one_hot(index, net.label_dim).to(torch.float32)
    return sampler(latents, class_labels, rnd.randn_like)


def check_finite(images, seeds):
    """Raise UserError if an image of `seeds` has NaN or infinite values, which `to_uint8` would hide.

    On a GPU the host waits for the images, once per batch.
    """
    finite = images.isfinite().flatten(1).all(dim=1)
    if not finite.all():
        bad = [seed for seed, ok in zip(seeds, finite.tolist()) if not ok]
        raise UserError(f'the network drew NaN or infinite values for seed {bad[0]} ({len(bad)} of {len(seeds)} images '
                        'of its batch); it is damaged or its training went wrong: use another snapshot, or '
                        '--precision=fp32 if it was fp16')


def default_batch(net):
    """A batch size that suits the network's device: BATCH, or on a large GPU a power of two up to GPU_BATCH.

    It depends only on the network and the kind of GPU, not on what else the GPU holds: an image's last bits
    depend on the batch it is drawn in.
    """
    device = next(net.parameters()).device
    if device.type != 'cuda':
        return BATCH
    features = net.model.features_per_image()
    if features is None:
        return BATCH
    image_bytes = 4 * 2 * features  # what is kept, in float32, and about as much again to compute with
    fitting = GPU_SHARE * torch.cuda.get_device_properties(device).total_memory / image_bytes
    return max(BATCH, min(GPU_BATCH, 1 << int(np.log2(max(fitting, 1)))))


def generate_images(net, seeds, sampler, max_batch=BATCH, class_idx=None, wanted=None,
                    must_be_finite=False):
    """Yield (seeds, uint8 images [B, C, H, W]) for this rank's share of `seeds`, in batches.

    With `wanted` (a set), yield only those seeds. The batches are still those of all seeds, and are drawn whole: an
    image's rounding depends on its batch, and images drawn later must equal an uninterrupted run's. A compiled network
    draws all batches at the size of the first.

    With `must_be_finite`, UserError for an image with NaN or infinite values; otherwise they are cast as they are:
    training goes on whatever its pictures show.
    """
    batches = [seeds[i:i + max_batch] for i in range(0, len(seeds), max_batch)]
    if wanted is not None:
        batches = [batch for batch in batches if not wanted.isdisjoint(batch)]
    for batch in batches[dist.get_rank()::dist.get_world_size()]:
        drawn = generate_batch(net, batch, sampler, class_idx, size=min(max_batch, len(seeds)))
        if must_be_finite:
            check_finite(drawn, batch)
        images = to_uint8(drawn)
        rows = [i for i, seed in enumerate(batch) if wanted is None or seed in wanted]
        # Taking rows copies their numbers to the GPU, for which the host would wait.
        yield [batch[i] for i in rows], images if len(rows) == len(batch) else images[rows]


def gather_images(net, seeds, sampler):
    """All images of `seeds` as one uint8 array [N, C, H, W] in the order of `seeds`, on every rank."""
    share = -(-len(seeds) // dist.get_world_size())  # spread over the ranks, however few the seeds
    parts = [(s, x.cpu().numpy()) for s, x in generate_images(net, seeds, sampler, min(BATCH, share))]
    images = {}
    for rank_parts in dist.gather_objects(parts):
        for part_seeds, part_images in rank_parts:
            images.update(zip(part_seeds, part_images))
    return np.stack([images[seed] for seed in seeds])
