"""Two right mixers and many that are each wrong in one way: what the conformance suite is there to find.

`Table` has a free matrix (not SAM), `Aligned` is linear attention (SAM); both compute `forward` by `matrix`, so that an
error is in both unless it is meant to part them. Axes: B batch, L length, H heads, P head width, R rank.
"""

import dataclasses
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from bench.mixers.base import Mixer, Wants, real, require_length, same_segment, segment_lengths
from bench.mixers.vandermonde import Vandermonde

RANK = 4


class Quadratic(Mixer):
    """`forward` by `matrix`; L^2."""

    levels = (False, True)
    sam = False
    conv = 0

    def __init__(self, grant):
        super().__init__(grant, "torch")

    @property
    def wants(self):
        return Wants(conv=self.conv * self.grant.heads, raw=0, exact=0)

    def initial(self, name, generator):
        return torch.randn(self.get_parameter(name).shape, generator=generator) / self.grant.length**0.5

    def forward(self, v_BLHP, features, segments_BL):
        wide = torch.promote_types(v_BLHP.dtype, torch.float32)
        m_BHLL = self.entries(v_BLHP.to(wide), features, segments_BL)
        return torch.einsum("bhij,bjhp->bihp", m_BHLL.to(v_BLHP.dtype), v_BLHP)

    def matrix(self, v_BLHP, features, segments_BL):
        return self.entries(v_BLHP, features, segments_BL)

    @property
    def state_size(self):
        return None

    def flops(self, length):
        return 2 * self.grant.heads * length**2 * (RANK + self.grant.head_width)


class Table(Quadratic):
    def __init__(self, grant):
        super().__init__(grant)
        self.t_HLL = nn.Parameter(torch.empty(grant.heads, grant.length, grant.length))

    def entries(self, v_BLHP, features, segments_BL):
        length = v_BLHP.shape[1]
        require_length(length, self.grant.length, "table")
        return self.t_HLL[:, :length, :length].to(v_BLHP.dtype) * same_segment(segments_BL)

    def flops(self, length):
        return 2 * self.grant.heads * length**2 * self.grant.head_width


class Aligned(Quadratic):
    sam = True
    conv = 2 * RANK

    def queries_keys(self, v_BLHP, features):
        conv_BLK = features.conv_BLK.to(v_BLHP.dtype)
        return F.silu(conv_BLK.unflatten(-1, (2, self.grant.heads, RANK))).unbind(2)

    def raw(self, v_BLHP, features):
        q_BLHR, k_BLHR = self.queries_keys(v_BLHP, features)
        return torch.einsum("bihr,bjhr->bhij", q_BLHR, k_BLHR).to(v_BLHP.dtype)

    def scale(self, segments_BL, dtype):
        return segment_lengths(segments_BL, self.grant.packed).to(dtype).rsqrt()[:, None, :, None]

    def entries(self, v_BLHP, features, segments_BL):
        return self.raw(v_BLHP, features) * same_segment(segments_BL) * self.scale(segments_BL, v_BLHP.dtype)

    @property
    def state_size(self):
        return RANK * self.grant.head_width


# Wrong in what it computes


class NoMix(Aligned):
    """The published contraction of the Vandermonde arm: each token times the sum of its own row."""

    def entries(self, v_BLHP, features, segments_BL):
        return torch.diag_embed(super().entries(v_BLHP, features, segments_BL).sum(-1))


class DeadStart(Table):
    """Cosines of phases that start at zero: M is not zero, its gradient is."""

    def initial(self, name, generator):
        return torch.zeros(self.get_parameter(name).shape)

    def entries(self, v_BLHP, features, segments_BL):
        length = v_BLHP.shape[1]
        require_length(length, self.grant.length, "dead")
        place_L = torch.arange(length).to(v_BLHP.dtype)
        phase_HLL = self.t_HLL[:, :length, :length].to(v_BLHP.dtype) * (place_L + 1)
        return phase_HLL.cos() * same_segment(segments_BL) / self.grant.length


class ZeroStart(Aligned):
    """A scale that starts at zero: everything behind it is dead."""

    def __init__(self, grant):
        super().__init__(grant)
        self.s_H = nn.Parameter(torch.empty(grant.heads))

    def initial(self, name, generator):
        return torch.zeros(self.get_parameter(name).shape)

    def entries(self, v_BLHP, features, segments_BL):
        return super().entries(v_BLHP, features, segments_BL) * self.s_H.to(v_BLHP.dtype)[:, None, None]


