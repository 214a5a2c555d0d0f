"""Preconditioned denoisers D(x; σ) = c_skip·x + c_out·F(c_in·x; c_noise) (Karras et al. 2022, Eq. 7 and Table 1).

One class per column of that table; they differ in `scalings` and in the range of σ.
"""

import copy
import math

import torch

from dnnlib import UserError, chosen
from dnnlib.text import excerpt
from torch_utils.precision import PRECISIONS, float32_products
from training.pixels import SIGMA_DATA, check_floats
from training.schedules import (IDDPM_C_1, IDDPM_C_2, IDDPM_M, VE_SIGMA_MAX, VE_SIGMA_MIN, VP_BETA_D, VP_BETA_MIN,
                                VP_EPSILON_T, iddpm_noise_levels, vp_sigma, vp_sigma_inv)
from training.unet import MODELS


def edm_scalings(sigma, sigma_data=SIGMA_DATA):
    """EDM's (c_skip, c_out, c_in, c_noise) at noise level σ > 0, a tensor of any shape."""
    total = sigma ** 2 + sigma_data ** 2
    c_skip = sigma_data ** 2 / total
    c_out = sigma * sigma_data / total.sqrt()
    c_in = 1 / total.sqrt()
    c_noise = sigma.log() / 4
    return c_skip, c_out, c_in, c_noise


# -- base

def per_image(levels, x, what):
    """The tensor `levels` as [B or 1, 1, 1, 1]; UserError unless one is for all B images x or each has its own."""
    if levels.numel() not in (1, len(x)):
        raise UserError(f'there are {levels.numel()} {what} for {len(x)} images; give one for all, or one per image')
    return levels.reshape(-1, 1, 1, 1)


def check_numbers(constants, model_kwargs):
    """Raise UserError for constants, or a dropout, that a file names but no network can be computed with."""
    sigma_data, dropout = constants.get('sigma_data', SIGMA_DATA), model_kwargs.get('dropout', 0)
    if not (isinstance(sigma_data, (int, float)) and 0 < sigma_data < math.inf):
        raise UserError(f'sigma_data={excerpt(sigma_data)} is no standard deviation of images; give a number > 0, such '
                        f'as {SIGMA_DATA}')
    if not (isinstance(dropout, (int, float)) and 0 <= dropout < 1):
        raise UserError(f'dropout={excerpt(dropout)} is no probability; give a number from 0 to below 1')


