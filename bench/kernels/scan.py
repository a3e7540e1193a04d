"""The chunked scans of both directions, or of one, without flips and without a matrix in memory.

    i > j: M_ij = c_i^T A_i .. A_{j+1} dt_j b_j      i = j: M_ii = delta_i
    i < j: M_ij = c'_i^T A'_i .. A'_{j-1} dt'_j b'_j, the primes for direction 1
The matrix of a chunk lives on the chip, c_i^T b_j exp2(row_i - column_j) of the direction in which i reads j: its
scores c^T b are those of all heads that share c and b. Between chunks go states of N x P numbers a head; a row of one
chunk has none. `scan` prepares what has no channels (sums of log A, weights, borders of documents) in plain torch,
which has its gradient; the operator `chunk_products` does the rest. Its gradient is a pass with the matrix transposed,
the states' adjoint scan, what these and the states of before give c and b, and what the matrix gives them.
Axes: B batch, L length, H heads, P head width, N state, G groups, D direction (0 forward, 1 backward; of c and b 1 if
both share), K chunks, T places of a chunk, I parts of a state, or of the heads that share c and b.
"""

import math

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from bench.kernels import precision
from bench.kernels.scan_gradients import heard, products_back
from bench.kernels.scan_tiles import carried, carry, carry_back, products, states

CHUNK = 64
WHOLE = 128
"""A row of up to so many tokens is one chunk: its states would cost more than the larger matrix."""
TILE = 64
"""Places at once, of the gradients."""
FEW = 2
"""Chunks of a row that need no carrying: what enters one is what the other says."""
SERIAL, SMALL = 32, 8192
"""Chunks of a row through which one program carries a state of so many numbers. In longer rows programs that take a
chunk each are faster, though what they say is written, and read again to be carried."""
BLOCK = 1024
"""Numbers of a state that one program then carries from chunk to chunk."""
PROGRAMS, PROGRAMS_HEARD = 256, 768
"""That are enough: each takes as many of the heads that share c and b as leave so many. Scores are made once for its
heads, and the gradients of c and b summed over them on the chip."""
ROOM, LARGE = 1024, 384
"""Bytes of a token's v and c together, as the chip counts them: from the former on a program may need more shared
memory than an H200 has; with more than the latter one has numbers of one head at a time, and more threads."""
NARROW = 64
"""States and heads of at least as much are multiplied by whole instructions. With such a state and a narrower head the
assembler of Triton 3.6 (ptxas 12.8) loses the address of the state: what chunks read of it was wrong by a third on an
H200, or lay outside all memory. benchmarks/compiled.py finds such addresses; 12.9 has none."""
WARPS, WARPS_LARGE = 4, 8
"""The latter also where a long chunk meets a wide head."""
STAGES, STAGES_WHOLE, STAGES_BACK, STAGES_CARRIED = 2, 3, 3, 3
"""Heads, or chunks of `carried`, whose numbers are on the chip or on their way to it."""
REGISTERS = 168
"""Of a thread of `heard`, so that an H200 has room for three programs."""


