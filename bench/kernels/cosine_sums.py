"""Sums of cosines at even places, c_m = sum over d of cos(2 pi f_d m spacing), for the frequencies of each token.

Places are cut into rows of 2 S, m = 2 S a + S - 1/2 +- (s + 1/2). With x the phase of a row's middle and y that of
s + 1/2, cos(x +- y) = cos x cos y -+ sin x sin y: two products of small matrices, over d, of the rows' waves with those
of half a row. So a token needs R (A + S) pairs of cosine and sine instead of a cosine for each d and m, and the sum
over d is left to the tensor cores. From one tile of A rows to the next the pairs are turned by a fixed angle, a product
of complex numbers. The gradient, -2 pi spacing * sum over m of m sin(2 pi f_d m spacing) gc_m, goes the same way back.
Axes: B batch, L length, H heads, R rank (terms d), K places m; T tokens, A rows and S half a row of a tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.kernels import dense_last, precision

ROWS, HALF = 16, 16  # A and S: the least that a product may have
TOKENS = 2


@triton.jit
def _wave(turns):
    """Cosine and sine of 2 pi turns, within 2e-6 where turns are below 2^22: polynomials on half a turn."""
    x = turns - ((turns + 12582912.0) - 12582912.0)  # 1.5 * 2^23: adding it rounds to whole numbers
    y = x * x
    even = ((-21.0711056 * y + 58.7904921) * y - 85.2716215) * y + 64.9286574
    odd = ((-12.4712435 * y + 41.3428824) * y - 76.6144725) * y + 81.5999433
    return (even * y - 19.7389804) * y + 0.999999211, ((odd * y - 41.3415892) * y + 6.28318492) * x


@triton.jit
def _turns(f, place):
    """f * place less whole turns. The frequency's first eleven binary places give a product that is exact in fp32 up to
    place 16,384; only the rest is rounded."""
    high = (f + 6144.0) - 6144.0
    whole = place * high
    return (whole - ((whole + 12582912.0) - 12582912.0)) + place * (f - high)


@triton.jit
def _frequencies(f_ptr, length, heads, rank, f_b, f_l, f_h, T: tl.constexpr, R: tl.constexpr):
    """Of a few tokens of a head, TR; their places among all tokens and heads, and whether they exist."""
    row, h = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    t_T, d_R = tl.program_id(1) * T + tl.arange(0, T), tl.arange(0, R)
    f_at = f_ptr + row * f_b + h * f_h + t_T[:, None] * f_l + d_R[None, :]
    f_TR = tl.load(f_at, mask=(t_T < length)[:, None] & (d_R < rank)[None, :], other=0.0)
    return f_TR, (row * length + t_T) * heads + h, t_T < length


@triton.jit(do_not_specialize=["length"])
def _sum(
    f_ptr, c_ptr, length, heads, rank, size, spacing, f_b, f_l, f_h,
    TILES: tl.constexpr, T: tl.constexpr, R: tl.constexpr, A: tl.constexpr, S: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    wide = tl.float32 if c_ptr.dtype.element_ty == tl.float32 else tl.float16
    f_TR, at_T, known_T = _frequencies(f_ptr, length, heads, rank, f_b, f_l, f_h, T, R)
    d_R, a_A, s_S = tl.arange(0, R), tl.arange(0, A), tl.arange(0, S)
    cos_TRS, sin_TRS = _wave(f_TR[:, :, None] * ((s_S + 0.5) * spacing)[None, None, :])
    # Beyond the rank the frequency is 0, whose sine is 0 already.
    cos_TRS, sin_TRS = tl.where((d_R < rank)[None, :, None], cos_TRS, 0.0).to(wide), sin_TRS.to(wide)
    cos_T1R, sin_T1R = _wave(_turns(f_TR, 2.0 * S * A * spacing)[:, None, :])
    cos_TAR, sin_TAR = _wave(_turns(f_TR[:, None, :], ((a_A * (2 * S) + (S - 0.5)) * spacing)[None, :, None]))
    for tile in range(TILES):
        even_TAS = tl.dot(cos_TAR.to(wide), cos_TRS, input_precision=PRECISION)
        odd_TAS = tl.dot(sin_TAR.to(wide), sin_TRS, input_precision=PRECISION)
        above_AS = (tile * A + a_A)[:, None] * (2 * S) + S + s_S[None, :]
        below_AS = above_AS - 1 - 2 * s_S[None, :]
        c_at = c_ptr + at_T[:, None, None] * size
        tl.store(c_at + above_AS[None], even_TAS - odd_TAS, mask=known_T[:, None, None] & (above_AS < size)[None])
        tl.store(c_at + below_AS[None], even_TAS + odd_TAS, mask=known_T[:, None, None] & (below_AS < size)[None])
        turned_TAR = cos_TAR * cos_T1R - sin_TAR * sin_T1R
        sin_TAR = sin_TAR * cos_T1R + cos_TAR * sin_T1R
        cos_TAR = turned_TAR


@triton.jit(do_not_specialize=["length"])
def _sum_back(
    f_ptr, gc_ptr, gf_ptr, length, heads, rank, size, spacing, f_b, f_l, f_h,
    TILES: tl.constexpr, T: tl.constexpr, R: tl.constexpr, A: tl.constexpr, S: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sin(x +- y) = sin x cos y +- cos x sin y: m gc of a tile meets the waves of y first, then those of x."""
    narrow = gc_ptr.dtype.element_ty
    f_TR, at_T, known_T = _frequencies(f_ptr, length, heads, rank, f_b, f_l, f_h, T, R)
    d_R, a_A, s_S = tl.arange(0, R), tl.arange(0, A), tl.arange(0, S)
    cos_TSR, sin_TSR = _wave(f_TR[:, None, :] * ((s_S + 0.5) * spacing)[None, :, None])
    cos_TSR, sin_TSR = cos_TSR.to(narrow), sin_TSR.to(narrow)
    cos_T1R, sin_T1R = _wave(_turns(f_TR, 2.0 * S * A * spacing)[:, None, :])
    cos_TAR, sin_TAR = _wave(_turns(f_TR[:, None, :], ((a_A * (2 * S) + (S - 0.5)) * spacing)[None, :, None]))
    g_TAR = tl.zeros((T, A, R), tl.float32)
    for tile in range(TILES):
        above_AS = (tile * A + a_A)[:, None] * (2 * S) + S + s_S[None, :]
        below_AS = above_AS - 1 - 2 * s_S[None, :]
        g_at = gc_ptr + at_T[:, None, None] * size
        up_TAS = tl.load(g_at + above_AS[None], mask=known_T[:, None, None] & (above_AS < size)[None], other=0.0)
        down_TAS = tl.load(g_at + below_AS[None], mask=known_T[:, None, None] & (below_AS < size)[None], other=0.0)
        up_TAS = up_TAS.to(tl.float32) * above_AS[None].to(tl.float32)
        down_TAS = down_TAS.to(tl.float32) * below_AS[None].to(tl.float32)
        g_TAR += sin_TAR * tl.dot((up_TAS + down_TAS).to(narrow), cos_TSR, input_precision=PRECISION)
        g_TAR += cos_TAR * tl.dot((up_TAS - down_TAS).to(narrow), sin_TSR, input_precision=PRECISION)
        turned_TAR = cos_TAR * cos_T1R - sin_TAR * sin_T1R
        sin_TAR = sin_TAR * cos_T1R + cos_TAR * sin_T1R
        cos_TAR = turned_TAR
    gf_TR = tl.sum(g_TAR, 1) * (-6.283185307 * spacing)
    tl.store(gf_ptr + at_T[:, None] * rank + d_R[None, :], gf_TR, mask=known_T[:, None] & (d_R < rank)[None, :])


