"""Recording and drawing the reverse process: the state x, the estimates D, R and x̂₀ = D + R at every noise level."""

import dataclasses
import io
import pathlib

import imageio
import numpy as np
import torch

from dnnlib import UserError
from dnnlib.files import atomic_write
from training.acceleration import uncompiled
from training.generation import generate_batch
from training.pictures import as_hwc, tile
from training.pixels import to_uint8

ROWS = ('x', 'D', 'R', 'x̂₀')
MAX_COLUMNS = 9  # noise levels in a still picture
FRAME_SECONDS = 0.15
ANIMATIONS = {'.gif': 'GIF-PIL', '.mp4': 'FFMPEG'}  # file ending → imageio's writer
ENDINGS = ('.png', *ANIMATIONS)


@dataclasses.dataclass
class Frame:
    """One noise level of a batch: β, α (0 without blur), and x, D, R [B, C, H, W] float32 on the CPU.

    β is the noise level given to the network; for Cold Diffusion, the number of blurs.
    """

    beta: float
    alpha: float
    x: torch.Tensor
    D: torch.Tensor
    R: torch.Tensor

    @property
    def clean(self):
        """x̂₀ = D + R."""
        return self.D + self.R


class Watch:
    """Wrapper that records a network's inputs and outputs; samplers can't tell it from the network itself.

    If a sampler evaluates a noise level twice (Heun: first at the predictor, then at the corrected state), the
    second evaluation is kept.
    """

    def __init__(self, net):
        self.net, self._frames = net, {}

    def __getattr__(self, name):
        return self._denoise_deblur if name == 'denoise_deblur' and hasattr(self.net, name) else getattr(self.net, name)

    def __call__(self, x, sigma, *args, **kwargs):
        D = self.net(x, sigma, *args, **kwargs)
        self._keep(x, sigma, 0, D, torch.zeros_like(D))
        return D

    def _denoise_deblur(self, x, sigma, class_labels=None, alpha=None, *args, **kwargs):
        D, R = self.net.denoise_deblur(x, sigma, class_labels, alpha, *args, **kwargs)
        self._keep(x, sigma, self.net.family.default.alpha(sigma) if alpha is None else alpha, D, R)
        return D, R

    def _keep(self, x, sigma, alpha, D, R):
        # All images of a batch have the same levels, whether given as numbers or per image.
        beta, alpha = (float(torch.as_tensor(level).flatten()[0]) for level in (sigma, alpha))
        images = (t.detach().to('cpu', torch.float32) for t in (x, D, R))
        # A computed level may differ from the grid's in its last digits.
        self._frames[f'{beta:.9g}'] = Frame(beta, alpha, *images)

    @property
    def frames(self):
        """The recorded frames, from the highest noise level to the lowest."""
        return sorted(self._frames.values(), key=lambda frame: -frame.beta)


def watch(net, system, seeds, options=None, class_idx=None):
    """Generate the images of `seeds` and return the frames of their reverse process, the images as the last frame.

    Args:
        net, system, options: As for `System.make_sampler`.
        seeds: One integer per image.
        class_idx: As for `generate_batch`.
    """
    watched = Watch(net)
    with uncompiled(net):  # these few images are not worth the minutes that another batch size takes to compile
        images = generate_batch(watched, seeds, system.make_sampler(watched, options), class_idx)
    images = images.to('cpu', torch.float32)
    return [*watched.frames, Frame(0.0, 0.0, images, images, torch.zeros_like(images))]


def visible(frame):
    """The four rows of a frame as uint8 images.

    x is divided by its own standard deviation where that exceeds 1, the most that images can have: noisy states are
    scaled, states that are only blurred are not. R, tiny at small blur, is divided by three times its own standard
    deviation. D and x̂₀ are shown as they are.
    """
    spread = 3 * frame.R.std()
    R = frame.R / spread if spread > 0 else frame.R
    return [to_uint8(t).numpy() for t in (frame.x / frame.x.std().clamp(min=1), frame.D, R, frame.clean)]


def pick(frames, count):
    """`count` of the frames, evenly spaced, including the first and the last."""
    index = np.unique(np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int))
    return [frames[i] for i in index]


def sheet(frames):
    """uint8 [C, H, W]: for each image of the batch the rows x, D, R, x̂₀, and a column for each noise level."""
    shown = [visible(frame) for frame in pick(frames, MAX_COLUMNS)]
    images = [column[row][i] for i in range(len(shown[0][0])) for row in range(len(ROWS)) for column in shown]
    return tile(np.stack(images), columns=len(shown))


def panels(frame):
    """uint8 [C, H, W]: x, D, R, x̂₀ side by side, a row for each image of the batch."""
    rows = visible(frame)
    return tile(np.stack([row[i] for i in range(len(rows[0])) for row in rows]), columns=len(ROWS))


def check_writer(path):
    """Raise UserError for a file that save_trajectory could not write, before anything is computed."""
    ending = pathlib.Path(path).suffix.lower()
    if ending not in ENDINGS:
        raise UserError(f"--trajectory={path} does not end in {', '.join(ENDINGS)}; choose one of these formats")
    if ending == '.mp4':
        try:
            import imageio_ffmpeg  # noqa: F401  (imageio finds it on its own)
        except ImportError as e:
            raise UserError(f'writing {path} needs the package imageio-ffmpeg; install it with '
                            '`pip install imageio-ffmpeg`, or choose a .gif or .png file') from e


def save_trajectory(path, frames):
    """Write the frames as a still picture (.png: `sheet`) or an animation (.gif, .mp4: `panels`).

    Raises:
        UserError: another extension, or no writer for the format.
    """
    check_writer(path)
    ending = pathlib.Path(path).suffix.lower()
    encoded = io.BytesIO()
    if ending == '.png':
        imageio.imwrite(encoded, as_hwc(sheet(frames)), format='PNG-PIL')
    else:
        pictures = [as_hwc(panels(frame)) for frame in frames]
        timing = {'duration': FRAME_SECONDS * 1000, 'loop': 0} if ending == '.gif' else {'fps': 1 / FRAME_SECONDS}
        imageio.mimwrite(encoded, pictures, format=ANIMATIONS[ending], **timing)
    with atomic_write(path) as f:
        f.write(encoded.getvalue())
