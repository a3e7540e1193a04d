"""Medians and quartiles, shares of the measured roofline, speed-ups, growth: plain numbers for the JSON. No torch.

Roofline of a layer: FLOPs / rate of a large matrix product + bytes / bandwidth of a large copy, both of the same run.
A sum and not the larger of both, since products and passes over memory follow each other. What a step amounts to
(layer.Counts) is counted by rules equal for all mixers: three times the FLOPs of forward, every tensor once a stage.
"""

import math
import statistics
from collections.abc import Iterable

QUARTILES = ("q1", "median", "q3")


def spread(values: list[float]) -> dict:
    """Quartiles (linear between order statistics) and number of values; {} for none."""
    if not values:
        return {}
    found = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return dict(zip(QUARTILES, found, strict=True)) | {"n": len(values)}


def flat(turns: list[list[float]]) -> list[float]:
    return [seconds for turn in turns for seconds in turn]


def ratios(above: list[list[float]], below: list[list[float]]) -> dict:
    """Of the medians of the same rounds: spread of above / below over the rounds that both took part in."""
    pairs = zip(above, below, strict=False)
    return spread([statistics.median(a) / statistics.median(b) for a, b in pairs])


def exponent(points: Iterable[tuple[float, float]]) -> float | None:
    """Slope of log y over log x by least squares; None with fewer than two x, or a y of 0."""
    points = list(points)
    if len({x for x, _ in points}) < 2 or min(y for _, y in points) <= 0:
        return None
    logs = [(math.log(x), math.log(y)) for x, y in points]
    middle_x, middle_y = (statistics.fmean(values) for values in zip(*logs, strict=True))
    steep = sum((x - middle_x) * (y - middle_y) for x, y in logs)
    return steep / sum((x - middle_x) ** 2 for x, _ in logs)


def roofline(flops: int, traffic: int, ceilings: dict) -> float | None:
    """Seconds that a step cannot go below by this account; None without both ceilings."""
    rate, bandwidth = (ceilings.get(name, {}).get("median") for name in ("matrix", "copy"))
    return flops / rate + traffic / bandwidth if rate and bandwidth else None


def ceiling(work: int, samples: list[list[float]]) -> dict:
    """Work a second, from the seconds of steps that do `work`."""
    return spread([work / seconds for seconds in flat(samples)])


def finished(rows: list[dict], ceilings: dict) -> list[dict]:
    """The rows with what follows from their turns and from other rows of the same run."""
    naive = {(row["arm"], row["length"]): row for row in rows if row["way"] == "naive" and row["outcome"] == "ok"}
    return [row | derived(row, naive.get((row["arm"], row["length"])), ceilings) for row in rows]


def derived(row: dict, naive: dict | None, ceilings: dict) -> dict:
    if row["outcome"] != "ok":
        return {"seconds": {}, "roofline": None, "share": None, "speedup": {}, "host_bound": False}
    # A run cut short before the rounds has one step of each cell, which is marked by n = 0.
    seconds = spread(flat(row["turns"])) or spread([row["estimate"]]) | {"n": 0}
    least = roofline(row["flops"], row["traffic"], ceilings)
    host = statistics.median(row["host"]) if row["host"] else 0.0
    return {
        "seconds": seconds,
        "roofline": least,
        "share": least / seconds["median"] if least else None,
        "speedup": ratios(naive["turns"], row["turns"]) if beside(row, naive) else {},
        "host_bound": host > 0.9 * seconds["median"],
    }


def beside(row: dict, naive: dict | None) -> bool:
    """Whether it had its turns in the rounds of its arm's naive way: one that was measured by itself says so."""
    return naive is not None and row["way"] != "naive" and not (row["reason"] or naive["reason"])


def growth(rows: list[dict]) -> list[dict]:
    """For each arm and way: exponents over the length of time and peak memory of one sequence; 1 is linear."""
    found = {}
    for row in rows:
        if row["outcome"] == "ok":
            found.setdefault((row["arm"], row["way"]), []).append(row)
    return [
        {
            "arm": arm,
            "way": way,
            "lengths": [row["length"] for row in own],
            "time": exponent((row["length"], row["seconds"]["median"] / row["batch"]) for row in own),
            "memory": exponent((row["length"], row["peak_memory"] / row["batch"]) for row in own),
        }
        for (arm, way), own in found.items()
    ]
