"""The verb: what is measured, in which order, and the files that say it; progress on stderr, a line a cell.

speed.json is rewritten whole after each cell that is prepared and each round, so that a call that is cut short leaves
all it knows; `mixerbench speed PATH/speed.json` makes table and figure of it again, anywhere.
"""

import dataclasses
import importlib.metadata
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from bench import Refusal, provenance, registry
from bench.compiling import allow_many
from bench.config import Where
from bench.report import speed as report
from bench.speed import figures
from bench.speed.rounds import CEILINGS, Ceiling, LayerCell, Timed, attempt, measure
from bench.speed.settings import Asked, Entry, Settings, read
from bench.speed.training import Fit
from bench.store import utc
from bench.where import results
from bench.whole import replace_whole

SCHEMA = 1
NAME = "speed.json"


def speed(asked: Asked) -> int:
    """Measure, write and print; 1 if a cell failed for another reason than memory or fitness."""
    settings, entries, where = read(asked)
    out = asked.out or results(where) / "speed" / settings.device
    if (out / NAME).exists():
        raise Refusal(f"{out / NAME} is there already; delete it or name another --out")
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(settings.threads)
    if settings.compiled:
        allow_many()
    start = {
        "schema": SCHEMA,
        "started": utc(),
        "settings": dataclasses.asdict(settings),
        "environment": environment(settings),
    }

    def save(found: dict) -> None:
        text = json.dumps(start | {"finished": utc()} | found, indent=1)
        replace_whole(out / NAME, lambda path: path.write_text(text + "\n"))

    found = (trainings if asked.training else layers)(entries, settings, where, asked.until, save)
    show(out, asked.as_json)
    failed = [row for row in found["rows"] if row["outcome"] == "error"]
    for row in failed:
        print(f"{row['arm']} {row.get('way', '')}: {row['reason']}", file=sys.stderr)
    return int(bool(failed))


def environment(settings: Settings) -> dict:
    """Device and versions: what else a figure depends on."""
    packages = ("lightning", "triton", "mamba-ssm")
    there = {name: version for name in packages if (version := version_of(name))}
    found = {
        "device": provenance.model_of(settings.device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "packages": there,
        "commit": provenance.commit(),
    }
    if settings.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "cuda": torch.version.cuda,
            "memory": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
        }
    return found


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


# Layers -------------------------------------------------------------------------------------------------------------


def layers(entries: list[Entry], settings: Settings, where: Where, until: float, save: Callable) -> dict:
    """All cells of one length take turns, lengths one after another, shortest first; the ceilings in each of them."""
    cells: list[LayerCell] = []
    probes: list[Ceiling] = []
    total = len(entries) * len(settings.ways) * len(settings.lengths)

    def note(cell: Timed | None, number: int) -> None:
        if isinstance(cell, LayerCell):
            done = sum(one.result.outcome != "" for one in cells)
            say(f"[{done}/{total}] {cell.label}: {told(cell)}")
        elif cell is None:
            say(f"L={cells[-1].length}: round {number} of {settings.rounds}")
        save(found())

    def found() -> dict:
        best = ceilings_of(probes)
        rows = figures.finished([row_of(cell) for cell in cells if cell.result.outcome], best)
        return {"kind": "layers", "ceilings": best, "rows": rows, "growth": figures.growth(rows)}

    if settings.device == "cpu":  # the first step of a process loads libraries, which are nobody's memory
        first = next(one for one in entries if one.run)
        cold = LayerCell(first, "fast", settings.lengths[0], settings, chosen(first, where, settings), None)
        attempt(cold, cold.prepare)
        cold.drop()
    for length in settings.lengths:
        if settings.compiled:
            torch._dynamo.reset()  # what was compiled for other lengths only has to be skipped
        shorter = {(id(cell.entry), cell.way): cell for cell in cells}
        new = [
            LayerCell(one, way, length, settings, chosen(one, where, settings), shorter.get((id(one), way)))
            for one in entries
            for way in settings.ways
        ]
        limits = [Ceiling(name, settings) for name in CEILINGS]
        cells, probes = cells + new, probes + limits
        measure([*limits, *new], settings, until, note)
    return found()


