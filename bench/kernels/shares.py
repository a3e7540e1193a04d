"""The gradient of a weight that all rows share, added up from the programs that each summed some of the rows.

Always in the same order, so that it repeats; torch's own sum over so few columns keeps little of a GPU busy.
Axes: S shares, C columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

SHARES, COLUMNS = 128, 16
"""Of a program's tile: it walks down its columns, so many shares at a time."""


@triton.jit(do_not_specialize=["shares"])
def _added(part_ptr, sum_ptr, shares, columns, S: tl.constexpr, C: tl.constexpr):
    c_C, s_S = tl.program_id(0) * C + tl.arange(0, C), tl.arange(0, S)
    sum_SC = tl.zeros((S, C), tl.float32)
    for s in range(0, shares, S):
        known_SC = (s + s_S < shares)[:, None] & (c_C < columns)[None, :]
        sum_SC += tl.load(part_ptr + (s + s_S)[:, None].to(tl.int64) * columns + c_C[None, :], mask=known_SC, other=0.0)
    tl.store(sum_ptr + c_C, tl.sum(sum_SC, 0), mask=c_C < columns)


def summed(part_SC: Tensor) -> Tensor:
    """sum_C of contiguous fp32 shares."""
    shares, columns = part_SC.shape
    sum_C = torch.empty(columns, dtype=torch.float32, device=part_SC.device)
    _added[(triton.cdiv(columns, COLUMNS),)](part_SC, sum_C, shares, columns, S=SHARES, C=COLUMNS)
    return sum_C
