"""Warm Diffusion (blur–noise mixture diffusion): blur, paths, network, loss, samplers, and the registry of systems.

    from warm import load, sample
    net = load('network-snapshot-000200.safetensors')
    images = sample(net, seeds=range(16))
"""

from warm.api import load, sample

__all__ = ['load', 'sample']
