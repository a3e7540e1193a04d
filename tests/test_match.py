"""Capacity in the open: figures are those of a run, the search finds the nearest value, what cannot move says so."""

import dataclasses
import json
import random
import shutil
import sys

import pytest
import torch

from bench import cli, compose, registry
from bench import run as one_run
from bench.capacity import capacity_of
from bench.compose import ROOT, choices, make_run
from bench.match.rows import Arm, figures, table, task_of
from bench.match.solve import FIGURES, HEADS, LARGEST, Budget, matched_all, nearest, turned, values_allowed
from bench.mixers.dense import Dense
from bench.mixers.low_rank import LowRank
from bench.store import Store
from bench.sweep import grid, load
from tests.conftest import built

SMALL = "quick_recall"
ARMS = [(name, level) for name in choices("mixer") for level in registry.mixer_class(name).levels]
KNOBS = [(*arm, knob) for arm in ARMS for knob in registry.mixer_class(arm[0]).knobs]
WITHOUT = [name for name in choices("mixer") if not registry.mixer_class(name).knobs]


@pytest.fixture
def call(monkeypatch, capsys):
    """(exit code, stdout, stderr) of `mixerbench match` with these words, without any data."""
    monkeypatch.delenv("MIXERBENCH_DATA", raising=False)

    def called(*words) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mixerbench", "match", *map(str, words)])
        capsys.readouterr()
        code = cli.main()
        return code, *capsys.readouterr()

    return called


@pytest.fixture
def rows(call):
    """The rows of `mixerbench match … --json`."""

    def called(*words) -> list[dict]:
        code, out, err = call(*words, "--json")
        assert code == 0, err
        return json.loads(out)["rows"]

    return called


def a_run(name: str, **changes):
    return make_run(SMALL, name, {f"mixer.{k}": v for k, v in changes.items()}, 0, 0)


def figure(run, name: str) -> int:
    return getattr(figures(run, task_of(run)), FIGURES[name])


# Figures ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("*/records.jsonl")), ids=lambda p: p.parent.name)
def test_figures_are_those_of_the_committed_records(path):
    records = Store(ROOT / "results").committed()
    for run in {
        (r.protocol_id, str(r.mixer)): r for r in grid(load(ROOT / "sweeps" / f"{path.parent.name}.yaml"))
    }.values():
        if records[run.id].outcome == "ok":
            assert figures(run, task_of(run)) == records[run.id].capacity


@pytest.mark.parametrize("arm", ARMS, ids=str)
def test_figures_are_those_of_a_run_built_to_train(where, arm):
    run = a_run(arm[0], sam=arm[1], heads=2)
    assert figures(run, task_of(run)) == one_run.build(run, where, "cpu").capacity == capacity_of(built(run)[0])


