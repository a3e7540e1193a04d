"""What a run is: frozen dataclasses, the strict build from plain values, content ids. Imports neither torch nor a room.

A task's and a mixer's own keys are checked where their classes are loaded (registry.py); here they stay plain values.
Where the plain values come from is compose.py's business.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from bench import Refusal
from bench.architecture import Backbone as Backbone
from bench.architecture import Shell as Shell
from bench.architecture import inner_width as inner_width
from bench.space import SELECTED, Tune
from bench.strict import at_least, below_one, one_of, set_key, share
from bench.strict import build as build
from bench.strict import coerce as coerce
from bench.strict import listed as listed


@dataclass(frozen=True)
class Named:
    """A task or a mixer: the name of its file and its own arguments."""

    name: str
    args: dict

    @cached_property
    def canonical(self) -> str:
        """Of a mixer: its part of the text that is hashed."""
        return canonical({"name": self.name, **self.args}, "mixer")


# The third value of a mixer's `sam`: as true, but each token gets the features of another token. Mixers never see it.
MISALIGNED = "misaligned"


@dataclass(frozen=True)
class Optimiser:
    """AdamW; weight decay on tensors of two or more dimensions, for every parameter alike."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    clip: float  # global gradient norm, 0: off
    ema: float  # decay of the averaged weights that are evaluated beside the last ones, 0: off

    def __post_init__(self):
        at_least("protocol.optimiser", self, {"lr": 0, "eps": 0, "weight_decay": 0, "clip": 0})
        below_one("protocol.optimiser", self, "ema")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise Refusal(f"protocol.optimiser.betas must lie from 0 to below 1, got {list(self.betas)}")


@dataclass(frozen=True)
class Schedule:
    shape: str  # 'linear' or 'cosine' decay after a linear warm-up
    warmup: float  # share of the steps
    final: float  # last learning rate / peak

    def __post_init__(self):
        one_of("protocol.schedule.shape", self.shape, ("linear", "cosine"))
        share("protocol.schedule", self, "warmup", "final")


@dataclass(frozen=True)
class Budget:
    steps: int  # optimiser steps
    batch: int  # examples of one optimiser step, over all devices and micro-batches

    def __post_init__(self):
        at_least("protocol.budget", self, {"steps": 1, "batch": 1})


@dataclass(frozen=True)
class Protocol:
    """All that is held fixed. `init`: id of the parent protocol whose weights the run starts from, '' for none."""

    init: str
    task: Named
    backbone: Backbone
    shell: Shell
    optimiser: Optimiser
    schedule: Schedule
    budget: Budget
    precision: str  # 'fp32' or 'bf16' (autocast); obeyed on every device or refused
    tune: Tune | None  # None (or no such key): the values above are used as they are

    def __post_init__(self):
        one_of("protocol.precision", self.precision, ("fp32", "bf16"))
        inner_width(self.backbone.width, self.shell.expand)

    @property
    def inner(self) -> int:
        """Channels of v: heads x head width."""
        return inner_width(self.backbone.width, self.shell.expand)

    @cached_property
    def canonical(self) -> str:
        """Its part of the text that is hashed: thousands of runs share one protocol."""
        return canonical(_protocol_values(self), "protocol")

    @cached_property
    def id(self) -> str:
        return _short_hash(f'{{"protocol":{self.canonical}}}')


@dataclass(frozen=True)
class Where:
    """Locates and executes; never part of an id. configs/run.yaml says what each key means."""

    data: str
    cache: str
    results: str
    device: str
    devices: int
    nodes: int
    threads: int
    loaders: int
    micro_batches: int
    compile: str
    graph: str
    backend: str
    checkpoint_seconds: float
    retries: int

    def __post_init__(self):
        one_of("where.device", self.device, ("auto", "cpu", "cuda"))
        one_of("where.compile", self.compile, ("auto", "on", "off"))
        one_of("where.graph", self.graph, ("auto", "on", "off"))
        at_least(
            "where",
            self,
            {
                "devices": 1,
                "nodes": 1,
                "threads": 1,
                "loaders": 0,
                "micro_batches": 1,
                "checkpoint_seconds": 0,
                "retries": 0,
            },
        )
        if self.graph == "on" and not self.undivided:
            raise Refusal("where.graph=on needs one device and one micro-batch; use: auto, off")

    @property
    def undivided(self) -> bool:
        """Whether one process computes an optimiser step in one piece."""
        return self.devices * self.nodes * self.micro_batches == 1

    def compiled(self, device: str) -> bool:
        return self.compile == "on" or (self.compile == "auto" and device == "cuda")

    def one_graph(self, device: str) -> bool:
        """Whether a step is issued as one CUDA graph: 'auto' where one process computes it in one piece, compiled."""
        fit = self.graph == "on" or (self.graph == "auto" and self.undivided and self.compiled(device))
        return device == "cuda" and fit


