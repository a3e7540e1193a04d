"""Products with a difference of two matrices of low rank, y = r (C w^T - w D^T) v, where w is one matrix for all heads.

C and D, L x K a head, are given with tokens side by side, as cosine_sums.py makes them; w is what a place sees of a
grid's points. Rows are gathered into states of K x P numbers, and states are applied to rows; a short row's never leave
the chip: one program does all with a row and head. The transposed product is that of C and D exchanged with its sign
turned, so the same two kernels serve the gradient of v. As in low_rank.py the product may have v / scale added. The
weights r say which tokens are real, too: where r is 0 what v has does not count, and but for v / scale 0 comes out.
Axes: B batch, L length, H heads, G those of C, then those of D, K points, P head width, W the two states, minus that of
C or D and that of w.
"""

import torch
import triton
from torch import Tensor

from bench.kernels import dense_last, precision, tile, warps
from bench.kernels.grid_tiles import apply, gather, outer, short, short_back

TOKENS, TOKENS_OUTER, POINTS, WIDE = 64, 128, 64, 128
"""Of a tile, at most; tokens, in 16 bits, of gradients of C and D."""
WARPS_GATHER, WARPS_APPLY, WARPS_OUTER = 4, 4, 8
STAGES_GATHER, STAGES_APPLY, STAGES_OUTER = 3, 2, 1
NARROW = 64
"""Channels of a tile, at least: with fewer the assembler of Triton 3.6 (ptxas 12.8) loses addresses in some shapes."""
SHORT, SHORT_POINTS, SHORT_BYTES = 128, 64, 256
"""Tokens, points and bytes of a head's row of v up to which one program takes a whole row."""
SHORT_TOKENS, WARPS_SHORT, WARPS_SHORT_BACK, STAGES_SHORT = 64, 4, 4, 2
"""Tokens that it takes at a time, its warps each way, and loads in flight."""


def _channels(width: int, most: int) -> int:
    return max(tile(width, most), min(NARROW, most))


def _tiles(w_LK: Tensor, v_BLHP: Tensor) -> tuple[tuple[int, ...], dict]:
    """Shapes and tiles that the kernels have in common."""
    (_, length, heads, width), size = v_BLHP.shape, w_LK.shape[1]
    tiles = {"T": tile(length, TOKENS), "M": tile(size, POINTS), "C": _channels(width, WIDE)}
    return (length, heads, size, width), tiles | {"PRECISION": precision(v_BLHP.dtype)}


def _gathered(c_BHKL: Tensor, w_LK: Tensor, x_BLHP: Tensor, r_BL: Tensor, band: tuple[int, int], back: bool) -> Tensor:
    """States BHWKP."""
    batch, ((length, heads, size, width), tiles) = len(x_BLHP), _tiles(w_LK, x_BLHP)
    states_BHWKP = x_BLHP.new_empty(batch, heads, 2, size, width)
    grid = batch * heads, triton.cdiv(size, tiles["M"]), triton.cdiv(width, tiles["C"])
    gather[grid](
        c_BHKL, w_LK, x_BLHP, r_BL, states_BHWKP, length, heads, size, width, *band, *_row(c_BHKL),
        *x_BLHP.stride()[:3],
        BACK=back, STEPS=triton.cdiv(length, tiles["T"]), **tiles, num_warps=WARPS_GATHER, num_stages=STAGES_GATHER,
    )  # fmt: skip
    return states_BHWKP


def _row(c_BHKL: Tensor) -> tuple[int, int]:
    """Strides from row to row, 0 where all rows have the same, and from head to head."""
    return (0 if len(c_BHKL) == 1 else c_BHKL.stride(0)), c_BHKL.stride(1)


def _applied(
    c_BHKL: Tensor,
    w_LK: Tensor,
    states_BHWKP: Tensor,
    r_BL: Tensor,
    v_BLHP: Tensor,
    scale: Tensor | None,
    band: tuple[int, int],
    back: bool,
) -> Tensor:
    batch, ((length, heads, size, width), tiles) = len(v_BLHP), _tiles(w_LK, v_BLHP)
    y_BLHP = v_BLHP.new_empty(v_BLHP.shape)
    grid = batch * heads, triton.cdiv(length, tiles["T"]), triton.cdiv(width, tiles["C"])
    apply[grid](
        c_BHKL, w_LK, states_BHWKP, r_BL, v_BLHP, r_BL if scale is None else scale, y_BLHP,
        length, heads, size, width, *band, *_row(c_BHKL), *v_BLHP.stride()[:3],
        BACK=back, SKIP=scale is not None, STEPS=triton.cdiv(size, tiles["M"]), **tiles,
        num_warps=WARPS_APPLY, num_stages=STAGES_APPLY,
    )  # fmt: skip
    return y_BLHP


