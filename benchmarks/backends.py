"""Do a mixer's backends train alike? The same runs with each, and how far apart two seeds are.

Command: python benchmarks/backends.py --steps 300 --out results/backends where.device=cuda where.loaders=3
Words may be `protocol.precision=fp32` and such. Trains cauchy, vandermonde and quasiseparable, sequence-aligned,
four heads, with each of --backends and --seeds (the schedule is that of --steps). Several of these commands share the
runs, and one goes on where another was stopped. Then, over the second half of the curve and on validation: the mean
distance of two backends on one seed (which sees the same batches from the same weights) beside that of two seeds on the
first. They agree if it is no larger. Writes backends.json and curves.png into --out. Exit status: 1 if two disagree.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

from bench import Refusal
from bench.cli import guarded, refuse_early, where_of
from bench.compose import ROOT, make_run, parse_overrides
from bench.queue import Queue
from bench.record import Record
from bench.report.plots import settings
from bench.store import Store
from bench.worker import Stop, work

MIXERS = ("cauchy", "vandermonde", "quasiseparable")
Trained = dict[tuple[str, str, int], Record]  # by mixer, backend, seed


def apart(records: Iterable[tuple[Record, Record]]) -> dict[str, float]:
    """Mean distances of pairs: of the losses of the second half of the curve, and of each metric."""
    curve, metrics = [], {}
    for one, other in records:
        both = list(zip(one.curve, other.curve, strict=True))
        curve.append(statistics.fmean(abs(a - b) for (_, a), (_, b) in both[len(both) // 2 :]))
        for name, value in one.metrics.items():
            metrics.setdefault(name, []).append(abs(value - other.metrics[name]))
    return {"curve": statistics.fmean(curve), **{name: statistics.fmean(found) for name, found in metrics.items()}}


def compared(trained: Trained, mixer: str, backends: list[str], seeds: list[int]) -> dict:
    """Distances of backends, and of seeds on the first; whether those are no larger, on the curve and in the loss."""
    by_backend = apart(
        (trained[mixer, a, seed], trained[mixer, b, seed])
        for a, b in itertools.combinations(backends, 2)
        for seed in seeds
    )
    reference = backends[0]
    by_seed = apart(
        (trained[mixer, reference, a], trained[mixer, reference, b]) for a, b in itertools.combinations(seeds, 2)
    )
    agree = all(by_backend[name] <= by_seed[name] for name in ("curve", "loss"))
    return {"mixer": mixer, "backends": by_backend, "seeds": by_seed, "agree": agree}


def draw(trained: Trained, path: Path) -> None:
    """A line for each seed, a colour and a dash for each backend."""
    with settings():
        from matplotlib.figure import Figure

        mixers = list(dict.fromkeys(mixer for mixer, _, _ in trained))
        backends = list(dict.fromkeys(backend for _, backend, _ in trained))
        figure = Figure(figsize=(3.2 * len(mixers), 2.6), layout="constrained")
        for axes, name in zip(figure.subplots(1, len(mixers), squeeze=False)[0], mixers, strict=True):
            for number, backend in enumerate(backends):
                look = {"color": f"C{number}", "linestyle": ("-", "--", ":", "-.")[number % 4], "linewidth": 0.9}
                curves = [r.curve for (mixer, way, _), r in trained.items() if (mixer, way) == (name, backend)]
                lines = [axes.plot(*zip(*curve, strict=True), **look)[0] for curve in curves]
                lines[0].set_label(f"{backend}, seeds: {len(lines)}")
            axes.set(title=name, xlabel="step", ylabel="training loss")
        axes.legend()
        figure.savefig(path, dpi=200)


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--protocol", default="mini_mlm")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--mixers", nargs="+", default=list(MIXERS))
    parser.add_argument("--backends", nargs="+", default=["torch", "triton"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--out", type=Path, required=True)
    places = [word for word in words if word.startswith("where.")]
    held = [word for word in words if word.startswith("protocol.")]
    options = parser.parse_args([word for word in words if word not in places + held])
    for word, given in (("--backends", options.backends), ("--seeds", options.seeds)):
        if len(set(given)) < 2:
            raise Refusal(f"{word} needs two to compare, got {', '.join(map(str, given))}")
    where, changes = where_of(places), {"mixer.sam": True, "mixer.heads": 4}
    changes |= {"protocol.budget.steps": options.steps} | parse_overrides(held)
    runs = {(m, s): make_run(options.protocol, m, changes, s, 0) for m in options.mixers for s in options.seeds}
    trained, out = {}, (ROOT / options.out).resolve()
    for backend in options.backends:
        here = dataclasses.replace(
            where, backend=backend, results=str(out / backend), cache=where.cache or str(out / "cache")
        )
        store = Store(out / backend)
        refuse_early(list(runs.values()), here)
        work(Queue(list(runs.values()), store, here), Stop(float("inf")))
        for (mixer, seed), run in runs.items():
            trained[mixer, backend, seed] = record = store.record(run.id)
            if record is None or record.outcome != "ok":
                raise Refusal(f"{mixer}, {backend}, seed {seed}: no record that is ok; see {out / backend}")
    rows = [compared(trained, mixer, options.backends, options.seeds) for mixer in options.mixers]
    (out / "backends.json").write_text(json.dumps(rows, indent=1) + "\n")
    draw({key: trained[key] for key in sorted(trained)}, out / "curves.png")
    for row in rows:
        for name, distance in row["backends"].items():
            print(f"{row['mixer']:16} {name:10} backends {distance:.4g}  seeds {row['seeds'][name]:.4g}")
    return int(not all(row["agree"] for row in rows))


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
