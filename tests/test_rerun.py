"""Committed runs that are trained again: the same numbers pass, others do not, and it says what differs."""

import dataclasses

import pytest

from bench import Refusal
from bench.record import dump
from bench.run import execute
from bench.store import Store
from bench.sweep import grid, load
from benchmarks import rerun

SWEEP = """
question: Does it come again?
protocols: [quick_digits]
mixers:
  - {name: identity, heads: 2}
  - {name: low_rank, heads: 2, sam: [false, true]}
seeds: [3]
replicas: [0]
varies: {budget.steps: [4]}
departures: []
columns: [{protocol: quick_digits, metric: accuracy}, {protocol: quick_digits, metric: loss}]
family:
  reference: {}
  comparisons: [sam]
  primary: {protocol: "quick_digits[budget.steps=4]", metric: accuracy}
  margin: 0.0
  alpha: 0.05
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A sweep whose runs are committed."""
    from bench.compose import make_where

    folder = tmp_path_factory.mktemp("rerun")
    (folder / "once.yaml").write_text(SWEEP)
    where = make_where({"where.results": str(folder / "made"), "where.device": "cpu"})
    records = [execute(run, where, lambda: False) for run in grid(load(folder / "once.yaml"))]
    return folder, records


def again(folder, records, *words: str) -> int:
    """The exit status with these records committed."""
    home = folder / "results" / "once"
    home.mkdir(parents=True, exist_ok=True)
    (home / "records.jsonl").write_text("".join(dump(r) + "\n" for r in records))
    places = ["--into", str(folder / "again"), f"where.results={folder / 'results'}", "where.device=cpu"]
    return rerun.main([str(folder / "once.yaml"), "--tolerance", "1e-6", *words, *places])


def test_a_run_comes_again_and_one_that_does_not_is_named(trained, capsys):
    folder, records = trained
    labels = ("--arms", "identity", "low_rank SAM")
    assert again(folder, records, *labels) == 0
    out = capsys.readouterr().out
    assert out.count("accuracy: ") == out.count("loss: ") == 2 and "BEYOND" not in out and "code that" not in out
    assert len(list(Store(folder / "again").root.glob("runs/*/record.json"))) == 2
    other = dataclasses.replace(records[2], metrics={**records[2].metrics, "loss": 1.0})
    assert again(folder, [*records[:2], other], *labels) == 1
    assert "loss: 1 committed" in (out := capsys.readouterr().out) and out.count("BEYOND") == 1
    moved = dataclasses.replace(records[2].hashes, batches="other")
    new = dataclasses.replace(records[2].environment, torch="1.0")
    assert again(folder, [*records[:2], dataclasses.replace(records[2], hashes=moved, environment=new)], *labels) == 1
    out = capsys.readouterr().out
    assert "batches differ" in out and "torch: 1.0 then" in out


def test_arms_and_records_that_are_not_there_are_refused(trained):
    folder, records = trained
    with pytest.raises(Refusal, match="no arm 'dense'; the sweep has: identity, low_rank, low_rank SAM"):
        again(folder, records, "--arms", "dense")
    with pytest.raises(Refusal, match=r"low_rank SAM, .*seed 3: there is no record"):
        again(folder, records[:2], "--arms", "low_rank SAM")
