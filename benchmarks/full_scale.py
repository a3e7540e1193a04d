"""What the full-scale sweeps need: a plan of each from its pilots, and a line for each arm that took a step.

Command: python benchmarks/full_scale.py results/full_scale > results/full_scale/table.md
The folder's steps.jsonl and pilots.jsonl are what benchmarks/one_step.py left (--out and --results). Of an arm that was
tried twice the last line counts. Nothing else is read: a sweep's finished runs change nothing here.
"""

import sys
from pathlib import Path

from bench.cli import guarded
from bench.compose import ROOT
from bench.plan.costs import Range
from bench.plan.verb import Plan, plan
from bench.store import Store
from bench.sweep import load
from benchmarks.step_files import GROUPS, latest, tries

PLAN = ("sweep", "runs", "device hours", "least", "most", "longest chain, days")
ARM = ("arm", "backend", "loss", "parameters", "examples a pass", "memory GiB", "examples/s", "tokens/s", "step s")
HOUR, DAY = 3600.0, 86400.0


def lines(header: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    """A Markdown table: the first column to the left, numbers to the right."""
    ruled = [list(header), [":-", *("-:" for _ in header[1:])], *rows]
    return [f"| {' | '.join(row)} |" for row in ruled]


def priced(made: Plan) -> list[str]:
    """A sweep's row; 'unknown' where a protocol and mixer has no pilot."""
    left = made.totals
    if left.device_seconds is None:
        return [f"`{made.sweep}`", f"{made.runs:,}", "unknown", "", "", ""]
    cost: Range = left.device_seconds.times(1 / HOUR)
    days = left.chain_seconds.mid / DAY
    return [f"`{made.sweep}`", f"{made.runs:,}", *(f"{x:,.0f}" for x in (cost.mid, cost.low, cost.high)), f"{days:.1f}"]


def arm(step: dict) -> list[str]:
    name = step["arm"].partition(" ")[2]
    if step["outcome"] != "ok":
        return [name, step["backend"], step["outcome"], *[""] * (len(ARM) - 3)]
    rates = [f"{step[key]:,.0f}" for key in ("examples_per_s", "tokens_per_s")]
    loss, memory, seconds = (f"{step[key]:.3g}" for key in ("loss", "memory_gib", "step_s"))
    return [name, step["backend"], loss, f"{step['parameters']:,}", str(step["micro"]), memory, *rates, seconds]


def table(folder: Path) -> list[str]:
    """Lines of the page. Raises OSError without the two files, Refusal for a damaged step or pilot."""
    for name in ("steps.jsonl", "pilots.jsonl"):
        (folder / name).stat()
    steps = latest(tries(folder / "steps.jsonl"))
    sweeps = [load(ROOT / "sweeps" / f"{name}.yaml") for group in GROUPS for name in group]
    rows = [priced(plan(sweep, Store(folder), retries=0, parallel=1, device="")) for sweep in sweeps]
    devices = sorted({x["device"] for x in steps.values()})
    found = [f"# {len(steps)} arms at full size on {', '.join(devices)}\n", *lines(PLAN, rows)]
    for name in [sweep.name for sweep in sweeps]:
        own = [arm(x) for x in steps.values() if x["arm"].startswith(f"{name} ")]
        found += [f"\n## {name}\n", *lines(ARM, own)] if own else []
    return found


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python benchmarks/full_scale.py FOLDER", file=sys.stderr)
        return 2
    print("\n".join(table(Path(arguments[0]))))
    return 0


if __name__ == "__main__":
    raise SystemExit(guarded(main, sys.argv[1:]))
