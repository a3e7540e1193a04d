"""The block of BERT and of vision transformers: projections with biases around the mixer, nothing else.

    v, features = in_v(x), in_features(x);  out(scale * M v)

With `conv_width`, v and the convolved features pass a short convolution first, as in Hyena's block (causal there); with
`skip`, v is added to M v. Sources: BERT's attention layer (q and k are features of the attention mixer), ViT's (timm),
Hyena's operator (safari), whose gates are features of the hyena mixer.
Axes: B batch, L length, D width, C inner channels (heads H * head width P).
"""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from bench.config import Shell as Settings
from bench.mixers.base import Mixer
from bench.shells.base import Shell, Taps


class Plain(Shell):
    reads: ClassVar = ("conv_width", "conv_causal", "skip")

    def __init__(self, width: int, settings: Settings, make_mixer: Callable[[], nn.Module], order: int | None):
        super().__init__(width, settings, make_mixer, order)
        self.in_v = nn.Linear(width, self.inner)
        self.conv_v = Taps(self.inner, settings.conv_width) if settings.conv_width else None
        self.add_features(self.mixer.wants)
        self.out = nn.Linear(self.inner, width)
        self.register_buffer("scale", torch.ones(()))

    def parts(self) -> list[tuple[Mixer, Tensor]]:
        return [(self.mixer, self.scale)]

    def forward(self, x_BLD: Tensor, segments_BL: Tensor) -> Tensor:
        v_BLC = self.in_v(x_BLD)
        if self.conv_v is not None:
            v_BLC = self.convolve(v_BLC, segments_BL, self.conv_v)
        v_BLHP = v_BLC.unflatten(-1, (self.mixer.grant.heads, -1))
        y_BLHP = self.mixer(v_BLHP, self.features(x_BLD, segments_BL), segments_BL) * self.scale
        if self.settings.skip:
            y_BLHP = y_BLHP + v_BLHP
        return self.out(y_BLHP.flatten(-2))
