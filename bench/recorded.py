"""From a record back to its run, and to the command that trains it anew: its weights may not be where the record is."""

import dataclasses
import json
import shlex

from bench import Refusal, registry
from bench.compose import parse_run
from bench.config import NEUTRAL, Named, Protocol, Run, build, kind_of
from bench.record import Record
from bench.space import SELECTED
from bench.store import Store

SHOWN = 4  # ids in one line


def id_of(store: Store, start: str) -> str:
    """The id that starts so, of all records; a Refusal if none or several do."""
    folders = sorted(path.parent.name for path in (store.root / "runs").glob("*/record.json"))
    found = [one for one in dict.fromkeys([*store.committed(), *folders]) if one.startswith(start)]
    if len(found) == 1:
        return found[0]
    if found:
        some = f"{', '.join(found[:SHOWN])}{', …' * (len(found) > SHOWN)}"
        raise Refusal(f"{len(found)} records under {store.root} start with '{start}': {some}")
    takes = "an id or its start, an .npz that it wrote, or a run's words: protocol=… mixer=… seed=…"
    raise Refusal(f"no record {start} under {store.root}; show takes {takes}; elsewhere: where.results=…")


def run_of(record: Record, store: Store, with_parent: bool) -> Run:
    """The run of a record, from its resolved values; its parent's too if asked for."""
    values = filled(json.loads(json.dumps(record.run)))
    protocol = values["protocol"]
    run = Run(
        protocol=build(Protocol, {**protocol, "task": named(protocol["task"])}, "protocol"),
        mixer=build(Named, named(values["mixer"]), "mixer"),
        seed=values["seed"],
        replica=values["replica"],
        point=values["point"],
        label=record.label,
        parent=None,
        registration=record.registration,
        trials=(),
    )
    if run.id != record.id:
        raise Refusal(f"record {record.id} was written by a version whose keys this one does not know")
    if with_parent and run.protocol.init:
        return dataclasses.replace(run, parent=parent_of(record, store))
    return run


def parent_of(record: Record, store: Store) -> Run:
    """Of the protocol that the record's starts from, with the same mixer and seed."""
    init, same = record.run["protocol"]["init"], ("mixer", "seed")
    folders = (path.parent.name for path in sorted((store.root / "runs").glob("*/record.json")))
    for above in map(store.record, dict.fromkeys([*store.committed(), *folders])):
        alike = above.protocol_id == init and all(above.run[key] == record.run[key] for key in same)
        if alike and kind_of(above.run["point"]) in ("", SELECTED):
            return run_of(above, store, False)
    raise Refusal(f"run {record.id} starts from protocol {init}, of which {store.root} has no record with its mixer")


def named(values: dict) -> dict:
    return {"name": values["name"], "args": {key: value for key, value in values.items() if key != "name"}}


def filled(values: dict) -> dict:
    """Resolved values with the keys that are younger than their record, at the values that mean no change."""
    own = {
        "mixer": registry.mixer_class(values["mixer"]["name"]).Args,
        "protocol.task": registry.task_class(values["protocol"]["task"]["name"]).Args,
    }
    for path, value in NEUTRAL.items():
        above, _, key = path.rpartition(".")
        node = values
        for step in above.split("."):
            node = node.get(step) if isinstance(node, dict) else None
        keys = [field.name for field in dataclasses.fields(own[above])] if above in own else [key]
        if isinstance(node, dict) and key in keys:
            node.setdefault(key, value)
    return values


def require_weights(run: Run, store: Store, words: list[str]) -> None:
    """Refuse a run without weights here, with the command that trains it."""
    if store.weights(run.id).exists():
        return
    record = store.record(run.id)
    if record is not None and record.outcome != "ok":
        raise Refusal(f"run {run.id} has no weights: {record.outcome}: {record.reason}; --fresh shows it untrained")
    missing = f"run {run.id} has a record, but its weights are not in {store.folder(run.id)}"
    raise Refusal(f"{missing if record else f'no weights of run {run.id}'}; {training(run, store, words)}")


def training(run: Run, store: Store, words: list[str]) -> str:
    """What gives a run its weights, for a refusal. A run with a record is not trained again beside it."""
    if store.record(run.id) is None:
        return f"train it: {command(words)}; or show it untrained: --fresh"
    again = anew(run, words)
    return f"{again}; or this: --fresh" if again else "show it untrained: --fresh"


def anew(run: Run, words: list[str]) -> str:
    """How to have a run that has a record, and what it starts from, trained in another folder; '' if not by words."""
    own = words_of(run)
    if not own:
        return ""
    own += [word for word in words if word.startswith("where.") and not word.startswith("where.results=")]
    trained = command([*own, "where.results=retrained"])
    return f"train it anew: {trained}; and show that, with where.results=retrained"


def command(words: list[str]) -> str:
    return shlex.join(["mixerbench", "run", *words])


def words_of(run: Run) -> list[str]:
    """The words that mean a recorded run, [] if its label and values do not tell them."""
    name, _, changed = run.label.removesuffix("]").partition("[")
    mixer = [f"mixer.{key}={json.dumps(value)}" for key, value in run.mixer.args.items()]
    words = [f"protocol={name}", *(f"protocol.{change}" for change in changed.split(",") if change)]
    words += [f"mixer={run.mixer.name}", *mixer, f"seed={run.seed}"]
    words += [f"replica={run.replica}"] if run.replica else []
    try:
        return words if parse_run(words)[0].id == run.id else []
    except Refusal:
        return []
