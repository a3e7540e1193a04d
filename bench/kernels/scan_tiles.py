"""The programs of scan.py: what one of them does with one chunk, of several heads or of one, or with a state.

Axes: B batch, L length, H heads, P head width, N state, G groups, D direction (0 forward, 1 backward; of c and b 1 if
both share), K chunks, T places of a chunk (S where read and written places meet).
"""

import triton
import triton.language as tl

SIZES = ["length", "chunks", "size"]  # a length of its own is no reason to compile again


@triton.jit
def matrix(ptr, first, length, step, size, T: tl.constexpr, N: tl.constexpr):
    """T rows of contiguous numbers from the first on, zero beyond the length and a row's size."""
    t_T, n_N = tl.arange(0, T), tl.arange(0, N)
    known_TN = (t_T < length - first)[:, None] & (n_N < size)[None, :]
    ptr += tl.cast(first, tl.int64) * step
    return tl.load(ptr + t_T[:, None] * step + n_N[None, :], mask=known_TN, other=0.0)


@triton.jit
def keep(x_TN, ptr, first, length, step, size, T: tl.constexpr, N: tl.constexpr):
    """Written where `matrix` reads."""
    t_T, n_N = tl.arange(0, T), tl.arange(0, N)
    known_TN = (t_T < length - first)[:, None] & (n_N < size)[None, :]
    ptr += tl.cast(first, tl.int64) * step
    tl.store(ptr + t_T[:, None] * step + n_N[None, :], x_TN, mask=known_TN)


@triton.jit
def _chunk(place, d, chunks):
    """The chunk that a direction comes to after so many others."""
    return place + d * (chunks - 1 - 2 * place)


