"""The scans of scan.py for short rows: a row is one chunk, its matrix is made on the chip, and there are no states.

Axes: B batch, L length, H heads, P head width, N state, G groups, D direction (0 forward, 1 backward; of c and b 1 if
both share), T places of a row (filled up), I shares of the heads.
"""

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from bench.kernels import precision, warps
from bench.kernels.scan_rows import products, products_back

PLACES, WIDE_PLACES = 128, 64
"""Of a row at most, and where v, c and b take much room on the chip."""
CHANNELS = 192
"""Of v, c and b together, as the chip counts them, from which on they do; fp32 has twice as many bytes."""
HEADS, PROGRAMS = 4, 132
"""Heads of a group that one program takes, if so many programs are left."""
WARPS, STAGES = 8, 2
"""Of a program; its loads in flight: those of the next head beside those of this one. With one, and a state of 16,
Triton 3.6 lets the gradients read memory that is not theirs (on an H200)."""


def fits(v_BLHP: Tensor, state: int) -> bool:
    return v_BLHP.shape[1] <= (WIDE_PLACES if _wide(v_BLHP, state) else PLACES)


def _wide(v_BLHP: Tensor, state: int) -> bool:
    return v_BLHP.dtype == torch.float32 or _padded(v_BLHP.shape[-1]) + 2 * _padded(state) > CHANNELS


def _padded(size: int) -> int:
    """As programs count: a power of two, and enough for a product."""
    return max(16, triton.next_power_of_2(size))


def short_scan(
    v_BLHP: Tensor,
    c_BLDGN: Tensor,
    b_BLDGN: Tensor,
    dt_BLDH: Tensor,
    rate_BLDH: Tensor,
    delta_BLH: Tensor,
    segments_BL: Tensor,
    packed: bool,
) -> Tensor:
    """As `scan`, of rows that fit."""
    batch, length = v_BLHP.shape[:2]
    fill = (WIDE_PLACES if length <= WIDE_PLACES else PLACES) - length
    rate_BDHT, dt_BDHT, delta_BHT = (
        F.pad(x.expand(batch, *x.shape[1:]).movedim(1, -1), (0, fill)) for x in (rate_BLDH, dt_BLDH, delta_BLH)
    )
    sum_BDHT = rate_BDHT.cumsum(-1)
    if rate_BLDH.shape[2] == 2:
        sum_BDHT = torch.stack((sum_BDHT[:, 0], (sum_BDHT - rate_BDHT)[:, 1]), 1)
    c_BLDGN, b_BLDGN = (x.to(v_BLHP.dtype).expand(batch, *x.shape[1:]) for x in (c_BLDGN, b_BLDGN))
    return row_products(v_BLHP, c_BLDGN, b_BLDGN, dt_BDHT, sum_BDHT, delta_BHT, segments_BL, packed)


def _shared(v_BLHP: Tensor, c_BLDGN: Tensor, b_BLDGN: Tensor, dt_BDHT: Tensor) -> tuple[list[int], dict, int]:
    """Sizes and strides, constants and options of both programs, and the heads that one takes."""
    batch, length, heads, width = v_BLHP.shape
    groups, state = c_BLDGN.shape[3:]
    each, most = heads // groups, min(HEADS, batch * heads // PROGRAMS)
    taken = max((x for x in range(1, most + 1) if each % x == 0), default=1)
    sizes = [length, heads, each, state, width, taken, *c_BLDGN.stride()[:4], *b_BLDGN.stride()[:4]]
    constants = {
        "BOTH": dt_BDHT.shape[1] == 2,
        "SHARED": c_BLDGN.shape[2] == 1,
        "T": dt_BDHT.shape[-1],
        "N": _padded(state),
        "P": _padded(width),
        "PRECISION": precision(v_BLHP.dtype),
        "num_warps": warps(WARPS, dt_BDHT.shape[-1]),
        "num_stages": 1 if _wide(v_BLHP, state) else STAGES,
    }
    return sizes, constants, taken


