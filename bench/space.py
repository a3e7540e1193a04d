"""What a protocol may declare of tuning: the space, the trials of a mixer, how one of them is chosen. No Optuna here.

Every mixer gets the same trials. With `grid` and `quasi_random` their points are fixed by the protocol alone, so that
they repeat whatever the order in which trials end; `tpe` looks at finished trials (tune.py) and does not repeat.
"""

import hashlib
import itertools
import math
from dataclasses import dataclass

from bench import Refusal
from bench.strict import at_least, listed, one_of

GRID, QUASI_RANDOM, TPE = "grid", "quasi_random", "tpe"
SELECTED = "selected"  # the point of a rerun: that of the trial that won
# What no mixer has a stake in. A mixer's own keys need a departure of the sweep that sets tune.space for that mixer.
TUNABLE = (
    *("optimiser.lr", "optimiser.eps", "optimiser.weight_decay", "optimiser.clip", "optimiser.ema"),
    *("schedule.shape", "schedule.warmup", "schedule.final", "budget.batch"),
    *("backbone.dropout", "backbone.drop_path", "task.label_smoothing"),
)
OWN = "mixer."
DIGITS = 6  # significant ones of a drawn value, so that ids do not hang on the last bit of a machine's logarithm
PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29)


@dataclass(frozen=True)
class Axis:
    """One parameter. Of a grid `values` are its values; else the least and the greatest, or for 'choice' all."""

    key: str  # of the protocol without 'protocol.', or 'mixer.…'
    scale: str  # 'linear', 'log', 'choice' (no order)
    values: list
    step: float  # drawn values are multiples of it, 0: any

    def __post_init__(self):
        one_of("protocol.tune.space.scale", self.scale, ("linear", "log", "choice"))
        at_least("protocol.tune.space", self, {"step": 0})
        if self.key not in TUNABLE and not self.key.startswith(OWN):
            allowed = f"allowed: {listed(TUNABLE)}; and mixer.…, in a departure"
            raise Refusal(f"protocol.tune.space: '{self.key}' is no key to tune for every mixer alike; {allowed}")
        plain = [isinstance(v, int | float) and not isinstance(v, bool) for v in self.values]
        if self.scale != "choice" and not all(plain):
            raise Refusal(f"protocol.tune.space: {self.key} has values that are no numbers: {self.values}")
        if len(self.values) < 2 or (self.scale != "choice" and sorted(set(self.values)) != self.values):
            raise Refusal(f"protocol.tune.space: {self.key} needs two or more rising values, got {self.values}")
        if self.scale == "log" and self.values[0] <= 0:
            raise Refusal(f"protocol.tune.space: {self.key} is on a log scale, its values must be above 0")

    def at(self, share: float):
        """The value at `share` (0 to 1) of the way along the axis."""
        if self.scale == "choice":
            return self.values[min(int(share * len(self.values)), len(self.values) - 1)]
        low, high = self.values[0], self.values[-1]
        value = low * (high / low) ** share if self.scale == "log" else low + share * (high - low)
        return self.rounded(value)

    def rounded(self, value):
        if self.scale == "choice":
            return value
        value = round(value / self.step) * self.step if self.step else value
        return float(f"{min(max(value, self.values[0]), self.values[-1]):.{DIGITS}g}")


@dataclass(frozen=True)
class Selection:
    """How trials are ranked: by a metric on training examples that no run of the protocol trains on."""

    metric: str  # as the task names it, without a set
    goal: str  # 'min' or 'max'
    examples: int  # held out of the training set, the same for every run; of generated tasks: examples more

    def __post_init__(self):
        one_of("protocol.tune.selection.goal", self.goal, ("min", "max"))
        at_least("protocol.tune.selection", self, {"examples": 1})


@dataclass(frozen=True)
class Pruner:
    """Successive halving: after each rung the share `keep` goes on, with 1 / keep times the steps, from fresh weights.

    So every mixer spends the same steps, whichever of its trials are dropped. rungs 1 prunes nothing.
    """

    rungs: int
    keep: float

    def __post_init__(self):
        at_least("protocol.tune.pruner", self, {"rungs": 1})
        if not (0 < self.keep < 1 or (self.rungs == 1 and self.keep == 1)):
            raise Refusal(f"protocol.tune.pruner.keep must lie between 0 and 1, or be 1 with one rung; got {self.keep}")


