"""The figure of lengths: a metric over the length of the rows that it is read in, and tokens a second over the length.

The second panel needs what `mixerbench speed` measured of the same mixers, as speed/speed.json beside the report.
"""

import re
from pathlib import Path

import numpy as np

from bench.report import plots, speed
from bench.report.analysis import Analysis
from bench.report.figures.responses import draw_lines, handles, says_of
from bench.report.frame import Table, nested
from bench.report.responses import LENGTH, Response, responses

MEASURED = Path("speed") / "speed.json"  # in a report's folder
ISSUED = ("graph", "fast")  # ways of a layer in a training: on one GPU, and where there is none of these


def draw(table: Table, analysis: Analysis, target: Path) -> list[Path]:
    """Write figures/length.png and .pdf for each metric that a task reads at two lengths or more."""
    found = [r for r in responses(table, analysis) if r.key == LENGTH and len(r.values) > 1]
    rates = rates_of(table, target / MEASURED) if found and (target / MEASURED).exists() else {}
    paths = []
    for place, response in enumerate(found):
        with plots.settings():
            name = "length" if place == 0 else f"length_{place + 1}"
            paths += plots.save(compose(table, analysis, response, rates), target / "figures" / name)
    return paths


def rates_of(table: Table, path: Path) -> dict[int, list[tuple[int, dict]]]:
    """Place of an arm -> (length, quartiles of tokens a second) of its layer as training runs it, ascending."""
    places = {(a.mixer["name"], tuple(sorted(own(a.mixer)))): i for i, a in enumerate(table.arms)}
    found: dict[int, list[tuple[int, dict]]] = {}
    timed = speed.load(path)["rows"]
    issued = next((way for way in ISSUED if any(row.get("way") == way for row in timed)), None)
    for row in timed:
        place = places.get((row["mixer"], tuple(sorted(own(row["args"])))))
        if place is not None and row.get("way") == issued and row["seconds"]:
            tokens = row["batch"] * row["length"]
            spread = {key: tokens / row["seconds"][key] for key in ("q1", "median", "q3")}
            found.setdefault(place, []).append((row["length"], spread))
    return {place: sorted(points, key=lambda point: point[0]) for place, points in found.items()}


def own(args: dict) -> list[tuple[str, str]]:
    return [(key, str(value)) for key, value in args.items() if key != "name"]


def compose(table: Table, analysis: Analysis, response: Response, rates: dict):
    """Panels one above the other, with the same lengths."""
    from matplotlib.figure import Figure

    tall = 2.1 if rates else 2.4
    figure = Figure(figsize=(plots.WIDTH * 0.72, tall * (1 + bool(rates))), layout="constrained")
    axes = figure.subplots(1 + bool(rates), 1, sharex=True, squeeze=False)[:, 0]
    styles = plots.arm_looks(table)
    trained = nested(table.of(response.protocol)[0].record.run["protocol"], "task.length")
    draw_lines(axes[0], response.lines, np.log2(response.values), styles)
    axes[0].set_ylabel(re.sub(r" at \d+", "", axes[0].get_ylabel()))
    plots.title(axes[0], response.protocol, at_floor=False)
    if rates:
        draw_rates(axes[1], rates, styles)
    for ax in axes:
        ax.axvline(np.log2(trained), color="0.8", lw=0.8, zorder=0)
        ax.spines[["top", "right"]].set_visible(False)
    lengths = sorted({*response.values, *(length for points in rates.values() for length, _ in points)})
    axes[-1].set_xticks(np.log2(lengths), [f"{length:,}" for length in lengths])
    axes[-1].set_xlabel("length of a row, tokens")
    says = f"{says_of(table, analysis, response.lines)}; grey: the length of training"
    plots.legend(figure, handles(response.lines, styles), title=says)
    return figure


def draw_rates(ax, rates: dict, styles: list[plots.Look]) -> None:
    """Median, and a bar from quartile to quartile."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    for place, points in rates.items():
        look, at = styles[place], np.log2([length for length, _ in points])
        low, middle, high = ([spread[key] for _, spread in points] for key in ("q1", "median", "q3"))
        ax.plot(at, middle, color=look.colour, ls=look.dashes, lw=1, zorder=3, **look.dot(3.6))
        ax.vlines(at, low, high, color=look.colour, lw=0.8, zorder=2)
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_ylabel("tokens a second")
    ax.set_title("one layer, forward and backward: medians with quartiles", loc="left")