def chosen(entry: Entry, where: Where, settings: Settings) -> str:
    """The backend that the arm's mixer runs on."""
    if entry.run is None:
        return ""
    return registry.backend(registry.mixer_class(entry.run.mixer.name), where.backend, settings.device)


def ceilings_of(probes: list[Ceiling]) -> dict:
    found = {}
    for name in CEILINGS:
        own = [probe for probe in probes if probe.name == name and probe.result.outcome == "ok"]
        turns = [turn for probe in own for turn in probe.result.turns or [[probe.result.estimate]]]
        if own:
            found[name] = figures.ceiling(own[0].result.work, turns)
    return found


def row_of(cell: LayerCell) -> dict:
    """A cell as plain values, complete but for what follows from others."""
    counts = dataclasses.asdict(cell.counts) if cell.counts else {}
    result = {key: value for key, value in dataclasses.asdict(cell.result).items() if key != "work"}
    about = {"arm": cell.entry.label, "mixer": cell.entry.name, "args": cell.entry.args}
    return about | {"way": cell.way, "length": cell.length, "batch": cell.batch} | result | counts


def told(cell: LayerCell) -> str:
    result = cell.result
    if result.outcome != "ok":
        return f"{result.outcome}: {result.reason}"
    memory = f"{result.peak_memory / 2**20:,.0f} MiB"
    return f"{1e3 * result.estimate:.3g} ms, {memory}, first step {result.first:.3g} s"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# Trainings ----------------------------------------------------------------------------------------------------------


def trainings(entries: list[Entry], settings: Settings, where: Where, until: float, save: Callable) -> dict:
    """Fits of all arms by turns."""
    cells = [Fit(one, where, settings) for one in entries]
    limits = [Ceiling(name, settings) for name in CEILINGS]

    def note(cell: Timed | None, number: int) -> None:
        if cell is None:
            say(f"round {number} of {settings.rounds}")
        elif isinstance(cell, Fit) and cell.result.outcome != "ok":
            say(f"{cell.label}: {cell.result.outcome}: {cell.result.reason}")
        save(found())

    def found() -> dict:
        best = ceilings_of(limits)
        rows = [fit_row(cell, best) for cell in cells if cell.result.outcome]
        return {"kind": "trainings", "ceilings": best, "rows": rows}

    measure([*limits, *cells], settings, until, note)
    return found()


def fit_row(cell: Fit, best: dict) -> dict:
    """A training as plain values: seconds a step, and what that makes of examples and tokens."""
    row = {"mixer": cell.entry.name, "args": cell.entry.args} | dataclasses.asdict(cell.result)
    seconds = figures.flat(cell.result.turns)
    if cell.result.outcome != "ok" or not seconds:
        return row | {"seconds": {}, "examples": {}, "tokens": {}, "share": None}
    batch = cell.run.protocol.budget.batch
    least = figures.roofline(cell.result.flops, 0, best)
    return row | {
        "seconds": figures.spread(seconds),
        "examples": figures.spread([batch / s for s in seconds]),
        "tokens": figures.spread([batch * cell.length / s for s in seconds]),
        "share": least / figures.spread(seconds)["median"] if least else None,
    }


# Files --------------------------------------------------------------------------------------------------------------


def show(out: Path, as_json: bool) -> None:
    """Table and figure beside the JSON, and the table or the JSON on stdout."""
    from rich.console import Console

    text = (out / NAME).read_text()
    console = Console() if sys.stdout.isatty() and not as_json else None
    paths = report.write(report.load(out / NAME), out, console)
    if as_json:
        print(text, end="")
    elif console is None:
        print((out / "speed.md").read_text())
    for path in [out / NAME, *paths]:
        print(path, file=sys.stderr if as_json else sys.stdout)
