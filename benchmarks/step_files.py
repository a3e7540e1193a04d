"""What one_step.py writes and full_scale.py reads: lines of steps, pilots, and of which sweeps."""

import json
import os
import statistics
from pathlib import Path

from bench import Refusal
from bench.config import Run, listed, one_of, resolved
from bench.plan.evidence import Pilot

GROUPS = (("table2_paper", "table4", "table5", "table3", "table10"), ("table2_strict",), ("attribution",))
OUTCOMES = ("ok", "not finite", "oom", "error")
START = '{"arm": '  # of every step's line
# What is read of every step, and of one that is ok besides.
NAMES = ("arm", "run", "outcome", "device", "backend")
NUMBERS = ("loss", "parameters", "micro", "memory_gib", "examples_per_s", "tokens_per_s", "step_s")
# Examples that a run evaluates on: C4's, ImageNet's and GLUE's validation.
HELD_OUT = {"masked_lm": 364_608, "images": 50_000, "mnli": 19_647, "qnli": 5_463, "qqp": 40_430, "rte": 277}
HELD_OUT |= {"sst2": 872, "mrpc": 408, "cola": 1_043, "stsb": 1_500}


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
