"""What a report says under its wide table: differences of each declared family, responses, ranks. Plain text cells.

A Section is one table with its notes; tables.py, latex.py and terminal.py only set it. '+' is in the units of the
column, as recorded: a loss that falls has a negative difference.
"""

from dataclasses import dataclass

import numpy as np

from bench.config import MISALIGNED
from bench.report import stats
from bench.report.analysis import A_A, Analysis, Measured, Result, controls
from bench.report.frame import LEVELS, Arm, Table, plain
from bench.report.responses import Response, responses
from bench.report.stats_bootstrap import caution
from bench.report.stats_suite import wins
from bench.report.stats_tests import Interval, detectable, smallest_flip_p, t_interval
from bench.report.tables import column_title, decimals
from bench.sweep import AGAINST, PARTS, SAM

POWER = 0.8
CHANGE = ", its change along "  # in the title of a section of paired changes


@dataclass(frozen=True)
class Section:
    title: str
    head: list[str]
    lines: list[list[str]]
    left: int  # that many first columns are text
    notes: list[str]


def sections(table: Table, analysis: Analysis) -> list[Section]:
    found = []
    for kind in analysis.families:
        results = [r for r in analysis.results if r.kind == kind]
        found.append(deltas(table, analysis, results))
        found += [detail(table, r) for r in results if r.primary and r.found.tested]
    for response in responses(table, analysis):
        found.append(response_section(response))
        if several(response):
            found.append(change_section(response, table, analysis))
    return [*found, ranking(table, analysis)] if analysis.overall else found


def kind_title(table: Table, analysis: Analysis, kind: str) -> str:
    if kind == AGAINST:
        return f"Difference from {table.arms[analysis.reference].label}"
    titles = {SAM: "SAM minus not SAM", PARTS: "SAM gain in two parts"}
    return titles.get(kind, "A/A: the same mixer with other initial values")


def pair_label(table: Table, kind: str, pair: tuple[int, int]) -> str:
    first, second = (table.arms[i] for i in pair)
    if kind == PARTS:
        return part_label(first, second)
    return first.label if kind == AGAINST else f"{first.label} - {second.label}"


def part_label(first: Arm, second: Arm) -> str:
    """'low_rank, rank 8: data dependence' of the pair that begins with the misaligned arm, else '…: alignment'."""
    name, level = first.mixer["name"], LEVELS[first.mixer["sam"]].label
    rest = first.name.removeprefix(name + level)
    rest += "".join(dict.fromkeys((second.mark, first.mark)))  # of either arm
    return f"{name}{rest}: {'data dependence' if first.mixer['sam'] == MISALIGNED else 'alignment'}"


# Differences --------------------------------------------------------------------------------------------------------


def deltas(table: Table, analysis: Analysis, results: list[Result]) -> Section:
    """Pairs as rows, columns as columns: mean paired difference, its interval and its mark."""
    kind, found = results[0].kind, results[0].found
    head = ["arm", *(column_title(r.measured.column) for r in results)]
    texts = [delta_cells(r, table) for r in results]
    lines = [[pair_label(table, kind, pair), *cells] for pair, *cells in zip(found.pairs, *texts, strict=True)]
    notes = delta_notes(table, analysis, results)
    return Section(kind_title(table, analysis, kind), head, lines, 1, notes)


def delta_cells(result: Result, table: Table) -> list[str]:
    values_AS, found = result.measured.values_AS, result.found
    digits, texts = digits_of(result.measured), []
    failed_A, seeds = stats.failures(values_AS), values_AS.shape[-1]
    for place, pair in enumerate(found.pairs):
        bad = [stats.failed_text(int(failed_A[i]), seeds) for i in pair if failed_A[i]]
        texts.append(bad[0] if bad else interval_text(found.difference_P, place, digits) + result.marks()[place])
    return texts


def digits_of(measured: Measured) -> int:
    import pandas as pd

    return decimals(pd.Series(measured.values_AS.mean(-1)))


def interval_text(interval: Interval, place: int, digits: int) -> str:
    """'+0.012 [-0.003, +0.027]'; without ends for one seed."""
    estimate, low, high = (float(ends[place]) for ends in interval)
    if np.isnan(low):
        return signed(estimate, digits)
    return f"{signed(estimate, digits)} [{signed(low, digits)}, {signed(high, digits)}]"


def signed(value: float, digits: int) -> str:
    text = f"{value:+.{digits}f}"
    return text if float(text) else f"{0:.{digits}f}"


