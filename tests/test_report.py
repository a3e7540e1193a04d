"""The report: the gate lets through only controlled tables, statistics are what they say, files repeat bit for bit.

Records are fabricated with true ids; no number here was trained. The golden texts are there to be read, too.
"""

import copy
import csv
import io
import json
import os
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench import Refusal
from bench.compose import ROOT
from bench.config import digest, resolved
from bench.record import Capacity, Cost, Environment, Hashes, Record
from bench.report import analysis, certificate, frame, latex, tables
from bench.report.frame import Row, controlled
from bench.report.sections import sections
from bench.report.verb import report
from bench.store import Store
from bench.sweep import Column, Departure, Family, Sweep, grid, load

GOLDEN = Path(__file__).parent / "golden"
PROTOCOL = {
    "init": "",
    "task": {"name": "digits", "patch": 2, "vocabulary": {"size": 64}},
    "backbone": {"layers": 2, "width": 32, "positions": True},
    "shell": {"conv_width": 3, "gain": 0.0},
    "optimiser": {"lr": 0.003, "betas": [0.9, 0.98]},
    "budget": {"steps": 300, "batch": 64},
    "precision": "fp32",
}
DENSE = {"name": "dense", "sam": False, "heads": 2}
LOW = {"name": "low_rank", "sam": False, "heads": 2, "rank": 8}
LOW_SAM = {"name": "low_rank", "sam": True, "heads": 2, "rank": 8}
ATTENTION = {"name": "attention", "sam": True, "heads": 2, "rank": 8}
ARMS = (DENSE, LOW, LOW_SAM, ATTENTION)


def changed(protocol: dict, changes: dict) -> dict:
    protocol = copy.deepcopy(protocol)
    for key, value in changes.items():
        *steps, last = key.split(".")
        owner = protocol
        for step in steps:
            owner = owner[step]
        owner[last] = value
    return protocol


def a_record(run: dict, metrics: dict, outcome: str = "ok", label: str = "quick") -> Record:
    """A record as `run` would leave it: what arms share depends on protocol, seed and replica, never on the mixer."""
    seed, name, protocol = f"{run['seed']}.{run['replica']}", run["mixer"]["name"], run["protocol"]
    shape = digest({k: protocol[k] for k in ("backbone", "shell", "task")})[:4]
    shown = digest({k: protocol[k] for k in ("budget", "task")})[:4]
    return Record(
        schema=1,
        id=digest(run),
        outcome=outcome,
        reason="" if outcome == "ok" else "loss is not finite at step 40",
        label=label,
        protocol_id=digest({"protocol": protocol}),
        run=run,
        digests={"run": "r1", "train": "t1", "mixers/base": "b1", f"mixers/{name}": f"own-{name}"},
        hashes=Hashes(f"init-{seed}-{shape}", f"data-{seed}-{shown}", f"groups-{shape}"),
        capacity=Capacity(41_000 + 100 * len(name), 100 * len(name), 10_000, -1 if name == "attention" else 16),
        gain=(0.5,),
        gain_varying=(0.5,),
        environment=Environment(
            "",
            "3.11.9",
            "2.13.0",
            {"numpy": "2.4.6"},
            "A processor",
            1,
            1,
            protocol["precision"],
            "torch",
            False,
            1,
            "n",
        ),
        cost=Cost(*[1.0] * 7, peak_memory=1, tokens=100),
        metrics=metrics if outcome == "ok" else {},
        curve=((1, 2.0),),
        finished="2026-01-01T00:00:00+00:00",
        registration="",
        chosen=None,
        card="",
    )


def a_row(
    mixer: dict, seed: int, value: float, changes: dict | None = None, outcome="ok", label="quick", replica=0
) -> Row:
    run = {"protocol": changed(PROTOCOL, changes or {}), "mixer": mixer, "seed": seed, "replica": replica, "point": {}}
    record = a_record(run, {"accuracy": value, "loss": 3 - 2 * value}, outcome)
    return Row(label, mixer, seed, replica, record.id, record)


def a_sweep(**changes) -> Sweep:
    family = Family({"name": "dense"}, ("reference", "sam"), Column("quick", "accuracy"), 0.02, 0.05)
    plain = Sweep(
        "demo", "Does it pass?", ("quick",), (), (0, 1), (0,), {}, (), (Column("quick", "accuracy"),), family, ()
    )
    return replace(plain, **changes)


