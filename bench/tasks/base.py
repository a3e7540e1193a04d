"""The task seam: what comes in and out, batches as pure functions, loss and metrics as sums. Knows no mixer, no model.

Axes: B examples, L length, T positions of a sequence that get an output, C classes or ids, F values of a patch.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from torch import Tensor

from bench import Refusal
from bench.seeds import Streams

if TYPE_CHECKING:
    from bench.tasks.shards import Shards

TRAIN, SELECTION = "train", "selection"  # parts beside the reported sets; see `Task.reserve`

Batch = dict[str, Tensor]
"""Every value has a leading axis B, so that a batch can be cut into micro-batches anywhere that `group` allows.

Keys that the backbone reads:
`tokens` BL int64 (Spec.kind 'tokens') or `patches` BLF float32 ('patches'); `segments` BL int64, 0 is padding,
1, 2, ... documents;
`types` BL int64 if Spec.types > 0; `positions` BT int64 unless Spec.pooled: the positions that get an output.
All other keys (`labels`, `items`, ...) are the task's own and are only read by `loss`, `count` and `outcomes`.
"""


@dataclass(frozen=True)
class Spec:
    """All that the backbone learns of the task."""

    kind: str  # 'tokens' or 'patches'
    symbols: int  # 'tokens': number of ids; 'patches': values of one patch (F)
    types: int  # token types (0: none)
    length: int  # longest sequence
    outputs: int  # width of one output (C)
    pooled: bool  # one output an example (BC), else one for each of `positions` (BTC)
    tied: bool  # outputs are the token ids themselves, so that the head may be tied to the embedding
    packed: bool  # a row may hold several documents
    group: int  # a micro-batch must be a multiple of this many examples (augmentation groups), mostly 1


@dataclass(frozen=True)
class Places:
    """Where data are (never part of an id)."""

    data: Path | None  # folder of the pinned files; None: not set, only data that need no file, or the hub
    cache: Path  # derived arrays, keyed by content; may be deleted at any time


def rows_of(length: int, size: int, own: int) -> int:
    """Rows of `length` that are evaluated at once where `size` rows of the task's `own` length would be: longer ones by
    the square, so that not even a matrix of L x L entries a row takes more memory than in training."""
    return max(1, size * own**2 // max(own, length) ** 2)


class Task(ABC):
    """`Args`: frozen dataclass, the keys of the task's yaml except `name`. Construction is cheap, touches no data."""

    Args: ClassVar[type]

    def __init__(self, args, places: Places):
        self.args = args
        self.places = places
        self.fused = False  # its loss by fused operators; set by who trains
        self.reserved = 0  # training examples that are held out for the selection of trials
        self._split: tuple[np.ndarray, np.ndarray] | None = None

    # Selection: examples that no run of a tuned protocol trains on and none reports, the same whatever the seed.

    def reserve(self, examples: int) -> None:
        """Hold out so many training examples as the part 'selection'; before anything is drawn."""
        self.reserved = examples

    def split(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """(items to train on, items of the selection) of n training items, ascending (int64)."""
        if self._split is None:
            if self.reserved > n // 2:
                raise Refusal(f"protocol.tune.selection.examples is {self.reserved}, must be at most half of {n}")
            chosen = Streams(0, 0).draw("selection", 0).permutation(n)[: self.reserved].astype(np.int64)
            away = self.akin(np.sort(chosen))
            self._split = np.setdiff1d(np.arange(n, dtype=np.int64), away), np.sort(chosen)
        return self._split

    def akin(self, items: np.ndarray) -> np.ndarray:
        """The training items that share a source with `items` (rows of one document), these included."""
        return items

    def drawn(self, streams: Streams, start: int, count: int, n: int) -> np.ndarray:
        """Items at positions start .. start + count - 1 of the training order over n items, selection left out."""
        if not self.reserved:
            return streams.order(start, count, n)
        kept = self.split(n)[0]
        return kept[streams.order(start, count, len(kept))]

    @abstractmethod
    def origin(self, part: str) -> tuple[str, np.ndarray]:
        """(what the items number, items) of all of 'train', of 'selection' or of a reported set: what equal names
        number twice is the same example."""

    def require_disjoint(self) -> None:
        """Raises Refusal if an example of the selection is trained on or reported."""
        name, items = self.origin(SELECTION)
        for part in (TRAIN, *self.held_out()):
            other, numbers = self.origin(part)
            if other == name and len(common := np.intersect1d(items, numbers)):
                raise Refusal(f"{len(common)} examples held out for the selection of trials are in '{part}' too")

    @abstractmethod
    def spec(self) -> Spec: ...

    def longest(self) -> int:
        """Tokens of the longest row that is ever read; above the spec's length for a task that also evaluates there."""
        return self.spec().length

    @abstractmethod
    def prepare(self) -> None:
        """Open the data (verify pins, build or open caches), so that `batch` and `held_out` work. Idempotent."""

    def shards(self) -> list["Shards"]:
        """Splits that `mixerbench data fetch` prepares ahead of any run, as they are too large to do so in one."""
        return []

    @abstractmethod
    def order(self, streams: Streams, step: int, size: int) -> np.ndarray:
        """Which training items make up the batch of optimiser step `step` (int64, `size` of them)."""

    @abstractmethod
    def batch(self, streams: Streams, step: int, size: int, part: slice) -> Batch:
        """Examples `part` of the batch of `size` at optimiser step `step`, a pure function whichever part is asked for.

        Randomness (masks, augmentation, generated examples) comes from streams.draw(purpose, step * size + position
        of the example or group in the whole batch), never from a global state.
        """

    @abstractmethod
    def held_out(self) -> list[str]:
        """Names of the reported sets, in order (e.g. ['validation'], ['matched', 'mismatched'])."""

    @abstractmethod
    def held_out_batches(self, part: str, size: int):
        """Batches of a reported set or of 'selection', as they are evaluated: the same for every arm and seed, every
        item once; the last may be short. `size` rows of the task's own length, `rows_of` another."""

    @abstractmethod
    def count(self, batch: Batch) -> float:
        """What the loss is divided by (targets, examples), from labels alone, so that ranks can add it up first."""

    @abstractmethod
    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Sum of the training loss over the batch (fp32 scalar); divided by `count` over a whole optimiser step."""

    @abstractmethod
    def outcomes(self, outputs: Tensor, batch: Batch) -> dict[str, np.ndarray]:
        """Per-example outcomes: column name -> values (one an example, `item` among them); become items.parquet."""

    @abstractmethod
    def metrics(self, part: str, outcomes: dict[str, np.ndarray]) -> dict[str, float]:
        """Metrics of one set from all its outcomes; names carry a reported set if there are several."""

    @abstractmethod
    def names(self, part: str) -> list[str]:
        """Of all metrics that a set may have; known without data."""

    def words(self, tokens: np.ndarray) -> list[str]:
        """Names of token ids, for people to read in a figure; [] if the ids of this task have none."""
        return []

    @abstractmethod
    def example(self, size: int) -> Batch:
        """A made-up batch of the right shapes and ids, without data: for tests of shapes and two training steps."""
