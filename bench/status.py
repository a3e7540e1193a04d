"""What the runs of a sweep are doing now, with or without Slurm, and the one screen that says so. Nothing is changed.

A run is, the first that holds: 'ok', 'diverged' or 'unfit' (its record), 'damaged' (a record that no verb takes),
'running' (somebody has its lease), 'given up' (failed too often, or its parent did), 'failed' (will be tried again),
'queued' (a task on Slurm is there that may take it), 'missing'. Slurm's silence changes no state but 'queued', and is
said.
"""

import json
import os
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from bench import Refusal, slurm
from bench.config import Run, Where, kind_of
from bench.plain import clean, clock, short, tail
from bench.record import OUTCOMES, RERUN, Record, read_record, uncollected
from bench.store import Store
from bench.submit import REFUSED, Submission, submissions
from bench.sweep import grid, load, named, ordered

STATES = (*OUTCOMES, "damaged", "running", "given up", "failed", "queued", "missing")
SETTLED = (*OUTCOMES, "damaged", "given up")
LINES = 15  # of each list, without --all
WATCH_SECONDS = 15.0
WATCH_AT_MOST = 120.0  # while Slurm does not answer


@dataclass(frozen=True)
class Outcome:
    """What is used of a record; 10,000 are read for one screen, as strictly as for a report, and not kept."""

    outcome: str
    reason: str
    wall: float  # seconds
    kind: tuple[str, str]  # protocol's id and 'trial' or the like, mixer


@dataclass(frozen=True)
class State:
    run: Run
    name: str  # one of STATES
    kind: str  # of the last failure, if that is what the state is about
    why: str  # one line; of a running one why it was interrupted last, '' if it was not
    log: str  # path of the last attempt's log, '' if unknown
    owner: dict | None  # of the lease of one that runs, or whose task is no more


@dataclass(frozen=True)
class Look:
    """The runs of a sweep and Slurm's tasks for it at one moment."""

    states: list[State]
    outcomes: dict[str, Outcome]
    sent: list[Submission]
    tasks: list[slurm.Element]  # alive
    silence: str  # why Slurm said nothing; '' if it answered or was not asked

    def of(self, name: str) -> list[State]:
        return [s for s in self.states if s.name == name]


class Reader:
    """Looks at a sweep again and again. Records never change, so each is read once."""

    def __init__(self, path: Path, where: Where, root: Path, told: bool):
        """`told`: `where.retries` was given, and is not that of the last submission."""
        self.runs = ordered(grid(load(path)))
        self.sweep, self.where, self.store, self.told = path.stem, where, Store(root), told
        committed = self.store.committed()
        self.outcomes = {run.id: _used(committed[run.id]) for run in self.runs if run.id in committed}

    def look(self) -> Look:
        there = _folders(self.store.root / "runs")
        self._read(there)
        open_runs = [r for r in self.runs if r.id in there and r.id not in self.outcomes]
        owners = {r.id: owner for r in open_runs if (owner := self.store.owner(r.id))}
        sent = submissions(self.store.root, self.sweep)
        tasks, silence = _tasks(sent, owners)
        # Slurm was asked after the store: who ended in between has left no lease, or even a record.
        ended = [i for i, owner in owners.items() if _ended(owner, tasks, silence)]
        owners = {i: o for i, o in owners.items() if i not in ended or self.store.owner(i) == o}
        self._read(there)
        vanished = _last_words({i: owners[i] for i in ended if i in owners and i not in self.outcomes})
        retries = sent[-1].where.retries if sent and not self.told else self.where.retries
        awaited = {i for s in sent if any(t.name == s.name for t in tasks) for i in s.runs}
        states: dict[str, State] = {}
        for run in self.runs:
            if run.id in self.outcomes:
                states[run.id] = _done(run, self.outcomes[run.id])
            elif run.id in owners and run.id not in vanished:
                before = _why(self.store.failures(run.id))
                states[run.id] = State(run, "running", "", before, owners[run.id].get("log", ""), owners[run.id])
            elif run.id in owners:
                states[run.id] = _vanished(run, owners[run.id], *vanished[run.id])
            else:
                failures = self.store.failures(run.id) if run.id in there else []
                blocked = run.blocked_by(lambda r: states[r.id].name in ("given up", "damaged"))
                above = (states[blocked[0].id], blocked[1]) if blocked else None
                states[run.id] = self._left(run, failures, retries, above, run.id in awaited)
        return Look(list(states.values()), self.outcomes, sent, tasks, silence)

    @uncollected()
    def _read(self, there: set[str]) -> None:
        """The records that are new among the run folders that are there."""
        for run in self.runs:
            if run.id in there and run.id not in self.outcomes:
                found = _outcome(self.store.folder(run.id) / "record.json", run.id)
                if found:
                    self.outcomes[run.id] = found

    def _left(self, run: Run, failures: list[dict], retries: int, above: tuple | None, awaited: bool) -> State:
        """A run that nobody has and that has no record; `above`: what it waits for in vain, and in words."""
        if above:
            state, who = above
            return State(run, "given up", "parent", f"{who} {state.run.id} is {state.name}", "", None)
        if failures:
            name, last = "given up" if self.store.given_up(run.id, retries) else "failed", failures[-1]
            return State(run, name, last["kind"], _why(failures), last.get("log", ""), None)
        return State(run, "queued" if awaited else "missing", "", "", "", None)


