"""What tables say about noise: families, letters, failures, floors, averages, responses; LaTeX. Fabricated records."""

import csv
import io
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats

from bench.report import analysis, latex, published, suite, tables, terminal
from bench.report.frame import controlled
from bench.report.sections import sections
from bench.report.stats import FEW
from bench.report.suite import Floor, floor_of, score
from bench.report.verb import report
from bench.store import Store
from bench.sweep import Column, Family, load
from tests.test_report import ATTENTION, DENSE, LOW, LOW_SAM, SWEEP, a_row, a_sweep, fill, text_of

ARMS = (DENSE, LOW, LOW_SAM, ATTENTION)


def noisy_rows(means: dict[int, float], seeds: int, arms=ARMS, label="quick", noise=0.01, **changes) -> list:
    """`means`: of each arm by place, 0.5 where not given. Every seed moves all arms alike, ten times the noise."""
    draw = np.random.default_rng(7)
    block, own = draw.normal(0, 10 * noise, seeds), draw.normal(0, noise, (len(arms), seeds))
    value = np.array([means.get(i, 0.5) for i in range(len(arms))])[:, None] + block + own
    return [a_row(m, s, value[i, s], label=label, **changes) for i, m in enumerate(arms) for s in range(seeds)]


def a_table(rows: list, **changes):
    seeds = tuple(dict.fromkeys(r.seed for r in rows))
    return controlled(rows, a_sweep(seeds=seeds, **changes))


def section(table, title: str) -> dict[str, list[str]]:
    """First cell of each line -> the others."""
    found = sections(table, analysis.analyse(table, {}))
    (one,) = [s for s in found if s.title == title]
    return {line[0]: line[1:] for line in one.lines}


def test_a_difference_that_only_pairing_shows_is_found_and_equal_arms_are_not_called_different():
    table = a_table(noisy_rows({3: 0.55}, seeds=10))
    tested = section(table, "Tests against the reference on quick: accuracy")
    assert tested["attention SAM"][-1] == "differs" and tested["attention SAM"][-2] == "10 of 10 [0.69, 1.00]"
    assert {tested[arm][-1].split(",")[0] for arm in ("low_rank", "low_rank SAM")} == {"not separable"}
    found = analysis.analyse(table, {})
    assert found.measured[0].letters == ["b", "b", "b", "a"]
    assert next(r for r in tables.wide(table, found)[1] if r[0] == "attention")[2].endswith(" a")


def test_a_control_is_shown_and_stands_in_no_family():
    rows = noisy_rows({3: 0.55}, seeds=10)
    table = a_table(rows, controls=({"name": "attention"},))
    found = analysis.analyse(table, {})
    assert found.families == {"reference": [(1, 0), (2, 0)], "sam": [(2, 1)]}
    assert analysis.analyse(a_table(rows, controls=(LOW_SAM,)), {}).families == {"reference": [(1, 0), (3, 0)]}
    text = text_of(table, [])
    assert "A family of 2" in text and "Controls, shown and in no family: attention SAM." in text
    assert [line[0] for line in tables.wide(table, found)[1]].count("attention") == 1
    assert "Controls" not in text_of(a_table(rows), [])


def test_equivalence_is_claimed_within_the_declared_margin_only():
    table = a_table(noisy_rows({3: 0.55}, seeds=10))
    tested = section(table, "Tests against the reference on quick: accuracy")
    assert tested["low_rank"][-1].endswith("within ±0.02") and "within" not in tested["attention SAM"][-1]
    family = replace(table.sweep.family, margin=0.0001)
    narrow = section(
        replace(table, sweep=replace(table.sweep, family=family)), "Tests against the reference on quick: accuracy"
    )
    assert not [cells for cells in narrow.values() if "within" in cells[-1]]


def test_too_few_seeds_give_intervals_and_no_test_letter_or_mark():
    table = a_table(noisy_rows({3: 0.9}, seeds=5))
    found = analysis.analyse(table, {})
    assert {tuple(m.letters) for m in found.measured} == {("", "", "", "")}
    (cell,) = section(table, "Difference from dense")["attention SAM"]
    assert "[" in cell and "*" not in cell
    text = text_of(table, [])
    assert "smallest p that sign-flips of n = 5 can reach is 0.062, x 3 by Holm" in text and "Tests against" not in text
    lines = list(csv.DictReader(io.StringIO(tables.comparisons_csv(table, found))))
    assert {line["verdict"] for line in lines} == {FEW} and {line["tested"] for line in lines} == {"false"}


