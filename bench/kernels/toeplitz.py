"""A product with a Toeplitz matrix by tiles on the tensor cores: y_i = sum over j of w_{i-j} v_j, no matrix in memory.

A tile of the matrix is read from the filter. Row i of it is the filter, reversed and moved by i places, so that reads
are aligned for one row in eight only: hence a table of eight copies, each moved by one place. The transposed product is
the same with the filter turned round. The gradient of the filter adds up products gy_i . v_j of all tiles that lie on
one diagonal of tiles, and then the diagonals of what it has. Rows hold one document: `count` tokens, then padding.
Axes: B batch, F filters (row b has number b mod F), L length, H heads, P head width, K = 2 L - 1 lags -(L-1) .. L-1,
W places of a table; I read and J written places and C channels of a tile, T both places of one of the gradient.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.kernels import dense_last, precision, tile, warps

READ, WRITTEN, WARPS, STAGES = 256, 64, 8, 3
"""Of the product: places of a tile at most, warps of a program, loads in flight."""
PLACES, WARPS_BACK, STAGES_BACK = 64, 4, 4
"""The same of the filter's gradient."""
CHANNELS, CHANNELS_BACK = 128, 64
COPIES = tl.constexpr(8)
FILL = 1024  # places of a table that a program writes


@triton.jit(do_not_specialize=["length", "size"])
def _table(
    w_ptr, t_ptr, length, size, w_f, w_h, w_k, TURNED: tl.constexpr, CAUSAL: tl.constexpr, M: tl.constexpr
):  # fmt: skip
    """Copy s holds at place m the weight of lag size / 2 + s - m, zero where there is none."""
    f, h, s = tl.program_id(2), tl.program_id(1) // COPIES, tl.program_id(1) % COPIES
    m_M = tl.program_id(0) * M + tl.arange(0, M)
    lag_M = size // 2 + s - m_M
    lag_M = -lag_M if TURNED else lag_M
    known_M = (tl.abs(lag_M) < length) & (m_M < size)
    known_M = known_M & (lag_M >= 0) if CAUSAL else known_M
    w_M = tl.load(w_ptr + f * w_f + h * w_h + (lag_M + length - 1) * w_k, mask=known_M, other=0.0)
    t_at = (f.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * size
    tl.store(t_ptr + t_at + m_M, w_M, mask=m_M < size)


@triton.jit(do_not_specialize=["length"])
def _product(
    t_ptr, v_ptr, y_ptr, count_ptr, length, heads, width, size, filters, v_b, v_l, v_h,
    TURNED: tl.constexpr, CAUSAL: tl.constexpr,
    I: tl.constexpr, J: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of y, over the places of v that it can see."""
    of_row, first = tl.program_id(0) // tl.cdiv(length, I), tl.program_id(0) % tl.cdiv(length, I) * I
    row, h = of_row // heads, of_row % heads
    i_I, c_C = tl.arange(0, I), tl.program_id(1) * C + tl.arange(0, C)
    count = tl.load(count_ptr + row).to(tl.int32)
    table = ((row % filters) * heads + h).to(tl.int64) * COPIES * size + size // 2
    t_at_I = t_ptr + table + (i_I % COPIES) * size - i_I // COPIES * COPIES - first
    v_at = v_ptr + row.to(tl.int64) * v_b + h * v_h + c_C[None, :]
    start = first // J * J if CAUSAL and TURNED else 0
    end = tl.minimum(count, first + I) if CAUSAL and not TURNED else count
    end = tl.where(first < count, end, start)  # a tile of padding sees nothing
    y_IC = tl.zeros((I, C), tl.float32)
    for at in range(start, end, J):
        j_J = at + tl.arange(0, J)
        t_IJ = tl.load(t_at_I[:, None] + j_J[None, :])
        v_JC = tl.load(v_at + j_J[:, None] * v_l, mask=(j_J < count)[:, None] & (c_C < width)[None, :], other=0.0)
        y_IC += tl.dot(t_IJ, v_JC, input_precision=PRECISION)
    i_I += first
    y_IC = tl.where((i_I < count)[:, None], y_IC, 0.0)
    y_at = y_ptr + ((row.to(tl.int64) * length + i_I[:, None]) * heads + h) * width + c_C[None, :]
    tl.store(y_at, y_IC, mask=(i_I < length)[:, None] & (c_C < width)[None, :])


@triton.jit
def _diagonal_of_tiles(
    g_at, v_at, first, second, steps, count, width, g_l, v_l,
    T: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The sum of g_i . v_j over tiles (first + n, second + n), n < steps: TT."""
    s_TT = tl.zeros((T, T), tl.float32)
    for n in range(steps * PARTS):
        c_C = n % PARTS * C + tl.arange(0, C)
        i_T, j_T = (first + n // PARTS) * T + tl.arange(0, T), (second + n // PARTS) * T + tl.arange(0, T)
        g_at_TC, v_at_TC = g_at + i_T[:, None] * g_l + c_C[None, :], v_at + j_T[:, None] * v_l + c_C[None, :]
        g_TC = tl.load(g_at_TC, mask=(i_T < count)[:, None] & (c_C < width)[None, :], other=0.0)
        v_TC = tl.load(v_at_TC, mask=(j_T < count)[:, None] & (c_C < width)[None, :], other=0.0)
        s_TT += tl.dot(g_TC, tl.trans(v_TC), input_precision=PRECISION)
    return s_TT


@triton.jit
def _lags(s_TT, at, place_T, T: tl.constexpr):
    """Sums of the diagonals of a tile of lag 0 and more to `at`, of the others to the second half.

    Entry (i, i - k mod T) is of lag k where i >= k, else of lag k - T.
    """
    i_T, k_T = tl.arange(0, T)[:, None], tl.arange(0, T)[None, :]
    s_TT = tl.gather(s_TT, (i_T - k_T + T) % T, 1)
    tl.store(at + place_T, tl.sum(tl.where(i_T >= k_T, s_TT, 0.0), 0))
    return tl.sum(tl.where(i_T < k_T, s_TT, 0.0), 0)


@triton.jit(do_not_specialize=["length", "tiles"])
def _filter_gradient(
    g_ptr, v_ptr, part_ptr, count_ptr, heads, width, tiles, g_b, g_l, g_h, v_b, v_l, v_h,
    CAUSAL: tl.constexpr, T: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Diagonals d and d - tiles of tiles, which together are as long as the row. Of a row and head, two lists of lags
    -tiles T, .., tiles T - 1, of which diagonal d writes stretch d of the first and d - 1 of the second."""
    of_row, d = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    row, h = of_row // heads, of_row % heads
    count = tl.load(count_ptr + row).to(tl.int32)
    g_at, v_at = g_ptr + row * g_b + h * g_h, v_ptr + row * v_b + h * v_h
    used = tl.cdiv(count, T)
    at = part_ptr + of_row * 4 * tiles * T
    k_T = tl.arange(0, T)
    steps = tl.maximum(used - d, 0)
    s_TT = _diagonal_of_tiles(g_at, v_at, d, 0, steps, count, width, g_l, v_l, T, C, PARTS, PRECISION)
    rest_T = _lags(s_TT, at, (tiles + d) * T + k_T, T)
    tl.store(at + (3 * tiles + d - 1) * T + k_T, rest_T)
    steps = 0 if CAUSAL else tl.where(d > 0, tl.maximum(used - tiles + d, 0), 0)
    s_TT = _diagonal_of_tiles(g_at, v_at, 0, tiles - d, steps, count, width, g_l, v_l, T, C, PARTS, PRECISION)
    rest_T = _lags(s_TT, at, d * T + k_T, T)
    # Diagonal -tiles does not exist: instead of it, the last stretch of the second list becomes zero.
    tl.store(at + (tl.where(d > 0, 2 * tiles + d, 4 * tiles) - 1) * T + k_T, rest_T)


def table(w_FHK: Tensor, dtype: torch.dtype, turned: bool, causal: bool) -> Tensor:
    """The copies of each filter in the dtype of v, of a size that no tile needs to be masked."""
    filters, heads, lags = w_FHK.shape
    length, most = (lags + 1) // 2, max(READ, WRITTEN)
    size = 2 * triton.cdiv(length, most) * most
    t_FHSW = w_FHK.new_empty(filters, heads, COPIES.value, size, dtype=dtype)
    _table[triton.cdiv(size, FILL), heads * COPIES.value, filters](
        w_FHK, t_FHSW, length, size, *w_FHK.stride(), TURNED=turned, CAUSAL=causal, M=FILL
    )
    return t_FHSW


def toeplitz(v_BLHP: Tensor, w_FHK: Tensor, count_B: Tensor) -> Tensor:
    """T v as `toeplitz_product` gives it, both ways."""
    return toeplitz_product(v_BLHP, w_FHK, count_B, False, False)


@torch.library.custom_op("mixerbench::toeplitz_product", mutates_args=())
def toeplitz_product(v_BLHP: Tensor, w_FHK: Tensor, count_B: Tensor, causal: bool, turned: bool) -> Tensor:
    """T v, BLHP in the dtype of v, zero on padding; T transposed if `turned`. w in fp32; with `causal` its negative
    lags count as zero."""
    v_BLHP = dense_last(v_BLHP)
    (batch, length, heads, width), filters = v_BLHP.shape, len(w_FHK)
    t_FHSW = table(w_FHK, v_BLHP.dtype, turned, causal)
    y_BLHP = v_BLHP.new_empty(batch, length, heads, width)
    i, j, c = tile(length, 2 * READ // v_BLHP.element_size()), tile(length, WRITTEN), tile(width, CHANNELS)
    _product[triton.cdiv(length, i) * batch * heads, triton.cdiv(width, c)](
        t_FHSW, v_BLHP, y_BLHP, count_B, length, heads, width, t_FHSW.shape[-1], filters, *v_BLHP.stride()[:3],
        TURNED=turned, CAUSAL=causal, I=i, J=j, C=c, PRECISION=precision(v_BLHP.dtype), num_warps=warps(WARPS, i),
        num_stages=STAGES,
    )  # fmt: skip
    return y_BLHP


@torch.library.custom_op("mixerbench::toeplitz_filter_gradient", mutates_args=())
def toeplitz_filter_gradient(
    gy_BLHP: Tensor, v_BLHP: Tensor, count_B: Tensor, filters: int, causal: bool
) -> Tensor:  # fmt: skip
    """gw_FHK, the sums of gy_i . v_j over i - j = lag, in fp32."""
    gy_BLHP, v_BLHP = dense_last(gy_BLHP), dense_last(v_BLHP)
    batch, length, heads, width = v_BLHP.shape
    t, c = tile(length, PLACES), tile(width, 2 * CHANNELS_BACK // v_BLHP.element_size())  # as many bytes in fp32
    tiles = triton.cdiv(length, t)
    part_BHSW = v_BLHP.new_empty(batch, heads, 2, 2 * tiles * t, dtype=torch.float32)
    _filter_gradient[tiles * batch * heads,](
        gy_BLHP, v_BLHP, part_BHSW, count_B, heads, width, tiles, *gy_BLHP.stride()[:3], *v_BLHP.stride()[:3],
        CAUSAL=causal, T=t, C=c, PARTS=triton.cdiv(width, c), PRECISION=precision(v_BLHP.dtype),
        num_warps=warps(WARPS_BACK, t), num_stages=STAGES_BACK,
    )  # fmt: skip
    gw_FHW = part_BHSW.unflatten(0, (-1, filters)).sum((0, 3))
    if causal:
        gw_FHW[..., : tiles * t].zero_()
    return gw_FHW[..., tiles * t - length + 1 : tiles * t + length].contiguous()


@toeplitz_product.register_fake
def _(v_BLHP, w_FHK, count_B, causal, turned):
    return v_BLHP.new_empty(v_BLHP.shape)


@toeplitz_filter_gradient.register_fake
def _(gy_BLHP, v_BLHP, count_B, filters, causal):
    length, heads = v_BLHP.shape[1:3]
    return v_BLHP.new_empty(filters, heads, 2 * length - 1, dtype=torch.float32)


def _keep(ctx, inputs, output):
    v_BLHP, w_FHK, count_B, ctx.causal, ctx.turned = inputs
    ctx.save_for_backward(v_BLHP, w_FHK, count_B)


def _gradients(ctx, gy_BLHP):
    v_BLHP, w_FHK, count_B = ctx.saved_tensors
    gv_BLHP = gw_FHK = None
    if ctx.needs_input_grad[0]:
        gv_BLHP = toeplitz_product(gy_BLHP, w_FHK, count_B, ctx.causal, not ctx.turned)
    if ctx.needs_input_grad[1]:
        pair = (v_BLHP, gy_BLHP) if ctx.turned else (gy_BLHP, v_BLHP)
        gw_FHK = toeplitz_filter_gradient(*pair, count_B, len(w_FHK), ctx.causal).to(w_FHK.dtype)
    return gv_BLHP, gw_FHK, None, None, None


toeplitz_product.register_autograd(_gradients, setup_context=_keep)
