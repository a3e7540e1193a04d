"""The smallest effect that a sweep's seeds can show, column by column.

In SDs of paired differences, what the t-test of the report finds with probability POWER at the declared alpha: at the
family's last Holm step (low) and at its first, the worst case (high), with each arm against one of them as the family,
A/A arms and controls left out; a family that is declared smaller (SAM against not SAM alone) can show a little more.
From three finished seeds on in the column's own units too, by the residual SD of the block model value = arm + seed +
noise.
"""

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache

from bench.config import resolved_mixer
from bench.matching import matched
from bench.plan.evidence import Ledger
from bench.report.frame import written_out
from bench.sweep import Cell, Sweep

POWER = 0.8
ENOUGH = 3  # seeds whose spread is worth naming


@dataclass(frozen=True)
class Effect:
    """None where it cannot be said: sds without two seeds or arms, units without ENOUGH finished seeds."""

    column: str
    seeds: int
    comparisons: int
    sds: tuple[float, float] | None
    units: tuple[float, float] | None
    sd: float | None  # of paired differences, in the column's units
    sd_seeds: int  # that it comes from
    tests_from: int  # seeds below which the report gives intervals only


def effects(sweep: Sweep, cells: list[Cell], ledger: Ledger) -> list[Effect]:
    by_label: dict[str, list[Cell]] = {}
    for cell in cells:
        if any(matched(control, resolved_mixer(cell.run)) for control in sweep.controls):
            continue
        by_label.setdefault(cell.protocol, []).append(cell)
    columns = written_out(sweep, list(by_label))
    return [
        _effect(f"{c.protocol} {c.metric}", c.metric, by_label[c.protocol], ledger, sweep.family.alpha) for c in columns
    ]


def _effect(title: str, metric: str, cells: list[Cell], ledger: Ledger, alpha: float) -> Effect:
    arms: dict[tuple, dict[int, list[float]]] = {}
    seeds = {c.seed for c in cells}
    for cell in [c for c in cells if not c.run.mixer.args.get("salt", 0)]:
        arm = arms.setdefault((cell.run.protocol_id, cell.run.mixer.canonical), {})
        finished = ledger.finished.get(cell.run.id)
        value = finished.metrics.get(metric, math.nan) if finished else math.nan
        arm.setdefault(cell.seed, []).append(value)
    comparisons = len(arms) - 1
    sds = _sds(len(seeds), comparisons, alpha) if comparisons else None
    table = {arm: {s: sum(v) / len(v) for s, v in values.items()} for arm, values in arms.items()}
    whole = sorted(s for s in seeds if all(math.isfinite(values.get(s, math.nan)) for values in table.values()))
    sd = (
        _sd([[values[s] for s in whole] for values in table.values()]) if comparisons and len(whole) >= ENOUGH else None
    )
    units = (sds[0] * sd, sds[1] * sd) if sds and sd is not None else None
    tests_from = _tests_from(comparisons, alpha) if comparisons else 0
    return Effect(title, len(seeds), comparisons, sds, units, sd, len(whole) if sd is not None else 0, tests_from)


@lru_cache
def _sds(seeds: int, comparisons: int, alpha: float) -> tuple[float, float] | None:
    from bench.report.stats_tests import detectable

    if seeds < 2:
        return None
    return detectable(seeds, 1, alpha, POWER), detectable(seeds, comparisons, alpha, POWER)


@lru_cache
def _tests_from(comparisons: int, alpha: float) -> int:
    from bench.report.stats_tests import can_test

    return next(n for n in itertools.count(2) if can_test(n, comparisons, alpha))


def _sd(values: list[list[float]]) -> float:
    """SD of paired differences from arms x seeds: the residual SD of the block model times the root of two."""
    arms, seeds = len(values), len(values[0])
    by_arm = [sum(row) / seeds for row in values]
    by_seed = [sum(row[s] for row in values) / arms for s in range(seeds)]
    mean = sum(by_arm) / arms
    rest = sum((row[s] - by_arm[a] - by_seed[s] + mean) ** 2 for a, row in enumerate(values) for s in range(seeds))
    return math.sqrt(2 * rest / ((arms - 1) * (seeds - 1)))
