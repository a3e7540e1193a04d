"""What `plan` says of a made-up store: states, reasons, costs, schedule, effects; and the pilots that it measures."""

import dataclasses
import json
import math
import statistics
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from bench import cli, run
from bench.compose import ROOT, make_run
from bench.config import NEUTRAL, Run, digest, resolved
from bench.plan.costs import longest, makespan
from bench.plan.effects import _sd, _sds
from bench.plan.evidence import Pilot, append_pilot, read_pilots
from bench.plan.graph import Node
from bench.plan.verb import Plan, pilots_missing, plan
from bench.provenance import code_digests, other_code
from bench.record import Capacity, Cost, Record
from bench.report import cost
from bench.report.frame import controlled, rows
from bench.store import Store
from bench.sweep import grid, load, ordered
from tests.test_store import a_record
from tests.test_sweep import PLAIN, a_sweep, chain, refusal

__all__ = ["chain"]  # a fixture
GOLDEN = Path(__file__).parent / "golden"
COST = Cost(wall=0, startup=1, first_step=2, evaluation=3, step_p10=1, step_p50=2, step_p90=3, peak_memory=1, tokens=1)
CHAIN = {
    "protocols": ["base", "child", "grandchild", "other"],
    "mixers": [{"name": "identity", "heads": 2}, {"name": "low_rank", "heads": 2, "sam": True}],
    "seeds": [0, 1],
    "varies": {},
    "columns": [{"protocol": "other", "metric": "accuracy"}],
}


def finish(
    store: Store, one: Run, wall: float = 10.0, outcome: str = "ok", device: str = "gadget", **changes
) -> Record:
    """A record of a run, put into the store with its weights. Each has its device to itself, on a day of its own."""
    made = a_record(0)
    day = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(days=len(list(store.root.glob("runs/*/record.json"))))
    fields = {
        "id": one.id,
        "label": one.label,
        "outcome": outcome,
        "reason": "" if outcome == "ok" else "because",
        "protocol_id": one.protocol_id,
        "run": json.loads(json.dumps(resolved(one))),
        "environment": dataclasses.replace(made.environment, device=device),
        "cost": dataclasses.replace(COST, wall=wall),
        "capacity": Capacity(250_000, 10, 1, 1),
        "finished": day.isoformat(timespec="seconds"),
    }
    record = dataclasses.replace(made, **(fields | changes))
    store.finish(record, {})
    if outcome == "ok":
        store.weights(one.id).write_bytes(b"")
    return record


def a_pilot(run: Run, **changes) -> Pilot:
    cost = {key: value for key, value in dataclasses.asdict(COST).items() if key not in ("wall", "tokens")}
    pilot = Pilot(
        protocol_id=run.protocol_id,
        label=run.label,
        mixer=resolved(run)["mixer"],
        device="gadget",
        world=1,
        steps=2,
        **cost,
        weights_bytes=1_000_000,
        checkpoint_bytes=3_000_000,
        record_bytes=2_000,
        torch="2",
        time="2026-01-01T00:00:00+00:00",
    )
    return dataclasses.replace(pilot, **changes)


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "results")


def planned(folder: Path, store: Store, parallel: int = 1, device: str = "", **changes) -> Plan:
    return plan(a_sweep(folder, **changes), Store(store.root), 2, parallel, device)


def said(folder: Path, store: Store, capsys, *words: str, **changes) -> str:
    a_sweep(folder, **changes)
    options = cli.parse(["plan", str(folder / "x.yaml"), *words, f"where.results={store.root}"])
    assert cli.plan(options) == 0
    lines = capsys.readouterr().out.replace(str(folder), "…").splitlines()
    return "\n".join(line.rstrip() for line in lines) + "\n"


def by_name(folder: Path, **changes) -> dict[tuple, Run]:
    runs = ordered(grid(a_sweep(folder, **changes)))
    return {(r.label, r.mixer.name, r.seed): r for r in runs}


# The graph ----------------------------------------------------------------------------------------------------------


