"""Vandermonde: M_ij = 1 / sqrt(n R) * sum over d of cos(2 pi f_id j) - cos(2 pi g_jd i), f, g in cycles per token.

f = bound * tanh(q), g = bound * tanh(k), bound at most 1/2, beyond which cosines at integers repeat. i, j are places
1, 2, ... in a document: from 0, as published, M_00 = 0 and a lone token has no mixer. From the paper: the exponent is
the product q_id j, and a difference (released without sam: a sum, which at low frequencies averages all tokens).
Not taken: the released factor 1e-3 on q, k, absent from the paper, by which entries start at 3e-4 and M nearly off.
The yaml's bound is 0.05: at 1/2 a phase turns by pi j per unit of q, too steep to learn from on the quick protocols.
sam: q, k are features computed outside autocast (bf16 alone errs by 44 rad at place 8,192), n the document's own number
of tokens (released: the longest length). Not sam: the same form from tables that start standard normal (published:
zeros, where the gradient is zero too), summed over j (published: over the wrong index, so that no token is mixed), with
n the protocol's length and places from the row's start. With spread phases a term has variance one, hence the scale
(released: 1 / sqrt(2 n R)); low frequencies agree in sign, so that the gain starts above one.
Kernels make cosines at the points of a coarse grid only, from which those at all places follow, where the bound allows
one; else they serve long rows only.
Axes: B batch, L length, H heads, P head width, R rank (terms d of the sum), K feature channels or points
of a grid, Q the two of q and k, G heads of q, then those of k.
"""

import dataclasses
import math
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
    real,
    require_length,
    same_segment,
    segment_lengths,
)
from bench.mixers.interpolation import grid

LONG = 1536
"""Points of a grid, of rows of 12,000 tokens under the yaml's bound, beyond which the sums go by Fourier transforms:
written, cosines take time and memory that grow with the square of the length."""


@dataclass(frozen=True)
class Args:
    sam: bool
    heads: int
    rank: int
    bound: float

    def __post_init__(self):
        at_least_one("vandermonde", self, ("heads", "rank"))
        if not 0 < self.bound <= 0.5:
            raise Refusal(f"mixer vandermonde: bound is {self.bound}; allowed: above 0, at most 0.5 cycles per token")