@triton.jit
def _place(chunks, heads):
    """Chunk, row and head of a program, one after the other in the grid's first dimension: the others end at 65,535."""
    of_row = tl.program_id(0) // chunks
    return tl.program_id(0) % chunks, (of_row // heads).to(tl.int64), of_row % heads


@triton.jit
def _said(
    x_ptr, weight_ptr, v_ptr, first, length, state, width, x_l, v_l,
    T: tl.constexpr, N: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum over the places of a chunk of weight_t x_t v_t^T."""
    x_TN = matrix(x_ptr, first, length, x_l, state, T, N).to(tl.float32)
    x_TN *= tl.load(weight_ptr + tl.arange(0, T))[:, None]
    v_TP = matrix(v_ptr, first, length, v_l, width, T, P)
    return tl.dot(tl.trans(x_TN).to(v_TP.dtype), v_TP, input_precision=PRECISION)


@triton.jit(do_not_specialize=SIZES)
def states(
    x_ptr, weight_ptr, v_ptr, s_ptr, length, heads, each, state, width, chunks, x_b, x_l, x_d, x_g,
    BACK: tl.constexpr, SHARED: tl.constexpr, T: tl.constexpr, N: tl.constexpr, P: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """s = sum over a chunk of weight_t x_t v_t^T, for one head and direction, kept at the next chunk, or with BACK at
    the one before: what the last chunk (the first) would say nobody reads."""
    place, row, h = _place(chunks - 1, heads)
    d, directions = tl.program_id(1), tl.num_programs(1)
    k, other = _chunk(place, d, chunks), _chunk(place + 1, d, chunks)
    if BACK:
        k, other = other, k
    x_ptr += row * x_b + (0 if SHARED else d * x_d) + h // each * x_g
    weight_ptr += (((row * chunks + k) * directions + d) * heads + h) * T
    v_ptr += (row * length * heads + h) * width
    s_NP = _said(x_ptr, weight_ptr, v_ptr, k * T, length, state, width, x_l, heads * width, T, N, P, PRECISION)
    s_ptr += (((row * chunks + other) * directions + d) * heads + h) * state * width
    keep(s_NP, s_ptr, 0, state, width, width, N, P)


@triton.jit(do_not_specialize=SIZES)
def carried(
    x_ptr, weight_ptr, v_ptr, s_ptr, decay_ptr, h_ptr, gdecay_ptr,
    length, heads, each, state, width, chunks, x_b, x_l, x_d, x_g,
    BACK: tl.constexpr, SHARED: tl.constexpr, T: tl.constexpr, N: tl.constexpr, P: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`states` and `carry`, or with BACK `states` and `carry_back`, in one: for one head and direction of one row,
    chunk after chunk, with what is carried on the chip."""
    row, h, d, directions = tl.program_id(0) // heads, tl.program_id(0) % heads, tl.program_id(1), tl.num_programs(1)
    row = row.to(tl.int64)
    x_ptr += row * x_b + (0 if SHARED else d * x_d) + h // each * x_g
    v_ptr += (row * length * heads + h) * width
    state_NP = tl.zeros((N, P), tl.float32)
    for step in range(chunks - 1):
        place, onward = (chunks - 1 - step, chunks - 2 - step) if BACK else (step, step + 1)
        k, other = _chunk(place, d, chunks), _chunk(onward, d, chunks)
        at = ((row * chunks + k) * directions + d) * heads + h
        weight_at = weight_ptr + at * T
        state_NP *= tl.load(decay_ptr + at)
        state_NP += _said(x_ptr, weight_at, v_ptr, k * T, length, state, width, x_l, heads * width, T, N, P, PRECISION)
        at = ((row * chunks + other) * directions + d) * heads + h
        keep(state_NP, s_ptr + at * state * width, 0, state, width, width, N, P)
        if BACK:
            h_NP = matrix(h_ptr + at * state * width, 0, tl.where(onward > 0, state, 0), width, width, N, P)
            tl.store(gdecay_ptr + at, tl.sum(h_NP.to(tl.float32) * state_NP))


@triton.jit
def carry(h_ptr, decay_ptr, heads, size, K: tl.constexpr, BLOCK: tl.constexpr):
    """What enters each chunk, from what the one before says of it, in its place: h_k += decay_{k-1} h_{k-1}; for
    direction 1 from the other end. The first has nothing that enters, and the second nothing to add."""
    row, h, d, directions = tl.program_id(0) // heads, tl.program_id(0) % heads, tl.program_id(1), tl.num_programs(1)
    i_I = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    before = ((row.to(tl.int64) * K + _chunk(1, d, K)) * directions + d) * heads + h
    state_I = tl.load(h_ptr + before * size + i_I, mask=i_I < size, other=0.0).to(tl.float32)
    for place in range(2, K):
        at = ((row.to(tl.int64) * K + _chunk(place, d, K)) * directions + d) * heads + h
        said_I = tl.load(h_ptr + at * size + i_I, mask=i_I < size, other=0.0)
        state_I = state_I * tl.load(decay_ptr + before) + said_I
        tl.store(h_ptr + at * size + i_I, state_I, mask=i_I < size)
        before = at


@triton.jit
def carry_back(gs_ptr, h_ptr, decay_ptr, part_ptr, heads, size, K: tl.constexpr, BLOCK: tl.constexpr):
    """The adjoint of `carry`, in place too: gs_k += decay_{k+1} gs_{k+1}, and (a part of) the gradient of decay, for
    chunks that something enters and leaves."""
    row, h, d, directions = tl.program_id(0) // heads, tl.program_id(0) % heads, tl.program_id(1), tl.num_programs(1)
    i_I = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    at = ((row.to(tl.int64) * K + _chunk(K - 2, d, K)) * directions + d) * heads + h
    g_I = tl.load(gs_ptr + at * size + i_I, mask=i_I < size, other=0.0).to(tl.float32)
    for step in range(2, K):
        h_I = tl.load(h_ptr + at * size + i_I, mask=i_I < size, other=0.0).to(tl.float32)
        tl.store(part_ptr + at * tl.num_programs(2) + tl.program_id(2), tl.sum(h_I * g_I, axis=0))
        g_I *= tl.load(decay_ptr + at)
        at = ((row.to(tl.int64) * K + _chunk(K - 1 - step, d, K)) * directions + d) * heads + h
        g_I += tl.load(gs_ptr + at * size + i_I, mask=i_I < size, other=0.0)
        tl.store(gs_ptr + at * size + i_I, g_I, mask=i_I < size)


@triton.jit
def state_of(
    ptr, row, k, none, d, h, chunks, heads, state, width,
    DIRECTIONS: tl.constexpr, N: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Zero, and not read, of the chunk that has none, at this place of the direction's way."""
    ptr += (((row * chunks + k) * DIRECTIONS + d) * heads + h) * state * width
    return matrix(ptr, 0, tl.where(k == _chunk(none, d, chunks), 0, state), width, width, N, P)


@triton.jit
def part_of(chunks, heads, each, size):
    """Chunk, row, group, number and heads, from one to before another, of a program: of those that share c and b it
    takes so many. And how many parts there are in all groups."""
    parts = (each + size - 1) // size
    k, row, part = _place(chunks, heads // each * parts)
    g, inside = part // parts, part % parts
    first, end = g * each + inside * size, g * each + tl.minimum((inside + 1) * size, each)
    return k, row, g, part, first, end, heads // each * parts


@triton.jit
def lower(x_ST, y_ST, S: tl.constexpr):
    """The one below the diagonal, the other elsewhere."""
    s_S = tl.arange(0, S)
    return tl.where(s_S[:, None] > s_S[None, :], x_ST, y_ST)


@triton.jit
def scores(
    c_ptr, b_ptr, first, length, state, c_l, c_d, b_l, b_d, I: tl.constexpr, J: tl.constexpr,
    BOTH: tl.constexpr, SHARED: tl.constexpr, S: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """c_s^T b_t of S places from the I-th of a chunk on (rows) and S from the J-th, of the direction in which s reads
    t."""
    d = 1 if I < J and not SHARED else 0
    c_SN = matrix(c_ptr + d * c_d, first + I, length, c_l, state, S, N)
    b_SN = matrix(b_ptr + d * b_d, first + J, length, b_l, state, S, N)
    cb_SS = tl.dot(c_SN, tl.trans(b_SN), input_precision=PRECISION)
    if I == J and BOTH and not SHARED:
        c_SN = matrix(c_ptr + c_d, first + I, length, c_l, state, S, N)
        b_SN = matrix(b_ptr + b_d, first + J, length, b_l, state, S, N)
        cb_SS = lower(cb_SS, tl.dot(c_SN, tl.trans(b_SN), input_precision=PRECISION), S)
    return cb_SS


@triton.jit
def kept(
    x_SS, segments_ptr, first, length, I: tl.constexpr, J: tl.constexpr,
    BOTH: tl.constexpr, PACKED: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Zero where no row reads the column: not its own place, nor another document, nor, but for BOTH, a later place."""
    s_S = tl.arange(0, S)
    if I == J:
        x_SS = tl.where(s_S[:, None] != s_S[None, :] if BOTH else s_S[:, None] > s_S[None, :], x_SS, 0.0)
    if PACKED:
        reader_S = tl.load(segments_ptr + first + I + s_S, mask=s_S < length - first - I, other=0)
        written_S = tl.load(segments_ptr + first + J + s_S, mask=s_S < length - first - J, other=0)
        x_SS = tl.where(reader_S[:, None] == written_S[None, :], x_SS, 0.0)
    return x_SS


@triton.jit
def decay(row_ptr, column_ptr, beyond, I: tl.constexpr, J: tl.constexpr, BOTH: tl.constexpr, S: tl.constexpr):
    """Of the direction in which a row reads a column; direction 1 is `beyond` numbers on."""
    s_S, d = tl.arange(0, S), 1 if I < J else 0
    log_SS = tl.load(row_ptr + d * beyond + I + s_S)[:, None] - tl.load(column_ptr + d * beyond + J + s_S)[None, :]
    if I == J and BOTH:
        back_SS = tl.load(row_ptr + beyond + I + s_S)[:, None] - tl.load(column_ptr + beyond + J + s_S)[None, :]
        log_SS = lower(log_SS, back_SS, S)
    elif I == J:
        log_SS = lower(log_SS, 0.0, S)
    return tl.exp2(log_SS)


@triton.jit(do_not_specialize=SIZES)
def products(
    v_ptr, c_ptr, b_ptr, row_ptr, column_ptr, weight_ptr, delta_ptr, h_ptr, segments_ptr, y_ptr,
    length, heads, each, state, width, chunks, size, c_b, c_l, c_d, c_g, b_b, b_l, b_d, b_g,
    BACK: tl.constexpr, ALONE: tl.constexpr, BOTH: tl.constexpr, SHARED: tl.constexpr, PACKED: tl.constexpr,
    T: tl.constexpr, N: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y of one chunk and a part of the heads; the matrix is the same for them but for the decay. With BACK its
    transpose is applied, with b, write and gs for c, read and h: of gy that is gv. ALONE: a row is one chunk."""
    k, row, g, _, begin, end, _ = part_of(chunks, heads, each, size)
    s_T, first = tl.arange(0, T), k * T
    DIRECTIONS: tl.constexpr = 2 if BOTH else 1
    c_ptr += row * c_b + g * c_g
    b_ptr += row * b_b + g * b_g
    cb_ST = scores(c_ptr, b_ptr, first, length, state, c_l, c_d, b_l, b_d, 0, 0, BOTH, SHARED, T, N, PRECISION)
    cb_ST = kept(cb_ST, segments_ptr + row * length, first, length, 0, 0, BOTH, PACKED, T)
    for h in range(begin, end):
        of_row = (row * length * heads + h) * width
        v_TP = matrix(v_ptr + of_row, first, length, heads * width, width, T, P)
        delta_T = tl.load(delta_ptr + ((row * chunks + k) * heads + h) * T + s_T)
        at = ((row * chunks + k) * DIRECTIONS * heads + h) * T
        m_ST = (cb_ST * decay(row_ptr + at, column_ptr + at, heads * T, 0, 0, BOTH, T)).to(v_TP.dtype)
        if BACK:
            m_ST = tl.trans(m_ST)
        y_TP = tl.dot(m_ST, v_TP, input_precision=PRECISION) + v_TP.to(tl.float32) * delta_T[:, None]
        if not ALONE:
            for d in tl.static_range(DIRECTIONS):
                if BACK:
                    x_TN = matrix(b_ptr + (0 if SHARED else d * b_d), first, length, b_l, state, T, N)
                else:
                    x_TN = matrix(c_ptr + (0 if SHARED else d * c_d), first, length, c_l, state, T, N)
                none = chunks - 1 if BACK else 0
                h_NP = state_of(h_ptr, row, k, none, d, h, chunks, heads, state, width, DIRECTIONS, N, P)
                weight_T = tl.load(weight_ptr + at + d * heads * T + s_T)
                y_TP += tl.dot(x_TN, h_NP, input_precision=PRECISION) * weight_T[:, None]
        keep(y_TP, y_ptr + of_row, first, length, heads * width, width, T, P)
