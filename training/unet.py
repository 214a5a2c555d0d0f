"""The U-Nets F of EDM: SongUNet (DDPM++, NCSN++; Song et al. 2021) and DhariwalUNet (ADM; Dhariwal & Nichol 2021).

Their interface is described in training.architecture.Network.
"""

import math

import torch
from torch.nn import functional as F

from dnnlib import UserError, chosen
from training.architecture import Network
from training.layers import (BlockStyle, Conv2d, FourierEmbedding, GroupNorm, Init, Linear, PositionalEmbedding,
                             UNetBlock)


class UNet(Network):
    """What the two networks share: levels of blocks going down, then up with skip connections.

    A subclass defines its embedding (`embed`), calls `build`, and defines how images pass through `enc` and `dec`
    (`encode`, `decode`). The keys of those two are {R}x{R}_{kind}, in order of execution.
    """

    can_recompute = True
    size_arguments = {'cbase': 'model_channels', 'cres': 'channel_mult'}

    def __init__(self, img_resolution, in_channels, out_channels, model_channels, channel_mult, num_blocks,
                 attn_resolutions, noise_channels):
        super().__init__(img_resolution, in_channels, out_channels, noise_channels)
        coarsest = 2 ** (len(channel_mult) - 1)
        if img_resolution % coarsest:
            raise UserError(f'images of {img_resolution}x{img_resolution} pixels cannot be halved '
                            f'{len(channel_mult) - 1} times; use a size divisible by {coarsest}, or shorten '
                            'channel_mult (--cres)')
        if noise_channels % 2 or noise_channels < 4:
            raise UserError(f'the noise embedding needs an even number of channels, at least 4, not '
                            f'{noise_channels}; change model_channels (--cbase)')
        self.model_channels, self.num_blocks = model_channels, num_blocks
        self.level_channels = [model_channels * mult for mult in channel_mult]
        self.attn_resolutions = list(attn_resolutions)

    def forward(self, x, noise_labels, class_labels=None, augment_labels=None, extra_embedding=None):
        emb = self.embed(noise_labels, class_labels, augment_labels, extra_embedding, batch=x.shape[0])
        x, skips = self.encode(x.contiguous(memory_format=self.memory_format), emb)
        return self.decode(x, skips, emb)

    def features_per_image(self):
        """The skips, num_blocks + 1 feature maps per level, and one more per level."""
        return sum((self.num_blocks + 2) * channels * (self.img_resolution >> level) ** 2
                   for level, channels in enumerate(self.level_channels))

    def drop_labels(self, labels, batch):
        """In training, zero each image's labels with the probability `label_dropout`, for classifier-free guidance."""
        if not (self.training and self.label_dropout):
            return labels
        keep = torch.rand([batch, 1], device=labels.device) >= self.label_dropout
        return labels * keep.to(labels.dtype)

    def run_layer(self, layer, x, emb):
        """Run a layer: blocks take the embedding, plain convolutions do not."""
        return self.run_block(layer, x, emb) if isinstance(layer, UNetBlock) else layer(x)

    def run_decoder_block(self, block, x, skips, emb):
        """Run a block, first concatenating the latest skip if the block takes more channels than x has."""
        if block.in_channels == x.shape[1]:
            return self.run_block(block, x, emb)
        return self.run_block(lambda *inputs: block(torch.cat(inputs[:2], dim=1), inputs[2]), x, skips.pop(), emb)

    # -- construction

    def build(self, style, stem_channels):
        """Create `enc` and `dec` from blocks of that style, with stem_channels out of the first convolution."""
        self.enc, self.dec = torch.nn.ModuleDict(), torch.nn.ModuleDict()
        skip_channels = self._build_encoder(style, stem_channels)
        self._build_decoder(style, skip_channels)

    def _build_encoder(self, style, channels):
        self.enc[self._key(0, 'conv')] = Conv2d(self.in_channels, channels, 3, style.init)
        skip_channels = [channels]
        for level, level_channels in enumerate(self.level_channels):
            if level > 0:
                self.enc[self._key(level, 'down')] = UNetBlock(channels, channels, style, down=True)
                self.add_encoder_aux(style, level, channels)
                skip_channels.append(channels)
            for i in range(self.num_blocks):
                self.enc[self._key(level, f'block{i}')] = UNetBlock(channels, level_channels, style,
                                                                    attention=self._attends(level))
                channels = level_channels
                skip_channels.append(channels)
        return skip_channels

    def _build_decoder(self, style, skip_channels):
        last = len(self.level_channels) - 1
        channels = skip_channels[-1]
        for level, level_channels in reversed(list(enumerate(self.level_channels))):
            if level == last:
                self.dec[self._key(level, 'in0')] = UNetBlock(channels, channels, style, attention=True)
                self.dec[self._key(level, 'in1')] = UNetBlock(channels, channels, style)
            else:
                self.dec[self._key(level, 'up')] = UNetBlock(channels, channels, style, up=True)
            for i in range(self.num_blocks + 1):
                attention = self._attends(level) and self.decoder_block_may_attend(i)
                self.dec[self._key(level, f'block{i}')] = UNetBlock(channels + skip_channels.pop(), level_channels,
                                                                    style, attention=attention)
                channels = level_channels
            self.add_decoder_aux(style, level, channels)

    def _key(self, level, kind):
        res = self.img_resolution >> level
        return f'{res}x{res}_{kind}'

    def _attends(self, level):
        return self.img_resolution >> level in self.attn_resolutions

    def decoder_block_may_attend(self, index):
        """Whether the index-th decoder block of a level in attn_resolutions has attention."""
        return True

    def add_encoder_aux(self, style, level, channels):
        """Called after each down block; a subclass may add its own layers to `enc`."""

    def add_decoder_aux(self, style, level, channels):
        """Called after each level's blocks; a subclass may add its own layers to `dec`."""


