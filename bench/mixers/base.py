"""The mixer seam: what a mixer is given, what it must offer. No mixer's name occurs here.

A mixer is a linear map of v per head, Y^h = M^h V^h, with M built from feature channels (sequence-aligned,
`sam: true`) or from free parameters (`sam: false`). It never sees the residual stream, the optimiser or the task, nor
whether its features are those of its own places: `sam: misaligned` is a `sam: true` mixer whose features the shell
passes through `misalign`, a control with equal parameters and equal dependence on the data.
The one exception is an entrywise product of several such maps: it declares itself 'not linear' and has no M.

Axes: B batch, L length, H heads, P head width, K feature channels of one kind.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import Refusal

MASK = 2**31 - 1  # of the hash that `sources` sorts by


@dataclass(frozen=True)
class Grant:
    """All that a mixer learns of the protocol.

    `length` is the longest sequence; `packed` says whether one row may hold several documents
    (segments 1, 2, ...) or only one followed by padding (segments 1 and 0).
    """

    heads: int
    head_width: int
    length: int
    packed: bool


@dataclass(frozen=True)
class Wants:
    """Feature channels, over all heads, that the mixer asks the shell for; (0, 0, 0) is a data-independent mixer.

    `conv` channels pass the shell's short convolution, `raw` channels come straight from the in-projection. `exact`
    ones are as `conv`, but autocast never touches them: they come in the parameters' own precision, for what bf16
    would ruin, such as the frequency of a phase. None has an activation: feature maps belong to the mixer.
    """

    conv: int
    raw: int
    exact: int


class Features(NamedTuple):
    """The granted channels; a kind that was not asked for has width 0."""

    conv_BLK: Tensor
    raw_BLK: Tensor
    exact_BLK: Tensor


class Mixer(nn.Module, ABC):
    """Abstract; concrete mixers are final. `Args` is a frozen dataclass: the keys of the mixer's yaml except `name`."""

    Args: ClassVar[type]
    levels: ClassVar[tuple[bool, ...]]  # values of `sam` that exist; with True, `misaligned` exists too
    # Variations of its yaml that a table may name: all are checked.
    forms: ClassVar[tuple[dict[str, object], ...]] = ({},)
    backends: ClassVar[tuple[str, ...]] = ("torch",)  # ways to compute `forward`; the first needs nothing
    # Own integer keys that set the capacity, best first: parameters, FLOPs and state never fall as one of them grows.
    knobs: ClassVar[tuple[str, ...]] = ()

    def __init__(self, grant: Grant, backend: str):
        super().__init__()
        if backend not in self.backends:
            raise ValueError(f"{type(self).__name__} has no backend '{backend}'; it has: {', '.join(self.backends)}")
        self.grant = grant
        self.backend = backend

    @classmethod
    def heads_allowed(cls, width: int) -> tuple[int, ...]:
        """Head counts that an inner width (channels of v, H * P) allows: its divisors, if the class says no fewer."""
        return tuple(h for h in range(1, width + 1) if width % h == 0)

    @classmethod
    def unfit(cls, grant: Grant, args) -> str:
        """Why this mixer cannot run in a setting ('' if it can): a reason that belongs in a table."""
        return ""

    @property
    @abstractmethod
    def wants(self) -> Wants: ...

    @abstractmethod
    def initial(self, name: str, generator: torch.Generator) -> Tensor:
        """A fresh value, on the CPU in fp32, for the mixer's own parameter `name`, drawn from `generator` only."""

    @abstractmethod
    def forward(self, v_BLHP: Tensor, features: Features, segments_BL: Tensor) -> Tensor:
        """Fast path: BLHP, rows of padding zero. Any dtype under autocast; decays, phases and normalisers in fp32."""

    def with_skip(self, v_BLHP: Tensor, features: Features, segments_BL: Tensor, scale: Tensor) -> Tensor | None:
        """M v + v / scale where that takes no more passes over memory than M v, else None, and who asks adds v.

        `scale` is one number and has no gradient. On padding anything may come out.
        """
        return None

    @abstractmethod
    def matrix(self, v_BLHP: Tensor, features: Features, segments_BL: Tensor) -> Tensor:
        """M_BHLL, exactly what `forward` applies: slow, plain, any device, in the dtype of v (fp32 or fp64).

        A mixer that is not linear in v has none and raises `NotImplementedError`: its reference is `matrices`.
        """

    def matrices(self, v_BLHP: Tensor, features: Features, segments_BL: Tensor) -> tuple[Tensor, ...]:
        """The matrices, each as `matrix` gives it, whose results M v `forward` multiplies entry by entry: M alone if it
        is linear in v, several if it declares 'not linear'. They never depend on v."""
        return (self.matrix(v_BLHP, features, segments_BL),)

    def structure(self) -> tuple[str, ...]:
        """What M promises, for the conformance suite to hold it to: names of check/structure.py ('constant diagonals',
        'rank 4'), and the exceptions 'identity' (does not mix tokens) and 'not linear' (in v)."""
        return ()

    def simplest(self) -> "Mixer | None":
        """For a sum of terms: the same mixer with one term, whose `structure` promises what the sum hides; else None.

        The conformance suite holds it to that promise beside the mixer itself. Parameters have no values yet.
        """
        return None

    @property
    @abstractmethod
    def state_size(self) -> int | None:
        """Numbers per head that summarise the past in a scan; None if that grows with the length."""

    @abstractmethod
    def flops(self, length: int) -> int:
        """Floating-point operations of `forward` for one sequence (a multiply-add is two), leading terms."""


