"""The benchmark of one optimiser step: whom it tries and in which order, that it goes on, halves, stops and says so."""

import json

import pytest
import torch

from bench.compose import ROOT, make_run
from bench.plan.evidence import read_pilots
from bench.sweep import grid, load
from benchmarks import one_step
from tests.conftest import shrunk

FIELDS = {"arm", "run", "protocol", "outcome", "loss", "finite", "parameters", "micro", "memory_gib", "examples_per_s"}
FIELDS |= {"tokens_per_s", "step_s", "device", "torch", "shrunk"}
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


def test_every_pretraining_of_the_full_scale_sweeps_is_tried_once_and_the_most_important_first():
    paths = [ROOT / "sweeps" / f"{name}.yaml" for name in one_step.SWEEPS]
    found = one_step.arms(paths, children=False)
    wanted = {(r.protocol_id, r.mixer.canonical) for p in paths for r in grid(load(p)) if r.parent is None}
    assert {(run.protocol_id, run.mixer.canonical) for _, run in found} == wanted and len(found) == len(wanted)
    order = list(dict.fromkeys(name.split()[0] for name, _ in found))
    assert order == [name for name in one_step.SWEEPS if name in order] and order[:3] == [
        "table2_paper",
        "table4",
        "table5",
    ]
    assert not any(run.parent for _, run in found)


def test_fine_tunings_come_after_all_pretrainings():
    with_children = one_step.arms([ROOT / "sweeps" / "table10.yaml"], children=True)
    kinds = [run.parent is not None for _, run in with_children]
    assert kinds == sorted(kinds) and len(kinds) == 4 * 9


def test_every_arm_of_table_4_takes_a_shrunk_step_and_no_pilot_is_made_of_it(tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    words = ["--device", "cpu", "--shrink", "--out", str(out), "--results", str(tmp_path)]
    assert one_step.main([str(ROOT / "sweeps" / "table4.yaml"), *words]) == 0
    assert [line["outcome"] for line in lines(out)] == ["ok"] * 5 and all(set(line) == FIELDS for line in lines(out))
    assert capsys.readouterr().out.count("outcome ok") == 5
    assert not (tmp_path / "pilots.jsonl").exists()


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
    take, out, tried = one_step.Step.take, tmp_path / "out.jsonl", []

    def limited(self, size):
        tried.append(size)
        if size > fits:
            raise torch.OutOfMemoryError("no room")
        return take(self, size)

    monkeypatch.setattr(one_step.Step, "take", limited)
    one_step.main([str(sweep), "--device", "cpu", "--out", str(out)])
    assert [line["outcome"] for line in lines(out)] == [outcome] * 2
    assert lines(out)[0].get("micro") == micro
    assert tried[:3] == [64, 32, 16]  # the protocol has 64 examples, fewer than the benchmark begins with


def test_the_loss_and_the_weights_do_not_depend_on_the_micro_batch():
    run = shrunk(make_run("quick_recall", "low_rank", {"mixer.heads": 2, "protocol.budget.batch": 8}, 0, 0))
    whole, cut = (one_step.Step(run, "cpu", False) for _ in range(2))
    assert whole.take(2)[0] == pytest.approx(cut.take(1)[0], rel=1e-5)
    for one, two in zip(whole.model.parameters(), cut.model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


def test_no_arm_is_started_when_the_time_is_over(sweep, capsys):
    assert one_step.main([str(sweep), "--device", "cpu", "--stop-after", "0s"]) == 0
    assert "stopped before arm 1 of 2" in capsys.readouterr().out
