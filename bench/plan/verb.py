"""`mixerbench plan`: gathers what the other files of this room find out, for people or as JSON."""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from bench import Refusal
from bench.config import Run, Where, canonical
from bench.plan.costs import SOURCES, Costs, Range, Totals, totals
from bench.plan.effects import Effect, effects
from bench.plan.evidence import Ledger, known_pilots, read_pilots
from bench.plan.graph import LEFT, STATES, Node, nodes
from bench.plan.screen import show
from bench.plan.why import Reason, reasons
from bench.record import uncollected
from bench.store import Store
from bench.sweep import Cell, Sweep, cells, load, ordered
from bench.where import results


@dataclass(frozen=True)
class Row:
    """One protocol of the graph."""

    protocol: str  # label
    depth: int  # of the chain that leads to it
    runs: int
    states: dict[str, int]
    device_seconds: Range | None  # of what is left; None if a run's cost is unknown
    sources: dict[str, int]  # runs that are left by what their cost comes from


@dataclass(frozen=True)
class Plan:
    sweep: str
    runs: int
    states: dict[str, int]
    rows: list[Row]
    failed: list[str]  # a line for each run that is given up
    new: list[Reason]
    other_code: list[str]  # a line for each commit whose records a report would refuse beside what is to do
    device: str  # whose costs these are; '' if nothing is known
    devices: tuple[str, ...]  # all of which something is known
    parallel: int
    totals: Totals
    alpha: float  # that the sweep declares
    effects: list[Effect]


def plan_verb(path: Path, where: Where, parallel: int, device: str, pilot: bool, as_json: bool) -> int:
    if parallel < 1:
        raise Refusal(f"--parallel must be at least 1, got {parallel}")
    sweep, store = load(path), Store(results(where))
    if pilot:
        from bench.plan.pilot import measure
        from bench.worker import Stop

        stop = Stop(float("inf"))
        measure(ordered(_runs(cells(sweep))), where, store, stop)
        if stop.signalled:
            raise KeyboardInterrupt
    made = plan(sweep, store, where.retries, parallel, device)
    if as_json:
        json.dump(asdict(made), sys.stdout, indent=1)
        print()
    else:
        show(made, path, store.absent())
    return 0


def pilots_missing(path: Path, where: Where, device: str) -> list[Run]:
    """One run of each protocol and mixer that was not measured here, on any device or on `device`."""
    known = read_pilots(results(where) / "pilots.jsonl")
    there = {(p.protocol_id, canonical(p.mixer, "mixer")) for p in known if device in ("", p.device)}
    each = {(r.protocol_id, r.mixer.canonical): r for r in ordered(_runs(cells(load(path))))}
    return [run for kind, run in each.items() if kind not in there]


@uncollected()
def plan(sweep: Sweep, store: Store, retries: int, parallel: int, device: str) -> Plan:
    """Nothing is started or written. Raises Refusal for a damaged record or pilot, or an unknown device."""
    places, ledger = cells(sweep), Ledger(store)
    graph = nodes(ordered(_runs(places)), store, ledger, retries)
    costs = Costs(ledger, known_pilots(store.root), graph, device)
    return Plan(
        sweep=sweep.name,
        runs=len(graph),
        states=_states(graph),
        rows=_rows(graph, costs),
        failed=[f"{n.run.id} {n.run.label} {n.run.mixer.name}: {n.reason}" for n in graph if n.state == "failed"],
        new=reasons(graph, ledger),
        other_code=_other_code(graph, ledger),
        device=costs.device,
        devices=costs.devices,
        parallel=parallel,
        totals=totals(graph, costs, parallel),
        alpha=sweep.family.alpha,
        effects=effects(sweep, places, ledger),
    )


def _runs(places: list[Cell]) -> list:
    """The runs of the cells, each once."""
    return list({cell.run.id: cell.run for cell in places}.values())


def _other_code(graph: list[Node], ledger: Ledger) -> list[str]:
    """What `sweep` warns of. The code is looked at only where a seed of a protocol has finished runs and others."""
    done = {n.run.id: ledger.finished[n.run.id] for n in graph if n.run.id in ledger.finished}
    begun = {(f.protocol_id, f.seed) for f in done.values()}
    todo = [n.run for n in graph if n.run.id not in done and (n.run.protocol_id, n.run.seed) in begun]
    if not todo:
        return []
    from bench.provenance import other_code

    return other_code(todo, done.values())


def _states(graph: list[Node]) -> dict[str, int]:
    return {state: sum(n.state == state for n in graph) for state in STATES}


def _rows(graph: list[Node], costs: Costs) -> list[Row]:
    """By protocol, each below the one that it starts from."""
    above: dict[str, str] = {}
    members: dict[str, list[Node]] = {}
    # By id: a parent names no departure that leaves it as it is, so its label may not be that of the same run here.
    names = {node.run.id: node.run.label + " trials" * node.run.is_trial for node in graph}
    for node in graph:
        name = names[node.run.id]
        members.setdefault(name, []).append(node)
        above.setdefault(name, names[node.run.parent.id] if node.run.parent else "")
    found: list[Row] = []

    def visit(name: str, depth: int) -> None:
        found.append(_row(name, depth, members[name], costs))
        for child in [c for c in members if above[c] == name]:
            visit(child, depth + 1)

    for root in [name for name in members if not above[name]]:
        visit(root, 0)
    return found


def _row(name: str, depth: int, members: list[Node], costs: Costs) -> Row:
    seconds = [costs.left_of(n) for n in members]
    sums = None
    if None not in seconds:
        sums = Range(*(costs.world * sum(values) for values in zip(*seconds, strict=True)))
    working = [costs.of(n) for n in members if n.state in LEFT and n.trains]
    sources = [e.source if e else "unknown" for e in working]
    return Row(
        protocol=name,
        depth=depth,
        runs=len(members),
        states=_states(members),
        device_seconds=sums,
        sources={s: sources.count(s) for s in SOURCES if s in sources},
    )
