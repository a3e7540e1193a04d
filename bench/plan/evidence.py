"""What is known already: the records of a store and the pilots beside them.

A plan of 10,000 runs may meet 10,000 records. They are read as strictly as for a report, so that no plan counts on one
that the report refuses, but only what a plan uses of them is kept.
"""

import json
import os
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from bench import Refusal
from bench.config import build, canonical, kind_of
from bench.record import RERUN, Cost, Record, dump, read_record
from bench.report.sharing import Stay
from bench.store import Store

SPENT = ("startup", "first_step", "step_p10", "step_p50", "step_p90", "evaluation", "peak_memory")
SPENT += ("weights_bytes", "checkpoint_bytes", "record_bytes")
LEAST = {"world": 1, "steps": 1} | dict.fromkeys(SPENT, 0)  # that a pilot can say
WEIGHT_BYTES = 4  # weights and optimiser states are fp32 whatever the protocol's precision


@dataclass(frozen=True)
class Finished:
    """Of one record: what a plan uses."""

    id: str
    outcome: str
    protocol_id: str
    kind: str  # '' or, of a tuned protocol, 'selected', 'trial' and so on
    mixer: str  # canonical text of name and arguments
    seed: int
    replica: int
    device: str  # model, '2 x …' for two of them
    world: int
    cost: Cost
    stay: Stay
    parameters: int
    bytes: int  # of the record itself
    metrics: dict[str, float]
    commit: str
    digests: dict[str, str]  # of the code, by file


@dataclass(frozen=True)
class Pilot:
    """One line of pilots.jsonl: a training cut short. Seconds and bytes."""

    protocol_id: str
    label: str  # of the protocol
    mixer: dict
    device: str  # as in Finished
    world: int
    steps: int  # that were run
    startup: float
    first_step: float  # compilation included
    step_p10: float
    step_p50: float
    step_p90: float
    evaluation: float
    peak_memory: int
    weights_bytes: int
    checkpoint_bytes: int
    record_bytes: int
    torch: str
    time: str  # UTC

    def __post_init__(self):
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise Refusal(f"pilot.{name} is {getattr(self, name)}, must be at least {least}")
        try:
            datetime.fromisoformat(self.time)
        except ValueError:
            raise Refusal(f"pilot.time is {self.time!r}, no time") from None

    @property
    def measured(self) -> float:
        """Seconds of the epoch."""
        return datetime.fromisoformat(self.time).timestamp()


class Ledger:
    """All finished runs of a store by id, and each protocol and mixer that occurs among them once."""

    def __init__(self, store: Store):
        self.finished: dict[str, Finished] = {}
        self.protocols: dict[str, dict] = {}
        self.mixers: dict[str, dict] = {}
        self.folders = _folders(store)
        for record in store.committed().values():
            self._add(record, len(dump(record)))
        for name in sorted(self.folders - self.finished.keys()):
            path = store.folder(name) / "record.json"
            if path.exists():
                self._add(read_record(path, name, RERUN), path.stat().st_size)

    def _add(self, record: Record, size: int) -> None:
        found = self.finished[record.id] = _finished(record, size)
        self.protocols.setdefault(found.protocol_id, record.run["protocol"])
        self.mixers.setdefault(found.mixer, record.run["mixer"])


def _folders(store: Store) -> set[str]:
    """Names of all run folders: asked once, since most runs of a new sweep have none."""
    try:
        return {entry.name for entry in os.scandir(store.root / "runs")}
    except FileNotFoundError:
        return set()


def _finished(record: Record, size: int) -> Finished:
    run, environment, cost = record.run, record.environment, record.cost
    end = datetime.fromisoformat(record.finished).timestamp()
    return Finished(
        id=record.id,
        outcome=record.outcome,
        protocol_id=record.protocol_id,
        kind=kind_of(run["point"]),
        mixer=canonical(run["mixer"], "mixer"),
        seed=run["seed"],
        replica=run["replica"],
        device=device_label(environment.device, environment.world),
        world=environment.world,
        cost=cost,
        stay=Stay(environment.node, environment.device, record.card, end, cost.wall),
        parameters=record.capacity.parameters,
        bytes=size,
        metrics=record.metrics,
        commit=environment.commit,
        digests=record.digests,
    )


def device_label(model: str, world: int) -> str:
    return model if world == 1 else f"{world} x {model}"


# Pilots -------------------------------------------------------------------------------------------------------------


def read_pilots(path: Path) -> list[Pilot]:
    """All lines of pilots.jsonl; [] if there is none. Raises Refusal for a line that is not a whole pilot."""
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        try:
            found.append(build(Pilot, json.loads(line), "pilot"))
        except (json.JSONDecodeError, Refusal) as error:
            raise Refusal(f"{path}:{number}: not a whole pilot ({error}); delete the line and measure again") from None
    return found


def known_pilots(root: Path) -> list[Pilot]:
    """Of a results folder: those of its own file, and the committed ones, <root>/*/pilots.jsonl, of what has none
    there. Of a protocol and mixer that several files have on one device, all of the last file count and no others."""
    latest: dict[tuple, list[Pilot]] = {}
    for path in [*sorted(root.glob("*/pilots.jsonl")), root / "pilots.jsonl"]:
        own: dict[tuple, list[Pilot]] = {}
        for pilot in read_pilots(path):
            key = pilot.protocol_id, canonical(pilot.mixer, "mixer"), pilot.device, pilot.world
            own.setdefault(key, []).append(pilot)
        latest |= own
    return [pilot for each in latest.values() for pilot in each]


def pilot_of(record: Record, weights_bytes: int, time: str) -> Pilot:
    """What the record of a training cut short says of the costs of whole ones.

    A checkpoint holds the weights, two moments of each and, if the protocol averages weights, their average.
    """
    cost, protocol = record.cost, record.run["protocol"]
    copies = 2 + bool(protocol["optimiser"]["ema"])
    return Pilot(
        protocol_id=record.protocol_id,
        label=record.label,
        mixer=record.run["mixer"],
        device=device_label(record.environment.device, record.environment.world),
        world=record.environment.world,
        steps=protocol["budget"]["steps"],
        startup=cost.startup,
        first_step=cost.first_step,
        step_p10=cost.step_p10,
        step_p50=cost.step_p50,
        step_p90=cost.step_p90,
        evaluation=cost.evaluation,
        peak_memory=cost.peak_memory,
        weights_bytes=weights_bytes,
        checkpoint_bytes=weights_bytes + copies * WEIGHT_BYTES * record.capacity.parameters,
        record_bytes=len(dump(record)),
        torch=record.environment.torch,
        time=time,
    )


def append_pilot(path: Path, pilot: Pilot) -> None:
    """Add one line, whole, in one write: several machines may measure at once. One that a dead writer cut is ended."""
    line = json.dumps(asdict(pilot), sort_keys=True, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+", buffering=0) as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else "\n" + line
        file.write(line.encode())
        os.fsync(file.fileno())
