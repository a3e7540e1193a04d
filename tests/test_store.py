"""The store under races, crashes and damage: what is visible is whole, the first wins, one process trains a run."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bench import Refusal, full, store
from bench.compose import make_run
from bench.config import resolved
from bench.merge import merge
from bench.record import SCHEMA, Capacity, Cost, Environment, Hashes, Record, dump, parse
from bench.store import Store
from bench.whole import link_whole, replace_whole

RUN = "0123456789ab"


def a_record(seed: int, outcome: str = "ok", wall: float = 1.0, accuracy: float = 0.5) -> Record:
    run = make_run("quick_copying", "identity", {}, seed, 0)
    return Record(
        schema=SCHEMA,
        id=run.id,
        outcome=outcome,
        reason="" if outcome == "ok" else "because",
        label=run.label,
        protocol_id=run.protocol_id,
        run=json.loads(json.dumps(resolved(run))),
        digests={},
        hashes=Hashes("", "", ""),
        capacity=Capacity(1, 1, 1, 1),
        gain=(),
        gain_varying=(),
        environment=Environment("", "3", "2", {}, "cpu", 1, 1, "fp32", "torch", False, 1, "node"),
        cost=Cost(wall, 0, 0, 0, 0, 0, 0, 0, 0),
        metrics={"accuracy": accuracy},
        curve=(),
        finished="2026-01-01T00:00:00+00:00",
        registration="",
        chosen=None,
        card="",
    )


def items_of(n: int) -> dict:
    return {"held_out": {"item": list(range(n)), "correct": [1] * n}}


def refusal(call, *arguments) -> str:
    with pytest.raises(Refusal) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def together(count: int, work) -> list:
    """Results of work(0), work(1), ... started at the same moment in threads."""
    barrier, results = threading.Barrier(count), [None] * count

    def one(n: int) -> None:
        barrier.wait()
        results[n] = work(n)

    threads = [threading.Thread(target=one, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


# Whole files --------------------------------------------------------------------------------------------------------


def test_the_first_of_many_writers_wins_and_nothing_else_stays(tmp_path):
    for trial in range(10):
        path = tmp_path / f"record-{trial}"
        won = together(8, lambda n, path=path: link_whole(path, str(n)))
        assert won.count(True) == 1 and path.read_text() == str(won.index(True))
    assert len(list(tmp_path.iterdir())) == 10


@pytest.mark.parametrize("replaced", [False, True])
def test_a_reader_never_sees_half_a_file(tmp_path, replaced):
    path, texts, done = tmp_path / "file", [c * 3_000_000 for c in "ab"], threading.Event()
    seen = []

    def read() -> None:
        while not done.is_set():
            if path.exists():
                try:
                    text = path.read_text()
                except FileNotFoundError:
                    continue
                seen.append(len(text) == 3_000_000 and len(set(text)) == 1)

    reader = threading.Thread(target=read)
    reader.start()
    for n in range(20):
        if replaced:
            replace_whole(path, lambda p, n=n: p.write_text(texts[n % 2]))
        else:
            path.unlink(missing_ok=True)
            link_whole(path, texts[n % 2])
        before, until = len(seen), time.monotonic() + 10
        while len(seen) == before and time.monotonic() < until:  # so that every version is read
            time.sleep(0.001)
    done.set()
    reader.join()
    assert seen and all(seen)


def test_a_write_that_breaks_off_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    monkeypatch.setattr(os, "replace", full)
    for call in (lambda: link_whole(tmp_path / "a", "text"), lambda: replace_whole(tmp_path / "b", Path.touch)):
        with pytest.raises(OSError, match="No space"):
            call()
    assert list(tmp_path.iterdir()) == []


def test_a_record_and_its_items_are_never_overwritten(tmp_path):
    results = Store(tmp_path)
    first, second = a_record(0, accuracy=0.5), a_record(0, accuracy=0.9)
    results.finish(first, items_of(3))
    before = content(tmp_path)
    for other in (results, Store(tmp_path)):
        other.finish(second, items_of(5))
    assert content(tmp_path) == before and Store(tmp_path).record(first.id) == first


def test_finish_clears_what_only_training_needs(tmp_path):
    results, record = Store(tmp_path), a_record(0)
    for name in ("checkpoint.pt", "weights.pt"):
        (results.open(record.id) / name).touch()
    (results.folder(record.id) / "progress.json").write_text('{"step": 3, "steps": 4}')
    assert results.progress(record.id) == 0.75
    results.finish(record, {})
    assert {p.name for p in results.folder(record.id).iterdir()} == {"record.json", "weights.pt"}
    assert results.progress(record.id) == 0.0


def test_failures_are_numbered_without_gaps_under_a_race(tmp_path):
    results = Store(tmp_path)
    together(6, lambda n: [results.fail(RUN, "error", f"{n} {m}") for m in range(4)])
    numbers = sorted(int(p.stem.split("-")[1]) for p in results.folder(RUN).glob("failure-*.json"))
    assert numbers == list(range(1, 25))
    assert {f["message"] for f in results.failures(RUN)} == {f"{n} {m}" for n in range(6) for m in range(4)}


def test_only_failures_that_count_use_up_retries(tmp_path):
    results = Store(tmp_path)
    for kind in (*store.SPARED, "error", *store.SPARED, "oom"):
        results.fail(RUN, kind, "message")
    assert not results.given_up(RUN, 2)
    results.fail(RUN, "error", "message")
    assert results.given_up(RUN, 2) and not results.given_up(RUN, 3)


# Leases -------------------------------------------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from bench.store import Store
print(Store(Path(sys.argv[1])).take(sys.argv[2]) is not None, flush=True)
time.sleep(60)
"""

