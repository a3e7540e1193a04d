"""What follows a branch of the backbone: added to the stream, and the layer norm of that, in one pass each way.

    h = x + y;  out = (h - mean(h)) / sqrt(var(h) + eps) * weight + bias
The stream x and out are in fp32, the branch y in what autocast computes in, and so is the copy of out that the next
branch reads. The two copies' gradients come in apart and are added here. The gradient computes h again from x and y.
Axes: B batch, L length, D width; N rows = B L; S programs, which each take a share of the rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.kernels.shares import summed

PROGRAMS = 660
"""Of the gradient: each sums its share of the rows into one row of the weights' gradients."""
PER_WARP = 256
"""Channels of a row that a warp takes."""
STAGES = 3
"""Rows of the gradient on their way from memory, with the one that is worked on."""


@triton.jit
def _normal(x_ptr, y_ptr, at, d_D, known_D, width, eps):
    """A row of h at mean 0 and variance 1, and what it was divided by, inverted."""
    h_D = tl.load(x_ptr + at + d_D, mask=known_D, other=0.0)
    h_D += tl.load(y_ptr + at + d_D, mask=known_D, other=0.0).to(tl.float32)
    centred_D = tl.where(known_D, h_D - tl.sum(h_D, axis=0) / width, 0.0)
    r = tl.rsqrt(tl.sum(centred_D * centred_D, axis=0) / width + eps)
    return centred_D * r, r


@triton.jit
def _forward(x_ptr, y_ptr, weight_ptr, bias_ptr, out_ptr, narrow_ptr, width, eps, D: tl.constexpr):
    at, d_D = tl.program_id(0).to(tl.int64) * width, tl.arange(0, D)
    known_D = d_D < width
    normal_D, _ = _normal(x_ptr, y_ptr, at, d_D, known_D, width, eps)
    weight_D = tl.load(weight_ptr + d_D, mask=known_D, other=0.0)
    out_D = normal_D * weight_D + tl.load(bias_ptr + d_D, mask=known_D, other=0.0)
    tl.store(out_ptr + at + d_D, out_D, mask=known_D)
    tl.store(narrow_ptr + at + d_D, out_D, mask=known_D)


@triton.jit
def _backward(
    g_ptr, gn_ptr, x_ptr, y_ptr, weight_ptr, gx_ptr, gy_ptr, part_ptr, rows, width, eps,
    D: tl.constexpr, SHARE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    d_D = tl.arange(0, D)
    weight_D = tl.load(weight_ptr + d_D, mask=d_D < width, other=0.0)
    of_weight_D, of_bias_D = tl.zeros((D,), tl.float32), tl.zeros((D,), tl.float32)
    for i in tl.range(0, SHARE, num_stages=STAGES):
        n = (tl.program_id(0) * SHARE + i).to(tl.int64)
        at, known_D = n * width, d_D < tl.where(n < rows, width, 0)
        normal_D, r = _normal(x_ptr, y_ptr, at, d_D, known_D, width, eps)
        g_D = tl.load(g_ptr + at + d_D, mask=known_D, other=0.0)
        g_D += tl.load(gn_ptr + at + d_D, mask=known_D, other=0.0).to(tl.float32)
        of_weight_D += g_D * normal_D
        of_bias_D += g_D
        g_D *= weight_D
        along = tl.sum(g_D * normal_D, axis=0) / width
        gh_D = r * (g_D - tl.sum(g_D, axis=0) / width - normal_D * along)
        tl.store(gx_ptr + at + d_D, gh_D, mask=known_D)
        tl.store(gy_ptr + at + d_D, gh_D, mask=known_D)
    part_ptr += tl.program_id(0) * 2 * width
    tl.store(part_ptr + d_D, of_weight_D, mask=d_D < width)
    tl.store(part_ptr + width + d_D, of_bias_D, mask=d_D < width)


def _shape(width: int) -> dict[str, int]:
    tile = triton.next_power_of_2(width)
    return {"D": tile, "num_warps": max(1, min(8, tile // PER_WARP))}


@torch.library.custom_op("mixerbench::add_norm", mutates_args=())
def add_norm(x_BLD: Tensor, y_BLD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """out_BLD in fp32 and, rounded, in the dtype of y. x and the weights are in fp32."""
    x_BLD, y_BLD = x_BLD.contiguous(), y_BLD.contiguous()
    out_BLD, narrow_BLD = torch.empty_like(x_BLD), torch.empty_like(y_BLD)
    width = x_BLD.shape[-1]
    _forward[(x_BLD.numel() // width,)](
        x_BLD, y_BLD, weight_D, bias_D, out_BLD, narrow_BLD, width, eps, **_shape(width)
    )  # fmt: skip
    return out_BLD, narrow_BLD


@torch.library.custom_op("mixerbench::add_norm_backward", mutates_args=())
def add_norm_backward(
    g_BLD: Tensor, gnarrow_BLD: Tensor, x_BLD: Tensor, y_BLD: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (fp32), of y (its dtype), and of weight and bias, one above the other (fp32)."""
    g_BLD, gnarrow_BLD, x_BLD, y_BLD = (x.contiguous() for x in (g_BLD, gnarrow_BLD, x_BLD, y_BLD))
    gx_BLD, gy_BLD = torch.empty_like(x_BLD), torch.empty_like(y_BLD)
    width = x_BLD.shape[-1]
    rows = x_BLD.numel() // width
    share = triton.cdiv(rows, PROGRAMS)
    part_S2D = torch.empty(triton.cdiv(rows, share), 2 * width, dtype=torch.float32, device=x_BLD.device)
    _backward[(len(part_S2D),)](
        g_BLD, gnarrow_BLD, x_BLD, y_BLD, weight_D, gx_BLD, gy_BLD, part_S2D, rows, width, eps,
        SHARE=share, STAGES=STAGES, **_shape(width),
    )  # fmt: skip
    return gx_BLD, gy_BLD, summed(part_S2D).view(2, width)


@add_norm.register_fake
def _(x_BLD, y_BLD, weight_D, bias_D, eps):
    return x_BLD.new_empty(x_BLD.shape), y_BLD.new_empty(y_BLD.shape)


@add_norm_backward.register_fake
def _(g_BLD, gnarrow_BLD, x_BLD, y_BLD, weight_D, eps):
    return x_BLD.new_empty(x_BLD.shape), y_BLD.new_empty(y_BLD.shape), weight_D.new_empty(2, *weight_D.shape)


def _keep(ctx, inputs, output):
    x_BLD, y_BLD, weight_D, _, ctx.eps = inputs
    ctx.save_for_backward(x_BLD, y_BLD, weight_D)


def _gradients(ctx, g_BLD, gnarrow_BLD):
    gx_BLD, gy_BLD, of_weights_2D = add_norm_backward(g_BLD, gnarrow_BLD, *ctx.saved_tensors, ctx.eps)
    return gx_BLD, gy_BLD, *of_weights_2D.unbind(), None


add_norm.register_autograd(_gradients, setup_context=_keep)
