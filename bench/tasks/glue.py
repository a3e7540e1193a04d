"""GLUE: classification (and for STS-B regression) of one sentence or a pair, with the benchmark's own metrics.

Training examples are shuffled anew each epoch; the released code left them in file order. Test splits have no public
labels, so the validation splits are what is reported. Axes: B examples, L length, C classes, N examples of a split,
S sentences of an example.
"""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bench import Refusal
from bench.seeds import Streams
from bench.tasks.base import SELECTION, TRAIN, Batch, Spec, Task
from bench.tasks.data import Pins, cached, table
from bench.tasks.text import Ragged, Vocabulary, WordPiece, code_digest, ranges


class Subset(NamedTuple):
    columns: tuple[str, ...]
    outputs: int  # number of classes; 1: a score
    scores: tuple[str, ...]  # metrics besides `loss`
    held_out: tuple[str, ...]  # reported sets; the split is 'validation', with several 'validation_<set>'


_ONE, _PAIR = ("sentence",), ("sentence1", "sentence2")
SUBSETS = {
    "cola": Subset(_ONE, 2, ("matthews", "accuracy"), ("validation",)),
    "sst2": Subset(_ONE, 2, ("accuracy",), ("validation",)),
    "mrpc": Subset(_PAIR, 2, ("accuracy", "f1"), ("validation",)),
    "stsb": Subset(_PAIR, 1, ("pearson", "spearman"), ("validation",)),
    "qqp": Subset(("question1", "question2"), 2, ("accuracy", "f1"), ("validation",)),
    "mnli": Subset(("premise", "hypothesis"), 3, ("accuracy",), ("matched", "mismatched")),
    "qnli": Subset(("question", "sentence"), 2, ("accuracy",), ("validation",)),
    "rte": Subset(_PAIR, 2, ("accuracy",), ("validation",)),
}


@dataclass(frozen=True)
class Args:
    subset: str  # a key of SUBSETS
    length: int  # tokens of a row, [CLS] and [SEP] included
    shorter: tuple[int, ...]  # lengths, ascending; a training batch is cut to the first that holds its rows, if any
    together: int  # successive training batches among which examples are sorted by length; 1: as drawn
    label_smoothing: float  # training loss only; 0 for stsb
    data: Pins  # split `train` and the reported ones
    vocabulary: Vocabulary


class Examples(NamedTuple):
    """One split, without padding: example i is tokens[offsets[i] : offsets[i + 1]], its first[i] tokens of type 0."""

    tokens: np.ndarray
    offsets: np.ndarray
    first: np.ndarray
    labels: np.ndarray  # int64, for stsb float32

    def __len__(self) -> int:
        return len(self.labels)

    def counts(self, items: np.ndarray) -> np.ndarray:
        """Tokens of each of these examples."""
        return self.offsets[items + 1] - self.offsets[items]


