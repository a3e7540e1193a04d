"""Streams: pure functions of (seed, replica, purpose, index); the training order visits every item once an epoch."""

import subprocess
import sys

import numpy as np
import pytest

from bench.seeds import Streams


def test_every_epoch_visits_every_item_once_in_an_order_of_its_own():
    order = Streams(3, 0).order(0, 30, 10)
    epochs = order.reshape(3, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize(("start", "count"), [(0, 7), (7, 7), (8, 5), (9, 25), (100, 1)])
def test_the_order_is_the_same_wherever_one_starts_to_read(start, count):
    streams = Streams(0, 1)
    assert streams.order(start, count, 10).tolist() == streams.order(0, 200, 10)[start : start + count].tolist()


def test_streams_differ_by_seed_replica_purpose_and_index_and_nothing_else():
    def draw(seed, replica, purpose, index):
        return tuple(Streams(seed, replica).draw(purpose, index).integers(0, 2**63, 4))

    keys = [(s, r, p, i) for s in (0, 1) for r in (0, 1) for p in ("mask", "order") for i in (0, 1, 2**40)]
    assert len({draw(*key) for key in keys}) == len(keys)
    assert all(draw(*key) == draw(*key) for key in keys)
    # '1/10' and '11/0' must not meet.
    assert Streams(1, 10).key("x") != Streams(11, 0).key("x")


def test_neighbouring_items_never_share_numbers():
    """An item's numbers come from counters that no other item reaches, however many it draws."""
    first = set(Streams(0, 0).draw("x", 0).integers(0, 2**63, 10_000).tolist())
    assert not first & set(Streams(0, 0).draw("x", 1).integers(0, 2**63, 10_000).tolist())


def test_another_process_draws_the_same():
    figures = "s.draw('a', 9).integers(0, 2**62), s.torch_seed('p'), *s.order(4, 9, 6)"
    code = f"from bench.seeds import Streams; s = Streams(5, 2); print({figures})"
    there = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7"}
    )
    s = Streams(5, 2)
    assert there.stdout.split() == [
        str(v) for v in (s.draw("a", 9).integers(0, 2**62), s.torch_seed("p"), *s.order(4, 9, 6))
    ]


def test_draws_are_uniform_over_items():
    """The first number of many neighbouring items behaves like one stream (a counter that is badly mixed would not)."""
    values = np.array([Streams(0, 0).draw("u", i).random() for i in range(4000)])
    assert abs(values.mean() - 0.5) < 4 * np.sqrt(1 / 12 / 4000)
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 4 / np.sqrt(4000)
