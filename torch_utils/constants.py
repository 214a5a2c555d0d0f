"""Tensors that never change: computed once per device."""

import functools

import torch


def constant(function):
    """Cache the tensors a function returns, computed outside inference mode since autograd may need them later."""
    return functools.lru_cache(maxsize=32)(torch.inference_mode(False)(function))
