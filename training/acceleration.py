"""How a network runs: precision, memory layout, recomputation, compilation. None of it enters a snapshot."""

import torch

from dnnlib import UserError
from torch_utils.precision import PRECISIONS

# Values that many others read are computed again where they are read: in the backward pass of the norms the compiler
# would otherwise write float32 features to memory, which costs more than all their arithmetic.
GPU_OPTIONS = {'realize_reads_threshold': 32, 'realize_opcount_threshold': 300}
RUN_OPTIONS = ('precision', 'compile')  # what commands that draw images offer of `accelerate`'s arguments


def accelerate(net, precision=None, channels_last=None, recompute=False, compile=False, cuda_graphs=False,
               backend='inductor'):
    """Set how a preconditioned network runs from now on; its weights stay as they are.

    Args:
        net: training.precond.Precond, on its device.
        precision: A name in torch_utils.precision.PRECISIONS; None leaves the network's own.
        channels_last: Lay features out with the channels of a pixel side by side; None does where it should pay
            (`wants_channels_last`).
        recompute: Keep only the inputs of the blocks for the backward pass: less memory, a third more work.
        compile: torch.compile F, once for every shape of its input.
        cuda_graphs: When compiled for CUDA, replay each call as one graph; for drawing, without gradients.
        backend: Of torch.compile. Others than its own get none of our options; 'aot_eager' takes seconds, to try what
            surrounds a compiled network, and makes it no faster.

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
    """Whether `accelerate` has compiled a network, for which every new shape of its input takes minutes at first.

    A copy of it is not compiled, nor is what stands in for its U-Net.
    """
    return getattr(net.model, '_compiled_call_impl', None) is not None


def wants_channels_last(device, precision, compile):
    """Whether features are laid out by pixels where nobody says so: on a GPU, compiled, in 16 bits.

    There cuDNN's 16-bit convolutions take that layout alone, and the compiler, which would choose it for most networks,
    leaves training in the other one if a single convolution has less than half as many outputs as inputs, as the last
    of these has. On the CPUs measured it is no faster (docs/performance.md).
    """
    return device.type == 'cuda' and compile and PRECISIONS[precision].dtype != torch.float32


def check_compiler(device):
    """Raise UserError unless torch.compile works for a device, by trying it; a few seconds at first."""
    try:
        torch.compile(_tiny, dynamic=False)(torch.ones([8], device=device))
    except Exception as e:  # whatever the compilers of two devices raise
        reason = next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__)
        raise UserError(f'--compile does not work here ({reason[:200]}); on a GPU it needs the package triton, on the '
                        'CPU a C++ compiler such as g++: install it, or leave --compile out') from e


def _tiny(x):
    return x.sin() + 1
