"""`cancel` and `retry` on a made-up store and a made-up Slurm, and once on a virtual one."""

import json

import pytest

from bench import cli
from bench.queue import Queue
from tests.test_plan import CHAIN, by_name, finish
from tests.test_status import call, leased, queue, row, store, submitted
from tests.test_sweep import chain, refusal

__all__ = ["chain", "queue", "store"]  # fixtures


def test_cancel_ends_the_tasks_of_this_sweep_by_name(chain, tmp_path, store, capsys, monkeypatch, queue):
    sent = submitted(tmp_path, store, monkeypatch, list(by_name(tmp_path, **CHAIN).values()))
    asked = queue(
        [row("12_3", sent.name, "RUNNING"), row("12_4", sent.name, "PENDING"), row("12_5", sent.name, "FAILED")]
    )
    text = call(tmp_path, store, capsys, "cancel")
    assert text.splitlines()[0] == "2 tasks cancelled: 1 pending, 1 running"
    assert asked.read_text().splitlines()[1:] == [f"scancel --name={sent.name}"]
    asked.unlink()
    queue([row("12_5", sent.name, "FAILED")])
    assert call(tmp_path, store, capsys, "cancel") == "no task of …/x.yaml waits or runs\n"
    assert "scancel" not in asked.read_text()


def test_cancel_without_an_answer_or_a_submission(chain, tmp_path, store, capsys, monkeypatch, queue):
    runs = list(by_name(tmp_path, **CHAIN).values())
    assert "nothing of …/x.yaml was submitted" in call(tmp_path, store, capsys, "cancel")
    submitted(tmp_path, store, monkeypatch, runs)
    queue(None)
    options = cli.parse(["cancel", str(tmp_path / "x.yaml"), f"where.results={store.root}"])
    assert "Unable to contact slurm controller; the tasks may still be there" in refusal(cli.cancel, options)


def failed(store, run, kind: str, times: int) -> None:
    for _ in range(times):
        store.fail(run.id, kind, f"{kind} it was")


def test_retry_forgets_what_was_asked_for_and_nothing_else(chain, tmp_path, store, capsys):
    runs = by_name(tmp_path, **CHAIN)
    oom, error, wild, cut = (runs["base", m, s] for m in ("identity", "low_rank") for s in (0, 1))
    failed(store, oom, "oom", 3)
    failed(store, error, "error", 3)
    failed(store, cut, "timeout", 1)
    finish(store, wild, outcome="diverged")
    assert "1 runs may be tried again: oom 1" in call(tmp_path, store, capsys, "retry", "--only", "oom,preempted")
    assert store.failures(oom.id) == [] and len(store.failures(error.id)) == 3
    assert len(list((store.folder(oom.id) / "retried-1").glob("failure-*.json"))) == 3
    failed(store, oom, "oom", 3)
    text = call(tmp_path, store, capsys, "retry")  # the given-up ones; the interrupted one goes on without it
    assert "2 runs may be tried again: error 1, oom 1" in text and len(store.failures(cut.id)) == 1
    assert len(list((store.folder(oom.id) / "retried-2").glob("failure-*.json"))) == 3
    assert "2 runs may be tried again: diverged 1, timeout 1" in call(
        tmp_path, store, capsys, "retry", "--only", "diverged|timeout"
    )
    assert not store.has(wild.id) and (store.folder(wild.id) / "retried-1" / "record.json").exists()
    assert call(tmp_path, store, capsys, "retry") == "0 runs may be tried again\n"


def test_a_waiting_worker_takes_a_run_that_retry_frees(chain, tmp_path, store, capsys, where):
    runs = by_name(tmp_path, **CHAIN)
    every = Queue(list(runs.values()), store, where)
    first, child = runs["base", "identity", 0], runs["child", "identity", 0]
    failed(store, first, "error", 3)
    assert every.settled(first) and every.settled(child)
    call(tmp_path, store, capsys, "retry")
    assert not every.settled(first) and not every.settled(child) and every.ready(first)


def test_retry_leaves_a_run_that_somebody_is_at(chain, tmp_path, store, capsys):
    run = by_name(tmp_path, **CHAIN)["base", "identity", 0]
    failed(store, run, "error", 3)
    leased(store, run)
    assert "0 runs may be tried again" in call(tmp_path, store, capsys, "retry", "--only", "error")
    assert len(store.failures(run.id)) == 3


@pytest.mark.parametrize(("then", "freed"), [([], True), (["RUNNING"], False), (None, False)])
def test_retry_takes_over_from_a_task_that_slurm_has_twice_not_shown(
    chain, tmp_path, store, capsys, monkeypatch, queue, then, freed
):
    run = by_name(tmp_path, **CHAIN)["base", "identity", 0]
    failed(store, run, "error", 3)
    leased(store, run, "12_3")
    queue([])
    second = None if then is None else [row("12_3", "mb-1", state) for state in then]
    now = [0.0]
    monkeypatch.setattr("bench.tend.time.sleep", lambda seconds: (queue(second), now.append(now[-1] + seconds)))
    monkeypatch.setattr("bench.tend.time.monotonic", lambda: now[-1])
    text = call(tmp_path, store, capsys, "retry", "--only", "lost")
    assert "1 runs belong to tasks that Slurm no longer shows" in text
    if freed:
        assert "1 runs may be tried again: lost 1" in text and store.failures(run.id) == []
        kept = [json.loads(p.read_text()) for p in sorted((store.folder(run.id) / "retried-1").glob("failure-*.json"))]
        assert [f["kind"] for f in kept] == ["error", "error", "error", "lost"] and not store.leased(run.id)
    else:
        assert "somebody has its lease" in text and "0 runs may be tried again" in text
        assert len(store.failures(run.id)) == 3 and store.leased(run.id)


def test_what_retry_cannot_do_is_refused(chain, tmp_path, store, capsys):
    runs = by_name(tmp_path, **CHAIN)
    record = finish(store, runs["base", "identity", 0], outcome="diverged")
    (store.root / "x").mkdir()
    (store.root / "x" / "records.jsonl").write_text((store.folder(record.id) / "record.json").read_text())
    for words, part in (
        (["--only", "boredom"], "unknown kind 'boredom'; allowed: oom, timeout, preempted"),
        (["--only", "diverged"], f"{record.id} has a committed record"),
        (["--max-parallel", "2"], "--max-parallel goes with --on"),
    ):
        options = cli.parse(["retry", str(tmp_path / "x.yaml"), *words, f"where.results={store.root}"])
        assert part in refusal(cli.retry, options)
    assert json.loads((store.folder(record.id) / "record.json").read_text())["outcome"] == "diverged"