def kinds(layers):
    """(kind, layer) for every entry of `enc` or `dec`: its key without the resolution."""
    return ((name.split('_', 1)[1], layer) for name, layer in layers.items())


# name → class or function that makes the noise embedding from the number of channels
EMBEDDINGS = {
    'positional': lambda channels: PositionalEmbedding(channels, endpoint=True, sin_first=True),
    'fourier': FourierEmbedding,
}
ENCODERS = ('standard', 'skip', 'residual')
DECODERS = ('standard', 'skip')


class SongUNet(UNet):
    """DDPM++ (positional, standard, standard), NCSN++ (fourier, residual, standard) and kin.

    Args:
        img_resolution, in_channels, out_channels: Size of the images, and channels in and out.
        label_dim, augment_dim: Width of the labels, 0 for none.
        model_channels, channel_mult: Channels of level i are model_channels·channel_mult[i].
        channel_mult_emb, channel_mult_noise: Widths of the embedding and the noise embedding, in model_channels.
        num_blocks, attn_resolutions: Blocks per level, and the resolutions with attention.
        dropout, label_dropout: Probabilities, active in training only.
        embedding_type: A name in EMBEDDINGS.
        encoder_type: One of ENCODERS: plain; the downsampled image added at each level (skip); a residual pyramid.
        decoder_type: One of DECODERS: output at the highest resolution, or a sum over all (skip).
        resample_filter: 1-D filter of all resampling: [1, 1] for DDPM++, [1, 3, 3, 1] for NCSN++.

    Raises:
        UserError: an unknown type, or an image size that the levels do not fit.
    """

    small = dict(model_channels=8, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4])

    def __init__(self, img_resolution, in_channels, out_channels, label_dim=0, augment_dim=0, model_channels=128,
                 channel_mult=(1, 2, 2, 2), channel_mult_emb=4, num_blocks=4, attn_resolutions=(16,), dropout=0.10,
                 label_dropout=0, embedding_type='positional', channel_mult_noise=1, encoder_type='standard',
                 decoder_type='standard', resample_filter=(1, 1)):
        make_embedding = chosen('embedding_type', embedding_type, EMBEDDINGS)
        chosen('encoder_type', encoder_type, ENCODERS)
        chosen('decoder_type', decoder_type, DECODERS)
        super().__init__(img_resolution, in_channels, out_channels, model_channels, channel_mult, num_blocks,
                         attn_resolutions, noise_channels=model_channels * channel_mult_noise)
        self.label_dim, self.label_dropout = label_dim, label_dropout
        self.encoder_type, self.decoder_type = encoder_type, decoder_type
        emb_channels = model_channels * channel_mult_emb
        init = Init('xavier_uniform')

        self.map_noise = make_embedding(self.noise_channels)
        self.map_label = Linear(label_dim, self.noise_channels, init) if label_dim else None
        self.map_augment = Linear(augment_dim, self.noise_channels, init, bias=False) if augment_dim else None
        self.map_layer0 = Linear(self.noise_channels, emb_channels, init)
        self.map_layer1 = Linear(emb_channels, emb_channels, init)
        style = BlockStyle(emb_channels, dropout, skip_scale=math.sqrt(0.5), eps=1e-6, init=init,
                           init_zero=Init('xavier_uniform', weight=1e-5),
                           init_attn=Init('xavier_uniform', weight=math.sqrt(0.2)),
                           resample_filter=tuple(resample_filter), resample_proj=True)
        self.build(style, stem_channels=model_channels)

    def embed(self, noise_labels, class_labels, augment_labels, extra_embedding, batch):
        """Embedding [B or 1, emb_channels] of the noise level and all other conditions."""
        emb = self.map_noise(noise_labels)
        if extra_embedding is not None:
            emb = emb + extra_embedding
        if self.map_label is not None:
            emb = emb + self.map_label(self.drop_labels(class_labels, batch) * math.sqrt(self.label_dim))
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def decoder_block_may_attend(self, index):
        return index == self.num_blocks

    @property
    def output_layers(self):
        """One per level that adds to the image; all but the finest only with the skip decoder."""
        return tuple(f'dec.{key}' for key in self.dec if key.endswith('_aux_conv'))

    def add_encoder_aux(self, style, level, channels):
        resampling = dict(down=True, resample_filter=style.resample_filter)
        if self.encoder_type == 'skip':
            self.enc[self._key(level, 'aux_down')] = Conv2d(self.in_channels, self.in_channels, 0, **resampling)
            self.enc[self._key(level, 'aux_skip')] = Conv2d(self.in_channels, channels, 1, style.init)
        if self.encoder_type == 'residual':
            # The pyramid starts from the image; from then on it is the level's own feature map.
            aux_channels = self.in_channels if level == 1 else self.level_channels[level - 2]
            self.enc[self._key(level, 'aux_residual')] = Conv2d(aux_channels, channels, 3, style.init,
                                                                fused_resample=True, **resampling)

    def add_decoder_aux(self, style, level, channels):
        if level > 0 and self.decoder_type != 'skip':
            return
        if level < len(self.level_channels) - 1 and self.decoder_type == 'skip':
            self.dec[self._key(level, 'aux_up')] = Conv2d(self.out_channels, self.out_channels, 0, up=True,
                                                          resample_filter=style.resample_filter)
        self.dec[self._key(level, 'aux_norm')] = GroupNorm(channels, style.eps)
        self.dec[self._key(level, 'aux_conv')] = Conv2d(channels, self.out_channels, 3, style.init_zero)

    def encode(self, x, emb):
        """Image → (coarsest features, skips), the auxiliary image pyramid joined at each level."""
        skips, aux = [], x
        for kind, layer in kinds(self.enc):
            if kind == 'aux_down':
                aux = layer(aux)
            elif kind == 'aux_skip':
                x = skips[-1] = x + layer(aux)
            elif kind == 'aux_residual':
                x = skips[-1] = aux = (x + layer(aux)) * math.sqrt(0.5)
            else:
                x = self.run_layer(layer, x, emb)
                skips.append(x)
        return x, skips

    def decode(self, x, skips, emb):
        """Features → image; with the skip decoder, the sum of all levels' images, upsampled on the way."""
        image = 0
        for kind, layer in kinds(self.dec):
            if kind == 'aux_up':
                image = layer(image)
            elif kind == 'aux_norm':
                normed = layer(x, silu=True)
            elif kind == 'aux_conv':
                image = image + layer(normed)
            else:
                x = self.run_decoder_block(layer, x, skips, emb)
        return image


