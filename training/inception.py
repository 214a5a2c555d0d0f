"""Inception-v3 as TensorFlow published it on 2015-12-05: the network behind FID and the Inception Score.

Szegedy et al. 2016, «Rethinking the Inception Architecture for Computer Vision». The published graph
differs from later ports in three places, all of which affect the scores: average pools leave the padding
out of the mean, the pool branch of the last block takes the maximum, and images are resized
bilinearly without half-pixel centres. Parameter names are those of the public state dict
`pt_inception-2015-12-05-6726825d.pth`.
"""

import torch

IMAGE_SIZE = 299
NUM_FEATURES = 2048
NUM_CLASSES = 1008
BN_EPS = 1e-3


# -- the graph as data
#
# A block is a list of branches whose outputs are concatenated; a branch is a list of stages; a stage is 'avg' or 'max',
# a layer, or a tuple of layers that share their input.

def layer(name, channels, kernel, stride=1):
    """A convolution with batch norm and ReLU: stride 1 keeps the size, stride 2 has no padding.

    `kernel` is [height, width] or one number for both.
    """
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    padding = tuple(k // 2 for k in kernel) if stride == 1 else 0
    return dict(name=name, channels=channels, kernel=kernel, stride=stride, padding=padding)


def block_35(pool_channels):
    """Blocks at 35×35: 5b, 5c, 5d."""
    return [[layer('branch1x1', 64, 1)],
            [layer('branch5x5_1', 48, 1), layer('branch5x5_2', 64, 5)],
            [layer('branch3x3dbl_1', 64, 1), layer('branch3x3dbl_2', 96, 3), layer('branch3x3dbl_3', 96, 3)],
            ['avg', layer('branch_pool', pool_channels, 1)]]


def block_to_17():
    """From 35×35 to 17×17: 6a."""
    return [[layer('branch3x3', 384, 3, stride=2)],
            [layer('branch3x3dbl_1', 64, 1), layer('branch3x3dbl_2', 96, 3),
             layer('branch3x3dbl_3', 96, 3, stride=2)],
            ['max/2']]


def block_17(width):
    """Blocks at 17×17 with factorised 7×7 convolutions: 6b to 6e."""
    return [[layer('branch1x1', 192, 1)],
            [layer('branch7x7_1', width, 1), layer('branch7x7_2', width, (1, 7)), layer('branch7x7_3', 192, (7, 1))],
            [layer('branch7x7dbl_1', width, 1), layer('branch7x7dbl_2', width, (7, 1)),
             layer('branch7x7dbl_3', width, (1, 7)), layer('branch7x7dbl_4', width, (7, 1)),
             layer('branch7x7dbl_5', 192, (1, 7))],
            ['avg', layer('branch_pool', 192, 1)]]


def block_to_8():
    """From 17×17 to 8×8: 7a."""
    return [[layer('branch3x3_1', 192, 1), layer('branch3x3_2', 320, 3, stride=2)],
            [layer('branch7x7x3_1', 192, 1), layer('branch7x7x3_2', 192, (1, 7)),
             layer('branch7x7x3_3', 192, (7, 1)), layer('branch7x7x3_4', 192, 3, stride=2)],
            ['max/2']]


def block_8(pool):
    """Blocks at 8×8, whose branches fork at their end: 7b with the average pool, 7c with the maximum."""
    return [[layer('branch1x1', 320, 1)],
            [layer('branch3x3_1', 384, 1),
             (layer('branch3x3_2a', 384, (1, 3)), layer('branch3x3_2b', 384, (3, 1)))],
            [layer('branch3x3dbl_1', 448, 1), layer('branch3x3dbl_2', 384, 3),
             (layer('branch3x3dbl_3a', 384, (1, 3)), layer('branch3x3dbl_3b', 384, (3, 1)))],
            [pool, layer('branch_pool', 192, 1)]]


# Layers before the first block; the two unpadded 3×3 convolutions differ from layer()'s rule.
STEM = [layer('Conv2d_1a_3x3', 32, 3, stride=2),
        {**layer('Conv2d_2a_3x3', 32, 3), 'padding': 0},
        layer('Conv2d_2b_3x3', 64, 3),
        'max/2',
        layer('Conv2d_3b_1x1', 80, 1),
        {**layer('Conv2d_4a_3x3', 192, 3), 'padding': 0},
        'max/2']

BLOCKS = {'Mixed_5b': block_35(32), 'Mixed_5c': block_35(64), 'Mixed_5d': block_35(64),
          'Mixed_6a': block_to_17(),
          'Mixed_6b': block_17(128), 'Mixed_6c': block_17(160), 'Mixed_6d': block_17(160), 'Mixed_6e': block_17(192),
          'Mixed_7a': block_to_8(),
          'Mixed_7b': block_8('avg'), 'Mixed_7c': block_8('max')}

POOLS = {'avg': lambda x: torch.nn.functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False),
         'max': lambda x: torch.nn.functional.max_pool2d(x, 3, stride=1, padding=1),
         'max/2': lambda x: torch.nn.functional.max_pool2d(x, 3, stride=2)}


