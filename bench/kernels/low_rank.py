"""A product with a matrix of low rank, y_i = q_i . sum over j of k_j v_j^T, without a transposed copy of anything.

Rows are gathered into states of R x P numbers a head, and states are applied to rows; each is the other's gradient with
the roles exchanged. A short row's states never leave the chip: one program does all with a row and head.
The product of rows may have v / scale added: what adds has the rows of v at hand, and those of gy for its gradient.
Axes: B batch, L length, H heads, P head width, R rank, S shares of a row; T tokens of a tile; A, C tiles of width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.kernels import dense_last, precision, tile, warps

TOKENS, TILE, WIDE, WARPS = 64, 64, 128, 4
"""Of a program: tokens of a step, the widest tile of the first factor and of the second, and its warps. What lies
beyond a tile is another program's, which reads the other factor again."""
PROGRAMS = 512
"""Rows are cut into shares until so many programs gather: a long row alone would leave most of a GPU idle."""
SHORT, SHORT_RANK, SHORT_WIDTH = 128, 64, 128
"""Tokens, rank and head width up to which one program takes a whole row."""
SHORT_TOKENS, WARPS_SHORT, WARPS_SHORT_BACK, STAGES_SHORT = 64, 4, 4, 2
"""Tokens that it takes at a time, its warps each way, and loads in flight."""