# Begun together. Each round: take the lease, be alone inside, then release it or die with it (a lease whose owner does
# not exist), until all of them together have had 400 rounds.
RACE = """
import json, os, random, sys, time
from pathlib import Path
from bench import store
results, run, rounds = store.Store(Path(sys.argv[1])), sys.argv[2], 0
inside, every = results.root / "inside", results.root / "rounds"
(results.root / f"ready-{os.getpid()}").touch()
while len(list(results.root.glob("ready-*"))) < 4:
    time.sleep(0.001)
while not every.exists() or every.stat().st_size < 400:
    lease = results.take(run)
    if lease:
        os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
        time.sleep(random.random() / 1000)
        with open(every, "a") as file:
            file.write(".")
        inside.unlink()
        rounds += 1
        if rounds % 2:
            lease.release()
        else:
            dead = {**store._owner(), "pid": 2**22 + 1}
            store.replace_whole(lease.path, lambda path: path.write_text(json.dumps(dead)))
print(rounds)
"""


def script(code: str, *arguments) -> subprocess.Popen:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_one_process_at_a_time_holds_a_lease(tmp_path):
    """Half of the owners die, so the race is also one of several finders of a lost lease."""
    racers = [script(RACE, tmp_path, RUN) for _ in range(4)]
    outputs = [racer.communicate(timeout=300) for racer in racers]
    assert [error for _, error in outputs] == [""] * 4  # to be inside together is an error
    assert sum(int(out) for out, _ in outputs) == (tmp_path / "rounds").stat().st_size >= 400


def test_a_living_owner_keeps_its_lease_and_a_killed_one_loses_it_at_once(tmp_path):
    results = Store(tmp_path)
    with script(HOLD, tmp_path, RUN) as owner:
        assert owner.stdout.readline() == "True\n"
        assert results.take(RUN) is None and results.leased(RUN)
        os.kill(owner.pid, signal.SIGKILL)
        os.waitid(os.P_PID, owner.pid, os.WEXITED | os.WNOWAIT)  # dead, and its parent has not asked for its exit code
        assert not results.leased(RUN)
        assert results.take(RUN) is not None and results.leased(RUN)


def test_a_slow_finder_of_a_lost_lease_does_not_rob_the_next_owner(tmp_path, monkeypatch):
    """Between a judgement and the attempt to take over, others may have taken, released and taken the lease."""
    results, judged = Store(tmp_path), []
    plant(results, {"pid": 2**22 + 1})

    def late(path: Path, text: str) -> bool:
        if path.name.startswith("lease-") and not judged:
            judged.append(path)
            for _ in range(3):
                lease = results.take(RUN)
                lease.release()
            assert results.take(RUN) is not None
        return link_whole(path, text)

    monkeypatch.setattr(store, "link_whole", late)
    assert results.take(RUN) is None
    assert judged and results.leased(RUN)
    assert len(list(results.folder(RUN).glob("lease-*"))) == 1


