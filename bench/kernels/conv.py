"""The shell's short depthwise convolution, with its activation, in one pass over memory each way.

    pre_i = bias + sum over w of weight_w x_{i + w - left};  y = silu(pre) or pre
over places of the token's own document only. Sums in fp32 whatever the dtype of x. A program walks along a stretch of
tokens and keeps those that its taps reach in registers, so that each is read once, some tokens ahead of its use. The
gradient needs x alone: pre is computed again on the way, and g = gy silu'(pre) is kept for as many tokens as x is.
Axes: B batch, L length, C channels, W taps, T tokens of a stretch, S stretches of all rows.
"""

import torch
import triton
from torch import Tensor

from bench.kernels import dense_last
from bench.kernels.conv_tiles import backward, forward, total

TOKENS, CHANNELS = 64, 256
"""Of a stretch: a longer one reads less twice, a shorter one keeps more programs busy."""
FOUR = 128
"""Channels that a warp takes, four a thread."""
UNROLLED = 8
"""Tokens of one turn of the loop, which a stretch is a multiple of: in so many all that is kept has moved on, so that
no register need be copied. With one, right in the interpreter, Triton 3.6 compiled an earlier form of this wrongly for
an H200: keep to what benchmarks/kernels.py has checked."""
REACH = 7
"""Taps that a program keeps; fewer are as good as 7 with zeros."""
SHARES = 32
"""Of the gradients of the taps, added up at a time, and channels of such a program."""


def _shape(x_BLC: Tensor) -> tuple[tuple[int, int, int], dict]:
    """The grid, and what a program is: four channels a thread. Inside a row programs count in 32 bits."""
    batch, length, channels = x_BLC.shape
    if length * max(channels, x_BLC.stride(1)) >= 2**31:
        raise ValueError(f"a row of {length} tokens, {x_BLC.stride(1)} numbers apart, is too long for this convolution")
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
    forward[grid](
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
    backward[grid](
        x_BLC, segments_BL, weight_CW, bias_C, gy_BLC, gx_BLC, part_SWC, length, channels,
        *x_BLC.stride()[:2], *gy_BLC.stride()[:2],
        W=width, LEFT=left, PACKED=packed, SILU=silu, **shape,
    )  # fmt: skip
    gw_CW, gb_C = part_SWC.new_empty(channels, width), part_SWC.new_empty(channels)
    tiles = triton.cdiv(channels, SHARES)
    total[tiles, REACH + 1](part_SWC, gw_CW, gb_C, len(part_SWC), channels, W=width, S=SHARES, C=SHARES)
    return gx_BLC, gw_CW, gb_C


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
