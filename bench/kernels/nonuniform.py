"""Sums over even places of cosines at any frequency, and their transpose: non-uniform Fourier sums in linear time.

With c_ik = sum over d of cos(2 pi f_id k spacing), k = 0 ... K - 1: rows y = c s and states s = c^T x. A Fourier
transform gives such sums at N even frequencies m / N of a place, twice as many as K places need; a frequency in between
is a window's weighted mean of its TAPS nearest, once each place has been divided by the window's own transform. The
window is exp(beta (sqrt(1 - z^2) - 1)), whose errors Barnett, Magland and af Klinteberg bound (SIAM J. Sci. Comput.
41, 2019). Time grows with L R + K log K, memory with L R + K. The sums are even in frequency and periodic, so half of
the N are kept, and what lies beyond either end is read from its mirror image.

States are added up in an order of their own: terms sorted by frequency, a program for a few neighbouring frequencies
going through the terms near them, so that no two threads add to one number. It is as slow as its fullest frequencies.
A phase is off by what fp32 leaves of f k spacing, twice what rounding f itself costs.
Axes: B batch, L length, H heads, R rank (terms d), K places, M frequencies of the transform, P head width, X any of K
and M, Q points of a quadrature; I tokens, T terms, N frequencies and C channels of a tile.
"""

import math

import torch
import triton
import triton.language as tl
from scipy.fft import next_fast_len
from torch import Tensor

from bench.kernels import dense_last, precision

TAPS = {2: 6, 4: 8}
"""By the bytes of a number. Errors of a cosine: 3e-5 and 1e-6 (test_approximations)."""
SHARPNESS = 2.3  # beta of a tap
NUMBERS = 1024  # of a tile of tokens by channels
TERMS, FREQUENCIES, CHANNELS = 64, 16, 128  # of a tile of terms that are added up
WARPS = 4


@triton.jit
def _window(x, TAPS: tl.constexpr, BETA: tl.constexpr):
    z = x * (2.0 / TAPS)
    under = 1.0 - z * z
    return tl.where(under > 0, tl.exp(BETA * (tl.sqrt(tl.maximum(under, 0.0)) - 1.0)), 0.0)


@triton.jit
def _steepness(x, TAPS: tl.constexpr, BETA: tl.constexpr):
    """The window's derivative; at its ends, where it is infinite of something tiny, that is cut off."""
    z = x * (2.0 / TAPS)
    under = 1.0 - z * z
    root = tl.sqrt(tl.maximum(under, 1e-6))
    return tl.where(under > 0, -(BETA * 2.0 / TAPS) * z / root * tl.exp(BETA * (root - 1.0)), 0.0)


