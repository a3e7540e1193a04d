"""Training curves: one panel a protocol, one line an arm, the mean over seeds with its t interval step by step. Of many
arms of few mixers, in one protocol, each mixer has its panel.

With two seeds a t interval is wider than any panel, so each seed has its line. An arm with failed runs has no mean:
each of its seeds has a line, and a cross where a run ended.
"""

from dataclasses import dataclass

import numpy as np

from bench.report.analysis import Analysis
from bench.report.frame import Row, Table
from bench.report.plots import CROWD, Look, arm_handles, arm_looks, few_ticks, legend, panels, title
from bench.report.stats_tests import t_interval

FEWEST = 3  # seeds of a band
MOST = 8  # panels of mixers
WARM_UP = 0.25  # share of the steps whose losses may run out of the top of the panel


@dataclass(frozen=True)
class Trace:
    """One arm's training losses at the steps that all its seeds have."""

    step_K: np.ndarray
    loss_SK: np.ndarray  # replicas averaged
    ended: tuple[int, ...]  # seeds (places) with a run that is not ok


def figures(table: Table, analysis: Analysis):
    """None if no run has a curve of two points."""
    found = {p: traces(table, p) for p in table.protocols()}
    found = {p: of for p, of in found.items() if any(len(t.step_K) > 1 for t in of if t)}
    if not found:
        return
    styles = arm_looks(table)
    apart = by_mixer(table, found)
    shown = apart or found
    figure, axes, firsts = panels(len(shown), 2.0, [])
    for ax, (name, of), first in zip(axes, shown.items(), firsts, strict=True):
        panel(ax, of, styles, 1 - analysis.alpha)
        if apart:  # on one scale, since they are of one protocol
            ax.set_ylim(*limits([t for ts in apart.values() for t in ts if t]))
        title(ax, name, at_floor=False)
        ax.set_xlabel("optimiser steps")
        ax.set_ylabel("training loss" if first else "")
    drawn = [look for place, look in enumerate(styles) if any(of[place] for of in found.values())]
    lost = any(t.ended for of in found.values() for t in of if t)
    title_text = says(table, analysis) + "; of an arm with failed runs each seed, a cross where one ended" * lost
    legend(figure, arm_handles(drawn, lines=True), title=title_text)
    yield "curves", figure


def by_mixer(table: Table, found: dict[str, list[Trace | None]]) -> dict[str, list[Trace | None]]:
    """'protocol: mixer' -> the traces of its arms alone; none where all arms can be told apart in one panel."""
    names = list(dict.fromkeys(arm.mixer["name"] for arm in table.arms))
    if len(found) > 1 or len(table.arms) <= CROWD or len(names) > MOST:
        return {}
    ((protocol, of),) = found.items()
    pairs = list(zip(table.arms, of, strict=True))
    own = {name: [trace if arm.mixer["name"] == name else None for arm, trace in pairs] for name in names}
    return {f"{protocol}: {name}": traces for name, traces in own.items() if any(traces)}


def says(table: Table, analysis: Analysis) -> str:
    n = len(table.seeds)
    if n < FEWEST:
        return "one seed" if n == 1 else f"each of {n} seeds"
    return f"mean of {n} seeds and {100 * (1 - analysis.alpha):g} % t interval step by step"


def traces(table: Table, protocol: str) -> list[Trace | None]:
    """Of each arm, None where nothing was trained."""
    rows: dict[str, dict[int, list[Row]]] = {}
    for row in table.of(protocol):
        if row.record.curve:
            rows.setdefault(row.arm, {}).setdefault(row.seed, []).append(row)
    return [trace(table, rows[arm.key]) if arm.key in rows else None for arm in table.arms]


def trace(table: Table, rows: dict[int, list[Row]]) -> Trace:
    curves = {seed: [dict(r.record.curve) for r in of] for seed, of in rows.items()}
    ended = [seed for seed, of in rows.items() if any(r.record.outcome != "ok" for r in of)]
    every = [set(c) for seed, of in curves.items() if seed not in ended for c in of] or [
        set(c) for of in curves.values() for c in of
    ]
    step_K = np.array(sorted(set.intersection(*every)))
    loss_SK = np.array(
        [np.mean([[c.get(k, np.nan) for k in step_K.tolist()] for c in of], axis=0) for of in curves.values()]
    )
    return Trace(step_K, loss_SK, tuple(list(curves).index(seed) for seed in ended))


def panel(ax, found: list[Trace | None], styles: list[Look], level: float) -> None:
    from matplotlib.collections import PolyCollection

    shown = [(t, look) for t, look in zip(found, styles, strict=True) if t]
    bands = []
    for one, look in shown:
        if one.ended or len(one.loss_SK) < FEWEST:
            each_seed(ax, one, look)
        else:
            mean_K, low_K, high_K = t_interval(one.loss_SK.T, level)
            bands.append((np.concatenate([[one.step_K, low_K], [one.step_K[::-1], high_K[::-1]]], axis=1).T, look))
            ax.plot(one.step_K, mean_K, color=look.colour, ls=look.dashes, lw=0.9)
            ax.plot(one.step_K[-1:], mean_K[-1:], ls="", clip_on=False, **look.dot(3))
    areas = PolyCollection([area for area, _ in bands], facecolors=[look.colour for _, look in bands], alpha=0.16, lw=0)
    ax.add_collection(areas, autolim=False)
    ax.set_ylim(*limits([t for t, _ in shown]))
    few_ticks(ax.xaxis)
    few_ticks(ax.yaxis)
    ax.spines[["top", "right"]].set_visible(False)


def each_seed(ax, one: Trace, look: Look) -> None:
    for place, loss_K in enumerate(one.loss_SK):
        ax.plot(one.step_K, loss_K, color=look.colour, ls=look.dashes, lw=0.6)
        there = np.flatnonzero(np.isfinite(loss_K))[-1:]
        dot = (
            {"marker": "X", "ms": 5.5, "mec": "0.1", "mfc": look.colour, "mew": 0.6}
            if place in one.ended
            else look.dot(2.6)
        )
        ax.plot(one.step_K[there], loss_K[there], ls="", zorder=5, **dot)


def limits(found: list[Trace]) -> tuple[float, float]:
    """Of the losses after WARM_UP; runs that failed do not count where others did not."""
    whole = [t for t in found if not t.ended] or found
    late = [t.loss_SK[:, t.step_K >= WARM_UP * t.step_K[-1]] for t in whole]
    low, high = min(np.nanmin(v) for v in late), max(np.nanmax(v) for v in late)
    room = 0.04 * (high - low or abs(high) or 1)
    return low - room, high + room
