"""y_i = scale_i sum over j of m_ij real_j v_j, m_ij the sum over entries r and terms (t, w) of w exp(-t (a_ir + b_jr)).

So m has rank R M with features sqrt(w) exp(-t x) of a and of b, which are made on the chip and never written. Rows are
gathered into states, and these applied to their tokens: two operators that are each other's gradient. Terms are
constants with w > 0; scale and real, a number of each token, have no gradient.
Axes: B batch, L length, H heads, P head width, R rank, M terms, K features (padded), S shares of a row.
"""

import math
from functools import lru_cache

import torch
import triton
from torch import Tensor

from bench.kernels import dense_last, exponential_tiles, precision, warps

TOKENS, WIDE, WARPS, STAGES = 64, 128, 4, 3
"""Tokens of a tile, its widest tile of values, warps of a program, loads in flight."""
ENTRIES = 16
"""The widest tile of entries."""
PROGRAMS = 512
"""Rows are cut into shares until so many programs gather: a long row alone would leave most of a GPU idle."""


@lru_cache
def _table(rates: tuple[float, ...], weights: tuple[float, ...], size: int, device: torch.device) -> Tensor:
    """Of each of `size` terms what 2 is raised to: a multiple of x, plus a number. Missing terms are zero. It is copied
    to the device once: a recorded step may not wait for the host."""
    terms = [(-t * math.log2(math.e), math.log2(w) / 2) for t, w in zip(rates, weights, strict=True)]
    return torch.tensor(terms + [(0.0, -math.inf)] * (size - len(terms)), dtype=torch.float32).to(device)


def _features(rank: int, terms: int) -> tuple[int, int, int]:
    """Tiles of entries, entries of a tile, and terms by four."""
    entries = min(max(triton.next_power_of_2(rank), 8), ENTRIES)
    return triton.cdiv(rank, entries), entries, triton.cdiv(terms, 4)


def _given(x_BLHR: Tensor, y: Tensor, rates: list[float], weights: list[float]) -> tuple[Tensor, list[int], int, dict]:
    """What all kernels take: the table of terms, the sizes of rows, tiles of y's width, constants."""
    rank, width = x_BLHR.shape[-1], y.shape[-1]
    tiles, entries, fours = _features(rank, len(rates))
    c = min(WIDE, max(16, triton.next_power_of_2(width)))
    constants = {"ENTRIES": tiles, "E": entries, "C": c, "PRECISION": precision(y.dtype)}
    table = _table(tuple(rates), tuple(weights), 4 * fours, x_BLHR.device)
    return table, [*x_BLHR.shape[1:3], rank, width, fours], triton.cdiv(width, c), constants


def _size(x_BLHR: Tensor, rates: list[float]) -> int:
    """K of a state."""
    return 4 * math.prod(_features(x_BLHR.shape[-1], len(rates)))


