"""Low rank: M_ij = phi(q_i) . phi(k_j) times a scale (linear attention, Prop. 2.6), rank at most `rank`.

sam: q, k are features; the scale is 1 / sqrt(n rank), n the segment's own number of tokens (released: the longest
length, which freezes it), or, with `normalise`, one over the sum of the row, which needs a positive map (elu + 1).
Not sam: q, k are free tables that pass the same map (published: `none`), scaled with the protocol's length; they
start standard normal, since the published start makes entries of 2e-5.
Axes: B batch, L length, H heads, P head width, R rank, K feature channels.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import Refusal
from bench.kernels import require_triton
from bench.mixers.base import (
    Features,
    Grant,
    Mixer,
    Wants,
    at_least_one,
    divisor,
    elu_plus_one,
    real,
    require_length,
    same_segment,
    segment_lengths,
)

MAPS = {"silu": F.silu, "elu1": elu_plus_one, "none": lambda x: x}


@dataclass(frozen=True)
class Args:
    sam: bool
    heads: int
    rank: int
    feature_map: str
    normalise: bool

    def __post_init__(self):
        at_least_one("low_rank", self, ("heads", "rank"))
        if self.feature_map not in MAPS:
            raise Refusal(f"mixer low_rank: feature_map is {self.feature_map}; allowed: {', '.join(MAPS)}")
        if self.normalise and self.feature_map != "elu1":
            # A signed map lets the row's sum cross zero.
            raise Refusal(f"mixer low_rank: normalise with feature_map {self.feature_map}; allowed: elu1")


class LowRank(Mixer):
    """Channels with sam: conv [q (H, R), k (H, R)]."""

    Args: ClassVar = Args
    levels: ClassVar = (False, True)
    forms: ClassVar = ({}, {"feature_map": "elu1"}, {"feature_map": "none"}, {"feature_map": "elu1", "normalise": True})
    knobs: ClassVar = ("rank",)
    backends: ClassVar = ("torch", "triton")

    def __init__(self, grant: Grant, args: Args, backend: str):
        super().__init__(grant, backend)
        if backend == "triton":
            require_triton()
            from bench.kernels.low_rank import low_rank_product
            from bench.kernels.scan import scan, takes

            self.product, self.scan, self.takes = low_rank_product, scan, takes
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
        if self.backend == "triton" and not self.grant.packed:
            return self.product(*self.factors(v_BLHP, features, segments_BL), v_BLHP)
        if self.grant.packed:
            q_BLHR, k_BLHR = self.mapped(features, v_BLHP.shape[1])
            fused = self.backend == "triton" and self.takes(v_BLHP, q_BLHR.shape[-1])
            way = self.scanned if fused else self.quadratic
            return way(q_BLHR, k_BLHR, v_BLHP, segments_BL)
        dtype, real_BL11 = v_BLHP.dtype, real(segments_BL, v_BLHP.dtype)
        q_BLHR, k_BLHR = self.scaled(features, segments_BL)
        v_BLHP = v_BLHP * real_BL11
        state_BHRP = torch.einsum("bjhr,bjhp->bhrp", k_BLHR.to(dtype), v_BLHP)
        y_BLHP = torch.einsum("bihr,bhrp->bihp", q_BLHR.to(dtype), state_BHRP)
        return y_BLHP * real_BL11.to(y_BLHP.dtype)

    def with_skip(self, v_BLHP: Tensor, features: Features, segments_BL: Tensor, scale: Tensor) -> Tensor | None:
        if self.backend != "triton" or self.grant.packed:
            return None
        return self.product(*self.factors(v_BLHP, features, segments_BL), v_BLHP, scale)

    def scaled(self, features: Features, segments_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Rows that hold one document: q by which M is q k^T, and k, each BLHR, at least fp32."""
        q_BLHR, k_BLHR = self.mapped(features, segments_BL.shape[1])
        if not self.args.normalise:
            return q_BLHR * self.scale(segments_BL, q_BLHR.dtype)[:, :, None, None], k_BLHR
        sum_B1HR = (k_BLHR * real(segments_BL, k_BLHR.dtype)).sum(1, keepdim=True)
        return q_BLHR / divisor((q_BLHR * sum_B1HR).sum(-1, keepdim=True)), k_BLHR

    def factors(self, v_BLHP: Tensor, features: Features, segments_BL: Tensor) -> Iterator[Tensor]:
        """These as kernels take them: zero on padding, in the dtype of v."""
        for x_BLHR in self.scaled(features, segments_BL):
            x_BLHR = (x_BLHR * real(segments_BL, x_BLHR.dtype)).to(v_BLHP.dtype)
            yield x_BLHR.expand(len(v_BLHP), -1, -1, -1)

    def quadratic(self, q_BLHR: Tensor, k_BLHR: Tensor, v_BLHP: Tensor, segments_BL: Tensor) -> Tensor:
        """Packed rows: the masked L x L matrix."""
        m_BHLL = torch.einsum("bihr,bjhr->bhij", q_BLHR, k_BLHR).to(q_BLHR.dtype) * same_segment(segments_BL)
        if self.args.normalise:
            m_BHLL = m_BHLL / divisor(m_BHLL.sum(-1, keepdim=True))
        else:
            m_BHLL = m_BHLL * self.scale(segments_BL, m_BHLL.dtype)[:, None, :, None]
        return torch.einsum("bhij,bjhp->bihp", m_BHLL.to(v_BLHP.dtype), v_BLHP)

    def scanned(self, q_BLHR: Tensor, k_BLHR: Tensor, v_BLHP: Tensor, segments_BL: Tensor) -> Tensor:
        """Packed rows in linear memory: scans in both directions without decay, which end with their document."""
        q_BLHR, k_BLHR = (x * real(segments_BL, x.dtype) for x in (q_BLHR, k_BLHR))
        if not self.args.normalise:
            q_BLHR = q_BLHR * self.scale(segments_BL, q_BLHR.dtype)[:, :, None, None]
        own_BLH = (q_BLHR * k_BLHR).sum(-1)
        none_BLDH = own_BLH.new_zeros(len(v_BLHP), own_BLH.shape[1], 2, self.grant.heads)
        terms = (q_BLHR[:, :, None], k_BLHR[:, :, None], none_BLDH + 1, none_BLDH, own_BLH)
        y_BLHP = self.scan(v_BLHP, *terms, segments_BL, True)
        if not self.args.normalise:
            return y_BLHP
        sum_BLH1 = self.scan(torch.ones_like(v_BLHP[..., :1]), *terms, segments_BL, True)
        return y_BLHP / divisor(sum_BLH1)

    def mapped(self, features: Features, length: int) -> tuple[Tensor, Tensor]:
        """phi(q), phi(k), each BLHR, at least fp32 (B = 1 if data-independent)."""
        phi = MAPS[self.args.feature_map]
        if self.args.sam:
            conv_BLK = features.conv_BLK
            conv_BLK = conv_BLK.to(torch.promote_types(conv_BLK.dtype, torch.float32))
            return phi(conv_BLK).unflatten(-1, (2, self.grant.heads, self.args.rank)).unbind(2)
        require_length(length, self.grant.length, "low_rank")
        return phi(self.q_LHR[None, :length]), phi(self.k_LHR[None, :length])

    def scale(self, segments_BL: Tensor, dtype: torch.dtype) -> Tensor:
        """What multiplies each row of phi(q) phi(k)^T, BL, unless rows are normalised."""
        if self.args.sam:
            return (segment_lengths(segments_BL, self.grant.packed) * self.args.rank).to(dtype).rsqrt()
        return torch.full_like(segments_BL, (self.grant.length * self.args.rank) ** -0.5, dtype=dtype)

    def matrix(self, v_BLHP: Tensor, features: Features, segments_BL: Tensor) -> Tensor:
        dtype = v_BLHP.dtype
        q_BLHR, k_BLHR = self.mapped(features, v_BLHP.shape[1])
        m_BHLL = q_BLHR.to(dtype).transpose(1, 2) @ k_BLHR.to(dtype).permute(0, 2, 3, 1)
        same_B1LL = same_segment(segments_BL)
        m_BHLL = torch.where(same_B1LL, m_BHLL, 0.0)
        if self.args.normalise:
            return m_BHLL / divisor(m_BHLL.sum(-1, keepdim=True))
        if self.args.sam:
            n_B1L1 = same_B1LL.sum(-1, keepdim=True).clamp(min=1).to(dtype)
            return m_BHLL / (n_B1L1 * self.args.rank).sqrt()
        return m_BHLL / (self.grant.length * self.args.rank) ** 0.5

    def structure(self) -> tuple[str, ...]:
        rank = f"rank {self.args.rank}"
        return (rank, "rows sum to one", "positive") if self.args.normalise else (rank,)

    @property
    def state_size(self) -> int:
        return self.args.rank * self.grant.head_width

    def flops(self, length: int) -> int:
        heads, rank, width = self.grant.heads, self.args.rank, self.grant.head_width
        if self.grant.packed:
            return 2 * heads * length**2 * (rank + width)
        return 4 * heads * length * rank * width
