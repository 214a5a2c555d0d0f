"""SongUNet against a plain reference: every kind of encoder and decoder, over three levels.

The recorded networks have two levels, which do not show what an auxiliary pyramid does from the second halving on. This
reference spells the network out level by level, from the description in Karras et al. 2022 and Song et al. 2021.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from training.unet import DECODERS, ENCODERS, SongUNet

RESOLUTION, LEVELS, BLOCKS, ATTENTION = 16, 3, 2, (16, 8)
LABELS = 5


def down(x, low_pass, padding=None):
    """Low-pass each channel, keep every second pixel."""
    padding = (low_pass.shape[-1] - 1) // 2 if padding is None else padding
    return F.conv2d(x, low_pass.repeat(x.shape[1], 1, 1, 1), stride=2, padding=padding, groups=x.shape[1])


def up(x, low_pass):
    """Zeros between the pixels, low-pass with gain 4."""
    return F.conv_transpose2d(x, (low_pass * 4).repeat(x.shape[1], 1, 1, 1), stride=2,
                              padding=(low_pass.shape[-1] - 1) // 2, groups=x.shape[1])


def dropout(x, p, training=True):
    """As PyTorch's, but its mask does not depend on the order in which the features lie in memory."""
    return x * (torch.rand(x.shape) >= p) / (1 - p) if training else x


