"""Ranges of seconds and bytes for what is left, from records and pilots, never from a guess.

For a run, in this order: finished runs of its protocol and mixer on the device of the plan; a pilot of them; the other
mixers of its protocol; else None. Three records or more give least, median and most; fewer give what their step-time
quantiles would make of a whole run, the tenth and ninetieth percentile at every step. Of a run that had others beside
it on its device only its share counts, as in the report's Cost. Of several pilots (measured on another day, or another
machine of the model) the last gives the middle, all give the range.
"""

import heapq
import statistics
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from bench import Refusal
from bench.config import canonical
from bench.plan.evidence import WEIGHT_BYTES, Ledger, Pilot
from bench.plan.graph import LEFT, Node
from bench.report.sharing import shares, together

MANY = 3  # records that speak for themselves
CLOCK = 1.0  # seconds that a run may seem to share with those before and after it: records cut its end to the second
SOURCES = ("records", "pilot", "other mixers", "unknown")


class Range(NamedTuple):
    low: float
    mid: float
    high: float

    def times(self, factor: float) -> "Range":
        return Range(*(value * factor for value in self))


@dataclass(frozen=True)
class Estimate:
    """Of one whole run: seconds of each device, and bytes (low: lasting; high: with the checkpoint of one in hand)."""

    seconds: Range
    source: str  # one of SOURCES but the last
    lasting_bytes: float
    checkpoint_bytes: float
    shared: bool  # whether some of the seconds are shares of a device that other runs used too


Sort = tuple[str, str]  # protocol's id and kind ('', 'trial', ...): what costs the same


def _sort(one) -> Sort:
    """Of a run or a finished one."""
    return one.protocol_id, one.kind


def by_steps(cost, steps: int) -> Range:
    """Seconds of a whole run from a record's or a pilot's own parts."""
    around = cost.startup + cost.first_step + cost.evaluation
    return Range(*(around + (steps - 1) * each for each in (cost.step_p10, cost.step_p50, cost.step_p90)))


def _parts(ledger: Ledger) -> dict[str, float]:
    """By finished run that had others beside it, of whatever sweep: which part of its seconds is its own."""
    stays = {f.id: f.stay for f in ledger.finished.values()}
    return {i: had / stays[i].wall for i, had in shares(stays).items() if together(had + CLOCK, stays[i].wall)}


class Costs:
    """What runs cost on one device model (and number of devices)."""

    def __init__(self, ledger: Ledger, pilots: list[Pilot], nodes: list[Node], device: str):
        self.left = [n for n in nodes if n.state in LEFT and n.trains]
        self.steps = {_sort(n.run): n.run.steps for n in nodes}
        self.copies = {_sort(n.run): 3 + bool(n.run.protocol.optimiser.ema) for n in nodes}
        self.kept = {_sort(n.run): not n.run.is_trial for n in nodes}
        protocols = {protocol for protocol, _ in self.steps}
        self.pilots = [(p, canonical(p.mixer, "mixer")) for p in pilots if p.protocol_id in protocols]
        ok = [f for f in ledger.finished.values() if f.outcome == "ok" and f.cost.wall > 0]
        self.records = [f for f in ok if _sort(f) in self.steps]
        self.parts = _parts(ledger)
        self.device, self.world = self._chosen(device)
        self.known = self._by_pair()
        self.cache: dict[tuple[Sort, str], Estimate | None] = {}

    def _chosen(self, device: str) -> tuple[str, int]:
        """The asked device, or the one whose evidence covers most of what is left, of several the one that was measured
        last; ('', 1) if there is no evidence."""
        wanted = Counter((n.run.protocol_id, n.run.mixer.canonical) for n in self.left)
        found = {(f.device, f.world): Counter() for f in [*self.records, *(p for p, _ in self.pilots)]}
        latest = dict.fromkeys(found, 0.0)
        for f in self.records:
            found[f.device, f.world][f.protocol_id, f.mixer] += 1
            latest[f.device, f.world] = max(latest[f.device, f.world], f.stay.end)
        for pilot, text in self.pilots:
            found[pilot.device, pilot.world][pilot.protocol_id, text] += 1
            latest[pilot.device, pilot.world] = max(latest[pilot.device, pilot.world], pilot.measured)
        self.devices = tuple(sorted({name for name, _ in found}))
        if device:
            matching = [pair for pair in found if pair[0] == device]
            if not matching:
                known = ", ".join(self.devices) or "none"
                raise Refusal(f"no record or pilot of this sweep on '{device}'; there are some on: {known}")
            return matching[0]

        def cover(pair: tuple[str, int]) -> tuple:
            return sum(wanted[key] for key in found[pair]), latest[pair], pair

        return max(found, key=cover) if found else ("", 1)

    def _by_pair(self) -> dict[Sort, dict[str, Estimate]]:
        """Sort -> mixer -> what whole runs cost."""
        records: dict[tuple[Sort, str], list] = {}
        for f in self.records:
            if (f.device, f.world) == (self.device, self.world):
                records.setdefault((_sort(f), f.mixer), []).append(f)
        pilots: dict[tuple[Sort, str], list[Pilot]] = {}
        for pilot, text in self.pilots:
            if (pilot.device, pilot.world) == (self.device, self.world):
                for sort in [s for s in self.steps if s[0] == pilot.protocol_id]:
                    pilots.setdefault((sort, text), []).append(pilot)
        known: dict[Sort, dict[str, Estimate]] = {}
        for (sort, mixer), measured in pilots.items():
            known.setdefault(sort, {})[mixer] = self._from_pilots(sort, measured)
        for (sort, mixer), found in records.items():
            known.setdefault(sort, {})[mixer] = self._from_records(sort, found)
        return known

    def _from_pilots(self, sort: Sort, measured: list[Pilot]) -> Estimate:
        """The last one's middle; a range that holds those of all."""
        each, last = [by_steps(pilot, self.steps[sort]) for pilot in measured], measured[-1]
        seconds = Range(min(r.low for r in each), each[-1].mid, max(r.high for r in each))
        lasting = self.kept[sort] * last.weights_bytes + last.record_bytes
        return Estimate(seconds, "pilot", lasting, last.checkpoint_bytes, False)

    def _from_records(self, sort: Sort, found: list) -> Estimate:
        parts = [self.parts.get(f.id, 1.0) for f in found]
        walls = [part * f.cost.wall for part, f in zip(parts, found, strict=True)]
        spread = list(walls)
        if len(found) < MANY:
            for part, f in zip(parts, found, strict=True):
                spread += by_steps(f.cost, self.steps[sort]).times(part)
        weights = WEIGHT_BYTES * max(f.parameters for f in found)
        lasting = self.kept[sort] * weights + max(f.bytes for f in found)
        seconds = Range(min(spread), statistics.median(walls), max(spread))
        return Estimate(seconds, "records", lasting, self.copies[sort] * weights, min(parts) < 1)

    def of(self, node: Node) -> Estimate | None:
        """Of the whole run, nothing subtracted for what is done."""
        key = _sort(node.run), node.run.mixer.canonical
        if key not in self.cache:
            self.cache[key] = self._of(*key)
        return self.cache[key]

    def _of(self, sort: Sort, mixer: str) -> Estimate | None:
        others = self.known.get(sort, {})
        if mixer in others or not others:
            return others.get(mixer)
        every = [e.seconds for e in others.values()]
        mid = statistics.median(r.mid for r in every)
        seconds = Range(min(r.low for r in every), mid, max(r.high for r in every))
        lasting = max(e.lasting_bytes for e in others.values())
        checkpoint, shared = max(e.checkpoint_bytes for e in others.values()), any(e.shared for e in others.values())
        return Estimate(seconds, "other mixers", lasting, checkpoint, shared)

    def left_of(self, node: Node) -> Range | None:
        """Seconds that are left of a run: nothing for one that is done, failed, or will not train."""
        if node.state not in LEFT or not node.trains:
            return Range(0.0, 0.0, 0.0)
        estimate = self.of(node)
        return estimate.seconds.times(node.share) if estimate else None


