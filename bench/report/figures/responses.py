"""How the primary metric answers to heads, rank or another key: a line an arm, its mean and t interval.

Along a key of the mixers also what it costs: their parameters, and state per head.
"""

import numpy as np

from bench.report import stats
from bench.report.analysis import Analysis
from bench.report.figures.pareto import Cost, known, parameters, round_ticks, state
from bench.report.frame import Table, plain
from bench.report.plots import WIDTH, Look, arm_looks, few_ticks, handle, legend, metric_text, title
from bench.report.responses import LENGTH, Response, responses

RATIO = 4  # largest over smallest value from which an axis is logarithmic
APART = 0.012  # of the width: lines that share a value of the key stand side by side, so that intervals can be seen
TOGETHER = 0.25  # of the way from a value to the next, at most, that all of them take


def figures(table: Table, analysis: Analysis):
    """One a key along which there are two lines, or one of three values; length_plot.py has that of rows' lengths.

    A single line of two points says no more than their row in the table.
    """
    for response in responses(table, analysis):
        sizes = [len(line) for line in response.lines.values() if len(line) > 1]
        if response.key != LENGTH and (len(sizes) > 1 or sum(sizes) > 2):
            yield f"response_{response.key.replace('.', '_')}", compose(table, analysis, response)


def compose(table: Table, analysis: Analysis, response: Response):
    from matplotlib.figure import Figure

    shown = {name: line for name, line in response.lines.items() if len(line) > 1}
    costs = costs_of(table, response, shown)
    figure = Figure(figsize=(WIDTH if costs else WIDTH * 0.72, 2.4), layout="constrained")
    (ax, *beside), styles = figure.subplots(1, 1 + len(costs), squeeze=False)[0], arm_looks(table)
    draw_lines(ax, shown, scale(ax, response.values), styles)
    for panel, cost in zip(beside, costs, strict=True):
        draw_cost(panel, cost, shown, scale(panel, response.values), styles)
    for panel in (ax, *beside):
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_xlabel(response.key)
    title(ax, response.protocol, at_floor=False)
    along = f"; along a line {', '.join(response.along)} may move too" if response.along else ""
    legend(figure, handles(shown, styles), title=says_of(table, analysis, shown) + along)
    return figure


def says_of(table: Table, analysis: Analysis, shown: dict) -> str:
    """What dots and bars are, for a legend."""
    interval = f"mean and {100 * (1 - analysis.alpha):g} % t interval" if len(table.seeds) > 1 else "one seed"
    return interval + ", a cross: failed runs" * any_failed(shown)


def draw_lines(ax, shown: dict, place_V: np.ndarray, styles: list[Look]) -> None:
    """Side by side where they share a value, with the metric's name."""
    for line, shift in zip(shown.values(), shifts(shown, place_V), strict=True):
        draw_line(ax, line, place_V + shift, styles)
    few_ticks(ax.yaxis)
    measured = next(iter(next(iter(shown.values())).values()))[0]
    ax.set_ylabel(metric_text(measured))


def shifts(shown: dict, place_V: np.ndarray) -> np.ndarray:
    others = max(len(shown) - 1, 1)
    way_V = np.abs(np.diff(place_V))
    step = min(APART * np.ptp(place_V), TOGETHER * way_V.min() / others)
    return step * (np.arange(len(shown)) - (len(shown) - 1) / 2)


def costs_of(table: Table, response: Response, shown: dict) -> list[Cost]:
    """Those that move along a line, for a key of the mixers."""
    if response.key not in table.axes:
        return []
    lines = [[place for _, place in line.values()] for line in shown.values()]
    found = [parameters(table, response.protocol), state(table, response.protocol, all_heads=False)]
    return [cost for cost in found if any(len(set(known(cost.place_A[line]))) > 1 for line in lines)]


def draw_cost(ax, cost: Cost, shown: dict, place_V: np.ndarray, styles: list[Look]) -> None:
    for line, shift in zip(shown.values(), shifts(shown, place_V), strict=True):
        places = [line[v][1] for v in sorted(line)]
        look = styles[places[-1]]
        at = place_V[sorted(line)] + shift
        ax.plot(at, cost.place_A[places], color=look.colour, ls=look.dashes, lw=1, **look.dot(3.6))
    low, high = ax.get_ylim()
    ticks = {place: text for place, text in cost.ticks.items() if low <= place <= high}
    if len(ticks) < 2:  # those of all arms may lie outside of these
        ticks = {place: text for place, text in round_ticks(low, high).items() if low <= place <= high}
    ax.set_yticks(list(ticks), list(ticks.values()))
    ax.set_title(cost.label, loc="left")


def draw_line(ax, line: dict, place_V: np.ndarray, styles: list[Look]) -> None:
    """Over the values that the line has; an arm with failed runs is a cross at the bottom and breaks the line."""
    at = [place_V[v] for v in sorted(line)]
    cells = [line[v] for v in sorted(line)]
    estimate, low, high = (
        np.array([getattr(m.interval_A, end)[place] for m, place in cells]) for end in ("estimate", "low", "high")
    )
    look = styles[cells[-1][1]]
    ax.plot(at, estimate, color=look.colour, ls=look.dashes, lw=1, zorder=3, **look.dot(3.6))
    if np.isfinite(low).any():
        ax.vlines(at, low, high, color=look.colour, lw=0.8, zorder=2)
    lost = [x for x, value in zip(at, estimate, strict=True) if np.isnan(value)]
    if lost:
        cross = {"marker": "X", "ms": 5.5, "mec": "0.1", "mfc": look.colour, "mew": 0.6, "clip_on": False}
        ax.plot(lost, [0.04] * len(lost), ls="", transform=ax.get_xaxis_transform(), zorder=5, **cross)


def any_failed(lines: dict) -> bool:
    return any(stats.failures(m.values_AS[place]) for line in lines.values() for m, place in line.values())


def handles(lines: dict, styles: list[Look]) -> list:
    """Handles with the lines' names."""
    looks = [styles[line[max(line)][1]] for line in lines.values()]
    return [handle(look, name, line=True) for look, name in zip(looks, lines, strict=True)]


def scale(ax, values: list) -> np.ndarray:
    """Places of the values along x: numbers as they are or by their logarithm, anything else in order."""
    from matplotlib.ticker import NullLocator

    numbers = all(type(v) in (int, float) for v in values)
    place_V = np.array(values if numbers else range(len(values)), float)
    if numbers and place_V.min() > 0 and place_V.max() >= RATIO * place_V.min():
        place_V = np.log2(place_V)
    ax.set_xticks(place_V, [plain(v) for v in values])
    ax.xaxis.set_minor_locator(NullLocator())
    return place_V
