"""The end of the shell in one pass over memory each way: scale, skip, RMS norm, gate.

    u = scale y + v (or scale y);  out = u / sqrt(mean(u^2) + eps) * weight * silu(z)
All in fp32 between bf16 loads and stores. The gradient computes u again from y and v.
Axes: B batch, L length, C channels; N rows = B L; S programs, which each take a share of the rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.kernels.shares import summed
from bench.kernels.sigmoid import sigmoid

PROGRAMS = 1056
"""Of the gradient: each sums its share of the rows into one row of the weight's gradient."""
PER_WARP = 512
"""Channels of a row that a warp takes."""
STAGES = 3
"""Rows of the gradient on their way from memory, with the one that is worked on."""


@triton.jit
def _row(y_ptr, v_ptr, z_ptr, at, z_at, c_C, known_C, scale, SKIP: tl.constexpr):
    u_C = tl.load(y_ptr + at + c_C, mask=known_C, other=0.0).to(tl.float32) * scale
    if SKIP:
        u_C += tl.load(v_ptr + at + c_C, mask=known_C, other=0.0).to(tl.float32)
    return u_C, tl.load(z_ptr + z_at + c_C, mask=known_C, other=0.0).to(tl.float32)


@triton.jit
def _forward(
    y_ptr, v_ptr, z_ptr, scale_ptr, weight_ptr, out_ptr, length, channels, z_b, z_l, eps,
    SKIP: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    c_C = tl.arange(0, C)
    known_C = c_C < channels
    z_at = (n // length) * z_b + (n % length) * z_l
    u_C, z_C = _row(y_ptr, v_ptr, z_ptr, n * channels, z_at, c_C, known_C, tl.load(scale_ptr), SKIP)
    r = tl.rsqrt(tl.sum(u_C * u_C, axis=0) / channels + eps)
    weight_C = tl.load(weight_ptr + c_C, mask=known_C, other=0.0)
    tl.store(out_ptr + n * channels + c_C, u_C * r * weight_C * z_C * sigmoid(z_C), mask=known_C)


@triton.jit
def _backward(
    g_ptr, y_ptr, v_ptr, z_ptr, scale_ptr, weight_ptr, gy_ptr, gv_ptr, gz_ptr, part_ptr,
    rows, length, channels, z_b, z_l, eps, SKIP: tl.constexpr, C: tl.constexpr, SHARE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    c_C = tl.arange(0, C)
    weight_C, scale = tl.load(weight_ptr + c_C, mask=c_C < channels, other=0.0), tl.load(scale_ptr)
    sum_C = tl.zeros((C,), tl.float32)
    for i in tl.range(0, SHARE, num_stages=STAGES):
        n = (tl.program_id(0) * SHARE + i).to(tl.int64)
        known_C = c_C < tl.where(n < rows, channels, 0)
        z_at = (n // length) * z_b + (n % length) * z_l
        u_C, z_C = _row(y_ptr, v_ptr, z_ptr, n * channels, z_at, c_C, known_C, scale, SKIP)
        g_C = tl.load(g_ptr + n * channels + c_C, mask=known_C, other=0.0).to(tl.float32)
        r = tl.rsqrt(tl.sum(u_C * u_C, axis=0) / channels + eps)
        sigmoid_C = sigmoid(z_C)
        gate_C, normal_C = z_C * sigmoid_C, u_C * r
        said_C = g_C * normal_C
        sum_C += said_C * gate_C
        said_C *= weight_C
        gz_C = said_C * (sigmoid_C + gate_C * (1 - sigmoid_C))
        mean = tl.sum(said_C * gate_C, axis=0) / channels
        gu_C = r * (g_C * gate_C * weight_C - normal_C * mean)
        tl.store(gz_ptr + n * channels + c_C, gz_C, mask=known_C)
        tl.store(gy_ptr + n * channels + c_C, gu_C * scale, mask=known_C)
        if SKIP:
            tl.store(gv_ptr + n * channels + c_C, gu_C, mask=known_C)
    tl.store(part_ptr + tl.program_id(0) * channels + c_C, sum_C, mask=c_C < channels)


def _warps(channels: int) -> int:
    return max(1, min(8, triton.next_power_of_2(channels) // PER_WARP))


@torch.library.custom_op("mixerbench::gated_norm", mutates_args=())
def gated_norm(
    y_BLC: Tensor, v_BLC: Tensor, z_BLC: Tensor, scale: Tensor, weight_C: Tensor, eps: float, skip: bool
) -> Tensor:
    """out_BLC in the dtype of y. `scale` has one element and no gradient; z may be a slice of wider rows."""
    y_BLC, v_BLC = y_BLC.contiguous(), v_BLC.contiguous()
    batch, length, channels = y_BLC.shape
    out_BLC = torch.empty_like(y_BLC)
    _forward[(batch * length,)](
        y_BLC, v_BLC, z_BLC, scale, weight_C, out_BLC, length, channels, *z_BLC.stride()[:2], eps,
        SKIP=skip, C=triton.next_power_of_2(channels), num_warps=_warps(channels),
    )  # fmt: skip
    return out_BLC


@torch.library.custom_op("mixerbench::gated_norm_backward", mutates_args=())
def gated_norm_backward(
    g_BLC: Tensor, y_BLC: Tensor, v_BLC: Tensor, z_BLC: Tensor, scale: Tensor, weight_C: Tensor, eps: float, skip: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of y, v, z (dtype of y; that of v is empty without `skip`) and of the weight (fp32)."""
    g_BLC, y_BLC, v_BLC = g_BLC.contiguous(), y_BLC.contiguous(), v_BLC.contiguous()
    batch, length, channels = y_BLC.shape
    gy_BLC, gz_BLC = torch.empty_like(y_BLC), torch.empty_like(y_BLC)
    gv_BLC = torch.empty_like(y_BLC) if skip else y_BLC.new_empty(0)
    share = triton.cdiv(batch * length, PROGRAMS)
    programs = triton.cdiv(batch * length, share)
    part_SC = torch.empty(programs, channels, dtype=torch.float32, device=y_BLC.device)
    _backward[(programs,)](
        g_BLC, y_BLC, v_BLC, z_BLC, scale, weight_C, gy_BLC, gv_BLC, gz_BLC, part_SC,
        batch * length, length, channels, *z_BLC.stride()[:2], eps,
        SKIP=skip, C=triton.next_power_of_2(channels), SHARE=share, STAGES=STAGES,
        num_warps=_warps(channels),
    )  # fmt: skip
    return gy_BLC, gv_BLC, gz_BLC, summed(part_SC)


@gated_norm.register_fake
def _(y_BLC, v_BLC, z_BLC, scale, weight_C, eps, skip):
    return y_BLC.new_empty(y_BLC.shape)


@gated_norm_backward.register_fake
def _(g_BLC, y_BLC, v_BLC, z_BLC, scale, weight_C, eps, skip):
    like_y = y_BLC.new_empty(y_BLC.shape)
    gv_BLC = torch.empty_like(like_y) if skip else y_BLC.new_empty(0)
    return like_y, gv_BLC, torch.empty_like(like_y), y_BLC.new_empty(weight_C.shape, dtype=torch.float32)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5])
    ctx.how = inputs[5:]


def _gradients(ctx, g_BLC):
    _, v_BLC, z_BLC, _, weight_C = ctx.saved_tensors
    gy_BLC, gv_BLC, gz_BLC, gw_C = gated_norm_backward(g_BLC, *ctx.saved_tensors, *ctx.how)
    gv_BLC = gv_BLC.to(v_BLC.dtype) if ctx.how[1] else None
    return gy_BLC, gv_BLC, gz_BLC.to(z_BLC.dtype), None, gw_C.to(weight_C.dtype), None, None


gated_norm.register_autograd(_gradients, setup_context=_keep)
