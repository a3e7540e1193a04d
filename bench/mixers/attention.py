"""Softmax attention: M_ij = softmax over visible j of q_i . k_j / sqrt(rank). No activation on q and k.

sam: q, k are features. Not sam: learned tables, standard normal at the start (published: nearly zero, so uniform).
Deliberate choice for both: the softmax runs over visible tokens only (released: padding included), so rows sum to
one at every length, and the tables' matrix for a shorter row is the leading block of the logits, not of M.
Axes: B batch, L length, H heads, P head width, R rank (width of q and k), K feature channels.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.kernels import require_triton
from bench.mixers.base import (
    Features,
    Grant,
    Mixer,
    Wants,
    at_least_one,
    real,
    require_length,
    same_segment,
    segment_starts,
)


@dataclass(frozen=True)
class Args:
    sam: bool
    heads: int
    rank: int

    def __post_init__(self):
        at_least_one("attention", self, ("heads", "rank"))


class Attention(Mixer):
    """Channels with sam: conv [q (H, R), k (H, R)]."""

    Args: ClassVar = Args
    levels: ClassVar = (False, True)
    knobs: ClassVar = ("rank",)
    backends: ClassVar = ("torch", "triton")

    def __init__(self, grant: Grant, args: Args, backend: str):
        super().__init__(grant, backend)
        self.product = None
        if backend == "triton":
            require_triton()
            from bench.kernels import softmax

            if softmax.fits(args.rank, grant.head_width):  # else torch's
                self.product = softmax.softmax_product
        self.args = args
        if not args.sam:
            self.q_LHR = nn.Parameter(torch.empty(grant.length, grant.heads, args.rank))
            self.k_LHR = nn.Parameter(torch.empty(grant.length, grant.heads, args.rank))

    @property
    def wants(self) -> Wants:
        return Wants(conv=2 * self.grant.heads * self.args.rank if self.args.sam else 0, raw=0, exact=0)

    def initial(self, name: str, generator: torch.Generator) -> Tensor:
        return torch.randn(self.get_parameter(name).shape, generator=generator, device="cpu")

    def forward(self, v_BLHP: Tensor, features: Features, segments_BL: Tensor) -> Tensor:
        x_BL2HR = self.queries_keys(features, v_BLHP)
        if self.backend == "triton" and self.product is not None:
            return self.product(x_BL2HR, v_BLHP, *bounds(segments_BL, self.grant.packed), self.grant.packed)[0]
        q_BHLR, k_BHLR = x_BL2HR.transpose(1, 3).unbind(2)
        # A row without a visible token is 0 / 0 in some kernels: something is shown there, the result dropped.
        if self.grant.packed:
            visible = same_segment(segments_BL) | torch.eye(v_BLHP.shape[1], dtype=torch.bool, device=v_BLHP.device)
        else:
            real_BL = segments_BL > 0
            visible = (real_BL | ~real_BL.any(1, keepdim=True))[:, None, None, :]
        y_BHLP = F.scaled_dot_product_attention(q_BHLR, k_BHLR, v_BLHP.transpose(1, 2), attn_mask=visible)
        return y_BHLP.transpose(1, 2) * real(segments_BL, y_BHLP.dtype)

    def queries_keys(self, features: Features, v_BLHP: Tensor) -> Tensor:
        """q and k, BL2HR, in the dtype of v."""
        if self.args.sam:
            return features.conv_BLK.to(v_BLHP.dtype).unflatten(-1, (2, self.grant.heads, self.args.rank))
        batch, length = v_BLHP.shape[:2]
        require_length(length, self.grant.length, "attention")
        x_L2HR = torch.stack([self.q_LHR[:length], self.k_LHR[:length]], 1).to(v_BLHP.dtype)
        return x_L2HR.expand(batch, -1, -1, -1, -1)

    def matrix(self, v_BLHP: Tensor, features: Features, segments_BL: Tensor) -> Tensor:
        q_BHLR, k_BHLR = self.queries_keys(features, v_BLHP).transpose(1, 3).unbind(2)
        s_BHLL = torch.einsum("bhir,bhjr->bhij", q_BHLR, k_BHLR) / self.args.rank**0.5
        same_B1LL = same_segment(segments_BL)
        s_BHLL = s_BHLL.masked_fill(~same_B1LL, torch.finfo(s_BHLL.dtype).min)
        e_BHLL = (s_BHLL - s_BHLL.detach().amax(-1, keepdim=True)).exp() * same_B1LL
        return e_BHLL / torch.where(same_B1LL.any(-1, keepdim=True), e_BHLL.sum(-1, keepdim=True), 1.0)

    def structure(self) -> tuple[str, ...]:
        return ("rows sum to one", "positive")

    @property
    def state_size(self) -> None:
        return None

    def flops(self, length: int) -> int:
        return 2 * self.grant.heads * length**2 * (self.args.rank + self.grant.head_width)


def bounds(segments_BL: Tensor, packed: bool) -> tuple[Tensor, Tensor]:
    """Where the document of each token begins and ends (the place after its last), both BL and int32; 0 on padding."""
    real_BL = (segments_BL > 0).to(torch.int32)
    if not packed:
        return torch.zeros_like(real_BL), real_BL.sum(1, keepdim=True, dtype=torch.int32) * real_BL
    after_BL = segments_BL.shape[1] - segment_starts(segments_BL.flip(1)).flip(1)
    return segment_starts(segments_BL).to(torch.int32) * real_BL, after_BL.to(torch.int32) * real_BL
