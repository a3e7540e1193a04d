"""How the primary metric answers to heads, rank, length or another key: a line an arm, its mean and t interval."""

import numpy as np

from bench.report import stats
from bench.report.analysis import Analysis
from bench.report.frame import Table, plain
from bench.report.plots import WIDTH, Look, arm_handles, arm_looks, few_ticks, legend, metric_text, title
from bench.report.responses import Response, responses

RATIO = 4  # largest over smallest value from which an axis is logarithmic
APART = 0.012  # of the width: lines that share a value of the key stand side by side, so that intervals can be seen


def figures(table: Table, analysis: Analysis):
    """One a key that has two values or more on one line."""
    for response in responses(table, analysis):
        if any(len(line) > 1 for line in response.lines.values()):
            yield f"response_{response.key.replace('.', '_')}", compose(table, analysis, response)


def compose(table: Table, analysis: Analysis, response: Response):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH * 0.72, 2.4), layout="constrained")
    ax, styles = figure.subplots(), arm_looks(table)
    place_V = scale(ax, response.values)
    shown = {name: line for name, line in response.lines.items() if len(line) > 1}
    width = place_V[-1] - place_V[0]
    for number, line in enumerate(shown.values()):
        shift = APART * width * (number - (len(shown) - 1) / 2) * min(1, 12 / len(shown))
        draw_line(ax, line, place_V + shift, styles)
    few_ticks(ax.yaxis)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_xlabel(response.key)
    measured = next(iter(next(iter(shown.values())).values()))[0]
    title(ax, response.protocol, at_floor=False)
    ax.set_ylabel(metric_text(measured))
    interval = f"mean and {100 * (1 - analysis.alpha):g} % t interval" if len(table.seeds) > 1 else "one seed"
    legend(figure, handles(shown, styles), title=interval + ", a cross: failed runs" * any_failed(shown))
    return figure


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
    found = arm_handles(looks, lines=True)
    for handle, name in zip(found, lines, strict=True):
        handle.set_label(name)
    return found


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
