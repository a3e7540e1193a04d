"""Bidirectional linear attention with decay (RetNet, LION): M_ij = scale phi(q_i) . phi(k_j) D_ij.

    i > j: D_ij = a_i a_{i-1} .. a_{j+1}        D_ii = 1        i < j: D_ij = a_i a_{i+1} .. a_{j-1}
so the reader's own decay counts, not the writer's, as in the recurrences S_i = a_i S_{i-1} + k_i v_i^T of both ways.
decay fixed: a = sigmoid(-bias_h), so D_ij = a^|i-j|; learned, as LION's (RetNet: constant). selective: a_i =
sigmoid(-(raw_i + bias_h)), the same in both ways. 1 - a starts log-spaced over heads from 1/32 to 1/512 (RetNet).
The scale is that of `low_rank`, which D = 1 gives back: 1 / sqrt(n rank), n the segment's own number of tokens, or,
with `normalise` (LION), one over the sum of the row with its decays, which needs a positive map.
Axes: B batch, L length, H heads (each a group G of its own in the scan), P head width, R rank, K feature channels.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import Refusal
from bench.mixers.base import (
    Features,
    Grant,
    Wants,
    at_least_one,
    divisor,
    elu_plus_one,
    real,
    same_segment,
    segment_lengths,
)
from bench.mixers.scan import Scanned, Terms, chunk_of, chunked_scan, products

MAPS = {"silu": F.silu, "elu1": elu_plus_one, "none": lambda x: x}
DECAYS = ("fixed", "selective")


@dataclass(frozen=True)
class Args:
    sam: bool
    heads: int
    rank: int
    decay: str
    feature_map: str
    normalise: bool

    def __post_init__(self):
        if not self.sam:
            raise Refusal("mixer decay_attention: sam is false; allowed: true")
        at_least_one("decay_attention", self, ("heads", "rank"))
        if self.decay not in DECAYS:
            raise Refusal(f"mixer decay_attention: decay is {self.decay}; allowed: {', '.join(DECAYS)}")
        if self.feature_map not in MAPS:
            raise Refusal(f"mixer decay_attention: feature_map is {self.feature_map}; allowed: {', '.join(MAPS)}")
        if self.normalise and self.feature_map != "elu1":
            # A signed map lets the row's sum cross zero.
            raise Refusal(f"mixer decay_attention: normalise with feature_map {self.feature_map}; allowed: elu1")


class DecayAttention(Scanned):
    """Channels: conv [q (H, R), k (H, R)], raw [logit of the decay (H)] if it is selective."""

    Args: ClassVar = Args
    levels: ClassVar = (True,)
    forms: ClassVar = tuple(
        {"decay": decay} | norm
        for decay in ("selective", "fixed")
        for norm in ({}, {"feature_map": "elu1", "normalise": True})
    )
    knobs: ClassVar = ("rank",)
    backends: ClassVar = ("torch", "triton")

    def __init__(self, grant: Grant, args: Args, backend: str):
        super().__init__(grant, backend, args.rank)
        self.args = args
        # One axis: the optimiser's rule decays parameters of two or more.
        self.bias_H = nn.Parameter(torch.empty(grant.heads))

    @property
    def wants(self) -> Wants:
        selective = self.args.decay == "selective"
        return Wants(conv=2 * self.grant.heads * self.args.rank, raw=self.grant.heads if selective else 0, exact=0)

    def initial(self, name: str, generator: torch.Generator) -> Tensor:
        """The logit of 1 - a."""
        steps = self.get_parameter(name).shape[0]
        return torch.linspace(math.log(1 / 32), math.log(1 / 512), steps, device="cpu").exp().logit()

    def forward(self, v_BLHP: Tensor, features: Features, segments_BL: Tensor) -> Tensor:
        real_BL11 = real(segments_BL, v_BLHP.dtype)
        terms = self.terms(features, segments_BL)
        if self.on_chip(v_BLHP):
            y_BLHP = self.by_kernels(v_BLHP, terms, segments_BL)
        else:
            y_BLHP = chunked_scan(v_BLHP * real_BL11, terms, segments_BL, self.grant.packed)
        if self.args.normalise:
            # The sum of a row is the scan of ones, in fp32.
            ones_BL11 = real(segments_BL, terms.rate_BLDH.dtype)
            ones_BLH1 = ones_BL11.expand(-1, -1, self.grant.heads, -1)
            with torch.autocast(v_BLHP.device.type, enabled=False):
                sum_BLH1 = chunked_scan(ones_BLH1, terms, segments_BL, self.grant.packed)
            y_BLHP = (y_BLHP / divisor(sum_BLH1)).to(y_BLHP.dtype)
        return y_BLHP * real_BL11.to(y_BLHP.dtype)

    def with_skip(self, v_BLHP: Tensor, features: Features, segments_BL: Tensor, scale: Tensor) -> Tensor | None:
        """Not of rows that are divided by their sum."""
        return None if self.args.normalise else super().with_skip(v_BLHP, features, segments_BL, scale)

    def terms(self, features: Features, segments_BL: Tensor) -> Terms:
        """What the scan of both directions takes: one c and b for both, dt = 1."""
        q_BLHR, k_BLHR = self.mapped(features)
        if not self.args.normalise:
            n_BL = segment_lengths(segments_BL, self.grant.packed)
            q_BLHR = q_BLHR * (n_BL * self.args.rank).to(q_BLHR.dtype).rsqrt()[:, :, None, None]
        rate_BLDH = self.rate(features)[:, :, None].expand(-1, -1, 2, -1)
        delta_BLH = (q_BLHR * k_BLHR).sum(-1)
        return Terms(q_BLHR[:, :, None], k_BLHR[:, :, None], torch.ones_like(rate_BLDH), rate_BLDH, delta_BLH)

    def mapped(self, features: Features) -> tuple[Tensor, Tensor]:
        """phi(q), phi(k), each BLHR, at least fp32."""
        conv_BLK = features.conv_BLK
        conv_BLK = MAPS[self.args.feature_map](conv_BLK.to(torch.promote_types(conv_BLK.dtype, torch.float32)))
        return conv_BLK.unflatten(-1, (2, self.grant.heads, self.args.rank)).unbind(2)

    def rate(self, features: Features) -> Tensor:
        """log a, BLH, at least fp32."""
        bias_H = self.bias_H.to(torch.promote_types(self.bias_H.dtype, torch.float32))
        if self.args.decay == "selective":
            return -F.softplus(features.raw_BLK.to(bias_H.dtype) + bias_H)
        return -F.softplus(bias_H).expand(*features.conv_BLK.shape[:2], -1)

    def matrix(self, v_BLHP: Tensor, features: Features, segments_BL: Tensor) -> Tensor:
        dtype = v_BLHP.dtype
        q_BLHR, k_BLHR = (x.to(dtype) for x in self.mapped(features))
        rate_BLH = self.rate(features).to(dtype)
        below_BHLL = products(rate_BLH)
        # The backward products are the forward ones of the reversed row, reversed again.
        decay_BHLL = below_BHLL.tril() + products(rate_BLH.flip(1)).flip(2, 3).triu(1)
        m_BHLL = torch.einsum("bihr,bjhr->bhij", q_BLHR, k_BLHR) * decay_BHLL
        same_B1LL = same_segment(segments_BL)
        m_BHLL = m_BHLL.masked_fill(~same_B1LL, 0.0)
        if self.args.normalise:
            return m_BHLL / divisor(m_BHLL.sum(-1, keepdim=True))
        return m_BHLL / (same_B1LL.sum(-1, keepdim=True).clamp(min=1) * self.args.rank).to(dtype).sqrt()

    def structure(self) -> tuple[str, ...]:
        rank = f"off-diagonal rank {self.args.rank}"
        return (rank, "rows sum to one", "positive") if self.args.normalise else (rank,)

    @property
    def state_size(self) -> int:
        """Of each direction: R * P."""
        return self.args.rank * self.grant.head_width

    def flops(self, length: int) -> int:
        heads, rank, chunk = self.grant.heads, self.args.rank, chunk_of(length)
        chunks = -(-length // chunk)
        total = 0
        for width in (self.grant.head_width, 1) if self.args.normalise else (self.grant.head_width,):
            inside = 2 * length * chunk * heads * (rank + width)
            total += inside + 2 * (2 * 2 * length + 2 * chunks**2) * heads * rank * width  # write, read, carry
        return total
