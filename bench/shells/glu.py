"""S4's block: the mixer on the stream itself, GELU, then a gated linear map.

    v = x, `expand` times side by side;  a, b = out(gelu(scale * M v + d * v));  a * sigmoid(b)

`expand` is the number of outputs that each channel of x has (its "channels"); d is a learned weight of each inner
channel, standard normal at the start (the source's D). Source: S4ND's vision transformer (state-spaces/s4,
vit_b_16_s4_imagenet_v2.yaml: channels 2, GELU, GLU).
Axes: B batch, L length, D width, C inner channels (heads H * head width P).
"""

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.config import Shell as Settings
from bench.mixers.base import Mixer
from bench.shells.base import Shell


class Skip(nn.Module):
    """A weight for each channel."""

    def __init__(self, channels: int):
        super().__init__()
        self.d_C = nn.Parameter(torch.empty(channels))

    def initial(self, name: str, generator: torch.Generator) -> Tensor:
        return torch.randn(self.d_C.shape, generator=generator, device="cpu")


class GLU(Shell):
    reads: ClassVar = ()
    expands: ClassVar = (1.0, 2.0, 3.0, 4.0)

    def __init__(self, width: int, settings: Settings, make_mixer: Callable[[], nn.Module], order: int | None):
        super().__init__(width, settings, make_mixer, order)
        self.add_features(self.mixer.wants)
        self.skip = Skip(self.inner)
        self.out = nn.Linear(self.inner, 2 * width)
        self.register_buffer("scale", torch.ones(()))

    def parts(self) -> list[tuple[Mixer, Tensor]]:
        return [(self.mixer, self.scale)]

    def forward(self, x_BLD: Tensor, segments_BL: Tensor) -> Tensor:
        v_BLC = x_BLD.repeat(1, 1, self.inner // self.width)
        v_BLHP = v_BLC.unflatten(-1, (self.mixer.grant.heads, -1))
        y_BLHP = self.mixer(v_BLHP, self.features(x_BLD, segments_BL), segments_BL) * self.scale
        y_BLC = y_BLHP.flatten(-2) + self.skip.d_C.to(v_BLC.dtype) * v_BLC
        return F.glu(self.out(F.gelu(y_BLC)), dim=-1)
