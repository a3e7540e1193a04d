"""Identity: M = I on real tokens. The control that shows what the shell's convolution, gate and skip do alone.

The published 'Vandermonde, non-SAM' row is in effect this control: as released, it scales each token by its row's sum.
Axes: B batch, L length, H heads, P head width.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bench.mixers.base import Features, Grant, Mixer, Wants, real, require_length


@dataclass(frozen=True)
class Args:
    sam: bool
    heads: int


class Identity(Mixer):
    """M_ij = 1 for i = j real, else 0. Heads are an axis without effect."""

    Args: ClassVar = Args
    levels: ClassVar = (False,)

    def __init__(self, grant: Grant, args: Args, backend: str):
        super().__init__(grant, backend)

    @property
    def wants(self) -> Wants:
        return Wants(conv=0, raw=0, exact=0)

    def initial(self, name: str, generator: torch.Generator) -> Tensor:
        raise KeyError(f"mixer identity has no parameter {name}")

    def forward(self, v_BLHP: Tensor, features: Features, segments_BL: Tensor) -> Tensor:
        # It could run at any length, but a control must be refused where the arms beside it are.
        require_length(v_BLHP.shape[1], self.grant.length, "identity")
        return v_BLHP * real(segments_BL, v_BLHP.dtype)

    def matrix(self, v_BLHP: Tensor, features: Features, segments_BL: Tensor) -> Tensor:
        require_length(v_BLHP.shape[1], self.grant.length, "identity")
        real_BL = (segments_BL > 0).to(v_BLHP.dtype)
        return torch.diag_embed(real_BL)[:, None].repeat(1, v_BLHP.shape[2], 1, 1)

    def structure(self) -> tuple[str, ...]:
        return ("identity", "symmetric")

    @property
    def state_size(self) -> int:
        return 0

    def flops(self, length: int) -> int:
        return 0
