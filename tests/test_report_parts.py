"""The SAM gain in two parts; what counts as one task, one response, one arm. Fabricated records."""

from dataclasses import replace

import numpy as np
import pytest

from bench import Refusal
from bench.report import analysis, plots, responses
from bench.report.figures import gains, pareto
from bench.report.sections import kind_title
from bench.sweep import AGAINST, PARTS, SAM, Column
from tests.test_figures import curved, drawn
from tests.test_report import ATTENTION, DENSE, LOW, LOW_SAM, a_sweep, text_of
from tests.test_report_statistics import a_table, noisy_rows, section
from tests.test_report_summary import timed

CROSSED = {**LOW_SAM, "sam": "misaligned"}
TWIN = {**ATTENTION, "salt": 1}
IN_PARTS = replace(a_sweep().family, reference={}, comparisons=(PARTS,))


# The SAM gain in two parts ------------------------------------------------------------------------------------------


def in_parts(means: dict, arms=(LOW, CROSSED, LOW_SAM, DENSE), seeds: int = 10):
    return a_table(noisy_rows(means, seeds, arms), family=IN_PARTS)


def test_a_gain_is_data_dependence_and_alignment_and_each_is_tested_in_one_family():
    table = in_parts({1: 0.53, 2: 0.61})
    found = analysis.analyse(table, {})
    assert found.families == {PARTS: [(1, 0), (2, 1)]}
    parts = found.result(PARTS, Column("quick", "accuracy"))
    values_AS = found.measured[0].values_AS
    assert parts.found.difference_P.estimate == pytest.approx([0.03, 0.08], abs=0.01)
    assert parts.found.difference_P.estimate.sum() == pytest.approx((values_AS[2] - values_AS[0]).mean())
    tested = section(table, "Tests of the parts on quick: accuracy")
    assert list(tested) == ["low_rank: data dependence", "low_rank: alignment"]
    assert {cells[-1] for cells in tested.values()} == {"differs"}
    text = text_of(table, [])
    assert "A family of 2" in text and "## SAM gain in two parts" in text
    assert "The two add up to the whole gain, which is in no family here, on quick: accuracy: low_rank +0.1" in text
    assert list(drawn(table, gains)) == ["sam_parts"]


def test_a_class_without_a_misaligned_arm_has_no_parts_and_an_axis_keeps_its_name():
    assert analysis.analyse(in_parts({}, arms=(LOW, LOW_SAM, DENSE)), {}).families == {}
    ranks = [{**mixer, "rank": rank} for rank in (2, 4) for mixer in (LOW, CROSSED, LOW_SAM)]
    table = in_parts({}, arms=ranks)
    kinds = analysis.analyse(table, {}).families
    assert kinds[PARTS] == [(1, 0), (2, 1), (4, 3), (5, 4)]
    assert "low_rank, rank 4: alignment" in section(table, kind_title(table, None, PARTS))


def test_the_kinds_of_comparisons_are_named_where_one_is_unknown():
    with pytest.raises(Refusal, match=f"{AGAINST}.*{SAM}.*{PARTS}"):
        replace(a_sweep().family, comparisons=("halves",))


# What is one task, one response, one arm ----------------------------------------------------------------------------


def test_two_protocols_on_one_task_are_not_two_tasks():
    columns = (Column("quick", "accuracy"), Column("rough", "accuracy"))
    for changes, tasks in (({"shell.conv_width": 0}, None), ({"task.patch": 4}, 2)):
        rows = noisy_rows({}, 3) + noisy_rows({}, 3, label="rough", changes=changes)
        overall = analysis.analyse(a_table(rows, columns=columns), {}).overall
        assert (overall.tasks if overall else None) == tasks


def test_a_key_that_differs_between_mixers_only_is_no_response():
    arms = ({**LOW, "bound": 4}, {**LOW_SAM, "bound": 4}, {**DENSE, "bound": 0.1})
    table = a_table(noisy_rows({}, 2, arms))
    found = analysis.analyse(table, {})
    assert "bound" in table.axes and not [r for r in responses.responses(table, found) if r.key == "bound"]


def test_an_a_a_arm_is_paler_than_its_twin():
    table = a_table(noisy_rows({}, 1, (ATTENTION, TWIN)))
    own, twin = plots.arm_looks(table)
    assert own.colour == plots.looks(["attention"])["attention"][0] and twin.colour != own.colour


def test_every_arm_of_a_crowd_without_state_lies_inside_the_panel_and_costs_have_ticks():
    arms = [*({**DENSE, "name": f"free_{k}"} for k in range(13)), LOW]
    rows = curved(noisy_rows({}, 2, arms))
    state = {True: 16, False: 0}
    rows = [
        replace(r, record=replace(r.record, capacity=replace(r.record.capacity, state_per_head=state[r.mixer == LOW])))
        for r in rows
    ]
    axes = drawn(a_table(rows), pareto)["pareto"].axes
    for ax in axes:
        left, right = ax.get_xlim()
        xs = np.concatenate([np.atleast_1d(line.get_xdata()) for line in ax.lines])
        assert len(xs) >= 10 and left < xs.min() and xs.max() < right
        assert len(ax.get_xticks()) >= 2


@pytest.mark.parametrize(
    ("begins", "another", "label"),
    [((0, 60), 200, "as the runs ran"), ((0, 30), 200, "runs side by side"), ((0, 60), 90, "runs side by side")],
)
def test_over_the_speed_of_runs_that_shared_a_device_no_arm_is_marked_as_unbeaten(begins, another, label):
    """With one another, or with a run of another table."""
    rows = curved(noisy_rows({}, 1, (DENSE, LOW)))
    speeds = [replace(r.record.cost, step_p50=step) for r, step in zip(rows, (0.1, 0.2), strict=True)]
    rows = [replace(r, record=replace(r.record, cost=cost)) for r, cost in zip(rows, speeds, strict=True)]
    rows = [timed(r, begin, 60) for r, begin in zip(rows, begins, strict=True)]
    (other,) = (timed(r, another, 60).record for r in noisy_rows({}, 1, (ATTENTION,)))
    figure = drawn(replace(a_table(rows), beside=(other,)), pareto)["pareto"]
    (ax,), (words,) = figure.axes, figure.legends  # their states are alike, so speed has the figure to itself
    assert ax.get_xlabel().endswith(label)
    assert any(line.get_color() == "0.8" for line in ax.lines) == (label == "as the runs ran")
    assert ("grey" in words.get_title().get_text()) == (label == "as the runs ran")
