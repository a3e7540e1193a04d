"""What tasks with generated examples share: batches from a stream, a fixed held-out set, accuracy per output.

There are no files and no epochs: every training example is new. Every position that gets an output counts the same.

Axes: B examples, L length, T positions with an output, C output symbols.
"""

from abc import abstractmethod
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from bench.seeds import Streams
from bench.tasks.base import SELECTION, TRAIN, Batch, Task

# These streams have purposes of their own, so their keys differ from that of every training stream, also of seed 0.
_FIXED = {"held_out": "held-out examples", SELECTION: "selection examples"}


class Generated(Task):
    """Abstract: a subclass has `held_out` among its Args and says what its spec is and how examples are drawn."""

    @abstractmethod
    def draw(self, rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(tokens BL, positions BT, labels BT) of `size` new examples, drawn from `rng` only; int64."""

    def prepare(self) -> None:
        """Nothing to open."""

    def order(self, streams: Streams, step: int, size: int) -> np.ndarray:
        """Running numbers: no example ever comes again."""
        return np.arange(step * size, (step + 1) * size, dtype=np.int64)

    def batch(self, streams: Streams, step: int, size: int, part: slice) -> Batch:
        """The whole batch of the step is drawn from one generator, then cut; so a part does not depend on the cut."""
        arrays = self.draw(streams.draw("examples", step), size)
        return _assemble(arrays, self.order(streams, step, size), part)

    def held_out(self) -> list[str]:
        return ["held_out"]

    def held_out_batches(self, part: str, size: int) -> Iterator[Batch]:
        _, items = self.origin(part)
        arrays = self.draw(Streams(0, 0).draw(_FIXED[part], 0), len(items))
        for start in range(0, len(items), size):
            yield _assemble(arrays, items, slice(start, start + size))

    def origin(self, part: str) -> tuple[str, np.ndarray]:
        """By the stream: nothing is held out of the training examples, since no two streams share a draw."""
        counts = {TRAIN: 0, SELECTION: self.reserved}
        return _FIXED.get(part, part), np.arange(counts.get(part, self.args.held_out), dtype=np.int64)

    def count(self, batch: Batch) -> float:
        return float(batch["labels"].numel())

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy in nats, summed over all positions; outputs BTC."""
        return _cross_entropy(outputs, batch["labels"]).sum()

    def outcomes(self, outputs: Tensor, batch: Batch) -> dict[str, np.ndarray]:
        """Per example: `correct` of its `targets` outputs, and `loss` summed over them (nats)."""
        labels_BT = batch["labels"]
        right_BT = outputs.argmax(-1) == labels_BT
        return {
            "item": batch["items"].cpu().numpy(),
            "correct": right_BT.sum(1).cpu().numpy(),
            "targets": np.full(len(labels_BT), labels_BT.shape[1], dtype=np.int64),
            "loss": _cross_entropy(outputs, labels_BT).sum(1).cpu().numpy(),
        }

    def metrics(self, part: str, outcomes: dict[str, np.ndarray]) -> dict[str, float]:
        """`accuracy` and `loss` (nats) per output."""
        targets = outcomes["targets"].sum()
        return {
            "accuracy": float(outcomes["correct"].sum() / targets),
            "loss": float(outcomes["loss"].sum(dtype=np.float64) / targets),
        }

    def names(self, part: str) -> list[str]:
        return ["accuracy", "loss"]

    def example(self, size: int) -> Batch:
        arrays = self.draw(Streams(0, 0).draw("made-up examples", 0), size)
        return _assemble(arrays, np.arange(size, dtype=np.int64), slice(None))


def _assemble(arrays: tuple[np.ndarray, np.ndarray, np.ndarray], items: np.ndarray, part: slice) -> Batch:
    tokens_BL, positions_BT, labels_BT = (torch.from_numpy(np.array(a[part])) for a in arrays)
    return {
        "tokens": tokens_BL,
        "segments": torch.ones_like(tokens_BL),
        "positions": positions_BT,
        "labels": labels_BT,
        "items": torch.from_numpy(items[part].copy()),
    }


def _cross_entropy(outputs_BTC: Tensor, labels_BT: Tensor) -> Tensor:
    """Nats per output, BT, in fp32 whatever the precision of the model."""
    return functional.cross_entropy(outputs_BTC.float().transpose(1, 2), labels_BT, reduction="none")
