"""The programs of scan.py that sum gradients over a chunk of several heads: of c and b, and of what has no channels.

Axes: B batch, L length, H heads, P head width, N state, G groups, D direction (0 forward, 1 backward; of c and b 1 if
both share), K chunks, T places of a chunk (S of a tile, of read or of written places).
"""

import triton
import triton.language as tl

from bench.kernels.scan_tiles import SIZES, decay, keep, kept, lower, matrix, part_of, scores, state_of

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=SIZES)
def heard(
    gy_ptr, c_ptr, read_ptr, h_ptr, gc_ptr, gread_ptr,
    length, heads, each, state, width, chunks, size, c_b, c_l, c_d, c_g,
    BACK: tl.constexpr, BOTH: tl.constexpr, SHARED: tl.constexpr,
    T: tl.constexpr, N: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the states of one chunk and direction give the gradients of c, summed over a part of the heads, and of read.
    With BACK those of b and write, from v and gs in the places of gy and h."""
    k, row, g, part, begin, end, parts = part_of(chunks, heads, each, size)
    s_T, first = tl.arange(0, T), k * T
    DIRECTIONS: tl.constexpr = 2 if BOTH else 1
    SIDES: tl.constexpr = 2 if BOTH and not SHARED else 1
    none = chunks - 1 if BACK else 0
    for side in tl.static_range(SIDES):
        c_TN = matrix(c_ptr + row * c_b + g * c_g + side * c_d, first, length, c_l, state, T, N)
        gc_TN = tl.zeros((T, N), tl.float32)
        for h in range(begin, end):
            gy_TP = matrix(gy_ptr + (row * length * heads + h) * width, first, length, heads * width, width, T, P)
            for d in tl.static_range(side, DIRECTIONS - SIDES + side + 1):
                at_T = (((row * chunks + k) * DIRECTIONS + d) * heads + h) * T + s_T
                h_NP = state_of(h_ptr, row, k, none, d, h, chunks, heads, state, width, DIRECTIONS, N, P)
                heard_TN = tl.dot(gy_TP, tl.trans(h_NP), input_precision=PRECISION)
                tl.store(gread_ptr + at_T, tl.sum(heard_TN * c_TN, axis=1))
                gc_TN += heard_TN * tl.load(read_ptr + at_T)[:, None]
        gc_at = gc_ptr + ((row * length * SIDES + side) * parts + part) * state
        keep(gc_TN, gc_at, first, length, SIDES * parts * state, state, T, N)


@triton.jit
def _gain(ptr, x_S, more: tl.constexpr, S: tl.constexpr):
    """The gradient of an exponent of two, added to what is there if there is more, else written."""
    x_S *= LN2
    if more:
        x_S += tl.load(ptr + tl.arange(0, S))
    tl.store(ptr + tl.arange(0, S), x_S)


@triton.jit
def _sums(
    gm_SS, grow_ptr, gcolumn_ptr, beyond, I: tl.constexpr, J: tl.constexpr, BOTH: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Gradients of the logs of rows and columns, beside what tiles before this one gave the same."""
    if I == J:
        lower_SS = lower(gm_SS, 0.0, S)
        _gain(grow_ptr + I, tl.sum(lower_SS, axis=1), J > 0, S)
        _gain(gcolumn_ptr + J, -tl.sum(lower_SS, axis=0), False, S)
        if BOTH:
            upper_SS = lower(0.0, gm_SS, S)  # zero on the diagonal
            _gain(grow_ptr + beyond + I, tl.sum(upper_SS, axis=1), False, S)
            _gain(gcolumn_ptr + beyond + J, -tl.sum(upper_SS, axis=0), I > 0, S)
    else:
        d = 1 if I < J else 0
        _gain(grow_ptr + d * beyond + I, tl.sum(gm_SS, axis=1), J > 0 if I > J else True, S)
        _gain(gcolumn_ptr + d * beyond + J, -tl.sum(gm_SS, axis=0), True if I > J else I > 0, S)


@triton.jit
def _of_c_and_b(
    gcb_SS, c_ptr, b_ptr, gc_ptr, gb_ptr, first, length, state, step, c_l, b_l,
    more_c: tl.constexpr, more_b: tl.constexpr, I: tl.constexpr, J: tl.constexpr,
    S: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Their gradients by those of the scores, added to what is there if there is more."""
    c_SN = matrix(c_ptr, first + I, length, c_l, state, S, N)
    b_SN = matrix(b_ptr, first + J, length, b_l, state, S, N)
    gcb_SS = gcb_SS.to(c_SN.dtype)
    gc_SN = tl.dot(gcb_SS, b_SN, input_precision=PRECISION)
    gb_SN = tl.dot(tl.trans(gcb_SS), c_SN, input_precision=PRECISION)
    if more_c:
        gc_SN += matrix(gc_ptr, first + I, length, step, state, S, N)
    if more_b:
        gb_SN += matrix(gb_ptr, first + J, length, step, state, S, N)
    keep(gc_SN, gc_ptr, first + I, length, step, state, S, N)
    keep(gb_SN, gb_ptr, first + J, length, step, state, S, N)


@triton.jit(do_not_specialize=SIZES)
def products_back(
    gy_ptr, v_ptr, c_ptr, b_ptr, row_ptr, column_ptr, gc_ptr, gb_ptr, grow_ptr, gcolumn_ptr, gdelta_ptr, segments_ptr,
    length, heads, each, state, width, chunks, size, c_b, c_l, c_d, c_g, b_b, b_l, b_d, b_g,
    ALONE: tl.constexpr, BOTH: tl.constexpr, SHARED: tl.constexpr, PACKED: tl.constexpr,
    T: tl.constexpr, S: tl.constexpr, N: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the matrix of one chunk gives the gradients: of row, column and delta for a part of the heads, and of c and
    b summed over these, beside what is there. S x S places at once: registers suffice for no more."""
    k, row, g, part, begin, end, parts = part_of(chunks, heads, each, size)
    s_S, first, of_chunk, beyond = tl.arange(0, S), k * T, row * chunks + k, heads * T
    DIRECTIONS: tl.constexpr = 2 if BOTH else 1
    SIDES: tl.constexpr = 2 if BOTH and not SHARED else 1
    c_ptr += row * c_b + g * c_g
    b_ptr += row * b_b + g * b_g
    segments_ptr += row * length
    own, step = (row * length * SIDES * parts + part) * state, SIDES * parts * state
    for I in tl.static_range(0, T, S):
        for J in tl.static_range(0, T if BOTH else I + S, S):
            cb_SS = scores(c_ptr, b_ptr, first, length, state, c_l, c_d, b_l, b_d, I, J, BOTH, SHARED, S, N, PRECISION)
            cb_SS = kept(cb_SS, segments_ptr, first, length, I, J, BOTH, PACKED, S)
            gcb_SS = tl.zeros((S, S), tl.float32)
            for h in range(begin, end):
                of_row = (row * length * heads + h) * width
                gy_SP = matrix(gy_ptr + of_row, first + I, length, heads * width, width, S, P)
                v_SP = matrix(v_ptr + of_row, first + J, length, heads * width, width, S, P)
                gm_SS = tl.dot(gy_SP, tl.trans(v_SP), input_precision=PRECISION)
                if I == J:
                    gdelta_S = tl.sum(tl.where(s_S[:, None] == s_S[None, :], gm_SS, 0.0), axis=1)
                    tl.store(gdelta_ptr + (of_chunk * heads + h) * T + I + s_S, gdelta_S)
                at = (of_chunk * DIRECTIONS * heads + h) * T
                gm_SS *= decay(row_ptr + at, column_ptr + at, beyond, I, J, BOTH, S)
                gcb_SS += gm_SS
                _sums(gm_SS * cb_SS, grow_ptr + at, gcolumn_ptr + at, beyond, I, J, BOTH, S)
            gcb_SS = kept(gcb_SS, segments_ptr, first, length, I, J, BOTH, PACKED, S)
            if I == J and SIDES == 2:
                lower_SS = lower(gcb_SS, 0.0, S)
                _of_c_and_b(
                    lower_SS, c_ptr, b_ptr, gc_ptr + own, gb_ptr + own, first, length, state, step, c_l, b_l,
                    not ALONE or J > 0, not ALONE, I, J, S, N, PRECISION,
                )  # fmt: skip
                gcb_SS -= lower_SS
            d = 1 if I <= J and SIDES == 2 else 0
            at = own + d * parts * state
            _of_c_and_b(
                gcb_SS, c_ptr + d * c_d, b_ptr + d * b_d, gc_ptr + at, gb_ptr + at,
                first, length, state, step, c_l, b_l,
                not ALONE or (J > I if I <= J and SIDES == 2 else J > 0),
                not ALONE or (I > 0 if I <= J and BOTH else I > J), I, J, S, N, PRECISION,
            )  # fmt: skip
            tl.debug_barrier()  # the next tile goes on with what this one wrote, maybe by other threads