def at_least_one(mixer: str, args, names: tuple[str, ...]) -> None:
    """Refuse arguments that count something and are below 1."""
    for name in names:
        if getattr(args, name) < 1:
            raise Refusal(f"mixer {mixer}: {name} is {getattr(args, name)}; allowed: 1 or more")


def same_segment(segments_BL: Tensor) -> Tensor:
    """Whether token i may see token j, B1LL: same document, and neither is padding (segment 0)."""
    real_BL = segments_BL > 0
    same_BLL = (segments_BL[:, :, None] == segments_BL[:, None, :]) & real_BL[:, :, None]
    return same_BLL[:, None]


def real(segments_BL: Tensor, dtype: torch.dtype) -> Tensor:
    """1 on real tokens and 0 on padding, BL11."""
    return (segments_BL > 0).to(dtype)[:, :, None, None]


def segment_lengths(segments_BL: Tensor, packed: bool) -> Tensor:
    """Number of tokens in each token's own segment, BL (1 on padding, so that it can divide)."""
    if packed:
        return same_segment(segments_BL)[:, 0].sum(-1).clamp(min=1)
    return (segments_BL > 0).sum(-1, keepdim=True).clamp(min=1).expand_as(segments_BL)


def segment_starts(segments_BL: Tensor) -> Tensor:
    """Where each token's own document begins in its row, BL; a place of padding is its own beginning.

    A document is one unbroken stretch of its number.
    """
    place_L = torch.arange(segments_BL.shape[1], device=segments_BL.device)
    before_BL = F.pad(segments_BL, (1, 0))[:, :-1]
    first_BL = (segments_BL != before_BL) | (segments_BL == 0)
    return torch.where(first_BL, place_L, 0).cummax(1).values


def misalign(features: Features, segments_BL: Tensor, seed: Tensor) -> Features:
    """The features with each real token's taken from another token of its document, as `sources` pairs them."""
    source_BL1 = sources(segments_BL, seed)[..., None]
    return Features(*(x.gather(1, source_BL1.expand(-1, -1, x.shape[-1])) for x in features))


@torch.library.custom_op("mixerbench::sources", mutates_args=())
def sources(segments_BL: Tensor, seed: Tensor) -> Tensor:
    """The place in its row from which each token takes its features, BL; padding keeps its own.

    Inside a document of n tokens this is one cycle through all its places, so none of two or more keeps its own; it
    depends on (seed, n) only: the places are shuffled by an integer hash and each takes from the next one. Hashes of
    31 bits, of which no step collides, so that there are no ties; computed on the device, with no wait for it.
    An operator of its own, not compiled with the layer, and its seed, one int64, is a tensor: with a number it was
    compiled anew for every run (H200: 51 to 113 s for the first step, 27 to 98 for the evaluation, runs side by side).
    """
    place_L = torch.arange(segments_BL.shape[1], device=segments_BL.device)
    start_BL = segment_starts(segments_BL)
    hash_BL = _mixed(_mixed((place_L - start_BL) ^ (seed & MASK)) ^ (seed >> 31 & MASK))
    # Sorted by document, then hash: rank r holds a token of the document that stands at place r.
    token_BL = (start_BL * (MASK + 1) + hash_BL).argsort(1)
    last_BL = F.pad(start_BL, (0, 1), value=-1)[:, 1:] != start_BL
    next_BL = torch.where(last_BL, start_BL, place_L + 1)
    return torch.empty_like(token_BL).scatter(1, token_BL, token_BL.gather(1, next_BL))


@sources.register_fake
def _sources(segments_BL: Tensor, seed: Tensor) -> Tensor:
    return torch.empty_like(segments_BL, dtype=torch.int64)


def _mixed(x: Tensor) -> Tensor:
    """A permutation of the 31-bit integers; no product leaves the range of int64."""
    for factor in (0x7FEB352D, 0x6CA68B95):
        x = (x ^ (x >> 16)) * factor & MASK
    return x ^ (x >> 16)


def elu_plus_one(x: Tensor) -> Tensor:
    """elu(x) + 1 as exp(x) below zero: a normaliser needs it above zero, where expm1(x) + 1 is rounded to it."""
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


def divisor(total: Tensor) -> Tensor:
    """A row's sum to divide by; 1 where nothing is seen, or where large features left so little that 1 / sum, which
    gradients hold, would not fit into fp32."""
    return torch.where(total > 1e-30, total, 1.0)


def require_length(length: int, longest: int, name: str) -> None:
    """A data-independent matrix has no entries beyond the protocol's length."""
    if length > longest:
        raise ValueError(f"{name} has parameters for {longest} tokens, given {length}")