def text_of(table: frame.Table, proof: list[str]) -> str:
    found = analysis.analyse(table, {})
    return tables.markdown(table, found, sections(table, found), proof)


def csv_of(table: frame.Table) -> str:
    return tables.csv(table, analysis.analyse(table, {}))


def rows_of(arms=ARMS, seeds=(0, 1)) -> list[Row]:
    return [a_row(mixer, seed, 0.5 + i / 8 + seed / 64) for i, mixer in enumerate(arms) for seed in seeds]


def with_record(row: Row, **changes) -> Row:
    return replace(row, record=replace(row.record, **changes))


def refusal(rows: list[Row], sweep: Sweep) -> str:
    with pytest.raises(Refusal) as caught:
        controlled(rows, sweep)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Columns ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [k for k in frame.flattened(PROTOCOL) if k != "precision"])
@pytest.mark.parametrize("seeds", [(1,), (0, 1)])
def test_a_key_that_differs_in_one_arm_is_refused_by_name_with_both_values(key, seeds):
    old = frame.nested(PROTOCOL, key)
    new = {"init": "abc", "task.name": "recall"}.get(key, [0.8, 0.9] if isinstance(old, list) else 7)
    rows = [a_row(r.mixer, r.seed, 0.5, {key: new} if r.mixer == LOW and r.seed in seeds else {}) for r in rows_of()]
    message = refusal(rows, a_sweep())
    assert "column 'quick x accuracy'" in message
    assert f"protocol.{key}: {frame.plain(old)} (dense" in message
    assert f"{frame.plain(new)} (low_rank" in message
    assert message.count("protocol.") == 1


def test_numbers_of_equal_value_are_one_value():
    rows = rows_of()
    rows[0] = a_row(DENSE, 0, 0.5, {"backbone.width": 32.0, "optimiser.betas": (0.9, 0.98)})
    assert len(controlled(rows, a_sweep()).rows) == len(rows)


def test_a_tuning_trial_is_not_the_run_of_an_arm():
    rows = rows_of()
    run = {**rows[0].record.run, "point": {"optimiser.lr": 0.1}}
    rows[0] = replace(rows[0], record=a_record(run, {"accuracy": 1.0}), run_id=digest(run))
    assert "point" in refusal(rows, a_sweep())


def test_a_record_in_the_folder_of_another_run_is_refused():
    rows = rows_of()
    rows[0] = replace(rows[0], record=rows[2].record)
    assert rows[0].run_id in refusal(rows, a_sweep())


WIDER = Departure({"name": "dense"}, {"backbone.width": 40}, "the published table")


def departing(changes: dict, departure: Departure) -> tuple[list[Row], Sweep]:
    rows = [a_row(r.mixer, r.seed, 0.5, changes if r.mixer["name"] == "dense" else {}) for r in rows_of()]
    return rows, a_sweep(departures=(departure,))


def test_a_declared_departure_passes_and_is_printed_with_its_source():
    table = controlled(*departing({"backbone.width": 40}, WIDER))
    text = text_of(table, certificate.short(certificate.certificate(table)))
    assert "| dense [1]" in text and "| low_rank  " in text
    assert "[1] dense departs from the protocol by backbone.width = 40; source: the published table." in text
    assert "equal for all arms but dense [1] (departure)" in text
    proof = certificate.certificate(table)["protocols"]["quick"]
    assert proof["departed"]["dense [1]"]["differs"] == {"backbone.width": [32, 40]}


@pytest.mark.parametrize("value", [32, 48])
def test_a_departure_that_the_records_do_not_hold_as_declared_is_refused(value):
    message = refusal(*departing({"backbone.width": value}, WIDER))
    assert "protocol.backbone.width = 40 for dense" in message and f"has {value}" in message


def test_a_departure_excuses_its_own_key_and_its_own_arm_only():
    assert "shell.conv_width" in refusal(*departing({"backbone.width": 40, "shell.conv_width": 5}, WIDER))
    rows, sweep = departing({"backbone.width": 40}, WIDER)
    rows = [a_row(r.mixer, r.seed, 0.5, {"backbone.width": 40}) if r.mixer == LOW else r for r in rows]
    assert "40 (low_rank)" in refusal(rows, sweep)


