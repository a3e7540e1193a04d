"""The block of Monarch Mixer BERT: gated convolution beside a second mixer of the stream itself, no residual.

    v, features = conv(in_v(x)), conv(in_features(x));  out(scale * M v + scale2 * M2 x)

M2 gets features that are 1 everywhere, so it is data-independent: for the hyena mixer a plain long convolution, the
source's "residual long conv", which stands where other blocks have a residual; the layer has no norm here either. The
source's Monarch matrices are the FFTs of these convolutions; those of its MLP are `backbone.mlp_blocks`. Source:
M2-BERT (HazyResearch/m2, Fu et al. 2023). The short convolution is causal there, though the long ones look both ways.
Axes: B batch, L length, D width, C inner channels (heads H * head width P; as many as D).
"""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from bench.config import Shell as Settings
from bench.mixers.base import Features, Mixer
from bench.shells.base import Several, Shell, Taps


class M2(Shell):
    reads: ClassVar = ("conv_width", "conv_causal")
    expands: ClassVar = (1.0,)
    residual: ClassVar = False

    def __init__(self, width: int, settings: Settings, make_mixer: Callable[[], nn.Module], order: int | None):
        super().__init__(width, settings, lambda: Several([make_mixer(), make_mixer()]), order)
        self.in_v = nn.Linear(width, self.inner)
        self.conv_v = Taps(self.inner, settings.conv_width) if settings.conv_width else None
        self.add_features(self.mixer.wants)
        self.out = nn.Linear(self.inner, width)
        self.register_buffer("scale", torch.ones(2))

    def parts(self) -> list[tuple[Mixer, Tensor]]:
        return list(zip(self.mixer, self.scale, strict=True))

    def forward(self, x_BLD: Tensor, segments_BL: Tensor) -> Tensor:
        heads, (gated, plain) = self.mixer.grant.heads, self.mixer
        v_BLC = self.in_v(x_BLD)
        if self.conv_v is not None:
            v_BLC = self.convolve(v_BLC, segments_BL, self.conv_v)
        features = self.features(x_BLD, segments_BL)
        ones = Features(*(torch.ones_like(kind) for kind in features))
        y_BLHP = gated(v_BLC.unflatten(-1, (heads, -1)), features, segments_BL) * self.scale[0]
        y_BLHP = y_BLHP + plain(x_BLD.to(v_BLC.dtype).unflatten(-1, (heads, -1)), ones, segments_BL) * self.scale[1]
        return self.out(y_BLHP.flatten(-2))
