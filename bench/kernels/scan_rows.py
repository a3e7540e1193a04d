"""The programs of scan_short.py: what one of them does with one row and some heads.

The two directions fill disjoint triangles of a row's matrix: one exponential and one product serve both.
Heads of a group share c and b, so a program that takes several multiplies these once, and sums their gradients. How
many, `taken`, is an argument and at least one, which is all that the compiler may know: where it knew of one head and a
state of 16, and unrolled the loop, Triton 3.6 read beyond its shared memory and had c's gradient wrong (on an H200).
Axes: B batch, L length, H heads, P head width, N state, G groups, D direction (0 forward, 1 backward; of c and b 1 if
both share), T places of a row (S where read and written places meet), I shares of the heads.
"""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
SIZES = ["length", "taken"]  # a length of its own, or one head, is no reason to compile again


@triton.jit
def _matrix(ptr, row_T, known_T, col_N, size):
    """Rows of contiguous numbers, zero beyond what is known. Where they begin fits 32 bits, from a pointer that did not
    have to: addresses of 64 for each would take registers."""
    return tl.load(ptr + row_T[:, None] + col_N[None, :], mask=known_T[:, None] & (col_N < size)[None, :], other=0.0)


@triton.jit
def _side(ptr, row, d, group, t_T, known_T, n_N, state, x_b, x_l, x_d, x_g, SHARED: tl.constexpr):
    """c or b of a row for one direction."""
    ptr += row.to(tl.int64) * x_b + (0 if SHARED else d * x_d) + group * x_g
    return _matrix(ptr, t_T * x_l, known_T, n_N, state)


@triton.jit
def _after(T: tl.constexpr):
    """Where direction 0 is at home: read places (rows) after the written ones."""
    return tl.arange(0, T)[:, None] > tl.arange(0, T)[None, :]


@triton.jit
def _diagonal(T: tl.constexpr):
    return tl.arange(0, T)[:, None] == tl.arange(0, T)[None, :]