@dataclass(frozen=True)
class Run:
    protocol: Protocol
    mixer: Named
    seed: int
    replica: int
    point: dict | str  # of a tuned protocol: a trial's values (or whose it gets), or 'selected'; else empty
    label: str = field(compare=False)  # the protocol's file name and what was changed in it: for people, not hashed
    parent: "Run | None" = field(compare=False)  # hashed through protocol.init
    # What its sweep declared to test (Sweep.registration), '' outside a sweep: goes into the record, never into the id.
    registration: str = field(compare=False)
    trials: "tuple[Run, ...]" = field(compare=False)  # whose records decide its point; hashed through protocol.tune

    def __post_init__(self):
        at_least("run", self, {"seed": 0, "replica": 0})

    @property
    def kind(self) -> str:
        """'' of an ordinary run, 'selected', 'trial', or 'rung 1' and so on: runs of one kind cost about the same."""
        return kind_of(self.point)

    @property
    def is_trial(self) -> bool:
        return self.kind not in ("", SELECTED)

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return self.protocol.tune.steps_of(self.point) if self.is_trial else self.protocol.budget.steps

    @property
    def needs(self) -> "tuple[Run, ...]":
        """The runs that must have ended before it can start."""
        return (*([self.parent] if self.parent else []), *self.trials)

    def blocked_by(self, lost: "Callable[[Run], bool]") -> "tuple[Run, str] | None":
        """What keeps it from ever being started, and in words: its parent if that is lost, its trials if all are."""
        if self.parent and lost(self.parent):
            return self.parent, "its parent"
        return (self.trials[0], "all its trials, like") if self.trials and all(map(lost, self.trials)) else None

    @cached_property
    def id(self) -> str:
        """`digest(resolved(self))`, from the texts that runs of one protocol or mixer share."""
        rest = f'"replica":{self.replica},"seed":{self.seed}'
        point = canonical(self.point, "point") if self.point else "{}"
        parts = f'"mixer":{self.mixer.canonical},"point":{point},"protocol":{self.protocol.canonical}'
        return _short_hash(f"{{{parts},{rest}}}")

    @cached_property
    def protocol_id(self) -> str:
        return self.protocol.id


LENGTH = "protocol.task.length"  # a mixer's matrices may have it: a fine-tuning goes on from one of its own length
CHAIN = ("protocol.backbone.", "protocol.shell.")  # what a child shares with its parent, since it takes its weights

# A key added after the first committed record has one neutral value here, at which it is left out of the hashed JSON,
# so that old evidence keeps its ids. Append only.
NEUTRAL: dict[str, object] = {
    "protocol.task.pieces": 0,  # masked_lm: all pieces of a document
    "protocol.shell.directions": "one",
    "protocol.task.crop_area": 0.0,  # images: none at random
    "protocol.task.crop_held_out": 1.0,
    "mixer.salt": 0,  # no yaml has it: an A/A arm says 1
    "protocol.tune": None,  # only the yaml of a tuned protocol has it
    "protocol.shell.name": "gated",
    "protocol.backbone.mlp_gated": False,
    "protocol.backbone.mlp_blocks": 1,
    "protocol.backbone.position_rows": 0,
    "protocol.backbone.hidden_dropout": 0.0,
    "protocol.task.reach": 0,  # masked_lm: no second reading
    "protocol.task.lengths": [],  # masked_lm: no other length
    "protocol.task.shorter": [],  # glue: every batch padded to the whole length
    "protocol.task.together": 1,
}


def resolved(run: Run) -> dict:
    """The total configuration of a run as plain values: what is hashed, stored and compared."""
    protocol = _protocol_values(run.protocol)
    mixer = resolved_mixer(run)
    return {"protocol": protocol, "mixer": mixer, "seed": run.seed, "replica": run.replica, "point": run.point}


def resolved_mixer(run: Run) -> dict:
    return {"name": run.mixer.name, **run.mixer.args}


def _protocol_values(protocol: Protocol) -> dict:
    values = {**dataclasses.asdict(protocol), "task": {"name": protocol.task.name, **protocol.task.args}}
    if protocol.tune is None:
        del values["tune"]
    return values


def kind_of(point: dict | str) -> str:
    """`Run.kind`, from what a record holds of it."""
    if isinstance(point, str) or not point:
        return point or ""
    return f"rung {point['rung']}" if "rung" in point else "trial"


def with_point(run: Run, values: dict) -> Run:
    """What a run of a tuned protocol trains: the values of its point applied, and a trial's steps. Its id is another.

    Raises Refusal for a key that is not there or a value that does not fit.
    """
    plain, args = dataclasses.asdict(run.protocol), dict(run.mixer.args)
    for key, value in values.items():
        group, _, rest = key.partition(".")
        if group == "mixer":
            set_key(args, rest, value, "mixer")
        else:
            set_key(plain, f"task.args.{rest}" if group == "task" else key, value, "protocol")
    plain["budget"]["steps"] = run.steps
    protocol = build(Protocol, plain, "protocol")
    return dataclasses.replace(run, protocol=protocol, mixer=dataclasses.replace(run.mixer, args=args))


def part_size(label: str, size: int, world: int, micro_batches: int, group: int) -> int:
    """Examples of one micro-batch on one device; a Refusal if a batch of `size` (of the protocol `label`) does not
    divide."""
    parts = world * micro_batches
    if size % (parts * group):
        cut = f"{world} devices x {micro_batches} micro-batches"
        raise Refusal(f"{label}: a batch of {size} cannot be cut into {cut} of whole groups of {group}")
    return size // parts


def digest(values: dict) -> str:
    """Twelve hex digits of the SHA-256 of canonical JSON; 1, 1.0 and 1e0 are one value."""
    return _short_hash(canonical(values, ""))


def canonical(values: dict | str, path: str) -> str:
    """Canonical JSON of the values at `path` ('' for a whole run), neutral ones left out."""
    plain = _canonical(values, path)
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _canonical(value, path: str):
    if isinstance(value, dict):
        inner = {k: (f"{path}.{k}" if path else str(k), v) for k, v in value.items()}
        return {k: _canonical(v, p) for k, (p, v) in inner.items() if p not in NEUTRAL or NEUTRAL[p] != v}
    if isinstance(value, list | tuple):
        return [_canonical(v, path) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise Refusal(f"{path} must be a finite number, got {value}")
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value
