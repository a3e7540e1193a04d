"""What a run is: frozen dataclasses, the strict build from yaml, content ids. Imports neither torch nor a room.

hydra-core composes the groups under `configs/`; the result is built strictly, so a misspelt key cannot be ignored.
A task's and a mixer's own keys are checked where their classes are loaded (registry.py); here they stay plain values.
"""

import dataclasses
import hashlib
import json
import types
import typing
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from bench import Refusal

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"


@dataclass(frozen=True)
class Named:
    """A task or a mixer: the name of its file and its own arguments."""

    name: str
    args: dict


@dataclass(frozen=True)
class Backbone:
    layers: int
    width: int  # channels of the residual stream
    norm: str  # 'post': LN(x + f(x)), 'pre': x + f(LN(x))
    norm_eps: float
    channel_mlp: int  # hidden width of a channel MLP after each mixer, 0: none
    positions: bool  # learned absolute positions
    pooling: str  # 'mean' over real tokens or 'first' token with a tanh layer; for tasks with one output an example
    tied: bool  # head tied to the token embedding, where the task's outputs are its ids
    pad_symbols: int  # the embedding's rows are rounded up to a multiple of this
    dropout: float  # after the embedding and before a pooled head
    drop_path: float  # of the last layer, growing linearly from 0
    init_std: float  # of every linear map and embedding

    def __post_init__(self):
        at_least("protocol.backbone", self, {"layers": 1, "width": 1, "channel_mlp": 0, "pad_symbols": 1})
        one_of("protocol.backbone.norm", self.norm, ("post", "pre"))
        one_of("protocol.backbone.pooling", self.pooling, ("mean", "first"))
        share("protocol.backbone", self, "dropout", "drop_path")


@dataclass(frozen=True)
class Shell:
    expand: int  # inner channels / width
    conv_width: int  # taps of the depthwise convolution, 0: none
    conv_causal: bool  # else centred, and conv_width is odd
    skip: bool  # adds v to the mixer's output
    gain: float  # target |M v| / |v| at initialisation, reached by one fixed scalar a layer; 0: not calibrated
    norm_eps: float

    def __post_init__(self):
        at_least("protocol.shell", self, {"expand": 1, "conv_width": 0, "gain": 0})
        if self.conv_width and not self.conv_causal and self.conv_width % 2 == 0:
            raise Refusal(f"protocol.shell.conv_width must be odd for a centred convolution, got {self.conv_width}")


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
        share("protocol.optimiser", self, "ema")


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
    """All that is held fixed. `init` is the id of the parent protocol whose weights the run starts from, '' for none."""

    init: str
    task: Named
    backbone: Backbone
    shell: Shell
    optimiser: Optimiser
    schedule: Schedule
    budget: Budget
    precision: str  # 'fp32' or 'bf16' (autocast); obeyed on every device or refused

    def __post_init__(self):
        one_of("protocol.precision", self.precision, ("fp32", "bf16"))


@dataclass(frozen=True)
class Where:
    """Locates and executes; never part of an id. configs/run.yaml says what each key means."""

    data: str
    cache: str
    results: str
    device: str
    devices: int
    threads: int
    loaders: int
    micro_batches: int
    compile: str
    backend: str
    checkpoint_seconds: float
    retries: int

    def __post_init__(self):
        one_of("where.device", self.device, ("auto", "cpu", "cuda"))
        one_of("where.compile", self.compile, ("auto", "on", "off"))
        at_least("where", self, {"devices": 1, "threads": 1, "loaders": 0, "micro_batches": 1, "checkpoint_seconds": 0, "retries": 0})


@dataclass(frozen=True)
class Run:
    protocol: Protocol
    mixer: Named
    seed: int
    replica: int
    point: dict  # a tuning trial's values
    label: str = field(compare=False)  # the protocol's file name and what was changed in it: for people, not hashed
    parent: "Run | None" = field(compare=False)  # hashed through protocol.init

    def __post_init__(self):
        at_least("run", self, {"seed": 0, "replica": 0})

    @property
    def id(self) -> str:
        return digest(resolved(self))

    @property
    def protocol_id(self) -> str:
        return digest({"protocol": resolved(self)["protocol"]})


# A key added after the first committed record has one neutral value here, at which it is left out of the hashed JSON,
# so that old evidence keeps its ids. Append only.
NEUTRAL: dict[str, object] = {}


def resolved(run: Run) -> dict:
    """The total configuration of a run as plain values: what is hashed, stored and compared."""
    protocol = dataclasses.asdict(run.protocol)
    protocol["task"] = {"name": run.protocol.task.name, **run.protocol.task.args}
    mixer = {"name": run.mixer.name, **run.mixer.args}
    return {"protocol": protocol, "mixer": mixer, "seed": run.seed, "replica": run.replica, "point": run.point}


