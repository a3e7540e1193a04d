"""Which tokens of a row are hidden, and what is shown instead.

Axes: B rows, L length, T masked positions of a row (fixed capacity), C ids, W random words of a row.
"""

import numpy as np

from bench.seeds import Streams
from bench.tasks.text import ranges

UNUSED = -100  # label of a position that is not masked


def capacity(length: int, rate: float) -> int:
    """T: no row of `length` tokens has more masked positions."""
    return max(1, int(np.rint(rate * length)))


def words(streams: Streams, purpose: str, first: int, rows: int, length: int, rate: float) -> np.ndarray:
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
