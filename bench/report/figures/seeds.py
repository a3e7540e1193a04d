"""Every number of the table: one panel a column, one row an arm, a dot a seed, their mean with its t interval.

Seeds are spread over the height of a row in a fixed order: one seed can be followed from arm to arm.
"""

import numpy as np

from bench.report import stats
from bench.report.analysis import Analysis, Measured
from bench.report.frame import Table
from bench.report.plots import (
    DARK,
    Look,
    arm_looks,
    failed,
    few_ticks,
    legend,
    level_handles,
    named_rows,
    stacked,
    title,
    whiskers,
    window,
)
from bench.report.variants import shared, variants


def figures(table: Table, analysis: Analysis):
    styles = arm_looks(table)
    columns = [measured.column for measured in analysis.measured]
    tall, names = 0.55 + 0.19 * len(table.arms), [look.label for look in styles]
    figure, axes, firsts = stacked(len(columns), variants(columns), tall, names)
    limits = shared(columns, [limits_of(measured) for measured in analysis.measured])
    for ax, measured, first, ends in zip(axes, analysis.measured, firsts, limits, strict=True):
        ax.set_xlim(*ends)
        panel(ax, measured, styles, first)
    legend(figure, [*level_handles(table), *more_handles(table, analysis)])
    yield "seeds", figure


def limits_of(measured: Measured) -> tuple[float, float]:
    kept, interval_A = stats.failures(measured.values_AS) == 0, measured.interval_A
    return window(measured.values_AS[kept], interval_A.low[kept], interval_A.high[kept])


def panel(ax, measured: Measured, styles: list[Look], first: bool) -> None:
    values_AS, interval_A = measured.values_AS, measured.interval_A
    n, failed_A = values_AS.shape[1], stats.failures(values_AS)
    kept = failed_A == 0
    named_rows(ax, [look.label for look in styles], first)
    offset_S = 0.5 * (np.arange(n) / max(n - 1, 1) - 0.5) if n > 1 else np.zeros(1)
    for height, (look, letters) in enumerate(zip(styles, measured.letters, strict=True)):
        if kept[height]:
            ax.plot(values_AS[height], height + offset_S, ls="", zorder=3, **look.dot(3.4 if n <= 3 else 2.4))
        else:
            failed(ax, height, stats.failed_text(failed_A[height], n))
        if letters:
            ax.text(1.01, height, letters, transform=ax.get_yaxis_transform(), va="center", size=6)
    if n > 1:
        rows = np.flatnonzero(kept)
        whiskers(ax, interval_A, rows)
        ax.vlines(interval_A.estimate[rows], rows - 0.3, rows + 0.3, color=DARK, lw=1.1, zorder=5)
    few_ticks(ax.xaxis)
    title(ax, measured.column.protocol, measured.at_floor)
    ax.set_xlabel(measured.column.metric.replace("_", " "))


def more_handles(table: Table, analysis: Analysis) -> list:
    from matplotlib.lines import Line2D

    found = []
    if len(table.seeds) > 1:
        text = f"mean and {100 * (1 - analysis.alpha):g} % t interval"
        found.append(Line2D([], [], color=DARK, lw=0.9, marker="|", ms=6, mew=1.1, label=text))
    if any("".join(m.letters) for m in analysis.measured):
        found.append(Line2D([], [], ls="", label="a, b: arms that share no letter differ"))
    if any(a.departed for a in table.arms):
        found.append(Line2D([], [], ls="", label="[n] declared departure"))
    return found