def grid_product(
    c_BGKL: Tensor, w_LK: Tensor, v_BLHP: Tensor, r_BL: Tensor, scale: Tensor | None, spacing: int, reach: int
) -> Tensor:
    """y_BLHP, with a scale (one number, without gradient) y + v / scale; c, w and v of one dtype, r in fp32, w and r
    without gradients. C and D of one row may serve all. Place j = 1, 2, ... sees of point k, which lies at place
    k * spacing, nothing from a distance of `reach` on: such tiles of w are not read."""
    length, size, row = *w_LK.shape, v_BLHP.shape[-1] * v_BLHP.element_size()
    if length <= SHORT and size <= SHORT_POINTS and row <= SHORT_BYTES:
        return short_product(c_BGKL, w_LK, v_BLHP, r_BL, scale)
    return long_product(c_BGKL, w_LK, v_BLHP, r_BL, scale, spacing, reach)[0]


@torch.library.custom_op("mixerbench::long_grid_product", mutates_args=())
def long_product(
    c_BGKL: Tensor, w_LK: Tensor, v_BLHP: Tensor, r_BL: Tensor, scale: Tensor | None, spacing: int, reach: int
) -> tuple[Tensor, Tensor]:
    """y_BLHP and the states."""
    c_BGKL, v_BLHP, heads = c_BGKL.contiguous(), dense_last(v_BLHP), v_BLHP.shape[2]
    states_BHWKP = _gathered(c_BGKL[:, heads:], w_LK, v_BLHP, r_BL, (spacing, reach), False)
    return _applied(c_BGKL[:, :heads], w_LK, states_BHWKP, r_BL, v_BLHP, scale, (spacing, reach), False), states_BHWKP


