"""What a report says beside its tables: cost, protocols compared, orders in groups, the summary. Fabricated records."""

import re
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats as scipy_stats

from bench.config import MISALIGNED
from bench.record import dump
from bench.report import analysis, contrasts, cost, links, orders, sharing, start, summary
from bench.report.figures import contrasts as figure
from bench.report.published import numbers
from bench.report.sections import sections
from bench.store import Store
from bench.sweep import AGAINST, PARTS, SAM, Column, Departure
from tests.test_figures import drawn
from tests.test_report import ARMS, ATTENTION, DENSE, GOLDEN, LOW, LOW_SAM, a_sweep, text_of
from tests.test_report_statistics import a_table, noisy_rows

TWIN = {**ATTENTION, "salt": 1}
WIDE = {"backbone.width": 40}
BOTH = (Column("quick", "accuracy"), Column("rough", "accuracy"))


# Cost ---------------------------------------------------------------------------------------------------------------


def timed(row, begin: float, wall: float, node: str = "n", world: int = 1, card: str = ""):
    """A run at work from `begin` for `wall` seconds, of which 1 is start-up, 2 the first step, 3 evaluation."""
    seconds = int(begin + wall)
    finished = f"2026-01-01T00:{seconds // 60:02d}:{seconds % 60:02d}+00:00"
    times = replace(row.record.cost, wall=wall, startup=1.0, first_step=2.0, evaluation=3.0)
    where = replace(row.record.environment, node=node, world=world)
    return replace(row, record=replace(row.record, cost=times, finished=finished, environment=where, card=card))


def minutes(rows, others=()) -> dict[str, list[float]]:
    found = cost.section(replace(a_table(rows), beside=tuple(others)))
    return {line[0]: [float(text) for text in line[2:7]] for line in found.lines}


def test_runs_that_share_a_device_share_its_time_and_the_parts_add_up():
    dense, low = noisy_rows({}, 1, (DENSE, LOW))
    alone = minutes([timed(dense, 0, 60), timed(low, 60, 120)])
    assert alone["dense"][0] == 1 and alone["low_rank"][0] == 2 and alone["all"][0] == 3
    together = minutes([timed(dense, 0, 60), timed(low, 0, 120)])
    assert together["dense"][0] == 0.5 and together["low_rank"][0] == 1.5 and together["all"][0] == 2
    apart = minutes([timed(dense, 0, 60), timed(low, 0, 120, node="another")])
    assert apart["all"][0] == 3
    two_cards = [timed(dense, 0, 60, card="GPU-1"), timed(low, 0, 120, card="GPU-2")]
    assert minutes(two_cards)["all"][0] == 3
    assert minutes([timed(dense, 0, 60, world=2), timed(low, 60, 60)])["dense"][0] == 2
    for values in (*alone.values(), *together.values()):
        assert values[0] == pytest.approx(sum(values[1:]), abs=0.21)
    assert alone["all"][1:] == [2.8, 0.0, 0.1, 0.1]
    for begins, beside in (((0, 60), False), ((0, 30), True)):
        rows = [timed(row, begin, 60) for row, begin in zip((dense, low), begins, strict=True)]
        assert any("as it ran beside others" in note for note in cost.section(a_table(rows)).notes) == beside


def test_a_run_of_another_table_has_its_share_of_the_device_and_no_line(tmp_path):
    """Read from the whole results folder, runs and merged records alike; one that is damaged is left out."""
    two, three = (timed(row, 0, 60).record for row in noisy_rows({}, 2, (LOW,)))
    Store(tmp_path).finish(two, {})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "records.jsonl").write_text(dump(three) + "\n")
    (tmp_path / "runs" / ("0" * 12)).mkdir()
    (tmp_path / "runs" / ("0" * 12) / "record.json").write_text("{")
    others = cost.beside(Store(tmp_path))
    assert {r.id for r in others} == {two.id, three.id}
    (dense,) = noisy_rows({}, 1, (DENSE,))
    found = minutes([timed(dense, 0, 60)], others)
    assert found["dense"][0] == found["all"][0] == pytest.approx(1 / 3, abs=0.05) and set(found) == {"dense", "all"}