def a_busy_store(folder: Path, store: Store) -> dict[tuple, Run]:
    runs = by_name(folder, **CHAIN)
    finish(store, runs["base", "identity", 0])
    store.weights(runs["base", "identity", 0].id).unlink()
    finish(store, runs["other", "identity", 0], 20.0)
    finish(store, runs["base", "low_rank", 0], 12.0)
    finish(store, runs["child", "low_rank", 0], outcome="diverged")
    store.take(runs["base", "identity", 1].id)
    for _ in range(3):
        store.fail(runs["base", "low_rank", 1].id, "error", "ValueError: wrong\ntraceback")
    return runs


def test_one_screen(chain, tmp_path, store, capsys):
    a_busy_store(tmp_path, store)
    text = said(tmp_path, store, capsys, "--parallel", "2", **CHAIN)
    assert text == (GOLDEN / "plan_unknown.txt").read_text()


def test_one_screen_when_all_costs_are_known(chain, tmp_path, store, capsys):
    runs = a_busy_store(tmp_path, store)
    for label in ("child", "grandchild"):
        append_pilot(store.root / "pilots.jsonl", a_pilot(runs[label, "identity", 0]))
    text = said(tmp_path, store, capsys, "--parallel", "2", **CHAIN)
    assert text == (GOLDEN / "plan_paid.txt").read_text()


def test_a_chain_counts_its_parents_once(chain, tmp_path, store):
    made = planned(tmp_path, store, **CHAIN | {"protocols": ["grandchild", "other"]})
    rows = [(row.protocol, row.depth, row.runs) for row in made.rows]
    assert rows == [("base", 0, 4), ("child", 1, 4), ("grandchild", 2, 4), ("other", 1, 4)]
    assert made.runs == 16


def test_weights_that_are_gone_cost_only_if_a_run_is_left_that_needs_them(chain, tmp_path, store):
    runs = by_name(tmp_path, **CHAIN | {"seeds": [0]})
    for one in runs.values():
        finish(store, one)
        store.weights(one.id).unlink()
    whole = planned(tmp_path, store, **CHAIN | {"seeds": [0]})
    assert (whole.states["done"], whole.states["again"]) == (8, 0) and whole.totals.device_seconds == (0, 0, 0)
    (store.folder(runs["grandchild", "identity", 0].id) / "record.json").unlink()
    made = planned(tmp_path, store, **CHAIN | {"seeds": [0]})
    assert (made.states["missing"], made.states["again"]) == (1, 2)  # its parent and its parent's parent


def test_a_run_in_hand_costs_what_is_left_of_it(chain, tmp_path, store):
    runs = by_name(tmp_path, **CHAIN)
    append_pilot(store.root / "pilots.jsonl", a_pilot(runs["base", "identity", 0]))
    only = CHAIN | {"protocols": ["base"], "mixers": CHAIN["mixers"][:1], "seeds": [0]}
    only["columns"] = [{"protocol": "base", "metric": "accuracy"}]
    folder = store.open(runs["base", "identity", 0].id)
    (folder / "progress.json").write_text('{"step": 3, "steps": 4}')
    assert planned(tmp_path, store, **only).totals.device_seconds == (7 / 4, 8 / 4, 9 / 4)


# Why ----------------------------------------------------------------------------------------------------------------


def why(made: Plan) -> list[tuple[int, str]]:
    return [(reason.runs, reason.text) for reason in made.new]


def test_a_new_run_is_told_from_the_nearest_finished_one(tmp_path, store):
    plain = {"mixers": [{"name": "low_rank", "heads": 2, "sam": [False, True]}], "varies": {"budget.steps": [2]}}
    for one in grid(a_sweep(tmp_path, **plain)):
        finish(store, one)
    assert why(planned(tmp_path, store, **plain)) == []
    more = planned(tmp_path, store, **plain | {"varies": {"budget.steps": [3]}})
    assert why(more) == [(2, "protocol.budget.steps 2 -> 3")]  # both levels of SAM have their own nearest run
    assert more.new[0].fields == ("protocol.budget.steps",)
    seeds = planned(tmp_path, store, **plain | {"seeds": [0, 1, 2]})
    assert why(seeds) == [(4, "another seed (finished: 0)")] and seeds.new[0].fields == ("seed",)
    rank = [{"name": "low_rank", "heads": 2, "sam": True, "rank": 5}]
    assert why(planned(tmp_path, store, **plain | {"mixers": rank})) == [(1, "mixer.rank 16 -> 5")]
    other = [{"name": "identity", "heads": 2}]
    assert why(planned(tmp_path, store, **plain | {"mixers": other})) == [(1, "no finished run of the mixer")]
    digits = plain | {"protocols": ["quick_digits"], "columns": [{"protocol": "quick_digits", "metric": "accuracy"}]}
    assert why(planned(tmp_path, store, **digits)) == [(2, "no finished run of the mixer on task digits")]


