"""What tuning did: every mixer's trials, the point that won, and the gate that wants equal budgets.

Values here are of the selection's examples and the tuning seeds, never of what the table reports. A loss is a trial
that diverged, is unfit or was given up.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

from bench import Refusal, tune
from bench import sweep as sweeps
from bench.config import Run, digest, resolved_mixer
from bench.record import OUTCOMES
from bench.report.frame import Arm, Table
from bench.space import Tune
from bench.store import Store
from bench.tune import Trial


class Place(NamedTuple):
    """One arm under one tuned protocol: where its reruns are."""

    protocol: str  # label
    arm: Arm
    run: Run  # a rerun, with its trials
    reruns: list[str]  # ids of all, over seeds


@dataclass(frozen=True)
class Tuned:
    """One arm's tuning under one protocol."""

    protocol: str  # label
    arm: Arm
    tune: Tune
    own: dict  # the protocol's values of the tuned keys, as they are without tuning
    rungs: list[list[Trial]]
    values: dict  # that won, {} if every trial is a loss
    edges: tuple[str, ...]  # keys whose value that won is the least or the greatest tried

    @property
    def trials(self) -> list[Trial]:
        """Every point that was tried."""
        return self.rungs[0]

    @property
    def sign(self) -> int:
        """1 where a smaller score is better, else -1."""
        return 1 if self.tune.selection.goal == "min" else -1

    @property
    def losses(self) -> list[Trial]:
        return [t for rung in self.rungs for t in rung if t.score is None]


def tuned(table: Table, store: Store) -> list[Tuned]:
    """The tuning behind a table's columns and the protocols that they start from; [] where nothing was tuned.

    Raises Refusal unless every arm has spent exactly the budget that its protocol declares, and its reruns took the
    best of their trials.
    """
    found = []
    for place in places(table):
        rungs = rungs_of(place, store)
        require_choice(place, rungs, store)
        best = tune.ranked(place.run.protocol.tune, rungs[-1])
        values = best[0].values if best else {}
        own = {axis.key: own_value(place.run, axis.key) for axis in place.run.protocol.tune.space}
        edges = tuple(edges_of(place.run.protocol.tune, values, rungs[0]))
        found.append(Tuned(place.protocol, place.arm, place.run.protocol.tune, own, rungs, values, edges))
    require_equal(found, store)
    return found


def places(table: Table) -> list[Place]:
    """Of the columns and of what their runs start from."""
    protocols = {r.protocol: r.record.run["protocol"] for r in table.rows}.values()
    if not any(p.get("tune") or p["init"] for p in protocols):
        return []  # most tables: the sweep need not be written out again
    arms, found = {a.key: a for a in table.arms}, {}
    for cell in sweeps.cells(table.sweep):
        if cell.protocol not in table.protocols() or cell.seed not in table.seeds:
            continue
        run, label = cell.run, cell.protocol
        while run is not None:
            if run.trials:
                arm = arms[digest({"mixer": resolved_mixer(run)})]
                found.setdefault((label, arm.key), Place(label, arm, run, [])).reruns.append(run.id)
            run, label = run.parent, run.parent.label if run.parent else ""
    return list(found.values())


def own_value(run: Run, key: str):
    """What the protocol (or the mixer) has where nothing is tuned."""
    group, _, rest = key.partition(".")
    if group == "mixer":
        return run.mixer.args[rest]
    return run.protocol.task.args[rest] if group == "task" else getattr(getattr(run.protocol, group), rest)


