"""The chunked scans of both directions, or of one, without flips and without a matrix in memory.

    i > j: M_ij = c_i^T A_i .. A_{j+1} dt_j b_j      i = j: M_ii = delta_i
    i < j: M_ij = c'_i^T A'_i .. A'_{j-1} dt'_j b'_j, the primes for direction 1
The matrix of a chunk lives on the chip; between chunks go states of N x P numbers a head: none in a row of one chunk,
and in one of two what each says to the other, which nothing carries. `scan` prepares what has no channels (sums of
log A, weights, borders of documents) in plain torch, which has its gradient; the operator `chunk_products` does the
rest, and its gradient is one more pass beside the states' adjoint scan.
Axes: B batch, L length, H heads, P head width, N state, G groups, D direction (0 forward, 1 backward; of c and b 1 if
both share), K chunks, T places of a chunk, I shares of a state.
"""

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from bench.kernels import precision
from bench.kernels.scan_tiles import carry, carry_back, products, products_back, states

CHUNK = 64
FEW = 2
"""Chunks of a row that need no carrying: what enters one is what the other says."""
BLOCK = 1024
"""Numbers of a state that one program carries from chunk to chunk."""
WARPS, WARPS_BACK = 4, 4
"""Of `products` and `products_back`; with eight the latter took twice as long on an H200."""
ROOM = 1024
"""Bytes of a token's v and c together, as the chip counts them, from which on a program of the gradients may need more
shared memory than an H200 has."""
NARROW = 64
"""States and heads of at least as much are multiplied by whole instructions. With such a state and a narrower head the
assembler of Triton 3.6 (ptxas 12.8) loses the address of the state: what chunks read of it was wrong by a third on an
H200, or lay outside all memory. benchmarks/compiled.py finds such addresses; 12.9 has none."""
STAGES, STAGES_BACK = 3, 1
"""Loads in flight; the loop over two directions of `products_back` has no registers for more than its own."""


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
    """M v, BLHP in the dtype of v, which is zero on padding; directions: as many as `rate` (log A, negative) has.

    With one direction M is the strict lower triangle and the diagonal.
    """
    batch = len(v_BLHP)
    rate_BKDHT, dt_BKDHT = (_cut(x.expand(batch, -1, -1, -1)) for x in (rate_BLDH, dt_BLDH))
    sum_BKDHT = rate_BKDHT.cumsum(-1)
    total_BKDH1 = sum_BKDHT[..., -1:]
    forward_BKHT, total_BKH1 = sum_BKDHT[:, :, 0], total_BKDH1[:, :, 0]
    sums, reads, writes = [forward_BKHT], [forward_BKHT], [total_BKH1 - forward_BKHT]
    if rate_BLDH.shape[2] == 2:
        backward_BKHT = (sum_BKDHT - rate_BKDHT)[:, :, 1]
        sums.append(backward_BKHT)
        reads.append(total_BKDH1[:, :, 1] - backward_BKHT)
        writes.append(backward_BKHT)
    read_BKDHT, write_BKDHT = torch.stack(reads, 2).exp(), torch.stack(writes, 2).exp() * dt_BKDHT
    decay_BKDH = total_BKDH1[..., 0].exp()
    if packed:
        enters_BKDT, leaves_BKDT, through_BKD = _borders(_cut(segments_BL), rate_BLDH.shape[2])
        read_BKDHT, write_BKDHT = read_BKDHT * enters_BKDT[..., None, :], write_BKDHT * leaves_BKDT[..., None, :]
        decay_BKDH = decay_BKDH * through_BKD[..., None]
    c_BLDGN, b_BLDGN = (x.to(v_BLHP.dtype).expand(batch, *x.shape[1:]) for x in (c_BLDGN, b_BLDGN))
    small = dt_BKDHT, torch.stack(sums, 2), write_BKDHT, read_BKDHT, _cut(delta_BLH.expand(batch, -1, -1))
    return chunk_products(v_BLHP, c_BLDGN, b_BLDGN, *small, decay_BKDH, segments_BL, packed)[0]


def takes(v_BLHP: Tensor, state: int) -> bool:
    """Whether heads so wide, with so large a state, fit on the chip: elsewhere a mixer has its plain scan."""
    return sum(_padded(v_BLHP.shape[-1], state)) * v_BLHP.element_size() < ROOM


def _padded(width: int, state: int) -> tuple[int, int]:
    """As programs count: powers of two, and enough for a product."""
    p, n = (max(16, triton.next_power_of_2(size)) for size in (width, state))
    return max(p, NARROW) if n >= NARROW else p, n


