"""Seconds from 10,000 records on disk to all tables and figures of a report.

Command: python benchmarks/scale_report.py. Fabricated records: 25 arms x 20 seeds x 20 protocols, as a committed
records.jsonl, read and reported as `mixerbench report` does. Target: under 20 s on two cores.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from bench.config import resolved
from bench.record import Capacity, Cost, Environment, Hashes, Record, dump
from bench.report.verb import report
from bench.store import Store
from bench.sweep import Sweep, grid, load

SWEEP = """question: How long does a large report take?
protocols: [quick_recall]
mixers:
  - {{name: low_rank, sam: [false, true], heads: 2, rank: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]}}
  - {{name: dense, sam: false, heads: 2}}
seeds: {seeds}
replicas: [0]
varies: {{budget.steps: {steps}}}
departures: []
columns: [{{protocol: quick_recall, metric: accuracy}}]
family:
  reference: {{name: dense}}
  comparisons: [reference, sam]
  primary: {{protocol: "quick_recall[budget.steps=10]", metric: accuracy}}
  margin: 0.01
  alpha: 0.05
"""


def a_record(run, value: float) -> Record:
    """What arms share depends on protocol and seed only."""
    values, place = json.loads(json.dumps(resolved(run))), f"{run.protocol_id}-{run.seed}"
    return Record(
        schema=1,
        id=run.id,
        outcome="ok",
        reason="",
        label=run.label,
        protocol_id=run.protocol_id,
        run=values,
        digests={name: "0" * 16 for name in ("run", "train", "mixers/base", f"mixers/{run.mixer.name}")},
        hashes=Hashes(place, place, place),
        capacity=Capacity(40_000, 400, 10_000, 16),
        gain=(0.5,),
        gain_varying=(0.5,),
        environment=Environment("", "3", "2", {"numpy": "2"}, "none", 1, 1, "fp32", "torch", False, 1, "n"),
        cost=Cost(*[1.0] * 7, peak_memory=1, tokens=1000),
        metrics={"accuracy": value, "loss": 1 - value},
        curve=tuple((step, 1.0 / step) for step in range(1, 65)),
        finished="2026-01-01T00:00:00+00:00",
        registration=run.registration,
        chosen=None,
        card="",
    )


def fill(folder: Path, seeds: int, protocols: int) -> Sweep:
    path = folder / "large.yaml"
    steps = [10 * (i + 1) for i in range(protocols)]
    path.write_text(SWEEP.format(seeds=list(range(seeds)), steps=steps))
    sweep, draw = load(path), np.random.default_rng(0)
    lines = sorted(dump(a_record(run, float(draw.uniform(0.5, 0.6)))) for run in grid(sweep))
    (folder / "results" / "large").mkdir(parents=True)
    (folder / "results" / "large" / "records.jsonl").write_text("\n".join(lines) + "\n")
    return sweep


def main() -> None:
    about = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    about.add_argument("--seeds", type=int, default=20)
    about.add_argument("--protocols", type=int, default=20)
    about.add_argument("--html", action="store_true", help="the page too")
    options = about.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fill(folder, options.seeds, options.protocols)
        started = time.perf_counter()
        report(load(folder / "large.yaml"), Store(folder / "results"), folder / "out", None, options.html)
        spent = time.perf_counter() - started
    print(f"{25 * options.seeds * options.protocols:,} records: {spent:.1f} s")


if __name__ == "__main__":
    main()
