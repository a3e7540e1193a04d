"""Figures: each only where a table can fill it, its numbers those of the analysis, colours that all can tell apart."""

import itertools
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench.report import analysis, length_plot, plots
from bench.report.figures import curves, gains, pareto, profile, ranks, responses, seeds
from bench.report.responses import responses as of_table
from bench.report.tints import DARKEST, PALEST, contrast, families, tinted
from bench.report.variants import variants
from bench.sweep import Column, Departure
from tests.test_report import ATTENTION, DENSE, LOW, LOW_SAM, a_sweep
from tests.test_report_statistics import a_table, noisy_rows

ARMS = (DENSE, LOW, LOW_SAM, ATTENTION)
RANKS = tuple({**m, "rank": r} for m in (LOW, LOW_SAM) for r in (2, 4, 8))
STEPS = (1, 50, 100, 200, 300)
TWO = (Column("quick", "accuracy"), Column("rough", "loss"))


def curved(rows: list) -> list:
    """A curve that ends at 3 - 2 x accuracy, and a speed and a state of each arm's own."""
    found = []
    for row in rows:
        record, ok = row.record, row.record.outcome == "ok"
        end = record.metrics.get("loss", 2.0)
        curve = tuple((k, end + 9 / k) for k in (STEPS if ok else STEPS[:3]))
        place = len(row.mixer["name"]) + int(row.mixer["sam"] is True)
        cost = replace(record.cost, step_p50=0.01 * place, tokens=30_000)
        capacity = replace(record.capacity, state_per_head=-1 if row.mixer["name"] == "attention" else place % 3 * 8)
        found.append(replace(row, record=replace(record, curve=curve, cost=cost, capacity=capacity)))
    return found


def two_tasks(n: int, arms=ARMS, means=None) -> list:
    rough = noisy_rows(means or {}, n, arms, label="rough", changes={"task.patch": 4})
    return curved(noisy_rows(means or {}, n, arms) + rough)


def drawn(table, module) -> dict:
    """Name -> figure, under the settings that figures are drawn with."""
    with plots.settings():
        return dict(module.figures(table, analysis.analyse(table, {})))


def names(table) -> set[str]:
    every = (seeds, gains, responses, curves, pareto, ranks, profile)
    return {name for module in every for name in drawn(table, module)}


def test_a_figure_is_drawn_where_the_table_has_what_it_needs():
    always = {"seeds", "curves", "pareto"}
    assert names(a_table(two_tasks(3), columns=TWO)) == always | {
        "differences",
        "sam_gain",
        "critical_difference",
        "profile",
    }
    assert names(a_table(two_tasks(1), columns=TWO)) == always | {"differences", "sam_gain"}
    assert names(a_table(noisy_rows({}, 3, arms=(DENSE,)))) == {"seeds"}
    alone = replace(a_sweep().family, reference={}, comparisons=("sam",))
    assert names(a_table(curved(noisy_rows({}, 2, (LOW, ATTENTION))), family=alone)) == always
    assert "response_rank" in names(a_table(noisy_rows({}, 2, RANKS), family=alone))


def test_whatever_the_names_and_failures_every_figure_is_laid_out_and_old_ones_go(tmp_path):
    """A layout that collapses is a warning, and warnings are errors here."""
    long = tuple({**m, "name": f"{m['name']}_whose_name_is_far_too_long_for_a_figure"} for m in RANKS)
    rows = noisy_rows({0: 0.9}, 3, long)
    failed = [
        replace(r, record=replace(r.record, outcome="diverged", metrics={})) if i == 4 else r
        for i, r in enumerate(rows)
    ]
    table = a_table(curved(failed), family=replace(a_sweep().family, reference={}, comparisons=("sam",)))
    (tmp_path / "profile.png").write_bytes(b"of an earlier report")
    (tmp_path / "notes.txt").write_text("mine")
    paths = plots.draw(table, analysis.analyse(table, {}), tmp_path)
    assert {p.stem for p in paths} == {"seeds", "sam_gain", "response_rank", "curves", "pareto", "critical_difference"}
    assert sorted(tmp_path.iterdir()) == sorted([*paths, tmp_path / "notes.txt"])
    text = b"".join(p.read_bytes() for p in paths)
    assert not [word for word in (b"CreationDate", b"matplotlib", b"Matplotlib") if word in text]


