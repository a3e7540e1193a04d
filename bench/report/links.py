"""Which runs stand behind a number of a section: its arms and its column, found by the labels of row, head and title.

A section (sections.py, published.py) is plain text; its labels are those of arms, pairs and columns, unique in a table.
"""

from dataclasses import dataclass
from functools import cached_property

from bench.report.analysis import Analysis
from bench.report.frame import Table
from bench.report.responses import Response, responses
from bench.report.sections import (
    Section,
    change_title,
    kind_name,
    kind_title,
    pair_label,
    response_section,
    several,
)
from bench.report.tables import column_title
from bench.sweep import AGAINST

ALL = "all"  # columns


@dataclass(frozen=True)
class Links:
    """Finds the runs of a table's numbers. An address is 'runs=<arm>[,<arm>]/<column>', places from 0 or `ALL`."""

    table: Table
    analysis: Analysis

    def address(self, arms: tuple[int, ...], column: int | str) -> str:
        return f"runs={','.join(map(str, arms))}/{column}"

    @cached_property
    def titles(self) -> dict[str, int]:
        """Heads of columns -> places among the measured ones."""
        found = {}
        for place, measured in enumerate(self.analysis.measured):
            column = measured.column
            found[column_title(column)] = found[f"{column.protocol} {column.metric}"] = place
            found.setdefault(f"{column.protocol} score", place)
            if self.analysis.average and column == self.analysis.average.column:
                found["GLUE average"] = place
        return found

    @cached_property
    def names(self) -> dict[str, tuple[int, ...]]:
        """Labels of arms and of pairs -> places of arms."""
        found = {arm.label: (place,) for place, arm in enumerate(self.table.arms)}
        for kind, pairs in self.analysis.families.items():
            if kind != AGAINST:
                found |= {pair_label(self.table, kind, pair): pair for pair in pairs}
        return found

    def arms(self, label: str, section: Section) -> tuple[int, ...]:
        """Arms of a row's label: beside the arm itself the reference, where the section compares with it."""
        found = self.names.get(label, ())
        if len(found) == 1 and self.against(section) and found[0] != self.analysis.reference:
            return (*found, self.analysis.reference)
        return found

    def against(self, section: Section) -> bool:
        """Whether the section's numbers are of an arm and the reference."""
        if AGAINST not in self.analysis.families:
            return False
        titles = (kind_title(self.table, self.analysis, AGAINST), kind_name(AGAINST))
        return section.title.startswith(titles)

    def column(self, text: str) -> int | None:
        """The column that a head or a title speaks of."""
        places = [(len(name), place) for name, place in self.titles.items() if same_title(name, text)]
        return max(places)[1] if places else None

    def of(self, section: Section) -> list[list[str]]:
        """An address for each cell of a section's lines, '' where no run stands behind it."""
        if section.title in self.responses:
            return self.of_response(self.responses[section.title])
        if section.title in self.changes:
            return self.of_change(self.changes[section.title])
        heads = [self.column(text) for text in section.head]
        own, everyone = self.column(section.title), tuple(range(len(self.table.arms)))
        found = []
        for line in section.lines:
            over = self.column(line[0])
            arms = self.arms(line[0], section) or (everyone if over is not None else ())
            found.append([""] * section.left)
            for text, head, column in list(zip(line, section.head, heads, strict=True))[section.left :]:
                where = next((c for c in (column, over, own) if c is not None), ALL)
                bare = text == "-" or head.startswith("published") or not arms
                found[-1].append("" if bare else self.address(arms, where))
        return found

    @cached_property
    def responses(self) -> dict[str, Response]:
        """By the titles of their sections."""
        return {response_section(r).title: r for r in responses(self.table, self.analysis)}

    @cached_property
    def changes(self) -> dict[str, Response]:
        """Likewise, of those along which something can change."""
        return {change_title(r): r for r in responses(self.table, self.analysis) if several(r)}

    def of_response(self, response: Response) -> list[list[str]]:
        """Each cell is one arm on one column."""
        places = {id(measured): place for place, measured in enumerate(self.analysis.measured)}
        found = []
        for value in range(len(response.values)):
            cells = [line.get(value) for line in response.lines.values()]
            found.append(["", *(self.address((arm[1],), places[id(arm[0])]) if arm else "" for arm in cells)])
        return found

    def of_change(self, response: Response) -> list[list[str]]:
        """Each cell is two arms on one column, or one arm on two: then on all."""
        places = {id(measured): place for place, measured in enumerate(self.analysis.measured)}
        found = []
        for value in range(1, len(response.values)):
            found.append([""])
            for line in several(response).values():
                (before, first), (after, arm) = line[min(line)], line.get(value, (None, None))
                where = places[id(after)] if after is before else ALL
                bare = after is None or value == min(line)
                found[-1].append("" if bare else self.address(tuple(dict.fromkeys((arm, first))), where))
        return found


def same_title(name: str, text: str) -> bool:
    """Whether a head or a section's title names the column: alone, before ': ours' or ' by …', or after ' on '."""
    begins = text.startswith((f"{name}: ours", f"{name} of ", f"{name} by "))
    return text == name or begins or text.endswith(f" on {name}")
