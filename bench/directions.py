"""Two directions as a shell (`shell.directions`), for mixers that look one way only. It knows no mixer's name.

    concat     one shell; the mixer twice, with features of their own, the second on reversed documents, outputs side by
               side: norm and out-projection are of twice the inner width, gate and skip serve both halves
    add, mult  two complete shells, the second on reversed documents, outputs added or multiplied
concat's features are made in the order of the row and then reversed, as the released block of the reference paper does;
in add and mult the second convolution sees the reversed row. Source: the baselines of that paper's Table 3; there too,
concat reduces the hidden width (expand 1.5 has the projections of 2).
Axes: B batch, L length, D width, H heads, P head width.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bench.config import Shell as Settings
from bench.mixers.base import Features, Mixer, Wants, segment_starts
from bench.shells.base import Shell


def directed(
    shell: type[Shell], width: int, settings: Settings, make_mixer: Callable[[], Mixer], order: int | None
) -> "Shell | TwoShells":
    """The shell, or two of it, as `settings.directions` asks for."""
    match settings.directions:
        case "one":
            return shell(width, settings, make_mixer, order)
        case "concat":
            return shell(width, settings, lambda: TwoMixers(make_mixer), order)
    return TwoShells(shell, width, settings, make_mixer, order)


def mirror(segments_BL: Tensor) -> Tensor:
    """The place, BL, that each token has when every document of a row is reversed where it stands; padding stays."""
    length = segments_BL.shape[1]
    last_BL = length - 1 - segment_starts(segments_BL.flip(1)).flip(1)
    return segment_starts(segments_BL) + last_BL - torch.arange(length, device=segments_BL.device)


def turned(x_BL: Tensor, mirror_BL: Tensor) -> Tensor:
    """x, BL and any further axes, with every document reversed."""
    index_BL = mirror_BL.view(*mirror_BL.shape, *(1,) * (x_BL.ndim - 2))
    return x_BL.gather(1, index_BL.expand_as(x_BL))


class TwoMixers(nn.Module):
    """Stands where a shell has its mixer: each half of every kind of feature is one direction's."""

    def __init__(self, make_mixer: Callable[[], Mixer]):
        super().__init__()
        self.forth, self.back = make_mixer(), make_mixer()
        self.grant = self.forth.grant
        wants = self.forth.wants
        self.wants = Wants(conv=2 * wants.conv, raw=2 * wants.raw, exact=2 * wants.exact)

    def forward(self, v_BLHP: Tensor, features: Features, segments_BL: Tensor) -> Tensor:
        """Both outputs along the axis of heads: those of `forth`, then those of `back`."""
        mirror_BL = mirror(segments_BL)
        forth, back = zip(*(x.chunk(2, dim=-1) for x in features), strict=True)
        back = Features(*(turned(x, mirror_BL) for x in back))
        y_BLHP = self.forth(v_BLHP, Features(*forth), segments_BL)
        w_BLHP = self.back(turned(v_BLHP, mirror_BL), back, segments_BL)
        return torch.cat((y_BLHP, turned(w_BLHP, mirror_BL)), dim=2)


class TwoShells(nn.Module):
    """Two shells with nothing in common, about twice the parameters of one: BLD -> BLD."""

    def __init__(
        self,
        shell: type[Shell],
        width: int,
        settings: Settings,
        make_mixer: Callable[[], Mixer],
        order: int | None,
    ):
        super().__init__()
        self.forth, self.back = (shell(width, settings, make_mixer, order) for _ in range(2))
        self.multiply = settings.directions == "mult"

    def parts(self) -> list[tuple[Mixer, Tensor]]:
        return self.forth.parts() + self.back.parts()

    def forward(self, x_BLD: Tensor, segments_BL: Tensor) -> Tensor:
        mirror_BL = mirror(segments_BL)
        y_BLD = self.forth(x_BLD, segments_BL)
        w_BLD = turned(self.back(turned(x_BLD, mirror_BL), segments_BL), mirror_BL)
        return y_BLD * w_BLD if self.multiply else y_BLD + w_BLD
