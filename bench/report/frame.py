"""The gate: a table exists only if, inside each of its columns, nothing but mixer, seed and replica differs.

A column is one protocol x one metric; a block is the arms of one seed inside it. Both are compared on what the records
hold, not on names: protocols key by key, digests of the shared code, hashes of initialisation, batches and optimiser.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from bench import Refusal
from bench import sweep as sweeps
from bench.config import CHAIN, LENGTH, MISALIGNED, NEUTRAL, digest, resolved_mixer
from bench.record import Record
from bench.report.values import ABSENT, flattened, same
from bench.report.values import nested as nested
from bench.report.values import plain as plain
from bench.store import Store
from bench.sweep import Column, Sweep
from bench.sweep import written_out as written_out


class Level(NamedTuple):
    """How a value of a mixer's `sam` is written."""

    label: str  # after the mixer's name
    cell: str  # in the column 'SAM'


LEFT_OUT = "Left out: "  # begins the note on seeds that are not whole
LEVELS = {False: Level("", "no"), True: Level(" SAM", "yes"), MISALIGNED: Level(" misaligned", "misaligned")}
# Which departures, and values that tuning chose, move which fact of a block. An arm is compared with those that have
# the same values of these keys.
MOVED_BY = {
    "shared initialisation": ("backbone", "shell", "task"),
    "batches": ("task", "budget"),
    "optimiser groups": ("backbone", "shell", "task", "optimiser"),
    "precision": ("precision",),
}


@dataclass(frozen=True)
class Row:
    """One run that the sweep asks for, and its record if there is one."""

    protocol: str  # label of the column's protocol: its name and what varies, departures left out
    mixer: dict  # name and arguments, resolved
    seed: int
    replica: int
    run_id: str
    record: Record | None

    @cached_property
    def arm(self) -> str:
        return digest({"mixer": self.mixer})

    @cached_property
    def shared(self) -> str:
        return digest({key: self.record.run[key] for key in ("protocol", "point")})  # what departures may move

    @property
    def point(self) -> dict:
        """The values that tuning chose for the run; {} without tuning."""
        return self.record.chosen.point if self.record and self.record.chosen else {}

    @property
    def trained(self) -> bool:
        """False for a run that ended before its first step (unfit, or a parent that is not ok): it has no hashes."""
        return self.record.outcome == "ok" or self.record.hashes.batches != ""


@dataclass(frozen=True)
class Arm:
    """One line of the table."""

    key: str
    name: str  # short and unique in its table; what refusals say, which list no departures
    label: str  # name and mark, which all that a report writes says
    mark: str  # ' [2]', the number of what it departs by, or ''
    mixer: dict
    departed: dict  # protocol key -> value, as declared in the sweep
    sources: tuple[str, ...]  # of its departures


@dataclass(frozen=True)
class Table:
    """What passed the gate: for every column, arm and seed (and replica) one row with a record."""

    sweep: Sweep
    columns: tuple[Column, ...]  # `varies` written out
    axes: tuple[str, ...]  # the mixers' own keys that take several values, beside name and sam
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    edges: frozenset[tuple[str, str]]  # (arm's key, protocol) whose tuned point lies on the edge of its space
    beside: tuple[Record, ...]  # records that may have shared a device with these runs, these among them or not

    @cached_property
    def places(self) -> dict[tuple, list[Row]]:
        """(protocol,) and (protocol, arm's key) -> rows."""
        found: dict[tuple, list[Row]] = {}
        for row in self.rows:
            found.setdefault((row.protocol,), []).append(row)
            found.setdefault((row.protocol, row.arm), []).append(row)
        return found

    def of(self, protocol: str) -> list[Row]:
        return self.places.get((protocol,), [])

    def cell(self, protocol: str, arm: Arm) -> list[Row]:
        return self.places.get((protocol, arm.key), [])

    @cached_property
    def primary(self) -> Column:
        """The declared one; of a protocol that varies in one value, that variation of it."""
        declared = self.sweep.family.primary
        own = [c for c in self.columns if Column(c.protocol.split("[", 1)[0], c.metric) == declared]
        return own[0] if len(own) == 1 else declared

    def protocols(self) -> list[str]:
        return list(dict.fromkeys(c.protocol for c in self.columns))


