"""Semiseparable (Mamba-2, SSD): one forward scan; a token sees itself and what came before it.

With A_k = exp(dt_k A_h), one scalar a head:
    i >= j: M_ij = c_i^T A_i A_{i-1} .. A_{j+1} dt_j b_j        i < j: 0
so every block on or below the diagonal has rank <= N. sam: c, b pass SiLU and dt = softplus(raw + bias), as released.
Not sam: c, b are tables (no SiLU), dt = softplus(bias). Deliberate: no D v of its own (the shell's skip has that
place); the start is the quasiseparable mixer's (A = -1; Mamba-2 draws it in [-16, -1]), so only the direction differs.
Axes: B batch, L length, H heads, P head width, N state, G groups, K feature channels.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.mixers.base import Features, Grant, Wants, at_least_one, real, require_length, same_segment
from bench.mixers.scan import Scanned, Terms, causal_scan, products
from bench.mixers.sets import negative, own_terms, scan_flops, start, whole_groups, widened


@dataclass(frozen=True)
class Args:
    sam: bool
    heads: int
    state: int
    groups: int

    def __post_init__(self):
        at_least_one("semiseparable", self, ("heads", "state", "groups"))
        whole_groups("semiseparable", self.heads, self.groups)


class Semiseparable(Scanned):
    """Channels with sam: conv [c, b (2, G, N)], raw [dt (H)]."""

    Args: ClassVar = Args
    levels: ClassVar = (False, True)
    knobs: ClassVar = ("state", "groups")
    backends: ClassVar = ("torch", "triton")

    def __init__(self, grant: Grant, args: Args, backend: str):
        super().__init__(grant, backend, args.state)
        self.args = args
        # One axis each: the optimiser's rule decays parameters of two or more.
        self.A_log_H = nn.Parameter(torch.empty(grant.heads))
        self.dt_bias_H = nn.Parameter(torch.empty(grant.heads))
        if not args.sam:
            self.c_LGN = nn.Parameter(torch.empty(grant.length, args.groups, args.state))
            self.b_LGN = nn.Parameter(torch.empty(grant.length, args.groups, args.state))

    @property
    def wants(self) -> Wants:
        if not self.args.sam:
            return Wants(conv=0, raw=0, exact=0)
        return Wants(conv=2 * self.args.groups * self.args.state, raw=self.grant.heads, exact=0)

    def initial(self, name: str, generator: torch.Generator) -> Tensor:
        return start(name, self.get_parameter(name).shape, generator)

    def forward(self, v_BLHP: Tensor, features: Features, segments_BL: Tensor) -> Tensor:
        if self.on_chip(v_BLHP):
            return self.by_kernels(v_BLHP, self.terms(features, segments_BL), segments_BL)
        v_BLHP = v_BLHP * real(segments_BL, v_BLHP.dtype)
        y_BLHP = causal_scan(v_BLHP, *self.one_way(features, v_BLHP.shape[1]), segments_BL, self.grant.packed)
        return y_BLHP * real(segments_BL, y_BLHP.dtype)

    def terms(self, features: Features, segments_BL: Tensor) -> Terms:
        """The own token's is what the other terms say of it."""
        terms = [x[:, :, None] for x in self.one_way(features, segments_BL.shape[1])]
        return Terms(*terms, own_terms(*terms[:3]))

    def one_way(self, features: Features, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """c, b (BLGN), dt and log A_k = dt_k A_h (BLH), at least fp32; B = 1 where data-independent."""
        bias_H, A_H = widened(self.dt_bias_H), negative(self.A_log_H)
        if self.args.sam:
            cb_BLK = F.silu(features.conv_BLK.to(bias_H.dtype))
            c_BLGN, b_BLGN = cb_BLK.unflatten(-1, (2, self.args.groups, self.args.state)).unbind(2)
            dt_BLH = F.softplus(features.raw_BLK.to(bias_H.dtype) + bias_H)
        else:
            require_length(length, self.grant.length, "semiseparable")
            c_BLGN, b_BLGN = (widened(x[None, :length]) for x in (self.c_LGN, self.b_LGN))
            dt_BLH = F.softplus(bias_H).expand(1, length, -1)
        return c_BLGN, b_BLGN, dt_BLH, A_H * dt_BLH

    def matrix(self, v_BLHP: Tensor, features: Features, segments_BL: Tensor) -> Tensor:
        terms = self.one_way(features, v_BLHP.shape[1])
        c_BLGN, b_BLGN, dt_BLH, rate_BLH = (x.to(v_BLHP.dtype) for x in terms)
        cb_BGLL = torch.einsum("bign,bjgn->bgij", c_BLGN, b_BLGN)
        cb_BHLL = cb_BGLL.repeat_interleave(self.grant.heads // self.args.groups, dim=1)
        m_BHLL = products(rate_BLH) * cb_BHLL * dt_BLH.transpose(1, 2)[:, :, None]
        return m_BHLL.tril().masked_fill(~same_segment(segments_BL), 0.0)

    def structure(self) -> tuple[str, ...]:
        return ("lower triangular", f"lower rank {self.args.state}")

    @property
    def state_size(self) -> int:
        return self.args.state * self.grant.head_width

    def flops(self, length: int) -> int:
        heads, width, args = self.grant.heads, self.grant.head_width, self.args
        return scan_flops(length, heads, width, args.state, args.groups, 1)
