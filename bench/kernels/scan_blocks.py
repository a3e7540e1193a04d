"""The scans of scan.py by larger chunks: a chunk is several blocks, whose matrices with one another live on the chip.

Larger chunks have fewer states, which are what scan.py moves most of; a row of one chunk has none. What enters the
chunks is summed up and carried by one program, which goes along the row. Each block reads from the blocks of its chunk
in one program; its gradients as one that reads and as one that is read are two more.
Axes: as in scan.py; C places of a chunk, of BLOCKS blocks of T.
"""

import torch
import triton
from torch import Tensor

from bench.kernels import precision
from bench.kernels.scan import grouped, laid_out, padded, register, terms
from bench.kernels.scan_block_tiles import carried, factors, products

BLOCK = 64
BLOCKS = 2
"""Of a chunk."""
TILE = 64
"""Channels that one program of `products` has."""
CARRIED = 4096
"""Numbers of a state that one program carries along."""
SHARE = 4
"""Heads with the same c and b, at most, whose gradients one program sums up."""
WARPS, WARPS_FACTORS, WARPS_CARRY = 4, 4, 4
"""Of `products`, `factors` and `carried`."""
STAGES, STAGES_FACTORS, STAGES_CARRY = 1, 1, 3
"""Loads in flight."""
REGISTERS, REGISTERS_FACTORS = None, None
"""Of a thread at most; with fewer more programs are on the chip at a time."""


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
    chunk = BLOCK * BLOCKS
    prepared = terms(v_BLHP, c_BLDGN, b_BLDGN, dt_BLDH, rate_BLDH, delta_BLH, segments_BL, packed, chunk)
    return block_products(*prepared, segments_BL, packed)[0]