def test_a_child_is_new_because_its_parent_is(chain, tmp_path, store):
    for one in by_name(tmp_path, **CHAIN).values():
        finish(store, one)
    made = planned(tmp_path, store, **CHAIN | {"varies": {"shell.conv_width": [5]}})
    width = "protocol.shell.conv_width 3 -> 5"
    assert why(made) == [(4, width), (12, f"{width}, starts from another parent (protocol.init)")]


def test_a_key_that_older_records_do_not_have_is_read_as_neutral(tmp_path, store):
    plain = {"varies": {}}
    (one,) = grid(a_sweep(tmp_path, **plain))
    old = json.loads(json.dumps(resolved(one)))
    del old["protocol"]["shell"]["directions"]
    finish(store, one, run=old)
    assert planned(tmp_path, store, **plain).states["done"] == 1
    made = planned(tmp_path, store, varies={"budget.steps": [3]})
    assert why(made) == [(1, "protocol.budget.steps 300 -> 3")]
    made = planned(tmp_path, store, varies={"shell.directions": ["concat"]})
    assert why(made) == [(1, f"protocol.shell.directions {NEUTRAL['protocol.shell.directions']} -> concat")]


# Costs --------------------------------------------------------------------------------------------------------------

ONE = {"mixers": [{"name": "identity", "heads": 2}], "seeds": [0, 1, 2, 3, 4]}


def test_every_run_of_a_departure_that_leaves_its_parent_as_it_is_has_a_row(tmp_path):
    """Two arms of Table 4 depart from the length of the fine-tunings only; the pretraining has that length anyway."""
    made = plan(load(ROOT / "sweeps" / "table4.yaml"), Store(tmp_path), 2, 1, "")
    assert sum(row.runs for row in made.rows) == made.runs == 1025


def test_costs_come_from_records_then_pilots_then_other_mixers_and_are_never_guessed(tmp_path, store):
    runs = grid(a_sweep(tmp_path, **ONE))
    pilots = store.root / "pilots.jsonl"
    unknown = planned(tmp_path, store, **ONE)
    assert unknown.totals.device_seconds is None and unknown.rows[0].sources == {"unknown": 5}
    assert unknown.totals.disk_bytes is None and unknown.totals.wall_seconds is None
    (other,) = grid(a_sweep(tmp_path, mixers=[{"name": "dense", "heads": 2}]))
    append_pilot(pilots, a_pilot(other, evaluation=13.0))
    made = planned(tmp_path, store, **ONE)
    assert made.rows[0].sources == {"other mixers": 5} and made.totals.device_seconds == (85, 90, 95)
    append_pilot(pilots, a_pilot(runs[0]))
    made = planned(tmp_path, store, **ONE)
    assert made.rows[0].sources == {"pilot": 5} and made.totals.device_seconds == (35, 40, 45)
    assert made.totals.disk_bytes == (5 * 1_002_000, 5 * 1_002_000 + 3_000_000)
    finish(store, runs[0], 50.0)
    made = planned(tmp_path, store, **ONE)  # one record: its wall in the middle, its own steps around it
    assert made.rows[0].sources == {"records": 4} and made.totals.device_seconds == (4 * 7, 4 * 50, 4 * 50)
    finish(store, runs[1], 40.0)
    finish(store, runs[2], 70.0)
    made = planned(tmp_path, store, **ONE)  # three: least, median, most
    assert made.totals.device_seconds == (2 * 40, 2 * 50, 2 * 70)