def rows(sweep: Sweep, store: Store) -> list[Row]:
    """Every cell of the sweep with its record. One arm that is listed twice is one arm."""
    found: dict[tuple, Row] = {}
    for cell in sweeps.cells(sweep):
        run_id, mixer = cell.run.id, resolved_mixer(cell.run)
        row = Row(cell.protocol, mixer, cell.seed, cell.replica, run_id, store.record(run_id))
        found.setdefault((row.protocol, row.arm, row.seed, row.replica), row)
    return list(found.values())


class Incomplete(Refusal):
    """No seed of a sweep is whole; how many runs have a record, and not where that was looked for."""


def controlled(rows: list[Row], sweep: Sweep) -> Table:
    """The table of the rows, or a Refusal that names what is not controlled."""
    columns = written_out(sweep, list(dict.fromkeys(r.protocol for r in rows)))
    shown = [r for r in rows if r.protocol in {c.protocol for c in columns}]
    arms, axes = arms_of(shown, sweep)
    seeds, notes = complete_seeds(shown, sweep)
    kept = tuple(r for r in shown if r.seed in seeds)
    table = Table(sweep, columns, axes, arms, seeds, kept, (), frozenset(), ())
    for column in {c.protocol: c for c in reversed(columns)}.values():
        check_protocols(table, column)
        for seed in seeds:
            check_block(table, column, seed)
    for column in columns:
        check_metric(table, column)
    return Table(sweep, columns, axes, arms, seeds, kept, (*notes, *seed_notes(table)), frozenset(), ())


def arms_of(rows: list[Row], sweep: Sweep) -> tuple[tuple[Arm, ...], tuple[str, ...]]:
    """The arms in the sweep's order, and the mixer keys that deserve a column: those with several values among them."""
    mixers = {r.arm: r.mixer for r in rows}
    keys = dict.fromkeys(k for m in mixers.values() for k in m if k not in ("name", "sam", "salt"))

    def several(key: str, among) -> bool:
        return len({digest({"": m[key]}) for m in among if key in m}) > 1

    axes = tuple(k for k in keys if several(k, mixers.values()))
    arms: list[Arm] = []
    numbers: dict[tuple, int] = {}  # of what arms depart by
    for key, mixer in mixers.items():
        alike = [m for m in mixers.values() if (m["name"], m["sam"]) == (mixer["name"], mixer["sam"])]
        own = [f"{k} {plain(mixer[k])}" for k in axes if several(k, alike)]
        own += [f"A/A {mixer['salt']}"] if mixer.get("salt", 0) else []
        if mixer["sam"] not in LEVELS:
            raise Refusal(f"mixer '{mixer['name']}': sam={mixer['sam']}; it can be false, true or misaligned")
        name = ", ".join([f"{mixer['name']}{LEVELS[mixer['sam']].label}", *own])
        declared = departures(sweep, mixer)
        departed = {k: v for d in declared for k, v in d.set.items()}
        sources = tuple(d.source for d in declared)
        told = mixer["name"], digest({"": departed}), sources
        mark = f" [{numbers.setdefault(told, len(numbers) + 1)}]" if departed else ""
        arms.append(Arm(key, name, name + mark, mark, mixer, departed, sources))
    return tuple(arms), axes


def departures(sweep: Sweep, mixer: dict) -> list[sweeps.Departure]:
    return [d for d in sweep.departures if all(mixer.get(k) == v for k, v in d.mixer.items())]


