"""The building blocks of U-Nets: weights and their initialisation, resampling convolutions, attention, the block.

Every layer keeps its parameters in float32 and casts them to the dtype of its input, so one set of
weights serves float32, float16, bfloat16 and float64. In the two 16-bit types, group norms and softmax
are still computed in float32. Parameter names are those of EDM's checkpoints.
"""

import dataclasses
import math
from typing import NamedTuple

import torch
from torch.nn import functional as F

from dnnlib import UserError


# -- initialisation

class Init(NamedTuple):
    """How a layer's weights are initialised: a mode in INIT_MODES, and gains for weight and bias."""
    mode: str
    weight: float = 1.0
    bias: float = 0.0


# In place: on the device 'meta', where networks are outlined before they are built, PyTorch computes x * y in Python,
# for which it imports its compiler, and that takes almost as long as importing PyTorch itself.
def _uniform(shape, variance):
    return torch.rand(shape).mul_(2).sub_(1).mul_(math.sqrt(3 * variance))


def _normal(shape, variance):
    return torch.randn(shape).mul_(math.sqrt(variance))


# mode → (distribution, variance as a function of fan_in and fan_out)
INIT_MODES = {
    'xavier_uniform': (_uniform, lambda fan_in, fan_out: 2 / (fan_in + fan_out)),
    'xavier_normal': (_normal, lambda fan_in, fan_out: 2 / (fan_in + fan_out)),
    'kaiming_uniform': (_uniform, lambda fan_in, fan_out: 1 / fan_in),
    'kaiming_normal': (_normal, lambda fan_in, fan_out: 1 / fan_in),
}


def draw_parameters(shape, init, bias=True):
    """Draw a layer's weight, then its bias, from the global generator.

    Args:
        shape: [out, in] or [out, in, k, k]; fans include the kernel's area.
        init: An `Init`. The bias has the weight's distribution and fans, with its own gain.
        bias: False returns None for the bias and draws nothing for it.

    Returns:
        (weight, bias) as torch.nn.Parameter; a gain of zero still consumes the random numbers.
    """
    distribution, variance_of = INIT_MODES[init.mode]
    area = math.prod(shape[2:])
    variance = variance_of(shape[1] * area, shape[0] * area)
    weight = torch.nn.Parameter(distribution(shape, variance).mul_(init.weight))
    if not bias:
        return weight, None
    return weight, torch.nn.Parameter(distribution(shape[:1], variance).mul_(init.bias))


# -- layers

def cast(parameter, like):
    """The parameter in the dtype of `like`; None stays None."""
    return None if parameter is None else parameter.to(like.dtype)


class Linear(torch.nn.Module):
    """Affine map [B, in_features] → [B, out_features]."""

    def __init__(self, in_features, out_features, init=Init('kaiming_normal'), bias=True):
        super().__init__()
        self.weight, self.bias = draw_parameters([out_features, in_features], init, bias)

    def forward(self, x):
        return F.linear(x, cast(self.weight, x), cast(self.bias, x))


SHORT_TYPES = (torch.float16, torch.bfloat16)