def rungs_of(place: Place, store: Store) -> list[list[Trial]]:
    """The arm's trials, first rung first. What was given up has the failure that a rerun noted; a lost record none."""
    rungs, runs = [], place.run.trials
    while runs:
        rungs.insert(0, tune.trials_of(runs, store))
        runs = runs[0].trials
    ids = [*place.reruns, *(run.id for rung in rungs for trial in rung for run in trial.runs)]
    records = [record for record in map(store.record, ids) if record and record.chosen]
    noted = {run_id: o for record in records for run_id, o in record.chosen.trials if o not in OUTCOMES}

    def known(trial: Trial) -> Trial:
        pairs = zip(trial.runs, trial.outcomes, strict=True)
        return replace(trial, outcomes=tuple(o if store.has(r.id) else noted.get(r.id, o) for r, o in pairs))

    return [[known(trial) for trial in rung] for rung in rungs]


def edges_of(declared: Tune, values: dict, trials: list[Trial]) -> list[str]:
    """Keys with an order of which the value that won is the least or the greatest that was tried."""
    found = []
    for axis in declared.space:
        tried = {t.values[axis.key] for t in trials if t.values}
        if values and axis.scale != "choice" and values[axis.key] in (min(tried), max(tried)):
            found.append(axis.key)
    return found


# The gate -----------------------------------------------------------------------------------------------------------


def require_choice(place: Place, rungs: list[list[Trial]], store: Store) -> None:
    """Refuse reruns that did not take the best of all their trials, as these stand now."""
    point = tune.choose(place.run, rungs[-1]) if not missing(rungs) else None
    for record in map(store.record, place.reruns):
        if point is None or record is None or record.chosen is None:
            continue  # the first is refused with its count; a rerun that ended before it began chose nothing
        if (record.chosen.point, dict(record.chosen.trials)) != (point.values, dict(point.chosen.trials)):
            raise Refusal(
                f"column '{place.protocol}' is not controlled: rerun {record.id} of {place.arm.label} took "
                f"{text_of(record.chosen.point)} among {len(record.chosen.trials)} trials, which are now "
                f"{len(point.chosen.trials)} with {text_of(point.values)} the best; delete it and run it again"
            )


def missing(rungs: list[list[Trial]]) -> int:
    return sum("missing" in trial.outcomes for rung in rungs for trial in rung)


def require_equal(found: list[Tuned], store: Store) -> None:
    """Refuse arms of one column that differ in the trials that they had, or in the steps these took."""
    for protocol in dict.fromkeys(one.protocol for one in found):
        group = [one for one in found if one.protocol == protocol]
        spent = {one.arm.label: (settled(one), steps_of(one, store)) for one in group}
        declared = {(sum(one.tune.counts), one.tune.spent) for one in group}
        if len({*spent.values(), *declared}) > 1:
            each = ", ".join(f"{arm} {trials} trials of {steps:,} steps" for arm, (trials, steps) in spent.items())
            due = " or ".join(f"{trials} of {steps:,}" for trials, steps in declared)
            raise Refusal(f"column '{protocol}' is not controlled, tuning budgets differ: {each}; declared: {due} each")


def settled(one: Tuned) -> int:
    return sum(len(rung) for rung in one.rungs) - missing(one.rungs)


def steps_of(one: Tuned, store: Store) -> int:
    """Optimiser steps that count: those that were taken; of a loss all that it was given."""
    total = 0
    for run in (run for rung in one.rungs for trial in rung if "missing" not in trial.outcomes for run in trial.runs):
        record = store.record(run.id)
        total += record.curve[-1][0] if record and record.outcome == "ok" else run.steps
    return total


def text_of(values: dict) -> str:
    """'lr 0.01, warmup 0.1'."""
    return (
        ", ".join(
            f"{key.split('.')[-1]} {value:g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in sorted(values.items())
        )
        or "no point"
    )


def steps_name(declared: Tune) -> str:
    """'150 steps each', with rungs '8, 4, 2 of 38, 75, 150 steps'."""
    steps = [f"{declared.steps_of({'rung': rung}):,}" for rung in range(declared.pruner.rungs)]
    if len(steps) == 1:
        return f"{steps[0]} steps each"
    return f"halved in rungs of {', '.join(map(str, declared.counts))} trials of {', '.join(steps)} steps"
