r"""One training on one device, once more, and spread over several: the same losses, and how much faster?

Command: python benchmarks/devices.py --devices 2 --mixers low_rank --protocol table2_mini --out results/two_gpus \
    mixer.sam=true protocol.backbone.layers=12 protocol.backbone.width=768 protocol.budget.batch=1024 \
    protocol.budget.steps=32 where.device=cuda where.loaders=4
The one device takes the batch in as many micro-batches as there are devices, so each forward pass has as many rows in
all three. The two that have one device each run at once, on different GPUs. Writes devices.json into --out: for each
mixer the losses of each step, the median step's seconds with the tenth and the ninetieth, and the greatest difference
of the losses between the first and its repetition, which is what a run differs by from itself, beside that between the
first and the several. Exit status: 1 if those that should agree to rounding, the first steps', are over --tolerance.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from bench import Refusal
from bench.cli import guarded
from bench.compose import ROOT, make_run, parse_overrides
from bench.record import Record
from bench.store import Store
from bench.train import CURVE_POINTS

FIRST = 3  # steps before rounding has grown


def train(words: list[str], mixer: str, devices: int, parts: int, gpus: str, folder: Path) -> subprocess.Popen:
    """`mixerbench run` in a process of its own, which sees the GPUs of `gpus` only; `parts` micro-batches a device."""
    own = [f"where.devices={devices}", f"where.micro_batches={parts}", f"where.results={folder}"]
    command = [sys.executable, "-m", "bench.cli", "run", f"mixer={mixer}", *words, *own]
    return subprocess.Popen(command, env=os.environ | {"CUDA_VISIBLE_DEVICES": gpus}, stdout=subprocess.DEVNULL)


def apart(one: Record, other: Record, steps: int) -> float:
    return max(abs(a - b) for (_, a), (_, b) in zip(one.curve[:steps], other.curve[:steps], strict=True))


def row(mixer: str, records: dict[str, Record], batch: int) -> dict:
    one, again, several = records["one"], records["again"], records["several"]
    timed = {
        name: {
            "world": r.environment.world,
            "device": r.environment.device,
            "step_s": [r.cost.step_p10, r.cost.step_p50, r.cost.step_p90],
            "examples_per_s": batch / r.cost.step_p50,
            "loss": [loss for _, loss in r.curve],
        }
        for name, r in records.items()
    }
    steps = len(one.curve)
    return {
        "mixer": mixer,
        "runs": timed,
        "itself": {"first": apart(one, again, FIRST), "all": apart(one, again, steps)},
        "devices": {"first": apart(one, several, FIRST), "all": apart(one, several, steps)},
        "speedup": one.cost.step_p50 / several.cost.step_p50,
    }


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, required=True)
    parser.add_argument("--mixers", nargs="+", required=True)
    parser.add_argument("--protocol", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tolerance", type=float, default=1e-3, help="of a loss, over the first steps")
    held = [word for word in words if word.startswith(("protocol.", "mixer.", "where."))]
    options = parser.parse_args([word for word in words if word not in held])
    changes = parse_overrides([word for word in held if not word.startswith("where.")])
    out, rows = (ROOT / options.out).resolve(), []
    for mixer in options.mixers:
        run = make_run(options.protocol, mixer, changes, 0, 0)
        if run.protocol.budget.steps > CURVE_POINTS:
            steps = f"protocol.budget.steps={run.protocol.budget.steps}"
            raise Refusal(f"{steps}: a record keeps {CURVE_POINTS} losses at most")
        every, given = ",".join(map(str, range(options.devices))), [f"protocol={options.protocol}", *held]
        alone = [train(given, mixer, 1, options.devices, str(n), out / name) for n, name in enumerate(("one", "again"))]
        codes = [process.wait() for process in alone]
        codes.append(train(given, mixer, options.devices, 1, every, out / "several").wait())
        records = {name: Store(out / name).record(run.id) for name in ("one", "again", "several")}
        lacking = [name for name, record in records.items() if record is None or record.outcome != "ok"]
        if lacking:
            raise Refusal(f"{mixer}: no record that is ok of {', '.join(lacking)} (exit codes {codes}); see {out}")
        rows.append(row(mixer, records, run.protocol.budget.batch))
        (out / "devices.json").write_text(json.dumps(rows, indent=1) + "\n")
        said = {k: rows[-1][k] for k in ("itself", "devices", "speedup")}
        print(mixer, json.dumps(said))
    return int(any(r["devices"]["first"] > options.tolerance for r in rows))


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