def test_a_failed_run_costs_what_it_ran():
    rows = [timed(r, 60 * i, 60) for i, r in enumerate(noisy_rows({}, 2, (DENSE, LOW)))]
    rows[3] = replace(rows[3], record=replace(rows[3].record, outcome="diverged", metrics={}))
    assert minutes(rows)["all"][0] == 4
    assert any("1 of 4 failed" in note for note in cost.section(a_table(rows)).notes)


def test_shares_are_a_sum_over_moments_by_brute_force():
    draw = np.random.default_rng(3)
    begin_R = draw.integers(0, 50, 20).astype(float)
    end_R = begin_R + draw.integers(1, 30, 20)
    expected_R = np.zeros(20)
    for second in range(80):
        here_R = (begin_R <= second) & (second < end_R)
        expected_R += here_R / max(here_R.sum(), 1)
    assert np.allclose(sharing.shared(begin_R, end_R), expected_R)


# Protocols compared -------------------------------------------------------------------------------------------------


def two_protocols(changes: dict, means: dict, other: dict):
    rows = noisy_rows(means, 6, ARMS) + noisy_rows(other, 6, ARMS, label="rough", changes=changes)
    return a_table(rows, columns=BOTH)


def test_a_change_of_the_protocol_is_shown_for_each_arm_and_each_declared_difference():
    table = two_protocols({"shell.conv_width": 0}, {0: 0.6, 3: 0.6}, {0: 0.5, 3: 0.8})
    (found,) = contrasts.sections(table, analysis.analyse(table, {}))
    assert found.title == "Protocols compared: rough less quick"
    cells = {line[0]: float(line[1].split()[0]) for line in found.lines}
    assert cells["dense"] == pytest.approx(-0.1, abs=0.03) and cells["attention SAM"] == pytest.approx(0.2, abs=0.03)
    assert cells["attention SAM - dense"] == pytest.approx(cells["attention SAM"] - cells["dense"], abs=0.0011)
    assert "low_rank SAM - low_rank" in cells
    assert any(note == "The protocols differ in shell.conv_width: 0 and 3." for note in found.notes)


def test_their_figure_has_the_differences_of_both_on_one_axis():
    table = two_protocols({"shell.conv_width": 0}, {0: 0.6, 3: 0.6}, {0: 0.5, 3: 0.8})
    found = analysis.analyse(table, {})
    (ax,) = drawn(table, figure)["protocols"].axes
    dots = [float(line.get_xdata()[0]) for line in ax.lines if line.get_marker() != "None"]
    results = [found.result(AGAINST, column) for column in BOTH]
    assert dots == [float(x) for result in results for x in result.found.difference_P.estimate]
    assert min(dots) > ax.get_xlim()[0] and max(dots) < ax.get_xlim()[1]


def test_protocols_of_two_tasks_and_variations_are_not_compared():
    table = two_protocols({"task.patch": 4}, {}, {})
    assert contrasts.sections(table, analysis.analyse(table, {})) == [] and not drawn(table, figure)
    table = two_protocols({"shell.conv_width": 0}, {}, {})
    varied = replace(table, sweep=replace(table.sweep, varies={"shell.conv_width": [3, 0]}))
    assert contrasts.sections(varied, analysis.analyse(table, {})) == [] and not drawn(varied, figure)


# Orders -------------------------------------------------------------------------------------------------------------

PRINTED = {(p.mixer, p.sam): p.value for p in numbers() if (p.table, p.key) == ("2", "masked_lm.loss")}


def of_table_2(losses: dict):
    arms = [{"name": mixer, "sam": sam == "true", "heads": 2} for mixer, sam in losses]
    rows = noisy_rows({}, 2, arms, label="text", changes={"task": {"name": "masked_lm"}})
    rows = [
        replace(r, record=replace(r.record, metrics={"loss": losses[r.mixer["name"], str(r.mixer["sam"]).lower()]}))
        for r in rows
    ]
    column = Column("text", "loss")
    return a_table(rows, columns=(column,), family=replace(a_sweep().family, primary=column))


