"""Strict building: plain values become a dataclass's declared types, or a Refusal names the key and what is allowed."""

import dataclasses
import math
import types
import typing
from functools import lru_cache

from bench import Refusal


def build(cls, values, path: str):
    """An instance of dataclass `cls` from plain values, or a Refusal that names the key and lists what is allowed."""
    if not isinstance(values, dict):
        raise Refusal(f"{path} must be a mapping with the keys {listed(f.name for f in dataclasses.fields(cls))}")
    hints = _hints(cls)
    for key in values:
        if key not in hints:
            raise Refusal(f"unknown key '{path}.{key}'; allowed: {listed(hints)}")
    for key in hints:
        if key not in values:
            raise Refusal(f"missing key '{path}.{key}'; {path} needs: {listed(hints)}")
    return cls(**{key: coerce(hint, values[key], f"{path}.{key}") for key, hint in hints.items()})


_hints = lru_cache(typing.get_type_hints)


@lru_cache(maxsize=256)
def shape_of(hint) -> tuple[bool, object, tuple]:
    """(whether it is a dataclass, origin, arguments) of a type hint."""
    return dataclasses.is_dataclass(hint), typing.get_origin(hint), typing.get_args(hint)


def coerce(hint, value, path: str):
    """The value as its declared type, or a Refusal: a whole float may be an int and an int a float, nothing else."""
    if isinstance(value, float) and not math.isfinite(value):
        raise Refusal(f"{path} must be a finite number, got {value}")
    if type(value) is hint and hint in (bool, int, float, str):  # nearly every value of a record
        return value
    nested, origin, inner = shape_of(hint)
    if nested:
        return build(hint, value, path)
    if origin is types.UnionType and type(None) in inner:
        (own,) = (h for h in inner if h is not type(None))
        return None if value is None else coerce(own, value, path)
    if origin is tuple and inner[-1] is Ellipsis and plain_rows(inner[0], value):
        return tuple(map(tuple, value))
    if origin is tuple and isinstance(value, list | tuple):
        inner = (inner[0],) * len(value) if inner[-1] is Ellipsis else inner
        if len(inner) == len(value):
            return tuple(coerce(h, v, f"{path}[{i}]") for i, (h, v) in enumerate(zip(inner, value, strict=True)))
    elif origin is dict and isinstance(value, dict):
        key_type, own = inner
        return {coerce(key_type, k, path): coerce(own, v, f"{path}.{k}") for k, v in value.items()}
    elif hint in (dict, list) and isinstance(value, hint):
        return value
    elif (hint is float and type(value) is int) or (hint is int and type(value) is float and value.is_integer()):
        return hint(value)
    wanted = hint.__name__ if isinstance(hint, type) and not isinstance(hint, types.GenericAlias) else str(hint)
    raise Refusal(f"{path} must be of type {wanted}, got {value!r} ({type(value).__name__})")


def plain_rows(hint, value) -> bool:
    """Whether all of a list are rows of finite numbers as declared: a curve need not be looked at number by number."""
    _, origin, inner = shape_of(hint)
    if origin is not tuple or not set(inner) <= {int, float} or not isinstance(value, list):
        return False
    if set(map(type, value)) != {list} or set(map(len, value)) != {len(inner)}:
        return False
    columns = list(zip(*value, strict=True))
    return [set(map(type, c)) for c in columns] == [{kind} for kind in inner] and math.isfinite(sum(map(sum, columns)))


def at_least(path: str, owner, lowest: dict[str, float]) -> None:
    for key, low in lowest.items():
        if getattr(owner, key) < low:
            raise Refusal(f"{path}.{key} must be at least {low}, got {getattr(owner, key)}")


def share(path: str, owner, *keys: str) -> None:
    for key in keys:
        if not 0 <= getattr(owner, key) <= 1:
            raise Refusal(f"{path}.{key} must lie between 0 and 1, got {getattr(owner, key)}")


def below_one(path: str, owner, *keys: str) -> None:
    for key in keys:
        if not 0 <= getattr(owner, key) < 1:
            raise Refusal(f"{path}.{key} must lie from 0 to below 1, got {getattr(owner, key)}")


def one_of(path: str, value, allowed) -> None:
    if value not in allowed:
        raise Refusal(f"{path} must be one of {listed(allowed)}, got {value!r}")


def listed(names) -> str:
    return ", ".join(str(n) for n in names)


def set_key(values: dict, key: str, value, path: str) -> None:
    """Change an existing key of nested plain values; an unknown one is a Refusal that lists its neighbours."""
    owner, node, steps = values, values, key.split(".")
    for step in steps:
        if not isinstance(node, dict) or step not in node:
            allowed = listed(node) if isinstance(node, dict) else "nothing, it is a single value"
            raise Refusal(f"unknown key '{path}.{key}': '{step}' is not one of: {allowed}")
        owner, node = node, node[step]
    if isinstance(node, dict):
        raise Refusal(f"'{path}.{key}' is a group of keys; change one of: {listed(node)}")
    owner[steps[-1]] = value
