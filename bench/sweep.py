"""A sweep file: protocols x mixers (with their own axes) x seeds x replicas -> runs in the order of their training.

There is no syntax for 'this mixer with another learning rate'. Two declared exceptions make derived protocols with ids
of their own: `varies` (a response axis, for every mixer alike) and `departures` (a named confound of one mixer).
`family` declares before the first run what the report will test, `controls` what it will not; a hash of both goes into
every record of the sweep.
"""

import dataclasses
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, get_origin

from bench import Refusal
from bench.compose import compose_group, load_yaml, make_run
from bench.config import Run, at_least, build, digest, listed, one_of
from bench.matching import arms_text, matched, no_arm
from bench.space import OWN


@dataclass(frozen=True)
class Departure:
    mixer: dict  # `name` and own keys, or some of them: the arms that it applies to
    set: dict  # protocol keys without the leading 'protocol.' -> value
    source: str  # why: where the confound is documented

    def __post_init__(self):
        if not (self.mixer and self.set and self.source):
            raise Refusal(f"sweep.departures: mixer, set and source may not be empty, got {vars(self)}")


@dataclass(frozen=True)
class Column:
    """One column of the sweep's table: a protocol's label and one of its task's metrics."""

    protocol: str
    metric: str


SPACE = "tune.space"  # a departure may let one mixer tune other keys, its own too, in as many trials
TAKEN = ("logs", "runs", "show", "slurm", "tune")  # folders of results beside those of sweeps
AGAINST, SAM, PARTS = "reference", "sam", "parts"  # kinds of comparisons; each is a family of its own for Holm


@dataclass(frozen=True)
class Family:
    """What the report tests, declared before the runs. Columns other than `primary` are exploration."""

    reference: dict  # `name` and any own keys of the one arm that others are compared with; {} without 'reference'
    # 'reference': each arm against it; 'sam': SAM against not SAM of each mixer; 'parts': misaligned against not SAM
    # (data dependence) and SAM against misaligned (alignment)
    comparisons: tuple[str, ...]
    primary: Column  # written out where a protocol varies: 'x[budget.steps=2]'
    margin: float  # differences within ± margin count as equivalent; in the primary metric's units, 0: no such test
    alpha: float  # family-wise error; intervals have level 1 - alpha

    def __post_init__(self):
        for kind in self.comparisons:
            one_of("sweep.family.comparisons", kind, (AGAINST, SAM, PARTS))
        at_least("sweep.family", self, {"margin": 0})
        if not 0 < self.alpha < 1:
            raise Refusal(f"sweep.family.alpha must lie between 0 and 1, got {self.alpha}")
        if bool(self.reference) != (AGAINST in self.comparisons):
            raise Refusal("sweep.family.reference names an arm if 'reference' is among its comparisons, and only then")