def orders_of(losses: dict) -> tuple[list[str], list[str]]:
    table = of_table_2(losses)
    (found,) = orders.sections(table, analysis.analyse(table, {}))
    return found.lines[0], found.notes


def test_the_order_is_compared_within_the_groups_without_the_two_broken_rows():
    line, notes = orders_of(PRINTED)
    assert line == ["text loss", "+1.00 (12 arms)", "+1.00 (6 arms)", "+1.00 (6 arms)", "+0.48"]
    assert any("dft (printed with" in note and "vandermonde (as released it mixes no tokens)" in note for note in notes)
    reversed_inside = {arm: (0 if arm[1] == "true" else 10) - value for arm, value in PRINTED.items()}
    line, _ = orders_of(reversed_inside)
    assert line[2:4] == ["-1.00 (6 arms)", "-1.00 (6 arms)"]


def test_the_split_alone_is_the_mean_over_orders_that_are_blind_inside_the_groups():
    kept = [arm for arm in PRINTED if arm not in (("dft", "false"), ("vandermonde", "false"))]
    sam_A, theirs_A = np.array([arm[1] == "true" for arm in kept]), -np.array([PRINTED[arm] for arm in kept])
    draw, taus = np.random.default_rng(0), []
    for _ in range(2000):
        taus.append(scipy_stats.kendalltau(sam_A + draw.random(len(kept)), theirs_A).statistic)
    assert orders.split(theirs_A, sam_A) == pytest.approx(np.mean(taus), abs=0.01) == pytest.approx(0.485, abs=0.01)


def test_few_arms_of_a_group_have_no_order():
    table = of_table_2({arm: loss for arm, loss in PRINTED.items() if arm[0] in ("attention", "low_rank")})
    assert orders.sections(table, analysis.analyse(table, {})) == []


def test_what_a_pretrainings_order_tells_of_the_fine_tunings_is_said_within_the_groups():
    """Accuracies that keep the order of the losses but turn it round inside SAM; an A/A arm has no say."""
    losses = {
        ("a", False): 3.0,
        ("b", False): 3.1,
        ("c", False): 3.2,
        ("a", True): 2.0,
        ("b", True): 2.1,
        ("c", True): 2.2,
    }
    arms = {arm: {"name": arm[0], "sam": arm[1], "heads": 2} for arm in losses}
    arms["a", True, 1] = {**arms["a", True], "salt": 1}
    rows = []
    for label, changes in (("text", {"task": {"name": "masked_lm"}}), ("fine", {"init": "text"})):
        for row in noisy_rows({}, 2, list(arms.values()), label=label, changes=changes):
            loss = losses[row.mixer["name"], row.mixer["sam"]]
            value = loss if label == "text" else 0.9 - loss / 10 if not row.mixer["sam"] else 0.6 + loss / 10
            metrics = {"loss" if label == "text" else "accuracy": 9.0 if "salt" in row.mixer else value}
            rows.append(replace(row, record=replace(row.record, metrics=metrics)))
    first, second = Column("text", "loss"), Column("fine", "accuracy")
    family = replace(a_sweep().family, primary=second, reference={"name": "a", "sam": True, "salt": 0})
    table = a_table(rows, columns=(first, second), family=family)
    (found,) = orders.sections(table, analysis.analyse(table, {}))
    assert found.title == "Orders of fine-tunings, beside text: loss"
    assert found.lines == [["fine accuracy", "+0.60 (6 arms)", "-1.00 (3 arms)", "+1.00 (3 arms)", "+0.60"]]
    assert "## Orders of fine-tunings, beside text: loss" in a_summary(table)
    alone = a_table([r for r in rows if r.protocol == "text"], columns=(first,), family=replace(family, primary=first))
    assert orders.sections(alone, analysis.analyse(alone, {})) == []


