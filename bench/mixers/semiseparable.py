"""Semiseparable (Mamba-2, SSD): one forward scan; a token sees itself and what came before it.

With A_k = exp(dt_k A_h), one scalar a head:
    i >= j: M_ij = c_i^T A_i A_{i-1} .. A_{j+1} dt_j b_j        i < j: 0
so every block on or below the diagonal has rank <= N. sam: c, b pass SiLU and dt = softplus(raw + bias), as released.
Not sam: c, b are tables (no SiLU), dt = softplus(bias). Deliberate: no D v of its own (the shell's skip has that
place); the start is the quasiseparable mixer's (A = -1; Mamba-2 draws it in [-16, -1]), so only the direction differs.
Axes: B batch, L length, H heads, P head width, N state, G groups, C chunks, S reading and T writing place in a chunk,
K feature channels.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import Refusal
from bench.mixers.base import Features, Grant, Mixer, Wants, at_least_one, real, require_length, same_segment
from bench.mixers.scan import chunk_decay, chunk_of, cut, products, weigh


@dataclass(frozen=True)
class Args:
    sam: bool
    heads: int
    state: int
    groups: int

    def __post_init__(self):
        at_least_one("semiseparable", self, ("heads", "state", "groups"))
        if self.heads % self.groups:
            allowed = ", ".join(str(g) for g in range(1, self.heads + 1) if self.heads % g == 0)
            raise Refusal(f"mixer semiseparable: groups is {self.groups}; allowed with {self.heads} heads: {allowed}")


class Semiseparable(Mixer):
    """Channels with sam: conv [c, b (2, G, N)], raw [dt (H)]."""

    Args: ClassVar = Args
    levels: ClassVar = (False, True)

    def __init__(self, grant: Grant, args: Args, backend: str):
        super().__init__(grant, backend)
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
        """A = -1, dt log-uniform in [1e-3, 0.1] as released; tables standard normal."""
        shape = self.get_parameter(name).shape
        match name:
            case "A_log_H":
                return torch.zeros(shape, device="cpu")
            case "dt_bias_H":
                uniform_H = torch.rand(shape, generator=generator, device="cpu")
                dt_H = torch.exp(math.log(1e-3) + uniform_H * (math.log(0.1) - math.log(1e-3)))
                return dt_H + torch.log(-torch.expm1(-dt_H))  # inverse of softplus
        return torch.randn(shape, generator=generator, device="cpu")

    def forward(self, v_BLHP: Tensor, features: Features, segments_BL: Tensor) -> Tensor:
        v_BLHP = v_BLHP * real(segments_BL, v_BLHP.dtype)
        y_BLHP = causal_scan(v_BLHP, *self.terms(features, v_BLHP.shape[1]), segments_BL, self.grant.packed)
        return y_BLHP * real(segments_BL, y_BLHP.dtype)

    def terms(self, features: Features, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """c, b (BLGN), dt and log A_k = dt_k A_h (BLH), at least fp32; B = 1 where data-independent."""
        wide = torch.promote_types(self.dt_bias_H.dtype, torch.float32)
        bias_H, A_H = self.dt_bias_H.to(wide), -self.A_log_H.to(wide).exp()
        if self.args.sam:
            cb_BLK = F.silu(features.conv_BLK.to(wide))
            c_BLGN, b_BLGN = cb_BLK.unflatten(-1, (2, self.args.groups, self.args.state)).unbind(2)
            dt_BLH = F.softplus(features.raw_BLK.to(wide) + bias_H)
        else:
            require_length(length, self.grant.length, "semiseparable")
            c_BLGN, b_BLGN = self.c_LGN[None, :length].to(wide), self.b_LGN[None, :length].to(wide)
            dt_BLH = F.softplus(bias_H).expand(1, length, -1)
        return c_BLGN, b_BLGN, dt_BLH, A_H * dt_BLH

    def matrix(self, v_BLHP: Tensor, features: Features, segments_BL: Tensor) -> Tensor:
        terms = self.terms(features, v_BLHP.shape[1])
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
        heads, width, state = self.grant.heads, self.grant.head_width, self.args.state
        chunk = chunk_of(length)
        chunks = -(-length // chunk)
        scores = 2 * length * chunk * self.args.groups * state
        inside = 2 * length * chunk * heads * width
        states = 2 * (2 * length + chunks**2) * heads * state * width  # write, read, carry
        return scores + inside + states


def causal_scan(
    v_BLHP: Tensor,
    c_BLGN: Tensor,
    b_BLGN: Tensor,
    dt_BLH: Tensor,
    rate_BLH: Tensor,
    segments_BL: Tensor,
    packed: bool,
) -> Tensor:
    """M v: a matrix inside each chunk, states between chunks. v is zero on padding.

    As in the scan of both directions, masks cut documents: a chunk's state holds the document of its last token only
    and is read by the document of a chunk's first token only.
    """
    length, dtype = v_BLHP.shape[1], v_BLHP.dtype
    v_BCTHP, segments_BCT, c_BCSGN, b_BCTGN, dt_BCTH, rate_BCTH = (
        cut(x, chunk_of(length)) for x in (v_BLHP, segments_BL, c_BLGN, b_BLGN, dt_BLH, rate_BLH)
    )
    sum_BCTH = rate_BCTH.cumsum(2)
    total_BC1H = sum_BCTH[:, :, -1:]
    m_BCHST = inner_matrix(c_BCSGN, b_BCTGN, dt_BCTH.transpose(2, 3), sum_BCTH.transpose(2, 3))
    if packed:
        m_BCHST = m_BCHST * (segments_BCT[..., :, None] == segments_BCT[..., None, :])[:, :, None]
    y_BCSHP = torch.einsum("bchst,bcthp->bcshp", m_BCHST.to(dtype), v_BCTHP)
    if v_BCTHP.shape[1] > 1:
        read_BCSH, write_BCTH = sum_BCTH.exp(), (total_BC1H - sum_BCTH).exp() * dt_BCTH
        joined_BCC = None
        if packed:
            first_BC1, last_BC1 = segments_BCT[..., :1], segments_BCT[..., -1:]
            read_BCSH = read_BCSH * (segments_BCT == first_BC1)[..., None]
            write_BCTH = write_BCTH * (segments_BCT == last_BC1)[..., None]
            joined_BCC = first_BC1 == last_BC1.transpose(1, 2)
        # The shared helpers have an axis of directions; here it has size 1.
        carry_BHCC = chunk_decay(total_BC1H, joined_BCC)[:, 0].to(dtype)
        b_BCTHN = weigh(b_BCTGN[:, :, :, None], write_BCTH[:, :, :, None])[..., 0, :].to(dtype)
        c_BCSHN = weigh(c_BCSGN[:, :, :, None], read_BCSH[:, :, :, None])[..., 0, :].to(dtype)
        state_BCHNP = torch.einsum("bcthn,bcthp->bchnp", b_BCTHN, v_BCTHP)
        state_BCHNP = torch.einsum("bhce,behnp->bchnp", carry_BHCC, state_BCHNP)
        y_BCSHP = y_BCSHP + torch.einsum("bcshn,bchnp->bcshp", c_BCSHN, state_BCHNP)
    return y_BCSHP.flatten(1, 2)[:, :length]


def inner_matrix(c_BCSGN: Tensor, b_BCTGN: Tensor, dt_BCHT: Tensor, sum_BCHT: Tensor) -> Tensor:
    """The lower triangle of each chunk with its diagonal, BCHST."""
    chunk, groups = c_BCSGN.shape[2], c_BCSGN.shape[3]
    below_ST = torch.ones(chunk, chunk, dtype=torch.bool, device=c_BCSGN.device).tril()
    # Exponents above 0 are replaced before exp, so that no infinity meets a zero in the gradient.
    log_BCHST = torch.where(below_ST, sum_BCHT[..., :, None] - sum_BCHT[..., None, :], 0.0)
    decay_BCHST = log_BCHST.exp() * below_ST * dt_BCHT[..., None, :]
    # In fp32: rounded to bf16 here, scores put errors into the gradient of A_log, a sum over all tokens that cancels.
    with torch.autocast(c_BCSGN.device.type, enabled=False):
        cb_BCGST = torch.einsum("bcsgn,bctgn->bcgst", c_BCSGN, b_BCTGN)
    return (cb_BCGST[:, :, :, None] * decay_BCHST.unflatten(2, (groups, -1))).flatten(2, 3)
