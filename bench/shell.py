"""The shell around every mixer: projections, short convolution, gate, skip. It knows no mixer's name.

    z, v = in_zv(x);  v = silu(conv(v));  y = scale * M v + v;  out(rms_norm(y) * silu(z))

It belongs to the protocol. Parameters that exist only because a mixer asked for features have names of their own
(`in_features`, `conv_features`; `in_exact`, `conv_exact` for those computed outside autocast), so that all others are
the same tensors for every mixer. With an `order` (the level `sam: misaligned`) the mixer gets each token's features at
another token's place. Source: the released block of the reference paper (no biases in the projections,
normalisation before the gate).
Axes: B batch, L length, D width, C inner channels (heads H * head width P), K feature channels, W taps.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.config import Shell as Settings
from bench.config import inner_width
from bench.kernels import require_triton
from bench.mixers.base import Features, Mixer, misalign

OWNED = ("mixer", "in_features", "conv_features", "in_exact", "conv_exact")


def owned_by_mixer(parameter: str) -> bool:
    """Whether a parameter's name says that it exists for the mixer only."""
    return any(part in OWNED for part in parameter.split("."))


class Taps(nn.Module):
    """Weights of a depthwise convolution, one filter a channel."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.weight_CW = nn.Parameter(torch.empty(channels, width))
        self.bias_C = nn.Parameter(torch.empty(channels))

    def initial(self, name: str, generator: torch.Generator) -> Tensor:
        """Uniform within 1/sqrt(W), as torch initialises a depthwise convolution."""
        bound = 1 / math.sqrt(self.weight_CW.shape[1])
        return torch.empty(getattr(self, name).shape).uniform_(-bound, bound, generator=generator)


def short_conv(
    x_BLC: Tensor, segments_BL: Tensor, weight_CW: Tensor, bias_C: Tensor, causal: bool, packed: bool
) -> Tensor:
    """Depthwise convolution that sees zeros outside a token's own segment; x must be zero on padding already.

    Centred (tap W//2 is the token itself) or causal (the last tap is). Written as W shifted multiply-adds, which
    torch.compile fuses into one pass; on a CPU torch's own convolution is faster where no segment can follow another.
    """
    width = weight_CW.shape[1]
    left = width - 1 if causal else width // 2
    if not packed and x_BLC.device.type == "cpu":
        x_BCL = F.pad(x_BLC.transpose(1, 2), (left, width - 1 - left))
        return F.conv1d(x_BCL, weight_CW[:, None], bias_C, groups=len(weight_CW)).transpose(1, 2)
    length = x_BLC.shape[1]
    padded_BLC = F.pad(x_BLC, (0, 0, left, width - 1 - left))
    padded_BL = F.pad(segments_BL, (left, width - 1 - left))
    y_BLC = bias_C.to(x_BLC.dtype).expand_as(x_BLC)
    for tap in range(width):
        shifted_BLC = padded_BLC[:, tap : tap + length]
        if packed and tap != left:
            shifted_BLC = shifted_BLC * (padded_BL[:, tap : tap + length] == segments_BL)[..., None]
        y_BLC = y_BLC + shifted_BLC * weight_CW[:, tap].to(x_BLC.dtype)
    return y_BLC


class Shell(nn.Module):
    """One mixer layer without its residual: BLD -> BLD. Rows of padding hold nothing that a real token can see.

    What `make_mixer` makes is a mixer, or (directions.py) as many as `outputs` says, which lay theirs side by side.
    Fused (`fuse`), it makes one operator of the convolution and its activation, one of scale, skip, norm and gate.
    """

    def __init__(
        self,
        width: int,
        settings: Settings,
        make_mixer: Callable[[], nn.Module],
        order: int | None,
        outputs: int,
    ):
        super().__init__()
        self.settings, self.order, self.outputs, self.backend = settings, order, outputs, "torch"
        self.mixer = make_mixer()
        self.packed = self.mixer.grant.packed
        inner, wants = inner_width(width, settings.expand), self.mixer.wants
        self.in_zv = nn.Linear(width, 2 * inner, bias=False)
        self.conv_v = Taps(inner, settings.conv_width) if settings.conv_width else None
        self.wants = wants
        if wants.conv + wants.raw:
            self.in_features = nn.Linear(width, wants.conv + wants.raw, bias=False)
        if wants.conv and settings.conv_width:
            self.conv_features = Taps(wants.conv, settings.conv_width)
        if wants.exact:
            self.in_exact = nn.Linear(width, wants.exact, bias=False)
        if wants.exact and settings.conv_width:
            self.conv_exact = Taps(wants.exact, settings.conv_width)
        self.norm = nn.RMSNorm(outputs * inner, eps=settings.norm_eps)
        self.out = nn.Linear(outputs * inner, width, bias=False)
        scale = torch.ones(()) if outputs == 1 else torch.ones(outputs * self.mixer.grant.heads, 1)
        self.register_buffer("scale", scale)  # calibrated once at build, kept in checkpoints

    def fuse(self) -> None:
        """Compute with the fused operators from now on: no parameter changes."""
        require_triton()
        from bench.kernels import conv, gated_norm  # noqa: F401 they register as torch.ops.mixerbench

        if self.settings.conv_width <= conv.REACH:
            self.backend = "triton"

    def parts(self) -> list[tuple[Mixer, Tensor]]:
        """Each mixer inside, in the order of their calls, and its part of `scale`."""
        if self.outputs == 1:
            return [(self.mixer, self.scale)]
        return list(zip((self.mixer.forth, self.mixer.back), self.scale.chunk(2), strict=True))

    def mixer_inputs(self, x_BLD: Tensor, segments_BL: Tensor) -> tuple[Tensor, Tensor, Features]:
        """The gate z_BLC, and v_BLHP and the features as the mixer gets them."""
        grant, wants = self.mixer.grant, self.wants
        real_BL1 = (segments_BL > 0).to(x_BLD.dtype)[..., None]
        if self.backend == "triton":  # two products: for one, both gradients would be copied into one tensor
            z_BLC, v_BLC = (F.linear(x_BLD, weight_CD) for weight_CD in self.in_zv.weight.chunk(2))
        else:
            z_BLC, v_BLC = self.in_zv(x_BLD).chunk(2, dim=-1)
        conv_BLK, raw_BLK = v_BLC[..., :0], v_BLC[..., :0]
        if wants.conv + wants.raw:
            conv_BLK, raw_BLK = self.in_features(x_BLD).split((wants.conv, wants.raw), dim=-1)
            raw_BLK = raw_BLK * real_BL1
        if self.backend == "triton" and self.conv_v is not None:
            v_BLC = self.fused(v_BLC, segments_BL, self.conv_v, True)
            conv_BLK = self.fused(conv_BLK, segments_BL, self.conv_features, False) if wants.conv else v_BLC[..., :0]
        else:
            v_BLC, conv_BLK = v_BLC * real_BL1, conv_BLK * real_BL1
            if self.conv_v is not None:
                v_BLC, conv_BLK = self.convolve(v_BLC, conv_BLK, segments_BL)
            v_BLC = F.silu(v_BLC)
        v_BLHP = v_BLC.unflatten(-1, (grant.heads, grant.head_width))
        exact_BLK = self.exact(x_BLD, segments_BL) if wants.exact else v_BLC[..., :0]
        features = Features(conv_BLK, raw_BLK, exact_BLK)
        return z_BLC, v_BLHP, features if self.order is None else misalign(features, segments_BL, self.order)

    def exact(self, x_BLD: Tensor, segments_BL: Tensor) -> Tensor:
        """The channels that autocast must not touch, in the precision of the parameters."""
        with torch.autocast(x_BLD.device.type, enabled=False):
            exact_BLK = self.in_exact(x_BLD.to(self.in_exact.weight.dtype))
            exact_BLK = exact_BLK * (segments_BL > 0).to(exact_BLK.dtype)[..., None]
            if self.conv_v is None:
                return exact_BLK
            weight, bias = self.conv_exact.weight_CW, self.conv_exact.bias_C
            return short_conv(exact_BLK, segments_BL, weight, bias, self.settings.conv_causal, self.packed)

    def convolve(self, v_BLC: Tensor, conv_BLK: Tensor, segments_BL: Tensor) -> tuple[Tensor, Tensor]:
        """v and the convolved features in one pass: the taps are separate parameters, the work is one convolution."""
        weight, bias, both = self.conv_v.weight_CW, self.conv_v.bias_C, v_BLC
        if self.wants.conv:
            weight = torch.cat((weight, self.conv_features.weight_CW))
            bias = torch.cat((bias, self.conv_features.bias_C))
            both = torch.cat((v_BLC, conv_BLK), dim=-1)
        both = short_conv(both, segments_BL, weight, bias, self.settings.conv_causal, self.packed)
        return both.split((v_BLC.shape[-1], self.wants.conv), dim=-1)

    def fused(self, x_BLC: Tensor, segments_BL: Tensor, taps: Taps, silu: bool) -> Tensor:
        """`short_conv` of channels that may be anything on padding, then SiLU if asked for, as one operator."""
        width = taps.weight_CW.shape[1]
        left = width - 1 if self.settings.conv_causal else width // 2
        packed, weights = self.packed, (taps.weight_CW, taps.bias_C)
        return torch.ops.mixerbench.short_conv(x_BLC, segments_BL, *weights, left, packed, silu)

    def forward(self, x_BLD: Tensor, segments_BL: Tensor) -> Tensor:
        z_BLC, v_BLHP, features = self.mixer_inputs(x_BLD, segments_BL)
        y_BLHP = self.mixer(v_BLHP, features, segments_BL)
        if self.backend == "triton" and self.outputs == 1:
            sides = (y_BLHP.flatten(-2), v_BLHP.flatten(-2), z_BLC, self.scale)
            return self.out(
                torch.ops.mixerbench.gated_norm(*sides, self.norm.weight, self.settings.norm_eps, self.settings.skip)
            )
        y_BLHP = y_BLHP * self.scale
        if self.outputs > 1:
            v_BLHP, z_BLC = v_BLHP.repeat(1, 1, self.outputs, 1), z_BLC.repeat(1, 1, self.outputs)
        if self.settings.skip:
            y_BLHP = y_BLHP + v_BLHP
        # Under autocast y is bf16; the norm is taken in the precision of its weight, as layer norms are.
        y_BLC = self.norm(y_BLHP.flatten(-2).to(self.norm.weight.dtype))
        return self.out(y_BLC * F.silu(z_BLC))
