"""Sixty runs in chains of three: on Slurm as on this machine, and under random faults as without.

    make chaos SEED=7

is a longer one, of 200 runs. Faults are drawn from a seeded generator; when they strike depends on the machine.
"""

import contextlib
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.test_slurm import Case, case, checkout, same_science
from tests.virtual import Virtual, slurm, wait

pytestmark = pytest.mark.slurm
RUNS = int(os.environ.get("MIXERBENCH_CHAOS_RUNS", 60))
SEED = int(os.environ.get("MIXERBENCH_CHAOS_SEED", 1))
NEWS_SECONDS = 6.0  # without a new record until a fault comes all the same
CHAIN = {"base": "", "child": "base", "grandchild": "child"}
PLAIN = [{"name": name, "heads": 2} for name in ("identity", "dense")]
BOTH = [{"name": name, "heads": 2, "sam": False} for name in ("toeplitz", "low_rank", "attention")]
GRID = {
    "protocols": list(CHAIN),
    "mixers": [*PLAIN, *BOTH],
    "seeds": list(range(-(-RUNS // 15))),
    "varies": {},
    "columns": [{"protocol": "base", "metric": "accuracy"}],
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return with_chain(tmp_path_factory.mktemp("chain") / "checkout", {})


@pytest.fixture(scope="module")
def slow(tmp_path_factory) -> Path:
    """The same with runs of some seconds, so that a fault finds somebody at work."""
    step = "        self.optimiser.step()\n"
    edits = {"bench/train.py": (step, f"        time.sleep(0.4)\n{step}")}
    return with_chain(tmp_path_factory.mktemp("slow") / "checkout", edits)


def with_chain(folder: Path, edits: dict) -> Path:
    """The code with three protocols more, each of a few steps, one from the weights of the other."""
    made = checkout(folder, edits)
    for n, (name, init) in enumerate(CHAIN.items()):
        own = f'init: "{init}"\ntask: {{held_out: {64 + n}}}\nbudget: {{steps: 6, batch: 16}}\n'
        text = f"defaults:\n  - quick_copying\n  - _self_\n{own}"
        (made / "configs" / "protocol" / f"{name}.yaml").write_text(text)
    return made


@pytest.fixture(scope="module")
def alone(root, tmp_path_factory) -> dict:
    """Every record of the grid, made by one process of this machine."""
    here = case(tmp_path_factory.mktemp("alone"), {}, **GRID)
    here.here(root)
    return found(here)


def found(asked: Case) -> dict:
    store = asked.store
    return {p.parent.name: store.record(p.parent.name) for p in store.root.glob("runs/*/record.json")}


def from_a_shell(asked: Case, root: Path) -> subprocess.Popen:
    """A shell that is no child of our session and runs the command as a user does."""
    words = [str(Path(sys.executable).with_name("mixerbench")), "sweep", str(asked.sweep), "--on", str(asked.cluster)]
    own = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    line = f"{shlex.join([*words, *asked.where])}; exit $?"
    return subprocess.Popen(["bash", "-c", line], cwd=asked.folder, env=own, start_new_session=True, **streams)


def processes() -> list[Path]:
    return list(Path("/proc").glob("[0-9]*"))


def session_of(process: Path) -> int:
    """0 for a process that has just ended."""
    try:
        return os.getsid(int(process.name))
    except ProcessLookupError:
        return 0


def wait_for(asked: Case, count: int, seconds: float) -> dict:
    wait(lambda: len(list(asked.store.root.glob("runs/*/record.json"))) == count, seconds, "records are missing")
    asked.ended(120)
    return found(asked)


def test_a_sweep_of_chains_is_bitwise_the_local_one(virtual, root, alone, tmp_path):
    """Submitted by a shell of a session of its own, which has ended when the first run begins."""
    asked = case(tmp_path, {"pack": -(-len(alone) // 4)}, **GRID)
    slurm("scontrol", "update", "NodeName=n[1-4]", "State=DRAIN", "Reason=test")
    shell = from_a_shell(asked, root)
    assert "4 tasks submitted" in shell.communicate(timeout=120)[0] and shell.returncode == 0
    assert not any(session_of(process) == shell.pid for process in processes())
    assert len(asked.queue()) == 4 and all("PENDING" in task for task in asked.queue())
    slurm("scontrol", "update", "NodeName=n[1-4]", "State=RESUME")
    there = wait_for(asked, len(alone), 600)
    assert there.keys() == alone.keys() and len(alone) >= RUNS
    assert all(same_science(there[run_id], alone[run_id]) for run_id in alone)
    assert not list(asked.store.root.glob("runs/*/failure-*"))
    assert "nothing to submit" in asked("--on", str(asked.cluster), root=root)


class Chaos:
    """Faults in a random order. Each leaves the cluster able to go on by itself or by `sweep --on`."""

    def __init__(self, virtual: Virtual, asked: Case, seed: int, words: tuple[str, ...], root: Path):
        self.virtual, self.asked, self.draw = virtual, asked, random.Random(seed)
        self.words, self.root = words, root

    def __call__(self) -> str:
        faults = [self.kill, self.kill, self.requeue, self.power, self.daemon, self.controller, self.cancel]
        faults += [self.preempt, self.submit]
        fault = self.draw.choice(faults)
        with contextlib.suppress(subprocess.CalledProcessError):  # whom it was meant for has just ended
            fault()
        return fault.__name__

    def a_task(self) -> str | None:
        tasks = [line.split()[0] for line in self.asked.queue() if line.endswith("RUNNING")]
        return self.draw.choice(tasks) if tasks else None

    def a_node(self) -> str:
        return f"n{self.draw.randint(1, 4)}"

    def kill(self) -> None:
        """A worker of this sweep, wherever it is."""
        mine = f"{self.asked.folder}/results/slurm/"
        workers = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                text = path.read_text()
                if "bench.worker" in text and mine in text:
                    workers.append(int(path.parent.name))
        if workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.draw.choice(sorted(workers)), signal.SIGKILL)

    def requeue(self) -> None:
        if task := self.a_task():
            slurm("scontrol", "requeue", task)

    def cancel(self) -> None:
        if task := self.a_task():
            slurm("scancel", task)

    def preempt(self) -> None:
        """A short job of more weight takes somebody's node."""
        words = ["-p", "high", "-w", self.a_node(), "-t", "1", "-o", "/dev/null", "--wrap", "sleep 1"]
        slurm("sbatch", *words)

    def submit(self) -> None:
        """Two submitters at once."""
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda _: self.asked("--on", str(self.asked.cluster), *self.words, root=self.root), range(2)))

    def power(self) -> None:
        node = self.a_node()
        self.virtual("fail", node)
        time.sleep(1)
        self.virtual("boot", node)

    def daemon(self) -> None:
        node = self.a_node()
        self.virtual("orphan", node)
        self.virtual("boot", node)

    def controller(self) -> None:
        self.virtual("halt")
        time.sleep(self.draw.random() * 3)
        self.virtual("resume")


def bring_back() -> None:
    """Every node that Slurm drained and every job that it held, since a task did not start in the confusion."""
    for number in range(1, 5):
        with contextlib.suppress(subprocess.CalledProcessError):  # nothing is wrong with it
            slurm("scontrol", "update", f"NodeName=n{number}", "State=RESUME")
    for job in slurm("squeue", "-h", "-r", "-t", "PD", "-o", "%i %r").splitlines():
        if "held" in job:
            slurm("scontrol", "release", job.split()[0])


def test_chaos_ends_as_that_many_correct_records(virtual, slow, alone, tmp_path):
    asked = case(tmp_path, {"pack": -(-len(alone) // 4), "idle": 1.0}, **GRID)
    words = ("where.retries=20", "where.checkpoint_seconds=0")
    asked.submit(*words, root=slow)
    chaos, done = Chaos(virtual, asked, SEED, words, slow), 0
    for n in range(RUNS // 5):
        time.sleep(chaos.draw.uniform(0, 3))
        done = after(asked, done)
        print(f"{n}: {done} records, {chaos()}", flush=True)
        if done == len(alone):
            break
        if n % 3 == 2:  # as a person would, now and then
            bring_back()
            asked("--on", str(asked.cluster), *words, root=slow)
    bring_back()
    asked("--on", str(asked.cluster), *words, root=slow)
    there = wait_for(asked, len(alone), 600)
    assert there.keys() == alone.keys()
    assert all(same_science(there[run_id], alone[run_id]) for run_id in alone), asked.logs()
    print(tally(asked), flush=True)
    assert tally(asked)


def after(asked: Case, done: int) -> int:
    """How many records there are, when there are more than `done` or, after a while, though there are no more.

    A fault that strikes while all are starting again finds nobody at work.
    """
    end = time.monotonic() + NEWS_SECONDS
    while (now := len(list(asked.store.root.glob("runs/*/record.json")))) == done and time.monotonic() < end:
        time.sleep(0.2)
    return now


def tally(asked: Case) -> dict[str, int]:
    kinds = [f["kind"] for run_id in found(asked) for f in asked.store.failures(run_id)]
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}