def scan(
    v_BLHP: Tensor,
    c_BLDGN: Tensor,
    b_BLDGN: Tensor,
    dt_BLDH: Tensor,
    rate_BLDH: Tensor,
    delta_BLH: Tensor,
    segments_BL: Tensor,
    packed: bool,
) -> Tensor:
    """M v, BLHP in the dtype of v, which is zero on padding; directions: as many as `rate` (log A, negative) has, and
    dt, positive.

    With one direction M is the strict lower triangle and the diagonal.
    """
    batch, chunk = len(v_BLHP), _chunk(v_BLHP, c_BLDGN.shape[-1])
    rate_BKDHT, dt_BKDHT = (_cut(x.expand(batch, -1, -1, -1), chunk) for x in (rate_BLDH, dt_BLDH))
    sum_BKDHT = rate_BKDHT.cumsum(-1)
    total_BKDH1 = sum_BKDHT[..., -1:]
    forward_BKHT, total_BKH1 = sum_BKDHT[:, :, 0], total_BKDH1[:, :, 0]
    rows, reads, writes = [forward_BKHT], [forward_BKHT], [total_BKH1 - forward_BKHT]
    if rate_BLDH.shape[2] == 2:
        backward_BKHT = (sum_BKDHT - rate_BKDHT)[:, :, 1]
        rows.append(-backward_BKHT)
        reads.append(total_BKDH1[:, :, 1] - backward_BKHT)
        writes.append(backward_BKHT)
    read_BKDHT, write_BKDHT = torch.stack(reads, 2).exp(), torch.stack(writes, 2).exp() * dt_BKDHT
    row_BKDHT = torch.stack(rows, 2) / math.log(2)
    column_BKDHT = row_BKDHT - dt_BKDHT.clamp(min=torch.finfo(dt_BKDHT.dtype).tiny).log2()
    decay_BKDH = total_BKDH1[..., 0].exp()
    if packed:
        enters_BKDT, leaves_BKDT, through_BKD = _borders(_cut(segments_BL, chunk), rate_BLDH.shape[2])
        read_BKDHT, write_BKDHT = read_BKDHT * enters_BKDT[..., None, :], write_BKDHT * leaves_BKDT[..., None, :]
        decay_BKDH = decay_BKDH * through_BKD[..., None]
    c_BLDGN, b_BLDGN = (x.to(v_BLHP.dtype).expand(batch, *x.shape[1:]) for x in (c_BLDGN, b_BLDGN))
    small = row_BKDHT, column_BKDHT, write_BKDHT, read_BKDHT, _cut(delta_BLH.expand(batch, -1, -1), chunk)
    return chunk_products(v_BLHP, c_BLDGN, b_BLDGN, *small, decay_BKDH, segments_BL, packed)[0]


def takes(v_BLHP: Tensor, state: int) -> bool:
    """Whether heads so wide, with so large a state, fit on the chip: elsewhere a mixer has its plain scan."""
    return sum(_padded(v_BLHP.shape[-1], state)) * v_BLHP.element_size() < ROOM


def _padded(width: int, state: int) -> tuple[int, int]:
    """As programs count: powers of two, and enough for a product."""
    p, n = (max(16, triton.next_power_of_2(size)) for size in (width, state))
    return max(p, NARROW) if n >= NARROW else p, n


def _large(v_BLHP: Tensor, state: int) -> bool:
    return sum(_padded(v_BLHP.shape[-1], state)) * v_BLHP.element_size() > LARGE


def _chunk(v_BLHP: Tensor, state: int) -> int:
    """Tokens of a chunk: a long one has no room for numbers of 32 bits."""
    whole = CHUNK < v_BLHP.shape[1] <= WHOLE and v_BLHP.element_size() < 4 and not _large(v_BLHP, state)
    return WHOLE if whole else CHUNK


def _cut(x_BL: Tensor, chunk: int) -> Tensor:
    """BL... into chunks BK...T, the last filled up with zeros: what a program reads of them lies side by side."""
    filled_BL = F.pad(x_BL, (0, 0) * (x_BL.ndim - 2) + (0, -x_BL.shape[1] % chunk))
    return filled_BL.unflatten(1, (-1, chunk)).movedim(2, -1).contiguous()


def _borders(segments_BKT: Tensor, directions: int) -> tuple[Tensor, Tensor, Tensor]:
    """Whether a token reads what enters its chunk, whether it writes what the next chunk reads, whether a state goes on
    through the chunk to the next one: BKDT, BKDT, BKD. What enters a chunk is of its first token's document."""
    first_BK1, last_BK1 = segments_BKT[..., :1], segments_BKT[..., -1:]
    next_BK1 = F.pad(first_BK1[:, 1:], (0, 0, 0, 1), value=-1)
    before_BK1 = F.pad(last_BK1[:, :-1], (0, 0, 1, 0), value=-1)
    first_BKT, final_BKT = segments_BKT == first_BK1, segments_BKT == last_BK1
    onward_BK1, back_BK1 = last_BK1 == next_BK1, first_BK1 == before_BK1
    whole_BK1 = first_BK1 == last_BK1
    enters, leaves = [first_BKT, final_BKT], [final_BKT & onward_BK1, first_BKT & back_BK1]
    through = [(whole_BK1 & onward_BK1)[..., 0], (whole_BK1 & back_BK1)[..., 0]]
    return tuple(torch.stack(x[:directions], 2) for x in (enters, leaves, through))


