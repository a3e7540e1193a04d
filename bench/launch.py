"""Starts workers on this machine, shows how far they are and what is missing, and stops them. Never knows torch."""

import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench import Refusal
from bench.config import Run, Where
from bench.store import Store
from bench.sweep import named

POLL_SECONDS = 0.5


def local(
    path: Path,
    seeds: list[int] | None,
    runs: list[Run],
    store: Store,
    where: Where,
    words: list[str],
    shares: list[str],
    until: float,
) -> int:
    """Train the runs of the sweep at `path`, or of some of its seeds, with attached workers, to the end or until Ctrl-C
    (130).

    Each of `shares` starts a worker: the GPUs that it sees, '' for no word on them. Raises Refusal if a worker refused
    its input; 1 if one ended in another way than it should.
    """
    logs = store.root / "logs"
    store.writable(logs)
    some = [] if seeds is None else ["--seeds", ",".join(map(str, seeds))]
    command = [sys.executable, "-m", "bench.worker", str(path), *some, "--until", str(until), "--where", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": str(where.threads), "PYTHONUNBUFFERED": "1"}
    started: dict[Path, subprocess.Popen] = {}
    handlers = {number: signal.signal(number, _interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        for n, share in enumerate(shares):
            log = logs / f"worker-{os.getpid()}-{n}.log"
            with open(log, "w") as out:
                # A session of their own: Ctrl-C reaches only us, and we ask the workers to checkpoint.
                own = environment | {"MIXERBENCH_LOG": str(log)} | ({"CUDA_VISIBLE_DEVICES": share} if share else {})
                started[log] = subprocess.Popen(command, stdout=out, stderr=out, env=own, start_new_session=True)
        watch(list(started.values()), runs, store, len(shares))
    except KeyboardInterrupt:
        note = "workers write a checkpoint and end (Ctrl-C again: at once); the same command goes on from there"
        print(f"stopping: {note}", file=sys.stderr)
        return 130
    finally:
        stop(list(started.values()))
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return verdict(started)


def _interrupt(number, frame) -> None:
    raise KeyboardInterrupt


def stop(processes: list[subprocess.Popen]) -> None:
    """Ask the processes to end and wait for them; a second Ctrl-C kills them."""
    try:
        for process in processes:
            process.send_signal(signal.SIGTERM)  # does nothing to one that has ended
        for process in processes:
            process.wait()
    except KeyboardInterrupt:
        for process in processes:
            process.kill()
            process.wait()


def verdict(ended: dict[Path, subprocess.Popen]) -> int:
    """0 if all workers ended well, else 1 and a line each; the first refusal of one is raised here."""
    bad = {log: process.returncode for log, process in ended.items() if process.returncode}
    for log in bad:
        lines = [line for line in log.read_text().splitlines() if line.startswith("mixerbench: ")]
        if lines:
            raise Refusal(lines[-1].removeprefix("mixerbench: "))
    for log, code in bad.items():
        print(f"a worker ended with exit code {code}; its log: {log}", file=sys.stderr)
    return int(bool(bad))


def watch(processes: list[subprocess.Popen], runs: list[Run], store: Store, workers: int) -> None:
    """A progress bar on a terminal, else a line a finished run, until all workers have ended."""
    console = Console()
    left = TextColumn("{task.fields[left]}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), left)
    seen = {r.id for r in runs if store.has(r.id)}
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        bar = progress.add_task("runs", total=len(runs), completed=len(seen), left="")
        while True:
            alive = any(p.poll() is None for p in processes)
            fresh = [r for r in runs if r.id not in seen and store.has(r.id)]
            for run in fresh:
                seen.add(run.id)
                line = f"[{len(seen)}/{len(runs)}] {store.record(run.id).label} {named(run)}: {outcome(store, run)}"
                progress.console.print(line, markup=False, highlight=False, soft_wrap=True)
            progress.update(bar, completed=len(seen), left=time_left(runs, store, workers))
            if not alive:
                return
            time.sleep(POLL_SECONDS)


def outcome(store: Store, run: Run) -> str:
    record = store.record(run.id)
    if record.outcome != "ok":
        return f"{record.outcome}: {record.reason}"
    return " ".join(f"{k}={v:.3g}" for k, v in record.metrics.items()) + f" ({record.cost.wall:.1f} s)"


def time_left(runs: list[Run], store: Store, workers: int) -> str:
    """From the walls of finished runs of the same protocol and the progress of those in hand; '' before the first."""
    walls: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        if store.has(run.id) and store.record(run.id).outcome == "ok":
            walls.setdefault((run.protocol_id, run.kind), []).append(store.record(run.id).cost.wall)
    if not walls:
        return ""
    anyhow = statistics.median([w for group in walls.values() for w in group])
    each = {kind: statistics.median(group) for kind, group in walls.items()}
    waiting = [run for run in runs if not store.has(run.id)]
    left = sum(each.get((run.protocol_id, run.kind), anyhow) * (1 - store.progress(run.id)) for run in waiting)
    # More workers than runs do not help, nor does a run get shorter than itself.
    minutes, seconds = divmod(round(left / max(1, min(workers, len(waiting)))), 60)
    hours, minutes = divmod(minutes, 60)
    return f"about {hours}:{minutes:02d}:{seconds:02d} left" if hours else f"about {minutes}:{seconds:02d} left"


def say_missing(runs: list[Run], store: Store, retries: int) -> int:
    """A line on stderr for each run without a record and why; 1 if there is one."""
    left = [r for r in runs if not store.has(r.id)]
    for one in left:
        failures = store.failures(one.id)
        why = "not started or not finished"
        if failures:
            why = f"{failures[-1]['kind']}: {failures[-1]['message'].splitlines()[0]}"
        if store.given_up(one.id, retries):
            why += f"; given up after {len(failures)} failures, `mixerbench retry` lets it be tried again"
        print(f"missing {one.id} {one.label} {named(one)}: {why}", file=sys.stderr)
    return int(bool(left))
