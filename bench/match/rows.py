"""The rows of the table: words of the command line -> arms -> runs -> what each costs, or why it has no figures."""

import itertools
import json
from dataclasses import dataclass

import torch

from bench import Refusal, registry
from bench.capacity import capacity_of, model_of
from bench.compose import choices, compose_group, make_run, parse_overrides
from bench.config import Run, listed, set_key
from bench.record import Capacity
from bench.tasks.base import Places, Task


@dataclass(frozen=True)
class Arm:
    """A mixer's name and what is changed for its rows only: 'mixer.…' and 'protocol.…' keys; a list is an axis."""

    name: str
    changes: dict


@dataclass(frozen=True)
class Row:
    name: str
    args: dict  # the mixer's keys; {} if it could not be read
    protocol: str  # label
    length: int  # tokens; 0 if it could not be read
    capacity: Capacity | None  # None: `note` says why
    knob: str  # the key that a budget moved, '' for none
    was: int  # its value before
    gap: float | None  # of the figure reached, in per cent of the budget
    note: str


def parse_words(words: list[str]) -> tuple[str, dict, list[Arm]]:
    """The protocol's name, the changes for all rows, and the arms that are named: 'NAME key=value …', one word each."""
    common = parse_overrides([word for word in words if "=" in (word.split() or [""])[0]])
    protocol = common.pop("protocol", None)
    if not isinstance(protocol, str):
        raise Refusal(f"missing 'protocol=…'; known: {listed(choices('protocol'))}")
    arms = [parse_arm(word) for word in words if "=" not in (word.split() or [""])[0]]
    for key in common:
        if not key.startswith(("protocol.", "mixer.")):
            raise Refusal(f"unknown key '{key}'; allowed here: protocol=…, protocol.…, mixer.… and mixers' names")
    known = dict.fromkeys(key for name in [arm.name for arm in arms] or choices("mixer") for key in keys_of(name))
    for key in common:
        if key.startswith("mixer."):
            set_key(known, key.removeprefix("mixer."), None, "mixer")  # refuses what no mixer here has
    return protocol, common, arms


def parse_arm(word: str) -> Arm:
    if not word.split():
        raise Refusal(f"a mixer's name is empty; known: {listed(choices('mixer'))}")
    name, *keys = word.split()
    keys_of(name)
    return Arm(name, parse_overrides(keys))


def keys_of(name: str) -> list[str]:
    return [key for key in compose_group("mixer", name) if key != "name"]


def runs_of(protocol: str, common: dict, arm: Arm, every_level: bool) -> list[Run]:
    """The runs of an arm, one for each combination of its axes. `common` applies as far as the mixer has its keys."""
    own = keys_of(arm.name)
    fitting = {k: v for k, v in common.items() if not k.startswith("mixer.") or k.removeprefix("mixer.") in own}
    changes = {**fitting, **arm.changes}
    if every_level and "mixer.sam" not in changes:
        changes["mixer.sam"] = list(registry.mixer_class(arm.name).levels)
    if empty := [key for key, value in changes.items() if value == []]:
        raise Refusal(f"{empty[0]} is empty: there is no such row")
    axes = [value if isinstance(value, list) else [value] for value in changes.values()]
    return [make_run(protocol, arm.name, dict(zip(changes, v, strict=True)), 0, 0) for v in itertools.product(*axes)]


def measured(run: Run) -> Row:
    """A run's figures, or why its mixer is unfit. What its mixer refuses is a Refusal, as for a run."""
    reason, task = registry.check(run), task_of(run)
    capacity = None if reason else figures(run, task)
    note = f"unfit: {reason}" if reason else ""
    return Row(run.mixer.name, run.mixer.args, run.label, task.spec().length, capacity, "", 0, None, note)


def without_figures(name: str, args: dict, protocol: str, why: str) -> Row:
    return Row(name, args, protocol, 0, None, "", 0, None, why)


def table(protocol: str, common: dict, arms: list[Arm]) -> list[tuple[Run | None, Row]]:
    """Every run and its row. What a mixer refuses is an error where the mixer was named, a note where all stand."""
    found: list[tuple[Run | None, Row]] = []
    for arm in arms or [Arm(name, {}) for name in choices("mixer")]:
        try:
            runs = runs_of(protocol, common, arm, every_level=True)
        except Refusal as error:
            if arms:
                raise
            found.append((None, without_figures(arm.name, {}, protocol, str(error))))
            continue
        for run in runs:
            try:
                found.append((run, measured(run)))
            except Refusal as error:
                if arms:
                    raise
                found.append((run, without_figures(arm.name, run.mixer.args, run.label, str(error))))
    if all(row.capacity is None for _, row in found):
        raise Refusal(found[0][1].note)
    return found


def task_of(run: Run) -> Task:
    return registry.make_task(run, Places(data=None, cache=None))


def figures(run: Run, task: Task) -> Capacity:
    """What a run would record. Whatever keeps its mixer from being built or counted is a Refusal: one mixer's fault."""
    try:
        with torch.device("meta"):
            return capacity_of(model_of(run, task, registry.mixer_class(run.mixer.name).backends[0]))
    except Refusal:
        raise
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise Refusal(f"mixer '{run.mixer.name}' cannot be built and counted: {why}") from None


def text_of(args: dict) -> str:
    """'sam=true heads=4 …' for people."""
    return " ".join(f"{key}={json.dumps(value).strip(chr(34))}" for key, value in args.items())