def _sizes(f_BLHR: Tensor, size: int, dtype: torch.dtype) -> tuple[tuple[int, int], dict]:
    """The grid and what both kernels take as constants."""
    batch, length, heads, rank = f_BLHR.shape
    tiles = triton.cdiv(size, 2 * ROWS * HALF)
    tokens = TOKENS if tiles == 1 else TOKENS // 2  # registers: all of it stays in those of one warp
    sizes = {"TILES": tiles, "T": tokens, "A": ROWS, "S": HALF, "num_warps": 1}
    sizes |= {"R": max(16, triton.next_power_of_2(rank)), "PRECISION": precision(dtype)}
    return (batch * heads, triton.cdiv(length, tokens)), sizes


@torch.library.custom_op("mixerbench::cosine_sums", mutates_args=())
def cosine_sums(f_BLHR: Tensor, spacing: int, size: int, dtype: torch.dtype) -> Tensor:
    """BLHK in `dtype`, K = `size` places 0, spacing, 2 spacing, ...; frequencies in fp32, in cycles."""
    f_BLHR, (batch, length, heads, rank) = dense_last(f_BLHR), f_BLHR.shape
    c_BLHK = f_BLHR.new_empty(batch, length, heads, size, dtype=dtype)
    grid, sizes = _sizes(f_BLHR, size, dtype)
    _sum[grid](f_BLHR, c_BLHK, length, heads, rank, size, spacing, *f_BLHR.stride()[:3], **sizes)
    return c_BLHK


@torch.library.custom_op("mixerbench::cosine_sums_backward", mutates_args=())
def cosine_sums_backward(gc_BLHK: Tensor, f_BLHR: Tensor, spacing: int) -> Tensor:
    f_BLHR, gc_BLHK, (_, length, heads, rank) = dense_last(f_BLHR), gc_BLHK.contiguous(), f_BLHR.shape
    gf_BLHR = f_BLHR.new_empty(f_BLHR.shape)
    size = gc_BLHK.shape[-1]
    grid, sizes = _sizes(f_BLHR, size, gc_BLHK.dtype)
    _sum_back[grid](f_BLHR, gc_BLHK, gf_BLHR, length, heads, rank, size, spacing, *f_BLHR.stride()[:3], **sizes)
    return gf_BLHR


@cosine_sums.register_fake
def _(f_BLHR, spacing, size, dtype):
    return f_BLHR.new_empty(*f_BLHR.shape[:-1], size, dtype=dtype)


@cosine_sums_backward.register_fake
def _(gc_BLHK, f_BLHR, spacing):
    return f_BLHR.new_empty(f_BLHR.shape)


def _keep(ctx, inputs, output):
    f_BLHR, ctx.spacing, _, _ = inputs
    ctx.save_for_backward(f_BLHR)


def _gradients(ctx, gc_BLHK):
    return cosine_sums_backward(gc_BLHK, *ctx.saved_tensors, ctx.spacing), None, None, None


cosine_sums.register_autograd(_gradients, setup_context=_keep)
