"""Window mean: M_ij = 1 / (2 reach + 1) for |i - j| <= reach. Axes: B batch, L length, H heads, P head width."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from bench.mixers.base import Mixer, Wants, at_least_one, require_length, same_segment


@dataclass(frozen=True)
class Args:
    sam: bool
    heads: int
    reach: int

    def __post_init__(self):
        at_least_one("window", self, ("heads", "reach"))


class Window(Mixer):
    Args: ClassVar = Args
    levels: ClassVar = (False,)  # no sequence-aligned form

    def __init__(self, grant, args, backend):
        super().__init__(grant, backend)
        self.args = args

    @property
    def wants(self):
        return Wants(conv=0, raw=0, exact=0)  # feature channels from the shell: a SAM mixer asks for some

    def initial(self, name, generator):
        raise KeyError(name)  # no parameters of its own

    def forward(self, v_BLHP, features, segments_BL):
        return torch.einsum("bhij,bjhp->bihp", self.matrix(v_BLHP, features, segments_BL), v_BLHP)

    def matrix(self, v_BLHP, features, segments_BL):
        require_length(v_BLHP.shape[1], self.grant.length, "window")
        place_L = torch.arange(v_BLHP.shape[1], device=v_BLHP.device)
        near_LL = (place_L[:, None] - place_L).abs() <= self.args.reach
        matrix_B1LL = (near_LL & same_segment(segments_BL)).to(v_BLHP.dtype) / (2 * self.args.reach + 1)
        return matrix_B1LL.expand(-1, self.grant.heads, -1, -1)

    @property
    def state_size(self):
        return 2 * self.args.reach * self.grant.head_width

    def flops(self, length):
        return 2 * length**2 * self.grant.heads * self.grant.head_width  # forward multiplies by the whole matrix

    def structure(self):
        return ("constant diagonals", "symmetric")  # optional: promises for `mixerbench check` to test