def _cut(x_BL: Tensor) -> Tensor:
    """BL... into chunks BK...T, the last filled up with zeros: what a program reads of them lies side by side."""
    filled_BL = F.pad(x_BL, (0, 0) * (x_BL.ndim - 2) + (0, -x_BL.shape[1] % CHUNK))
    return filled_BL.unflatten(1, (-1, CHUNK)).movedim(2, -1).contiguous()


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


def _sizes(v_BLHP: Tensor, c_BLDGN: Tensor, decay_BKDH: Tensor) -> dict:
    """What all kernels take of shapes and precision."""
    _, length, heads, width = v_BLHP.shape
    state, groups = c_BLDGN.shape[-1], c_BLDGN.shape[-2]
    p, n = _padded(width, state)
    return {
        "ints": (length, heads, heads // groups, state, width, decay_BKDH.shape[1]),
        "SHARED": c_BLDGN.shape[2] == 1,
        "T": CHUNK,
        "N": n,
        "P": p,
        "PRECISION": precision(v_BLHP.dtype),
    }


def _states_of(x_BLDGN: Tensor, weight_BKDHT: Tensor, v_BLHP: Tensor, decay_BKDH: Tensor, back: bool) -> Tensor:
    """What each chunk says to the next, or back to the one before, kept there: BKDHNP, unwritten where nothing is."""
    sizes = _sizes(v_BLHP, x_BLDGN, decay_BKDH)
    batch, chunks, directions, heads = decay_BKDH.shape
    s_BKDHNP = v_BLHP.new_empty(*decay_BKDH.shape, x_BLDGN.shape[-1], v_BLHP.shape[-1])
    ints = sizes.pop("ints")
    if chunks > 1:
        states[(chunks - 1) * batch * heads, directions](
            x_BLDGN, weight_BKDHT, v_BLHP, s_BKDHNP, *ints, *x_BLDGN.stride()[:4], BACK=back, **sizes
        )
    return s_BKDHNP


def _blocks(s_BKDHNP: Tensor) -> tuple[int, int]:
    """Numbers of a state, and programs that share them."""
    size = s_BKDHNP.shape[-2] * s_BKDHNP.shape[-1]
    return size, triton.cdiv(size, BLOCK)


@torch.library.custom_op("mixerbench::chunk_products", mutates_args=())
def chunk_products(
    v_BLHP: Tensor,
    c_BLDGN: Tensor,
    b_BLDGN: Tensor,
    dt_BKDHT: Tensor,
    sum_BKDHT: Tensor,
    write_BKDHT: Tensor,
    read_BKDHT: Tensor,
    delta_BKHT: Tensor,
    decay_BKDH: Tensor,
    segments_BL: Tensor,
    packed: bool,
) -> tuple[Tensor, Tensor]:
    """y_BLHP, and what enters the chunks, BKDHNP, unwritten where nothing does. dt, sum, write, read and delta are of
    whole chunks and fp32."""
    small = (dt_BKDHT, sum_BKDHT, write_BKDHT, read_BKDHT)
    v_BLHP, c_BLDGN, b_BLDGN, delta_BKHT, decay_BKDH, segments_BL, *small = _laid_out(
        v_BLHP, c_BLDGN, b_BLDGN, delta_BKHT, decay_BKDH, segments_BL, *small
    )
    dt_BKDHT, sum_BKDHT, write_BKDHT, read_BKDHT = small
    batch, chunks, directions, heads = decay_BKDH.shape
    h_BKDHNP = _states_of(b_BLDGN, write_BKDHT, v_BLHP, decay_BKDH, back=False)
    size, blocks = _blocks(h_BKDHNP)
    if chunks > FEW:
        carry[batch * heads, directions, blocks](h_BKDHNP, decay_BKDH, heads, size, K=chunks, BLOCK=BLOCK)
    y_BLHP, sizes = torch.empty_like(v_BLHP), _sizes(v_BLHP, c_BLDGN, decay_BKDH)
    ints = sizes.pop("ints")
    products[chunks * batch * heads,](
        v_BLHP, c_BLDGN, b_BLDGN, dt_BKDHT, sum_BKDHT, read_BKDHT, delta_BKHT, h_BKDHNP, segments_BL, y_BLHP,
        *ints, *c_BLDGN.stride()[:4], *b_BLDGN.stride()[:4],
        BOTH=directions == 2, PACKED=packed, num_warps=WARPS, num_stages=STAGES, **sizes,
    )  # fmt: skip
    return y_BLHP, h_BKDHNP


@torch.library.custom_op("mixerbench::chunk_products_backward", mutates_args=())
def chunk_products_backward(
    gy_BLHP: Tensor,
    v_BLHP: Tensor,
    c_BLDGN: Tensor,
    b_BLDGN: Tensor,
    dt_BKDHT: Tensor,
    sum_BKDHT: Tensor,
    write_BKDHT: Tensor,
    read_BKDHT: Tensor,
    delta_BKHT: Tensor,
    decay_BKDH: Tensor,
    segments_BL: Tensor,
    h_BKDHNP: Tensor,
    packed: bool,
) -> list[Tensor]:
    """Gradients of v, c, b, dt, sum, write, read, delta and decay."""
    gy_BLHP, small = gy_BLHP.contiguous(), (dt_BKDHT, sum_BKDHT, write_BKDHT, read_BKDHT)
    v_BLHP, c_BLDGN, b_BLDGN, delta_BKHT, decay_BKDH, segments_BL, *small = _laid_out(
        v_BLHP, c_BLDGN, b_BLDGN, delta_BKHT, decay_BKDH, segments_BL, *small
    )
    batch, chunks, directions, heads = decay_BKDH.shape
    gs_BKDHNP = _states_of(c_BLDGN, small[-1], gy_BLHP, decay_BKDH, back=True)
    size, blocks = _blocks(gs_BKDHNP)
    part_BKDHI = decay_BKDH.new_zeros(*decay_BKDH.shape, blocks)
    if chunks > FEW:
        carry_back[batch * heads, directions, blocks](
            gs_BKDHNP, h_BKDHNP, decay_BKDH, part_BKDHI, heads, size, K=chunks, BLOCK=BLOCK
        )
    gv_BLHP, gdelta_BKHT = torch.empty_like(v_BLHP), torch.empty_like(delta_BKHT)
    gsmall = [torch.empty_like(x) for x in small]
    shape = (*v_BLHP.shape[:2], directions, heads, c_BLDGN.shape[-1])
    gc_BLDHN, gb_BLDHN = v_BLHP.new_empty(shape), v_BLHP.new_empty(shape)
    sizes = _sizes(v_BLHP, c_BLDGN, decay_BKDH)
    ints = sizes.pop("ints")
    gdt_BKDHT, gsum_BKDHT, gwrite_BKDHT, gread_BKDHT = gsmall
    products_back[chunks * batch * heads,](
        gy_BLHP, v_BLHP, c_BLDGN, b_BLDGN, *small, delta_BKHT, h_BKDHNP, gs_BKDHNP, segments_BL,
        gv_BLHP, gc_BLDHN, gb_BLDHN, gdt_BKDHT, gsum_BKDHT, gwrite_BKDHT, gread_BKDHT, gdelta_BKHT,
        *ints, *c_BLDGN.stride()[:4], *b_BLDGN.stride()[:4],
        BOTH=directions == 2, PACKED=packed, num_warps=WARPS_BACK, num_stages=STAGES_BACK, **sizes,
    )  # fmt: skip
    grouped = (_grouped(x, c_BLDGN) for x in (gc_BLDHN, gb_BLDHN))
    return [gv_BLHP, *grouped, *gsmall, gdelta_BKHT, part_BKDHI.sum(-1)]


def _laid_out(v_BLHP: Tensor, c_BLDGN: Tensor, b_BLDGN: Tensor, *others: Tensor) -> list[Tensor]:
    """As the programs read them: whole in memory, but for c and b, whose states alone must lie side by side."""
    sides = (x if x.stride(-1) == 1 else x.contiguous() for x in (c_BLDGN, b_BLDGN))
    return [v_BLHP.contiguous(), *sides, *(x.contiguous() for x in others)]


def _grouped(g_BLDHN: Tensor, like_BLDGN: Tensor) -> Tensor:
    """Gradients of each head and direction summed over those that share a c or b."""
    g_BLDGN = g_BLDHN.unflatten(3, (like_BLDGN.shape[3], -1)).sum(4, dtype=torch.float32)
    return g_BLDGN if like_BLDGN.shape[2] > 1 or g_BLDGN.shape[2] == 1 else g_BLDGN.sum(2, keepdim=True)


@chunk_products.register_fake
def _(v, c, b, dt, sum_, write, read, delta, decay, segments, packed):
    return v.new_empty(v.shape), v.new_empty(*decay.shape, c.shape[-1], v.shape[-1])


@chunk_products_backward.register_fake
def _(gy, v, c, b, dt, sum_, write, read, delta, decay, segments, h, packed):
    small = [x.new_empty(x.shape) for x in (dt, sum_, write, read, delta, decay)]
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
