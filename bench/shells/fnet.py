"""FNet's block: a Fourier transform over the channels, then the mixer, and no projection.

    a + i b = DFT over channels of x;  sum of the two halves of scale * M (a, b)

The first half of the heads has the real part a, the second the imaginary part b. With the fourier mixer (cosines on the
first half of the heads, sines on the second) this is the real part of the 2-D DFT of x, as FNet has it: not scaled.
Deliberate: padding takes no part (there its embeddings do). Source: Lee-Thorp et al. 2021.
Axes: B batch, L length, D width, C = 2 D inner channels (heads H * head width P).
"""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from bench.config import Shell as Settings
from bench.mixers.base import Mixer
from bench.shells.base import Shell


class FNet(Shell):
    reads: ClassVar = ()
    expands: ClassVar = (2.0,)

    def __init__(self, width: int, settings: Settings, make_mixer: Callable[[], nn.Module], order: int | None):
        super().__init__(width, settings, make_mixer, order)
        self.add_features(self.mixer.wants)
        self.register_buffer("scale", torch.ones(()))

    def parts(self) -> list[tuple[Mixer, Tensor]]:
        return [(self.mixer, self.scale)]

    def forward(self, x_BLD: Tensor, segments_BL: Tensor) -> Tensor:
        with torch.autocast(x_BLD.device.type, enabled=False):
            wide = torch.promote_types(x_BLD.dtype, torch.float32)
            z_BLD = torch.fft.fft(x_BLD.to(wide), dim=-1)
            v_BLC = torch.cat((z_BLD.real, z_BLD.imag), dim=-1)
        v_BLHP = v_BLC.unflatten(-1, (self.mixer.grant.heads, -1))
        y_BLHP = self.mixer(v_BLHP, self.features(x_BLD, segments_BL), segments_BL) * self.scale
        a_BLD, b_BLD = y_BLHP.flatten(-2).chunk(2, dim=-1)
        return a_BLD + b_BLD
