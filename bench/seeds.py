"""Random streams. Every draw is a pure function of (seed, replica, purpose, index or name).

So a batch, a mask or a parameter does not depend on what was drawn before it, on the rank, on a resume,
or on which mixer is in the model. All draws happen on the host.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

LARGE = 2**25
ROUNDS = 8


@dataclass(frozen=True)
class Streams:
    """The streams of one run. `replica` is 0 for a pretraining, the repeat's number for a fine-tuning."""

    seed: int
    replica: int

    def key(self, purpose: str) -> int:
        """128 bits that name the stream (seed, replica, purpose)."""
        text = f"{self.seed}/{self.replica}/{purpose}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")

    def torch_seed(self, purpose: str) -> int:
        """A 63-bit seed for a torch generator of the stream."""
        return self.key(purpose) & (2**63 - 1)

    def draw(self, purpose: str, index: int) -> np.random.Generator:
        """The generator of item `index` of a stream: Philox4x64, key the stream, the counter's high words the index."""
        return np.random.Generator(np.random.Philox(key=self.key(purpose), counter=int(index) << 128))

    def order(self, start: int, count: int, n: int) -> np.ndarray:
        """Items at positions start .. start+count-1 of the endless training order over n items (int64).

        Each epoch is one permutation of all items; a batch may span two epochs, so every batch is full. Above LARGE
        items the permutation is computed at the places asked for, as a list of it would take gigabytes a process.
        """
        parts = []
        while count > 0:
            epoch, offset = divmod(start, n)
            take = min(count, n - offset)
            if n > LARGE:
                parts.append(_permuted(self.key(f"order {epoch}"), np.arange(offset, offset + take), n))
            else:
                parts.append(_permutation(self, epoch, n)[offset : offset + take])
            start, count = start + take, count - take
        return np.concatenate(parts).astype(np.int64)


@lru_cache(maxsize=2)
def _permutation(streams: Streams, epoch: int, n: int) -> np.ndarray:
    return streams.draw("order", epoch).permutation(np.arange(n, dtype=np.uint32 if n < 2**32 else np.uint64))


def _permuted(key: int, at: np.ndarray, n: int) -> np.ndarray:
    """Where a pseudo-random permutation of 0 .. n - 1 takes the places `at`.

    A Feistel network over the next even power of two (each round mixes one half into the other, so it is a
    permutation whatever the mixing), repeated for what falls outside until it falls inside.
    """
    half = np.uint64(-(-(n - 1).bit_length() // 2))
    mask = np.uint64((1 << int(half)) - 1)
    digest = hashlib.blake2b(key.to_bytes(16, "little"), digest_size=8 * ROUNDS).digest()
    x, todo = at.astype(np.uint64), np.ones(len(at), bool)
    while todo.any():
        left, right = x[todo] >> half, x[todo] & mask
        for round_key in np.frombuffer(digest, np.uint64):
            left, right = right, left ^ (_scrambled(right ^ round_key) & mask)
        x[todo] = left << half | right
        todo[todo] = x[todo] >= n
    return x


def _scrambled(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64; products wrap around."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)
