"""Tuning: from a run's point to the values it trains with. Trials are ranked by their records and nothing else.

A loss (a run that diverged, is unfit or was given up) ranks below every value and counts like any trial. Optuna is
imported where sampler tpe asks it, and nowhere else.
"""

import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from bench import Refusal
from bench.config import Run, canonical, digest, resolved, with_point
from bench.record import Chosen
from bench.space import SELECTED, TPE, Axis, Tune, values_of
from bench.store import Lease, Store, take
from bench.whole import link_whole, replace_whole

OTHER_ASKER_SECONDS = 60.0
STARTUP = 0.25  # share of the trials that tpe draws without looking at others


@dataclass(frozen=True)
class Trial:
    """One point that a mixer was trained at, with each tuning seed."""

    number: int  # in its rung
    runs: tuple[Run, ...]
    outcomes: tuple[str, ...]  # of each run: as in its record, the kind of its last failure, or 'missing'
    values: dict  # {} if no record says
    score: float | None  # mean over the tuning seeds; None for a loss


class Point(NamedTuple):
    """What a run has to do: train at `values`, or end with an outcome that is known already."""

    values: dict
    chosen: Chosen | None
    outcome: str  # '' if it is to be trained
    reason: str


def acting(run: Run, point: Point) -> Run:
    """The run with the values of its point in their places; an ordinary run as it is."""
    return with_point(run, point.values) if run.kind else run


def settle(run: Run, store: Store) -> Point:
    """The point of a run whose trials have ended; of one that has a record, what that says."""
    record = store.record(run.id)
    if record and record.chosen:
        return Point(record.chosen.point, record.chosen, "", "")
    if not run.kind or (run.is_trial and values_of(run.point) is not None):
        return Point(dict(run.point), None, "", "")
    if not run.trials:
        values = asked(run, store)
        if values is None:
            raise RuntimeError(f"nobody asked for the values of trial {run.id}")
        return Point(values, Chosen(values, ()), "", "")
    return choose(run, trials_of(run.trials, store))


def choose(run: Run, trials: list[Trial]) -> Point:
    """The values of the best trial, or for a rung's place of the next best; losses have none to give."""
    seen = tuple((r.id, o) for trial in trials for r, o in zip(trial.runs, trial.outcomes, strict=True))
    missing = [run_id for run_id, outcome in seen if outcome == "missing"]
    if missing:
        raise RuntimeError(f"trials of {run.id} have not ended: {', '.join(missing)}")
    best, place = ranked(run.protocol.tune, trials), 0 if run.point == SELECTED else run.point["place"]
    if place < len(best):
        return Point(best[place].values, Chosen(best[place].values, seen), "", "")
    counts = {o: sum(other == o for _, other in seen) for _, o in seen}
    outcome = "unfit" if set(counts) == {"unfit"} else "diverged"
    lost = "every trial" if not best else f"all but {len(best)} trials"
    text = ", ".join(f"{n} {o}" for o, n in counts.items() if o != "ok")
    return Point({}, Chosen({}, seen), outcome, f"{lost} of its tuning failed: {text}")


def ranked(tune: Tune, trials: list[Trial]) -> list[Trial]:
    """Best first, ties by number; without losses."""
    sign = 1 if tune.selection.goal == "min" else -1
    return sorted((t for t in trials if t.score is not None), key=lambda t: (sign * t.score, t.number))


