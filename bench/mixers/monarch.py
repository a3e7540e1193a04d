"""Monarch, a butterfly of order 2: M = P^T L P R with L and R block-diagonal, P a transposition. Data-independent only.

A place is i = x * K + u on a grid of X rows and K columns: R mixes inside each row y (block R_y, K x K), then L inside
each column u (block L_u, X x X), so M_{(x,u),(y,w)} = L_u[x, y] R_y[u, w] (Dao et al. 2022; with X = K their b^2). The
reference's Table 1 lists the class, its ablation skips it. Deliberate choices: K = ceil(sqrt(n)), X = ceil(n / K) for
the protocol's n tokens, the next product of near-equal numbers, whatever n's divisors; M is the leading block of that
matrix, at n as at shorter rows. Entries start normal, 1 / sqrt(X) and 1 / sqrt(K), so M keeps an uncorrelated v's size.
Axes: B batch, L length, H heads, P head width, X and Y rows (read, written), U and W columns (read, written).
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.mixers.base import Features, Grant, Mixer, Wants, real, require_length, same_segment


@dataclass(frozen=True)
class Args:
    sam: bool
    heads: int


class Monarch(Mixer):
    """M inside a segment, 0 elsewhere."""

    Args: ClassVar = Args
    levels: ClassVar = (False,)

    def __init__(self, grant: Grant, args: Args, backend: str):
        super().__init__(grant, backend)
        self.columns = math.isqrt(grant.length - 1) + 1
        self.rows = -(-grant.length // self.columns)
        self.left_HUXY = nn.Parameter(torch.empty(grant.heads, self.columns, self.rows, self.rows))
        self.right_HYUW = nn.Parameter(torch.empty(grant.heads, self.rows, self.columns, self.columns))

    @property
    def wants(self) -> Wants:
        return Wants(conv=0, raw=0, exact=0)

    def initial(self, name: str, generator: torch.Generator) -> Tensor:
        shape = self.get_parameter(name).shape
        return torch.randn(shape, generator=generator, device="cpu") / shape[-1] ** 0.5

    def forward(self, v_BLHP: Tensor, features: Features, segments_BL: Tensor) -> Tensor:
        length, dtype = v_BLHP.shape[1], v_BLHP.dtype
        require_length(length, self.grant.length, "monarch")
        if self.grant.packed:
            m_BHLL = self.whole(dtype)[:, :length, :length] * same_segment(segments_BL)
            return torch.einsum("bhij,bjhp->bihp", m_BHLL, v_BLHP)
        real_BL11 = real(segments_BL, dtype)
        # Zeros up to the product leave the leading block; rows and columns of the grid beyond it are not computed.
        rows = -(-length // self.columns)
        v_BLHP = F.pad(v_BLHP * real_BL11, (0, 0, 0, 0, 0, rows * self.columns - length))
        v_BYWHP = v_BLHP.unflatten(1, (rows, self.columns))
        v_BYUHP = torch.einsum("hyuw,bywhp->byuhp", self.right_HYUW[:, :rows].to(dtype), v_BYWHP)
        y_BXUHP = torch.einsum("huxy,byuhp->bxuhp", self.left_HUXY[:, :, :rows, :rows].to(dtype), v_BYUHP)
        return y_BXUHP.flatten(1, 2)[:, :length] * real_BL11

    def whole(self, dtype: torch.dtype) -> Tensor:
        """The matrix at the next product, HLL."""
        m_HXUYW = torch.einsum("huxy,hyuw->hxuyw", self.left_HUXY.to(dtype), self.right_HYUW.to(dtype))
        return m_HXUYW.flatten(3, 4).flatten(1, 2)

    def matrix(self, v_BLHP: Tensor, features: Features, segments_BL: Tensor) -> Tensor:
        length = v_BLHP.shape[1]
        require_length(length, self.grant.length, "monarch")
        m_HLL = self.whole(v_BLHP.dtype)[:, :length, :length]
        return m_HLL.masked_fill(~same_segment(segments_BL), 0.0)

    def structure(self) -> tuple[str, ...]:
        return (f"rank-one blocks {self.columns}",)

    @property
    def state_size(self) -> None:
        return None

    def flops(self, length: int) -> int:
        heads, width = self.grant.heads, self.grant.head_width
        if self.grant.packed:
            return 2 * heads * length**2 * width
        rows = -(-length // self.columns)
        return 2 * heads * width * rows * self.columns * (rows + self.columns)
