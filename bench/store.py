"""Results on disk: run folders, records, failures, leases, merge. Needs no server and no file locks.

A file that others may read appears whole: written under a temporary name, then linked (the first wins) or renamed.
A lease names its owner exactly, so that a dead owner on this machine is known at once, one elsewhere by its age. Leases
are numbered and the highest counts; it is never removed, only marked as released: were a number used twice, a process
that had judged the first lease stale could take the second from its living owner.
"""

import json
import os
import secrets
import socket
import time
from collections.abc import Callable
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
        self._read: dict[str, Record] = {}  # of run folders; a record never changes

    def folder(self, run_id: str) -> Path:
        return self.root / "runs" / run_id

    def writable(self, folder: Path) -> None:
        """Make a folder of the store if it is not there; a Refusal if nothing can be created or linked in it."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".probe.{secrets.token_hex(4)}"
            link_whole(probe, "")
            probe.unlink()
        except OSError as error:
            why = f"cannot be written: {error.strerror}; set where.results"
            raise Refusal(f"results folder {self.root} {why}") from None

    def open(self, run_id: str) -> Path:
        """The run's folder, made if it is not there; a Refusal if nothing can be written."""
        folder = self.folder(run_id)
        self.writable(folder)
        return folder

    def committed(self) -> dict[str, Record]:
        if self._committed is None:
            found: dict[str, Record] = {}
            for path in sorted(self.root.glob("*/records.jsonl")):
                _unite(found, read_records(path), str(path))
            self._committed = found
        return self._committed

    def has(self, run_id: str) -> bool:
        return run_id in self.committed() or (self.folder(run_id) / "record.json").exists()

    def record(self, run_id: str) -> Record | None:
        """The run's record, None if it has none; a Refusal for one that is damaged or belongs to another run."""
        if run_id in self.committed():
            return self.committed()[run_id]
        path = self.folder(run_id) / "record.json"
        if run_id not in self._read and path.exists():
            record = read_record(path)
            if record.id != run_id:
                raise Refusal(f"{path} is the record of run {record.id}, not of {run_id}; delete it and run again")
            self._read[run_id] = record
        return self._read.get(run_id)

    def weights(self, run_id: str) -> Path:
        return self.folder(run_id) / "weights.pt"

    def finish(self, record: Record, items: dict[str, dict]) -> None:
        """Write the run's items and then its record. Those that are there already stay as they are."""
        folder = self.open(record.id)
        if not self.has(record.id):
            if items:
                replace_whole(folder / "items.parquet", lambda path: write_items(path, record.id, items))
            link_whole(folder / "record.json", dump(record) + "\n")
        for name in ("checkpoint.pt", "progress.json"):
            (folder / name).unlink(missing_ok=True)

    def progress(self, run_id: str) -> float:
        """Share of the steps of a run in hand, or interrupted, that are done."""
        try:
            progress = json.loads((self.folder(run_id) / "progress.json").read_text())
        except FileNotFoundError:
            return 0.0
        return progress["step"] / progress["steps"]

    def fail(self, run_id: str, kind: str, message: str) -> None:
        """Note a failure that is not an outcome of the science, as the next failure-<n>.json."""
        folder = self.open(run_id)
        note = {"kind": kind, "message": message, "time": utc()}
        n = 1
        while not link_whole(folder / f"failure-{n}.json", json.dumps(note) + "\n"):
            n += 1

    def failures(self, run_id: str) -> list[dict]:
        found = sorted(self.folder(run_id).glob("failure-*.json"), key=_number)
        return [json.loads(path.read_text()) for path in found]

    def given_up(self, run_id: str, retries: int) -> bool:
        """Whether the run has failed more often than it may be retried."""
        return sum(f["kind"] not in SPARED for f in self.failures(run_id)) > retries

    def take(self, run_id: str) -> "Lease | None":
        """The right to train a run, or None while somebody else has it."""
        folder = self.open(run_id)
        number, newest = _newest(folder)
        if number and not _free(newest):
            return None
        lease = Lease(folder / f"lease-{number + 1}.json")
        if not link_whole(lease.path, json.dumps(_owner()) + "\n"):
            return None
        if _newest(folder)[0] != number + 1:  # we were so slow that even our number has been used and cleared since
            lease.path.unlink(missing_ok=True)
            return None
        for path in folder.glob("lease-*.json"):
            if _number(path) <= number:
                path.unlink(missing_ok=True)
        return lease

    def leased(self, run_id: str) -> bool:
        number, newest = _newest(self.folder(run_id))
        return number > 0 and not _free(newest)


@dataclass(frozen=True)
class Lease:
    """Held by the process that made it. All it can touch is its own file, so it cannot release what others hold."""

    path: Path

    def renew(self) -> None:
        if self.path.exists():
            os.utime(self.path)

    def release(self) -> None:
        replace_whole(self.path, lambda path: path.write_text(json.dumps({"released": utc()}) + "\n"))


