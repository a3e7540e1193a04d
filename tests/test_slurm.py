"""Submission to a real Slurm, on a virtual cluster: what is submitted, what runs, what a second submission does."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import ANY

import pytest
import yaml

from bench.compose import ROOT
from bench.config import Run
from bench.store import Store
from bench.submit import Submission, submissions
from bench.sweep import grid, load, ordered
from tests.forked import forked
from tests.virtual import Virtual, slurm, wait

pytestmark = pytest.mark.slurm
TINY = {
    "question": "Which?",
    "protocols": ["quick_copying"],
    "mixers": [{"name": "identity", "heads": 2}, {"name": "toeplitz", "heads": 2, "sam": False}],
    "seeds": [0, 1],
    "replicas": [0],
    "varies": {"budget.steps": [20]},
    "departures": [],
    "columns": [{"protocol": "quick_copying", "metric": "accuracy"}],
    "family": {
        "reference": {},
        "comparisons": [],
        "primary": {"protocol": "quick_copying", "metric": "accuracy"},
        "margin": 0,
        "alpha": 0.05,
    },
}


@dataclasses.dataclass
class Case:
    """A sweep, a cluster file and a results folder of one test."""

    folder: Path
    sweep: Path
    cluster: Path

    @property
    def store(self) -> Store:
        return Store(self.folder / "results")

    @property
    def runs(self) -> list[Run]:
        return ordered(grid(load(self.sweep)))

    def __call__(self, *words: str, code: int = 0, root: Path = ROOT) -> str:
        """Standard output (and error, if the exit code is not 0) of `mixerbench sweep` on the test's results."""
        return self.verb("sweep", *words, code=code, root=root)

    def verb(self, name: str, *words: str, code: int = 0, root: Path = ROOT) -> str:
        done = forked("bench.cli", [name, str(self.sweep), *words, *self.where], root, self.folder, 300)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + (done.stderr if code else "")

    def here(self, root: Path = ROOT) -> None:
        """The sweep in one process of this machine."""
        done = forked("bench.worker", [str(self.sweep), "--where", *self.where], root, self.folder, 300)
        assert done.returncode == 0, done.stdout + done.stderr

    @property
    def where(self) -> list[str]:
        return [f"where.results={self.folder / 'results'}", "where.device=cpu"]

    def submit(self, *words: str, root: Path = ROOT) -> Submission:
        """`sweep --on`, and the submission that it made."""
        self("--on", str(self.cluster), *words, root=root)
        return submissions(self.store.root, self.sweep.stem)[-1]

    def records(self) -> list:
        """Of the runs, in order; None where there is none."""
        store = self.store
        return [store.record(run.id) for run in self.runs]

    def finished(self, seconds: float = 240) -> None:
        """Wait until every run has its record and no task is left."""
        wait(lambda: all(self.store.has(run.id) for run in self.runs), seconds, self.logs)
        self.ended(120)

    def ended(self, seconds: float) -> None:
        wait(lambda: not self.queue(), seconds, "tasks are left")

    def queue(self) -> list[str]:
        """'123_0 RUNNING' for every task that is not at its end."""
        names = ",".join(s.name for s in submissions(self.store.root, self.sweep.stem))
        return slurm("squeue", "-h", "-r", f"--name={names}", "-o", "%i %T").splitlines() if names else []

    def logs(self) -> str:
        """What the tasks wrote, and what Slurm says of them."""
        files = sorted(self.folder.glob("results/slurm/*/*/*.txt"))
        said = [f"== {path.name}\n{path.read_text().rstrip()}" for path in files]  # refused.txt is reserved with blanks
        columns = "JobArrayID,State,Reason,RestartCnt,BatchHost"
        return "\n".join([*said, slurm("squeue", "-r", "-t", "all", "-O", columns)])


def case(folder: Path, cluster: dict, **changes) -> Case:
    """A sweep of four tiny runs with `changes`, and the virtual cluster's file with `cluster` changed."""
    sweep, on = folder / "tiny.yaml", folder / "cluster.yaml"
    values = TINY | changes
    values["family"] = TINY["family"] | {"primary": values["columns"][0]}
    sweep.write_text(yaml.safe_dump(values, sort_keys=False))
    on.write_text(yaml.safe_dump(yaml.safe_load((ROOT / "slurm" / "virtual.yaml").read_text()) | cluster))
    return Case(folder, sweep, on)


