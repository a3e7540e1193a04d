"""Cells that take turns, so that whatever drifts (clocks, heat, other users) meets all of them alike.

A cell is prepared once (built, compiled, warmed, its memory taken), then has a few steps in each of several rounds;
every second round goes backwards. Running out of memory, being unfit and failing are outcomes of a cell, never the end
of the others.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from bench import Refusal
from bench.config import Run
from bench.registry import mixer_class
from bench.speed import clock, layer, naive
from bench.speed.settings import Entry, Settings

CEILINGS = ("copy", "matrix")
ALONE = "measured after the others, by itself: beside them there was no memory for it"


@dataclass
class Result:
    """What is known of a cell so far; plain values."""

    outcome: str = ""  # 'ok', 'oom', 'unfit', 'error', 'skipped' (the time was up); '' before it is prepared
    reason: str = ""  # for an outcome that is not 'ok', or what is special about one that is
    backend: str = ""
    first: float = 0.0  # seconds of the first step, compilation included
    estimate: float = 0.0  # seconds of one step, warm, before the rounds
    turns: list[list[float]] = field(default_factory=list)  # seconds of the steps of each turn
    host: list[float] = field(default_factory=list)  # seconds of the host to issue a step, each turn
    peak_memory: int = 0  # bytes, those of the layer and its input included
    work: int = 0  # of a ceiling: what a step does, in bytes or FLOPs


class Timed:
    """A cell: `label`, `result`, how to make its step and how to let go of it."""

    def __init__(self, label: str, settings: Settings):
        self.label, self.settings, self.result = label, settings, Result()
        self.step: Callable[[], object] | None = None

    def build(self) -> None:
        """Set `self.step`, or the outcome."""
        raise NotImplementedError

    def finish(self) -> None:
        """Called when the step is warm."""

    def drop(self) -> None:
        """Let go of everything that holds memory."""
        self.step = None

    def prepare(self) -> None:
        device, result = self.settings.device, self.result
        clock.release(device)
        before = clock.in_use(device)
        self.build()
        if self.step is None:
            return
        result.first = clock.waited(self.step, device)
        slow = result.first > self.settings.seconds and not self.settings.compiled
        for _ in range(0 if slow else self.settings.warm - 1):
            self.step()
        result.peak_memory = clock.peak_of(self.step, device) - before  # of the step itself: a graph keeps its memory
        self.finish()
        result.estimate = clock.waited(self.step, device)
        result.outcome = "ok"

    def known(self) -> bool:
        """Whether there is a time of a step: preparing gives one."""
        return self.result.outcome == "ok"

    def skip(self) -> None:
        self.result.outcome, self.result.reason = "skipped", "the time was up"

    def turns(self) -> int:
        """In how many rounds it takes part."""
        return share(self.result.estimate, self.settings)[0]

    def turn(self) -> None:
        """Some steps, timed. Where it is cheap one goes ahead: the first after another cell finds cold caches."""
        _, times = share(self.result.estimate, self.settings)
        if times > 1:
            self.step()
        seconds, host = clock.timed(self.step, times, self.settings.device)
        self.result.turns.append(seconds)
        self.result.host.append(host)


def share(estimate: float, settings: Settings) -> tuple[int, int]:
    """How many turns a cell has, and how many timed steps in each, for its part of `seconds`.

    At least three turns, so that there is a spread; one if a single step takes longer than that.
    """
    steps = settings.seconds / max(estimate, 1e-9)
    turns = min(settings.rounds, max(3 if steps >= 1 else 1, int(steps)))
    return turns, min(settings.most, max(1, int(steps / turns)))


class LayerCell(Timed):
    """One arm in one of the ways at one length."""

    def __init__(self, entry: Entry, way: str, length: int, settings: Settings, backend: str, shorter):
        """`shorter`: the cell of the same arm and way at the length before, if there is one."""
        super().__init__(f"{entry.label} {way} L={length}", settings)
        self.entry, self.way, self.length, self.shorter = entry, way, length, shorter
        self.batch = settings.examples(length)
        self.counts: layer.Counts | None = None
        self.result.backend = "matrix" if way == "naive" else backend

    @property
    def run(self) -> Run:
        return self.entry.run

    def build(self) -> None:
        result, settings = self.result, self.settings
        reason = self.entry.refused or layer.unfit(self.run, self.length, settings.segments)
        if reason:
            result.outcome, result.reason = "unfit", reason
            return
        self.counts = layer.counts_of(self.run, self.length, self.batch, settings.segments)
        needed, available = self.least_memory(), clock.free(settings.device)
        if needed > available:
            result.outcome = "oom"
            result.reason = f"needs at least {gigabytes(needed)}, {gigabytes(available)} are free: not tried"
            return
        backend = result.backend if self.way != "naive" else mixer_class(self.run.mixer.name).backends[0]
        subject = layer.subject_of(self.run, self.length, self.batch, settings.segments, backend, settings.device)
        layer.prepare(subject, self.way, settings.compiled)
        self.subject, self.step = subject, subject.step

    def finish(self) -> None:
        if self.way == "graph":
            self.step = layer.captured(self.subject)

    def drop(self) -> None:
        super().drop()
        self.subject = None

    def least_memory(self) -> int:
        """Bytes without which it cannot run: parameters and their gradients, for `naive` the matrices and theirs.

        On a CPU, where running out ends the process, what a shorter length needed is carried on too.
        """
        least = 8 * self.counts.parameters
        if self.way != "naive":
            return least
        rows = self.batch if self.run.mixer.args["sam"] else 1
        least += naive.least_bytes(rows, self.run.mixer.args["heads"], self.length)
        if self.settings.device == "cpu" and self.shorter and self.shorter.result.peak_memory > 0:
            before = self.shorter
            growth = self.batch * self.length**2 / (before.batch * before.length**2)
            least = max(least, round(before.result.peak_memory * growth))
        return least


class Ceiling(Timed):
    """What the device can do at best: 'copy' (bytes read and written) or 'matrix' (FLOPs)."""

    def __init__(self, name: str, settings: Settings):
        super().__init__(name, settings)
        self.name = name

    def build(self) -> None:
        settings = self.settings
        made = {
            "copy": lambda: clock.copying(settings.copy, settings.device),
            "matrix": lambda: clock.multiplying(settings.matrix, settings.precision, settings.device),
        }
        self.step, self.result.work = made[self.name]()


def gigabytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB"


def attempt(cell: Timed, action: Callable[[], None]) -> None:
    """Do it; what goes wrong is the cell's outcome, and its memory is free again."""
    try:
        action()
    except Refusal:
        raise
    except Exception as error:  # a kernel that does not build, say: the other cells are measured nevertheless
        short = clock.is_shortage(error)
        text = " ".join(f"{type(error).__name__}: {error}".split())
        cell.result.outcome, cell.result.reason = "oom" if short else "error", text[:300]
    if cell.result.outcome != "ok":
        cell.drop()
        clock.release(cell.settings.device)


