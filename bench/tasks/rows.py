"""Rows of masked language modelling: documents cut into pieces, pieces put into rows. Axes: B rows, L length."""

import itertools
from typing import NamedTuple

import numpy as np

from bench.tasks.text import WordPiece, ranges


class Rows(NamedTuple):
    """One split. Row r holds pieces first[r] .. first[r + 1] - 1; piece p is tokens[start[p] : start[p] + count[p]]."""

    tokens: np.ndarray
    start: np.ndarray
    count: np.ndarray
    first: np.ndarray
    documents: np.ndarray  # where each begins in tokens, and the end

    def __len__(self) -> int:
        return len(self.first) - 1


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