class Vandermonde(Mixer):
    """Channels with sam: exact [q (H, R), k (H, R)]."""

    Args: ClassVar = Args
    levels: ClassVar = (False, True)
    knobs: ClassVar = ("rank",)
    backends: ClassVar = ("torch", "triton")

    def __init__(self, grant: Grant, args: Args, backend: str):
        super().__init__(grant, backend)
        if backend == "triton":
            require_triton()
            from bench.kernels.cosine_sums import cosine_sums
            from bench.kernels.grid_product import grid_product
            from bench.kernels.grid_sums import from_grid, to_grid
            from bench.kernels.nonuniform import apply_nonuniform, gather_nonuniform

            self.cosines, self.product = cosine_sums, grid_product
            self.apply_cosines, self.gather_cosines = apply_nonuniform, gather_nonuniform
            self.to_grid, self.from_grid, self.grid = to_grid, from_grid, grid(args.bound)
        self.args = args
        if not args.sam:
            self.q_LHR = nn.Parameter(torch.empty(grant.length, grant.heads, args.rank))
            self.k_LHR = nn.Parameter(torch.empty(grant.length, grant.heads, args.rank))

    @property
    def wants(self) -> Wants:
        return Wants(conv=0, raw=0, exact=2 * self.grant.heads * self.args.rank if self.args.sam else 0)

    def initial(self, name: str, generator: torch.Generator) -> Tensor:
        return torch.randn(self.get_parameter(name).shape, generator=generator, device="cpu")

    def forward(self, v_BLHP: Tensor, features: Features, segments_BL: Tensor) -> Tensor:
        way = self.way(v_BLHP.shape[1])
        if way == "transforms":
            return self.transformed(v_BLHP, features, segments_BL)
        if way == "points":
            return self.interpolated(v_BLHP, features, segments_BL, None)
        f_BHLR, g_BHLR = self.frequencies(features, v_BLHP.shape[1])
        place_BL = self.places(segments_BL)
        m_BHLL = SumOfCosines.apply(f_BHLR, place_BL) - SumOfCosines.apply(g_BHLR, place_BL).transpose(2, 3)
        real_BL11 = real(segments_BL, v_BLHP.dtype)
        if self.grant.packed:
            m_BHLL = m_BHLL * same_segment(segments_BL)
        y_BLHP = torch.einsum("bhij,bjhp->bihp", m_BHLL.to(v_BLHP.dtype), v_BLHP * real_BL11)
        scale_BL = (self.lengths(segments_BL) * self.args.rank).to(v_BLHP.dtype).rsqrt()
        return y_BLHP * (real_BL11 * scale_BL[:, :, None, None])

    def with_skip(self, v_BLHP: Tensor, features: Features, segments_BL: Tensor, scale: Tensor) -> Tensor | None:
        if self.way(v_BLHP.shape[1]) != "points":
            return None
        return self.interpolated(v_BLHP, features, segments_BL, scale)

    def way(self, length: int) -> str:
        """Of rows of this length: by the matrix, by cosines at a grid's points, or by Fourier transforms."""
        if self.backend != "triton" or self.grant.packed:
            return "matrix"
        if self.points(length)[1] > LONG:
            return "transforms"
        return "matrix" if self.grid is None else "points"

    def points(self, length: int) -> tuple[int, int]:
        """Spacing and number of points: of the coarse grid, or if there is none of all places and place 0."""
        return (1, length + 1) if self.grid is None else (self.grid.spacing, self.grid.size(length))

    def interpolated(self, v_BLHP: Tensor, features: Features, segments_BL: Tensor, scale: Tensor | None) -> Tensor:
        """By matrices of cosines at the points, times what places see of these."""
        length, dtype = v_BLHP.shape[1], v_BLHP.dtype
        spacing, size = self.points(length)
        f_BLGR = self.args.bound * self.unit(features, length).flatten(2, 3).float()
        c_BGKL = self.cosines(f_BLGR, spacing, size, dtype)
        w_LK = self.grid.matrix(length, v_BLHP.device).to(dtype)
        r_BL = (self.lengths(segments_BL) * self.args.rank).float().rsqrt() * (segments_BL > 0)
        return self.product(c_BGKL, w_LK, v_BLHP, r_BL, scale, spacing, self.grid.reach)

    def transformed(self, v_BLHP: Tensor, features: Features, segments_BL: Tensor) -> Tensor:
        """By Fourier transforms: v is summed up at the points, or the sum is interpolated from there."""
        length = v_BLHP.shape[1]
        spacing, size = self.points(length)
        f_BLHR, g_BLHR = (x_BHLR.transpose(1, 2) for x_BHLR in self.frequencies(features, length))
        real_BL11 = real(segments_BL, v_BLHP.dtype)
        v_BLHP = v_BLHP * real_BL11
        first_BLHP = self.apply_cosines(f_BLHR, self.at_points(v_BLHP, size), spacing)
        second_BLHP = self.at_places(self.gather_cosines(g_BLHR, v_BLHP, spacing, size), length)
        scale_BL = (self.lengths(segments_BL) * self.args.rank).to(v_BLHP.dtype).rsqrt()
        return (first_BLHP - second_BLHP) * (real_BL11 * scale_BL[:, :, None, None])

    def at_points(self, v_BLHP: Tensor, size: int) -> Tensor:
        """v at the K points of the coarse grid, BHKP; without one every place is a point, and so is place 0."""
        if self.grid is None:
            return F.pad(v_BLHP.transpose(1, 2), (0, 0, 1, 0))
        return self.to_grid(v_BLHP, self.grid.weights(v_BLHP.device), self.grid.spacing, size)

    def at_places(self, u_BHKP: Tensor, length: int) -> Tensor:
        """Values at the points, at all places 1 to `length`, BLHP."""
        if self.grid is None:
            return u_BHKP[:, :, 1:].transpose(1, 2)
        return self.from_grid(u_BHKP, self.grid.weights(u_BHKP.device), self.grid.spacing, length)

    def places(self, segments_BL: Tensor) -> Tensor:
        """1, 2, ... in each token's own document, or in the row if data-independent; BL, B = 1 if all rows agree."""
        if self.args.sam and self.grant.packed:
            return same_segment(segments_BL)[:, 0].tril().sum(-1)
        return torch.arange(1, segments_BL.shape[1] + 1, device=segments_BL.device)[None]

    def lengths(self, segments_BL: Tensor) -> Tensor:
        """n of the scale, BL."""
        if self.args.sam:
            return segment_lengths(segments_BL, self.grant.packed)
        return torch.full_like(segments_BL, self.grant.length)

    def frequencies(self, features: Features, length: int) -> tuple[Tensor, Tensor]:
        """f, g, each BHLR, at least fp32, within -bound and bound; B = 1 if data-independent."""
        f_BLHR, g_BLHR = (self.args.bound * self.unit(features, length)).unbind(2)
        return f_BLHR.transpose(1, 2), g_BLHR.transpose(1, 2)

    def unit(self, features: Features, length: int) -> Tensor:
        """f and g as parts of the bound, BLQHR."""
        if self.args.sam:
            exact_BLK = features.exact_BLK
            exact_BLK = exact_BLK.to(torch.promote_types(exact_BLK.dtype, torch.float32))
            x_BLQHR = exact_BLK.unflatten(-1, (2, self.grant.heads, self.args.rank))
        else:
            require_length(length, self.grant.length, "vandermonde")
            x_BLQHR = torch.stack([self.q_LHR[None, :length], self.k_LHR[None, :length]], dim=2)
        return torch.tanh(x_BLQHR)

    def matrix(self, v_BLHP: Tensor, features: Features, segments_BL: Tensor) -> Tensor:
        """Phases in fp64 whatever the dtype of v, so that they need no reduction."""
        f_BHLR, g_BHLR = (2 * math.pi * x.double() for x in self.frequencies(features, v_BLHP.shape[1]))
        place_BL = self.places(segments_BL).double()
        at_i_B1L1, at_j_B11L = place_BL[:, None, :, None], place_BL[:, None, None]
        m_BHLL = 0.0
        for f_BHL, g_BHL in zip(f_BHLR.unbind(-1), g_BHLR.unbind(-1), strict=True):
            m_BHLL = m_BHLL + (f_BHL[..., None] * at_j_B11L).cos() - (g_BHL[:, :, None] * at_i_B1L1).cos()
        m_BHLL = m_BHLL * (self.lengths(segments_BL) * self.args.rank).double().rsqrt()[:, None, :, None]
        return m_BHLL.to(v_BLHP.dtype).masked_fill(~same_segment(segments_BL), 0.0)

    def structure(self) -> tuple[str, ...]:
        return ("differences of cosines",) if self.args.rank == 1 else ()

    def simplest(self) -> Mixer | None:
        one = dataclasses.replace(self.args, rank=1)
        return None if one == self.args else type(self)(self.grant, one, self.backend)

    @property
    def state_size(self) -> None:
        return None

    def flops(self, length: int) -> int:
        """Eight operations for each of two cosines of a term (a phase in two parts, its reduction, the sum)."""
        return self.grant.heads * length**2 * (16 * self.args.rank + 2 * self.grant.head_width)