# Start of training --------------------------------------------------------------------------------------------------


def started(row, gains: tuple, varying: tuple):
    return replace(row, record=replace(row.record, gain=gains, gain_varying=varying))


def test_how_large_each_mixer_starts_is_told_over_layers_and_seeds_and_by_what_it_is_scaled():
    """The protocol's target over the gain; '-' without a target and for weights that come from a parent."""
    plain = noisy_rows({}, 2, (DENSE, LOW))
    rows = [started(r, (0.02, 0.05, 0.02 * 2**r.seed), (0.01, 0.04, 0.01)) for r in plain[:2]]
    rows += [started(r, (4.0, 4.0), (1.0, 1.0)) for r in plain[2:]]
    (found,) = start.sections(a_table(rows))
    assert found.head == ["arm", "gain", "over tokens", "scaled by"] and len(found.notes) == 1
    assert found.lines == [["dense", "0.03 (0.02 to 0.05)", "0.01 (0.01 to 0.04)", "-"], ["low_rank", "4", "1", "-"]]

    aimed = noisy_rows({}, 2, (DENSE, LOW), changes={"shell.gain": 2.0})
    children = [started(r, (), ()) for r in noisy_rows({}, 2, (DENSE, LOW), label="rough", changes={"task.patch": 4})]
    rows = [started(r, (0.004, 2.0), (0.0, 1.0)) for r in aimed]
    (found,) = start.sections(a_table(rows + children, columns=BOTH))
    assert found.head == ["arm", "gain", "over tokens", "scaled by"] and found.notes[1].startswith("Scaled by: ")
    assert [line[-1] for line in found.lines] == ["250 (1 to 500)"] * 2
    assert start.sections(a_table(children, columns=BOTH[1:])) == []

    both = [*rows, *noisy_rows({}, 2, (DENSE, LOW), label="rough", changes={"task.patch": 4})]
    (found,) = start.sections(a_table(both, columns=BOTH))
    assert [line[:2] for line in found.lines] == [[arm, p] for arm in ("dense", "low_rank") for p in ("quick", "rough")]
    assert found.left == 2 and {line[-1] for line in found.lines} == {"250 (1 to 500)", "-"}


# Summary ------------------------------------------------------------------------------------------------------------


def a_summary(table) -> str:
    found = analysis.analyse(table, {})
    more = [*sections(table, found), *contrasts.sections(table, found), *orders.sections(table, found)]
    more.append(cost.section(table))
    return summary.markdown(table, found, more)


def golden_table():
    """Two protocols of one task, an A/A arm, a control, one arm that is better and one that is not separable."""
    arms, means = (DENSE, LOW, LOW_SAM, ATTENTION, TWIN), {3: 0.55, 4: 0.55}
    rows = noisy_rows(means, 10, arms)
    rows += noisy_rows({0: 0.47, 3: 0.6, 4: 0.6}, 10, arms, label="rough", changes={"shell.conv_width": 0})
    return a_table(rows, columns=BOTH, controls=(LOW_SAM,))


def test_the_summary_reads_as_the_golden_text():
    assert a_summary(golden_table()) == (GOLDEN / "report_summary.md").read_text()


def test_an_arm_that_departs_is_marked_wherever_it_is_compared_and_the_summary_says_how():
    wider = Departure(dict(LOW), {"backbone.width": 40}, "a test")
    rows = noisy_rows({}, 3, (DENSE, LOW_SAM)) + noisy_rows({}, 3, (LOW,), changes={"backbone.width": 40})
    table = a_table(rows, departures=(wider,))
    said = a_summary(table).split("\n## ")
    means, against, sam = said[1:4]
    assert "- low_rank [1]: 0." in means and "- dense: 0." in means
    assert "- [1] low_rank departs from the protocol by backbone.width = 40; source: a test." in means
    assert "low_rank [1] " in against and "dense [1]" not in against
    assert "low_rank SAM - low_rank [1] " in sam
    found = analysis.analyse(table, {})
    (section,) = [s for s in sections(table, found) if s.title == "Difference from dense"]
    assert {line[0] for line in section.lines} == {"low_rank [1]", "low_rank SAM"}
    # A page's row of such a label leads to the runs of its arm and of the reference.
    assert links.Links(table, found).arms("low_rank [1]", section) == (2, 0)


