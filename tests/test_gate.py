"""The gate cell by cell: which fact each departure excuses, which column and which arm is held to what.

Fabricated records, as in test_report.
"""

import copy
import dataclasses

import pytest

from bench.compose import make_run
from bench.config import NEUTRAL
from bench.provenance import code_digests, other_code
from bench.record import Chosen, Hashes, Record
from bench.report.frame import ABSENT, Row, controlled, nested, plain
from bench.sweep import Column, Departure
from tests.test_report import (
    ARMS,
    ATTENTION,
    DENSE,
    LOW,
    LOW_SAM,
    ODD,
    WIDER,
    a_row,
    a_sweep,
    changed,
    departing,
    refusal,
    rows_of,
    with_record,
)
from tests.test_store import a_record

# Columns ------------------------------------------------------------------------------------------------------------

PROTOCOLS = {"quick": {}, "rough": {"task.patch": 4}, "long": {"budget.steps": 600}}
COLUMNS = tuple(Column(label, metric) for label in PROTOCOLS for metric in ("accuracy", "loss"))


def rows_of_all(odd: dict[str, dict] | None = None) -> list[Row]:
    """`odd`: label of a protocol -> what differs there in low_rank."""
    return [
        a_row(m, seed, 0.5, changes | ((odd or {}).get(label, {}) if m == LOW else {}), label=label)
        for label, changes in PROTOCOLS.items()
        for m in ARMS
        for seed in (0, 1)
    ]


@pytest.mark.parametrize("label", PROTOCOLS)
def test_every_column_is_held_to_the_protocol_not_only_the_first(label):
    message = refusal(rows_of_all({label: {"optimiser.lr": 7}}), a_sweep(columns=COLUMNS))
    assert f"column '{label} x accuracy'" in message and "protocol.optimiser.lr: " in message
    assert "7 (low_rank)" in message


@pytest.mark.parametrize("label", PROTOCOLS)
@pytest.mark.parametrize("fact", ODD)
def test_every_column_is_held_to_its_blocks_not_only_the_first(label, fact):
    rows = [ODD[fact](r) if (r.protocol, r.mixer, r.seed) == (label, LOW, 1) else r for r in rows_of_all()]
    message = refusal(rows, a_sweep(columns=COLUMNS))
    assert f"column '{label} x accuracy', seed 1" in message and f"{fact}: " in message


def test_protocols_are_not_compared_with_each_other():
    assert len(controlled(rows_of_all(), a_sweep(columns=COLUMNS)).rows) == len(PROTOCOLS) * len(ARMS) * 2


# Departures ---------------------------------------------------------------------------------------------------------

VALUES = {
    "backbone.width": 40,
    "shell.conv_width": 5,
    "task.patch": 4,
    "optimiser.lr": 0.1,
    "budget.steps": 600,
    "precision": "tf32",
}
# Every other fact of a block is the same whatever departs.
EXCUSED = {
    "backbone.width": {"shared initialisation", "optimiser groups"},
    "shell.conv_width": {"shared initialisation", "optimiser groups"},
    "task.patch": {"shared initialisation", "batches", "optimiser groups"},
    "optimiser.lr": {"optimiser groups"},
    "budget.steps": {"batches"},
    "precision": {"precision"},
}
CELLS = [(key, fact) for key in VALUES for fact in ODD]


def one_odd(rows: list[Row], fact: str, mixer: dict) -> list[Row]:
    return [ODD[fact](r) if (r.mixer, r.seed) == (mixer, 0) else r for r in rows]


def verdict(rows: list[Row], sweep, fact: str, label: str, excused: bool) -> None:
    """The odd arm passes, or it is refused for this fact alone and by name."""
    if excused:
        assert controlled(rows, sweep).arms
        return
    message = refusal(rows, sweep)
    assert "seed 0, is not controlled" in message
    assert f"{fact}: " in message and f"({label})" in message
    assert [f for f in ODD if f"{f}: " in message] == [fact]


@pytest.mark.parametrize(("key", "fact"), CELLS)
def test_a_departure_excuses_the_facts_that_its_key_moves_and_no_other(key, fact):
    rows, sweep = departing({key: VALUES[key]}, Departure({"name": "dense"}, {key: VALUES[key]}, "a test"))
    controlled(rows, sweep)
    verdict(one_odd(rows, fact, DENSE), sweep, fact, "dense", fact in EXCUSED[key])


@pytest.mark.parametrize(("key", "fact"), CELLS)
def test_a_departure_of_one_arm_excuses_nothing_of_another(key, fact):
    rows, sweep = departing({key: VALUES[key]}, Departure({"name": "dense"}, {key: VALUES[key]}, "a test"))
    verdict(one_odd(rows, fact, LOW), sweep, fact, "low_rank", False)


@pytest.mark.parametrize(("key", "fact"), CELLS)
def test_arms_that_depart_alike_are_still_compared_with_each_other(key, fact):
    both = Departure({"sam": True}, {key: VALUES[key]}, "a test")
    rows = [a_row(r.mixer, r.seed, 0.5, {key: VALUES[key]} if r.mixer["sam"] else {}) for r in rows_of()]
    sweep = a_sweep(departures=(both,))
    controlled(rows, sweep)
    message = refusal(one_odd(rows, fact, LOW_SAM), sweep)
    assert f"{fact}: " in message and "(low_rank SAM)" in message and "attention SAM" in message