def complete_seeds(rows: list[Row], sweep: Sweep) -> tuple[tuple[int, ...], list[str]]:
    """Seeds for which every arm has a record in every column, and a note on the others."""
    missing = {s: sum(r.seed == s and r.record is None for r in rows) for s in dict.fromkeys(r.seed for r in rows)}
    have = len(rows) - sum(missing.values())
    if not have:
        raise Incomplete(f"no records for sweep '{sweep.name}' ({len(rows)} runs are missing)")
    seeds = tuple(s for s, n in missing.items() if n == 0)
    each = ", ".join(f"seed {s} ({n} run{'s' * (n > 1)} missing)" for s, n in missing.items() if n)
    if not seeds:
        some = f"{have} of {len(rows)} runs have a record: {each}"
        raise Incomplete(f"sweep '{sweep.name}': no seed is complete, {some}")
    cure = f"`mixerbench sweep sweeps/{sweep.name}.yaml` completes it"  # no path: the same records, the same bytes
    return seeds, [f"{LEFT_OUT}{each}; {cure}."] if each else []


# One column ---------------------------------------------------------------------------------------------------------


def check_protocols(table: Table, column: Column) -> None:
    """Refuse a column in which a key of the resolved protocol differs, other than where a departure declares it."""
    rows, arms = table.of(column.protocol), {a.key: a for a in table.arms}
    for row in rows:
        if row.record.id != row.run_id:
            wrong = f"the record of run {row.run_id} is that of run {row.record.id}"
            raise Refusal(f"{title(column)}: {wrong}; delete the copy and run again")
        for key, value in arms[row.arm].departed.items():
            if not same(value, found := protocol_value(row.record.run, key)):
                raise Refusal(
                    f"{title(column)} is not controlled: the sweep declares protocol.{key} = {plain(value)} for "
                    f"{arms[row.arm].name}, its run {row.run_id} has {plain(found)}"
                )
    if len({row.shared for row in rows}) == 1:
        return
    flat = [(row, flattened({key: row.record.run[key] for key in ("protocol", "point")})) for row in rows]
    differing = []
    for key in dict.fromkeys(k for _, values in flat for k in values):
        # A key that is younger than a record has its neutral value there.
        neutral = NEUTRAL.get(key, ABSENT)
        pairs = [(row, values.get(key, neutral)) for row, values in flat if not excused(key, arms[row.arm].departed)]
        if not all(same(value, pairs[0][1]) for _, value in pairs):
            differing.append(f"{key}: {split(pairs, table)}")
    if differing:
        raise Refusal(f"{title(column)} is not controlled, only mixer and seed may differ: {'; '.join(differing)}")


def excused(key: str, departed: dict) -> bool:
    """Whether a departure declares that `key` differs; a child's `init` follows backbone, shell and length."""
    if key == "protocol.init":
        return any(f"protocol.{k}.".startswith((*CHAIN, f"{LENGTH}.")) for k in departed)
    return any(f"{key}.".startswith(f"protocol.{k}.") for k in departed)


def check_block(table: Table, column: Column, seed: int) -> None:
    """Refuse a block whose arms differ in shared code, libraries, device, precision, first values or batches."""
    arms = {a.key: a for a in table.arms}
    rows = [row for row in table.of(column.protocol) if row.seed == seed and row.trained]
    declared = dict.fromkeys(k for row in rows for k in (*arms[row.arm].departed, *row.point))
    groups: dict[tuple, list[tuple[Row, str]]] = {}
    for row in rows:
        code = {(f"code of {name}", 0): value for name, value in row.record.digests.items()}
        for (fact, replica), value in (facts(row) | code).items():
            keys = [k for k in declared if k.split(".")[0] in MOVED_BY.get(fact, ())]
            own = {k: row.point[k] if k in row.point else protocol_value(row.record.run, k) for k in keys}
            groups.setdefault((fact, replica, digest(own) if own else ""), []).append((row, value))
    wrong = [f"{fact}: {split(pairs, table)}" for (fact, *_), pairs in groups.items() if len({v for _, v in pairs}) > 1]
    if wrong:
        raise Refusal(
            f"{title(column)}, seed {seed}, is not controlled, the arms of one seed must agree: {'; '.join(wrong)}; "
            "delete the odd runs and run them again with the others' code and device"
        )


