"""The seam of shells: what a layer does with a mixer before and after it. No mixer's name occurs here.

A shell belongs to the protocol. Parameters that exist only because a mixer asked for features have names of their own
(`in_features`, `conv_features`; `in_exact`, `conv_exact` for those computed outside autocast), so that all others are
the same tensors for every mixer. With an `order` (the level `sam: misaligned`) the mixer gets each token's features at
another token's place. On padding a mixer sees nothing, but a convolution would.
Axes: B batch, L length, D width, C inner channels (heads H * head width P), K feature channels, W taps.
"""

import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import Refusal
from bench.config import Shell as Settings
from bench.config import inner_width, listed
from bench.mixers.base import Features, Grant, Mixer, Wants, misalign

OWNED = ("mixer", "in_features", "conv_features", "in_exact", "conv_exact")
OFF = {"directions": "one", "conv_width": 0, "conv_causal": False, "skip": False}
SEAM = ("__init__", "base", "directions")  # files of this room that are no shell


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


class ExactProduct(torch.autograd.Function):
    """x_BLD W_KD^T in the precision of W, with `fused` by the kernel. `narrow_BLD` is x as autocast has it, and gets
    the gradient. Gradients are products in its dtype, as those of all other linear maps are: it is the phases made of
    the values that a rounding would spoil."""

    @staticmethod
    def forward(ctx, x_BLD: Tensor, narrow_BLD: Tensor, weight_KD: Tensor, fused: bool) -> Tensor:
        ctx.save_for_backward(narrow_BLD, weight_KD.to(narrow_BLD.dtype))
        ctx.dtype, wide_BLD = weight_KD.dtype, x_BLD.to(weight_KD.dtype)
        if not fused:
            return F.linear(wide_BLD, weight_KD)
        return torch.ops.mixerbench.exact_product(wide_BLD.flatten(0, -2), weight_KD).unflatten(0, x_BLD.shape[:-1])

    @staticmethod
    def backward(ctx, g_BLK: Tensor) -> tuple[None, Tensor, Tensor, None]:
        narrow_BLD, weight_KD = ctx.saved_tensors
        g_BLK = g_BLK.to(narrow_BLD.dtype)
        gw_KD = g_BLK.flatten(0, -2).t() @ narrow_BLD.flatten(0, -2)
        return None, g_BLK @ weight_KD, gw_KD.to(ctx.dtype), None


class Several(nn.ModuleList):
    """Mixers that stand where a shell has its one, all with the same grant, features and wishes."""

    @property
    def grant(self) -> Grant:
        return self[0].grant

    @property
    def wants(self) -> Wants:
        return self[0].wants


