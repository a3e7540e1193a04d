"""The programs of exponential_product.py. Features are made anew wherever they are needed: cheaper than to fetch them.

A program's tiles of entries are outside, its fours of terms inside.
Axes as there, and of a tile T tokens, E entries, G a pair of terms, A = E G features (or of two pairs), C its width.
_ptr is of values, _n of the tokens' numbers (scale, real), term_ptr of the table of terms, _b _l _h are strides.
"""

import math

import triton
import triton.language as tl

FAR = tl.constexpr(1e30)
"""An entry where there is none: all its features are zero."""
LN2 = tl.constexpr(math.log(2))


@triton.jit
def _entries(x_ptr, n_ptr, row, h, t_T, e, length, rank, x_b, x_l, x_h, E: tl.constexpr):
    """The e-th tile of entries of tokens t, TE, and their numbers, T1."""
    e_E, known_T = e * E + tl.arange(0, E), t_T < length
    x_at = x_ptr + row * x_b + h * x_h + t_T.to(tl.int64)[:, None] * x_l + e_E[None, :]
    x_TE = tl.load(x_at, mask=known_T[:, None] & (e_E < rank)[None, :], other=FAR)
    return x_TE, tl.load(n_ptr + row * length + t_T, mask=known_T, other=0.0)[:, None]


@triton.jit
def _rows(at, stride, t_T, length, c, width, C: tl.constexpr):
    """The c-th tile of width of rows t, TC."""
    c_C = c * C + tl.arange(0, C)
    known_TC = (t_T < length)[:, None] & (c_C < width)[None, :]
    return tl.load(at + t_T.to(tl.int64)[:, None] * stride + c_C[None, :], mask=known_TC, other=0.0)


@triton.jit
def _write(at, stride, t_T, length, c, width, x_TC, C: tl.constexpr):
    c_C = c * C + tl.arange(0, C)
    known_TC = (t_T < length)[:, None] & (c_C < width)[None, :]
    tl.store(at + t_T.to(tl.int64)[:, None] * stride + c_C[None, :], x_TC, mask=known_TC)


@triton.jit
def _terms(term_ptr, i):
    """Of the i-th pair of terms, of each what 2 is raised to: a multiple of x and a number."""
    at = term_ptr + 4 * i
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@triton.jit
def _two(x_TE, n_T1, terms, T: tl.constexpr, E: tl.constexpr):
    """Features of a pair of terms, TA, both of an entry side by side: so a thread has neighbours to write."""
    first_TE, second_TE = tl.exp2(x_TE * terms[0] + terms[1]), tl.exp2(x_TE * terms[2] + terms[3])
    return tl.reshape(tl.join(first_TE * n_T1, second_TE * n_T1), (T, 2 * E))


@triton.jit
def _four(x_TE, n_T1, terms, more, T: tl.constexpr, E: tl.constexpr):
    """Of two fours, likewise: 0 2 1 3 of an entry, then of the next."""
    return tl.reshape(tl.join(_two(x_TE, n_T1, terms, T, E), _two(x_TE, n_T1, more, T, E)), (T, 4 * E))


@triton.jit
def _slopes(g_TA, x_TE, term_ptr, i, T: tl.constexpr, E: tl.constexpr):
    """From the gradient by features of a pair of terms that by entries, TE, but for the tokens' numbers and LN2.

    With the two as an axis, entries come to the layout of products before the loop, not slopes in each of its turns.
    """
    at_G = term_ptr + 4 * i + 2 * tl.arange(0, 2)
    rate_11G, root_11G = tl.load(at_G)[None, None, :], tl.load(at_G + 1)[None, None, :]
    slope_TEG = rate_11G * tl.exp2(x_TE[:, :, None] * rate_11G + root_11G)
    return tl.sum(tl.reshape(g_TA, (T, E, 2)) * slope_TEG, 2)