@torch.library.custom_op("mixerbench::gather_exponentials", mutates_args=())
def gather_exponentials(
    x_BLHR: Tensor, number_BL: Tensor, y_BLHP: Tensor, rates: list[float], weights: list[float]
) -> Tensor:
    """States BHKP, the sum over L of features y^T for each head, in the dtype of y, added up in fp32."""
    x_BLHR, y_BLHP = dense_last(x_BLHR), dense_last(y_BLHP)
    batch, length, heads, width = y_BLHP.shape
    table, sizes, chunks, constants = _given(x_BLHR, y_BLHP, rates, weights)
    size, steps = _size(x_BLHR, rates), triton.cdiv(length, TOKENS)
    programs = batch * heads * chunks * size // (4 * constants["E"])
    share = triton.cdiv(steps, max(1, PROGRAMS // programs))
    shares = triton.cdiv(steps, share)
    kept = y_BLHP.dtype if shares == 1 else torch.float32
    s_BHSKP = y_BLHP.new_empty(batch, heads, shares, size, width, dtype=kept)
    exponential_tiles.gather[programs, shares](
        x_BLHR, number_BL.contiguous(), table, y_BLHP, s_BHSKP, *sizes, *x_BLHR.stride()[:3], *y_BLHP.stride()[:3],
        SHARE=share, CHUNKS=chunks, T=TOKENS, **constants,
        num_warps=warps(WARPS, 4 * constants["E"]), num_stages=STAGES,
    )  # fmt: skip
    return s_BHSKP.sum(2).to(y_BLHP.dtype) if shares > 1 else s_BHSKP.squeeze(2)


@torch.library.custom_op("mixerbench::apply_exponentials", mutates_args=())
def apply_exponentials(
    x_BLHR: Tensor, number_BL: Tensor, s_BHKP: Tensor, rates: list[float], weights: list[float]
) -> Tensor:
    """Rows BLHP, features times their head's state, in its dtype."""
    x_BLHR, s_BHKP = dense_last(x_BLHR), s_BHKP.contiguous()
    batch, length, heads, _ = x_BLHR.shape
    table, sizes, chunks, constants = _given(x_BLHR, s_BHKP, rates, weights)
    y_BLHP = s_BHKP.new_empty(batch, length, heads, s_BHKP.shape[-1])
    exponential_tiles.apply[batch * heads * triton.cdiv(length, TOKENS), chunks](
        x_BLHR, number_BL.contiguous(), table, s_BHKP, y_BLHP, *sizes, *x_BLHR.stride()[:3],
        T=TOKENS, num_warps=warps(WARPS, TOKENS), num_stages=STAGES, **constants,
    )  # fmt: skip
    return y_BLHP


@torch.library.custom_op("mixerbench::exponentials_by_entries", mutates_args=())
def exponentials_by_entries(
    x_BLHR: Tensor, number_BL: Tensor, y_BLHP: Tensor, s_BHKP: Tensor, rates: list[float], weights: list[float]
) -> Tensor:
    """The gradient by x of the sum over tokens of y . (features s)."""
    x_BLHR, y_BLHP, s_BHKP = dense_last(x_BLHR), dense_last(y_BLHP), s_BHKP.contiguous()
    batch, length, heads, _ = x_BLHR.shape
    table, sizes, chunks, constants = _given(x_BLHR, y_BLHP, rates, weights)
    gx_BLHR = x_BLHR.new_empty(x_BLHR.shape)
    exponential_tiles.by_entries[(batch * heads * triton.cdiv(length, TOKENS),)](
        x_BLHR, number_BL.contiguous(), table, y_BLHP, s_BHKP, gx_BLHR, *sizes,
        *x_BLHR.stride()[:3], *y_BLHP.stride()[:3],
        CHUNKS=chunks, T=TOKENS, num_warps=warps(WARPS, TOKENS), num_stages=STAGES, **constants,
    )  # fmt: skip
    return gx_BLHR


def exponential_product(
    a_BLHR: Tensor, b_BLHR: Tensor, v_BLHP: Tensor, scale_BL: Tensor, real_BL: Tensor,
    rates: list[float], weights: list[float],
) -> Tensor:  # fmt: skip
    """y_BLHP in the dtype of v; a, b, scale and real in fp32."""
    s_BHKP = gather_exponentials(b_BLHR, real_BL, v_BLHP, rates, weights)
    return apply_exponentials(a_BLHR, scale_BL, s_BHKP, rates, weights)


@gather_exponentials.register_fake
def _(x_BLHR, number_BL, y_BLHP, rates, weights):
    batch, _, heads, width = y_BLHP.shape
    return y_BLHP.new_empty(batch, heads, _size(x_BLHR, rates), width)


@apply_exponentials.register_fake
def _(x_BLHR, number_BL, s_BHKP, rates, weights):
    return s_BHKP.new_empty(*x_BLHR.shape[:-1], s_BHKP.shape[-1])


@exponentials_by_entries.register_fake
def _(x_BLHR, number_BL, y_BLHP, s_BHKP, rates, weights):
    return x_BLHR.new_empty(x_BLHR.shape)


def _keep(ctx, inputs, output):
    *tensors, ctx.rates, ctx.weights = inputs
    ctx.save_for_backward(*tensors)


def _gather_gradients(ctx, gs_BHKP):
    (x_BLHR, number_BL, y_BLHP), terms = ctx.saved_tensors, (ctx.rates, ctx.weights)
    gx = exponentials_by_entries(x_BLHR, number_BL, y_BLHP, gs_BHKP, *terms) if ctx.needs_input_grad[0] else None
    gy = apply_exponentials(x_BLHR, number_BL, gs_BHKP, *terms) if ctx.needs_input_grad[2] else None
    return gx, None, gy, None, None


def _apply_gradients(ctx, gy_BLHP):
    (x_BLHR, number_BL, s_BHKP), terms = ctx.saved_tensors, (ctx.rates, ctx.weights)
    gx = exponentials_by_entries(x_BLHR, number_BL, gy_BLHP, s_BHKP, *terms) if ctx.needs_input_grad[0] else None
    gs = gather_exponentials(x_BLHR, number_BL, gy_BLHP, *terms) if ctx.needs_input_grad[2] else None
    return gx, None, gs, None, None


gather_exponentials.register_autograd(_gather_gradients, setup_context=_keep)
apply_exponentials.register_autograd(_apply_gradients, setup_context=_keep)
