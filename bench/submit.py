"""From a sweep to a submission: folder, snapshot of the code, batch script, arrays. Prints what it did and is done.

An element of an array is one generic task (element.py) that takes whatever run is ready: what counts is their number.
Everything is found again by the submission's own unique job name; Slurm's numbers repeat, and its answers get lost.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import sys
import time
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from bench import Refusal, full, slurm
from bench.cluster import Cluster, gpus, requests
from bench.compose import CONFIGS, ROOT
from bench.config import Where, build
from bench.store import Store, take
from bench.whole import replace_whole

SNAPSHOT = ("bench", "configs")  # what of the checkout a task needs
FULL = (
    "SubmitJobLimit",
    "MaxSubmitJob",
    "MaxJobCount",
    "temporarily unable",
    "job submit limit",
)  # held back, not failed
OTHER_SUBMITTER_SECONDS = 120.0
REFUSED = "refused.txt"  # the last refusal of a task, though there be no room for its log
RUNS, PILOTS = "bench.worker", "bench.plan.pilot"  # what a task is there for: the module of its workers


@dataclass(frozen=True)
class Submission:
    """What submission.json holds."""

    folder: Path
    name: str  # of the Slurm jobs, unique: 'mb-' and eight digits
    module: str  # RUNS or PILOTS
    sweep: str  # its name, of pilots with '.pilots'
    sweep_text: str
    words: tuple[str, ...]
    where: Where  # its paths are absolute
    cluster: Cluster
    snapshot: Path
    code: str  # digest of the snapshot
    runs: tuple[str, ...]  # ids of all runs of the sweep, parents included
    command: tuple[str, ...]  # sbatch's words but for the array
    time: str  # to the microsecond: it orders submissions
    arrays: list[dict] = field(default_factory=list)  # {"job": number, "elements": how many}

    @property
    def sweep_file(self) -> Path:
        return self.folder / f"{self.sweep}.yaml"

    def write(self) -> None:
        values = dataclasses.asdict(self) | {"folder": str(self.folder), "snapshot": str(self.snapshot)}
        text = json.dumps(values, indent=1)
        replace_whole(self.folder / "submission.json", lambda path: path.write_text(text + "\n"))

    @classmethod
    def read(cls, folder: Path) -> "Submission":
        path = folder / "submission.json"
        try:
            values = json.loads(path.read_text())
            own = {"where": build(Where, values["where"], "where"), "folder": folder}
            own |= {"cluster": build(Cluster, values["cluster"], "cluster"), "snapshot": Path(values["snapshot"])}
            own |= {key: tuple(values[key]) for key in ("words", "runs", "command")}
            return cls(**{**values, **own})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Refusal(f"{path} is not a submission: {type(error).__name__}: {error}") from None


def refuse(error: Exception, folder: Path | None) -> None:
    """Say why a process did nothing, as a part of a submission where `status` finds it even on a full disk."""
    line = f"mixerbench: {' '.join(str(error).split())}"
    full.say(line, error=True)
    if folder:
        with contextlib.suppress(OSError):
            full.overwrite(folder / REFUSED, line.encode()[: full.BYTES // 2].decode(errors="ignore"))


def pilots_of(sweep: str) -> str:
    """The name under which a sweep's pilots are submitted."""
    return f"{sweep}.pilots"


def submissions(results: Path, sweep: str) -> list[Submission]:
    """All submissions of a sweep, oldest first."""
    found = [Submission.read(path.parent) for path in (results / "slurm" / sweep).glob("*/submission.json")]
    return sorted(found, key=lambda s: (s.time, s.name))


def digest_of(folder: Path) -> str:
    """SHA-256 (16 hex digits) of the paths and contents of a snapshot's files."""
    total = hashlib.sha256()
    for path in _files(folder):
        total.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode())
        total.update(path.read_bytes())
    return total.hexdigest()[:16]


