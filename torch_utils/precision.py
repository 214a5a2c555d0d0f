"""How CUDA rounds float32 products. The setting is the whole process's, so it is made where it is needed and undone."""

import contextlib

import torch


@contextlib.contextmanager
def float32_products(tf32):
    """Within it, CUDA's float32 products and convolutions are rounded to TF32 (10 bits of mantissa), or not at all.

    A backward pass is rounded as the setting of its own moment says, so it needs the same context. Products of
    float16 are summed in float32 within it. Also a decorator.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    former = matmul.allow_tf32, cudnn.allow_tf32, matmul.allow_fp16_reduced_precision_reduction
    try:
        matmul.allow_tf32 = cudnn.allow_tf32 = tf32
        matmul.allow_fp16_reduced_precision_reduction = False
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, matmul.allow_fp16_reduced_precision_reduction = former
