"""Pilots: each protocol and mixer of a sweep trained for STEPS steps, evaluated, and measured; no record is kept.

An ordinary run in a folder of its own that is removed, with two differences: the budget is cut, and a child starts
from fresh weights (they cost the same). Only this file of the room starts a training, and so loads torch.
"""

import argparse
import dataclasses
import os
import sys
import tempfile
import time
from pathlib import Path

from bench import Refusal
from bench.config import Run, Where, canonical, digest
from bench.plan.evidence import Pilot, append_pilot, device_label, pilot_of, read_pilots
from bench.store import Store, take, utc
from bench.submit import Submission
from bench.sweep import grid, load, ordered

STEPS = 60


def measure(runs: list[Run], where: Where, store: Store, stop) -> None:
    """One line in pilots.jsonl for each protocol and mixer that has none on this device; one that fails is said.

    Others may measure beside us: each pilot is taken by a lease. Ends early when `stop` says so.
    """
    from bench.provenance import model_of
    from bench.where import device_of

    path = store.root / "pilots.jsonl"
    store.writable(store.root)
    todo = {(r.protocol_id, r.mixer.canonical): r for r in runs}
    for number, (kind, run) in enumerate(todo.items(), 1):
        here = device_label(model_of(device_of(run, where)), where.devices * where.nodes)
        title = f"[{number}/{len(todo)}] pilot of {run.label} {run.mixer.name}"
        lease = take(made(store.root / ".pilots" / digest({"pilot": [*kind, here]})))
        if lease is None:
            print(f"{title}: somebody else is at it", file=sys.stderr)
            continue
        try:
            known = {(p.protocol_id, canonical(p.mixer, "mixer"), p.device) for p in read_pilots(path)}
            if (*kind, here) in known:
                print(f"{title}: measured before on {here}", file=sys.stderr)
            elif lease.bereft:
                print(f"{title}: left out, whoever tried it last was killed", file=sys.stderr, flush=True)
            elif pilot := one(run, where, store, stop):
                added(path, pilot)
                took = f"{1e3 * pilot.step_p50:.3g} ms a step, evaluation {pilot.evaluation:.3g} s on {pilot.device}"
                print(f"{title}: {took}", file=sys.stderr, flush=True)
        finally:
            lease.release()
        if stop():
            return


def made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def added(path: Path, pilot: Pilot) -> None:
    """Append the line, one process at a time: appending is no atomic act on a shared file system."""
    while not (lease := take(made(path.parent / ".pilots" / "append"))):
        time.sleep(0.1)
    try:
        append_pilot(path, pilot)
    finally:
        lease.release()


def one(run: Run, where: Where, store: Store, stop) -> Pilot | None:
    """Train the cut run; None if it could not be measured, with the reason on stderr, or was interrupted."""
    from bench.ranks import execute_ranks
    from bench.run import execute
    from bench.where import places

    protocol = run.protocol
    budget = dataclasses.replace(protocol.budget, steps=min(STEPS, protocol.budget.steps))
    held = dataclasses.replace(protocol, init="", budget=budget, tune=None)
    cut = dataclasses.replace(run, protocol=held, parent=None, replica=0, point={}, trials=())
    with tempfile.TemporaryDirectory(dir=store.root, prefix=".pilot-") as folder:
        there = dataclasses.replace(where, results=str(Path(folder).resolve()), cache=str(places(where).cache))
        try:
            record = execute(cut, there, stop) if where.devices * where.nodes == 1 else execute_ranks(cut, there, stop)
        except Refusal:
            raise
        except Exception as error:  # out of memory, say: the others are measured nevertheless
            print(f"pilot of {run.label} {run.mixer.name}: {type(error).__name__}: {error}", file=sys.stderr)
            return None
        if record is None:
            return None
        if record.outcome != "ok":
            print(f"pilot of {run.label} {run.mixer.name}: {record.outcome}: {record.reason}", file=sys.stderr)
            return None
        weights = Store(Path(there.results)).weights(cut.id).stat().st_size
    pilot = pilot_of(record, weights, utc())
    return dataclasses.replace(pilot, protocol_id=run.protocol_id, label=run.label)


def main(arguments: list[str]) -> int:
    """As part of a Slurm task."""
    from bench.where import results
    from bench.worker import Stop

    parser = argparse.ArgumentParser(prog="python -m bench.plan.pilot")
    parser.add_argument("--submission", type=Path, required=True)
    options = parser.parse_args(arguments)
    os.umask(0o077)
    try:
        submission = Submission.read(options.submission)
        runs = ordered(grid(load(submission.sweep_file)))
        measure(runs, submission.where, Store(results(submission.where)), Stop(float("inf")))
    except Refusal as error:
        print(f"mixerbench: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