class DeadChannel(Aligned):
    conv = 2 * RANK + 1

    def queries_keys(self, v_BLHP, features):
        return super().queries_keys(v_BLHP, features._replace(conv_BLK=features.conv_BLK[..., self.grant.heads :]))


class Lags(Table):
    """A Toeplitz matrix, right."""

    def __init__(self, grant):
        Quadratic.__init__(self, grant)
        self.t_HK = nn.Parameter(torch.empty(grant.heads, 2 * grant.length - 1))

    def structure(self):
        return ("constant diagonals",)

    def lags(self, length):
        return torch.arange(length)[:, None] - torch.arange(length) + self.grant.length - 1

    def entries(self, v_BLHP, features, segments_BL):
        require_length(v_BLHP.shape[1], self.grant.length, "lags")
        return self.t_HK[:, self.lags(v_BLHP.shape[1])].to(v_BLHP.dtype) * same_segment(segments_BL)


class ShiftedLags(Lags):
    """The published Toeplitz: the own token is lag 1 and the lag that falls off wraps round; `matrix` right."""

    def forward(self, v_BLHP, features, segments_BL):
        shifted_HK = self.t_HK.roll(-1, dims=1)
        m_HLL = shifted_HK[:, self.lags(v_BLHP.shape[1])].to(v_BLHP.dtype)
        return torch.einsum("bhij,bjhp->bihp", m_HLL * same_segment(segments_BL), v_BLHP)


class UnevenLags(Lags):
    def entries(self, v_BLHP, features, segments_BL):
        place_L = torch.arange(v_BLHP.shape[1]).to(v_BLHP.dtype)
        return super().entries(v_BLHP, features, segments_BL) * (1 + 1e-3 * place_L)


class EmittedLags(Quadratic):
    """Token d of a document emits the weights of lag d and -d: a Toeplitz SAM, right."""

    sam = True
    conv = 2
    shift = 0

    def structure(self):
        return ("constant diagonals",)

    def entries(self, v_BLHP, features, segments_BL):
        length, same_B1LL = v_BLHP.shape[1], same_segment(segments_BL)
        lag_LL = torch.arange(length)[:, None] - torch.arange(length) + self.shift
        start_BL, size_BL = same_B1LL[:, 0].int().argmax(-1), same_B1LL[:, 0].sum(-1).clamp(min=1)
        source_BLL = start_BL[..., None] + lag_LL.abs() % size_BL[..., None]
        source_BLL = source_BLL.clamp(max=length - 1) + length * (lag_LL < 0)
        w_BHK = features.conv_BLK.to(v_BLHP.dtype).transpose(1, 2).unflatten(1, (-1, 2)).flatten(2)
        m_BHK = w_BHK.gather(-1, source_BLL.flatten(1)[:, None].expand(-1, self.grant.heads, -1))
        return m_BHK.unflatten(-1, (length, length)) * same_B1LL / size_BL[:, None, :, None] ** 0.5


class ShiftedEmittedLags(EmittedLags):
    """The published one, in `matrix` too: the own token is lag 1, so M_00 is emitted by token 1."""

    shift = 1


class SwappedOutput(Aligned):
    """Heads and length swapped by a reshape where a transposition is due."""

    def forward(self, v_BLHP, features, segments_BL):
        y_BLHP = super().forward(v_BLHP, features, segments_BL)
        return y_BLHP.transpose(1, 2).reshape(y_BLHP.shape) * real(segments_BL, y_BLHP.dtype)


class SwappedFeatures(Aligned):
    """The same on the way in, in `matrix` too: heads read other tokens' channels."""

    def queries_keys(self, v_BLHP, features):
        q_BLHR, k_BLHR = super().queries_keys(v_BLHP, features)
        shape = q_BLHR.transpose(1, 2).shape
        return q_BLHR.reshape(shape).transpose(1, 2), k_BLHR.reshape(shape).transpose(1, 2)


class Detached(Aligned):
    """Keys are cut from the graph, in `matrix` too."""

    def queries_keys(self, v_BLHP, features):
        q_BLHR, k_BLHR = super().queries_keys(v_BLHP, features)
        return q_BLHR, k_BLHR * 0.5 + k_BLHR.detach() * 0.5


