"""Looking after a sweep that was started, here or on Slurm: `logs`, `cancel`, `retry`."""

import time
from collections import Counter
from pathlib import Path

from bench import Refusal, slurm
from bench.config import Run, Where
from bench.plain import clean, tail
from bench.status import Reader, State
from bench.store import KINDS, Store
from bench.submit import alone, pilots_of, submissions
from bench.sweep import grid, load, named, ordered

NAMES = 4  # in one line
RETRIED = (*KINDS, "diverged")


def logs(path: Path, where: Where, root: Path, names: list[str], lines: int) -> int:
    """Print the end of one run's log and why it failed, or which log each run has."""
    if lines < 1:
        raise Refusal(f"--lines must be at least 1, got {lines}")
    if len(names) > 1:
        raise Refusal(f"logs: one run at a time, got {', '.join(names)}")
    store, runs = Store(root), ordered(grid(load(path)))
    if names:
        return _log_of(one_of(runs, names[0], path), store, lines)
    known = [(run, store.log(run.id)) for run in runs if store.folder(run.id).exists()]
    for run, log in known:
        if log:
            print(f"{run.id} {run.label} {named(run)}: {clean(log)}")
    if not any(log for _, log in known):
        print(f"no run of {path} has a log in {root}{store.absent()}")
    return 0


def one_of(runs: list[Run], start: str, path: Path) -> Run:
    """The run whose id starts so. Raises Refusal if none or several do."""
    found = [run for run in runs if run.id.startswith(start)]
    if len(found) == 1:
        return found[0]
    some = ", ".join(run.id for run in (found or runs)[:NAMES])
    what = f"{len(found)} runs start with {start!r}" if found else f"no run is {start!r}"
    raise Refusal(f"{path}: {what}; {'among them' if len(found or runs) > NAMES else 'there are'} {some}")


def _log_of(run: Run, store: Store, lines: int) -> int:
    print(f"{run.id} {run.label} {named(run)}{store.absent()}")
    failures, log = store.failures(run.id), store.log(run.id)
    for number, one in enumerate(failures[:-1], 1):
        print(f"failure {number}, {one['time']}: {one['kind']}: {clean((one['message'].splitlines() or [''])[0])}")
    if failures:
        last = failures[-1]
        print(f"failure {len(failures)}, {last['time']}: {last['kind']}")
        for line in last["message"].splitlines():
            print(f"  {clean(line) if not line.startswith(' ') else '  ' + clean(line)}".rstrip())
    if not log:
        print("no log is known: the run was not started, or in a terminal, which has what it said")
        return 0
    print(clean(log))
    try:
        end = tail(Path(log), lines)
    except OSError as error:
        raise Refusal(f"the log of {run.id}, {clean(log)}, cannot be read: {error.strerror}") from None
    for line in end:
        print(f"  {line}")
    return 0


def cancel(path: Path, where: Where, root: Path) -> int:
    """End all tasks of a sweep on Slurm, waiting ones and pilots too; those at work write a checkpoint first."""
    load(path)  # a wrong name is no empty sweep
    homes = [home for name in (path.stem, pilots_of(path.stem)) if (home := root / "slurm" / name).exists()]
    if not homes:
        print(f"nothing of {path} was submitted from {root}{Store(root).absent()}")
        return 0
    leases = [alone(home) for home in homes]  # what somebody is just submitting is cancelled too
    try:
        names = [s.name for home in homes for s in submissions(root, home.name)]
        tasks = [e for e in slurm.elements(names) if slurm.alive(e)]
        slurm.cancel(sorted({e.name for e in tasks}))
    except slurm.Unavailable as error:
        raise Refusal(f"{error}; the tasks may still be there, give the command again") from None
    finally:
        for lease in leases:
            lease.release()
    states = Counter(e.state.lower() for e in tasks)
    said = ", ".join(f"{number} {state}" for state, number in sorted(states.items()))
    print(f"{len(tasks)} tasks cancelled: {said}" if tasks else f"no task of {path} waits or runs")
    if states["running"]:
        print("those at work write a checkpoint; `mixerbench sweep` goes on from there")
    return 0


def _wanted(state: State, only: list[str]) -> bool:
    """Whether `retry` is about a run: with `only` by its last failure or outcome, else those given up."""
    if state.kind == "parent" or state.name == "running":
        return False
    return ("diverged" if state.name == "diverged" else state.kind) in only if only else state.name == "given up"


def _gone(owners: list[dict]) -> list[dict]:
    """Of the owners of leases whose tasks Slurm did not show, those that it does not show some seconds later either."""
    if not owners:
        return []
    print(f"{len(owners)} runs belong to tasks that Slurm no longer shows; looking once more", flush=True)
    watch = slurm.Watch(time.monotonic)
    watch.gone(owners)
    time.sleep(slurm.CONFIRM_SECONDS)
    return watch.gone(owners)


def retry(path: Path, where: Where, root: Path, told: bool, only: list[str]) -> int:
    """Let runs be tried again: the given-up ones, or with `only` all whose last failure (or outcome) is of that kind.

    What is known of their failures moves into a folder of its own, so that they count from 0. A run that somebody is
    at stays as it is. The number of runs.
    """
    if wrong := [kind for kind in only if kind not in RETRIED]:
        raise Refusal(f"--only: unknown kind '{wrong[0]}'; allowed: {', '.join(RETRIED)}")
    store, chosen = Store(root), Counter()
    wanted = [s for s in Reader(path, where, root, told).look().states if _wanted(s, only)]
    gone = _gone([state.owner for state in wanted if state.owner])
    for state in wanted:
        lease = store.take(state.run.id, state.owner if state.owner in gone else None)
        if lease is None:
            print(f"{state.run.id} {state.run.label} {named(state.run)}: somebody has its lease, left as it is")
            continue
        try:
            if lease.bereft:
                store.fail(state.run.id, *slurm.last_words(lease.bereft), lease.bereft)
            store.set_aside(state.run.id)
        finally:
            lease.release()
        chosen["diverged" if state.name == "diverged" else state.kind] += 1
    kinds = ", ".join(f"{kind} {number}" for kind, number in sorted(chosen.items()))
    print(f"{chosen.total()} runs may be tried again{f': {kinds}' if kinds else ''}{store.absent()}")
    return chosen.total()
