"""The programs of grid_product.py, in whose words C and D are matrices; the axis C is the channels of a tile.

Columns of C and D are as long as the row: the compiler is to know if 16 divides the length, or it reads and writes
them number by number.
Axes: T tokens, M points of the grid and C channels of a tile.
"""

import triton
import triton.language as tl


@triton.jit
def _columns(c_ptr, at, k_M, t_T, length, size):
    """A tile of C or D of a head, MT."""
    known_MT = (k_M < size)[:, None] & (t_T < length)[None, :]
    return tl.load(c_ptr + at + k_M[:, None].to(tl.int64) * length + t_T[None, :], mask=known_MT, other=0.0)


@triton.jit
def _seen(w_ptr, k_M, t_T, length, size):
    known_TM = (t_T < length)[:, None] & (k_M < size)[None, :]
    return tl.load(w_ptr + t_T[:, None] * size + k_M[None, :], mask=known_TM, other=0.0)


@triton.jit
def _rows(ptr, t_T, c_C, x_l, length, width):
    known_TC = (t_T < length)[:, None] & (c_C < width)[None, :]
    return tl.load(ptr + t_T[:, None] * x_l + c_C[None, :], mask=known_TC, other=0.0)


@triton.jit
def _weighed(x_TC, r_T, BACK: tl.constexpr):
    """Rows are left out where r is 0, and those of a gradient multiplied by r."""
    if BACK:
        x_TC = (x_TC.to(tl.float32) * r_T[:, None]).to(x_TC.dtype)
    return tl.where((r_T > 0)[:, None], x_TC, 0.0)