class DetachedWhenCompiled(Aligned):
    """Right as it is written; a compiler makes it lose the gradient of the keys."""

    def queries_keys(self, v_BLHP, features):
        q_BLHR, k_BLHR = super().queries_keys(v_BLHP, features)
        return q_BLHR, k_BLHR.detach() if torch.compiler.is_compiling() else k_BLHR


class Rectified(Aligned):
    def forward(self, v_BLHP, features, segments_BL):
        return super().forward(v_BLHP, features, segments_BL).relu()


class NoRefusal(Table):
    """Longer rows than its table get the last entry again."""

    def entries(self, v_BLHP, features, segments_BL):
        at_L = torch.arange(v_BLHP.shape[1]).clamp(max=self.grant.length - 1)
        return self.t_HLL[:, at_L[:, None], at_L].to(v_BLHP.dtype) * same_segment(segments_BL)


# Not linear in v


class Product(Aligned):
    """Two attentions multiplied entry by entry, the second with queries and keys exchanged; right."""

    def forward(self, v_BLHP, features, segments_BL):
        y_BLHP = torch.ones_like(v_BLHP)
        for m_BHLL in self.matrices(v_BLHP, features, segments_BL):
            y_BLHP = y_BLHP * torch.einsum("bhij,bjhp->bihp", m_BHLL.to(v_BLHP.dtype), v_BLHP)
        return y_BLHP

    def matrix(self, v_BLHP, features, segments_BL):
        raise NotImplementedError("no matrix")

    def factor(self, v_BLHP, features, segments_BL):
        """Of the same channels, transposed."""
        conv_BLK = torch.cat(features.conv_BLK.chunk(2, -1)[::-1], -1)
        return self.entries(v_BLHP, features._replace(conv_BLK=conv_BLK), segments_BL)

    def matrices(self, v_BLHP, features, segments_BL):
        return self.entries(v_BLHP, features, segments_BL), self.factor(v_BLHP, features, segments_BL)

    def structure(self):
        return ("not linear",)

    def flops(self, length):
        return 2 * super().flops(length)


class UndeclaredProduct(Product):
    def structure(self):
        return ()


class DeclaredNotLinear(Aligned):
    """Linear, but calls itself not linear to be let off."""

    def structure(self):
        return ("not linear",)


class MovingFactor(Product):
    """A factor that looks at v: no product of linear maps."""

    def factor(self, v_BLHP, features, segments_BL):
        gate_BH1L = torch.sigmoid(v_BLHP.mean(-1)).transpose(1, 2)[:, :, None]
        return super().factor(v_BLHP, features, segments_BL) * gate_BH1L


class OtherFactor(Product):
    """`forward` multiplies by the first factor twice; `matrices` right."""

    def forward(self, v_BLHP, features, segments_BL):
        m_BHLL = self.entries(v_BLHP, features, segments_BL)
        return torch.einsum("bhij,bjhp->bihp", m_BHLL.to(v_BLHP.dtype), v_BLHP) ** 2


class UnmixedProduct(Product):
    """Each token's v squared, times what its row says."""

    def matrices(self, v_BLHP, features, segments_BL):
        return tuple(torch.diag_embed(m_BHLL.sum(-1)) for m_BHLL in super().matrices(v_BLHP, features, segments_BL))


class LeakingFactor(Product):
    """The second factor is masked nowhere; the first one's zero rows hide that from the output on padding."""

    def factor(self, v_BLHP, features, segments_BL):
        return self.raw(v_BLHP, features) / v_BLHP.shape[1] ** 0.5


class MisalignedFactor(Product):
    """The second factor reads each token's mirror image."""

    def factor(self, v_BLHP, features, segments_BL):
        return super().factor(v_BLHP, features._replace(conv_BLK=features.conv_BLK.flip(1)), segments_BL)


class DataFactor(Product):
    """Calls itself not SAM."""

    sam = False


# Wrong in what a token sees


class SoftmaxOverPadding(Aligned):
    def entries(self, v_BLHP, features, segments_BL):
        return self.raw(v_BLHP, features).softmax(-1) * same_segment(segments_BL)