@dataclass(frozen=True)
class Sweep:
    name: str
    question: str  # one line, printed above the table
    protocols: tuple[str, ...]
    mixers: tuple[dict, ...]  # each `name` and own keys; a list of values is an axis; `salt: 1` makes an A/A arm
    seeds: tuple[int, ...]
    replicas: tuple[int, ...]  # of the protocols that start from a parent; others have replica 0 only
    varies: dict[str, list]  # protocol key -> values
    departures: tuple[Departure, ...]
    columns: tuple[Column, ...]
    family: Family
    controls: tuple[dict, ...]  # arms that are shown and stand in no declared family; a file without the key has none

    @property
    def registration(self) -> str:
        """Hash of what was declared: family, metric, margin, alpha, seeds and replicas, and the arms that span it."""
        values = dataclasses.asdict(self)
        keys = ["family", "seeds", "replicas", "protocols", "mixers", "varies", "departures"]
        keys += ["controls"] if self.controls else []  # the key is younger than the first records
        return digest({"registration": [[k, values[k]] for k in keys]})


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
    if path.stem in TAKEN:
        raise Refusal(f"{path}: results folders keep something else under '{path.stem}'; give the file another name")
    values = load_yaml(path)
    keys = [f.name for f in dataclasses.fields(Sweep) if f.name != "name"]
    if not isinstance(values, dict) or not values:
        raise Refusal(f"{path} must be a mapping with the keys {', '.join(keys)}")
    if odd := [key for key in values if key not in keys]:
        raise Refusal(f"unknown key 'sweep.{odd[0]}' in {path}; allowed: {', '.join(keys)}")
    needed, values = [key for key in keys if key != "controls"], {"controls": [], **values}
    if missing := [key for key in needed if key not in values]:
        raise Refusal(f"missing key 'sweep.{missing[0]}' in {path}; a sweep needs: {', '.join(needed)}")
    for field in dataclasses.fields(Sweep):
        if get_origin(field.type) is tuple and not isinstance(values[field.name], list):
            raise Refusal(f"sweep.{field.name} must be a list in {path}, got {values[field.name]!r}")
    try:
        sweep = build(Sweep, {**values, "name": path.stem}, "sweep")
    except Refusal as error:
        raise Refusal(f"{path}: {error}") from None
    require_lists(sweep, path)
    for key in (*sweep.varies, *(k for d in sweep.departures for k in d.set)):
        if key.split(".")[0] == "init":
            raise Refusal(f"sweep: '{key}' cannot be changed, it names the parent protocol")
    for key in (k for d in sweep.departures for k in d.set):
        if key.split(".")[0] == "tune" and key != SPACE:
            raise Refusal(f"sweep.departures: '{key}' would give a mixer a budget of its own; allowed: {SPACE}")
        if key in sweep.varies and key != SPACE:
            raise Refusal(f"sweep.departures: '{key}' varies for every mixer alike, so none can depart in it")
    require_primary(sweep, path)
    return sweep


def require_lists(sweep: Sweep, path: Path) -> None:
    """Refuse a list that is empty, or that has a value twice: its table would have fewer seeds than one reads there."""
    once = {key: getattr(sweep, key) for key in ("protocols", "seeds", "replicas")}
    once |= {f"varies.{key}": values for key, values in sweep.varies.items()}
    for key, values in (once | {"mixers": sweep.mixers, "columns": sweep.columns}).items():
        if not values:
            raise Refusal(f"sweep.{key} is empty in {path}: the sweep has no run")
    for key, values in once.items():
        if len({digest({f"sweep.{key}": value}) for value in values}) < len(values):
            raise Refusal(f"sweep.{key} lists a value twice in {path}: {listed(values)}")


def require_primary(sweep: Sweep, path: Path) -> None:
    """Refuse a primary column that is none of the columns. Which metrics a task has only the task knows, and torch."""
    columns = [(c.protocol, c.metric) for c in sweep.columns]
    protocol, metric = sweep.family.primary.protocol, sweep.family.primary.metric
    names = (protocol, protocol.split("[", 1)[0])
    if any((name, metric) in columns for name in names):
        return
    others = [own for name, own in columns if name in names]
    if others:  # either of the two may be the misspelt one
        differ = f"sweep.family.primary has the metric '{metric}' of '{protocol}', sweep.columns has: {listed(others)}"
        raise Refusal(f"{path}: {differ}; both must name the same metric of its task")
    has = ", ".join(" x ".join(c) for c in columns)
    raise Refusal(f"sweep.family.primary: '{protocol} x {metric}' is not a column of {path}; it has: {has}")


def written_out(sweep: Sweep, labels: list[str]) -> tuple[Column, ...]:
    """The sweep's columns; one that names a protocol that varies stands for all its variations."""
    found = {}
    for column in sweep.columns:
        matches = [label for label in labels if column.protocol in (label, label.split("[", 1)[0])]
        if not matches:
            wrong = f"column '{column.protocol} x {column.metric}': no such protocol in sweep '{sweep.name}'"
            raise Refusal(f"{wrong}; it has: {', '.join(labels)}")
        found |= {(label, column.metric): Column(label, column.metric) for label in matches}
    return tuple(found.values())


def require_one(sweep: Sweep, labels: list[str]) -> None:
    """Refuse a primary column that is several, since its protocol varies, or none of them."""
    protocol = sweep.family.primary.protocol
    each = [label for label in labels if label.split("[", 1)[0] == protocol.split("[", 1)[0]]
    if protocol not in each and (len(each) > 1 or "[" in protocol):
        raise Refusal(f"sweep.family.primary: '{protocol}' must be one of {listed(each)}, since the sweep varies it")