def test_costs_are_those_of_one_device(tmp_path, store):
    runs = grid(a_sweep(tmp_path, **ONE))
    finish(store, runs[0], 50.0, device="slow")
    for one in runs[1:3]:
        finish(store, one, 5.0, device="fast")
    made = planned(tmp_path, store, **ONE)
    assert made.device == "fast" and made.totals.device_seconds.mid == 10
    made = planned(tmp_path, store, device="slow", **ONE)
    assert made.device == "slow" and made.totals.device_seconds.mid == 100
    known = refusal(planned, tmp_path, store, device="quick", **ONE)
    assert known == "no record or pilot of this sweep on 'quick'; there are some on: fast, slow"


def test_of_devices_that_are_known_alike_the_last_measured_prices_and_the_others_are_named(tmp_path, store, capsys):
    """Committed pilots of another machine must not hide those of one's own."""
    runs = grid(a_sweep(tmp_path, **ONE))
    (store.root / "paper").mkdir(parents=True)
    append_pilot(store.root / "paper" / "pilots.jsonl", a_pilot(runs[0], device="Z", time="2026-01-02T00:00:00+00:00"))
    append_pilot(store.root / "pilots.jsonl", a_pilot(runs[0], device="A", time="2026-01-03T00:00:00+00:00"))
    made = planned(tmp_path, store, **ONE)
    assert (made.device, made.devices) == ("A", ("A", "Z"))
    assert "--device takes the costs of another: Z" in said(tmp_path, store, capsys, **ONE)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"step_p50": -1.0}, "pilot.step_p50 is -1.0"), ({"world": 0}, "pilot.world is 0"), ({"time": "x"}, "no time")],
)
def test_a_pilot_that_cannot_have_been_measured_is_refused(tmp_path, store, change, message):
    path = store.root / "pilots.jsonl"
    good = dataclasses.asdict(a_pilot(grid(a_sweep(tmp_path, **ONE))[0]))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(good | change) + "\n")
    assert message in refusal(planned, tmp_path, store, **ONE)


def at(second: int) -> str:
    return f"2026-03-01T00:{second // 60:02d}:{second % 60:02d}+00:00"


def test_of_runs_that_shared_a_device_only_the_shares_count_and_the_plan_says_so(tmp_path, store, capsys):
    """Three from 0 to 60, of which one, of another sweep, is no cost of this one: 20 s each."""
    runs = grid(a_sweep(tmp_path, **ONE))
    (other,) = grid(a_sweep(tmp_path, mixers=[{"name": "dense", "heads": 2}], varies={"budget.steps": [3]}))
    for one in (*runs[:2], other):
        finish(store, one, 60.0, finished=at(60))
    made = planned(tmp_path, store, **ONE)  # two: shares of what their steps make of a whole run too, 7 to 11 s
    assert made.totals.device_seconds == pytest.approx((3 * 7 / 3, 3 * 20, 3 * 20)) and made.totals.shared == 3
    finish(store, runs[2], 90.0, finished=at(190))
    made = planned(tmp_path, store, **ONE)  # three: least, median, most
    assert made.totals.device_seconds == pytest.approx((2 * 20, 2 * 20, 2 * 90)) and made.totals.shared == 2
    text = said(tmp_path, store, capsys, **ONE)
    assert "\nShared device  for 2 runs the seconds are shares of runs that had others beside them on" in text
    assert ", 1 at a time, each on a device of its own; the longest chain 20.0 s (20.0 to 90.0)\n" in text
    unknown = {"mixers": [{"name": "low_rank", "heads": 2, "sam": True}]}
    values = json.loads(said(tmp_path, store, capsys, "--json", **unknown))
    assert values["rows"][0]["sources"] == {"other mixers": 1} and values["totals"]["shared"] == 1


