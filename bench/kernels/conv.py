"""The shell's short depthwise convolution, with its activation, in one pass over memory each way.

    pre_i = bias + sum over w of weight_w x_{i + w - left};  y = silu(pre) or pre
over places of the token's own document only. Sums in fp32 whatever the dtype of x. A program walks along a stretch of
tokens and keeps those that its taps reach in registers, so that each is read once, some tokens ahead of its use. The
gradient needs x alone: pre is computed again on the way, and g = gy silu'(pre) is kept for as many tokens as x is.
Axes: B batch, L length, C channels, W taps, T tokens of a stretch, S stretches of all rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.kernels import dense_last

TOKENS, CHANNELS = 64, 256
"""Of a stretch: a longer one reads less twice, a shorter one keeps more programs busy."""
FOUR = 128
"""Channels that a warp takes, four a thread."""
UNROLLED = 7
"""Tokens of one turn of the loop: after seven the window is another, so that no register need be moved. With one,
right in the interpreter, Triton 3.6 compiled it wrongly for an H200: keep to what benchmarks/kernels.py has checked."""
REACH = 7
"""Taps that a program keeps; fewer are as good as 7 with zeros."""
AHEAD = tl.constexpr(4)  # tokens on their way from memory while one is worked on; converted later, so as not to wait


@triton.jit
def _token(x_ptr, place, length, c_C, channels, stride_l):
    """A token's channels as they are in memory, zero outside the row."""
    inside = (place >= 0) & (place < length)
    x_at = x_ptr + tl.where(inside, place, 0).to(tl.int64) * stride_l
    return tl.load(x_at + c_C, mask=c_C < tl.where(inside, channels, 0), other=0.0)


@triton.jit
def _segment(segments_ptr, place, length):
    """A token's segment, -1 outside the row."""
    return tl.load(segments_ptr + place, mask=(place >= 0) & (place < length), other=-1)


@triton.jit
def _read(x_ptr, segments_ptr, at, length, c_C, channels, stride_l):
    """Four tokens from place `at` on, and their segments, none of which waits for another."""
    x0, x1 = (
        _token(x_ptr, at, length, c_C, channels, stride_l),
        _token(x_ptr, at + 1, length, c_C, channels, stride_l),
    )
    x2, x3 = (
        _token(x_ptr, at + 2, length, c_C, channels, stride_l),
        _token(x_ptr, at + 3, length, c_C, channels, stride_l),
    )
    s0, s1 = _segment(segments_ptr, at, length), _segment(segments_ptr, at + 1, length)
    s2, s3 = _segment(segments_ptr, at + 2, length), _segment(segments_ptr, at + 3, length)
    return x0, x1, x2, x3, s0, s1, s2, s3


@triton.jit
def _real(x_C, segment):
    """In fp32, zero on padding, whatever stands there."""
    return tl.where(segment > 0, x_C.to(tl.float32), 0.0)


@triton.jit
def _window(x_ptr, segments_ptr, at, length, c_C, channels, stride_l):
    """Seven tokens from place `at` on, ready, and their segments; then the four tokens ahead of them and theirs."""
    x0, x1, x2, x3, s0, s1, s2, s3 = _read(x_ptr, segments_ptr, at, length, c_C, channels, stride_l)
    x4, x5, x6, a0, s4, s5, s6, b0 = _read(x_ptr, segments_ptr, at + 4, length, c_C, channels, stride_l)
    a1, a2, a3, _, b1, b2, b3, _ = _read(x_ptr, segments_ptr, at + 8, length, c_C, channels, stride_l)
    return (
        _real(x0, s0), _real(x1, s1), _real(x2, s2), _real(x3, s3), _real(x4, s4), _real(x5, s5), _real(x6, s6),
        s0, s1, s2, s3, s4, s5, s6, a0, a1, a2, a3, b0, b1, b2, b3,
    )  # fmt: skip


@triton.jit
def _tap(weight_ptr, c_C, channels, w: tl.constexpr, W: tl.constexpr):
    known_C = c_C < (channels if w < W else 0)
    return tl.load(weight_ptr + c_C * W + w, mask=known_C, other=0.0).to(tl.float32)


@triton.jit
def _taps(weight_ptr, c_C, channels, W: tl.constexpr):
    return (
        _tap(weight_ptr, c_C, channels, 0, W), _tap(weight_ptr, c_C, channels, 1, W),
        _tap(weight_ptr, c_C, channels, 2, W), _tap(weight_ptr, c_C, channels, 3, W),
        _tap(weight_ptr, c_C, channels, 4, W), _tap(weight_ptr, c_C, channels, 5, W),
        _tap(weight_ptr, c_C, channels, 6, W),
    )  # fmt: skip