def trials_of(runs: tuple[Run, ...], store: Store) -> list[Trial]:
    """The runs of one rung by their point, in order."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(canonical(run.point, "point"), []).append(run)
    return [_trial(number, tuple(group), store) for number, group in enumerate(groups.values())]


def _trial(number: int, runs: tuple[Run, ...], store: Store) -> Trial:
    records = [store.record(run.id) for run in runs]
    outcomes = tuple(r.outcome if r else _failure(run, store) for run, r in zip(runs, records, strict=True))
    values, score = values_of(runs[0].point), None
    if values is None:
        values = next((r.chosen.point for r in records if r and r.chosen), {})
    if set(outcomes) == {"ok"}:
        metric = runs[0].protocol.tune.selection.metric
        for record in records:
            if metric not in record.metrics:
                has = ", ".join(sorted(record.metrics))
                raise Refusal(f"protocol.tune.selection.metric: trial {record.id} has no '{metric}'; it has: {has}")
        score = sum(r.metrics[metric] for r in records) / len(records)
    return Trial(number, runs, outcomes, values, score)


def _failure(run: Run, store: Store) -> str:
    """The kind of a run's last failure, or of its parent's if that is given up; 'missing' if nothing is known."""
    if failures := store.failures(run.id):
        return failures[-1]["kind"]
    return _failure(run.parent, store) if run.parent and not store.has(run.parent.id) else "missing"


# TPE ----------------------------------------------------------------------------------------------------------------


def folder_of(run: Run, store: Store) -> Path:
    """Where the values that one mixer's trials were given and Optuna's journal are: by protocol and mixer."""
    return store.root / "tune" / digest({key: resolved(run)[key] for key in ("protocol", "mixer")})


def asked(run: Run, store: Store) -> dict | None:
    """The values that a trial of tpe was given: by a file, else by a record of the same trial."""
    path = folder_of(run, store) / f"point-{run.point['trial']}.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        records = [store.record(replace(run, seed=seed).id) for seed in run.protocol.tune.seeds]
        return next((r.chosen.point for r in records if r and r.chosen), None)


def ask(run: Run, store: Store) -> None:
    """Give a trial of tpe its values, once and for all: whoever goes on after a killed worker finds the same ones.

    The journal only remembers what Optuna asked; what trials came to, it is told from the records each time, so one
    that is lost is made again. Does nothing for any other run.
    """
    if not run.is_trial or run.protocol.tune.sampler != TPE or asked(run, store) is not None:
        return
    folder, tune, number = folder_of(run, store), run.protocol.tune, run.point["trial"]
    folder.mkdir(parents=True, exist_ok=True)
    lease = _alone(folder)
    try:
        if asked(run, store) is None:
            values = _ask(folder, tune, number, _known(run, store))
            link_whole(folder / f"point-{number}.json", json.dumps(values) + "\n")
    finally:
        lease.release()


def _alone(folder: Path) -> Lease:
    end = time.monotonic() + OTHER_ASKER_SECONDS
    while not (lease := take(folder)):
        if time.monotonic() > end:
            raise RuntimeError(f"somebody else is asking for a trial; their lease: {folder}/lease-*.json")
        time.sleep(0.05)
    return lease


def _known(run: Run, store: Store) -> dict[int, Trial]:
    """Every trial of the mixer that has its values."""
    tune, found = run.protocol.tune, {}
    for number in range(tune.trials):
        runs = tuple(replace(run, point={"trial": number}, seed=seed) for seed in tune.seeds)
        if values := asked(runs[0], store):
            found[number] = replace(_trial(number, runs, store), values=values)
    return found


def _ask(folder: Path, tune: Tune, number: int, known: dict[int, Trial]) -> dict:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import TrialState, create_trial

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = {axis.key: _distribution(axis) for axis in tune.space}
    journal, sound = folder / "journal.log", folder / "journal.sound"
    if not sound.exists():  # its last writer was killed, perhaps in the middle of a line
        for path in folder.glob("journal.log*"):
            path.unlink()
    sound.unlink(missing_ok=True)
    startup = math.ceil(STARTUP * tune.trials)
    sampler = optuna.samplers.TPESampler(seed=tune.seed * 1_000_003 + number, n_startup_trials=startup)
    direction = {"min": "minimize", "max": "maximize"}[tune.selection.goal]
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(journal))),
        sampler=sampler,
        study_name="trials",
        direction=direction,
        load_if_exists=True,
    )
    there = {t.user_attrs["trial"]: t for t in study.trials if "trial" in t.user_attrs}
    for trial in known.values():
        ended = "missing" not in trial.outcomes
        state = TrialState.COMPLETE if trial.score is not None else TrialState.FAIL if ended else TrialState.RUNNING
        if trial.number not in there:
            attributes = {"trial": trial.number}
            one = create_trial(
                state=state,
                value=trial.score,
                params=trial.values,
                distributions=space,
                user_attrs=attributes,
            )
            study.add_trial(one)
        elif ended and not there[trial.number].state.is_finished():
            study.tell(there[trial.number].number, trial.score, state=state)
    new = study.ask(space)
    new.set_user_attr("trial", number)
    replace_whole(sound, lambda path: path.write_text(""))
    return {axis.key: axis.rounded(new.params[axis.key]) for axis in tune.space}


def _distribution(axis: Axis):
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if axis.scale == "choice":
        return CategoricalDistribution(axis.values)
    return FloatDistribution(axis.values[0], axis.values[-1], log=axis.scale == "log")