class ShortTypeNorm(torch.autograd.Function):
    """Group norm, optionally with SiLU, of float16 or bfloat16 features, computed in float32 and rounded once.

    The features are kept for the backward pass in their 16-bit type; the float32 values are recomputed. The result and
    the gradient have the input's memory format; in between all is contiguous, as the CUDA kernels require.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, num_groups, eps, silu):
        wide = x.to(torch.float32, memory_format=torch.contiguous_format)
        y, mean, rstd = torch.native_group_norm(wide, weight, bias, *_sizes(x), num_groups, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.num_groups, ctx.silu = num_groups, silu
        return (F.silu(y) if silu else y).to(x.dtype, memory_format=_layout(x))

    @staticmethod
    def backward(ctx, grad):
        gradients = norm_gradients_to_compile if torch.compiler.is_compiling() else norm_gradients
        return *gradients(grad, *ctx.saved_tensors, ctx.num_groups, ctx.silu), None, None, None


def norm_gradients(grad, x, weight, bias, mean, rstd, num_groups, silu):
    """Gradients of `ShortTypeNorm` with respect to x, weight and bias, by PyTorch's kernel.

    Args:
        grad: Gradient of the result, [B, C, H, W].
        x, weight, bias: As given to the norm: [B, C, H, W], [C], [C].
        mean, rstd: Mean and inverse standard deviation of each group, float32 [B, num_groups].
        num_groups, silu: As given to the norm.
    """
    wide, grad = (t.to(torch.float32, memory_format=torch.contiguous_format) for t in (x, grad))
    if silu:
        y = (wide.unflatten(1, (num_groups, -1)) - mean[:, :, None, None, None]) * rstd[:, :, None, None, None]
        y = torch.addcmul(bias[:, None, None], y.flatten(1, 2), weight[:, None, None])
        grad = grad * _silu_slope(y)
    grad_x, *others = torch.ops.aten.native_group_norm_backward(
        grad, wide, mean, rstd, weight, *_sizes(x), num_groups, [True, True, True])
    return grad_x.to(x.dtype, memory_format=_layout(x)), *others


def norm_gradients_to_compile(grad, x, weight, bias, mean, rstd, num_groups, silu):
    """The same, written out as pixelwise products and sums, which a compiler fuses into two passes, the sums first.

    As the norm is x̂·w + b with x̂ = (x − mean)·rstd, all gradients follow from each channel's Σ g and Σ g·x̂, the
    gradients of b and w:

        grad_x = rstd·(w·g − mean(w·g) − x̂·mean(w·g·x̂)),

    both means over a group. PyTorch's kernel would force float32 features, in another layout, to be written before and
    after it.
    """
    batch, channels, pixels = _sizes(x)

    def spread(t):  # [B, num_groups, 1 or channels per group] → [B, C, 1, 1]
        return t.expand(batch, num_groups, channels // num_groups).reshape(batch, channels, 1, 1)
    mean, rstd = mean[:, :, None], rstd[:, :, None]
    weight, bias = weight.view(num_groups, -1), bias.view(num_groups, -1)
    wide, grad = x.to(torch.float32), grad.to(torch.float32)
    scale = spread(rstd * weight)
    if silu:
        grad = grad * _silu_slope(wide * scale + spread(bias - mean * rstd * weight))
    grad_bias = grad.sum((2, 3)).view(batch, num_groups, -1)
    grad_weight = ((grad * wide).sum((2, 3)).view(batch, num_groups, -1) - mean * grad_bias) * rstd
    size = pixels * channels // num_groups
    mean_wg = (grad_bias * weight).sum(2, keepdim=True) / size
    mean_wgx = (grad_weight * weight).sum(2, keepdim=True) / size
    grad_x = grad * scale - wide * spread(rstd ** 2 * mean_wgx) + spread(mean * rstd ** 2 * mean_wgx - rstd * mean_wg)
    return grad_x.to(x.dtype, memory_format=_layout(x)), grad_weight.sum(0).flatten(), grad_bias.sum(0).flatten()


def _silu_slope(y):
    gate = y.sigmoid()
    return gate * (1 + y * (1 - gate))


def _layout(x):
    """The memory format of features [B, C, H, W]."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last and not x.is_contiguous() else torch.contiguous_format


def _sizes(x):
    """Batch, channels and pixels of [B, C, H, W]."""
    return x.shape[0], x.shape[1], x.shape[2] * x.shape[3]


class GroupNorm(torch.nn.Module):
    """Group normalisation with min(32, C // 4) groups; its statistics are at least float32.

    Raises:
        UserError: C channels cannot be divided into that many groups.
    """

    def __init__(self, channels, eps=1e-5):
        super().__init__()
        self.num_groups = min(32, channels // 4)
        if self.num_groups == 0 or channels % self.num_groups:
            raise UserError(f'a group norm of {channels} channels is impossible; choose model_channels and '
                            'channel_mult so that all widths are multiples of 4, and above 128 multiples of 32')
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(channels))
        self.bias = torch.nn.Parameter(torch.zeros(channels))

    def forward(self, x, silu=False):
        """The normalised features, with `silu` passed through SiLU."""
        if x.dtype in SHORT_TYPES:
            return ShortTypeNorm.apply(x, self.weight, self.bias, self.num_groups, self.eps, silu)
        y = F.group_norm(x, self.num_groups, cast(self.weight, x), cast(self.bias, x), self.eps)
        return F.silu(y) if silu else y


def make_resample_filter(taps):
    """The 2-D low-pass [1, 1, k, k] of a 1-D filter with k taps: their outer product, normalised to a sum of 1."""
    total = sum(taps) ** 2
    taps = torch.as_tensor(taps, dtype=torch.float32)
    ones = torch.ones([1, 1, len(taps), len(taps)])
    return ones.mul_(taps[:, None]).mul_(taps).div_(total)  # in place: see `_uniform`


def filter_down(x, low_pass, padding):
    """Low-pass each channel and keep every second pixel: [B, C, H, W] → [B, C, H/2, W/2]."""
    channels = x.shape[1]
    return F.conv2d(x, low_pass.to(x.dtype).expand(channels, -1, -1, -1), stride=2, padding=padding, groups=channels)


def filter_up(x, low_pass, padding):
    """Insert zeros between the pixels and low-pass with gain 4: [B, C, H, W] → [B, C, 2H, 2W]."""
    channels = x.shape[1]
    kernel = (low_pass * 4).to(x.dtype).expand(channels, -1, -1, -1)
    return F.conv_transpose2d(x, kernel, stride=2, padding=padding, groups=channels)


