"""The classifier that stands in for Inception: a nine-layer residual network with a detector's interface.

Its layout is the ResNet-9 of the DAWNBench entries: the network of He et al. 2016, «Deep Residual Learning», cut down
until it trains on CIFAR-10 in minutes.
"""

import io
import warnings
import zipfile

import torch

MIN_RESOLUTION = 8
MIN_MAP = 4  # feature maps are not pooled below this size
STAGES = (True, False, True)  # for each stage, which doubles the channels: whether it ends in a residual block
LOGIT_SCALE = 0.5  # keeps the probabilities soft while the last layer's weights grow
MACHINE_RECORDS = ('.debug_pkl', 'serialization_id')  # in a TorchScript file: paths of its sources, and their hash


class ConvBlock(torch.nn.Sequential):
    """3×3 convolution, batch norm, ReLU."""

    def __init__(self, in_channels, channels):
        super().__init__(torch.nn.Conv2d(in_channels, channels, 3, padding=1, bias=False),
                         torch.nn.BatchNorm2d(channels), torch.nn.ReLU())


class Residual(torch.nn.Module):
    """x + f(x), with f made of two ConvBlocks."""

    def __init__(self, channels):
        super().__init__()
        self.f = torch.nn.Sequential(ConvBlock(channels, channels), ConvBlock(channels, channels))

    def forward(self, x):
        return x + self.f(x)


def trunk(channels, resolution, width):
    """The layers before the global pooling: [B, channels, resolution, resolution] → [B, 8·width, ≥ 4, ≥ 4]."""
    layers = [ConvBlock(channels, width)]
    size = resolution
    for residual in STAGES:
        layers.append(ConvBlock(width, 2 * width))
        width *= 2
        if size >= 2 * MIN_MAP:
            layers.append(torch.nn.MaxPool2d(2))
            size //= 2
        if residual:
            layers.append(Residual(width))
    return torch.nn.Sequential(*layers)


class Classifier(torch.nn.Module):
    """Images in, features or class probabilities out; can be scripted.

    Args:
        resolution: Resolution of the training images, at least MIN_RESOLUTION; other images are resized to it.
        channels: Their channels, 1 or 3; other images have grey repeated, or colours averaged.
        num_classes: Number of classes K.
        width: Channels of the first layer; there are D = 8·width features.
        mean, std: Mean and standard deviation of the training images' pixels, [channels] each, on the scale 0…255.
    """

    def __init__(self, resolution, channels, num_classes, width, mean, std):
        super().__init__()
        self.resolution, self.channels = int(resolution), int(channels)
        self.logit_scale = LOGIT_SCALE  # TorchScript does not see module-level constants
        self.register_buffer('mean', torch.as_tensor(mean, dtype=torch.float32).reshape(1, -1, 1, 1))
        self.register_buffer('std', torch.as_tensor(std, dtype=torch.float32).reshape(1, -1, 1, 1))
        self.trunk = trunk(channels, resolution, width)
        self.fc = torch.nn.Linear(width * 2 ** len(STAGES), num_classes, bias=False)

    def fit(self, images):
        """Resize to float32 [B, channels, resolution, resolution], 0…255: by area to shrink, else bilinearly."""
        x = images.to(torch.float32)
        if x.shape[1] != self.channels:
            x = x.mean(dim=1, keepdim=True).expand(-1, self.channels, -1, -1)
        if x.shape[2] >= self.resolution and x.shape[3] >= self.resolution:
            if x.shape[2] > self.resolution or x.shape[3] > self.resolution:
                x = torch.nn.functional.adaptive_avg_pool2d(x, [self.resolution, self.resolution])
        else:
            x = torch.nn.functional.interpolate(x, size=[self.resolution, self.resolution], mode='bilinear',
                                                align_corners=False)
        return x

    def features(self, images):
        """Pooled features [B, D], float32, all ≥ 0, of images uint8 [B, 1 or 3, H, W]."""
        x = (self.fit(images) - self.mean) / self.std
        return self.trunk(x).to(torch.float32).mean(dim=[2, 3])

    def logits(self, images):
        """Class logits [B, K], float32, of images uint8 [B, 1 or 3, H, W]."""
        return self.fc(self.features(images)).to(torch.float32) * self.logit_scale

    def forward(self, images, return_features: bool = False, no_output_bias: bool = False):
        """Features [B, D] with `return_features`, else class probabilities [B, K]; float32.

        `no_output_bias` is part of a detector's interface; the last layer has no bias, so it changes nothing.

        Args:
            images: uint8 [B, 1 or 3, H, W].
        """
        if return_features:
            return self.features(images)
        return self.logits(images).softmax(dim=1)


def script_bytes(net):
    """The bytes of a TorchScript file of a `Classifier` on the CPU, in evaluation mode.

    Entries that reveal the machine's folders are left out. The order of a few names in the file's code, and so its
    digest, can change from one process to the next; the weights do not.
    """
    scripted, stripped = io.BytesIO(), io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', DeprecationWarning)  # NVIDIA's Inception file has this form, too
        torch.jit.save(torch.jit.script(net.eval()), scripted)
    with zipfile.ZipFile(scripted) as source, zipfile.ZipFile(stripped, 'w') as dest:
        for info in source.infolist():
            if not info.filename.endswith(MACHINE_RECORDS):
                dest.writestr(info, source.read(info))
    return stripped.getvalue()
