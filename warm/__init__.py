"""Warm Diffusion (blur–noise mixture diffusion): blur, paths, network, loss, samplers, and the registry of systems."""
