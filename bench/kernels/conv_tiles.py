"""The programs of conv.py: what one of them does with a stretch of tokens of some channels.

Axes: B batch, L length, C channels, W taps, T tokens of a stretch, S shares of a gradient.
"""

import triton
import triton.language as tl

from bench.kernels.sigmoid import sigmoid

AHEAD = tl.constexpr(4)  # tokens on their way from memory while one is worked on; converted later, so as not to wait


@triton.jit
def _token(at_C, known_C, place, length, stride_l, FIRST: tl.constexpr):
    """A token's channels as they are in memory; outside the row another's, which its segment will undo. Only what is
    read FIRST may lie before the row."""
    place = tl.minimum(place, length - 1)
    if FIRST:
        place = tl.maximum(place, 0)
    return tl.load(at_C + place * stride_l, mask=known_C, other=0.0)


@triton.jit
def _segment(segments_ptr, place, length, FIRST: tl.constexpr):
    """A token's segment, -1 outside the row."""
    inside = place < length
    if FIRST:
        inside = inside & (place >= 0)
    return tl.load(segments_ptr + place, mask=inside, other=-1).to(tl.int32)


@triton.jit
def _read(at_C, known_C, segments_ptr, at, length, stride_l):
    """Four tokens from place `at` on, and their segments, none of which waits for another."""
    x0 = _token(at_C, known_C, at, length, stride_l, True)
    x1 = _token(at_C, known_C, at + 1, length, stride_l, True)
    x2 = _token(at_C, known_C, at + 2, length, stride_l, True)
    x3 = _token(at_C, known_C, at + 3, length, stride_l, True)
    s0, s1 = _segment(segments_ptr, at, length, True), _segment(segments_ptr, at + 1, length, True)
    s2, s3 = _segment(segments_ptr, at + 2, length, True), _segment(segments_ptr, at + 3, length, True)
    return x0, x1, x2, x3, s0, s1, s2, s3


@triton.jit
def _real(x_C, segment):
    """In fp32, zero on padding, whatever stands there."""
    return tl.where(segment > 0, x_C.to(tl.float32), 0.0)