@pytest.mark.parametrize("dies", [False, True])
def test_a_large_table_is_drawn_by_two_processes_into_the_same_bytes(tmp_path, monkeypatch, dies):
    table = a_table(noisy_rows({}, 2, (DENSE, LOW)))
    found = analysis.analyse(table, {})
    one = plots.draw(table, found, tmp_path / "one")
    monkeypatch.setattr(plots, "LARGE", 0)
    if dies:
        here, before = os.getpid(), plots.draw_some
        monkeypatch.setattr(plots, "draw_some", lambda *a: before(*a) if os.getpid() == here else os._exit(1))
    two = plots.draw(table, found, tmp_path / "two")
    assert sorted(p.name for p in one) == sorted(p.name for p in two)
    assert all((tmp_path / "one" / p.name).read_bytes() == p.read_bytes() for p in two)


# Numbers ------------------------------------------------------------------------------------------------------------


def points(ax) -> np.ndarray:
    """All that the panel's lines and markers stand on, (x, y)."""
    return np.concatenate([np.array(line.get_xydata(), float).reshape(-1, 2) for line in ax.lines])


def near(ax, x: float, y: float) -> bool:
    return bool((np.abs(points(ax) - (x, y)) < 1e-9).all(1).any())


def test_dots_are_the_values_and_forests_the_paired_differences():
    table = a_table(noisy_rows({3: 0.6}, 4))
    found = analysis.analyse(table, {})
    (ax,) = drawn(table, seeds)["seeds"].axes
    for height, values_S in enumerate(found.measured[0].values_AS):
        assert set(values_S) <= {x for x, y in points(ax) if abs(y - height) < 0.3}
    result = next(r for r in found.results if r.kind == "reference")
    (ax,) = drawn(table, gains)["differences"].axes
    assert all(near(ax, x, height) for height, x in enumerate(result.found.difference_P.estimate))
    ends = np.concatenate([c.get_segments() for c in ax.collections if c.get_zorder() == 4])
    left, right = ax.get_xlim()
    for height, (low, high) in enumerate(zip(*result.found.difference_P[1:], strict=True)):
        (segment,) = [s for s in ends if s[0][1] == height]
        assert segment[:, 0].tolist() == [max(low, left), min(high, right)]


def test_the_names_of_neighbouring_axes_do_not_meet():
    """As of GLUE: four panels in a row, metrics of long names in two of them."""
    both = ("accuracy_matched", "accuracy_mismatched")
    columns = tuple(Column("quick", name) for name in ("accuracy", "loss", *both))
    rows = [
        replace(row, record=replace(row.record, metrics=row.record.metrics | dict.fromkeys(both, row.seed / 7)))
        for row in two_tasks(3)
    ]
    every = drawn(a_table(rows, columns=columns), gains)
    for figure in every.values():
        figure.draw_without_rendering()
        first, *others = [ax.xaxis.label.get_window_extent() for ax in figure.axes]
        assert len(others) == 3
        for before, after in itertools.pairwise((first, *others)):
            assert after.y0 != before.y0 or before.x1 < after.x0


def test_of_many_arms_of_few_mixers_each_mixer_has_its_panel_of_curves_on_one_scale():
    """25 arms in one panel cover one another."""
    arms = tuple({**arm, "heads": 1 + n} for arm in (ATTENTION, LOW) for n in range(7))
    figure = drawn(a_table(curved(noisy_rows({}, 3, arms))), curves)["curves"]
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["quick: attention", "quick: low_rank"]
    assert [len(ax.collections[0].get_paths()) for ax in figure.axes] == [7, 7]
    assert len({ax.get_ylim() for ax in figure.axes}) == 1