def test_a_unit_of_rank_costs_its_projections_and_taps():
    layers, heads, width, taps = 6, 4, 256, 7
    one, two = (make_run("mini_mlm", "low_rank", {"mixer.rank": rank}, 0, 0) for rank in (16, 17))
    one, two = figures(one, task_of(one)), figures(two, task_of(two))
    assert two.parameters - one.parameters == layers * 2 * heads * (width + taps + 1)
    assert two.mixer_parameters - one.mixer_parameters == two.parameters - one.parameters
    assert two.flops - one.flops == layers * 4 * heads * 128 * (2 * width // heads)
    assert (one.state_per_head, two.state_per_head) == (16 * 128, 17 * 128)


@pytest.mark.parametrize(("name", "level", "knob"), KNOBS)
def test_figures_never_fall_as_a_knob_grows_and_one_of_them_rises(name, level, knob):
    run = a_run(name, sam=level, heads=8)
    assert type(run.mixer.args[knob]) is int
    counts = [figures(turned(run, knob, v), task_of(run)) for v in values_allowed(run, task_of(run), knob)[:40]]
    for key in FIGURES.values():
        values = [getattr(count, key) for count in counts]
        assert values == sorted(values), key
    assert counts[-1].mixer_parameters > counts[0].mixer_parameters


@pytest.mark.parametrize("arm", ARMS, ids=str)
def test_an_integer_key_that_sets_the_capacity_is_a_knob(arm):
    run = a_run(arm[0], sam=arm[1], heads=8)
    before, knobs = figures(run, task_of(run)), registry.mixer_class(arm[0]).knobs
    for key in (k for k, v in run.mixer.args.items() if type(v) is int and k not in (HEADS, *knobs)):
        more = min(value for value in values_allowed(run, task_of(run), key) if value > run.mixer.args[key])
        assert figures(turned(run, key, more), task_of(run)) == before, f"{arm[0]}.{key} belongs to its knobs"


def test_every_shipped_mixer_is_in_the_table_at_each_of_its_levels_and_needs_no_data(rows):
    found = rows("protocol=mini_mlm")
    assert [(row["name"], row["args"]["sam"]) for row in found] == ARMS
    assert all(row["capacity"]["parameters"] > 1e6 and row["note"] == "" and row["met"] is None for row in found)


# The search ---------------------------------------------------------------------------------------------------------


def test_the_nearest_value_is_found_as_by_looking_at_all_of_them():
    draw = random.Random(0)
    for _ in range(300):
        values = sorted(draw.sample(range(1, 60), draw.randint(1, 20)))
        figures_of, total = {}, 0
        for value in values:
            total += draw.choice((0, 0, 1, 2, 7))  # level stretches too
            figures_of[value] = total
        goal = draw.choice((draw.randint(-2, 70), draw.randint(0, 70) + 0.5))
        best = min(values, key=lambda value: (abs(figures_of[value] - goal), value))
        assert nearest(values, figures_of.get, goal, rising=True) == best
        assert nearest(values, figures_of.get, goal, rising=False) == best


@pytest.mark.parametrize("by", ["parameters", "mixer_parameters", "flops", "state"])
def test_a_known_optimum_is_found_and_half_way_goes_down(rows, by):
    low, high = (figure(a_run("low_rank", rank=rank), by) for rank in (11, 12))
    for goal, rank in ((low, 11), ((low + high) / 2, 11), ((low + high) / 2 + 1, 12)):
        (row,) = rows(f"protocol={SMALL}", "low_rank mixer.sam=true", "--budget", f"{by}={goal}")
        assert (row["args"]["rank"], row["was"], row["knob"]) == (rank, 16, "rank")
        assert row["gap"] == pytest.approx(100 * ((low if rank == 11 else high) / goal - 1))


def test_values_that_a_mixer_refuses_are_never_chosen(rows):
    run = a_run("quasiseparable", heads=8)
    assert values_allowed(run, task_of(run), "groups") == [1, 2, 4, 8]
    assert values_allowed(a_run("quasiseparable", heads=8, groups=4), task_of(run), HEADS) == [4, 8, 16, 32, 64]
    two, four = (figure(turned(run, "groups", groups), "flops") for groups in (2, 4))
    words = (f"protocol={SMALL}", "quasiseparable mixer.heads=8 mixer.sam=true", "--knob", "groups")
    (row,) = rows(*words, "--budget", f"flops={(two + four) / 2 - 1}")
    assert row["args"]["groups"] == 2


def test_values_at_which_a_mixer_is_unfit_are_never_chosen(rows, monkeypatch):
    monkeypatch.setattr(LowRank, "unfit", classmethod(lambda cls, grant, args: "even" if args.rank % 2 == 0 else ""))
    state = figure(a_run("low_rank", rank=10), "state")
    (row,) = rows(f"protocol={SMALL}", "low_rank mixer.sam=true mixer.rank=3", "--budget", f"state={state}")
    assert row["args"]["rank"] == 9  # as far as 11


def test_heads_are_turned_only_where_asked_for_and_every_count_is_looked_at(rows):
    words = (f"protocol={SMALL}", "low_rank mixer.sam=true", "--budget", "state=120")
    (row,) = rows(*words)
    assert (row["knob"], row["args"]["heads"]) == ("rank", 4)
    (row,) = rows(*words, "--knob", "heads")
    assert (row["args"]["rank"], row["args"]["heads"], row["capacity"]["state_per_head"]) == (16, 8, 128)
    run = a_run("dense")
    goal = figure(turned(run, "heads", 16), "parameters")
    (row,) = rows(f"protocol={SMALL}", "dense", "--knob", "heads", "--budget", f"parameters={goal}")
    assert (row["args"]["heads"], row["gap"], row["met"]) == (16, 0, True)


def test_others_are_matched_to_one_arm(rows):
    words = (f"protocol={SMALL}", "mixer.sam=true", "quasiseparable", "semiseparable", "low_rank", "attention")
    found = {row["name"]: row for row in rows(*words, "--like", "quasiseparable mixer.state=32")}
    goal = figure(a_run("quasiseparable", state=32), "mixer_parameters")
    assert (found["quasiseparable"]["args"]["state"], found["quasiseparable"]["gap"]) == (32, 0)
    for row in found.values():
        counts = [figure(turned(a_run(row["name"]), row["knob"], v), "mixer_parameters") for v in range(1, 70)]
        assert row["capacity"]["mixer_parameters"] == min(counts, key=lambda count: abs(count - goal))
    found = {row["name"]: row for row in rows(*words, "--like", "low_rank mixer.rank=24", "--by", "state")}
    assert found["quasiseparable"]["args"]["state"] == found["semiseparable"]["args"]["state"] == 24
    assert found["attention"]["note"] == "state grows with the length" and found["attention"]["gap"] is None


@pytest.mark.parametrize("name", WITHOUT)
def test_what_has_no_knob_says_so_and_does_not_move(rows, name):
    words = (f"protocol={SMALL}", name, "--budget", "parameters=1e6")
    for row in rows(*words):
        assert (row["knob"], row["met"]) == ("", False)
        assert row["note"] == "missed by more than 5 %; no knob but heads"
        run = a_run(name, sam=row["args"]["sam"])
        assert row["capacity"] == dataclasses.asdict(figures(run, task_of(run)))


def test_a_knob_that_a_row_lacks_or_that_moves_nothing_is_named(rows):
    words = (f"protocol={SMALL}", "low_rank", "quasiseparable", "--knob", "groups", "--budget", "state=256")
    notes = {row["name"]: row["note"] for row in rows(*words)}
    assert notes["low_rank"] == "no knob groups; it has: rank, heads"
    assert notes["quasiseparable"] == "groups does not change its state"


def test_the_search_ends_where_no_one_needs_more(rows):
    (row,) = rows(f"protocol={SMALL}", "low_rank mixer.sam=true", "--budget", "state=1e9")
    assert row["args"]["rank"] == LARGEST and row["note"] == "missed by more than 5 %" and not row["met"]


# Rows ---------------------------------------------------------------------------------------------------------------


def test_a_list_is_a_row_each_for_one_mixer_or_for_all_and_the_protocol_may_vary(rows, call):
    words = (
        f"protocol={SMALL}",
        "dense",
        "semiseparable mixer.sam=true protocol.shell.expand=[1,2] mixer.state=[8,16]",
    )
    found = rows(*words)
    labels = [(row["name"], row["protocol"], row["args"].get("state")) for row in found]
    assert labels == [
        ("dense", SMALL, None),
        *(("semiseparable", f"{SMALL}[shell.expand={e}]", s) for e in (1, 2) for s in (8, 16)),
    ]
    assert found[1]["capacity"]["parameters"] < found[3]["capacity"]["parameters"]
    title, *lines = call(*words)[1].splitlines()
    assert title == f"{SMALL}: 24 tokens" and f"| {SMALL}[shell.expand=2] |" in lines[-1]
    assert call(*words[:2], "protocol.shell.expand=1")[1].startswith(f"{SMALL}[shell.expand=1]: 24 tokens\n")
    found = rows(f"protocol={SMALL}", "low_rank", "dense", "mixer.rank=[4,8]", "mixer.sam=false")
    assert [row["args"].get("rank") for row in found] == [4, 8, None]


def test_two_directions_with_one_shell_cost_no_second_set_of_projections(rows):
    """The quasiseparable form against its heuristics: shared projections, and a second shell around one direction."""
    words = ("semiseparable protocol.shell.directions=[one,concat,add,mult]", "mixer.sam=true")
    found = rows("protocol=mini_mlm", "quasiseparable", "add", *words)
    quasi, shared, one, concat, add, mult = (row["capacity"] for row in found)
    layers, width, inner, taps = 6, 256, 512, 7
    block = 2 * inner * width + inner * (taps + 1) + inner + inner * width  # in_zv, taps of v, norm, out
    assert add["parameters"] - one["parameters"] == layers * block + one["mixer_parameters"]
    assert mult["parameters"] == add["parameters"] and add["flops"] == 2 * one["flops"]
    beside = layers * (inner + inner * width)  # a longer norm and out-projection
    assert concat["parameters"] - one["parameters"] == beside + one["mixer_parameters"]
    assert 0 < quasi["parameters"] - shared["parameters"] < 0.001 * one["parameters"]
    assert quasi["parameters"] - one["parameters"] < 1.2 * one["mixer_parameters"]


def test_an_unfit_mixer_stands_in_the_table_with_its_reason(rows, monkeypatch):
    monkeypatch.setattr(Dense, "unfit", classmethod(lambda cls, grant, args: "too dense"))
    for budget in ((), ("--budget", "parameters=1e5")):
        found = rows(f"protocol={SMALL}", "dense", "low_rank mixer.sam=true", *budget)
        assert (found[0]["capacity"], found[0]["note"]) == (None, "unfit: too dense")
        assert found[1]["capacity"] and "unfit" not in found[1]["note"]


def test_in_the_table_of_all_a_refusal_is_a_note_and_of_a_named_mixer_an_error(rows, call):
    found = {row["name"]: row for row in rows(f"protocol={SMALL}", "mixer.sam=true")}
    assert found["dense"]["capacity"] is None and "no form with sam=true" in found["dense"]["note"]
    assert found["attention"]["capacity"]
    code, _, err = call(f"protocol={SMALL}", "mixer.sam=true", "attention", "dense")
    assert code == 2 and "no form with sam=true" in err


def test_a_mixer_that_names_a_knob_it_does_not_have_is_refused(monkeypatch):
    monkeypatch.setattr(LowRank, "knobs", ("rnk",))
    with pytest.raises(compose.Refusal, match="mixer 'low_rank' names knobs that are no integer keys of its own: rnk"):
        matched_all(table(SMALL, {}, [Arm("low_rank", {})]), Budget("state", 128, ""), "")


def test_mixers_may_stand_behind_options_and_elsewhere_a_bare_word_is_still_refused(call, capsys):
    code, out, _ = call(f"protocol={SMALL}", "--json", "dense", "mixer.heads=2", "dft")
    assert code == 0 and [row["name"] for row in json.loads(out)["rows"]] == ["dense", "dft"]
    with pytest.raises(SystemExit):
        cli.parse(["check", "dense", "--json", "dft"])


# What is shown and written ------------------------------------------------------------------------------------------


def test_markdown_for_files_and_a_drawn_table_for_a_terminal(call, monkeypatch):
    words = (f"protocol={SMALL}", "low_rank mixer.sam=true", "protocol.shell.conv_width=[3,5]", "--like", "dense")
    refused = call(*words)
    assert refused[0] == 2 and "2 rows" in refused[2]
    words = (*words[:-1], "dense protocol.shell.conv_width=3")
    out = call(*words)[1]
    assert "| mixer | keys | protocol |" in out and "| low_rank | sam=true heads=4 rank=" in out
    lines = [line for line in out.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1 and len(lines) == 4
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "240")
    drawn = call(*words)[1]
    assert "quick_recall[shell.conv_width=5]" in drawn and "---:" not in drawn


def test_files_are_whole_mixers_that_compose_build_and_cost_what_they_say(call, rows, tmp_path, monkeypatch):
    words = (f"protocol={SMALL}", "low_rank", "quasiseparable mixer.sam=true", "dense", "--budget", "state=200")
    found, out = rows(*words), tmp_path / "matched"
    code, text, _ = call(*words, "--out", out)
    names = ["low_rank-sam-false", "low_rank-sam-true", "quasiseparable"]
    assert code == 0 and sorted(p.stem for p in out.iterdir()) == names
    assert all(str(out / f"{name}.yaml") in text for name in names)
    configs = tmp_path / "configs"
    shutil.copytree(compose.CONFIGS, configs)
    for name in names:
        shutil.copy(out / f"{name}.yaml", configs / "mixer" / f"{name}-matched.yaml")
    monkeypatch.setattr(compose, "CONFIGS", configs)
    for name, row in zip(names, (row for row in found if row["met"]), strict=True):
        lines = (out / f"{name}.yaml").read_text().splitlines()
        assert lines[0].startswith(f"# Matched under {SMALL}, 24 tokens: state 192, -4.00 % of the budget 200.")
        run = make_run(SMALL, f"{name}-matched", {}, 0, 0)
        assert {"name": run.mixer.name, **run.mixer.args} == json.loads(lines[1].split(": ", 1)[1])
        assert dataclasses.asdict(figures(run, task_of(run))) == row["capacity"]
        assert sum(p.numel() for p in built(run)[0].parameters()) == row["capacity"]["parameters"]


def test_nothing_is_overwritten_and_nothing_half_written(call, tmp_path):
    (tmp_path / "low_rank.yaml").write_text("mine")
    words = (f"protocol={SMALL}", "attention mixer.sam=true", "low_rank mixer.sam=true", "--budget", "flops=1e6")
    code, out, err = call(*words, "--out", tmp_path)
    assert (code, out) == (2, "") and str(tmp_path / "low_rank.yaml") in err and err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["low_rank.yaml"]
    assert (tmp_path / "low_rank.yaml").read_text() == "mine"


def test_meta_models_hold_no_values():
    run = a_run("low_rank", rank=LARGEST)
    assert torch.get_default_device().type == "cpu" and figures(run, task_of(run)).parameters > LARGEST
    assert torch.get_default_device().type == "cpu"
