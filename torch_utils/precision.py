"""The precisions that a network can run in, and how CUDA rounds float32 products.

The latter is a process-wide setting, so it is changed only where needed, and then restored.
"""

import contextlib
from typing import NamedTuple

import torch


class Precision(NamedTuple):
    """How a network is computed: the dtype of its features; whether CUDA rounds float32 products to TF32."""

    dtype: torch.dtype
    tf32: bool = False
    cuda_only: bool = False  # elsewhere float32, as in EDM

    def dtype_on(self, device):
        """The dtype on a torch.device."""
        return torch.float32 if self.cuda_only and device.type != 'cuda' else self.dtype


PRECISIONS = {
    'fp32': Precision(torch.float32),
    'tf32': Precision(torch.float32, tf32=True),
    'bf16': Precision(torch.bfloat16),
    'fp16': Precision(torch.float16, cuda_only=True),
}


def effective_precision(name, device):
    """The name of the precision that a network set to `name` really has on a torch.device."""
    only_cuda = PRECISIONS[name].cuda_only or PRECISIONS[name].tf32
    return 'fp32' if only_cuda and device.type != 'cuda' else name


@contextlib.contextmanager
def float32_products(tf32):
    """Context or decorator: CUDA rounds float32 products and convolutions to TF32 (10-bit mantissa), or not at all.

    A backward pass follows the setting at the time it runs, so it needs the same context. Within it, products of
    float16 are accumulated in float32.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    former = matmul.allow_tf32, cudnn.allow_tf32, matmul.allow_fp16_reduced_precision_reduction
    try:
        matmul.allow_tf32 = cudnn.allow_tf32 = tf32
        matmul.allow_fp16_reduced_precision_reduction = False
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, matmul.allow_fp16_reduced_precision_reduction = former
