"""The figure of tuning: for each protocol the response along every tuned key, and the expected best of k trials."""

import textwrap
from pathlib import Path

from bench.report import plots
from bench.report.frame import Table
from bench.report.plots import Look
from bench.report.tuning import Tuned
from bench.report.tuning_text import best_of, filled_scores

LINE = 40  # letters of a panel's title


def draw(table: Table, found: list[Tuned], folder: Path) -> list[Path]:
    """Write tuning.png and tuning.pdf; nothing where nothing was tuned."""
    if not found:
        return []
    shown = []
    for protocol in dict.fromkeys(one.protocol for one in found):
        group = [one for one in found if one.protocol == protocol]
        keys = dict.fromkeys(axis.key for one in group for axis in one.tune.space if axis.scale != "choice")
        shown += [(group, key) for key in keys] + [(group, "")]
    styles = dict(zip([a.key for a in table.arms], plots.arm_looks(table), strict=True))
    with plots.settings():
        figure, axes, _ = plots.panels(len(shown), 2.0, [])
        for ax, (group, key) in zip(axes, shown, strict=True):
            response(ax, group, key, styles) if key else budgets(ax, group, styles)
            ax.spines[["top", "right"]].set_visible(False)
        says = "ring: the trial that won; a cross on top: a loss (diverged, unfit or given up)"
        plots.legend(figure, plots.arm_handles(list(styles.values()), lines=True), title=says)
        return plots.save(figure, folder / "tuning")


def response(ax, group: list[Tuned], key: str, styles: dict[str, Look]) -> None:
    """Scores along one key. Points that differ in other keys too are not joined."""
    for one in group:
        look, joined = styles[one.arm.key], len(one.tune.space) == 1
        there = sorted((t for t in one.trials if key in t.values), key=lambda t: t.values[key])
        if fine := [(t.values[key], t.score) for t in there if t.score is not None]:
            line = {"color": look.colour, "ls": look.dashes if joined else "", "lw": 0.8}
            ax.plot(*zip(*fine, strict=True), **line, **look.dot(2.8))
        for t in there:
            if t.score is None:
                look_of_loss = {"color": look.colour, "ms": 4, "transform": ax.get_xaxis_transform(), "clip_on": False}
                ax.plot(t.values[key], 1.0, "x", **look_of_loss)
            elif t.values == one.values:
                ax.plot(t.values[key], t.score, "o", ms=7, mfc="none", mec=look.colour, mew=0.8)
    scales = {axis.scale for one in group for axis in one.tune.space if axis.key == key}
    ax.set_xscale("log" if scales == {"log"} else "linear")
    finish(ax, group, key)


def budgets(ax, group: list[Tuned], styles: dict[str, Look]) -> None:
    for one, scores in zip(group, filled_scores(group).values(), strict=True):
        look, counts = styles[one.arm.key], range(1, len(scores) + 1)
        ax.plot(counts, [best_of(scores, one.sign, k) for k in counts], color=look.colour, ls=look.dashes, lw=0.9)
    plots.few_ticks(ax.xaxis)
    finish(ax, group, "trials, best of k expected")


def finish(ax, group: list[Tuned], name: str) -> None:
    """A log scale for losses that span more than a factor of five."""
    selection, scores = group[0].tune.selection, [t.score for one in group for t in one.trials if t.score is not None]
    if selection.goal == "min" and scores and min(scores) > 0 and max(scores) > 5 * min(scores):
        ax.set_yscale("log")
    else:
        plots.few_ticks(ax.yaxis)
    ax.set_title(textwrap.fill(group[0].protocol.replace(",", ", "), LINE), loc="left")
    ax.set_xlabel(name)
    ax.set_ylabel(f"selection {selection.metric.replace('_', ' ')}")