def _folders(path: Path) -> set[str]:
    try:
        return {entry.name for entry in os.scandir(path)}
    except FileNotFoundError:
        return set()


def _used(record: Record) -> Outcome:
    kind = record.protocol_id + kind_of(record.run["point"]), json.dumps(record.run["mixer"], sort_keys=True)
    return Outcome(record.outcome, record.reason, record.cost.wall, kind)


def _outcome(path: Path, run_id: str) -> Outcome | None:
    """Of a run folder's record; None if there is none."""
    if not path.exists():
        return None
    try:
        return _used(read_record(path, run_id, RERUN))
    except Refusal as error:
        return Outcome("damaged", str(error), 0.0, ("", ""))


def _tasks(sent: list[Submission], owners: dict[str, dict]) -> tuple[list[slurm.Element], str]:
    """Living tasks of the sweep's submissions, and of others that have a run of it; one question for all."""
    names = sorted({s.name for s in sent} | {o["job"]["name"] for o in owners.values() if "job" in o})
    try:
        return [e for e in slurm.elements(names) if slurm.alive(e)], ""
    except slurm.Unavailable as error:
        return [], clean(str(error))


def _ended(owner: dict, tasks: list[slurm.Element], silence: str) -> bool:
    """Whether Slurm does not show the task of a lease; False while it does, or nobody can know."""
    job = owner.get("job")
    if job is None or silence:
        return False
    return not any((t.name, t.id) == (job["name"], job["id"]) and t.restarts <= job["restarts"] for t in tasks)


def _last_words(owners: dict[str, dict]) -> dict[str, tuple[str, str]]:
    """Kind and message of runs whose tasks are no more; of those that are not shown nobody asks."""
    unknown = "lost", "Slurm no longer shows its task"
    return {i: slurm.last_words(owner) if n < LINES else unknown for n, (i, owner) in enumerate(owners.items())}


def _vanished(run: Run, owner: dict, kind: str, message: str) -> State:
    return State(run, "failed", kind, f"{kind}: {clean(message)}", owner.get("log", ""), owner)


def _why(failures: list[dict]) -> str:
    """The last failure in a line, and how many there were; '' if there was none."""
    if not failures:
        return ""
    why = f"{failures[-1]['kind']}: {clean((failures[-1]['message'].splitlines() or [''])[0])}"
    return f"after {len(failures)} failures, {why}" if len(failures) > 1 else why


def _done(run: Run, one: Outcome) -> State:
    return State(run, one.outcome, "", clean(one.reason), "", None)


def last_line(state: State) -> str:
    """What a run's log said of it, else at its end; '' if that is no news or there is no log."""
    try:
        lines = tail(Path(state.log), 500) if state.log else []
    except OSError:
        return ""
    own = [line for line in lines if line.startswith(f"{state.run.label} {named(state.run)}: ")]
    line = (own or lines or [""])[-1]
    known = state.why.rpartition(": ")[2]
    return "" if own and known and known in line else line


# Screen -----------------------------------------------------------------------------------------------------------


def screen(look: Look, path: Path, store: Store, everything: bool) -> list[str]:
    walls = _walls(look)
    lines = [f"{path}: {len(look.states)} runs: {_counts(look)}{store.absent()}", *_slurm_lines(look, path)]
    lists = {
        "Running": [f"{_who(s)}: {_progress(s, walls, store)}{_before(s)}" for s in look.of("running")],
        "Failed, will be tried again": [_failed(s) for s in look.of("failed")],
        "Given up (`retry` lets them be tried again)": [_failed(s) for s in look.of("given up")],
        "No outcome but a damaged record": [f"{_who(s)}: {s.why}" for s in look.of("damaged")],
        "Diverged": [short(f"{_who(s)}: {s.why}") for s in look.of("diverged")],
        "Unfit": [short(f"{_who(s)}: {s.why}") for s in look.of("unfit")],
    }
    if everything:  # thousands of folders are read for it
        done = [(s, why) for name in OUTCOMES for s in look.of(name) if (why := _why(store.failures(s.run.id)))]
        lists["Done in spite of failures"] = [short(f"{_who(s)}: {why}") for s, why in done]
    for title, rows in lists.items():
        shown = rows if everything or len(rows) <= LINES else [*rows[:LINES], f"… and {len(rows) - LINES} more: --all"]
        lines += [title, *(f"  {row}" for row in shown)] if rows else []
    return lines


