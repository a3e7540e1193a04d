"""The strict build of a dataclass from plain values: no key may be left over, none may be left out."""

import dataclasses

import pytest

from bench import Refusal
from bench.compose import make_run
from bench.config import Budget, Protocol, build


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 1, "batch": 1, "stepz": 1}, "unknown key 'protocol.budget.stepz'; allowed: steps, batch"),
        ({"steps": 1}, "missing key 'protocol.budget.batch'; protocol.budget needs: steps, batch"),
        ([1, 2], "protocol.budget must be a mapping with the keys steps, batch"),
    ],
)
def test_a_key_too_many_or_too_few_is_refused(values, message):
    with pytest.raises(Refusal) as caught:
        build(Budget, values, "protocol.budget")
    assert str(caught.value) == message
    protocol = dataclasses.asdict(make_run("quick_digits", "dense", {}, 0, 0).protocol)
    with pytest.raises(Refusal, match=r"protocol\.budget"):
        build(Protocol, protocol | {"budget": values}, "protocol")