@triton.jit
def _own(x_C, segment, own, PACKED: tl.constexpr):
    """x if it is of the same document; in a row of one document every place is."""
    return x_C * (segment == own).to(tl.float32) if PACKED else x_C


@triton.jit
def _reader(s0, s1, s2, s3, s4, s5, s6, LEFT: tl.constexpr):
    """The segment of the token whose taps reach the window."""
    s012, s345 = s0 if LEFT == 0 else s1 if LEFT == 1 else s2, s3 if LEFT == 3 else s4 if LEFT == 4 else s5
    return s012 if LEFT < 3 else s345 if LEFT < 6 else s6


@triton.jit
def _pre(bias_C, k0, k1, k2, k3, k4, k5, k6, w0, w1, w2, w3, w4, w5, w6):
    """One sum after another: each is a fused multiply-add."""
    pre_C = bias_C + k0 * w0
    pre_C += k1 * w1
    pre_C += k2 * w2
    pre_C += k3 * w3
    pre_C += k4 * w4
    pre_C += k5 * w5
    pre_C += k6 * w6
    return pre_C


@triton.jit
def _forward(
    x_ptr, segments_ptr, weight_ptr, bias_ptr, y_ptr, length, channels, stride_b, stride_l,
    W: tl.constexpr, LEFT: tl.constexpr, PACKED: tl.constexpr, SILU: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
    U: tl.constexpr,
):  # fmt: skip
    row, first, c_C = tl.program_id(2).to(tl.int64), tl.program_id(0) * T, tl.program_id(1) * C + tl.arange(0, C)
    w0, w1, w2, w3, w4, w5, w6 = _taps(weight_ptr, c_C, channels, W)
    bias_C = tl.load(bias_ptr + c_C, mask=c_C < channels, other=0.0).to(tl.float32)
    x_ptr, segments_ptr, y_ptr = x_ptr + row * stride_b, segments_ptr + row * length, y_ptr + row * length * channels
    x0, x1, x2, x3, x4, x5, x6, s0, s1, s2, s3, s4, s5, s6, a0, a1, a2, a3, b0, b1, b2, b3 = _window(
        x_ptr, segments_ptr, first - LEFT, length, c_C, channels, stride_l
    )
    for n in range(0, T, U):
        for u in tl.static_range(U):
            t = first + n + u
            ahead = t - LEFT + 7 + AHEAD
            a4 = _token(x_ptr, ahead, length, c_C, channels, stride_l)
            b4 = _segment(segments_ptr, ahead, length)
            own = _reader(s0, s1, s2, s3, s4, s5, s6, LEFT)
            k0, k1, k2 = _own(x0, s0, own, PACKED), _own(x1, s1, own, PACKED), _own(x2, s2, own, PACKED)
            k3, k4, k5 = _own(x3, s3, own, PACKED), _own(x4, s4, own, PACKED), _own(x5, s5, own, PACKED)
            k6 = _own(x6, s6, own, PACKED)
            y_C = _pre(bias_C, k0, k1, k2, k3, k4, k5, k6, w0, w1, w2, w3, w4, w5, w6)
            if SILU:
                y_C = y_C * tl.sigmoid(y_C)
            kept_C = c_C < tl.where((t < length) & (t < first + T), channels, 0)
            tl.store(y_ptr + t.to(tl.int64) * channels + c_C, y_C, mask=kept_C)
            x0, x1, x2, x3, x4, x5, x6 = x1, x2, x3, x4, x5, x6, _real(a0, b0)
            s0, s1, s2, s3, s4, s5, s6 = s1, s2, s3, s4, s5, s6, b0
            a0, a1, a2, a3, b0, b1, b2, b3 = a1, a2, a3, a4, b1, b2, b3, b4


@triton.jit
def _share(part_ptr, d0, d1, d2, d3, d4, d5, d6, db, c_C, channels):
    """A stretch's share of the gradients: rows 0 to 6 of the taps, 7 of the bias."""
    known_C = c_C < channels
    tl.store(part_ptr + c_C, d0, mask=known_C)
    tl.store(part_ptr + channels + c_C, d1, mask=known_C)
    tl.store(part_ptr + 2 * channels + c_C, d2, mask=known_C)
    tl.store(part_ptr + 3 * channels + c_C, d3, mask=known_C)
    tl.store(part_ptr + 4 * channels + c_C, d4, mask=known_C)
    tl.store(part_ptr + 5 * channels + c_C, d5, mask=known_C)
    tl.store(part_ptr + 6 * channels + c_C, d6, mask=known_C)
    tl.store(part_ptr + 7 * channels + c_C, db, mask=known_C)


