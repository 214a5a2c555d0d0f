"""Small networks of every system and architecture, with all weights moved away from their (often zero) start."""

import pytest
import torch

from training.dataset import EMBEDDED
from training.networks import EDMPrecond
from warm.systems import SYSTEMS

NETWORKS = {
    'SongUNet': dict(model_type='SongUNet', model_channels=32, resample_filter=[1, 3, 3, 1], encoder_type='residual'),
    'DhariwalUNet': dict(model_type='DhariwalUNet', model_channels=64),
}
DEVICES = ['cpu', pytest.param('cuda', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU'))]
TINY = dict(model_type='SongUNet', model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[])
TRAINABLE = [name for name, system in SYSTEMS.items() if system.trainable]
# Steps enough for any of a system's options: with fewer, Blur Diffusion refuses --reverse-step=ancestral.
FEW = {'blurring': {'num_steps': 3}, 'lee': {'num_steps': 10}, 'cold': {'num_steps': 3}, 'ihdm': {}}


def make_net(model_type='SongUNet', network_class=EDMPrecond, device='cpu', **kwargs):
    """An 8×8 network with all weights away from their (often zero) start, in training mode without dropout."""
    torch.manual_seed(0)
    net = network_class(img_resolution=8, img_channels=3, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4],
                        dropout=0, **NETWORKS[model_type], **kwargs)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return net.to(device)


def outputs_and_gradients(net, x, c_noise):
    """([F], gradients of all parameters) for the loss F²."""
    net.zero_grad(set_to_none=True)
    F_x = net.run_model(x, c_noise)
    with net.products():
        F_x.square().mean().backward()
    return [F_x], [p.grad for p in net.parameters() if p.grad is not None]


def distance(a, b):
    """‖a − b‖/‖b‖ over all tensors."""
    a, b = (torch.cat([t.detach().double().flatten() for t in tensors]) for tensors in (a, b))
    return ((a - b).norm() / b.norm()).item()


def tiny_network(name, **options):
    """A system's network for one-channel images of 8×8, in evaluation mode."""
    torch.manual_seed(0)
    system = SYSTEMS[name]
    kwargs = {**system.network_kwargs(options), **TINY}
    net = system.network_class(img_resolution=8, img_channels=1, **kwargs)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    return net.eval().requires_grad_(False)


def short_network(name):
    """`tiny_network`, with few levels where the network fixes their number."""
    return tiny_network(name, **({'ihdm_levels': 3} if name == 'ihdm' else {}))


def few_steps(name):
    """Options that make a system's sampler quick."""
    options = dict(FEW.get(name, {'num_steps': 2}))
    if SYSTEMS[name].starts_from_data:
        options['data'] = EMBEDDED
    return options
