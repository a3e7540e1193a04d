"""The paper's numbers: complete, true to its printed averages, and shown without a claim that they cannot bear."""

from dataclasses import replace

import numpy as np
import pytest

from bench.report import analysis, published, suite
from bench.report.frame import controlled
from bench.report.published import numbers
from bench.sweep import Column, Family
from tests.test_report import a_row, a_sweep

TABLE2 = [p for p in numbers() if p.table == "2"]
ROWS = list(dict.fromkeys((p.row, p.mixer, p.sam) for p in TABLE2))


def value(row: str, key: str, table: str = "2") -> float:
    (found,) = [p.value for p in numbers() if (p.table, p.row, p.key) == (table, row, key)]
    return found


def test_every_table_is_there_in_full_with_its_source():
    shapes = {"2": (14, 12), "3": (5, 4), "4": (5, 12), "5": (5, 5), "7": (1, 12), "10": (4, 3)}
    for table, (rows, keys) in shapes.items():
        found = [p for p in numbers() if p.table == table]
        assert len(found) == rows * keys == len({(p.row, p.key) for p in found}), table
        assert {p.source for p in found} == {f"arXiv 2407.09941 (NeurIPS 2024), Table {table}"}
    assert value("Quasisep. SAM", "glue") == 79.7 and value("Quasiseparable", "masked_lm.loss", "3") == 1.66
    assert {p.unit for p in numbers()} == {"millions", "nats", "percent"}


def as_records(arms: list[tuple[str, str, str]], seeds=(0,)):
    """Table 2's rows as records: one run an arm and task, metrics as fractions; MRPC and QQP are printed as means."""
    rows = []
    for number, subset in enumerate(suite.SCORES):
        for row, mixer, sam in arms:
            for seed in seeds:
                changes = {"task": {"name": "glue", "subset": subset}, "budget.steps": 10 + number}
                one = a_row({"name": mixer, "sam": sam == "true", "heads": 2}, seed, 0.5, changes, label=subset)
                metrics = dict.fromkeys(suite.SCORES[subset], value(row, f"glue.{subset}") / 100) | {"loss": 1.0}
                rows.append(replace(one, record=replace(one.record, metrics=metrics)))
    columns = tuple(Column(s, "loss") for s in suite.SCORES)
    family = Family({}, (), columns[0], 0.0, 0.05)
    return controlled(rows, a_sweep(columns=columns, family=family, seeds=seeds))


def test_the_rows_of_table_2_as_records_give_its_printed_averages():
    found = analysis.analyse(as_records(ROWS), {})
    for (row, *_), values_S in zip(ROWS, found.average.values_AS, strict=True):
        assert 100 * values_S[0] == pytest.approx(value(row, "glue"), abs=0.07), row  # eight cells and a mean, rounded
    gains = {
        mixer: [100 * v[0] for (_, m, _), v in zip(ROWS, found.average.values_AS, strict=True) if m == mixer]
        for _, mixer, _ in ROWS
    }
    assert sum(len(v) == 2 and v[1] > v[0] for v in gains.values()) == 6  # SAM is ahead in each pair


def test_beside_the_published_stand_no_gap_no_interval_and_no_claim():
    table = as_records(ROWS)
    both, agreement = published.beside(table, analysis.analyse(table, {}))
    assert both.title == "Ours and the published, Table 2" and len(both.lines) == 14
    for line in both.lines:
        assert line[-2] == line[-1] or abs(float(line[-2]) - float(line[-1])) < 0.11  # the average, recomputed
    assert any("no standard deviation is printed anywhere" in n and "nor can it be said" in n for n in both.notes)
    assert any("backbone.layers 2 (published 12)" in n for n in both.notes)
    assert "-" not in "".join(h for h in both.head if "gap" in h or "difference" in h)
    taus = {line[0]: line[1:] for line in agreement.lines}
    assert all(tau == "+1.00" for _, tau, _ in list(taus.values())[:-1])
    assert taus["GLUE average"][0] == "14"


def test_orders_that_differ_have_an_interval_and_arms_that_the_paper_lacks_are_left_out():
    table = as_records(ROWS[:6])
    found = analysis.analyse(table, {})
    average = replace(found.average, values_AS=found.average.values_AS[[1, 0, 2, 3, 4, 5]])
    agreement = published.beside(table, replace(found, average=average))[1]
    _, arms, tau, interval = agreement.lines[-1]
    assert (
        (arms, tau) == ("6", "+0.87") and interval == "[+0.38, +0.98]" and "rough below ten arms" in agreement.notes[-1]
    )
    mine = tuple((row, "mine" if i else mixer, sam) for i, (row, mixer, sam) in enumerate(ROWS[:3]))
    table = as_records(list(mine)[:2])
    assert published.beside(table, analysis.analyse(table, {})) == []


def test_a_partial_average_is_compared_with_the_same_tasks():
    table = as_records(ROWS)
    found = analysis.analyse(table, {})
    average = suite.glue_average(table, ["cola"])
    column = published.ours(table, replace(found, average=average))[-1]
    assert len(column.keys) == 7 and "glue.cola" not in column.keys
    values = {(p.mixer, p.sam, p.key): p.value for p in TABLE2}
    theirs = [published.printed(arm, column, values) for arm in table.arms]
    assert np.allclose(theirs, column.values_AS[:, 0])