def arms(sweep: Sweep) -> list[Arm]:
    found, wholes = [], []
    for mixer in sweep.mixers:
        if not isinstance(mixer.get("name"), str):
            raise Refusal("sweep.mixers: every entry needs a name")
        axes = {k: v if isinstance(v, list) else [v] for k, v in mixer.items() if k != "name"}
        if empty := [k for k, values in axes.items() if not values]:
            raise Refusal(f"sweep.mixers: {mixer['name']}.{empty[0]} is empty: the sweep has no such run")
        whole = compose_group("mixer", mixer["name"])  # a departure may also match what the sweep leaves as it is
        if odd := [k for k in axes if k.split(".")[0] not in (*whole, "salt")]:
            raise Refusal(f"sweep.mixers: {mixer['name']} has no key '{odd[0]}'; it has: {listed([*whole, 'salt'])}")
        for values in itertools.product(*axes.values()):
            own, departed = dict(zip(axes, values, strict=True)), {}
            for departure in sweep.departures:
                if matched(departure.mixer, {**whole, **own}):
                    if both := [k for k in departure.set if f"protocol.{k}" in departed]:
                        raise Refusal(f"sweep.departures: two set '{both[0]}' for one; {arms_text([{**whole, **own}])}")
                    departed |= {f"protocol.{k}": v for k, v in departure.set.items()}
            found.append(Arm(mixer["name"], {f"mixer.{k}": v for k, v in own.items()}, departed))
            wholes.append({**whole, **own})
    if unused := [d.mixer for d in sweep.departures if not any(matched(d.mixer, whole) for whole in wholes)]:
        raise Refusal(f"sweep.departures: {no_arm(unused[0], wholes)}")
    check_reference(sweep.family.reference, wholes)
    check_controls(sweep, wholes)
    return found


def check_reference(reference: dict, mixers: list[dict]) -> None:
    """Refuse a reference that no arm or more than one is; an arm that the file lists twice is one."""
    plain = [m for m in mixers if not m.get("salt", 0)]  # an A/A arm is no reference
    matches = {digest({"mixer": m}): m for m in plain if matched(reference, m)}
    if reference and len(matches) != 1:
        several = f"{reference}: {len(matches)} arms match it, name more of its keys; {arms_text([*matches.values()])}"
        raise Refusal(f"sweep.family.reference: {several if matches else no_arm(reference, plain)}")


def check_controls(sweep: Sweep, mixers: list[dict]) -> None:
    """Refuse controls that are no arm, or the arm that others are compared with."""
    for control in sweep.controls:
        matches = [m for m in mixers if matched(control, m)]
        if not matches:
            raise Refusal(f"sweep.controls: {no_arm(control, mixers)}")
        if sweep.family.reference and any(matched(sweep.family.reference, m) for m in matches):
            raise Refusal(f"sweep.controls {control}: sweep.family.reference cannot be a control")


def registered(run: Run, registration: str, known: dict[str, Run]) -> Run:
    """The run and those that it needs, marked with what their sweep declared. `known`: trials that are, by id."""

    def once(trial: Run) -> Run:
        if trial.id not in known:
            known[trial.id] = registered(trial, registration, known)
        return known[trial.id]

    parent = registered(run.parent, registration, known) if run.parent else None
    trials = tuple(once(trial) for trial in run.trials)
    # By hand, as dataclasses.replace takes longer than all else here; a sweep has ten thousands.
    return Run(run.protocol, run.mixer, run.seed, run.replica, run.point, run.label, parent, registration, trials)


def check_tuning(run: Run, arm: "Arm") -> None:
    """Refuse a seed that is tuned with and reported, and a mixer's own key in a space that is not a departure's."""
    tune = run.protocol.tune
    if tune is None:
        return
    if run.seed in tune.seeds:
        raise Refusal(f"seed {run.seed} of the sweep is a tuning seed of {run.label}: what is reported must be others")
    own = [axis.key for axis in tune.space if axis.key.startswith(OWN)]
    if own and f"protocol.{SPACE}" not in arm.departed:
        raise Refusal(f"{run.label} tunes {', '.join(own)}: a mixer's own key needs a departure that sets {SPACE}")


