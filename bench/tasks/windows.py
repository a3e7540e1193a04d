"""The same held-out tokens in rows of several lengths, so that only the context that a row shows differs.

A window is N successive tokens of a document, what fills one row of the longest length; a document has as many as fit,
from its start. It is masked as a whole and then cut into pieces of L - 2 tokens, the last one of the rest; a row is
[CLS] piece [SEP], padded. So every length scores the same tokens at the same places of the same documents.
Axes: W windows, N tokens of one, P pieces of one, B rows, L length, T masked positions of a window, S of a row.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from bench.tasks.base import Batch
from bench.tasks.masking import UNUSED
from bench.tasks.rows import Rows
from bench.tasks.text import WordPiece, ranges


def whole_windows(parts: list[Rows], count: int) -> np.ndarray:
    """WN: all windows of `count` tokens, document after document."""
    found = []
    for part in parts:
        windows_D = np.diff(part.documents) // count
        number_W = ranges(np.zeros_like(windows_D), windows_D)
        start_W = np.repeat(np.asarray(part.documents[:-1]), windows_D) + number_W * count
        found.append(np.asarray(part.tokens[start_W[:, None] + np.arange(count)], np.int64))
    return np.concatenate(found)


class Windows(NamedTuple):
    """Masked; a slot that is not used has label UNUSED."""

    tokens_WN: np.ndarray
    positions_WT: np.ndarray
    labels_WT: np.ndarray

    def batches(self, length: int, size: int, pieces: WordPiece) -> Iterator[Batch]:
        """Rows of `length`, window after window, `size` at a time."""
        rows = self.cut(length, pieces)
        for first in range(0, len(rows["tokens"]), size):
            yield {name: torch.from_numpy(values[first : first + size]) for name, values in rows.items()}

    def cut(self, length: int, pieces: WordPiece) -> dict[str, np.ndarray]:
        windows, count = self.tokens_WN.shape
        most = length - 2
        start_P = np.arange(0, count, most)
        count_P = np.minimum(most, count - start_P)
        tokens_WPL = np.full((windows, len(start_P), length), pieces.pad, np.int64)
        inside = np.full((windows, len(start_P) * most), pieces.pad, np.int64)
        inside[:, :count] = self.tokens_WN
        tokens_WPL[:, :, 1:-1] = inside.reshape(windows, -1, most)
        tokens_WPL[:, :, 0] = pieces.cls
        tokens_WPL[:, np.arange(len(start_P)), count_P + 1] = pieces.sep
        segments_PL = (np.arange(length) < count_P[:, None] + 2).astype(np.int64)
        tokens_BL = tokens_WPL.reshape(-1, length)
        positions_BS, labels_BS = self.targets(most, len(start_P))
        return {
            "tokens": tokens_BL,
            "segments": np.tile(segments_PL, (windows, 1)),
            "types": np.zeros_like(tokens_BL),
            "positions": positions_BS,
            "labels": labels_BS,
            "items": np.arange(len(tokens_BL)),
        }

    def targets(self, most: int, pieces: int) -> tuple[np.ndarray, np.ndarray]:
        """(positions_BS, labels_BS) of the rows of windows that are cut after every `most` tokens."""
        window, slot = np.nonzero(self.labels_WT != UNUSED)
        piece, place = np.divmod(self.positions_WT[window, slot], most)
        row = window * pieces + piece
        count_B = np.bincount(row, minlength=len(self.tokens_WN) * pieces)
        own = ranges(np.zeros_like(count_B), count_B)
        positions_BS = np.zeros((len(count_B), count_B.max()), np.int64)
        labels_BS = np.full(positions_BS.shape, UNUSED, np.int64)
        positions_BS[row, own] = place + 1
        labels_BS[row, own] = self.labels_WT[window, slot]
        return positions_BS, labels_BS