@triton.jit
def _backward(
    x_ptr, segments_ptr, weight_ptr, bias_ptr, gy_ptr, gx_ptr, part_ptr, length, channels, stride_b, stride_l, gy_b,
    gy_l,
    W: tl.constexpr, LEFT: tl.constexpr, PACKED: tl.constexpr, SILU: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
    U: tl.constexpr,
):  # fmt: skip
    """gx of the stretch, and the stretch's share of the gradients of the taps and (last row) the bias.

    Step n meets reader r = first - 6 + LEFT + n, whose taps reach places r - LEFT .. r - LEFT + 6, and ends with gx of
    place r - LEFT, the last reader of which is r.
    """
    row, first, c_C = tl.program_id(2).to(tl.int64), tl.program_id(0) * T, tl.program_id(1) * C + tl.arange(0, C)
    w0, w1, w2, w3, w4, w5, w6 = _taps(weight_ptr, c_C, channels, W)
    bias_C = tl.load(bias_ptr + c_C, mask=c_C < channels, other=0.0).to(tl.float32)
    at, reader = first - 6, first - 6 + LEFT
    x_ptr, segments_ptr, gy_ptr = x_ptr + row * stride_b, segments_ptr + row * length, gy_ptr + row * gy_b
    x0, x1, x2, x3, x4, x5, x6, s0, s1, s2, s3, s4, s5, s6, a0, a1, a2, a3, b0, b1, b2, b3 = _window(
        x_ptr, segments_ptr, at, length, c_C, channels, stride_l
    )
    y0 = _token(gy_ptr, reader, length, c_C, channels, gy_l)
    y1 = _token(gy_ptr, reader + 1, length, c_C, channels, gy_l)
    y2 = _token(gy_ptr, reader + 2, length, c_C, channels, gy_l)
    y3 = _token(gy_ptr, reader + 3, length, c_C, channels, gy_l)
    zero_C = tl.zeros((C,), tl.float32)
    g0, g1, g2, g3, g4, g5 = zero_C, zero_C, zero_C, zero_C, zero_C, zero_C
    d0, d1, d2, d3, d4, d5, d6, db = zero_C, zero_C, zero_C, zero_C, zero_C, zero_C, zero_C, zero_C
    r0 = s0 * 0 - 1  # segments of the last readers; none yet
    r1, r2, r3, r4, r5 = r0, r0, r0, r0, r0
    for n in range(0, T + 6, U):
        for u in tl.static_range(U):
            place, r = at + n + u, reader + n + u
            a4 = _token(x_ptr, place + 7 + AHEAD, length, c_C, channels, stride_l)
            b4 = _segment(segments_ptr, place + 7 + AHEAD, length)
            y4 = _token(gy_ptr, r + AHEAD, length, c_C, channels, gy_l)
            r6 = _reader(s0, s1, s2, s3, s4, s5, s6, LEFT)
            k0, k1, k2 = _own(x0, s0, r6, PACKED), _own(x1, s1, r6, PACKED), _own(x2, s2, r6, PACKED)
            k3, k4, k5 = _own(x3, s3, r6, PACKED), _own(x4, s4, r6, PACKED), _own(x5, s5, r6, PACKED)
            k6, g6 = _own(x6, s6, r6, PACKED), y0.to(tl.float32)
            if SILU:
                pre_C = _pre(bias_C, k0, k1, k2, k3, k4, k5, k6, w0, w1, w2, w3, w4, w5, w6)
                sigmoid_C = tl.sigmoid(pre_C)
                g6 = g6 * (sigmoid_C + pre_C * (sigmoid_C - sigmoid_C * sigmoid_C))
            mine_C = tl.where((r >= first) & (r < first + T), g6, 0.0)
            d0, d1, d2, d3 = d0 + mine_C * k0, d1 + mine_C * k1, d2 + mine_C * k2, d3 + mine_C * k3
            d4, d5, d6, db = d4 + mine_C * k4, d5 + mine_C * k5, d6 + mine_C * k6, db + mine_C
            n6, n5, n4 = _own(g6, r6, s0, PACKED), _own(g5, r5, s0, PACKED), _own(g4, r4, s0, PACKED)
            n3, n2, n1 = _own(g3, r3, s0, PACKED), _own(g2, r2, s0, PACKED), _own(g1, r1, s0, PACKED)
            n0 = _own(g0, r0, s0, PACKED)
            gx_C = _pre(zero_C, n6, n5, n4, n3, n2, n1, n0, w0, w1, w2, w3, w4, w5, w6)
            kept = (place >= first) & (place < length) & (place < first + T)
            gx_at = gx_ptr + (row * length + place) * channels
            tl.store(gx_at + c_C, tl.where(s0 > 0, gx_C, 0.0), mask=c_C < tl.where(kept, channels, 0))
            x0, x1, x2, x3, x4, x5, x6 = x1, x2, x3, x4, x5, x6, _real(a0, b0)
            s0, s1, s2, s3, s4, s5, s6 = s1, s2, s3, s4, s5, s6, b0
            a0, a1, a2, a3, b0, b1, b2, b3 = a1, a2, a3, a4, b1, b2, b3, b4
            g0, g1, g2, g3, g4, g5, r0, r1, r2, r3, r4, r5 = g1, g2, g3, g4, g5, g6, r1, r2, r3, r4, r5, r6
            y0, y1, y2, y3 = y1, y2, y3, y4
    part = part_ptr + (row * tl.num_programs(0) + tl.program_id(0)) * 8 * channels
    _share(part, d0, d1, d2, d3, d4, d5, d6, db, c_C, channels)