@triton.jit
def _window(at_C, known_C, segments_ptr, at, length, stride_l):
    """Seven tokens from place `at` on, ready, and their segments; then the four tokens ahead of them and theirs."""
    x0, x1, x2, x3, s0, s1, s2, s3 = _read(at_C, known_C, segments_ptr, at, length, stride_l)
    x4, x5, x6, a0, s4, s5, s6, b0 = _read(at_C, known_C, segments_ptr, at + 4, length, stride_l)
    a1, a2, a3, _, b1, b2, b3, _ = _read(at_C, known_C, segments_ptr, at + 8, length, stride_l)
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
def _seen(
    bias_C, w0, w1, w2, w3, w4, w5, w6, x0, x1, x2, x3, x4, x5, x6, s0, s1, s2, s3, s4, s5, s6,
    LEFT: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """pre of the token whose taps reach the window, and its segment."""
    own = _reader(s0, s1, s2, s3, s4, s5, s6, LEFT)
    k0, k1, k2 = _own(x0, s0, own, PACKED), _own(x1, s1, own, PACKED), _own(x2, s2, own, PACKED)
    k3, k4, k5 = _own(x3, s3, own, PACKED), _own(x4, s4, own, PACKED), _own(x5, s5, own, PACKED)
    return _pre(bias_C, k0, k1, k2, k3, k4, k5, _own(x6, s6, own, PACKED), w0, w1, w2, w3, w4, w5, w6), own


@triton.jit
def forward(
    x_ptr, segments_ptr, weight_ptr, bias_ptr, y_ptr, length, channels, stride_b, stride_l,
    W: tl.constexpr, LEFT: tl.constexpr, PACKED: tl.constexpr, SILU: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
    U: tl.constexpr,
):  # fmt: skip
    row, first, c_C = tl.program_id(2).to(tl.int64), tl.program_id(0) * T, tl.program_id(1) * C + tl.arange(0, C)
    w0, w1, w2, w3, w4, w5, w6 = _taps(weight_ptr, c_C, channels, W)
    known_C = c_C < channels
    bias_C = tl.load(bias_ptr + c_C, mask=known_C, other=0.0).to(tl.float32)
    x_C, y_C = x_ptr + row * stride_b + c_C, y_ptr + row * length * channels + c_C
    segments_ptr += row * length
    x0, x1, x2, x3, x4, x5, x6, s0, s1, s2, s3, s4, s5, s6, a0, a1, a2, a3, b0, b1, b2, b3 = _window(
        x_C, known_C, segments_ptr, first - LEFT, length, stride_l
    )
    for n in range(0, T, U):
        for u in tl.static_range(U):
            t = first + n + u
            a4 = _token(x_C, known_C, t - LEFT + 7 + AHEAD, length, stride_l, False)
            b4 = _segment(segments_ptr, t - LEFT + 7 + AHEAD, length, False)
            out_C, _ = _seen(
                bias_C, w0, w1, w2, w3, w4, w5, w6, x0, x1, x2, x3, x4, x5, x6, s0, s1, s2, s3, s4, s5, s6, LEFT, PACKED
            )
            if SILU:
                out_C *= sigmoid(out_C)
            tl.store(y_C + t * channels, out_C, mask=c_C < tl.where(t < length, channels, 0))
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
def _said(gy_C, c_C, r, length, channels, stride_l):
    """What came in for token r, as it is in memory, zero outside the row."""
    inside = (r >= 0) & (r < length)
    return tl.load(gy_C + tl.where(inside, r, 0) * stride_l, mask=c_C < tl.where(inside, channels, 0), other=0.0)


@triton.jit
def _ahead(x_C, known_C, segments_ptr, gy_C, c_C, place, r, length, channels, stride_l, gy_l):
    """What the step of x at this place and of reader r will work on."""
    return (
        _token(x_C, known_C, place, length, stride_l, False),
        _segment(segments_ptr, place, length, False),
        _said(gy_C, c_C, r, length, channels, gy_l),
    )


@triton.jit
def _of_pre(gy_C, pre_C, SILU: tl.constexpr):
    """The gradient of pre."""
    g_C = gy_C.to(tl.float32)
    if SILU:
        sigmoid_C = sigmoid(pre_C)
        g_C *= sigmoid_C + pre_C * (sigmoid_C - sigmoid_C * sigmoid_C)
    return g_C


@triton.jit
def backward(
    x_ptr, segments_ptr, weight_ptr, bias_ptr, gy_ptr, gx_ptr, part_ptr, length, channels, stride_b, stride_l, gy_b,
    gy_l, W: tl.constexpr, LEFT: tl.constexpr, PACKED: tl.constexpr, SILU: tl.constexpr, T: tl.constexpr,
    C: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """gx of the stretch, and what its tokens say of the gradients of the taps and the bias. A step has place p in x0
    and ends with its gx, since p's last reader is r = p + LEFT, whose taps reach p .. p + 6. Six steps before the
    stretch make g of the other readers of its first places."""
    row, first, c_C = tl.program_id(2).to(tl.int64), tl.program_id(0) * T, tl.program_id(1) * C + tl.arange(0, C)
    w0, w1, w2, w3, w4, w5, w6 = _taps(weight_ptr, c_C, channels, W)
    known_C = c_C < channels
    bias_C = tl.load(bias_ptr + c_C, mask=known_C, other=0.0).to(tl.float32)
    x_C, gy_C, gx_C = x_ptr + row * stride_b + c_C, gy_ptr + row * gy_b + c_C, gx_ptr + row * length * channels + c_C
    segments_ptr, r = segments_ptr + row * length, first - 6 + LEFT
    x0, x1, x2, x3, x4, x5, x6, s0, s1, s2, s3, s4, s5, s6, a0, a1, a2, a3, b0, b1, b2, b3 = _window(
        x_C, known_C, segments_ptr, first - 6, length, stride_l
    )
    y0, y1 = _said(gy_C, c_C, r, length, channels, gy_l), _said(gy_C, c_C, r + 1, length, channels, gy_l)
    y2, y3 = _said(gy_C, c_C, r + 2, length, channels, gy_l), _said(gy_C, c_C, r + 3, length, channels, gy_l)
    zero_C = tl.zeros((C,), tl.float32)
    g0, g1, g2, g3, g4, g5 = zero_C, zero_C, zero_C, zero_C, zero_C, zero_C
    r0 = s0 * 0 - 1  # segments of the last readers; none yet
    r1, r2, r3, r4, r5 = r0, r0, r0, r0, r0
    for n in tl.static_range(6):
        place, at_r = first + n + 1 + AHEAD, r + n + AHEAD
        a4, b4, y4 = _ahead(x_C, known_C, segments_ptr, gy_C, c_C, place, at_r, length, channels, stride_l, gy_l)
        pre_C, r6 = _seen(
            bias_C, w0, w1, w2, w3, w4, w5, w6, x0, x1, x2, x3, x4, x5, x6, s0, s1, s2, s3, s4, s5, s6, LEFT, PACKED
        )
        g6 = _of_pre(y0, pre_C, SILU)
        x0, x1, x2, x3, x4, x5, x6 = x1, x2, x3, x4, x5, x6, _real(a0, b0)
        s0, s1, s2, s3, s4, s5, s6 = s1, s2, s3, s4, s5, s6, b0
        a0, a1, a2, a3, b0, b1, b2, b3 = a1, a2, a3, a4, b1, b2, b3, b4
        g0, g1, g2, g3, g4, g5, r0, r1, r2, r3, r4, r5 = g1, g2, g3, g4, g5, g6, r1, r2, r3, r4, r5, r6
        y0, y1, y2, y3 = y1, y2, y3, y4
    d0, d1, d2, d3, d4, d5, d6, db = zero_C, zero_C, zero_C, zero_C, zero_C, zero_C, zero_C, zero_C
    for n in range(0, T, U):
        for u in tl.static_range(U):
            p = first + n + u
            place, at_r = p + 7 + AHEAD, p + LEFT + AHEAD
            a4, b4, y4 = _ahead(x_C, known_C, segments_ptr, gy_C, c_C, place, at_r, length, channels, stride_l, gy_l)
            pre_C, r6 = _seen(
                bias_C, w0, w1, w2, w3, w4, w5, w6, x0, x1, x2, x3, x4, x5, x6, s0, s1, s2, s3, s4, s5, s6, LEFT, PACKED
            )
            g6 = _of_pre(y0, pre_C, SILU)
            n6, n5, n4 = _own(g6, r6, s0, PACKED), _own(g5, r5, s0, PACKED), _own(g4, r4, s0, PACKED)
            n3, n2, n1 = _own(g3, r3, s0, PACKED), _own(g2, r2, s0, PACKED), _own(g1, r1, s0, PACKED)
            n0 = _own(g0, r0, s0, PACKED)
            d0, d1, d2, d3 = d0 + x0 * n6, d1 + x0 * n5, d2 + x0 * n4, d3 + x0 * n3
            d4, d5, d6 = d4 + x0 * n2, d5 + x0 * n1, d6 + x0 * n0
            db += _reader(g6, g5, g4, g3, g2, g1, g0, LEFT)  # p's own
            gx = _pre(zero_C, n6, n5, n4, n3, n2, n1, n0, w0, w1, w2, w3, w4, w5, w6)
            tl.store(gx_C + p * channels, tl.where(s0 > 0, gx, 0.0), mask=c_C < tl.where(p < length, channels, 0))
            x0, x1, x2, x3, x4, x5, x6 = x1, x2, x3, x4, x5, x6, _real(a0, b0)
            s0, s1, s2, s3, s4, s5, s6 = s1, s2, s3, s4, s5, s6, b0
            a0, a1, a2, a3, b0, b1, b2, b3 = a1, a2, a3, a4, b1, b2, b3, b4
            g0, g1, g2, g3, g4, g5, r0, r1, r2, r3, r4, r5 = g1, g2, g3, g4, g5, g6, r1, r2, r3, r4, r5, r6
            y0, y1, y2, y3 = y1, y2, y3, y4
    part = part_ptr + (row * tl.num_programs(0) + tl.program_id(0)) * 8 * channels
    _share(part, d0, d1, d2, d3, d4, d5, d6, db, c_C, channels)


@triton.jit(do_not_specialize=["shares"])
def total(part_ptr, gw_ptr, gb_ptr, shares, channels, W: tl.constexpr, S: tl.constexpr, C: tl.constexpr):
    """The shares of one tap (or of the bias, the last row) added up, always in the same order."""
    w, c_C, s_S = tl.program_id(1), tl.program_id(0) * C + tl.arange(0, C), tl.arange(0, S)
    known_C = c_C < channels
    sum_SC = tl.zeros((S, C), tl.float32)
    for s in range(0, shares, S):
        at_SC = ((s + s_S[:, None]).to(tl.int64) * 8 + w) * channels + c_C[None, :]
        sum_SC += tl.load(part_ptr + at_SC, mask=((s + s_S) < shares)[:, None] & known_C[None, :], other=0.0)
    sum_C = tl.sum(sum_SC, 0)
    tl.store(gw_ptr + c_C * W + w, sum_C, mask=c_C < tl.where(w < W, channels, 0))
    tl.store(gb_ptr + c_C, sum_C, mask=c_C < tl.where(w == 7, channels, 0))