def test_a_departure_excuses_only_the_hashes_that_it_moves():
    faster = Departure({"name": "dense"}, {"optimiser.lr": 0.1}, "the published table")
    rows, sweep = departing({"optimiser.lr": 0.1}, faster)
    controlled(rows, sweep)
    odd = replace(rows[0].record.hashes, optimiser_groups="other")
    controlled([with_record(r, hashes=odd) if r == rows[0] else r for r in rows], sweep)
    odd = replace(rows[0].record.hashes, shared_init="other")
    message = refusal([with_record(r, hashes=odd) if r == rows[0] else r for r in rows], sweep)
    assert "shared initialisation: other (dense)" in message


def test_a_childs_parent_follows_a_departure_of_its_backbone_and_of_nothing_else():
    controlled(*departing({"backbone.width": 40, "init": "abc"}, WIDER))
    longer = Departure({"name": "dense"}, {"budget.steps": 600}, "the published table")
    assert "protocol.init" in refusal(*departing({"budget.steps": 600, "init": "abc"}, longer))


def test_a_column_of_a_protocol_that_varies_stands_for_all_its_variations():
    rows = [
        a_row(r.mixer, r.seed, 0.5, {"task.patch": n}, label=f"quick[task.patch={n}]")
        for n in (4, 1)
        for r in rows_of()
    ]
    table = controlled(rows, a_sweep(varies={"task.patch": [4, 1]}))
    assert [c.protocol for c in table.columns] == ["quick[task.patch=4]", "quick[task.patch=1]"]
    one = controlled(rows, a_sweep(columns=(Column("quick[task.patch=1]", "loss"),)))
    assert one.columns == (Column("quick[task.patch=1]", "loss"),) and len(one.rows) == len(rows) // 2
    assert "quick[task.patch=4]" in refusal(rows, a_sweep(columns=(Column("quikc", "loss"),)))


def test_a_metric_that_is_not_there_is_refused_with_those_that_are():
    message = refusal(rows_of(), a_sweep(columns=(Column("quick", "acuracy"),)))
    assert "'acuracy'" in message and "accuracy, loss" in message


# Blocks -------------------------------------------------------------------------------------------------------------


def environment(row: Row, **changes) -> Row:
    return with_record(row, environment=replace(row.record.environment, **changes))


def hashes(row: Row, **changes) -> Row:
    return with_record(row, hashes=replace(row.record.hashes, **changes))


ODD = {
    "torch": lambda r: environment(r, torch="1.0"),
    "device": lambda r: environment(r, device="Another"),
    "precision": lambda r: environment(r, precision="bf16"),
    "numpy": lambda r: environment(r, packages={"numpy": "1.0"}),
    "code of train": lambda r: with_record(r, digests={**r.record.digests, "train": "t2"}),
    "code of mixers/base": lambda r: with_record(r, digests={**r.record.digests, "mixers/base": "b2"}),
    "shared initialisation": lambda r: hashes(r, shared_init="other"),
    "batches": lambda r: hashes(r, batches="other"),
    "optimiser groups": lambda r: hashes(r, optimiser_groups="other"),
}


@pytest.mark.parametrize("fact", ODD)
def test_arms_of_one_seed_must_agree(fact):
    rows = [ODD[fact](r) if r.mixer == LOW_SAM and r.seed == 1 else r for r in rows_of()]
    message = refusal(rows, a_sweep())
    assert "column 'quick x accuracy', seed 1" in message
    assert f"{fact}: " in message and "(low_rank SAM)" in message and "(dense, low_rank, attention SAM)" in message


@pytest.mark.parametrize("fact", [f for f in ODD if f not in frame.MOVED_BY])
def test_a_difference_between_seeds_is_a_note(fact):
    table = controlled([ODD[fact](r) if r.seed == 1 else r for r in rows_of()], a_sweep())
    (note,) = table.notes
    assert f"seeds differ in {fact}: " in note and "(seed 0)" in note and "(seed 1)" in note


def test_an_arm_whose_own_code_differs_between_seeds_is_a_note_too():
    """Its mean would be of two mixers: whoever edits one and adds seeds must see it."""

    def edited(row):
        digests = row.record.digests | {"mixers/low_rank": f"of seed {row.seed}"}
        return replace(row, record=replace(row.record, digests=digests)) if row.mixer["name"] == "low_rank" else row

    (note,) = controlled([edited(r) for r in rows_of()], a_sweep()).notes
    assert "seeds differ in code of mixers/low_rank: of seed 0 (seed 0), of seed 1 (seed 1)" in note


def test_a_level_that_no_mixer_has_is_refused():
    odd = [replace(r, mixer={**r.mixer, "sam": "misalignd"}) if r.mixer == LOW_SAM else r for r in rows_of()]
    assert "'low_rank': sam=misalignd; it can be false, true or misaligned" in refusal(odd, a_sweep())


