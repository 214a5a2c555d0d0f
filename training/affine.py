"""Affine maps of images: their matrices, the resampling that warps pixels, the product that mixes colours.

Everything is computed on the images' device, with sizes that follow from shapes alone: the host never reads
a value back, so a call can be compiled or, once its constants are there, recorded as a CUDA graph.
"""

import math

import torch
import torch.nn.functional as F

from torch_utils.constants import constant
from torch_utils.precision import float32_products

# Low-pass filter of the sym6 wavelet (Daubechies' least asymmetric one with 12 taps), with sum √2. It is
# orthonormal under shifts by two, so filtering up and then down returns the original image.
SYM6 = [0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633,
        0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252,
        -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148]
LAG = 5  # taps before the centre of the filter


def matrix(*rows):
    """Matrices [N, R, C] from R rows of C entries, each a number or a tensor [N] (at least one tensor)."""
    like = next(e for row in rows for e in row if torch.is_tensor(e))
    entries = [e if torch.is_tensor(e) else torch.full_like(like, e) for row in rows for e in row]
    return torch.stack(entries, dim=-1).reshape(-1, len(rows), len(rows[0]))


def compose(A, B):
    """Product A·B of two stacks [N, K, K]; None stands for the identity.

    Written as sums of products because a matrix product may be rounded to TF32 or half precision,
    which would visibly shift coordinates.
    """
    if A is None or B is None:
        return B if A is None else A
    return (A[:, :, :, None] * B[:, None, :, :]).sum(dim=2)


# -- the plane: [N, 3, 3] on (x, y, 1) in pixels from the image's centre, y down

def zoom(a, b):
    """Scale x by a and y by b, both [N]."""
    return matrix([a, 0, 0], [0, b, 0], [0, 0, 1])


def rotation(theta):
    """Rotate by theta [N] radians."""
    c, s = theta.cos(), theta.sin()
    return matrix([c, -s, 0], [s, c, 0], [0, 0, 1])


def shift(x, y):
    """Move by x and y pixels, both [N]."""
    return matrix([1, 0, x], [0, 1, y], [0, 0, 1])


# -- colours: [N, 4, 4] on (r, g, b, 1), with values in [-1, 1]

def colour_map(luma=1, chroma=1, quarter_turn=0, offset=0):
    """Scale the component along the grey axis by `luma`, and scale and rotate the one orthogonal to it.

    The latter is multiplied by chroma + i·quarter_turn, where i rotates it by 90° about the grey axis;
    `offset` is then added to every channel. Each argument is a number or a tensor [N].
    """
    diagonal = (luma + 2 * chroma) / 3
    mean = (luma - chroma) / 3
    odd = quarter_turn / math.sqrt(3)
    rest = (mean - odd, mean + odd)
    return matrix([diagonal, rest[0], rest[1], offset], [rest[1], diagonal, rest[0], offset],
                  [rest[0], rest[1], diagonal, offset], [0, 0, 0, 1])


@float32_products(tf32=False)  # TF32 would round the images' own values
def recolour(images, C):
    """Apply colour matrices C [N, 4, 4] to images [N, 3, H, W]; grey ones [N, 1, H, W] get the channels' mean."""
    C = C[:, :3].to(images.dtype)
    if images.shape[1] == 1:
        C = C.mean(dim=1)
        return images * C[:, :3].sum(dim=1)[:, None, None, None] + C[:, 3, None, None, None]
    return (C[:, :, :3] @ images.flatten(2) + C[:, :, 3:]).unflatten(2, images.shape[2:])


# -- resampling

def reflect(index, size):
    """Map any integer index into 0…size−1 by mirroring at the outermost pixels, which are not repeated."""
    period = max(2 * (size - 1), 1)
    index = index % period
    return torch.minimum(index, period - index) if size > 1 else index


def filter_taps(k, dtype):
    """SYM6[k] for a tensor of integers k, zero where there is no such tap."""
    return torch.tensor([0, *SYM6, 0], dtype=dtype)[(k + 1).clamp(0, len(SYM6) + 1)]


@constant
def upsampling_matrix(size, dtype, device):
    """[2(3·size − 2), size]: mirror-pad `size` pixels by size − 1 on each side, then upsample by 2 with the filter.

    Row n is u[n] = Σ_k h[k] z[n + 5 − k], where z[2j] is pixel j of the padded line and 0 elsewhere.
    """
    j, n = torch.arange(size), torch.arange(2 * (3 * size - 2))
    # A pixel appears in the padded line up to three times: itself and its two mirror images.
    # An outermost pixel coincides with one of its mirror images, and counts once.
    places = torch.stack([j, -j, 2 * (size - 1) - j]) + size - 1
    counts = torch.stack([j >= 0, j > 0, j < size - 1])
    taps = filter_taps(n[None, :, None] + LAG - 2 * places[:, None, :], dtype)
    return (taps * counts[:, None, :]).sum(dim=0).to(device)


@constant
def downsampling_matrix(size, dtype, device):
    """[size, 2·size + 10]: y[j] = Σ_k h[k] v[2j − 5 + k], where the first column is v[−5]."""
    j, r = torch.arange(size), torch.arange(2 * size + len(SYM6) - 2)
    return filter_taps(r[None, :] - 2 * j[:, None], dtype).to(device)


@constant
def sample_positions(size, device):
    """[2·size + 10]: positions of v[−5]…, in pixels from the centre of the line."""
    n = torch.arange(2 * size + len(SYM6) - 2) - LAG
    return ((n + 0.5) / 2 - size / 2).to(device)


@float32_products(tf32=False)
def warp(images, M):
    """Warp `images` [N, C, H, W]: look each pixel up at the position that M [N, 3, 3] maps it to.

    Band-limited as in StyleGAN2-ADA (Karras et al. 2020, appendix B): upsample by 2 with an orthogonal
    wavelet filter, look up bilinearly, filter down. Beyond its border the image is mirrored, once per
    side; further out it is zero. Padding, zero insertion and filter of one axis form one constant matrix,
    so filtering up or down takes one matrix product per axis.
    """
    H, W = images.shape[2:]
    like = dict(dtype=images.dtype, device=images.device)
    up_y, down_y = upsampling_matrix(H, **like), downsampling_matrix(H, **like)
    up_x, down_x = (up_y, down_y) if W == H else (upsampling_matrix(W, **like), downsampling_matrix(W, **like))
    x = sample_positions(W, images.device)[None, None, :] + 0.25
    y = sample_positions(H, images.device)[None, :, None] + 0.25
    M = M[:, :, :, None, None]
    # In grid_sample's units the mirrored canvas, 3W − 2 by 3H − 2 pixels, spans −1 to 1.
    grid_x = (M[:, 0, 0] * x + M[:, 0, 1] * y + M[:, 0, 2] - 0.25) / (1.5 * W - 1)
    grid_y = (M[:, 1, 0] * x + M[:, 1, 1] * y + M[:, 1, 2] - 0.25) / (1.5 * H - 1)
    canvas = up_y @ images @ up_x.T
    grid = torch.stack([grid_x, grid_y], dim=-1).to(images.dtype)
    v = F.grid_sample(canvas, grid, mode='bilinear', padding_mode='zeros', align_corners=False)
    return down_y @ v @ down_x.T