def test_what_a_killed_owner_had_half_written_goes_with_its_lease(tmp_path):
    """One that was only taken for dead cannot put it in the place of the next owner's any more."""
    results, folder = Store(tmp_path), Store(tmp_path).open(RUN)
    whole = [folder / name for name in ("checkpoint.pt", "progress.json", "weights.pt")]
    half = [folder / f".{name}.0123abcd" for name in ("checkpoint.pt", "progress.json", "items.parquet", "record.json")]
    contender = folder / ".lease-3.json.0123abcd"  # of somebody who asks for the run just now
    for path in [*whole, *half, contender]:
        path.touch()

    def slowly(path: Path) -> None:
        path.write_text("late")
        assert results.take(RUN) is not None

    with pytest.raises(FileNotFoundError):
        replace_whole(folder / "checkpoint.pt", slowly)
    assert not any(path.exists() for path in half) and contender.exists()
    assert all(path.read_text() == "" for path in whole)


def plant(results: Store, changes: dict, age: float = 0.0) -> Path:
    """A lease of somebody else: ours with `changes`, last renewed `age` seconds ago."""
    lease = results.take(RUN)
    lease.path.write_text(json.dumps({**json.loads(lease.path.read_text()), **changes}))
    os.utime(lease.path, (time.time() - age,) * 2)
    return lease.path


@pytest.mark.parametrize("changes", [{"node": "elsewhere"}, {"machine": "another boot or container"}])
def test_a_lease_elsewhere_is_lost_by_age(tmp_path, changes):
    results = Store(tmp_path)
    plant(results, changes, store.STALE_SECONDS - 30)
    assert results.take(RUN) is None
    os.utime(next(results.folder(RUN).glob("lease-*")), (time.time() - store.STALE_SECONDS - 1,) * 2)
    assert results.take(RUN) is not None


def test_where_processes_cannot_be_looked_up_age_decides(tmp_path, monkeypatch):
    """Without /proc, as on macOS."""
    results = Store(tmp_path)
    monkeypatch.setattr(store, "_machine", lambda: "")
    monkeypatch.setattr(store, "_started", lambda pid: "")
    path = plant(results, {}, store.STALE_SECONDS - 30)
    assert results.leased(RUN)
    os.utime(path, (0, 0))
    assert not results.leased(RUN)


def test_another_process_of_the_same_pid_is_not_the_owner(tmp_path):
    results = Store(tmp_path)
    plant(results, {"started": "1"})  # our pid, but a process that started earlier
    assert not results.leased(RUN) and results.take(RUN) is not None


def test_a_lease_is_released_and_renewed_only_by_its_owner(tmp_path):
    results = Store(tmp_path)
    first = results.take(RUN)
    plain = json.loads(first.path.read_text())
    replace_whole(first.path, lambda path: path.write_text(json.dumps({**plain, "pid": 2**22 + 1})))  # thought dead
    second = results.take(RUN)
    assert second is not None
    first.renew()
    first.release()  # it was alive after all
    assert results.leased(RUN) and results.take(RUN) is None
    os.utime(second.path, (0, 0))
    second.renew()
    assert time.time() - second.path.stat().st_mtime < 60
    second.release()
    assert not results.leased(RUN) and results.take(RUN) is not None


# Damage -------------------------------------------------------------------------------------------------------------


def test_results_that_cannot_be_written_are_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for root in (tmp_path / "file" / "results", Path("/proc/results")):
        message = refusal(Store(root).take, RUN)
        assert str(root) in message and "where.results" in message

    def no_links(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)  # as on file systems without hard links
    assert "cannot be written: Operation not permitted" in refusal(Store(tmp_path).take, RUN)


