"""What the full-scale sweeps need: a plan of each from its pilots, and a line for each arm that took a step.

Command: python benchmarks/full_scale.py results/full_scale > results/full_scale/table.md
The folder's steps.jsonl and pilots.jsonl are what benchmarks/one_step.py left (--out and --results). Of an arm that was
tried twice the last line counts. Nothing else is read: a sweep's finished runs change nothing here. What both know of
the two files stands here: which sweeps, what a step's line must have, what a pilot says.
"""

import json
import os
import statistics
import sys
from pathlib import Path

from bench import Refusal
from bench.cli import guarded
from bench.compose import ROOT
from bench.config import Run, listed, one_of, resolved
from bench.plan.costs import Range
from bench.plan.evidence import Pilot
from bench.plan.verb import Plan, plan
from bench.store import Store
from bench.sweep import load

GROUPS = (("table2_paper", "table4", "table5", "table3", "table10"), ("table2_strict",), ("attribution",))
OUTCOMES = ("ok", "not finite", "oom", "error")
START = '{"arm": '  # of every step's line
# What is read of every step, and of one that is ok besides.
NAMES = ("arm", "run", "outcome", "device", "backend")
NUMBERS = ("loss", "parameters", "micro", "memory_gib", "examples_per_s", "tokens_per_s", "step_s")
# Examples that a run evaluates on: C4's, ImageNet's and GLUE's validation.
HELD_OUT = {"masked_lm": 364_608, "images": 50_000, "mnli": 19_647, "qnli": 5_463, "qqp": 40_430, "rte": 277}
HELD_OUT |= {"sst2": 872, "mrpc": 408, "cola": 1_043, "stsb": 1_500}
PLAN = ("sweep", "runs", "device hours", "least", "most", "longest chain, days")
ARM = ("arm", "backend", "loss", "parameters", "examples a pass", "memory GiB", "examples/s", "tokens/s", "step s")
HOUR, DAY = 3600.0, 86400.0


# The lines of steps -----------------------------------------------------------------------------------------------


def tries(path: Path) -> list[dict]:
    """All steps of a file; none if there is no file. A line whose writer was stopped is passed over, also once another
    writer has ended it. Raises Refusal for any other that is no step."""
    found = []
    content = path.read_bytes() if path.exists() else b""
    for number, line in enumerate(content.decode(errors="replace").split("\n"), 1):
        if START.startswith(line[: len(START)]) and not line.rstrip().endswith("}"):
            continue
        try:
            found.append(step_of(json.loads(line)))
        except (ValueError, Refusal) as error:
            raise Refusal(f"{path}:{number}: no step ({error}); delete the line or name another file") from None
    return found


def step_of(values) -> dict:
    """The values of a line. Raises Refusal if any that is read is not there, or is of another type."""
    kinds = dict.fromkeys(NAMES, str)
    if not isinstance(values, dict):
        raise Refusal(f"must be a mapping with the keys {listed(kinds)}")
    if values.get("outcome") == "ok":
        kinds |= dict.fromkeys(NUMBERS, int | float)
    if wrong := [key for key, kind in kinds.items() if not isinstance(values.get(key), kind)]:
        raise Refusal(f"missing or of a wrong type: {listed(wrong)}; needed: {listed(kinds)}")
    one_of("outcome", values["outcome"], OUTCOMES)
    return values


def latest(steps: list[dict]) -> dict[tuple[str, str], dict]:
    """The last step of each run and device."""
    return {(step["run"], step["device"]): step for step in steps}


def append(path: Path, step: dict) -> None:
    """Add a line; one that a stopped writer left is ended."""
    torn = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
    with path.open("a") as file:
        file.write("\n" * torn + json.dumps(step) + "\n")


def refuse_unwritable(word: str, path: Path, made: bool, allowed: str) -> None:
    """Refuse a file that cannot be appended to. `made`: folders above it that are not there will be."""
    there = next(above for above in (path, *path.parents) if above.exists())
    if there.is_dir() == (there == path):
        wrong = f"{there} is a {'folder' if there == path else 'file'}"
    elif not made and there not in (path, path.parent):
        wrong = f"there is no folder {path.parent}"
    else:
        wrong = "" if os.access(there, os.W_OK) else f"{there} cannot be written"
    if wrong:
        raise Refusal(f"{word}: {wrong}; name {allowed}")


# Pilots -----------------------------------------------------------------------------------------------------------


def pilot_of(run: Run, look: float, known: dict) -> Pilot:
    """`look`: seconds of an example that is evaluated; `known`: the values that like runs share."""
    task, ema = run.protocol.task, bool(run.protocol.optimiser.ema)
    held_out = HELD_OUT.get(task.args.get("subset", task.name), 0)
    return Pilot(
        protocol_id=run.protocol_id,
        label=run.label,
        mixer=resolved(run)["mixer"],
        evaluation=held_out * (1 + ema) * look,
        checkpoint_bytes=known["weights_bytes"] * (3 + ema),
        record_bytes=len(json.dumps(resolved(run))),
        **known,
    )


def quantiles(seconds: list[float]) -> tuple[float, float, float]:
    """The tenth, fiftieth and ninetieth percentile."""
    if len(seconds) == 1:
        return (seconds[0],) * 3
    tenths = statistics.quantiles(seconds, n=10, method="inclusive")
    return tenths[0], tenths[4], tenths[8]


# The page ---------------------------------------------------------------------------------------------------------


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
