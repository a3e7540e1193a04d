"""Quasiseparable (Eq. 3, Def. 3.2; the Hydra mixer): a scan in each direction and a free diagonal.

With A_k = exp(dt_k A_h), one scalar a head, and primes for the backward set:
    i > j: M_ij = c_i^T A_i A_{i-1} .. A_{j+1} dt_j b_j        i = j: M_ii = delta_i
    i < j: M_ij = c'_i^T A'_i A'_{i+1} .. A'_{j-1} dt'_j b'_j, the mirror image: the reader's own A, not the writer's.
The released code instead reads c and A of the neighbouring token (a shifted scan); both have blocks of rank <= N.
sam: c, b pass SiLU as released, dt = softplus(raw + bias), delta_i = feature + D_h. Not sam: c, b, delta - D_h are
tables (no SiLU), dt = softplus(bias); as released, that diagonal still depends on the tokens. Both sets share A_h.
Axes: B batch, L length, H heads, P head width, N state, G groups, J heads of a group, D direction (0 forward, 1
backward; size 1 if both share), C chunks, S reading and T writing place in a chunk, K feature channels.
"""

import importlib.util
import math
import sys
import types
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import Refusal
from bench.mixers.base import Features, Grant, Mixer, Wants, real, require_length, same_segment

CHUNK = 64
WHOLE = 128
"""A row of up to so many tokens is one chunk: states would cost more than the larger matrix."""


@dataclass(frozen=True)
class Args:
    sam: bool
    heads: int
    state: int
    groups: int
    separate: bool

    def __post_init__(self):
        for name in ("heads", "state", "groups"):
            if getattr(self, name) < 1:
                raise Refusal(f"mixer quasiseparable: {name} is {getattr(self, name)}; allowed: 1 or more")
        if self.heads % self.groups:
            allowed = ", ".join(str(g) for g in range(1, self.heads + 1) if self.heads % g == 0)
            raise Refusal(f"mixer quasiseparable: groups is {self.groups}; allowed with {self.heads} heads: {allowed}")


class Terms(NamedTuple):
    """What Eq. 3 is made of; B = 1 where data-independent. At least fp32."""

    c_BLDGN: Tensor
    b_BLDGN: Tensor
    dt_BLDH: Tensor
    rate_BLDH: Tensor  # log A_k = dt_k A_h, negative
    delta_BLH: Tensor


