"""Pilots: each protocol and mixer of a sweep trained for STEPS steps, evaluated, and measured; no record is kept.

An ordinary run in a folder of its own that is removed, with two differences: the budget is cut, and a child starts
from fresh weights (they cost the same). Only this file of the room starts a training, and so loads torch.
"""

import dataclasses
import sys
import tempfile
from pathlib import Path

from bench import Refusal
from bench.config import Run, Where, canonical
from bench.plan.evidence import Pilot, append_pilot, device_label, pilot_of, read_pilots
from bench.store import Store, utc

STEPS = 60


def measure(runs: list[Run], where: Where, store: Store) -> None:
    """One line in pilots.jsonl for each protocol and mixer that has none on this device; one that fails is said."""
    from bench.provenance import model_of
    from bench.where import device_of
    from bench.worker import Stop

    path = store.root / "pilots.jsonl"
    store.writable(store.root)
    known = {(p.protocol_id, canonical(p.mixer, "mixer"), p.device) for p in read_pilots(path)}
    todo = {(r.protocol_id, r.mixer.canonical): r for r in runs}
    stop = Stop(float("inf"))
    for number, run in enumerate(todo.values(), 1):
        here = device_label(model_of(device_of(run, where)), where.devices)
        title = f"[{number}/{len(todo)}] pilot of {run.label} {run.mixer.name}"
        if (run.protocol_id, run.mixer.canonical, here) in known:
            print(f"{title}: measured before on {here}", file=sys.stderr)
            continue
        if pilot := one(run, where, store, stop):
            append_pilot(path, pilot)
            took = f"{1e3 * pilot.step_p50:.3g} ms a step, evaluation {pilot.evaluation:.3g} s on {pilot.device}"
            print(f"{title}: {took}", file=sys.stderr, flush=True)
        elif stop.signalled:
            raise KeyboardInterrupt


def one(run: Run, where: Where, store: Store, stop) -> Pilot | None:
    """Train the cut run; None if it could not be measured, with the reason on stderr, or was interrupted."""
    from bench.run import execute
    from bench.where import places
    from bench.worker import execute_ranks

    protocol = run.protocol
    budget = dataclasses.replace(protocol.budget, steps=min(STEPS, protocol.budget.steps))
    held = dataclasses.replace(protocol, init="", budget=budget, tune=None)
    cut = dataclasses.replace(run, protocol=held, parent=None, replica=0, point={}, trials=())
    with tempfile.TemporaryDirectory(dir=store.root, prefix=".pilot-") as folder:
        there = dataclasses.replace(where, results=str(Path(folder).resolve()), cache=str(places(where).cache))
        try:
            record = execute(cut, there, stop) if where.devices == 1 else execute_ranks(cut, there, stop)
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