def pool(x):
    """`filter_down` with the taps [1, 1], bit for bit: the means of 2×2 pixels."""
    return F.avg_pool2d(x, 2)


def double(x):
    """`filter_up` with the taps [1, 1], bit for bit: every pixel repeated four times."""
    batch, channels, height, width = x.shape
    twice = x[:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2)
    return twice.reshape(batch, channels, 2 * height, 2 * width).contiguous(memory_format=_layout(x))


class Conv2d(torch.nn.Module):
    """Same-size convolution, optionally preceded by a 2× resampling; kernel = 0 only resamples.

    With `fused_resample` the two share one padding. When downsampling, the convolution then comes first, at
    full resolution, and only its result is low-passed.

    Attributes:
        memory_format: The layout in which the weight is passed to the convolution, and hence that of the result; the
            parameter itself keeps its own.

    Raises:
        UserError: both `up` and `down` are set.
    """

    memory_format = torch.preserve_format

    def __init__(self, in_channels, out_channels, kernel, init=Init('kaiming_normal'), up=False, down=False,
                 resample_filter=(1, 1), fused_resample=False):
        super().__init__()
        if up and down:
            raise UserError('a convolution resamples up or down, not both; choose one of up and down')
        self.up, self.down, self.fused_resample = up, down, fused_resample
        if kernel:
            self.weight, self.bias = draw_parameters([out_channels, in_channels, kernel, kernel], init)
        else:
            self.weight = self.bias = None
        self.register_buffer('resample_filter', make_resample_filter(resample_filter) if up or down else None)
        self.pad = kernel // 2
        self.filter_pad = (len(resample_filter) - 1) // 2
        self.plain = tuple(resample_filter) == (1, 1)

    def forward(self, x):
        if self.fused_resample and self.weight is not None:
            return self._fused(x)
        if self.up:
            x = self._up(x, self.filter_pad)
        if self.down:
            x = self._down(x, self.filter_pad)
        return x if self.weight is None else self._convolve(x, self.pad)

    def _up(self, x, padding):
        return double(x) if self._as_pixels(x) else filter_up(x, self.resample_filter, padding)

    def _down(self, x, padding):
        return pool(x) if self._as_pixels(x) else filter_down(x, self.resample_filter, padding)

    def _as_pixels(self, x):
        # On a GPU, pixel means and copies fuse with their neighbours; on a CPU they beat only 16-bit convolutions.
        return self.plain and (x.is_cuda or x.dtype in SHORT_TYPES)

    def _convolve(self, x, padding):
        weight = self.weight.to(x.dtype, memory_format=self.memory_format)
        return F.conv2d(x, weight, cast(self.bias, x), padding=padding)

    def _fused(self, x):
        if self.up:
            x = self._up(x, max(self.filter_pad - self.pad, 0))
            return self._convolve(x, max(self.pad - self.filter_pad, 0))
        x = self._convolve(x, self.pad + self.filter_pad)
        # The filter sums to one and meets no padding here, so it leaves the bias as it is.
        return self._down(x, 0) if self.down else x


# -- embeddings

class PositionalEmbedding(torch.nn.Module):
    """Sinusoidal embedding [B] → [B, num_channels], with frequencies falling geometrically from 1.

    With `endpoint` they reach 1/10000 in the last channel, otherwise they stop one step before it.
    With `sin_first` the sines are the first half of the channels, otherwise the cosines.
    """

    def __init__(self, num_channels, endpoint, sin_first):
        super().__init__()
        self.half, self.endpoint, self.sin_first = num_channels // 2, endpoint, sin_first

    def forward(self, x):
        exponents = torch.arange(self.half, dtype=torch.float32, device=x.device) / (self.half - self.endpoint)
        return _sinusoids(x.outer(((1 / 10000) ** exponents).to(x.dtype)), self.sin_first)


