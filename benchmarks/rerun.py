"""Committed runs trained again: do they give their metrics?

Command: python benchmarks/rerun.py sweeps/table2_mini.yaml --arms "attention SAM" "low_rank SAM" quasiseparable \
    --tolerance 0.005 where.device=cuda where.loaders=3
Trains, in a folder of their own, the runs of these arms (labels as in the table) with the primary column's protocol and
the first seed, their parents too, and compares with the records in where.results. Initial values, batches and optimiser
groups must be the same bit for bit, the metrics of the sweep's columns within the tolerance (absolute). Differences of
device, versions and code are listed, for they explain what differs. Exit status: 1 if anything is beyond its tolerance.
"""

import argparse
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

from bench import Refusal
from bench.cli import guarded, refuse_early, where_of
from bench.compose import ROOT
from bench.config import Run
from bench.queue import Queue
from bench.record import Record
from bench.report.frame import arms_of, rows, written_out
from bench.store import Store
from bench.sweep import Sweep, cells, load, ordered
from bench.where import results
from bench.worker import Stop, work

EXACT = ("shared_init", "batches", "optimiser_groups")


@dataclass(frozen=True)
class Again:
    """A committed run, and the record of its rerun (None until it is trained)."""

    arm: str
    run: Run
    committed: Record


def chosen(sweep: Sweep, store: Store, labels: list[str], protocol: str, seed: int) -> list[Again]:
    """The runs of these arms; a Refusal for an arm that is not there, or a run without a record that is ok."""
    every = rows(sweep, store)
    arms = {arm.label: arm.key for arm in arms_of(every, sweep)[0]}
    runs, found = {cell.run.id: cell.run for cell in cells(sweep)}, []
    for label in labels:
        if label not in arms:
            raise Refusal(f"--arms: no arm '{label}'; the sweep has: {', '.join(arms)}")
        here = [r for r in every if (r.arm, r.protocol, r.seed, r.replica) == (arms[label], protocol, seed, 0)]
        if not here or here[0].record is None or here[0].record.outcome != "ok":
            raise Refusal(f"{label}, {protocol}, seed {seed}: there is no record that is ok")
        found.append(Again(label, runs[here[0].run_id], here[0].record))
    return found


def compared(one: Again, again: Record, metrics: list[str], tolerance: float) -> tuple[list[str], bool]:
    """Lines on one run, and whether all is as it was."""
    lines, good = [f"{one.arm}, run {one.run.id}"], again.outcome == "ok"
    if not good:
        lines.append(f"  {again.outcome}: {again.reason}")
    for name in EXACT:
        same = getattr(one.committed.hashes, name) == getattr(again.hashes, name)
        good &= same
        lines += [] if same else [f"  {name.replace('_', ' ')} differ"]
    for name in metrics if again.outcome == "ok" else []:
        before, now = one.committed.metrics[name], again.metrics[name]
        near = abs(now - before) <= tolerance
        good &= near
        word = f"within {tolerance:g}" if near else f"BEYOND {tolerance:g}"
        lines.append(f"  {name}: {before:.6g} committed, {now:.6g} again, {now - before:+.2g}, {word}")
    return [*lines, *explained(one.committed, again)], good


def explained(before: Record, now: Record) -> list[str]:
    old, new = (dataclasses.asdict(r.environment) for r in (before, now))
    lines = [f"  {k}: {old[k]} then, {new[k]} now" for k in old if old[k] != new[k] and k not in ("commit", "node")]
    code = sorted(k for k in {*before.digests, *now.digests} if before.digests.get(k) != now.digests.get(k))
    return lines + ([f"  code that changed: {', '.join(code)}"] if code else [])


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--arms", nargs="+", required=True)
    parser.add_argument("--tolerance", type=float, required=True, help="of every metric, in its own units")
    parser.add_argument("--protocol", help="default: that of the primary column")
    parser.add_argument("--seed", type=int, help="default: the sweep's first")
    parser.add_argument("--into", type=Path, default=ROOT / "results" / "rerun", help="results folder of the reruns")
    places = [word for word in words if word.startswith("where.")]
    options = parser.parse_args([word for word in words if word not in places])
    sweep, where = load(options.sweep), where_of(places)
    protocol = options.protocol or sweep.family.primary.protocol
    seed = sweep.seeds[0] if options.seed is None else options.seed
    every = chosen(sweep, Store(results(where)), options.arms, protocol, seed)
    elsewhere = dataclasses.replace(where, results=str(options.into.resolve()))
    store, runs = Store(options.into.resolve()), ordered([one.run for one in every])
    refuse_early(runs, elsewhere)
    work(Queue(runs, store, elsewhere), Stop(float("inf")))
    columns = written_out(sweep, list(dict.fromkeys(cell.protocol for cell in cells(sweep))))
    metrics, good = [c.metric for c in columns if c.protocol == protocol], True
    for one in every:
        again = store.record(one.run.id)
        if again is None:
            raise Refusal(f"{one.arm}: the rerun did not finish; the same command goes on")
        lines, same = compared(one, again, metrics, options.tolerance)
        good &= same
        print("\n".join(lines))
    return int(not good)


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
