"""DFT: M_ij = sqrt(2 / n) cos(2 pi i j / n), n the protocol's length (FNet's mixing over tokens). No parameters.

Real part only, no transform over channels, as the reference's ablation has it; n stays when a row is shorter, so its
matrix is the leading block, as for every data-independent mixer. Deliberate choice: sqrt(2 / n) keeps the size of an
uncorrelated v (released: 1 / sqrt(n); the real part drops half of the energy). Columns j and n - j are equal, so M
cannot tell those two tokens apart (rank n // 2 + 1); the places of packed documents count from the row's start.
Axes: B batch, L length, H heads, P head width, F frequencies.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bench.mixers.base import Features, Grant, Mixer, Wants, real, require_length, same_segment
from bench.mixers.waves import real_part, stretches, transform_flops, turns

PRODUCT, PRODUCT_WIDE = 1024, 2048
"""Rows of up to so many tokens of 16 bits (or more) are multiplied by the matrix itself where tensor cores do that
(backend 'triton'), longer ones of 16 bits by two smaller ones (waves.py): on an H200 a transform along tokens takes
longer, most of it for copies to and fro. More operations, less time."""


@dataclass(frozen=True)
class Args:
    sam: bool
    heads: int


class DFT(Mixer):
    """One matrix for all heads: they are an axis without effect."""

    Args: ClassVar = Args
    levels: ClassVar = (False,)
    backends: ClassVar = ("torch", "triton")

    def __init__(self, grant: Grant, args: Args, backend: str):
        super().__init__(grant, backend)

    @property
    def wants(self) -> Wants:
        return Wants(conv=0, raw=0, exact=0)

    def initial(self, name: str, generator: torch.Generator) -> Tensor:
        raise KeyError(f"mixer dft has no parameter {name}")

    def forward(self, v_BLHP: Tensor, features: Features, segments_BL: Tensor) -> Tensor:
        length, n = v_BLHP.shape[1], self.grant.length
        require_length(length, n, "dft")
        if self.grant.packed:
            m_BHLL = self.cosines(length, v_BLHP) * same_segment(segments_BL)
            return torch.einsum("bij,bjhp->bihp", m_BHLL[:, 0], v_BLHP)
        real_BL11 = real(segments_BL, v_BLHP.dtype)
        if self.backend == "triton":
            narrow = v_BLHP.dtype.itemsize == 2
            if length <= (PRODUCT if narrow else PRODUCT_WIDE):
                return torch.einsum("ij,bjhp->bihp", self.cosines(length, v_BLHP), v_BLHP * real_BL11) * real_BL11
            if narrow and stretches(n):
                return real_part(v_BLHP * real_BL11, n) * math.sqrt(2 / n) * real_BL11
        wide = torch.promote_types(v_BLHP.dtype, torch.float32)
        # Zeros up to n leave the leading block of the matrix.
        y_BFHP = torch.fft.rfft((v_BLHP * real_BL11).to(wide), n=n, dim=1).real
        y_BLHP = torch.cat([y_BFHP, y_BFHP[:, 1 : (n + 1) // 2].flip(1)], dim=1)[:, :length]
        return (y_BLHP * math.sqrt(2 / n)).to(v_BLHP.dtype) * real_BL11

    def cosines(self, length: int, v_BLHP: Tensor) -> Tensor:
        """The leading block, LL, in the dtype of v."""
        n = self.grant.length
        return (math.sqrt(2 / n) * torch.cos(2 * math.pi * turns(length, n, v_BLHP))).to(v_BLHP.dtype)

    def matrix(self, v_BLHP: Tensor, features: Features, segments_BL: Tensor) -> Tensor:
        length, heads = v_BLHP.shape[1], v_BLHP.shape[2]
        require_length(length, self.grant.length, "dft")
        m_BHLL = self.cosines(length, v_BLHP).expand(1, heads, -1, -1)
        return m_BHLL.masked_fill(~same_segment(segments_BL), 0.0)

    def structure(self) -> tuple[str, ...]:
        return ("symmetric", f"rank {self.grant.length // 2 + 1}")

    @property
    def state_size(self) -> None:
        return None

    def flops(self, length: int) -> int:
        return transform_flops(self.grant, length)
