"""Augmentation of training images, with labels that tell the network what was done.

The non-leaking augmentation of Karras et al. 2022 (EDM, appendix F.2, after StyleGAN2-ADA, Karras et
al. 2020). Each transform is one function below and one line in TRANSFORMS.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from dnnlib import UserError, chosen
from training import affine


class AugmentPipe:
    """Random transforms of a batch of images: `images, labels = pipe(images)`.

    A transform is enabled if its strength is above 0, and is applied to an image with probability
    p·strength. Random numbers come from the global generator of the images' device.

    Args:
        p: Overall probability, 0…1.
        settings: Strengths, by name in TRANSFORMS (0 unless given), and the transforms' own settings. All
            of them become attributes.

    Attributes:
        init_kwargs: All settings: AugmentPipe(**pipe.init_kwargs) is the same pipe.

    Raises:
        UserError: an unknown setting or one out of range, or images that an enabled transform cannot take.
    """

    def __init__(self, p=1, **settings):
        self.init_kwargs = {'p': p, **{t.name: 0 for t in TRANSFORMS}}
        for transform in TRANSFORMS:
            self.init_kwargs.update(transform.settings)
        for name, value in settings.items():
            chosen('augmentation setting', name, self.init_kwargs)
            self.init_kwargs[name] = value
        vars(self).update(self.init_kwargs)
        for name, value in self.init_kwargs.items():
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f'the augmentation setting {name} is {value}; give a number of at least 0')
        if self.p > 1:
            raise UserError(f'the augmentation probability p is {self.p}; give a number between 0 and 1')
        if self.translate_int_max == 0:
            raise UserError('the augmentation setting translate_int_max is 0; give a positive fraction of the image, '
                            'or leave out translate_int')

    @property
    def enabled(self):
        """The transforms of strength above 0, in draw order."""
        return [t for t in TRANSFORMS if getattr(self, t.name) > 0]

    @property
    def label_dim(self):
        """Number of label columns."""
        return sum(t.columns for t in self.enabled)

    def __call__(self, images):
        """Transform images [N, C, H, W], float in [−1, 1].

        Returns:
            The images, same shape and dtype, and labels [N, label_dim] float32: the random variates
            before scaling, all 0 for an unchanged image.
        """
        self._check(images)
        M = C = None
        labels = [torch.zeros([0, images.shape[0]], device=images.device)]
        for transform in self.enabled:
            effect, columns = transform.draw(self, images)
            if transform.kind == 'blit':
                images = effect
            elif transform.kind == 'geometry':
                M = affine.compose(M, effect)  # inverse maps, hence on the right
            else:
                C = affine.compose(effect, C)
            labels.append(torch.stack(columns).to(torch.float32))
        if M is not None:
            images = affine.warp(images, M)
        if C is not None:
            images = affine.recolour(images, C)
        return images, torch.cat(labels).T.contiguous()

    def gated(self, name, w):
        """The variates w […, N] of transform `name`, each image's kept with probability p·strength, else set to 0."""
        return torch.where(torch.rand(w.shape[-1:], device=w.device) < self.p * getattr(self, name), w, 0)

    def _check(self, images):
        if images.ndim != 4 or not images.is_floating_point():
            raise UserError(f'augmentation got a {images.dtype} tensor of shape {list(images.shape)}; '
                            'give float images [N, C, H, W] with values in [-1, 1]')
        colours = [t.name for t in self.enabled if t.kind == 'colour']
        if colours and images.shape[1] not in (1, 3):
            raise UserError(f'colour augmentation takes images of 1 or 3 channels, not {images.shape[1]}; '
                            f'leave out {", ".join(colours)}')


def _normal(images, *leading):
    return torch.randn([*leading, images.shape[0]], device=images.device)


def _signed(images, *leading):
    """Uniform in −1…1."""
    return torch.rand([*leading, images.shape[0]], device=images.device) * 2 - 1