@triton.jit
def _scores(
    c_ptr, b_ptr, row, group, t_T, known_T, n_N, state, c_b, c_l, c_d, c_g, b_b, b_l, b_d, b_g,
    BOTH: tl.constexpr, SHARED: tl.constexpr, T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """c_s^T b_t, in each triangle of its own direction."""
    c_TN = _side(c_ptr, row, 0, group, t_T, known_T, n_N, state, c_b, c_l, c_d, c_g, SHARED)
    b_TN = _side(b_ptr, row, 0, group, t_T, known_T, n_N, state, b_b, b_l, b_d, b_g, SHARED)
    cb_ST = tl.dot(c_TN, tl.trans(b_TN), input_precision=PRECISION)
    if BOTH and not SHARED:
        c_TN = _side(c_ptr, row, 1, group, t_T, known_T, n_N, state, c_b, c_l, c_d, c_g, SHARED)
        b_TN = _side(b_ptr, row, 1, group, t_T, known_T, n_N, state, b_b, b_l, b_d, b_g, SHARED)
        cb_ST = tl.where(_after(T), cb_ST, tl.dot(c_TN, tl.trans(b_TN), input_precision=PRECISION))
    return cb_ST


@triton.jit
def _documents(segments_ptr, row, length, t_T, known_T, PACKED: tl.constexpr):
    """Whose each place is; anything where rows are one document."""
    if PACKED:
        return tl.load(segments_ptr + row.to(tl.int64) * length + t_T, mask=known_T, other=0).to(tl.int32)
    else:
        return t_T


@triton.jit
def _decay(sum_ptr, dt_ptr, next, t_T, own_T, BOTH: tl.constexpr, PACKED: tl.constexpr, T: tl.constexpr):
    """Products of A between a read place (rows) and the written places of its document before it, with two directions
    after it too, else 0, but anything on the diagonal; and dt of the written places. `next` is how far direction 1 lies
    behind direction 0. Exponents at most 0 are chosen before exp2, so that no infinity meets a zero."""
    sum_T, dt_ST = tl.load(sum_ptr + t_T) * LOG2E, tl.load(dt_ptr + t_T)[None, :]
    log_ST = sum_T[:, None] - sum_T[None, :]
    if BOTH:
        sum_T = tl.load(sum_ptr + next + t_T) * LOG2E
        log_ST = tl.where(_after(T), log_ST, sum_T[None, :] - sum_T[:, None])
        dt_ST = tl.where(_after(T), dt_ST, tl.load(dt_ptr + next + t_T)[None, :])
    else:
        log_ST = tl.where(_after(T), log_ST, float("-inf"))
    if PACKED:
        log_ST = tl.where(own_T[:, None] == own_T[None, :], log_ST, float("-inf"))
    return tl.exp2(log_ST), dt_ST


@triton.jit(do_not_specialize=SIZES)
def products(
    v_ptr, c_ptr, b_ptr, dt_ptr, sum_ptr, delta_ptr, segments_ptr, y_ptr,
    length, heads, each, state, width, taken, c_b, c_l, c_d, c_g, b_b, b_l, b_d, b_g,
    BOTH: tl.constexpr, SHARED: tl.constexpr, PACKED: tl.constexpr,
    T: tl.constexpr, N: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y of one row and as many heads of a group as are taken."""
    tl.assume(taken > 0)
    shares = heads // taken
    row, first = tl.program_id(0) // shares, tl.program_id(0) % shares * taken
    t_T, n_N, p_P = tl.arange(0, T), tl.arange(0, N), tl.arange(0, P)
    known_T, group = t_T < length, first // each
    DIRECTIONS: tl.constexpr = 2 if BOTH else 1
    cb_ST = _scores(
        c_ptr, b_ptr, row, group, t_T, known_T, n_N, state, c_b, c_l, c_d, c_g, b_b, b_l, b_d, b_g,
        BOTH, SHARED, T, PRECISION,
    )  # fmt: skip
    own_T = _documents(segments_ptr, row, length, t_T, known_T, PACKED)
    v_at, v_at_T = row.to(tl.int64) * length * heads * width, t_T * heads * width
    for j in range(taken):
        h = first + j
        v_TP = _matrix(v_ptr + v_at + h * width, v_at_T, known_T, p_P, width)
        at = (row.to(tl.int64) * DIRECTIONS * heads + h) * T
        delta_T = tl.load(delta_ptr + (row.to(tl.int64) * heads + h) * T + t_T)
        decay_ST, dt_ST = _decay(sum_ptr + at, dt_ptr + at, heads * T, t_T, own_T, BOTH, PACKED, T)
        m_ST = tl.where(_diagonal(T), delta_T[:, None], cb_ST * decay_ST * dt_ST)
        y_TP = tl.dot(m_ST.to(v_TP.dtype), v_TP, input_precision=PRECISION)
        y_ptr_TP = y_ptr + v_at + h * width + (v_at_T[:, None] + p_P[None, :])
        tl.store(y_ptr_TP, y_TP, mask=known_T[:, None] & (p_P < width)[None, :])


@triton.jit
def _store_sums(row_T, gdt_T, dt_ptr, gdt_ptr, gsum_ptr, t_T, sign: tl.constexpr):
    """Gradients of dt and of the sums of log A of a direction."""
    tl.store(gdt_ptr + t_T, gdt_T)
    tl.store(gsum_ptr + t_T, (row_T - gdt_T * tl.load(dt_ptr + t_T)) * sign)


@triton.jit
def _store_sides(
    gcb_ST, c_ptr, b_ptr, gc_ptr, gb_ptr, row, length, group, shares, share, t_T, known_T, n_N, state,
    c_b, c_l, c_d, c_g, b_b, b_l, b_d, b_g, SIDES: tl.constexpr, T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of c and b of the heads that are taken; the diagonal has none."""
    gcb_ST = tl.where(_diagonal(T), 0.0, gcb_ST)
    at, at_T = row.to(tl.int64) * length * SIDES * shares * state, t_T * SIDES * shares * state
    at_TN, kept_TN = at_T[:, None] + n_N[None, :], known_T[:, None] & (n_N < state)[None, :]
    for d in tl.static_range(SIDES):
        own_ST = gcb_ST
        if SIDES == 2:
            own_ST = tl.where(_after(T), own_ST, 0.0) if d == 0 else tl.where(_after(T), 0.0, own_ST)
        own_ST = own_ST.to(c_ptr.dtype.element_ty)
        own_at = at + (d * shares + share) * state
        b_TN = _side(b_ptr, row, d, group, t_T, known_T, n_N, state, b_b, b_l, b_d, b_g, SIDES == 1)
        tl.store(gc_ptr + own_at + at_TN, tl.dot(own_ST, b_TN, input_precision=PRECISION), mask=kept_TN)
        c_TN = _side(c_ptr, row, d, group, t_T, known_T, n_N, state, c_b, c_l, c_d, c_g, SIDES == 1)
        tl.store(gb_ptr + own_at + at_TN, tl.dot(tl.trans(own_ST), c_TN, input_precision=PRECISION), mask=kept_TN)


@triton.jit(do_not_specialize=SIZES)
def products_back(
    gy_ptr, v_ptr, c_ptr, b_ptr, dt_ptr, sum_ptr, delta_ptr, segments_ptr,
    gv_ptr, gc_ptr, gb_ptr, gdt_ptr, gsum_ptr, gdelta_ptr,
    length, heads, each, state, width, taken, c_b, c_l, c_d, c_g, b_b, b_l, b_d, b_g,
    BOTH: tl.constexpr, SHARED: tl.constexpr, PACKED: tl.constexpr,
    T: tl.constexpr, N: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All gradients of one row and the heads that are taken of a group; those of c and b summed over these heads. Masks
    are used where they are made, and once: the compiler packs those that it keeps into bits, which takes longer."""
    tl.assume(taken > 0)
    shares = heads // taken
    row, first = tl.program_id(0) // shares, tl.program_id(0) % shares * taken
    t_T, n_N, p_P = tl.arange(0, T), tl.arange(0, N), tl.arange(0, P)
    known_T, group = t_T < length, first // each
    DIRECTIONS: tl.constexpr = 2 if BOTH else 1
    cb_ST = _scores(
        c_ptr, b_ptr, row, group, t_T, known_T, n_N, state, c_b, c_l, c_d, c_g, b_b, b_l, b_d, b_g,
        BOTH, SHARED, T, PRECISION,
    )  # fmt: skip
    own_T = _documents(segments_ptr, row, length, t_T, known_T, PACKED)
    cb_ST, gcb_ST = tl.where(_diagonal(T), 0.0, cb_ST), tl.zeros((T, T), tl.float32)
    v_at, v_at_T = row.to(tl.int64) * length * heads * width, t_T * heads * width
    for j in range(taken):
        h = first + j
        v_TP = _matrix(v_ptr + v_at + h * width, v_at_T, known_T, p_P, width)
        gy_TP = _matrix(gy_ptr + v_at + h * width, v_at_T, known_T, p_P, width)
        at, delta_at = (row.to(tl.int64) * DIRECTIONS * heads + h) * T, (row.to(tl.int64) * heads + h) * T
        gm_ST = tl.dot(gy_TP, tl.trans(v_TP), input_precision=PRECISION)
        decay_ST, dt_ST = _decay(sum_ptr + at, dt_ptr + at, heads * T, t_T, own_T, BOTH, PACKED, T)
        gcb_ST += gm_ST * (decay_ST * dt_ST)
        decay_ST *= cb_ST
        delta_T = tl.load(delta_ptr + delta_at + t_T)
        m_ST = tl.where(_diagonal(T), delta_T[None, :], decay_ST * dt_ST).to(gy_TP.dtype)
        gdelta_T = tl.sum(tl.where(_diagonal(T), gm_ST, 0.0), axis=1)
        gm_ST *= decay_ST  # what an entry says of dt
        part_ST = tl.where(_after(T), gm_ST, 0.0) if BOTH else gm_ST
        row_T, gdt_T = tl.sum(part_ST * dt_ST, axis=1), tl.sum(part_ST, axis=0)
        if BOTH:
            part_ST = gm_ST - part_ST
            row_back_T, gdt_back_T = tl.sum(part_ST * dt_ST, axis=1), tl.sum(part_ST, axis=0)
        gv_TP = tl.dot(tl.trans(m_ST), gy_TP, input_precision=PRECISION)
        tl.store(gdelta_ptr + delta_at + t_T, gdelta_T)
        _store_sums(row_T, gdt_T, dt_ptr + at, gdt_ptr + at, gsum_ptr + at, t_T, 1)
        if BOTH:
            at += heads * T
            _store_sums(row_back_T, gdt_back_T, dt_ptr + at, gdt_ptr + at, gsum_ptr + at, t_T, -1)
        gv_ptr_TP = gv_ptr + v_at + h * width + (v_at_T[:, None] + p_P[None, :])
        tl.store(gv_ptr_TP, gv_TP, mask=known_T[:, None] & (p_P < width)[None, :])
    _store_sides(
        gcb_ST, c_ptr, b_ptr, gc_ptr, gb_ptr, row, length, group, shares, first // taken, t_T, known_T, n_N, state,
        c_b, c_l, c_d, c_g, b_b, b_l, b_d, b_g, SIDES=1 if SHARED else DIRECTIONS, T=T, PRECISION=PRECISION,
    )  # fmt: skip