@dataclass(frozen=True)
class Tune:
    space: tuple[Axis, ...]
    trials: int  # of each mixer
    sampler: str
    seed: int  # of the sampler
    selection: Selection
    steps: int  # optimiser steps of a trial (of the last rung)
    pruner: Pruner
    seeds: tuple[int, ...]  # each trial is trained with each of them, and ranked by the mean; never reported

    def __post_init__(self):
        one_of("protocol.tune.sampler", self.sampler, (GRID, QUASI_RANDOM, TPE))
        at_least("protocol.tune", self, {"trials": 1, "seed": 0, "steps": 1})
        keys = [axis.key for axis in self.space]
        if not 0 < len(keys) <= len(PRIMES) or len(set(keys)) < len(keys):
            raise Refusal(f"protocol.tune.space needs 1 to {len(PRIMES)} different keys, got: {listed(keys) or 'none'}")
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise Refusal(f"protocol.tune.seeds needs one or more different seeds from 0 on, got {list(self.seeds)}")
        if self.sampler == TPE and self.pruner.rungs > 1:
            raise Refusal("protocol.tune.pruner.rungs must be 1 with sampler tpe, which fixes no points to drop")
        self._check_values()

    def _check_values(self) -> None:
        grid = self.sampler == GRID
        size = math.prod(len(axis.values) for axis in self.space)
        if grid and size != self.trials:
            raise Refusal(f"protocol.tune.trials must be the size of the grid, {size}, got {self.trials}")
        if grid and (self.seed or any(axis.step for axis in self.space)):
            raise Refusal("protocol.tune.seed and step must be 0 with sampler grid, where nothing is drawn")
        for axis in self.space:
            if not grid and axis.scale != "choice" and len(axis.values) != 2:
                raise Refusal(
                    f"protocol.tune.space: {axis.key} needs its least and greatest value, got {axis.values}; "
                    f"only sampler grid lists them"
                )

    @property
    def counts(self) -> list[int]:
        """Trials of each rung."""
        found = [self.trials]
        for _ in range(self.pruner.rungs - 1):
            found.append(max(1, math.ceil(found[-1] * self.pruner.keep)))
        return found

    def steps_of(self, point: dict) -> int:
        """Optimiser steps of a trial, by its point."""
        return max(1, round(self.steps * self.pruner.keep ** (self.pruner.rungs - 1 - rung_of(point))))

    @property
    def spent(self) -> int:
        """Optimiser steps that one mixer's tuning takes."""
        each = [n * self.steps_of({"rung": rung}) for rung, n in enumerate(self.counts)]
        return sum(each) * len(self.seeds)


def rung_of(point: dict) -> int:
    return point.get("rung", 0)


def points(tune: Tune, rung: int) -> list[dict]:
    """What the trials of a rung have as their point: values, or which trial's values they will have."""
    if rung:
        return [{"rung": rung, "place": place} for place in range(tune.counts[rung])]
    if tune.sampler == TPE:
        return [{"trial": number} for number in range(tune.trials)]
    keys = [axis.key for axis in tune.space]
    if tune.sampler == GRID:
        return [dict(zip(keys, v, strict=True)) for v in itertools.product(*(axis.values for axis in tune.space))]
    return _quasi_random(tune)


def values_of(point: dict) -> dict | None:
    """The values that a trial's point holds; None if it only says whose they are."""
    return None if point.keys() & {"rung", "trial"} else point


def _quasi_random(tune: Tune) -> list[dict]:
    """Halton's sequence, shifted by the sampler's seed; a point that rounding makes equal to an earlier one is skipped.

    Written out here since the points are in the ids of runs, which a library's next version must not change.
    """
    shifts = [_uniform(tune.seed, axis.key) for axis in tune.space]
    found: list[dict] = []
    for index in range(100 * tune.trials):
        shares = [(_radical_inverse(index, p) + s) % 1 for p, s in zip(PRIMES, shifts, strict=False)]
        point = {axis.key: axis.at(share) for axis, share in zip(tune.space, shares, strict=True)}
        if point not in found:
            found.append(point)
        if len(found) == tune.trials:
            return found
    raise Refusal(f"protocol.tune.trials: the space has no {tune.trials} different points")


def _uniform(seed: int, key: str) -> float:
    bits = hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest()
    return int.from_bytes(bits, "little") / 2**64


def _radical_inverse(index: int, base: int) -> float:
    """The digits of `index` mirrored at the point: 0, 1/2, 1/4, 3/4, ... for base 2."""
    share, unit = 0.0, 1.0
    while index:
        index, digit = divmod(index, base)
        unit /= base
        share += digit * unit
    return share