def _number(path: Path) -> int:
    """Of lease-<n>.json or failure-<n>.json."""
    return int(path.stem.split("-")[1])


def _newest(folder: Path) -> tuple[int, Path]:
    return max(((_number(path), path) for path in folder.glob("lease-*.json")), default=(0, folder))


def _free(path: Path) -> bool:
    """Whether a lease was released or has lost its owner; one that has vanished was replaced by a newer one."""
    try:
        owner, age = json.loads(path.read_text()), time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return False
    if "released" in owner:
        return True
    if owner["machine"] and (owner["node"], owner["machine"]) == (socket.gethostname(), _machine()):
        return _started(owner["pid"]) != owner["started"]
    return age > STALE_SECONDS


def _owner() -> dict:
    return {"node": socket.gethostname(), "machine": _machine(), "pid": os.getpid(), "started": _started(os.getpid())}


def _machine() -> str:
    """This boot of this machine and the name space of our process numbers (containers); '' where there is no /proc."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + " " + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _started(pid: int) -> str:
    """Start of a process in clock ticks since boot (tells it from a later one of the same pid), '' if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]  # ended, though its parent has not asked for its exit code yet


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


def replace_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Create or replace `path` whole, with what `write` writes to the path that it is given."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        write(temporary)
        os.replace(temporary, path)
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


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(f"{path} cannot be read: {error}") from None


def read_record(path: Path) -> Record:
    return parse(_text(path), str(path))


def read_records(path: Path) -> dict[str, Record]:
    """All records of a .jsonl file, by id."""
    records = {}
    for number, line in enumerate(_text(path).splitlines(), 1):
        record = parse(line, f"{path}:{number}")
        if record.id in records:
            raise Refusal(f"{path}:{number}: record {record.id} occurs twice")
        records[record.id] = record
    return records


def found_records(path: Path) -> dict[str, Record]:
    """Records under a path: a records file, a run folder, or a results folder with any of them below."""
    found: dict[str, Record] = {}
    files = [path] if path.is_file() else [*sorted(path.rglob("records.jsonl")), *sorted(path.rglob("record.json"))]
    if not files:
        raise Refusal(f"no records under {path}; looked for records.jsonl and record.json")
    for file in files:
        if file.suffix == ".jsonl":
            _unite(found, read_records(file), str(file))
        else:
            record = read_record(file)
            _unite(found, {record.id: record}, str(file))
    return found


def _unite(into: dict[str, Record], more: dict[str, Record], source: str) -> None:
    for run_id, record in more.items():
        if run_id in into and dump(into[run_id]) != dump(record):
            raise Refusal(f"{source}: record {run_id} differs from the one that is there already; remove one of them")
        into[run_id] = record


def merge(paths: list[Path], target: Path) -> tuple[int, int]:
    """Add records (and items) under `paths` to target/records.jsonl: sorted by id, identical or refused. (new, all)."""
    records, items = target / "records.jsonl", target / "items.parquet"
    united = read_records(records) if records.exists() else {}
    before = set(united)
    for path in paths:
        _unite(united, found_records(path), str(path))
    table = _merged_items(paths, items, set(united))
    Store(target).writable(target)
    if table is not None:
        import pyarrow.parquet as pq

        replace_whole(items, lambda path: pq.write_table(table, path, compression="zstd"))
    if len(united) > len(before):
        text = "".join(dump(united[i]) + "\n" for i in sorted(united))
        replace_whole(records, lambda path: path.write_text(text))
    return len(united.keys() - before), len(united)


def _merged_items(paths: list[Path], target: Path, wanted: set[str]):
    """Items of the merged records as one table, None if nothing is new; what `target` has of a run stays as it is."""
    import pyarrow as pa
    import pyarrow.compute as pc

    tables = [_read_items(target)] if target.exists() else []
    known = set(tables[0]["run"].unique().to_pylist()) if tables else set()
    before = len(known)
    for path in paths:
        for file in [path.with_name("items.parquet")] if path.is_file() else sorted(path.rglob("items.parquet")):
            if file.exists():
                table = _read_items(file)
                runs = [r for r in table["run"].unique().to_pylist() if r in wanted and r not in known]
                tables.append(table.filter(pc.is_in(table["run"], pa.array(runs, pa.string()))))
                known.update(runs)
    if len(known) == before:
        return None
    table = pa.concat_tables([t for t in tables if len(t)], promote_options="permissive")
    keys = ["run", "part", "item"]
    columns = [*keys, *sorted(set(table.column_names) - set(keys))]
    return table.select(columns).sort_by([(key, "ascending") for key in keys])


def _read_items(path: Path):
    """A Parquet file of items; a Refusal for one that is damaged or lacks the keys."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    remedy = "delete it (its records stay) or restore it"
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise Refusal(f"{path} is not readable Parquet ({str(error).splitlines()[0]}); {remedy}") from None
    if missing := {"run", "part", "item"} - set(table.column_names):
        raise Refusal(f"{path} has no column {', '.join(sorted(missing))}; {remedy}")
    return table
