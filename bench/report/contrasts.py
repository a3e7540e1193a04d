"""Protocols of one task compared: what a change of the protocol (no convolution, a confound) does to each arm.

A column compares arms inside one protocol. Where a table has several protocols of one task, the same arm and seed can
be compared across them: the paired change of its score, and of each declared difference. Intervals only, no tests.
"""

import numpy as np

from bench.config import NEUTRAL
from bench.report import stats
from bench.report.analysis import A_A, Analysis, Measured
from bench.report.frame import Table, flattened, plain, same
from bench.report.responses import primary
from bench.report.sections import Section, digits_of, interval_text, pair_label
from bench.report.stats_tests import t_interval
from bench.report.values import ABSENT
from bench.sweep import AGAINST

TITLE = "Protocols compared"


def sections(table: Table, analysis: Analysis) -> list[Section]:
    """One for each other protocol of the primary column's task."""
    base, *others = compared(table, analysis)
    return [found for other in others if (found := changes(table, analysis, other, base))]


def compared(table: Table, analysis: Analysis) -> list[str]:
    """The primary column's protocol, then the others of its task; it alone where a key varies: that is a response."""
    base = primary(table, analysis).column.protocol
    if table.sweep.varies:
        return [base]
    return [base, *(p for p in table.protocols() if p != base and same(task(table, p), task(table, base)))]


def task(table: Table, protocol: str) -> dict:
    return table.of(protocol)[0].record.run["protocol"]["task"]


def changes(table: Table, analysis: Analysis, other: str, base: str) -> Section | None:
    """Arms, then declared pairs as rows; metrics that both protocols show as columns."""
    found = {(m.column.protocol, m.column.metric): m for m in analysis.measured}
    metrics = [metric for protocol, metric in found if protocol == base and (other, metric) in found]
    if not metrics:
        return None
    pairs = [(kind, pair) for kind, of in analysis.families.items() if kind != A_A for pair in of]
    lines = [[arm.label] for arm in table.arms] + [[gap_label(table, kind, pair)] for kind, pair in pairs]
    for metric in metrics:
        cells = change_cells(found[other, metric], found[base, metric], [pair for _, pair in pairs], analysis.alpha)
        lines = [[*line, cell] for line, cell in zip(lines, cells, strict=True)]
    head = ["arm, or difference of two", *(metric.replace("_", " ") for metric in metrics)]
    notes = [
        f"Mean paired change over n = {len(table.seeds)} seeds, {other} less {base}"
        + (f" [{100 * (1 - analysis.alpha):g} % t interval of the line]." if len(table.seeds) > 1 else "."),
        "A line of two arms: by how much their difference changes. In no family, not tested: no claim rests on it.",
        f"The protocols differ in {'; '.join(differing(table, other, base))}.",
    ]
    return Section(f"{TITLE}: {other} less {base}", head, lines, 1, notes)


def gap_label(table: Table, kind: str, pair: tuple[int, int]) -> str:
    label = pair_label(table, kind, pair)
    return f"{label} - {table.arms[pair[1]].label}" if kind == AGAINST else label


def change_cells(other: Measured, base: Measured, pairs: stats.Pairs, alpha: float) -> list[str]:
    values_AS = stats.finite(other.values_AS) - stats.finite(base.values_AS)
    gaps_PS = stats.differences(values_AS, pairs) if pairs else np.zeros((0, values_AS.shape[1]))
    every = t_interval(np.concatenate([values_AS, gaps_PS]), 1 - alpha)
    digits = digits_of(base)
    return [stats.FAILED if np.isnan(e) else interval_text(every, i, digits) for i, e in enumerate(every.estimate)]


def differing(table: Table, other: str, base: str) -> list[str]:
    """'shell.conv_width: 7 and 0' of the first arm's protocols, without what its departures declare for both."""
    flat = [flattened(table.of(p)[0].record.run["protocol"]) for p in (other, base)]
    found = []
    for key in dict.fromkeys((*flat[0], *flat[1])):
        one, two = (values.get(key, NEUTRAL.get(f"protocol.{key}", ABSENT)) for values in flat)
        if not same(one, two):
            found.append(f"{key}: {plain(one)} and {plain(two)}")
    return found