class BackwardScan(Quadratic):
    """y_i = sum over j >= i of the product of decays times k_j v_j, plus the same forwards; right."""

    sam = True
    conv = 2
    mask_backward = True

    @property
    def state_size(self):
        return self.grant.head_width

    def forward(self, v_BLHP, features, segments_BL):
        return super().forward(v_BLHP, features, segments_BL) * real(segments_BL, v_BLHP.dtype)

    def entries(self, v_BLHP, features, segments_BL):
        decay_BHL, k_BHL = features.conv_BLK.to(v_BLHP.dtype).transpose(1, 2).chunk(2, 1)
        sum_BHL = F.logsigmoid(decay_BHL + 2).cumsum(-1)
        between_BHLL = -(sum_BHL[..., :, None] - sum_BHL[..., None, :]).abs()
        m_BHLL = between_BHLL.exp() * F.silu(k_BHL)[:, :, None]
        same_B1LL = same_segment(segments_BL)
        if not self.mask_backward:
            same_B1LL = same_B1LL | (segments_BL == 0)[:, None, None] & (segments_BL > 0)[:, None, :, None]
        return m_BHLL * same_B1LL / 4


class BackwardFromPadding(BackwardScan):
    """The backward scan starts at the end of the row, inside the padding."""

    mask_backward = False


class SegmentLeak(Aligned):
    """Masks padding only."""

    def entries(self, v_BLHP, features, segments_BL):
        real_BL = (segments_BL > 0).to(v_BLHP.dtype)
        return self.raw(v_BLHP, features) * real_BL[:, None, :, None] * real_BL[:, None, None] / v_BLHP.shape[1] ** 0.5


class BatchNorm(Aligned):
    def queries_keys(self, v_BLHP, features):
        q_BLHR, k_BLHR = super().queries_keys(v_BLHP, features)
        return q_BLHR, k_BLHR - k_BLHR.mean(0, keepdim=True)


class DataDiagonal(Table):
    """The published non-SAM quasiseparable: its diagonal still comes from the tokens."""

    conv = 1

    def entries(self, v_BLHP, features, segments_BL):
        delta_BHL = features.conv_BLK.to(v_BLHP.dtype).transpose(1, 2) * (segments_BL > 0)[:, None]
        return super().entries(v_BLHP, features, segments_BL) + torch.diag_embed(delta_BHL)


class ValueDiagonal(Table):
    """The same from v itself, without asking for a channel."""

    def entries(self, v_BLHP, features, segments_BL):
        delta_BHL = v_BLHP.mean(-1).transpose(1, 2) * (segments_BL > 0)[:, None]
        return super().entries(v_BLHP, features, segments_BL) + torch.diag_embed(delta_BHL)


class FrozenLength(Aligned):
    def entries(self, v_BLHP, features, segments_BL):
        place_L = torch.linspace(0, 1, self.grant.length, dtype=v_BLHP.dtype)
        return super().entries(v_BLHP, features, segments_BL) * (1 + place_L)


class FrozenAbove(Aligned):
    def entries(self, v_BLHP, features, segments_BL):
        require_length(v_BLHP.shape[1], self.grant.length, "frozen")
        return super().entries(v_BLHP, features, segments_BL)


class BakedScale(Aligned):
    def scale(self, segments_BL, dtype):
        return self.grant.length**-0.5


class Misaligned(Aligned):
    """Each token's features are those of its mirror image, within one document: the reader's alignment is lost."""

    def entries(self, v_BLHP, features, segments_BL):
        count_BL = (segments_BL > 0).sum(1, keepdim=True)
        at_L = torch.arange(v_BLHP.shape[1])
        mirror_BL = torch.where(at_L < count_BL, count_BL - 1 - at_L, at_L)
        conv_BLK = features.conv_BLK.gather(1, mirror_BL[..., None].expand_as(features.conv_BLK))
        return super().entries(v_BLHP, features._replace(conv_BLK=conv_BLK), segments_BL)


class DeclaredSam(Table):
    """A table that calls itself SAM."""

    sam = True


# Wrong in its arithmetic, its cost or its word


class RandomOrder(Aligned):
    """Sums over tokens in an order that is drawn anew."""

    def forward(self, v_BLHP, features, segments_BL):
        order_L = torch.from_numpy(np.random.default_rng().permutation(v_BLHP.shape[1]))
        m_BHLL = self.entries(v_BLHP, features, segments_BL)
        return torch.einsum("bhij,bjhp->bihp", m_BHLL[..., order_L], v_BLHP[:, order_L])


class Dropping(Aligned):
    """Draws from the global generator, without effect."""

    def forward(self, v_BLHP, features, segments_BL):
        return super().forward(v_BLHP, features, segments_BL) + 0 * torch.rand(())


