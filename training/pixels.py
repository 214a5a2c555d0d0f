"""The scale of pixels: 0…255 in files and data sets, [−1, 1] in networks (as in EDM)."""

import torch

from dnnlib import UserError

SIGMA_DATA = 0.5  # standard deviation of images in [−1, 1]: EDM's assumption


def to_float(pixels, dtype=torch.float32):
    """uint8 0…255 of any shape → [−1, 1]: x/127.5 − 1."""
    return pixels.to(dtype).div_(127.5).sub_(1)  # in place: `to` has made a copy


def to_uint8(images):
    """[−1, 1] → 0…255: x·127.5 + 128, clipped, truncated."""
    return (images * 127.5 + 128).clip(0, 255).to(torch.uint8)


def check_floats(x):
    """Raise UserError for images of whole numbers: pixel values 0…255, where −1…1 is meant."""
    if not x.is_floating_point():
        raise UserError(f'images of type {str(x.dtype).removeprefix("torch.")} are pixel values; scale them to [−1, 1] '
                        'first: x.float() / 127.5 - 1')
