"""Budgets, and the search for the value of one key that brings a row nearest to one."""

import dataclasses
import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from bench import Refusal, registry
from bench.config import Named, Run, listed
from bench.match.rows import Row, figures, measured, parse_arm, runs_of, task_of, text_of
from bench.record import Capacity
from bench.tasks.base import Task

# What can be matched -> its name in a record. Most of `parameters` is shared, so a gap in it looks small.
FIGURES = {
    "parameters": "parameters",
    "mixer_parameters": "mixer_parameters",
    "flops": "flops",
    "state": "state_per_head",
}
USUAL = "mixer_parameters"  # what `--like` matches if nothing is said
HEADS = "heads"  # a knob of every mixer, but only where asked for: heads change what is compared
LARGEST = 2**14  # of a rank or a state
NEAR = 5.0  # per cent: a mixer that misses the budget by more is marked


@dataclass(frozen=True)
class Budget:
    figure: str  # a key of FIGURES
    value: float
    like: str  # the row that it was taken from, '' if it was given as a number


def parse_budget(text: str) -> Budget:
    name, _, value = text.partition("=")
    if name not in FIGURES:
        raise Refusal(f"unknown budget '{name}'; allowed: {listed(f'{figure}=…' for figure in FIGURES)}")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise Refusal(f"--budget {name} must be a number above 0, got '{value}'")
    return Budget(name, number, "")


def budget_like(word: str, figure: str, protocol: str, common: dict) -> Budget:
    """The figure of one arm as the budget of the others."""
    if figure not in FIGURES:
        raise Refusal(f"unknown figure --by {figure}; allowed: {listed(FIGURES)}")
    runs = runs_of(protocol, common, parse_arm(word), every_level=False)
    if len(runs) > 1:
        raise Refusal(f"--like '{word}' means {len(runs)} rows under these keys; it must mean one")
    row = measured(runs[0])
    if row.capacity is None:
        raise Refusal(f"--like {row.name}: {row.note}")
    value = figure_of(row.capacity, figure)
    if value < 0:
        raise Refusal(f"--like {row.name}: its {figure} grows with the length; match another figure with --by")
    if value == 0:
        raise Refusal(f"--like {row.name}: its {figure} is 0, which leaves nothing to match")
    under = f" under {row.protocol}" if row.protocol != protocol else ""
    return Budget(figure, value, f"{row.name} {text_of(row.args)}{under}")


def met(row: Row) -> bool:
    return row.gap is not None and abs(row.gap) <= NEAR


def figure_of(capacity: Capacity, figure: str) -> int:
    return getattr(capacity, FIGURES[figure])


def turned(run: Run, knob: str, value: int) -> Run:
    return dataclasses.replace(run, mixer=Named(run.mixer.name, {**run.mixer.args, knob: value}))


def values_allowed(run: Run, task: Task, knob: str) -> list[int]:
    """The values of a knob that the mixer accepts in this setting, ascending."""
    cls, args = registry.mixer_class(run.mixer.name), registry.mixer_args(run)
    now = registry.grant(run, task, args)
    found = []
    for value in cls.heads_allowed(now.heads * now.head_width) if knob == HEADS else range(1, LARGEST + 1):
        try:
            other = dataclasses.replace(args, **{knob: value})
        except Refusal:
            continue
        if not cls.unfit(registry.grant(run, task, other), other):
            found.append(value)
    return found


def nearest(values: list[int], figure: Callable[[int], int], goal: float, rising: bool) -> int:
    """The value whose figure is nearest to the goal, the smallest of equals.

    With `rising` (the figure never falls from one value to the next) by bisection, else by a look at every value.
    """
    if not rising:
        return min(values, key=lambda value: (abs(figure(value) - goal), value))
    at = bisect_left(values, goal, key=figure)
    ends = values[at : at + 1]
    if at:
        ends.append(values[bisect_left(values, figure(values[at - 1]), key=figure)])  # the first of a level stretch
    return min(ends, key=lambda value: (abs(figure(value) - goal), value))


def knob_of(row: Row, asked: str) -> tuple[str, str]:
    """The knob to turn for a row, and why there is none."""
    knobs = registry.mixer_class(row.name).knobs
    if wrong := [knob for knob in knobs if type(row.args.get(knob)) is not int]:
        raise Refusal(f"mixer '{row.name}' names knobs that are no integer keys of its own: {listed(wrong)}")
    if asked == HEADS or asked in knobs:
        return asked, ""
    if asked:
        return "", f"no knob {asked}; it has: {listed((*knobs, HEADS))}"
    return (knobs[0], "") if knobs else ("", f"no knob but {HEADS}")


def matched(run: Run, row: Row, budget: Budget, asked: str) -> Row:
    """The row with its knob turned to where its figure is nearest to the budget, and the gap that is left."""
    if row.capacity is None:
        return row
    if figure_of(row.capacity, budget.figure) < 0:
        return dataclasses.replace(row, note=f"{budget.figure} grows with the length")
    knob, note = knob_of(row, asked)
    if knob:
        task = task_of(run)

        @cache
        def figure(value: int) -> int:
            return figure_of(figures(turned(run, knob, value), task), budget.figure)

        values = values_allowed(run, task, knob)
        if len({figure(value) for value in (values if knob == HEADS else values[:1] + values[-1:])}) < 2:
            note = f"{knob} does not change its {budget.figure}"
        else:
            run = turned(run, knob, nearest(values, figure, budget.value, rising=knob != HEADS))
            row = dataclasses.replace(measured(run), knob=knob, was=row.args[knob])
    gap = 100 * (figure_of(row.capacity, budget.figure) / budget.value - 1)
    if abs(gap) > NEAR:
        note = "; ".join(filter(None, (f"missed by more than {NEAR:g} %", note)))
    return dataclasses.replace(row, gap=gap, note=note)


def matched_all(found: list[tuple[Run | None, Row]], budget: Budget, knob: str) -> list[Row]:
    """Every row brought nearest to the budget by the knob asked for, or by its mixer's first."""
    fit = [row for _, row in found if row.capacity]
    known = sorted({HEADS, *(own for row in fit for own in registry.mixer_class(row.name).knobs)})
    if knob and knob not in known:
        raise Refusal(f"unknown --knob {knob}; these mixers have: {listed(known)}")
    shared = min(row.capacity.parameters - row.capacity.mixer_parameters for row in fit)
    if budget.figure == "parameters" and budget.value < shared:
        raise Refusal(f"--budget parameters={budget.value:,.0f} is impossible: {shared:,} are there without any mixer")
    return [matched(run, row, budget, knob) for run, row in found]
