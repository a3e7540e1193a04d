"""Whether two orders of the arms agree within the SAM arms and within the others: ours and the published one, that of a
pretraining and those of its fine-tunings. Descriptive.

Over all arms most of the agreement is the split between the two groups, which any order shares that puts SAM first: so
each group is looked at by itself, beside what that split alone would give. Two published rows are left out.
"""

import numpy as np

from bench.report.analysis import Analysis, lower_is_better
from bench.report.frame import Table
from bench.report.published import Ours, broken_rows, numbers, ours, places, printed
from bench.report.sections import Section
from bench.report.stats_suite import kendall
from bench.report.tables import column_title

LEAST = 3  # arms of a group whose order says anything
TITLE = "Orders with SAM and without, beside Table"
CARRIED = "Orders of fine-tunings, beside"
HEAD = ["column", "all arms", "SAM arms", "not SAM arms", "SAM split alone"]
ALONE = "SAM split alone: what an order gives on average that puts all SAM arms first and is blind inside the groups."


def sections(table: Table, analysis: Analysis) -> list[Section]:
    """For each published table that has enough of our arms with SAM and without; a line a column."""
    found = carried(table, analysis)
    for name in dict.fromkeys(p.table for p in numbers()):
        values = {(p.row, p.key): p.value for p in numbers() if p.table == name}
        rows = places(table, name)
        broken = broken_rows(name)
        kept = [i for i, row in rows.items() if row not in broken]
        sam_A = np.array([table.arms[i].mixer["sam"] is True for i in kept], bool)
        if min(sam_A.sum(), (~sam_A).sum()) < LEAST:
            continue
        lines = []
        for column in ours(table, analysis):
            theirs_A = sign_of(column) * np.array([printed(rows[i], column, values) for i in kept])
            if not np.isnan(theirs_A).all():
                lines.append([column.title, *agreement(means(column)[kept], theirs_A, sam_A)])
        why = {table.arms[i].label: broken[row] for i, row in rows.items() if row in broken}
        if lines:
            found.append(Section(f"{TITLE} {name}", HEAD, lines, 1, notes(why)))
    return found


def carried(table: Table, analysis: Analysis) -> list[Section]:
    """What a pretraining's order, on its first column, tells of its fine-tunings; none without enough arms."""
    children = {p for p in table.protocols() if table.of(p)[0].record.run["protocol"]["init"]}
    base = next((m for m in analysis.measured if m.column.protocol not in children), None)
    kept = [i for i, arm in enumerate(table.arms) if not arm.mixer.get("salt", 0)]
    sam_A = np.array([table.arms[i].mixer["sam"] is True for i in kept], bool)
    if base is None or not children or min(sam_A.sum(), (~sam_A).sum()) < LEAST:
        return []
    before_A = base.sign * base.interval_A.estimate[kept]
    columns = [c for c in ours(table, analysis) if c.protocol in children or not c.protocol]
    lines = [[c.title, *agreement(means(c)[kept], before_A, sam_A)] for c in columns]
    text = "Kendall's tau-b of the arms' means, without A/A arms; descriptive: the noise of seeds is not in it."
    return [Section(f"{CARRIED} {column_title(base.column)}", HEAD, lines, 1, [text, ALONE])]


def sign_of(column: Ours) -> int:
    return -1 if lower_is_better(column.key.split(".")[-1]) else 1


def means(column: Ours) -> np.ndarray:
    """Over seeds, an arm an entry; larger is better."""
    return sign_of(column) * column.values_AS.mean(-1)


def agreement(mine_A: np.ndarray, theirs_A: np.ndarray, sam_A: np.ndarray) -> list[str]:
    """Cells of a line; of both orders larger is better."""
    cells = []
    for group_A in (np.ones_like(sam_A), sam_A, ~sam_A):
        found = kendall(mine_A[group_A], theirs_A[group_A], 0.95)
        cells.append("-" if np.isnan(found.tau) else f"{found.tau:+.2f} ({found.arms} arms)")
    alone = split(theirs_A, sam_A)
    return [*cells, "-" if np.isnan(alone) else f"{alone:+.2f}"]


def split(theirs_A: np.ndarray, sam_A: np.ndarray) -> float:
    """Mean tau-b of the published order with all orders that put every SAM arm before all others; larger is better."""
    theirs_A, sam_A = theirs_A[~np.isnan(theirs_A)], sam_A[~np.isnan(theirs_A)]
    across = np.sign(theirs_A[sam_A][:, None] - theirs_A[~sam_A]).sum()
    pairs = len(theirs_A) * (len(theirs_A) - 1) / 2
    untied = np.abs(np.sign(theirs_A[:, None] - theirs_A)).sum() / 2
    return float(across / np.sqrt(pairs * untied)) if untied else np.nan


def notes(left_out: dict[str, str]) -> list[str]:
    found = [
        "Kendall's tau-b of the two orders; descriptive: data, scale and recipe differ, few arms agree by chance.",
        ALONE,
    ]
    texts = [f"{arm} ({why})" for arm, why in left_out.items()]
    return [*found, f"Left out, of the published rows: {', '.join(texts)}."] if texts else found