def test_a_primary_column_whose_protocol_varies_in_one_value_is_that_variation():
    label = "quick[task.patch=4]"
    rows = [replace(r, protocol=label) for r in rows_of()]
    table = controlled(rows, a_sweep(varies={"task.patch": [4]}))
    assert table.primary == Column(label, "accuracy")
    assert all(result.primary for result in analysis.analyse(table, {}).results)


def test_a_mixers_own_code_and_what_only_it_imports_may_differ():
    rows = [with_record(r, digests={**r.record.digests, f"kernels/{r.mixer['name']}": "k"}) for r in rows_of()]
    assert controlled(rows, a_sweep()).notes == ()


def test_an_arm_that_was_never_trained_has_no_hashes_to_compare():
    rows = rows_of()
    empty = {"hashes": Hashes("", "", ""), "capacity": Capacity(0, 0, 0, 0), "metrics": {}, "outcome": "unfit"}
    rows = [with_record(r, reason="too short", **empty) if r.mixer == DENSE else r for r in rows]
    table = controlled(rows, a_sweep())
    text = text_of(table, certificate.short(certificate.certificate(table)))
    assert "2 of 2 failed (2 unfit) [1]" in text and "unfit: too short (seeds 0, 1)" in text
    assert "not trained: dense" in text and "parameters 41,800 to 41,900" in text


# Seeds --------------------------------------------------------------------------------------------------------------


def without(rows: list[Row], *places: tuple[dict, int]) -> list[Row]:
    return [replace(r, record=None) if (r.mixer, r.seed) in places else r for r in rows]


def test_a_seed_that_lacks_an_arm_is_left_out_and_said_so():
    table = controlled(without(rows_of(seeds=(0, 1, 2)), (LOW, 1)), a_sweep())
    assert table.seeds == (0, 2) and {r.seed for r in table.rows} == {0, 2}
    (note,) = table.notes
    assert note == "Left out: seed 1 (1 run missing); `mixerbench sweep sweeps/demo.yaml` completes it."


def test_a_sweep_without_a_complete_seed_is_refused():
    message = refusal(without(rows_of(), (LOW, 1), (DENSE, 0), (LOW, 0)), a_sweep())
    assert (
        "no seed is complete, 5 of 8 runs" in message and "seed 0 (2 runs missing), seed 1 (1 run missing)" in message
    )
    assert "no records for sweep 'demo'" in refusal([replace(r, record=None) for r in rows_of()], a_sweep())


# Numbers ------------------------------------------------------------------------------------------------------------


def test_mean_and_spread_are_over_seeds_of_means_over_replicas():
    values = {(0, 0): 0.1, (0, 1): 0.4, (1, 0): 0.5, (1, 1): 0.9, (2, 0): 0.3, (2, 1): 0.3}
    rows = [a_row(LOW, seed, v, replica=replica) for (seed, replica), v in values.items()]
    table = controlled(rows, a_sweep())
    (cell,) = tables.summary(tables.tidy(table)).to_dict("records")
    by_seed = [0.25, 0.7, 0.3]
    assert cell["n"] == 3 and cell["runs"] == 6
    assert cell["mean"] == pytest.approx(statistics.mean(by_seed), abs=1e-15)
    assert cell["sd"] == pytest.approx(statistics.stdev(by_seed), abs=1e-15)
    text = text_of(table, [])
    assert "0.417 ± 0.247" in text and "Replicas are averaged within their seed first: quick (2)." in text


def test_no_mean_over_survivors():
    rows = [a_row(r.mixer, r.seed, 0.777, outcome="diverged" if r.mixer == LOW and r.seed else "ok") for r in rows_of()]
    table = controlled(rows, a_sweep())
    (line,) = [x for x in text_of(table, []).splitlines() if x.startswith("| low_rank ") and "| no" in x]
    assert "1 of 2 failed (1 diverged) [1]" in line and "0.777" not in line
    (cell,) = [c for c in csv.DictReader(io.StringIO(csv_of(table))) if c["arm"] == "low_rank"]
    assert (cell["mean"], cell["sd"], cell["diverged"], cell["seed_0"], cell["seed_1"]) == ("", "", "1", "0.777", "")


