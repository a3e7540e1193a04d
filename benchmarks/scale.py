"""Seconds that the verbs without training need for a large sweep, each in a process of its own, as users wait for it.

Command: python benchmarks/scale.py [--runs 10000] [--repeats 3]
Prints the plan of a sweep of that many runs (chains of two protocols, SAM and heads as axes): of an empty store, and of
one in which every second run has a record; then the status when all have one. Wall and processor seconds, median of the
repeats. No data set is needed. Where Slurm is installed, and as root, also the submission of 1,000 runs, a task each,
to a virtual cluster (tests/virtual_slurm.sh), whose tasks wait.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.compose import ROOT
from bench.config import Run, resolved
from bench.record import SCHEMA, Capacity, Cost, Environment, Hashes, Record, dump
from bench.store import utc
from bench.sweep import grid, load, ordered

ARMS = ("attention", "low_rank", "toeplitz", "quasiseparable", "dense")
LABELS = ("mini_mlm", "mini_sst2", "mini_cola", "mini_mnli_small", "mini_mrpc")


def written(path: Path, runs: int) -> None:
    """A sweep file of `runs` runs: 5 protocols x 20 arms x seeds."""
    each = len(LABELS) * len(ARMS) * 4
    mixers = [{"name": name, "heads": [1, 2, 4, 8]} for name in ARMS]
    values = {
        "question": "How long does it take?",
        "protocols": list(LABELS),
        "mixers": mixers,
        "seeds": list(range(-(-runs // each))),
        "replicas": [0],
        "varies": {},
        "departures": [],
        "columns": [{"protocol": "mini_mlm", "metric": "loss"}, {"protocol": "mini_mrpc", "metric": "f1"}],
        "family": {
            "reference": {"name": "dense", "heads": 4},
            "comparisons": ["reference"],
            "primary": {"protocol": "mini_mrpc", "metric": "f1"},
            "margin": 0.0,
            "alpha": 0.05,
        },
    }
    path.write_text(json.dumps(values))  # JSON is yaml


def a_record(run: Run, number: int) -> Record:
    wobble = 1 + 0.01 * (number % 7)
    return Record(
        schema=SCHEMA,
        id=run.id,
        outcome="ok",
        reason="",
        label=run.label,
        protocol_id=run.protocol_id,
        run=json.loads(json.dumps(resolved(run))),
        digests={f"file {n}": "0123456789abcdef" for n in range(12)},
        hashes=Hashes("0" * 16, "0" * 16, "0" * 16),
        capacity=Capacity(10_000_000, 100_000, 10**8, 1024),
        gain=(1.0,) * 6,
        gain_varying=(0.1,) * 6,
        environment=Environment("", "3", "2", {}, "made-up device", 1, 1, "bf16", "torch", True, 1, "node"),
        cost=Cost(40.0 * wobble, 0.3, 17.0, 8.0, 0.022, 0.024, 0.028, 2 * 10**9, 10**7),
        metrics={"loss": 2.0 * wobble, "f1": 0.7 * wobble},
        curve=tuple((10 * n, 1.0 / n) for n in range(1, 65)),
        finished=utc(),
        registration=run.registration,
        chosen=None,
        card="",
    )


def filled(results: Path, path: Path, start: int) -> int:
    """A record for every second run from the start-th on, in run folders as the store has them."""
    chosen = ordered(grid(load(path)))[start::2]
    for number, run in enumerate(chosen):
        folder = results / "runs" / run.id
        folder.mkdir(parents=True)
        (folder / "record.json").write_text(dump(a_record(run, number)) + "\n")
    return len(chosen)


def timed(words: list[str]) -> tuple[float, float, str]:
    """(wall seconds, processor seconds, first line) of one mixerbench command."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-m", "bench.cli", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall, spent, done.stdout.splitlines()[0]


def report(title: str, words: list[str], repeats: int) -> None:
    figures = [timed(words) for _ in range(repeats)]
    wall, spent = (statistics.median(f[n] for f in figures) for n in (0, 1))
    print(f"{title}: {wall:.2f} s, {spent:.2f} s of processor ({figures[0][2]})", flush=True)


def submitted(folder: Path, runs: int, repeats: int) -> None:
    """A sweep of `runs` runs sent to nodes that take no work; each repeat has a results folder of its own."""
    script = ROOT / "tests" / "virtual_slurm.sh"
    os.environ |= {"SLURM_CI_ACCT": "none", "SLURM_CI_DIR": f"/dev/shm/mixerbench-scale-{os.getpid()}"}
    path, cluster = folder / "thousand.yaml", folder / "cluster.yaml"
    values = {
        "question": "How long does it take?",
        "protocols": ["quick_copying"],
        "mixers": [{"name": "identity", "heads": 2}],
        "seeds": list(range(runs)),
        "replicas": [0],
        "varies": {},
        "departures": [],
        "columns": [{"protocol": "quick_copying", "metric": "accuracy"}],
        "family": {
            "reference": {},
            "comparisons": [],
            "primary": {"protocol": "quick_copying", "metric": "accuracy"},
            "margin": 0.0,
            "alpha": 0.05,
        },
    }
    path.write_text(json.dumps(values))
    cluster.write_text((ROOT / "slurm" / "virtual.yaml").read_text().replace("pack: 30", "pack: 1"))
    try:
        subprocess.run([script, "start"], check=True)
        os.environ["SLURM_CONF"] = f"{os.environ['SLURM_CI_DIR']}/slurm.conf"
        subprocess.run(["scontrol", "update", "NodeName=n[1-4]", "State=DRAIN", "Reason=scale"], check=True)
        figures = []
        for n in range(repeats):
            words = [str(path), "--on", str(cluster), f"where.results={folder / f'sent-{n}'}", "where.device=cpu"]
            figures.append(timed(["sweep", *words]))
        queued = len(subprocess.run(["squeue", "-h", "-r"], capture_output=True, text=True).stdout.splitlines())
        wall, spent = (statistics.median(f[n] for f in figures) for n in (0, 1))
        print(f"submission: {wall:.2f} s, {spent:.2f} s of processor ({queued // repeats} tasks each)", flush=True)
    finally:
        subprocess.run([script, "stop"], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path, results = Path(folder) / "large.yaml", Path(folder) / "results"
        written(path, options.runs)
        words = [str(path), f"where.results={results}"]
        report("plan, empty store", ["plan", *words], options.repeats)
        there = filled(results, path, 0)
        report(f"plan, {there} records", ["plan", *words], options.repeats)
        there += filled(results, path, 1)
        report(f"status, {there} records", ["status", *words], options.repeats)
        if shutil.which("slurmctld", path="/usr/sbin:/sbin:" + os.environ["PATH"]) and os.geteuid() == 0:
            submitted(Path(folder), 1000, options.repeats)
        else:
            print("submission: not measured, Slurm is not installed here or this is not root")


if __name__ == "__main__":
    main()
