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
import os
import sys
import types
import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from bench import NotInstalled, Refusal
from bench.mixers.base import Features, Grant, Wants, at_least_one, real, require_length, same_segment
from bench.mixers.scan import CHUNK, Scanned, Terms, chunked_scan
from bench.mixers.sets import (
    negative,
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

    def __post_init__(self):
        at_least_one("quasiseparable", self, ("heads", "state", "groups"))
        whole_groups("quasiseparable", self.heads, self.groups)


class Quasiseparable(Scanned):
    """Channels with sam: conv [c, b of each direction (D, 2, G, N), delta (H)], raw [dt (D = 2, H)]."""

    Args: ClassVar = Args
    levels: ClassVar = (False, True)
    forms: ClassVar = ({}, {"separate": False})
    knobs: ClassVar = ("state", "groups")
    backends: ClassVar = ("torch", "triton", "mamba_ssm")

    def __init__(self, grant: Grant, args: Args, backend: str):
        super().__init__(grant, backend, args.state)
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
            return Wants(conv=0, raw=0, exact=0)
        pairs = 2 * self.directions * self.args.groups * self.args.state
        return Wants(conv=pairs + self.grant.heads, raw=2 * self.grant.heads, exact=0)

    def initial(self, name: str, generator: torch.Generator) -> Tensor:
        return start(name, self.get_parameter(name).shape, generator)

    def forward(self, v_BLHP: Tensor, features: Features, segments_BL: Tensor) -> Tensor:
        terms = self.terms(features, segments_BL)
        if self.on_chip(v_BLHP):
            return self.by_kernels(v_BLHP, terms, segments_BL)
        v_BLHP = v_BLHP * real(segments_BL, v_BLHP.dtype)
        if self.backend == "mamba_ssm":
            y_BLHP = kernel_scan(v_BLHP, terms, self.A_H(), segments_BL, self.grant.packed)
        else:
            y_BLHP = chunked_scan(v_BLHP, terms, segments_BL, self.grant.packed)
        return y_BLHP * real(segments_BL, y_BLHP.dtype)

    def A_H(self) -> Tensor:
        return negative(self.A_log_H)

    def terms(self, features: Features, segments_BL: Tensor) -> Terms:
        heads, args, length = self.grant.heads, self.args, segments_BL.shape[1]
        if args.sam:
            cb_BLK, delta_BLH = features.conv_BLK[..., :-heads], features.conv_BLK[..., -heads:]
            sets = token_sets(cb_BLK, features.raw_BLK, self.dt_bias_2H, self.A_log_H, args.groups, args.state)
        else:
            require_length(length, self.grant.length, "quasiseparable")
            sets = table_sets(self.c_LDGN, self.b_LDGN, self.dt_bias_2H, self.A_log_H, length)
            delta_BLH = self.delta_LH[None, :length]
        return Terms(*sets, widened(delta_BLH) + widened(self.D_H))

    def matrix(self, v_BLHP: Tensor, features: Features, segments_BL: Tensor) -> Tensor:
        *sets, delta_BLH = (x.to(v_BLHP.dtype) for x in self.terms(features, segments_BL))
        lower_BHLL, upper_BHLL = triangles(sets)
        m_BHLL = lower_BHLL.tril(-1) + upper_BHLL.triu(1) + torch.diag_embed(delta_BLH.transpose(1, 2))
        return m_BHLL.masked_fill(~same_segment(segments_BL), 0.0)

    def structure(self) -> tuple[str, ...]:
        return (f"off-diagonal rank {self.args.state}", "free diagonal")

    @property
    def state_size(self) -> int:
        """Of each direction: N * P."""
        return self.args.state * self.grant.head_width

    def flops(self, length: int) -> int:
        heads, width, args = self.grant.heads, self.grant.head_width, self.args
        return scan_flops(length, heads, width, args.state, self.directions * args.groups, 2)


def mamba_scan():
    """The kernel of mamba-ssm, imported when it is asked for, in its deterministic mode.

    Otherwise it chooses among variants by timing them, so that two processes may round differently (and compiles a
    hundred), and adds gradients up in whatever order they come.
    """
    name = "selective_scan_cuda"
    if name not in sys.modules and importlib.util.find_spec(name) is None:
        # A build without the CUDA extension fails on importing it, though this kernel does not use it.
        sys.modules[name] = types.ModuleType(name)
    os.environ.setdefault("MAMBA_DETERMINISTIC", "1")  # read when the package is imported
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that timing them once would be faster
            from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    except ImportError as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise NotInstalled(
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

    diagonal_BLH = delta_BLH - own_terms(c_BLDGN, b_BLDGN, dt_BLDH)
    y_BLHP = one_way(0, lambda x: x.contiguous()) + one_way(1, lambda x: x.flip(1))
    return y_BLHP + (diagonal_BLH[..., None] * v_BLHP).to(dtype)
