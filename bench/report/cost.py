"""What a table cost: device time of its runs by arm, from the records alone.

A moment that runs shared is split between them (sharing.py), those of other tables too, as far as their records are in
the same results folder.
"""

from contextlib import suppress
from datetime import datetime

import numpy as np

from bench import Refusal
from bench.record import Record
from bench.report import stats
from bench.report.frame import Row, Table
from bench.report.sections import Section
from bench.report.sharing import Stay, shares, together
from bench.store import Store

TITLE = "Cost"
PARTS = ("start-up", "compilation", "evaluation")  # what of a run is not training
EACH = "Step and memory"  # begins the note on these columns
NONE = np.zeros(1 + len(PARTS))


def beside(store: Store) -> tuple[Record, ...]:
    """Every record of a results folder, but for those that cannot be read: a table is not refused for another's."""
    found = dict(store.committed())
    for path in sorted(store.root.glob("runs/*/record.json")):
        with suppress(Refusal):
            found[path.parent.name] = store.record(path.parent.name)
    return tuple(found.values())


def section(table: Table) -> Section:
    """Arms as rows, minutes of a device: all, training, and what is apart; then the step and the memory of one run."""
    rows = [r for r in {r.run_id: r for r in table.rows}.values() if r.trained]
    minutes = dict(zip([r.run_id for r in rows], parted(table, rows), strict=True))
    head = ["arm", "runs", "minutes", "training", *PARTS, "step (ms)", "peak memory (GB)"]
    lines = []
    for arm in table.arms:
        own = [r for r in rows if r.arm == arm.key]
        lines.append([arm.label, *line(own, minutes), *alone([r for r in own if r.protocol == table.protocols()[0]])])
    lines.append(["all", *line(rows, minutes), "-", "-"])
    return Section(TITLE, head, lines, 1, notes(table, rows, minutes))


def stay(record: Record) -> Stay:
    room, end = record.environment, datetime.fromisoformat(record.finished).timestamp()
    return Stay(room.node, room.device, record.card, end, record.cost.wall)


def parted(table: Table, rows: list[Row]) -> list[np.ndarray]:
    """Minutes of each run: training, then PARTS. All devices of a run on several count."""
    records = {r.id: r for r in table.beside} | {row.record.id: row.record for row in rows}
    had = shares({run_id: stay(record) for run_id, record in records.items()})
    found = []
    for row in rows:
        cost = row.record.cost
        apart = np.array([cost.startup, cost.first_step, cost.evaluation])
        rest = max(cost.wall - apart.sum(), 0.0)
        parts = np.array([rest, *apart])
        found.append(parts / max(parts.sum(), 1e-9) * had[row.record.id] * row.record.environment.world / 60)
    return found


def side_by_side(table: Table, rows: list[Row]) -> bool:
    """Whether some of these runs shared a device, so that their steps took longer than alone."""
    clocks = sum(r.record.cost.wall * r.record.environment.world for r in rows) / 60
    return together(sum(parts.sum() for parts in parted(table, rows)), clocks)


def line(rows: list[Row], minutes: dict[str, np.ndarray]) -> list[str]:
    parts = sum((minutes[r.run_id] for r in rows), NONE)
    return [str(len(rows)), *(f"{value:.1f}" for value in (parts.sum(), *parts))]


def alone(rows: list[Row]) -> list[str]:
    """Median step and the most memory of an arm's runs that came out ok, as they ran."""
    whole = [r.record.cost for r in rows if r.record.outcome == "ok"]
    if not whole:
        return ["-", "-"]
    step, memory = np.median([c.step_p50 for c in whole]), max(c.peak_memory for c in whole)
    return [f"{1000 * step:.1f}", f"{memory / 1e9:.2f}"]


def notes(table: Table, rows: list[Row], minutes: dict[str, np.ndarray]) -> list[str]:
    devices = dict.fromkeys(r.record.environment.device for r in rows)
    walls = sum(r.record.cost.wall * r.record.environment.world for r in rows) / 60
    beside = ", as it ran beside others" * side_by_side(table, rows)
    found = [
        f"Minutes of one device ({', '.join(devices)}). Where runs shared it, those of other tables of this results "
        f"folder too, each moment is split evenly between them; the clocks of this table's runs add up to {walls:.1f}.",
        "Training: all that is neither start-up (data, model), compilation (the first step with it) nor evaluation.",
        f"{EACH}: median and most of a run on {table.protocols()[0]}{beside}.",
    ]
    if len(table.protocols()) > 1:
        sums = {p: sum((minutes[r.run_id].sum() for r in rows if r.protocol == p), 0.0) for p in table.protocols()}
        found.append(f"By protocol: {', '.join(f'{p} {value:.1f}' for p, value in sums.items())}.")
    if any(r.record.chosen for r in rows):
        found.append("Trials of the tuning are not counted here.")
    lost = sum(r.record.outcome != "ok" for r in table.rows)
    return [*found, f"{stats.failed_text(lost, len(table.rows))}; they count as far as they ran."] if lost else found