@pytest.mark.parametrize(
    ("ends", "cards"),
    [
        ((60, 119, 178), ("", "", "")),  # one after another; ends are cut to the second
        ((60, 60, 60), ("GPU-1", "GPU-2", "GPU-3")),
    ],
)
def test_runs_that_had_their_device_to_themselves_count_whole(tmp_path, store, capsys, ends, cards):
    runs = grid(a_sweep(tmp_path, **ONE))
    for one, end, card in zip(runs, ends, cards, strict=False):
        finish(store, one, 60.0, finished=at(end), card=card)
    made = planned(tmp_path, store, **ONE)
    assert made.totals.device_seconds == (120, 120, 120) and made.totals.shared == 0
    text = said(tmp_path, store, capsys, **ONE)
    assert "Shared device" not in text and "1 at a time; the longest chain alone 60.0 s\n" in text


def test_a_plan_and_the_cost_of_a_report_split_a_device_alike(tmp_path, store):
    fields = ONE | {"seeds": [0, 1, 2, 3], "family": PLAIN["family"] | {"reference": {}, "comparisons": []}}
    sweep = a_sweep(tmp_path, **fields)
    ends = (30, 40, 50, 70)
    for one, end in zip(grid(sweep), ends, strict=True):
        finish(store, one, 30.0, finished=at(end))
    table = dataclasses.replace(controlled(rows(sweep, store), sweep), beside=cost.beside(store))
    told = [60 * float(parts.sum()) for parts in cost.parted(table, list(table.rows))]
    made = planned(tmp_path, store, **ONE)  # one run is left
    assert sum(told) == pytest.approx(70) and min(told) < 29
    assert made.totals.device_seconds == pytest.approx((min(told), statistics.median(told), max(told)))


def test_two_devices_for_a_run_cost_twice_their_wall_time(tmp_path, store):
    runs = grid(a_sweep(tmp_path, **ONE))
    append_pilot(store.root / "pilots.jsonl", a_pilot(runs[0], world=2, device="2 x gadget"))
    made = planned(tmp_path, store, **ONE)
    assert made.totals.device_seconds.mid == 2 * 40 and made.totals.wall_seconds.mid == 40


def test_pilots_of_another_number_of_devices_are_no_costs_of_this_one(tmp_path, store):
    both = {"mixers": [*ONE["mixers"], {"name": "dense", "heads": 2}], "seeds": [0]}
    runs = grid(a_sweep(tmp_path, **both))
    for one in runs:
        append_pilot(store.root / "pilots.jsonl", a_pilot(one))
    append_pilot(store.root / "pilots.jsonl", a_pilot(runs[0], world=8, evaluation=99.0))
    made = planned(tmp_path, store, **both)
    assert made.totals.device_seconds == (14, 16, 18) and made.rows[0].sources == {"pilot": 2}


def test_the_schedule_respects_chains_as_computed_by_hand(chain, tmp_path):
    """Two seeds of base (4 s) -> other (2 s), child (3 s). With two workers: bases to 4, other 0 to 6, child 0 to 7,
    other 1 to 8, child 1 to 10; with three other 1 from 4 to 6 beside them, child 1 from 6 to 9."""
    fields = CHAIN | {"protocols": ["other", "child"], "mixers": CHAIN["mixers"][:1]}
    runs = ordered(grid(a_sweep(tmp_path, **fields)))
    assert [r.label for r in runs] == ["base", "other", "child"] * 2
    nodes = [Node(r, "missing", 1.0, "", True) for r in runs]
    seconds = {r.id: {"base": 4.0, "other": 2.0, "child": 3.0}[r.label] for r in runs}
    assert [makespan(nodes, seconds, n) for n in (1, 2, 3, 4, 9)] == [18.0, 10.0, 9.0, 7.0, 7.0]
    assert longest(nodes, seconds) == 7.0


# Effects ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seeds", "alone", "of_thirteen"), [(3, 3.26, 11.8), (5, 1.68, 3.38), (8, 1.16, 1.89), (10, 1.0, 1.54)]
)
def test_the_smallest_effect_is_that_of_the_noncentral_t(seeds, alone, of_thirteen):
    assert _sds(seeds, 13, 0.05) == (pytest.approx(alone, rel=5e-3), pytest.approx(of_thirteen, rel=5e-3))


