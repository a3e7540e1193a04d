"""The common shell: projections, short convolution, gate, skip. It knows no mixer's name.

    z, v = in_zv(x);  v = silu(conv(v));  y = scale * M v + v;  out(rms_norm(y) * silu(z))

Source: the released block of the reference paper (no biases in the projections, normalisation before the gate).
Axes: B batch, L length, D width, C inner channels (heads H * head width P), K feature channels, W taps.
"""

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.config import Shell as Settings
from bench.mixers.base import Features, Mixer
from bench.shells.base import Shell, Taps, short_conv


class Gated(Shell):
    """What `make_mixer` makes is a mixer, or (directions.py) two, which lay their outputs side by side.

    Fused (`fuse`), it makes one operator of the convolution and its activation, one of scale, skip, norm and gate.
    """

    reads: ClassVar = ("directions", "conv_width", "conv_causal", "skip")
    bias: ClassVar = False

    def __init__(self, width: int, settings: Settings, make_mixer: Callable[[], nn.Module], order: int | None):
        super().__init__(width, settings, make_mixer, order)
        self.outputs = 1 if isinstance(self.mixer, Mixer) else 2
        self.packed, self.wants = self.mixer.grant.packed, self.mixer.wants
        self.in_zv = nn.Linear(width, 2 * self.inner, bias=False)
        self.conv_v = Taps(self.inner, settings.conv_width) if settings.conv_width else None
        self.add_features(self.wants)
        self.norm = nn.RMSNorm(self.outputs * self.inner, eps=settings.norm_eps)
        self.out = nn.Linear(self.outputs * self.inner, width, bias=False)
        scale = torch.ones(()) if self.outputs == 1 else torch.ones(self.outputs * self.mixer.grant.heads, 1)
        self.register_buffer("scale", scale)  # calibrated once at build, kept in checkpoints

    def fuse(self) -> None:
        """Compute with the fused operators from now on: no parameter changes."""
        from bench.kernels import conv, exact_product, gated_norm  # noqa: F401 they register as torch.ops.mixerbench

        if self.settings.conv_width <= conv.REACH:
            self.backend = "triton"

    def parts(self) -> list[tuple[Mixer, Tensor]]:
        """Each mixer inside, in the order of their calls, and its part of `scale`."""
        if self.outputs == 1:
            return [(self.mixer, self.scale)]
        return list(zip((self.mixer.forth, self.mixer.back), self.scale.chunk(2), strict=True))

    def mixer_inputs(
        self, x_BLD: Tensor, segments_BL: Tensor, narrow_BLD: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Features]:
        """The gate z_BLC, and v_BLHP and the features as the mixer gets them. The linear maps read autocast's copy of
        x, if there is one, which then gets all gradients."""
        grant, wants = self.mixer.grant, self.wants
        real_BL1 = (segments_BL > 0).to(x_BLD.dtype)[..., None]
        z_BLC, v_BLC, *more = self.maps(x_BLD, narrow_BLD)
        conv_BLK, raw_BLK = v_BLC[..., :0], v_BLC[..., :0]
        if wants.conv + wants.raw:
            conv_BLK, raw_BLK = more[0].split((wants.conv, wants.raw), dim=-1)
            raw_BLK = raw_BLK * real_BL1
        if self.backend == "triton" and self.conv_v is not None:
            v_BLC = self.fused(v_BLC, segments_BL, self.conv_v, True)
            conv_BLK = self.fused(conv_BLK, segments_BL, self.conv_features, False) if wants.conv else v_BLC[..., :0]
        elif self.backend == "triton":  # under autocast v is bf16 and x is not: what is fp32 here is fp32 in the mixer
            real_BL1 = real_BL1.to(v_BLC.dtype)
            v_BLC, conv_BLK = F.silu(v_BLC * real_BL1), conv_BLK * real_BL1
        else:
            v_BLC, conv_BLK = v_BLC * real_BL1, conv_BLK * real_BL1
            if self.conv_v is not None:
                v_BLC, conv_BLK = self.convolve_both(v_BLC, conv_BLK, segments_BL)
            v_BLC = F.silu(v_BLC)
        v_BLHP = v_BLC.unflatten(-1, (grant.heads, grant.head_width))
        exact_BLK = self.exact(x_BLD, segments_BL, narrow_BLD) if wants.exact else v_BLC[..., :0]
        return z_BLC, v_BLHP, self.ordered(Features(conv_BLK, raw_BLK, exact_BLK), segments_BL)

    def maps(self, x_BLD: Tensor, narrow_BLD: Tensor | None) -> list[Tensor]:
        """Gate, v and, if there are any, features, as the linear maps give them."""
        features = [self.in_features] if self.wants.conv + self.wants.raw else []
        if self.backend != "triton":
            return [*self.in_zv(x_BLD).chunk(2, dim=-1), *(linear(x_BLD) for linear in features)]
        # Gate and v are two products: for one, both gradients would be copied into one tensor.
        weights = [*self.in_zv.weight.chunk(2), *(linear.weight for linear in features)]
        if narrow_BLD is None:
            return [F.linear(x_BLD, weight) for weight in weights]
        from bench.kernels.maps import Maps

        gate_CD, v_CD, *more = (weight.to(narrow_BLD.dtype) for weight in weights)
        return Maps.apply(narrow_BLD, gate_CD, v_CD, more[0] if more else None)

    def convolve_both(self, v_BLC: Tensor, conv_BLK: Tensor, segments_BL: Tensor) -> tuple[Tensor, Tensor]:
        """v and the convolved features in one pass: the taps are separate parameters, the work is one convolution."""
        weight, bias, both = self.conv_v.weight_CW, self.conv_v.bias_C, v_BLC
        if self.wants.conv:
            weight = torch.cat((weight, self.conv_features.weight_CW))
            bias = torch.cat((bias, self.conv_features.bias_C))
            both = torch.cat((v_BLC, conv_BLK), dim=-1)
        both = short_conv(both, segments_BL, weight, bias, self.settings.conv_causal, self.packed)
        return both.split((v_BLC.shape[-1], self.wants.conv), dim=-1)

    def convolve(self, x_BLC: Tensor, segments_BL: Tensor, taps: Taps) -> Tensor:
        if self.backend == "triton":
            return self.fused(x_BLC, segments_BL, taps, False)
        return super().convolve(x_BLC, segments_BL, taps)

    def fused(self, x_BLC: Tensor, segments_BL: Tensor, taps: Taps, silu: bool) -> Tensor:
        """`short_conv` of channels that may be anything on padding, then SiLU if asked for, as one operator."""
        width = taps.weight_CW.shape[1]
        left = width - 1 if self.settings.conv_causal else width // 2
        packed, weights = self.packed, (taps.weight_CW, taps.bias_C)
        return torch.ops.mixerbench.short_conv(x_BLC, segments_BL, *weights, left, packed, silu)

    def moved(self) -> int:
        """In-projection, convolution with SiLU, mixer, gated norm with skip, out-projection."""
        inner, outputs, wants = self.inner, self.outputs, self.wants
        granted, convolved = sum(vars(wants).values()), inner
        if self.conv_v is not None:
            convolved += wants.conv + wants.exact
        into, mixer = self.width + 2 * inner + granted, inner + granted + outputs * inner
        return into + 2 * convolved + mixer + 4 * outputs * inner + outputs * inner + self.width

    def mixed(self, z_BLC: Tensor, v_BLHP: Tensor, features: Features, segments_BL: Tensor) -> Tensor:
        """The mixer, and as one operator what follows, which adds v if the mixer has not: scale (M v + v / scale)."""
        y_BLHP, skip = None, self.settings.skip
        if skip:
            y_BLHP = self.mixer.with_skip(v_BLHP, features, segments_BL, self.scale)
        if y_BLHP is None:
            y_BLHP = self.mixer(v_BLHP, features, segments_BL)
        else:
            v_BLHP, skip = y_BLHP, False
        sides = (y_BLHP.flatten(-2), v_BLHP.flatten(-2), z_BLC, self.scale)
        return torch.ops.mixerbench.gated_norm(*sides, self.norm.weight, self.settings.norm_eps, skip)

    def forward(self, x_BLD: Tensor, segments_BL: Tensor, narrow_BLD: Tensor | None = None) -> Tensor:
        inputs = self.mixer_inputs(x_BLD, segments_BL, narrow_BLD)
        if self.backend == "triton" and self.outputs == 1:
            return self.out(self.mixed(*inputs, segments_BL))
        z_BLC, v_BLHP, features = inputs
        y_BLHP = self.mixer(v_BLHP, features, segments_BL) * self.scale
        if self.outputs > 1:
            v_BLHP, z_BLC = v_BLHP.repeat(1, 1, self.outputs, 1), z_BLC.repeat(1, 1, self.outputs)
        if self.settings.skip:
            y_BLHP = y_BLHP + v_BLHP
        # Under autocast y is bf16; the norm is taken in the precision of its weight, as layer norms are.
        y_BLC = self.norm(y_BLHP.flatten(-2).to(self.norm.weight.dtype))
        return self.out(y_BLC * F.silu(z_BLC))
