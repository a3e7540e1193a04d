"""The verbs `data fetch` and `data vocab`: from a name to a task's pins, and from there to data.py and text.py."""

import hashlib
import secrets
from pathlib import Path

from bench import Refusal
from bench.compose import choices, compose_group
from bench.config import build
from bench.tasks.base import Places
from bench.tasks.data import Pins, fetch, table
from bench.tasks.text import SPECIALS, Vocabulary, train_vocabulary, vocabulary_pins


def pins_of(name: str) -> list[Pins]:
    """The pins of the task `name`, or of every task whose data set is called so; vocabularies included."""
    found = {}
    for task in choices("task"):
        values = compose_group("task", task)
        if "data" not in values or name not in (task, values["data"]["name"]):
            continue
        pins = build(Pins, values["data"], "task.data")
        found[str(pins)] = pins
        if "vocabulary" in values:
            words = vocabulary_pins(build(Vocabulary, values["vocabulary"], "task.vocabulary"), pins.name)
            found[str(words)] = words
    if not found:
        every = [compose_group("task", task) for task in choices("task")]
        known = sorted({values["data"]["name"] for values in every if "data" in values})
        raise Refusal(f"unknown data set '{name}'; known: {', '.join(known)}")
    return list(found.values())


def fetch_verb(name: str, places: Places, source: Path | None) -> int:
    """Fetch or verify a set; 1 if something of it is still missing or not as pinned."""
    states = [state for pins in pins_of(name) for state in fetch(pins, places, source)]
    for state in states:
        print(" ".join(part for part in state if part))
    return int(any(state.state in ("missing", "other content") for state in states))


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
