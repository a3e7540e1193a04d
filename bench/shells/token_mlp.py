"""MLP-Mixer's token-mixing MLP: two mixers with a GELU between them, and no projection.

    y = scale2 * M2 gelu(scale * M x)

With the dense mixer of one head, W2 gelu(W1 x) over tokens with one pair of matrices for all channels, as MLP-Mixer has
it (Tolstikhin et al. 2021). Deliberate: as many hidden tokens as tokens, since the hidden ones must keep documents and
padding apart too (MLP-Mixer-B has 384 for 196), and no biases over tokens.
Axes: B batch, L length, D width, C inner channels (heads H * head width P; as many as D).
"""

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.config import Shell as Settings
from bench.mixers.base import Mixer
from bench.shells.base import Several, Shell


class TokenMLP(Shell):
    """Both mixers get the same features."""

    reads: ClassVar = ()
    expands: ClassVar = (1.0,)

    def __init__(self, width: int, settings: Settings, make_mixer: Callable[[], nn.Module], order: int | None):
        super().__init__(width, settings, lambda: Several([make_mixer(), make_mixer()]), order)
        self.add_features(self.mixer.wants)
        self.register_buffer("scale", torch.ones(2))

    def parts(self) -> list[tuple[Mixer, Tensor]]:
        return list(zip(self.mixer, self.scale, strict=True))

    def forward(self, x_BLD: Tensor, segments_BL: Tensor) -> Tensor:
        up, down = self.mixer
        v_BLHP, features = x_BLD.unflatten(-1, (up.grant.heads, -1)), self.features(x_BLD, segments_BL)
        hidden_BLHP = F.gelu(up(v_BLHP, features, segments_BL) * self.scale[0])
        return (down(hidden_BLHP, features, segments_BL) * self.scale[1]).flatten(-2)
