"""Costs, floors, spreads, items, edges and disk: figures that a reader takes as they stand. Fabricated records."""

import csv
import io
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest

from bench.merge import merge
from bench.plan.costs import Costs
from bench.plan.evidence import Ledger, append_pilot, known_pilots
from bench.plan.graph import nodes
from bench.report import analysis, cost, items, tables
from bench.report.suite import floor_of
from bench.report.tuning import edges_of
from bench.store import Store
from bench.sweep import Column, Family, grid, load, ordered
from bench.tune import Trial
from tests.test_plan import ONE, a_pilot, finish, planned, store
from tests.test_report import DENSE, LOW
from tests.test_report_items import glue_rows, outcomes, stored
from tests.test_report_statistics import a_table, noisy_rows
from tests.test_store import a_record, results_with, runs_of
from tests.test_sweep import a_sweep
from tests.test_tune import LR, a_tune, write

__all__ = ["store"]  # a fixture


# Cost ---------------------------------------------------------------------------------------------------------------


def costing(row, outcome: str = "ok", **changes):
    metrics = row.record.metrics if outcome == "ok" else {}
    changed = replace(row.record.cost, **changes)
    return replace(row, record=replace(row.record, cost=changed, outcome=outcome, metrics=metrics))


def test_training_is_what_is_left_of_a_run_beside_its_other_parts():
    (row,) = noisy_rows({}, 1, (DENSE,))
    spent = {"startup": 10.0, "first_step": 20.0, "evaluation": 30.0}
    (found,) = cost.parted(a_table([row]), [costing(row, wall=100.0, **spent)])
    assert found * 60 == pytest.approx([40, 10, 20, 30])
    (found,) = cost.parted(a_table([row]), [costing(row, wall=60.0, **spent)])
    assert found * 60 == pytest.approx([0, 10, 20, 30])


def test_step_and_memory_are_the_median_and_the_most_of_the_runs_that_came_out_ok():
    rows = noisy_rows({}, 3, (DENSE, LOW))
    changes = [
        {"step_p50": 0.001, "peak_memory": 1_000_000_000},
        {"step_p50": 0.003, "peak_memory": 2_000_000_000},
        {"step_p50": 9.0, "peak_memory": 50_000_000_000, "outcome": "diverged"},
    ]
    rows[:3] = [costing(row, **change) for row, change in zip(rows[:3], changes, strict=True)]
    rows[3:] = [costing(row, outcome="diverged") for row in rows[3:]]
    lines = {line[0]: line[-2:] for line in cost.section(a_table(rows)).lines}
    assert lines["dense"] == ["2.0", "2.00"] and lines["low_rank"] == ["-", "-"]


# Floors and averages ------------------------------------------------------------------------------------------------


def test_the_floor_of_f1_has_the_error_of_f1_and_not_of_the_rate():
    r, n = 0.3, 1000
    label = np.repeat([1, 0], [300, 700])
    floor = floor_of("f1", {"validation": label})
    assert floor.value == pytest.approx(2 * r / (1 + r))
    assert floor.error == pytest.approx(2 / (1 + r) ** 2 * np.sqrt(r * (1 - r) / n))
    draws = np.random.default_rng(0).binomial(n, r, 20_000) / n
    assert floor.error == pytest.approx((2 * draws / (1 + draws)).std(), rel=0.03)


def test_a_metric_that_names_no_part_has_no_floor_where_there_are_several():
    label = np.array([1, 1, 0])
    assert floor_of("accuracy", {"matched": label, "mismatched": 1 - label}) is None
    assert floor_of("ema_accuracy", {"validation": label}).value == pytest.approx(2 / 3)


def test_the_spread_of_an_average_is_the_sample_standard_deviation():
    table = a_table(noisy_rows({}, 3, (DENSE,)))
    average = SimpleNamespace(column=Column("GLUE", "average"), values_AS=np.array([[0.5, 0.6, 0.7]]))
    assert tables.average_texts(table, average) == {("dense", "GLUE", "average"): "0.600 ± 0.100"}


# Comparisons in full precision --------------------------------------------------------------------------------------


def test_every_column_of_the_comparisons_has_the_figure_that_it_is_named_for():
    columns = (Column("quick", "accuracy"), Column("quick", "loss"))
    table = a_table(noisy_rows({2: 0.507, 3: 0.51}, seeds=10), columns=columns)
    found = analysis.analyse(table, {})
    lines = list(csv.DictReader(io.StringIO(tables.comparisons_csv(table, found))))
    every = [(result, i) for result in found.results for i in range(len(result.found.pairs))]
    assert len(lines) == len(every) == 8  # three against the reference and one SAM, on two columns
    for line, (result, i) in zip(lines, every, strict=True):
        one = result.found
        expected = {
            "difference": one.difference_P.estimate,
            "low": one.difference_P.low,
            "high": one.difference_P.high,
            "p_t": one.p_P,
            "p_t_holm": one.adjusted_P,
            "p_t_bh": result.explored_P,
            "bca_low": result.bca_P.low,
            "bca_high": result.bca_P.high,
            "p_flip": one.flip_P,
            "p_flip_holm": one.flip_adjusted_P,
            "p_block_holm": one.pooled_adjusted_P,
        }
        if result.equivalence:
            expected["p_equivalent_holm"] = result.equivalence.p
        read = {name: float(line[name] or "nan") for name in expected}
        assert read == pytest.approx({name: values[i] for name, values in expected.items()}, nan_ok=True)
    for other in ("p_t_holm", "p_flip_holm"):
        assert any(line["p_block_holm"] != line[other] for line in lines)