class Reference:
    """The forward pass from a state dict alone; `encoder` and `decoder` as in SongUNet, no dropout in evaluation."""

    def __init__(self, state, encoder, decoder, dropout=0, label_dropout=0):
        self.state, self.encoder, self.decoder = state, encoder, decoder
        self.dropout, self.label_dropout = dropout, label_dropout

    def conv(self, x, name):
        weight = self.state[f'{name}.weight']
        return F.conv2d(x, weight, self.state[f'{name}.bias'], padding=weight.shape[-1] // 2)

    def norm(self, x, name):
        groups = min(32, x.shape[1] // 4)
        return F.group_norm(x, groups, self.state[f'{name}.weight'], self.state[f'{name}.bias'], 1e-6)

    def linear(self, x, name):
        return F.linear(x, self.state[f'{name}.weight'], self.state[f'{name}.bias'])

    def attention(self, x, name):
        batch, channels, height, width = x.shape
        q, k, v = self.conv(self.norm(x, f'{name}.norm2'), f'{name}.qkv').reshape(batch, channels, 3, -1).unbind(2)
        weights = torch.einsum('ncq,nck->nqk', q, k / math.sqrt(channels)).softmax(2)
        a = torch.einsum('nqk,nck->ncq', weights, v).reshape(batch, channels, height, width)
        return (self.conv(a, f'{name}.proj') + x) * math.sqrt(0.5)

    def block(self, x, emb, name, resample=lambda x, low_pass: x, attention=False):
        low_pass = self.state.get(f'{name}.conv0.resample_filter')
        h = resample(F.silu(self.norm(x, f'{name}.norm0')), low_pass)
        h = self.conv(h, f'{name}.conv0') + self.linear(emb, f'{name}.affine')[:, :, None, None]
        h = self.conv(dropout(F.silu(self.norm(h, f'{name}.norm1')), self.dropout), f'{name}.conv1')
        skip = resample(x, low_pass)
        if f'{name}.skip.weight' in self.state:
            skip = self.conv(skip, f'{name}.skip')
        x = (skip + h) * math.sqrt(0.5)
        return self.attention(x, name) if attention else x

    def embedding(self, noise, labels):
        if 'map_noise.freqs' in self.state:
            phase = noise.outer(2 * math.pi * self.state['map_noise.freqs'])
        else:
            half = self.state['map_layer0.weight'].shape[1] // 2
            phase = noise.outer((1 / 10000) ** (torch.arange(half) / (half - 1)))
        if self.label_dropout:
            labels = labels * (torch.rand([len(labels), 1]) >= self.label_dropout)
        emb = torch.cat([phase.sin(), phase.cos()], 1) + self.linear(labels * math.sqrt(LABELS), 'map_label')
        return F.silu(self.linear(F.silu(self.linear(emb, 'map_layer0')), 'map_layer1'))

    def __call__(self, x, noise, labels):
        emb, image, skips = self.embedding(noise, labels), x, []
        for level in range(LEVELS):
            size = RESOLUTION >> level
            name = f'enc.{size}x{size}_'
            if level == 0:
                x = self.conv(x, f'{name}conv')
            else:
                x = self.block(x, emb, f'{name}down', down)
                x, image = self.joined(x, image, name)
            skips.append(x)
            for i in range(BLOCKS):
                x = self.block(x, emb, f'{name}block{i}', attention=size in ATTENTION)
                skips.append(x)
        total = None
        for level in reversed(range(LEVELS)):
            size = RESOLUTION >> level
            name = f'dec.{size}x{size}_'
            if level == LEVELS - 1:
                x = self.block(x, emb, f'{name}in0', attention=True)
                x = self.block(x, emb, f'{name}in1')
            else:
                x = self.block(x, emb, f'{name}up', up)
            for i in range(BLOCKS + 1):
                attention = size in ATTENTION and i == BLOCKS
                x = self.block(torch.cat([x, skips.pop()], 1), emb, f'{name}block{i}', attention=attention)
            if self.decoder == 'skip' or level == 0:
                out = self.conv(F.silu(self.norm(x, f'{name}aux_norm')), f'{name}aux_conv')
                # The images of all levels are summed, each enlarged on its way up.
                total = out if total is None else up(total, self.state[f'{name}aux_up.resample_filter']) + out
        return total

    def joined(self, x, image, name):
        """(features, pyramid) after a level's auxiliary layers."""
        if self.encoder == 'skip':
            image = down(image, self.state[f'{name}aux_down.resample_filter'])
            x = x + self.conv(image, f'{name}aux_skip')
        if self.encoder == 'residual':
            low_pass = self.state[f'{name}aux_residual.resample_filter']
            wide = F.conv2d(image, self.state[f'{name}aux_residual.weight'], padding=1 + (low_pass.shape[-1] - 1) // 2)
            bias = self.state[f'{name}aux_residual.bias'].reshape(1, -1, 1, 1)
            image = x = (x + down(wide, low_pass, padding=0) + bias) / math.sqrt(2)
        return x, image


@torch.no_grad()
@pytest.mark.parametrize('taps', [(1, 1), (1, 3, 3, 1)], ids=str)
@pytest.mark.parametrize('decoder', DECODERS)
@pytest.mark.parametrize('encoder', ENCODERS)
def test_equals_the_reference_over_three_levels(encoder, decoder, taps, monkeypatch):
    """In evaluation, and in training with the same random numbers: dropout before each block's second convolution."""
    monkeypatch.setattr(F, 'dropout', dropout)
    torch.manual_seed(0)
    embedding = dict(embedding_type='fourier' if taps == (1, 3, 3, 1) else 'positional', channel_mult_noise=2)
    net = SongUNet(RESOLUTION, 3, 3, label_dim=LABELS, model_channels=8, channel_mult=[1, 2, 3], num_blocks=BLOCKS,
                   attn_resolutions=ATTENTION, encoder_type=encoder, decoder_type=decoder, resample_filter=taps,
                   dropout=0.3, label_dropout=0.5, **embedding)
    for p in net.parameters():  # unit gain throughout, so that no layer is lost in the others
        p.copy_(torch.randn_like(p) * 0.5 / math.sqrt(max(p[0].numel(), 1)) + (p.ndim == 1))
    x, noise, labels = torch.randn([2, 3, RESOLUTION, RESOLUTION]), torch.randn([2]), torch.eye(LABELS)[:2]
    for training, dropouts in ((False, ()), (True, (0.3, 0.5))):
        torch.manual_seed(1)
        expected = Reference(net.state_dict(), encoder, decoder, *dropouts)(x, noise, labels)
        torch.manual_seed(1)
        actual = net.train(training)(x, noise, labels)
        assert actual.shape == expected.shape == x.shape
        assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
