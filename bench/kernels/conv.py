"""The shell's short depthwise convolution, with its activation, in one pass over memory each way.

    pre_i = bias + sum over w of weight_w x_{i + w - left};  y = silu(pre) or pre
over places of the token's own document only. Sums in fp32 whatever the dtype of x. The gradient needs x alone: pre is
computed again, in the same tile.
Axes: B batch, L length, C channels, W taps, T tokens of a tile, S tiles of a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS, CHANNELS = 64, 64
"""Of a tile: 64 channels are 128 bytes of bf16, a full line; more tokens lessen what neighbouring tiles read twice."""


@triton.jit
def _source(segments_ptr, row, place_T, own_T, length, PACKED: tl.constexpr):
    """Which of the places hold a token that the tile's tokens may see."""
    inside_T = (place_T >= 0) & (place_T < length)
    seen_T = tl.load(segments_ptr + row * length + place_T, mask=inside_T, other=0)
    return (seen_T > 0) & ((seen_T == own_T) if PACKED else inside_T)


@triton.jit
def _before_activation(
    x_ptr, segments_ptr, weight_ptr, bias_ptr, row, t_T, own_T, c_C, length, channels, stride_b, stride_l,
    W: tl.constexpr, LEFT: tl.constexpr, PACKED: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    known_C = c_C < channels
    pre_TC = tl.zeros((T, C), tl.float32) + tl.load(bias_ptr + c_C, mask=known_C, other=0.0).to(tl.float32)[None, :]
    for w in tl.static_range(W):
        place_T = t_T + (w - LEFT)
        seen_T = _source(segments_ptr, row, place_T, own_T, length, PACKED)
        at_TC = x_ptr + row.to(tl.int64) * stride_b + place_T[:, None] * stride_l + c_C[None, :]
        x_TC = tl.load(at_TC, mask=seen_T[:, None] & known_C[None, :], other=0.0).to(tl.float32)
        weight_C = tl.load(weight_ptr + c_C * W + w, mask=known_C, other=0.0).to(tl.float32)
        pre_TC += x_TC * weight_C[None, :]
    return pre_TC


@triton.jit
def _forward(
    x_ptr, segments_ptr, weight_ptr, bias_ptr, y_ptr, length, channels, stride_b, stride_l,
    W: tl.constexpr, LEFT: tl.constexpr, PACKED: tl.constexpr, SILU: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(2)
    t_T = tl.program_id(0) * T + tl.arange(0, T)
    c_C = tl.program_id(1) * C + tl.arange(0, C)
    own_T = tl.load(segments_ptr + row * length + t_T, mask=t_T < length, other=0)
    y_TC = _before_activation(
        x_ptr, segments_ptr, weight_ptr, bias_ptr, row, t_T, own_T, c_C, length, channels, stride_b, stride_l,
        W, LEFT, PACKED, T, C,
    )  # fmt: skip
    if SILU:
        y_TC = y_TC * tl.sigmoid(y_TC)
    at_TC = y_ptr + (row.to(tl.int64) * length + t_T[:, None]) * channels + c_C[None, :]
    tl.store(at_TC, y_TC, mask=(t_T < length)[:, None] & (c_C < channels)[None, :])


@triton.jit
def _backward_taps(
    x_ptr, segments_ptr, weight_ptr, bias_ptr, gy_ptr, g_ptr, part_ptr, length, channels, stride_b, stride_l,
    gy_b, gy_l,
    W: tl.constexpr, LEFT: tl.constexpr, PACKED: tl.constexpr, SILU: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The gradient before the activation, g, and each tile's share of those of the taps and (last row) the bias."""
    row, tiles = tl.program_id(2), tl.num_programs(0)
    t_T = tl.program_id(0) * T + tl.arange(0, T)
    c_C = tl.program_id(1) * C + tl.arange(0, C)
    known_C, known_TC = c_C < channels, (t_T < length)[:, None] & (c_C < channels)[None, :]
    own_T = tl.load(segments_ptr + row * length + t_T, mask=t_T < length, other=0)
    at_TC = gy_ptr + row.to(tl.int64) * gy_b + t_T[:, None] * gy_l + c_C[None, :]
    g_TC = tl.load(at_TC, mask=known_TC, other=0.0).to(tl.float32)
    if SILU:
        pre_TC = _before_activation(
            x_ptr, segments_ptr, weight_ptr, bias_ptr, row, t_T, own_T, c_C, length, channels, stride_b, stride_l,
            W, LEFT, PACKED, T, C,
        )  # fmt: skip
        sigmoid_TC = tl.sigmoid(pre_TC)
        g_TC = g_TC * sigmoid_TC * (1 + pre_TC * (1 - sigmoid_TC))
        tl.store(g_ptr + (row.to(tl.int64) * length + t_T[:, None]) * channels + c_C[None, :], g_TC, mask=known_TC)
    part = part_ptr + (row.to(tl.int64) * tiles + tl.program_id(0)) * (W + 1) * channels
    for w in tl.static_range(W):
        place_T = t_T + (w - LEFT)
        seen_T = _source(segments_ptr, row, place_T, own_T, length, PACKED)
        x_at_TC = x_ptr + row.to(tl.int64) * stride_b + place_T[:, None] * stride_l + c_C[None, :]
        x_TC = tl.load(x_at_TC, mask=seen_T[:, None] & known_C[None, :], other=0.0).to(tl.float32)
        tl.store(part + w * channels + c_C, tl.sum(x_TC * g_TC, axis=0), mask=known_C)
    tl.store(part + W * channels + c_C, tl.sum(g_TC, axis=0), mask=known_C)


@triton.jit
def _backward_input(
    g_ptr, segments_ptr, weight_ptr, gx_ptr, length, channels, g_b, g_l,
    W: tl.constexpr, LEFT: tl.constexpr, PACKED: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(2)
    t_T = tl.program_id(0) * T + tl.arange(0, T)
    c_C = tl.program_id(1) * C + tl.arange(0, C)
    known_C = c_C < channels
    own_T = tl.load(segments_ptr + row * length + t_T, mask=t_T < length, other=0)
    gx_TC = tl.zeros((T, C), tl.float32)
    for w in tl.static_range(W):
        reader_T = t_T - (w - LEFT)
        inside_T = (reader_T >= 0) & (reader_T < length)
        if PACKED:
            reading_T = tl.load(segments_ptr + row * length + reader_T, mask=inside_T, other=-1)
            inside_T = reading_T == own_T
        at_TC = g_ptr + row.to(tl.int64) * g_b + reader_T[:, None] * g_l + c_C[None, :]
        g_TC = tl.load(at_TC, mask=inside_T[:, None] & known_C[None, :], other=0.0).to(tl.float32)
        gx_TC += g_TC * tl.load(weight_ptr + c_C * W + w, mask=known_C, other=0.0).to(tl.float32)[None, :]
    gx_TC = tl.where((own_T > 0)[:, None], gx_TC, 0.0)
    at_TC = gx_ptr + (row.to(tl.int64) * length + t_T[:, None]) * channels + c_C[None, :]
    tl.store(at_TC, gx_TC, mask=(t_T < length)[:, None] & known_C[None, :])


def _grid(x_BLC: Tensor) -> tuple[int, int, int]:
    batch, length, channels = x_BLC.shape
    return triton.cdiv(length, TOKENS), triton.cdiv(channels, CHANNELS), batch


def _rows(x_BLC: Tensor) -> Tensor:
    """x with its channels side by side in memory: a slice of wider rows may stay as it is."""
    return x_BLC if x_BLC.stride(-1) == 1 else x_BLC.contiguous()


@torch.library.custom_op("mixerbench::short_conv", mutates_args=())
def short_conv(
    x_BLC: Tensor, segments_BL: Tensor, weight_CW: Tensor, bias_C: Tensor, left: int, packed: bool, silu: bool
) -> Tensor:
    """y_BLC in the dtype of x. `left`: taps before the token's own. Padding (segment 0) is read as zero."""
    x_BLC, segments_BL = _rows(x_BLC), segments_BL.contiguous()
    y_BLC = torch.empty(x_BLC.shape, dtype=x_BLC.dtype, device=x_BLC.device)
    _forward[_grid(x_BLC)](
        x_BLC, segments_BL, weight_CW, bias_C, y_BLC, *x_BLC.shape[1:], *x_BLC.stride()[:2],
        W=weight_CW.shape[1], LEFT=left, PACKED=packed, SILU=silu, T=TOKENS, C=CHANNELS,
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
    gy_BLC, x_BLC, segments_BL = _rows(gy_BLC), _rows(x_BLC), segments_BL.contiguous()
    (batch, length, channels), width, grid = x_BLC.shape, weight_CW.shape[1], _grid(x_BLC)
    gx_BLC = torch.empty(x_BLC.shape, dtype=x_BLC.dtype, device=x_BLC.device)
    g_BLC = torch.empty_like(gx_BLC) if silu else gy_BLC
    part_SWC = torch.empty(batch * grid[0], width + 1, channels, dtype=torch.float32, device=x_BLC.device)
    shape = {"W": width, "LEFT": left, "PACKED": packed, "T": TOKENS, "C": CHANNELS}
    _backward_taps[grid](
        x_BLC, segments_BL, weight_CW, bias_C, gy_BLC, g_BLC, part_SWC, length, channels,
        *x_BLC.stride()[:2], *gy_BLC.stride()[:2], SILU=silu, **shape,
    )  # fmt: skip
    _backward_input[grid](g_BLC, segments_BL, weight_CW, gx_BLC, length, channels, *g_BLC.stride()[:2], **shape)
    sum_WC = part_SWC.sum(0)
    return gx_BLC, sum_WC[:width].t().contiguous(), sum_WC[width].clone()


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
