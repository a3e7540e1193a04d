"""What a score costs: the primary column over positions a second and over the state of all heads, an arm a point.

Grey marks the arms that none beats in both. It goes through means: what lies inside an interval of it may be on it.
Where runs shared a device nothing is marked over speed: who stood beside an arm's runs made theirs what it is.
"""

from dataclasses import dataclass, replace

import numpy as np

from bench.report.analysis import Analysis, Measured
from bench.report.cost import side_by_side
from bench.report.frame import Table
from bench.report.plots import NARROW, WIDTH, Look, arm_handles, arm_looks, few_ticks, legend, metric_text, title
from bench.report.responses import primary
from bench.report.tables import capacities, count_text, throughput

GROWS = -1  # a state that grows with the length, as records hold it
ASIDE = 1.5  # octaves between the numbers and what has no logarithm: none, and growing


@dataclass(frozen=True)
class Cost:
    """Places of the arms along x, NaN for an arm without one."""

    label: str
    place_A: np.ndarray
    ticks: dict[float, str]
    less_is_better: bool
    marked: bool  # the arms that none beats


def figures(table: Table, analysis: Analysis):
    """Panels of the costs in which arms differ; needs two arms with a mean."""
    measured = primary(table, analysis)
    whole = np.isfinite(measured.interval_A.estimate)
    protocol = measured.column.protocol
    costs = speed(table, protocol), state(table, protocol, all_heads=True)
    costs = [c for c in costs if len(set(known(c.place_A[whole]))) > 1]
    if not costs:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH if len(costs) > 1 else NARROW, 2.2), layout="constrained")
    axes, styles = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0], arm_looks(table)
    for ax, cost in zip(axes, costs, strict=False):
        panel(ax, measured, cost, styles)
    title(axes[0], protocol, measured.at_floor)
    axes[0].set_ylabel(metric_text(measured))
    shown = [look for place, look in enumerate(styles) if whole[place]]
    interval = f"mean and {100 * (1 - analysis.alpha):g} % t interval" if len(table.seeds) > 1 else "one seed"
    where = "" if all(cost.marked for cost in costs) else " on the right"  # speed stands on the left
    grey = f"; grey{where}: arms that none beats in both" if any(cost.marked for cost in costs) else ""
    legend(figure, arm_handles(shown, lines=False), title=interval + grey)
    yield "pareto", figure


def known(place_A: np.ndarray) -> list[float]:
    return place_A[np.isfinite(place_A)].tolist()


def speed(table: Table, protocol: str) -> Cost:
    speed_A = np.array([throughput(table, arm, [protocol]) for arm in table.arms])
    found = by_logarithm("positions a second in training, as the runs ran", speed_A, less_is_better=False)
    if side_by_side(table, [r for r in table.rows if r.protocol == protocol and r.trained]):
        found = replace(found, label="positions a second in training, runs side by side", marked=False)
    return found


def parameters(table: Table, protocol: str) -> Cost:
    """The mixer's own."""
    found = [capacities(table, arm, [protocol], "mixer_parameters") for arm in table.arms]
    count_A = np.array([values[0] if values else np.nan for values in found], float)
    return by_logarithm("the mixer's parameters", count_A, less_is_better=True)


def by_logarithm(label: str, value_A: np.ndarray, less_is_better: bool) -> Cost:
    """No place for an arm without a value above 0."""
    place_A = np.log2(np.where(value_A > 0, value_A, np.nan))
    found = known(place_A) or [0.0]
    return Cost(label, place_A, round_ticks(min(found), max(found)), less_is_better, marked=True)


def round_ticks(low: float, high: float) -> dict[float, str]:
    """Round numbers about the values whose logarithms are `low` and `high`, by their logarithms."""
    from matplotlib.ticker import MaxNLocator

    low, high = 2**low, 2**high
    if high > 5 * low:
        found = [m * 10**k for k in range(len(str(int(high))) + 1) for m in (1, 2, 5)]
    else:
        found = [int(v) for v in MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high) if v >= 1]
    return {float(np.log2(v)): count_text(v) for v in found}