def turns(frequency: Tensor, place: Tensor) -> Tensor:
    """frequency * place less whole turns, broadcast, in the dtype of the frequency, at least fp32.

    The frequency's first eleven binary places give a product that is exact, at fp32 up to place 16,384; the rest is
    below four turns there. So what remains at place 8,192 is 3e-7 turns, and what the frequency itself was rounded by:
    in fp32 near half a cycle per token 1.5e-8, or 1.2e-4 turns (8e-4 rad).
    """
    place = place.to(frequency.dtype)
    coarse = (frequency * 2048).round() / 2048
    whole = coarse * place
    return (whole - whole.round()) + (frequency - coarse) * place


class SumOfCosines(torch.autograd.Function):
    """c_BHLL = sum over d of cos(2 pi f_id place_j), one d at a time in both passes.

    Autograd alone would keep every term for the backward pass: R matrices of L x L. Places have no gradient.
    """

    @staticmethod
    def forward(ctx, f_BHLR: Tensor, place_BL: Tensor) -> Tensor:
        ctx.save_for_backward(f_BHLR, place_BL)
        c_BHLL = f_BHLR.new_zeros(*f_BHLR.shape[:-1], place_BL.shape[-1])
        for d in range(f_BHLR.shape[-1]):
            c_BHLL = c_BHLL + torch.cos(2 * math.pi * turns(f_BHLR[..., d, None], place_BL[:, None, None]))
        return c_BHLL

    @staticmethod
    def backward(ctx, grad_BHLL: Tensor) -> tuple[Tensor, None]:
        f_BHLR, place_BL = ctx.saved_tensors
        weighted_BHLL = grad_BHLL * (-2 * math.pi * place_BL[:, None, None].to(grad_BHLL.dtype))
        by_f = []
        for d in range(f_BHLR.shape[-1]):
            sine_BHLL = torch.sin(2 * math.pi * turns(f_BHLR[..., d, None], place_BL[:, None, None]))
            by_f.append((weighted_BHLL * sine_BHLL).sum(-1))
        return torch.stack(by_f, -1), None
