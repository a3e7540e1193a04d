"""Submission to a real Slurm, on a virtual cluster: what is submitted, what runs, what a second submission does."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from bench.compose import ROOT
from bench.config import Run
from bench.store import Store
from bench.submit import Submission, submissions
from bench.sweep import grid, load, ordered
from tests.virtual import slurm, wait

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
        words = ("sweep", str(self.sweep), *words, f"where.results={self.folder / 'results'}", "where.device=cpu")
        environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "bench.cli", *words],
            capture_output=True,
            text=True,
            env=environment,
            cwd=self.folder,
            timeout=300,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + (done.stderr if code else "")

    def submit(self, *words: str) -> Submission:
        """`sweep --on`, and the submission that it made."""
        self("--on", str(self.cluster), *words)
        return submissions(self.store.root, self.sweep.stem)[-1]

    def records(self) -> list:
        """Of the runs, in order; None where there is none."""
        store = self.store
        return [store.record(run.id) for run in self.runs]

    def finished(self, seconds: float = 240) -> None:
        """Wait until every run has its record and no task is left."""
        wait(lambda: all(self.store.has(run.id) for run in self.runs), seconds, self.logs())
        self.ended(60)

    def ended(self, seconds: float) -> None:
        wait(lambda: not self.queue(), seconds, "tasks are left")

    def queue(self) -> list[str]:
        """'123_0 RUNNING' for every task that is not at its end."""
        names = ",".join(s.name for s in submissions(self.store.root, self.sweep.stem))
        return slurm("squeue", "-h", "-r", f"--name={names}", "-o", "%i %T").splitlines() if names else []

    def logs(self) -> str:
        files = sorted(self.folder.glob("results/slurm/*/*/*.txt"))
        return "\n".join(f"== {path.name}\n{path.read_text()}" for path in files)


def case(folder: Path, cluster: dict, **changes) -> Case:
    """A sweep of four tiny runs with `changes`, and the virtual cluster's file with `cluster` changed."""
    sweep, on = folder / "tiny.yaml", folder / "cluster.yaml"
    sweep.write_text(yaml.safe_dump(TINY | changes, sort_keys=False))
    on.write_text(yaml.safe_dump(yaml.safe_load((ROOT / "slurm" / "virtual.yaml").read_text()) | cluster))
    return Case(folder, sweep, on)


def same_science(one, other) -> bool:
    """Whether two records say the same to the last bit of every metric and loss."""
    parts = ("id", "outcome", "metrics", "curve", "hashes", "digests", "capacity", "gain")
    return all(getattr(one, part) == getattr(other, part) for part in parts)


def test_a_sweep_on_slurm_is_the_sweep_on_this_machine(virtual, tmp_path):
    asked = case(tmp_path, {"pack": 2})
    submission = asked.submit()
    assert [array["elements"] for array in submission.arrays] == [2]
    again = asked("--on", str(asked.cluster))
    assert "2 tasks of this sweep are queued" in again and "nothing to submit" in again
    asked.finished()
    there = asked.records()
    assert {r.environment.node for r in there} <= {"n1", "n2", "n3", "n4"}
    (tmp_path / "results").rename(tmp_path / "there")
    asked()
    assert all(same_science(*pair) for pair in zip(there, asked.records(), strict=True))
