"""Results on disk: run folders, records, failures, leases. Needs no server and no file locks.

A lease names its owner exactly, so that a dead owner on this machine is known at once, one elsewhere by its age. Leases
are numbered and the highest counts; it is never removed, only marked as released: were a number used twice, a process
that had judged the first lease stale could take the second from its living owner.
"""

import contextlib
import json
import os
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from bench import Refusal, full
from bench.record import RERUN, Record, United, dump, read_record, write_items
from bench.whole import clear_half_written, link_whole, linked, replace_whole

STALE_SECONDS = 600.0  # a lease elsewhere that was not renewed for so long has lost its owner
KINDS = ("oom", "timeout", "preempted", "error", "cancelled", "lost")  # lost: its process ended without a word
SPARED = ("cancelled", "preempted", "timeout")  # do not count against the run: it goes on from its checkpoint
WRITTEN = ("checkpoint.pt", "progress.json", "weights.pt", "items.parquet", "record.json")  # by whoever has the lease
SPARED_AT_MOST = 20  # interruptions, one after another, that left the run no further than it was


class Store:
    """`root`/runs/<id>/ united with every `root`/<sweep>/records.jsonl."""

    def __init__(self, root: Path):
        self.root = root
        self._committed: dict[str, Record] | None = None
        self._read: dict[str, Record] = {}  # of run folders; a record never changes

    def absent(self) -> str:
        """That there is no such results folder, to end the first line of what is read from it; '' if there is one."""
        return "" if self.root.exists() else f"; results folder {self.root} does not exist yet"

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
            why = f"cannot be written: {error.strerror}; name another (where.results=…; of merge: --into)"
            raise Refusal(f"results folder {self.root} {why}") from None

    def open(self, run_id: str) -> Path:
        """The run's folder, made if it is not there; a Refusal if nothing can be written."""
        folder = self.folder(run_id)
        if not folder.exists():
            with contextlib.suppress(OSError):  # what is wrong with it, `writable` says
                folder.parent.mkdir(parents=True, exist_ok=True)
                folder.mkdir(mode=0o700, exist_ok=True)
        self.writable(folder)
        return folder

    def committed(self) -> dict[str, Record]:
        if self._committed is None:
            found = United()
            for path in sorted(self.root.glob("*/records.jsonl")):
                found.add_lines(path)
            self._committed = found.records
        return self._committed

    def has(self, run_id: str) -> bool:
        return run_id in self.committed() or (self.folder(run_id) / "record.json").exists()

    def record(self, run_id: str) -> Record | None:
        """The run's record, None if it has none; a Refusal for one that is damaged or belongs to another run."""
        if run_id in self.committed():
            return self.committed()[run_id]
        path = self.folder(run_id) / "record.json"
        if run_id not in self._read and path.exists():
            self._read[run_id] = read_record(path, run_id, RERUN)
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
        for name in ("checkpoint.pt", "progress.json", full.SPARE):
            (folder / name).unlink(missing_ok=True)

    def progress(self, run_id: str) -> float:
        """Share of the steps of a run in hand, or interrupted, that are done."""
        try:
            progress = json.loads((self.folder(run_id) / "progress.json").read_text())
        except FileNotFoundError:
            return 0.0
        return progress["step"] / progress["steps"]

    def fail(self, run_id: str, kind: str, message: str, owner: dict | None = None) -> None:
        """Note a failure that is not an outcome of the science, as the next failure-<n>.json.

        `owner`: whose lease it was, if not ours. The note says how far the run was, where it ran and what log it wrote.
        """
        folder, owner = self.folder(run_id), owner or _owner()
        folder.mkdir(parents=True, exist_ok=True)
        note = {"kind": kind, "message": message, "time": utc(), "progress": self.progress(run_id)}
        note |= {key: owner[key] for key in ("node", "job", "log") if key in owner}
        try:
            _numbered(folder, lambda path: link_whole(path, json.dumps(note) + "\n"))
        except OSError as error:
            self._fail_on_a_full_disk(folder, note, error)

    def _fail_on_a_full_disk(self, folder: Path, note: dict, error: OSError) -> None:
        """In the room that `take` reserved. What went wrong follows from the full disk, so that is said first."""
        spare = folder / full.SPARE
        note["message"] = f"{error.strerror} in the results folder; {note['message']}"[: full.BYTES // 4]
        try:
            full.overwrite(spare, json.dumps(note))
            _numbered(folder, lambda path: linked(spare, path))
            spare.unlink()
        except OSError:
            self.writable(folder)  # says so
            raise Refusal(f"results folder {self.root} cannot be written: {error.strerror}") from None

    def failures(self, run_id: str) -> list[dict]:
        found = sorted(self.folder(run_id).glob("failure-*.json"), key=_number)
        return [json.loads(path.read_text()) for path in found]

    def given_up(self, run_id: str, retries: int) -> bool:
        """Whether the run has failed more often than it may be retried, or is interrupted again and again in one place.

        A lost process counts if the run had got no further since the last failure: what kills it will do so again.
        """
        counted, stuck, furthest = 0, 0, 0.0
        for failure in self.failures(run_id):
            further = failure.get("progress", 0.0) > furthest
            furthest = max(furthest, failure.get("progress", 0.0))
            spared = failure["kind"] in SPARED or (failure["kind"] == "lost" and further)
            counted += not spared
            stuck = 0 if further else stuck + spared
        return counted > retries or stuck > SPARED_AT_MOST

    def set_aside(self, run_id: str) -> None:
        """Move what is known of a run's failures, and a record, into the next retried-<n>/; its lease must be ours.

        Raises Refusal for a record that is committed: that is evidence, and stays.
        """
        if run_id in self.committed():
            raise Refusal(f"{run_id} has a committed record in {self.root}; remove it there to train it again")
        folder, n = self.folder(run_id), 1
        while (folder / f"retried-{n}").exists():
            n += 1
        (folder / f"retried-{n}").mkdir()
        for path in [*sorted(folder.glob("failure-*.json"), key=_number), folder / "record.json"]:  # the record last
            with contextlib.suppress(FileNotFoundError):
                path.rename(folder / f"retried-{n}" / path.name)
        self._read.pop(run_id, None)

    def take(self, run_id: str, dead: dict | None = None) -> "Lease | None":
        """The right to train a run, or None while somebody else has it.

        `dead`: an owner that is known to have ended, whatever its lease looks like from here.
        """
        folder = self.open(run_id)
        try:
            lease = take(folder, dead)
            if lease:
                clear_half_written(folder, WRITTEN)
                full.reserve(folder / full.SPARE)
        except OSError as error:  # a full disk takes an empty file, and no more
            raise Refusal(f"results folder {self.root} cannot be written: {error.strerror}; make room") from None
        return lease

    def leased(self, run_id: str) -> bool:
        return self.owner(run_id) is not None

    def log(self, run_id: str) -> str:
        """Path of the log that the last attempt at a run wrote to, '' if it wrote to none that is known."""
        number, newest = _newest(self.folder(run_id))
        lease = _content(newest) or {} if number else {}
        return lease.get("log") or next((f["log"] for f in reversed(self.failures(run_id)) if "log" in f), "")

    def owner(self, run_id: str) -> dict | None:
        """Who has a run: node, machine, pid, started, and in a Slurm job also job and log. None if nobody has."""
        number, newest = _newest(self.folder(run_id))
        return None if number == 0 or _free(newest) else _content(newest)


@dataclass(frozen=True)
class Lease:
    """Held by the process that made it. All it can touch is its own file, so it cannot release what others hold."""

    path: Path
    bereft: dict | None  # the owner before, if it ended without releasing it

    def held(self) -> bool:
        """Whether nobody has taken it from us in the belief that we are dead."""
        return self.path.exists()

    def renew(self) -> None:
        if self.path.exists():
            os.utime(self.path)

    def release(self) -> None:
        """Raises OSError where not even that can be written."""
        if not self.path.exists():
            return
        note = {"released": utc()} | {key: value for key, value in _owner().items() if key == "log"}
        self.path.with_name(full.SPARE).unlink(missing_ok=True)
        try:
            replace_whole(self.path, lambda path: path.write_text(json.dumps(note) + "\n"))
        except OSError:
            full.overwrite(self.path, json.dumps(note))


def take(folder: Path, dead: dict | None = None) -> Lease | None:
    """The only right to work in a folder, or None while somebody else has it."""
    number, newest = _newest(folder)
    before = _content(newest) if number else None
    if number and not _free(newest) and (dead is None or before != dead):
        return None
    lease = Lease(folder / f"lease-{number + 1}.json", None if before and "released" in before else before)
    if not link_whole(lease.path, json.dumps(_owner()) + "\n"):
        return None
    if _newest(folder)[0] != number + 1:  # we were so slow that even our number has been used and cleared since
        lease.path.unlink(missing_ok=True)
        return None
    for path in folder.glob("lease-*.json"):
        if _number(path) <= number:
            path.unlink(missing_ok=True)
    return lease


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
    if owner["machine"] and (owner["node"], owner["machine"]) == (node_name(), _machine()):
        return _started(owner["pid"]) != owner["started"]
    return age > STALE_SECONDS


def _content(path: Path) -> dict | None:
    """What a lease says; None if it has vanished."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None


def node_name() -> str:
    """As Slurm calls this node inside a job, else the host's name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _owner() -> dict:
    me = {"node": node_name(), "machine": _machine(), "pid": os.getpid(), "started": _started(os.getpid())}
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        element = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
        restarts = int(os.environ.get("SLURM_RESTART_COUNT", 0))
        me["job"] = {"name": os.environ["SLURM_JOB_NAME"], "id": element, "restarts": restarts}
    if "MIXERBENCH_LOG" in os.environ:
        me["log"] = os.environ["MIXERBENCH_LOG"]
    return me


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


def _numbered(folder: Path, create: Callable[[Path], bool]) -> None:
    """Create the next failure-<n>.json."""
    n = 1
    while not create(folder / f"failure-{n}.json"):
        n += 1


def utc() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