def _files(root: Path) -> list[Path]:
    files = [p for part in SNAPSHOT for p in (root / part).rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    return sorted([*files, *root.glob("COMMIT")])


def snapshot(results: Path) -> tuple[Path, str]:
    """A copy of the code as it is now, and its digest; submissions of equal code share it."""
    from bench.provenance import commit

    home = results / "slurm" / "snapshots"
    Store(results).writable(home)
    draft = home / f".{uuid.uuid4().hex}"
    hidden = shutil.ignore_patterns("__pycache__", ".*")
    shutil.copytree(ROOT / "bench", draft / "bench", ignore=hidden)
    shutil.copytree(CONFIGS, draft / "configs", ignore=hidden)
    (draft / "COMMIT").write_text(commit() + "\n")  # its folder is no checkout
    code = digest_of(draft)
    target = home / code
    try:
        draft.rename(target)
    except OSError:
        shutil.rmtree(draft)
    if digest_of(target) != code:
        raise Refusal(f"{target} has been changed since it was made; move it away and submit again")
    return target, code


def script(submission: Submission) -> str:
    """The batch script. All that comes from a file is quoted, but for the lines of `setup`, which are commands."""
    cluster, q = submission.cluster, shlex.quote
    # The task itself talks to Slurm, so it stays outside of the container; only its workers are inside.
    python = sys.executable if cluster.container else cluster.python or sys.executable
    lines = [
        "#!/bin/bash",
        "# One task of a sweep.",
        "set -e",
        "trap '' USR2 # until somebody listens to it",
        *(f"module load {q(name)}" for name in cluster.modules),
        *cluster.setup,
        f"export PYTHONPATH={q(str(submission.snapshot))}${{PYTHONPATH:+:$PYTHONPATH}}",
        f"export OMP_NUM_THREADS={submission.where.threads} PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1",
        f"cd {q(str(submission.snapshot))}",
        f"exec {' '.join(map(q, [python, '-m', 'bench.element', str(submission.folder)]))}",
    ]
    return "\n".join(lines) + "\n"


def command(folder: Path, name: str, cluster: Cluster, nodes: int) -> list[str]:
    """sbatch's words, but for the array and the script."""
    output = f"{folder}/slurm-%A_%a.txt"
    fixed = ["--requeue", "--open-mode=append", "--export=ALL", "--kill-on-invalid-dep=yes"]
    fixed += [f"--nodes={nodes}", "--ntasks-per-node=1"]
    return [f"--job-name={name}", f"--output={output}", f"--chdir={folder}", *fixed, *requests(cluster)]


def prepare(
    path: Path, sweep: str, module: str, words: list[str], where: Where, cluster: Cluster, run_ids: list[str]
) -> Submission:
    """The submission's folder, whole, before Slurm hears of it."""
    results = Path(where.results)
    code, digest = snapshot(results)
    number = uuid.uuid4().hex
    folder = results / "slurm" / sweep / number
    folder.mkdir(mode=0o700)
    name = f"mb-{number[:8]}"
    submission = Submission(
        folder=folder,
        name=name,
        module=module,
        sweep=sweep,
        sweep_text=path.read_text(),
        words=tuple(words),
        where=where,
        cluster=cluster,
        snapshot=code,
        code=digest,
        runs=tuple(run_ids),
        command=tuple(command(folder, name, cluster, where.nodes)),
        time=datetime.now(UTC).isoformat(timespec="microseconds"),
    )
    submission.sweep_file.write_text(submission.sweep_text)
    full.reserve(folder / REFUSED)
    (folder / "job.sh").write_text(script(submission))
    submission.write()
    return submission


def absolute(where: Where) -> Where:
    """The same places, wherever a task is started."""
    data = where.data or os.environ.get("MIXERBENCH_DATA", "")
    return dataclasses.replace(
        where,
        results=str(ROOT / where.results),
        data=str(Path(data).absolute()) if data else "",
        cache=str(Path(where.cache).absolute()) if where.cache else "",
    )


def check(cluster: Cluster, where: Where) -> None:
    """What would pend for ever, fail without a word or compute something slow and wrong."""
    if odd := re.search(r"[%\\\x00-\x1f\x7f]", where.results):  # Slurm 22 takes no escape for them in a job's output
        raise Refusal(f"where.results={where.results!r}: Slurm cannot write below a folder with {odd[0]!r} in its name")
    if where.threads * cluster.side_by_side > cluster.cpus:
        asked = f"{cluster.side_by_side} x where.threads={where.threads}"
        raise Refusal(f"cluster.cpus={cluster.cpus} is less than the threads of a task, {asked}")
    given = gpus(cluster)
    if where.device == "cuda" and given is not None and given < where.devices:
        raise Refusal(f"cluster.gres={cluster.gres!r} gives a task fewer GPUs than where.devices={where.devices} needs")
    if where.nodes > 1 and (cluster.container or cluster.side_by_side > 1):
        key = "container: srun is not inside" if cluster.container else "side_by_side: a run has all of its nodes"
        raise Refusal(f"where.nodes={where.nodes} does not go with cluster.{key}")
    if cluster.partition:
        try:
            limit, nodes = slurm.partition_limits(cluster.partition)
        except slurm.Unavailable as error:
            raise Refusal(f"cluster.partition {cluster.partition!r}: {error}") from None
        if where.nodes > nodes:
            raise Refusal(f"where.nodes={where.nodes} is more than {cluster.partition} has or allows, {nodes:g}")
        if cluster.time > limit:
            raise Refusal(f"cluster.time: {cluster.time} minutes is more than {cluster.partition}'s limit, {limit:g}")


def submit(
    path: Path, module: str, missing: int, run_ids: list[str], words, where, cluster, at_most: int | None
) -> int:
    """Submit as many tasks as the `missing` runs (or pilots) of a sweep need and do not have; how many were."""
    sweep = path.stem if module == RUNS else pilots_of(path.stem)
    where = absolute(where)
    if not re.fullmatch(r"\w[\w.+-]*", sweep):
        raise Refusal(f"{sweep!r} is no name for a folder; rename the sweep's file to letters, digits and . + - _")
    if module == PILOTS and where.nodes > 1:
        raise Refusal(f"where.nodes={where.nodes}: pilots are measured on one node")
    check(cluster, where)
    old = os.umask(0o077)
    try:
        home = Path(where.results) / "slurm" / sweep
        Store(Path(where.results)).writable(home)
        lease = alone(home)
        try:
            return _submit(path, sweep, module, missing, run_ids, words, where, cluster, at_most)
        finally:
            lease.release()
    except slurm.Unavailable as error:
        raise Refusal(str(error)) from None
    finally:
        os.umask(old)


def alone(home: Path):
    """The right to submit this sweep: two submitters at once would both find nothing queued."""
    end = time.monotonic() + OTHER_SUBMITTER_SECONDS
    while not (lease := take(home)):
        if time.monotonic() > end:
            raise Refusal(f"somebody else is submitting this sweep; their lease: {home}/lease-*.json")
        time.sleep(0.5)
    return lease


def _submit(path, sweep, module, missing, run_ids, words, where, cluster, at_most) -> int:
    names = [s.name for s in submissions(Path(where.results), sweep)]
    queued = [e for e in slurm.elements(names) if slurm.alive(e)]
    wanted = math.ceil(missing / (cluster.pack * cluster.side_by_side)) - len(queued)
    if queued:
        ids = ", ".join(sorted({f"{e.id.split('_')[0]} ({e.name})" for e in queued}))
        print(f"{len(queued)} tasks of this sweep are queued or running already: {ids}")
    room = None if at_most is None else at_most - len(queued)
    if wanted <= 0 or (room is not None and room <= 0):
        print("nothing to submit" if wanted <= 0 else f"nothing submitted: --max-parallel {at_most} is reached")
        return 0
    largest = slurm.max_array_size()  # asked first: a Slurm that does not answer leaves no folder
    submission = prepare(path, sweep, module, words, where, cluster, run_ids)
    sent = send(submission, wanted, largest, room)
    print(f"{sent} tasks submitted as {', '.join(a['job'] for a in submission.arrays)} ({submission.name})")
    print(f"folder: {submission.folder}")
    return sent


def send(submission: Submission, wanted: int, largest: int, room: int | None) -> int:
    """Submit the elements in arrays that this cluster takes; what its limits hold back is said and left for later."""
    sent, size = 0, largest
    while sent < wanted:
        count = min(size, wanted - sent)
        extra = [f"--array=0-{count - 1}" + (f"%{room}" if room else "")]
        if room and submission.arrays:  # each array counts by itself: one after the other keeps to the limit
            extra.append(f"--dependency=afterany:{submission.arrays[-1]['job']}")
        known = {array["job"] for array in submission.arrays}
        words = [*submission.command, *extra, str(submission.folder / "job.sh")]
        try:
            job = slurm.submit(words, submission.name, known)
        except slurm.Unavailable as error:
            if not any(word in str(error) for word in FULL):
                raise _undone(submission, str(error)) from None
            if count > 1:
                size = max(1, count // 2)
                continue
            print(f"{wanted - sent} tasks are held back ({error}); the same command sends them later")
            break
        submission.arrays.append({"job": job, "elements": count})
        submission.write()
        sent += count
    if not sent:
        _undone(submission, "")
    return sent


def _undone(submission: Submission, why: str) -> Refusal:
    """Clear the folder of a submission that Slurm took nothing of."""
    if not submission.arrays:
        shutil.rmtree(submission.folder)
        return Refusal(why)
    return Refusal(f"{why}; accepted before that: {', '.join(a['job'] for a in submission.arrays)}")
