"""What `status` and its fellow verbs say and do for a made-up store and a made-up Slurm; one case on a virtual one."""

import json
import os
import re
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import cli, status
from bench.compose import make_where
from bench.config import Run
from bench.plain import clean, tail
from bench.status import screen
from bench.store import Store
from bench.submit import RUNS, Submission, prepare
from bench.sweep import grid, load, ordered
from tests.test_plan import CHAIN, by_name, finish
from tests.test_submit import cluster
from tests.test_sweep import a_sweep, chain, refusal

__all__ = ["chain"]  # a fixture
GOLDEN = Path(__file__).parent / "golden"
ELSEWHERE = {"node": "n7", "machine": "another boot", "pid": 4711, "started": "1"}


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "results")


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """A Slurm of two commands: squeue prints what is in `queue`, or fails if it is None; scancel notes its words."""

    def show(rows: list[str] | None) -> Path:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        (folder / "answer").write_text("".join(f"{row}\n" for row in rows or []))
        bad = 'echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; exit 1\n'
        for name, then in (("squeue", bad if rows is None else f"cat {folder}/answer\n"), ("scancel", "")):
            (folder / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {folder}/asked\n{then}')
            (folder / name).chmod(stat.S_IRWXU)
        return folder / "asked"

    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return show


def call(folder: Path, store: Store, capsys, verb: str, *words: str) -> str:
    options = cli.parse([verb, str(folder / "x.yaml"), *words, f"where.results={store.root}"])
    assert getattr(cli, verb)(options) == 0
    return said(folder, capsys)


def said(folder: Path, capsys) -> str:
    return capsys.readouterr().out.replace(str(folder), "…")


def golden(name: str, text: str) -> None:
    """To take a wanted change over: delete the file and run the test."""
    if not (GOLDEN / name).exists():
        (GOLDEN / name).write_text(text)
    assert text == (GOLDEN / name).read_text()


def leased(store: Store, run: Run, job: str = "", name: str = "mb-1", log: str = "", **progress) -> None:
    """A run in the hands of a process elsewhere, at most of a Slurm task."""
    folder = store.open(run.id)
    owner = (
        ELSEWHERE | ({"job": {"name": name, "id": job, "restarts": 0}} if job else {}) | ({"log": log} if log else {})
    )
    (folder / "lease-1.json").write_text(json.dumps(owner))
    if progress:
        (folder / "progress.json").write_text(json.dumps(progress))


def submitted(folder: Path, store: Store, monkeypatch, runs: list[Run]) -> Submission:
    """The folder of a submission; its code is not copied."""
    monkeypatch.setattr("bench.submit.snapshot", lambda results: (results, "0" * 16))
    where = make_where({"where.results": str(store.root), "where.device": "cpu"})
    (store.root / "slurm" / "x").mkdir(parents=True, exist_ok=True)
    return prepare(folder / "x.yaml", "x", RUNS, [], where, cluster(), [r.id for r in runs])


def row(job: str, name: str, state: str, reason: str = "None", restarts: int = 0) -> str:
    return f"{job}|{name}|{state}|{reason}|{restarts}|n7|9:00|"


# status -------------------------------------------------------------------------------------------------------------


def a_busy_store(folder: Path, store: Store) -> dict[tuple, Run]:
    """Two seeds of two chains: a finished, a diverged, a failed, an interrupted, a given-up and two running runs."""
    runs = by_name(folder, **CHAIN)
    log = folder / "worker.log"
    finish(store, runs["base", "identity", 0], 20.0)
    finish(store, runs["base", "low_rank", 0], 40.0)
    finish(store, runs["child", "low_rank", 0], outcome="diverged")
    leased(store, runs["child", "identity", 0], log=str(log), step=50, steps=200, loss=2.5, pace=0.5)
    leased(store, runs["base", "identity", 1], "12_3", step=150, steps=200, loss=1.25)
    lost = runs["other", "low_rank", 0]
    owner = {"node": "n2", "log": str(log), "job": {"name": "mb-1", "id": "12_1", "restarts": 0}}
    store.fail(lost.id, "oom", "OutOfMemoryError: \x1b[31m40 GB\x1b[0m\nTraceback", owner)
    for _ in range(3):
        store.fail(runs["base", "low_rank", 1].id, "error", "ValueError: wrong\ntraceback", owner)
    mine = status.named(lost)
    log.write_bytes(
        f"first\n{lost.label} {mine}: step 10\x07\n10%\r20%\rlast \x1b[1mword\x1b[0m\xff\n\n".encode("latin1")
    )
    return runs


def test_one_screen_of_local_workers_and_no_slurm(chain, tmp_path, store, capsys, monkeypatch):
    runs = a_busy_store(tmp_path, store)
    leased(store, runs["base", "identity", 1], step=150, steps=200, loss=1.25)
    monkeypatch.setenv("PATH", "/nonexistent")
    golden("status_here.txt", call(tmp_path, store, capsys, "status"))


def test_one_screen_with_tasks_that_run_and_wait(chain, tmp_path, store, capsys, monkeypatch, queue):
    runs = a_busy_store(tmp_path, store)
    sent = submitted(tmp_path, store, monkeypatch, list(runs.values()))
    leased(store, runs["base", "identity", 1], "12_3", sent.name, step=150, steps=200, loss=1.25)
    rows = [row("12_3", sent.name, "RUNNING"), row("12_4", sent.name, "PENDING", "Resources")]
    rows += [row("12_5", sent.name, "PENDING", "Resources"), row("12_2", sent.name, "FAILED", "NonZeroExitCode")]
    asked = queue(rows)
    text = call(tmp_path, store, capsys, "status").replace(sent.name, "mb-UUID8")
    golden("status_slurm.txt", text)
    assert len(asked.read_text().splitlines()) == 1  # one question


def test_a_lease_whose_task_slurm_does_not_show_is_no_running_run(chain, tmp_path, store, capsys, queue):
    runs = by_name(tmp_path, **CHAIN)
    leased(store, runs["base", "identity", 0], "12_3")
    queue([row("12_3", "mb-2", "RUNNING"), row("12_4", "mb-1", "RUNNING")])  # another's number, another number
    text = call(tmp_path, store, capsys, "status")
    assert "1 failed (lost 1)" in text and "lost: 12_3 on n7 ended without a word: Slurm has forgotten it" in text
    queue([row("12_3", "mb-1", "RUNNING", restarts=1)])  # put back since
    assert "1 failed (preempted 1)" in call(tmp_path, store, capsys, "status")
    queue([row("12_3", "mb-1", "RUNNING")])
    assert "1 running" in call(tmp_path, store, capsys, "status")


def test_silence_of_slurm_is_said_and_nobodys_failure(chain, tmp_path, store, capsys, monkeypatch, queue):
    runs = by_name(tmp_path, **CHAIN)
    submitted(tmp_path, store, monkeypatch, list(runs.values()))
    leased(store, runs["base", "identity", 0], "12_3")
    queue(None)
    text = call(tmp_path, store, capsys, "status")
    assert "16 runs: 0 ok, 1 running, 15 missing" in text
    assert text.count("Unable to contact slurm controller") == 1


def test_a_run_that_ends_while_slurm_is_asked_is_not_lost(chain, tmp_path, store, capsys, monkeypatch):
    runs = by_name(tmp_path, **CHAIN)
    done, left = runs["base", "identity", 0], runs["base", "identity", 1]
    leased(store, done, "12_3")
    leased(store, left, "12_4")

    def elements(names):
        finish(store, done)
        (store.folder(left.id) / "lease-1.json").write_text('{"released": "now"}')
        return []

    monkeypatch.setattr(status.slurm, "elements", elements)
    assert "16 runs: 1 ok, 15 missing" in call(tmp_path, store, capsys, "status")


def test_tasks_that_refused_their_work_say_why(chain, tmp_path, store, capsys, monkeypatch, queue):
    sent = submitted(tmp_path, store, monkeypatch, list(by_name(tmp_path, **CHAIN).values()))
    (sent.folder / "slurm-12_0.txt").write_text("n1, restart 0\nmixerbench: other code\x1b[2J\n")
    queue([])
    text = call(tmp_path, store, capsys, "status")
    assert "no task waits or runs; `mixerbench sweep …/x.yaml --on …` sends what is left" in text
    assert "refused: mixerbench: other code\n" in text


def test_retries_are_those_of_the_submission_unless_given(chain, tmp_path, store, capsys, monkeypatch, queue):
    runs = by_name(tmp_path, **CHAIN)
    sent = submitted(tmp_path, store, monkeypatch, list(runs.values()))
    path = sent.folder / "submission.json"
    path.write_text(path.read_text().replace('"retries": 2', '"retries": 0'))
    store.fail(runs["grandchild", "identity", 0].id, "error", "")
    queue([])
    assert "1 given up (error 1)" in call(tmp_path, store, capsys, "status")
    assert "1 failed (error 1)" in call(tmp_path, store, capsys, "status", "where.retries=2")


def test_a_damaged_record_is_shown_and_hides_nothing(chain, tmp_path, store, capsys):
    runs = by_name(tmp_path, **CHAIN)
    record = finish(store, runs["base", "identity", 0])
    path = store.folder(record.id) / "record.json"
    for damage in ("{", "[]", "{}", path.read_text().replace(record.id, "0" * len(record.id))):
        path.write_text(damage)
        text = call(tmp_path, store, capsys, "status")
        assert "0 ok, 1 damaged, 3 given up (parent 3), 12 missing" in text
        assert "delete it and run again" in text


def test_committed_records_count_and_a_damaged_line_is_named(chain, tmp_path, store, capsys):
    runs = by_name(tmp_path, **CHAIN)
    record = finish(store, runs["base", "identity", 0])
    path = store.root / "x" / "records.jsonl"
    path.parent.mkdir()
    path.write_text((store.folder(record.id) / "record.json").read_text())
    (store.folder(record.id) / "record.json").unlink()
    assert "16 runs: 1 ok, 15 missing" in call(tmp_path, store, capsys, "status")
    path.write_text(path.read_text() + "{\n")
    options = cli.parse(["status", str(tmp_path / "x.yaml"), f"where.results={store.root}"])
    assert f"{path}:2" in refusal(cli.status, options)


def test_what_a_run_went_through_is_shown_while_it_goes_on_and_afterwards_if_asked(chain, tmp_path, store, capsys):
    run = by_name(tmp_path, **CHAIN)["base", "identity", 0]
    store.fail(run.id, "timeout", "the time limit of 12_3 is near")
    leased(store, run, step=150, steps=200, loss=1.25)
    assert "on n7; goes on after timeout: the time limit of 12_3 is near\n" in call(tmp_path, store, capsys, "status")
    store.fail(run.id, "preempted", "12_3 was put back")
    text = call(tmp_path, store, capsys, "status")
    assert "goes on after 2 failures, preempted: 12_3 was put back\n" in text
    finish(store, run)
    assert "put back" not in call(tmp_path, store, capsys, "status")
    text = call(tmp_path, store, capsys, "status", "--all")
    assert "Done in spite of failures\n" in text and "after 2 failures, preempted: 12_3 was put back\n" in text


def test_long_lists_are_cut_with_their_number(chain, tmp_path, store):
    runs = by_name(tmp_path, **CHAIN | {"seeds": [0, 1, 2, 3]})
    for run in runs.values():
        store.fail(run.id, "preempted", "put back")
    reader = status.Reader(tmp_path / "x.yaml", make_where({}), store.root, False)
    lines = screen(reader.look(), tmp_path / "x.yaml", store, everything=False)
    assert len(lines) == 2 + status.LINES + 1 and lines[-1] == "  … and 17 more: --all"
    assert len(screen(reader.look(), tmp_path / "x.yaml", store, everything=True)) == 2 + 32


def test_watch_reads_each_record_once_and_ends_when_all_is_settled(chain, tmp_path, store, capsys, monkeypatch):
    runs = list(by_name(tmp_path, **CHAIN).values())
    finish(store, runs[0])
    naps = []

    def sleep(seconds):
        naps.append(seconds)
        (store.folder(runs[0].id) / "record.json").unlink(missing_ok=True)  # would be missed if it were read again
        for run in runs[1:]:
            finish(store, run)

    monkeypatch.setattr(status, "time", SimpleNamespace(sleep=sleep))
    text = call(tmp_path, store, capsys, "status", "--watch")
    assert re.findall(r"16 runs: .*", text) == ["16 runs: 1 ok, 15 missing", "16 runs: 16 ok"]
    assert naps == [status.WATCH_SECONDS] and "\x1b" not in text


def test_a_silent_slurm_is_asked_less_and_less(chain, tmp_path, store, capsys, monkeypatch, queue):
    submitted(tmp_path, store, monkeypatch, list(by_name(tmp_path, **CHAIN).values()))
    naps = []

    def sleep(seconds):
        naps.append(seconds)
        if len(naps) == 6:
            raise KeyboardInterrupt

    queue(None)
    monkeypatch.setattr(status, "time", SimpleNamespace(sleep=sleep))
    with pytest.raises(KeyboardInterrupt):
        call(tmp_path, store, capsys, "status", "--watch")
    assert naps == [30, 60, 120, 120, 120, 120]


def test_a_terminal_is_shown_no_control_characters():
    every = "".join(map(chr, range(0x250))) + "\u2028\u202e\u2066"
    assert not [c for c in clean(every) if ord(c) < 32 or 127 <= ord(c) < 160 or c in "\u2028\u202e\u2066"]
    assert clean("\x1b]0;title\x07a\x1b[2J\x1b[31;1mb\x1b(Bc\t1\r\n") == "abc 1"
    assert clean("10%\r20%") == "20%"


def test_the_end_of_a_log_is_read_without_the_rest(tmp_path):
    log = tmp_path / "log"
    log.write_text("x" * 10_000_000 + "\n" + "a\n\nb\nc\n")
    assert tail(log, 2) == ["b", "c"]


# logs ---------------------------------------------------------------------------------------------------------------


def test_the_log_of_the_last_attempt_and_why_it_failed(chain, tmp_path, store, capsys):
    runs = a_busy_store(tmp_path, store)
    lost = runs["other", "low_rank", 0]
    text = call(tmp_path, store, capsys, "logs", lost.id[:8], "--lines", "1")
    text = re.sub(r"\d{4}-\d\d-\d\dT[\d:+]+\d", "TIME", text)
    assert text == (
        f"{lost.id} other {status.named(lost)}\nfailure 1, TIME: oom\n  OutOfMemoryError: 40 GB\n  Traceback\n"
        "…/worker.log\n  last word\ufffd\n"
    )
    finished = runs["base", "identity", 0]
    assert "no log is known" in call(tmp_path, store, capsys, "logs", finished.id)
    every = call(tmp_path, store, capsys, "logs")
    assert [line.split()[0] for line in every.splitlines()] == [
        r.id for r in ordered(grid(load(tmp_path / "x.yaml"))) if store.log(r.id)
    ]


def test_a_run_that_is_done_still_knows_its_log(tmp_path, store, monkeypatch):
    lease = store.take("a" * 12)
    monkeypatch.setenv("MIXERBENCH_LOG", "/the/log")
    lease.release()
    assert store.log("a" * 12) == "/the/log" and not store.leased("a" * 12)


def test_a_run_that_logs_does_not_know_is_refused(chain, tmp_path, store):
    a_sweep(tmp_path, **CHAIN)
    for words, part in ((["nope"], "'nope'"), (["--lines", "0", "a"], "--lines"), (["a", "b"], "one run")):
        options = cli.parse(["logs", str(tmp_path / "x.yaml"), *words, f"where.results={store.root}"])
        assert part in refusal(cli.logs, options)