def checkout(folder: Path, edits: dict[str, tuple[str, str]]) -> Path:
    """A checkout of this code with one passage of some files replaced."""
    for part in ("bench", "configs"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    for name, (old, new) in edits.items():
        text = (folder / name).read_text()
        assert text.count(old) == 1, f"{name}: {old}"
        (folder / name).write_text(text.replace(old, new))
    return folder


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """What is submitted meanwhile starts only afterwards."""
    slurm("scontrol", "update", "NodeName=n[1-4]", "State=DRAIN", "Reason=test")
    try:
        yield
    finally:
        slurm("scontrol", "update", "NodeName=n[1-4]", "State=RESUME")


def same_science(one, other) -> bool:
    """Whether two records say the same to the last bit of every metric and loss."""
    parts = ("id", "outcome", "metrics", "curve", "hashes", "capacity", "gain")
    return all(getattr(one, part) == getattr(other, part) for part in parts)


def test_a_sweep_on_slurm_is_the_sweep_on_this_machine(virtual, tmp_path):
    asked = case(tmp_path, {"pack": 2})
    with waiting():
        submission = asked.submit()
        again = asked("--on", str(asked.cluster))
    assert [array["elements"] for array in submission.arrays] == [2]
    assert "2 tasks of this sweep are queued" in again and "nothing to submit" in again
    asked.finished()
    there = asked.records()
    assert {r.environment.node for r in there} <= {"n1", "n2", "n3", "n4"}
    (tmp_path / "results").rename(tmp_path / "there")
    asked.here()
    assert all(same_science(*pair) for pair in zip(there, asked.records(), strict=True))


def test_workers_side_by_side_in_a_container(virtual, tmp_path):
    """The container is a plain command that leaves a trace of itself."""
    inside = ["env", "INSIDE=a 'b", "sh", "-c", 'echo "inside $INSIDE"; exec "$@"', "container"]
    asked = case(tmp_path, {"pack": 2, "side_by_side": 2, "container": inside})
    assert [array["elements"] for array in asked.submit().arrays] == [1]
    asked.finished()
    logs = [p.read_text() for p in sorted(tmp_path.glob("results/slurm/tiny/*/log-*.txt"))]
    assert len(logs) == 2 and all(text.startswith("inside a 'b\n") for text in logs)
    assert sum(text.count("accuracy=") for text in logs) == 4


def test_the_code_that_runs_is_the_code_that_was_submitted(virtual, tmp_path):
    """While the tasks wait, the checkout is edited so that every run would fail; nothing changes."""
    root = checkout(tmp_path / "checkout", {})
    asked = case(tmp_path, {})
    slurm("scontrol", "update", "NodeName=n[1-4]", "State=DRAIN", "Reason=test")
    asked.submit(root=root)
    assert [line.split()[1] for line in asked.queue()] == ["PENDING"]
    for name in ("bench/run.py", "bench/worker.py", "configs/protocol/quick_copying.yaml"):
        (root / name).write_text("raise SystemExit('edited')")
    slurm("scontrol", "update", "NodeName=n[1-4]", "State=RESUME")
    asked.finished()
    assert {record.outcome for record in asked.records()} == {"ok"}


def test_two_submitters_at_once_submit_it_once(virtual, tmp_path):
    asked = case(tmp_path, {"pack": 1})
    slurm("scontrol", "update", "NodeName=n[1-4]", "State=DRAIN", "Reason=test")
    with ThreadPoolExecutor(2) as pool:
        said = list(pool.map(lambda _: asked("--on", str(asked.cluster)), range(2)))
    assert len(asked.queue()) == 4
    assert sum("4 tasks submitted" in text for text in said) == 1 and sum("nothing to submit" in t for t in said) == 1
    tasks = asked.queue()
    slurm("scancel", tasks[0].split()[0])  # one that waits: it leaves no trace, and the next command sends another
    wait(lambda: len(asked.queue()) == 3, 60)
    assert "1 tasks submitted" in asked("--on", str(asked.cluster))
    assert "--max-parallel 2 is reached" not in asked("--on", str(asked.cluster), "--max-parallel", "2")
    slurm("scancel", *(line.split()[0] for line in asked.queue()))
    slurm("scontrol", "update", "NodeName=n[1-4]", "State=RESUME")
    asked.ended(120)
    assert asked.submit("--max-parallel", "1").arrays == [{"job": ANY, "elements": 4}]
    wait(lambda: any("RUNNING" in line for line in asked.queue()), 120)
    for _ in range(10):
        assert sum("RUNNING" in line for line in asked.queue()) <= 1
        time.sleep(0.2)
    slurm("scancel", *(line.split()[0] for line in asked.queue()))
    asked.ended(120)


def test_a_thousand_runs_are_submitted_in_arrays_of_what_the_cluster_takes(tmp_path):
    with Virtual(accounting=False, lines="MaxArraySize=301") as small:
        assert small("nodes").count("idle") == 4
        slurm("scontrol", "update", "NodeName=n[1-4]", "State=DRAIN", "Reason=test")
        asked = case(tmp_path, {"pack": 1}, seeds=list(range(500)))
        arrays = asked.submit().arrays
        assert [array["elements"] for array in arrays] == [301, 301, 301, 97]
        assert len(asked.queue()) == 1000
        assert "nothing to submit" in asked("--on", str(asked.cluster))


def test_the_limit_of_an_association_holds_back_what_is_over_it(tmp_path):
    with Virtual(accounting=True, lines="AccountingStorageEnforce=associations,limits"):
        slurm("sacctmgr", "-i", "add", "account", "lab")
        slurm("sacctmgr", "-i", "add", "user", "root", "account=lab")
        slurm("sacctmgr", "-i", "modify", "user", "root", "set", "MaxSubmitJobs=3")
        slurm("scontrol", "update", "NodeName=n[1-4]", "State=DRAIN", "Reason=test")
        asked = case(tmp_path, {"pack": 1, "account": "lab"}, seeds=[0, 1, 2])
        wait(lambda: _limit() == 3, 120, "the controller has not heard of the limit")
        said = asked("--on", str(asked.cluster))
        assert "3 tasks are held back" in said and len(asked.queue()) == 3
        slurm("sacctmgr", "-i", "modify", "user", "root", "set", "MaxSubmitJobs=9")
        wait(lambda: _limit() == 9, 120, "the controller has not heard of the limit")
        assert "3 tasks submitted" in asked("--on", str(asked.cluster)) and len(asked.queue()) == 6


def _limit() -> int:
    """Of root's jobs in account lab, as the controller knows it; 0 while it knows none."""
    said = slurm("scontrol", "show", "assoc_mgr", "accounts=lab", "users=root", "flags=assoc")
    found = re.search(r"UserName=root\(.*?MaxSubmitJobs=(\d+)", said, re.DOTALL)
    return int(found[1]) if found else 0


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"partition": "night"}, "cluster.partition 'night'"),
        ({"partition": "high", "time": 100}, "cluster.time: 100 minutes is more than high's limit, 60"),
        (
            {"gres": "gpu:9"},
            "sbatch: error: Batch job submission failed: Requested node configuration is not available",
        ),
        ({"constraint": "moon"}, "sbatch: error: Batch job submission failed: Invalid feature specification"),
    ],
)
def test_what_slurm_refuses_is_one_line_and_leaves_nothing(virtual, tmp_path, changes, part):
    asked = case(tmp_path, changes)
    said = asked("--on", str(asked.cluster), code=2)
    assert part in said.splitlines()[-1]
    assert list((tmp_path / "results" / "slurm").glob("tiny/*/")) == [] and not asked.queue()


