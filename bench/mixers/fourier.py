"""Fourier: cos(2 pi i j / n) on the first half of the heads, sin(2 pi i j / n) on the second, n the protocol's length.

What a complex DFT needs: with the real part of a signal in the first half and its imaginary part in the second, the sum
of the halves' results is the real part of its DFT (so the fnet shell uses it; FNet, Lee-Thorp et al. 2021). Without
scale, as there, so |M v| / |v| is about sqrt(n / 2). As for every data-independent mixer n stays when a row is shorter
and M is the leading block; the places of packed documents count from the row's start. No parameters. The dft mixer has
the cosines on all heads, scaled.
Axes: B batch, L length, H heads, P head width, F frequencies.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bench import Refusal
from bench.mixers.base import Features, Grant, Mixer, Wants, real, require_length, same_segment
from bench.mixers.waves import transform_flops, turns


@dataclass(frozen=True)
class Args:
    sam: bool
    heads: int

    def __post_init__(self):
        if self.heads < 2 or self.heads % 2:
            raise Refusal(
                f"mixer fourier: heads is {self.heads}; allowed: even numbers, half for cosines, half for sines"
            )


class Fourier(Mixer):
    Args: ClassVar = Args
    levels: ClassVar = (False,)

    def __init__(self, grant: Grant, args: Args, backend: str):
        super().__init__(grant, backend)

    @classmethod
    def heads_allowed(cls, width: int) -> tuple[int, ...]:
        return tuple(h for h in range(2, width + 1, 2) if width % h == 0)

    @property
    def wants(self) -> Wants:
        return Wants(conv=0, raw=0, exact=0)

    def initial(self, name: str, generator: torch.Generator) -> Tensor:
        raise KeyError(f"mixer fourier has no parameter {name}")

    def forward(self, v_BLHP: Tensor, features: Features, segments_BL: Tensor) -> Tensor:
        length, n, half = v_BLHP.shape[1], self.grant.length, self.grant.heads // 2
        require_length(length, n, "fourier")
        if self.grant.packed:
            m_BHLL = self.waves(length, v_BLHP) * same_segment(segments_BL)
            return torch.einsum("bhij,bjhp->bihp", m_BHLL, v_BLHP)
        real_BL11 = real(segments_BL, v_BLHP.dtype)
        wide = torch.promote_types(v_BLHP.dtype, torch.float32)
        # Zeros up to n leave the leading block of the matrix.
        y_BFHP = torch.fft.rfft((v_BLHP * real_BL11).to(wide), n=n, dim=1)
        even_BFHP, odd_BFHP = y_BFHP[:, :, :half].real, -y_BFHP[:, :, half:].imag
        y_BFHP = torch.cat((even_BFHP, odd_BFHP), dim=2)
        mirror_BFHP = torch.cat((even_BFHP, -odd_BFHP), dim=2)[:, 1 : (n + 1) // 2].flip(1)
        return torch.cat([y_BFHP, mirror_BFHP], dim=1)[:, :length].to(v_BLHP.dtype) * real_BL11

    def waves(self, length: int, v_BLHP: Tensor) -> Tensor:
        """The leading block, HLL, in the dtype of v."""
        phase_LL = 2 * math.pi * turns(length, self.grant.length, v_BLHP)
        halves = (phase_LL.cos(), phase_LL.sin())
        return torch.cat([wave.to(v_BLHP.dtype).expand(self.grant.heads // 2, -1, -1) for wave in halves])

    def matrix(self, v_BLHP: Tensor, features: Features, segments_BL: Tensor) -> Tensor:
        length = v_BLHP.shape[1]
        require_length(length, self.grant.length, "fourier")
        return self.waves(length, v_BLHP).masked_fill(~same_segment(segments_BL), 0.0)

    def structure(self) -> tuple[str, ...]:
        return ("symmetric", f"rank {self.grant.length // 2 + 1}")

    @property
    def state_size(self) -> None:
        return None

    def flops(self, length: int) -> int:
        return transform_flops(self.grant, length)