class Precond(torch.nn.Module):
    """A network F and what surrounds it: noise levels, labels, precision.

    A subclass defines `scalings`, or its own `forward` that calls `run_model`. Its constructor takes its own arguments
    by keyword and passes on the common ones, from img_resolution on, as `args` and `network`.

    Args:
        constants: The subclass's own arguments by name; they become attributes.
        sigma_min, sigma_max: Range of noise levels the network supports.
        out_branches: How many images F returns; D is computed from the first.
        img_resolution, img_channels: Size of the images, and their channels.
        label_dim: Width of the class labels, 0 for none.
        use_fp16: EDM's switch: makes fp16 instead of fp32 the default of `precision`.
        model_type: A name in training.unet.MODELS.
        model_kwargs: Further arguments of that model.

    Attributes: All of these, and
        model: F.
        init_kwargs: The subclass's constructor arguments as a JSON-serialisable dict; type(net)(**net.init_kwargs) has
            the same architecture.
        precision: A name in torch_utils.precision.PRECISIONS: how F runs. It may be set at any time and is not part of
            a snapshot. Weights, embeddings, group norms' statistics, softmax and all that surrounds F are always
            float32.

    Raises:
        UserError: an unknown name, or an argument that the network cannot be built with.
    """

    _precision = None

    def __init__(self, constants, sigma_min, sigma_max, out_branches, /, img_resolution, img_channels, label_dim=0,
                 use_fp16=False, *, model_type='SongUNet', **model_kwargs):
        super().__init__()
        self.init_kwargs = copy.deepcopy(dict(
            img_resolution=img_resolution, img_channels=img_channels, label_dim=label_dim, use_fp16=use_fp16,
            **constants, model_type=model_type, **model_kwargs))
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        self.use_fp16 = use_fp16
        check_numbers(constants, model_kwargs)
        for name, value in constants.items():
            setattr(self, name, value)
        self.sigma_min, self.sigma_max = float(sigma_min), float(sigma_max)
        self.model = chosen('model_type', model_type, MODELS)(
            img_resolution=img_resolution, in_channels=img_channels, out_channels=out_branches * img_channels,
            label_dim=label_dim, **model_kwargs)

    @property
    def precision(self):
        return self._precision or ('fp16' if self.use_fp16 else 'fp32')

    @precision.setter
    def precision(self, name):
        chosen('precision', name, PRECISIONS)
        self._precision = name

    def products(self):
        """Context where CUDA rounds float32 products as `precision` says; F runs in it, backward passes should too."""
        return float32_products(PRECISIONS[self.precision].tf32)

    def forward(self, x, sigma, class_labels=None, force_fp32=False, **model_kwargs):
        """The denoised image D(x; σ).

        Args:
            x: [B, img_channels, img_resolution, img_resolution], of any float dtype.
            sigma: Noise level > 0, in units of the images: a number or tensor of 1 or B values.
            class_labels: [B, label_dim] or [1, label_dim]; None means zeros.
            force_fp32: Use fp32 instead of `precision`.
            model_kwargs: Passed on to F, such as augment_labels.

        Returns:
            float32, shaped like x.

        Raises:
            UserError: images, noise levels or labels of the wrong shape.
        """
        x = self.check_images(x)
        sigma = self.as_sigma(sigma, x)
        c_skip, c_out, c_in, c_noise = self.scalings(sigma)
        F_x = self.run_model(c_in * x, c_noise, class_labels, force_fp32, **model_kwargs)
        return c_skip * x + c_out * F_x[:, :self.img_channels]

    def scalings(self, sigma):
        """(c_skip, c_out, c_in, c_noise) at σ, each float32 [B or 1, 1, 1, 1]; the first three may be plain numbers."""
        raise NotImplementedError

    def run_model(self, c_in_x, c_noise, class_labels=None, force_fp32=False, **model_kwargs):
        """F of a scaled image, in the precision that suits the device; float32 [B, out_channels, H, W]."""
        precision = PRECISIONS['fp32' if force_fp32 else self.precision]
        labels = self.check_labels(class_labels, c_in_x)
        with float32_products(precision.tf32):
            F_x = self.model(c_in_x.to(precision.dtype_on(c_in_x.device)), c_noise.flatten(), labels, **model_kwargs)
        return F_x.to(torch.float32, memory_format=torch.contiguous_format)

    @classmethod
    def meaning(cls, kwargs):
        """Constructor arguments in canonical form, for comparisons: equal if they make the same network."""
        return dict(kwargs)

    @torch.no_grad()
    def transfer(self, source, source_kwargs=None):
        """Start from the weights of another network; returns the names of the tensors that it set.

        Every tensor of the same name and shape is copied; in the output layers, branch by branch (`taken_branches`).

        Args:
            source: State dict of that network.
            source_kwargs: Its constructor arguments; None: it has this network's.
        """
        source_kwargs = self.init_kwargs if source_kwargs is None else source_kwargs
        outputs = {f'model.{layer}.{kind}' for layer in self.model.output_layers for kind in ('weight', 'bias')}
        copied = []
        for name, own in self.state_dict().items():
            theirs = source.get(name)
            if theirs is None or theirs.shape[1:] != own.shape[1:]:
                continue
            if name in outputs and source_kwargs['img_channels'] == self.img_channels:
                theirs = self.taken_branches(theirs.split(self.img_channels), source_kwargs)
            if theirs.shape == own.shape:
                own.copy_(theirs)
                copied.append(name)
        return copied

    def taken_branches(self, branches, source_kwargs):
        """Of an output layer's tensor, cut into the branches of a network with these arguments, what `transfer` takes.

        The first ones, as many as this network has: of Warm's, D.
        """
        return torch.cat(branches[:self.model.out_channels // self.img_channels])

    def round_sigma(self, sigma):
        """The noise level nearest to σ that the network supports, as a tensor like σ."""
        return torch.as_tensor(sigma)

    def check_images(self, x):
        """x in float32; UserError unless its image shape is the network's and its values are floats."""
        check_floats(x)
        expected = (self.img_channels, self.img_resolution, self.img_resolution)
        if tuple(x.shape[1:]) != expected:
            raise UserError(f'images of [channels, height, width] = {list(x.shape[1:])} do not fit a network for '
                            f'{list(expected)}; resize the images, or use a network made for them')
        return x.to(torch.float32)

    def as_sigma(self, sigma, x):
        """σ as float32 [B or 1, 1, 1, 1] on x's device."""
        return per_image(torch.as_tensor(sigma, dtype=torch.float32, device=x.device), x, 'noise levels')

    def check_labels(self, class_labels, x):
        """Labels as float32 [B or 1, label_dim], zeros for None; None for a network without labels."""
        if class_labels is None:
            return torch.zeros([1, self.label_dim], device=x.device) if self.label_dim else None
        shape = list(class_labels.shape)
        if shape[-1:] != [self.label_dim] or class_labels.ndim > 2 or (len(shape) == 2 and shape[0] not in (1, len(x))):
            raise UserError(f'class labels of shape {shape} do not fit {len(x)} images and a network with label '
                            f'dimension {self.label_dim}; give shape {[len(x), self.label_dim]}, or none at all')
        return class_labels.to(torch.float32).reshape(-1, self.label_dim) if self.label_dim else None


# -- the four columns

class VPPrecond(Precond):
    """Variance preserving (Song et al. 2021): F predicts the unit-variance noise and is conditioned on time, not σ.

    Args, beyond those of `Precond`:
        beta_d, beta_min: Constants of the noise schedule.
        M: Number of time steps that c_noise counts in.
        epsilon_t: Smallest time.
    """

    def __init__(self, *args, beta_d=VP_BETA_D, beta_min=VP_BETA_MIN, M=1000, epsilon_t=VP_EPSILON_T, **network):
        ends = vp_sigma(torch.tensor([epsilon_t, 1], dtype=torch.float64, device='cpu'), beta_d, beta_min).tolist()
        super().__init__(dict(beta_d=beta_d, beta_min=beta_min, M=M, epsilon_t=epsilon_t), *ends, 1, *args, **network)

    def scalings(self, sigma):
        return 1, -sigma, 1 / (sigma ** 2 + 1).sqrt(), (self.M - 1) * self.sigma_inv(sigma)

    def sigma(self, t):
        """Noise level at time t, a number or tensor in 0…1."""
        return vp_sigma(torch.as_tensor(t), self.beta_d, self.beta_min)

    def sigma_inv(self, sigma):
        """Time of noise level σ, a number or tensor."""
        return vp_sigma_inv(torch.as_tensor(sigma), self.beta_d, self.beta_min)


class VEPrecond(Precond):
    """Variance exploding (Song et al. 2021): F predicts (D − x)/σ from the unscaled image.

    Args, beyond those of `Precond`:
        sigma_min, sigma_max: Range of the noise levels.
    """

    def __init__(self, *args, sigma_min=VE_SIGMA_MIN, sigma_max=VE_SIGMA_MAX, **network):
        super().__init__(dict(sigma_min=sigma_min, sigma_max=sigma_max), sigma_min, sigma_max, 1, *args, **network)

    def scalings(self, sigma):
        return 1, sigma, 1, (0.5 * sigma).log()


class iDDPMPrecond(Precond):
    """Improved DDPM (Nichol & Dhariwal 2021): a grid of noise levels; the second half of F's channels is unused.

    Args, beyond those of `Precond`:
        C_1, C_2, M: Constants of the grid, see training.schedules.iddpm_noise_levels.

    Its buffer `u` is the grid.
    """

    def __init__(self, *args, C_1=IDDPM_C_1, C_2=IDDPM_C_2, M=IDDPM_M, model_type='DhariwalUNet', **network):
        u = iddpm_noise_levels(C_1, C_2, M)
        super().__init__(dict(C_1=C_1, C_2=C_2, M=M), u[M - 1], u[0], 2, *args, model_type=model_type, **network)
        self.register_buffer('u', u)

    def scalings(self, sigma):
        c_noise = self.M - 1 - self.round_sigma(sigma, return_index=True).to(torch.float32)
        return 1, -sigma, 1 / (sigma ** 2 + 1).sqrt(), c_noise

    def round_sigma(self, sigma, return_index=False):
        """The grid's noise level nearest to σ, in σ's shape, float dtype and device; or its index, as int64."""
        sigma = torch.as_tensor(sigma)
        gaps = (sigma.to(self.u.device, torch.float32).reshape(-1, 1) - self.u).abs()
        index = gaps.argmin(dim=1)
        nearest = index if return_index else self.u[index].to(torch.result_type(sigma, 1.0))
        return nearest.reshape(sigma.shape).to(sigma.device)


class EDMPrecond(Precond):
    """EDM's own (Karras et al. 2022): unit variance of F's input and target at every σ.

    Args, beyond those of `Precond`:
        sigma_min, sigma_max: Supported noise levels.
        sigma_data: Standard deviation of the data.
    """

    def __init__(self, *args, sigma_min=0, sigma_max=float('inf'), sigma_data=SIGMA_DATA, model_type='DhariwalUNet',
                 **network):
        super().__init__(dict(sigma_min=sigma_min, sigma_max=sigma_max, sigma_data=sigma_data), sigma_min, sigma_max,
                         1, *args, model_type=model_type, **network)

    def scalings(self, sigma):
        return edm_scalings(sigma, self.sigma_data)