# -- the graph as modules

class ConvBN(torch.nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, in_channels, channels, kernel, stride, padding):
        super().__init__()
        self.conv = torch.nn.Conv2d(in_channels, channels, kernel, stride, padding, bias=False)
        self.bn = torch.nn.BatchNorm2d(channels, eps=BN_EPS)

    def forward(self, x):
        return torch.relu(self.bn(self.conv(x)))


def _add_layers(module, stages, channels):
    """Register the layers of a branch on `module` under their names; returns the branch's output channels."""
    for stage in stages:
        if isinstance(stage, str):
            continue
        forks = stage if isinstance(stage, tuple) else (stage,)
        for fork in forks:
            module.add_module(fork['name'], ConvBN(channels, **{k: v for k, v in fork.items() if k != 'name'}))
        channels = sum(fork['channels'] for fork in forks)
    return channels


def _run_stages(module, stages, x):
    for stage in stages:
        if isinstance(stage, str):
            x = POOLS[stage](x)
        elif isinstance(stage, tuple):
            x = torch.cat([getattr(module, fork['name'])(x) for fork in stage], dim=1)
        else:
            x = getattr(module, stage['name'])(x)
    return x


class Mixed(torch.nn.Module):
    """One inception block: its branches side by side."""

    def __init__(self, in_channels, branches):
        super().__init__()
        self.branches = branches
        self.out_channels = sum(_add_layers(self, stages, in_channels) for stages in branches)

    def forward(self, x):
        return torch.cat([_run_stages(self, stages, x) for stages in self.branches], dim=1)


class InceptionV3(torch.nn.Module):
    """The network, always in evaluation mode; its state dict has the public file's names."""

    def __init__(self):
        super().__init__()
        channels = _add_layers(self, STEM, 3)
        for name, branches in BLOCKS.items():
            block = Mixed(channels, branches)
            self.add_module(name, block)
            channels = block.out_channels
        self.fc = torch.nn.Linear(channels, NUM_CLASSES)
        super().train(False)

    def train(self, mode=True):
        """Stay in evaluation mode: batch statistics would make an image's features depend on its batch."""
        return super().train(False)

    def features(self, images):
        """Pool features [B, 2048] float32, all ≥ 0.

        Args:
            images: uint8 [B, 3, H, W], RGB, any size.
        """
        x = (resize_bilinear(images.to(torch.float32), IMAGE_SIZE) - 128) / 128
        x = _run_stages(self, STEM, x)
        for name in BLOCKS:
            x = getattr(self, name)(x)
        return x.mean(dim=[2, 3])

    def logits(self, features, no_output_bias=False):
        """Class logits [B, 1008] of features [B, 2048]."""
        return torch.nn.functional.linear(features, self.fc.weight, None if no_output_bias else self.fc.bias)

    def forward(self, images, return_features=False, no_output_bias=False):
        """Logits [B, 1008], or features [B, 2048] with `return_features`; float32.

        `no_output_bias` omits the bias of the last layer, as the Inception Score does. The result is logits,
        before the softmax (NVIDIA's TorchScript file of the same network returns probabilities).

        Args:
            images: uint8 [B, 3, H, W], RGB, any size.
        """
        features = self.features(images)
        return features if return_features else self.logits(features, no_output_bias)


def resize_bilinear(images, size):
    """TensorFlow 1's bilinear resize to [B, C, size, size], without half-pixel centres.

    Output pixel i samples the input at i·(in/size); beyond the last pixel the edge repeats. When an image
    shrinks, pixels are skipped, not averaged: the published scores were computed this way.
    """
    for dim in (3, 2):
        if images.shape[dim] != size:
            images = _resize_axis(images, size, dim)
    return images


def _resize_axis(x, size, dim):
    position = torch.arange(size, device=x.device, dtype=torch.float64) * (x.shape[dim] / size)
    lower = position.floor().long()
    upper = (lower + 1).clamp(max=x.shape[dim] - 1)
    weight = (position - lower).to(x.dtype).reshape([-1] + [1] * (3 - dim))
    return torch.lerp(x.index_select(dim, lower), x.index_select(dim, upper), weight)
