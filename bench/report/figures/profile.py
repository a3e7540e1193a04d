"""Performance profile over tasks: the share of runs (task and seed) above each scaled score; beside it the IQM.

Scaled task by task: 0 the worst run of all arms, 1 the best. A curve that lies above another everywhere is better for
any threshold; where curves cross, the means hide it. Bands are bootstraps over seeds.
"""

import numpy as np

from bench.report import stats
from bench.report.analysis import THRESHOLDS_K, Analysis
from bench.report.frame import Table
from bench.report.plots import WIDTH, arm_handles, arm_looks, failed, few_ticks, legend, named_rows, whiskers


def figures(table: Table, analysis: Analysis):
    """Needs what analysis.Overall needs: two tasks, seeds and arms."""
    found = analysis.overall
    if found is None:
        return
    from matplotlib.figure import Figure

    styles = arm_looks(table)
    figure = Figure(figsize=(WIDTH, max(2.1, 0.45 + 0.16 * len(styles))), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
    for place, look in enumerate(styles):
        share, low, high = (ends[place] for ends in found.profile_AK)
        left.fill_between(THRESHOLDS_K, low, high, color=look.colour, alpha=0.1, lw=0)
        middle = [int(np.argmin(np.abs(share - 0.5)))]
        left.plot(THRESHOLDS_K, share, color=look.colour, ls=look.dashes, lw=0.9, markevery=middle, **look.dot(3))
    left.set_xlabel("scaled score: 0 the worst run of a task, 1 its best")
    left.set_ylabel("share of runs above it")
    left.set_xlim(0, 1)
    left.set_ylim(0, 1.01)
    left.spines[["top", "right"]].set_visible(False)
    iqm(right, found, styles)
    level = f"{found.tasks} tasks x {len(table.seeds)} seeds; {100 * (1 - analysis.alpha):g} % bootstrap over seeds"
    legend(figure, arm_handles(styles, lines=True), title=level + (f": {found.caution}" if found.caution else ""))
    yield "profile", figure


def iqm(ax, found, styles: list) -> None:
    estimate = found.iqm_A.estimate
    ax.set_xlim(-0.02, 1.02)
    named_rows(ax, [look.label for look in styles], first=True)
    whole = ~np.isnan(estimate)
    for height, look in enumerate(styles):
        if whole[height]:
            ax.plot([estimate[height]], [height], ls="", zorder=5, **look.dot(4))
        else:
            failed(ax, height, stats.FAILED)
    whiskers(ax, found.iqm_A, np.flatnonzero(whole))
    few_ticks(ax.xaxis)
    ax.set_xlabel("IQM of the scaled scores")
