"""`sam: misaligned`: features of another token of the same document, fixed by the seed, all else as with `sam: true`.

Axes: B batch, L length, K channels, n tokens of a document.
"""

import pytest
import torch

from bench.mixers.base import Features, misalign, sources

ROWS = torch.tensor(
    [[1] * 5 + [2] * 4 + [3] + [0] * 2, [1] * 12, [1] * 5 + [0] * 7, [1] * 4 + [2] * 5 + [0] * 3, [0] * 12]
)
SEED = 2**61 + 12345


def of_length(n: int, seed: int) -> list[int]:
    return sources(torch.ones(1, n, dtype=torch.int64), seed)[0].tolist()


@pytest.mark.parametrize("seed", [0, 1, SEED])
def test_sources_of_a_document_depend_on_its_length_and_the_seed_alone(seed):
    """Not on the padding after it, its row's other documents, its place in the row, or the row's length."""
    found = sources(ROWS, seed)
    for row, sources_L in zip(ROWS, found, strict=True):
        assert sources_L[row == 0].tolist() == torch.arange(12)[row == 0].tolist()
        for number in range(1, int(row.max()) + 1):
            (places,) = (row == number).nonzero(as_tuple=True)
            assert (sources_L[places] - places[0]).tolist() == of_length(len(places), seed)
    assert torch.equal(sources(ROWS[:, :9], seed)[0], found[0, :9])


@pytest.mark.parametrize("n", [1, 2, 3, 50, 3000])
def test_sources_are_one_cycle_so_that_no_token_keeps_its_own(n):
    source, at, seen = of_length(n, SEED), 0, []
    for _ in range(n):
        seen.append(at)
        at = source[at]
    assert at == 0 and sorted(seen) == list(range(n))


def test_sources_differ_between_seeds_and_leave_no_trace_of_the_order():
    """Each distance occurs as often as in a shuffled document, for neighbouring seeds as for others."""
    n, seeds = 16, 2000
    lags = torch.tensor([of_length(n, seed) for seed in range(seeds)]) - torch.arange(n)
    for lag in (-4, -2, -1, 1, 2, 4):
        expected = (n - abs(lag)) / (n * (n - 1))
        assert float((lags == lag).double().mean()) == pytest.approx(expected, rel=0.1)
    assert len({tuple(of_length(n, seed)) for seed in range(seeds)}) == seeds


def test_misalign_moves_every_kind_of_feature_alike():
    draw = torch.Generator().manual_seed(0)
    features = Features(*(torch.randn(len(ROWS), 12, k, generator=draw) for k in (3, 0, 2)))
    moved = misalign(features, ROWS, SEED)
    for x, y in zip(features, moved, strict=True):
        assert y.dtype == x.dtype and torch.equal(
            y, torch.stack([r[s] for r, s in zip(x, sources(ROWS, SEED), strict=True)])
        )