def _choice(images, count):
    return torch.randint(count, [images.shape[0]], device=images.device)


def _where(condition, a, b):
    """Choose per image: condition is [N]."""
    return torch.where(condition[:, None, None, None], a, b)


# -- blits: pixels only change places. Each function returns the new images and the label columns, [N] each.

def xflip(pipe, images):
    """Flip horizontally."""
    w = pipe.gated('xflip', _choice(images, 2))
    return _where(w == 1, images.flip(3), images), [w]


def yflip(pipe, images):
    """Flip vertically."""
    w = pipe.gated('yflip', _choice(images, 2))
    return _where(w == 1, images.flip(2), images), [w]


def rotate_int(pipe, images):
    """Rotate by w quarter turns, built from two flips and a transposition."""
    H, W = images.shape[2:]
    if H != W:
        raise UserError(f'rotate_int turns square images only, not {W}x{H} ones; use square images or leave it out')
    w = pipe.gated('rotate_int', _choice(images, 4))
    turned_x, turned_y = (w == 1) | (w == 2), (w == 2) | (w == 3)
    images = _where(turned_x, images.flip(3), images)
    images = _where(turned_y, images.flip(2), images)
    images = _where(w % 2 == 1, images.transpose(2, 3), images)
    return images, [turned_x, turned_y]


def translate_int(pipe, images):
    """Translate by whole pixels, right and up if positive; what comes in at the border is mirrored."""
    H, W = images.shape[2:]
    limit_x, limit_y = W * pipe.translate_int_max, H * pipe.translate_int_max
    w = pipe.gated('translate_int', _signed(images, 2))
    tx, ty = (w[0] * limit_x).round(), (w[1] * limit_y).round()
    n, c, y, x = (torch.arange(size, device=images.device) for size in images.shape)
    x = affine.reflect(x - tx[:, None].to(torch.int64), W)[:, None, None, :]
    y = affine.reflect(y + ty[:, None].to(torch.int64), H)[:, None, :, None]
    return images[n[:, None, None, None], c[:, None, None], y, x], [tx / limit_x, ty / limit_y]


# -- geometry: each returns the matrix [N, 3, 3] from a pixel to the position it is looked up at, and the columns

def scale(pipe, images):
    """Zoom by 2^(0.2 w) with the default scale_std."""
    w = pipe.gated('scale', _normal(images))
    s = torch.exp2(-w * pipe.scale_std)
    return affine.zoom(s, s), [w]


def rotate_frac(pipe, images):
    """Rotate by the angle w."""
    w = pipe.gated('rotate_frac', _signed(images) * (math.pi * pipe.rotate_frac_max))
    return affine.rotation(w), [w.cos() - 1, w.sin()]


def aniso(pipe, images):
    """Stretch along direction r, and shrink by the same factor across it."""
    w, r = _normal(images), _signed(images) * math.pi
    w = pipe.gated('aniso', w)
    r = torch.where(torch.rand(r.shape, device=r.device) < pipe.aniso_rotate_prob, r, 0)
    s = w * pipe.aniso_std
    stretch = affine.compose(affine.zoom(torch.exp2(-s), torch.exp2(s)), affine.rotation(r))
    return affine.compose(affine.rotation(-r), stretch), [w * r.cos(), w * r.sin()]


def translate_frac(pipe, images):
    """Translate by w/8 of the image with the default translate_frac_std."""
    w = pipe.gated('translate_frac', _normal(images, 2))
    H, W = images.shape[2:]
    return affine.shift(-w[0] * (W * pipe.translate_frac_std), -w[1] * (H * pipe.translate_frac_std)), [w[0], w[1]]


# -- colour: each returns the matrix [N, 4, 4] from a pixel's colour to the new one, and the columns

def brightness(pipe, images):
    """Add 0.2 w to every channel with the default brightness_std."""
    w = pipe.gated('brightness', _normal(images))
    return affine.colour_map(offset=w * pipe.brightness_std), [w]


