"""Settings as a record holds them: read by key, compared, written flat, written as in yaml."""

import json

from bench.config import digest

ABSENT = "absent"


def plain(value) -> str:
    """A setting as it stands in yaml."""
    if isinstance(value, str):
        return value
    return json.dumps(int(value) if isinstance(value, float) and value.is_integer() else value)


def same(a, b) -> bool:
    return (type(a) is type(b) and a == b) or digest({"": a}) == digest({"": b})


def nested(values: dict, key: str):
    for step in key.split("."):
        values = values[step] if isinstance(values, dict) and step in values else ABSENT
    return values


def flattened(values: dict) -> dict[str, object]:
    """Nested mappings as 'a.b.c' -> value; an empty mapping is a value."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= {f"{key}.{k}": v for k, v in flattened(value).items()}
        else:
            flat[key] = value
    return flat
