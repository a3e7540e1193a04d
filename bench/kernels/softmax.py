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

QUERIES, KEYS, WARPS, STAGES = 64, 64, 4, 3
"""Of the values: a tile of queries and the keys read at a time, warps of a program, loads in flight."""
OWN, OTHER, WARPS_BACK, STAGES_BACK = 128, 64, 8, 4
"""Of the gradients: a tile of what a program owns and of what it reads, its warps, loads in flight."""
WHOLE, WARPS_WHOLE = 128, 8
"""Of rows that one tile of keys holds: their places at most, and the warps of a program."""
LARGEST = 128
"""A tile, and each divides it: so do lines of a number for each token, for no load of them to need a mask."""
WIDEST = 256
"""Of a head, and of its rank: wider ones have no room on the chip."""
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _place(length, heads, T: tl.constexpr):
    """Where a program's tile begins, its row and head. One axis: a grid's others end at 65,535, and B x H need not."""
    tiles = tl.cdiv(length, T)
    of_row, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    return tile * T, (of_row // heads).to(tl.int64), of_row % heads


@triton.jit
def _range(first_ptr, end_ptr, t_T, length):
    """What tokens t see, and all of them together: from which place to which."""
    first_T = tl.load(first_ptr + t_T, mask=t_T < length, other=0)
    end_T = tl.load(end_ptr + t_T, mask=t_T < length, other=0)
    high = tl.max(end_T, 0)
    tl.assume(high >= 0)  # else loops of no turn have code of their own, for which products wait for one another
    return first_T, end_T, tl.min(tl.where(end_T > first_T, first_T, high), 0), high


@triton.jit
def _rows(at, stride, start, end, SIZE: tl.constexpr, T: tl.constexpr, C: tl.constexpr, MASKED: tl.constexpr):
    """T rows from `start` on, if MASKED zero from `end` on: TC. A loop's masks take as long as its products."""
    t_T, c_C = tl.arange(0, T), tl.arange(0, C)
    kept_TC = tl.full((T, C), 1, tl.int1)
    if MASKED:
        kept_TC &= (start + t_T < end)[:, None]
    if C > SIZE:
        kept_TC &= (c_C < SIZE)[None, :]
    to_TC = at + tl.cast(start, tl.int64) * stride + (t_T[:, None] * stride + c_C[None, :])
    return tl.load(to_TC, mask=kept_TC, other=0.0)


@triton.jit
def _write(at, stride, start, end, x_TC, SIZE: tl.constexpr, T: tl.constexpr, C: tl.constexpr):
    t_T, c_C = start + tl.arange(0, T), tl.arange(0, C)
    kept_TC = (t_T < end)[:, None] & (c_C < SIZE)[None, :]
    tl.store(at + t_T.to(tl.int64)[:, None] * stride + c_C[None, :], x_TC, mask=kept_TC)


@triton.jit
def _among(first_I, end_I, j_J):
    """Whether token i sees token j, IJ."""
    return (j_J[None, :] >= first_I[:, None]) & (j_J[None, :] < end_I[:, None])


@triton.jit
def _scores(
    q_IR, k_at, x_l, first_I, end_I, at, high, RANK: tl.constexpr,
    MASKED: tl.constexpr, J: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q . k with the tile of keys `at`, if MASKED without those that a query does not see."""
    k_JR = _rows(k_at, x_l, at, high, RANK, J, R, MASKED)
    s_IJ = tl.dot(q_IR, tl.trans(k_JR), input_precision=PRECISION)
    if MASKED:
        s_IJ = tl.where(_among(first_I, end_I, at + tl.arange(0, J)), s_IJ, float("-inf"))
    return s_IJ


@triton.jit
def _largest(
    q_IR, k_at, x_l, first_I, end_I, low, high, RANK: tl.constexpr,
    PACKED: tl.constexpr, I: tl.constexpr, J: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The largest score of each query."""
    most_IJ, full = tl.full((I, J), -1e30, tl.float32), (low if PACKED else high) // J * J
    if not PACKED:
        for at in range(0, full, J):
            s_IJ = _scores(q_IR, k_at, x_l, first_I, end_I, at, high, RANK, False, J, R, PRECISION)
            most_IJ = tl.maximum(most_IJ, s_IJ)
    for at in tl.range(full, high, J, num_stages=None if PACKED else 1):  # one turn, if not packed
        s_IJ = _scores(q_IR, k_at, x_l, first_I, end_I, at, high, RANK, True, J, R, PRECISION)
        most_IJ = tl.maximum(most_IJ, s_IJ)
    return tl.max(most_IJ, 1)


@triton.jit(do_not_specialize=["length"])
def _values(
    x_ptr, v_ptr, first_ptr, end_ptr, y_ptr, lse_ptr,
    length, heads, root, x_b, x_l, x_2, x_h, v_b, v_l, v_h, lse_h, RANK: tl.constexpr, WIDTH: tl.constexpr,
    PACKED: tl.constexpr, I: tl.constexpr, J: tl.constexpr, R: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of y and its log2 of the sum of exponentials, infinite where nothing is visible.

    The largest scores come first, in a pass of their own: q . k is cheap beside products with v, and these, which then
    are never rescaled, run during the exponentials of the tile that follows."""
    start_i, row, h = _place(lse_h, heads, I)
    i_I = start_i + tl.arange(0, I)
    first_I, end_I, low, high = _range(first_ptr + row * length, end_ptr + row * length, i_I, length)
    q_at, v_at, scale = x_ptr + row * x_b + h * x_h, v_ptr + row * v_b + h * v_h, LOG2E / root
    k_at, full = q_at + x_2, (low if PACKED else high) // J * J  # all is visible of the tiles before
    q_IR = _rows(q_at, x_l, start_i, high, RANK, I, R, True)
    most_I = scale * _largest(q_IR, k_at, x_l, first_I, end_I, low, high, RANK, PACKED, I, 2 * J, R, PRECISION)
    y_IP, e_IJ, sum_I = tl.zeros((I, P), tl.float32), tl.zeros((I, J), tl.float32), tl.zeros((I,), tl.float32)
    if not PACKED:
        for at in range(0, full, J):
            s_IJ = _scores(q_IR, k_at, x_l, first_I, end_I, at, high, RANK, False, J, R, PRECISION)
            v_JP = _rows(v_at, v_l, tl.maximum(at - J, 0), high, WIDTH, J, P, False)
            y_IP = tl.dot(e_IJ.to(v_JP.dtype), v_JP, y_IP, input_precision=PRECISION)
            e_IJ = tl.exp2(s_IJ * scale - most_I[:, None])
            sum_I += tl.sum(e_IJ, 1)
        v_JP = _rows(v_at, v_l, tl.maximum(full - J, 0), high, WIDTH, J, P, True)
        y_IP = tl.dot(e_IJ.to(v_JP.dtype), v_JP, y_IP, input_precision=PRECISION)
    for at in tl.range(full, high, J, num_stages=None if PACKED else 1):
        s_IJ = _scores(q_IR, k_at, x_l, first_I, end_I, at, high, RANK, True, J, R, PRECISION)
        v_JP = _rows(v_at, v_l, at, high, WIDTH, J, P, True)
        e_IJ = tl.exp2(s_IJ * scale - most_I[:, None])
        y_IP = tl.dot(e_IJ.to(v_JP.dtype), v_JP, y_IP, input_precision=PRECISION)
        sum_I += tl.sum(e_IJ, 1)
    sees_I = end_I > first_I
    sum_I = tl.where(sees_I, sum_I, 1.0)
    y_IP = tl.where(sees_I[:, None], y_IP / sum_I[:, None], 0.0)
    _write(y_ptr + (row * length * heads + h) * WIDTH, heads * WIDTH, start_i, length, y_IP, WIDTH, I, P)
    lse_I = tl.where(sees_I, most_I + tl.log2(sum_I), float("inf"))
    tl.store(lse_ptr + (row * heads + h) * lse_h + i_I, lse_I)


@triton.jit
def _queries_step(
    gq_IR, q_IR, gy_IP, lse_I, delta_I, k_at, v_at, x_l, v_l, first_I, end_I, at, high, scale,
    RANK: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr,
    J: tl.constexpr, R: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    k_JR, v_JP = _rows(k_at, x_l, at, high, RANK, J, R, MASKED), _rows(v_at, v_l, at, high, WIDTH, J, P, MASKED)
    p_IJ = tl.exp2(tl.dot(q_IR, tl.trans(k_JR), input_precision=PRECISION) * scale - lse_I[:, None])
    if MASKED:
        p_IJ = tl.where(_among(first_I, end_I, at + tl.arange(0, J)), p_IJ, 0.0)
    gs_IJ = p_IJ * (tl.dot(gy_IP, tl.trans(v_JP), input_precision=PRECISION) - delta_I[:, None])
    return gq_IR + tl.dot(gs_IJ.to(k_JR.dtype), k_JR, input_precision=PRECISION)


@triton.jit(do_not_specialize=["length"])
def _queries(
    x_ptr, v_ptr, first_ptr, end_ptr, y_ptr, lse_ptr, gy_ptr, delta_ptr, gx_ptr,
    length, heads, root, x_b, x_l, x_2, x_h, v_b, v_l, v_h, lse_h, RANK: tl.constexpr, WIDTH: tl.constexpr,
    PACKED: tl.constexpr, I: tl.constexpr, J: tl.constexpr, R: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of q, and delta = gy . y for `_keys`."""
    start_i, row, h = _place(lse_h, heads, I)
    i_I = start_i + tl.arange(0, I)
    first_I, end_I, low, high = _range(first_ptr + row * length, end_ptr + row * length, i_I, length)
    q_at, v_at, scale = x_ptr + row * x_b + h * x_h, v_ptr + row * v_b + h * v_h, LOG2E / root
    of_head, line = (row * length * heads + h) * WIDTH, (row * heads + h) * lse_h
    q_IR = _rows(q_at, x_l, start_i, high, RANK, I, R, True)
    gy_IP = _rows(gy_ptr + of_head, heads * WIDTH, start_i, high, WIDTH, I, P, True)
    y_IP = _rows(y_ptr + of_head, heads * WIDTH, start_i, high, WIDTH, I, P, True)
    delta_I = tl.sum(gy_IP.to(tl.float32) * y_IP.to(tl.float32), 1)
    tl.store(delta_ptr + line + i_I, delta_I)
    lse_I = tl.load(lse_ptr + line + i_I)
    gq_IR, full = tl.zeros((I, R), tl.float32), (low if PACKED else high) // J * J
    if not PACKED:
        for at in range(0, full, J):
            gq_IR = _queries_step(
                gq_IR, q_IR, gy_IP, lse_I, delta_I, q_at + x_2, v_at, x_l, v_l, first_I, end_I, at, high, scale,
                RANK, WIDTH, False, J, R, P, PRECISION,
            )  # fmt: skip
    for at in tl.range(full, high, J, num_stages=None if PACKED else 1):
        gq_IR = _queries_step(
            gq_IR, q_IR, gy_IP, lse_I, delta_I, q_at + x_2, v_at, x_l, v_l, first_I, end_I, at, high, scale,
            RANK, WIDTH, True, J, R, P, PRECISION,
        )  # fmt: skip
    _write(gx_ptr + (row * length * 2 * heads + h) * RANK, 2 * heads * RANK, start_i, length, gq_IR / root, RANK, I, R)


@triton.jit
def _shares(s_JI, lse_at, at, first_J, end_J, scale, PACKED: tl.constexpr, WHOLE: tl.constexpr, I: tl.constexpr):
    """Of keys in the sums of a tile of queries. The logarithm is infinite for padding, and behind the row."""
    p_JI = tl.exp2(s_JI * scale - tl.load(lse_at + at + tl.arange(0, I))[None, :])
    if PACKED:
        p_JI = tl.where(_among(first_J, end_J, at + tl.arange(0, I)), p_JI, 0.0)
    elif WHOLE:
        p_JI = tl.where((end_J > first_J)[:, None], p_JI, 0.0)
    return p_JI


@triton.jit(do_not_specialize=["length"])
def _keys(
    x_ptr, v_ptr, first_ptr, end_ptr, lse_ptr, gy_ptr, delta_ptr, gx_ptr, gv_ptr,
    length, heads, root, x_b, x_l, x_2, x_h, v_b, v_l, v_h, lse_h, RANK: tl.constexpr, WIDTH: tl.constexpr,
    PACKED: tl.constexpr, WHOLE: tl.constexpr,
    I: tl.constexpr, J: tl.constexpr, R: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of k and v, over the queries that see it; if WHOLE, which holds a row, also those of q.

    A tile of queries has its exponentials while products of the tile before run, and q . k before those: the only
    product that a turn waits for is gy . v."""
    start_j, row, h = _place(length, heads, J)
    j_J = start_j + tl.arange(0, J)
    first_J, end_J, low, high = _range(first_ptr + row * length, end_ptr + row * length, j_J, length)
    sees_J, line, of_head = end_J > first_J, (row * heads + h) * lse_h, (row * length * heads + h) * WIDTH
    q_at, gx_at = x_ptr + row * x_b + h * x_h, gx_ptr + (row * length * 2 * heads + h) * RANK
    k_JR = _rows(q_at + x_2, x_l, start_j, high, RANK, J, R, True)
    v_JP = _rows(v_ptr + row * v_b + h * v_h, v_l, start_j, high, WIDTH, J, P, True)
    gk_JR, gv_JP = tl.zeros((J, R), tl.float32), tl.zeros((J, P), tl.float32)
    start, end, scale, lse_at = low // I * I, high, LOG2E / root, lse_ptr + line
    if WHOLE:  # padding has a gradient too, zero
        start, end = start * 0, length
    s_JI = tl.dot(k_JR, tl.trans(_rows(q_at, x_l, start, high, RANK, I, R, True)), input_precision=PRECISION)
    p_JI = _shares(s_JI, lse_at, start, first_J, end_J, scale, PACKED, WHOLE, I)
    s_JI = tl.dot(k_JR, tl.trans(_rows(q_at, x_l, start + I, high, RANK, I, R, True)), input_precision=PRECISION)
    for at in range(start, end, I):
        q_IR = _rows(q_at, x_l, at, high, RANK, I, R, True)
        gy_IP = _rows(gy_ptr + of_head, heads * WIDTH, at, high, WIDTH, I, P, True)
        gp_JI = tl.dot(v_JP, tl.trans(gy_IP), input_precision=PRECISION)
        gv_JP = tl.dot(p_JI.to(gy_IP.dtype), gy_IP, gv_JP, input_precision=PRECISION)
        # of a whole row all that a query sees is here
        delta_I = tl.sum(p_JI * gp_JI, 0) if WHOLE else tl.load(delta_ptr + line + at + tl.arange(0, I))
        gs_JI = (p_JI * (gp_JI - delta_I[None, :])).to(q_IR.dtype)
        gk_JR = tl.dot(gs_JI, q_IR, gk_JR, input_precision=PRECISION)
        if WHOLE:
            gq_IR = tl.dot(tl.trans(gs_JI), k_JR, input_precision=PRECISION) / root
            _write(gx_at, 2 * heads * RANK, at, length, gq_IR, RANK, I, R)
        p_JI = _shares(s_JI, lse_at, tl.minimum(at + I, lse_h - I), first_J, end_J, scale, PACKED, WHOLE, I)
        q_IR = _rows(q_at, x_l, at + 2 * I, high, RANK, I, R, True)
        s_JI = tl.dot(k_JR, tl.trans(q_IR), input_precision=PRECISION)
    gk_JR, gv_JP = tl.where(sees_J[:, None], gk_JR / root, 0.0), tl.where(sees_J[:, None], gv_JP, 0.0)
    _write(gx_at + heads * RANK, 2 * heads * RANK, start_j, length, gk_JR, RANK, J, R)
    _write(gv_ptr + of_head, heads * WIDTH, start_j, length, gv_JP, WIDTH, J, P)


def fits(rank: int, width: int) -> bool:
    return max(rank, width) <= WIDEST


def _sizes(x_BL2HR: Tensor, v_BLHP: Tensor) -> dict:
    """What all kernels take of shapes, strides and precision."""
    _, length, heads, width = v_BLHP.shape
    rank = x_BL2HR.shape[-1]
    return {
        "numbers": (length, heads, float(rank**0.5), *x_BL2HR.stride()[:4], *v_BLHP.stride()[:3], _line(length)),
        "RANK": rank,
        "WIDTH": width,
        "R": max(16, triton.next_power_of_2(rank)),
        "P": max(16, triton.next_power_of_2(width)),
        "PRECISION": precision(v_BLHP.dtype),
    }


def _line(length: int) -> int:
    """Places in memory of a number for each token of a row."""
    return -(-length // LARGEST) * LARGEST


def _tile(most: int, length: int, sizes: dict, x: Tensor) -> int:
    """Of places: fewer where a place takes more bytes than one of width 128 in half precision."""
    wide = max(sizes["R"], sizes["P"], 128) // 128 * (x.element_size() // 2)
    return max(16, min(most // wide, triton.next_power_of_2(length)))


@torch.library.custom_op("mixerbench::softmax_product", mutates_args=())
def softmax_product(
    x_BL2HR: Tensor, v_BLHP: Tensor, first_BL: Tensor, end_BL: Tensor, packed: bool
) -> tuple[Tensor, Tensor]:
    """y_BLHP in the dtype of v, zero where nothing is visible, and the log2 of the sum of exponentials, BHL in fp32
    with something behind each row.

    x is q and k, of the dtype of v; first and end are int32. Not `packed`: a row is one document from its beginning."""
    x_BL2HR, v_BLHP = dense_last(x_BL2HR), dense_last(v_BLHP)
    batch, length, heads, width = v_BLHP.shape
    sizes = _sizes(x_BL2HR, v_BLHP)
    i, j = (_tile(most, length, sizes, v_BLHP) for most in (QUERIES, KEYS))
    y_BLHP, numbers = v_BLHP.new_empty(batch, length, heads, width), sizes.pop("numbers")
    lse_BHL = v_BLHP.new_empty(batch, heads, _line(length), dtype=torch.float32)
    _values[(triton.cdiv(_line(length), i) * batch * heads,)](
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
    gx_BL2HR, gv_BLHP = v_BLHP.new_empty(x_BL2HR.shape), v_BLHP.new_empty(v_BLHP.shape)
    delta_BHL, numbers = torch.empty_like(lse_BHL), sizes.pop("numbers")
    given = x_BL2HR, v_BLHP, first_BL.contiguous(), end_BL.contiguous()
    own, other, whole = (_tile(most, length, sizes, v_BLHP) for most in (OWN, OTHER, WHOLE))
    sizes |= {"PACKED": packed, "num_stages": max(1, min(STAGES_BACK, WIDEST // sizes["R"]))}
    if length <= whole:
        sizes |= {"I": other, "J": whole, "WHOLE": True, "num_warps": warps(WARPS_WHOLE, whole)}
        _keys[(batch * heads,)](*given, lse_BHL, gy_BLHP, delta_BHL, gx_BL2HR, gv_BLHP, *numbers, **sizes)
        return gx_BL2HR, gv_BLHP
    sizes["num_warps"] = warps(WARPS_BACK, own)
    _queries[(triton.cdiv(_line(length), own) * batch * heads,)](
        *given, y_BLHP.contiguous(), lse_BHL, gy_BLHP, delta_BHL, gx_BL2HR, *numbers, I=own, J=other, **sizes
    )
    _keys[(triton.cdiv(length, own) * batch * heads,)](
        *given, lse_BHL, gy_BLHP, delta_BHL, gx_BL2HR, gv_BLHP, *numbers, I=other, J=own, WHOLE=False, **sizes
    )
    return gx_BL2HR, gv_BLHP


@softmax_product.register_fake
def _(x_BL2HR, v_BLHP, first_BL, end_BL, packed):
    batch, length, heads, _ = v_BLHP.shape
    return v_BLHP.new_empty(v_BLHP.shape), v_BLHP.new_empty(batch, heads, _line(length), dtype=torch.float32)


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