@triton.jit
def _place(length, heads, T: tl.constexpr):
    """Which state, row and head, and the tokens of one tile. One axis: a grid's others end at 65,535."""
    tiles = tl.cdiv(length, T)
    state, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    return state.to(tl.int64), (state // heads).to(tl.int64), state % heads, tile * T + tl.arange(0, T)


@triton.jit
def _state(s_at, a_A, c, width, C: tl.constexpr):
    """Features a of a state, and the c-th tile of width, AC."""
    c_C = c * C + tl.arange(0, C)
    return tl.load(s_at + a_A[:, None] * width + c_C[None, :], mask=(c_C < width)[None, :], other=0.0)


@triton.jit(do_not_specialize=["length"])
def gather(
    x_ptr, n_ptr, term_ptr, y_ptr, s_ptr, length, heads, rank, width, fours, x_b, x_l, x_h, y_b, y_l, y_h,
    SHARE: tl.constexpr, ENTRIES: tl.constexpr, CHUNKS: tl.constexpr,
    T: tl.constexpr, E: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of s = sum over a share of the row of features_t y_t^T. Tiles that read the same are neighbours."""
    tiles = ENTRIES * CHUNKS * fours
    state, i, c = tl.program_id(0) // tiles, tl.program_id(0) % tiles // CHUNKS, tl.program_id(0) % CHUNKS
    row, h, e = (state // heads).to(tl.int64), state % heads, i // fours
    terms, more = _terms(term_ptr, 2 * (i % fours)), _terms(term_ptr, 2 * (i % fours) + 1)
    s_AC = tl.zeros((4 * E, C), tl.float32)
    for step in range(SHARE):
        t_T = (tl.program_id(1) * SHARE + step) * T + tl.arange(0, T)
        x_TE, n_T1 = _entries(x_ptr, n_ptr, row, h, t_T, e, length, rank, x_b, x_l, x_h, E)
        y_TC = _rows(y_ptr + row * y_b + h * y_h, y_l, t_T, length, c, width, C)
        f_AT = tl.trans(_four(x_TE, n_T1, terms, more, T, E).to(y_TC.dtype))
        s_AC += tl.dot(f_AT, y_TC, input_precision=PRECISION)
    share = state.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    s_at, a_A, c_C = s_ptr + share * (ENTRIES * fours * 4 * E) * width, tl.arange(0, 4 * E), c * C + tl.arange(0, C)
    tl.store(s_at + (i * 4 * E + a_A[:, None]) * width + c_C[None, :], s_AC, mask=(c_C < width)[None, :])


@triton.jit(do_not_specialize=["length"])
def apply(
    x_ptr, n_ptr, term_ptr, s_ptr, y_ptr, length, heads, rank, width, fours, x_b, x_l, x_h,
    ENTRIES: tl.constexpr, T: tl.constexpr, E: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of y_t = features_t s."""
    state, row, h, t_T = _place(length, heads, T)
    c, s_at = tl.program_id(1), s_ptr + state * (ENTRIES * fours * 4 * E) * width
    y_TC = tl.zeros((T, C), tl.float32)
    for e in range(ENTRIES):
        x_TE, n_T1 = _entries(x_ptr, n_ptr, row, h, t_T, e, length, rank, x_b, x_l, x_h, E)
        for i in range(fours):
            s_AC = _state(s_at, (e * fours + i) * 4 * E + tl.arange(0, 4 * E), c, width, C)
            f_TA = _four(x_TE, n_T1, _terms(term_ptr, 2 * i), _terms(term_ptr, 2 * i + 1), T, E).to(s_AC.dtype)
            y_TC += tl.dot(f_TA, s_AC, input_precision=PRECISION)
    _write(y_ptr + (row * length * heads + h) * width, heads * width, t_T, length, c, width, y_TC, C)


@triton.jit(do_not_specialize=["length"])
def by_entries(
    x_ptr, n_ptr, term_ptr, y_ptr, s_ptr, gx_ptr, length, heads, rank, width, fours, x_b, x_l, x_h, y_b, y_l, y_h,
    ENTRIES: tl.constexpr, CHUNKS: tl.constexpr,
    T: tl.constexpr, E: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient by the entries of tokens t of y_t . (features_t s)."""
    state, row, h, t_T = _place(length, heads, T)
    s_at = s_ptr + state * (ENTRIES * fours * 4 * E) * width
    for e in range(ENTRIES):
        x_TE, n_T1 = _entries(x_ptr, n_ptr, row, h, t_T, e, length, rank, x_b, x_l, x_h, E)
        gx_TE = tl.zeros((T, E), tl.float32)
        for c in range(CHUNKS):
            y_TC = _rows(y_ptr + row * y_b + h * y_h, y_l, t_T, length, c, width, C)
            for i in range(2 * fours):
                a_A = (e * fours + i // 2) * 4 * E + i % 2 + 2 * tl.arange(0, 2 * E)  # of one pair out of two
                s_AC = _state(s_at, a_A, c, width, C)
                g_TA = tl.dot(y_TC, tl.trans(s_AC), input_precision=PRECISION)
                gx_TE += _slopes(g_TA, x_TE, term_ptr, i, T, E)
        gx_at = gx_ptr + (row * length * heads + h) * rank
        _write(gx_at, heads * rank, t_T, length, e, rank, gx_TE * n_T1 * LN2, E)
