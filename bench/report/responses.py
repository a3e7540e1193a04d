"""How a metric answers to a key: the arms along a mixer key with several values, what the sweep varies, or the length
of the rows that a task reads after training ('loss_at_256').

The table (sections.py) and the figures (figures/responses.py, length_plot.py) say the same.
"""

import re
from dataclasses import dataclass

from bench.config import NEUTRAL
from bench.report.analysis import Analysis, Measured, salted
from bench.report.frame import LEVELS, Arm, Table, nested, plain, same
from bench.report.tables import column_title, departed_text


@dataclass(frozen=True)
class Response:
    """Rows are values of the key, lines are arms (or what is left of them without the key)."""

    key: str
    title: str
    protocol: str  # of the primary column; without its variations where one of them is the key
    values: list  # as in the yaml
    lines: dict[str, dict[int, tuple[Measured, int]]]  # name -> place of the value -> (column, place of the arm)
    along: tuple[str, ...]  # other keys of the mixers that move with it, so that their values go unnamed


LENGTH = "length"  # as a response's key


def responses(table: Table, analysis: Analysis) -> list[Response]:
    keys = [key for place, key in enumerate(table.axes) if not follows(table, key, table.axes[:place])]
    found = [by_key(table, analysis, key) for key in keys]
    found = [r for r in found if any(len(line) > 1 for line in r.lines.values())]  # else it is one of names
    return found + [by_variation(table, analysis, key) for key in table.sweep.varies] + by_length(table, analysis)


def kin(table: Table) -> list[list[Arm]]:
    """The arms of each mixer and level that depart alike."""
    groups: dict[tuple, list[Arm]] = {}
    for arm in table.arms:
        if not salted(arm):
            groups.setdefault((arm.mixer["name"], arm.mixer["sam"], departed_text(arm)), []).append(arm)
    return list(groups.values())


def told_apart(arms: list[Arm], key: str) -> bool:
    """Whether no two of the arms have the same value of the key."""
    return all(key in a.mixer for a in arms) and len({plain(a.mixer[key]) for a in arms}) == len(arms)


def follows(table: Table, key: str, earlier: tuple[str, ...]) -> bool:
    """Whether wherever a mixer has several values of the key, an earlier key tells its arms apart already."""
    moved = [arms for arms in kin(table) if len({plain(a.mixer.get(key)) for a in arms}) > 1]
    return bool(moved) and all(any(told_apart(arms, other) for other in earlier) for arms in moved)


def by_key(table: Table, analysis: Analysis, key: str) -> Response:
    """On the primary column; a line for each mixer and what else its arms differ in."""
    measured = primary(table, analysis)
    arms = [(i, a) for i, a in enumerate(table.arms) if key in a.mixer and not salted(a)]
    values = list({plain(a.mixer[key]): a.mixer[key] for _, a in arms}.values())
    values = sorted(values) if all(type(v) in (int, float) for v in values) else values
    lines: dict[str, dict] = {}
    alone = {arm.key for group in kin(table) if told_apart(group, key) for arm in group}
    for place, arm in arms:
        name = f"{arm.mixer['name']}{LEVELS[arm.mixer['sam']].label}" if arm.key in alone else line_label(arm, key)
        name += arm.mark  # what departs stands on no line with what does not
        lines.setdefault(name, {})[values.index(arm.mixer[key])] = (measured, place)
    along = tuple(other for other in table.axes if other != key and follows(table, other, (key,)))
    return Response(key, column_title(measured.column), measured.column.protocol, values, lines, along)


def line_label(arm: Arm, key: str) -> str:
    """The arm without the key, without keys that it shares with nobody, and without its mark."""
    rest = [part for part in arm.name.split(", ")[1:] if not part.startswith(f"{key} ")]
    return ", ".join([f"{arm.mixer['name']}{LEVELS[arm.mixer['sam']].label}", *rest])


def by_variation(table: Table, analysis: Analysis, key: str) -> Response:
    """The primary metric over the variations of its protocol; a line an arm (and what else varies beside the key)."""
    base, metric = table.sweep.family.primary.protocol.split("[", 1)[0], table.sweep.family.primary.metric
    shown = [m for m in analysis.measured if (m.column.protocol.split("[", 1)[0], m.column.metric) == (base, metric)]
    found = [value_of(table, measured, key) for measured in shown]
    values = list({plain(v): v for v in found}.values())
    lines: dict[str, dict] = {}
    for measured, value in zip(shown, found, strict=True):
        for place, arm in enumerate(table.arms):
            name = ", ".join([arm.label, *besides(measured.column.protocol, key)])
            lines.setdefault(name, {})[values.index(value)] = (measured, place)
    return Response(key, f"{base}: {metric}", base, values, lines, ())


def by_length(table: Table, analysis: Analysis) -> list[Response]:
    """A line an arm over the lengths of columns like 'loss_at_64', 'loss_at_256' of one protocol."""
    groups: dict[tuple[str, str], dict[int, Measured]] = {}
    for measured in analysis.measured:
        if found := re.fullmatch(r"(.+)_at_(\d+)", measured.column.metric):
            groups.setdefault((measured.column.protocol, found[1]), {})[int(found[2])] = measured
    responses = []
    for (protocol, metric), at in groups.items():
        values = sorted(at)
        lines = {a.label: {v: (at[n], i) for v, n in enumerate(values)} for i, a in enumerate(table.arms)}
        responses.append(Response(LENGTH, f"{protocol}: {metric}", protocol, values, lines, ()))
    return responses


def value_of(table: Table, measured: Measured, key: str):
    value = nested(table.of(measured.column.protocol)[0].record.run["protocol"], key)
    return NEUTRAL.get(f"protocol.{key}", value) if same(value, "absent") else value


def besides(protocol: str, key: str) -> list[str]:
    """'quick[task.length=64,budget.steps=10]' without `key`: what else varies."""
    inside = protocol.partition("[")[2].removesuffix("]")
    return [part for part in inside.split(",") if part and not part.startswith(f"{key}=")]


def primary(table: Table, analysis: Analysis) -> Measured:
    return next((m for m in analysis.measured if m.column == table.primary), analysis.measured[0])