def test_only_the_primary_column_decides_and_others_are_marked_as_exploration():
    columns = (Column("quick", "accuracy"), Column("quick", "loss"))
    cells = section(a_table(noisy_rows({3: 0.55}, seeds=10), columns=columns), "Difference from dense")["attention SAM"]
    assert cells[0].endswith("]*") and cells[0].startswith("+0.05")
    assert cells[1].endswith("]°") and cells[1].startswith("-0.1")


def test_sam_is_compared_with_not_sam_of_the_same_mixer():
    table = a_table(noisy_rows({2: 0.6}, seeds=10))
    assert list(section(table, "SAM minus not SAM")) == ["low_rank SAM - low_rank"]
    wider = {**LOW_SAM, "heads": 4}  # the only two arms of the mixer are a pair though they differ in heads
    table = a_table(noisy_rows({}, seeds=2, arms=(DENSE, LOW, wider)))
    assert len(section(table, "SAM minus not SAM")) == 1
    table = a_table(noisy_rows({}, seeds=2, arms=(DENSE, LOW, LOW_SAM, wider)))
    assert list(section(table, "SAM minus not SAM")) == ["low_rank SAM, heads 2 - low_rank"]


def test_an_arm_with_failed_runs_has_no_interval_no_letter_and_the_last_rank():
    columns = (Column("quick", "accuracy"), Column("rough", "accuracy"))
    rows = noisy_rows({3: 0.9}, seeds=10) + noisy_rows({3: 0.9}, seeds=10, label="rough", changes={"task.patch": 4})
    rows = [
        a_row(r.mixer, r.seed, 0.9, {"task.patch": 4}, "diverged", "rough")
        if (r.protocol, r.mixer, r.seed) == ("rough", ATTENTION, 3)
        else r
        for r in rows
    ]
    table = a_table(rows, columns=columns)
    found = analysis.analyse(table, {})
    assert found.measured[1].letters[3] == "" and found.measured[0].letters[3] == "a"
    assert "1 of 10 failed (1 diverged)" in text_of(table, [])
    assert section(table, "Difference from dense")["attention SAM"][1] == "1 of 10 failed"
    assert section(table, "Over 2 tasks")["attention SAM"][0].startswith("2.50 ")  # first of four, last of four


def test_one_arm_and_one_seed_are_honest_tables():
    table = a_table(noisy_rows({}, seeds=3, arms=(DENSE,)))
    text = text_of(table, [])
    assert "One arm: there is nothing to compare." in text and "Difference" not in text
    one = text_of(a_table(noisy_rows({}, seeds=1)), [])
    assert "One seed: differences have no interval and nothing is tested." in one and " ± " not in one


def test_the_table_says_whether_its_family_was_declared_before_the_runs():
    rows = noisy_rows({}, seeds=2)
    sweep = a_sweep()
    marked = [replace(r, record=replace(r.record, registration=sweep.registration)) for r in rows]
    assert f"declared before the first run (`{sweep.registration}` in all 8 records)" in text_of(a_table(marked), [])
    assert "declared after the runs" in text_of(a_table(rows), [])
    assert "which 4 of 8 records carry" in text_of(a_table(marked[:4] + rows[4:]), [])


# Suites -------------------------------------------------------------------------------------------------------------


def glue_rows(seeds=2, subsets=("sst2", "mrpc"), value=None) -> list:
    rows = []
    for number, subset in enumerate(subsets):
        for row in noisy_rows({}, seeds, label=subset):
            changes = {"task": {"name": "glue", "subset": subset}, "budget.steps": 10 + number}
            one = a_row(row.mixer, row.seed, 0.5, changes, label=subset)
            metrics = {"accuracy": 0.8, "f1": 0.6, "matthews": 0.3, "loss": 1.0, "spearman": 0.7}
            metrics |= {"accuracy_matched": 0.5, "accuracy_mismatched": 0.7}
            rows.append(replace(one, record=replace(one.record, metrics=metrics)))
    return rows


def glue_sweep(subsets, metric="loss") -> dict:
    columns = tuple(Column(s, metric) for s in subsets)
    return {"columns": columns, "family": Family({"name": "dense"}, ("reference",), columns[0], 0.0, 0.05)}


def test_glue_is_averaged_as_the_paper_does():
    every = tuple(suite.SCORES)
    table = a_table(glue_rows(subsets=every), **glue_sweep(every))
    average = suite.glue_average(table, [])
    expected = np.mean([0.6, 0.8, 0.7, 0.8, 0.8, 0.7, 0.3, 0.7])  # mnli qnli qqp rte sst2 mrpc cola stsb
    assert average.column == Column("GLUE", "average") and average.values_AS == pytest.approx(expected)
    assert score("mrpc", {"accuracy": 0.9, "f1": 0.7}) == pytest.approx(0.8)
    part = suite.glue_average(a_table(glue_rows(subsets=every[:3]), **glue_sweep(every[:3])), [])
    assert part.column.metric == "average_of_3_of_8_tasks" and "not to be compared" in part.note
    assert suite.glue_average(a_table(glue_rows(subsets=every[:1]), **glue_sweep(every[:1])), []) is None


