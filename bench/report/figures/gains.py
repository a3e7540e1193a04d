"""Forest plots: paired differences of each declared family, one row a pair: a dot a seed, the mean, its t interval.

The grey band on the primary column is the declared margin of equivalence.
"""

import numpy as np

from bench.report import stats
from bench.report.analysis import A_A, Analysis, Result
from bench.report.frame import Table
from bench.report.plots import (
    DARK,
    Look,
    arm_looks,
    difference_label,
    failed,
    few_ticks,
    legend,
    named_rows,
    stacked,
    title,
    whiskers,
    window,
)
from bench.report.sections import kind_title, pair_label
from bench.report.variants import shared, variants
from bench.sweep import PARTS, SAM

NAMES = {SAM: "sam_gain", PARTS: "sam_parts"}


def figures(table: Table, analysis: Analysis):
    """One a family; an A/A family has none."""
    styles = arm_looks(table)
    for kind, pairs in analysis.families.items():
        if kind == A_A:
            continue
        results = [r for r in analysis.results if r.kind == kind]
        names = [row_name(table, kind, pair) for pair in pairs]
        columns = [result.measured.column for result in results]
        figure, axes, firsts = stacked(len(results), variants(columns), 0.75 + 0.2 * len(pairs), names)
        limits = shared(columns, [limits_of(result) for result in results])
        for ax, result, first, ends in zip(axes, results, firsts, limits, strict=True):
            ax.set_xlim(*ends)
            named_rows(ax, names, first)
            panel(ax, result, styles, table.sweep.family.margin)
        legend(figure, handles(table, results, kind_title(table, analysis, kind)))
        yield NAMES.get(kind, "differences"), figure


def limits_of(result: Result) -> tuple[float, float]:
    """With 0 inside."""
    gaps_PS = stats.differences(stats.finite(result.measured.values_AS), result.found.pairs)
    interval = result.found.difference_P
    whole = ~np.isnan(interval.estimate)
    left, right = window(gaps_PS[whole], interval.low[whole], interval.high[whole])
    room = 0.04 * (right - left)
    return min(left, -room), max(right, room)


def panel(ax, result: Result, styles: list[Look], margin: float) -> None:
    values_AS, interval, pairs = result.measured.values_AS, result.found.difference_P, result.found.pairs
    gaps_PS, n = stats.differences(stats.finite(values_AS), pairs), values_AS.shape[1]
    whole = ~np.isnan(interval.estimate)
    ax.axvline(0, color="0.35", lw=0.7, zorder=1)
    if result.primary and margin:
        ax.axvspan(-margin, margin, color="0.9", lw=0, zorder=0)
    offset_S = 0.4 * (np.arange(n) / max(n - 1, 1) - 0.5) if n > 1 else np.zeros(1)
    for height, ((own, other), mark) in enumerate(zip(pairs, result.marks(), strict=True)):
        if not whole[height]:
            failed(ax, height, failed_text(values_AS, own, other))
            continue
        look, dot = styles[own], {"marker": styles[own].marker, "ms": 1.8, "mec": "none", "alpha": 0.7}
        ax.plot(gaps_PS[height], height + offset_S, ls="", mfc=look.colour, **dot)
        ax.plot([interval.estimate[height]], [height], ls="", zorder=5, **look.dot(4.2))
        if mark:
            ax.text(1.01, height, mark, transform=ax.get_yaxis_transform(), va="center", size=7)
    if n > 1:
        whiskers(ax, interval, np.flatnonzero(whole))
    few_ticks(ax.xaxis)
    ax.tick_params(axis="x", length=2.5 * whole.any(), labelbottom=bool(whole.any()))
    title(ax, result.measured.column.protocol, result.measured.at_floor)
    better = "larger" if result.measured.sign > 0 else "smaller"
    ax.set_xlabel(difference_label(result.measured.column.metric, better))


def row_name(table: Table, kind: str, pair: tuple[int, int]) -> str:
    """The pair's; of SAM against not SAM the arm that both stem from, unless one departs where the other does not."""
    own, other = (table.arms[place] for place in pair)
    return other.label if kind == SAM and own.mark == other.mark else pair_label(table, kind, pair)


def failed_text(values_AS: np.ndarray, own: int, other: int) -> str:
    """Of the pair's first arm that has failed runs."""
    counts, runs = stats.failures(values_AS), values_AS.shape[1]
    return stats.failed_text(int(counts[own] or counts[other]), runs)


def handles(table: Table, results: list[Result], what: str) -> list:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    found, family = results[0].found, table.sweep.family
    if found.seeds < 2:
        return [Line2D([], [], ls="", label=f"{what}; one seed, so no interval")]
    text = f"{what}: seeds (small), their mean (large) and {100 * (1 - found.alpha):g} % t interval of the pair"
    shown = [Line2D([], [], color=DARK, lw=0.9, marker="|", ms=6, mew=1.1, label=text)]
    if found.tested:
        shown.append(Line2D([], [], ls="", label="* differs (primary column, Holm)   ° exploration (BH)"))
    else:
        shown.append(Line2D([], [], ls="", label=f"n = {found.seeds}: {stats.FEW}"))
    if family.margin and any(r.primary for r in results):
        shown.append(Patch(fc="0.9", label=f"margin ±{family.margin:g}"))
    return shown