def test_effects_are_in_sds_until_three_seeds_are_finished_and_then_in_the_columns_units(tmp_path, store):
    fields = {"mixers": [{"name": "identity", "heads": 2}, {"name": "dense", "heads": 2}], "seeds": [0, 1, 2, 3, 4]}
    runs = grid(a_sweep(tmp_path, **fields))
    gaps = {0: 0.1, 1: 0.2, 2: 0.6}  # identity minus dense, by seed
    for one in runs:
        if one.seed in (0, 1):
            finish(store, one, metrics={"accuracy": one.seed + gaps[one.seed] * (one.mixer.name == "identity")})
    (effect,) = planned(tmp_path, store, **fields).effects
    assert effect.units is None and effect.sds == (pytest.approx(1.68, abs=0.01),) * 2 and effect.tests_from == 6
    for one in runs:
        if one.seed == 2:
            finish(store, one, metrics={"accuracy": 2 + gaps[2] * (one.mixer.name == "identity")})
    (effect,) = planned(tmp_path, store, **fields).effects
    sd = math.sqrt(0.07)  # of 0.1, 0.2, 0.6
    assert effect.sd == pytest.approx(sd) and effect.sd_seeds == 3
    assert effect.units == (pytest.approx(effect.sds[0] * sd),) * 2


def test_controls_and_a_a_arms_are_no_comparisons(tmp_path, store):
    low = {"name": "low_rank", "heads": 2, "sam": True}
    mixers = [{"name": "identity", "heads": 2}, {"name": "dense", "heads": 2}, low, {**low, "salt": 1}]
    for controls, left in (([], 2), ([{"name": "identity"}], 1)):
        (effect,) = planned(tmp_path, store, mixers=mixers, controls=controls).effects
        assert effect.comparisons == left


def test_the_sd_of_many_arms_is_that_of_their_paired_differences():
    """Arms whose noise is drawn independently with SD 1: the differences of two have SD sqrt(2)."""
    import numpy as np

    values_AS = np.random.default_rng(0).normal(size=(40, 50)) + np.arange(50) * 3 + np.arange(40)[:, None] * 7
    assert _sd(values_AS.tolist()) == pytest.approx(math.sqrt(2), rel=0.05)


# Other code ---------------------------------------------------------------------------------------------------------


def test_a_plan_warns_as_a_sweep_does_of_seeds_that_would_mix_code_and_loads_no_torch(tmp_path, store, capsys):
    fields = {"mixers": [{"name": "identity", "heads": 2}, {"name": "dense", "heads": 2}], "seeds": [0, 1, 2]}
    runs = {(r.mixer.name, r.seed): r for r in grid(a_sweep(tmp_path, **fields))}
    old = code_digests(runs["dense", 0]) | {"train": "x"}
    environment = dataclasses.replace(a_record(0).environment, device="gadget", commit="0123456789")
    for name, seed in (("identity", 0), ("identity", 1), ("dense", 1)):  # seed 1 is whole, and 2 not begun
        finish(store, runs[name, seed], digests=old, environment=environment)
    found = [store.record(one.id) for one in runs.values()]
    missing = [one for one, record in zip(runs.values(), found, strict=True) if record is None]
    (line,) = other_code(missing, [record for record in found if record])
    assert line.startswith("with other code (commit 0123456) than the runs to do now: 1 of these records, of seed 0; ")
    assert planned(tmp_path, store, **fields).other_code == [line]
    assert f"Other code\n  {line}\n" in said(tmp_path, store, capsys, **fields)
    words = ["mixerbench", "plan", str(tmp_path / "x.yaml"), f"where.results={store.root}"]
    code = f"import sys; sys.argv = {words}; from bench import cli; cli.main(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert line in done.stdout and done.stdout.splitlines()[-1] == "False"
    finish(store, runs["dense", 0], digests=old)
    assert planned(tmp_path, store, **fields).other_code == []


# What users wait for, and what they get wrong -----------------------------------------------------------------------


def test_plan_loads_no_torch_and_writes_nothing(tmp_path):
    a_sweep(tmp_path)
    words = ["mixerbench", "plan", str(tmp_path / "x.yaml"), f"where.results={tmp_path / 'none'}"]
    code = f"import sys; sys.argv = {words}; from bench import cli; cli.main(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert not (tmp_path / "none").exists()


