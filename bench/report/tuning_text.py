"""What a report says of tuning: choices, response curves, what a smaller budget would have found, and the ranks."""

import math
from dataclasses import replace

import numpy as np

from bench.report.frame import Table, plain
from bench.report.sections import Section
from bench.report.stats_suite import kendall
from bench.report.tables import decimals
from bench.report.tuning import Tuned, steps_name, text_of
from bench.tune import Trial

LINES = 24  # of a response


def marked(table: Table, found: list[Tuned]) -> Table:
    """The table with a mark on every cell whose tuned point lies on the edge, and what it means."""
    edges = frozenset((one.arm.key, one.protocol) for one in found if one.edges)
    if not edges:
        return table
    where = ", ".join(f"{one.arm.label} on {one.protocol} ({', '.join(one.edges)})" for one in found if one.edges)
    note = f"(edge): the tuned value is the least or the greatest that was tried, a better one may lie beyond: {where}."
    return replace(table, edges=edges, notes=(*table.notes, note))


def sections(found: list[Tuned]) -> list[Section]:
    made = []
    for protocol in dict.fromkeys(one.protocol for one in found):
        group = [one for one in found if one.protocol == protocol]
        made += [choices(group), response(group), budgets(group), *ranks(group)]
    return made


def choices(group: list[Tuned]) -> Section:
    """Arms as rows: the point that won, its score, and what became of the trials."""
    one, metric = group[0], group[0].tune.selection.metric.replace("_", " ")
    lines = []
    for own in group:
        best, ended = winner(own), [o for rung in own.rungs for t in rung for o in t.outcomes]
        lost = {o: ended.count(o) for o in ended if o != "ok"}
        text = ", ".join(f"{n} {o}" for o, n in lost.items()) or "-"
        point = text_of(own.values) + (f" (edge: {', '.join(own.edges)})" if own.edges else "")
        score = "-" if best is None else f"{best.score:.{places(group)}f}"
        lines.append([own.arm.label, point if own.values else "no trial came out", score, str(len(ended)), text])
    tune = one.tune
    seeds = f"seed{'s' * (len(tune.seeds) > 1)} {', '.join(map(str, tune.seeds))}"
    notes = [
        f"{len(one.trials)} trials of each arm ({tune.sampler.replace('_', '-')} over {space_text(group)}), "
        f"{steps_name(tune)}, tuning {seeds}, ranked by {metric} on {tune.selection.examples:,} examples that no run "
        f"of the protocol trains on and none reports; ties by number.",
        "Each arm spent the same steps; what diverged, is unfit or was given up counts as a loss and as spent.",
    ]
    head = ["arm", "point", f"selection {metric}", "runs", "losses"]
    return Section(f"Tuning of {one.protocol}", head, lines, 2, notes)


def winner(one: Tuned) -> Trial | None:
    best = [t for t in one.rungs[-1] if t.score is not None and t.values == one.values]
    return best[0] if best else None


def space_text(group: list[Tuned]) -> str:
    each = []
    for one in group:
        axes = [f"{a.key} {', '.join(plain(v) for v in a.values)}" for a in one.tune.space]
        each.append("; ".join(axes))
    return " or ".join(dict.fromkeys(each))


def places(group: list[Tuned]) -> int:
    import pandas as pd

    return decimals(pd.Series([t.score for one in group for t in one.trials if t.score is not None], dtype=float))


# Curves -------------------------------------------------------------------------------------------------------------


def response(group: list[Tuned]) -> Section:
    """Points as rows, arms as columns: scores of the first rung."""
    metric, digits = group[0].tune.selection.metric.replace("_", " "), places(group)
    points = {text_of(t.values): t.values for one in group for t in one.trials if t.values}
    order = sorted(points, key=lambda text: tuple(map(sortable, points[text].values())))
    scores = [{text_of(t.values): t for t in one.trials} for one in group]
    lines = []
    for text in order[:LINES]:
        cells = [cell(one, trials.get(text), digits) for one, trials in zip(group, scores, strict=True)]
        lines.append([text, *cells])
    notes = [f"Selection {metric} after {group[0].trials[0].runs[0].steps:,} steps; * the point that won."]
    if len(order) > LINES:
        notes.append(f"The first {LINES} of {len(order)} points; the figure has all.")
    return Section(f"Response of {group[0].protocol}", ["point", *(one.arm.label for one in group)], lines, 1, notes)


def sortable(value) -> tuple:
    return (0, value, "") if isinstance(value, int | float) else (1, 0, str(value))


def cell(one: Tuned, trial: Trial | None, digits: int) -> str:
    if trial is None:
        return "-"
    if trial.score is None:
        return next(o for o in trial.outcomes if o != "ok")
    return f"{trial.score:.{digits}f}" + " *" * (trial.values == one.values)


def filled_scores(group: list[Tuned]) -> dict[str, list[float]]:
    """Arm -> scores of its trials, losses at the worst score of any arm; [] if no trial of any arm came out."""
    worst = [one.sign * t.score for one in group for t in one.trials if t.score is not None]
    if not worst:
        return {one.arm.label: [] for one in group}
    at = group[0].sign * max(worst)
    return {one.arm.label: [at if t.score is None else t.score for t in one.trials] for one in group}