def test_a_seed_with_a_diverged_replica_has_no_value():
    rows = [a_row(LOW, s, 0.5, outcome="diverged" if s and r else "ok", replica=r) for s in (0, 1) for r in (0, 1)]
    (cell,) = csv.DictReader(io.StringIO(csv_of(controlled(rows, a_sweep()))))
    assert (cell["runs"], cell["diverged"], cell["mean"], cell["seed_0"], cell["seed_1"]) == ("4", "1", "", "0.5", "")


def test_one_seed_has_no_spread():
    table = controlled(rows_of(seeds=(3,)), a_sweep())
    text = text_of(table, [])
    assert "±" not in text and "One seed (3): no spread." in text
    assert {c["sd"] for c in csv.DictReader(io.StringIO(csv_of(table)))} == {""}


def test_an_own_key_gets_a_column_where_it_takes_several_values():
    wide = {**LOW, "rank": 16}
    table = controlled(rows_of(arms=(DENSE, LOW, wide, ATTENTION)), a_sweep())
    assert table.axes == ("rank",)
    assert [a.label for a in table.arms] == ["dense", "low_rank, rank 8", "low_rank, rank 16", "attention SAM"]
    assert controlled(rows_of(), a_sweep()).axes == ()


def golden_table() -> frame.Table:
    """Two protocols, one departure, one diverged run, one incomplete seed."""
    rows = []
    for label, patch in (("quick", 2), ("rough", 4)):
        for row in rows_of():
            changes = {"task.patch": patch, "backbone.width": 40 if row.mixer == DENSE else 32}
            outcome = "diverged" if (label, row.mixer, row.seed) == ("rough", LOW, 1) else "ok"
            value = row.record.metrics["accuracy"] / (patch / 2)
            rows.append(a_row(row.mixer, row.seed, value, changes, outcome, label))
    rows.append(replace(a_row(LOW, 2, 0.5), record=None))
    columns = (Column("quick", "accuracy"), Column("quick", "loss"), Column("rough", "accuracy"))
    return controlled(rows, a_sweep(columns=columns, departures=(WIDER,)))


def test_table_reads_as_the_golden_text():
    table = golden_table()
    text = text_of(table, certificate.short(certificate.certificate(table)))
    assert text == (GOLDEN / "report_table.md").read_text()
    assert csv_of(table) == (GOLDEN / "report_table.csv").read_text()
    found = analysis.analyse(table, {})
    assert latex.fragment(table, found, sections(table, found)) == (GOLDEN / "report_table.tex").read_text()


def test_markdown_lines_up():
    wide = text_of(golden_table(), []).split("\n## ")[0]
    lines = [x for x in wide.splitlines() if x.startswith("|")]
    assert len({tuple(i for i, c in enumerate(line) if c == "|") for line in lines}) == 1


# From a sweep file to files -----------------------------------------------------------------------------------------

SWEEP = """
question: Does the whole way work?
protocols: [quick_digits]
mixers:
  - {name: identity, heads: [2, 2]}
  - {name: low_rank, heads: 2, sam: [false, true]}
seeds: [0, 1]
replicas: [0]
varies: {}
departures: [{mixer: {name: identity}, set: {backbone.width: 40}, source: a test}]
columns: [{protocol: quick_digits, metric: accuracy}]
family:
  reference: {name: identity}
  comparisons: [reference, sam]
  primary: {protocol: quick_digits, metric: accuracy}
  margin: 0.02
  alpha: 0.05
"""


def fill(folder: Path) -> tuple[Sweep, Store]:
    """A sweep file and a store with a record for each of its runs."""
    (folder / "way.yaml").write_text(SWEEP)
    sweep, store = load(folder / "way.yaml"), Store(folder / "results")
    for i, run in enumerate(grid(sweep)):
        store.finish(a_record(json.loads(json.dumps(resolved(run))), {"accuracy": 0.3 + 0.03 * i}, label=run.label), {})
    return sweep, store


def test_the_rows_are_the_runs_of_the_grid(tmp_path):
    sweep, store = fill(tmp_path)
    family = replace(sweep.family, primary=Column("quick_digits[task.patch=2]", "accuracy"))
    wider = replace(sweep, varies={"task.patch": [2, 4]}, seeds=(0, 1, 5), family=family)
    rows = frame.rows(wider, store)
    assert {r.run_id for r in rows if r.record} == {run.id for run in grid(sweep)}
    assert sorted(r.run_id for r in rows) == sorted(run.id for run in grid(wider))
    assert {r.protocol for r in rows} == {"quick_digits[task.patch=2]", "quick_digits[task.patch=4]"}