@triton.jit(do_not_specialize=["length"])
def _gather(
    x_ptr, y_ptr, s_ptr, length, heads, a_size, c_size, x_b, x_l, x_h, y_b, y_l, y_h,
    SHARE: tl.constexpr, T: tl.constexpr, A: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of s = sum over a share of the row of x_t y_t^T."""
    row, h = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    tiles = tl.cdiv(c_size, C)
    a_A, c_C = tl.program_id(2) // tiles * A + tl.arange(0, A), tl.program_id(2) % tiles * C + tl.arange(0, C)
    s_AC = tl.zeros((A, C), tl.float32)
    for i in range(SHARE):
        t_T = (tl.program_id(1) * SHARE + i) * T + tl.arange(0, T)
        known_T = t_T < length
        x_at = x_ptr + row * x_b + h * x_h + t_T[:, None] * x_l + a_A[None, :]
        y_at = y_ptr + row * y_b + h * y_h + t_T[:, None] * y_l + c_C[None, :]
        x_TA = tl.load(x_at, mask=known_T[:, None] & (a_A < a_size)[None, :], other=0.0)
        y_TC = tl.load(y_at, mask=known_T[:, None] & (c_C < c_size)[None, :], other=0.0)
        s_AC += tl.dot(tl.trans(x_TA), y_TC, input_precision=PRECISION)
    s_at = (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * a_size * c_size
    kept_AC = (a_A < a_size)[:, None] & (c_C < c_size)[None, :]
    tl.store(s_ptr + s_at + a_A[:, None] * c_size + c_C[None, :], s_AC, mask=kept_AC)


@triton.jit(do_not_specialize=["length"])
def _apply(
    x_ptr, s_ptr, y_ptr, v_ptr, scale_ptr, length, heads, a_size, c_size, x_b, x_l, x_h, s_a, s_c, v_b, v_l, v_h,
    SKIP: tl.constexpr, STEPS: tl.constexpr, T: tl.constexpr, A: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of y_t = x_t s (+ v_t / scale), s of this head read by the strides given (so also transposed)."""
    row, h = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    t_T, c_C = tl.program_id(1) * T + tl.arange(0, T), tl.program_id(2) * C + tl.arange(0, C)
    known_T, known_C = t_T < length, c_C < c_size
    y_TC = tl.zeros((T, C), tl.float32)
    for i in range(STEPS):
        a_A = i * A + tl.arange(0, A)
        known_A = a_A < a_size
        x_at = x_ptr + row * x_b + h * x_h + t_T[:, None] * x_l + a_A[None, :]
        x_TA = tl.load(x_at, mask=known_T[:, None] & known_A[None, :], other=0.0)
        s_at = s_ptr + tl.program_id(0).to(tl.int64) * a_size * c_size + a_A[:, None] * s_a + c_C[None, :] * s_c
        s_AC = tl.load(s_at, mask=known_A[:, None] & known_C[None, :], other=0.0)
        y_TC += tl.dot(x_TA, s_AC, input_precision=PRECISION)
    if SKIP:
        v_at = v_ptr + row * v_b + h * v_h + t_T[:, None] * v_l + c_C[None, :]
        y_TC += tl.load(v_at, mask=known_T[:, None] & known_C[None, :], other=0.0).to(tl.float32) / tl.load(scale_ptr)
    y_at = y_ptr + ((row * length + t_T[:, None]) * heads + h) * c_size + c_C[None, :]
    tl.store(y_at, y_TC, mask=known_T[:, None] & known_C[None, :])


@triton.jit
def _rows(ptr, h, x_l, x_h, t_T, length, size, A: tl.constexpr):
    """Rows t of a head, zero beyond the row and the width."""
    a_A = tl.arange(0, A)
    known_TA = (t_T < length)[:, None] & (a_A < size)[None, :]
    return tl.load(ptr + h * x_h + t_T[:, None] * x_l + a_A[None, :], mask=known_TA, other=0.0)


@triton.jit
def _write(ptr, row, h, heads, t_T, length, size, x_TA, A: tl.constexpr):
    a_A = tl.arange(0, A)
    known_TA = (t_T < length)[:, None] & (a_A < size)[None, :]
    tl.store(ptr + ((row * length + t_T[:, None]) * heads + h) * size + a_A[None, :], x_TA, mask=known_TA)


@triton.jit(do_not_specialize=["length"])
def _short(
    q_ptr, k_ptr, v_ptr, scale_ptr, y_ptr, length, heads, rank, width, q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h,
    SKIP: tl.constexpr, STEPS: tl.constexpr, T: tl.constexpr, A: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, h = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    q_ptr, k_ptr, v_ptr = q_ptr + row * q_b, k_ptr + row * k_b, v_ptr + row * v_b
    s_AC = tl.zeros((A, C), tl.float32)
    for i in range(STEPS):
        t_T = i * T + tl.arange(0, T)
        k_TA, v_TC = _rows(k_ptr, h, k_l, k_h, t_T, length, rank, A), _rows(v_ptr, h, v_l, v_h, t_T, length, width, C)
        s_AC += tl.dot(tl.trans(k_TA), v_TC, input_precision=PRECISION)
    s_AC = s_AC.to(v_ptr.dtype.element_ty)
    for i in range(STEPS):
        t_T = i * T + tl.arange(0, T)
        y_TC = tl.dot(_rows(q_ptr, h, q_l, q_h, t_T, length, rank, A), s_AC, input_precision=PRECISION)
        if SKIP:
            y_TC += _rows(v_ptr, h, v_l, v_h, t_T, length, width, C).to(tl.float32) / tl.load(scale_ptr)
        _write(y_ptr, row, h, heads, t_T, length, width, y_TC, C)


@triton.jit(do_not_specialize=["length"])
def _short_back(
    gy_ptr, q_ptr, k_ptr, v_ptr, scale_ptr, gq_ptr, gk_ptr, gv_ptr,
    length, heads, rank, width, y_b, y_l, y_h, q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h,
    SKIP: tl.constexpr, STEPS: tl.constexpr, T: tl.constexpr, A: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All gradients of a row and head; the states are made again, and rows read again rather than kept on the chip."""
    row, h = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    gy_ptr, q_ptr, k_ptr, v_ptr = gy_ptr + row * y_b, q_ptr + row * q_b, k_ptr + row * k_b, v_ptr + row * v_b
    s_AC, gs_AC = tl.zeros((A, C), tl.float32), tl.zeros((A, C), tl.float32)
    for i in range(STEPS):
        t_T = i * T + tl.arange(0, T)
        k_TA, v_TC = _rows(k_ptr, h, k_l, k_h, t_T, length, rank, A), _rows(v_ptr, h, v_l, v_h, t_T, length, width, C)
        s_AC += tl.dot(tl.trans(k_TA), v_TC, input_precision=PRECISION)
        q_TA, gy_TC = _rows(q_ptr, h, q_l, q_h, t_T, length, rank, A), _rows(gy_ptr, h, y_l, y_h, t_T, length, width, C)
        gs_AC += tl.dot(tl.trans(q_TA), gy_TC, input_precision=PRECISION)
    s_AC, gs_AC = s_AC.to(v_ptr.dtype.element_ty), gs_AC.to(v_ptr.dtype.element_ty)
    for i in range(STEPS):
        t_T = i * T + tl.arange(0, T)
        gy_TC = _rows(gy_ptr, h, y_l, y_h, t_T, length, width, C)
        gq_TA = tl.dot(gy_TC, tl.trans(s_AC), input_precision=PRECISION)
        _write(gq_ptr, row, h, heads, t_T, length, rank, gq_TA, A)
        v_TC = _rows(v_ptr, h, v_l, v_h, t_T, length, width, C)
        gk_TA = tl.dot(v_TC, tl.trans(gs_AC), input_precision=PRECISION)
        _write(gk_ptr, row, h, heads, t_T, length, rank, gk_TA, A)
        k_TA = _rows(k_ptr, h, k_l, k_h, t_T, length, rank, A)
        gv_TC = tl.dot(k_TA, gs_AC, input_precision=PRECISION)
        if SKIP:
            gv_TC += gy_TC.to(tl.float32) / tl.load(scale_ptr)
        _write(gv_ptr, row, h, heads, t_T, length, width, gv_TC, C)


def gathered(x_BLHA: Tensor, y_BLHC: Tensor) -> Tensor:
    """sum over L of x y^T for each head, BHAC in the dtype of y, added up in fp32."""
    (batch, length, heads, a_size), c_size = x_BLHA.shape, y_BLHC.shape[-1]
    a, c = tile(a_size, TILE), tile(c_size, WIDE)
    tiles, steps = triton.cdiv(a_size, a) * triton.cdiv(c_size, c), triton.cdiv(length, TOKENS)
    share = triton.cdiv(steps, max(1, PROGRAMS // (batch * heads * tiles)))
    shares = triton.cdiv(steps, share)
    kept = y_BLHC.dtype if shares == 1 else torch.float32
    s_BHSAC = y_BLHC.new_empty(batch, heads, shares, a_size, c_size, dtype=kept)
    _gather[batch * heads, shares, tiles](
        x_BLHA, y_BLHC, s_BHSAC, length, heads, a_size, c_size, *x_BLHA.stride()[:3], *y_BLHC.stride()[:3],
        SHARE=share, T=TOKENS, A=a, C=c, PRECISION=precision(y_BLHC.dtype), num_warps=WARPS,
    )  # fmt: skip
    return s_BHSAC.sum(2).to(y_BLHC.dtype) if shares > 1 else s_BHSAC[:, :, 0]


def applied(x_BLHA: Tensor, s_BHAC: Tensor, v_BLHC: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """x s for each row and head, BLHC, plus v / scale if there is a scale; s may be a transposed view of contiguous
    states."""
    (batch, length, heads, a_size), c_size = x_BLHA.shape, s_BHAC.shape[-1]
    a, c = tile(a_size, TILE), tile(c_size, WIDE)
    y_BLHC = x_BLHA.new_empty(batch, length, heads, c_size)
    added, by = (y_BLHC, y_BLHC) if scale is None else (v_BLHC, scale)  # without a scale neither is read
    _apply[batch * heads, triton.cdiv(length, TOKENS), triton.cdiv(c_size, c)](
        x_BLHA, s_BHAC, y_BLHC, added, by, length, heads, a_size, c_size,
        *x_BLHA.stride()[:3], *s_BHAC.stride()[2:], *added.stride()[:3],
        SKIP=scale is not None, STEPS=triton.cdiv(a_size, a), T=TOKENS, A=a, C=c, PRECISION=precision(x_BLHA.dtype),
        num_warps=WARPS,
    )  # fmt: skip
    return y_BLHC


def low_rank_product(q_BLHR: Tensor, k_BLHR: Tensor, v_BLHP: Tensor, scale: Tensor | None = None) -> Tensor:
    """y_BLHP, with a scale (one number, without gradient) y + v / scale; all else of one dtype. Nothing is masked: keys
    or values are zero on padding."""
    if v_BLHP.shape[1] <= SHORT and k_BLHR.shape[-1] <= SHORT_RANK and v_BLHP.shape[-1] <= SHORT_WIDTH:
        return short_product(q_BLHR, k_BLHR, v_BLHP, scale)
    return long_product(q_BLHR, k_BLHR, v_BLHP, scale)[0]


@torch.library.custom_op("mixerbench::long_product", mutates_args=())
def long_product(q_BLHR: Tensor, k_BLHR: Tensor, v_BLHP: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """y_BLHP and the states BHRP."""
    q_BLHR, k_BLHR, v_BLHP = (dense_last(x) for x in (q_BLHR, k_BLHR, v_BLHP))
    s_BHRP = gathered(k_BLHR, v_BLHP).contiguous()
    return applied(q_BLHR, s_BHRP, v_BLHP, scale), s_BHRP


@torch.library.custom_op("mixerbench::long_product_backward", mutates_args=())
def long_product_backward(
    gy_BLHP: Tensor, q_BLHR: Tensor, k_BLHR: Tensor, v_BLHP: Tensor, scale: Tensor | None, s_BHRP: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    gy_BLHP, q_BLHR, k_BLHR, v_BLHP = (dense_last(x) for x in (gy_BLHP, q_BLHR, k_BLHR, v_BLHP))
    gs_BHRP = gathered(q_BLHR, gy_BLHP).contiguous()
    gq_BLHR, gk_BLHR = applied(gy_BLHP, s_BHRP.transpose(2, 3)), applied(v_BLHP, gs_BHRP.transpose(2, 3))
    return gq_BLHR, gk_BLHR, applied(k_BLHR, gs_BHRP, gy_BLHP, scale)


def _of_short_rows(k_BLHR: Tensor, v_BLHP: Tensor, most: int) -> tuple[tuple, tuple[int, ...], dict]:
    """Grid, shapes and constants."""
    (batch, length, heads, width), rank = v_BLHP.shape, k_BLHR.shape[-1]
    t = min(SHORT_TOKENS, max(16, triton.next_power_of_2(length)))
    sizes = {"STEPS": triton.cdiv(length, t), "T": t, "A": tile(rank, SHORT_RANK), "C": tile(width, SHORT_WIDTH)}
    sizes |= {"PRECISION": precision(v_BLHP.dtype), "num_warps": warps(most, t), "num_stages": STAGES_SHORT}
    return (batch * heads,), (length, heads, rank, width), sizes


@torch.library.custom_op("mixerbench::short_product", mutates_args=())
def short_product(q_BLHR: Tensor, k_BLHR: Tensor, v_BLHP: Tensor, scale: Tensor | None) -> Tensor:
    q_BLHR, k_BLHR, v_BLHP = (dense_last(x) for x in (q_BLHR, k_BLHR, v_BLHP))
    y_BLHP, (grid, shapes, sizes) = v_BLHP.new_empty(v_BLHP.shape), _of_short_rows(k_BLHR, v_BLHP, WARPS_SHORT)
    strides = (stride for x in (q_BLHR, k_BLHR, v_BLHP) for stride in x.stride()[:3])
    by, skip = v_BLHP if scale is None else scale, scale is not None
    _short[grid](q_BLHR, k_BLHR, v_BLHP, by, y_BLHP, *shapes, *strides, SKIP=skip, **sizes)
    return y_BLHP


@torch.library.custom_op("mixerbench::short_product_backward", mutates_args=())
def short_product_backward(
    gy_BLHP: Tensor, q_BLHR: Tensor, k_BLHR: Tensor, v_BLHP: Tensor, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    given = tuple(dense_last(x) for x in (gy_BLHP, q_BLHR, k_BLHR, v_BLHP))
    grid, shapes, sizes = _of_short_rows(k_BLHR, v_BLHP, WARPS_SHORT_BACK)
    found = tuple(x.new_empty(x.shape) for x in given[1:])
    by, strides = given[-1] if scale is None else scale, (stride for x in given for stride in x.stride()[:3])
    _short_back[grid](*given, by, *found, *shapes, *strides, SKIP=scale is not None, **sizes)
    return found


@short_product.register_fake
def _(q_BLHR, k_BLHR, v_BLHP, scale):
    return v_BLHP.new_empty(v_BLHP.shape)


@long_product.register_fake
def _(q_BLHR, k_BLHR, v_BLHP, scale):
    batch, _, heads, width = v_BLHP.shape
    return v_BLHP.new_empty(v_BLHP.shape), v_BLHP.new_empty(batch, heads, k_BLHR.shape[-1], width)


@short_product_backward.register_fake
def _(gy_BLHP, q_BLHR, k_BLHR, v_BLHP, scale):
    return tuple(x.new_empty(x.shape) for x in (q_BLHR, k_BLHR, v_BLHP))


@long_product_backward.register_fake
def _(gy_BLHP, q_BLHR, k_BLHR, v_BLHP, scale, s_BHRP):
    return tuple(x.new_empty(x.shape) for x in (q_BLHR, k_BLHR, v_BLHP))


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _short_gradients(ctx, gy_BLHP):
    return *short_product_backward(gy_BLHP, *ctx.saved_tensors), None


def _keep_states(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[1])


def _long_gradients(ctx, gy_BLHP, gs_BHRP):
    """The states are no result of their own: they have no gradient."""
    return *long_product_backward(gy_BLHP, *ctx.saved_tensors), None


short_product.register_autograd(_short_gradients, setup_context=_keep)
long_product.register_autograd(_long_gradients, setup_context=_keep_states)
