"""Protocols of one task on one axis: how far each arm is from the reference in every one of them.

In the forest plots of `gains` each column has an axis of its own, which hides what a change of the protocol does.
"""

import numpy as np

from bench.report import contrasts, stats
from bench.report.analysis import Analysis, Result
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
    panels,
    window,
)
from bench.report.sections import kind_title
from bench.sweep import AGAINST

ROOM = 0.6  # of a row's height, for all its protocols
PALE = 0.45


def figures(table: Table, analysis: Analysis):
    """A panel for each metric that several of the protocols have; needs a family against a reference."""
    protocols = contrasts.compared(table, analysis)
    found = {(r.measured.column.protocol, r.measured.column.metric): r for r in analysis.results if r.kind == AGAINST}
    metrics = [m for m in dict.fromkeys(m for _, m in found) if sum((p, m) in found for p in protocols) > 1]
    if not metrics:
        return
    styles = arm_looks(table)
    names = [styles[own].label for own, _ in analysis.families[AGAINST]]
    figure, axes, firsts = panels(len(metrics), 0.75 + 0.3 * len(names), names)
    for ax, metric, first in zip(axes, metrics, firsts, strict=True):
        named_rows(ax, names, first)
        panel(ax, [found.get((protocol, metric)) for protocol in protocols], styles)
        better = "smaller" if found[protocols[0], metric].measured.sign < 0 else "larger"
        ax.set_xlabel(difference_label(metric, better))
    level = f"mean and {100 * (1 - analysis.alpha):g} % t interval of the pair" if len(table.seeds) > 1 else "one seed"
    legend(figure, handles(protocols), title=f"{kind_title(table, analysis, AGAINST)}: {level}")
    yield "protocols", figure


def panel(ax, results: list[Result | None], styles: list[Look]) -> None:
    """A row an arm; inside it one dot a protocol, from above in their order, the first in full colour."""
    every = [r.found.difference_P for r in results if r]
    estimate, low, high = (np.concatenate([interval[end] for interval in every]) for end in range(3))
    left, right = window(*(ends[np.isfinite(estimate)] for ends in (estimate, low, high)))
    room = 0.04 * (right - left)
    ax.set_xlim(min(left, -room), max(right, room))
    ax.axvline(0, color="0.35", lw=0.7, zorder=1)
    for place, result in enumerate(results):
        shift = ROOM * ((place + 0.5) / len(results) - 0.5)
        for row, (own, _) in enumerate(result.found.pairs if result else ()):
            middle, low, high = (float(ends[row]) for ends in result.found.difference_P)
            if np.isnan(middle):
                failed(ax, row + shift, stats.FAILED)
                continue
            ax.plot([low, high], [row + shift] * 2, color=DARK, lw=0.9, alpha=PALE if place else 1, zorder=4)
            ax.plot(middle, row + shift, ls="", alpha=PALE if place else 1, zorder=5, **styles[own].dot(4.2))
    few_ticks(ax.xaxis)


def handles(protocols: list[str]) -> list:
    """Shades, since markers have the shapes of their mixers."""
    from matplotlib.patches import Patch

    return [Patch(fc="0.2", lw=0, label=name, alpha=PALE if place else 1) for place, name in enumerate(protocols)]
