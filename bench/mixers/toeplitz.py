"""Toeplitz: M_ij depends on i - j (a long convolution). Own token is lag 0: the released code is off by one token.

sam: token d of a document emits a forward weight f_d and a backward weight r_d per head (SiLU, as released); M_ij =
f_{i-j} for i >= j, r_{j-i} for i < j, over sqrt(n), n the document's own number of tokens, so that any length runs
(released: 0.5 / sqrt(longest length)). Not sam: 2L-1 free values per head, standard deviation 1 / sqrt(L), no scale.
It fulfils the weaker of the paper's two definitions of sequence alignment: M_ii = f_0 depends on the first token.
Axes: B batch, L length, H heads, P head width, K lags or feature channels.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.kernels import require_triton
from bench.mixers import lags
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


@dataclass(frozen=True)
class Args:
    sam: bool
    heads: int

    def __post_init__(self):
        at_least_one("toeplitz", self, ("heads",))


class Toeplitz(Mixer):
    """Channels with sam: conv [forward H, backward H]."""

    Args: ClassVar = Args
    levels: ClassVar = (False, True)
    backends: ClassVar = ("torch", "triton")

    def __init__(self, grant: Grant, args: Args, backend: str):
        super().__init__(grant, backend)
        if backend == "triton":
            require_triton()
            from bench.kernels.toeplitz import toeplitz

            self.tiles = toeplitz
        self.sam = args.sam
        if not self.sam:
            self.t_HK = nn.Parameter(torch.empty(grant.heads, 2 * grant.length - 1))  # lag i - j at i - j + L - 1

    @property
    def wants(self) -> Wants:
        return Wants(conv=2 * self.grant.heads if self.sam else 0, raw=0, exact=0)

    def initial(self, name: str, generator: torch.Generator) -> Tensor:
        shape = self.get_parameter(name).shape
        return torch.randn(shape, generator=generator, device="cpu") / self.grant.length**0.5

    def forward(self, v_BLHP: Tensor, features: Features, segments_BL: Tensor) -> Tensor:
        length = v_BLHP.shape[1]
        if self.in_tiles(v_BLHP):
            return self.tiles(v_BLHP, *self.tiled(features, segments_BL))
        real_BL11 = real(segments_BL, v_BLHP.dtype)
        v_BLHP = v_BLHP * real_BL11
        if self.sam and self.grant.packed:
            y_BLHP = lags.apply(packed_matrix(self.emitted(features), segments_BL), v_BLHP)
        else:
            w_BHK = self.lags(features, length)
            y_BLHP = lags.product(w_BHK, v_BLHP, segments_BL, self.grant.packed)
        if self.sam:
            n_BL = segment_lengths(segments_BL, self.grant.packed)
            real_BL11 = real_BL11 * n_BL[:, :, None, None].to(real_BL11.dtype).rsqrt()
        return y_BLHP * real_BL11

    def with_skip(self, v_BLHP: Tensor, features: Features, segments_BL: Tensor, scale: Tensor) -> Tensor | None:
        if not self.in_tiles(v_BLHP):
            return None
        w_BHK, count_B = self.tiled(features, segments_BL)
        own_K = torch.arange(w_BHK.shape[-1], device=w_BHK.device) == v_BLHP.shape[1] - 1
        return self.tiles(v_BLHP, w_BHK + own_K * scale.reciprocal(), count_B)

    def in_tiles(self, v_BLHP: Tensor) -> bool:
        """Whether M is multiplied by tiles, which read only the row's one document and so need no mask on v."""
        narrow = lags.TILED if self.sam else lags.TILED_SHARED
        most = narrow if lags.in_blocks(v_BLHP) else lags.TILED_WIDE
        return self.backend == "triton" and not self.grant.packed and v_BLHP.shape[1] <= most

    def tiled(self, features: Features, segments_BL: Tensor) -> tuple[Tensor, Tensor]:
        """As tiles take M: weights BHK by lag with their scale, and the tokens of each row, B."""
        w_BHK, count_B = self.lags(features, segments_BL.shape[1]), (segments_BL > 0).sum(1)
        if self.sam:
            w_BHK = w_BHK * count_B.clamp(min=1).to(w_BHK.dtype).rsqrt()[:, None, None]
        return w_BHK, count_B

    def emitted(self, features: Features) -> tuple[Tensor, Tensor]:
        """The weights f, r that the tokens emit, each BHL, at least fp32."""
        conv_BLK = features.conv_BLK
        wide = torch.promote_types(conv_BLK.dtype, torch.float32)
        return F.silu(conv_BLK.to(wide)).transpose(1, 2).chunk(2, dim=1)

    def lags(self, features: Features, length: int) -> Tensor:
        """Weights by lag -(L-1) .. L-1 of rows that hold one document, BHK (B = 1 if data-independent)."""
        if self.sam:
            f_BHL, r_BHL = self.emitted(features)
            return torch.cat([r_BHL[..., 1:].flip(-1), f_BHL], dim=-1)
        require_length(length, self.grant.length, "toeplitz")
        middle = self.grant.length - 1
        return self.t_HK[None, :, middle - length + 1 : middle + length]

    def matrix(self, v_BLHP: Tensor, features: Features, segments_BL: Tensor) -> Tensor:
        length = v_BLHP.shape[1]
        lag_LL = torch.arange(length)[:, None] - torch.arange(length)
        if not self.sam:
            require_length(length, self.grant.length, "toeplitz")
            m_HLL = self.t_HK[:, lag_LL + self.grant.length - 1].to(v_BLHP.dtype)
            return m_HLL.masked_fill(~same_segment(segments_BL), 0.0)
        w_BLK = F.silu(features.conv_BLK.to(v_BLHP.dtype))
        rows = []
        for b in range(len(v_BLHP)):
            m_HLL = w_BLK.new_zeros(self.grant.heads, length, length)
            for number in segments_BL[b].unique().tolist():
                if number > 0:
                    at_N = (segments_BL[b] == number).nonzero()[:, 0].cpu()
                    f_HN, r_HN = w_BLK[b, at_N].T.chunk(2)
                    lag_NN = lag_LL[: len(at_N), : len(at_N)]
                    block_HNN = torch.where((lag_NN >= 0).to(f_HN.device), f_HN[:, lag_NN.abs()], r_HN[:, lag_NN.abs()])
                    m_HLL = m_HLL.index_put(
                        (torch.arange(self.grant.heads)[:, None, None], at_N[:, None], at_N),
                        block_HNN / len(at_N) ** 0.5,
                    )
            rows.append(m_HLL)
        return torch.stack(rows)

    def structure(self) -> tuple[str, ...]:
        return ("constant diagonals",)

    @property
    def state_size(self) -> None:
        return None

    def flops(self, length: int) -> int:
        return lags.product_flops(length, self.grant.heads, self.grant.head_width, self.grant.packed)


def packed_matrix(emitted: tuple[Tensor, Tensor], segments_BL: Tensor) -> Tensor:
    """M_BHLL, without its scale, for several documents a row: lag d of a document reads the weight of its token d."""
    f_BHL, r_BHL = emitted
    batch, heads, length = f_BHL.shape
    at_L = torch.arange(length, device=segments_BL.device)
    opens_BL = segments_BL != F.pad(segments_BL, (1, 0), value=-1)[:, :-1]
    start_BL = torch.where(opens_BL, at_L, 0).cummax(dim=1).values
    lag_LL = at_L[:, None] - at_L
    source_BLL = (start_BL[:, :, None] + lag_LL.abs()).clamp(max=length - 1) + length * (lag_LL < 0)
    w_BHK = torch.cat([f_BHL, r_BHL], dim=-1)
    m_BHK = w_BHK.gather(-1, source_BLL.view(batch, 1, -1).expand(-1, heads, -1))
    return m_BHK.view(batch, heads, length, length) * same_segment(segments_BL)