def _shape(x_BLC: Tensor) -> tuple[tuple[int, int, int], dict]:
    """The grid, and what a program is: four channels a thread."""
    batch, length, channels = x_BLC.shape
    tile = min(CHANNELS, max(128, triton.next_power_of_2(channels)))
    grid = triton.cdiv(length, TOKENS), triton.cdiv(channels, tile), batch
    return grid, {"T": TOKENS, "C": tile, "U": UNROLLED, "num_warps": tile // FOUR}


@torch.library.custom_op("mixerbench::short_conv", mutates_args=())
def short_conv(
    x_BLC: Tensor, segments_BL: Tensor, weight_CW: Tensor, bias_C: Tensor, left: int, packed: bool, silu: bool
) -> Tensor:
    """y_BLC in the dtype of x. `left`: taps before the token's own. Padding (segment 0) is read as zero."""
    x_BLC, segments_BL = dense_last(x_BLC), segments_BL.contiguous()
    y_BLC = torch.empty(x_BLC.shape, dtype=x_BLC.dtype, device=x_BLC.device)
    grid, shape = _shape(x_BLC)
    _forward[grid](
        x_BLC, segments_BL, weight_CW, bias_C, y_BLC, *x_BLC.shape[1:], *x_BLC.stride()[:2],
        W=weight_CW.shape[1], LEFT=left, PACKED=packed, SILU=silu, **shape,
    )  # fmt: skip
    return y_BLC


@torch.library.custom_op("mixerbench::short_conv_backward", mutates_args=())
def short_conv_backward(
    gy_BLC: Tensor,
    x_BLC: Tensor,
    segments_BL: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor,
    left: int,
    packed: bool,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (its dtype), of the taps and of the bias (fp32)."""
    gy_BLC, x_BLC, segments_BL = dense_last(gy_BLC), dense_last(x_BLC), segments_BL.contiguous()
    (batch, length, channels), width = x_BLC.shape, weight_CW.shape[1]
    grid, shape = _shape(x_BLC)
    gx_BLC = torch.empty(x_BLC.shape, dtype=x_BLC.dtype, device=x_BLC.device)
    part_SWC = torch.empty(batch * grid[0], REACH + 1, channels, dtype=torch.float32, device=x_BLC.device)
    _backward[grid](
        x_BLC, segments_BL, weight_CW, bias_C, gy_BLC, gx_BLC, part_SWC, length, channels,
        *x_BLC.stride()[:2], *gy_BLC.stride()[:2],
        W=width, LEFT=left, PACKED=packed, SILU=silu, **shape,
    )  # fmt: skip
    sum_WC = part_SWC.sum(0)
    return gx_BLC, sum_WC[:width].t().contiguous(), sum_WC[REACH].clone()


@short_conv.register_fake
def _(x_BLC, segments_BL, weight_CW, bias_C, left, packed, silu):
    return torch.empty(x_BLC.shape, dtype=x_BLC.dtype, device=x_BLC.device)


@short_conv_backward.register_fake
def _(gy_BLC, x_BLC, segments_BL, weight_CW, bias_C, left, packed, silu):
    gx_BLC = torch.empty(x_BLC.shape, dtype=x_BLC.dtype, device=x_BLC.device)
    return (
        gx_BLC,
        gx_BLC.new_empty(weight_CW.shape, dtype=torch.float32),
        gx_BLC.new_empty(bias_C.shape, dtype=torch.float32),
    )


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])
    ctx.how = inputs[4:]


def _gradients(ctx, gy_BLC):
    x_BLC, segments_BL, weight_CW, bias_C = ctx.saved_tensors
    gx_BLC, gw_CW, gb_C = short_conv_backward(gy_BLC, x_BLC, segments_BL, weight_CW, bias_C, *ctx.how)
    return gx_BLC, None, gw_CW.to(weight_CW.dtype), gb_C.to(bias_C.dtype), None, None, None


short_conv.register_autograd(_gradients, setup_context=_keep)