@torch.library.custom_op("mixerbench::long_grid_product_backward", mutates_args=())
def long_product_backward(
    gy_BLHP: Tensor, c_BGKL: Tensor, w_LK: Tensor, v_BLHP: Tensor, r_BL: Tensor, scale: Tensor | None,
    spacing: int, reach: int, states_BHWKP: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of C and D, for each row, and of v."""
    c_BGKL, gy_BLHP, v_BLHP = c_BGKL.contiguous(), dense_last(gy_BLHP), dense_last(v_BLHP)
    batch, ((length, heads, size, width), tiles) = len(v_BLHP), _tiles(w_LK, v_BLHP)
    back_BHWKP = _gathered(c_BGKL[:, :heads], w_LK, gy_BLHP, r_BL, (spacing, reach), True)
    gv_BLHP = _applied(c_BGKL[:, heads:], w_LK, back_BHWKP, r_BL, gy_BLHP, scale, (spacing, reach), True)
    gc_BGKL = v_BLHP.new_empty(batch, 2 * heads, size, length)
    tiles["T"] = tile(length, 2 * TOKENS_OUTER // v_BLHP.element_size())
    grid, steps = (batch * heads, triton.cdiv(length, tiles["T"])), triton.cdiv(width, tiles["C"])
    outer[grid](
        gy_BLHP, v_BLHP, r_BL, states_BHWKP, back_BHWKP, gc_BGKL,
        length, heads, size, width, *gy_BLHP.stride()[:3], *v_BLHP.stride()[:3],
        POINTS=triton.cdiv(size, tiles["M"]), STEPS=steps, **tiles,
        # Eight share out the tokens too, which fp32 must not (see `warps`): with its 64 there are four.
        num_warps=warps(WARPS_OUTER, tiles["T"]), num_stages=STAGES_OUTER,
    )  # fmt: skip
    return gc_BGKL, gv_BLHP


def _of_short_rows(w_LK: Tensor, v_BLHP: Tensor, most: int) -> tuple[tuple[int], tuple[int, ...], dict]:
    """Grid, shapes and constants."""
    (batch, length, heads, width), size = v_BLHP.shape, w_LK.shape[1]
    t = tile(length, SHORT_TOKENS)
    tiles = {"STEPS": triton.cdiv(length, t), "T": t, "M": tile(size, SHORT_POINTS)}
    tiles |= {"C": _channels(width, SHORT_BYTES)}
    tiles |= {"PRECISION": precision(v_BLHP.dtype), "num_warps": warps(most, t), "num_stages": STAGES_SHORT}
    return (batch * heads,), (length, heads, size, width), tiles


@torch.library.custom_op("mixerbench::short_grid_product", mutates_args=())
def short_product(c_BGKL: Tensor, w_LK: Tensor, v_BLHP: Tensor, r_BL: Tensor, scale: Tensor | None) -> Tensor:
    c_BGKL, v_BLHP = c_BGKL.contiguous(), dense_last(v_BLHP)
    grid, shapes, tiles = _of_short_rows(w_LK, v_BLHP, WARPS_SHORT)
    y_BLHP, strides = v_BLHP.new_empty(v_BLHP.shape), (*_row(c_BGKL), *v_BLHP.stride()[:3])
    by, skip = r_BL if scale is None else scale, scale is not None
    short[grid](c_BGKL, w_LK, v_BLHP, r_BL, by, y_BLHP, *shapes, *strides, SKIP=skip, **tiles)
    return y_BLHP


@torch.library.custom_op("mixerbench::short_grid_product_backward", mutates_args=())
def short_product_backward(
    gy_BLHP: Tensor, c_BGKL: Tensor, w_LK: Tensor, v_BLHP: Tensor, r_BL: Tensor, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of C and D, for each row, and of v."""
    c_BGKL, gy_BLHP, v_BLHP = c_BGKL.contiguous(), dense_last(gy_BLHP), dense_last(v_BLHP)
    grid, shapes, tiles = _of_short_rows(w_LK, v_BLHP, WARPS_SHORT_BACK)
    gc_BGKL, gv_BLHP = v_BLHP.new_empty(len(v_BLHP), *c_BGKL.shape[1:]), v_BLHP.new_empty(v_BLHP.shape)
    strides = *gy_BLHP.stride()[:3], *_row(c_BGKL), *v_BLHP.stride()[:3]
    short_back[grid](
        gy_BLHP, c_BGKL, w_LK, v_BLHP, r_BL, r_BL if scale is None else scale, gc_BGKL, gv_BLHP, *shapes, *strides,
        SKIP=scale is not None, **tiles,
    )  # fmt: skip
    return gc_BGKL, gv_BLHP


@short_product.register_fake
def _(c_BGKL, w_LK, v_BLHP, r_BL, scale):
    return v_BLHP.new_empty(v_BLHP.shape)


@short_product_backward.register_fake
def _(gy_BLHP, c_BGKL, w_LK, v_BLHP, r_BL, scale):
    return v_BLHP.new_empty(len(v_BLHP), *c_BGKL.shape[1:]), v_BLHP.new_empty(v_BLHP.shape)


@long_product.register_fake
def _(c_BGKL, w_LK, v_BLHP, r_BL, scale, spacing, reach):
    batch, _, heads, width = v_BLHP.shape
    return v_BLHP.new_empty(v_BLHP.shape), v_BLHP.new_empty(batch, heads, 2, w_LK.shape[1], width)


@long_product_backward.register_fake
def _(gy_BLHP, c_BGKL, w_LK, v_BLHP, r_BL, scale, spacing, reach, states_BHWKP):
    return v_BLHP.new_empty(len(v_BLHP), *c_BGKL.shape[1:]), v_BLHP.new_empty(v_BLHP.shape)


def _of_all_rows(gc_BGKL: Tensor, c_BGKL: Tensor) -> Tensor:
    return gc_BGKL.sum(0, keepdim=True) if len(c_BGKL) == 1 else gc_BGKL


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _keep_states(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5], output[1])
    ctx.band = inputs[5:]


def _short_gradients(ctx, gy_BLHP):
    gc_BGKL, gv_BLHP = short_product_backward(gy_BLHP, *ctx.saved_tensors)
    return _of_all_rows(gc_BGKL, ctx.saved_tensors[0]), None, gv_BLHP, None, None


def _long_gradients(ctx, gy_BLHP, gstates_BHWKP):
    """The states are no result of their own: they have no gradient."""
    gc_BGKL, gv_BLHP = long_product_backward(gy_BLHP, *ctx.saved_tensors[:5], *ctx.band, ctx.saved_tensors[5])
    return _of_all_rows(gc_BGKL, ctx.saved_tensors[0]), None, gv_BLHP, None, None, None, None


short_product.register_autograd(_short_gradients, setup_context=_keep)
long_product.register_autograd(_long_gradients, setup_context=_keep_states)
