"""A/A arms: the same mixer twice, with nothing but the draws of its own parameters salted, and a table that says so."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import Refusal, backbone
from bench.compose import make_run
from bench.config import resolved
from bench.report import analysis
from bench.sweep import Column, grid, load
from tests.conftest import built
from tests.test_report import ATTENTION, DENSE, LOW, LOW_SAM, a_sweep, text_of
from tests.test_report_statistics import a_table, noisy_rows, section

TWIN = {**LOW_SAM, "salt": 1}
ARMS = (DENSE, LOW, LOW_SAM, ATTENTION, TWIN)


def a_run(**changes):
    return make_run("quick_recall", "low_rank", {"mixer.sam": True, "mixer.heads": 2, **changes}, 0, 0)


def test_only_the_mixers_own_values_are_salted():
    plain, salted = (dict(built(a_run(**c))[0].named_parameters()) for c in ({}, {"mixer.salt": 1}))
    differing = {name for name in plain if not torch.equal(plain[name], salted[name])}
    assert differing and all(backbone.owned_by_mixer(name) for name in differing)
    shared = [name for name in plain if not backbone.owned_by_mixer(name)]
    assert shared and all(torch.equal(plain[name], salted[name]) for name in shared)


def test_a_salt_is_another_run_and_none_is_the_run_as_it_was():
    assert a_run().id == a_run(**{"mixer.salt": 0}).id != a_run(**{"mixer.salt": 1}).id
    assert "salt" not in resolved(a_run())["mixer"]
    assert a_run(**{"mixer.salt": 1}).id != a_run(**{"mixer.salt": 2}).id
    with pytest.raises(Refusal, match=r"mixer\.salt must be at least 0"):
        a_run(**{"mixer.salt": -1})
    with pytest.raises(Refusal, match=r"mixer\.salt must be of type int"):
        a_run(**{"mixer.salt": "a"})


def test_a_sweep_takes_an_a_a_arm_which_is_never_the_reference(tmp_path):
    (tmp_path / "twice.yaml").write_text("""
question: Is it noise?
protocols: [quick_recall]
mixers: [{name: low_rank, sam: true, heads: 2, salt: [0, 1]}, {name: dense, heads: 2}]
seeds: [0]
replicas: [0]
varies: {}
departures: []
columns: [{protocol: quick_recall, metric: accuracy}]
family:
  reference: {name: low_rank}
  comparisons: [reference]
  primary: {protocol: quick_recall, metric: accuracy}
  margin: 0
  alpha: 0.05
""")
    runs = grid(load(Path(tmp_path / "twice.yaml")))
    assert [r.mixer.args.get("salt", 0) for r in runs] == [0, 1, 0]
    assert runs[0].id == a_run().id


def test_a_trained_twin_shares_batches_and_shared_values_and_ends_elsewhere(where):
    from bench.run import execute

    short = {"protocol.budget.steps": 2, "protocol.budget.batch": 4, "protocol.task.held_out": 8}
    one, two = (execute(a_run(**short, **c), where, lambda: False) for c in ({}, {"mixer.salt": 1}))
    assert one.hashes == two.hashes and one.capacity == two.capacity
    assert one.metrics["loss"] != two.metrics["loss"]


def test_the_twin_is_compared_with_its_own_arm_and_stands_in_no_declared_family():
    table = a_table(noisy_rows({}, seeds=10, arms=ARMS))
    assert list(section(table, "Difference from dense")) == ["low_rank", "low_rank SAM", "attention SAM"]
    title = "A/A: the same mixer with other initial values"
    assert list(section(table, title)) == ["low_rank SAM, A/A 1 - low_rank SAM"]
    text = text_of(table, [])
    assert "low_rank (A/A 1)" in text and "nothing came out different" in text
    found = analysis.analyse(table, {})
    assert found.measured[0].letters[-1] == "" and not found.flagged()


def test_a_twin_that_comes_out_different_is_flagged_in_the_wide_tables_notes():
    table = a_table(noisy_rows({4: 0.7}, seeds=10, arms=ARMS))
    text = text_of(table, []).split("\n## ")[0]
    assert "WARNING: the A/A arm low_rank SAM, A/A 1 came out different on quick: accuracy" in text


def test_equal_twins_are_flagged_at_the_nominal_rate():
    """200 tables without any effect: 10 of them are expected, 21 or more have a chance of 0.1 %."""
    draw, flagged = np.random.default_rng(3), 0
    columns = (Column("quick", "accuracy"), Column("quick", "loss"))
    table = a_table(noisy_rows({}, seeds=8, arms=(DENSE, {**DENSE, "salt": 1})), columns=columns)
    found = analysis.analyse(table, {})
    for _ in range(200):
        measured = [analysis.measure(c, draw.normal(size=(2, 8)), [0], 0.05, False) for c in columns]
        results = [analysis.result(table, "a_a", m, [(1, 0)]) for m in measured]
        flagged += bool(dataclasses.replace(found, results=results).flagged())
    assert 2 <= flagged <= 20


def test_the_family_hash_covers_the_salt():
    one, two = ({"name": "low_rank", "salt": s} for s in (0, 1))
    assert dataclasses.replace(a_sweep(), mixers=(one,)).registration != a_sweep(mixers=(two,)).registration