@dataclass(frozen=True)
class Totals:
    """Of all that is left; None where something is unknown. Device seconds, wall seconds, bytes."""

    device_seconds: Range | None
    known_device_seconds: Range  # of the runs whose cost is known
    wall_seconds: Range | None
    chain_seconds: Range | None  # of the longest chain: no number of devices beats it
    disk_bytes: tuple[float, float] | None  # what stays; and with the checkpoints of those in hand
    unknown: tuple[str, ...]  # 'protocol / mixer' without a cost
    shared: int  # runs whose seconds are shares of a device that other runs used too


def totals(nodes: list[Node], costs: Costs, parallel: int) -> Totals:
    left = {n.run.id: costs.left_of(n) for n in nodes}
    known = [r.times(costs.world) for r in left.values() if r is not None]
    sums = Range(*(sum(values) for values in zip(*known, strict=True))) if known else Range(0.0, 0.0, 0.0)
    lost = [n for n in nodes if left[n.run.id] is None]
    unknown = tuple(dict.fromkeys(f"{n.run.label} / {n.run.mixer.name}" for n in lost))
    shared = sum(e.shared for e in map(costs.of, costs.left) if e)
    if lost:
        return Totals(None, sums, None, None, None, unknown, shared)
    wall = Range(*(makespan(nodes, {i: r[q] for i, r in left.items()}, parallel) for q in range(3)))
    chain = Range(*(longest(nodes, {i: r[q] for i, r in left.items()}) for q in range(3)))
    working = [costs.of(n) for n in costs.left]
    lasting = sum(e.lasting_bytes for e in working)
    flying = sum(sorted((e.checkpoint_bytes for e in working), reverse=True)[:parallel])
    return Totals(sums, sums, wall, chain, (lasting, lasting + flying), (), shared)


def longest(nodes: list[Node], seconds: dict[str, float]) -> float:
    """Seconds of the longest chain of a run and what it starts from; the nodes hold parents before children."""
    end: dict[str, float] = {}
    for node in nodes:
        above = max([end[run.id] for run in node.run.needs], default=0.0)
        end[node.run.id] = above + seconds[node.run.id]
    return max(end.values(), default=0.0)


def makespan(nodes: list[Node], seconds: dict[str, float], parallel: int) -> float:
    """Seconds until all runs have ended: the next in the sweep's order whose needs are done, as workers take them."""
    children: dict[str, list[int]] = {}
    waits = [len({run.id for run in node.run.needs}) for node in nodes]
    ready = [number for number, count in enumerate(waits) if not count]
    for number, node in enumerate(nodes):
        for run_id in {run.id for run in node.run.needs}:
            children.setdefault(run_id, []).append(number)
    heapq.heapify(ready)
    running: list[tuple[float, int]] = []
    now = 0.0
    while ready or running:
        while ready and len(running) < parallel:
            number = heapq.heappop(ready)
            heapq.heappush(running, (now + seconds[nodes[number].run.id], number))
        now, number = heapq.heappop(running)
        for child in children.get(nodes[number].run.id, ()):
            waits[child] -= 1
            if not waits[child]:
                heapq.heappush(ready, child)
    return now
