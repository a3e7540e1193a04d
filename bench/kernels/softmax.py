"""Softmax attention by tiles, y_i = sum over visible j of softmax(q_i . k_j / sqrt(R)) v_j, no matrix in memory.

Token i sees the tokens first_i .. end_i - 1, its own document; padding sees none, first = end = 0. Tiles that hold
nothing visible are passed over, and of the padding that ends a row nothing is read. Rows that one tile of keys holds
need one pass for all gradients; longer ones take two, of which each owns what it writes, so that no sum depends on the
order of programs.
Axes: B batch, L length, H heads, P head width, R rank (width of q and k), 2 q and k; I queries and J keys of a tile, T
either, C its channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.kernels import dense_last, precision, warps

QUERIES, KEYS, WARPS, STAGES = 128, 64, 8, 3
"""Of the values: a tile of queries and the keys read at a time, warps of a program, loads in flight."""
OWN, OTHER, WARPS_BACK, STAGES_BACK = 128, 64, 8, 3
"""Of the gradients: a tile of what a program owns and of what it reads, its warps, loads in flight."""
WIDEST = 256
"""Of a head, and of its rank: wider ones have no room on the chip."""
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _place(length, heads, T: tl.constexpr):
    """Tokens t, row and head of a program. One axis: a grid's others end at 65,535, and B x H need not."""
    tiles = tl.cdiv(length, T)
    of_row, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    return tile * T + tl.arange(0, T), (of_row // heads).to(tl.int64), of_row % heads


@triton.jit
def _range(first_ptr, end_ptr, t_T, length):
    """What tokens t see, and all of them together: from which place to which."""
    first_T = tl.load(first_ptr + t_T, mask=t_T < length, other=0)
    end_T = tl.load(end_ptr + t_T, mask=t_T < length, other=0)
    high = tl.max(end_T, 0)
    return first_T, end_T, tl.min(tl.where(end_T > first_T, first_T, high), 0), high


@triton.jit
def _rows(at, stride, t_T, end, size, C: tl.constexpr):
    """Rows t, zero from `end` on: TC."""
    c_C = tl.arange(0, C)
    return tl.load(
        at + t_T.to(tl.int64)[:, None] * stride + c_C[None, :],
        mask=(t_T < end)[:, None] & (c_C < size)[None, :],
        other=0.0,
    )


@triton.jit
def _write(at, stride, t_T, end, size, x_TC, C: tl.constexpr):
    c_C = tl.arange(0, C)
    kept_TC = (t_T < end)[:, None] & (c_C < size)[None, :]
    tl.store(at + t_T.to(tl.int64)[:, None] * stride + c_C[None, :], x_TC, mask=kept_TC)


@triton.jit
def _among(first_I, end_I, j_J):
    """Whether token i sees token j, IJ."""
    return (j_J[None, :] >= first_I[:, None]) & (j_J[None, :] < end_I[:, None])


@triton.jit
def _values_step(
    y_IP, most_I, sum_I, q_IR, k_at, v_at, x_l, v_l, first_I, end_I, j_J, high, rank, width, scale,
    MASKED: tl.constexpr, R: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums so far with one more tile of keys, relative to the largest score so far in powers of two."""
    k_JR, v_JP = _rows(k_at, x_l, j_J, high, rank, R), _rows(v_at, v_l, j_J, high, width, P)
    s_IJ = tl.dot(q_IR, tl.trans(k_JR), input_precision=PRECISION) * scale
    if MASKED:
        s_IJ = tl.where(_among(first_I, end_I, j_J), s_IJ, float("-inf"))
    new_I = tl.maximum(most_I, tl.max(s_IJ, 1))
    p_IJ, old_I = tl.exp2(s_IJ - new_I[:, None]), tl.exp2(most_I - new_I)
    y_IP = y_IP * old_I[:, None] + tl.dot(p_IJ.to(v_JP.dtype), v_JP, input_precision=PRECISION)
    return y_IP, new_I, sum_I * old_I + tl.sum(p_IJ, 1)


@triton.jit(do_not_specialize=["length"])
def _values(
    x_ptr, v_ptr, first_ptr, end_ptr, y_ptr, lse_ptr,
    length, heads, rank, width, root, x_b, x_l, x_2, x_h, v_b, v_l, v_h,
    PACKED: tl.constexpr, I: tl.constexpr, J: tl.constexpr, R: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of y and its log2 of the sum of exponentials, infinite where nothing is visible."""
    i_I, row, h = _place(length, heads, I)
    first_I, end_I, low, high = _range(first_ptr + row * length, end_ptr + row * length, i_I, length)
    q_at, v_at, scale = x_ptr + row * x_b + h * x_h, v_ptr + row * v_b + h * v_h, LOG2E / root
    q_IR = _rows(q_at, x_l, i_I, high, rank, R)
    y_IP, most_I, sum_I = tl.zeros((I, P), tl.float32), tl.full((I,), -1e30, tl.float32), tl.zeros((I,), tl.float32)
    start = low // J * J
    if not PACKED:
        start = high // J * J  # all is visible of the tiles before
        for at in range(0, start, J):
            y_IP, most_I, sum_I = _values_step(
                y_IP, most_I, sum_I, q_IR, q_at + x_2, v_at, x_l, v_l, first_I, end_I, at + tl.arange(0, J), high,
                rank, width, scale, False, R, P, PRECISION,
            )  # fmt: skip
    for at in range(start, high, J):
        y_IP, most_I, sum_I = _values_step(
            y_IP, most_I, sum_I, q_IR, q_at + x_2, v_at, x_l, v_l, first_I, end_I, at + tl.arange(0, J), high,
            rank, width, scale, True, R, P, PRECISION,
        )  # fmt: skip
    sees_I = end_I > first_I
    sum_I = tl.where(sees_I, sum_I, 1.0)
    y_IP = tl.where(sees_I[:, None], y_IP / sum_I[:, None], 0.0)
    _write(y_ptr + (row * length * heads + h) * width, heads * width, i_I, length, width, y_IP, P)
    lse_I = tl.where(sees_I, most_I + tl.log2(sum_I), float("inf"))
    tl.store(lse_ptr + (row * heads + h) * length + i_I, lse_I, mask=i_I < length)


@triton.jit
def _queries_step(
    gq_IR, q_IR, gy_IP, lse_I, delta_I, k_at, v_at, x_l, v_l, first_I, end_I, j_J, high, rank, width, scale,
    MASKED: tl.constexpr, R: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    k_JR, v_JP = _rows(k_at, x_l, j_J, high, rank, R), _rows(v_at, v_l, j_J, high, width, P)
    p_IJ = tl.exp2(tl.dot(q_IR, tl.trans(k_JR), input_precision=PRECISION) * scale - lse_I[:, None])
    if MASKED:
        p_IJ = tl.where(_among(first_I, end_I, j_J), p_IJ, 0.0)
    gs_IJ = p_IJ * (tl.dot(gy_IP, tl.trans(v_JP), input_precision=PRECISION) - delta_I[:, None])
    return gq_IR + tl.dot(gs_IJ.to(k_JR.dtype), k_JR, input_precision=PRECISION)


@triton.jit(do_not_specialize=["length"])
def _queries(
    x_ptr, v_ptr, first_ptr, end_ptr, y_ptr, lse_ptr, gy_ptr, delta_ptr, gx_ptr,
    length, heads, rank, width, root, x_b, x_l, x_2, x_h, v_b, v_l, v_h,
    PACKED: tl.constexpr, I: tl.constexpr, J: tl.constexpr, R: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of q, and delta = gy . y for `_keys`."""
    i_I, row, h = _place(length, heads, I)
    first_I, end_I, low, high = _range(first_ptr + row * length, end_ptr + row * length, i_I, length)
    q_at, v_at, scale = x_ptr + row * x_b + h * x_h, v_ptr + row * v_b + h * v_h, LOG2E / root
    of_head, line = (row * length * heads + h) * width, (row * heads + h) * length
    q_IR = _rows(q_at, x_l, i_I, high, rank, R)
    gy_IP = _rows(gy_ptr + of_head, heads * width, i_I, high, width, P)
    y_IP = _rows(y_ptr + of_head, heads * width, i_I, high, width, P)
    delta_I = tl.sum(gy_IP.to(tl.float32) * y_IP.to(tl.float32), 1)
    tl.store(delta_ptr + line + i_I, delta_I, mask=i_I < length)
    lse_I = tl.load(lse_ptr + line + i_I, mask=i_I < length, other=float("inf"))
    gq_IR, start = tl.zeros((I, R), tl.float32), low // J * J
    if not PACKED:
        start = high // J * J
        for at in range(0, start, J):
            gq_IR = _queries_step(
                gq_IR, q_IR, gy_IP, lse_I, delta_I, q_at + x_2, v_at, x_l, v_l, first_I, end_I, at + tl.arange(0, J),
                high, rank, width, scale, False, R, P, PRECISION,
            )  # fmt: skip
    for at in range(start, high, J):
        gq_IR = _queries_step(
            gq_IR, q_IR, gy_IP, lse_I, delta_I, q_at + x_2, v_at, x_l, v_l, first_I, end_I, at + tl.arange(0, J),
            high, rank, width, scale, True, R, P, PRECISION,
        )  # fmt: skip
    _write(gx_ptr + (row * length * 2 * heads + h) * rank, 2 * heads * rank, i_I, length, rank, gq_IR / root, R)


@triton.jit(do_not_specialize=["length"])
def _keys(
    x_ptr, v_ptr, first_ptr, end_ptr, lse_ptr, gy_ptr, delta_ptr, gx_ptr, gv_ptr,
    length, heads, rank, width, root, x_b, x_l, x_2, x_h, v_b, v_l, v_h,
    PACKED: tl.constexpr, WHOLE: tl.constexpr,
    I: tl.constexpr, J: tl.constexpr, R: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of k and v, over the queries that see it; if WHOLE, which holds a row, also those of q."""
    j_J, row, h = _place(length, heads, J)
    first_J, end_J, low, high = _range(first_ptr + row * length, end_ptr + row * length, j_J, length)
    sees_J, line, of_head = end_J > first_J, (row * heads + h) * length, (row * length * heads + h) * width
    q_at, v_at, gx_at = x_ptr + row * x_b + h * x_h, v_ptr + row * v_b + h * v_h, (row * length * 2 * heads + h) * rank
    k_JR, v_JP = _rows(q_at + x_2, x_l, j_J, high, rank, R), _rows(v_at, v_l, j_J, high, width, P)
    gk_JR, gv_JP = tl.zeros((J, R), tl.float32), tl.zeros((J, P), tl.float32)
    start, end = low // I * I, high
    if WHOLE:  # padding has a gradient too, zero
        start, end = 0, length
    for at in range(start, end, I):
        i_I = at + tl.arange(0, I)
        q_IR = _rows(q_at, x_l, i_I, high, rank, R)
        gy_IP = _rows(gy_ptr + of_head, heads * width, i_I, high, width, P)
        lse_I = tl.load(lse_ptr + line + i_I, mask=i_I < length, other=float("inf"))
        s_JI = tl.dot(k_JR, tl.trans(q_IR), input_precision=PRECISION) * (LOG2E / root)
        p_JI = tl.exp2(s_JI - lse_I[None, :])
        if PACKED:
            p_JI = tl.where(_among(first_J, end_J, i_I), p_JI, 0.0)
        elif WHOLE:
            p_JI = tl.where(sees_J[:, None], p_JI, 0.0)
        gv_JP += tl.dot(p_JI.to(gy_IP.dtype), gy_IP, input_precision=PRECISION)
        gp_JI = tl.dot(v_JP, tl.trans(gy_IP), input_precision=PRECISION)
        if WHOLE:  # all that a query sees is here
            delta_I = tl.sum(p_JI * gp_JI, 0)
        if not WHOLE:
            delta_I = tl.load(delta_ptr + line + i_I, mask=i_I < high, other=0.0)
        gs_JI = (p_JI * (gp_JI - delta_I[None, :])).to(q_IR.dtype)
        gk_JR += tl.dot(gs_JI, q_IR, input_precision=PRECISION)
        if WHOLE:
            gq_IR = tl.dot(tl.trans(gs_JI), k_JR, input_precision=PRECISION) / root
            _write(gx_ptr + gx_at, 2 * heads * rank, i_I, length, rank, gq_IR, R)
    gk_JR, gv_JP = tl.where(sees_J[:, None], gk_JR / root, 0.0), tl.where(sees_J[:, None], gv_JP, 0.0)
    _write(gx_ptr + gx_at + heads * rank, 2 * heads * rank, j_J, length, rank, gk_JR, R)
    _write(gv_ptr + of_head, heads * width, j_J, length, width, gv_JP, P)


def fits(rank: int, width: int) -> bool:
    return max(rank, width) <= WIDEST


def _sizes(x_BL2HR: Tensor, v_BLHP: Tensor) -> dict:
    """What all kernels take of shapes, strides and precision."""
    _, length, heads, width = v_BLHP.shape
    rank = x_BL2HR.shape[-1]
    return {
        "numbers": (length, heads, rank, width, float(rank**0.5), *x_BL2HR.stride()[:4], *v_BLHP.stride()[:3]),
        "R": max(16, triton.next_power_of_2(rank)),
        "P": max(16, triton.next_power_of_2(width)),
        "PRECISION": precision(v_BLHP.dtype),
    }


def _tile(most: int, length: int, sizes: dict, x: Tensor) -> int:
    """Of places: fewer where a place takes more bytes than one of width 128 in half precision."""
    wide = max(sizes["R"], sizes["P"], 128) // 128 * (x.element_size() // 2)
    return max(16, min(most // wide, triton.next_power_of_2(length)))


@torch.library.custom_op("mixerbench::softmax_product", mutates_args=())
def softmax_product(
    x_BL2HR: Tensor, v_BLHP: Tensor, first_BL: Tensor, end_BL: Tensor, packed: bool
) -> tuple[Tensor, Tensor]:
    """y_BLHP in the dtype of v, zero where nothing is visible, and the log2 of the sum of exponentials, BHL in fp32.

    x is q and k, of the dtype of v; first and end are int32. Not `packed`: a row is one document from its beginning."""
    x_BL2HR, v_BLHP = dense_last(x_BL2HR), dense_last(v_BLHP)
    batch, length, heads, width = v_BLHP.shape
    sizes = _sizes(x_BL2HR, v_BLHP)
    i, j = (_tile(most, length, sizes, v_BLHP) for most in (QUERIES, KEYS))
    y_BLHP = v_BLHP.new_empty(batch, length, heads, width)
    lse_BHL = v_BLHP.new_empty(batch, heads, length, dtype=torch.float32)
    numbers = sizes.pop("numbers")
    _values[(triton.cdiv(length, i) * batch * heads,)](
        x_BL2HR, v_BLHP, first_BL.contiguous(), end_BL.contiguous(), y_BLHP, lse_BHL, *numbers,
        PACKED=packed, I=i, J=j, num_warps=warps(WARPS, i), num_stages=STAGES, **sizes,
    )  # fmt: skip
    return y_BLHP, lse_BHL


@torch.library.custom_op("mixerbench::softmax_product_backward", mutates_args=())
def softmax_product_backward(
    gy_BLHP: Tensor, x_BL2HR: Tensor, v_BLHP: Tensor, first_BL: Tensor, end_BL: Tensor, y_BLHP: Tensor,
    lse_BHL: Tensor, packed: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of x and v."""
    gy_BLHP, x_BL2HR, v_BLHP = gy_BLHP.contiguous(), dense_last(x_BL2HR), dense_last(v_BLHP)
    batch, length, heads, _ = v_BLHP.shape
    sizes = _sizes(x_BL2HR, v_BLHP)
    own, other = (_tile(most, length, sizes, v_BLHP) for most in (OWN, OTHER))
    gx_BL2HR, gv_BLHP = v_BLHP.new_empty(x_BL2HR.shape), v_BLHP.new_empty(v_BLHP.shape)
    delta_BHL, numbers = torch.empty_like(lse_BHL), sizes.pop("numbers")
    given = x_BL2HR, v_BLHP, first_BL.contiguous(), end_BL.contiguous()
    sizes |= {"PACKED": packed, "I": own, "J": other, "num_warps": warps(WARPS_BACK, own), "num_stages": STAGES_BACK}
    grid = (triton.cdiv(length, own) * batch * heads,)
    whole = length <= own
    if not whole:
        _queries[grid](*given, y_BLHP.contiguous(), lse_BHL, gy_BLHP, delta_BHL, gx_BL2HR, *numbers, **sizes)
    sizes |= {"I": other, "J": own}
    _keys[grid](*given, lse_BHL, gy_BLHP, delta_BHL, gx_BL2HR, gv_BLHP, *numbers, WHOLE=whole, **sizes)
    return gx_BL2HR, gv_BLHP


@softmax_product.register_fake
def _(x_BL2HR, v_BLHP, first_BL, end_BL, packed):
    batch, length, heads, _ = v_BLHP.shape
    return v_BLHP.new_empty(v_BLHP.shape), v_BLHP.new_empty(batch, heads, length, dtype=torch.float32)


@softmax_product_backward.register_fake
def _(gy_BLHP, x_BL2HR, v_BLHP, first_BL, end_BL, y_BLHP, lse_BHL, packed):
    return v_BLHP.new_empty(x_BL2HR.shape), v_BLHP.new_empty(v_BLHP.shape)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.packed = inputs[4]


def _gradients(ctx, gy_BLHP, glse_BHL):
    """The logarithms are for the gradient alone: they have none."""
    x_BL2HR, v_BLHP, first_BL, end_BL, y_BLHP, lse_BHL = ctx.saved_tensors
    found = softmax_product_backward(gy_BLHP, x_BL2HR, v_BLHP, first_BL, end_BL, y_BLHP, lse_BHL, ctx.packed)
    return *found, None, None, None


softmax_product.register_autograd(_gradients, setup_context=_keep)
