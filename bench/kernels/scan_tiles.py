"""The programs of scan.py: what one of them does with one chunk (or state) of one head.

Axes: B batch, L length, H heads, P head width, N state, G groups, D direction (0 forward, 1 backward; of c and b 1 if
both share), K chunks, T places of a chunk (S where read and written places meet).
"""

import triton
import triton.language as tl

SIZES = ["length", "chunks"]  # a length of its own is no reason to compile again


@triton.jit
def _matrix(ptr, row_T, known_T, col_N, size):
    """Rows of contiguous numbers, zero beyond what is known."""
    return tl.load(ptr + row_T[:, None] + col_N[None, :], mask=known_T[:, None] & (col_N < size)[None, :], other=0.0)


@triton.jit
def _chunk(place, d, chunks):
    """The chunk that a direction comes to after so many others."""
    return place + d * (chunks - 1 - 2 * place)


@triton.jit
def _place(chunks, heads):
    """Chunk, row and head of a program, one after the other in the grid's first dimension: the others end at 65,535."""
    of_row = tl.program_id(0) // chunks
    return tl.program_id(0) % chunks, of_row // heads, of_row % heads


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
    t_T = k * T + tl.arange(0, T)
    n_N, p_P = tl.arange(0, N), tl.arange(0, P)
    known_T = t_T < length
    x_d = 0 if SHARED else d * x_d
    x_TN = _matrix(x_ptr + row.to(tl.int64) * x_b + x_d + h // each * x_g, t_T * x_l, known_T, n_N, state)
    at = (((row.to(tl.int64) * chunks + k) * directions + d) * heads + h) * T
    x_TN = x_TN.to(tl.float32) * tl.load(weight_ptr + at + tl.arange(0, T))[:, None]
    v_TP = _matrix(v_ptr, ((row.to(tl.int64) * length + t_T) * heads + h) * width, known_T, p_P, width)
    s_NP = tl.dot(tl.trans(x_TN).to(v_TP.dtype), v_TP, input_precision=PRECISION)
    s_at = (((row.to(tl.int64) * chunks + other) * directions + d) * heads + h) * state * width
    kept_NP = (n_N < state)[:, None] & (p_P < width)[None, :]
    tl.store(s_ptr + s_at + n_N[:, None] * width + p_P[None, :], s_NP, mask=kept_NP)


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
def _of_direction(
    d, c_ptr, b_ptr, dt_ptr, sum_ptr, read_ptr, row, k, h, t_T, known_T, n_N, heads, each, state, chunks,
    c_b, c_l, c_d, c_g, b_b, b_l, b_d, b_g, DIRECTIONS: tl.constexpr, SHARED: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    c_d, b_d = (0, 0) if SHARED else (d * c_d, d * b_d)
    c_TN = _matrix(c_ptr + row.to(tl.int64) * c_b + c_d + h // each * c_g, t_T * c_l, known_T, n_N, state)
    b_TN = _matrix(b_ptr + row.to(tl.int64) * b_b + b_d + h // each * b_g, t_T * b_l, known_T, n_N, state)
    at_T = (((row.to(tl.int64) * chunks + k) * DIRECTIONS + d) * heads + h) * T + tl.arange(0, T)
    return c_TN, b_TN, tl.load(dt_ptr + at_T), tl.load(sum_ptr + at_T), tl.load(read_ptr + at_T), at_T


@triton.jit
def _state(ptr, row, k, none, d, h, chunks, heads, state, width, n_N, p_P, DIRECTIONS: tl.constexpr):
    """Zero, and not read, of the chunk that has none, at this place of the direction's way."""
    at = (((row.to(tl.int64) * chunks + k) * DIRECTIONS + d) * heads + h) * state * width
    return _matrix(ptr + at, n_N * width, n_N < tl.where(k == _chunk(none, d, chunks), 0, state), p_P, width)


@triton.jit
def _decay(sum_T, d, T: tl.constexpr):
    """Products of A between a read place (rows) and the written places before it, for direction 1 after it; else 0."""
    s_T, sign = tl.arange(0, T), 1 - 2 * d
    kept_ST = (s_T[:, None] - s_T[None, :]) * sign > 0
    return tl.where(kept_ST, tl.exp(tl.where(kept_ST, (sum_T[:, None] - sum_T[None, :]) * sign, 0.0)), 0.0)


@triton.jit(do_not_specialize=SIZES)
def products(
    v_ptr, c_ptr, b_ptr, dt_ptr, sum_ptr, read_ptr, delta_ptr, h_ptr, segments_ptr, y_ptr,
    length, heads, each, state, width, chunks, c_b, c_l, c_d, c_g, b_b, b_l, b_d, b_g,
    BOTH: tl.constexpr, SHARED: tl.constexpr, PACKED: tl.constexpr,
    T: tl.constexpr, N: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y of one chunk and head."""
    k, row, h = _place(chunks, heads)
    t_T = k * T + tl.arange(0, T)
    n_N, p_P, known_T = tl.arange(0, N), tl.arange(0, P), t_T < length
    DIRECTIONS: tl.constexpr = 2 if BOTH else 1
    v_at_T = ((row.to(tl.int64) * length + t_T) * heads + h) * width
    v_TP = _matrix(v_ptr, v_at_T, known_T, p_P, width)
    delta_T = tl.load(delta_ptr + ((row.to(tl.int64) * chunks + k) * heads + h) * T + tl.arange(0, T))
    y_TP = v_TP.to(tl.float32) * delta_T[:, None]
    m_ST = tl.zeros((T, T), tl.float32)
    for d in tl.static_range(DIRECTIONS):
        c_TN, b_TN, dt_T, sum_T, read_T, _ = _of_direction(
            d, c_ptr, b_ptr, dt_ptr, sum_ptr, read_ptr, row, k, h, t_T, known_T, n_N, heads, each, state, chunks,
            c_b, c_l, c_d, c_g, b_b, b_l, b_d, b_g, DIRECTIONS, SHARED, T,
        )  # fmt: skip
        cb_ST = tl.dot(c_TN, tl.trans(b_TN), input_precision=PRECISION)
        m_ST += cb_ST * _decay(sum_T, d, T) * dt_T[None, :]
        h_NP = _state(h_ptr, row, k, 0, d, h, chunks, heads, state, width, n_N, p_P, DIRECTIONS)
        y_TP += tl.dot((c_TN * read_T[:, None]).to(v_TP.dtype), h_NP, input_precision=PRECISION)
    if PACKED:
        own_T = tl.load(segments_ptr + row * length + t_T, mask=known_T, other=0)
        m_ST = tl.where(own_T[:, None] == own_T[None, :], m_ST, 0.0)
    y_TP += tl.dot(m_ST.to(v_TP.dtype), v_TP, input_precision=PRECISION)
    tl.store(y_ptr + v_at_T[:, None] + p_P[None, :], y_TP, mask=known_T[:, None] & (p_P < width)[None, :])


@triton.jit(do_not_specialize=SIZES)
def products_back(
    gy_ptr, v_ptr, c_ptr, b_ptr, dt_ptr, sum_ptr, write_ptr, read_ptr, delta_ptr, h_ptr, gs_ptr, segments_ptr,
    gv_ptr, gc_ptr, gb_ptr, gdt_ptr, gsum_ptr, gwrite_ptr, gread_ptr, gdelta_ptr,
    length, heads, each, state, width, chunks, c_b, c_l, c_d, c_g, b_b, b_l, b_d, b_g,
    BOTH: tl.constexpr, SHARED: tl.constexpr, PACKED: tl.constexpr,
    T: tl.constexpr, N: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All gradients of one chunk and head; those of c and b per head and direction. One direction after the other, in a
    loop, and gv last, from rows of gy that are read again: registers do not suffice for all of it at once."""
    k, row, h = _place(chunks, heads)
    t_T = k * T + tl.arange(0, T)
    s_T, n_N, p_P, known_T = tl.arange(0, T), tl.arange(0, N), tl.arange(0, P), t_T < length
    DIRECTIONS: tl.constexpr = 2 if BOTH else 1
    v_at_T = ((row.to(tl.int64) * length + t_T) * heads + h) * width
    v_TP = _matrix(v_ptr, v_at_T, known_T, p_P, width)
    gy_TP = _matrix(gy_ptr, v_at_T, known_T, p_P, width)
    delta_at_T = ((row.to(tl.int64) * chunks + k) * heads + h) * T + tl.arange(0, T)
    gm_ST = tl.dot(gy_TP, tl.trans(v_TP), input_precision=PRECISION)
    tl.store(gdelta_ptr + delta_at_T, tl.sum(tl.where(s_T[:, None] == s_T[None, :], gm_ST, 0.0), axis=1))
    if PACKED:
        own_T = tl.load(segments_ptr + row * length + t_T, mask=known_T, other=0)
        gm_ST = tl.where(own_T[:, None] == own_T[None, :], gm_ST, 0.0)
    m_ST = tl.zeros((T, T), tl.float32)
    for d in range(DIRECTIONS):
        c_TN, b_TN, dt_T, sum_T, read_T, at_T = _of_direction(
            d, c_ptr, b_ptr, dt_ptr, sum_ptr, read_ptr, row, k, h, t_T, known_T, n_N, heads, each, state, chunks,
            c_b, c_l, c_d, c_g, b_b, b_l, b_d, b_g, DIRECTIONS, SHARED, T,
        )  # fmt: skip
        decay_ST = _decay(sum_T, d, T)
        cb_ST = tl.dot(c_TN, tl.trans(b_TN), input_precision=PRECISION) * decay_ST
        m_ST += cb_ST * dt_T[None, :]
        cb_ST *= gm_ST
        gdt_T, row_T = tl.sum(cb_ST, axis=0), tl.sum(cb_ST * dt_T[None, :], axis=1)
        tl.store(gdt_ptr + at_T, gdt_T)
        tl.store(gsum_ptr + at_T, (row_T - gdt_T * dt_T) * (1 - 2 * d))
        gcb_ST = (gm_ST * decay_ST * dt_T[None, :]).to(c_TN.dtype)
        own_at_T = (((row.to(tl.int64) * length + t_T) * DIRECTIONS + d) * heads + h) * state
        own_TN = known_T[:, None] & (n_N < state)[None, :]
        h_NP = _state(h_ptr, row, k, 0, d, h, chunks, heads, state, width, n_N, p_P, DIRECTIONS)
        seen_TN = tl.dot(gy_TP, tl.trans(h_NP), input_precision=PRECISION)
        tl.store(gread_ptr + at_T, tl.sum(seen_TN * c_TN, axis=1))
        gc_TN = tl.dot(gcb_ST, b_TN, input_precision=PRECISION) + seen_TN * read_T[:, None]
        tl.store(gc_ptr + own_at_T[:, None] + n_N[None, :], gc_TN, mask=own_TN)
        gs_NP = _state(gs_ptr, row, k, chunks - 1, d, h, chunks, heads, state, width, n_N, p_P, DIRECTIONS)
        said_TN = tl.dot(v_TP, tl.trans(gs_NP), input_precision=PRECISION)
        tl.store(gwrite_ptr + at_T, tl.sum(said_TN * b_TN, axis=1))
        gb_TN = tl.dot(tl.trans(gcb_ST), c_TN, input_precision=PRECISION)
        gb_TN += said_TN * tl.load(write_ptr + at_T)[:, None]
        tl.store(gb_ptr + own_at_T[:, None] + n_N[None, :], gb_TN, mask=own_TN)
    if PACKED:
        m_ST = tl.where(own_T[:, None] == own_T[None, :], m_ST, 0.0)
    gv_TP = tl.dot(tl.trans(m_ST).to(v_TP.dtype), gy_TP, input_precision=PRECISION)
    gv_TP += _matrix(gy_ptr, v_at_T, known_T, p_P, width).to(tl.float32) * tl.load(delta_ptr + delta_at_T)[:, None]
    for d in range(DIRECTIONS):
        b_ptr_d = b_ptr + row.to(tl.int64) * b_b + h // each * b_g + (0 if SHARED else d * b_d)
        b_TN = _matrix(b_ptr_d, t_T * b_l, known_T, n_N, state)
        write_T = tl.load(write_ptr + (((row.to(tl.int64) * chunks + k) * DIRECTIONS + d) * heads + h) * T + s_T)
        gs_NP = _state(gs_ptr, row, k, chunks - 1, d, h, chunks, heads, state, width, n_N, p_P, DIRECTIONS)
        gv_TP += tl.dot((b_TN * write_T[:, None]).to(v_TP.dtype), gs_NP, input_precision=PRECISION)
    tl.store(gv_ptr + v_at_T[:, None] + p_P[None, :], gv_TP, mask=known_T[:, None] & (p_P < width)[None, :])
