"""Starts workers on this machine, shows how far they are, and stops them. Knows runs and the store, never torch."""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.config import Run, Where
from bench.store import Store

POLL_SECONDS = 0.5


def local(path: Path, runs: list[Run], store: Store, where: Where, words: list[str], workers: int, until: float) -> int:
    """Train the runs of the sweep at `path` with attached workers. Exit code: 0, or 2 if a worker refused its input."""
    logs = store.root / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "bench.worker", str(path), "--until", str(until), "--where", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": str(where.threads), "PYTHONUNBUFFERED": "1"}
    log_paths = [logs / f"worker-{os.getpid()}-{n}.log" for n in range(workers)]
    processes = []
    for log in log_paths:
        with open(log, "w") as out:
            # A session of their own: Ctrl-C reaches only us, and we ask the workers to checkpoint.
            processes.append(subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True))
    try:
        watch(processes, runs, store, workers)
    except KeyboardInterrupt:
        print("stopping: workers write a checkpoint and end; the same command goes on from there", file=sys.stderr)
        stop(processes)
        return 130
    refused = [log for process, log in zip(processes, log_paths, strict=True) if process.returncode]
    for log in refused[:1]:
        print(log.read_text().strip().splitlines()[-1], file=sys.stderr)
    return max((p.returncode for p in processes), default=0)


def stop(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        process.send_signal(signal.SIGTERM)
    for process in processes:
        process.wait()


def watch(processes: list[subprocess.Popen], runs: list[Run], store: Store, workers: int) -> None:
    """A progress bar on a terminal, else a line a finished run, until all workers have ended."""
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[left]}"))
    seen = {r.id for r in runs if store.has(r.id)}
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        bar = progress.add_task("runs", total=len(runs), completed=len(seen), left="")
        while True:
            alive = any(p.poll() is None for p in processes)
            fresh = [r for r in runs if r.id not in seen and store.has(r.id)]
            for run in fresh:
                seen.add(run.id)
                line = f"[{len(seen)}/{len(runs)}] {store.record(run.id).label} {describe(run)}{outcome(store, run)}"
                progress.console.print(line, markup=False, highlight=False, soft_wrap=True)
            progress.update(bar, completed=len(seen), left=time_left(runs, store, workers))
            if not alive:
                return
            time.sleep(POLL_SECONDS)


def describe(run: Run) -> str:
    level = {True: " sam", False: " not sam"}.get(run.mixer.args.get("sam"), "")
    return f"{run.mixer.name}{level} seed {run.seed}: "


def outcome(store: Store, run: Run) -> str:
    record = store.record(run.id)
    if record.outcome != "ok":
        return f"{record.outcome}: {record.reason}"
    return " ".join(f"{k}={v:.3g}" for k, v in record.metrics.items()) + f" ({record.cost.wall:.0f} s)"


def time_left(runs: list[Run], store: Store, workers: int) -> str:
    """From the walls of finished runs of the same protocol and the progress of those in hand; '' before the first."""
    walls: dict[str, list[float]] = {}
    for run in runs:
        if store.has(run.id):
            walls.setdefault(run.protocol_id, []).append(store.record(run.id).cost.wall)
    if not walls:
        return ""
    anyhow = statistics.median([w for group in walls.values() for w in group])
    left = 0.0
    for run in runs:
        if not store.has(run.id):
            left += statistics.median(walls.get(run.protocol_id, [anyhow])) * (1 - fraction(store, run))
    minutes, seconds = divmod(round(left / workers), 60)
    return f"about {minutes}:{seconds:02d} left"


def fraction(store: Store, run: Run) -> float:
    """Share of a run's steps that are done."""
    try:
        progress = json.loads((store.folder(run.id) / "progress.json").read_text())
    except FileNotFoundError:
        return 0.0
    return progress["step"] / progress["steps"]
