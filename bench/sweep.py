"""A sweep file: protocols x mixers (with their own axes) x seeds x replicas -> runs in the order of their training.

There is no syntax for 'this mixer with another learning rate'. Two declared exceptions make derived protocols with ids
of their own: `varies` (a response axis, for every mixer alike) and `departures` (a named confound of one mixer).
"""

import dataclasses
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from bench import Refusal
from bench.compose import compose_group, load_yaml, make_run
from bench.config import Run, build


@dataclass(frozen=True)
class Departure:
    mixer: dict  # `name` and any own keys: the arms that it applies to
    set: dict  # protocol keys without the leading 'protocol.' -> value
    source: str  # why: where the confound is documented


@dataclass(frozen=True)
class Column:
    """One column of the sweep's table: a protocol's label and one of its task's metrics."""

    protocol: str
    metric: str


@dataclass(frozen=True)
class Sweep:
    name: str
    question: str  # one line, printed above the table
    protocols: tuple[str, ...]
    mixers: tuple[dict, ...]  # each `name` and own keys; a list of values is an axis
    seeds: tuple[int, ...]
    replicas: tuple[int, ...]  # of the protocols that start from a parent; others have replica 0 only
    varies: dict[str, list]  # protocol key -> values
    departures: tuple[Departure, ...]
    columns: tuple[Column, ...]


@dataclass(frozen=True)
class Arm:
    """One row of a table: a mixer with fixed arguments and the departures that apply to it."""

    mixer: str
    changes: dict  # 'mixer.…' keys
    departed: dict  # 'protocol.…' keys


class Cell(NamedTuple):
    """One place of the sweep's product and the run that belongs there."""

    protocol: str  # label: the protocol's name and what varies, departures left out
    arm: Arm
    variation: dict  # 'protocol.…' keys
    seed: int
    replica: int
    run: Run


def load(path: Path) -> Sweep:
    values = load_yaml(path)
    keys = [f.name for f in dataclasses.fields(Sweep) if f.name != "name"]
    if not isinstance(values, dict) or not values:
        raise Refusal(f"{path} must be a mapping with the keys {', '.join(keys)}")
    for key in values:
        if key not in keys:
            raise Refusal(f"unknown key 'sweep.{key}' in {path}; allowed: {', '.join(keys)}")
    sweep = build(Sweep, {**values, "name": path.stem}, "sweep")
    for key in ("protocols", "mixers", "seeds", "replicas", "columns"):
        if not getattr(sweep, key):
            raise Refusal(f"sweep.{key} is empty in {path}: the sweep has no run")
    for key, given in sweep.varies.items():
        if not given:
            raise Refusal(f"sweep.varies.{key} is empty in {path}: the sweep has no run")
    for key in (*sweep.varies, *(k for d in sweep.departures for k in d.set)):
        if key.split(".")[0] == "init":
            raise Refusal(f"sweep: '{key}' cannot be changed, it names the parent protocol")
    return sweep


def arms(sweep: Sweep) -> list[Arm]:
    found, used = [], set()
    for mixer in sweep.mixers:
        if not isinstance(mixer.get("name"), str):
            raise Refusal("sweep.mixers: every entry needs a name")
        axes = {k: v if isinstance(v, list) else [v] for k, v in mixer.items() if k != "name"}
        if empty := [k for k, values in axes.items() if not values]:
            raise Refusal(f"sweep.mixers: {mixer['name']}.{empty[0]} is empty: the sweep has no such run")
        whole = compose_group("mixer", mixer["name"])  # a departure may also match what the sweep leaves as it is
        for values in itertools.product(*axes.values()):
            own = dict(zip(axes, values, strict=True))
            departed = {}
            for number, departure in enumerate(sweep.departures):
                if all({**whole, **own}.get(k) == v for k, v in departure.mixer.items()):
                    departed |= {f"protocol.{k}": v for k, v in departure.set.items()}
                    used.add(number)
            found.append(Arm(mixer["name"], {f"mixer.{k}": v for k, v in own.items()}, departed))
    unused = [str(d.mixer) for n, d in enumerate(sweep.departures) if n not in used]
    if unused:
        raise Refusal(f"sweep.departures: no arm of the sweep matches {', '.join(unused)}")
    return found


def variations(sweep: Sweep) -> list[dict]:
    """Each combination of the varied keys' values, as 'protocol.…' changes; one empty one if nothing varies."""
    keys = [f"protocol.{k}" for k in sweep.varies]
    return [dict(zip(keys, values, strict=True)) for values in itertools.product(*sweep.varies.values())]


def cells(sweep: Sweep) -> list[Cell]:
    """The sweep's product, arm by arm within each seed. The same run may occur twice if the file lists it twice."""
    every = arms(sweep)
    columns = itertools.product(sweep.protocols, variations(sweep))
    plain = [(protocol, v, make_run(protocol, every[0].mixer, v, 0, 0)) for protocol, v in columns]
    found = []
    for seed, arm, (protocol, variation, base), replica in itertools.product(sweep.seeds, every, plain, sweep.replicas):
        if replica and base.parent is None:
            continue
        run = make_run(protocol, arm.mixer, {**variation, **arm.departed, **arm.changes}, seed, replica)
        found.append(Cell(base.label, arm, variation, seed, replica, run))
    return found


def grid(sweep: Sweep) -> list[Run]:
    """The runs that the sweep asks for, each once (parents that it does not list are not among them)."""
    runs: dict[str, Run] = {}
    for cell in cells(sweep):
        runs.setdefault(cell.run.id, cell.run)
    return list(runs.values())


def ordered(runs: list[Run]) -> list[Run]:
    """All runs and their parents, seed by seed and each chain depth first: an interruption costs one chain at most."""
    children: dict[str, list[Run]] = {}
    every: dict[str, Run] = {}
    for run in runs:
        while run is not None and run.id not in every:
            every[run.id] = run
            children.setdefault(run.parent.id if run.parent else "", []).append(run)
            run = run.parent
    found: list[Run] = []

    def visit(run: Run) -> None:
        found.append(run)
        for child in children.get(run.id, ()):
            visit(child)

    for root in sorted(children.get("", ()), key=lambda r: r.seed):
        visit(root)
    return found


def named(run: Run) -> str:
    """'low_rank sam heads=4 … seed 0' for people."""
    args = run.mixer.args.items()
    own = [(v if isinstance(v, str) else "sam" if v else "not sam") if k == "sam" else f"{k}={v}" for k, v in args]
    replica = f" replica {run.replica}" if run.replica else ""
    return f"{run.mixer.name} {' '.join(own)} seed {run.seed}{replica}"