def digest(values: dict) -> str:
    """Twelve hex digits of the SHA-256 of canonical JSON; 1, 1.0 and 1e0 are one value."""
    text = json.dumps(_canonical(values, ""), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _canonical(value, path: str):
    if isinstance(value, dict):
        inner = {k: (f"{path}.{k}" if path else str(k), v) for k, v in value.items()}
        return {k: _canonical(v, p) for k, (p, v) in inner.items() if p not in NEUTRAL or NEUTRAL[p] != v}
    if isinstance(value, list | tuple):
        return [_canonical(v, path) for v in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


# Strict build -------------------------------------------------------------------------------------------------------


def build(cls, values, path: str):
    """An instance of the dataclass `cls` from plain values, or a Refusal that names the key and lists what is allowed."""
    if not isinstance(values, dict):
        raise Refusal(f"{path} must be a mapping with the keys {_listed(f.name for f in dataclasses.fields(cls))}")
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise Refusal(f"unknown key '{path}.{key}'; allowed: {_listed(hints)}")
    for key in hints:
        if key not in values:
            raise Refusal(f"missing key '{path}.{key}'; {path} needs: {_listed(hints)}")
    return cls(**{key: _coerce(hint, values[key], f"{path}.{key}") for key, hint in hints.items()})


def _coerce(hint, value, path: str):
    if dataclasses.is_dataclass(hint):
        return build(hint, value, path)
    origin = typing.get_origin(hint)
    if origin is tuple and isinstance(value, list | tuple):
        inner = typing.get_args(hint)
        inner = (inner[0],) * len(value) if inner[-1] is Ellipsis else inner
        if len(inner) == len(value):
            return tuple(_coerce(h, v, f"{path}[{i}]") for i, (h, v) in enumerate(zip(inner, value, strict=True)))
    elif origin is dict and isinstance(value, dict):
        key_type, inner = typing.get_args(hint)
        return {_coerce(key_type, k, path): _coerce(inner, v, f"{path}.{k}") for k, v in value.items()}
    elif hint in (dict, list) and isinstance(value, hint):
        return value
    elif hint is float and type(value) in (int, float) or hint is int and type(value) is float and value.is_integer():
        return hint(value)
    elif hint in (bool, int, str) and type(value) is hint:
        return value
    wanted = hint.__name__ if isinstance(hint, type) and not isinstance(hint, types.GenericAlias) else str(hint)
    raise Refusal(f"{path} must be of type {wanted}, got {value!r} ({type(value).__name__})")


def at_least(path: str, owner, lowest: dict[str, float]) -> None:
    for key, low in lowest.items():
        if getattr(owner, key) < low:
            raise Refusal(f"{path}.{key} must be at least {low}, got {getattr(owner, key)}")


def share(path: str, owner, *keys: str) -> None:
    for key in keys:
        if not 0 <= getattr(owner, key) <= 1:
            raise Refusal(f"{path}.{key} must lie between 0 and 1, got {getattr(owner, key)}")


def one_of(path: str, value, allowed) -> None:
    if value not in allowed:
        raise Refusal(f"{path} must be one of {_listed(allowed)}, got {value!r}")


def _listed(names) -> str:
    return ", ".join(str(n) for n in names)


# Yaml ---------------------------------------------------------------------------------------------------------------


def load_yaml(path: Path) -> dict:
    """The one reader of yaml: safe, no interpolations. Numbers as in hydra-core (1e-3 is a float)."""
    from omegaconf import OmegaConf

    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except FileNotFoundError:
        raise Refusal(f"no such file: {path}") from None
    except Exception as error:  # yaml and omegaconf have several unrelated error classes
        raise Refusal(f"{path} is not readable yaml: {' '.join(str(error).split())}") from None
    refuse_interpolation(values, str(path))
    return values


def refuse_interpolation(value, where: str) -> None:
    if isinstance(value, dict):
        for k, v in value.items():
            refuse_interpolation(k, where)
            refuse_interpolation(v, where)
    elif isinstance(value, list | tuple):
        for v in value:
            refuse_interpolation(v, where)
    elif isinstance(value, str) and "${" in value:
        raise Refusal(f"{where}: interpolation {value!r} is refused; write the value itself")


def choices(group: str) -> list[str]:
    return sorted(p.stem for p in (CONFIGS / group).glob("*.yaml"))


@lru_cache(maxsize=256)
def _composed(group: str, name: str) -> str:
    """The composed values of one choice of a group, as JSON (so that a cached value cannot be changed)."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    if name not in choices(group):
        raise Refusal(f"unknown {group} '{name}'; known: {_listed(choices(group))}")
    _scan(group, name)
    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            values = OmegaConf.to_container(compose("run", overrides=[f"{group}={name}"])[group], resolve=False)
    except Exception as error:
        raise Refusal(f"configs/{group}/{name}.yaml does not compose: {' '.join(str(error).split())}") from None
    refuse_interpolation(values, f"configs/{group}/{name}.yaml")
    return json.dumps(values)


def _scan(group: str, name: str) -> None:
    """Refuse interpolations in a file and in those that its defaults list names, before hydra-core could resolve one."""
    for entry in load_yaml(CONFIGS / group / f"{name}.yaml").get("defaults", []):
        if isinstance(entry, dict):
            for other_group, other in entry.items():
                _scan(other_group.split("@")[0].strip("/"), str(other))
        elif entry != "_self_":
            _scan(group, str(entry))


def compose_group(group: str, name: str) -> dict:
    return json.loads(_composed(group, name))


def parse_overrides(texts: list[str]) -> dict[str, object]:
    """'a.b=1' words of a command line -> {'a.b': 1}, in hydra-core's override grammar."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parsed = {}
    for text in texts:
        refuse_interpolation(text, "command line")
        try:
            (override,) = OverridesParser.create().parse_overrides([text])
            if override.is_delete() or override.is_add() or override.is_sweep_override():
                raise Refusal(f"'{text}': only plain key=value is allowed")
            parsed[override.key_or_group] = override.value()
        except HydraException:
            raise Refusal(f"'{text}' is not of the form key=value") from None
    return parsed


def set_key(values: dict, key: str, value, path: str) -> None:
    """Change an existing key of nested plain values; an unknown one is a Refusal that lists its neighbours."""
    owner, node, steps = values, values, key.split(".")
    for step in steps:
        if not isinstance(node, dict) or step not in node:
            allowed = _listed(node) if isinstance(node, dict) else "nothing, it is a single value"
            raise Refusal(f"unknown key '{path}.{key}': '{step}' is not one of: {allowed}")
        owner, node = node, node[step]
    owner[steps[-1]] = value


# Runs ---------------------------------------------------------------------------------------------------------------

CHAIN = ("protocol.backbone.", "protocol.shell.")  # what a child shares with its parent, since it takes its weights


def make_run(protocol: str, mixer: str, changes: dict[str, object], seed: int, replica: int) -> Run:
    """The run of a named protocol and mixer with `changes` ('protocol.…' and 'mixer.…' keys) applied.

    Its parent is the same mixer and seed, replica 0, on the protocol named by `init`; changes of the backbone and the
    shell go up the chain.
    """
    values, mixer_values = compose_group("protocol", protocol), compose_group("mixer", mixer)
    for key, value in changes.items():
        group, _, rest = key.partition(".")
        if group not in ("protocol", "mixer") or not rest:
            raise Refusal(f"unknown key '{key}'; allowed: protocol.…, mixer.…")
        set_key(values if group == "protocol" else mixer_values, rest, value, group)
    if values["init"]:
        inherited = {k: v for k, v in changes.items() if k.startswith((*CHAIN, "mixer."))}
        parent = make_run(values["init"], mixer, inherited, seed, 0)
        values["init"] = parent.protocol_id
    else:
        parent = None
        if replica:
            raise Refusal(f"replica {replica}: protocol '{protocol}' has no parent, only replica 0 exists")
    changed = ",".join(f"{k.removeprefix('protocol.')}={v}" for k, v in changes.items() if k.startswith("protocol."))
    return Run(
        protocol=build(Protocol, {**values, "task": _named(values["task"], "protocol.task")}, "protocol"),
        mixer=build(Named, _named(mixer_values, "mixer"), "mixer"),
        seed=_coerce(int, seed, "seed"),
        replica=_coerce(int, replica, "replica"),
        point={},
        label=f"{protocol}[{changed}]" if changed else protocol,
        parent=parent,
    )


def _named(values: dict, path: str) -> dict:
    if not isinstance(values, dict) or "name" not in values:
        raise Refusal(f"missing key '{path}.name'")
    return {"name": values["name"], "args": {k: v for k, v in values.items() if k != "name"}}


def make_where(changes: dict[str, object]) -> Where:
    """configs/run.yaml's `where` with 'where.…' changes applied."""
    values = load_yaml(CONFIGS / "run.yaml")["where"]
    for key, value in changes.items():
        set_key(values, key.removeprefix("where."), value, "where")
    return build(Where, values, "where")


def parse_run(words: list[str]) -> tuple[Run, Where]:
    """`protocol=… mixer=… mixer.sam=true seed=0 where.device=cpu`: the words of the verb `run`."""
    given = parse_overrides(words)
    top = {k: given.pop(k) for k in ("protocol", "mixer", "seed", "replica") if k in given}
    for key in ("protocol", "mixer"):
        if key not in top:
            raise Refusal(f"missing '{key}=…'; known: {_listed(choices(key))}")
        if not isinstance(top[key], str):
            raise Refusal(f"{key} must be a name, got {top[key]!r}; known: {_listed(choices(key))}")
    where = make_where({k: given.pop(k) for k in list(given) if k.startswith("where.")})
    defaults = load_yaml(CONFIGS / "run.yaml")
    return make_run(top["protocol"], top["mixer"], given, top.get("seed", defaults["seed"]), top.get("replica", defaults["replica"])), where
