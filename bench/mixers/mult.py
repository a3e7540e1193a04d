"""Mult (Table 3 of the reference paper): a scan in each direction over shared v, the two results multiplied.

y = (M v) * (M' v), entry by entry: quadratic in v, so no matrix mixer. With A_k = exp(dt_k A_h), one scalar a head, and
primes for the backward set (both are zero elsewhere):
    i >= j: M_ij = c_i^T A_i A_{i-1} .. A_{j+1} dt_j b_j
    i <= j: M'_ij = c'_i^T A'_i A'_{i+1} .. A'_{j-1} dt'_j b'_j
Start, sam and not sam: as the quasiseparable mixer has them, without its diagonal. Deliberate: neither scan has a D v
of its own (the shell's skip has that place), and there is no scale, as published. So |y| / |v| grows with |v|, and it
starts small: 4e-4, where the sum of the two scans has 5e-2 (width 768, 128 tokens, maps of deviation 0.02). A protocol
that calibrates the gain lifts that; one that does not starts this mixer near off. bf16 has the range for it, and the
product only adds the two scans' relative errors.
Axes: B batch, L length, H heads, P head width, N state, G groups, D direction (0 forward, 1 backward; size 1 if both
share), K feature channels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from bench.kernels import require_triton
from bench.mixers.base import Features, Grant, Mixer, Wants, at_least_one, real, require_length, same_segment
from bench.mixers.scan import Terms, causal_scan, masked
from bench.mixers.sets import Sets, own_terms, scan_flops, start, table_sets, token_sets, triangles, whole_groups


@dataclass(frozen=True)
class Args:
    sam: bool
    heads: int
    state: int
    groups: int
    separate: bool

    def __post_init__(self):
        at_least_one("mult", self, ("heads", "state", "groups"))
        whole_groups("mult", self.heads, self.groups)


class Mult(Mixer):
    """Channels with sam: conv [c, b of each direction (D, 2, G, N)], raw [dt (2, H)]."""

    Args: ClassVar = Args
    levels: ClassVar = (False, True)
    knobs: ClassVar = ("state", "groups")
    backends: ClassVar = ("torch", "triton")

    def __init__(self, grant: Grant, args: Args, backend: str):
        super().__init__(grant, backend)
        if backend == "triton":
            require_triton()
            from bench.kernels.scan import scan, takes

            self.scan, self.takes = scan, takes
        self.args = args
        self.directions = 2 if args.separate else 1
        # One axis each: the optimiser's rule decays parameters of two or more.
        self.A_log_H = nn.Parameter(torch.empty(grant.heads))
        self.dt_bias_2H = nn.Parameter(torch.empty(2 * grant.heads))
        if not args.sam:
            shape = (grant.length, self.directions, args.groups, args.state)
            self.c_LDGN = nn.Parameter(torch.empty(shape))
            self.b_LDGN = nn.Parameter(torch.empty(shape))

    @property
    def wants(self) -> Wants:
        if not self.args.sam:
            return Wants(conv=0, raw=0, exact=0)
        pairs = 2 * self.directions * self.args.groups * self.args.state
        return Wants(conv=pairs, raw=2 * self.grant.heads, exact=0)

    def initial(self, name: str, generator: torch.Generator) -> Tensor:
        return start(name, self.get_parameter(name).shape, generator)

    def forward(self, v_BLHP: Tensor, features: Features, segments_BL: Tensor) -> Tensor:
        v_BLHP = v_BLHP * real(segments_BL, v_BLHP.dtype)
        c_BLDGN, b_BLDGN, dt_BLDH, rate_BLDH = self.sets(features, v_BLHP.shape[1])
        fused = self.backend == "triton" and self.takes(v_BLHP, self.args.state)
        way = self.by_kernel if fused else causal_scan

        def one_way(d: int, turn: Callable[[Tensor], Tensor]) -> Tensor:
            """Direction d, with `turn` to make it a forward one."""
            own = (c_BLDGN[:, :, -d], b_BLDGN[:, :, -d], dt_BLDH[:, :, d], rate_BLDH[:, :, d])
            return turn(way(turn(v_BLHP), *map(turn, own), turn(segments_BL), self.grant.packed))

        y_BLHP = one_way(0, lambda x: x) * one_way(1, lambda x: x.flip(1))
        return y_BLHP * real(segments_BL, y_BLHP.dtype)

    def by_kernel(self, v_BLHP: Tensor, *given) -> Tensor:
        """What `causal_scan` computes of the same, by the kernel of one direction."""
        c_BLDGN, b_BLDGN, dt_BLDH, rate_BLDH = (x[:, :, None] for x in given[:4])
        terms = Terms(c_BLDGN, b_BLDGN, dt_BLDH, rate_BLDH, own_terms(c_BLDGN, b_BLDGN, dt_BLDH))
        segments_BL, packed = given[4:]
        return self.scan(v_BLHP, *masked(terms, segments_BL), segments_BL, packed)

    def sets(self, features: Features, length: int) -> Sets:
        args = self.args
        if args.sam:
            conv_BLK, raw_BLK = features.conv_BLK, features.raw_BLK
            return token_sets(conv_BLK, raw_BLK, self.dt_bias_2H, self.A_log_H, args.groups, args.state)
        require_length(length, self.grant.length, "mult")
        return table_sets(self.c_LDGN, self.b_LDGN, self.dt_bias_2H, self.A_log_H, length)

    def matrix(self, v_BLHP: Tensor, features: Features, segments_BL: Tensor) -> Tensor:
        raise NotImplementedError("mult is not linear in v and has no matrix; its two factors: matrices()")

    def matrices(self, v_BLHP: Tensor, features: Features, segments_BL: Tensor) -> tuple[Tensor, ...]:
        """M and M', BHLL: lower and upper triangular, each with its own diagonal."""
        factors = triangles(tuple(x.to(v_BLHP.dtype) for x in self.sets(features, v_BLHP.shape[1])))
        return tuple(m_BHLL.masked_fill(~same_segment(segments_BL), 0.0) for m_BHLL in factors)

    def structure(self) -> tuple[str, ...]:
        return ("not linear",)

    @property
    def state_size(self) -> int:
        """Of each direction: N * P."""
        return self.args.state * self.grant.head_width

    def flops(self, length: int) -> int:
        heads, width, args = self.grant.heads, self.grant.head_width, self.args
        return 2 * scan_flops(length, heads, width, args.state, args.groups, 1)