class Waves(Aligned):
    """cos(2 pi q_i (i - j)), at most a third of a turn a token, in fp32 from exact channels; right."""

    conv, exact = 0, 1
    state_size = None

    @property
    def wants(self):
        heads = self.grant.heads
        return Wants(conv=self.conv * heads, raw=0, exact=self.exact * heads)

    def frequency(self, features):
        return features.exact_BLK

    def places(self, length, dtype):
        return torch.arange(length).to(dtype)

    def widen(self, x, dtype):
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def raw(self, v_BLHP, features):
        q_BHL1 = self.widen(self.frequency(features), v_BLHP.dtype).transpose(1, 2)[..., None]
        place_L = self.places(v_BLHP.shape[1], q_BHL1.dtype)
        return (2 * math.pi / 3 * torch.tanh(q_BHL1) * (place_L[:, None] - place_L)).cos().to(v_BLHP.dtype)

    def forward(self, v_BLHP, features, segments_BL):
        m_BHLL = self.entries(v_BLHP, features, segments_BL)
        return torch.einsum("bhij,bjhp->bihp", m_BHLL, v_BLHP)


class CosineInBf16(Waves):
    def widen(self, x, dtype):
        return x.to(dtype)


class ExponentialInBf16(BackwardScan):
    def forward(self, v_BLHP, features, segments_BL):
        m_BHLL = self.entries(v_BLHP, features, segments_BL)
        return torch.einsum("bhij,bjhp->bihp", m_BHLL, v_BLHP) * real(segments_BL, v_BLHP.dtype)


class RoundedKeys(Aligned):
    """bf16 inside whatever is asked for, but for fp64."""

    def queries_keys(self, v_BLHP, features):
        q_BLHR, k_BLHR = super().queries_keys(v_BLHP, features)
        return q_BLHR, k_BLHR.bfloat16().to(k_BLHR.dtype) if k_BLHR.dtype == torch.float32 else k_BLHR


class Coarse(torch.autograd.Function):
    """Three binary places of the gradient, if autocast is on."""

    @staticmethod
    def forward(ctx, x):
        ctx.half = torch.is_autocast_enabled("cpu")
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        mantissa, power = torch.frexp(grad)
        return torch.ldexp((mantissa * 8).round() / 8, power) if ctx.half else grad


class CoarseGradient(Aligned):
    def queries_keys(self, v_BLHP, features):
        q_BLHR, k_BLHR = super().queries_keys(v_BLHP, features)
        return q_BLHR, Coarse.apply(k_BLHR)


class CheapWord(Aligned):
    """Declares linear cost."""

    def flops(self, length):
        return 64 * self.grant.heads * length


class DearWord(Aligned):
    """Declares cost that grows as it should and is four times what it is."""

    def flops(self, length):
        return 4 * super().flops(length)


class KeepsTerms(CheapWord):
    """Nothing that a counter of matrix products sees, but L x L terms for the backward pass."""

    def forward(self, v_BLHP, features, segments_BL):
        wide = torch.promote_types(v_BLHP.dtype, torch.float32)
        q_BLHR, k_BLHR = self.queries_keys(v_BLHP.to(wide), features)
        m_BHLL = sum(q_BLHR[..., r].mT[..., None] * k_BLHR[..., r].mT[..., None, :] for r in range(RANK))
        m_BHLL = m_BHLL * same_segment(segments_BL) * self.scale(segments_BL, wide)
        return (m_BHLL[..., None] * v_BLHP.transpose(1, 2)[:, :, None]).sum(3).transpose(1, 2).to(v_BLHP.dtype)


class SmallState(Aligned):
    @property
    def state_size(self):
        return (RANK - 1) * self.grant.head_width


class LargeState(Aligned):
    @property
    def state_size(self):
        return 4 * super().state_size


class NoState(Aligned):
    """Declares that its state grows with the length, though it does not."""

    state_size = None


class WrongRank(Aligned):
    def structure(self):
        return (f"rank {RANK - 1}",)


