"""S4: a convolution with the impulse response of a linear state space, one way behind and another ahead. Not sam.

    M_ij = k_{i-j} for i >= j, k'_{j-i-1} for i < j;  k_l = 2 Re sum_n c_n (exp(dt a_n) - 1) / a_n exp(dt a_n l)

N / 2 complex states a_n = -exp(A_log_n) + i w_n, shared by all heads; of each head its own step dt and, for each
direction, its own complex c_n. Start: Re a = -1/2, w = pi (n + 1/2), dt log-uniform in [1e-3, 1e-1], c standard normal.
Source: the S4 of S4ND's vision transformer (Nguyen et al. 2022: one state matrix for all channels, bidirectional as
here). There the state matrix is diagonal plus low rank (HiPPO-LegS); here it is diagonal with zero-order hold, S4D (Gu
et al. 2022), which was found as good and whose response is one sum: N numbers fewer a layer (the low-rank part), as are
N for B, which is 1 here. Deliberate: frequencies start half a step up, so that no imaginary part is without effect at
the start; no D, the block around it has one (shells/glu.py). With heads of width 1 each channel has a response of its
own.
Axes: B batch, L length, H heads, P head width, D direction, N states, S = N / 2 pairs of them, K lags.
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
    state: int

    def __post_init__(self):
        at_least_one("s4", self, ("heads",))
        if self.state < 2 or self.state % 2:
            raise Refusal(f"mixer s4: state is {self.state}; allowed: even numbers, as states come in conjugate pairs")


class S4(Mixer):
    Args: ClassVar = Args
    levels: ClassVar = (False,)
    knobs: ClassVar = ("state",)

    def __init__(self, grant: Grant, args: Args, backend: str):
        super().__init__(grant, backend)
        self.state, pairs = args.state, args.state // 2
        # One axis each: the optimiser's rule decays parameters of two or more.
        self.A_log_S = nn.Parameter(torch.empty(pairs))
        self.w_S = nn.Parameter(torch.empty(pairs))
        self.dt_log_H = nn.Parameter(torch.empty(grant.heads))
        self.c_DHS2 = nn.Parameter(torch.empty(2, grant.heads, pairs, 2))

    @property
    def wants(self) -> Wants:
        return Wants(conv=0, raw=0, exact=0)

    def initial(self, name: str, generator: torch.Generator) -> Tensor:
        shape = self.get_parameter(name).shape
        match name:
            case "A_log_S":
                return torch.full(shape, math.log(0.5), device="cpu")
            case "w_S":
                return math.pi * (torch.arange(*shape, device="cpu") + 0.5)
            case "dt_log_H":
                ends = math.log(1e-3), math.log(1e-1)
                return torch.empty(shape, device="cpu").uniform_(*ends, generator=generator)
        return torch.randn(shape, generator=generator, device="cpu") / 2**0.5

    def forward(self, v_BLHP: Tensor, features: Features, segments_BL: Tensor) -> Tensor:
        length, real_BL11 = v_BLHP.shape[1], real(segments_BL, v_BLHP.dtype)
        require_length(length, self.grant.length, "s4")
        with torch.autocast(v_BLHP.device.type, enabled=False):
            w_1HK = lags.both_ways(*self.responses(length))
        return lags.product(w_1HK, v_BLHP * real_BL11, segments_BL, self.grant.packed) * real_BL11

    def responses(self, length: int) -> tuple[Tensor, Tensor]:
        """k and k' of L lags, each HL, in the parameters' precision: their phases are products with a place."""
        a_S, dt_H1 = self.A_log_S.exp(), self.dt_log_H.exp()[:, None]
        decay_HS, turn_HS = dt_H1 * a_S, dt_H1 * self.w_S
        # (exp(dt a) - 1) / a in real numbers, and its product with c.
        e_HS, size_S = (-decay_HS).exp(), a_S.square() + self.w_S.square()
        x_HS, y_HS = e_HS * turn_HS.cos() - 1, e_HS * turn_HS.sin()
        b_HS, d_HS = (self.w_S * y_HS - a_S * x_HS) / size_S, -(a_S * y_HS + self.w_S * x_HS) / size_S
        re_DHS, im_DHS = self.c_DHS2.unbind(-1)
        weights_DHN = torch.cat((re_DHS * b_HS - im_DHS * d_HS, -(re_DHS * d_HS + im_DHS * b_HS)), dim=-1)
        lag_L = torch.arange(length, device=a_S.device, dtype=a_S.dtype)
        phase_HSL, size_HSL = turn_HS[..., None] * lag_L, (-decay_HS[..., None] * lag_L).exp()
        waves_HNL = torch.cat((size_HSL * phase_HSL.cos(), size_HSL * phase_HSL.sin()), dim=1)
        k_HDL = torch.einsum("dhn,hnl->hdl", weights_DHN, 2 * waves_HNL)
        return k_HDL[:, 0], k_HDL[:, 1]

    def matrix(self, v_BLHP: Tensor, features: Features, segments_BL: Tensor) -> Tensor:
        """By complex powers, one lag at a time."""
        length = v_BLHP.shape[1]
        require_length(length, self.grant.length, "s4")
        wide = torch.promote_types(v_BLHP.dtype, self.c_DHS2.dtype)
        a_S = torch.complex(-self.A_log_S.exp(), self.w_S).to(torch.promote_types(wide, torch.complex64))
        step_HS = (self.dt_log_H.exp()[:, None] * a_S).exp()
        c_DHS = torch.view_as_complex(self.c_DHS2) * (step_HS - 1) / a_S
        k_LDH = torch.stack([2 * (c_DHS * step_HS**lag).sum(-1).real for lag in range(length)])
        lag_LL = torch.arange(length)[:, None] - torch.arange(length)
        behind_LLH, ahead_LLH = k_LDH[lag_LL.clamp(min=0), 0], k_LDH[(-lag_LL - 1).clamp(min=0), 1]
        m_LLH = torch.where((lag_LL >= 0).to(k_LDH.device)[..., None], behind_LLH, ahead_LLH)
        return m_LLH.permute(2, 0, 1).to(v_BLHP.dtype).masked_fill(~same_segment(segments_BL), 0.0)

    def structure(self) -> tuple[str, ...]:
        return ("constant diagonals",)

    @property
    def state_size(self) -> int:
        """Of each direction: N * P."""
        return self.state * self.grant.head_width

    def flops(self, length: int) -> int:
        heads, width = self.grant.heads, self.grant.head_width
        response = 8 * heads * self.state * length
        return response + lags.product_flops(length, heads, width, self.grant.packed)
