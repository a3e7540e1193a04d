"""What the scanning mixers share besides the scan: start values, the sets (c, b, dt, log A) and their plain matrices.

No mixer, and so without a yaml. A set is what one direction needs; B and C may be one pair for both directions.
Axes: B batch, L length, H heads, N state, G groups, D direction (0 forward, 1 backward; size 1 if both share),
K feature channels.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Refusal
from bench.mixers.scan import chunk_of, products

Sets = tuple[Tensor, Tensor, Tensor, Tensor]
"""c_BLDGN, b_BLDGN, dt_BLDH and log A_BLDH = dt A_h, at least fp32; B = 1 where data-independent."""


def whole_groups(mixer: str, heads: int, groups: int) -> None:
    """Refuse groups that do not divide the heads."""
    if heads % groups:
        allowed = ", ".join(str(g) for g in range(1, heads + 1) if heads % g == 0)
        raise Refusal(f"mixer {mixer}: groups is {groups}; allowed with {heads} heads: {allowed}")


def start(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """A = -1, dt log-uniform in [1e-3, 0.1], D = 1 as released; tables standard normal, the diagonal's zero."""
    match name.rpartition("_")[0]:
        case "A_log" | "delta":
            return torch.zeros(shape, device="cpu")
        case "D":
            return torch.ones(shape, device="cpu")
        case "dt_bias":
            uniform = torch.rand(shape, generator=generator, device="cpu")
            dt = torch.exp(math.log(1e-3) + uniform * (math.log(0.1) - math.log(1e-3)))
            return dt + torch.log(-torch.expm1(-dt))  # inverse of softplus
    return torch.randn(shape, generator=generator, device="cpu")


def widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def negative(A_log_H: Tensor) -> Tensor:
    """A_h of each head."""
    return -widened(A_log_H).exp()


def token_sets(cb_BLK: Tensor, raw_BLK: Tensor, dt_bias_2H: Tensor, A_log_H: Tensor, groups: int, state: int) -> Sets:
    """Of the channels [c, b of each direction (D, 2, G, N)] and [dt (2, H)]: SiLU on c and b, as released."""
    bias_2H = widened(dt_bias_2H)
    c_BLDGN, b_BLDGN = F.silu(cb_BLK.to(bias_2H.dtype)).unflatten(-1, (-1, 2, groups, state)).unbind(3)
    dt_BLDH = F.softplus(raw_BLK.to(bias_2H.dtype) + bias_2H).unflatten(-1, (2, -1))
    return c_BLDGN, b_BLDGN, dt_BLDH, negative(A_log_H) * dt_BLDH


def table_sets(c_LDGN: Tensor, b_LDGN: Tensor, dt_bias_2H: Tensor, A_log_H: Tensor, length: int) -> Sets:
    """Of tables for each place (no SiLU) and one dt a head and direction."""
    dt_BLDH = F.softplus(widened(dt_bias_2H)).view(1, 1, 2, -1).expand(1, length, -1, -1)
    c_BLDGN, b_BLDGN = (widened(x[None, :length]) for x in (c_LDGN, b_LDGN))
    return c_BLDGN, b_BLDGN, dt_BLDH, negative(A_log_H) * dt_BLDH


def triangles(sets: Sets) -> tuple[Tensor, Tensor]:
    """What each direction applies, slow and plain: lower and upper triangular BHLL, each with its own diagonal.

    i >= j: c_i^T A_i A_{i-1} .. A_{j+1} dt_j b_j        i <= j: c'_i^T A'_i A'_{i+1} .. A'_{j-1} dt'_j b'_j
    """
    c_BLDGN, b_BLDGN, dt_BLDH, rate_BLDH = sets
    each = dt_BLDH.shape[-1] // c_BLDGN.shape[3]
    cb_BDHLL = torch.einsum("bidgn,bjdgn->bdgij", c_BLDGN, b_BLDGN).repeat_interleave(each, dim=2)
    dt_BDHL = dt_BLDH.permute(0, 2, 3, 1)
    lower_BHLL = products(rate_BLDH[:, :, 0]) * cb_BDHLL[:, 0] * dt_BDHL[:, 0, :, None]
    # The backward products are the forward ones of the reversed row, reversed again.
    upper_BHLL = products(rate_BLDH[:, :, 1].flip(1)).flip(2, 3) * cb_BDHLL[:, -1] * dt_BDHL[:, 1, :, None]
    return lower_BHLL.tril(), upper_BHLL.triu()


def own_terms(c_BLDGN: Tensor, b_BLDGN: Tensor, dt_BLDH: Tensor) -> Tensor:
    """c_i . b_i dt_i summed over both directions, BLH: the diagonals that `triangles` has."""
    own_BLDG = (c_BLDGN * b_BLDGN).sum(-1)
    own_BLDH = own_BLDG.repeat_interleave(dt_BLDH.shape[-1] // own_BLDG.shape[-1], dim=-1) * dt_BLDH
    return own_BLDH.sum(2)


def scan_flops(length: int, heads: int, width: int, state: int, pairs: int, directions: int) -> int:
    """Of one scan in so many directions at once; `pairs`: how many pairs of c and b (their directions times groups)."""
    chunk = chunk_of(length)
    chunks = -(-length // chunk)
    scores = 2 * length * chunk * pairs * state
    inside = 2 * length * chunk * heads * width
    states = directions * 2 * (2 * length + chunks**2) * heads * state * width  # write, read, carry
    return scores + inside + states
