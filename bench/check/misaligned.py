"""The level `sam: misaligned` for the checks: a mixer behind the permutation of features that the shell does for it."""

import torch
from torch import Tensor

from bench.mixers.base import Features, Mixer, Wants, misalign

SEED = torch.tensor(0)


def _moved(features: Features, segments_BL: Tensor) -> Features:
    return misalign(features, segments_BL, SEED.to(segments_BL.device))


class Misaligned(Mixer):
    """What `inner` does with each token's features taken from another token of its document."""

    def __init__(self, inner: Mixer):
        super().__init__(inner.grant, "torch")
        self.inner = inner

    @property
    def wants(self) -> Wants:
        return self.inner.wants

    def initial(self, name: str, generator: torch.Generator) -> Tensor:
        return self.inner.initial(name.removeprefix("inner."), generator)

    def forward(self, v_BLHP: Tensor, features: Features, segments_BL: Tensor) -> Tensor:
        return self.inner(v_BLHP, _moved(features, segments_BL), segments_BL)

    def matrix(self, v_BLHP: Tensor, features: Features, segments_BL: Tensor) -> Tensor:
        return self.inner.matrix(v_BLHP, _moved(features, segments_BL), segments_BL)

    def matrices(self, v_BLHP: Tensor, features: Features, segments_BL: Tensor) -> tuple[Tensor, ...]:
        return self.inner.matrices(v_BLHP, _moved(features, segments_BL), segments_BL)

    def structure(self) -> tuple[str, ...]:
        return self.inner.structure()

    def simplest(self) -> Mixer | None:
        simple = self.inner.simplest()
        return None if simple is None else Misaligned(simple)

    @property
    def state_size(self) -> int | None:
        return self.inner.state_size

    def flops(self, length: int) -> int:
        return self.inner.flops(length)
