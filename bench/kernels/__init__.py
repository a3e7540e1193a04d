"""Fast paths in Triton, each an operator of torch with its own gradient, held to plain torch by the tests.

They know tensors, not mixers: the shell's convolution (conv.py), gated norm (gated_norm.py), linear maps of one input
(maps.py) and products of fp32 (exact_product.py), a residual with its norm (add_norm.py), products with a matrix of
low rank (low_rank.py), with one of cosines at a grid's points (cosine_sums.py, grid_product.py) or, for long rows, by
Fourier transforms (grid_sums.py, nonuniform.py), with a sum of exponentials (exponential_product.py), with a Toeplitz
matrix (toeplitz.py) and with that of softmax attention (softmax.py), scans (scan.py), the loss over a vocabulary
(cross_entropy.py). They need triton, which CUDA builds of torch bring. Without a GPU they run in Triton's interpreter
(TRITON_INTERPRET=1), which is how the tests hold them on any machine.
"""

import importlib.util

import torch
from torch import Tensor

from bench import NotInstalled


def present() -> bool:
    return importlib.util.find_spec("triton") is not None


def warps(most: int, rows: int) -> int:
    """Of a program whose products have so many rows: `most` if each has 16, else four.

    More would share out the columns instead, and Triton 3.6 then reads beyond its shared memory where fp32 is
    multiplied in parts (tf32x3): seen on an H200 in the gradient of attention's queries, 64 x 16.
    """
    return most if rows >= 16 * most else min(most, 4)


def tile(size: int, most: int) -> int:
    """Of an axis: a power of two, at least what a product takes."""
    return min(most, max(16, 1 << (size - 1).bit_length()))


def precision(dtype: torch.dtype) -> str:
    """Of products of fp32, three in TF32 for one; it means nothing to others."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


def dense_last(x: Tensor) -> Tensor:
    """x with its last axis side by side in memory: a slice of wider rows may stay as it is."""
    return x if x.stride(-1) == 1 else x.contiguous()


def require_triton() -> None:
    """Refuse now rather than in the first step: call it before importing kernels."""
    if not present():
        raise NotInstalled("backend 'triton' needs the package triton, which is not installed; use: torch")
