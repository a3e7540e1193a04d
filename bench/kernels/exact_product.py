"""x W^T of fp32 in fp32's precision, by tensor cores, which take bf16.

A number of 24 bits is the sum of three of bf16, x = x1 + x2 + x3. Of the nine products of two numbers' parts the six
that fp32 would notice are added up in fp32, the small ones first, as one product of rows six times as long. Its error
is near that of a product in fp32 (`exact_features` of tests/kernel_cases.py holds the two together).
Axes: N rows of x, M rows of W, D width, S all parts of a row; X numbers of a tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LEFT, RIGHT = (2, 1, 0, 1, 0, 0), (0, 1, 2, 0, 1, 0)
"""Parts of x and of W that meet."""
NUMBERS, WARPS = 1024, 4  # of a program
WIDENS = "dtype" in torch.ops.aten.mm.overloads()  # torch 2.8 and later multiply bf16 into fp32


@triton.jit
def _split(x_ptr, out_ptr, count, width, PARTS: tl.constexpr, COUNT: tl.constexpr, X: tl.constexpr):
    """Each row's parts in the order of PARTS, a row of the width for each."""
    at_X = tl.program_id(0).to(tl.int64) * X + tl.arange(0, X)
    x_X = tl.load(x_ptr + at_X, mask=at_X < count, other=0.0)
    first_X = x_X.to(tl.bfloat16)
    rest_X = x_X - first_X.to(tl.float32)
    second_X = rest_X.to(tl.bfloat16)
    third_X = (rest_X - second_X.to(tl.float32)).to(tl.bfloat16)
    out_at = out_ptr + at_X // width * (COUNT * width) + at_X % width
    for i in tl.static_range(COUNT):
        part_X = first_X if PARTS[i] == 0 else second_X if PARTS[i] == 1 else third_X
        tl.store(out_at + i * width, part_X, mask=at_X < count)


def _parts(x_ND: Tensor, parts: tuple[int, ...]) -> Tensor:
    x_ND, (rows, width) = x_ND.contiguous(), x_ND.shape
    out_NS = x_ND.new_empty(rows, len(parts) * width, dtype=torch.bfloat16)
    grid = (triton.cdiv(rows * width, NUMBERS),)
    _split[grid](x_ND, out_NS, rows * width, width, PARTS=parts, COUNT=len(parts), X=NUMBERS, num_warps=WARPS)
    return out_NS


@torch.library.custom_op("mixerbench::exact_product", mutates_args=())
def exact_product(x_ND: Tensor, w_MD: Tensor) -> Tensor:
    """x W^T, both in fp32. Without a gradient of its own."""
    if x_ND.is_cuda and not WIDENS:
        return x_ND @ w_MD.t()
    x_NS, w_MS = _parts(x_ND, LEFT), _parts(w_MD, RIGHT)
    if x_ND.is_cuda:
        return torch.mm(x_NS, w_MS.t(), out_dtype=torch.float32)
    return x_NS.float() @ w_MS.float().t()


@exact_product.register_fake
def _(x_ND, w_MD):
    return x_ND.new_empty(len(x_ND), len(w_MD))