@pytest.mark.parametrize("fact", EXCUSED["optimiser.lr"])
def test_arms_that_depart_by_different_values_are_not_compared_in_what_these_move(fact):
    own = {"low_rank": 0.1, "attention": 0.2}
    rates = [{"optimiser.lr": own[m["name"]]} if m["sam"] else {} for m in ARMS]
    rows = [a_row(m, s, 0.5, rate) for m, rate in zip(ARMS, rates, strict=True) for s in (0, 1)]
    declared = [Departure({"name": n, "sam": True}, {"optimiser.lr": v}, "a test") for n, v in own.items()]
    assert controlled(one_odd(rows, fact, LOW_SAM), a_sweep(departures=tuple(declared))).arms


def test_two_departures_of_one_arm_excuse_what_either_moves():
    changes = {"optimiser.lr": 0.1, "budget.steps": 600}
    rows = [a_row(r.mixer, r.seed, 0.5, changes if r.mixer == DENSE else {}) for r in rows_of()]
    sweep = a_sweep(departures=tuple(Departure({"name": "dense"}, {k: v}, "a test") for k, v in changes.items()))
    for fact in ODD:
        excused = fact in ("optimiser groups", "batches")
        verdict(one_odd(rows, fact, DENSE), sweep, fact, "dense", excused)


# Tuning -------------------------------------------------------------------------------------------------------------


def tuned(rows: list[Row], mixer: dict, point: dict) -> list[Row]:
    return [with_record(r, chosen=Chosen(point, ())) if r.mixer == mixer else r for r in rows]


@pytest.mark.parametrize(("key", "fact"), CELLS)
def test_a_value_that_tuning_chose_excuses_as_a_departure_does(key, fact):
    rows = tuned(rows_of(), DENSE, {key: VALUES[key]})
    controlled(rows, a_sweep())
    verdict(one_odd(rows, fact, DENSE), a_sweep(), fact, "dense", fact in EXCUSED[key])


@pytest.mark.parametrize("fact", ODD)
def test_a_value_that_tuning_chose_of_the_mixer_itself_excuses_nothing(fact):
    rows = tuned(rows_of(), LOW, {"mixer.rank": 4})
    controlled(rows, a_sweep())
    verdict(one_odd(rows, fact, LOW), a_sweep(), fact, "low_rank", False)


@pytest.mark.parametrize("fact", ODD)
def test_arms_for_which_tuning_chose_the_same_value_are_compared(fact):
    rows = tuned(tuned(rows_of(), LOW, {"optimiser.lr": 0.1}), LOW_SAM, {"optimiser.lr": 0.1})
    message = refusal(one_odd(rows, fact, LOW), a_sweep())
    assert f"{fact}: " in message and "(low_rank)" in message and "low_rank SAM" in message


# Keys of a protocol -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("declared", "other"),
    [("backbone.norm", "backbone.norm_eps"), ("task.name", "task.names"), ("precision", "precision_of_sums")],
)
def test_a_departure_excuses_no_key_that_only_begins_like_its_own(declared, other):
    departure = Departure({"name": "dense"}, {declared: "mine"}, "a test")
    rows = [a_row(r.mixer, r.seed, 0.5, {declared: "mine" if r.mixer == DENSE else "all", other: 1}) for r in rows_of()]
    sweep = a_sweep(departures=(departure,))
    controlled(rows, sweep)
    rows = [a_row(DENSE, r.seed, 0.5, {declared: "mine", other: 2}) if r.mixer == DENSE else r for r in rows]
    message = refusal(rows, sweep)
    assert f"protocol.{other}: 2 (dense), 1 (low_rank" in message and f"protocol.{declared}: " not in message


def test_a_departure_of_a_whole_group_excuses_every_key_in_it():
    task = {"name": "recall", "pairs": 8}
    assert controlled(*departing({"task": task}, Departure({"name": "dense"}, {"task": task}, "a test"))).arms


YOUNG = [key.removeprefix("protocol.") for key in NEUTRAL if key.startswith("protocol.")]


def holding(row: Row, key: str, value) -> Row:
    """The row, its record holding one more key, its hashes as they are."""
    run = copy.deepcopy(row.record.run)
    return with_record(row, run=run | {"protocol": changed(run["protocol"], {key: value})})


@pytest.mark.parametrize("key", YOUNG)
def test_a_record_older_than_a_key_is_equal_to_those_that_hold_its_neutral_value(key):
    value = NEUTRAL[f"protocol.{key}"]
    # Beside nothing else that differs, and beside another arm's departure.
    for rows, sweep in ((rows_of(), a_sweep()), departing({"backbone.width": 40}, WIDER)):
        rows = [r if r.mixer == LOW else holding(r, key, value) for r in rows]
        assert {nested(r.record.run["protocol"], key) is ABSENT for r in rows} == {True, False}
        controlled(rows, sweep)


