"""Add (Tables 3 and 10 of the reference paper): a scan in each direction over shared v, the two results added.

With A_k = exp(dt_k A_h), one scalar a head, and primes for the backward set:
    i > j: M_ij = c_i^T A_i A_{i-1} .. A_{j+1} dt_j b_j        i = j: M_ii = c_i^T dt_i b_i + c'_i^T dt'_i b'_i
    i < j: M_ij = c'_i^T A'_i A'_{i+1} .. A'_{j-1} dt'_j b'_j
so the diagonal is tied to both sets. `diagonal` adds a free delta_i there ('Add + Diag'). `shift` makes the triangles
strict, so the diagonal loses both own terms and, without `diagonal`, is zero: the shell's skip gives the token itself
('Add + Shift'). Both together are the quasiseparable mixer. Deliberate: the released shift also reads c and A of the
neighbouring token; here the reader keeps its own. Start, sam and not sam: as the quasiseparable mixer has them.
Axes: B batch, L length, H heads, P head width, N state, G groups, D direction (0 forward, 1 backward; size 1 if both
share), K feature channels.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from bench.mixers.base import Features, Grant, Wants, at_least_one, real, require_length, same_segment
from bench.mixers.scan import Scanned, Terms, chunked_scan
from bench.mixers.sets import (
    Sets,
    own_terms,
    scan_flops,
    start,
    table_sets,
    token_sets,
    triangles,
    whole_groups,
    widened,
)


@dataclass(frozen=True)
class Args:
    sam: bool
    heads: int
    state: int
    groups: int
    separate: bool
    shift: bool
    diagonal: bool

    def __post_init__(self):
        at_least_one("add", self, ("heads", "state", "groups"))
        whole_groups("add", self.heads, self.groups)


class Add(Scanned):
    """Channels with sam: conv [c, b of each direction (D, 2, G, N), delta (H) if diagonal], raw [dt (2, H)]."""

    Args: ClassVar = Args
    levels: ClassVar = (False, True)
    knobs: ClassVar = ("state", "groups")
    backends: ClassVar = ("torch", "triton")
    forms: ClassVar = ({}, {"diagonal": True}, {"shift": True})  # both: the quasiseparable mixer

    def __init__(self, grant: Grant, args: Args, backend: str):
        super().__init__(grant, backend, args.state)
        self.args = args
        self.directions = 2 if args.separate else 1
        # One axis each: the optimiser's rule decays parameters of two or more.
        self.A_log_H = nn.Parameter(torch.empty(grant.heads))
        self.dt_bias_2H = nn.Parameter(torch.empty(2 * grant.heads))
        if args.diagonal:
            self.D_H = nn.Parameter(torch.empty(grant.heads))
        if not args.sam:
            shape = (grant.length, self.directions, args.groups, args.state)
            self.c_LDGN = nn.Parameter(torch.empty(shape))
            self.b_LDGN = nn.Parameter(torch.empty(shape))
        if args.diagonal and not args.sam:
            self.delta_LH = nn.Parameter(torch.empty(grant.length, grant.heads))

    @property
    def pairs(self) -> int:
        """Channels of c and b."""
        return 2 * self.directions * self.args.groups * self.args.state

    @property
    def wants(self) -> Wants:
        if not self.args.sam:
            return Wants(conv=0, raw=0, exact=0)
        free = self.grant.heads if self.args.diagonal else 0
        return Wants(conv=self.pairs + free, raw=2 * self.grant.heads, exact=0)

    def initial(self, name: str, generator: torch.Generator) -> Tensor:
        return start(name, self.get_parameter(name).shape, generator)

    def forward(self, v_BLHP: Tensor, features: Features, segments_BL: Tensor) -> Tensor:
        terms = self.terms(features, segments_BL)
        if self.on_chip(v_BLHP):
            return self.by_kernels(v_BLHP, terms, segments_BL)
        v_BLHP = v_BLHP * real(segments_BL, v_BLHP.dtype)
        y_BLHP = chunked_scan(v_BLHP, terms, segments_BL, self.grant.packed)
        return y_BLHP * real(segments_BL, y_BLHP.dtype)

    def terms(self, features: Features, segments_BL: Tensor) -> Terms:
        sets = self.sets(features, segments_BL.shape[1])
        c_BLDGN, b_BLDGN, dt_BLDH, _ = sets
        delta_BLH = self.free(features, dt_BLDH)
        if not self.args.shift:
            delta_BLH = delta_BLH + own_terms(c_BLDGN, b_BLDGN, dt_BLDH)
        return Terms(*sets, delta_BLH)

    def sets(self, features: Features, length: int) -> Sets:
        args = self.args
        if args.sam:
            cb_BLK = features.conv_BLK[..., : self.pairs]
            return token_sets(cb_BLK, features.raw_BLK, self.dt_bias_2H, self.A_log_H, args.groups, args.state)
        require_length(length, self.grant.length, "add")
        return table_sets(self.c_LDGN, self.b_LDGN, self.dt_bias_2H, self.A_log_H, length)

    def free(self, features: Features, dt_BLDH: Tensor) -> Tensor:
        """The part of the diagonal that belongs to neither set, BLH: delta_i, or zero."""
        if not self.args.diagonal:
            return torch.zeros_like(dt_BLDH[:, :, 0])
        delta_BLH = features.conv_BLK[..., self.pairs :] if self.args.sam else self.delta_LH[None, : dt_BLDH.shape[1]]
        return widened(delta_BLH) + widened(self.D_H)

    def matrix(self, v_BLHP: Tensor, features: Features, segments_BL: Tensor) -> Tensor:
        sets = self.sets(features, v_BLHP.shape[1])
        delta_BHL = self.free(features, sets[2]).transpose(1, 2).to(v_BLHP.dtype)
        lower_BHLL, upper_BHLL = triangles(tuple(x.to(v_BLHP.dtype) for x in sets))
        if self.args.shift:
            lower_BHLL, upper_BHLL = lower_BHLL.tril(-1), upper_BHLL.triu(1)
        m_BHLL = lower_BHLL + upper_BHLL + torch.diag_embed(delta_BHL)
        return m_BHLL.masked_fill(~same_segment(segments_BL), 0.0)

    def structure(self) -> tuple[str, ...]:
        rank = f"off-diagonal rank {self.args.state}"
        if self.args.diagonal:
            return (rank, "free diagonal")
        return (rank, "zero diagonal") if self.args.shift else (rank,)

    @property
    def state_size(self) -> int:
        """Of each direction: N * P."""
        return self.args.state * self.grant.head_width

    def flops(self, length: int) -> int:
        heads, width, args = self.grant.heads, self.grant.head_width, self.args
        return scan_flops(length, heads, width, args.state, self.directions * args.groups, 2)