def _sizes(v_BLHP: Tensor, c_BLDGN: Tensor, row_BKDHT: Tensor) -> dict:
    """What all kernels take of shapes and precision."""
    _, length, heads, width = v_BLHP.shape
    state, groups = c_BLDGN.shape[-1], c_BLDGN.shape[-2]
    p, n = _padded(width, state)
    return {
        "ints": (length, heads, heads // groups, state, width, row_BKDHT.shape[1]),
        "SHARED": c_BLDGN.shape[2] == 1,
        "T": row_BKDHT.shape[-1],
        "N": n,
        "P": p,
        "PRECISION": precision(v_BLHP.dtype),
        "num_warps": WARPS_LARGE if _large(v_BLHP, state) else WARPS,
    }


def _part(row_BKDHT: Tensor, c_BLDGN: Tensor, programs: int) -> tuple[int, int]:
    """Heads that one program of a chunk takes, of those that share c and b, and programs of a chunk."""
    batch, chunks, _, heads, _ = row_BKDHT.shape
    groups = c_BLDGN.shape[-2]
    each = heads // groups
    size = triton.cdiv(each, min(each, triton.cdiv(programs, max(1, batch * chunks * groups))))
    return size, groups * triton.cdiv(each, size)


def _room(v_BLHP: Tensor, c_BLDGN: Tensor, decay_BKDH: Tensor) -> Tensor:
    """For what enters the chunks, BKDHNP; none if there is but one."""
    shape = (*decay_BKDH.shape, c_BLDGN.shape[-1], v_BLHP.shape[-1])
    return v_BLHP.new_empty(shape if decay_BKDH.shape[1] > 1 else 0)


def _entering(
    x_BLDGN: Tensor, weight_BKDHT: Tensor, v_BLHP: Tensor, decay_BKDH: Tensor, h_BKDHNP: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What enters each chunk, BKDHNP: sums over those before it of weight x v^T, carried on; unwritten where nothing
    does. With h, of the forward pass, the same from the other end, and the gradient of decay, BKDH."""
    s_BKDHNP, gdecay_BKDH = _room(v_BLHP, x_BLDGN, decay_BKDH), torch.zeros_like(decay_BKDH)
    batch, chunks, directions, heads = decay_BKDH.shape
    if chunks == 1:
        return s_BKDHNP, gdecay_BKDH
    sizes, back, large = _sizes(v_BLHP, x_BLDGN, weight_BKDHT), h_BKDHNP is not None, _large(v_BLHP, x_BLDGN.shape[-1])
    ints, strides, size = sizes.pop("ints"), x_BLDGN.stride()[:4], s_BKDHNP.shape[-2] * s_BKDHNP.shape[-1]
    given = x_BLDGN, weight_BKDHT, v_BLHP, s_BKDHNP
    if chunks <= SERIAL and size <= SMALL:
        carried[batch * heads, directions](
            *given, decay_BKDH, h_BKDHNP if back else s_BKDHNP, gdecay_BKDH, *ints, *strides, BACK=back,
            num_stages=1 if large else STAGES_CARRIED, **sizes,
        )  # fmt: skip
        return s_BKDHNP, gdecay_BKDH
    states[(chunks - 1) * batch * heads, directions](*given, *ints, *strides, BACK=back, **sizes)
    if chunks > FEW:
        grid = batch * heads, directions, triton.cdiv(size, BLOCK)
        if not back:
            carry[grid](s_BKDHNP, decay_BKDH, heads, size, K=chunks, BLOCK=BLOCK)
            return s_BKDHNP, gdecay_BKDH
        part_BKDHI = decay_BKDH.new_zeros(*decay_BKDH.shape, grid[-1])
        carry_back[grid](s_BKDHNP, h_BKDHNP, decay_BKDH, part_BKDHI, heads, size, K=chunks, BLOCK=BLOCK)
        gdecay_BKDH = part_BKDHI.sum(-1)
    return s_BKDHNP, gdecay_BKDH


def _products(
    v_BLHP: Tensor,
    c_BLDGN: Tensor,
    b_BLDGN: Tensor,
    small: list[Tensor],
    delta_BKHT: Tensor,
    h_BKDHNP: Tensor,
    segments_BL: Tensor,
    packed: bool,
    back: bool,
) -> Tensor:
    """M v, or with `back` its transpose by v; small: row, column and read, or with `back` write."""
    batch, chunks, directions, _, chunk = small[0].shape
    y_BLHP, sizes = torch.empty_like(v_BLHP), _sizes(v_BLHP, c_BLDGN, small[0])
    ints, (size, parts) = sizes.pop("ints"), _part(small[0], c_BLDGN, PROGRAMS)
    stages = STAGES_WHOLE if chunk > CHUNK else 1 if _large(v_BLHP, c_BLDGN.shape[-1]) else STAGES
    if chunk > CHUNK and sizes["P"] > 64:
        sizes["num_warps"] = WARPS_LARGE
    products[chunks * batch * parts,](
        v_BLHP, c_BLDGN, b_BLDGN, *small, delta_BKHT, h_BKDHNP, segments_BL, y_BLHP,
        *ints, size, *c_BLDGN.stride()[:4], *b_BLDGN.stride()[:4],
        BACK=back, ALONE=chunks == 1, BOTH=directions == 2, PACKED=packed,
        num_stages=stages, **sizes,
    )  # fmt: skip
    return y_BLHP


@torch.library.custom_op("mixerbench::chunk_products", mutates_args=())
def chunk_products(
    v_BLHP: Tensor,
    c_BLDGN: Tensor,
    b_BLDGN: Tensor,
    row_BKDHT: Tensor,
    column_BKDHT: Tensor,
    write_BKDHT: Tensor,
    read_BKDHT: Tensor,
    delta_BKHT: Tensor,
    decay_BKDH: Tensor,
    segments_BL: Tensor,
    packed: bool,
) -> tuple[Tensor, Tensor]:
    """y_BLHP, and what enters the chunks, BKDHNP, unwritten where nothing does. row, column, write, read and delta are
    of whole chunks and fp32."""
    small = (row_BKDHT, column_BKDHT, write_BKDHT, read_BKDHT)
    v_BLHP, c_BLDGN, b_BLDGN, delta_BKHT, decay_BKDH, segments_BL, *small = _laid_out(
        v_BLHP, c_BLDGN, b_BLDGN, delta_BKHT, decay_BKDH, segments_BL, *small
    )
    row_BKDHT, column_BKDHT, write_BKDHT, read_BKDHT = small
    h_BKDHNP, _ = _entering(b_BLDGN, write_BKDHT, v_BLHP, decay_BKDH, None)
    given = v_BLHP, c_BLDGN, b_BLDGN, [row_BKDHT, column_BKDHT, read_BKDHT], delta_BKHT, h_BKDHNP, segments_BL
    return _products(*given, packed, back=False), h_BKDHNP


@torch.library.custom_op("mixerbench::chunk_products_backward", mutates_args=())
def chunk_products_backward(
    gy_BLHP: Tensor,
    v_BLHP: Tensor,
    c_BLDGN: Tensor,
    b_BLDGN: Tensor,
    row_BKDHT: Tensor,
    column_BKDHT: Tensor,
    write_BKDHT: Tensor,
    read_BKDHT: Tensor,
    delta_BKHT: Tensor,
    decay_BKDH: Tensor,
    segments_BL: Tensor,
    h_BKDHNP: Tensor,
    packed: bool,
) -> list[Tensor]:
    """Gradients of v, c, b, row, column, write, read, delta and decay."""
    gy_BLHP, small = gy_BLHP.contiguous(), (row_BKDHT, column_BKDHT, write_BKDHT, read_BKDHT)
    v_BLHP, c_BLDGN, b_BLDGN, delta_BKHT, decay_BKDH, segments_BL, *small = _laid_out(
        v_BLHP, c_BLDGN, b_BLDGN, delta_BKHT, decay_BKDH, segments_BL, *small
    )
    row_BKDHT, column_BKDHT, write_BKDHT, read_BKDHT = small
    batch, chunks, directions, _ = decay_BKDH.shape
    gs_BKDHNP, gdecay_BKDH = _entering(c_BLDGN, read_BKDHT, gy_BLHP, decay_BKDH, h_BKDHNP)
    given = gy_BLHP, c_BLDGN, b_BLDGN, [row_BKDHT, column_BKDHT, write_BKDHT], delta_BKHT, gs_BKDHNP, segments_BL
    gv_BLHP, sizes = _products(*given, packed, back=True), _sizes(v_BLHP, c_BLDGN, row_BKDHT)
    ints, (size, parts) = sizes.pop("ints"), _part(row_BKDHT, c_BLDGN, PROGRAMS_HEARD if chunks > 1 else PROGRAMS)
    grid, large = (chunks * batch * parts,), _large(v_BLHP, c_BLDGN.shape[-1])
    sizes["BOTH"] = directions == 2
    gc_BLDIN, gb_BLDIN = (v_BLHP.new_empty(*c_BLDGN.shape[:3], parts, c_BLDGN.shape[-1]) for _ in range(2))
    gwrite_BKDHT, gread_BKDHT = torch.zeros_like(write_BKDHT), torch.zeros_like(read_BKDHT)
    if chunks > 1:
        for back, sides in enumerate((
            (gy_BLHP, c_BLDGN, read_BKDHT, h_BKDHNP, gc_BLDIN, gread_BKDHT),
            (v_BLHP, b_BLDGN, write_BKDHT, gs_BKDHNP, gb_BLDIN, gwrite_BKDHT),
        )):  # fmt: skip
            heard[grid](
                *sides, *ints, size, *sides[1].stride()[:4], BACK=bool(back),
                num_stages=1 if large else STAGES, maxnreg=None if large else REGISTERS, **sizes,
            )  # fmt: skip
    grow_BKDHT, gcolumn_BKDHT, gdelta_BKHT = (torch.empty_like(x) for x in (row_BKDHT, column_BKDHT, delta_BKHT))
    products_back[grid](
        gy_BLHP, v_BLHP, c_BLDGN, b_BLDGN, row_BKDHT, column_BKDHT, gc_BLDIN, gb_BLDIN,
        grow_BKDHT, gcolumn_BKDHT, gdelta_BKHT, segments_BL,
        *ints, size, *c_BLDGN.stride()[:4], *b_BLDGN.stride()[:4], ALONE=chunks == 1, PACKED=packed,
        S=min(TILE, sizes["T"]), num_stages=1 if large else STAGES_BACK, **sizes,
    )  # fmt: skip
    grouped = (x.unflatten(3, (c_BLDGN.shape[3], -1)).sum(4, dtype=torch.float32) for x in (gc_BLDIN, gb_BLDIN))
    return [
        gv_BLHP, *grouped, grow_BKDHT, gcolumn_BKDHT, gwrite_BKDHT, gread_BKDHT, gdelta_BKHT, gdecay_BKDH
    ]  # fmt: skip


def _laid_out(v_BLHP: Tensor, c_BLDGN: Tensor, b_BLDGN: Tensor, *others: Tensor) -> list[Tensor]:
    """As the programs read them: whole in memory, but for c and b, whose states alone must lie side by side."""
    sides = (x if x.stride(-1) == 1 else x.contiguous() for x in (c_BLDGN, b_BLDGN))
    return [v_BLHP.contiguous(), *sides, *(x.contiguous() for x in others)]


@chunk_products.register_fake
def _(v, c, b, row, column, write, read, delta, decay, segments, packed):
    return v.new_empty(v.shape), _room(v, c, decay)


@chunk_products_backward.register_fake
def _(gy, v, c, b, row, column, write, read, delta, decay, segments, h, packed):
    small = [x.new_empty(x.shape) for x in (row, column, write, read, delta, decay)]
    both = [v.new_empty(x.shape, dtype=torch.float32) for x in (c, b)]
    return [v.new_empty(v.shape), *both, *small]


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:10], output[1])
    ctx.packed = inputs[10]


def _gradients(ctx, gy_BLHP, gh_BKDHNP):
    """The states are no result of their own: they have no gradient."""
    saved = ctx.saved_tensors
    found = chunk_products_backward(gy_BLHP, *saved, ctx.packed)
    return *(g.to(x.dtype) for g, x in zip(found, saved, strict=False)), None, None


chunk_products.register_autograd(_gradients, setup_context=_keep)