def test_json_holds_what_the_screen_cuts(tmp_path, store, capsys):
    mixers = [{"name": "low_rank", "heads": 2, "sam": True, "rank": list(range(1, 13))}]
    (one,) = grid(a_sweep(tmp_path, mixers=[{"name": "low_rank", "heads": 2, "sam": True}]))
    finish(store, one)
    text = said(tmp_path, store, capsys, mixers=mixers)
    assert "  and 4 more (--json has them)\n" in text
    values = json.loads(said(tmp_path, store, capsys, "--json", mixers=mixers))
    assert values["states"]["missing"] == 12 and len(values["new"]) == 12
    assert values["totals"]["unknown"] == [] and values["rows"][0]["sources"] == {"other mixers": 12}


def test_wrong_words_and_damaged_files_are_refused(tmp_path, store):
    (one,) = grid(a_sweep(tmp_path))
    sweep = str(tmp_path / "x.yaml")
    where = f"where.results={store.root}"
    assert "--parallel must be at least 1" in refusal(cli.plan, cli.parse(["plan", sweep, "--parallel", "0", where]))
    assert "--on goes with --pilot" in refusal(cli.plan, cli.parse(["plan", sweep, "--on", "c.yaml", where]))
    missing = [{"protocol": "quick_digits", "metric": "accuracy"}]
    assert "no such protocol in sweep 'x'" in refusal(planned, tmp_path, store, columns=missing)
    finish(store, one)
    path = store.folder(one.id) / "record.json"
    whole = path.read_text()
    undated = whole.replace('"finished":"2026', '"finished":"once 2026')
    recast = whole.replace('"cost"', '"coast"')
    for damage in (whole[:50], recast, whole.replace('"schema":1', '"schema":9'), "[]", undated):
        path.write_text(damage)
        assert str(path) in refusal(planned, tmp_path, store)
    path.write_text(whole.replace(one.id, "0" * 12, 1))
    assert f"record {'0' * 12} holds a run whose id is {one.id}" in refusal(planned, tmp_path, store)
    path.write_text(whole)
    append_pilot(store.root / "pilots.jsonl", a_pilot(one))
    with open(store.root / "pilots.jsonl", "a") as file:
        file.write('{"protocol_id": "half')
    assert "pilots.jsonl:2: not a whole pilot" in refusal(planned, tmp_path, store)


def test_committed_pilots_price_a_sweep_until_some_are_measured_here(tmp_path, store):
    one, folder = grid(a_sweep(tmp_path, **ONE))[0], store.root / "full_scale"
    append_pilot(folder / "pilots.jsonl", a_pilot(one, evaluation=13.0))
    assert planned(tmp_path, store, **ONE).totals.device_seconds == (85, 90, 95)
    missing = pilots_missing(tmp_path / "x.yaml", cli.where_of([f"where.results={store.root}"]), "")
    assert [run.protocol_id for run in missing] == [one.protocol_id]  # --pilot still measures here
    append_pilot(store.root / "pilots.jsonl", a_pilot(one))
    assert planned(tmp_path, store, **ONE).totals.device_seconds == (35, 40, 45)


def test_several_pilots_of_one_thing_give_a_range_and_the_last_one_its_middle(tmp_path, store):
    one, own = grid(a_sweep(tmp_path, **ONE))[0], store.root / "pilots.jsonl"
    for pilot in (a_pilot(one, evaluation=23.0), a_pilot(one), a_pilot(one, evaluation=13.0)):
        append_pilot(own, pilot)
    assert planned(tmp_path, store, **ONE).totals.device_seconds == (35, 90, 145)
    append_pilot(store.root / "later" / "pilots.jsonl", a_pilot(one, evaluation=1003.0))  # own ones count
    assert planned(tmp_path, store, **ONE).totals.device_seconds == (35, 90, 145)