class FourierEmbedding(torch.nn.Module):
    """Fourier features [B] → [B, num_channels], with fixed random frequencies 16·N(0, 1), sines first."""

    def __init__(self, num_channels):
        super().__init__()
        self.register_buffer('freqs', torch.randn(num_channels // 2).mul_(16))

    def forward(self, x):
        return _sinusoids(x.outer((2 * math.pi * self.freqs).to(x.dtype)), sin_first=True)


def _sinusoids(phase, sin_first):
    cos, sin = phase.cos(), phase.sin()
    return torch.cat([sin, cos] if sin_first else [cos, sin], dim=1)


# -- attention

def split_heads(qkv, num_heads):
    """[B, 3C, H, W] → query, key, value, each [B, heads, H·W, C/heads], contiguous as fused kernels need them.

    Channels are ordered by head, then channel, then query/key/value.
    """
    batch, channels, height, width = qkv.shape
    parts = qkv.reshape(batch, num_heads, channels // (3 * num_heads), 3, height * width)
    return parts.permute(3, 0, 1, 4, 2).contiguous().unbind(0)


def plain_attention(q, k, v):
    """softmax(q·kᵀ/√c)·v over [..., pixels, c], the softmax in at least float32: the reference."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    weights = (q.to(dtype) @ k.to(dtype).transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(dim=-1)
    return weights.to(v.dtype) @ v


def attend(qkv, num_heads):
    """Self-attention over the pixels: [B, 3C, H, W] → [B, C, H, W].

    Equals `plain_attention` on `split_heads`; the fused kernel never stores the [H·W, H·W] matrix.
    """
    batch, channels, height, width = qkv.shape
    a = F.scaled_dot_product_attention(*split_heads(qkv, num_heads))
    return a.transpose(-1, -2).reshape(batch, channels // 3, height, width)


# -- block

@dataclasses.dataclass(frozen=True)
class BlockStyle:
    """Settings that all blocks of a network share.

    Attributes:
        emb_channels: Width of the embedding that modulates the blocks.
        dropout: Dropout probability before the second convolution.
        skip_scale: Factor on every residual sum.
        eps: Epsilon of the group norms.
        init, init_zero, init_attn: Initialisation of most layers; of the last layer of each residual branch; of the
            attention's query, key and value.
        resample_filter: 1-D filter of the resampling blocks.
        resample_proj: Resampling blocks also project their skip by a 1×1 convolution.
        adaptive_scale: The embedding scales and shifts the second norm, instead of being added before it.
        channels_per_head: Channels of an attention head; None means a single head.
    """
    emb_channels: int
    dropout: float
    skip_scale: float
    eps: float
    init: Init
    init_zero: Init
    init_attn: Init
    resample_filter: tuple = (1, 1)
    resample_proj: bool = False
    adaptive_scale: bool = False
    channels_per_head: int | None = None

    def num_heads(self, channels):
        """Number of attention heads for that many channels; 0, no attention, if they do not fill one (as in EDM)."""
        heads = 1 if self.channels_per_head is None else channels // self.channels_per_head
        if heads and channels % heads:
            raise UserError(f'{channels} channels cannot be divided among {heads} attention heads; make them a '
                            f'multiple of {self.channels_per_head}, or leave that level out of attn_resolutions')
        return heads


class UNetBlock(torch.nn.Module):
    """Residual block with optional 2× resampling, modulated by an embedding, then optional self-attention.

    forward(x [B, in_channels, H, W], emb [B or 1, emb_channels]) → [B, out_channels, H′, W′].
    """

    def __init__(self, in_channels, out_channels, style, up=False, down=False, attention=False):
        super().__init__()
        resampling = dict(up=up, down=down, resample_filter=style.resample_filter)
        self.style = style
        self.in_channels, self.out_channels = in_channels, out_channels
        self.num_heads = style.num_heads(out_channels) if attention else 0

        self.norm0 = GroupNorm(in_channels, style.eps)
        self.conv0 = Conv2d(in_channels, out_channels, 3, style.init, **resampling)
        self.affine = Linear(style.emb_channels, out_channels * (2 if style.adaptive_scale else 1), style.init)
        self.norm1 = GroupNorm(out_channels, style.eps)
        self.conv1 = Conv2d(out_channels, out_channels, 3, style.init_zero)

        self.skip = None
        if out_channels != in_channels or up or down:
            kernel = 1 if out_channels != in_channels or style.resample_proj else 0
            self.skip = Conv2d(in_channels, out_channels, kernel, style.init, **resampling)

        if self.num_heads:
            self.norm2 = GroupNorm(out_channels, style.eps)
            self.qkv = Conv2d(out_channels, out_channels * 3, 1, style.init_attn)
            self.proj = Conv2d(out_channels, out_channels, 1, style.init_zero)

    def forward(self, x, emb):
        h = self.conv0(self.norm0(x, silu=True))
        h = self._modulate(h, self.affine(emb)[:, :, None, None].to(h.dtype))
        h = self.conv1(F.dropout(h, p=self.style.dropout, training=self.training))
        x = (h + (x if self.skip is None else self.skip(x))) * self.style.skip_scale
        if self.num_heads:
            x = (self.proj(attend(self.qkv(self.norm2(x)), self.num_heads)) + x) * self.style.skip_scale
        return x

    def _modulate(self, h, params):
        """The second norm and SiLU; the embedding scales and shifts the norm's output, or is added to its input."""
        if self.style.adaptive_scale:
            scale, shift = params.chunk(2, dim=1)
            return F.silu(torch.addcmul(shift, self.norm1(h), scale + 1))
        return self.norm1(h + params, silu=True)
