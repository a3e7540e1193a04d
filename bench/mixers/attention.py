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

from bench.mixers.base import Features, Grant, Mixer, Wants, at_least_one, real, require_length, same_segment


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

    def __init__(self, grant: Grant, args: Args, backend: str):
        super().__init__(grant, backend)
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
        q_BHLR, k_BHLR = self.queries_keys(features, v_BLHP)
        # A row without a visible token is 0 / 0 in some kernels: something is shown there, the result dropped.
        if self.grant.packed:
            visible = same_segment(segments_BL) | torch.eye(v_BLHP.shape[1], dtype=torch.bool, device=v_BLHP.device)
        else:
            real_BL = segments_BL > 0
            visible = (real_BL | ~real_BL.any(1, keepdim=True))[:, None, None, :]
        y_BHLP = F.scaled_dot_product_attention(q_BHLR, k_BHLR, v_BLHP.transpose(1, 2), attn_mask=visible)
        return y_BHLP.transpose(1, 2) * real(segments_BL, y_BHLP.dtype)

    def queries_keys(self, features: Features, v_BLHP: Tensor) -> tuple[Tensor, Tensor]:
        """q, k, each BHLR, in the dtype of v."""
        if self.args.sam:
            conv_BLK = features.conv_BLK.to(v_BLHP.dtype)
            q_BLHR, k_BLHR = conv_BLK.unflatten(-1, (2, self.grant.heads, self.args.rank)).unbind(2)
        else:
            batch, length = v_BLHP.shape[:2]
            require_length(length, self.grant.length, "attention")
            q_BLHR = self.q_LHR[:length].to(v_BLHP.dtype).expand(batch, -1, -1, -1)
            k_BLHR = self.k_LHR[:length].to(v_BLHP.dtype).expand(batch, -1, -1, -1)
        return q_BLHR.transpose(1, 2), k_BLHR.transpose(1, 2)

    def matrix(self, v_BLHP: Tensor, features: Features, segments_BL: Tensor) -> Tensor:
        q_BHLR, k_BHLR = self.queries_keys(features, v_BLHP)
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