def test_a_read_only_mount_is_one_line(tmp_path):
    code = f"from pathlib import Path; from bench.store import Store; Store(Path({str(tmp_path)!r})).take({RUN!r})"
    mount = 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" || exit 77; shift; exec "$@"'
    try:
        command = ["unshare", "-m", "sh", "-c", mount, "sh", tmp_path, sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no unshare")
    if done.returncode == 77 or done.stderr.startswith("unshare"):
        pytest.skip("may not mount")
    assert "Refusal: results folder" in done.stderr and "Read-only file system" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def tiny_disk(tmp_path):
    """A disk of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], capture_output=True).returncode:
        pytest.skip("may not mount")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def filled(disk: Path) -> Path:
    with open(disk / "filler", "wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(b"0" * 4096)
    return disk / "filler"


def test_a_full_disk_takes_one_reason_more_and_gives_the_lease_back(tiny_disk):
    results = Store(tiny_disk)
    lease = results.take(RUN)
    filler = filled(tiny_disk)
    results.fail(RUN, "error", "RuntimeError: " + "x" * 9000)
    (failure,) = results.failures(RUN)
    assert failure["kind"] == "error"
    assert failure["message"].startswith("No space left on device in the results folder; RuntimeError: xxx")
    lease.release()
    assert not results.leased(RUN)
    message = refusal(Store(tiny_disk).take, RUN)
    assert "No space left on device" in message and not results.leased(RUN)
    assert "cannot be written" in refusal(results.fail, RUN, "error", "once more") and len(results.failures(RUN)) == 1
    filler.unlink()
    second = results.take(RUN)
    assert second.bereft is None
    second.release()
    assert not (results.folder(RUN) / full.SPARE).exists()


def test_room_is_filled_in_place_and_no_longer_text_is_taken(tmp_path):
    path = tmp_path / "room"
    full.reserve(path)
    full.overwrite(path, "first, and long")
    full.overwrite(path, "ä")
    assert path.read_text().strip() == "ä" and path.stat().st_size == full.BYTES
    with pytest.raises(OSError, match="4095 bytes"):
        full.overwrite(path, "x" * full.BYTES)
    assert path.read_text().strip() == "ä"


def damaged(record: Record) -> dict[str, tuple[str, str]]:
    """What may lie in a record's place -> a part of the message."""
    whole = json.loads(dump(record))
    return {
        "cut": (dump(record)[: len(dump(record)) // 2], "delete it and run again"),
        "empty": ("", "delete it and run again"),
        "other id": (json.dumps({**whole, "id": RUN}), "whose id is"),
        "edited": (json.dumps({**whole, "run": {**whole["run"], "seed": 7}}), "whose id is"),
        "schema": (json.dumps({**whole, "schema": 99, "novelty": 1}), "schema 99 is not known"),
        "outcome": (json.dumps({**whole, "outcome": "great"}), "great"),
        "no mapping": ("[]", "mapping"),
        "copied": (dump(a_record(1)), f"not of {record.id}"),
    }


@pytest.mark.parametrize("damage", list(damaged(a_record(0))))
def test_a_damaged_record_is_one_line_that_names_the_file(tmp_path, damage):
    record = a_record(0)
    path = Store(tmp_path).open(record.id) / "record.json"
    text, part = damaged(record)[damage]
    path.write_text(text)
    message = refusal(Store(tmp_path).record, record.id)
    assert str(path) in message and part in message
    if damage != "copied":  # a copy is whole; merge takes it for what it is
        assert str(path) in refusal(merge, [tmp_path], tmp_path / "x")
        assert not (tmp_path / "x").exists()


def test_bytes_that_are_no_text_are_one_line(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "records.jsonl").write_bytes(b"\xff\xfe\x00")
    assert "records.jsonl cannot be read" in refusal(Store(tmp_path).committed)


def test_committed_records_that_contradict_each_other_are_refused(tmp_path):
    for name, accuracy in (("x", 0.1), ("y", 0.2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "records.jsonl").write_text(dump(a_record(0, accuracy=accuracy)) + "\n")
    results = Store(tmp_path)
    one, two = (tmp_path / name / "records.jsonl" for name in ("x", "y"))
    for _ in range(2):
        message = refusal(results.has, a_record(0).id)
        assert f"{two}:1: record {a_record(0).id} differs from that of {one}:1; remove" in message


# Merge --------------------------------------------------------------------------------------------------------------


def results_with(root: Path, *seeds: int) -> Path:
    for seed in seeds:
        Store(root).finish(a_record(seed), items_of(seed + 2))
    return root


def runs_of(path: Path) -> list[str]:
    return pq.read_table(path)["run"].unique().to_pylist()


def test_merge_brings_results_a_run_folder_and_a_file_home_sorted_and_twice_is_once(tmp_path):
    home = tmp_path / "home" / "x"
    other, third = results_with(tmp_path / "other", 0, 1), results_with(tmp_path / "third", 2, 3)
    assert merge([third], tmp_path / "third" / "y") == (2, 2)
    assert merge([other / "runs" / a_record(1).id], home) == (1, 1)
    assert merge([other, third / "y" / "records.jsonl"], home) == (3, 4)
    ids = sorted(a_record(seed).id for seed in range(4))
    assert [json.loads(line)["id"] for line in (home / "records.jsonl").read_text().splitlines()] == ids
    assert runs_of(home / "items.parquet") == ids and len(pq.read_table(home / "items.parquet")) == 2 + 3 + 4 + 5
    assert all(Store(tmp_path / "home").record(a_record(s).id) == a_record(s) for s in range(4))
    before = content(home)
    assert set(before) == {"records.jsonl", "items.parquet"}
    for again in ([other], [third / "y"], [other, third, home], [home.parent]):
        assert merge(again, home) == (0, 4)
        assert content(home) == before


def test_the_order_of_merges_does_not_show(tmp_path):
    one, two = results_with(tmp_path / "one", 0), tmp_path / "two"
    for seed in (1, 2):  # another task: other columns
        Store(two).finish(a_record(seed), {"held_out": {"item": [1, 0], "loss": [1.0, 2.0], "label": [0.5, 1.5]}})
    merge([one], tmp_path / "x")
    merge([two], tmp_path / "x")
    merge([two, one], tmp_path / "y")
    assert content(tmp_path / "x") == content(tmp_path / "y")


def test_merged_items_keep_every_value_and_are_far_smaller_than_plain(tmp_path):
    draw = np.random.default_rng(0)
    items = {"item": list(range(5000)), "loss": draw.random(5000, np.float32), "label": list(draw.integers(0, 2, 5000))}
    Store(tmp_path / "one").finish(a_record(0), {"held_out": items})
    merge([tmp_path / "one"], tmp_path / "x")
    found = pq.read_table(tmp_path / "x" / "items.parquet")
    assert found["loss"].to_pylist() == [float(v) for v in items["loss"]]
    assert found["item"].to_pylist() == items["item"] and found["label"].to_pylist() == items["label"]
    pq.write_table(found, tmp_path / "plain.parquet", compression="zstd")
    plain, small = ((tmp_path / name).stat().st_size for name in ("plain.parquet", "x/items.parquet"))
    assert small < 0.7 * plain


def test_items_that_come_later_are_added(tmp_path):
    whole = results_with(tmp_path / "whole", 0)
    (tmp_path / "bare.jsonl").write_text(dump(a_record(0)) + "\n")
    assert merge([tmp_path / "bare.jsonl"], tmp_path / "x") == (1, 1)
    assert not (tmp_path / "x" / "items.parquet").exists()
    assert merge([whole], tmp_path / "x") == (0, 1)
    assert runs_of(tmp_path / "x" / "items.parquet") == [a_record(0).id]


ITEMS_THAT_DIFFER = {
    "a value": {"item": [0, 1], "correct": [1, 0]},
    "an item more": {"item": [0, 1, 2], "correct": [1, 1, 1]},
    "an item twice": {"item": [0, 1, 1], "correct": [1, 1, 1]},
    "a column more": {"item": [0, 1], "correct": [1, 1], "loss": [0.5, 0.5]},
}


@pytest.mark.parametrize("there", [True, False], ids=["merged before", "in one call"])
@pytest.mark.parametrize("columns", ITEMS_THAT_DIFFER.values(), ids=ITEMS_THAT_DIFFER)
def test_items_that_contradict_each_other_are_refused_by_run(tmp_path, columns, there):
    home, run_id = tmp_path / "x", a_record(0).id
    sources = [results_with(tmp_path / "unlike", 1), results_with(tmp_path / "one", 0)]
    merge(sources[: 1 + there], home)
    before = content(home)
    Store(tmp_path / "odd").finish(a_record(0), {"held_out": columns})
    message = refusal(merge, [*sources, tmp_path / "odd"], home)
    assert f"items of {run_id} differ between" in message and str(tmp_path / "odd") in message
    assert str(home if there else tmp_path / "one") in message and content(home) == before


def test_the_same_items_are_the_same_in_another_order_of_rows_and_wider_numbers(tmp_path):
    nan = float("nan")
    Store(tmp_path / "one").finish(a_record(0), {"held_out": {"item": [0, 1], "loss": np.float32([0.1, nan])}})
    wide = {"item": np.int32([1, 0]), "loss": [nan, float(np.float32(0.1))]}
    Store(tmp_path / "other").finish(a_record(0), {"held_out": wide})
    assert merge([tmp_path / "one", tmp_path / "other", tmp_path / "one"], tmp_path / "x") == (1, 1)
    before = content(tmp_path / "x")
    assert merge([tmp_path / "other"], tmp_path / "x") == (0, 1) and content(tmp_path / "x") == before


def test_items_of_a_type_that_goes_with_no_other_are_refused_by_file(tmp_path):
    merge([results_with(tmp_path / "one", 0)], tmp_path / "x")
    Store(tmp_path / "odd").finish(a_record(1), {"held_out": {"item": [0], "correct": ["yes"]}})
    message = refusal(merge, [tmp_path / "odd"], tmp_path / "x")
    assert str(tmp_path / "odd") in message and "of another type" in message


def test_a_file_that_merge_does_not_take_is_not_to_be_deleted(tmp_path):
    """What damages it names the line of a records file; a record of a run folder alone can be trained again."""
    good, text, lines = dump(a_record(0)), tmp_path / "README.md", tmp_path / "records.jsonl"
    text.write_text("# Words\n")
    lines.write_text(f"{good}\n{good[:99]}\n")
    pilots = tmp_path / "pilots.jsonl"
    pilots.write_text('{"protocol_id": "x"}\n')
    alone = tmp_path / "record.json"
    alone.write_text(good[:99])
    for file, parts in (
        (text, [f"{text} is no record", "merge takes a results folder, a run folder"]),
        (lines, [f"{lines}:2: not a whole record", "restore the file"]),
        (pilots, [f"{pilots}:1: ", "restore the file"]),
        (alone, [f"{alone}: not a whole record", "delete it and run again, or restore it"]),
    ):
        message = refusal(merge, [file], tmp_path / "x")
        assert all(part in message for part in parts) and ("delete" in message) == (file == alone), message
    assert not (tmp_path / "x").exists()


def test_a_refused_merge_changes_nothing(tmp_path):
    home = tmp_path / "x"
    merge([results_with(tmp_path / "one", 0, 1)], home)
    before = content(home)
    good, odd = results_with(tmp_path / "good", 2), results_with(tmp_path / "odd", 3)
    link_whole(odd / "records.jsonl", dump(dataclasses.replace(a_record(0), metrics={"accuracy": 0.6})) + "\n")
    message = refusal(merge, [good, odd], home)
    differs = f"record {a_record(0).id} differs from that of {home}/records.jsonl:1; remove"
    assert f"{odd}/records.jsonl:1: {differs}" in message
    (odd / "records.jsonl").unlink()
    items = Store(odd).folder(a_record(3).id) / "items.parquet"
    whole = items.read_bytes()
    for damage in (whole[: len(whole) // 2], b""):
        items.write_bytes(damage)
        message = refusal(merge, [good, odd], home)
        assert str(items) in message and "delete it" in message
    pq.write_table(pa.table({"run": [a_record(3).id]}), items)
    assert "no column item, part" in refusal(merge, [good, odd], home)
    assert "no records" in refusal(merge, [good, tmp_path / "nowhere"], home)
    twice = tmp_path / "twice.jsonl"
    twice.write_text((dump(a_record(5)) + "\n") * 2)
    assert "occurs twice" in refusal(merge, [good, twice], home)
    assert content(home) == before
    assert merge([good], home) == (1, 3)


def test_a_record_from_before_the_declarations_reads_and_is_written_again_as_it_was():
    def read(text: str) -> Record:
        return parse(text, "x", "")

    old = dump(read(dump(a_record(0))))
    assert "registration" not in old and read(old).registration == "" and dump(read(old)) == old
    new = dump(dataclasses.replace(read(old), registration="abc"))
    assert read(new).registration == "abc" and dump(read(new)) == new
