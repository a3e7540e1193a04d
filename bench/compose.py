"""From yaml and command-line words to runs: the one reader of yaml, hydra-core's composition, changes, parents.

hydra-core composes the groups under `configs/`, and a mixer of another distribution from its own; the result is built
strictly (config.py), so that a misspelt key is never ignored. Interpolations are refused before hydra-core could
resolve one: a configuration says what it is.
"""

import dataclasses
import json
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from bench import Refusal, plugins
from bench.config import CHAIN, LENGTH, NEUTRAL, Named, Protocol, Run, Where, build, coerce, listed, with_point
from bench.space import SELECTED, points, values_of
from bench.strict import set_key

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
# What hydra-core sets up for applications, and a third of the time of a composition.
NO_APPLICATION = [
    f"~hydra/{part}"
    for part in ("output", "launcher", "sweeper", "hydra_logging", "job_logging", "env", "hydra_help", "help")
]


def load_yaml(path: Path) -> dict:
    """The one reader of yaml: safe, no interpolations. Numbers as in hydra-core (1e-3 is a float)."""
    from omegaconf import OmegaConf

    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except FileNotFoundError:
        beside = sorted(file.name for file in path.parent.glob("*.yaml"))
        raise Refusal(f"no such file: {path}" + (f"; there are: {', '.join(beside)}" if beside else "")) from None
    except IsADirectoryError:
        inside = listed(sorted(str(file) for file in path.glob("*.yaml")))
        raise Refusal(f"{path} is a folder, name a file" + (f"; there are: {inside}" if inside else "")) from None
    except Exception as error:  # yaml and omegaconf have several unrelated error classes
        raise Refusal(f"{path} is not readable yaml: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise Refusal(f"{path} must hold key: value lines, found {type(values).__name__}")
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


def shipped(group: str) -> list[str]:
    return sorted(p.stem for p in (CONFIGS / group).glob("*.yaml"))


def choices(group: str) -> list[str]:
    """Names of a group: those shipped and, for mixers, those that installed distributions claim, broken or not."""
    return sorted({*shipped(group), *(plugins.claims() if group == "mixer" else ())})


def claim_of(mixer: str) -> plugins.Claim | None:
    """The distribution that brings a mixer; None for a shipped one. Raises Refusal if several claim its name."""
    return plugins.claim_of(mixer, mixer in shipped("mixer"))


@lru_cache(maxsize=256)
def _composed(group: str, name: str) -> str:
    """The composed values of one choice of a group, as JSON (so that a cached value cannot be changed)."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    if name not in choices(group):
        raise Refusal(f"unknown {group} '{name}'; known: {listed(choices(group))}")
    claim = claim_of(name) if group == "mixer" else None
    folders = [CONFIGS, plugins.configs_of(claim)] if claim else [CONFIGS]
    path = _scan(group, name, folders)
    # As JSON, since its strings are quoted strings of hydra-core's grammar; the shipped folder is searched first.
    search = json.dumps([f"file://{folder}" for folder in folders[1:]], ensure_ascii=False)
    words = [f"{group}={name}", f"hydra.searchpath={search}", *NO_APPLICATION]
    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            values = OmegaConf.to_container(compose("run", overrides=words)[group], resolve=False)
    except Exception as error:
        raise Refusal(f"{path} does not compose: {' '.join(str(error).split())}") from None
    refuse_interpolation(values, str(path))
    if claim and (not isinstance(values, dict) or values.get("name") != name):
        raise claim.broken(f"{path} must say 'name: {name}', like its entry point")
    return json.dumps(values)


def _scan(group: str, name: str, folders: list[Path]) -> Path:
    """Refuse interpolations in a file and in those that its defaults list names, before hydra-core can resolve one.

    The file is the first of that name in `folders`; its path is returned.
    """
    paths = [folder / group / f"{name}.yaml" for folder in folders]
    path = next((p for p in paths if p.is_file()), paths[0])
    for entry in load_yaml(path).get("defaults") or []:
        if isinstance(entry, dict):
            for other_group, other in entry.items():
                _scan(other_group.split("@")[0].strip("/"), str(other), folders)
        elif entry != "_self_":
            _scan(group, str(entry), folders)
    return path


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
            odd = override.is_delete() or override.is_add() or override.is_sweep_override() or override.package
            if odd or override.key_or_group in parsed:
                raise Refusal(f"'{text}': only plain key=value is allowed, each key once")
            parsed[override.key_or_group] = override.value()
        except HydraException:
            raise Refusal(f"'{text}' is not of the form key=value") from None
    return parsed


# Runs ---------------------------------------------------------------------------------------------------------------


def make_run(protocol: str, mixer: str, changes: dict[str, object], seed: int, replica: int) -> Run:
    """The run of a named protocol and mixer with `changes` ('protocol.…' and 'mixer.…' keys) applied.

    Its parent is the same mixer and seed, replica 0, on the protocol named by `init`; changes of the backbone and the
    shell go up the chain, and of the length as far as there are fine-tunings. On a protocol that is tuned it is the
    rerun of the point that its `trials` will select.
    """
    run = _untuned(protocol, mixer, changes, seed, replica)
    if run.protocol.tune is None:
        return run
    return dataclasses.replace(run, point=SELECTED, trials=_trials(protocol, mixer, _below("", changes)))


@lru_cache(maxsize=4096)
def _trials(protocol: str, mixer: str, changes: str) -> tuple[Run, ...]:
    """The trials that a selection chooses from: those of the last rung, each with the rung before as its `trials`."""
    tune = _untuned(protocol, mixer, json.loads(changes), 0, 0).protocol.tune
    seeds = [_untuned(protocol, mixer, json.loads(changes), seed, 0) for seed in tune.seeds]
    found: tuple[Run, ...] = ()
    for rung in range(tune.pruner.rungs):
        each = [(point, run) for point in points(tune, rung) for run in seeds]
        found = tuple(dataclasses.replace(run, point=point, trials=found) for point, run in each)
        for run in found:
            with_point(run, values_of(run.point) or {})  # refuses a key or a value that the protocol does not take
    return found


class Shared(NamedTuple):
    """What the runs of one protocol and mixer have in common, whatever their seeds."""

    protocol: Protocol
    mixer: Named
    label: str
    above: str  # name of the protocol that it starts from, '' for none
    changes: dict[str, object]  # that go up the chain


def _untuned(protocol: str, mixer: str, changes: dict[str, object], seed: int, replica: int) -> Run:
    shared = _shared(protocol, mixer, _below("", changes))
    if not shared.above and replica:
        raise Refusal(f"replica {replica}: protocol '{protocol}' has no parent, only replica 0 exists")
    return Run(
        protocol=shared.protocol,
        mixer=shared.mixer,
        seed=coerce(int, seed, "seed"),
        replica=coerce(int, replica, "replica"),
        point={},
        label=shared.label,
        parent=make_run(shared.above, mixer, shared.changes, seed, 0) if shared.above else None,
        registration="",
        trials=(),
    )


@lru_cache(maxsize=4096)
def _shared(protocol: str, mixer: str, text: str) -> Shared:
    """Built and checked once for thousands of runs. `text`: the changes as JSON."""
    changes = json.loads(text)
    for key in changes:
        group, _, rest = key.partition(".")
        if group not in ("protocol", "mixer") or not rest:
            raise Refusal(f"unknown key '{key}'; allowed: protocol, mixer, seed, replica, protocol.…, mixer.…, where.…")
    protocol_text, mixer_text = _composed("protocol", protocol), _composed("mixer", mixer)
    held, own = _below("protocol.", changes), _below("mixer.", changes)
    above = _above(protocol, _init(protocol_text, held))
    up = {k: v for k, v in changes.items() if k.startswith((*CHAIN, "mixer."))}
    if LENGTH in changes and above and _init(_composed("protocol", above), "{}"):
        up[LENGTH] = changes[LENGTH]
    parent = make_run(above, mixer, up, 0, 0) if above else None
    built = _protocol(protocol_text, held, parent.protocol_id if parent else "")
    if parent is not None:
        _require_same_trunk(protocol, built, parent)
    told = {k.removeprefix("protocol."): v for k, v in changes.items() if k.startswith("protocol.")}
    changed = ",".join(f"{k}={_space_text(v) if k == 'tune.space' else v}" for k, v in told.items())
    label = f"{protocol}[{changed}]" if changed else protocol
    return Shared(built, _mixer(mixer_text, own), label, above, up)


def _space_text(space) -> str:
    """'optimiser.lr 0.001 0.01' for a label; what is no space is refused elsewhere."""
    axes = [axis for axis in space if isinstance(axis, dict)] if isinstance(space, list) else []
    return "; ".join(" ".join(map(str, [a.get("key"), *a.get("values", ())])) for a in axes)


def _below(prefix: str, changes: dict[str, object]) -> str:
    """The changes of one group as JSON, the key under which what they make is shared (1, 1.0 and true differ)."""
    own = {key.removeprefix(prefix): value for key, value in changes.items() if key.startswith(prefix)}
    try:
        return json.dumps(own)
    except TypeError as error:
        raise Refusal(f"{prefix}… must have plain values: {error}") from None


def _applied(text: str, changes: str, group: str) -> dict:
    values = json.loads(text)
    for key, value in json.loads(changes).items():
        set_key(values, key, value, group)
    return values


@lru_cache(maxsize=4096)
def _init(text: str, changes: str):
    return _applied(text, changes, "protocol").get("init")


@lru_cache(maxsize=4096)
def _protocol(text: str, changes: str, init: str) -> Protocol:
    """Built once for all runs that share it; nobody changes the arguments inside."""
    values = {"tune": NEUTRAL["protocol.tune"]} | _applied(text, changes, "protocol") | ({"init": init} if init else {})
    return build(Protocol, {**values, "task": _named(values.get("task"), "protocol.task")}, "protocol")


@lru_cache(maxsize=4096)
def _mixer(text: str, changes: str) -> Named:
    if "salt" in json.loads(changes):  # every mixer takes it, though no yaml lists it
        text = json.dumps({**json.loads(text), "salt": NEUTRAL["mixer.salt"]})
    values = _applied(text, changes, "mixer")
    if coerce(int, values.get("salt", 0), "mixer.salt") < 0:
        raise Refusal(f"mixer.salt must be at least 0, got {values['salt']}")
    return build(Named, _named(values, "mixer"), "mixer")


def _above(protocol: str, init) -> str:
    """Name of the protocol that a protocol starts from, '' for none."""
    above = init
    while above and above != protocol:
        above = _init(_composed("protocol", above), "{}")
    if above:
        raise Refusal(f"protocol '{protocol}' starts from itself through init: {init}")
    return init or ""


# What a fine-tuning may choose anew.
OF_THE_CHILD = ("dropout", "hidden_dropout", "drop_path", "pooling", "tied", "init_std")


def _require_same_trunk(name: str, child: Protocol, parent: Run) -> None:
    """A child computes with its parent's weights, so whatever gives them their meaning must be the same."""
    for part in ("backbone", "shell"):
        own, above = vars(getattr(child, part)), vars(getattr(parent.protocol, part))
        differing = [f"{part}.{k}={v} (parent: {above[k]})" for k, v in own.items() if above[k] != v]
        differing = [text for text in differing if text.split(".")[1].split("=")[0] not in OF_THE_CHILD]
        if differing:
            raise Refusal(f"protocol '{name}' cannot start from '{parent.label}': {', '.join(differing)}")


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
            raise Refusal(f"missing '{key}=…'; known: {listed(choices(key))}")
        if not isinstance(top[key], str):
            raise Refusal(f"{key} must be a name, got {top[key]!r}; known: {listed(choices(key))}")
    where = make_where({k: given.pop(k) for k in list(given) if k.startswith("where.")})
    defaults = load_yaml(CONFIGS / "run.yaml")
    return make_run(
        top["protocol"], top["mixer"], given, top.get("seed", defaults["seed"]), top.get("replica", defaults["replica"])
    ), where
