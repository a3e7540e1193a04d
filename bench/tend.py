"""Looking after a sweep that was started, here or on Slurm: `logs`."""

from pathlib import Path

from bench import Refusal
from bench.config import Run, Where
from bench.status import clean, tail
from bench.store import Store
from bench.sweep import grid, load, named, ordered

NAMES = 4  # in one line


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
        print(f"no run of {path} has a log in {root}")
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
    print(f"{run.id} {run.label} {named(run)}")
    failures, log = store.failures(run.id), store.log(run.id)
    if failures and not store.has(run.id):
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
