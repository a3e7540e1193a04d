"""Masked language modelling: documents cut into pieces, one piece a row (padded) or several (packed).

Tokenised once into the cache of derived arrays, a large set file by file (shards.py); rows are put together when a
batch is asked for, so nothing padded is stored. Axes: B rows, L length, T masked positions of a row (fixed capacity),
W random words of a row.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bench import Refusal
from bench.seeds import Streams
from bench.tasks import rows as rows_file
from bench.tasks.base import SELECTION, TRAIN, Batch, Spec, Task, rows_of
from bench.tasks.data import Pins, cached, table
from bench.tasks.masking import UNUSED, capacity, mask, words
from bench.tasks.rows import Rows, cut_rows, fill
from bench.tasks.shards import Joined, Shards, large
from bench.tasks.text import Vocabulary, WordPiece, code_digest, ranges
from bench.tasks.windows import Windows, whole_windows

_SHARD = 1  # to be raised when `_shard` or what it calls changes: a digest of the code would waste days of preparation


@dataclass(frozen=True)
class Args:
    length: int  # tokens of a row, [CLS] and [SEP] included
    documents: int  # train on the first so many documents of the training split; 0: all, as a large set must have
    packed: bool  # pieces of successive documents fill a row as segments 1, 2, ...; else one piece a row (`cut_rows`)
    pieces: int  # of a document that are used, from its start; 0: all. 1 truncates documents to one row each
    mask_rate: float  # share of the ordinary tokens of a row that is chosen, in training
    mask_rate_held_out: float
    short: int  # a document's last piece is dropped if it has fewer tokens than this, unless it is the only one
    reach: int  # tokens; the loss is also read where the clue lies farther away than this (`beyond`), 0: it is not
    lengths: tuple[int, ...]  # of rows in which the same held-out tokens are read too (windows.py), ascending
    data: Pins  # splits `train` and `validation`
    column: str  # the text column
    vocabulary: Vocabulary


class MaskedLM(Task):
    """Masked LM as in the released BERT, 80 % [MASK], 10 % random, 10 % kept, but with an exact number a row.

    Of the n ordinary tokens of a row (not one of the five specials, [UNK] included), max(1, round(rate n)) are
    chosen; a row of specials only has none. Held-out masks are the same for all runs and all batch sizes.
    """

    Args = Args

    def __init__(self, args, places):
        super().__init__(args, places)
        if args.length < 3:
            raise Refusal(f"task.length is {args.length}; [CLS] token [SEP] need 3")
        for name, rate in (("mask_rate", args.mask_rate), ("mask_rate_held_out", args.mask_rate_held_out)):
            if not 0 < rate < 1:
                raise Refusal(f"task.{name} is {rate}; it must lie between 0 and 1")
        if args.documents < 0:
            raise Refusal(f"task.documents is {args.documents}; it must be 0 (all) or more")
        if args.pieces < 0 or (args.packed and args.pieces):
            allowed = "0 (all) with packed rows" if args.packed else "0 (all) or more"
            raise Refusal(f"task.pieces is {args.pieces}; it must be {allowed}")
        if not 0 <= args.short <= args.length - 2:
            raise Refusal(f"task.short is {args.short}; it must lie between 0 and task.length - 2 = {args.length - 2}")
        if args.reach < 0:
            raise Refusal(f"task.reach is {args.reach}; it must be 0 (no second reading) or more")
        if list(args.lengths) != sorted({n for n in args.lengths if n > 2}):
            raise Refusal(f"task.lengths is {list(args.lengths)}; it must ascend, and [CLS] token [SEP] need 3")
        self.rows: dict[str, Joined] = {}

    def spec(self) -> Spec:
        size = self.args.vocabulary.size
        return Spec(
            kind="tokens",
            symbols=size,
            types=2,
            length=self.args.length,
            outputs=size,
            pooled=False,
            tied=True,
            packed=self.args.packed,
            group=1,
        )

    def prepare(self) -> None:
        if self.rows:
            return
        self.special_C = self.pieces.special_C
        self.ordinary = np.flatnonzero(~self.special_C)
        self.rows = {split: self._rows(split) for split in (TRAIN, "validation")}
        self.windows = self._windows() if self.args.lengths else None

    def longest(self) -> int:
        return max(self.args.length, *self.args.lengths, 0)

    @cached_property
    def pieces(self) -> WordPiece:
        return WordPiece(self.args.vocabulary, self.args.data.name, self.places)

    def _rows(self, split: str) -> Joined:
        parts = self._sharded(split) if large(self.args.data, split, self.places) else [self._whole(split)]
        if not sum(map(len, parts)):
            raise Refusal(f"data set {self.args.data.name}: split {split} has no text in column {self.args.column}")
        return Joined(parts, [len(part) for part in parts])

    def _whole(self, split: str) -> Rows:
        args = self.args
        documents = args.documents if split == TRAIN else 0
        key = ["masked_lm", code_digest(), args.data.content(split), args.column, documents, args.vocabulary.sha256]

        def tokenise():
            texts = table(args.data, split, self.places, [args.column])[args.column]
            return self.pieces.encode(texts[: documents or None])._asdict()

        text = cached(self.places, json.dumps([*key, "tokens"]), tokenise)
        # Rows are an entry of their own, so that a sweep over lengths tokenises once.
        key += ["rows", code_digest(Path(rows_file.__file__)), args.length, args.short, args.packed, args.pieces]
        cut = cached(
            self.places,
            json.dumps(key),
            lambda: cut_rows(text["offsets"], args.length, args.short, args.packed, args.pieces),
        )
        return Rows(*map(np.asarray, (text["ids"], cut["start"], cut["count"], cut["first"], text["offsets"])))

    def _sharded(self, split: str) -> list[Rows]:
        if self.args.documents:
            large_one = f"data set {self.args.data.name} is read in shards"
            raise Refusal(f"task.documents is {self.args.documents}; it must be 0 (all), as {large_one}")
        opened = self._shards(split).open()
        return [Rows(*(np.asarray(shard[name]) for name in Rows._fields)) for shard in opened]

    def shards(self) -> list[Shards]:
        splits = ("train", "validation")
        return [self._shards(split) for split in splits if large(self.args.data, split, self.places)]

    def _shards(self, split: str) -> Shards:
        import tokenizers

        args = self.args
        cutting = [args.length, args.short, args.packed, args.pieces]
        key = json.dumps(["masked_lm", _SHARD, tokenizers.__version__, args.vocabulary.sha256, *cutting])
        return Shards(args.data, split, (args.column,), key, self._shard, self.places)

    def _shard(self, tables: Iterator, where: str) -> dict[str, np.ndarray]:
        """One file: what its rows use of its documents, and the rows as `_whole` would cut them (packed: by file)."""
        args, ids, counts = self.args, [np.zeros(0, self.pieces.dtype)], [np.zeros(0, np.int64)]
        most = args.pieces * (args.length - 2)
        for rows in tables:
            text = self.pieces.encode(rows[args.column])
            kept = np.minimum(np.diff(text.offsets), most) if most else np.diff(text.offsets)
            ids.append(text.ids[ranges(text.offsets[:-1], kept)])
            counts.append(kept)
        offsets = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
        cut = cut_rows(offsets, args.length, args.short, args.packed, args.pieces)
        return {"tokens": np.concatenate(ids), **cut, "documents": offsets}

    def order(self, streams: Streams, step: int, size: int) -> np.ndarray:
        return self.drawn(streams, step * size, size, len(self.rows[TRAIN]))

    def batch(self, streams: Streams, step: int, size: int, part: slice) -> Batch:
        first, stop, _ = part.indices(size)
        items = self.drawn(streams, step * size + first, stop - first, len(self.rows[TRAIN]))
        words_BW = words(streams, "mask", step * size + first, len(items), self.args.length, self.args.mask_rate)
        return self._batch(self.rows[TRAIN], items, words_BW, self.args.mask_rate)

    def _windows(self) -> Windows:
        """Masked once, before they are cut: every length hides the same tokens and shows the same in their places."""
        count, rate = max(self.args.lengths) - 2, self.args.mask_rate_held_out
        tokens_BL = whole_windows(self.rows["validation"].parts, count)
        if not len(tokens_BL):
            raise Refusal(f"task.lengths: no validation document of {self.args.data.name} has {count} tokens")
        words_BW = words(Streams(0, 0), "window mask", 0, len(tokens_BL), count, rate)
        return Windows(*mask(tokens_BL, words_BW, rate, self.special_C, self.ordinary, self.pieces.mask))

    def held_out(self) -> list[str]:
        return ["validation", *map(part_at, self.args.lengths)]

    def held_out_batches(self, part: str, size: int):
        if length := self._length(part):
            yield from self.windows.batches(length, rows_of(length, size, self.args.length), self.pieces)
            return
        rows, rate = self.rows[TRAIN if part == SELECTION else part], self.args.mask_rate_held_out
        _, every = self.origin(part)
        for first in range(0, len(every), size):
            items = every[first : first + size]
            words_BW = words(Streams(0, 0), "held-out mask", first, len(items), self.args.length, rate)
            yield self._batch(rows, items, words_BW, rate)

    def origin(self, part: str) -> tuple[str, np.ndarray]:
        held = part not in (TRAIN, SELECTION)
        split = "validation" if held else TRAIN  # what is read at other lengths are its documents too
        n = len(self.rows[split])
        items = np.arange(n) if held else self.split(n)[part == SELECTION]
        return str(self.args.data.content(split)), items

    def akin(self, items: np.ndarray) -> np.ndarray:
        """All rows with a piece of a document that has a piece in these rows: they would know its words."""
        found = [np.zeros(0, np.int64)]
        for part, at, own in self.rows[TRAIN].groups(items):
            document = np.searchsorted(part.documents, part.start, side="right")
            per_row = np.diff(part.first)
            pieces = ranges(part.first[own], per_row[own])
            hit = np.zeros(len(part.documents) + 1, bool)
            hit[document[pieces]] = True
            row = np.repeat(np.arange(len(part)), per_row)[hit[document]]
            found.append(items[at[0]] - own[0] + np.flatnonzero(np.bincount(row)))
        return np.unique(np.concatenate(found))

    def _batch(self, rows: Joined, items: np.ndarray, words_BW: np.ndarray, rate: float) -> Batch:
        tokens_BL, segments_BL = (np.empty((len(items), self.args.length), np.int64) for _ in range(2))
        for part, at, own in rows.groups(items):
            tokens_BL[at], segments_BL[at] = fill(part, own, self.args.length, self.pieces)
        tokens_BL, positions_BT, labels_BT = mask(
            tokens_BL, words_BW, rate, self.special_C, self.ordinary, self.pieces.mask
        )
        return {
            "tokens": torch.from_numpy(tokens_BL),
            "segments": torch.from_numpy(segments_BL),
            "types": torch.zeros(tokens_BL.shape, dtype=torch.int64),
            "positions": torch.from_numpy(positions_BT),
            "labels": torch.from_numpy(labels_BT),
            "items": torch.from_numpy(items),
        }

    def count(self, batch: Batch) -> float:
        return float((batch["labels"] != UNUSED).sum())

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        outputs_NC, labels_N = outputs.flatten(0, 1), batch["labels"].flatten()
        if self.fused:
            return torch.ops.mixerbench.cross_entropy(outputs_NC, labels_N, UNUSED)[0]
        return F.cross_entropy(outputs_NC.float(), labels_N, ignore_index=UNUSED, reduction="sum")

    def outcomes(self, outputs: Tensor, batch: Batch) -> dict[str, np.ndarray]:
        """`item` (row of the held-out split), `loss_sum` (nats), `correct` and `count` (masked tokens) of each row.

        With a `reach` also `loss_sum_far` and `count_far`, of the masked tokens `beyond` it.
        """
        labels_BT = batch["labels"]
        loss_BT = F.cross_entropy(
            outputs.float().flatten(0, 1), labels_BT.flatten(), ignore_index=UNUSED, reduction="none"
        ).view(labels_BT.shape)
        columns = {
            "item": batch["items"],
            "loss_sum": loss_BT.sum(1),
            "correct": (outputs.argmax(-1) == labels_BT).sum(1),
            "count": (labels_BT != UNUSED).sum(1),
        }
        if self.args.reach:
            far_BT = beyond(batch, self.args.reach)
            columns |= {"loss_sum_far": (loss_BT * far_BT).sum(1), "count_far": far_BT.sum(1)}
        return {name: values.detach().cpu().numpy() for name, values in columns.items()}

    def metrics(self, part: str, outcomes: dict[str, np.ndarray]) -> dict[str, float]:
        """`loss` (nats) and `accuracy`, means over all masked tokens of the set, and their number `tokens`.

        With a `reach` also `tokens_far` and, unless there is none, `loss_far`: of the masked tokens `beyond` it. Of a
        set of `lengths` with its length: `loss_at_256`.
        """
        return {name + self._suffix(part): value for name, value in self._means(outcomes).items()}

    def names(self, part: str) -> list[str]:
        far = ["tokens_far", "loss_far"] if self.args.reach else []
        return [name + self._suffix(part) for name in ("loss", "accuracy", "tokens", *far)]

    def _suffix(self, part: str) -> str:
        length = self._length(part)
        return f"_at_{length}" if length else ""

    def _length(self, part: str) -> int:
        """Of the rows of a set of windows; 0 for any other set."""
        return next((length for length in self.args.lengths if part == part_at(length)), 0)

    def _means(self, outcomes: dict[str, np.ndarray]) -> dict[str, float]:
        tokens, loss = _total(outcomes["count"]), _total(outcomes["loss_sum"])
        found = {"loss": loss / tokens, "accuracy": _total(outcomes["correct"]) / tokens, "tokens": tokens}
        if self.args.reach:
            found["tokens_far"] = far = _total(outcomes["count_far"])
            found |= {"loss_far": _total(outcomes["loss_sum_far"]) / far} if far else {}
        return found

    def words(self, tokens: np.ndarray) -> list[str]:
        return [self.pieces.words[token] for token in tokens]

    def example(self, size: int) -> Batch:
        length, symbols = self.args.length, self.args.vocabulary.size
        draw = Streams(0, 0).draw("example", 0)
        tokens_BL = draw.integers(0, symbols, (size, length))
        used_B1 = draw.integers(max(3, length // 2), length + 1, (size, 1))
        place_L = np.arange(length)
        segments_BL = 1 + (place_L >= length // 3) * int(self.args.packed)
        segments_BL = np.where(place_L < used_B1, segments_BL, 0)
        positions_BT = np.sort(draw.integers(0, used_B1, (size, capacity(length, self.args.mask_rate))), axis=1)
        batch = {
            "tokens": tokens_BL,
            "segments": segments_BL,
            "types": np.zeros_like(tokens_BL),
            "positions": positions_BT,
            "labels": np.take_along_axis(tokens_BL, positions_BT, 1),
            "items": np.arange(size),
        }
        return {name: torch.from_numpy(values.astype(np.int64)) for name, values in batch.items()}


def part_at(length: int) -> str:
    """Name of the reported set of windows cut to rows of `length`."""
    return f"validation_at_{length}"


def beyond(batch: Batch, reach: int) -> Tensor:
    """BT bool: masked tokens whose segment shows the same id more than `reach` tokens away and nowhere nearer.

    What counts is what the input shows: a chosen token that was kept shows itself, at distance 0, and does not count.
    """
    segments_BL, positions_BT = batch["segments"], batch["positions"]
    shown_BTL = batch["tokens"][:, None] == batch["labels"][..., None]
    shown_BTL &= segments_BL[:, None] == segments_BL.gather(1, positions_BT)[..., None]
    apart_BTL = (torch.arange(segments_BL.shape[1], device=segments_BL.device) - positions_BT[..., None]).abs()
    return shown_BTL.any(-1) & ~(shown_BTL & (apart_BTL <= reach)).any(-1)


def _total(values_B: np.ndarray) -> float:
    return float(values_B.sum(dtype=np.float64))