def facts(row: Row) -> dict[tuple[str, int], str]:
    """What must be equal for the arms of one seed: (name, replica that it is bound to or 0) -> value."""
    record = row.record
    return {
        **{(f"code of {name}", 0): value for name, value in shared_code(record).items()},
        **{(name, 0): version for name, version in shared_packages(record).items()},
        ("torch", 0): record.environment.torch,
        ("device", 0): record.environment.device,
        ("precision", 0): record.environment.precision,
        ("shared initialisation", row.replica): record.hashes.shared_init,
        ("batches", row.replica): record.hashes.batches,
        ("optimiser groups", row.replica): record.hashes.optimiser_groups,
    }


def shared_code(record: Record) -> dict[str, str]:
    """Digests of the files outside the mixers: those of all arms. What some mixers share is compared where they do."""
    return {k: v for k, v in record.digests.items() if not k.startswith("mixers/") or k == "mixers/base"}


def shared_packages(record: Record) -> dict[str, str]:
    """Versions of the libraries, but not of the distribution that brought the mixer: that is the mixer's own."""
    own = {name.split("/")[1] for name in record.digests if name.startswith("mixers/") and name.count("/") > 1}
    return {name: version for name, version in record.environment.packages.items() if name not in own}


def check_metric(table: Table, column: Column) -> None:
    for row in table.of(column.protocol):
        if row.record.outcome == "ok" and column.metric not in row.record.metrics:
            exist = ", ".join(sorted(row.record.metrics)) or "none"
            raise Refusal(f"{title(column)}: run {row.run_id} has no metric '{column.metric}'; it has: {exist}")


def seed_notes(table: Table) -> list[str]:
    """What differs between blocks: no fault, since arms are compared within a seed, but the reader should know."""
    notes: dict[str, list[str]] = {}
    for protocol in table.protocols():
        facts_of = {}
        for row in table.of(protocol):
            if row.trained:
                common = {fact: value for (fact, _), value in facts(row).items() if fact not in MOVED_BY}
                common |= {f"code of {name}": value for name, value in row.record.digests.items()}  # mixers' too
                facts_of.setdefault(row.seed, {}).update(common)
        for fact in dict.fromkeys(f for values in facts_of.values() for f in values):
            seeds: dict[str, list[int]] = {}
            for seed, values in facts_of.items():
                if fact in values:
                    seeds.setdefault(values[fact], []).append(seed)
            if len(seeds) > 1:
                text = ", ".join(f"{value} ({seeds_text(s)})" for value, s in seeds.items())
                note = f"seeds differ in {fact}: {text}; arms are compared within a seed."
                notes.setdefault(note, []).append(protocol)
    return [f"{', '.join(protocols)}: {text}" for text, protocols in notes.items()]


# Words --------------------------------------------------------------------------------------------------------------


def title(column: Column) -> str:
    return f"column '{column.protocol} x {column.metric}'"


def split(pairs: list[tuple[Row, object]], table: Table) -> str:
    """'0.001 (dense, toeplitz), 0.002 (attention SAM)'; seeds are named where one arm has several values."""
    labels = {a.key: a.name for a in table.arms}
    values: dict[str, list[Row]] = {}
    for row, value in pairs:
        values.setdefault(plain(value), []).append(row)
    count = {key: sum(key in {r.arm for r in rows} for rows in values.values()) for key in labels}
    texts = []
    for value, rows in values.items():
        names = dict.fromkeys(labels[r.arm] + (f" seed {r.seed}" if count[r.arm] > 1 else "") for r in rows)
        shown = [*list(names)[:4], *([f"{len(names) - 4} more"] if len(names) > 4 else [])]
        texts.append(f"{value} ({', '.join(shown)})")
    return ", ".join(texts)


def seeds_text(seeds: list[int]) -> str:
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def protocol_value(run: dict, key: str):
    """A value of a record's protocol: of a key that is younger than the record, its neutral one."""
    found = nested(run["protocol"], key)
    return NEUTRAL.get(f"protocol.{key}", ABSENT) if found is ABSENT else found
