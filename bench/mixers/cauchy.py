"""Cauchy: M_ij = scale * mean over d of 2 / (a_id + b_jd) with positive nodes, so that there is no pole.

a = exp(clamp(g_d q)), b = exp(clamp(g_d k)), clamp(x) = bound * tanh(x / bound): smooth, so gradients fade beyond it
instead of stopping. Departures: the paper's 1 / (q - k + c) has poles; its released form 1 / (exp(q) + exp(k) + 2c)
has none, but is nearly constant at the start. Here c is left out (the clamp bounds a + b from below), and a learned g,
4 at the start, spreads the nodes: features begin near 0.3, without it entries would differ by a few per cent.
sam: q, k are features without activation, scale 1 / sqrt(n), n the segment's own number of tokens (released: the
longest length, which freezes it). Not sam: tables that start standard normal, g = 1 fixed, n the protocol's length.
A mean over d (released: a sum over sqrt(d)), since terms of one sign add up in proportion to their number.
Axes: B batch, L length, H heads, P head width, R rank (terms d of the sum), K feature channels.
"""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from bench import Refusal
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
    segment_lengths,
)
from bench.mixers.exponentials import exponentials


@dataclass(frozen=True)
class Args:
    sam: bool
    heads: int
    rank: int
    bound: float

    def __post_init__(self):
        at_least_one("cauchy", self, ("heads", "rank"))
        if not 0 < self.bound <= 20:
            # exp(20)^2, which the gradient holds, is far from the largest fp32; its inverse too.
            raise Refusal(f"mixer cauchy: bound is {self.bound}; allowed: above 0, at most 20")