def test_without_slurm_it_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    asked = case(tmp_path, {})
    assert "is not installed here" in asked("--on", str(asked.cluster), code=2).splitlines()[-1]


def test_a_run_on_two_nodes(virtual, tmp_path):
    """A rank on each; one that is killed ends the other, and the run is tried again. To rounding, one node's run.

    If the worker is killed, nothing that it started outlives it for long.
    """
    edits = {
        "bench/train.py": (
            "        self.optimiser.step()\n",
            "        time.sleep(0.1)\n        self.optimiser.step()\n",
        )
    }
    asked = case(tmp_path, {"pack": 1}, mixers=TINY["mixers"][:1], seeds=[0], varies={"budget.steps": [120]})
    asked.submit("where.nodes=2", root=checkout(tmp_path / "checkout", edits))
    (run,) = asked.runs
    wait(lambda: asked.store.progress(run.id) > 0.1, 180, asked.logs)
    (follower,) = followers(asked)
    assert "--cpus-per-task=2" in str(processes("srun"))  # it does not take them over by itself
    os.kill(follower, signal.SIGKILL)
    wait(lambda: asked.store.failures(run.id), 120, asked.logs)
    wait(lambda: followers(asked) and followers(asked) != [follower] and below(followers(asked)[0]), 120, asked.logs)
    worker = asked.store.owner(run.id)["pid"]
    started = [*below(worker), *followers(asked), *below(followers(asked)[0])]
    os.kill(worker, signal.SIGKILL)
    wait(lambda: not any(Path(f"/proc/{process}").exists() for process in started), 120, f"some of {started} are left")
    asked.finished()
    (record,) = asked.records()
    failures = asked.store.failures(run.id)
    assert record.environment.world == 2
    assert [f["kind"] for f in failures] == ["error", "lost"], f"{json.dumps(failures)}\n{asked.logs()}"
    assert "srun of the other nodes" in failures[0]["message"]
    nodes = re.findall(r'"ranks of": "(n\d)", "node": 1', asked.logs())
    assert len(nodes) == 3 and record.environment.node not in nodes
    (tmp_path / "results").rename(tmp_path / "there")
    asked.here()
    (alone,) = asked.records()
    assert [loss for _, loss in record.curve] == pytest.approx([loss for _, loss in alone.curve], rel=1e-4)


