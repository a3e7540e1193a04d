"""Hyena: a long convolution whose weights an MLP makes of the lag, between two gates. Linear in v, gates as features.

    M_ij = x_i (k_{i-j} + d [i = j]) z_j;  k_l = exp(-t r_h) W sin(f * (..)) of (t, cos, -sin of 2 pi b l / span)

sam: x and z are features, one number a head (with heads of width 1 a gate for each channel, as published). Not sam: no
gates, M_ij = k_{i-j} + d [i = j]. One MLP makes the weights of own and earlier tokens; `bidirectional`, a second one
those of later tokens (lag -1 is its 0), with the same frequencies f and window; else these are 0. The MLP: `bands`
frequencies b from 1e-4 up to bands - 1, t = l / (span - 1), `inner` maps between the first and the last, sines of
`hidden` channels. The window falls to 0.01 after 1.5 to 0.3 spans, first to last head. Start: maps uniform within
1 / sqrt(inputs) as torch has them, f = `frequency`, d standard normal.
Sources: Hyena (Poli et al. 2023; its vision transformer looks one way), M2-BERT (both ways). Deliberate: lags are
measured in an own `span` of tokens, not in the longest length, and its features are not learned (published: at a rate
of 1e-5), so that any length runs.
Axes: B batch, L length, H heads, P head width, F lag features, E hidden channels, D directions, N inner maps, K lags.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from bench import Refusal
from bench.mixers import lags
from bench.mixers.base import Features, Grant, Mixer, Wants, at_least_one, real, require_length, same_segment


@dataclass(frozen=True)
class Args:
    sam: bool
    heads: int
    span: int
    bands: int
    hidden: int
    inner: int
    frequency: float
    bidirectional: bool

    def __post_init__(self):
        at_least_one("hyena", self, ("heads", "bands", "hidden", "inner"))
        if self.span < 2:
            raise Refusal(f"mixer hyena: span is {self.span}; allowed: 2 or more")


class Hyena(Mixer):
    """Channels with sam: conv [x (H), z (H)]."""

    Args: ClassVar = Args
    levels: ClassVar = (False, True)
    forms: ClassVar = ({"bidirectional": True}, {"bidirectional": False})
    knobs: ClassVar = ("hidden", "bands", "inner")

    def __init__(self, grant: Grant, args: Args, backend: str):
        super().__init__(grant, backend)
        self.args = args
        ways, hidden = 1 + args.bidirectional, args.hidden
        self.in_DEF = nn.Parameter(torch.empty(ways, hidden, 2 * args.bands + 1))
        self.inner_NDEE = nn.Parameter(torch.empty(args.inner, ways, hidden, hidden))
        self.out_DHE = nn.Parameter(torch.empty(ways, grant.heads, hidden))
        # One axis each: the optimiser's rule decays parameters of two or more. The biases are (1 + N, D, E).
        self.bias = nn.Parameter(torch.empty((1 + args.inner) * ways * hidden))
        self.frequency_E = nn.Parameter(torch.empty(hidden))
        self.d_H = nn.Parameter(torch.empty(grant.heads))

    @property
    def wants(self) -> Wants:
        return Wants(conv=2 * self.grant.heads if self.args.sam else 0, raw=0, exact=0)

    def initial(self, name: str, generator: torch.Generator) -> Tensor:
        shape = self.get_parameter(name).shape
        match name:
            case "frequency_E":
                return torch.full(shape, float(self.args.frequency), device="cpu")
            case "d_H":
                return torch.randn(shape, generator=generator, device="cpu")
            case "bias":
                first, rest = (1 + self.args.bidirectional) * self.args.hidden, self.args.hidden**-0.5
                bound = torch.full(shape, rest, device="cpu")
                bound[:first] = (2 * self.args.bands + 1) ** -0.5
                return bound * torch.empty(shape, device="cpu").uniform_(-1, 1, generator=generator)
        bound = shape[-1] ** -0.5
        return torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=generator)

    def forward(self, v_BLHP: Tensor, features: Features, segments_BL: Tensor) -> Tensor:
        length, real_BL11 = v_BLHP.shape[1], real(segments_BL, v_BLHP.dtype)
        if not self.args.sam:
            require_length(length, self.grant.length, "hyena")
        with torch.autocast(v_BLHP.device.type, enabled=False):
            w_1HK = lags.both_ways(*self.weights(length))
        u_BLHP = v_BLHP * real_BL11
        if self.args.sam:
            x_BLH1, z_BLH1 = self.gates(features, v_BLHP.dtype)
            y_BLHP = x_BLH1 * lags.product(w_1HK, z_BLH1 * u_BLHP, segments_BL, self.grant.packed)
        else:
            y_BLHP = lags.product(w_1HK, u_BLHP, segments_BL, self.grant.packed)
        return y_BLHP * real_BL11

    def gates(self, features: Features, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """x and z, each BLH1."""
        x_BLH, z_BLH = features.conv_BLK.to(dtype).chunk(2, dim=-1)
        return x_BLH[..., None], z_BLH[..., None]

    def weights(self, length: int) -> tuple[Tensor, Tensor]:
        """Of lags 0, 1, .., d included, and of lags -1, -2, .., each HL, in the parameters' precision."""
        lag_L = torch.arange(length, device=self.d_H.device, dtype=self.d_H.dtype)
        ways, span = len(self.in_DEF), self.args.span
        bias_ND1E = self.bias.view(1 + self.args.inner, ways, 1, self.args.hidden)
        h_DLE = self.sine(torch.einsum("lf,def->dle", self.lag_features(lag_L), self.in_DEF) + bias_ND1E[0])
        for map_DEE, bias_D1E in zip(self.inner_NDEE, bias_ND1E[1:], strict=True):
            h_DLE = self.sine(torch.einsum("dle,dge->dlg", h_DLE, map_DEE) + bias_D1E)
        window_HL = (-rates(self.grant.heads, lag_L)[:, None] * (lag_L / (span - 1))).exp()
        k_DHL = torch.einsum("dle,dhe->dhl", h_DLE, self.out_DHE) * window_HL
        behind_HL = k_DHL[0] + self.d_H[:, None] * (lag_L == 0)
        return behind_HL, k_DHL[1] if self.args.bidirectional else torch.zeros_like(behind_HL)

    def sine(self, h_DLE: Tensor) -> Tensor:
        return torch.sin(self.frequency_E * h_DLE)

    def lag_features(self, lag_L: Tensor) -> Tensor:
        """t, then cosines and negative sines of every band, LF."""
        band_S = torch.linspace(1e-4, max(self.args.bands - 1, 1e-4), self.args.bands).to(lag_L)
        phase_LS = 2 * math.pi / self.args.span * lag_L[:, None] * band_S
        return torch.cat((lag_L[:, None] / (self.args.span - 1), phase_LS.cos(), -phase_LS.sin()), dim=-1)

    def matrix(self, v_BLHP: Tensor, features: Features, segments_BL: Tensor) -> Tensor:
        length = v_BLHP.shape[1]
        if not self.args.sam:
            require_length(length, self.grant.length, "hyena")
        behind_HL, ahead_HL = (k_HL.to(v_BLHP.dtype) for k_HL in self.weights(length))
        lag_LL = torch.arange(length)[:, None] - torch.arange(length)
        at_LL = (lag_LL >= 0).to(v_BLHP.device)
        m_HLL = torch.where(at_LL, behind_HL[:, lag_LL.clamp(min=0)], ahead_HL[:, (-lag_LL - 1).clamp(min=0)])
        if not self.args.sam:
            return m_HLL.masked_fill(~same_segment(segments_BL), 0.0)
        x_BLH1, z_BLH1 = self.gates(features, v_BLHP.dtype)
        m_BHLL = x_BLH1.transpose(1, 2) * m_HLL * z_BLH1.permute(0, 2, 3, 1)
        return m_BHLL.masked_fill(~same_segment(segments_BL), 0.0)

    def structure(self) -> tuple[str, ...]:
        same = () if self.args.sam else ("constant diagonals",)
        return same if self.args.bidirectional else (*same, "lower triangular")

    @property
    def state_size(self) -> None:
        return None

    def flops(self, length: int) -> int:
        heads, width, args = self.grant.heads, self.grant.head_width, self.args
        a_lag = args.hidden * (2 * args.bands + 1 + args.inner * args.hidden + heads)
        made = 2 * (1 + args.bidirectional) * length * a_lag
        return made + lags.product_flops(length, heads, width, self.grant.packed)


def rates(heads: int, like: Tensor) -> Tensor:
    """Of the window, H: log 100 over 1.5 to 0.3 spans."""
    return torch.linspace(math.log(100) / 1.5, math.log(100) / 0.3, heads).to(like)