def delta_notes(table: Table, analysis: Analysis, results: list[Result]) -> list[str]:
    found = results[0].found
    level, n, size = percent(1 - found.alpha), found.seeds, len(found.pairs)
    family_note = [] if results[0].kind == A_A else [f"A family of {size}, {declared(table)}.", *left_out(table)]
    if n < 2:
        return ["One seed: differences have no interval and nothing is tested.", *family_note]
    notes = [f"Mean paired difference over n = {n} seeds [{level} t interval of the pair].", *family_note]
    notes += part_notes(table, results) if results[0].kind == PARTS else []
    if results[0].kind == A_A:
        wrong = dict.fromkeys(column_title(column) for _, column in analysis.flagged())
        says = f"WARNING: they came out different on {', '.join(wrong)}" if wrong else "nothing came out different"
        text = f"Arms that differ in nothing but the mixer's draws; {says} (paired t, Holm over all pairs and columns)."
        return [*notes, text if analysis.a_a_tested else f"{text.split(';')[0]}; {stats.FEW} them on all columns."]
    if not found.tested:
        notes.append(
            f"{stats.FEW.capitalize()}: the smallest p that sign-flips of n = {n} can reach is "
            f"{smallest_flip_p(n):.2g}, x {size} by Holm, above alpha = {found.alpha:g}. Intervals only."
        )
        return notes
    decided = " x ".join((table.primary.protocol, table.primary.metric))
    notes.append(
        f"`*` differs on the primary column ({decided}): paired t, Holm over {size}, p <= {found.alpha:g}. "
        f"`°` elsewhere, by Benjamini-Hochberg: exploration, no claim rests on it."
    )
    least = detectable(n, size, found.alpha, POWER)
    notes.append(f"A true difference of {least:.2g} SDs of paired differences is found with {percent(POWER)} chance.")
    return notes


def part_notes(table: Table, results: list[Result]) -> list[str]:
    """What the parts are, and their sums on the primary column."""
    notes = [
        "Data dependence: misaligned (each token has the features of another token of its document) minus not SAM. "
        "Alignment: SAM minus misaligned. A misaligned feature also carries what stands at the other place: where that "
        "path helps a model, data dependence looks larger and alignment smaller."
    ]
    for result in (r for r in results if r.primary):
        values_AS, found = stats.finite(result.measured.values_AS), result.found
        pairs = [(a, f) for (m, f), (a, n) in zip(found.pairs[::2], found.pairs[1::2], strict=True) if m == n]
        whole_P = t_interval(stats.differences(values_AS, pairs), 1 - found.alpha)
        names = [pair_label(table, PARTS, pair).rpartition(":")[0] for pair in pairs]
        digits = digits_of(result.measured)
        texts = [f"{name} {interval_text(whole_P, place, digits)}" for place, name in enumerate(names)]
        where = column_title(result.measured.column)
        notes.append(f"The two add up to the whole gain, which is in no family here, on {where}: {', '.join(texts)}.")
    return notes


def left_out(table: Table) -> list[str]:
    names = "; ".join(table.arms[place].label for place in controls(table))
    return [f"Controls, shown and in no family: {names}."] if names else []


def percent(share: float) -> str:
    return f"{100 * share:g} %"


def detail(table: Table, result: Result) -> Section:
    """All tests of one family on the primary column."""
    found, same_as = result.found, result.equivalence
    margin = table.sweep.family.margin
    head = [
        "arm",
        "difference",
        "BCa interval",
        "p (t, Holm)",
        "p (sign-flip, Holm)",
        "p (block model, Holm)",
        "seeds ahead",
        "verdict",
    ]
    gaps_PS = result.measured.sign * stats.differences(result.measured.values_AS, found.pairs)
    lines = []
    for i, (pair, cell, verdict) in enumerate(
        zip(found.pairs, delta_cells(result, table), found.verdicts(), strict=True)
    ):
        p = [found.adjusted_P[i], found.flip_adjusted_P[i], found.pooled_adjusted_P[i]]
        shown = [p_text(v) for v in p]
        share = wins(gaps_PS[i], 1 - found.alpha)
        ahead = f"{int((gaps_PS[i] > 0).sum())} of {found.seeds} [{share.low:.2f}, {share.high:.2f}]"
        ahead, shown = ("-" if np.isnan(share.estimate) else ahead), [bca_text(result, i), *shown]
        if same_as is not None and same_as.equivalent[i]:
            verdict += f", within ±{margin:g}"
        lines.append([pair_label(table, result.kind, pair), cell.rstrip("*°"), *shown, ahead, verdict])
    label = caution(found.seeds)
    notes = [
        "The t test decides; sign-flips are exact without normality; the block model takes all arms for equally noisy.",
        f"BCa interval{f' ({label})' if label else ''}: a bootstrap over seeds, beside the t interval. Seeds ahead: "
        "the chance of improvement on one seed, with the exact interval of Clopper and Pearson.",
    ]
    if same_as is not None:
        least = min(p for p in [*same_as.p, 1.0] if not np.isnan(p))
        notes.append(f"Equivalence (two one-sided t tests, Holm) within ±{margin:g}; smallest p {p_text(least)}.")
    return Section(f"{kind_name(result.kind)} on {column_title(result.measured.column)}", head, lines, 1, notes)


