"""Dense: a free L x L matrix per head, M_ij = m_hij (MLP-Mixer, Prop. 2.5). Data-independent only.

Deliberate choice: entries start normal with standard deviation 1 / sqrt(L) and there is no further scale, so M keeps
the size of an uncorrelated v. The released code has Xavier entries times 1 / sqrt(L), about 9e-4 at L = 128.
Axes: B batch, L length, H heads, P head width.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from bench.mixers.base import Features, Grant, Mixer, Wants, real, require_length, same_segment


@dataclass(frozen=True)
class Args:
    sam: bool
    heads: int


class Dense(Mixer):
    """M_ij = m_hij inside a segment, 0 elsewhere."""

    Args: ClassVar = Args
    levels: ClassVar = (False,)

    def __init__(self, grant: Grant, args: Args, backend: str):
        super().__init__(grant, backend)
        self.m_HLL = nn.Parameter(torch.empty(grant.heads, grant.length, grant.length))

    @property
    def wants(self) -> Wants:
        return Wants(conv=0, raw=0)

    def initial(self, name: str, generator: torch.Generator) -> Tensor:
        shape = self.get_parameter(name).shape
        return torch.randn(shape, generator=generator, device="cpu") / self.grant.length**0.5

    def forward(self, v_BLHP: Tensor, features: Features, segments_BL: Tensor) -> Tensor:
        length = v_BLHP.shape[1]
        require_length(length, self.grant.length, "dense")
        m_HLL = self.m_HLL[:, :length, :length].to(v_BLHP.dtype)
        if self.grant.packed:
            m_BHLL = m_HLL * same_segment(segments_BL)
            return torch.einsum("bhij,bjhp->bihp", m_BHLL, v_BLHP)
        real_BL11 = real(segments_BL, v_BLHP.dtype)
        return torch.einsum("hij,bjhp->bihp", m_HLL, v_BLHP * real_BL11) * real_BL11

    def matrix(self, v_BLHP: Tensor, features: Features, segments_BL: Tensor) -> Tensor:
        length = v_BLHP.shape[1]
        require_length(length, self.grant.length, "dense")
        m_1HLL = self.m_HLL[None, :, :length, :length].to(v_BLHP.dtype)
        return m_1HLL.masked_fill(~same_segment(segments_BL), 0.0)

    @property
    def state_size(self) -> None:
        return None

    def flops(self, length: int) -> int:
        return 2 * self.grant.heads * length**2 * self.grant.head_width
