"""A slow wave at integer places from its values on a coarse grid, by a sinc under a Kaiser window.

A wave of at most `bound` cycles a token is known from every `spacing`-th place, which is more than two places a cycle:
e^(2 pi i f j) is the sum over m of `weight(j / spacing - m)` e^(2 pi i f m spacing), of `taps` terms.
Axes: J places, K points; O distances between them, X, M offsets, F frequencies.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

TOLERANCE = 1e-4
"""Of a wave of amplitude one: far below the rounding of bf16, 4e-3."""
SAMPLING = 2.5  # samples a cycle at the bound: 2 would need all places, and more need more samples

PIECE = 16


@dataclass(frozen=True)
class Grid:
    spacing: int
    taps: int
    shape: float  # of the Kaiser window, and its height before it is scaled to one
    height: float

    @property
    def reach(self) -> int:
        """The distance of a place and a point from which on they do not see each other."""
        return -(-self.spacing * self.taps // 2)

    def size(self, length: int) -> int:
        """Grid points m = 0, 1, ... that places 1 to `length` see, filled up so that memory is read in whole pieces."""
        seen = -(-(2 * length + self.spacing * self.taps) // (2 * self.spacing))
        return -(-seen // PIECE) * PIECE

    def weights(self, device: torch.device) -> Tensor:
        """What a place sees of a point at the distance of 0, 1, ... places; beyond these O it is nothing."""
        return self.weight(torch.arange(self.reach, device=device) / self.spacing)

    def matrix(self, length: int, device: torch.device) -> Tensor:
        """w_JK: what places 1 to `length` see of the points; an even wave is also seen beyond place 0."""
        points_K = self.spacing * torch.arange(self.size(length), device=device)
        place_J1 = torch.arange(1, length + 1, device=device)[:, None]
        near_JK = self.weight((place_J1 - points_K) / self.spacing)
        return near_JK + self.weight((place_J1 + points_K) / self.spacing) * (points_K > 0)

    def weight(self, x: Tensor) -> Tensor:
        under = (1 - (2 * x / self.taps).square()).clamp(min=0)
        window = torch.i0(self.shape * under.sqrt()) / self.height
        return torch.where(under > 0, torch.sinc(x) * window, 0.0)


@lru_cache
def grid(bound: float) -> Grid | None:
    """The coarsest grid, with the fewest taps that meet `TOLERANCE`; None if it would have half the places or more."""
    spacing = math.floor(1 / (SAMPLING * bound) + 1e-9)
    if spacing < 3:
        return None
    margin = 1 - 2 * bound * spacing
    taps = 2 * int(2 / margin)
    while True:
        shape = math.pi * taps / 2 * margin
        found = Grid(spacing, taps, shape, float(np.i0(shape)))
        if error(found, bound) <= TOLERANCE:
            return found
        taps += 2


def error(grid: Grid, bound: float) -> float:
    """The largest error of a wave within the bound, at any place; beyond half-way between points it repeats."""
    x_XM = torch.linspace(0, 0.5, 17, dtype=torch.float64)[:, None] - torch.arange(-grid.taps // 2, grid.taps // 2 + 1)
    phase_F = 2 * math.pi * torch.linspace(0, bound * grid.spacing, 65, dtype=torch.float64)
    # The wave at m relative to the wave at x: it should add up to one.
    relative_XMF = torch.polar(torch.ones(()).double(), -x_XM[..., None] * phase_F)
    return float(((grid.weight(x_XM)[..., None] * relative_XMF).sum(1) - 1).abs().max())
