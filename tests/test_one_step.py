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
from benchmarks import full_scale, one_step
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
    other = [json.dumps(json.loads(line) | {"device": "another"}) + "\n" for line in (first, second)]
    out.write_text("".join(other))
    assert one_step.main(words) == 0 and "2 to try" in capsys.readouterr().out


def test_where_the_device_is_lost_a_new_process_goes_on_with_the_next_arm(sweep, tmp_path, monkeypatch):
    started, out = [], tmp_path / "out.jsonl"

    def lost(self, part):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    def replaced(path, words):
        started.append(words)
        raise SystemExit(9)

    monkeypatch.setattr(one_step.Step, "one", lost)
    monkeypatch.setattr(one_step.os, "execv", replaced)
    with pytest.raises(SystemExit):
        one_step.main([str(sweep), "--device", "cpu", "--out", str(out), "--stop-after", "5m"])
    assert [line["outcome"] for line in lines(out)] == ["error"] and started[0][-2] == "--stop-after"
    assert 250 < float(started[0][-1].removesuffix("s")) <= 300


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


def test_the_committed_page_is_what_its_steps_and_pilots_give_and_every_arm_has_a_finite_loss(every):
    folder = ROOT / "results" / "full_scale"
    page = "\n".join(full_scale.table(folder)) + "\n"
    assert page == (folder / "table.md").read_text(), "python benchmarks/full_scale.py results/full_scale"
    taken = {line["run"]: line for line in lines(folder / "steps.jsonl")}
    assert set(taken) == {arm.run.id for arm in every} and all(line["finite"] for line in taken.values())
    readme = (ROOT / "README.md").read_text()
    for row in (line.split("|") for line in page.splitlines() if line.startswith(("| `table", "| `attribution"))):
        assert f"|{'|'.join(row[1:4])}|" in readme  # the sweep, its runs, its hours
