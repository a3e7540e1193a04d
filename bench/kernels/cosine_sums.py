"""Sums of cosines at even places, c_k = sum over d of cos(2 pi f_d k spacing), for the frequencies of each token.

With x = sin(pi f spacing) and y = 4 x^2 a cosine is made of the two before it, p_(k+1) = 2 p_k - p_(k-1) - y p_k: two
operations. They are added up as steps, e_(k+1) = e_k - y p_k and p_(k+1) = p_k + e_(k+1), which Reinsch gave for small
angles: a cosine near 1 would hold few digits of a low frequency. The derivative by x is -4 x k u_k, where the u_k =
sin(2 pi f k spacing) / sin(2 pi f spacing) follow one another in the same way.
Axes: B batch, L length, G heads, R rank (terms d of the sum), K places; T tokens of a tile, X all its numbers.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.kernels import dense_last

TOKENS, WARPS, TERMS = 32, 1, 32
"""Of a program: as many tokens as it has threads, or a multiple, so that a sum over d stays in a thread; and the terms
that a thread may have: for more there are more warps."""
UNROLLED, UNROLLED_BACK = 1, 16  # places that are made, or summed up, without a branch


@triton.jit
def _numbers(x_ptr, length, heads, rank, x_b, x_l, x_g, T: tl.constexpr, R: tl.constexpr):
    """x of a few tokens of a head, RT; which of these numbers exist; the tokens' places.

    They are read as one row, of which a thread has every T-th number: all terms of a token. Of a tile the compiler
    would share out a token's terms, which lie side by side, and their sums would go from thread to thread.
    """
    row, g = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    at_X = tl.arange(0, R * T)
    t_X, r_X = tl.program_id(1) * T + at_X % T, at_X // T
    x_X = tl.load(x_ptr + row * x_b + g * x_g + t_X * x_l + r_X, mask=(r_X < rank) & (t_X < length), other=0.0)
    t_T, r_R = tl.program_id(1) * T + tl.arange(0, T), tl.arange(0, R)
    return tl.reshape(x_X, (R, T)), (r_R < rank)[:, None] & (t_T < length)[None, :], t_T


@triton.jit(do_not_specialize=["length"])
def _cosines(
    x_ptr, c_ptr, length, heads, rank, size, x_b, x_l, x_g, T: tl.constexpr, R: tl.constexpr, BY: tl.constexpr
):  # fmt: skip
    x_RT, known_RT, t_T = _numbers(x_ptr, length, heads, rank, x_b, x_l, x_g, T, R)
    y_RT, p_RT = 4.0 * x_RT * x_RT, tl.where(known_RT, 1.0, 0.0)
    e_RT = 0.5 * y_RT
    c_at = c_ptr + tl.program_id(0).to(tl.int64) * size * length + t_T
    for _ in tl.range(0, size, loop_unroll_factor=BY):
        tl.store(c_at, tl.sum(p_RT, 0), mask=t_T < length)
        c_at += length
        e_RT -= y_RT * p_RT
        p_RT += e_RT


@triton.jit(do_not_specialize=["length"])
def _cosines_back(
    x_ptr, gc_ptr, gx_ptr, length, heads, rank, size, x_b, x_l, x_g,
    T: tl.constexpr, R: tl.constexpr, BY: tl.constexpr,
):  # fmt: skip
    x_RT, known_RT, t_T = _numbers(x_ptr, length, heads, rank, x_b, x_l, x_g, T, R)
    y_RT, e_RT = 4.0 * x_RT * x_RT, tl.where(known_RT, 1.0, 0.0)
    u_RT, sum_RT = tl.zeros((R, T), tl.float32), tl.zeros((R, T), tl.float32)
    gc_at = gc_ptr + tl.program_id(0).to(tl.int64) * size * length + t_T
    for k in tl.range(0, size, loop_unroll_factor=BY):
        gc_T = tl.load(gc_at, mask=t_T < length, other=0.0).to(tl.float32) * k
        gc_at += length
        sum_RT += gc_T[None, :] * u_RT
        e_RT -= y_RT * u_RT
        u_RT += e_RT
    row, g = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    at_RT = ((row * length + t_T[None, :]) * heads + g) * rank + tl.arange(0, R)[:, None]
    tl.store(gx_ptr + at_RT, -4.0 * x_RT * sum_RT, mask=known_RT)


def _programs(x_BLGR: Tensor) -> tuple[tuple[int, int], dict]:
    """The grid and what both kernels take as constants."""
    batch, length, heads, rank = x_BLGR.shape
    r = triton.next_power_of_2(rank)
    sizes = {"T": TOKENS, "R": r, "num_warps": WARPS * triton.cdiv(r, TERMS)}
    return (batch * heads, triton.cdiv(length, TOKENS)), sizes


def cosine_sums(f_BLGR: Tensor, spacing: int, size: int, dtype: torch.dtype) -> Tensor:
    """c_BGKL in `dtype`, K = `size` places 0, spacing, 2 spacing, ...; frequencies in fp32, in cycles, at most 0.4
    from place to place. Rounding grows with K, to 1e-4 of the norm at 1,040 places; nearer to half a cycle, where the
    cosines alternate, it would be a hundred times that."""
    return sums_of_steps(torch.sin(math.pi * spacing * f_BLGR), size, dtype)


@torch.library.custom_op("mixerbench::sums_of_steps", mutates_args=())
def sums_of_steps(x_BLGR: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """c_BGKL of the sines x of half a step, in fp32."""
    x_BLGR, (batch, length, heads, rank), (grid, sizes) = dense_last(x_BLGR), x_BLGR.shape, _programs(x_BLGR)
    c_BGKL = x_BLGR.new_empty(batch, heads, size, length, dtype=dtype)
    _cosines[grid](x_BLGR, c_BGKL, length, heads, rank, size, *x_BLGR.stride()[:3], BY=UNROLLED, **sizes)
    return c_BGKL


@torch.library.custom_op("mixerbench::sums_of_steps_backward", mutates_args=())
def sums_of_steps_backward(gc_BGKL: Tensor, x_BLGR: Tensor) -> Tensor:
    x_BLGR, (_, length, heads, rank), (grid, sizes) = dense_last(x_BLGR), x_BLGR.shape, _programs(x_BLGR)
    gc_BGKL, gx_BLGR = gc_BGKL.contiguous(), x_BLGR.new_empty(x_BLGR.shape)
    shapes = length, heads, rank, gc_BGKL.shape[2]
    _cosines_back[grid](x_BLGR, gc_BGKL, gx_BLGR, *shapes, *x_BLGR.stride()[:3], BY=UNROLLED_BACK, **sizes)
    return gx_BLGR


@sums_of_steps.register_fake
def _(x_BLGR, size, dtype):
    batch, length, heads, _ = x_BLGR.shape
    return x_BLGR.new_empty(batch, heads, size, length, dtype=dtype)


@sums_of_steps_backward.register_fake
def _(gc_BGKL, x_BLGR):
    return x_BLGR.new_empty(x_BLGR.shape)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])


def _gradients(ctx, gc_BGKL):
    return sums_of_steps_backward(gc_BGKL, *ctx.saved_tensors), None, None


sums_of_steps.register_autograd(_gradients, setup_context=_keep)