class Quasiseparable(Mixer):
    """Channels with sam: conv [c, b of each direction (D, 2, G, N), delta (H)], raw [dt (D = 2, H)]."""

    Args: ClassVar = Args
    levels: ClassVar = (False, True)
    backends: ClassVar = ("torch", "mamba_ssm")

    def __init__(self, grant: Grant, args: Args, backend: str):
        super().__init__(grant, backend)
        if backend == "mamba_ssm":
            mamba_scan()  # refuse now rather than in the first step
        self.args = args
        self.directions = 2 if args.separate else 1
        # One axis each: the optimiser's rule decays parameters of two or more.
        self.A_log_H = nn.Parameter(torch.empty(grant.heads))
        self.dt_bias_2H = nn.Parameter(torch.empty(2 * grant.heads))
        self.D_H = nn.Parameter(torch.empty(grant.heads))
        if not args.sam:
            shape = (grant.length, self.directions, args.groups, args.state)
            self.c_LDGN = nn.Parameter(torch.empty(shape))
            self.b_LDGN = nn.Parameter(torch.empty(shape))
            self.delta_LH = nn.Parameter(torch.empty(grant.length, grant.heads))

    @property
    def wants(self) -> Wants:
        if not self.args.sam:
            return Wants(conv=0, raw=0)
        pairs = 2 * self.directions * self.args.groups * self.args.state
        return Wants(conv=pairs + self.grant.heads, raw=2 * self.grant.heads)

    def initial(self, name: str, generator: torch.Generator) -> Tensor:
        """A = -1, dt log-uniform in [1e-3, 0.1], D = 1 as released; tables standard normal, the diagonal's zero."""
        shape = self.get_parameter(name).shape
        match name:
            case "A_log_H" | "delta_LH":
                return torch.zeros(shape, device="cpu")
            case "D_H":
                return torch.ones(shape, device="cpu")
            case "dt_bias_2H":
                uniform_2H = torch.rand(shape, generator=generator, device="cpu")
                dt_2H = torch.exp(math.log(1e-3) + uniform_2H * (math.log(0.1) - math.log(1e-3)))
                return dt_2H + torch.log(-torch.expm1(-dt_2H))  # inverse of softplus
        return torch.randn(shape, generator=generator, device="cpu")

    def forward(self, v_BLHP: Tensor, features: Features, segments_BL: Tensor) -> Tensor:
        v_BLHP = v_BLHP * real(segments_BL, v_BLHP.dtype)
        terms = self.terms(features, v_BLHP.shape[1])
        if self.backend == "mamba_ssm":
            y_BLHP = kernel_scan(v_BLHP, terms, self.A_H(), segments_BL, self.grant.packed)
        else:
            y_BLHP = chunked_scan(v_BLHP, terms, segments_BL, self.grant.packed)
        return y_BLHP * real(segments_BL, y_BLHP.dtype)

    def A_H(self) -> Tensor:
        return -self.A_log_H.to(torch.promote_types(self.A_log_H.dtype, torch.float32)).exp()

    def terms(self, features: Features, length: int) -> Terms:
        heads, groups, state = self.grant.heads, self.args.groups, self.args.state
        wide = torch.promote_types(self.dt_bias_2H.dtype, torch.float32)
        bias_2H = self.dt_bias_2H.to(wide)
        if self.args.sam:
            conv_BLK = features.conv_BLK.to(wide)
            cb_BLD2GN = F.silu(conv_BLK[..., :-heads]).unflatten(-1, (self.directions, 2, groups, state))
            c_BLDGN, b_BLDGN = cb_BLD2GN.unbind(3)
            delta_BLH = conv_BLK[..., -heads:] + self.D_H
            dt_BLDH = F.softplus(features.raw_BLK.to(wide) + bias_2H).unflatten(-1, (2, heads))
        else:
            require_length(length, self.grant.length, "quasiseparable")
            c_BLDGN, b_BLDGN = self.c_LDGN[None, :length].to(wide), self.b_LDGN[None, :length].to(wide)
            delta_BLH = (self.delta_LH[None, :length] + self.D_H).to(wide)
            dt_BLDH = F.softplus(bias_2H).view(1, 1, 2, heads).expand(1, length, 2, heads)
        return Terms(c_BLDGN, b_BLDGN, dt_BLDH, self.A_H() * dt_BLDH, delta_BLH)

    def matrix(self, v_BLHP: Tensor, features: Features, segments_BL: Tensor) -> Tensor:
        length, dtype = v_BLHP.shape[1], v_BLHP.dtype
        c_BLDGN, b_BLDGN, dt_BLDH, rate_BLDH, delta_BLH = (x.to(dtype) for x in self.terms(features, length))
        each = self.grant.heads // self.args.groups
        cb_BDHLL = torch.einsum("bidgn,bjdgn->bdgij", c_BLDGN, b_BLDGN).repeat_interleave(each, dim=2)
        dt_BDHL = dt_BLDH.permute(0, 2, 3, 1)
        below_BHLL = products(rate_BLDH[:, :, 0]) * cb_BDHLL[:, 0] * dt_BDHL[:, 0, :, None]
        # The backward products are the forward ones of the reversed row, reversed again.
        above_BHLL = products(rate_BLDH[:, :, 1].flip(1)).flip(2, 3) * cb_BDHLL[:, -1] * dt_BDHL[:, 1, :, None]
        m_BHLL = below_BHLL.tril(-1) + above_BHLL.triu(1) + torch.diag_embed(delta_BLH.transpose(1, 2))
        return m_BHLL.masked_fill(~same_segment(segments_BL), 0.0)

    @property
    def state_size(self) -> int:
        """Of each direction: N * P."""
        return self.args.state * self.grant.head_width

    def flops(self, length: int) -> int:
        heads, width, state = self.grant.heads, self.grant.head_width, self.args.state
        chunk = chunk_of(length)
        chunks = -(-length // chunk)
        scores = 2 * length * chunk * self.directions * self.args.groups * state
        inside = 2 * length * chunk * heads * width
        states = 2 * (2 * 2 * length + 2 * chunks**2) * heads * state * width  # both directions: write, read, carry
        return scores + inside + states


def products(rate_BLH: Tensor) -> Tensor:
    """A_i A_{i-1} .. A_{j+1} at (i, j), i >= j (1 on the diagonal), BHLL, row by row."""
    decay_BHL = rate_BLH.exp().transpose(1, 2)
    one_LL = torch.eye(rate_BLH.shape[1], dtype=rate_BLH.dtype, device=rate_BLH.device)
    rows = [one_LL[0].expand_as(decay_BHL)]
    for i in range(1, len(one_LL)):
        rows.append(rows[-1] * decay_BHL[..., i : i + 1] + one_LL[i])
    return torch.stack(rows, dim=2)


def chunked_scan(v_BLHP: Tensor, terms: Terms, segments_BL: Tensor, packed: bool) -> Tensor:
    """M v: one matrix inside each chunk for both directions, states between chunks. v is zero on padding.

    Segments are cut by boolean masks: a chunk's state holds only the segment that touches the border it crosses and
    is read only by that segment, so no decay has to stand for a border.
    """
    length, dtype = v_BLHP.shape[1], v_BLHP.dtype
    chunk = chunk_of(length)
    v_BCTHP, segments_BCT = cut(v_BLHP, chunk), cut(segments_BL, chunk)
    c_BCSDGN, b_BCTDGN, dt_BCTDH, rate_BCTDH, delta_BCSH = (cut(x, chunk) for x in terms)
    # Sums of log A in a chunk: forward, up to and with a place; backward, up to it without its own.
    sum_BCTDH = rate_BCTDH.cumsum(2)
    total_BC1DH = sum_BCTDH[:, :, -1:]
    sum_BCTDH = torch.stack([sum_BCTDH[..., 0, :], (sum_BCTDH - rate_BCTDH)[..., 1, :]], 3)
    rest_BCTDH = total_BC1DH - sum_BCTDH
    read_BCSDH = torch.stack([sum_BCTDH[..., 0, :], rest_BCTDH[..., 1, :]], 3).exp()
    write_BCTDH = torch.stack([rest_BCTDH[..., 0, :], sum_BCTDH[..., 1, :]], 3).exp() * dt_BCTDH
    m_BCHST = inner_matrix(c_BCSDGN, b_BCTDGN, dt_BCTDH, sum_BCTDH.permute(0, 1, 3, 4, 2), delta_BCSH)
    if packed:
        m_BCHST = m_BCHST * (segments_BCT[..., :, None] == segments_BCT[..., None, :])[:, :, None]
    y_BCSHP = torch.einsum("bchst,bcthp->bcshp", m_BCHST.to(dtype), v_BCTHP)
    if v_BCTHP.shape[1] > 1:
        first_BC1, last_BC1 = segments_BCT[..., :1], segments_BCT[..., -1:]
        joined_BCC = None
        if packed:
            enters_BCTD = torch.stack([segments_BCT == first_BC1, segments_BCT == last_BC1], -1)
            read_BCSDH = read_BCSDH * enters_BCTD[..., None]
            write_BCTDH = write_BCTDH * enters_BCTD.flip(-1)[..., None]
            joined_BCC = first_BC1 == last_BC1.transpose(1, 2)
        state_BCHDNP = torch.einsum("bcthdn,bcthp->bchdnp", weigh(b_BCTDGN, write_BCTDH).to(dtype), v_BCTHP)
        carry_BDHCC = chunk_decay(total_BC1DH[:, :, 0], joined_BCC).to(dtype)
        state_BCHDNP = torch.einsum("bdhce,behdnp->bchdnp", carry_BDHCC, state_BCHDNP)
        read_BCSHDN = weigh(c_BCSDGN, read_BCSDH).to(dtype)
        y_BCSHP = y_BCSHP + torch.einsum("bcshdn,bchdnp->bcshp", read_BCSHDN, state_BCHDNP)
    return y_BCSHP.flatten(1, 2)[:, :length]


def chunk_of(length: int) -> int:
    return length if length <= WHOLE else CHUNK


def cut(x_BL: Tensor, chunk: int) -> Tensor:
    """BL... into chunks BCT..., the last filled up with zeros."""
    missing = -x_BL.shape[1] % chunk
    x_BL = F.pad(x_BL, (0, 0) * (x_BL.ndim - 2) + (0, missing))
    return x_BL.unflatten(1, (-1, chunk))


def weigh(x_BCTDGN: Tensor, weight_BCTDH: Tensor) -> Tensor:
    """c or b of each head and direction times a weight, BCTHDN."""
    weight_BCTDGJ1 = weight_BCTDH.unflatten(-1, (x_BCTDGN.shape[4], -1))[..., None]
    return (x_BCTDGN[..., None, :] * weight_BCTDGJ1).flatten(4, 5).transpose(3, 4)


def inner_matrix(
    c_BCSDGN: Tensor, b_BCTDGN: Tensor, dt_BCTDH: Tensor, sums_BCDHT: Tensor, delta_BCSH: Tensor
) -> Tensor:
    """Both triangles and the diagonal of each chunk, BCHST; `sums` of log A, forward with, backward without a place."""
    chunk, groups = c_BCSDGN.shape[2], c_BCSDGN.shape[4]
    f_BCHT, b_BCHT = sums_BCDHT.unbind(2)
    below_ST = torch.ones(chunk, chunk, dtype=torch.bool, device=f_BCHT.device).tril()
    # Only exponents <= 0 are chosen before exp, so that no infinity meets a zero in the gradient.
    log_BCHST = torch.where(
        below_ST, f_BCHT[..., :, None] - f_BCHT[..., None, :], b_BCHT[..., None, :] - b_BCHT[..., :, None]
    )
    dt_BCDH1T = dt_BCTDH.permute(0, 1, 3, 4, 2)[..., None, :]
    decay_BCHST = log_BCHST.exp() * torch.where(below_ST, dt_BCDH1T[:, :, 0], dt_BCDH1T[:, :, 1])
    cb_BCDGST = torch.einsum("bcsdgn,bctdgn->bcdgst", c_BCSDGN, b_BCTDGN)
    cb_BCGST = torch.where(below_ST, cb_BCDGST[:, :, 0], cb_BCDGST[:, :, -1])
    m_BCHST = (cb_BCGST[:, :, :, None] * decay_BCHST.unflatten(2, (groups, -1))).flatten(2, 3)
    eye_ST = torch.eye(chunk, dtype=torch.bool, device=f_BCHT.device)
    return torch.where(eye_ST, delta_BCSH.transpose(2, 3)[..., None], m_BCHST)


def chunk_decay(total_BCDH: Tensor, joined_BCC: Tensor | None) -> Tensor:
    """How much of chunk e's state reaches chunk c: the product of A over the chunks strictly between, BDHCE.

    Forward e < c, backward e > c. `joined` (c, e): the first token of c and the last of e have one segment.
    """
    total_BDHC = total_BCDH.permute(0, 2, 3, 1)
    chunks = total_BDHC.shape[-1]
    earlier_CC = torch.ones(chunks, chunks, dtype=torch.bool, device=total_BDHC.device).tril(-1)
    # Summed afresh from each e on: differences of long sums would lose digits. Row c adds chunk c - 1 if e < c - 1.
    step_BDHC1 = F.pad(total_BDHC, (1, -1))[..., None]
    log_BDHCC = (step_BDHC1 * F.pad(earlier_CC, (0, 0, 1, -1))).cumsum(-2)
    reach_BDHCC = log_BDHCC.exp()[:, :1] * earlier_CC
    # Backward, what lies strictly between is the same: the transpose, with its own sums.
    back_BDHCC = log_BDHCC.exp()[:, 1:] * earlier_CC
    if joined_BCC is not None:
        reach_BDHCC, back_BDHCC = (x * joined_BCC[:, None, None] for x in (reach_BDHCC, back_BDHCC))
    return torch.cat([reach_BDHCC, back_BDHCC.transpose(-1, -2)], dim=1)


def mamba_scan():
    """The kernel of mamba-ssm, imported when it is asked for."""
    name = "selective_scan_cuda"
    if name not in sys.modules and importlib.util.find_spec(name) is None:
        # A build without the CUDA extension fails on importing it, though this kernel does not use it.
        sys.modules[name] = types.ModuleType(name)
    try:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    except ImportError as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Refusal(
            f"backend 'mamba_ssm' cannot be imported ({reason}); install 'mixerbench[mamba]' or use: torch"
        ) from error
    return mamba_chunk_scan_combined


@torch.compiler.disable
def kernel_scan(v_BLHP: Tensor, terms: Terms, A_H: Tensor, segments_BL: Tensor, packed: bool) -> Tensor:
    """M v by two calls of mamba-ssm's scan, whose own diagonal is taken off again. fp32 (as TF32) or half precision."""
    if v_BLHP.device.type != "cuda":
        raise Refusal(f"backend 'mamba_ssm' needs a CUDA device; on {v_BLHP.device.type} use: torch")
    if v_BLHP.dtype == torch.float64:
        raise Refusal("backend 'mamba_ssm' has no float64; use: torch")
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else v_BLHP.dtype
    scan, v_BLHP = mamba_scan(), v_BLHP.to(dtype)
    c_BLDGN, b_BLDGN, dt_BLDH, _, delta_BLH = (x.expand(len(v_BLHP), *x.shape[1:]) for x in terms)
    seq_idx = segments_BL.to(torch.int32) if packed else None

    def one_way(d: int, turn) -> Tensor:
        """Direction d, with `turn` to make it a forward one; strictly triangular."""
        c_BLGN, b_BLGN, dt_BLH = turn(c_BLDGN[:, :, -d]), turn(b_BLDGN[:, :, -d]), turn(dt_BLDH[:, :, d])
        turned = None if seq_idx is None else turn(seq_idx)
        y_BLHP = scan(turn(v_BLHP), dt_BLH, A_H, b_BLGN.to(dtype), c_BLGN.to(dtype), CHUNK, seq_idx=turned)
        return turn(y_BLHP)

    own_BLDG = (c_BLDGN * b_BLDGN).sum(-1)
    own_BLDH = own_BLDG.repeat_interleave(dt_BLDH.shape[-1] // own_BLDG.shape[-1], dim=-1) * dt_BLDH
    diagonal_BLH = delta_BLH - own_BLDH.sum(2)
    y_BLHP = one_way(0, lambda x: x.contiguous()) + one_way(1, lambda x: x.flip(1))
    return y_BLHP + (diagonal_BLH[..., None] * v_BLHP).to(dtype)
