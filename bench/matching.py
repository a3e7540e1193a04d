"""Which arms of a sweep some of a mixer's keys mean, and the words for arms that none or too many keys mean."""

import json

from bench.strict import listed


def no_arm(asked: dict, mixers: list[dict]) -> str:
    """That no arm has the values asked for: which arms there are, or keys, if one asked for is none of them."""
    keys = dict.fromkeys(k for m in mixers for k in m)
    odd = [k for k in asked if k not in keys]
    there = f"none has the key '{odd[0]}'; keys: {listed(keys)}" if odd else arms_text(mixers, tuple(asked))
    return f"no arm of the sweep matches {asked}; {there}"


def arms_text(mixers: list[dict], asked: tuple[str, ...] = ()) -> str:
    """'arms: dense sam=false heads=2, …', with the keys in which any two of them differ and those asked for."""
    keys = [k for k in dict.fromkeys(k for m in mixers for k in m) if k != "name"]
    told = [k for k in keys if len(mixers) == 1 or k in asked or len({json.dumps(m[k]) for m in mixers if k in m}) > 1]
    texts = (" ".join([m["name"], *(f"{k}={json.dumps(m[k])}" for k in told if k in m)]) for m in mixers)
    return f"arms: {', '.join(dict.fromkeys(texts))}"


def matched(keys: dict, mixer: dict) -> bool:
    """Whether a mixer's arguments, its name among them, have these values."""
    return all(mixer.get(key) == value for key, value in keys.items())