@triton.jit(do_not_specialize=["length"])
def _between(
    t_ptr, f_ptr, x_ptr, out_ptr, length, heads, rank, count, width, scale, f_b, f_l, f_h, x_b, x_l, x_h,
    SLOPES: tl.constexpr, TAPS: tl.constexpr, BETA: tl.constexpr, I: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Tokens of a head: the sum of their terms' rows, or with SLOPES each term's derivative against x."""
    tiles = tl.cdiv(length, I)
    row, h = (tl.program_id(0) // tiles // heads).to(tl.int64), tl.program_id(0) // tiles % heads
    i_I, c_C = tl.program_id(0) % tiles * I + tl.arange(0, I), tl.arange(0, C)
    known_I = i_I < length
    known_IC = known_I[:, None] & (c_C < width)[None, :]
    t_at = t_ptr + (row * heads + h) * (count // 2 + 1) * width + c_C[None, :]
    f_at = f_ptr + row * f_b + h * f_h + i_I * f_l
    y_IC = tl.zeros((I, C), tl.float32)
    if SLOPES:
        x_at = x_ptr + row * x_b + i_I[:, None] * x_l + h * x_h + c_C[None, :]
        x_IC = tl.load(x_at, mask=known_IC, other=0.0).to(tl.float32)
    for d in range(rank):
        f_I = tl.load(f_at + d, mask=known_I, other=0.0)
        place_I = tl.abs(f_I) * scale
        first_I = place_I.to(tl.int32) - (TAPS // 2 - 1)
        if SLOPES:
            y_IC = tl.zeros((I, C), tl.float32)
        for tap in tl.static_range(TAPS):
            m_I = first_I + tap
            near_I = tl.abs(m_I)
            near_I = tl.minimum(near_I, count - near_I)
            t_IC = tl.load(t_at + near_I[:, None] * width, mask=known_IC, other=0.0).to(tl.float32)
            if SLOPES:
                y_IC += t_IC * _steepness(place_I - m_I, TAPS, BETA)[:, None]
            else:
                y_IC += t_IC * _window(place_I - m_I, TAPS, BETA)[:, None]
        if SLOPES:
            slope_I = tl.sum(y_IC * x_IC, 1) * tl.where(f_I < 0, -scale, scale)
            tl.store(out_ptr + ((row * length + i_I) * heads + h) * rank + d, slope_I, mask=known_I)
    if not SLOPES:
        tl.store(out_ptr + ((row * length + i_I[:, None]) * heads + h) * width + c_C[None, :], y_IC, mask=known_IC)


@triton.jit(do_not_specialize=["length"])
def _add_up(
    x_ptr, f_ptr, order_ptr, starts_ptr, u_ptr, length, heads, rank, count, width, scale, own,
    f_b, f_l, f_h, x_b, x_l, x_h, TAPS: tl.constexpr, BETA: tl.constexpr,
    T: tl.constexpr, N: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A few frequencies of a head: the rows of all terms near them. `own`: 1 if a row has frequencies of its own."""
    row, h = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    m_N, c_C = tl.program_id(0) * N + tl.arange(0, N), tl.program_id(2) * C + tl.arange(0, C)
    cells = count // 2 + 1
    at = starts_ptr + (row * own * heads + h) * cells
    begin = tl.load(at + tl.maximum(tl.program_id(0) * N - TAPS // 2, 0))
    end = tl.load(at + tl.minimum(tl.program_id(0) * N + N + TAPS // 2, cells))
    u_NC = tl.zeros((N, C), tl.float32)
    for start in range(begin, end, T):
        known_T = start + tl.arange(0, T) < end
        term_T = tl.load(order_ptr + start + tl.arange(0, T), mask=known_T, other=0)
        i_T, d_T = term_T // rank % length, term_T % rank
        f_T = tl.load(f_ptr + row * f_b + h * f_h + i_T * f_l + d_T, mask=known_T, other=0.0)
        place_T = tl.abs(f_T) * scale
        m_N1, place_1T = m_N[:, None].to(tl.float32), place_T[None, :]
        w_NT = _window(place_1T - m_N1, TAPS, BETA)
        w_NT += tl.where(m_N1 > 0, _window(place_1T + m_N1, TAPS, BETA), 0.0)
        w_NT += tl.where(m_N1 * 2 < count, _window(place_1T + m_N1 - count, TAPS, BETA), 0.0)
        x_at = x_ptr + row * x_b + i_T[:, None] * x_l + h * x_h + c_C[None, :]
        x_TC = tl.load(x_at, mask=known_T[:, None] & (c_C < width)[None, :], other=0.0)
        u_NC += tl.dot(w_NT.to(x_TC.dtype), x_TC, input_precision=PRECISION)
    u_at = u_ptr + (tl.program_id(1).to(tl.int64) * cells + m_N[:, None]) * width + c_C[None, :]
    tl.store(u_at, u_NC, mask=(m_N < cells)[:, None] & (c_C < width)[None, :])


def _count(size: int) -> int:
    """N: even, twice what `size` places need, and a product of small primes."""
    return 2 * next_fast_len(2 * size, real=True)


def _correction(size: int, count: int, taps: int, device: torch.device) -> Tensor:
    """One over the window's transform at each place, (K, 1), by the midpoint rule; made on the device."""
    x_Q = ((torch.arange(64 * taps, device=device) + 0.5) / (64 * taps) - 0.5) * taps
    window_Q = torch.exp(SHARPNESS * taps * ((1 - (2 * x_Q / taps).square()).sqrt() - 1))
    phase_KQ = (2 * math.pi / count) * torch.arange(size, device=device)[:, None] * x_Q
    return 64 / (phase_KQ.cos() @ window_Q)[:, None]


def _transformed(x_BHXP: Tensor, count: int, kept: int) -> Tensor:
    """Sums over X of cos(2 pi x m / N) x, for the first `kept` m, fp32."""
    return torch.fft.rfft(x_BHXP, n=count, dim=2).real[:, :, :kept]


def _frequencies(s_BHKP: Tensor) -> tuple[Tensor, int, int]:
    """The sums at even frequencies, in the dtype of s; N and TAPS."""
    size, taps = s_BHKP.shape[2], TAPS[s_BHKP.dtype.itemsize]
    count = _count(size)
    corrected = s_BHKP * _correction(size, count, taps, s_BHKP.device)
    return _transformed(corrected, count, count // 2 + 1).to(s_BHKP.dtype).contiguous(), count, taps


def _launch_between(f_BLHR: Tensor, s_BHKP: Tensor, x_BLHP: Tensor | None, out: Tensor, spacing: int) -> None:
    t_BHMP, count, taps = _frequencies(s_BHKP)
    f_BLHR, x = dense_last(f_BLHR), t_BHMP if x_BLHP is None else dense_last(x_BLHP)
    (batch, heads, _, width), (_, length, _, rank) = s_BHKP.shape, f_BLHR.shape
    own, c = int(len(f_BLHR) > 1), triton.next_power_of_2(width)
    i = max(NUMBERS // c, 1)
    _between[batch * heads * triton.cdiv(length, i),](
        t_BHMP, f_BLHR, x, out, length, heads, rank, count, width, spacing * count,
        f_BLHR.stride(0) * own, *f_BLHR.stride()[1:3], *x.stride()[:3],
        SLOPES=x_BLHP is not None, TAPS=taps, BETA=SHARPNESS * taps, I=i, C=c, num_warps=WARPS,
    )  # fmt: skip


def _sorted(f_BLHR: Tensor, scale: int, cells: int) -> tuple[Tensor, Tensor]:
    """Terms of each head by the cell of frequencies that they lie in, and where the cells begin among them."""
    batch, _, heads, _ = f_BLHR.shape
    cell_BHLR = (f_BLHR.transpose(1, 2).abs() * scale).int()
    first_BH11 = cells * torch.arange(batch * heads, device=f_BLHR.device, dtype=torch.int32).view(batch, heads, 1, 1)
    cell, order = (cell_BHLR + first_BH11).flatten().sort(stable=True)
    edges = torch.arange(batch * heads * cells + 1, device=cell.device, dtype=torch.int32)
    return order, torch.searchsorted(cell, edges, out_int32=True)


@torch.library.custom_op("mixerbench::apply_nonuniform", mutates_args=())
def apply_nonuniform(f_BLHR: Tensor, s_BHKP: Tensor, spacing: int) -> Tensor:
    """Rows y_BLHP = c s in the dtype of s; frequencies in fp32, of one row or of all, at most 1 / (2 spacing)."""
    batch, heads, _, width = s_BHKP.shape
    y_BLHP = s_BHKP.new_empty(batch, f_BLHR.shape[1], heads, width)
    _launch_between(f_BLHR, s_BHKP, None, y_BLHP, spacing)
    return y_BLHP


@torch.library.custom_op("mixerbench::gather_nonuniform", mutates_args=())
def gather_nonuniform(f_BLHR: Tensor, x_BLHP: Tensor, spacing: int, size: int) -> Tensor:
    """States s_BHKP = c^T x in the dtype of x, K = `size`; added up in fp32."""
    f_BLHR, x_BLHP = dense_last(f_BLHR), dense_last(x_BLHP)
    (batch, length, heads, width), rank = x_BLHP.shape, f_BLHR.shape[-1]
    count, taps, own = _count(size), TAPS[x_BLHP.dtype.itemsize], int(len(f_BLHR) > 1)
    cells, c = count // 2 + 1, min(CHANNELS, max(16, triton.next_power_of_2(width)))
    order, starts = _sorted(f_BLHR, spacing * count, cells)
    u_BHMP = x_BLHP.new_empty(batch, heads, cells, width, dtype=torch.float32)
    _add_up[triton.cdiv(cells, FREQUENCIES), batch * heads, triton.cdiv(width, c)](
        x_BLHP, f_BLHR, order, starts, u_BHMP, length, heads, rank, count, width, spacing * count, own,
        f_BLHR.stride(0) * own, *f_BLHR.stride()[1:3], *x_BLHP.stride()[:3],
        TAPS=taps, BETA=SHARPNESS * taps, T=TERMS, N=FREQUENCIES, C=c,
        PRECISION=precision(x_BLHP.dtype), num_warps=WARPS,
    )  # fmt: skip
    s_BHKP = _transformed(u_BHMP, count, size) * _correction(size, count, taps, u_BHMP.device)
    return s_BHKP.to(x_BLHP.dtype).contiguous()  # a transform leaves its axes in an order of its own


@torch.library.custom_op("mixerbench::nonuniform_backward", mutates_args=())
def frequency_gradient(f_BLHR: Tensor, x_BLHP: Tensor, s_BHKP: Tensor, spacing: int) -> Tensor:
    """gf, like f, of the sum over tokens, heads and places of c (x s^T)."""
    gf_BLHR = f_BLHR.new_empty(len(x_BLHP), *f_BLHR.shape[1:])
    _launch_between(f_BLHR, s_BHKP, x_BLHP, gf_BLHR, spacing)
    return gf_BLHR.sum(0, keepdim=True) if len(f_BLHR) < len(gf_BLHR) else gf_BLHR


@apply_nonuniform.register_fake
def _(f_BLHR, s_BHKP, spacing):
    return s_BHKP.new_empty(len(s_BHKP), *f_BLHR.shape[1:3], s_BHKP.shape[-1])


@gather_nonuniform.register_fake
def _(f_BLHR, x_BLHP, spacing, size):
    return x_BLHP.new_empty(len(x_BLHP), f_BLHR.shape[2], size, x_BLHP.shape[-1])


@frequency_gradient.register_fake
def _(f_BLHR, x_BLHP, s_BHKP, spacing):
    return f_BLHR.new_empty(f_BLHR.shape)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])
    ctx.spacing = inputs[2]


def _apply_gradients(ctx, gy_BLHP):
    f_BLHR, s_BHKP = ctx.saved_tensors
    gf_BLHR = frequency_gradient(f_BLHR, gy_BLHP, s_BHKP, ctx.spacing)
    return gf_BLHR, gather_nonuniform(f_BLHR, gy_BLHP, ctx.spacing, s_BHKP.shape[2]), None


def _gather_gradients(ctx, gs_BHKP):
    f_BLHR, x_BLHP = ctx.saved_tensors
    gf_BLHR = frequency_gradient(f_BLHR, x_BLHP, gs_BHKP, ctx.spacing)
    return gf_BLHR, apply_nonuniform(f_BLHR, gs_BHKP, ctx.spacing), None, None


apply_nonuniform.register_autograd(_apply_gradients, setup_context=_keep)
gather_nonuniform.register_autograd(_gather_gradients, setup_context=_keep)
