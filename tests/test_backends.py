"""The benchmark of a mixer's backends: runs that are the same agree, one that went another way does not."""

import dataclasses
import json

import pytest

from bench import Refusal
from bench.compose import make_run
from bench.store import Store
from benchmarks import backends

WORDS = ["--protocol", "quick_recall", "--steps", "4", "--mixers", "low_rank", "--backends", "torch", "auto"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("backends")
    assert backends.main([*WORDS, "--out", str(out), "where.device=cpu"]) == 0  # on a CPU 'auto' is torch
    return out


def test_the_same_backend_under_two_names_agrees_bit_for_bit(made):
    (row,) = json.loads((made / "backends.json").read_text())
    assert row["agree"] and row["backends"]["curve"] == row["backends"]["loss"] == 0 < row["seeds"]["curve"]
    assert (made / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("change", ["curve", "metrics"])
def test_a_backend_that_is_as_far_as_another_seed_does_not_agree(made, change):
    changes = {"protocol.budget.steps": 4, "mixer.sam": True, "mixer.heads": 4}
    trained = {
        ("low_rank", backend, seed): Store(made / backend).record(
            make_run("quick_recall", "low_rank", changes, seed, 0).id
        )
        for backend in ("torch", "auto")
        for seed in (0, 1)
    }
    one = trained["low_rank", "auto", 0]
    values = {"curve": tuple((step, loss + 9) for step, loss in one.curve), "metrics": {**one.metrics, "loss": 9.0}}
    trained["low_rank", "auto", 0] = dataclasses.replace(one, **{change: values[change]})
    assert not backends.compared(trained, "low_rank", ["torch", "auto"], [0, 1])["agree"]


def test_the_protocol_may_be_changed_in_words(tmp_path):
    words = ["--seeds", "0", "1", "--out", str(tmp_path), "protocol.precision=bf16", "where.device=cpu"]
    assert backends.main([*WORDS, *words]) == 0
    records = [json.loads(path.read_text()) for path in tmp_path.glob("*/runs/*/record.json")]
    assert len(records) == 4 and {r["run"]["protocol"]["precision"] for r in records} == {"bf16"}


@pytest.mark.parametrize(("word", "given"), [("--seeds", ["3", "3"]), ("--backends", ["torch"])])
def test_one_alone_is_refused_before_anything_is_trained(tmp_path, word, given):
    with pytest.raises(Refusal, match=f"{word} needs two to compare, got {', '.join(given)}"):
        backends.main([*WORDS, word, *given, "--out", str(tmp_path / "out"), "where.device=cpu"])
    assert not (tmp_path / "out").exists()
