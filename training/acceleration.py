"""How a network runs: precision, memory layout, recomputation, compilation. None of this is stored in snapshots."""

import contextlib

import torch

from dnnlib import UserError
from torch_utils.precision import PRECISIONS

# Recompute values that have many readers: otherwise, in the backward pass of the norms, the compiler writes float32
# features to memory, which costs more than all the arithmetic on them.
GPU_OPTIONS = {'realize_reads_threshold': 32, 'realize_opcount_threshold': 300}
RUN_OPTIONS = ('precision', 'compile')  # arguments of `accelerate` that the sampling commands offer


def accelerate(net, precision=None, channels_last=None, recompute=False, compile=False, cuda_graphs=False,
               backend='inductor'):
    """Set how a preconditioned network runs from now on; its weights are unchanged.

    Args:
        net: training.precond.Precond, on its device.
        precision: A name in torch_utils.precision.PRECISIONS; None keeps the network's own.
        channels_last: Whether features use the channels-last memory format; None uses it where it should pay off
            (`wants_channels_last`).
        recompute: Activation checkpointing: keep only the blocks' inputs for the backward pass. Less memory, a third
            more work.
        compile: torch.compile F, once for every input shape.
        cuda_graphs: When compiled for CUDA, replay each call as one CUDA graph; for sampling, without gradients.
        backend: Backend of torch.compile. Only the default one gets our options. 'aot_eager' compiles in seconds and
            makes nothing faster; it is for testing the code around a compiled network.

    Returns:
        `net`.

    Raises:
        UserError: an unknown precision; recomputation or compilation where it is impossible.
    """
    if precision is not None:
        net.precision = precision
    device = next(net.parameters()).device
    if channels_last is None:
        channels_last = wants_channels_last(device, net.precision, compile)
    if channels_last:
        net.model.set_memory_format(torch.channels_last)
    if recompute:
        net.model.check_recompute()
    net.model.recompute = recompute
    if compile:
        if backend == 'inductor':
            check_compiler(device)
        torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 32)
        ours = {**GPU_OPTIONS, 'triton.cudagraphs': cuda_graphs} if device.type == 'cuda' else {}
        net.model.compile(dynamic=False, backend=backend, options=ours if backend == 'inductor' else None)
    return net


def is_compiled(net):
    """Whether `accelerate` has compiled this network, so that each new input shape costs minutes the first time.

    A copy of a compiled network is not compiled, nor is one whose U-Net has been replaced.
    """
    return getattr(net.model, '_compiled_call_impl', None) is not None


def uncompiled(net):
    """Context in which a network that `accelerate` has compiled runs as it is written."""
    return torch.compiler.set_stance('force_eager') if is_compiled(net) else contextlib.nullcontext()


def wants_channels_last(device, precision, compile):
    """Whether channels-last is the default: on a GPU, compiled, in 16 bits.

    cuDNN's 16-bit convolutions support only that layout. The compiler would choose it for most networks, but
    trains in the other layout if a single convolution has less than half as many outputs as inputs, as the last one of
    these networks has. On the CPUs measured it is no faster (docs/performance.md).
    """
    return device.type == 'cuda' and compile and PRECISIONS[precision].dtype != torch.float32


def check_compiler(device):
    """Raise UserError unless torch.compile works on a device; trying it takes a few seconds the first time."""
    try:
        torch.compile(_tiny, dynamic=False)(torch.ones([8], device=device))
    except Exception as e:  # the compilers for CPU and GPU raise all kinds of errors
        reason = next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__)
        raise UserError(f'--compile does not work here ({reason[:200]}); on a GPU it needs the package triton, on the '
                        'CPU a C++ compiler such as g++: install it, or leave --compile out') from e


def _tiny(x):
    return x.sin() + 1