def test_report_writes_its_files_and_a_whole_certificate(tmp_path):
    paths = report(*fill(tmp_path), tmp_path / "out", None)
    figures = [f"{name}{suffix}" for name in ("seeds", "differences", "sam_gain") for suffix in (".png", ".pdf")]
    names = [
        "table.md",
        "table.csv",
        *figures,
        "summary.md",
        "comparisons.csv",
        "table.tex",
        "page.tex",
        "certificate.json",
    ]
    assert [p.name for p in paths] == names and all(p.stat().st_size for p in paths)
    text = paths[0].read_text()
    assert text.startswith("# way\n\nDoes the whole way work?\n") and "identity [1]" in text and "low_rank" in text
    proof = json.loads(paths[-1].read_text())
    assert proof["records"] == 6 and proof["seeds"] == [0, 1]
    for values in proof["protocols"].values():
        assert list(values["departed"]) == ["identity [1]"]
        for block in values["blocks"]:
            assert set(block["arms"]) == {"identity [1]", "low_rank", "low_rank SAM"}
            assert [a for a, own in block["arms"].items() if own["differs"]] == ["identity [1]"]


def test_a_record_older_than_a_key_has_its_neutral_value_in_gate_and_certificate(tmp_path):
    (tmp_path / "way.yaml").write_text(SWEEP.replace("backbone.width: 40", "shell.directions: concat"))
    sweep, store = load(tmp_path / "way.yaml"), Store(tmp_path / "results")
    for run in grid(sweep):
        values = json.loads(json.dumps(resolved(run)))
        if values["protocol"]["shell"]["directions"] == "one":
            del values["protocol"]["shell"]["directions"]
        store.finish(a_record(values, {"accuracy": 0.5}, label=run.label), {})
    proof = json.loads(report(sweep, store, tmp_path / "out", None)[-1].read_text())
    (departed,) = proof["protocols"]["quick_digits"]["departed"].values()
    assert departed["differs"] == {"shell.directions": ["one", "concat"]}
    declared = Departure({"name": "low_rank"}, {"shell.directions": "one"}, "a test")
    family = replace(sweep.family, reference={}, comparisons=())
    arms = ({"name": "low_rank", "heads": 2, "sam": [False, True]},)
    old = replace(sweep, mixers=arms, departures=(declared,), family=family)
    assert {a.departed["shell.directions"] for a in frame.controlled(frame.rows(old, store), old).arms} == {"one"}


def test_nothing_is_written_for_a_table_that_is_refused(tmp_path):
    sweep, store = fill(tmp_path)
    with pytest.raises(Refusal):
        report(replace(sweep, columns=(Column("quick_digits", "nothing"),)), store, tmp_path / "out", None)
    assert not (tmp_path / "out").exists()


def test_the_same_records_give_the_same_bytes_whatever_the_process_and_the_users_settings(tmp_path):
    fill(tmp_path)
    (tmp_path / "matplotlibrc").write_text("font.size: 20\nsavefig.dpi: 50\naxes.grid: True\n")
    code = (
        "import sys; from pathlib import Path; from bench.report.verb import report; from bench.store import Store; "
        "from bench.sweep import load; here = Path(sys.argv[1]); "
        "report(load(here / 'way.yaml'), Store(here / 'results'), here / sys.argv[2], None, True); "
        "print(sorted({'torch', 'lightning', 'matplotlib.pyplot'} & set(sys.modules)))"
    )
    for out, changes in {
        "a": {"PYTHONHASHSEED": "1"},
        "b": {"PYTHONHASHSEED": "2", "MATPLOTLIBRC": str(tmp_path)},
    }.items():
        command = [sys.executable, "-W", "error", "-c", code, str(tmp_path), out]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | changes, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]", "the report needs neither torch nor a global figure"
    found = [sorted(p.relative_to(tmp_path / out) for p in (tmp_path / out).rglob("*.*")) for out in "ab"]
    assert found[0] == found[1]
    for path in found[0]:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes(), path


def test_a_mixer_keeps_its_colour_and_any_fourteen_can_be_told_apart():
    from bench.report.plots import KNOWN, looks

    assert looks(["dense", "toeplitz"])["dense"] == looks(["dense", "a_new_one", "zeta"])["dense"]
    every = looks([*KNOWN, "mine", "yours", "theirs", "ours"])
    assert len(set(every.values())) == len(every) >= 14