def measure(cells: list[Timed], settings: Settings, until: float, save: Callable[[Timed | None, int], None]) -> None:
    """Prepare all cells, then let them take turns; `save(cell, 0)` after each that is prepared, `save(None, n)` after
    round n = 1, 2, ... What was not begun by `until` is skipped. A cell that cannot be prepared for the memory that
    others keep (their CUDA graphs do) is measured after them, by itself."""
    crowded = []
    for number, cell in enumerate(cells):
        if time.time() > until:
            cell.skip()
        else:
            attempt(cell, cell.prepare)
        if cell.result.outcome == "oom" and any(other.result.outcome == "ok" for other in cells[:number]):
            crowded.append(cell)
        save(cell, 0)
    for number in range(settings.rounds):
        take_turns(cells if number % 2 == 0 else cells[::-1], number, until)
        save(None, number + 1)
    for cell in cells:
        cell.drop()
    clock.release(settings.device)
    for cell in crowded:
        if time.time() <= until:
            alone(cell, settings.rounds, until)
        else:
            cell.skip()
        save(cell, 0)


def take_turns(cells: list[Timed], number: int, until: float) -> None:
    """Round `number` of those that still have turns."""
    for cell in cells:
        if cell.result.outcome != "ok" or number >= cell.turns():
            continue
        if time.time() <= until:
            attempt(cell, cell.turn)
        elif not cell.known():
            cell.skip()


def alone(cell: Timed, rounds: int, until: float) -> None:
    """All of a cell's turns on end, with the memory to itself."""
    cell.result.outcome, cell.result.reason = "", ALONE
    attempt(cell, cell.prepare)
    for number in range(rounds):
        take_turns([cell], number, until)
    cell.drop()
    clock.release(cell.settings.device)
