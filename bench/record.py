"""The record: the one small JSON that a run ends with. Its schema, its strict reading, and the items beside it.

A record exists only for outcomes of the science ('ok', 'diverged', 'unfit'); a failure is another file (store.py).
"""

import gc
import json
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from bench import Refusal
from bench.config import build, digest

SCHEMA = 1
OUTCOMES = ("ok", "diverged", "unfit")
# A field added after the first committed record has one neutral value here, at which it is not written, so that old
# records read, and are written again, as they are. Append only.
YOUNGER: dict[str, object] = {"registration": "", "chosen": None, "card": ""}


@dataclass(frozen=True)
class Hashes:
    """SHA-256 (first 16 hex digits) of what must be equal for every arm of one seed."""

    shared_init: str  # names, shapes and values of all parameters outside the mixer, as drawn
    batches: str  # content of the first batch and items of the first hundred
    optimiser_groups: str  # rule and members outside the mixer


@dataclass(frozen=True)
class Capacity:
    parameters: int
    mixer_parameters: int  # all parameters that exist for the mixer only: its own, its feature projections and taps
    flops: int  # of the mixers' forward pass for one sequence of full length, all layers
    state_per_head: int  # numbers; -1: grows with the length


@dataclass(frozen=True)
class Environment:
    commit: str  # '+changes' if files differed, '' outside git; provenance only, the digests count
    python: str
    torch: str
    packages: dict[str, str]  # versions of the other libraries whose draws, kernels or decoders make the numbers
    device: str  # model name
    world: int
    threads: int
    precision: str
    backend: str
    compiled: bool
    micro_batches: int
    node: str


@dataclass(frozen=True)
class Cost:
    """Seconds, bytes and tokens of this run alone."""

    wall: float
    startup: float  # data, model, first batch
    first_step: float  # compilation included
    evaluation: float
    step_p10: float
    step_p50: float
    step_p90: float
    peak_memory: int  # bytes: of the device if it is a GPU, else resident in the host
    tokens: int  # positions processed in training, padding included


@dataclass(frozen=True)
class Chosen:
    """Of a run whose point only says whose values it gets: these values, and what was looked at."""

    point: dict  # {} if no trial came out
    trials: tuple[tuple[str, str], ...]  # id of each run and its outcome, or the kind of its last failure


@dataclass(frozen=True)
class Record:
    schema: int
    id: str
    outcome: str
    reason: str
    label: str
    protocol_id: str
    run: dict
    digests: dict[str, str]
    hashes: Hashes
    capacity: Capacity
    # |M v| / |v| of each layer (and direction) at initialisation, before calibration; () if weights came from a parent
    gain: tuple[float, ...]
    gain_varying: tuple[float, ...]  # the part of it that varies over tokens
    environment: Environment
    cost: Cost
    metrics: dict[str, float]
    curve: tuple[tuple[int, float], ...]  # (optimiser steps done, training loss), at most 64 points
    finished: str  # UTC, ISO 8601
    registration: (
        str  # hash of what the run's sweep declared to test, as it stood when the run began; '' outside a sweep
    )
    chosen: Chosen | None
    card: str  # UUID of the (first rank's) GPU, whose time all runs on it share; '' on a CPU

    def __post_init__(self):
        if self.outcome not in OUTCOMES:
            raise Refusal(f"record outcome {self.outcome!r} is not one of {', '.join(OUTCOMES)}")
        if digest(self.run) != self.id:
            raise Refusal(f"record {self.id} holds a run whose id is {digest(self.run)}")
        try:
            datetime.fromisoformat(self.finished)
        except ValueError:
            raise Refusal(f"record.finished must be a time in ISO 8601, got {self.finished!r}") from None

    @property
    def seed(self) -> int:
        return self.run["seed"]

    @property
    def commit(self) -> str:
        return self.environment.commit


def dump(record: Record) -> str:
    """Canonical one-line JSON text."""
    values = {k: v for k, v in asdict(record).items() if k not in YOUNGER or v != YOUNGER[k]}
    return json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)


RESTORE = "restore the file"  # of many records: whoever deletes it loses them all
RERUN = "delete it and run again, or restore it"


def parse(text: str, source: str, remedy: str) -> Record:
    """A record from its JSON text; `source` names it in the error, and `remedy` says what to do about it."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise Refusal(f"{source}: not a whole record ({error}); {remedy}") from None
    if isinstance(values, dict) and "schema" in values and values["schema"] != SCHEMA:
        # Before the strict build, which would only find the other schema's first key unknown.
        raise Refusal(f"{source}: record schema {values['schema']} is not known; this version reads: {SCHEMA}")
    try:
        return build(Record, YOUNGER | values if isinstance(values, dict) else values, "record")
    except Refusal as error:
        raise Refusal(f"{source}: {error}; {remedy}") from None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(f"{path} cannot be read: {error}") from None


def read_record(path: Path, run_id: str, remedy: str) -> Record:
    """The record in a file; a Refusal for one that is not that of `run_id` ('': of any run)."""
    record = parse(_text(path), str(path), remedy)
    if run_id not in ("", record.id):
        raise Refusal(f"{path} is the record of run {record.id}, not of {run_id}; {remedy}")
    return record


def read_records(path: Path) -> dict[str, Record]:
    """All records of a .jsonl file, by id, in the order of its lines."""
    records = {}
    for number, line in enumerate(_text(path).splitlines(), 1):
        record = parse(line, f"{path}:{number}", RESTORE)
        if record.id in records:
            raise Refusal(f"{path}:{number}: record {record.id} occurs twice")
        records[record.id] = record
    return records


class United:
    """Records of several files by id; two different ones of one id are a Refusal that names both places."""

    def __init__(self):
        self.records: dict[str, Record] = {}
        self.places: dict[str, str] = {}

    def add(self, record: Record, place: str) -> None:
        if record.id in self.records and dump(self.records[record.id]) != dump(record):
            differs = f"record {record.id} differs from that of {self.places[record.id]}"
            raise Refusal(f"{place}: {differs}; remove one of them")
        self.records[record.id] = record
        self.places.setdefault(record.id, place)

    def add_lines(self, path: Path) -> None:
        """All of a .jsonl file."""
        for number, record in enumerate(read_records(path).values(), 1):
            self.add(record, f"{path}:{number}")


def write_items(path: Path, run_id: str, items: dict[str, dict]) -> None:
    """Per-example outcomes of all reported sets as one Parquet file: columns run, part and the task's own."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = []
    for part, columns in items.items():
        n = len(next(iter(columns.values())))
        tables.append(pa.table({"run": [run_id] * n, "part": [part] * n, **columns}))
    pq.write_table(pa.concat_tables(tables, promote_options="default"), path, compression="zstd")


@contextmanager
def uncollected():
    """Without the cyclic garbage collector, which would look through ten thousand records again and again."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
