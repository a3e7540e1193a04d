"""The chunked scans that several mixers share, of both directions at once and of one: no mixer, and so without a yaml.

With A_k = exp(rate_k) and primes for the backward set, `chunked_scan` applies
    i > j: M_ij = c_i^T A_i A_{i-1} .. A_{j+1} dt_j b_j        i = j: M_ii = delta_i
    i < j: M_ij = c'_i^T A'_i A'_{i+1} .. A'_{j-1} dt'_j b'_j.
Axes: B batch, L length, H heads, P head width, N state, G groups, J heads of a group, D direction (0 forward, 1
backward; size 1 if both share), C chunks, S reading and T writing place in a chunk.
"""

from abc import abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kernels import require_triton
from bench.mixers.base import Features, Grant, Mixer

CHUNK = 64
WHOLE = 128
"""A row of up to so many tokens is one chunk: states would cost more than the larger matrix."""


class Terms(NamedTuple):
    """What a scan in both directions is made of; B = 1 where data-independent. At least fp32."""

    c_BLDGN: Tensor
    b_BLDGN: Tensor
    dt_BLDH: Tensor  # positive
    rate_BLDH: Tensor  # log A_k, negative
    delta_BLH: Tensor


def masked(terms: Terms, segments_BL: Tensor) -> Terms:
    """Terms by which padding neither speaks nor hears: a kernel then needs no mask on v, which is larger."""
    real_BL111 = (segments_BL > 0).to(terms.c_BLDGN.dtype)[:, :, None, None, None]
    c_BLDGN, b_BLDGN = terms.c_BLDGN * real_BL111, terms.b_BLDGN * real_BL111
    return terms._replace(c_BLDGN=c_BLDGN, b_BLDGN=b_BLDGN, delta_BLH=terms.delta_BLH * real_BL111[..., 0, 0])


class Scanned(Mixer):
    """A mixer that is one scan: with the backend 'triton' an operator takes its terms if states fit on the chip."""

    def __init__(self, grant: Grant, backend: str, state: int):
        super().__init__(grant, backend)
        self.state = state
        if backend == "triton":
            require_triton()
            from bench.kernels.scan import scan, takes

            self.scan, self.takes = scan, takes

    @abstractmethod
    def terms(self, features: Features, segments_BL: Tensor) -> Terms: ...

    def on_chip(self, v_BLHP: Tensor) -> bool:
        return self.backend == "triton" and self.takes(v_BLHP, self.state)

    def by_kernels(self, v_BLHP: Tensor, terms: Terms, segments_BL: Tensor) -> Tensor:
        return self.scan(v_BLHP, *masked(terms, segments_BL), segments_BL, self.grant.packed)

    def with_skip(self, v_BLHP: Tensor, features: Features, segments_BL: Tensor, scale: Tensor) -> Tensor | None:
        """On the diagonal, which every scan has."""
        if not self.on_chip(v_BLHP):
            return None
        terms = self.terms(features, segments_BL)
        terms = terms._replace(delta_BLH=terms.delta_BLH + scale.reciprocal())
        return self.by_kernels(v_BLHP, terms, segments_BL)


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


def causal_scan(
    v_BLHP: Tensor,
    c_BLGN: Tensor,
    b_BLGN: Tensor,
    dt_BLH: Tensor,
    rate_BLH: Tensor,
    segments_BL: Tensor,
    packed: bool,
) -> Tensor:
    """M v of the forward triangle alone, its own terms c_i^T dt_i b_i on the diagonal. v is zero on padding.

    As in the scan of both directions, masks cut documents: a chunk's state holds the document of its last token only
    and is read by the document of a chunk's first token only.
    """
    length, dtype = v_BLHP.shape[1], v_BLHP.dtype
    v_BCTHP, segments_BCT, c_BCSGN, b_BCTGN, dt_BCTH, rate_BCTH = (
        cut(x, chunk_of(length)) for x in (v_BLHP, segments_BL, c_BLGN, b_BLGN, dt_BLH, rate_BLH)
    )
    sum_BCTH = rate_BCTH.cumsum(2)
    total_BC1H = sum_BCTH[:, :, -1:]
    m_BCHST = lower_matrix(c_BCSGN, b_BCTGN, dt_BCTH.transpose(2, 3), sum_BCTH.transpose(2, 3))
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


def lower_matrix(c_BCSGN: Tensor, b_BCTGN: Tensor, dt_BCHT: Tensor, sum_BCHT: Tensor) -> Tensor:
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