def best_of(scores: list[float], sign: int, k: int) -> float:
    """Expected best of k of the trials, drawn without replacement: exact, over all subsets. `sign` 1: least is best."""
    best_first = sorted(scores, key=lambda score: sign * score)
    n = len(best_first)
    return sum(score * math.comb(n - 1 - i, k - 1) for i, score in enumerate(best_first)) / math.comb(n, k)


def budgets(group: list[Tuned]) -> Section:
    """Numbers of trials as rows, arms as columns."""
    scores, digits, n = filled_scores(group), places(group), len(group[0].trials)
    counts = sorted({*(2**i for i in range(n.bit_length())), n})
    lines = [
        [str(k), *(f"{best_of(v, group[0].sign, k):.{digits}f}" if v else "-" for v in scores.values())] for k in counts
    ]
    metric = group[0].tune.selection.metric.replace("_", " ")
    notes = [
        f"Expected best selection {metric} of k of the {n} trials, over all subsets; a loss counts as the worst score "
        f"of any arm. The less a column still moves at {n}, the less would more trials have found."
    ]
    return Section(f"Best of k trials, {group[0].protocol}", ["trials", *scores], lines, 1, notes)


# Ranks --------------------------------------------------------------------------------------------------------------


def ranks(group: list[Tuned]) -> list[Section]:
    """Ranks of the arms at their own points and at one point for all; [] if the arms have no points in common."""
    common = [text_of(t.values) for t in group[0].trials if t.values]
    tried = [{text_of(t.values): t.score for t in one.trials if t.values} for one in group]
    common = [text for text in common if all(text in scores for scores in tried)]
    if len(group) < 2 or not common:
        return []
    sign = group[0].sign
    one_point = {text: ranked([scores[text] for scores in tried], sign) for text in common}
    best = [winner(one) for one in group]
    tuned_A = ranked([b.score if b else None for b in best], sign)
    usual = nearest(group[0], common)
    lines = []
    for place, one in enumerate(group):
        every = [r[place] for r in one_point.values()]
        lines.append([one.arm.label, *(rank_text(r) for r in (tuned_A[place], one_point[usual][place]))])
        lines[-1] += [f"{rank_text(min(every))} to {rank_text(max(every))}"]
    agree = {text: kendall(-tuned_A, -r_A, 0.95).tau for text, r_A in one_point.items()}
    low = min(agree, key=lambda text: (agree[text], text))
    notes = [
        f"Ranks by the selection's score, 1 is best, ties share their mean rank. {usual} is the trial nearest to what "
        f"the protocol has without tuning ({text_of(group[0].own)}).",
        f"Kendall's tau-b with the tuned order: {tau_text(agree[usual])} at {usual}; least {tau_text(agree[low])} at "
        f"{low}. Means over {len(group[0].tune.seeds)} tuning seed(s): an orientation, no test.",
    ]
    head = ["arm", "rank, each tuned", f"rank at {usual}", "ranks at one point for all"]
    return [Section(f"What tuning did to the order, {group[0].protocol}", head, lines, 1, notes)]


def ranked(scores: list[float | None], sign: int) -> np.ndarray:
    """Ranks from 1 (best), ties share their mean; losses are last."""
    values = np.array([np.inf if s is None else sign * s for s in scores])
    return np.array([(values < v).sum() + ((values == v).sum() + 1) / 2 for v in values])


def nearest(one: Tuned, texts: list[str]) -> str:
    """The common point that is nearest to the protocol's own values, each axis measured by its span and scale."""
    points = {text_of(t.values): t.values for t in one.trials}

    def distance(text: str) -> float:
        total = 0.0
        for axis in one.tune.space:
            own, value = one.own[axis.key], points[text][axis.key]
            if axis.scale == "choice":
                total += own != value
            elif axis.scale == "log" and own > 0:
                total += abs(math.log(value / own)) / math.log(axis.values[-1] / axis.values[0])
            else:
                total += abs(value - own) / (axis.values[-1] - axis.values[0])
        return total

    return min(texts, key=lambda text: (distance(text), texts.index(text)))


def rank_text(rank: float) -> str:
    return f"{rank:g}"


def tau_text(tau: float) -> str:
    return "undefined" if math.isnan(tau) else f"{tau:.2f}"


# Proof --------------------------------------------------------------------------------------------------------------


def proof(found: list[Tuned]) -> dict:
    """For the certificate: by protocol and arm the trials that were looked at, their outcomes and the values taken."""
    every: dict[str, dict] = {}
    for one in found:
        runs = {r.id: o for rung in one.rungs for t in rung for r, o in zip(t.runs, t.outcomes, strict=True)}
        steps, edges = one.tune.spent, list(one.edges)
        values = {"values": one.values, "edges": edges, "steps": steps, "trials": runs}
        every.setdefault(one.protocol, {})[one.arm.label] = values
    return every


def short(found: list[Tuned]) -> list[str]:
    """Lines for the foot of the table."""
    lines = []
    for protocol in dict.fromkeys(one.protocol for one in found):
        one = next(one for one in found if one.protocol == protocol)
        each = f"{sum(one.tune.counts)} trials and {one.tune.spent:,} steps for every arm"
        lines.append(f"Tuned: `{protocol}`, {each}; selection data and tuning seeds are in no reported number.")
    return lines
