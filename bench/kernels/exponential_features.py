"""Features w exp(-t x) of each entry x and each term (t, w), times a number of the token; the gradient makes them anew.

A compiler given the same expression keeps each term in fp32 for the backward pass, four times what is read and written
here. The terms are constants without a gradient, and so is the token's number.
Axes: B batch, L length, H heads, R rank, M terms, K = M R; T tokens of a tile.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS = 64


@triton.jit
def _tile(x_ptr, s_ptr, length, heads, rank, x_b, x_l, x_h, T: tl.constexpr, R: tl.constexpr):
    """x and the token's number, TR; where the tokens are among all tokens and heads; which entries there are."""
    row, h = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    t_T, d_R = tl.program_id(1) * T + tl.arange(0, T), tl.arange(0, R)
    known_TR = (t_T < length)[:, None] & (d_R < rank)[None, :]
    x_TR = tl.load(x_ptr + row * x_b + h * x_h + t_T[:, None] * x_l + d_R[None, :], mask=known_TR, other=0.0)
    s_T = tl.load(s_ptr + row * length + t_T, mask=t_T < length, other=0.0)
    return x_TR, s_T[:, None], ((row * length + t_T) * heads + h)[:, None], known_TR


@triton.jit(do_not_specialize=["length"])
def _features(
    x_ptr, s_ptr, term_ptr, y_ptr, length, heads, rank, x_b, x_l, x_h,
    M: tl.constexpr, T: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    x_TR, s_T1, at_T1, known_TR = _tile(x_ptr, s_ptr, length, heads, rank, x_b, x_l, x_h, T, R)
    y_at = y_ptr + at_T1 * (M * rank) + tl.arange(0, R)[None, :]
    for m in range(M):
        rate, weight = tl.load(term_ptr + 2 * m), tl.load(term_ptr + 2 * m + 1)
        tl.store(y_at + m * rank, weight * tl.exp(-rate * x_TR) * s_T1, mask=known_TR)


@triton.jit(do_not_specialize=["length"])
def _features_back(
    x_ptr, s_ptr, term_ptr, gy_ptr, gx_ptr, length, heads, rank, x_b, x_l, x_h,
    M: tl.constexpr, T: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    x_TR, s_T1, at_T1, known_TR = _tile(x_ptr, s_ptr, length, heads, rank, x_b, x_l, x_h, T, R)
    gy_at = gy_ptr + at_T1 * (M * rank) + tl.arange(0, R)[None, :]
    gx_TR = tl.zeros((T, R), tl.float32)
    for m in range(M):
        rate, weight = tl.load(term_ptr + 2 * m), tl.load(term_ptr + 2 * m + 1)
        gy_TR = tl.load(gy_at + m * rank, mask=known_TR, other=0.0).to(tl.float32)
        gx_TR -= rate * weight * tl.exp(-rate * x_TR) * gy_TR
    tl.store(gx_ptr + at_T1 * rank + tl.arange(0, R)[None, :], gx_TR * s_T1, mask=known_TR)


@lru_cache
def _table(rates: tuple[float, ...], weights: tuple[float, ...], device: torch.device) -> Tensor:
    """The terms on the device, copied there once: a recorded step may not wait for the host."""
    return torch.tensor([rates, weights], dtype=torch.float32).T.contiguous().to(device)


def _given(
    x_BLHR: Tensor, scale_BL: Tensor, rates: list[float], weights: list[float]
) -> tuple[tuple, tuple, tuple, dict]:
    """The grid, the tensors and the numbers that both kernels read, and their constants."""
    x_BLHR = x_BLHR if x_BLHR.stride(-1) == 1 else x_BLHR.contiguous()
    batch, length, heads, rank = x_BLHR.shape
    tensors = x_BLHR, scale_BL.contiguous(), _table(tuple(rates), tuple(weights), x_BLHR.device)
    sizes = {"M": len(rates), "T": TOKENS, "R": triton.next_power_of_2(rank)}
    return (batch * heads, triton.cdiv(length, TOKENS)), tensors, (length, heads, rank, *x_BLHR.stride()[:3]), sizes


@torch.library.custom_op("mixerbench::exponential_features", mutates_args=())
def exponential_features(
    x_BLHR: Tensor, scale_BL: Tensor, rates: list[float], weights: list[float], dtype: torch.dtype
) -> Tensor:
    """BLHK in `dtype`, terms outside the entries; x and scale in fp32."""
    grid, tensors, numbers, sizes = _given(x_BLHR, scale_BL, rates, weights)
    y_BLHK = x_BLHR.new_empty(*x_BLHR.shape[:-1], len(rates) * x_BLHR.shape[-1], dtype=dtype)
    _features[grid](*tensors, y_BLHK, *numbers, **sizes)
    return y_BLHK


@torch.library.custom_op("mixerbench::exponential_features_backward", mutates_args=())
def exponential_features_backward(
    gy_BLHK: Tensor, x_BLHR: Tensor, scale_BL: Tensor, rates: list[float], weights: list[float]
) -> Tensor:
    grid, tensors, numbers, sizes = _given(x_BLHR, scale_BL, rates, weights)
    gx_BLHR = x_BLHR.new_empty(x_BLHR.shape)
    _features_back[grid](*tensors, gy_BLHK.contiguous(), gx_BLHR, *numbers, **sizes)
    return gx_BLHR


@exponential_features.register_fake
def _(x_BLHR, scale_BL, rates, weights, dtype):
    return x_BLHR.new_empty(*x_BLHR.shape[:-1], len(rates) * x_BLHR.shape[-1], dtype=dtype)


@exponential_features_backward.register_fake
def _(gy_BLHK, x_BLHR, scale_BL, rates, weights):
    return x_BLHR.new_empty(x_BLHR.shape)


def _keep(ctx, inputs, output):
    x_BLHR, scale_BL, ctx.rates, ctx.weights, _ = inputs
    ctx.save_for_backward(x_BLHR, scale_BL)


def _gradients(ctx, gy_BLHK):
    return exponential_features_backward(gy_BLHK, *ctx.saved_tensors, ctx.rates, ctx.weights), None, None, None, None


exponential_features.register_autograd(_gradients, setup_context=_keep)