class Shell(nn.Module, ABC):
    """One mixer layer without its residual: BLD -> BLD. Abstract; concrete shells have one file each.

    What a mixer gives is multiplied by its scale, which a protocol can calibrate (`gain`).
    """

    reads: ClassVar[tuple[str, ...]]  # of the keys in OFF, those that it has
    expands: ClassVar[tuple[float, ...]] = ()  # values of `expand` that it can have; (): any
    residual: ClassVar[bool] = True  # whether the layer adds the stream and has a norm here
    bias: ClassVar[bool] = True  # of its linear maps

    def __init__(self, width: int, settings: Settings, make_mixer: Callable[[], nn.Module], order: int | None):
        super().__init__()
        self.settings, self.backend = settings, "torch"
        self.register_buffer("order", None if order is None else torch.tensor(order), persistent=False)
        self.width, self.inner = width, inner_width(width, settings.expand)
        self.mixer = make_mixer()  # a mixer, or what has a mixer's grant and wants

    def fuse(self) -> None:
        """Compute with fused operators from now on, if there are any: no parameter changes."""
        return

    @abstractmethod
    def parts(self) -> list[tuple[Mixer, Tensor]]:
        """Each mixer inside, in the order of their calls, and the fixed scale of its output."""

    @abstractmethod
    def forward(self, x_BLD: Tensor, segments_BL: Tensor) -> Tensor: ...

    def add_features(self, wants: Wants) -> None:
        """Linear maps and taps of the channels that a mixer asks for."""
        width, taps = self.width, self.settings.conv_width
        if wants.conv + wants.raw:
            self.in_features = nn.Linear(width, wants.conv + wants.raw, bias=self.bias)
        if wants.conv and taps:
            self.conv_features = Taps(wants.conv, taps)
        if wants.exact:
            self.in_exact = nn.Linear(width, wants.exact, bias=self.bias)
        if wants.exact and taps:
            self.conv_exact = Taps(wants.exact, taps)

    def features(self, x_BLD: Tensor, segments_BL: Tensor) -> Features:
        """The channels as the mixer gets them."""
        wants = self.mixer.wants
        conv_BLK, raw_BLK, exact_BLK = x_BLD[..., :0], x_BLD[..., :0], x_BLD[..., :0]
        if wants.conv + wants.raw:
            conv_BLK, raw_BLK = self.in_features(x_BLD).split((wants.conv, wants.raw), dim=-1)
        if wants.conv and self.settings.conv_width:
            conv_BLK = self.convolve(conv_BLK, segments_BL, self.conv_features)
        if wants.exact:
            exact_BLK = self.exact(x_BLD, segments_BL)
        return self.ordered(Features(conv_BLK, raw_BLK, exact_BLK), segments_BL)

    def exact(self, x_BLD: Tensor, segments_BL: Tensor, narrow_BLD: Tensor | None = None) -> Tensor:
        """The channels that autocast must not touch, in the precision of the parameters. `narrow_BLD`: autocast's copy
        of x, if there is one, which then gets the gradient."""
        device, weight_KD = x_BLD.device.type, self.in_exact.weight
        narrow = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_KD.dtype
        fused = self.backend == "triton" and weight_KD.dtype == torch.float32 and narrow == torch.bfloat16
        if narrow_BLD is None:
            narrow_BLD = x_BLD.to(narrow)
        with torch.autocast(device, enabled=False):
            exact_BLK = ExactProduct.apply(x_BLD.detach(), narrow_BLD, weight_KD, fused)
            exact_BLK = exact_BLK if self.in_exact.bias is None else exact_BLK + self.in_exact.bias
            if self.settings.conv_width:
                return self.convolve(exact_BLK, segments_BL, self.conv_exact)
            return exact_BLK * (segments_BL > 0).to(exact_BLK.dtype)[..., None]

    def convolve(self, x_BLC: Tensor, segments_BL: Tensor, taps: Taps) -> Tensor:
        """Padding may hold anything: biases, what a layer before made of them."""
        packed, x_BLC = self.mixer.grant.packed, x_BLC * (segments_BL > 0).to(x_BLC.dtype)[..., None]
        return short_conv(x_BLC, segments_BL, taps.weight_CW, taps.bias_C, self.settings.conv_causal, packed)

    def moved(self) -> int:
        """Numbers a token that its stages read and write, each once: maps in, convolutions, mixers, map out."""
        maps = [m for name, m in self.named_children() if isinstance(m, nn.Linear) and name.startswith("in_")]
        taps = sum(len(m.weight_CW) for m in self.children() if isinstance(m, Taps))
        mixers = len(self.parts()) * (2 * self.inner + sum(vars(self.mixer.wants).values()))
        out = self.inner + self.width if hasattr(self, "out") else 0
        return self.width * bool(maps) + sum(m.out_features for m in maps) + 2 * taps + mixers + out

    def ordered(self, features: Features, segments_BL: Tensor) -> Features:
        return features if self.order is None else misalign(features, segments_BL, self.order)


def names() -> list[str]:
    return sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem not in SEAM)


def find(settings: Settings) -> type[Shell]:
    """The class of the named shell. Raises Refusal for an unknown name and for keys that it does not have."""
    if settings.name not in names():
        raise Refusal(f"protocol.shell.name must be one of {listed(names())}, got '{settings.name}'")
    module = importlib.import_module(f"bench.shells.{settings.name}")
    (cls,) = (c for c in vars(module).values() if _is_own(c, module.__name__))
    wrong = [f"{k}={off!r}" for k, off in OFF.items() if k not in cls.reads and getattr(settings, k) != off]
    if wrong:
        raise Refusal(f"shell '{settings.name}' has other keys only; set protocol.shell: {listed(wrong)}")
    if cls.expands and settings.expand not in cls.expands:
        raise Refusal(f"shell '{settings.name}' has protocol.shell.expand {listed(cls.expands)}, got {settings.expand}")
    return cls


def _is_own(value, module: str) -> bool:
    return isinstance(value, type) and issubclass(value, Shell) and value.__module__ == module
