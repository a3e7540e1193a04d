"""Copying: at each position, say the symbol that stood a fixed number of tokens earlier.

One shift-invariant matrix with a single diagonal solves it, so it is a probe for data-independent mixers, where
recall is one for sequence-aligned mixers.

Axes: B examples, L length, T = L - offset positions with an output.
"""

from dataclasses import dataclass

import numpy as np

from bench import Refusal
from bench.tasks.base import Spec
from bench.tasks.generated import Generated


@dataclass(frozen=True)
class Args:
    """`offset` is a distance in tokens, `held_out` a number of examples."""

    length: int
    symbols: int
    offset: int
    held_out: int

    def __post_init__(self):
        if self.symbols < 2:
            raise Refusal(f"copying: symbols is {self.symbols}, must be at least 2")
        if not 1 <= self.offset < self.length:
            raise Refusal(f"copying: offset is {self.offset}, must be at least 1 and less than length ({self.length})")
        if self.held_out < 1:
            raise Refusal(f"copying: held_out is {self.held_out}, must be at least 1")


class Copying(Generated):
    """Symbols are independent and uniform; the label at position t >= offset is the symbol at t - offset.

    No other token says anything about it: accuracy is 1 with the right token in view and 1 / symbols (chance) without.
    A stack of n convolutions of width w, centred, sees n (w - 1) / 2 tokens either way; choose a larger offset.
    """

    Args = Args

    def spec(self) -> Spec:
        args = self.args
        return Spec(
            kind="tokens",
            symbols=args.symbols,
            types=0,
            length=args.length,
            outputs=args.symbols,
            pooled=False,
            # Outputs are token ids, but a tied head would let the embedding alone decide how hard the task is.
            tied=False,
            packed=False,
            group=1,
        )

    def draw(self, rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        args = self.args
        tokens_BL = rng.integers(args.symbols, size=(size, args.length))
        positions_T = np.arange(args.offset, args.length)
        positions_BT = np.broadcast_to(positions_T, (size, len(positions_T)))
        return tokens_BL, positions_BT, tokens_BL[:, : args.length - args.offset]
