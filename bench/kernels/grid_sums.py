"""Rows summed up at the points of a coarse grid, and rows interpolated from there: two operators, each the other's
gradient with the roles exchanged.

Place j = 1, 2, ... and point k = 0, 1, ..., which lies at place k * spacing, see each other with a weight of their
distance, given as a table of distances 0, 1, ... beyond which it is zero. The grid is even: point k > 0 is also seen at
distance j + k * spacing. So the matrix of weights is a band; it is read from the table and never written.
Axes: B batch, L length, H heads, P head width, K points, O distances; J places, K points and C channels of a tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.kernels import precision, tile

PLACES, POINTS, SEEN, CHANNELS = 64, 16, 64, 128
"""Of a tile, at most: places, points that are summed up at, points that are seen by places at a time, channels."""
WARPS = 4


@triton.jit
def _weights(w_ptr, j, k, reach, spacing):
    """Of places and points that broadcast."""
    near = tl.abs(j - k * spacing)
    far = j + k * spacing
    w = tl.load(w_ptr + near, mask=near < reach, other=0.0)
    return w + tl.load(w_ptr + far, mask=(far < reach) & (k > 0), other=0.0)


@triton.jit(do_not_specialize=["length"])
def _to_grid(
    v_ptr, w_ptr, u_ptr, length, heads, size, width, reach, spacing, v_b, v_l, v_h,
    STEPS: tl.constexpr, J: tl.constexpr, K: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of points: the places within reach of them."""
    row, h = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    k_K, c_C = tl.program_id(1) * K + tl.arange(0, K), tl.program_id(2) * C + tl.arange(0, C)
    first = tl.maximum(tl.program_id(1) * K * spacing - reach + 1, 1)
    u_KC = tl.zeros((K, C), tl.float32)
    for i in range(STEPS):
        j_J = first + i * J + tl.arange(0, J)
        v_at = v_ptr + row * v_b + h * v_h + (j_J[:, None] - 1) * v_l + c_C[None, :]
        v_JC = tl.load(v_at, mask=(j_J <= length)[:, None] & (c_C < width)[None, :], other=0.0)
        w_KJ = _weights(w_ptr, j_J[None, :], k_K[:, None], reach, spacing)
        u_KC += tl.dot(w_KJ.to(v_JC.dtype), v_JC, input_precision=PRECISION)
    u_at = u_ptr + (tl.program_id(0).to(tl.int64) * size + k_K[:, None]) * width + c_C[None, :]
    tl.store(u_at, u_KC, mask=(k_K < size)[:, None] & (c_C < width)[None, :])


@triton.jit(do_not_specialize=["length"])
def _from_grid(
    u_ptr, w_ptr, y_ptr, length, heads, size, width, reach, spacing,
    STEPS: tl.constexpr, J: tl.constexpr, K: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of places: the points within reach of them."""
    row, h = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    j_J, c_C = tl.program_id(1) * J + 1 + tl.arange(0, J), tl.program_id(2) * C + tl.arange(0, C)
    first = tl.maximum(tl.program_id(1) * J + 1 - reach, 0) // spacing
    y_JC = tl.zeros((J, C), tl.float32)
    for i in range(STEPS):
        k_K = first + i * K + tl.arange(0, K)
        u_at = u_ptr + (tl.program_id(0).to(tl.int64) * size + k_K[:, None]) * width + c_C[None, :]
        u_KC = tl.load(u_at, mask=(k_K < size)[:, None] & (c_C < width)[None, :], other=0.0)
        w_JK = _weights(w_ptr, j_J[:, None], k_K[None, :], reach, spacing)
        y_JC += tl.dot(w_JK.to(u_KC.dtype), u_KC, input_precision=PRECISION)
    y_at = y_ptr + ((row * length + j_J[:, None] - 1) * heads + h) * width + c_C[None, :]
    tl.store(y_at, y_JC, mask=(j_J <= length)[:, None] & (c_C < width)[None, :])


@torch.library.custom_op("mixerbench::to_grid", mutates_args=())
def to_grid(v_BLHP: Tensor, weight_O: Tensor, spacing: int, size: int) -> Tensor:
    """u_BHKP of K = `size` points, in the dtype of v; weights in fp32, without a gradient."""
    v_BLHP = v_BLHP if v_BLHP.stride(-1) == 1 else v_BLHP.contiguous()
    (batch, length, heads, width), reach = v_BLHP.shape, len(weight_O)
    u_BHKP = v_BLHP.new_empty(batch, heads, size, width)
    j, k, c = tile(length, PLACES), tile(size, POINTS), tile(width, CHANNELS)
    steps = triton.cdiv(min((k - 1) * spacing + 2 * reach - 1, length), j)
    _to_grid[batch * heads, triton.cdiv(size, k), triton.cdiv(width, c)](
        v_BLHP, weight_O, u_BHKP, length, heads, size, width, reach, spacing, *v_BLHP.stride()[:3],
        STEPS=steps, J=j, K=k, C=c, PRECISION=precision(v_BLHP.dtype), num_warps=WARPS,
    )  # fmt: skip
    return u_BHKP


@torch.library.custom_op("mixerbench::from_grid", mutates_args=())
def from_grid(u_BHKP: Tensor, weight_O: Tensor, spacing: int, length: int) -> Tensor:
    """y_BLHP in the dtype of u."""
    u_BHKP = u_BHKP.contiguous()
    (batch, heads, size, width), reach = u_BHKP.shape, len(weight_O)
    y_BLHP = u_BHKP.new_empty(batch, length, heads, width)
    j, c = tile(length, PLACES), tile(width, CHANNELS)
    seen = min((j + 2 * reach) // spacing + 2, size)
    k = tile(seen, SEEN)
    _from_grid[batch * heads, triton.cdiv(length, j), triton.cdiv(width, c)](
        u_BHKP, weight_O, y_BLHP, length, heads, size, width, reach, spacing,
        STEPS=triton.cdiv(seen, k), J=j, K=k, C=c, PRECISION=precision(u_BHKP.dtype), num_warps=WARPS,
    )  # fmt: skip
    return y_BLHP


@to_grid.register_fake
def _(v_BLHP, weight_O, spacing, size):
    batch, _, heads, width = v_BLHP.shape
    return v_BLHP.new_empty(batch, heads, size, width)


@from_grid.register_fake
def _(u_BHKP, weight_O, spacing, length):
    batch, heads, _, width = u_BHKP.shape
    return u_BHKP.new_empty(batch, length, heads, width)


def _keep_length(ctx, inputs, output):
    v_BLHP, weight_O, ctx.spacing, _ = inputs
    ctx.length = v_BLHP.shape[1]
    ctx.save_for_backward(weight_O)


def _keep_size(ctx, inputs, output):
    u_BHKP, weight_O, ctx.spacing, _ = inputs
    ctx.size = u_BHKP.shape[2]
    ctx.save_for_backward(weight_O)


def _to_grid_gradients(ctx, gu_BHKP):
    return from_grid(gu_BHKP, *ctx.saved_tensors, ctx.spacing, ctx.length), None, None, None


def _from_grid_gradients(ctx, gy_BLHP):
    return to_grid(gy_BLHP, *ctx.saved_tensors, ctx.spacing, ctx.size), None, None, None


to_grid.register_autograd(_to_grid_gradients, setup_context=_keep_length)
from_grid.register_autograd(_from_grid_gradients, setup_context=_keep_size)