def test_a_node_that_is_held_up_when_a_run_begins_is_asked_again(tmp_path):
    """The second node's slurmd stands still for longer than a step's credential lasts (5 s here)."""
    with Virtual(accounting=False, lines="SlurmdTimeout=120") as cluster:
        slurm("scontrol", "update", "NodeName=n[3-4]", "State=DRAIN", "Reason=test")
        (node,) = [number for number, words in processes("slurmd").items() if {"n2", cluster.conf} <= {*words}]
        asked = case(tmp_path, {"pack": 1}, mixers=TINY["mixers"][:1], seeds=[0])
        os.kill(node, signal.SIGSTOP)
        try:
            asked.submit("where.nodes=2")
            wait(lambda: str(asked.folder) in str(processes("srun")), 120, asked.logs)
            time.sleep(7)
        finally:
            os.kill(node, signal.SIGCONT)
        asked.finished()
        assert "Job credential expired" in asked.logs() and "launch 2 of 3" in asked.logs()
        assert asked.store.failures(asked.runs[0].id) == [] and asked.records()[0].environment.world == 2


def processes(word: str) -> dict[int, list[str]]:
    """Number and arguments of each process that has an argument of this name."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_text(errors="replace").split("\0")
            found |= {int(path.parent.name): words} if word in words else {}
    return found


def followers(asked: Case) -> list[int]:
    """The process that has the ranks of the second node."""
    every = processes("bench.ranks").items()
    return [number for number, words in every if "srun" not in words[0] and str(asked.folder) in str(words)]


def below(process: int) -> list[int]:
    """The processes that a process started and those that these did."""
    found: list[int] = []
    for path in Path(f"/proc/{process}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, path.read_text().split())
    return found + [lower for child in found for lower in below(child)]


def test_pilots_are_measured_by_tasks(virtual, tmp_path):
    """Two pilots in two tasks; the plan knows the costs then, and a second command sends nothing."""
    asked = case(tmp_path, {"pack": 1})
    with waiting():
        said = asked.verb("plan", "--pilot", "--on", str(asked.cluster))
        again = asked.verb("plan", "--pilot", "--on", str(asked.cluster))
    assert "2 tasks submitted" in said
    assert "2 tasks of this sweep are queued" in again and "nothing to submit" in again
    path = tmp_path / "results" / "pilots.jsonl"
    wait(lambda: path.exists() and len(path.read_text().splitlines()) == 2, 180, "no pilots")
    assert {json.loads(line)["mixer"]["name"] for line in path.read_text().splitlines()} == {"identity", "toeplitz"}
    assert "every protocol and mixer is measured" in asked.verb("plan", "--pilot", "--on", str(asked.cluster))
    assert "pilot" in asked.verb("plan") and not list((tmp_path / "results").glob("runs/*/record.json"))


def test_what_a_user_sees_and_does(virtual, tmp_path):
    """One mixer raises: status says so and where, logs has its words, retry lets it be tried with mended code."""
    edits = {
        "bench/mixers/toeplitz.py": (
            "real_BL11 = real(segments_BL, v_BLHP.dtype)",
            'raise ValueError("\\x1b[31mbad luck")\n        real_BL11 = real(segments_BL, v_BLHP.dtype)',
        )
    }
    asked = case(tmp_path, {"pack": 4}, seeds=[0])
    asked.submit("where.retries=0", root=checkout(tmp_path / "checkout", edits))
    _, bad = sorted(asked.runs, key=lambda run: run.mixer.name)
    wait(lambda: asked.store.failures(bad.id), 180, asked.logs)
    asked.ended(120)
    screen = asked.verb("status")
    assert "2 runs: 1 ok, 1 given up (error 1)" in screen and "\x1b" not in screen
    assert f"{bad.id} quick_copying[budget.steps=20] toeplitz" in screen and "error: ValueError: bad luck" in screen
    log = asked.verb("logs", bad.id[:8])
    assert "failure 1" in log and "ValueError: bad luck" in log and "Traceback" in log
    assert "1 runs may be tried again: error 1" in asked.verb("retry", "--only", "oom,error")
    slurm("scontrol", "update", "NodeName=n[1-4]", "State=DRAIN", "Reason=test")
    asked.submit()
    screen = asked.verb("status")
    assert "1 ok, 1 queued" in screen and "1 pending" in screen
    assert "1 tasks cancelled: 1 pending" in asked.verb("cancel")
    asked.ended(120)
    assert "1 ok, 1 missing" in asked.verb("status") and not asked.store.has(bad.id)
    slurm("scontrol", "update", "NodeName=n[1-4]", "State=RESUME")
    asked.submit()
    asked.finished()
    assert "2 runs: 2 ok" in asked.verb("status") and {r.outcome for r in asked.records()} == {"ok"}
