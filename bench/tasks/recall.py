"""Associative recall: key-value pairs, then queries by key at other places, each to be answered with its value.

In the manner of multi-query associative recall (Arora et al. 2023, arXiv:2312.04927), without a causal order: answers
are read at the query and never stand in the sequence, so a mixer may look both ways.

Axes: B examples, L length, T queries, P pairs.
"""

from dataclasses import dataclass

import numpy as np

from bench import Refusal
from bench.tasks.base import Spec
from bench.tasks.generated import Generated


@dataclass(frozen=True)
class Args:
    """`gap` is a distance in tokens; everything else is a number of tokens, symbols or examples."""

    length: int
    pairs: int
    keys: int
    values: int
    queries: int
    gap: int
    held_out: int

    def __post_init__(self):
        for name in ("length", "pairs", "keys", "values", "queries", "gap", "held_out"):
            if getattr(self, name) < 1:
                raise Refusal(f"recall: {name} is {getattr(self, name)}, must be at least 1")
        for name in ("keys", "values"):
            if getattr(self, name) < self.pairs:
                raise Refusal(f"recall: pairs is {self.pairs}, must not exceed {name} ({getattr(self, name)})")
        if self.queries > self.pairs:
            raise Refusal(f"recall: queries is {self.queries}, must not exceed pairs ({self.pairs})")
        needed = first_query(self.pairs, self.gap) + self.queries
        if self.length < needed:
            raise Refusal(f"recall: length is {self.length}, must be at least 2 * pairs - 1 + gap + queries = {needed}")


def first_query(pairs: int, gap: int) -> int:
    """First position that may hold a query: `gap` after the last pair's value, which stands at 2 * pairs - 1."""
    return 2 * pairs - 1 + gap


class Recall(Generated):
    """One example: k_1 v_1 k_2 v_2 ... k_P v_P, then filler, in which `queries` of the keys occur again.

    Keys differ within an example, and so do values; which value goes with which key is drawn anew each time. The
    queried keys are distinct, in random order, at random places from position 2 P - 1 + gap on. So a query is at least
    `gap` tokens from the value it asks for (and `gap` + 1 from the key), whichever pair that is. A stack of n
    convolutions of width w, centred, sees n (w - 1) / 2 tokens either way: with a larger gap it can do no better than
    chance, and the mixer has to carry the answer.

    Ids: 0 filler, 1 .. keys the keys, keys + 1 .. keys + values the values. The label is the number of the value, 0 ..
    values - 1. Chance: accuracy 1 / values; 1 / pairs for a model that knows which values occur but not their keys.
    """

    Args = Args

    def spec(self) -> Spec:
        args = self.args
        return Spec(
            kind="tokens",
            symbols=1 + args.keys + args.values,
            types=0,
            length=args.length,
            outputs=args.values,
            pooled=False,
            tied=False,
            packed=False,
            group=1,
        )

    def words(self, tokens: np.ndarray) -> list[str]:
        """k1, k2, ... for the keys, v1, v2, ... for the values, a dot for filler."""
        keys = self.args.keys
        return ["·" if t == 0 else f"k{t}" if t <= keys else f"v{t - keys}" for t in tokens.tolist()]

    def draw(self, rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        args = self.args
        keys_BP = 1 + distinct(rng, size, args.keys, args.pairs)
        values_BP = distinct(rng, size, args.values, args.pairs)
        asked_BT = distinct(rng, size, args.pairs, args.queries)
        start = first_query(args.pairs, args.gap)
        positions_BT = start + np.sort(distinct(rng, size, args.length - start, args.queries), axis=1)

        tokens_BL = np.zeros((size, args.length), dtype=np.int64)
        tokens_BL[:, 0 : 2 * args.pairs : 2] = keys_BP
        tokens_BL[:, 1 : 2 * args.pairs : 2] = 1 + args.keys + values_BP
        np.put_along_axis(tokens_BL, positions_BT, np.take_along_axis(keys_BP, asked_BT, axis=1), axis=1)
        return tokens_BL, positions_BT, np.take_along_axis(values_BP, asked_BT, axis=1)


def distinct(rng: np.random.Generator, size: int, n: int, k: int) -> np.ndarray:
    """`size` rows of k different numbers below n, in random order (int64): where the k smallest of n uniforms stand."""
    uniform = rng.random((size, n))
    smallest = np.argpartition(uniform, k - 1, axis=1)[:, :k]
    rank = np.argsort(np.take_along_axis(uniform, smallest, axis=1), axis=1)
    return np.take_along_axis(smallest, rank, axis=1).astype(np.int64)
