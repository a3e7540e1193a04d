"""summary.md: what a table answers in plain lines, with intervals, and no claim that the statistics do not carry.

Every number is one of the report's tables; what words surround it depends on the verdict alone.
"""

import numpy as np

from bench.report import contrasts, cost, orders, published, stats
from bench.report.analysis import A_A, Analysis, Measured, Result, controls
from bench.report.frame import LEFT_OUT, Table, seeds_text
from bench.report.responses import primary
from bench.report.sections import (
    CHANGE,
    Section,
    declared,
    digits_of,
    interval_text,
    p_text,
    pair_label,
    percent,
)
from bench.report.tables import bullets, column_title, numbered_departures
from bench.sweep import AGAINST, PARTS, SAM

WORDS = {AGAINST: "Against {reference}", SAM: "SAM against not SAM", PARTS: "The SAM gain in two parts"}


def markdown(table: Table, analysis: Analysis, more: list[Section]) -> str:
    """`more`: the sections of the report, of which those on cost, protocols and orders are said in lines."""
    measured = primary(table, analysis)
    parts = [f"# {table.sweep.name} in short", table.sweep.question]
    for shown in [measured, *(m for m in analysis.measured if m.column not in table.columns)]:  # GLUE's average
        better = "larger" if shown.sign > 0 else "smaller"
        parts += [
            f"## Means on {column_title(shown.column)} ({better} is better)",
            bullets(means(table, shown, analysis.alpha)),
        ]
    for kind in (k for k in analysis.families if k != A_A):
        result = analysis.result(kind, measured.column)
        name = WORDS[kind].format(reference=table.arms[analysis.reference or 0].label)
        parts += [f"## {name}", bullets(verdicts(table, result))]
    parts += ["## Noise and limits", bullets(limits(table, analysis))]
    for section in more:
        if CHANGE in section.title:
            parts += [f"## {section.title}", bullets([*along(section), *section.notes])]
        if section.title.startswith((contrasts.TITLE, orders.CARRIED, orders.TITLE)):
            parts += [f"## {section.title}", bullets([*said(section), *section.notes])]
        if section.title == cost.TITLE:
            parts += [f"## {section.title}", bullets(costs(section))]
    return "\n\n".join(parts) + "\n"


def means(table: Table, measured: Measured, alpha: float) -> list[str]:
    """Arms from the best mean on; controls and A/A arms stand in their place, named as such. Then what departs."""
    mean_A = measured.interval_A.estimate
    order = sorted(range(len(mean_A)), key=lambda a: (np.isnan(mean_A[a]), -measured.sign * mean_A[a]))
    digits, lines = digits_of(measured), []
    for place in order:
        estimate, low, high = (float(ends[place]) for ends in measured.interval_A)
        spread = "" if np.isnan(low) else f" [{low:.{digits}f}, {high:.{digits}f}]"
        what = ", a control" if place in controls(table) else ""
        failed = stats.failed_text(int(stats.failures(measured.values_AS)[place]), len(table.seeds))
        lines.append(f"{table.arms[place].label}{what}: {failed or f'{estimate:.{digits}f}{spread}'}")
    level = f" [{percent(1 - alpha)} t interval]" if len(table.seeds) > 1 else ""
    return [
        *lines,
        *numbered_departures(table),
        f"Mean{level} over n = {len(table.seeds)} ({seeds_text(table.seeds)}).",
    ]


def verdicts(table: Table, result: Result) -> list[str]:
    """What differs, what does not, each with its interval; the sign is the column's."""
    found, digits = result.found, digits_of(result.measured)
    names = [pair_label(table, result.kind, pair) for pair in found.pairs]
    groups: dict[str, list[str]] = {}
    for i, verdict in enumerate(found.verdicts()):
        estimate = result.measured.sign * found.difference_P.estimate[i]
        text = names[i]
        if verdict != stats.FAILED:
            text += f" {interval_text(found.difference_P, i, digits)}"
        if verdict in (stats.DIFFERS, stats.OPEN):
            text += f", p {p_text(found.adjusted_P[i])}"
            same = result.equivalence is not None and result.equivalence.equivalent[i]
            text += f", within ±{table.sweep.family.margin:g}" * bool(same)
        word = verdict if verdict != stats.DIFFERS else "better" if estimate > 0 else "worse"
        groups.setdefault(word, []).append(text)
    order = ("better", "worse", stats.OPEN, stats.FEW, stats.FAILED)
    lines = [f"{word}: {'; '.join(groups[word])}." for word in order if word in groups]
    test = f"p: paired t, Holm over {len(names)}; " if found.tested else ""
    level = f"[{percent(1 - found.alpha)} t interval of one pair]; " if found.seeds > 1 else ""
    return [*lines, f"n = {found.seeds}; {level}{test}{declared(table)}."]


def limits(table: Table, analysis: Analysis) -> list[str]:
    """Seeds that are not whole, A/A, floors, arms that are too alike, what is not comparable with the paper."""
    found = [note for note in table.notes if note.startswith(LEFT_OUT)]
    if A_A in analysis.families:
        wrong = [column_title(c) for _, c in analysis.flagged()]
        text = f"came out different on {', '.join(wrong)}: noise passes for an effect" if wrong else "nothing differs"
        text = text if analysis.a_a_tested else f"{stats.FEW} them on all columns"
        result = analysis.result(A_A, primary(table, analysis).column)
        gaps = [
            interval_text(result.found.difference_P, i, digits_of(result.measured))
            for i in range(len(result.found.pairs))
        ]
        found.append(f"A/A, one mixer twice with other draws: {'; '.join(gaps)}; {text}.")
    found += [
        f"At floor, so it tells no arms apart: {column_title(m.column)}." for m in analysis.measured if m.at_floor
    ]
    if primary(table, analysis).no_letters:
        found.append("Which of all pairs of arms differ: there are too few seeds for that many tests.")
    for section in published.beside(table, analysis):
        recipes = [note.removeprefix(published.DIFFER) for note in section.notes if note.startswith(published.DIFFER)]
        found += [f"Not the recipe of {section.title.split(', ')[-1]}: {recipe}" for recipe in recipes]
    return found or ["Nothing beyond the arms, data and scale of this table."]


def said(section: Section) -> list[str]:
    """'low_rank SAM: loss +0.1 [..], loss far …' of each line."""
    heads = section.head[section.left :]
    return [
        f"{line[0]}: {', '.join(f'{h} {c}' for h, c in zip(heads, line[1:], strict=True))}" for line in section.lines
    ]


def along(section: Section) -> list[str]:
    """'low_rank SAM: 2 +0.1 [..], 4 …' of each line of a response, which is a column."""
    values, *columns = zip(*section.lines, strict=True)
    names = section.head[section.left :]
    return [
        f"{name}: {', '.join(f'{v} {c}' for v, c in zip(values, cells, strict=True))}"
        for name, cells in zip(names, columns, strict=True)
    ]


def costs(section: Section) -> list[str]:
    every = dict(zip(section.head, section.lines[-1], strict=True))
    apart = ", ".join(f"{name} {every[name]}" for name in cost.PARTS)
    return [
        f"{every['runs']} runs took {every['minutes']} minutes: training {every['training']}, {apart}.",
        *(note for note in section.notes if not note.startswith(cost.EACH)),
    ]
