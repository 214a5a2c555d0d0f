"""Cold Diffusion, blur (Bansal, Borgnia, Chu, Li, Kazemi, Huang, Goldblum, Geiping and Goldstein, 2022).

There is no noise: x_s is the image after s blurs, the network predicts x₀ (L1 loss), and a step of the paper's
improved sampler is

    x_{s−1} = x_s − blur_s(x̂₀) + blur_{s−1}(x̂₀),

exact for any x̂₀ as far as blur is linear in s, and otherwise for an exact x̂₀. Only the start is random.

There are two blurs (--cold-blur) and two starts (--cold-start), since a start must be a state seen in training:
- `paper`: 50 cumulative 11×11 kernels of standard deviation 0.35 + 0.01·i, i = 0…49 (about 4.3 pixels in all). It
  only goes with the start `blurred`, from blurred training images: restoration, as for the paper's FID of 80.08, not
  unconditional generation.
- `strong`: Gaussian blurs from 0.5 pixels to 1.25 image widths, evenly spaced in the logarithm; the last level is a
  constant colour to within 0.05 %. It goes with both starts; `colours` draws that colour from a Gaussian fitted to the
  mean colours of the training images, with 0.002 of noise to break the symmetry (from memory of the paper). The levels
  are ours, modelled on IHDM's.

Also ours: edges are reflecting (so that blur is diagonal in the DCT, with a kernel's cosine series as its
eigenvalues), and s goes into the U-Net's embedding unscaled. The authors' code may treat edges differently.
"""

import dataclasses
import functools
import math

import click
import torch

from dnnlib import UserError, chosen
from torch_utils.constants import constant
from torch_utils.distributed import unwrapped
from training.loss import augment
from training.precond import Precond
from training.samplers import check_steps, evaluate
from training.system import Option, System
from warm.bands import MAX_LEVELS, Bands, diffuse, spread_blurs, spread_levels
from warm.blur import dct2, filter_bands, idct2, log_blur_mask
from warm.starts import BLURRED_IMAGES, DATA, TrainingImages

KERNEL_REACH = 5  # an 11×11 kernel
COLOUR_NOISE = 0.002


def kernel_gains(first, last, n):
    """Eigenvalues of the paper's kernels i = first … last − 1 along one axis of N pixels: float64 [last − first, N]."""
    std = 0.35 + 0.01 * torch.arange(first, last, dtype=torch.float64, device='cpu')
    j = torch.arange(-KERNEL_REACH, KERNEL_REACH + 1, dtype=torch.float64, device='cpu')
    kernels = torch.exp(-j.square() / (2 * std[:, None].square()))
    kernels = kernels / kernels.sum(dim=1, keepdim=True)
    k = torch.arange(n, dtype=torch.float64, device='cpu')
    return kernels @ torch.cos(math.pi / n * j[:, None] * k)


def kernel_log_gains(num_steps, n):
    """Log gain of each band after s = 0 … num_steps of the paper's kernels: float64 [num_steps + 1, N, N]."""
    rows = kernel_gains(0, num_steps, n).log().cumsum(0)
    rows = torch.cat([rows.new_zeros([1, n]), rows])
    return rows[:, :, None] + rows[:, None, :]


def strong_log_gains(num_steps, n):
    """Log gain of each band under Gaussian blurs of 0.5 to 1.25·N pixels: float64 [num_steps + 1, N, N], 0 at s = 0."""
    return log_blur_mask(spread_blurs(0.5, 1.25 * n, num_steps), n).squeeze(1)


BLURS = {'paper': kernel_log_gains, 'strong': strong_log_gains}


@constant
def log_gains(name, num_steps, n, device=torch.device('cpu')):
    """The table of log gains of BLURS[name], on a device."""
    return BLURS[name](num_steps, n).to(device)


@dataclasses.dataclass(frozen=True)
class ColdProcess:
    """Blur without noise over steps 0 … num_steps."""

    blur: str = 'paper'
    num_steps: int = 50

    def __post_init__(self):
        chosen('--cold-blur', self.blur, BLURS)
        if not 2 <= self.num_steps <= MAX_LEVELS:
            raise UserError(f'--cold-steps={self.num_steps} is too few or too many; give 2 to {MAX_LEVELS}')

    def check(self, n):
        """Raise UserError if there are more of the paper's kernels than can blur N×N images.

        The wider the Gaussian, the more of it the 11 taps cut off, until the kernel inverts fine detail. Once one
        kernel does, all wider ones do, so it is enough to check the last.
        """
        if self.blur == 'paper' and (kernel_gains(self.num_steps - 1, self.num_steps, n) <= 0).any():
            raise UserError(f"--cold-steps={self.num_steps} is too many for the paper's kernels, the widest of which "
                            f'no longer blur images of {n} pixels but invert their detail; give fewer, such as '
                            f'{ColdProcess.num_steps}, or --cold-blur=strong')

    def at(self, s, n):
        """`Bands` of N×N images at steps s, an integer tensor ([] or [B, 1, 1, 1]) on their device."""
        table = log_gains(self.blur, self.num_steps, n, s.device)
        log_signal = table.index_select(0, s.flatten()).reshape(*s.shape[:2], n, n)
        return Bands(log_signal, torch.zeros(s.shape, dtype=torch.float64, device=s.device))


