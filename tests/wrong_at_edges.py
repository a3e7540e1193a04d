"""Wrong mixers whose defect shows only somewhere: at some lengths, in company, in bf16, late in a row, in another mode.

Made from the right ones of `wrong_mixers`. Axes: B batch, L length, H heads, P head width, R rank.
"""

import random

import torch
import torch.nn.functional as F
from torch import nn

from bench.mixers.base import real, require_length, same_segment
from tests.wrong_mixers import RANK, Aligned, BackwardScan, Lags, Table, Waves

# In company


class RowScale(Aligned):
    """The scale counts all real tokens of the row, those of other documents too."""

    def scale(self, segments_BL, dtype):
        return (segments_BL > 0).sum(-1).clamp(min=1).to(dtype).rsqrt()[:, None, None, None]


class RowScaleOfTable(Table):
    def entries(self, v_BLHP, features, segments_BL):
        n_B = (segments_BL > 0).sum(-1).clamp(min=1).to(v_BLHP.dtype)
        return super().entries(v_BLHP, features, segments_BL) / n_B[:, None, None, None].sqrt()


class PackedScale(Aligned):
    """Twice as large where rows may be packed."""

    def scale(self, segments_BL, dtype):
        return super().scale(segments_BL, dtype) * (2 if self.grant.packed else 1)


class PlaceInRow(Aligned):
    """Reads its place in the row, where only that in the document is its own."""

    def entries(self, v_BLHP, features, segments_BL):
        wave_L = torch.arange(v_BLHP.shape[1]).to(v_BLHP.dtype).cos()
        return super().entries(v_BLHP, features, segments_BL) * (1 + 0.1 * wave_L)[:, None]


class MergedDocuments(Aligned):
    """Documents from the eighth on are one."""

    def entries(self, v_BLHP, features, segments_BL):
        return super().entries(v_BLHP, features, segments_BL.clamp(max=8))


class LeakInBf16(Aligned):
    """Under autocast other documents are scaled down, not masked."""

    def entries(self, v_BLHP, features, segments_BL):
        real_BL = (segments_BL > 0).to(v_BLHP.dtype)
        leak_BHLL = 2e-4 * self.raw(v_BLHP, features) * real_BL[:, None, :, None] * real_BL[:, None, None]
        return super().entries(v_BLHP, features, segments_BL) + leak_BHLL * torch.is_autocast_enabled("cpu")


class OldMask(Aligned):
    """Keeps the mask of the first batch of each shape."""

    def __init__(self, grant):
        super().__init__(grant)
        self.masks = {}

    def entries(self, v_BLHP, features, segments_BL):
        mask_B1LL = self.masks.setdefault(segments_BL.shape, same_segment(segments_BL))
        return super().entries(v_BLHP, features, segments_BL) * mask_B1LL


# At some lengths


class WrongAtPowersOfTwo(Lags):
    """A circular transform of too few points, say."""

    def forward(self, v_BLHP, features, segments_BL):
        length = v_BLHP.shape[1]
        wraps = length >= 8 and length & (length - 1) == 0
        return super().forward(v_BLHP, features, segments_BL) * (1.5 if wraps else 1.0)


class WrongBeyond256(Aligned):
    """Chunks of 256 tokens without a state between them."""

    def forward(self, v_BLHP, features, segments_BL):
        chunk_L = torch.arange(v_BLHP.shape[1]) // 256
        m_BHLL = self.entries(v_BLHP, features, segments_BL) * (chunk_L[:, None] == chunk_L)
        return torch.einsum("bhij,bjhp->bihp", m_BHLL.to(v_BLHP.dtype), v_BLHP)


class FrozenAtTwice(Aligned):
    """Runs up to twice the granted length."""

    def entries(self, v_BLHP, features, segments_BL):
        require_length(v_BLHP.shape[1], 2 * self.grant.length, "frozen")
        return super().entries(v_BLHP, features, segments_BL)


class MisalignedLater(Aligned):
    """From its place 16 on, a document's tokens take their keys from each other, two by two."""

    def entries(self, v_BLHP, features, segments_BL):
        same_BLL = same_segment(segments_BL)[:, 0]
        own_BL, size_BL = same_BLL.tril().sum(-1) - 1, same_BLL.sum(-1)
        partner_BL = torch.where((own_BL >= 16) & (own_BL ^ 1 < size_BL), own_BL ^ 1, own_BL) - own_BL
        source_BL1 = (torch.arange(v_BLHP.shape[1]) + partner_BL)[..., None]
        keys_BLK = features.conv_BLK[..., self.grant.heads * RANK :]
        keys_BLK = keys_BLK.gather(1, source_BL1.expand_as(keys_BLK))
        conv_BLK = torch.cat([features.conv_BLK[..., : self.grant.heads * RANK], keys_BLK], -1)
        return super().entries(v_BLHP, features._replace(conv_BLK=conv_BLK), segments_BL)


# In some modes