class Renamed(Vandermonde):
    """A cosine transform under the name of the learned matrix, as released; whatever its terms."""

    sam = False

    def __init__(self, grant):
        super().__init__(grant, Vandermonde.Args(sam=False, heads=grant.heads, rank=RANK, bound=0.5), "torch")

    def matrix(self, v_BLHP, features, segments_BL):
        require_length(v_BLHP.shape[1], self.grant.length, "renamed")
        place_L = torch.arange(v_BLHP.shape[1]).to(v_BLHP.dtype)
        learned_HLL = super().matrix(v_BLHP, features, segments_BL)
        wave_LL = (2 * math.pi * place_L[:, None] * place_L / self.grant.length).cos() / self.grant.length**0.5
        return wave_LL * same_segment(segments_BL) + 0 * learned_HLL

    def forward(self, v_BLHP, features, segments_BL):
        wide = torch.promote_types(v_BLHP.dtype, torch.float32)
        m_BHLL = self.matrix(v_BLHP.to(wide), features, segments_BL)
        return torch.einsum("bhij,bjhp->bihp", m_BHLL.to(v_BLHP.dtype), v_BLHP)

    def simplest(self):
        simple = Renamed(self.grant)
        Vandermonde.__init__(simple, self.grant, dataclasses.replace(self.args, rank=1), "torch")
        return simple


class SummedCosines(Renamed):
    """The released sign: cos(t_i j) + cos(p_j i), at one term."""

    def matrix(self, v_BLHP, features, segments_BL):
        f_BHLR, g_BHLR = (2 * math.pi * x.to(v_BLHP.dtype) for x in self.frequencies(features, v_BLHP.shape[1]))
        place_L = torch.arange(1, v_BLHP.shape[1] + 1).to(v_BLHP.dtype)
        by_row_BHLL = (f_BHLR[..., None] * place_L).cos().sum(-2)
        by_column_BHLL = (g_BHLR[..., None] * place_L).cos().sum(-2).transpose(-1, -2)
        scale = (self.grant.length * self.args.rank) ** -0.5
        return (by_row_BHLL + by_column_BHLL) * scale * same_segment(segments_BL)

    def simplest(self):
        simple = SummedCosines(self.grant)
        Vandermonde.__init__(simple, self.grant, dataclasses.replace(self.args, rank=1), "torch")
        return simple


class Reciprocals(Table):
    """1 / (a_i b_j + c_i d_j): the matrix of 1 / M_ij has rank 2, as a Cauchy matrix's, but is no sum of nodes."""

    def structure(self):
        return ("reciprocal sums",)

    def entries(self, v_BLHP, features, segments_BL):
        e_HLL = super().entries(v_BLHP, features, torch.ones_like(segments_BL)).exp()
        rank_two_HLL = e_HLL[..., :1] * e_HLL[..., :1, :] + e_HLL[..., -1:] * e_HLL[..., -1:, :]
        return rank_two_HLL.reciprocal() * same_segment(segments_BL)


class HalfWidths(Aligned):
    """Takes a head apart in two halves; a width of one has none."""

    def forward(self, v_BLHP, features, segments_BL):
        halves = v_BLHP.unflatten(-1, (2, self.grant.head_width // 2)).unbind(-2)
        return torch.cat([super(HalfWidths, self).forward(x, features, segments_BL) for x in halves], dim=-1)


class WrongInSilence(Aligned):
    """Calls itself unfit for a head of width one, and returns zeros there."""

    @classmethod
    def unfit(cls, grant, args):
        return "a head of width 1 has no halves" if grant.head_width == 1 else ""

    def forward(self, v_BLHP, features, segments_BL):
        return super().forward(v_BLHP, features, segments_BL) * (self.grant.head_width > 1)


class NoReason(Aligned):
    @classmethod
    def unfit(cls, grant, args):
        return " " if grant.length == 7 else ""


class UnfitEverywhere(Aligned):
    @classmethod
    def unfit(cls, grant, args):
        return "not today"


class PairedHeads(Aligned):
    """Takes heads two by two, but allows any number."""

    def forward(self, v_BLHP, features, segments_BL):
        v_BLHP.unflatten(2, (self.grant.heads // 2, 2))
        return super().forward(v_BLHP, features, segments_BL)


class NoDivisors(Aligned):
    @classmethod
    def heads_allowed(cls, width):
        return tuple(range(1, width + 1))


class Huge(Table):
    def initial(self, name, generator):
        return super().initial(name, generator) * 1e9


class Constant(Table):
    """Every row the same mean: nothing that differs between tokens."""

    def entries(self, v_BLHP, features, segments_BL):
        length = v_BLHP.shape[1]
        require_length(length, self.grant.length, "constant")
        row_H1L = self.t_HLL[:, :, :length].mean(1, keepdim=True).to(v_BLHP.dtype)
        return row_H1L * same_segment(segments_BL)


class GlobalDraw(Table):
    def initial(self, name, generator):
        return torch.randn(self.get_parameter(name).shape)