class ColdPrecond(Precond):
    """x̂₀ = net(x_s, s): the second argument, σ in other networks, is the number of blurs s in 1…T.

    Args:
        cold_blur: A name in BLURS.
        cold_steps: T.
    """

    def __init__(self, *args, cold_blur=ColdProcess.blur, cold_steps=ColdProcess.num_steps, **network):
        process = ColdProcess(cold_blur, cold_steps)
        super().__init__(dict(cold_blur=cold_blur, cold_steps=cold_steps), 1, cold_steps, 1, *args, **network)
        process.check(self.img_resolution)
        self.process = process

    def scalings(self, sigma):
        return 0, 1, 1, sigma


def cold_loss(net, images, labels=None, augment_pipe=None):
    """|net(x_s, s) − x₀|, s uniform in 1…T; `net` may be wrapped. Draws s [B, 1, 1, 1], then the augmentation."""
    process = unwrapped(net).process
    s = torch.randint(1, process.num_steps + 1, [len(images), 1, 1, 1], device=images.device)
    y, augment_labels = augment(images, augment_pipe)
    x_s = diffuse(y, torch.zeros_like(y), process.at(s, y.shape[-1]))
    return (net(x_s, s, labels, augment_labels=augment_labels) - y).abs()


def restoration_step(x, x0, here, there):
    """x − blur_s(x̂₀) + blur_{s′}(x̂₀).

    Args:
        x: State [B, C, N, N]: images in [−1, 1], blurred.
        x0: The network's x̂₀, shaped like x.
        here, there: `Bands` at steps s and s′ < s (`ColdProcess.at`); only their signal counts, there is no noise.

    Returns:
        The next state, float64 [B, C, N, N].
    """
    return idct2(dct2(x) + (there.signal - here.signal) * dct2(x0))


def blurred_start(images, last):
    """Make start(latents, class_labels, randn_like), which draws training images blurred to the last level."""
    def start(latents, class_labels, randn_like):
        return filter_bands(images.draw(latents, class_labels, randn_like), last.signal.to(latents.device))
    return start


def colour_start(images, last):
    """Make start(latents, class_labels, randn_like): constant colours like the training images' means, a little noise.

    The class is ignored: one Gaussian is fitted to the colours of all images, and only the network knows the classes.
    """
    mean, covariance = images.colours()
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp(min=0).sqrt()

    def start(latents, class_labels, randn_like):
        z = randn_like(latents.new_empty([*latents.shape[:2], 1, 1], dtype=torch.float64))
        colours = mean.to(z.device) + z.flatten(1) @ root.to(z.device).T
        return colours[:, :, None, None] + COLOUR_NOISE * latents.to(torch.float64)
    return start


STARTS = {'blurred': blurred_start, 'colours': colour_start}
PRIORS = {'blurred': BLURRED_IMAGES, 'colours': 'mean colours of training images'}  # as recorded with scores
DEFAULT_START = 'blurred'


def cold_sampler(net, latents, class_labels=None, randn_like=torch.randn_like, start=None,
                 num_steps=ColdProcess.num_steps):
    """Sample from `start` back through num_steps of the network's steps, one evaluation each.

    Args:
        net: x̂₀-predictor with a `process`.
        latents: Standard normal [B, C, N, N].
        class_labels: [B, label_dim], or None.
        randn_like: Source of random numbers for the start.
        start: start(latents, class_labels, randn_like) → state at the last step, see STARTS.
        num_steps: At most the network's.

    Returns:
        float64 images [B, C, N, N].
    """
    steps = spread_levels(num_steps, net.process.num_steps)
    x = start(latents, class_labels, randn_like)
    for s, s_next in zip(steps[:-1], steps[1:]):
        here, there = (net.process.at(torch.full([], j, device=x.device), x.shape[-1]) for j in (s, s_next))
        x = restoration_step(x, evaluate(net, x, s, class_labels), here, there)
    return x


def make_cold_sampler(net, num_steps=None, data=None, cold_start=DEFAULT_START):
    """`cold_sampler` with its options checked; by default as many steps as the network has."""
    process = net.process
    num_steps = process.num_steps if num_steps is None else num_steps
    check_steps(num_steps, at_most=process.num_steps)
    make_start = chosen('--cold-start', cold_start, STARTS)
    if cold_start == 'colours' and process.blur == 'paper':
        raise UserError("--cold-start=colours needs a blur that leaves nothing but a colour; train with "
                        '--cold-blur=strong, or use --cold-start=blurred')
    last = process.at(torch.full([], process.num_steps), net.img_resolution)
    return functools.partial(cold_sampler, start=make_start(TrainingImages(data, net), last), num_steps=num_steps)


def cold_facts(net, options):
    """What the samples start from, and the names of the blur and the start, defaults included."""
    start = options.get('cold_start', DEFAULT_START)
    return dict(prior=PRIORS[start], cold_blur=net.process.blur, cold_start=start)


COLD = System(
    name='cold',
    title='Cold Diffusion',
    paper='Bansal et al. 2022, blur',
    network_class=ColdPrecond,
    loss=lambda net: cold_loss,
    sampler=make_cold_sampler,
    sample_options=('num_steps',),
    describe=cold_facts,
    own_sample_options=(
        DATA,
        Option('cold_start', DEFAULT_START, 'What Cold Diffusion starts from', type=click.Choice(list(STARTS))),
    ),
    network_options=(
        Option('cold_blur', ColdProcess.blur, 'Blur of Cold Diffusion', type=click.Choice(list(BLURS))),
        Option('cold_steps', ColdProcess.num_steps, 'Number of blurs', type=int),
    ),
)