@pytest.mark.parametrize("key", YOUNG)
def test_a_record_older_than_a_key_is_refused_beside_another_value_and_by_that_key_alone(key):
    rows = [a_row(r.mixer, r.seed, 0.5, {} if r.mixer == LOW else {key: "other"}) for r in rows_of()]
    message = refusal(rows, a_sweep())
    assert message.count("protocol.") == 1 and f"protocol.{key}: other (dense" in message
    assert f"{plain(NEUTRAL[f'protocol.{key}'])} (low_rank)" in message


# Runs that failed ---------------------------------------------------------------------------------------------------


def failed(rows: list[Row], mixer: dict, outcome: str = "diverged") -> list[Row]:
    return [with_record(r, outcome=outcome, reason="nan", metrics={}) if r.mixer == mixer else r for r in rows]


@pytest.mark.parametrize("fact", ODD)
@pytest.mark.parametrize("mixer", [DENSE, ATTENTION], ids=["dense", "attention"])
def test_a_diverged_run_is_held_to_the_rules_of_its_block(fact, mixer):
    rows = failed(rows_of(), mixer)
    controlled(rows, a_sweep())
    label = {"dense": "dense", "attention": "attention SAM"}[mixer["name"]]
    verdict(one_odd(rows, fact, mixer), a_sweep(), fact, label, False)


def test_a_run_that_ended_before_its_first_step_shows_no_hash_and_is_compared_in_none():
    rows = [with_record(r, hashes=Hashes("", "", "")) if r.mixer == LOW else r for r in failed(rows_of(), LOW, "unfit")]
    assert len(controlled(rows, a_sweep()).rows) == len(rows)
    rows = [with_record(r, outcome="ok", metrics={"accuracy": 1.0}) for r in rows]  # no run ends well without a batch
    assert "batches: " in refusal(rows, a_sweep())


@pytest.mark.parametrize("file", ["mixers/scan", "mixers/low_rank"])
def test_arms_with_the_same_file_of_the_mixers_have_the_same_code_of_it(file):
    """A helper of several mixers, and a mixer's own file, between its arms."""
    having = [r for r in rows_of() if r.mixer["name"] == "low_rank"]
    others = [r for r in rows_of() if r.mixer["name"] != "low_rank"]
    for odd in (LOW, LOW_SAM):
        rows = [with_record(r, digests={**r.record.digests, file: "b" if r.mixer == odd else "a"}) for r in having]
        assert f"code of {file}" in refusal([*rows, *others], a_sweep())
    same = [with_record(r, digests={**r.record.digests, file: "a"}) for r in having]
    assert controlled([*same, *others], a_sweep()).arms


def test_a_departure_to_the_value_of_all_others_takes_no_arm_out_of_the_comparison():
    alike = Departure({"name": "dense"}, {"backbone.width": 32}, "a test")
    rows, sweep = departing({}, alike)
    assert controlled(rows, sweep).arms
    odd = [ODD["shared initialisation"](r) if r.mixer == DENSE and r.seed == 0 else r for r in rows]
    assert "shared initialisation" in refusal(odd, sweep)


def test_a_departure_of_other_lengths_excuses_no_other_parent():
    changes = {"task.lengths": [1], "init": "abc"}
    rows, sweep = departing(changes, Departure({"name": "dense"}, {"task.lengths": [1]}, "a test"))
    assert "protocol.init" in refusal(rows, sweep)


# Before the first run ------------------------------------------------------------------------------------------------


def of_code(mixer: str, seed: int, **odd: str) -> Record:
    """A finished run of today's code, but for `odd` files ('__' for '/')."""
    run = make_run("quick_copying", mixer, {}, seed, 0)
    digests = code_digests(run) | {name.replace("__", "/"): digest for name, digest in odd.items()}
    environment = dataclasses.replace(a_record(seed).environment, commit="0123456789abcdef")
    return dataclasses.replace(a_record(seed), digests=digests, environment=environment)


@pytest.mark.parametrize(
    ("mixer", "odd", "files"),
    [
        ("identity", {"train": "x"}, "train"),
        ("cauchy", {"mixers__exponentials": "x", "mixers__cauchy": "y"}, ""),  # low rank has neither
        ("cauchy", {"kernels__low_rank": "x", "backbone": "y"}, "backbone, kernels/low_rank"),
        ("low_rank", {"mixers__low_rank": "x"}, "mixers/low_rank"),
    ],
)
def test_a_sweep_says_which_seeds_were_begun_with_other_code_that_the_rest_shares(mixer, odd, files):
    todo = [make_run("quick_copying", "low_rank", {}, seed, 0) for seed in (0, 1, 2)]
    done = [of_code(mixer, 0), of_code(mixer, 1, **odd), of_code(mixer, 2, **odd), of_code(mixer, 3, **odd)]
    found = other_code(todo, done)
    assert ["now: 2 of these records, of seed 1, 2; " in line for line in found] == [True] * bool(files)
    assert all("code (commit 0123456) than" in line and f"; files: {files}. " in line for line in found)
    assert other_code(todo[:1], done) == other_code([], done) == []
