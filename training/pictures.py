"""uint8 images [C, H, W] as pictures: Pillow images and contact sheets."""

import numpy as np
import PIL.Image

from dnnlib.files import atomic_write


def as_hwc(image):
    """uint8 image [C, H, W] → [H, W] with one channel, [H, W, 3] with three."""
    return image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0))


def to_pil(image):
    """uint8 image [C, H, W] → Pillow image: one channel as L, three as RGB."""
    return PIL.Image.fromarray(as_hwc(image))


def tile(images, columns=None, min_cell=64, gap=2):
    """uint8 images [N, C, H, W] → one [C, H', W'], row by row on grey.

    Images narrower than `min_cell` are enlarged by an integer factor; `gap` pixels of grey surround each.
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


def save_grid(path, images):
    """Write uint8 images [N, C, H, W] as one contact sheet (`tile`)."""
    with atomic_write(path) as f:
        to_pil(tile(images)).save(f, format='PNG')