def test_the_state_of_arms_with_other_heads_is_compared_over_all_heads():
    rows = curved(noisy_rows({}, 3, ({**LOW, "heads": 1}, {**LOW, "heads": 4})))
    held = {1: 64, 4: 16}  # a head: the same memory
    rows = [
        replace(
            r,
            record=replace(r.record, capacity=replace(r.record.capacity, state_per_head=held[r.mixer["heads"]])),
        )
        for r in rows
    ]
    table = a_table(rows)
    assert set(pareto.state(table, "quick", all_heads=True).place_A) == {6.0}
    assert list(pareto.state(table, "quick", all_heads=False).place_A) == [6.0, 4.0]


@pytest.mark.parametrize(("heads", "width"), [(3, plots.NARROW), (15, plots.WIDTH)])
def test_a_figure_with_many_arms_has_the_width_that_their_names_need(heads, width):
    """Of 25 arms the names under a panel of one text column stood in one list, four times as high as the panel."""
    arms = tuple({**ATTENTION, "name": f"mixer_{n}"} for n in range(heads))
    figure = drawn(a_table(curved(noisy_rows({}, 3, arms))), curves)["curves"]
    assert figure.get_figwidth() == width


def legend_of(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_many_arms_of_few_mixers_have_a_name_a_mixer_in_a_legend_and_few_arms_one_each():
    """A list of 25 took half of the figure."""
    arms = tuple({**arm, "heads": 1 + n} for arm in (ATTENTION, LOW) for n in range(7))
    many, few = (drawn(a_table(curved(noisy_rows({}, 3, some))), pareto)["pareto"] for some in (arms, arms[4:9]))
    values = ", ".join(str(1 + n) for n in range(7))
    assert legend_of(many) == [
        f"attention SAM, pale to dark: heads {values}",
        f"low_rank, pale to dark: heads {values}",
    ]
    assert len(legend_of(few)) == 5
    assert families(["add, shift true", "add, heads 2", "mult"]) == [
        (0, "add, shift true"),
        (1, "add, heads 2"),
        (2, "mult"),
    ]


@pytest.mark.parametrize(("shared", "says"), [(False, "; grey: "), (True, "; grey on the right: ")])
def test_what_grey_is_is_said_of_the_panels_that_have_some(monkeypatch, shared, says):
    monkeypatch.setattr(pareto, "side_by_side", lambda table, rows: shared)
    figure = drawn(a_table(two_tasks(3)), pareto)["pareto"]
    marked = [any(line.get_color() == "0.8" for line in ax.lines) for ax in figure.axes]
    assert marked == [not shared, True] and says in figure.legends[0].get_title().get_text()


def test_ticks_of_states_are_powers_of_two_among_them_and_of_one_or_two_states_these():
    for states, ticks in (((96, 448, 8448, 34816), {128, 512, 2048, 8192, 32768}), ((96, 8448, -1), {96, 8448})):
        arms = tuple({**LOW, "rank": 1 + n} for n in range(len(states)))
        rows = [
            replace(r, record=replace(r.record, capacity=replace(r.record.capacity, state_per_head=of)))
            for r, of in zip(noisy_rows({}, 1, arms), states, strict=True)
        ]
        found = pareto.state(a_table(rows), "quick", all_heads=False).ticks
        assert {round(2**place) for place, text in found.items() if text != "grows"} == ticks
        assert ("grows" in found.values()) == (-1 in states)


@pytest.mark.parametrize("limits", [(3.0, 3.27), (0.455, 0.495), (-0.05, 0.03), (0, 1)])
def test_an_axis_that_goes_up_has_three_ticks_or_more(limits):
    from matplotlib.figure import Figure

    ax = Figure().subplots()
    ax.set_ylim(*limits)
    plots.few_ticks(ax.yaxis)
    assert sum(limits[0] <= tick <= limits[1] for tick in ax.get_yticks()) >= 3


def test_variants_of_a_protocol_stand_one_below_the_other_on_one_scale_a_metric():
    gained = [f"quick[shell.gain={gain}]" for gain in (1.0, 0.0)]
    rows = [r for v, m in zip(gained, ({}, {0: 0.9}), strict=True) for r in noisy_rows(m, 3, label=v)]
    columns = tuple(Column(v, metric) for metric in ("accuracy", "loss") for v in gained)
    table = a_table(rows, columns=columns)
    for module, name in ((seeds, "seeds"), (gains, "differences")):
        figure = drawn(table, module)[name]
        figure.draw_without_rendering()
        upper, lower = figure.axes[:2], figure.axes[2:]
        assert [len({ax.get_title(loc="left") for ax in row}) for row in (upper, lower)] == [1, 1]
        for above, below in zip(upper, lower, strict=True):
            assert (above.get_xlabel(), above.get_xlim()) == (below.get_xlabel(), below.get_xlim())
        assert upper[0].get_xlabel() != upper[1].get_xlabel() and upper[0].get_xlim() != upper[1].get_xlim()


def test_columns_that_form_no_grid_of_variants_are_laid_out_by_their_number():
    one, other = "quick[shell.gain=1.0]", "quick[shell.gain=0.0]"
    for columns, count in (
        ([(one, "loss"), (other, "loss"), (one, "accuracy"), (other, "accuracy")], 2),
        ([(one, "loss"), (other, "loss"), (one, "accuracy")], 1),
        ([(one, "loss"), (one, "accuracy"), (other, "loss"), (other, "accuracy")], 1),
        ([("quick", "loss"), ("rough", "loss")], 1),
    ):
        assert variants([Column(*column) for column in columns]) == count


def test_a_response_is_the_mean_at_each_value_and_a_failed_arm_breaks_its_line():
    rows = noisy_rows({0: 0.1}, 2, RANKS)
    rows = [
        replace(r, record=replace(r.record, outcome="diverged", metrics={})) if i == 2 else r
        for i, r in enumerate(rows)
    ]
    table = a_table(rows, family=replace(a_sweep().family, reference={}, comparisons=("sam",)))
    mean_A = analysis.analyse(table, {}).measured[0].interval_A.estimate
    (ax,) = drawn(table, responses)["response_rank"].axes
    shown = [line.get_ydata() for line in ax.lines if len(line.get_ydata()) == 3]
    assert len(shown) == 2 and np.array_equal(np.concatenate(shown), mean_A, equal_nan=True) and np.isnan(mean_A[1])
    assert [t.get_text() for t in ax.get_xticklabels()] == ["2", "4", "8"]


def test_along_heads_stand_parameters_and_state_and_what_moves_with_them_makes_no_lines_of_its_own():
    arms = tuple({**m, "heads": h, "rank": 16 // h} for m in (LOW, LOW_SAM) for h in (1, 2, 4))
    rows = [
        replace(
            r, record=replace(r.record, capacity=replace(r.record.capacity, mixer_parameters=100 * r.mixer["heads"]))
        )
        for r in noisy_rows({}, 2, arms)
    ]
    table = a_table(rows, family=replace(a_sweep().family, reference={}, comparisons=("sam",)))
    found = drawn(table, responses)
    assert set(found) == {"response_heads"}
    loss, parameters = found["response_heads"].axes
    mean_A = analysis.analyse(table, {}).measured[0].interval_A.estimate
    assert np.array_equal(np.concatenate([line.get_ydata() for line in loss.lines]), mean_A)
    assert parameters.get_title(loc="left") == "the mixer's parameters"
    assert all(np.allclose(line.get_ydata(), np.log2([100, 200, 400])) for line in parameters.lines)


def test_parameters_that_hardly_move_have_ticks_of_their_own_beside_an_arm_with_many():
    arms = ({**LOW, "rank": 2}, {**LOW, "rank": 4}, {**LOW, "rank": 8}, DENSE)
    counts = {2: 215_112, 4: 221_472, 8: 234_192, None: 2_000_000}
    rows = []
    for row in noisy_rows({}, 2, arms):
        capacity = replace(row.record.capacity, mixer_parameters=counts[row.mixer.get("rank")])
        rows.append(replace(row, record=replace(row.record, capacity=capacity)))
    _, parameters = drawn(a_table(rows), responses)["response_rank"].axes
    low, high = parameters.get_ylim()
    assert len(parameters.get_yticks()) >= 2 and all(low <= tick <= high for tick in parameters.get_yticks())


def test_an_arm_that_departs_stands_on_no_line_with_those_that_do_not():
    arms = tuple({**LOW, "rank": rank} for rank in (2, 4, 8, 16))
    departure = Departure({"name": LOW["name"], "rank": 4}, {"shell.conv_width": 3}, "a test")
    rows = [r if r.mixer["rank"] != 4 else replace(r, record=departed(r.record)) for r in noisy_rows({}, 2, arms)]
    table = a_table(
        rows,
        departures=(departure,),
        family=replace(a_sweep().family, reference={"rank": 2}, comparisons=("reference",)),
    )
    (ax,) = drawn(table, responses)["response_rank"].axes
    assert [len(line.get_xdata()) for line in ax.lines] == [3]


def test_a_single_line_of_two_points_has_no_figure():
    assert drawn(a_table(noisy_rows({}, 2, (DENSE, *RANKS[:2]))), responses) == {}
    assert set(drawn(a_table(noisy_rows({}, 2, (DENSE, *RANKS[:3]))), responses)) == {"response_rank"}
    assert set(drawn(a_table(noisy_rows({}, 2, (*RANKS[:2], *RANKS[3:5]))), responses)) == {"response_rank"}


def departed(record):
    protocol = record.run["protocol"]
    return replace(
        record, run={**record.run, "protocol": {**protocol, "shell": {**protocol["shell"], "conv_width": 3}}}
    )


@pytest.mark.parametrize("values", [[0.0, 1.0, 2.0, 3.0, 4.0], [1.0, 0.0], [0.0, 1.0, 9.0]])
def test_lines_stand_side_by_side_and_each_nearest_to_its_own_value(values):
    place_V = np.array(values)
    for lines in (2, 5, 40):
        shift = responses.shifts(dict.fromkeys(range(lines)), place_V)
        assert (np.diff(shift) > 0).all() and np.isclose(shift.sum(), 0)
        nearest = np.abs(place_V[:, None, None] + shift - place_V[:, None]).argmin(1)
        assert (nearest == np.arange(len(place_V))[:, None]).all()


@pytest.mark.parametrize(("issued", "other"), [("graph", "fast"), ("fast", "naive")])
def test_a_metric_stands_over_the_length_and_above_the_tokens_a_second_of_the_same_mixers(tmp_path, issued, other):
    lengths, rows = (64, 256), noisy_rows({}, 3, changes={"task.length": 128})
    at = {n: {f"loss_at_{n}": n / 100} for n in lengths}
    rows = [replace(r, record=replace(r.record, metrics=r.record.metrics | at[64] | at[256])) for r in rows]
    columns = (Column("quick", "accuracy"), *(Column("quick", f"loss_at_{n}") for n in lengths))
    table = a_table(rows, columns=columns)
    found = analysis.analyse(table, {})
    (response,) = [r for r in of_table(table, found) if r.key == "length"]
    assert response.values == [64, 256] and len(response.lines) == len(ARMS)
    stray = {"mixer": "toeplitz", "args": {"sam": True}}
    cells = [{"mixer": ATTENTION["name"], "args": {k: v for k, v in ATTENTION.items() if k != "name"}}, stray]
    seconds = {"q1": 0.5, "median": 1.0, "q3": 2.0, "n": 4}
    timed = [
        c | {"way": issued, "length": n, "batch": 1024 // n, "seconds": seconds} for c in cells for n in (512, 128)
    ]
    timed += [row | {"way": other, "seconds": dict.fromkeys(seconds, 9.0)} for row in timed]
    (tmp_path / "figures").mkdir()
    assert [p.name for p in length_plot.draw(table, found, tmp_path)] == ["length.png", "length.pdf"]
    (tmp_path / "speed").mkdir()
    (tmp_path / "speed" / "speed.json").write_text(json.dumps({"kind": "layers", "rows": timed}))
    rates = length_plot.rates_of(table, tmp_path / "speed" / "speed.json")
    spread = {"q1": 2048.0, "median": 1024.0, "q3": 512.0}
    assert rates == {ARMS.index(ATTENTION): [(128, spread), (512, spread)]}
    with plots.settings():
        loss, tokens = length_plot.compose(table, found, response, rates).axes
    assert [line.get_ydata().tolist() for line in loss.lines[: len(ARMS)]] == [[0.64, 2.56]] * len(ARMS)
    assert loss.get_ylabel() == "loss (smaller is better)" and tokens.get_xlabel() == "length of a row, tokens"
    assert near(tokens, 7, 1024) and near(tokens, 9, 1024)


def test_a_curve_is_the_mean_over_seeds_and_an_arm_with_a_failed_run_has_each_seed_instead():
    rows = curved(noisy_rows({}, 4))
    rows = [
        r if (r.mixer, r.seed) != (LOW, 2) else replace(r, record=replace(r.record, outcome="diverged", metrics={}))
        for r in rows
    ]
    table = a_table(rows)
    (ax,) = drawn(table, curves)["curves"].axes
    whole = [r for r in rows if r.mixer == DENSE]
    mean = np.mean([[loss for _, loss in r.record.curve] for r in whole], axis=0)
    lines = [line.get_ydata() for line in ax.lines if len(line.get_ydata()) == len(STEPS)]
    assert sum(np.allclose(y, mean) for y in lines) == 1 and len(lines) == 3 + 4  # three means, four seeds of low_rank
    (bands,) = ax.collections
    assert len(bands.get_paths()) == 3


def test_no_arm_of_the_front_is_beaten_in_both_and_every_other_is():
    cost, score = np.random.default_rng(0).integers(0, 9, (2, 60)).astype(float)
    cost[3], score[7] = np.nan, np.nan
    best = pareto.front(cost, score)

    def beaten(a: int) -> bool:
        no_worse = (cost <= cost[a]) & (score >= score[a])
        return bool((no_worse & ((cost < cost[a]) | (score > score[a]))).any())

    assert not any(beaten(a) for a in best) and 3 not in best and 7 not in best
    places = {(cost[a], score[a]) for a in best}
    assert all(beaten(a) or (cost[a], score[a]) in places for a in range(60) if a not in (3, 7))


def test_bars_of_the_critical_difference_diagram_are_the_letters_of_the_table():
    table = a_table(noisy_rows({3: 0.55}, 10))
    measured = analysis.analyse(table, {}).measured[0]
    assert measured.letters == ["b", "b", "b", "a"]
    assert [sorted(bar) for bar in ranks.groups(measured, [3, 0, 1, 2])] == [[0, 1, 2]]
    few = a_table(noisy_rows({3: 0.55}, 4))
    (ax,) = drawn(few, ranks)["critical_difference"].axes
    assert any("no bars: too few seeds to test" in t.get_text() for t in ax.texts)


def test_many_arms_have_a_critical_difference_diagram_only_where_they_were_tested():
    arms = tuple({**LOW, "rank": 1 + n} for n in range(ranks.MOST + 1))
    assert not drawn(a_table(noisy_rows({}, 3, arms)), ranks) and drawn(a_table(noisy_rows({}, 3, arms[1:])), ranks)
    assert drawn(a_table(noisy_rows({}, 14, arms)), ranks)


def test_ranks_within_seeds_iqm_and_profile_of_scaled_values():
    found = analysis.analyse(a_table(two_tasks(3, means={0: 0.1, 3: 0.9}), columns=TWO), {})
    assert found.measured[0].rank_A.estimate[[0, 3]].tolist() == [4, 1]
    share_AK = found.overall.profile_AK.estimate
    assert (np.diff(share_AK) <= 0).all() and (share_AK[:, -1] == 0).all()
    assert found.overall.iqm_A.estimate[3] > 0.9 and found.overall.iqm_A.estimate[0] < 0.1


# Colours ------------------------------------------------------------------------------------------------------------

# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
BLIND = {
    "nobody": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
LMS = [[0.41222147, 0.53633254, 0.05144599], [0.21190350, 0.68069955, 0.10739696], [0.08830246, 0.28171884, 0.62997870]]
LAB = [
    [0.21045426, 0.79361779, -0.00407205],
    [1.97799850, -2.42859221, 0.45059371],
    [0.02590404, 0.78277177, -0.80867577],
]


def seen(colour: str, who: str) -> np.ndarray:
    """The colour in Oklab (Ottosson 2020), where distances are alike to the eye, x 100."""
    share = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    return 100 * (np.array(LAB) @ np.cbrt(np.array(LMS) @ np.clip(np.array(BLIND[who]) @ linear, 0, 1)))


@pytest.mark.parametrize("who", BLIND)
def test_colours_are_told_apart_by_everybody_and_from_white_paper(who):
    """7 is well over three just noticeable differences; red and green of one lightness would be 1 to a deutan."""
    for one, other in itertools.combinations([*plots.COLOURS, "#FFFFFF"], 2):
        assert np.linalg.norm(seen(one, who) - seen(other, who)) > 7, (one, other)


def test_one_mixer_has_one_colour_in_all_figures_and_paler_ones_for_its_variants():
    styles = plots.arm_looks(a_table(noisy_rows({}, 1, (*RANKS, ATTENTION))))
    colour, marker = plots.looks(["low_rank"])["low_rank"]
    assert {look.marker for look in styles[:6]} == {marker} and styles[0].colour == styles[3].colour
    assert len({look.colour for look in styles[:3]}) == 3
    assert (styles[6].colour, styles[6].marker) == plots.looks(["attention"])["attention"] != (colour, marker)


@pytest.mark.parametrize("marker", plots.MARKERS)
def test_half_a_marker_is_half_of_its_ink(marker):
    from matplotlib.markers import MarkerStyle

    dot = plots.Look("", "#000000", marker, plots.filled("misaligned", "#000000"), plots.HALF).dot(1)
    half = MarkerStyle(marker, fillstyle=dot["fillstyle"])
    one, other = (
        part.transformed(transform).to_polygons()[0]
        for part, transform in (
            (half.get_path(), half.get_transform()),
            (half.get_alt_path(), half.get_alt_transform()),
        )
    )
    assert np.isclose(area(one), area(other))


def area(corners: np.ndarray) -> float:
    x, y = corners.T
    return abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2


@pytest.mark.parametrize("colour", plots.COLOURS)
def test_tints_go_from_one_that_is_seen_on_white_to_a_dark_one_in_even_steps(colour):
    found = [contrast(tinted(colour, share)) for share in (0, 0.25, 0.5, 0.75, 1)]
    assert np.allclose(np.diff(np.log(found)), np.log(found[-1] / found[0]) / 4, atol=0.03)
    assert np.isclose(found[0], PALEST, atol=0.03) and np.isclose(found[-1], max(DARKEST, contrast(colour)), atol=0.03)
    assert contrast("#FFFFFF") == 1 and contrast("#000000") == pytest.approx(21) and contrast(colour) > 2


def test_mixers_of_one_table_share_neither_colour_nor_marker_while_there_are_others():
    """In a table of eleven, two were vermillion and differed by their markers alone."""
    for count in (2, 7, 11, 17):
        for shown in (plots.KNOWN[:count], plots.KNOWN[-count:]):
            colours, markers = zip(*plots.looks(list(shown)).values(), strict=True)
            assert len(set(colours)) == min(count, len(plots.COLOURS))
            assert len(set(markers)) == min(count, len(plots.MARKERS))
    many = [*plots.KNOWN, *(f"mine_{n}" for n in range(40))]
    assert len(set(plots.looks(many).values())) == len(many)
    first = plots.KNOWN[: len(plots.MARKERS)]
    assert plots.looks(many)[first[-1]] == plots.looks([first[-1]])[first[-1]]  # whatever else is shown


def test_where_rows_are_named_a_legend_shows_the_marker_of_no_mixer():
    """It was a circle, beside squares."""
    table = a_table(noisy_rows({}, 3))
    for module in (seeds, gains):
        for figure in drawn(table, module).values():
            shown = {h.get_marker() for h in figure.legends[0].legend_handles if hasattr(h, "get_marker")}
            assert not shown & set(plots.MARKERS)
    assert legend_of(drawn(table, seeds)["seeds"])[0] == "full: sequence-aligned (SAM); empty: not aligned"


def test_figures_do_not_touch_the_users_matplotlib():
    import matplotlib

    before = dict(matplotlib.rcParams)
    with plots.settings():
        assert matplotlib.rcParams["font.size"] == 7
    assert dict(matplotlib.rcParams) == before and Path(matplotlib.matplotlib_fname()).exists()
