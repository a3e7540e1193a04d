"""Masked language modelling: documents cut into pieces, one piece a row (padded) or several (packed).

Tokenised once into the cache of derived arrays; rows are put together when a batch is asked for, so nothing padded is
stored. Axes: B rows, L length, T masked positions of a row (fixed capacity), C ids, W random words of a row.
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
from bench.tasks.text import Vocabulary, WordPiece, code_digest, ranges

UNUSED = -100  # label of a position that is not masked


@dataclass(frozen=True)
class Args:
    length: int  # tokens of a row, [CLS] and [SEP] included
    documents: int  # train on the first so many documents of the training split; 0: all
    packed: bool  # pieces of successive documents fill a row as segments 1, 2, ...; else one piece a row (`cut_rows`)
    pieces: int  # of a document that are used, from its start; 0: all. 1 truncates documents to one row each
    mask_rate: float  # share of the ordinary tokens of a row that is chosen, in training
    mask_rate_held_out: float
    short: int  # a document's last piece is dropped if it has fewer tokens than this, unless it is the only one
    data: Pins  # splits `train` and `validation`
    column: str  # the text column
    vocabulary: Vocabulary


class Rows(NamedTuple):
    """One split. Row r holds pieces first[r] .. first[r + 1] - 1; piece p is tokens[start[p] : start[p] + count[p]]."""

    tokens: np.ndarray
    start: np.ndarray
    count: np.ndarray
    first: np.ndarray

    def __len__(self) -> int:
        return len(self.first) - 1


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
        self.rows: dict[str, Rows] = {}

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
        self.pieces = WordPiece(self.args.vocabulary, self.args.data.name, self.places)
        self.special_C = self.pieces.special_C
        self.ordinary = np.flatnonzero(~self.special_C)
        self.rows = {split: self._rows(split) for split in (TRAIN, "validation")}

    def _rows(self, split: str) -> Rows:
        args = self.args
        documents = args.documents if split == TRAIN else 0
        key = ["masked_lm", code_digest(), args.data.content(split), args.column, documents, args.vocabulary.sha256]

        def tokenise():
            texts = table(args.data, split, self.places, [args.column])[args.column]
            return self.pieces.encode(texts[: documents or None])._asdict()

        text = cached(self.places, json.dumps([*key, "tokens"]), tokenise)
        # Rows are an entry of their own, so that a sweep over lengths tokenises once.
        key += ["rows", code_digest(Path(__file__)), args.length, args.short, args.packed, args.pieces]
        cut = cached(
            self.places,
            json.dumps(key),
            lambda: cut_rows(text["offsets"], args.length, args.short, args.packed, args.pieces),
        )
        if len(cut["first"]) < 2:
            raise Refusal(f"data set {args.data.name}: split {split} has no text in column {args.column}")
        if split == TRAIN:
            self.documents = np.asarray(text["offsets"])  # where each begins, in tokens
        return Rows(np.asarray(text["ids"]), *(np.asarray(cut[name]) for name in ("start", "count", "first")))

    def order(self, streams: Streams, step: int, size: int) -> np.ndarray:
        return self.drawn(streams, step * size, size, len(self.rows[TRAIN]))

    def batch(self, streams: Streams, step: int, size: int, part: slice) -> Batch:
        first, stop, _ = part.indices(size)
        items = self.drawn(streams, step * size + first, stop - first, len(self.rows[TRAIN]))
        words_BW = _words(streams, "mask", step * size + first, len(items), self.args.length, self.args.mask_rate)
        return self._batch(self.rows[TRAIN], items, words_BW, self.args.mask_rate)

    def held_out(self) -> list[str]:
        return ["validation"]

    def held_out_batches(self, part: str, size: int):
        rows, rate = self.rows[TRAIN if part == SELECTION else part], self.args.mask_rate_held_out
        _, every = self.origin(part)
        for first in range(0, len(every), size):
            items = every[first : first + size]
            words_BW = _words(Streams(0, 0), "held-out mask", first, len(items), self.args.length, rate)
            yield self._batch(rows, items, words_BW, rate)

    def origin(self, part: str) -> tuple[str, np.ndarray]:
        held = part not in (TRAIN, SELECTION)
        n = len(self.rows[part if held else TRAIN])
        items = np.arange(n) if held else self.split(n)[part == SELECTION]
        return str(self.args.data.content(part if held else TRAIN)), items

    def akin(self, items: np.ndarray) -> np.ndarray:
        """All rows with a piece of a document that has a piece in these rows: they would know its words."""
        rows = self.rows[TRAIN]
        document = np.searchsorted(self.documents, rows.start, side="right")
        per_row = np.diff(rows.first)
        pieces = ranges(rows.first[items], per_row[items])
        row = np.repeat(np.arange(len(rows)), per_row)
        return np.unique(row[np.isin(document, document[pieces])])

    def _batch(self, rows: Rows, items: np.ndarray, words_BW: np.ndarray, rate: float) -> Batch:
        tokens_BL, segments_BL = fill(rows, items, self.args.length, self.pieces)
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
        return F.cross_entropy(
            outputs.float().flatten(0, 1), batch["labels"].flatten(), ignore_index=UNUSED, reduction="sum"
        )

    def outcomes(self, outputs: Tensor, batch: Batch) -> dict[str, np.ndarray]:
        """`item` (row of the held-out split), `loss_sum` (nats), `correct` and `count` (masked tokens) of each row."""
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
        return {name: values.detach().cpu().numpy() for name, values in columns.items()}

    def metrics(self, part: str, outcomes: dict[str, np.ndarray]) -> dict[str, float]:
        """`loss` (nats) and `accuracy`, means over all masked tokens of the set, and their number `tokens`."""
        tokens = float(outcomes["count"].sum())
        loss = float(outcomes["loss_sum"].sum(dtype=np.float64))
        return {"loss": loss / tokens, "accuracy": float(outcomes["correct"].sum()) / tokens, "tokens": tokens}

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


def capacity(length: int, rate: float) -> int:
    """T: no row of `length` tokens has more masked positions."""
    return max(1, int(np.rint(rate * length)))


def cut_rows(offsets: np.ndarray, length: int, short: int, packed: bool, pieces: int) -> dict[str, np.ndarray]:
    """The pieces of documents offsets[i] .. offsets[i + 1] - 1 and how they fill rows of `length`, as in `Rows`.

    Unpacked: pieces have length - 2 tokens, the last one of a document the rest. Packed: a document begins in what the
    row before has left (after [CLS] and [SEP]), if all of it or at least `short` tokens fit there, and goes on in the
    next rows; each piece is a segment. Either way a last piece below `short` is dropped, unless the only one. With
    `pieces` above 0 (unpacked only), what follows a document's first so many pieces is left out.
    """
    if packed:
        return _cut_packed(offsets.tolist(), length, short)
    most = length - 2
    total = np.diff(offsets)
    used = -(-total // most)
    rest = total - (used - 1) * most
    used = np.where((used > 1) & (rest < short), used - 1, used)
    used = np.minimum(used, pieces) if pieces else used
    within = ranges(np.zeros_like(used), used) * most
    count = np.minimum(np.repeat(total, used) - within, most)
    return {"start": np.repeat(offsets[:-1], used) + within, "count": count, "first": np.arange(len(count) + 1)}


def _cut_packed(offsets: list[int], length: int, short: int) -> dict[str, np.ndarray]:
    start, count, first = [], [], []
    free = 0
    for begin, end in itertools.pairwise(offsets):
        place = begin
        while place < end and (place == begin or end - place >= short):
            take = min(end - place, free - 2)
            if take < max(1, min(short, end - place)):
                first.append(len(start))
                free = length
                continue
            start.append(place)
            count.append(take)
            place, free = place + take, free - take - 2
    return {"start": np.asarray(start), "count": np.asarray(count), "first": np.asarray([*first, len(start)])}


def fill(rows: Rows, items: np.ndarray, length: int, pieces: WordPiece) -> tuple[np.ndarray, np.ndarray]:
    """Rows `items` as (tokens_BL, segments_BL), int64: each piece as [CLS] piece [SEP], padded at the end."""
    per_row = rows.first[items + 1] - rows.first[items]
    piece = ranges(rows.first[items], per_row)
    size = rows.count[piece]
    number = ranges(np.ones_like(per_row), per_row)  # 1, 2, ... within each row
    before = np.cumsum(size + 2) - (size + 2)
    row_start = np.repeat(before[np.cumsum(per_row) - per_row], per_row)
    begin = np.repeat(np.arange(len(items)) * length, per_row) + before - row_start
    tokens = np.full(len(items) * length, pieces.pad, np.int64)
    segments = np.zeros(len(items) * length, np.int64)
    tokens[ranges(begin + 1, size)] = rows.tokens[ranges(rows.start[piece], size)]
    tokens[begin], tokens[begin + size + 1] = pieces.cls, pieces.sep
    segments[ranges(begin, size + 2)] = np.repeat(number, size + 2)
    return tokens.reshape(-1, length), segments.reshape(-1, length)


def _words(streams: Streams, purpose: str, first: int, rows: int, length: int, rate: float) -> np.ndarray:
    """32 random bits (uint32) for all that a row may draw, for rows first .. first + rows - 1 of a stream.

    Each row owns a fixed stretch of the counter, so that rows can be drawn alone, in any batch.
    """
    counts = -(-(length + 2 * capacity(length, rate)) // 8)  # one count of Philox4x64 gives 8 words of 32 bits
    bits = streams.draw(purpose, 0).bit_generator.advance(first * counts)
    return bits.random_raw(rows * counts * 4).view(np.uint32).reshape(rows, counts * 8)


def mask(
    tokens_BL: np.ndarray, words_BW: np.ndarray, rate: float, special_C: np.ndarray, ordinary: np.ndarray, mask_id: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens_BL with masks, positions_BT ascending, labels_BT); unused slots have position 0 and label UNUSED."""
    length = tokens_BL.shape[1]
    slots = capacity(length, rate)
    special_BL = special_C.take(tokens_BL)
    # The position in the low bits makes keys of a row distinct, so that the k smallest are exactly k.
    low = (1 << (length - 1).bit_length()) - 1
    keys_BL = words_BW[:, :length] & ~np.uint32(low) | np.arange(length, dtype=np.uint32)
    keys_BL[special_BL] = 0xFFFFFFFF
    maskable_B = length - special_BL.sum(1)
    chosen_B = np.minimum(np.maximum(1, np.rint(rate * maskable_B)).astype(np.int64), maskable_B)
    limit_B1 = np.take_along_axis(np.sort(keys_BL, axis=1), np.maximum(chosen_B - 1, 0)[:, None], 1)
    row, position = np.divmod(np.flatnonzero((keys_BL <= limit_B1) & ~special_BL), length)
    slot = ranges(np.zeros_like(chosen_B), chosen_B)
    positions_BT = np.zeros((len(tokens_BL), slots), np.int64)
    labels_BT = np.full((len(tokens_BL), slots), UNUSED, np.int64)
    positions_BT[row, slot] = position
    labels_BT[row, slot] = label = tokens_BL[row, position]
    action = words_BW[row, length + slot] / 2**32
    other = ordinary[words_BW[row, length + slots + slot].astype(np.uint64) * np.uint64(len(ordinary)) >> np.uint64(32)]
    tokens_BL[row, position] = np.where(action < 0.8, mask_id, np.where(action < 0.9, other, label))
    return tokens_BL, positions_BT, labels_BT