def test_a_reference_that_departs_is_marked_wherever_arms_are_compared_with_it():
    """Also in the parts of a gain, along what varies, and in the names of rows of figures."""
    misaligned = {**LOW_SAM, "sam": MISALIGNED}
    rows = []
    for gain, label in ((1.0, "quick[shell.gain=1.0]"), (2.0, "quick[shell.gain=2.0]")):
        for own, wider in (((DENSE, LOW), WIDE), ((misaligned, LOW_SAM), {})):
            rows += noisy_rows({}, 3, own, label=label, changes={"shell.gain": gain, **wider})
    wide = [Departure(dict(arm), WIDE, "a test") for arm in (DENSE, LOW)]
    primary = Column("quick[shell.gain=1.0]", "accuracy")
    family = replace(a_sweep().family, comparisons=(AGAINST, SAM, PARTS), primary=primary)
    columns = (primary, Column("quick[shell.gain=2.0]", "accuracy"))
    table = a_table(rows, columns=columns, departures=tuple(wide), family=family, varies={"shell.gain": (1.0, 2.0)})
    found = analysis.analyse(table, {})
    every = {section.title: section for section in sections(table, found)}
    assert "Difference from dense [1]" in every and "## Against dense [1]" in a_summary(table)
    assert every["quick: accuracy by shell.gain"].head[1:] == [
        "dense [1]",
        "low_rank [2]",
        "low_rank misaligned",
        "low_rank SAM",
    ]
    parts = [line[0] for line in every["SAM gain in two parts"].lines]
    assert parts == ["low_rank [2]: data dependence", "low_rank: alignment"]


def test_the_summary_claims_a_difference_only_where_the_tests_do():
    text = a_summary(a_table(noisy_rows({3: 0.9}, 5)))
    assert "better" not in text.replace("larger is better", "") and "worse" not in text
    assert "too few seeds to test: low_rank" in text
    text = a_summary(a_table(noisy_rows({}, 10)))
    assert "- not separable: low_rank" in text and "\n- better: " not in text
    one = a_summary(a_table(noisy_rows({}, 1)))
    assert "[" not in one.split("## Cost")[0].replace("[declared", "")


def test_an_a_a_arm_that_cannot_be_tested_is_not_said_to_be_alike():
    table = a_table(noisy_rows({}, 5, (DENSE, ATTENTION, TWIN)))
    assert "; too few seeds to test them on all columns." in a_summary(table)
    assert "; too few seeds to test them on all columns." in text_of(table, [])
    table = a_table(noisy_rows({}, 8, (DENSE, ATTENTION, TWIN)))
    assert "nothing differs." in a_summary(table) and "nothing came out different" in text_of(table, [])


def test_the_summary_says_how_a_line_of_a_response_changes_and_nothing_of_columns_that_it_does_not_show():
    arms = tuple({**LOW, "rank": rank} for rank in (4, 8, 16))
    text = a_summary(a_table(noisy_rows({}, 3, arms), family=replace(a_sweep().family, reference={**LOW, "rank": 4})))
    (line,) = [line for line in text.splitlines() if line.startswith("- low_rank: ")]
    assert re.fullmatch(r"- low_rank: 8 [+-]0\.\d+ \[.*\], 16 [+-]0\.\d+ \[.*\]", line)
    assert "no claim rests on it" in text and "Step and memory" not in text


def test_a_loss_that_falls_is_better():
    columns, family = (Column("quick", "loss"),), replace(a_sweep().family, primary=Column("quick", "loss"))
    text = a_summary(a_table(noisy_rows({3: 0.55}, 10), columns=columns, family=family))
    assert "(smaller is better)" in text and "- better: attention SAM -0.1" in text