class Cauchy(Mixer):
    """Channels with sam: conv [q (H, R), k (H, R)]."""

    Args: ClassVar = Args
    levels: ClassVar = (False, True)
    knobs: ClassVar = ("rank",)
    backends: ClassVar = ("torch", "triton")

    def __init__(self, grant: Grant, args: Args, backend: str):
        super().__init__(grant, backend)
        if backend == "triton":
            require_triton()
            from bench.kernels.exponential_product import exponential_product

            self.product = exponential_product
            self.terms = [list(x) for x in zip(*exponentials(args.bound), strict=True)]  # rates, weights
        self.args = args
        if args.sam:
            # One axis: the optimiser's rule decays parameters of two or more.
            self.gain_K = nn.Parameter(torch.empty(2 * grant.heads * args.rank))
        else:
            self.q_LHR = nn.Parameter(torch.empty(grant.length, grant.heads, args.rank))
            self.k_LHR = nn.Parameter(torch.empty(grant.length, grant.heads, args.rank))

    @property
    def wants(self) -> Wants:
        return Wants(conv=2 * self.grant.heads * self.args.rank if self.args.sam else 0, raw=0, exact=0)

    def initial(self, name: str, generator: torch.Generator) -> Tensor:
        shape = self.get_parameter(name).shape
        if name == "gain_K":
            return torch.full(shape, 4.0, device="cpu")
        return torch.randn(shape, generator=generator, device="cpu")

    def forward(self, v_BLHP: Tensor, features: Features, segments_BL: Tensor) -> Tensor:
        if self.backend == "triton" and not self.grant.packed:
            return self.factored(v_BLHP, features, segments_BL)
        a_BHLR, b_BHLR = self.nodes(features, v_BLHP.shape[1])
        m_BHLL = MeanOfInverses.apply(a_BHLR, b_BHLR)
        real_BL11 = real(segments_BL, v_BLHP.dtype)
        if self.grant.packed:
            m_BHLL = m_BHLL * same_segment(segments_BL)
        y_BLHP = torch.einsum("bhij,bjhp->bihp", m_BHLL.to(v_BLHP.dtype), v_BLHP * real_BL11)
        return y_BLHP * (real_BL11 * self.lengths(segments_BL)[:, :, None, None].to(v_BLHP.dtype).rsqrt())

    def factored(self, v_BLHP: Tensor, features: Features, segments_BL: Tensor) -> Tensor:
        """In linear time: with 1 / (a + b) a sum of exponentials, M has rank R times their number."""
        batch, length = v_BLHP.shape[:2]
        a_BLHR, b_BLHR = (x.transpose(1, 2).expand(batch, -1, -1, -1) for x in self.nodes(features, length))
        real_BL = (segments_BL > 0).to(a_BLHR.dtype)
        scale_BL = real_BL * self.lengths(segments_BL).to(a_BLHR.dtype).rsqrt() * (2 / self.args.rank)
        return self.product(a_BLHR, b_BLHR, v_BLHP, scale_BL, real_BL, *self.terms)

    def lengths(self, segments_BL: Tensor) -> Tensor:
        """n of the scale, BL."""
        if self.args.sam:
            return segment_lengths(segments_BL, self.grant.packed)
        return torch.full_like(segments_BL, self.grant.length)

    def nodes(self, features: Features, length: int) -> tuple[Tensor, Tensor]:
        """a, b, each BHLR, at least fp32, within exp(-bound) and exp(bound); B = 1 if data-independent."""
        if self.args.sam:
            wide = torch.promote_types(features.conv_BLK.dtype, self.gain_K.dtype)
            x_BLK = features.conv_BLK.to(wide) * self.gain_K
            x_BLQHR = x_BLK.unflatten(-1, (2, self.grant.heads, self.args.rank))
        else:
            require_length(length, self.grant.length, "cauchy")
            x_BLQHR = torch.stack([self.q_LHR[None, :length], self.k_LHR[None, :length]], dim=2)
        bound = self.args.bound
        a_BLHR, b_BLHR = (bound * torch.tanh(x_BLQHR / bound)).exp().unbind(2)
        return a_BLHR.transpose(1, 2), b_BLHR.transpose(1, 2)

    def matrix(self, v_BLHP: Tensor, features: Features, segments_BL: Tensor) -> Tensor:
        a_BHLR, b_BHLR = (x.to(v_BLHP.dtype) for x in self.nodes(features, v_BLHP.shape[1]))
        terms = zip(a_BHLR.unbind(-1), b_BHLR.unbind(-1), strict=True)
        m_BHLL = sum(2 / (a_BHL[..., None] + b_BHL[:, :, None]) for a_BHL, b_BHL in terms) / self.args.rank
        same_B1LL = same_segment(segments_BL)
        if self.args.sam:
            m_BHLL = m_BHLL / same_B1LL.sum(-1, keepdim=True).clamp(min=1).to(m_BHLL.dtype).sqrt()
        else:
            m_BHLL = m_BHLL / self.grant.length**0.5
        return m_BHLL.masked_fill(~same_B1LL, 0.0)

    def structure(self) -> tuple[str, ...]:
        return ("positive", "reciprocal sums") if self.args.rank == 1 else ("positive",)

    def simplest(self) -> Mixer | None:
        one = dataclasses.replace(self.args, rank=1)
        return None if one == self.args else type(self)(self.grant, one, self.backend)

    @property
    def state_size(self) -> None:
        return None

    def flops(self, length: int) -> int:
        """An addition, a division and a sum for each term, then the product with v."""
        return self.grant.heads * length**2 * (3 * self.args.rank + 2 * self.grant.head_width)


class MeanOfInverses(torch.autograd.Function):
    """m_BHLL = mean over d of 2 / (a_id + b_jd), one d at a time in both passes.

    Autograd alone would keep every term for the backward pass: R matrices of L x L, 1.5 GiB in the released code.
    """

    @staticmethod
    def forward(ctx, a_BHLR: Tensor, b_BHLR: Tensor) -> Tensor:
        ctx.save_for_backward(a_BHLR, b_BHLR)
        rank = a_BHLR.shape[-1]
        m_BHLL = a_BHLR.new_zeros(*a_BHLR.shape[:-1], b_BHLR.shape[-2])
        for d in range(rank):
            m_BHLL = m_BHLL + (a_BHLR[..., d, None] + b_BHLR[..., None, :, d]).reciprocal()
        return m_BHLL * (2 / rank)

    @staticmethod
    def backward(ctx, grad_BHLL: Tensor) -> tuple[Tensor, Tensor]:
        a_BHLR, b_BHLR = ctx.saved_tensors
        rank = a_BHLR.shape[-1]
        by_a, by_b = [], []
        for d in range(rank):
            inverse_BHLL = (a_BHLR[..., d, None] + b_BHLR[..., None, :, d]).reciprocal()
            slope_BHLL = grad_BHLL * inverse_BHLL * inverse_BHLL
            by_a.append(slope_BHLL.sum(-1))
            by_b.append(slope_BHLL.sum(-2))
        return torch.stack(by_a, -1) * (-2 / rank), torch.stack(by_b, -1) * (-2 / rank)