class DhariwalUNet(UNet):
    """ADM: adaptive group norm, 64 channels per attention head. Arguments as for SongUNet."""

    small = dict(model_channels=16, channel_mult=[1, 4], num_blocks=1, attn_resolutions=[4])
    output_layers = ('out_conv',)

    def __init__(self, img_resolution, in_channels, out_channels, label_dim=0, augment_dim=0, model_channels=192,
                 channel_mult=(1, 2, 3, 4), channel_mult_emb=4, num_blocks=3, attn_resolutions=(32, 16, 8),
                 dropout=0.10, label_dropout=0):
        super().__init__(img_resolution, in_channels, out_channels, model_channels, channel_mult, num_blocks,
                         attn_resolutions, noise_channels=model_channels)
        self.label_dropout = label_dropout
        emb_channels = model_channels * channel_mult_emb
        init = Init('kaiming_uniform', weight=math.sqrt(1 / 3), bias=math.sqrt(1 / 3))
        init_zero = Init('kaiming_uniform', weight=0, bias=0)
        init_label = Init('kaiming_normal', weight=math.sqrt(label_dim))

        self.map_noise = PositionalEmbedding(model_channels, endpoint=False, sin_first=False)
        self.map_augment = Linear(augment_dim, model_channels, init_zero, bias=False) if augment_dim else None
        self.map_layer0 = Linear(model_channels, emb_channels, init)
        self.map_layer1 = Linear(emb_channels, emb_channels, init)
        self.map_label = Linear(label_dim, emb_channels, init_label, bias=False) if label_dim else None
        style = BlockStyle(emb_channels, dropout, skip_scale=1.0, eps=1e-5, init=init, init_zero=init_zero,
                           init_attn=init, adaptive_scale=True, channels_per_head=64)
        self.build(style, stem_channels=self.level_channels[0])
        self.out_norm = GroupNorm(self.level_channels[0])
        self.out_conv = Conv2d(self.level_channels[0], out_channels, 3, init_zero)

    def embed(self, noise_labels, class_labels, augment_labels, extra_embedding, batch):
        """Embedding [B or 1, emb_channels] of the noise level and all other conditions."""
        emb = self.map_noise(noise_labels)
        if extra_embedding is not None:
            emb = emb + extra_embedding
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None:
            emb = emb + self.map_label(self.drop_labels(class_labels, batch))
        return F.silu(emb)

    def encode(self, x, emb):
        """Image → (coarsest features, skips)."""
        skips = []
        for layer in self.enc.values():
            x = self.run_layer(layer, x, emb)
            skips.append(x)
        return x, skips

    def decode(self, x, skips, emb):
        """Features → image."""
        for block in self.dec.values():
            x = self.run_decoder_block(block, x, skips, emb)
        return self.out_conv(self.out_norm(x, silu=True))


MODELS = {'SongUNet': SongUNet, 'DhariwalUNet': DhariwalUNet}

# What --arch stands for: the network's arguments, as in EDM. --cbase and --cres replace two of them, if it has these.
ARCHITECTURES = {
    'ddpmpp': dict(model_type='SongUNet', embedding_type='positional', encoder_type='standard',
                   decoder_type='standard', channel_mult_noise=1, resample_filter=[1, 1], model_channels=128,
                   channel_mult=[2, 2, 2]),
    'ncsnpp': dict(model_type='SongUNet', embedding_type='fourier', encoder_type='residual',
                   decoder_type='standard', channel_mult_noise=2, resample_filter=[1, 3, 3, 1], model_channels=128,
                   channel_mult=[2, 2, 2]),
    'adm': dict(model_type='DhariwalUNet', model_channels=192, channel_mult=[1, 2, 3, 4]),
}