@triton.jit
def gather(
    c_ptr, w_ptr, x_ptr, r_ptr, out_ptr, length, heads, size, width, spacing, reach, c_b, c_g, x_b, x_l, x_h,
    BACK: tl.constexpr, STEPS: tl.constexpr, T: tl.constexpr, M: tl.constexpr, C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Tiles of both states, the sums over a row of -c_t x_t^T and w_t x_t^T."""
    row, h = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    k_M, c_C = tl.program_id(1) * M + tl.arange(0, M), tl.program_id(2) * C + tl.arange(0, C)
    of_c_MC, of_w_MC = tl.zeros((M, C), tl.float32), tl.zeros((M, C), tl.float32)
    for i in range(STEPS):
        t_T = i * T + tl.arange(0, T)
        r_T = tl.load(r_ptr + row * length + t_T, mask=t_T < length, other=0.0)
        x_TC = _weighed(_rows(x_ptr + row * x_b + h * x_h, t_T, c_C, x_l, length, width), r_T, BACK)
        c_MT = _columns(c_ptr, row * c_b + h.to(tl.int64) * c_g, k_M, t_T, length, size)
        of_c_MC += tl.dot(c_MT, x_TC, input_precision=PRECISION)
    first = tl.program_id(1) * M * spacing  # of the places of these points
    for i in range(tl.maximum(first - reach, 0) // T, tl.minimum((first + M * spacing + reach) // T + 1, STEPS)):
        t_T = i * T + tl.arange(0, T)
        r_T = tl.load(r_ptr + row * length + t_T, mask=t_T < length, other=0.0)
        x_TC = _weighed(_rows(x_ptr + row * x_b + h * x_h, t_T, c_C, x_l, length, width), r_T, BACK)
        of_w_MC += tl.dot(tl.trans(_seen(w_ptr, k_M, t_T, length, size)), x_TC, input_precision=PRECISION)
    out_at = out_ptr + tl.program_id(0).to(tl.int64) * 2 * size * width + k_M[:, None] * width + c_C[None, :]
    known_MC = (k_M < size)[:, None] & (c_C < width)[None, :]
    tl.store(out_at, -of_c_MC, mask=known_MC)
    tl.store(out_at + size * width, of_w_MC, mask=known_MC)


@triton.jit
def _states(ptr, k_M, c_C, size, width):
    known_MC = (k_M < size)[:, None] & (c_C < width)[None, :]
    return tl.load(ptr + k_M[:, None] * width + c_C[None, :], mask=known_MC, other=0.0)


@triton.jit
def apply(
    c_ptr, w_ptr, a_ptr, r_ptr, v_ptr, scale_ptr, y_ptr,
    length, heads, size, width, spacing, reach, c_b, c_g, v_b, v_l, v_h,
    BACK: tl.constexpr, SKIP: tl.constexpr, STEPS: tl.constexpr, T: tl.constexpr, M: tl.constexpr, C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of c_t (state of w) + w_t (state of C), times r, with BACK its negative on real tokens; plus v / scale."""
    row, h = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    t_T, c_C = tl.program_id(1) * T + tl.arange(0, T), tl.program_id(2) * C + tl.arange(0, C)
    a_ptr += tl.program_id(0).to(tl.int64) * 2 * size * width
    y_TC = tl.zeros((T, C), tl.float32)
    for i in range(STEPS):
        k_M = i * M + tl.arange(0, M)
        c_MT = _columns(c_ptr, row * c_b + h.to(tl.int64) * c_g, k_M, t_T, length, size)
        of_w_MC = _states(a_ptr + size * width, k_M, c_C, size, width)
        y_TC += tl.dot(tl.trans(c_MT), of_w_MC, input_precision=PRECISION)
    first, step = tl.program_id(1) * T, M * spacing
    for i in range(tl.maximum(first - reach, 0) // step, tl.minimum((first + T + reach) // step + 1, STEPS)):
        k_M = i * M + tl.arange(0, M)
        of_c_MC = _states(a_ptr, k_M, c_C, size, width)
        y_TC += tl.dot(_seen(w_ptr, k_M, t_T, length, size), of_c_MC, input_precision=PRECISION)
    r_T = tl.load(r_ptr + row * length + t_T, mask=t_T < length, other=0.0)
    y_TC *= tl.where(r_T > 0, -1.0, 0.0)[:, None] if BACK else r_T[:, None]
    if SKIP:
        v_TC = _rows(v_ptr + row * v_b + h * v_h, t_T, c_C, v_l, length, width)
        y_TC += v_TC.to(tl.float32) / tl.load(scale_ptr)
    y_at = y_ptr + ((row * length + t_T[:, None]) * heads + h) * width + c_C[None, :]
    tl.store(y_at, y_TC, mask=(t_T < length)[:, None] & (c_C < width)[None, :])


@triton.jit
def _against(ptr, x_TC, k_M, c_C, size, width, PRECISION: tl.constexpr):
    """States times rows, MT."""
    return tl.dot(_states(ptr, k_M, c_C, size, width), tl.trans(x_TC), input_precision=PRECISION)


@triton.jit
def outer(
    gy_ptr, v_ptr, r_ptr, a_ptr, ga_ptr, gc_ptr, length, heads, size, width, y_b, y_l, y_h, v_b, v_l, v_h,
    POINTS: tl.constexpr, STEPS: tl.constexpr, T: tl.constexpr, M: tl.constexpr, C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of C and D at some tokens: (state of w) gy_t, and -(gradient's state of w) v_t. Rows of one tile of
    channels are read once for all points."""
    row, h = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    t_T, c_C = tl.program_id(1) * T + tl.arange(0, T), tl.arange(0, C)
    of_w = tl.program_id(0).to(tl.int64) * 2 * size * width + size * width
    gc_at, gd_at = (row * 2 * heads + h) * size * length, (row * 2 * heads + heads + h) * size * length
    gy_at, v_at = gy_ptr + row * y_b + h * y_h, v_ptr + row * v_b + h * v_h
    a_at, ga_at = a_ptr + of_w, ga_ptr + of_w
    r_T = tl.load(r_ptr + row * length + t_T, mask=t_T < length, other=0.0)
    gy_TC = _weighed(_rows(gy_at, t_T, c_C, y_l, length, width), r_T, True)
    v_TC = _weighed(_rows(v_at, t_T, c_C, v_l, length, width), r_T, False)
    for i in range(POINTS):
        k_M = i * M + tl.arange(0, M)
        first_MT = _against(a_at, gy_TC, k_M, c_C, size, width, PRECISION)
        second_MT = _against(ga_at, v_TC, k_M, c_C, size, width, PRECISION)
        for part in range(1, STEPS):
            p_C = part * C + c_C
            more_TC = _weighed(_rows(gy_at, t_T, p_C, y_l, length, width), r_T, True)
            first_MT += _against(a_at, more_TC, k_M, p_C, size, width, PRECISION)
            more_TC = _weighed(_rows(v_at, t_T, p_C, v_l, length, width), r_T, False)
            second_MT += _against(ga_at, more_TC, k_M, p_C, size, width, PRECISION)
        at_MT = k_M[:, None].to(tl.int64) * length + t_T[None, :]
        known_MT = (k_M < size)[:, None] & (t_T < length)[None, :]
        tl.store(gc_ptr + gc_at + at_MT, first_MT, mask=known_MT)
        tl.store(gc_ptr + gd_at + at_MT, -second_MT, mask=known_MT)


@triton.jit
def short(
    c_ptr, w_ptr, v_ptr, r_ptr, scale_ptr, y_ptr, length, heads, size, width, c_b, c_g, v_b, v_l, v_h,
    SKIP: tl.constexpr, STEPS: tl.constexpr, T: tl.constexpr, M: tl.constexpr, C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A row and head, whose states are one tile."""
    row, h = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    of_c, of_d = row * c_b + h.to(tl.int64) * c_g, row * c_b + (heads + h).to(tl.int64) * c_g
    v_ptr, r_ptr = v_ptr + row * v_b + h * v_h, r_ptr + row * length
    k_M, c_C = tl.arange(0, M), tl.arange(0, C)
    of_w_MC, of_d_MC = tl.zeros((M, C), tl.float32), tl.zeros((M, C), tl.float32)
    for i in range(STEPS):
        t_T = i * T + tl.arange(0, T)
        r_T = tl.load(r_ptr + t_T, mask=t_T < length, other=0.0)
        v_TC = _weighed(_rows(v_ptr, t_T, c_C, v_l, length, width), r_T, False)
        of_w_MC += tl.dot(tl.trans(_seen(w_ptr, k_M, t_T, length, size)), v_TC, input_precision=PRECISION)
        of_d_MC += tl.dot(_columns(c_ptr, of_d, k_M, t_T, length, size), v_TC, input_precision=PRECISION)
    of_w_MC, of_d_MC = of_w_MC.to(v_ptr.dtype.element_ty), of_d_MC.to(v_ptr.dtype.element_ty)
    for i in range(STEPS):
        t_T = i * T + tl.arange(0, T)
        c_MT = _columns(c_ptr, of_c, k_M, t_T, length, size)
        y_TC = tl.dot(tl.trans(c_MT), of_w_MC, input_precision=PRECISION)
        y_TC -= tl.dot(_seen(w_ptr, k_M, t_T, length, size), of_d_MC, input_precision=PRECISION)
        y_TC *= tl.load(r_ptr + t_T, mask=t_T < length, other=0.0)[:, None]
        if SKIP:
            y_TC += _rows(v_ptr, t_T, c_C, v_l, length, width).to(tl.float32) / tl.load(scale_ptr)
        y_at = y_ptr + ((row * length + t_T[:, None]) * heads + h) * width + c_C[None, :]
        tl.store(y_at, y_TC, mask=(t_T < length)[:, None] & (c_C < width)[None, :])


@triton.jit
def short_back(
    gy_ptr, c_ptr, w_ptr, v_ptr, r_ptr, scale_ptr, gc_ptr, gv_ptr,
    length, heads, size, width, y_b, y_l, y_h, c_b, c_g, v_b, v_l, v_h,
    SKIP: tl.constexpr, STEPS: tl.constexpr, T: tl.constexpr, M: tl.constexpr, C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """All gradients of a row and head; states are made again, and rows read again rather than kept on the chip."""
    row, h = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    of_c, of_d = row * c_b + h.to(tl.int64) * c_g, row * c_b + (heads + h).to(tl.int64) * c_g
    v_ptr, gy_ptr, r_ptr = v_ptr + row * v_b + h * v_h, gy_ptr + row * y_b + h * y_h, r_ptr + row * length
    gc_at = gc_ptr + (row * 2 * heads + h) * size * length
    gd_at = gc_ptr + (row * 2 * heads + heads + h) * size * length
    k_M, c_C = tl.arange(0, M), tl.arange(0, C)
    of_w_MC, back_w_MC, back_c_MC = (
        tl.zeros((M, C), tl.float32),
        tl.zeros((M, C), tl.float32),
        tl.zeros((M, C), tl.float32),
    )
    for i in range(STEPS):
        t_T = i * T + tl.arange(0, T)
        r_T, w_TM = tl.load(r_ptr + t_T, mask=t_T < length, other=0.0), _seen(w_ptr, k_M, t_T, length, size)
        v_TC = _weighed(_rows(v_ptr, t_T, c_C, v_l, length, width), r_T, False)
        of_w_MC += tl.dot(tl.trans(w_TM), v_TC, input_precision=PRECISION)
        gy_TC = _weighed(_rows(gy_ptr, t_T, c_C, y_l, length, width), r_T, True)
        back_w_MC += tl.dot(tl.trans(w_TM), gy_TC, input_precision=PRECISION)
        back_c_MC += tl.dot(_columns(c_ptr, of_c, k_M, t_T, length, size), gy_TC, input_precision=PRECISION)
    dtype = v_ptr.dtype.element_ty
    of_w_MC, back_w_MC, back_c_MC = of_w_MC.to(dtype), back_w_MC.to(dtype), back_c_MC.to(dtype)
    for i in range(STEPS):
        t_T = i * T + tl.arange(0, T)
        r_T = tl.load(r_ptr + t_T, mask=t_T < length, other=0.0)
        at_MT = k_M[:, None] * length + t_T[None, :]
        known_MT, known_TC = (
            (k_M < size)[:, None] & (t_T < length)[None, :],
            (t_T < length)[:, None] & (c_C < width)[None, :],
        )
        v_TC = _weighed(_rows(v_ptr, t_T, c_C, v_l, length, width), r_T, False)
        gd_MT = tl.dot(back_w_MC, tl.trans(v_TC), input_precision=PRECISION)
        tl.store(gd_at + at_MT, -gd_MT, mask=known_MT)
        given_TC = _rows(gy_ptr, t_T, c_C, y_l, length, width)
        gc_MT = tl.dot(of_w_MC, tl.trans(_weighed(given_TC, r_T, True)), input_precision=PRECISION)
        tl.store(gc_at + at_MT, gc_MT, mask=known_MT)
        gv_TC = tl.dot(_seen(w_ptr, k_M, t_T, length, size), back_c_MC, input_precision=PRECISION)
        gv_TC -= tl.dot(tl.trans(_columns(c_ptr, of_d, k_M, t_T, length, size)), back_w_MC, input_precision=PRECISION)
        gv_TC = tl.where((r_T > 0)[:, None], gv_TC, 0.0)
        if SKIP:
            gv_TC += given_TC.to(tl.float32) / tl.load(scale_ptr)
        gv_at = gv_ptr + ((row * length + t_T[:, None]) * heads + h) * width + c_C[None, :]
        tl.store(gv_at, gv_TC, mask=known_TC)
