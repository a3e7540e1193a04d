"""Items in a report: McNemar of two checkpoints, labelled as such; GLUE's average by the hierarchical bootstrap."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binomtest

from bench import Refusal
from bench.report import analysis, items, suite
from bench.store import Store
from bench.sweep import Column, Family
from tests.test_report import ATTENTION, DENSE, LOW, LOW_SAM, a_row
from tests.test_report_statistics import a_table, noisy_rows

ARMS = (DENSE, LOW, LOW_SAM, ATTENTION)
PARTS = {"mnli": ("matched", "mismatched")}


def stored(tmp_path, rows: list, columns: dict) -> Store:
    """A store with the rows' records and items: run -> part -> columns."""
    store = Store(tmp_path)
    for row in rows:
        store.finish(row.record, columns.get(row.run_id, {}))
    return Store(tmp_path)


def outcomes(seed: int, share: float, count=200) -> dict:
    draw = np.random.default_rng(seed)
    label = np.arange(count) % 2
    return {
        "item": np.arange(count),
        "label": label,
        "prediction": np.where(draw.random(count) < share, label, 1 - label),
    }


def test_mcnemar_counts_the_items_of_the_first_seed_and_speaks_of_checkpoints_only(tmp_path):
    rows = noisy_rows({}, 3)
    told = {r.run_id: {"validation": outcomes(i, 0.6 + 0.1 * (r.mixer == ATTENTION))} for i, r in enumerate(rows)}
    table, store = a_table(rows), stored(tmp_path, rows, told)
    (found,) = items.two_checkpoints(table, analysis.analyse(table, {}), store)
    assert found.title == "Items of two checkpoints on quick: accuracy"
    assert "these two checkpoints (seed 0), not about their mixers" in found.notes[0]
    lines = {line[0]: line[1:] for line in found.lines}
    assert list(lines) == [
        *(f"{a} - dense" for a in ("low_rank", "low_rank SAM", "attention SAM")),
        "low_rank SAM - low_rank",
    ]
    right = {r.mixer["name"] + str(r.mixer["sam"]): told[r.run_id]["validation"] for r in rows if r.seed == 0}
    one, other = (right[k]["label"] == right[k]["prediction"] for k in ("attentionTrue", "denseFalse"))
    b, c = int((one & ~other).sum()), int((other & ~one).sum())
    assert lines["attention SAM - dense"][:3] == [str(b), str(c), "200"]
    p = binomtest(b, b + c).pvalue
    assert lines["attention SAM - dense"][3] == ("< 0.001" if p < 0.001 else f"{p:.3f}")


def test_without_items_or_with_other_items_nothing_is_said_of_them(tmp_path):
    rows = noisy_rows({}, 2)
    table = a_table(rows)
    found = analysis.analyse(table, {})
    assert items.sections(table, found, stored(tmp_path / "none", rows, {})) == []
    told = {r.run_id: {"validation": outcomes(i, 0.6)} for i, r in enumerate(rows)}
    first = next(r.run_id for r in rows if r.seed == 0)
    told[first]["validation"] |= {"item": np.arange(200) + 1}
    assert items.sections(table, found, stored(tmp_path / "other", rows, told)) == []


def test_damaged_items_are_one_line(tmp_path):
    rows = noisy_rows({}, 2)
    told = {r.run_id: {"validation": outcomes(i, 0.6)} for i, r in enumerate(rows)}
    table, store = a_table(rows), stored(tmp_path, rows, told)
    path = store.folder(rows[0].run_id) / "items.parquet"
    path.write_bytes(path.read_bytes()[:-40])
    for read in (lambda: items.sections(table, analysis.analyse(table, {}), store), lambda: suite.floors(table, store)):
        with pytest.raises(Refusal, match="not a whole table of items") as caught:
            read()
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def glue_rows(subsets, seeds: int, shares: dict[str, float]):
    """(rows, their items): metrics are those of the items; STS-B has none."""
    rows, told = [], {}
    for number, subset in enumerate(subsets):
        for arm, mixer in enumerate(ARMS):
            for seed in range(seeds):
                changes = {"task": {"name": "glue", "subset": subset}, "budget.steps": 10 + number}
                row = a_row(mixer, seed, 0.5, changes, label=subset)
                share = shares.get(mixer["name"], 0.7) + 0.02 * seed
                parts = {p: outcomes(100 * arm + 10 * seed + number, share) for p in PARTS.get(subset, ("validation",))}
                metrics = {"loss": 1.0, "spearman": share} | scores(parts)
                rows.append(replace(row, record=replace(row.record, metrics=metrics)))
                told[row.run_id] = {} if subset == "stsb" else parts
    return rows, told


def scores(parts: dict) -> dict[str, float]:
    from sklearn import metrics

    found = {}
    for part, columns in parts.items():
        label, prediction = columns["label"], columns["prediction"]
        suffix = f"_{part}" if len(parts) > 1 else ""
        found[f"accuracy{suffix}"] = float(np.mean(label == prediction))
        found |= {"f1": metrics.f1_score(label, prediction), "matthews": metrics.matthews_corrcoef(label, prediction)}
    return found


@pytest.mark.parametrize("reference", [True, False])
def test_the_hierarchical_bootstrap_has_the_tables_average_and_an_interval_around_it(tmp_path, reference):
    subsets = tuple(suite.SCORES)
    rows, told = glue_rows(subsets, 4, {"attention": 0.9})
    columns = tuple(Column(s, "loss") for s in subsets)
    family = Family({"name": "dense"} if reference else {}, ("reference",) if reference else (), columns[0], 0.0, 0.05)
    table = a_table(rows, columns=columns, family=family)
    found = analysis.analyse(table, {})
    (section,) = items.hierarchical(table, found, stored(tmp_path, rows, told))
    assert section.title == "Hierarchical bootstrap on GLUE: average" and "undercovers at this n" in section.notes[0]
    for line, values_S in zip(section.lines, found.average.values_AS, strict=True):
        mean, low, high = (float(x) for x in line[1].replace("[", "").replace("]", "").replace(",", "").split())
        assert mean == pytest.approx(values_S.mean(), abs=6e-4) and low < mean < high
    if reference:
        assert section.lines[0][2] == "-" and section.lines[3][2].startswith("+0.")
        assert float(section.lines[3][2].split("[")[1].split(",")[0]) > 0  # 0.2 better on every item


def test_an_arm_with_a_failed_run_has_no_hierarchical_interval_and_missing_items_give_none(tmp_path):
    subsets = ("sst2", "cola", "rte")
    rows, told = glue_rows(subsets, 2, {})
    bad = next(r for r in rows if r.mixer == LOW and r.protocol == "cola")
    lost = {k: v for k, v in told.items() if k != bad.run_id}
    columns = tuple(Column(s, "loss") for s in subsets)
    family = Family({"name": "dense"}, ("reference",), columns[0], 0.0, 0.05)
    table = a_table(rows, columns=columns, family=family)
    assert items.hierarchical(table, analysis.analyse(table, {}), stored(tmp_path / "lost", rows, lost)) == []
    failed = replace(bad, record=replace(bad.record, outcome="diverged", metrics={}))
    rows = [failed if r is bad else r for r in rows]
    table = a_table(rows, columns=columns, family=family)
    (section,) = items.hierarchical(table, analysis.analyse(table, {}), stored(tmp_path / "failed", rows, lost))
    assert section.lines[1] == ["low_rank", "failed runs", "failed runs"] and "[" in section.lines[2][1]