def state(table: Table, protocol: str, all_heads: bool) -> Cost:
    """By the logarithm; no state stands left of the others, one that grows with the length right of them.

    `all_heads`: of them together, so that arms with other numbers of heads can be compared; else of one.
    """
    found = [capacities(table, arm, [protocol], "state_per_head") for arm in table.arms]
    state_A = np.array([values[0] if values else np.nan for values in found], float)
    if all_heads:
        heads_A = np.array([arm.mixer["heads"] for arm in table.arms], float)
        state_A = np.where(state_A > 0, state_A * heads_A, state_A)
    positive = state_A[state_A > 0]
    low, high = (np.log2(positive.min()), np.log2(positive.max())) if len(positive) else (0.0, 0.0)
    place_A = np.log2(np.where(state_A > 0, state_A, np.nan))
    place_A = np.where(state_A == 0, low - ASIDE, np.where(state_A == GROWS, high + ASIDE, place_A))
    ticks = state_ticks(positive)
    ticks |= {low - ASIDE: "0"} if (state_A == 0).any() else {}
    ticks |= {high + ASIDE: "grows"} if (state_A == GROWS).any() else {}
    return Cost(
        "state of all heads" if all_heads else "state per head", place_A, ticks, less_is_better=True, marked=True
    )


def state_ticks(positive: np.ndarray) -> dict[float, str]:
    """The states where they are one or two, else round numbers among them: powers of two, if several lie there."""
    if len(set(positive)) <= 2:
        return {float(np.log2(v)): count_text(int(v)) for v in positive}
    low, high = np.log2(positive.min()), np.log2(positive.max())
    first, last = int(np.ceil(low)), int(np.floor(high))
    if last - first >= 2:
        return {float(k): count_text(2**k) for k in range(first, last + 1, 1 + (last - first) // 5)}
    return {place: text for place, text in round_ticks(low, high).items() if low <= place <= high}


def panel(ax, measured: Measured, cost: Cost, styles: list[Look]) -> None:
    estimate, low, high = measured.interval_A
    there = np.isfinite(cost.place_A) & np.isfinite(estimate)
    span = np.ptp(cost.place_A[there])
    place_A = cost.place_A + spread(cost.place_A, 0.022 * span)
    for place in np.flatnonzero(there):
        look = styles[place]
        if np.isfinite(low[place]):
            ax.plot([place_A[place]] * 2, [low[place], high[place]], color=look.colour, lw=0.8, zorder=2)
        ax.plot(place_A[place], estimate[place], ls="", zorder=3, **look.dot(4.4))
    cost_A = cost.place_A if cost.less_is_better else -cost.place_A
    if cost.marked:
        best = [place for place in front(cost_A, measured.sign * estimate) if there[place]]
        ax.plot(place_A[best], estimate[best], color="0.8", lw=0.8, marker="o", ms=8.5, mew=0, zorder=1)
    left, right = place_A[there].min() - 0.1 * span, place_A[there].max() + 0.1 * span
    ax.set_xlim(left, right)
    ticks = {place: text for place, text in cost.ticks.items() if left <= place <= right}
    ax.set_xticks(list(ticks), list(ticks.values()))
    ax.set_xlabel(cost.label)
    few_ticks(ax.yaxis)
    ax.spines[["top", "right"]].set_visible(False)


def spread(place_A: np.ndarray, step: float) -> np.ndarray:
    """Shifts that set arms of one place side by side."""
    shift_A = np.zeros(len(place_A))
    for place in np.unique(place_A[np.isfinite(place_A)]):
        alike = np.flatnonzero(place_A == place)
        shift_A[alike] = step * (np.arange(len(alike)) - (len(alike) - 1) / 2)
    return shift_A


def front(cost_A: np.ndarray, score_A: np.ndarray) -> list[int]:
    """Arms that no other beats in one of cost (less) and score (more) and equals in the other; by rising cost."""
    whole = np.flatnonzero(np.isfinite(cost_A) & np.isfinite(score_A))
    order = sorted(whole.tolist(), key=lambda a: (cost_A[a], -score_A[a]))
    found: list[int] = []
    for place in order:
        if not found or score_A[place] > score_A[found[-1]]:
            found.append(place)
    return found
