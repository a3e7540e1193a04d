"""Products with sums of cosines, c_BLHK of cosine_sums.py: rows y = c s and states s = c^T x.

Over few places c is written and multiplied with, in time and memory that grow with L K; over more, where that is a
square of the length, the sums go by Fourier transforms and interpolation, in linear time (nonuniform.py).
Axes: B batch, L length, H heads, R rank (terms of a sum), K places of the sums, P head width.
"""

import torch
from torch import Tensor

from bench.kernels.cosine_sums import cosine_sums
from bench.kernels.low_rank import apply_states, gather_rows
from bench.kernels.nonuniform import apply_nonuniform, gather_nonuniform

FEW = 1536
"""Places of which c is written: of rows of 12,000 tokens under the yaml's bound."""


def are_many(size: int) -> bool:
    return size > FEW


def apply_cosines(f_BLHR: Tensor, s_BHKP: Tensor, spacing: int) -> Tensor:
    """Rows y_BLHP = c s in the dtype of s, c of K places 0, spacing, ...; frequencies in fp32, of one row or of all."""
    batch, _, size, _ = s_BHKP.shape
    if are_many(size):
        return apply_nonuniform(f_BLHR, s_BHKP, spacing)
    return apply_states(_written(f_BLHR, batch, spacing, size, s_BHKP.dtype), s_BHKP)


def gather_cosines(f_BLHR: Tensor, x_BLHP: Tensor, spacing: int, size: int) -> Tensor:
    """States s_BHKP = c^T x in the dtype of x, K = `size`; added up in fp32."""
    if are_many(size):
        return gather_nonuniform(f_BLHR, x_BLHP, spacing, size)
    return gather_rows(_written(f_BLHR, len(x_BLHP), spacing, size, x_BLHP.dtype), x_BLHP)


def _written(f_BLHR: Tensor, batch: int, spacing: int, size: int, dtype: torch.dtype) -> Tensor:
    return cosine_sums(f_BLHR, spacing, size, dtype).expand(batch, -1, -1, -1)
