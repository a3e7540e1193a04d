"""The benchmark of one optimiser step: whom it tries and in which order, that it goes on, halves, stops and says so."""

import json

import pytest
import torch

from bench.cli import guarded
from bench.compose import ROOT, make_run
from bench.plan.arms import arms
from bench.plan.evidence import read_pilots
from bench.plan.verb import plan
from bench.store import Store
from bench.sweep import cells, grid, load, ordered
from benchmarks import full_scale, one_step, step_files
from tests.conftest import shrunk

FIELDS = {"arm", "run", "protocol", "outcome", "loss", "finite", "parameters", "micro", "memory_gib", "examples_per_s"}
FIELDS |= {"tokens_per_s", "step_s", "device", "backend", "torch", "also", "passes", "graph"}
SMALL = """question: Does it run?
protocols: [quick_recall]
mixers: [{name: dense, heads: 2}, {name: low_rank, heads: 2}]
seeds: [0, 1]
replicas: [0]
varies: {}
departures: []
columns: [{protocol: quick_recall, metric: loss}]
family: {reference: {}, comparisons: [], primary: {protocol: quick_recall, metric: loss}, margin: 0.0, alpha: 0.05}
"""


@pytest.fixture
def sweep(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def every():
    return arms([[ROOT / "sweeps" / f"{name}.yaml" for name in group] for group in one_step.GROUPS])


def pair(run) -> tuple[str, str]:
    return run.protocol_id, run.mixer.canonical


def test_every_protocol_and_mixer_of_the_full_scale_sweeps_is_tried_or_stood_for_once(every):
    paths = [ROOT / "sweeps" / f"{name}.yaml" for group in one_step.GROUPS for name in group]
    wanted = {pair(r): r for p in paths for r in ordered(grid(load(p)))}
    found = [pair(run) for arm in every for run in arm.alike]
    assert sorted(found) == sorted(wanted)  # each once, parents too
    assert all(arm.run in arm.alike and (arm.run.parent is None) <= (len(arm.alike) == 1) for arm in every)
    for arm in every:  # what stands for others computes the same
        for run in arm.alike:
            one, two = arm.run.protocol, run.protocol
            assert (one.budget.batch, one.backbone, one.shell) == (two.budget.batch, two.backbone, two.shell)
            assert one.task.args["length"] == two.task.args["length"] if run.parent else one == two


def test_a_run_that_is_cut_short_has_something_of_every_table_and_pretrainings_first(every):
    names = [arm.name.split()[0] for arm in every]
    assert names[:5] == list(one_step.GROUPS[0])
    pretrainings = [arm for arm in every if arm.run.parent is None and arm.name.split()[0] in one_step.GROUPS[0]]
    assert every[: len(pretrainings)] == pretrainings and len(pretrainings) == 31
    assert names[-1] == "attribution" and names.index("table2_strict") > max(names.index(n) for n in one_step.GROUPS[0])


def test_every_arm_of_table_4_takes_a_shrunk_step_and_its_pilots_price_the_table_but_on_no_real_device(
    tmp_path, capsys
):
    out, path = tmp_path / "out.jsonl", ROOT / "sweeps" / "table4.yaml"
    words = ["--device", "cpu", "--shrink", "--share", "0s", "--out", str(out), "--results", str(tmp_path)]
    assert one_step.main([str(path), *words]) == 0
    said = lines(out)
    assert [line["outcome"] for line in said] == ["ok"] * 25 and all(set(line) == FIELDS for line in said)
    assert capsys.readouterr().out.count("outcome ok") == 25  # a pretraining and four kinds of fine-tuning of five arms
    pilots, sweep = read_pilots(tmp_path / "pilots.jsonl"), load(path)
    assert len(pilots) == 5 * 9 and all(p.device.startswith("shrunk, ") and p.evaluation > 0 for p in pilots)
    made = plan(sweep, Store(tmp_path), 0, 1, "")
    out.rename(tmp_path / "steps.jsonl")
    page = full_scale.table(tmp_path)
    (row,) = [line for line in page if line.startswith("| `table4` |")]
    hours = made.totals.device_seconds.times(1 / 3600)
    assert [cell.strip() for cell in row.split("|")][3:6] == [f"{x:,.0f}" for x in (hours.mid, hours.low, hours.high)]
    assert sum(line.startswith("| main_") for line in page) == 25 and sum("unknown" in line for line in page) == 6
    assert made.totals.unknown == () and 0 < made.totals.device_seconds.low <= made.totals.device_seconds.high
    assert made.states["missing"] == len(cells(sweep))


def test_an_arm_that_fails_is_said_and_the_next_one_follows(sweep, tmp_path, monkeypatch, capsys):
    made, out = one_step.made, tmp_path / "out.jsonl"

    def broken(run, backend, device):
        if run.mixer.name == "dense":
            raise ValueError("bad luck")
        return made(run, backend, device)

    monkeypatch.setattr(one_step, "made", broken)
    words = [str(sweep), "--device", "cpu", "--out", str(out), "--results", str(tmp_path)]
    assert one_step.main(words) == 1
    assert [line["outcome"] for line in lines(out)] == ["error", "ok"]
    assert lines(out)[0]["reason"] == "ValueError: bad luck" and "bad luck" in capsys.readouterr().out
    (pilot,) = read_pilots(tmp_path / "pilots.jsonl")
    run = make_run("quick_recall", "low_rank", {"mixer.heads": 2}, 0, 0)
    assert (pilot.protocol_id, pilot.mixer["name"], pilot.world) == (run.protocol_id, "low_rank", 1)
    assert 0 < pilot.step_p10 <= pilot.step_p50 <= pilot.step_p90
    assert pilot.checkpoint_bytes == 3 * pilot.weights_bytes == 12 * lines(out)[1]["parameters"]


@pytest.mark.parametrize(("fits", "outcome", "micro"), [(16, "ok", 16), (0, "oom", None)])
def test_micro_batches_are_halved_until_they_fit(sweep, tmp_path, monkeypatch, fits, outcome, micro):
    one, out, tried = one_step.Step.one, tmp_path / "out.jsonl", []

    def limited(self, part):
        tried.append(len(part["labels"]))
        if tried[-1] > fits:
            raise torch.OutOfMemoryError("no room")
        return one(self, part)

    monkeypatch.setattr(one_step.Step, "one", limited)
    one_step.main([str(sweep), "--device", "cpu", "--out", str(out)])
    assert [line["outcome"] for line in lines(out)] == [outcome] * 2
    assert lines(out)[0].get("micro") == micro
    assert tried[:3] == [64, 32, 16]  # the protocol has 64 examples, fewer than the benchmark begins with


def a_step(batch: int = 8) -> one_step.Step:
    run = shrunk(make_run("quick_recall", "low_rank", {"mixer.heads": 2, "protocol.budget.batch": batch}, 0, 0))
    return one_step.Step(run, *one_step.built(run, "torch")[:2], "cpu", False)


def test_the_loss_and_the_weights_do_not_depend_on_the_micro_batch_nor_on_the_search_for_it():
    whole, cut = a_step(), a_step()
    assert cut.fitting(2)[0] == 2
    assert whole.take(2, 60.0)[0] == pytest.approx(cut.take(1, 60.0)[0], rel=1e-5)
    for one, two in zip(whole.model.parameters(), cut.model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


def test_a_step_that_has_used_its_share_leaves_the_rest_out_and_keeps_the_scale_of_its_loss(sweep, tmp_path):
    words = [str(sweep), "--device", "cpu", "--micro", "8"]
    for share in ("0s", "60s"):
        one_step.main([*words, "--share", share, "--out", str(tmp_path / share)])
    for cut, whole in zip(lines(tmp_path / "0s"), lines(tmp_path / "60s"), strict=True):
        assert (cut["passes"], whole["passes"]) == ("2 of 8", "8 of 8")
        assert cut["loss"] == pytest.approx(whole["loss"], rel=0.1)


def test_the_same_command_goes_on_with_what_is_not_done_on_this_device(sweep, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    words = [str(sweep), "--device", "cpu", "--out", str(out)]
    assert one_step.main(words) == 0
    first, second = out.read_text().splitlines(keepends=True)
    out.write_text(first + second[:40])  # the second was being written when the machine went away
    capsys.readouterr()
    assert one_step.main(words) == 0
    assert "1 to try" in capsys.readouterr().out
    assert json.loads(out.read_text().splitlines()[-1])["arm"] == json.loads(second)["arm"]
    assert one_step.main(words) == 0 and "0 to try" in capsys.readouterr().out  # also past the line that was cut short
    other = [json.dumps(json.loads(line) | {"device": "another"}) + "\n" for line in (first, second)]
    out.write_text("".join(other))
    assert one_step.main(words) == 0 and "2 to try" in capsys.readouterr().out


@pytest.mark.parametrize(("outcome", "again"), [("error", 1), ("oom", 0), ("not finite", 0)])
def test_what_ended_as_an_error_is_tried_again_and_nothing_is_well_before_every_last_line_is_ok(
    sweep, tmp_path, capsys, outcome, again
):
    out = tmp_path / "out.jsonl"
    out.touch()
    words = [str(sweep), "--device", "cpu", "--out", str(out)]
    assert one_step.main(words) == 0
    first = lines(out)[0]  # an empty file is not taken for one with a line that was cut short
    with out.open("a") as file:
        file.write(json.dumps({k: first[k] for k in ("arm", "run", "device", "backend")} | {"outcome": outcome}) + "\n")
    capsys.readouterr()
    assert one_step.main([*words, "--stop-after", "0s"]) == 1  # not even where nothing was tried
    said = capsys.readouterr().out
    assert f"{again} to try" in said and said.endswith(f"not ok: 1 {outcome}\n")
    assert one_step.main(words) == 1 - again
    assert len(lines(out)) == 3 + again and lines(out)[-1]["outcome"] == ("ok" if again else outcome)


def test_where_the_device_is_lost_a_new_process_goes_on_with_the_next_arm(sweep, tmp_path, monkeypatch, capsys):
    started, out, one = [], tmp_path / "out.jsonl", one_step.Step.one

    def lost(self, part):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    def replaced(path, words):
        started.append(words)
        raise SystemExit(9)

    monkeypatch.setattr(one_step.Step, "one", lost)
    monkeypatch.setattr(one_step.os, "execv", replaced)
    words = [str(sweep), "--device", "cpu", "--out", str(out)]
    for before in (0, 1):  # a second call tries the arm again, but its own new process does not
        with pytest.raises(SystemExit):
            one_step.main([*words, "--stop-after", "5m"])
        assert [line["outcome"] for line in lines(out)] == ["error"] * (before + 1)
        assert started[-1][-4:-1] == ["--since", str(before), "--stop-after"]
        assert 250 < float(started[-1][-1].removesuffix("s")) <= 300
    monkeypatch.setattr(one_step.Step, "one", one)
    capsys.readouterr()
    assert one_step.main([*words, *started[-1][-4:]]) == 1
    assert "1 to try" in capsys.readouterr().out
    assert [line["outcome"] for line in lines(out)] == ["error", "error", "ok"]


def test_no_arm_is_started_when_the_time_is_over(sweep, capsys):
    assert one_step.main([str(sweep), "--device", "cpu", "--stop-after", "0s"]) == 0
    assert "stopped before arm 1 of 2" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_a_pass_is_timed_as_one_graph(sweep, tmp_path):
    out = tmp_path / "out.jsonl"
    assert one_step.main([str(sweep), "--out", str(out), "--results", str(tmp_path)]) == 0
    assert [line["graph"] for line in lines(out)] == [True, True]
    for pilot in read_pilots(tmp_path / "pilots.jsonl"):
        assert 0 < pilot.step_p10 <= pilot.step_p50 <= pilot.step_p90 < pilot.first_step


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused_in_one_line(capsys):
    assert guarded(one_step.main, []) == 2
    assert capsys.readouterr().err == "mixerbench: --device cuda: no CUDA device is visible; use: cpu\n"


WRONG = {
    "no micro-batch": (["--micro", "0"], ["--micro", "at least 1", "0"]),
    "unknown device": (["--device", "gpu"], ["--device", "cpu, cuda", "'gpu'"]),
    "unknown backend": (["--backend", "x"], ["--backend must be one of auto, torch, triton, mamba_ssm, got 'x'"]),
    "a backend of another device": (["--backend", "triton"], ["--backend=triton", "CUDA", "torch"]),
    "a time without a unit": (["--stop-after", "3"], ["--stop-after", "'3'", "90s, 9m or 2h"]),
    "a time below nothing": (["--share=-1s"], ["--share", "'-1s'", "90s, 9m or 2h"]),
    "no time": (["--share", "-1s"], ["--share", "one argument"]),
    "unknown option": (["--stop-before", "3m"], ["--stop-before"]),
    "lines in no folder": (["--out", "no/folder/x"], ["--out", "no folder no/folder", "a file in a folder"]),
    "lines in a file's folder": (["--out", "file/x"], ["--out", "file is a file", "a file in a folder"]),
    "lines in a folder": (["--out", "."], ["--out", ". is a folder", "a file in a folder"]),
    "results in a file": (["--results", "file"], ["--results", "file is a file", "a folder, which need not be there"]),
    "results below a file": (["--results", "file/x/y"], ["--results", "file is a file", "a folder"]),
}


@pytest.mark.parametrize("case", list(WRONG))
def test_wrong_words_are_one_line_before_the_first_arm(sweep, tmp_path, monkeypatch, capsys, case):
    words, parts = WRONG[case]
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    try:
        code = guarded(one_step.main, [str(sweep), "--device", "cpu", *words])
    except SystemExit as end:  # of the words' reader
        code = end.code
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("mixerbench: ")
    assert all(part in err for part in parts), err
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "small.yaml"]


def test_kernels_without_triton_are_refused_before_the_first_arm(sweep, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(one_step.kernels, "present", lambda: False)
    assert guarded(one_step.main, [str(sweep), "--device", "cuda", "--backend", "triton"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "needs the package triton, which is not installed; use: torch" in err


def test_a_place_without_the_right_to_write_is_refused_before_the_first_arm(sweep, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(step_files.os, "access", lambda path, right: False)  # whoever runs the tests may be root
    for word, path in (("--out", tmp_path / "x"), ("--out", sweep), ("--results", tmp_path / "a" / "b")):
        assert guarded(one_step.main, [str(sweep), "--device", "cpu", word, str(path)]) == 2
        out, err = capsys.readouterr()
        there = sweep if path == sweep else tmp_path
        assert out == "" and err.startswith(f"mixerbench: {word}: {there} cannot be written; name a f")


STEP = {"arm": "small a b", "run": "1", "outcome": "oom", "device": "d", "backend": "torch"}
NO_STEPS = {
    "other keys": (b'{"a": 1}', "missing or of a wrong type: arm, run, outcome, device, backend"),
    "one key less": (json.dumps({k: v for k, v in STEP.items() if k != "run"}).encode(), "of a wrong type: run;"),
    "one of another type": (json.dumps(STEP | {"device": 3}).encode(), "of a wrong type: device;"),
    "an outcome of its own": (
        json.dumps(STEP | {"outcome": "fine"}).encode(),
        "ok, not finite, oom, error, got 'fine'",
    ),
    "ok without its numbers": (
        json.dumps(STEP | {"outcome": "ok", "loss": 1.0}).encode(),
        "of a wrong type: parameters,",
    ),
    "a list": (b"[1]", "must be a mapping with the keys arm, run"),
    "bytes": (b"\x00\xff\x85\xe2\x80\xa8", "Expecting value"),
    "text": (b"# A page", "Expecting value"),
    "broken inside": (b'{"arm": "small a b", "run": }', "Expecting value"),
}


@pytest.mark.parametrize("case", list(NO_STEPS))
@pytest.mark.parametrize("end", [b"\n", b""])
def test_a_whole_line_that_is_no_step_is_refused_by_file_and_number(sweep, tmp_path, capsys, case, end):
    line, why = NO_STEPS[case]
    path, content = tmp_path / "steps.jsonl", json.dumps(STEP).encode() + b'\n{"arm": "sma\n' + line + end
    path.write_bytes(content)
    (tmp_path / "pilots.jsonl").touch()
    for act, words in (
        (one_step.main, [str(sweep), "--device", "cpu", "--out", str(path)]),
        (full_scale.main, [str(tmp_path)]),
    ):
        assert guarded(act, words) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1) and err.startswith(f"mixerbench: {path}:3: no step (") and why in err
    assert path.read_bytes() == content


@pytest.mark.parametrize("end", ["", "\n"])
def test_a_line_that_was_cut_short_anywhere_is_passed_over(tmp_path, end):
    path, whole = tmp_path / "steps.jsonl", json.dumps(STEP | {"also": ["a", "b"], "loss": 1.5})
    for length in range(len(whole)):
        path.write_text(f"{json.dumps(STEP)}\r\n{whole[:length]}{end}")
        assert step_files.tries(path) == [STEP]


def test_the_committed_page_is_what_its_steps_and_pilots_give_and_every_arm_has_a_finite_loss(every):
    folder = ROOT / "results" / "full_scale"
    page = "\n".join(full_scale.table(folder)) + "\n"
    assert page == (folder / "table.md").read_text(), "python benchmarks/full_scale.py results/full_scale"
    taken = {line["run"]: line for line in lines(folder / "steps.jsonl")}
    assert set(taken) == {arm.run.id for arm in every} and all(line["finite"] for line in taken.values())
    readme = (ROOT / "README.md").read_text()
    for row in (line.split("|") for line in page.splitlines() if line.startswith(("| `table", "| `attribution"))):
        assert f"|{'|'.join(row[1:4])}|" in readme  # the sweep, its runs, its hours