def test_a_task_at_its_floor_is_named_and_enters_no_average():
    names = ("mnli", "sst2", "mrpc")
    table = a_table(glue_rows(seeds=3, subsets=names), **glue_sweep(names, "accuracy"))
    columns = {c: Floor(0.79 if c.protocol == "mrpc" else 0.2, 0.02) for c in table.columns}
    found = analysis.analyse(table, columns)
    assert [m.at_floor for m in found.measured] == [False, False, True, False]
    assert found.average.tasks == ["mnli", "sst2"] and found.average.values_AS == pytest.approx((0.6 + 0.8) / 2)
    text = tables.markdown(table, found, sections(table, found), [])
    assert "mrpc: accuracy (at floor)" in text and "left out, at floor: mrpc" in text
    assert found.overall.tasks == 2
    titles = [column.title for column in published.ours(table, found)]
    assert titles == ["mnli score", "sst2 score", "mrpc score (at floor)", "GLUE average of mnli, sst2"]


def test_floors_are_of_the_reported_labels():
    label = np.array([1] * 60 + [0] * 40)
    assert floor_of("accuracy", {"validation": label}) == Floor(0.6, pytest.approx(np.sqrt(0.24 / 100)))
    assert floor_of("f1", {"validation": label}).value == pytest.approx(0.75)  # precision 0.6, recall 1
    assert floor_of("matthews", {"validation": label}) == Floor(0.0, 0.1)
    assert floor_of("accuracy_matched", {"matched": label, "mismatched": 1 - label}).value == 0.6
    assert floor_of("loss", {"validation": label}) is None and floor_of("accuracy", {}) is None


def test_floors_read_the_items_of_the_store(tmp_path):
    sweep, store = fill(tmp_path)
    from bench.sweep import grid

    items = {"held_out": {"item": list(range(10)), "label": [1] * 7 + [0] * 3}}
    for run in grid(sweep):
        record = store.record(run.id)
        shutil.rmtree(store.folder(run.id))
        Store(store.root).finish(record, items)
    from bench.report import frame

    table = controlled(frame.rows(sweep, Store(store.root)), sweep)
    assert suite.floors(table, store)[sweep.columns[0]].value == pytest.approx(0.7)
    assert "(at floor)" in report(sweep, store, tmp_path / "out", None)[0].read_text()


# Responses ----------------------------------------------------------------------------------------------------------


def test_an_axis_becomes_rows_and_a_varied_key_too():
    arms = tuple({**m, "rank": r} for m in (LOW, LOW_SAM) for r in (4, 8))
    family = replace(a_sweep().family, reference={}, comparisons=("sam",))
    table = a_table(noisy_rows({0: 0.1}, seeds=2, arms=arms, noise=1e-6), family=family)
    ranks = section(table, "quick: accuracy by rank")
    assert list(ranks) == ["4", "8"] and ranks["4"][0].startswith("0.100 ±") and ranks["8"][0].startswith("0.500 ±")
    label = "quick[task.patch={}]".format
    rows = [r for n in (1, 4) for r in noisy_rows({}, 2, label=label(n), changes={"task.patch": n})]
    column = Column(label(4), "accuracy")
    family = replace(family, primary=column)
    table = a_table(rows, varies={"task.patch": [1, 4]}, columns=(Column("quick", "accuracy"),), family=family)
    assert list(section(table, "quick: accuracy by task.patch")) == ["1", "4"]