def _counts(look: Look) -> str:
    counts = Counter(s.name for s in look.states)
    found = []
    for name in STATES:
        kinds = Counter(s.kind for s in look.of(name) if s.kind)
        kinds = f" ({', '.join(f'{kind} {n}' for kind, n in sorted(kinds.items()))})" if kinds else ""
        if counts[name] or name == "ok":
            found.append(f"{counts[name]} {name}{kinds}")
    return ", ".join(found)


def _slurm_lines(look: Look, path: Path) -> list[str]:
    if look.silence:
        return [f"Slurm: {look.silence}; what waits there is unknown"]
    arrays: dict[tuple, Counter] = {}
    for task in look.tasks:
        reason = f" ({clean(task.reason)})" if task.state == "PENDING" and task.reason != "None" else ""
        arrays.setdefault((task.id.split("_")[0], task.name), Counter())[task.state.lower() + reason] += 1
    lines = [
        f"Slurm {job} {name}: {', '.join(f'{n} {what}' for what, n in sorted(states.items()))}"
        for (job, name), states in sorted(arrays.items())
    ]
    left = any(s.name in ("failed", "missing") for s in look.states)
    if look.sent and left and not look.tasks:
        lines.append(f"Slurm: no task waits or runs; `mixerbench sweep {path} --on …` sends what is left")
        lines += [f"  the last ones refused: {line}" for line in _refused(look.sent[-1])]
    return lines


def _refused(submission: Submission) -> list[str]:
    """Why the tasks of a submission did nothing, if they said so; such a refusal is no run's failure."""
    logs = [*submission.folder.glob("log-*.txt"), *submission.folder.glob("slurm-*.txt")]
    full = submission.folder.glob(REFUSED)  # absent in submissions of earlier versions
    lines = [line for log in [*full, *sorted(logs)[:50]] for line in tail(log, 20)]
    return sorted({short(line) for line in lines if line.startswith("mixerbench: ")})[:3]


def _who(state: State) -> str:
    return f"{state.run.id} {state.run.label} {named(state.run)}"


def _before(state: State) -> str:
    """What a run that goes on was interrupted by."""
    if not state.why:
        return ""
    return short(f"; goes on {'' if state.why.startswith('after') else 'after '}{state.why}")


def _failed(state: State) -> str:
    line = last_line(state)
    return short(f"{_who(state)}: {state.why}") + (f" | log: {short(line)}" if line else "")


def _progress(state: State, known: dict, store: Store) -> str:
    owner = state.owner
    task = f"task {owner['job']['id']}" if "job" in owner else f"process {owner['pid']}"
    place = f"{task} on {owner['node']}"
    try:
        now = json.loads((store.folder(state.run.id) / "progress.json").read_text())
    except (OSError, ValueError):
        return f"starting; {place}"
    share = now["step"] / now["steps"]
    left = _seconds_left(state.run, known, share, now)
    about = f"about {clock(left)} left" if left is not None else "time left unknown"
    return f"step {now['step']} of {now['steps']} ({share:.0%}), loss {now['loss']:.4g}, {about}; {place}"


def _walls(look: Look) -> dict[tuple[str, str], list[float]]:
    """Seconds of finished runs by protocol and mixer, and by protocol and ''."""
    found: dict[tuple[str, str], list[float]] = {}
    for one in look.outcomes.values():
        if one.outcome == "ok":
            found.setdefault(one.kind, []).append(one.wall)
            found.setdefault((one.kind[0], ""), []).append(one.wall)
    return found


def _seconds_left(run: Run, known: dict[tuple[str, str], list[float]], share: float, now: dict) -> float | None:
    """By the walls of finished runs like it, else of its protocol; before the first by its pace, no evaluation."""
    kind = run.protocol_id + run.kind, json.dumps({"name": run.mixer.name, **run.mixer.args}, sort_keys=True)
    if walls := known.get(kind) or known.get((kind[0], "")):
        return statistics.median(walls) * (1 - share)
    return now["pace"] * (now["steps"] - now["step"]) if "pace" in now else None


def status(path: Path, where: Where, root: Path, told: bool, watch: bool, everything: bool) -> int:
    """Print the screen, with `watch` again and again until every run is settled."""
    reader, nap = Reader(path, where, root, told), WATCH_SECONDS
    while True:
        look = reader.look()
        lines = screen(look, path, reader.store, everything)
        start = "\x1b[H\x1b[2J" if watch and sys.stdout.isatty() else ""
        print(start + "\n".join(lines), flush=True)
        if not watch or all(s.name in SETTLED for s in look.states):
            return 0
        nap = min(nap * 2, WATCH_AT_MOST) if look.silence else WATCH_SECONDS
        time.sleep(nap)