def _sizes(v_BLHP: Tensor, c_BLDGN: Tensor, chunks: int) -> tuple[tuple[int, ...], dict]:
    """What all kernels take of shapes and precision."""
    _, length, heads, width = v_BLHP.shape
    state, groups = c_BLDGN.shape[-1], c_BLDGN.shape[-2]
    p, n = padded(width, state)
    names = {"SHARED": c_BLDGN.shape[2] == 1, "N": n, "P": p, "PRECISION": precision(v_BLHP.dtype)}
    return (length, heads, heads // groups, state, width, chunks), names


def _of_blocks(v_BLHP: Tensor, c_BLDGN: Tensor, decay_BKDH: Tensor, packed: bool) -> tuple[tuple[int, ...], dict]:
    """What programs of a block take of them."""
    _, chunks, directions, _ = decay_BKDH.shape
    ints, names = _sizes(v_BLHP, c_BLDGN, chunks)
    names |= {"DIRECTIONS": directions, "PACKED": packed, "STATES": chunks > 1, "BLOCKS": BLOCKS, "T": BLOCK}
    return ints, names


def _products(
    x_BLHP: Tensor, a_BLDGN: Tensor, e_BLDGN: Tensor, decay_BKDH: Tensor, packed: bool, turned: bool, *rest: Tensor
) -> Tensor:
    """M x, or its transpose times x where c and b have changed places."""
    y_BLHP, (ints, names) = torch.empty_like(x_BLHP), _of_blocks(x_BLHP, a_BLDGN, decay_BKDH, packed)
    e, chunks, options = min(names.pop("P"), TILE), decay_BKDH.shape[1], {"num_stages": STAGES, "maxnreg": REGISTERS}
    products[len(x_BLHP) * x_BLHP.shape[2] * chunks * BLOCKS, triton.cdiv(x_BLHP.shape[-1], e)](
        x_BLHP, a_BLDGN, e_BLDGN, *rest, y_BLHP, *ints, *a_BLDGN.stride()[:4], *e_BLDGN.stride()[:4],
        TURNED=turned, E=e, num_warps=WARPS, **options, **names,
    )  # fmt: skip
    return y_BLHP


def _factors(
    u_BLHP: Tensor, x_BLHP: Tensor, a_BLDGN: Tensor, e_BLDGN: Tensor, decay_BKDH: Tensor, packed: bool, turned: bool,
    given: tuple[Tensor, ...], made: tuple[Tensor, ...],
) -> Tensor:  # fmt: skip
    """The gradient of `a` in its own shape, fp32; `made` gets the others."""
    (batch, length, heads, _), (_, chunks, directions, _) = u_BLHP.shape, decay_BKDH.shape
    ints, names = _of_blocks(u_BLHP, a_BLDGN, decay_BKDH, packed)
    share = next(n for n in range(SHARE, 0, -1) if ints[2] % n == 0)
    ga_BLDHN = u_BLHP.new_empty(batch, length, directions, heads // share, a_BLDGN.shape[-1])
    options = {"num_warps": WARPS_FACTORS, "num_stages": STAGES_FACTORS, "maxnreg": REGISTERS_FACTORS}
    factors[(batch * (heads // share) * chunks * BLOCKS,)](
        u_BLHP, x_BLHP, a_BLDGN, e_BLDGN, *given, ga_BLDHN, *made, *ints, *a_BLDGN.stride()[:4], *e_BLDGN.stride()[:4],
        SHARE=share, TURNED=turned, **options, **names,
    )  # fmt: skip
    return grouped(ga_BLDHN, a_BLDGN)


def _carried(
    x_BLDGN: Tensor, weight_BKDHC: Tensor, v_BLHP: Tensor, decay_BKDH: Tensor, other_BKDHNP: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What enters each chunk, BKDHNP; with other states, from the other end, and its products with them: BKDH."""
    batch, chunks, directions, heads = decay_BKDH.shape
    ints, names = _sizes(v_BLHP, x_BLDGN, chunks)
    e = min(names.pop("P"), max(16, CARRIED // names["N"]))
    tiles = triton.cdiv(v_BLHP.shape[-1], e)
    h_BKDHNP = v_BLHP.new_empty(*decay_BKDH.shape, x_BLDGN.shape[-1], v_BLHP.shape[-1])
    part_BKDHE = decay_BKDH.new_zeros(*decay_BKDH.shape, tiles)
    if chunks > 1:
        given = x_BLDGN, weight_BKDHC, v_BLHP, decay_BKDH, h_BKDHNP
        carried[batch * heads, directions, tiles](
            *given, h_BKDHNP if other_BKDHNP is None else other_BKDHNP, part_BKDHE, *ints, *x_BLDGN.stride()[:4],
            TURNED=other_BKDHNP is not None, BLOCKS=BLOCKS, T=BLOCK, E=e,
            num_warps=WARPS_CARRY, num_stages=STAGES_CARRY, **names,
        )  # fmt: skip
    return h_BKDHNP, part_BKDHE.sum(-1)


@torch.library.custom_op("mixerbench::block_products", mutates_args=())
def block_products(
    v_BLHP: Tensor,
    c_BLDGN: Tensor,
    b_BLDGN: Tensor,
    dt_BKDHC: Tensor,
    sum_BKDHC: Tensor,
    write_BKDHC: Tensor,
    read_BKDHC: Tensor,
    delta_BKHC: Tensor,
    decay_BKDH: Tensor,
    segments_BL: Tensor,
    packed: bool,
) -> tuple[Tensor, Tensor]:
    """y_BLHP, and what enters the chunks, BKDHNP. dt, sum, write, read and delta are of whole chunks and fp32."""
    small = dt_BKDHC, sum_BKDHC, write_BKDHC, read_BKDHC, delta_BKHC, decay_BKDH, segments_BL
    v_BLHP, c_BLDGN, b_BLDGN, *small = laid_out(v_BLHP, c_BLDGN, b_BLDGN, *small)
    dt_BKDHC, sum_BKDHC, write_BKDHC, read_BKDHC, delta_BKHC, decay_BKDH, segments_BL = small
    h_BKDHNP, _ = _carried(b_BLDGN, write_BKDHC, v_BLHP, decay_BKDH, None)
    rest = dt_BKDHC, sum_BKDHC, read_BKDHC, delta_BKHC, h_BKDHNP, segments_BL
    y_BLHP = _products(v_BLHP, c_BLDGN, b_BLDGN, decay_BKDH, packed, False, *rest)
    return y_BLHP, h_BKDHNP


@torch.library.custom_op("mixerbench::block_products_backward", mutates_args=())
def block_products_backward(
    gy_BLHP: Tensor,
    v_BLHP: Tensor,
    c_BLDGN: Tensor,
    b_BLDGN: Tensor,
    dt_BKDHC: Tensor,
    sum_BKDHC: Tensor,
    write_BKDHC: Tensor,
    read_BKDHC: Tensor,
    delta_BKHC: Tensor,
    decay_BKDH: Tensor,
    segments_BL: Tensor,
    h_BKDHNP: Tensor,
    packed: bool,
) -> list[Tensor]:
    """Gradients of v, c, b, dt, sum, write, read, delta and decay."""
    small = dt_BKDHC, sum_BKDHC, write_BKDHC, read_BKDHC, delta_BKHC, decay_BKDH, segments_BL
    gy_BLHP = gy_BLHP.contiguous()
    v_BLHP, c_BLDGN, b_BLDGN, *small = laid_out(v_BLHP, c_BLDGN, b_BLDGN, *small)
    dt_BKDHC, sum_BKDHC, write_BKDHC, read_BKDHC, delta_BKHC, decay_BKDH, segments_BL = small
    gs_BKDHNP, gdecay_BKDH = _carried(c_BLDGN, read_BKDHC, gy_BLHP, decay_BKDH, h_BKDHNP)
    gdt_BKDHC, gsum_BKDHC, gdelta_BKHC = (torch.empty_like(x) for x in (dt_BKDHC, sum_BKDHC, delta_BKHC))
    # Without states these two stay zero.
    gwrite_BKDHC, gread_BKDHC = torch.zeros_like(write_BKDHC), torch.zeros_like(read_BKDHC)
    every = dt_BKDHC, sum_BKDHC
    gc_BLDGN = _factors(
        gy_BLHP, v_BLHP, c_BLDGN, b_BLDGN, decay_BKDH, packed, False,
        (*every, read_BKDHC, h_BKDHNP, segments_BL), (gsum_BKDHC, gread_BKDHC, gdelta_BKHC, gdt_BKDHC),
    )  # fmt: skip
    gb_BLDGN = _factors(
        v_BLHP, gy_BLHP, b_BLDGN, c_BLDGN, decay_BKDH, packed, True,
        (*every, write_BKDHC, gs_BKDHNP, segments_BL), (gsum_BKDHC, gwrite_BKDHC, gdelta_BKHC, gdt_BKDHC),
    )  # fmt: skip
    rest = *every, write_BKDHC, delta_BKHC, gs_BKDHNP, segments_BL
    gv_BLHP = _products(gy_BLHP, b_BLDGN, c_BLDGN, decay_BKDH, packed, True, *rest)
    gsmall = gdt_BKDHC, gsum_BKDHC, gwrite_BKDHC, gread_BKDHC, gdelta_BKHC, gdecay_BKDH
    return [gv_BLHP, gc_BLDGN, gb_BLDGN, *gsmall]


register(block_products, block_products_backward)
