"""The programs of scan_blocks.py: what one of them does with one block, or one tile of the states, of one head.

Each is there for M and, turned, for its transpose, of which b is what c is of M: it reads what M has written.
Axes: B batch, L length, H heads, P head width, E a tile of it, N state, G groups, D direction (0 forward, 1 backward;
of c and b 1 if both share), K chunks, C places of a chunk, T places of the own block, S of another one.
"""

import triton
import triton.language as tl

from bench.kernels.scan_tiles import SIZES, _matrix, _state


@triton.jit(do_not_specialize=SIZES)
def carried(
    x_ptr, weight_ptr, v_ptr, decay_ptr, h_ptr, other_ptr, part_ptr,
    length, heads, each, state, width, chunks, x_b, x_l, x_d, x_g,
    SHARED: tl.constexpr, TURNED: tl.constexpr, BLOCKS: tl.constexpr, T: tl.constexpr, N: tl.constexpr,
    E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What enters each chunk, h_k = decay_{k-1} h_{k-1} + sum of weight_t x_t v_t^T over chunk k - 1, for direction 1
    from the other end. Turned, it goes the other way round, and sums up h times the other states: decay's gradient."""
    row, h, d, directions = tl.program_id(0) // heads, tl.program_id(0) % heads, tl.program_id(1), tl.num_programs(1)
    row = row.to(tl.int64)
    n_N, e_E = tl.arange(0, N), tl.program_id(2) * E + tl.arange(0, E)
    kept_NE = (n_N < state)[:, None] & (e_E < width)[None, :]
    state_NE = tl.zeros((N, E), tl.float32)
    x_at = x_ptr + row * x_b + h // each * x_g + (0 if SHARED else d * x_d)
    falling = 1 - d if TURNED else d
    for step in range(chunks):
        k = step + falling * (chunks - 1 - 2 * step)
        at = ((row * chunks + k) * directions + d) * heads + h
        tile_NE = at * state * width + n_N[:, None] * width + e_E[None, :]
        tl.store(h_ptr + tile_NE, state_NE, mask=kept_NE)
        if TURNED:
            other_NE = tl.load(other_ptr + tile_NE, mask=kept_NE, other=0.0).to(tl.float32)
            tl.store(part_ptr + at * tl.num_programs(2) + tl.program_id(2), tl.sum(other_NE * state_NE))
        state_NE *= tl.load(decay_ptr + at)
        for block in tl.static_range(BLOCKS):
            t_T = (k * BLOCKS + block) * T + tl.arange(0, T)
            v_TE = _matrix(v_ptr, ((row * length + t_T) * heads + h) * width, t_T < length, e_E, width)
            x_TN = _matrix(x_at, t_T * x_l, t_T < length, n_N, state)
            weight_T = tl.load(weight_ptr + (at * BLOCKS + block) * T + tl.arange(0, T))
            x_TN = (x_TN.to(tl.float32) * weight_T[:, None]).to(v_TE.dtype)
            state_NE += tl.dot(tl.trans(x_TN), v_TE, input_precision=PRECISION)


@triton.jit
def _place(heads, blocks):
    """Which row and head, and which block of the row. One axis: a grid's others end at 65,535."""
    of_row = tl.program_id(0) // blocks
    return (of_row // heads).to(tl.int64), of_row % heads, tl.program_id(0) % blocks


@triton.jit
def _known(o, length, T: tl.constexpr):
    """Places of a block, and which of them the row has."""
    t_T = o * T + tl.arange(0, T)
    return t_T, t_T < length


@triton.jit
def _small(row, o, d, h, chunks, heads, DIRECTIONS: tl.constexpr, BLOCKS: tl.constexpr, T: tl.constexpr):
    """Where the numbers of a block's places lie in B K D H C."""
    at = ((row * chunks + o // BLOCKS) * DIRECTIONS + d) * heads + h
    return (at * BLOCKS + o % BLOCKS) * T + tl.arange(0, T)


@triton.jit
def _reach(o, way, blocks, BLOCKS: tl.constexpr):
    """The blocks that block o reads, itself and those of its chunk before it (way 0) or after: from, to (without)."""
    first = o // BLOCKS * BLOCKS
    return tl.where(way == 0, first, o), tl.where(way == 0, o + 1, tl.minimum(first + BLOCKS, blocks))


@triton.jit
def _decay(own_T, other_S, t_T, s_S, way):
    """Products of A between places of the own block (rows) and those before them (way 0) or after them; else 0."""
    sign = 1 - 2 * way
    kept_TS = (t_T[:, None] - s_S[None, :]) * sign > 0
    return tl.where(kept_TS, tl.exp(tl.where(kept_TS, (own_T[:, None] - other_S[None, :]) * sign, 0.0)), 0.0)


@triton.jit
def _same(segments_ptr, row, length, t_T, s_S):
    """Which places are of one document."""
    own_T = tl.load(segments_ptr + row * length + t_T, mask=t_T < length, other=0)
    return own_T[:, None] == tl.load(segments_ptr + row * length + s_S, mask=s_S < length, other=0)[None, :]


@triton.jit(do_not_specialize=SIZES)
def products(
    x_ptr, a_ptr, e_ptr, dt_ptr, sum_ptr, weight_ptr, delta_ptr, h_ptr, segments_ptr, y_ptr,
    length, heads, each, state, width, chunks, a_b, a_l, a_d, a_g, e_b, e_l, e_d, e_g,
    TURNED: tl.constexpr, DIRECTIONS: tl.constexpr, SHARED: tl.constexpr, PACKED: tl.constexpr, STATES: tl.constexpr,
    BLOCKS: tl.constexpr, T: tl.constexpr, N: tl.constexpr, E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """M x of one block, head and tile, or its transpose times x: from its chunk and from what enters that."""
    row, h, o = _place(heads, chunks * BLOCKS)
    blocks, n_N, e_E = tl.cdiv(length, T), tl.arange(0, N), tl.program_id(1) * E + tl.arange(0, E)
    t_T, known_T = _known(o, length, T)
    at_T = ((row * length + t_T) * heads + h) * width
    delta_T = tl.load(delta_ptr + _small(row, o, 0, h, chunks, heads, 1, BLOCKS, T))
    y_TE = _matrix(x_ptr, at_T, known_T, e_E, width).to(tl.float32) * delta_T[:, None]
    for d in range(DIRECTIONS):
        a_at = a_ptr + row * a_b + h // each * a_g + (0 if SHARED else d * a_d)
        e_at = e_ptr + row * e_b + h // each * e_g + (0 if SHARED else d * e_d)
        own_T = _small(row, o, d, h, chunks, heads, DIRECTIONS, BLOCKS, T)
        a_TN, sum_T = _matrix(a_at, t_T * a_l, known_T, n_N, state), tl.load(sum_ptr + own_T)
        way = 1 - d if TURNED else d
        begin, end = _reach(o, way, blocks, BLOCKS)
        for q in range(begin, end):
            s_S, there_S = _known(q, length, T)
            other_S = _small(row, q, d, h, chunks, heads, DIRECTIONS, BLOCKS, T)
            e_SN = _matrix(e_at, s_S * e_l, there_S, n_N, state)
            x_SE = _matrix(x_ptr, ((row * length + s_S) * heads + h) * width, there_S, e_E, width)
            m_TS = tl.dot(a_TN, tl.trans(e_SN), input_precision=PRECISION)
            m_TS *= _decay(sum_T, tl.load(sum_ptr + other_S), t_T, s_S, way)
            m_TS *= tl.load(dt_ptr + own_T)[:, None] if TURNED else tl.load(dt_ptr + other_S)[None, :]
            if PACKED:
                m_TS = tl.where(_same(segments_ptr, row, length, t_T, s_S), m_TS, 0.0)
            y_TE += tl.dot(m_TS.to(x_SE.dtype), x_SE, input_precision=PRECISION)
        if STATES:
            h_NE = _state(h_ptr, row, o // BLOCKS, d, h, chunks, heads, state, width, n_N, e_E, DIRECTIONS)
            weighted_TN = (a_TN * tl.load(weight_ptr + own_T)[:, None]).to(h_NE.dtype)
            y_TE += tl.dot(weighted_TN, h_NE, input_precision=PRECISION)
    tl.store(y_ptr + at_T[:, None] + e_E[None, :], y_TE, mask=known_T[:, None] & (e_E < width)[None, :])


@triton.jit(do_not_specialize=SIZES)
def factors(
    u_ptr, x_ptr, a_ptr, e_ptr, dt_ptr, sum_ptr, weight_ptr, h_ptr, segments_ptr,
    ga_ptr, gsum_ptr, gweight_ptr, gdelta_ptr, gdt_ptr,
    length, heads, each, state, width, chunks, a_b, a_l, a_d, a_g, e_b, e_l, e_d, e_g,
    SHARE: tl.constexpr, TURNED: tl.constexpr, DIRECTIONS: tl.constexpr, SHARED: tl.constexpr, PACKED: tl.constexpr,
    STATES: tl.constexpr, BLOCKS: tl.constexpr, T: tl.constexpr, N: tl.constexpr, P: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one block and of heads that share c and b: of c, of what they read from states and of delta, where u
    is y's and x is v; turned, of b, of what they write to states and of dt, where u is v and x is y's. Of the sums the
    first leaves the part of the reading places, which the second completes."""
    row, some, o = _place(heads // SHARE, chunks * BLOCKS)
    blocks, n_N, p_P = tl.cdiv(length, T), tl.arange(0, N), tl.arange(0, P)
    t_T, known_T = _known(o, length, T)
    for d in range(DIRECTIONS):
        group = some * SHARE // each
        a_at = a_ptr + row * a_b + group * a_g + (0 if SHARED else d * a_d)
        e_at = e_ptr + row * e_b + group * e_g + (0 if SHARED else d * e_d)
        a_TN, ga_TN = _matrix(a_at, t_T * a_l, known_T, n_N, state), tl.zeros((T, N), tl.float32)
        way = 1 - d if TURNED else d
        begin, end = _reach(o, way, blocks, BLOCKS)
        for h in range(some * SHARE, some * SHARE + SHARE):
            at_T = ((row * length + t_T) * heads + h) * width
            own_T = _small(row, o, d, h, chunks, heads, DIRECTIONS, BLOCKS, T)
            u_TP, sum_T = _matrix(u_ptr, at_T, known_T, p_P, width), tl.load(sum_ptr + own_T)
            inner_TN = tl.zeros((T, N), tl.float32)
            for q in range(begin, end):
                s_S, there_S = _known(q, length, T)
                other_S = _small(row, q, d, h, chunks, heads, DIRECTIONS, BLOCKS, T)
                x_SP = _matrix(x_ptr, ((row * length + s_S) * heads + h) * width, there_S, p_P, width)
                e_SN = _matrix(e_at, s_S * e_l, there_S, n_N, state)
                g_TS = tl.dot(u_TP, tl.trans(x_SP), input_precision=PRECISION)
                g_TS *= _decay(sum_T, tl.load(sum_ptr + other_S), t_T, s_S, way)
                g_TS *= tl.load(dt_ptr + own_T)[:, None] if TURNED else tl.load(dt_ptr + other_S)[None, :]
                if PACKED:
                    g_TS = tl.where(_same(segments_ptr, row, length, t_T, s_S), g_TS, 0.0)
                inner_TN += tl.dot(g_TS.to(e_SN.dtype), e_SN, input_precision=PRECISION)
            part_T = tl.sum(inner_TN * a_TN, axis=1)
            if TURNED:
                dt_T = tl.load(dt_ptr + own_T)
                tl.store(gdt_ptr + own_T, tl.where(dt_T == 0.0, 0.0, part_T / tl.where(dt_T == 0.0, 1.0, dt_T)))
                part_T = (tl.load(gsum_ptr + own_T) - part_T) * (1 - 2 * d)
            elif d == 0:
                gdelta_T = tl.sum(u_TP.to(tl.float32) * _matrix(x_ptr, at_T, known_T, p_P, width), axis=1)
                tl.store(gdelta_ptr + _small(row, o, 0, h, chunks, heads, 1, BLOCKS, T), gdelta_T)
            tl.store(gsum_ptr + own_T, part_T)
            ga_TN += inner_TN
            if STATES:
                h_NP = _state(h_ptr, row, o // BLOCKS, d, h, chunks, heads, state, width, n_N, p_P, DIRECTIONS)
                seen_TN = tl.dot(u_TP, tl.trans(h_NP), input_precision=PRECISION)
                tl.store(gweight_ptr + own_T, tl.sum(seen_TN * a_TN, axis=1))
                ga_TN += seen_TN * tl.load(weight_ptr + own_T)[:, None]
        ga_at_T = (((row * length + t_T) * DIRECTIONS + d) * (heads // SHARE) + some) * state
        tl.store(ga_ptr + ga_at_T[:, None] + n_N[None, :], ga_TN, mask=known_T[:, None] & (n_N < state)[None, :])