def _laid_out(v_BLHP: Tensor, c_BLDGN: Tensor, b_BLDGN: Tensor, *others: Tensor) -> list[Tensor]:
    """As the programs read them: whole in memory, but for c and b, whose states alone must lie side by side."""
    sides = (x if x.stride(-1) == 1 else x.contiguous() for x in (c_BLDGN, b_BLDGN))
    return [v_BLHP.contiguous(), *sides, *(x.contiguous() for x in others)]


@torch.library.custom_op("mixerbench::row_products", mutates_args=())
def row_products(
    v_BLHP: Tensor,
    c_BLDGN: Tensor,
    b_BLDGN: Tensor,
    dt_BDHT: Tensor,
    sum_BDHT: Tensor,
    delta_BHT: Tensor,
    segments_BL: Tensor,
    packed: bool,
) -> Tensor:
    """y_BLHP. dt, sum and delta are fp32 and filled up with zeros to T places."""
    v_BLHP, *others = _laid_out(v_BLHP, c_BLDGN, b_BLDGN, dt_BDHT, sum_BDHT, delta_BHT, segments_BL)
    sizes, constants, taken = _shared(v_BLHP, *others[:3])
    y_BLHP = torch.empty_like(v_BLHP)
    programs = v_BLHP.shape[0] * v_BLHP.shape[2] // taken
    products[(programs,)](v_BLHP, *others, y_BLHP, *sizes, PACKED=packed, **constants)
    return y_BLHP


@torch.library.custom_op("mixerbench::row_products_backward", mutates_args=())
def row_products_backward(
    gy_BLHP: Tensor,
    v_BLHP: Tensor,
    c_BLDGN: Tensor,
    b_BLDGN: Tensor,
    dt_BDHT: Tensor,
    sum_BDHT: Tensor,
    delta_BHT: Tensor,
    segments_BL: Tensor,
    packed: bool,
) -> list[Tensor]:
    """Gradients of v, c, b, dt, sum and delta."""
    v_BLHP, *others = _laid_out(v_BLHP, c_BLDGN, b_BLDGN, dt_BDHT, sum_BDHT, delta_BHT, segments_BL)
    sizes, constants, taken = _shared(v_BLHP, *others[:3])
    batch, length, heads, _ = v_BLHP.shape
    shape = (batch, length, 1 if constants["SHARED"] else others[2].shape[1], heads // taken, c_BLDGN.shape[-1])
    gc_BLDIN, gb_BLDIN = v_BLHP.new_empty(shape), v_BLHP.new_empty(shape)
    gv_BLHP, *gsmall = map(torch.empty_like, (v_BLHP, *others[2:5]))
    products_back[(batch * heads // taken,)](
        gy_BLHP.contiguous(), v_BLHP, *others, gv_BLHP, gc_BLDIN, gb_BLDIN, *gsmall, *sizes, PACKED=packed, **constants
    )
    return [gv_BLHP, *(_grouped(x, c_BLDGN.shape[3]) for x in (gc_BLDIN, gb_BLDIN)), *gsmall]


def _grouped(g_BLDIN: Tensor, groups: int) -> Tensor:
    """Summed over the shares of each group; sums of bf16 are made in fp32."""
    return g_BLDIN if g_BLDIN.shape[3] == groups else g_BLDIN.unflatten(3, (groups, -1)).sum(4)


@row_products.register_fake
def _(v, c, b, dt, sum_, delta, segments, packed):
    return v.new_empty(v.shape)


@row_products_backward.register_fake
def _(gy, v, c, b, dt, sum_, delta, segments, packed):
    return [x.new_empty(x.shape) for x in (v, c, b, dt, sum_, delta)]


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:7])
    ctx.packed = inputs[7]


def _gradients(ctx, gy_BLHP):
    return *row_products_backward(gy_BLHP, *ctx.saved_tensors, ctx.packed), None, None


row_products.register_autograd(_gradients, setup_context=_keep)
