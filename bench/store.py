"""Results on disk: run folders, records, failures, leases, merge. Works on a shared file system without a server or file locks.

A file that others may read appears whole: written under a temporary name, then linked (the first wins) or renamed. A lease says
who trains a run; it names its owner exactly, so that a dead owner on this machine is known at once and one elsewhere by its age.
"""

import json
import os
import secrets
import socket
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from bench import Refusal
from bench.record import Record, dump, parse

STALE_SECONDS = 600.0  # a lease elsewhere that was not renewed for so long has lost its owner
KINDS = ("oom", "timeout", "preempted", "error", "cancelled")
SPARED = ("cancelled", "preempted", "timeout")  # do not count against the run: it goes on from its checkpoint


class Store:
    """`root`/runs/<id>/ united with every `root`/<sweep>/records.jsonl."""

    def __init__(self, root: Path):
        self.root = root
        self._committed: dict[str, Record] | None = None

    def folder(self, run_id: str) -> Path:
        return self.root / "runs" / run_id

    def open(self, run_id: str) -> Path:
        """The run's folder, made if it is not there; a Refusal if nothing can be written."""
        folder = self.folder(run_id)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".probe.{secrets.token_hex(4)}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise Refusal(f"results folder {self.root} cannot be written: {error.strerror}; set where.results") from None
        return folder

    def committed(self) -> dict[str, Record]:
        if self._committed is None:
            self._committed = {}
            for path in sorted(self.root.glob("*/records.jsonl")):
                self._committed.update(read_records(path))
        return self._committed

    def has(self, run_id: str) -> bool:
        return run_id in self.committed() or (self.folder(run_id) / "record.json").exists()

    def record(self, run_id: str) -> Record | None:
        if run_id in self.committed():
            return self.committed()[run_id]
        path = self.folder(run_id) / "record.json"
        return parse(path.read_text(), str(path)) if path.exists() else None

    def weights(self, run_id: str) -> Path:
        return self.folder(run_id) / "weights.pt"

    def finish(self, record: Record, items: dict[str, dict]) -> None:
        """Write the run's items and then its record. A record that is there already stays as it is."""
        folder = self.open(record.id)
        if items:
            path = folder / "items.parquet"
            temporary = folder / f".items.{secrets.token_hex(4)}"
            write_items(temporary, record.id, items)
            os.replace(temporary, path)
        link_whole(folder / "record.json", dump(record) + "\n")
        for name in ("checkpoint.pt", "progress.json"):
            (folder / name).unlink(missing_ok=True)

    def fail(self, run_id: str, kind: str, message: str) -> None:
        """Note a failure that is not an outcome of the science, as the next failure-<n>.json."""
        folder = self.open(run_id)
        note = {"kind": kind, "message": message, "time": utc()}
        n = 1
        while not link_whole(folder / f"failure-{n}.json", json.dumps(note) + "\n"):
            n += 1

    def failures(self, run_id: str) -> list[dict]:
        found = sorted(self.folder(run_id).glob("failure-*.json"), key=lambda p: int(p.stem.split("-")[1]))
        return [json.loads(path.read_text()) for path in found]

    def given_up(self, run_id: str, retries: int) -> bool:
        """Whether the run has failed more often than it may be retried."""
        return sum(f["kind"] not in SPARED for f in self.failures(run_id)) > retries

    def take(self, run_id: str) -> "Lease | None":
        """The right to train a run, or None while somebody else has it."""
        path = self.open(run_id) / "lease.json"
        owner = {**_owner(), "token": secrets.token_hex(8)}
        while not link_whole(path, json.dumps(owner) + "\n"):
            if not _stale(path):
                return None
            # Only one of several finders can rename it away; the others try again and see the new lease.
            aside = path.with_name(f"lease-lost-{secrets.token_hex(8)}.json")
            try:
                os.rename(path, aside)
                aside.unlink()
            except FileNotFoundError:
                pass
        return Lease(path, owner["token"])

    def leased(self, run_id: str) -> bool:
        path = self.folder(run_id) / "lease.json"
        return path.exists() and not _stale(path)


@dataclass(frozen=True)
class Lease:
    path: Path
    token: str

    def mine(self) -> bool:
        try:
            return json.loads(self.path.read_text())["token"] == self.token
        except FileNotFoundError:
            return False

    def renew(self) -> None:
        if self.mine():
            os.utime(self.path)

    def release(self) -> None:
        if self.mine():
            self.path.unlink(missing_ok=True)