def test_a_change_along_a_key_is_paired_by_seed_and_starts_at_the_first_value_of_its_line():
    values = {(8, 0): 0.50, (8, 1): 0.70, (8, 2): 0.60, (4, 0): 0.40, (4, 1): 0.59, (4, 2): 0.52}
    rows = [a_row({**LOW_SAM, "rank": rank}, seed, value) for (rank, seed), value in values.items()]
    rows += [a_row({**LOW, "rank": 8}, seed, 0.1 + seed / 10) for seed in (0, 1, 2)]
    (line,) = section(a_table(rows), "quick: accuracy, its change along rank").items()
    after, before = ([values[rank, seed] for seed in (0, 1, 2)] for rank in (8, 4))
    mean, (low, high) = np.mean(np.subtract(after, before)), scipy.stats.ttest_rel(after, before).confidence_interval()
    assert line == ("8", [f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"])  # low rank without SAM has one rank: no line


# LaTeX, terminal ----------------------------------------------------------------------------------------------------


def test_cells_are_set_for_tex_and_no_character_breaks_it():
    assert latex.cell("0.508 ± 0.011 ab") == r"$0.508 \pm 0.011$\textsuperscript{ab}"
    assert latex.cell("+0.1 [-0.2, +0.3]*") == r"$+0.1^{*}\;[-0.2, +0.3]$"
    assert latex.cell("10,000") == "$10{,}000$"
    assert latex.escaped("50 % of a_b & {c} \\d") == r"50 \% of a\_b \& \{c\} \textbackslash{}d"


def test_a_table_wider_than_a_page_is_parted_with_its_arms_in_each_part():
    head, cells = ["arm", *(f"quick: number {i}" for i in range(30))], [["dense", *(f"{i}.125" for i in range(30))]]
    parts = latex.parted(head, cells, 1)
    assert (
        len(parts) > 1 and all(part[0] == 0 for part in parts) and [i for p in parts for i in p[1:]] == [*range(1, 31)]
    )
    text = latex.tabular("demo", "Wide", head, cells, 1, ["One note."])
    assert text.count("\\begin{table}") == len(parts) == text.count("dense") and text.count("One note.") == 1
    assert len(latex.parted(head[:4], [cells[0][:4]], 1)) == 1


@pytest.mark.tex
def test_the_page_compiles(tmp_path):
    hard = replace(a_sweep(), question="Is 50 % of a_b & {c} \\d < ~e^f > #1 $x$ ± °?")
    ranks = tuple({**m, "rank": r} for m in (LOW, LOW_SAM) for r in range(1, 15))
    label = "quick[task.patch={}]".format
    rows = [r for n in (1, 4) for r in noisy_rows({}, 2, ranks, label(n), changes={"task.patch": n})]
    family = replace(a_sweep().family, reference={}, comparisons=("sam",), primary=Column(label(4), "accuracy"))
    columns = (Column("quick", "accuracy"),)
    for folder, table in {
        "many": a_table(noisy_rows({3: 0.55}, 10)),
        "one": a_table(noisy_rows({}, 1, (DENSE,))),
        "wide": a_table(rows, varies={"task.patch": [1, 4]}, columns=columns, family=family),
    }.items():
        table = replace(table, sweep=replace(table.sweep, question=hard.question))
        found = analysis.analyse(table, {})
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "table.tex").write_text(latex.fragment(table, found, sections(table, found)))
        (tmp_path / folder / "page.tex").write_text(latex.PAGE)
        command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "page.tex"]
        done = subprocess.run(command, cwd=tmp_path / folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:]
        assert "Overfull" not in done.stdout


def test_the_terminal_shows_the_same_cells():
    from rich.console import Console

    table = a_table(noisy_rows({3: 0.55}, 10))
    found = analysis.analyse(table, {})
    console = Console(file=io.StringIO(), width=200, color_system=None)
    terminal.show(table, found, sections(table, found), console)
    shown = console.file.getvalue()
    for line in tables.wide(table, found)[1]:
        assert all(cell in shown for cell in line)
    assert "Difference from dense" in shown


# Broken input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (lambda text: text[: len(text) // 2], ["not a whole record"]),
        (lambda text: text.replace('"schema":1', '"schema":9'), ["schema 9", "reads: 1"]),
        (lambda text: text.replace('"accuracy":0.', '"accuracy":NaN,"x":0.'), ["accuracy", "finite"]),
        (lambda text: "", ["not a whole record"]),
    ],
)
def test_a_damaged_record_is_one_line_and_nothing_is_written(tmp_path, damage, parts):
    from bench import Refusal
    from bench.sweep import grid

    sweep, store = fill(tmp_path)
    path = store.folder(grid(sweep)[0].id) / "record.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(Refusal) as caught:
        report(sweep, Store(store.root), tmp_path / "out", None)
    assert "\n" not in str(caught.value) and all(part in str(caught.value) for part in [*parts, str(path)])
    assert not (tmp_path / "out").exists()


def test_a_missing_seed_is_a_note_and_an_empty_sweep_a_refusal(tmp_path):
    from bench import Refusal
    from bench.sweep import grid

    sweep, store = fill(tmp_path)
    (store.folder(grid(sweep)[-1].id) / "record.json").unlink()
    report(sweep, Store(store.root), tmp_path / "out", None)
    for name in ("table.md", "summary.md"):
        assert "- Left out: seed 1 (1 run missing)" in (tmp_path / "out" / name).read_text(), name
    for key in ("seeds", "mixers", "columns"):
        (tmp_path / "empty.yaml").write_text(SWEEP.replace(f"{key}:", f"{key}: []\nx{key}:"))
        with pytest.raises(Refusal):
            load(tmp_path / "empty.yaml")