def bca_text(result: Result, place: int) -> str:
    low, high = result.bca_P.low[place], result.bca_P.high[place]
    digits = digits_of(result.measured)
    return "-" if np.isnan(low) else f"[{signed(low, digits)}, {signed(high, digits)}]"


def kind_name(kind: str) -> str:
    whats = {AGAINST: "against the reference", SAM: "of SAM", PARTS: "of the parts", A_A: "of A/A"}
    return f"Tests {whats[kind]}"


def p_text(p: float) -> str:
    return "-" if np.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def declared(table: Table) -> str:
    """Whether the records were made under the sweep's declaration as it stands now."""
    now = table.sweep.registration
    carried = sum(r.record.registration == now for r in table.rows)
    total = len(table.rows)
    if carried == total:
        return f"declared before the first run (`{now}` in all {total} records)"
    if not carried:
        return f"declared after the runs (no record carries `{now}`)"
    others: dict[str, int] = {}
    for row in table.rows:
        if row.record.registration != now:
            name = f"`{row.record.registration}`" if row.record.registration else "none"
            others[name] = others.get(name, 0) + 1
    ran = ", ".join(f"{count} under {name}" for name, count in sorted(others.items()))
    return f"declared `{now}`, which {carried} of {total} records carry; the others: {ran}"


# Responses ----------------------------------------------------------------------------------------------------------


def response_section(response: Response) -> Section:
    """Values of the key as rows, lines as columns."""
    lines = []
    for place, value in enumerate(response.values):
        cells = [value_text(*line[place]) if place in line else "-" for line in response.lines.values()]
        lines.append([plain(value), *cells])
    notes = [f"Along a line {', '.join(response.along)} may move too."] if response.along else []
    return Section(f"{response.title} by {response.key}", [response.key, *response.lines], lines, 1, notes)


def several(response: Response) -> dict[str, dict[int, tuple[Measured, int]]]:
    """The lines along which something can change."""
    return {name: line for name, line in response.lines.items() if len(line) > 1}


def change_section(response: Response, table: Table, analysis: Analysis) -> Section:
    """Paired changes from the first value of each line: the values after the first as rows, lines as columns."""
    lines = []
    for place, value in list(enumerate(response.values))[1:]:
        cells = [change_text(line, place, analysis.alpha) for line in several(response).values()]
        lines.append([plain(value), *cells])
    notes = [
        f"Mean paired change over n = {len(table.seeds)} seeds from the first value of the column"
        + (f" [{100 * (1 - analysis.alpha):g} % t interval of the one cell]." if len(table.seeds) > 1 else "."),
        "In no family, not tested: no claim rests on it.",
    ]
    return Section(change_title(response), [response.key, *several(response)], lines, 1, notes)


def change_title(response: Response) -> str:
    return f"{response.title}{CHANGE}{response.key}"


def change_text(line: dict[int, tuple[Measured, int]], place: int, alpha: float) -> str:
    """'+0.012 [-0.003, +0.027]' from the line's first value to the one at `place`; '-' with nothing to compare."""
    if place not in line or place == min(line):
        return "-"
    (before, first), (after, arm) = line[min(line)], line[place]
    changes_S = stats.finite(after.values_AS[arm]) - stats.finite(before.values_AS[first])
    found = t_interval(changes_S[None], 1 - alpha)
    return stats.FAILED if np.isnan(found.estimate[0]) else interval_text(found, 0, digits_of(after))


def value_text(measured: Measured, place: int) -> str:
    values_S, digits = measured.values_AS[place], digits_of(measured)
    if failed := stats.failed_text(int(stats.failures(values_S)), len(values_S)):
        return failed
    spread = f" ± {values_S.std(ddof=1):.{digits}f}" if len(values_S) > 1 else ""
    return f"{values_S.mean():.{digits}f}{spread}"


# Over tasks ---------------------------------------------------------------------------------------------------------


def ranking(table: Table, analysis: Analysis) -> Section:
    found = analysis.overall
    head = ["arm", "mean rank", "IQM"] + (
        [f"chance to beat {table.arms[analysis.reference].label}"] if found.improvement_A else []
    )
    lines = []
    for place, arm in enumerate(table.arms):
        cells = [span(found.rank_A, place)]
        cells.append(stats.FAILED if np.isnan(found.iqm_A.estimate[place]) else span(found.iqm_A, place))
        if found.improvement_A:
            cells.append("-" if place == analysis.reference else span(found.improvement_A, place))
        lines.append([arm.label, *cells])
    label = f": {found.caution}" if found.caution else ""
    notes = [f"[percentile bootstrap over seeds{label}]. 1 is the best rank; an arm with failed runs loses there."]
    notes.append(
        "IQM: mean of the middle half of all runs, scaled task by task: 0 the worst run of the task, 1 its best."
    )
    return Section(f"Over {found.tasks} tasks", head, lines, 1, notes)


def span(interval: Interval, place: int) -> str:
    return f"{interval.estimate[place]:.2f} [{interval.low[place]:.2f}, {interval.high[place]:.2f}]"
