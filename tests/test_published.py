"""The paper's numbers: complete, true to its printed averages, and shown without a claim that they cannot bear."""

import json
from dataclasses import replace

import numpy as np
import pytest

from bench.compose import ROOT
from bench.config import resolved
from bench.report import analysis, orders, published, suite
from bench.report.frame import Row, controlled
from bench.report.published import numbers
from bench.sweep import Column, Family, cells, load
from tests.test_report import a_record, a_row, a_sweep

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


def as_records(arms: list[tuple[str, str, str]], seeds=(0,), twice: str = ""):
    """Table 2's rows as records: one run an arm and task, metrics as fractions; MRPC and QQP are printed as means.

    `twice`: mixer whose arms are there with three heads, too.
    """
    rows = []
    for number, subset in enumerate(suite.SCORES):
        for row, mixer, sam, heads in [(*a, 2) for a in arms] + [(*a, 3) for a in arms if a[1] == twice]:
            for seed in seeds:
                changes = {"task": {"name": "glue", "subset": subset}, "budget.steps": 10 + number}
                one = a_row({"name": mixer, "sam": sam == "true", "heads": heads}, seed, 0.5, changes, label=subset)
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
    (odd,) = (n for n in agreement.notes if "not what they are called" in n)
    assert "dft (printed with" in odd and "vandermonde (as released" in odd and odd.count("(") == 2


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
    values = {(p.row, p.key): p.value for p in TABLE2}
    theirs = [published.printed(row, column, values) for row, *_ in ROWS]
    assert np.allclose(theirs, column.values_AS[:, 0])


def test_a_row_that_several_arms_are_stands_beside_none_and_is_counted_in_no_order():
    """Heads of one mixer are one published row: each of them counted, five heads of five mixers would be 25 arms."""
    table = as_records(ROWS, twice="attention")
    found = analysis.analyse(table, {})
    both, agreement = published.beside(table, found)
    assert [line[0] for line in both.lines] == [a.label for a in table.arms if a.mixer["name"] != "attention"]
    assert "Left out, as more than one arm here is this one row: Attention, Attention SAM." in both.notes
    assert {line[1] for line in agreement.lines} == {"12"}
    (groups,) = [s for s in orders.sections(table, found) if s.title.startswith(orders.TITLE)]
    assert {line[1].split("(")[1] for line in groups.lines} == {"10 arms)"}  # of the twelve two are broken
    only = as_records([row for row in ROWS if row[1] == "attention"], twice="attention")
    assert published.beside(only, analysis.analyse(only, {})) == []


ARMS = {
    "table3": ["Mamba", "Add", "Mult", "Concat", "Quasiseparable"],
    "table4": ["BERT", "MLP-Mixer", "FNet", "M2", "Hydra (23 layers)"],
    "table5": ["ViT-B", "S4-ViT-B", "Hyena-ViT-B", "Mamba-ViT-B", "Hydra-ViT-B"],
    "table10": ["Add", "Add + Diag", "Add + Shift", "Quasi (both)"],
}


def reported(name: str, own: list[str]):
    """Table and sections of a shipped sweep whose every run, of two seeds, got what the paper prints for its row."""
    sweep = replace(load(ROOT / "sweeps" / f"{name}.yaml"), seeds=(0, 1), replicas=(0,))
    known = {(p.row, p.key): p for p in numbers() if p.table == name.removeprefix("table")}
    places = {arm: place for place, arm in enumerate(dict.fromkeys(str(cell.arm) for cell in cells(sweep)))}
    rows = []
    for cell in cells(sweep):
        task, row = cell.run.protocol.task, own[places[str(cell.arm)]]
        subset = task.args.get("subset", "")
        keys = {
            m: f"glue.{subset}" if subset else f"{task.name}.{m}"
            for m in METRICS.get(task.name) or suite.SCORES[subset]
        }
        found = {m: known.get((row, key), known.get((row, "glue"))) for m, key in keys.items()}
        metrics = {m: 0.5 if p is None else p.value / (1 if p.unit == "nats" else 100) for m, p in found.items()}
        record = a_record(json.loads(json.dumps(resolved(cell.run))), {"loss": 1.0} | metrics, label=cell.protocol)
        rows.append(Row(cell.protocol, record.run["mixer"], cell.seed, cell.replica, record.id, record))
    table = controlled(rows, sweep)
    return table, published.beside(table, analysis.analyse(table, {}))


METRICS = {"masked_lm": ("loss", "accuracy"), "images": ("top1", "ema_top1", "top5", "ema_top5")}


@pytest.mark.parametrize("name", ARMS)
def test_each_arm_of_a_sweep_of_the_paper_stands_beside_its_own_row_and_beside_no_other_table(name):
    table, shown = reported(name, ARMS[name])
    number = name.removeprefix("table")
    assert [published.row_of(table, number, arm) for arm in table.arms] == ARMS[name]
    both, agreement = (s for s in shown if s.title.endswith(f"Table {number}"))
    assert len(both.lines) == len(ARMS[name])
    for line in both.lines:
        pairs = [(a, b) for a, b in zip(line[1::2], line[2::2], strict=True) if b != "-"]
        assert pairs and all(abs(float(a) - float(b)) < 0.11 for a, b in pairs), line
    assert agreement.lines[0][2] == "+1.00"
    named = [n for n in both.notes if n.startswith("Arms by their published names: ")]
    assert len(named) == (number in "45") and all(row in named[0] for row in ARMS[name] if named)
    assert any("five fine-tuning runs" in n for n in both.notes) == (number != "5")
    beside = {s.title.split()[-1] for s in shown}
    assert beside - {number} <= {"3": {"10"}, "10": {"3"}}.get(number, set())  # two arms are in both


def test_an_arm_in_another_shell_is_not_the_row_that_has_its_mixer():
    """Attention in the block of Table 2 is not BERT, and BERT is not attention in the block of Table 2."""
    table, _ = reported("table4", ARMS["table4"])
    assert [published.row_of(table, "2", arm) for arm in table.arms] == ["", "", "", "", "Quasisep. SAM"]
    small = as_records(ROWS)
    assert {published.row_of(small, "4", arm) for arm in small.arms} == {"", "Hydra (23 layers)"}