def _owner() -> dict:
    return {"node": socket.gethostname(), "boot": _boot(), "pid": os.getpid(), "started": _started(os.getpid())}


def _boot() -> str:
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


def _started(pid: int) -> str:
    """Start time of a process in clock ticks since boot, '' if it is gone (tells a process from a later one of the same pid)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except OSError:
        return ""


def _stale(path: Path) -> bool:
    try:
        owner, age = json.loads(path.read_text()), time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return False
    if owner["node"] == socket.gethostname():
        return owner["boot"] != _boot() or _started(owner["pid"]) != owner["started"]
    return age > STALE_SECONDS


def link_whole(path: Path, text: str) -> bool:
    """Create `path` with all of `text` or not at all; False if it is there already."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "x") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)
        return True
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)


def utc() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def write_items(path: Path, run_id: str, items: dict[str, dict]) -> None:
    """Per-example outcomes of all reported sets as one Parquet file: columns run, part and the task's own."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = []
    for part, columns in items.items():
        n = len(next(iter(columns.values())))
        tables.append(pa.table({"run": [run_id] * n, "part": [part] * n, **columns}))
    pq.write_table(pa.concat_tables(tables, promote_options="default"), path, compression="zstd")


# Merge --------------------------------------------------------------------------------------------------------------


def read_records(path: Path) -> dict[str, Record]:
    """All records of a .jsonl or .json file, by id."""
    records = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        record = parse(line, f"{path}:{number}")
        if record.id in records:
            raise Refusal(f"{path}:{number}: record {record.id} occurs twice")
        records[record.id] = record
    return records


def found_records(path: Path) -> dict[str, Record]:
    """Records under a path: a records file, a run folder, or a results folder with any of them below."""
    if path.is_file():
        return read_records(path)
    files = [*sorted(path.rglob("records.jsonl")), *sorted(path.rglob("record.json"))]
    if not files:
        raise Refusal(f"no records under {path}; looked for records.jsonl and record.json")
    found: dict[str, Record] = {}
    for file in files:
        _unite(found, read_records(file), str(file))
    return found


def _unite(into: dict[str, Record], more: dict[str, Record], source: str) -> None:
    for run_id, record in more.items():
        if run_id in into and dump(into[run_id]) != dump(record):
            raise Refusal(f"{source}: record {run_id} differs from the one that is there already; one of the two must go")
        into[run_id] = record


def merge(paths: list[Path], target: Path) -> tuple[int, int]:
    """Add the records (and items) under `paths` to target/records.jsonl: sorted by id, identical or refused. (new, all)."""
    records = target / "records.jsonl"
    united = read_records(records) if records.exists() else {}
    before = set(united)
    for path in paths:
        _unite(united, found_records(path), str(path))
    target.mkdir(parents=True, exist_ok=True)
    _merge_items(paths, target / "items.parquet", set(united))
    temporary = records.with_name(f".records.{secrets.token_hex(4)}")
    temporary.write_text("".join(dump(united[i]) + "\n" for i in sorted(united)))
    os.replace(temporary, records)
    return len(united.keys() - before), len(united)


def _merge_items(paths: list[Path], target: Path, wanted: set[str]) -> None:
    """Items of the merged records; those of a run that is in `target` already stay as they are."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    have = [pq.read_table(target)] if target.exists() else []
    known = set(have[0]["run"].unique().to_pylist()) if have else set()
    sources = [p.parent if p.is_file() else p for p in paths]
    for file in dict.fromkeys(f for s in sources for f in sorted(s.rglob("items.parquet")) if f != target):
        table = pq.read_table(file)
        runs = [r for r in table["run"].unique().to_pylist() if r in wanted and r not in known]
        have.append(table.filter(pc.is_in(table["run"], pa.array(runs, pa.string()))))
        known.update(runs)
    have = [t for t in have if len(t)]
    if have:
        temporary = target.with_name(f".items.{secrets.token_hex(4)}")
        table = pa.concat_tables(have, promote_options="permissive").sort_by([("run", "ascending"), ("part", "ascending"), ("item", "ascending")])
        pq.write_table(table, temporary, compression="zstd")
        os.replace(temporary, target)