class OtherInEvaluation(Aligned):
    def scale(self, segments_BL, dtype):
        return super().scale(segments_BL, dtype) * (1.0 if self.training else 0.5)


class WritesV(Aligned):
    def forward(self, v_BLHP, features, segments_BL):
        v_BLHP.data.mul_(real(segments_BL, v_BLHP.dtype))
        return super().forward(v_BLHP, features, segments_BL)


class WritesSegments(Aligned):
    def forward(self, v_BLHP, features, segments_BL):
        y_BLHP = super().forward(v_BLHP, features, segments_BL)
        segments_BL.clamp_(max=1)
        return y_BLHP


class ReadsMemory(Aligned):
    """As if all tensors lay in memory in the order of their axes."""

    def forward(self, v_BLHP, features, segments_BL):
        return super().forward(
            v_BLHP.as_strided(v_BLHP.shape, torch.empty(v_BLHP.shape).stride()), features, segments_BL
        )


class DrawsInPython(Aligned):
    def forward(self, v_BLHP, features, segments_BL):
        return super().forward(v_BLHP, features, segments_BL) + 0 * random.random()


class Clamped(Aligned):
    """Linear as long as v is not large."""

    def forward(self, v_BLHP, features, segments_BL):
        return super().forward(v_BLHP.clamp(-40, 40), features, segments_BL)


class OneHeadOfTwo(Aligned):
    """The last head looks at places and hardly at tokens."""

    def queries_keys(self, v_BLHP, features):
        share_H1 = torch.where(torch.arange(self.grant.heads) < self.grant.heads - 1, 1.0, 1e-7)[:, None]
        angle_LHR = torch.arange(v_BLHP.shape[1])[:, None, None] * torch.arange(1.0, RANK + 1)
        waves = angle_LHR.cos().to(v_BLHP.dtype), angle_LHR.sin().to(v_BLHP.dtype)
        tokens = super().queries_keys(v_BLHP, features)
        return tuple(
            x * share_H1.to(x.dtype) + w * (1 - share_H1).to(x.dtype) for x, w in zip(tokens, waves, strict=True)
        )


# In gradients only


class LateDetach(Aligned):
    """Beyond the fiftieth token half of the keys' gradient is missing, in `matrix` too."""

    def queries_keys(self, v_BLHP, features):
        q_BLHR, k_BLHR = super().queries_keys(v_BLHP, features)
        late_L11 = (torch.arange(v_BLHP.shape[1]) > 50)[:, None, None]
        return q_BLHR, torch.where(late_L11, 0.5 * k_BLHR + 0.5 * k_BLHR.detach(), k_BLHR)


class SlightlyDetached(Aligned):
    """A two-thousandth of the keys' gradient is missing, in `matrix` too."""

    def queries_keys(self, v_BLHP, features):
        q_BLHR, k_BLHR = super().queries_keys(v_BLHP, features)
        return q_BLHR, 0.9995 * k_BLHR + 0.0005 * k_BLHR.detach()


class MixedBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad + 0.1 * grad.flip(0) if len(grad) > 1 else grad


class BatchInBackward(Aligned):
    """The backward pass adds gradients of other rows, in `matrix` too."""

    def queries_keys(self, v_BLHP, features):
        q_BLHR, k_BLHR = super().queries_keys(v_BLHP, features)
        return q_BLHR, MixedBackward.apply(k_BLHR)


class FaintGradient(Aligned):
    """A parameter that counts a million millionth of its value."""

    def __init__(self, grant):
        super().__init__(grant)
        self.s_H = nn.Parameter(torch.empty(grant.heads))

    def entries(self, v_BLHP, features, segments_BL):
        s_H11 = 1 + 1e-12 * self.s_H.to(v_BLHP.dtype)[:, None, None]
        return super().entries(v_BLHP, features, segments_BL) * s_H11


# In its numbers


class RoundedPhases(Waves):
    """Asks for its frequencies as channels that autocast rounds."""

    conv, exact = 1, 0

    def frequency(self, features):
        return features.conv_BLK


class PlacesInBf16(Waves):
    """Counts tokens in bf16, which is exact up to 256."""

    def places(self, length, dtype):
        half = torch.bfloat16 if torch.is_autocast_enabled("cpu") else dtype
        return torch.arange(length).to(half).to(dtype)


class BareSoftmax(Aligned):
    """Exponentials of logits as they are, without their largest taken off."""

    state_size = None

    def entries(self, v_BLHP, features, segments_BL):
        same_B1LL = same_segment(segments_BL)
        conv_BLK = features.conv_BLK.to(v_BLHP.dtype)
        q_BLHR, k_BLHR = conv_BLK.unflatten(-1, (2, self.grant.heads, RANK)).unbind(2)
        e_BHLL = torch.where(same_B1LL, torch.einsum("bihr,bjhr->bhij", q_BLHR, k_BLHR), -torch.inf).exp()
        return e_BHLL / torch.where(same_B1LL.any(-1, keepdim=True), e_BHLL.sum(-1, keepdim=True), 1.0)