class Glue(Task):
    """[CLS] a [SEP] (type 0), for pairs then b [SEP] (type 1); pooled. Sources: the GLUE and the BERT paper."""

    Args = Args

    def __init__(self, args, places):
        super().__init__(args, places)
        if args.subset not in SUBSETS:
            raise Refusal(f"task.subset '{args.subset}' is none of {', '.join(SUBSETS)}")
        self.subset = SUBSETS[args.subset]
        if args.length < 5:
            raise Refusal(f"task.length is {args.length}; [CLS] a [SEP] b [SEP] need 5")
        if list(args.shorter) != sorted(set(args.shorter) & set(range(1, args.length))):
            allowed = f"lengths from 1 to {args.length - 1}, ascending"
            raise Refusal(f"task.shorter is {list(args.shorter)}; it must be [] or {allowed}")
        if args.together < 1:
            raise Refusal(f"task.together is {args.together}; it must be 1 (batches as drawn) or more")
        if not 0 <= args.label_smoothing < 1 or (args.label_smoothing and self.regression):
            raise Refusal(f"task.label_smoothing is {args.label_smoothing}; it must lie in [0, 1), and be 0 for stsb")
        self.examples: dict[str, Examples] = {}

    @property
    def regression(self) -> bool:
        return self.subset.outputs == 1

    def spec(self) -> Spec:
        return Spec(
            kind="tokens",
            symbols=self.args.vocabulary.size,
            types=2,
            length=self.args.length,
            outputs=self.subset.outputs,
            pooled=True,
            tied=False,
            packed=False,
            group=1,
        )

    def prepare(self) -> None:
        if self.examples:
            return
        self.pieces = WordPiece(self.args.vocabulary, self.args.data.name, self.places)
        self.examples = {part: self._open(split) for part, split in self.splits.items()}

    @property
    def splits(self) -> dict[str, str]:
        """Part -> split of the data."""
        parts = self.subset.held_out
        return {TRAIN: TRAIN} | {part: part if part == "validation" else f"validation_{part}" for part in parts}

    def _open(self, split: str) -> Examples:
        args = self.args
        key = json.dumps(
            [
                "glue",
                code_digest(Path(__file__)),
                args.data.content(split),
                args.subset,
                args.length,
                args.vocabulary.sha256,
            ]
        )

        def build():
            data = table(args.data, split, self.places, [*self.subset.columns, "label"])
            labels = data["label"].to_numpy().astype(np.float32 if self.regression else np.int64)
            self._check_labels(labels, split)
            sentences = [self.pieces.encode(data[column]) for column in self.subset.columns]
            return join(sentences, labels, args.length, self.pieces)._asdict()

        arrays = cached(self.places, key, build)
        return Examples(*(np.asarray(arrays[name]) for name in Examples._fields))

    def _check_labels(self, labels: np.ndarray, split: str) -> None:
        low, high = (0, 5) if self.regression else (0, self.subset.outputs - 1)
        if not len(labels) or not np.all((labels >= low) & (labels <= high)):
            raise Refusal(
                f"data set {self.args.data.name}: split {split} must have labels from {low} to {high} "
                f"(the test splits of GLUE have none)"
            )

    def order(self, streams: Streams, step: int, size: int) -> np.ndarray:
        """The examples of a batch. Those of `together` batches, sorted by length, are the same batches in any order."""
        examples, together = self.examples[TRAIN], self.args.together
        first, own = divmod(step, together)
        items = self.drawn(streams, first * together * size, together * size, len(examples))
        if together == 1:
            return items
        by_length = items[np.argsort(examples.counts(items), kind="stable")].reshape(together, size)
        return by_length[streams.draw("batches sorted by length", first).permutation(together)[own]]

    def batch(self, streams: Streams, step: int, size: int, part: slice) -> Batch:
        items, examples = self.order(streams, step, size), self.examples[TRAIN]
        longest = examples.counts(items).max()  # of the whole batch: all its parts have one length
        length = next((length for length in self.args.shorter if length >= longest), self.args.length)
        return self._batch(examples, items[part], length)

    def held_out(self) -> list[str]:
        return list(self.subset.held_out)

    def held_out_batches(self, part: str, size: int):
        examples = self.examples[TRAIN if part == SELECTION else part]
        _, items = self.origin(part)
        for first in range(0, len(items), size):
            yield self._batch(examples, items[first : first + size], self.args.length)

    def origin(self, part: str) -> tuple[str, np.ndarray]:
        held = part not in (TRAIN, SELECTION)
        n = len(self.examples[part if held else TRAIN])
        items = np.arange(n) if held else self.split(n)[part == SELECTION]
        return str(self.args.data.content(self.splits[part if held else TRAIN])), items

    def akin(self, items: np.ndarray) -> np.ndarray:
        """All examples that have a sentence of these, as far as rows hold it: a premise stands in three pairs of MNLI.

        Parts of a sentence go unnoticed; SST-2 trains on phrases of its sentences.
        """
        names_NS = sentences(self.examples[TRAIN])
        return np.flatnonzero(np.isin(names_NS, names_NS[items]).any(1))

    def _batch(self, examples: Examples, items: np.ndarray, length: int) -> Batch:
        start, count_B1 = examples.offsets[items], examples.counts(items)[:, None]
        tokens = np.full(len(items) * length, self.pieces.pad, np.int64)
        place = ranges(np.arange(len(items)) * length, count_B1[:, 0])
        tokens[place] = examples.tokens[ranges(start, count_B1[:, 0])]
        place_L = np.arange(length)
        segments_BL = (place_L < count_B1).astype(np.int64)
        return {
            "tokens": torch.from_numpy(tokens.reshape(-1, length)),
            "segments": torch.from_numpy(segments_BL),
            "types": torch.from_numpy(segments_BL * (place_L >= examples.first[items][:, None])),
            "labels": torch.from_numpy(examples.labels[items]),
            "items": torch.from_numpy(items),
        }

    def count(self, batch: Batch) -> float:
        return float(len(batch["labels"]))

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return self._loss(outputs, batch["labels"], self.args.label_smoothing).sum()

    def _loss(self, outputs: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        """Of each example: squared error of the score, or cross-entropy in nats."""
        if self.regression:
            return (outputs.float()[:, 0] - labels) ** 2
        return F.cross_entropy(outputs.float(), labels, label_smoothing=smoothing, reduction="none")

    def outcomes(self, outputs: Tensor, batch: Batch) -> dict[str, np.ndarray]:
        """`item` (row of the split), `label`, `prediction` (class or score), `loss` (not smoothed) of each example."""
        columns = {
            "item": batch["items"],
            "label": batch["labels"],
            "prediction": outputs.float()[:, 0] if self.regression else outputs.argmax(-1),
            "loss": self._loss(outputs, batch["labels"], 0.0),
        }
        return {name: values.detach().cpu().numpy() for name, values in columns.items()}

    def metrics(self, part: str, outcomes: dict[str, np.ndarray]) -> dict[str, float]:
        """The subset's scores as fractions (not percent) and `loss`, the mean; with two sets named <metric>_<set>."""
        label, prediction = outcomes["label"], outcomes["prediction"]
        found = {name: _SCORES[name](label, prediction) for name in self.subset.scores}
        found["loss"] = float(outcomes["loss"].mean(dtype=np.float64))
        return {name + self._suffix(part): value for name, value in found.items()}

    def names(self, part: str) -> list[str]:
        return [name + self._suffix(part) for name in (*self.subset.scores, "loss")]

    def _suffix(self, part: str) -> str:
        return f"_{part}" if len(self.subset.held_out) > 1 and part != SELECTION else ""

    def words(self, tokens: np.ndarray) -> list[str]:
        return [self.pieces.words[token] for token in tokens]

    def example(self, size: int) -> Batch:
        length, draw = self.args.length, Streams(0, 0).draw("example", 0)
        place_L, count_B1 = np.arange(length), draw.integers(length // 2, length + 1, (size, 1))
        segments_BL = (place_L < count_B1).astype(np.int64)
        labels = (
            draw.uniform(0, 5, size).astype(np.float32)
            if self.regression
            else draw.integers(0, self.subset.outputs, size)
        )
        pair = int(len(self.subset.columns) == 2)
        return {
            "tokens": torch.from_numpy(draw.integers(0, self.args.vocabulary.size, (size, length))),
            "segments": torch.from_numpy(segments_BL),
            "types": torch.from_numpy(segments_BL * (place_L >= length // 4) * pair),
            "labels": torch.from_numpy(labels),
            "items": torch.arange(size),
        }


def join(sentences: list[Ragged], labels: np.ndarray, length: int, pieces: WordPiece) -> Examples:
    """[CLS] a [SEP] or [CLS] a [SEP] b [SEP] of each example, in at most `length` tokens."""
    counts = [np.diff(sentence.offsets) for sentence in sentences]
    kept = truncate(*counts, length - 3) if len(counts) == 2 else [np.minimum(counts[0], length - 2)]
    offsets = np.concatenate([[0], np.cumsum(1 + sum(count + 1 for count in kept))])
    tokens = np.full(offsets[-1], pieces.sep, pieces.dtype)
    tokens[offsets[:-1]] = pieces.cls
    begin = offsets[:-1] + 1
    for sentence, count in zip(sentences, kept, strict=True):
        tokens[ranges(begin, count)] = sentence.ids[ranges(sentence.offsets[:-1], count)]
        begin = begin + count + 1
    return Examples(tokens, offsets, kept[0] + 2, labels)


def truncate(a: np.ndarray, b: np.ndarray, room: int) -> list[np.ndarray]:
    """Token counts of pairs after taking tokens off the longer one (b if equal) until both fit into `room`."""
    kept_a = np.minimum(a, np.maximum(room - b, -(-room // 2)))
    return [kept_a, np.minimum(b, room - kept_a)]


def sentences(examples: Examples) -> np.ndarray:
    """A number for each sentence of an example (N, 2), the same for the same tokens; one that is empty is nobody's."""
    known: dict[bytes, int] = {}
    names_NS = np.empty((len(examples), 2), np.int64)
    for i, (start, stop) in enumerate(itertools.pairwise(examples.offsets)):
        middle = start + examples.first[i]
        for s, text in enumerate((examples.tokens[start + 1 : middle - 1], examples.tokens[middle : stop - 1])):
            names_NS[i, s] = known.setdefault(text.tobytes(), len(known)) if len(text) else -1 - i
    return names_NS


def _accuracy(label: np.ndarray, prediction: np.ndarray) -> float:
    return float((label == prediction).mean())


def _f1(label: np.ndarray, prediction: np.ndarray) -> float:
    """F1 of class 1; 0 if it is neither predicted nor present."""
    from sklearn.metrics import f1_score

    return float(f1_score(label, prediction, zero_division=0.0))


def _matthews(label: np.ndarray, prediction: np.ndarray) -> float:
    """Matthews correlation; 0 if either side is constant."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(label, prediction)) if _vary(label, prediction) else 0.0


def _pearson(label: np.ndarray, prediction: np.ndarray) -> float:
    from scipy.stats import pearsonr

    return _correlation(pearsonr, label, prediction)


def _spearman(label: np.ndarray, prediction: np.ndarray) -> float:
    from scipy.stats import spearmanr

    return _correlation(spearmanr, label, prediction)


def _correlation(statistic, label: np.ndarray, prediction: np.ndarray) -> float:
    """0 if either side is constant, as it says nothing of the other."""
    if not _vary(label, prediction):
        return 0.0
    return float(statistic(label.astype(np.float64), prediction.astype(np.float64)).statistic)


def _vary(*sides: np.ndarray) -> bool:
    return all(np.ptp(side) != 0 for side in sides)


_SCORES = {"accuracy": _accuracy, "f1": _f1, "matthews": _matthews, "pearson": _pearson, "spearman": _spearman}
