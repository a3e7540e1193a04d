"""The verbs `data fetch` and `data vocab`: from a name to a task's pins, and from there to data.py and text.py."""

import hashlib
import re
import secrets
from functools import partial
from pathlib import Path

from bench import Refusal
from bench.compose import choices, compose_group
from bench.config import build
from bench.registry import task_class
from bench.tasks.base import Places, Task
from bench.tasks.data import Pins, fetch, table
from bench.tasks.text import SPECIALS, train_vocabulary, vocabulary_pins


def tasks_of(name: str, places: Places) -> list[Task]:
    """The task `name`, or every task whose data set is called so, without its data."""
    found = {task: compose_group("task", task) for task in choices("task")}
    found = {task: values for task, values in found.items() if "data" in values}
    named = [values for task, values in found.items() if name in (task, values["data"]["name"])]
    if not named:
        known = sorted({values["data"]["name"] for values in found.values()})
        raise Refusal(f"unknown data set '{name}'; known: {', '.join(known)}")
    return [_task(values, places) for values in named]


def _task(values: dict, places: Places) -> Task:
    cls = task_class(values["name"])
    return cls(build(cls.Args, {key: value for key, value in values.items() if key != "name"}, "task"), places)


def pins_of(tasks: list[Task]) -> list[Pins]:
    """What the tasks need as it is, each once: local files and vocabularies, and hub sets that are not prepared."""
    found = {}
    for task in tasks:
        data, vocabulary = task.args.data, getattr(task.args, "vocabulary", None)
        if not (data.hub and task.shards()):
            found[str(data)] = data
        if vocabulary:
            words = vocabulary_pins(vocabulary, data.name)
            found[str(words)] = words
    return list(found.values())


def fetch_verb(name: str, places: Places, source: Path | None, part: str) -> int:
    """Fetch or verify a set, and prepare what is large; 1 if something of it is still missing or not as pinned.

    `part` 'k/n': of each large split only every n-th file, from the k-th on.
    """
    share, tasks = _share(part), tasks_of(name, places)
    states = [state for pins in pins_of(tasks) for state in fetch(pins, places, source)]
    for state in states:
        print(" ".join(part for part in state if part))
    if any(state.state in ("missing", "other content") for state in states):
        return 1
    for shards in [shards for task in tasks for shards in task.shards()]:
        shards.prepare(share, partial(print, flush=True))
    return 0


def _share(part: str) -> tuple[int, int]:
    numbers = re.fullmatch(r"(\d+)/(\d+)", part)
    if not numbers or not 1 <= int(numbers[1]) <= int(numbers[2]):
        raise Refusal(f"--part is '{part}'; allowed: k/n with 1 <= k <= n, as 3/16")
    return int(numbers[1]), int(numbers[2])


def vocab_verb(task: str, places: Places, size: int, out: Path) -> int:
    """Write a vocabulary of `size` entries, one a line, made of the task's training texts; print its pin."""
    values = compose_group("task", task)
    if "column" not in values:
        raise Refusal(f"task '{task}' is no text task with one column; use one of: {', '.join(_text_tasks())}")
    if out.exists():
        raise Refusal(f"{out} is there already; choose another --out")
    if not out.parent.is_dir():
        raise Refusal(f"{out}: no folder {out.parent}; make it or choose another --out")
    if size <= len(SPECIALS):
        raise Refusal(f"--size must be more than the {len(SPECIALS)} special tokens, got {size}")
    pins = build(Pins, values["data"], "task.data")
    texts = table(pins, "train", places, [values["column"]])[values["column"]]
    limit = values["documents"] or None
    text = "".join(word + "\n" for word in train_vocabulary([str(t) for t in texts[:limit]], size))
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
    temporary.write_text(text, encoding="utf-8")
    temporary.rename(out)
    inside = places.data is not None and out.resolve().is_relative_to(places.data.resolve())
    # A pin is a path in the data folder.
    file = out.resolve().relative_to(places.data.resolve()) if inside else out.name
    print(f"vocabulary: {{file: {file}, sha256: {hashlib.sha256(text.encode()).hexdigest()}, size: {size}}}")
    return 0


def _text_tasks() -> list[str]:
    return [task for task in choices("task") if "column" in compose_group("task", task)]
