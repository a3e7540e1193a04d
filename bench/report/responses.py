"""How the primary metric answers to a key: the arms along a mixer key with several values, or what the sweep varies.

The table (sections.py) and the figure (figures/responses.py) say the same.
"""

from dataclasses import dataclass

from bench.config import NEUTRAL
from bench.report.analysis import Analysis, Measured, salted
from bench.report.frame import LEVELS, Arm, Table, nested, plain, same
from bench.report.tables import column_title


@dataclass(frozen=True)
class Response:
    """Rows are values of the key, lines are arms (or what is left of them without the key)."""

    key: str
    title: str
    protocol: str  # of the primary column; without its variations where one of them is the key
    values: list  # as in the yaml
    lines: dict[str, dict[int, tuple[Measured, int]]]  # name -> place of the value -> (column, place of the arm)


def responses(table: Table, analysis: Analysis) -> list[Response]:
    keys = [by_key(table, analysis, key) for key in table.axes]
    keys = [found for found in keys if any(len(line) > 1 for line in found.lines.values())]  # else it is one of names
    return keys + [by_variation(table, analysis, key) for key in table.sweep.varies]


def by_key(table: Table, analysis: Analysis, key: str) -> Response:
    """On the primary column; a line for each mixer and what else its arms differ in."""
    measured = primary(table, analysis)
    arms = [(i, a) for i, a in enumerate(table.arms) if key in a.mixer and not salted(a)]
    values = list({plain(a.mixer[key]): a.mixer[key] for _, a in arms}.values())
    values = sorted(values) if all(type(v) in (int, float) for v in values) else values
    lines: dict[str, dict] = {}
    for place, arm in arms:
        lines.setdefault(line_label(arm, key), {})[values.index(arm.mixer[key])] = (measured, place)
    return Response(key, column_title(measured.column), measured.column.protocol, values, lines)


def line_label(arm: Arm, key: str) -> str:
    """The arm without the key, and without keys that it shares with nobody."""
    rest = [part for part in arm.label.split(", ")[1:] if not part.startswith(f"{key} ")]
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
    return Response(key, f"{base}: {metric}", base, values, lines)


def value_of(table: Table, measured: Measured, key: str):
    value = nested(table.of(measured.column.protocol)[0].record.run["protocol"], key)
    return NEUTRAL.get(f"protocol.{key}", value) if same(value, "absent") else value


def besides(protocol: str, key: str) -> list[str]:
    """'quick[task.length=64,budget.steps=10]' without `key`: what else varies."""
    inside = protocol.partition("[")[2].removesuffix("]")
    return [part for part in inside.split(",") if part and not part.startswith(f"{key}=")]


def primary(table: Table, analysis: Analysis) -> Measured:
    return next((m for m in analysis.measured if m.column == table.sweep.family.primary), analysis.measured[0])