def contrast(pipe, images):
    """Multiply the colours by 2^(0.5 w) with the default contrast_std."""
    w = pipe.gated('contrast', _normal(images))
    s = torch.exp2(w * pipe.contrast_std)
    return affine.colour_map(luma=s, chroma=s), [w]


def lumaflip(pipe, images):
    """Reflect the colours about the luma axis."""
    w = pipe.gated('lumaflip', _choice(images, 2))
    return affine.colour_map(luma=1 - 2 * w.to(torch.float32)), [w]


def hue(pipe, images):
    """Rotate the colours about the luma axis by the angle w."""
    w = pipe.gated('hue', _signed(images) * (math.pi * pipe.hue_max))
    return affine.colour_map(chroma=w.cos(), quarter_turn=w.sin()), [w.cos() - 1, w.sin()]


def saturation(pipe, images):
    """Multiply the distance from the luma axis by 2^w with the default saturation_std."""
    w = pipe.gated('saturation', _normal(images))
    return affine.colour_map(chroma=torch.exp2(w * pipe.saturation_std)), [w]


class Transform(NamedTuple):
    """One line of TRANSFORMS."""

    name: str           # also the name of its strength, a setting of AugmentPipe
    kind: str           # 'blit', 'geometry' or 'colour': what `draw` returns
    columns: int        # label columns
    draw: Callable      # (pipe, images) → (new images or matrix, label columns)
    settings: dict = {}     # further settings of AugmentPipe that `draw` reads, and their defaults
    strength: float = 1     # in training, as a multiple of the probability `--augment`


# In draw order, which is also the order of the label columns. A new transform goes at the end of
# its kind, so that the draws of those before it stay the same.
TRANSFORMS = [
    Transform('xflip', 'blit', 1, xflip, strength=1e8),  # a fair coin whatever p is, unless p is 0
    Transform('yflip', 'blit', 1, yflip),
    Transform('rotate_int', 'blit', 2, rotate_int),
    Transform('translate_int', 'blit', 2, translate_int, dict(translate_int_max=0.125)),  # fraction of the image's size
    Transform('scale', 'geometry', 1, scale, dict(scale_std=0.2)),  # octaves
    Transform('rotate_frac', 'geometry', 2, rotate_frac, dict(rotate_frac_max=1)),  # half turns
    Transform('aniso', 'geometry', 2, aniso, dict(aniso_std=0.2, aniso_rotate_prob=0.5)),  # octaves
    Transform('translate_frac', 'geometry', 2, translate_frac, dict(translate_frac_std=0.125)),  # fraction of the size
    Transform('brightness', 'colour', 1, brightness, dict(brightness_std=0.2)),  # of the range −1…1
    Transform('contrast', 'colour', 1, contrast, dict(contrast_std=0.5)),  # octaves
    Transform('lumaflip', 'colour', 1, lumaflip),
    Transform('hue', 'colour', 2, hue, dict(hue_max=1)),  # half turns
    Transform('saturation', 'colour', 1, saturation, dict(saturation_std=1)),  # octaves
]


def training_strengths(names):
    """'xflip,hue' → {name: its strength in training} in the table's order.

    Raises:
        UserError: an unknown transform, or none.
    """
    wanted = [part.strip() for part in names.split(',')]
    known = {t.name: t.strength for t in TRANSFORMS}
    for name in wanted:
        chosen('--augment-with', name, known)
    return {name: strength for name, strength in known.items() if name in wanted}


def enabled_names(augment_kwargs):
    """The transforms that these arguments of AugmentPipe enable, as 'xflip,scale'; '' for None."""
    return ','.join(t.name for t in AugmentPipe(**augment_kwargs).enabled) if augment_kwargs else ''


TRAIN_AUGMENT = training_strengths('xflip,yflip,scale,rotate_frac,aniso,translate_frac')  # EDM's