def variations(sweep: Sweep) -> list[dict]:
    """Each combination of the varied keys' values, as 'protocol.…' changes; one empty one if nothing varies."""
    keys = [f"protocol.{k}" for k in sweep.varies]
    return [dict(zip(keys, values, strict=True)) for values in itertools.product(*sweep.varies.values())]


def cells(sweep: Sweep) -> list[Cell]:
    """The sweep's product, arm by arm within each seed. The same run may occur twice if the file lists it twice."""
    every = arms(sweep)
    columns = itertools.product(sweep.protocols, variations(sweep))
    plain = [(protocol, v, make_run(protocol, every[0].mixer, v, 0, 0)) for protocol, v in columns]
    if 0 not in sweep.replicas and (lone := [name for name, _, base in plain if base.parent is None]):
        raise Refusal(f"sweep.replicas must list 0: '{lone[0]}' starts from no other protocol and has no other replica")
    labels = [base.label for *_, base in plain]
    written_out(sweep, labels)  # refuses a column that the table could not have
    require_one(sweep, labels)
    found, registration, known = [], sweep.registration, {}
    for seed, arm, (protocol, variation, base), replica in itertools.product(sweep.seeds, every, plain, sweep.replicas):
        if replica and base.parent is None:
            continue
        run = make_run(protocol, arm.mixer, {**variation, **arm.departed, **arm.changes}, seed, replica)
        check_tuning(run, arm)
        found.append(Cell(base.label, arm, variation, seed, replica, registered(run, registration, known)))
    return found


def grid(sweep: Sweep) -> list[Run]:
    """The runs that the sweep asks for, each once (parents that it does not list are not among them)."""
    runs: dict[str, Run] = {}
    for cell in cells(sweep):
        runs.setdefault(cell.run.id, cell.run)
    return list(runs.values())


def work_of(sweep: Sweep, seeds: list[int] | None) -> list[Run]:
    """The runs of a sweep, or those of some of its seeds, and what they need, in the order in which to train them.
    Raises Refusal for a seed that is none of the sweep's."""
    if missing := [seed for seed in seeds or () if seed not in sweep.seeds]:
        raise Refusal(f"--seeds {missing[0]} is none of {sweep.name}'s; it has: {', '.join(map(str, sweep.seeds))}")
    return ordered([run for run in grid(sweep) if seeds is None or run.seed in seeds])


def ordered(runs: list[Run]) -> list[Run]:
    """All runs and what they need, seed by seed and each chain depth first: an interruption costs one chain at most.

    What is tuned comes after all trials that decide it, rung after rung.
    """
    level: dict[str, int] = {}
    children: dict[tuple[str, int], list[Run]] = {}

    def add(run: Run) -> int:
        """How many selections a run stands behind."""
        if run.id not in level:
            level[run.id] = 0
            above = add(run.parent) if run.parent else 0
            level[run.id] = max([above, *(add(trial) + 1 for trial in run.trials)])
            same = run.parent is not None and above == level[run.id]
            children.setdefault((run.parent.id if same else "", level[run.id]), []).append(run)
        return level[run.id]

    for run in runs:
        add(run)
    found: list[Run] = []

    def visit(run: Run) -> None:
        found.append(run)
        for child in children.get((run.id, level[run.id]), ()):
            visit(child)

    for now in sorted(set(level.values())):
        for root in sorted(children.get(("", now), ()), key=lambda r: r.seed):
            visit(root)
    return found


def named(run: Run) -> str:
    """'low_rank sam heads=4 … seed 0' for people."""
    args = run.mixer.args.items()
    own = [(v if isinstance(v, str) else "sam" if v else "not sam") if k == "sam" else f"{k}={v}" for k, v in args]
    replica = f" replica {run.replica}" if run.replica else ""
    point = "" if not run.is_trial else " trial " + " ".join(f"{k}={v}" for k, v in run.point.items())
    return f"{run.mixer.name} {' '.join(own)} seed {run.seed}{replica}{point}"
