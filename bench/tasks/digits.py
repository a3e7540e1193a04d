"""Handwritten digits: the 1,797 real images of 8x8 pixels that come with scikit-learn (no download).

Small enough to train on within seconds. The images are pinned by their hash; the split is fixed, whatever the seed.

Axes: B images, L patches, F pixels of a patch, C classes.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from bench import Refusal
from bench.seeds import Streams
from bench.tasks.base import SELECTION, TRAIN, Batch, Places, Spec, Task

SIDE, CLASSES, IMAGES = 8, 10, 1797
_SHA256 = "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"


@dataclass(frozen=True)
class Args:
    """`patch` in pixels, `held_out` in images; `label_smoothing` enters the training loss only."""

    patch: int
    held_out: int
    label_smoothing: float

    def __post_init__(self):
        if self.patch not in (1, 2, 4):
            raise Refusal(f"digits: patch is {self.patch}, must be 1, 2 or 4")
        if not CLASSES <= self.held_out <= IMAGES // 2:
            raise Refusal(f"digits: held_out is {self.held_out}, must be {CLASSES} to {IMAGES // 2} of {IMAGES}")
        if not 0 <= self.label_smoothing < 1:
            raise Refusal(f"digits: label_smoothing is {self.label_smoothing}, must be at least 0 and below 1")


class Digits(Task):
    """Ten classes, one output an image. Grey levels 0 .. 16 become -1 .. 1; chance is 0.1 (classes are about equal).

    Source: `sklearn.datasets.load_digits`, from the UCI data set "Optical recognition of handwritten digits"
    (Alpaydin and Kaynak 1998, CC BY 4.0). An item's number is its row there.
    """

    Args = Args

    def __init__(self, args: Args, places: Places):
        super().__init__(args, places)
        self._prepared = False

    def spec(self) -> Spec:
        return Spec(
            kind="patches",
            symbols=self.args.patch**2,
            types=0,
            length=(SIDE // self.args.patch) ** 2,
            outputs=CLASSES,
            pooled=True,
            tied=False,
            packed=False,
            group=1,
        )

    def prepare(self) -> None:
        """Refusal if scikit-learn ships other images than the pinned ones."""
        if self._prepared:
            return
        from sklearn.datasets import load_digits  # a second to import, and needed here only

        pixels, labels = load_digits(return_X_y=True)
        pixels, self._labels = pixels.astype(np.uint8), labels.astype(np.int64)
        found = hashlib.sha256(pixels.tobytes() + self._labels.astype(np.uint8).tobytes()).hexdigest()
        if found != _SHA256:
            raise Refusal(f"digits: scikit-learn's images have sha256 {found}, the task is pinned to {_SHA256}")
        images_NHW = pixels.reshape(-1, SIDE, SIDE).astype(np.float32) / 8 - 1
        self._patches_NLF = cut(images_NHW, self.args.patch)
        self._train, self._held_out = split(self._labels, self.args.held_out)
        self._prepared = True

    def order(self, streams: Streams, step: int, size: int) -> np.ndarray:
        return self._train[self.drawn(streams, step * size, size, len(self._train))]

    def batch(self, streams: Streams, step: int, size: int, part: slice) -> Batch:
        return self._assemble(self.order(streams, step, size)[part])

    def held_out(self) -> list[str]:
        return ["held_out"]

    def held_out_batches(self, part: str, size: int) -> Iterator[Batch]:
        _, items = self.origin(part)
        for start in range(0, len(items), size):
            yield self._assemble(items[start : start + size])

    def origin(self, part: str) -> tuple[str, np.ndarray]:
        train, selection = self.split(len(self._train))
        items = {TRAIN: self._train[train], SELECTION: self._train[selection]}
        return "image", items.get(part, self._held_out)

    def count(self, batch: Batch) -> float:
        return float(len(batch["labels"]))

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy with label smoothing (nats), summed over images; outputs BC."""
        smoothing = self.args.label_smoothing
        return functional.cross_entropy(outputs.float(), batch["labels"], reduction="sum", label_smoothing=smoothing)

    def outcomes(self, outputs: Tensor, batch: Batch) -> dict[str, np.ndarray]:
        """Per image: `label`, `prediction` and `loss` (nats, without smoothing)."""
        loss_B = functional.cross_entropy(outputs.float(), batch["labels"], reduction="none")
        columns = {"item": batch["items"], "label": batch["labels"], "prediction": outputs.argmax(-1), "loss": loss_B}
        return {name: column.cpu().numpy() for name, column in columns.items()}

    def metrics(self, part: str, outcomes: dict[str, np.ndarray]) -> dict[str, float]:
        """`accuracy` and `loss` (nats) per image."""
        return {
            "accuracy": float(np.mean(outcomes["prediction"] == outcomes["label"])),
            "loss": float(np.mean(outcomes["loss"], dtype=np.float64)),
        }

    def names(self, part: str) -> list[str]:
        return ["accuracy", "loss"]

    def example(self, size: int) -> Batch:
        rng, spec = Streams(0, 0).draw("made-up examples", 0), self.spec()
        patches_BLF = rng.uniform(-1, 1, (size, spec.length, spec.symbols)).astype(np.float32)
        return _tensors(patches_BLF, rng.integers(CLASSES, size=size), np.arange(size))

    def _assemble(self, items: np.ndarray) -> Batch:
        return _tensors(self._patches_NLF[items], self._labels[items], items)


def _tensors(patches_BLF: np.ndarray, labels_B: np.ndarray, items: np.ndarray) -> Batch:
    return {
        "patches": torch.from_numpy(patches_BLF),
        "segments": torch.ones(patches_BLF.shape[:2], dtype=torch.int64),
        "labels": torch.from_numpy(labels_B),
        "items": torch.from_numpy(items.copy()),
    }


def cut(images_NHW: np.ndarray, patch: int) -> np.ndarray:
    """Square patches of an image in reading order, pixels of a patch in reading order: NHW to NLF."""
    n, height, width = images_NHW.shape
    tiles = images_NHW.reshape(n, height // patch, patch, width // patch, patch).transpose(0, 1, 3, 2, 4)
    return np.ascontiguousarray(tiles.reshape(n, -1, patch * patch))


def split(labels_N: np.ndarray, held_out: int) -> tuple[np.ndarray, np.ndarray]:
    """(training items, held-out items), both ascending: a class's share of the held-out items is its share of all.

    Whole numbers by largest remainder; which items of a class is drawn from a stream that no seed changes.
    """
    share_C = np.bincount(labels_N, minlength=CLASSES) * held_out / len(labels_N)
    take_C = np.floor(share_C).astype(np.int64)
    remainder_C = share_C - take_C
    take_C[np.argsort(-remainder_C, kind="stable")[: held_out - take_C.sum()]] += 1
    shuffled = Streams(0, 0).draw("held-out digits", 0).permutation(len(labels_N))
    chosen = [shuffled[labels_N[shuffled] == c][: take_C[c]] for c in range(CLASSES)]
    kept = np.sort(np.concatenate(chosen)).astype(np.int64)
    return np.setdiff1d(np.arange(len(labels_N), dtype=np.int64), kept), kept