# Items --------------------------------------------------------------------------------------------------------------


def flip_one(columns: dict) -> None:
    columns["label"] = columns["label"].copy()
    columns["label"][0] = 1 - columns["label"][0]


def test_checkpoints_that_were_judged_by_other_labels_are_not_set_side_by_side(tmp_path):
    rows = noisy_rows({}, 1)
    told = {r.run_id: {"validation": outcomes(i, 0.6)} for i, r in enumerate(rows)}
    table = a_table(rows)
    found = analysis.analyse(table, {})
    assert len(items.two_checkpoints(table, found, stored(tmp_path / "same", rows, told))) == 1
    flip_one(told[rows[0].run_id]["validation"])
    assert items.two_checkpoints(table, found, stored(tmp_path / "flipped", rows, told)) == []


def test_an_average_over_other_labels_has_no_hierarchical_bootstrap(tmp_path):
    rows, told = glue_rows(("sst2", "cola"), 2, {})
    columns = (Column("sst2", "loss"), Column("cola", "loss"))
    table = a_table(rows, columns=columns, family=Family({"name": "dense"}, ("reference",), columns[0], 0.0, 0.05))
    found = analysis.analyse(table, {})
    assert len(items.hierarchical(table, found, stored(tmp_path / "same", rows, told))) == 1
    flip_one(told[rows[0].run_id]["validation"])
    assert items.hierarchical(table, found, stored(tmp_path / "flipped", rows, told)) == []


def test_items_of_a_run_without_a_record_stay_where_they_are(tmp_path):
    other = results_with(tmp_path / "other", 0, 1)
    (Store(other).folder(a_record(1).id) / "record.json").unlink()
    assert merge([other], tmp_path / "x") == (1, 1)
    assert runs_of(tmp_path / "x" / "items.parquet") == [a_record(0).id]
    assert len(pq.read_table(tmp_path / "x" / "items.parquet")) == 2


# Edges of a tuning --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("won", "scale", "edges"),
    [
        (0.001, "log", ["optimiser.lr"]),
        (0.01, "log", []),
        (0.1, "log", ["optimiser.lr"]),
        (0.1, "choice", []),  # without an order there is no edge
    ],
)
def test_the_least_and_the_greatest_value_tried_are_edges(won, scale, edges):
    tried = [0.1, 0.001, 0.01]
    declared = a_tune(space=[LR | {"values": sorted(tried), "scale": scale}], trials=3)
    trials = [Trial(n, (), (), {"optimiser.lr": value}, 0.5) for n, value in enumerate(tried)]
    lost = Trial(3, (), ("missing",), {}, None)
    assert edges_of(declared, {"optimiser.lr": won}, [*trials, lost]) == edges
    assert edges_of(declared, {}, trials) == []  # nothing won


# Disk of a plan -----------------------------------------------------------------------------------------------------


def in_hand(made) -> float:
    """Bytes of the checkpoints beside what stays."""
    low, high = made.totals.disk_bytes
    return high - low


@pytest.mark.parametrize(("ema", "copies"), [(0.0, 3), (0.5, 4)])  # weights, two moments, their average
def test_a_checkpoint_holds_the_weights_two_moments_and_the_average_if_there_is_one(tmp_path, store, ema, copies):
    fields = ONE | {"seeds": [0, 1], "varies": {"optimiser.ema": [ema]}}
    record = finish(store, grid(a_sweep(tmp_path, **fields))[0])
    assert in_hand(planned(tmp_path, store, **fields)) == copies * 4 * record.capacity.parameters


def test_the_most_disk_has_the_largest_checkpoints_in_hand(tmp_path, store):
    both = {"mixers": [*ONE["mixers"], {"name": "dense", "heads": 2}], "seeds": [0]}
    for one, size in zip(grid(a_sweep(tmp_path, **both)), (3_000_000, 9_000_000), strict=True):
        append_pilot(store.root / "pilots.jsonl", a_pilot(one, checkpoint_bytes=size))
    assert [in_hand(planned(tmp_path, store, n, **both)) for n in (1, 2)] == [9_000_000, 12_000_000]


def of_one_mixer(folder) -> list:
    """Runs of a tuned sweep of two seeds: those of a kind share what they cost."""
    return ordered(grid(load(write(folder, mixers=[{"name": "identity", "heads": 2}], seeds=[0, 1]))))


def estimates(runs: list, store: Store) -> dict[str, tuple[str, float]]:
    """'trial' and 'selected' -> where the estimate comes from, and the bytes that one run leaves."""
    ledger = Ledger(store)
    found = nodes(runs, store, ledger, 2)
    costs = Costs(ledger, known_pilots(store.root), found, "")
    return {node.run.kind: (costs.of(node).source, costs.of(node).lasting_bytes) for node in found}


def test_a_trial_leaves_its_record_and_no_weights(tmp_path, store):
    runs = of_one_mixer(tmp_path)
    append_pilot(store.root / "pilots.jsonl", a_pilot(runs[-1]))
    assert estimates(runs, store) == {"trial": ("pilot", 2_000), "selected": ("pilot", 1_002_000)}
    sizes = {}
    for run in {run.kind: run for run in runs}.values():
        weights = 4 * finish(store, run).capacity.parameters
        sizes[run.kind] = (store.folder(run.id) / "record.json").stat().st_size
    assert estimates(runs, Store(store.root)) == {
        "trial": ("records", sizes["trial"]),
        "selected": ("records", weights + sizes["selected"]),
    }