class DividedDecays(BackwardScan):
    """Products of decays as quotients of products from the start of the row, which underflow."""

    def entries(self, v_BLHP, features, segments_BL):
        decay_BHL, k_BHL = features.conv_BLK.to(v_BLHP.dtype).transpose(1, 2).chunk(2, 1)
        product_BHL = F.logsigmoid(decay_BHL + 2).cumsum(-1).exp()
        below_BHLL = product_BHL[..., :, None] / product_BHL[..., None, :]
        m_BHLL = below_BHLL.tril() + below_BHLL.mT.triu(1)
        return m_BHLL * F.silu(k_BHL)[:, :, None] * same_segment(segments_BL) / 4


class NanInEmptyRows(Aligned):
    """Only under autocast."""

    def forward(self, v_BLHP, features, segments_BL):
        y_BLHP = super().forward(v_BLHP, features, segments_BL)
        empty_B111 = (segments_BL == 0).all(1)[:, None, None, None] & torch.is_autocast_enabled("cpu")
        return torch.where(empty_B111, torch.nan, y_BLHP)


class NearlyOff(Table):
    """The published free factors: entries of 2e-5."""

    def initial(self, name, generator):
        return super().initial(name, generator) * 2e-4


class NearlyConstant(Table):
    """The released Cauchy at its start: a mean over all tokens, of which a hundredth differs."""

    def initial(self, name, generator):
        return 0.118 + 0.0013 * torch.randn(self.get_parameter(name).shape, generator=generator)


class Poles(Aligned):
    """The published Cauchy, 1 / (q - k + c)."""

    state_size = None

    def raw(self, v_BLHP, features):
        wide = torch.promote_types(v_BLHP.dtype, torch.float32)
        q_BLHR, k_BLHR = features.conv_BLK.to(wide).unflatten(-1, (2, self.grant.heads, RANK)).unbind(2)
        terms_BLLHR = (q_BLHR[:, :, None] - k_BLHR[:, None] + 0.5).reciprocal()
        return terms_BLLHR.sum(-1).permute(0, 3, 1, 2).to(v_BLHP.dtype)


# In its words


class TiedDiagonal(BackwardScan):
    """Declares a diagonal of its own, which is the scan's."""

    def structure(self):
        return ("off-diagonal rank 1", "free diagonal")


class WidthlessState(Aligned):
    state_size = RANK * 4  # right for heads of width 4


class StateOfGrant(Table):
    @property
    def state_size(self):
        return self.grant.length * self.grant.head_width


class LargeBoundedState(Table):
    """A state that any short row fits into."""

    @property
    def state_size(self):
        return 120 * self.grant.head_width


class BrokenState(Aligned):
    @property
    def state_size(self):
        return RANK * self.grant.head_width + 0.5


class WidthlessFlops(Aligned):
    def flops(self, length):
        return 2 * self.grant.heads * length**2 * (RANK + 4)


class PackedWord(Aligned):
    """Declares linear cost of packed rows."""

    def flops(self, length):
        return 64 * self.grant.heads * length if self.grant.packed else super().flops(length)


class PackedCube(Aligned):
    """Squares the mask of packed rows."""

    def forward(self, v_BLHP, features, segments_BL):
        y_BLHP = super().forward(v_BLHP, features, segments_BL)
        if self.grant.packed:
            same_BLL = same_segment(segments_BL)[:, 0].to(y_BLHP.dtype)
            y_BLHP = y_BLHP + 0 * (same_BLL @ same_BLL)[..., :1, None]
        return y_BLHP


class MaskByANumber(Aligned):
    """Softmax attention whose mask is -100: nothing beside usual scores, and much beside those of large features."""

    state_size = None

    def queries_keys(self, v_BLHP, features):
        return features.conv_BLK.to(v_BLHP.dtype).unflatten(-1, (2, self.grant.heads, RANK)).unbind(2)

    def entries(self, v_BLHP, features, segments_BL):
        scores_BHLL = self.raw(v_BLHP, features).masked_fill(~same_segment(segments_BL), -100.0)
        return scores_BHLL.softmax(-1).nan_to_num() * (segments_BL > 0)[:, None, :, None]


class FiniteMaskInBf16(Aligned):
    """Softmax attention; where rows are not packed, under autocast, padding is given a low score and not none.

    In fp64 it is right, and in bf16 the weight of ordinary padding drowns in rounding; that of loud padding does not.
    """

    low = -10.0
    state_size = None

    def entries(self, v_BLHP, features, segments_BL):
        same_B1LL = same_segment(segments_BL)
        finite = torch.is_autocast_enabled("cpu") and not self.grant.packed
        masked = self.raw(v_BLHP, features).masked_fill(~same_B1LL, self.low if finite else -torch.inf)
        return masked.softmax(-1).nan_to_num() * (segments_BL > 0)[:, None, :, None]


class RightMask(FiniteMaskInBf16):
    low = -torch.inf