def test_a_pilot_after_a_line_that_was_cut_stands_on_a_line_of_its_own(tmp_path):
    one = a_pilot(make_run("quick_copying", "identity", {}, 0, 0))
    path = tmp_path / "pilots.jsonl"
    path.write_text('{"protocol_id": "half')
    append_pilot(path, one)
    lines = path.read_text().splitlines()
    path.write_text(lines[1] + "\n")
    assert read_pilots(path) == [one]


# Ids stay exact though runs share their parts -----------------------------------------------------------------------


def test_runs_of_a_grid_share_protocol_and_mixer_and_keep_their_ids(tmp_path):
    primary = {"protocol": "quick_copying[optimiser.lr=1]", "metric": "accuracy"}
    family = PLAIN["family"] | {"primary": primary}
    runs = grid(a_sweep(tmp_path, seeds=[0, 1], varies={"optimiser.lr": [1, 1.5]}, family=family))
    assert runs[0].protocol is runs[2].protocol and runs[0].mixer is runs[3].mixer
    assert runs[0].protocol is not runs[1].protocol
    for path in sorted((Path(__file__).parents[1] / "sweeps").glob("*.yaml")):
        for one in ordered(grid(load(path))):
            assert one.id == digest(resolved(one))
            assert one.protocol_id == digest({"protocol": resolved(one)["protocol"]})


def test_equal_numbers_of_another_type_are_not_confused(tmp_path):
    """1 and 1.0 are one value where the type allows it; true is none."""
    ids = {make_run("quick_copying", "identity", {"protocol.optimiser.lr": v}, 0, 0).id for v in (1, 1.0)}
    assert len(ids) == 1
    assert "protocol.optimiser.lr" in refusal(
        make_run, "quick_copying", "identity", {"protocol.optimiser.lr": True}, 0, 0
    )


# Pilots -------------------------------------------------------------------------------------------------------------


def test_a_pilot_measures_each_protocol_and_mixer_once_and_leaves_no_record(chain, tmp_path, store, capsys):
    fields = CHAIN | {"protocols": ["child"], "columns": [{"protocol": "child", "metric": "accuracy"}]}
    a_sweep(tmp_path, **fields | {"varies": {"budget.steps": [90]}})
    words = ["plan", str(tmp_path / "x.yaml"), "--pilot", f"where.results={store.root}", "where.device=cpu"]
    assert cli.plan(cli.parse(words)) == 0
    out, error = capsys.readouterr()
    assert error.count("ms a step") == 4 and "known from\nbase" in "\n".join(x.rstrip() for x in out.splitlines())
    found = read_pilots(store.root / "pilots.jsonl")
    assert {(p.label, p.mixer["name"]) for p in found} == {
        (label, mixer) for label in ("base", "child[budget.steps=90]") for mixer in ("identity", "low_rank")
    }
    assert {p.label: p.steps for p in found} == {"base": 2, "child[budget.steps=90]": 60}
    for one in found:
        assert 0 < one.step_p10 <= one.step_p50 <= one.step_p90 and one.evaluation > 0 and one.startup > 0
    assert [p.name for p in store.root.iterdir() if p.name not in ("cache", ".pilots")] == ["pilots.jsonl"]
    made = plan(load(tmp_path / "x.yaml"), Store(store.root), 2, 1, "")
    assert [row.sources for row in made.rows] == [{"pilot": 4}, {"pilot": 4}]
    assert cli.plan(cli.parse(words)) == 0
    assert capsys.readouterr().err.count("measured before on") == 4
    assert len(read_pilots(store.root / "pilots.jsonl")) == 4


def test_a_pilots_checkpoint_is_as_large_as_a_real_one(tmp_path, store, where):
    from bench.plan.pilot import one as measured
    from bench.worker import Stop

    changes = {"protocol.backbone.width": 256, "protocol.budget.steps": 2, "protocol.optimiser.ema": 0.5}
    wide = make_run("quick_copying", "low_rank", changes, 0, 0)
    store.writable(store.root)
    pilot = measured(wide, where, store, Stop(float("inf")))
    assert run.execute(wide, where, lambda: True) is None
    real = (Path(where.results) / "runs" / wide.id / "checkpoint.pt").stat().st_size
    assert pilot.checkpoint_bytes == pytest.approx(real, rel=0.02)
