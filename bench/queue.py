"""The ordered runs of a sweep against the store: what is settled, what may start now. Knows no torch."""

import itertools
import statistics
import time

from bench import slurm
from bench.config import Named, Run, Where, kind_of
from bench.record import Record
from bench.store import Lease, Store


class Queue:
    """The ordered runs of a sweep against the store: what is settled, what may start now."""

    def __init__(self, runs: list[Run], store: Store, where: Where):
        self.runs, self.store, self.where = runs, store, where
        self.parents = {r.parent.id: r.parent for r in runs if r.parent}
        self.dead: dict[str, dict] = {}  # run -> owner of its lease that is known to have ended
        self.last: Run | None = None  # that this worker took
        self.compiled: list[Named] = []  # of which this worker had a run

    def settled(self, run: Run) -> bool:
        """Has its record and whatever its unsettled children need of it, or will not be tried again."""
        if self.store.has(run.id):
            return run.id not in self.parents or self.enough_for_children(run)
        return self.hopeless(run)

    def enough_for_children(self, run: Run) -> bool:
        if self.store.weights(run.id).exists() or self.store.record(run.id).outcome != "ok":
            return True
        return all(self.settled(child) for child in self.runs if child.parent and child.parent.id == run.id)

    def hopeless(self, run: Run) -> bool:
        """Given up, or waiting for a parent that is."""
        if self.store.given_up(run.id, self.where.retries):
            return True
        if run.trials and all(self.without_record(trial) for trial in run.trials):
            return True
        return run.parent is not None and not self.has_parent(run) and self.hopeless(run.parent)

    def without_record(self, trial: Run) -> bool:
        """Whether a trial will have none: it counts as a loss, and nothing was found if all are so."""
        return not self.store.has(trial.id) and self.hopeless(trial)

    def ready(self, run: Run) -> bool:
        return self.has_parent(run) and all(self.store.has(t.id) or self.hopeless(t) for t in run.trials)

    def has_parent(self, run: Run) -> bool:
        parent = run.parent
        if parent is None:
            return True
        if not self.store.has(parent.id):
            return False
        return self.store.weights(parent.id).exists() or self.store.record(parent.id).outcome != "ok"

    def expected_seconds(self, run: Run) -> float:
        """What is left of a run, by finished ones of the same protocol: of the same mixer or else the longest.

        0 if there is none to go by.
        """
        alike = [r for r in self.finished() if (r.protocol_id, kind_of(r.run["point"])) == (run.protocol_id, run.kind)]
        done = [r for r in alike if r.outcome == "ok"]
        mixer = {"name": run.mixer.name, **run.mixer.args}
        same = [r.cost.wall for r in done if r.run["mixer"] == mixer]
        wall = statistics.median(same) if same else max((r.cost.wall for r in done), default=0.0)
        return wall * (1 - self.store.progress(run.id))

    def finished(self) -> list[Record]:
        return [self.store.record(r.id) for r in self.runs if self.store.has(r.id)]

    def in_turn(self) -> list[Run]:
        """In order, but first what goes on with the last run's arm and seed, and of the next seed's runs first those of
        arms that this process has compiled."""
        if self.last is None:
            return self.runs
        arm = self.last.mixer, self.last.seed
        found = []
        for _, block in itertools.groupby(self.runs, key=lambda run: run.seed):
            found += sorted(block, key=lambda run: run.mixer not in self.compiled)
        return sorted(found, key=lambda run: (run.mixer, run.seed) != arm)

    def next(self, until: float) -> "tuple[Run, Lease] | None":
        """The first run that may start and can end by `until` (second of the epoch), with its lease; None: no run."""
        for run in self.in_turn():
            if self.settled(run) or not self.ready(run):
                continue
            if until < float("inf") and time.time() + self.expected_seconds(run) > until:
                continue
            lease = self.store.take(run.id, self.dead.pop(run.id, None))
            if lease and lease.bereft and not self.settled(run):
                self.store.fail(run.id, *slurm.last_words(lease.bereft), lease.bereft)
            if lease and self.settled(run):  # finished by another worker in between, or given up
                lease.release()
            elif lease:
                self.last = run
                if run.mixer not in self.compiled:
                    self.compiled.append(run.mixer)
                return run, lease
        return None

    def find_dead(self, watch: slurm.Watch) -> None:
        """Ask Slurm about those who hold what we wait for; `next` takes over from who is gone."""
        owners = {r.id: self.store.owner(r.id) for r in self.runs if not self.settled(r)}
        gone = watch.gone([owner for owner in owners.values() if owner])
        self.dead = {run_id: owner for run_id, owner in owners.items() if owner in gone}

    def waiting(self) -> bool:
        """Whether another worker is at a run of ours, so that more may become ready."""
        return any(self.store.leased(r.id) for r in self.runs if not self.settled(r))
