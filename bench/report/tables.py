"""Tables: the tidy frame (one row a run and metric), its summary, Markdown and CSV. Plain functions of a Table.

A mean is over seeds, after replicas are averaged within their seed, and exists only if all its runs came out ok.
"""

import math
import statistics

from bench.report.frame import LEVELS, Arm, Table, nested, plain, seeds_text
from bench.report.stats_tests import t_interval

PLACE = ["arm", "protocol", "metric"]
# Of a record's capacity -> its column. FLOPs are in it, for arms of equal parameters may take very unequal work.
CAPACITY = {
    "parameters": "parameters",
    "mixer_parameters": "of the mixer",
    "flops": "its FLOPs",
    "state_per_head": "state per head",
}


def tidy(table: Table):
    """pandas frame, one row a (run, metric): arm, mixer, sam, protocol, metric, seed, replica, run, outcome, value.

    `arm` is the label; `sam` is False, True or 'misaligned'; `value` is NaN unless the outcome is 'ok'.
    """
    import pandas as pd

    arms = {a.key: a for a in table.arms}
    lines = []
    for column in table.columns:
        for row in table.of(column.protocol):
            ok = row.record.outcome == "ok"
            lines.append(
                {
                    "arm": arms[row.arm].label,
                    "mixer": row.mixer["name"],
                    "sam": row.mixer["sam"],
                    "protocol": column.protocol,
                    "metric": column.metric,
                    "seed": row.seed,
                    "replica": row.replica,
                    "run": row.run_id,
                    "outcome": row.record.outcome,
                    "value": row.record.metrics[column.metric] if ok else math.nan,
                }
            )
    return pd.DataFrame(lines)


def by_seed(frame):
    """Cells x seeds: replicas averaged; NaN where one of them is not ok. Index and columns keep the table's order."""
    groups = frame.groupby([*PLACE, "seed"], sort=False)["value"]
    means = groups.mean().where(groups.count() == groups.size())  # a mean skips NaN
    order = list(frame[PLACE].drop_duplicates().itertuples(index=False, name=None))
    return means.unstack("seed").reindex(index=order, columns=frame["seed"].unique())


def summary(frame):
    """One row an (arm, protocol, metric): n seeds, mean, sd, runs, diverged, unfit, and each seed's value, seed_<s>.

    `sd` is the sample standard deviation, NaN for one seed.
    """
    seeds = by_seed(frame)
    keys = [frame[key] for key in PLACE]
    table = seeds.add_prefix("seed_")
    table.insert(0, "n", seeds.shape[1])
    table.insert(1, "mean", seeds.mean(axis=1, skipna=False))
    table.insert(2, "sd", seeds.std(axis=1, ddof=1, skipna=False))
    table.insert(3, "runs", frame.groupby(PLACE, sort=False).size())
    for place, outcome in ((4, "diverged"), (5, "unfit")):
        table.insert(place, outcome, (frame["outcome"] == outcome).groupby(keys, sort=False).sum().astype(int))
    return table.rename_axis(columns=None)


def csv(table: Table, analysis) -> str:
    """Tidy, full precision: one line an (arm, column), the mean's t interval (level 1 - alpha) and letters included."""
    frame = summary(tidy(table)).reset_index()
    seeds = frame[[f"seed_{s}" for s in table.seeds]].to_numpy(float)
    _, low, high = t_interval(seeds, 1 - analysis.alpha)
    for place, (key, values) in enumerate((("low", low), ("high", high)), list(frame.columns).index("sd") + 1):
        frame.insert(place, key, values)
    letters = {
        (arm.label, m.column.protocol, m.column.metric): text
        for m in analysis.measured
        for arm, text in zip(table.arms, m.letters, strict=True)
    }
    frame["letters"] = [letters[key] for key in frame[PLACE].itertuples(index=False, name=None)]
    arms = {a.label: a for a in table.arms}
    own = {
        "mixer": [arms[label].mixer["name"] for label in frame["arm"]],
        "sam": [str(arms[label].mixer["sam"]).lower() for label in frame["arm"]],
        **{k: [plain(arms[label].mixer.get(k, "")) for label in frame["arm"]] for k in table.axes},
        "departures": [departed_text(arms[label]) for label in frame["arm"]],
    }
    for place, (key, values) in enumerate(own.items(), 1):
        frame.insert(place, key, values)
    for key in CAPACITY:
        found = [capacities(table, arms[a], [p], key) for a, p in zip(frame["arm"], frame["protocol"], strict=True)]
        frame[key] = [str(values[0]) if values else "" for values in found]
    speeds = {(a.label, p): throughput(table, a, [p]) for a in table.arms for p in table.protocols()}
    frame["tokens_per_second"] = [speeds[a, p] for a, p in zip(frame["arm"], frame["protocol"], strict=True)]
    return frame.to_csv(index=False, lineterminator="\n")


def throughput(table: Table, arm: Arm, protocols: list[str]) -> float:
    """Positions a second at the median of the median steps of the arm's trained runs, as in `Cost`; NaN without runs.

    As the runs ran, whatever else the machine did: an orientation, not a benchmark.
    """
    found = []
    for row in (r for p in protocols for r in table.cell(p, arm) if r.trained):
        cost, steps = row.record.cost, nested(row.record.run["protocol"], "budget.steps")
        if cost.step_p50 > 0 and row.record.outcome == "ok":
            found.append((cost.step_p50, cost.tokens / steps))
    seconds, tokens = (statistics.median(values) for values in zip(*found, strict=True)) if found else (1, math.nan)
    return tokens / seconds


def comparisons_csv(table: Table, analysis) -> str:
    """Every declared comparison on every column in full precision, one line each."""
    import pandas as pd

    lines = []
    for result in analysis.results:
        found, column = result.found, result.measured.column
        for i, (first, second) in enumerate(found.pairs):
            line = {"family": result.kind, "arm": table.arms[first].label, "against": table.arms[second].label}
            line |= {"protocol": column.protocol, "metric": column.metric, "primary": str(result.primary).lower()}
            line |= {"n": found.seeds, "difference": found.difference_P.estimate[i]}
            line |= {"low": found.difference_P.low[i], "high": found.difference_P.high[i]}
            line |= {"p_t": found.p_P[i], "p_t_holm": found.adjusted_P[i], "p_t_bh": result.explored_P[i]}
            line |= {"bca_low": result.bca_P.low[i], "bca_high": result.bca_P.high[i]}
            line |= {"p_flip": found.flip_P[i], "p_flip_holm": found.flip_adjusted_P[i]}
            line |= {"p_block_holm": found.pooled_adjusted_P[i], "tested": str(found.tested).lower()}
            line |= {"p_equivalent_holm": result.equivalence.p[i] if result.equivalence else math.nan}
            lines.append(line | {"verdict": found.verdicts()[i] if result.primary else "exploration"})
    return pd.DataFrame(lines).to_csv(index=False, lineterminator="\n")


def departed_text(arm: Arm) -> str:
    return ", ".join(f"{k} = {plain(v)}" for k, v in arm.departed.items())


def capacities(table: Table, arm: Arm, protocols: list[str], key: str) -> list[int]:
    """The distinct values of a capacity among the arm's trained runs, ascending."""
    rows = [r for p in protocols for r in table.cell(p, arm) if r.trained]
    return sorted({getattr(r.record.capacity, key) for r in rows})


# The wide table -----------------------------------------------------------------------------------------------------


def column_title(column) -> str:
    return f"{column.protocol}: {column.metric.replace('_', ' ')}"


def wide(table: Table, analysis) -> tuple[list[str], list[list[str]], list[str]]:
    """(head, lines, notes): arms as rows, columns and GLUE's average as columns, then capacity. `analysis.Analysis`."""
    numbered = numbered_departures(table)
    cells, reasons = cell_texts(table, len(numbered))
    if analysis.average:
        cells |= average_texts(table, analysis.average)
    head = ["mixer", "SAM", *table.axes]
    head += [column_title(m.column) + " (at floor)" * m.at_floor for m in analysis.measured]
    head += CAPACITY.values()
    lines = []
    for place, arm in enumerate(table.arms):
        twin = f" (A/A {arm.mixer['salt']})" if arm.mixer.get("salt", 0) else ""
        own = [arm.mixer["name"] + twin + arm.mark, LEVELS[arm.mixer["sam"]].cell]
        own += [plain(arm.mixer[k]) if k in arm.mixer else "-" for k in table.axes]
        texts = [(cells[arm.label, m.column.protocol, m.column.metric], m.letters[place]) for m in analysis.measured]
        edge = [" (edge)" * ((arm.key, m.column.protocol) in table.edges) for m in analysis.measured]
        own += [f"{text}{mark} {letters}".rstrip() for (text, letters), mark in zip(texts, edge, strict=True)]
        own += [capacity_text(table, arm, k) for k in CAPACITY]
        lines.append(own)
    return head, lines, [*numbered, *reasons, *standing_notes(table), *analysis_notes(table, analysis), *table.notes]


def average_texts(table: Table, average) -> dict[tuple, str]:
    """Cells of GLUE's average."""
    texts = {}
    for arm, values_S in zip(table.arms, average.values_AS, strict=True):
        failed = int((values_S != values_S).sum())
        spread = f" ± {values_S.std(ddof=1):.3f}" if len(values_S) > 1 else ""
        text = f"{failed} of {len(values_S)} failed" if failed else f"{values_S.mean():.3f}{spread}"
        texts[arm.label, average.column.protocol, average.column.metric] = text
    return texts


def analysis_notes(table: Table, analysis) -> list[str]:
    """On letters, floors, averages and what no test can say."""
    notes, lettered = [], [m for m in analysis.measured if not m.no_letters]
    for place, column in analysis.flagged():
        what = f"{table.arms[place].label} came out different on {column_title(column)}"
        notes.append(f"WARNING: the A/A arm {what}: noise passes for an effect.")
    if len(table.arms) < 2:
        notes.append("One arm: there is nothing to compare.")
    elif lettered:
        level = f"{analysis.alpha:g}"
        notes.append(f"Arms that share a letter were not declared different (paired t, Holm over all pairs, {level}).")
    elif len(table.seeds) > 1:
        notes.append(f"No significance groups: {analysis.measured[0].no_letters} all pairs (n = {len(table.seeds)}).")
    if low := [column_title(m.column) for m in analysis.measured if m.at_floor]:
        name = table.arms[analysis.reference].label
        text = "is not more than 3 standard errors above always saying the most frequent class"
        notes.append(f"At floor: {', '.join(low)}: {name} {text}; such a task tells no arms apart.")
    if analysis.average:
        notes.append(f"{column_title(analysis.average.column)}: {analysis.average.note}.")
    return notes


# Markdown -----------------------------------------------------------------------------------------------------------


def markdown(table: Table, analysis, sections: list, certificate: list[str]) -> str:
    """The wide table under its question, then its notes, the other sections and the short fairness certificate."""
    head, lines, notes = wide(table, analysis)
    but = ", and what is declared as a departure" if any(a.departed for a in table.arms) else ""
    parts = [f"# {table.sweep.name}", table.sweep.question, grid(head, lines, left=2), bullets(notes)]
    for section in sections:
        parts += [f"## {section.title}", grid(section.head, section.lines, section.left)]
        parts += [bullets(section.notes)] if section.notes else []
    parts += [
        "## Fairness certificate",
        f"In each column only mixer and seed differ{but}; checked on {len(table.rows)} records:",
        bullets(certificate),
    ]
    return "\n\n".join(parts) + "\n"


def bullets(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def grid(head: list[str], lines: list[list[str]], left: int) -> str:
    """A Markdown table whose source is aligned too; the first `left` columns to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    rule = [":" + "-" * (w - 1) if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    padded = [
        [text.ljust(w) if i < left else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths, strict=True))]
        for line in (head, rule, *lines)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def cell_texts(table: Table, notes_before: int) -> tuple[dict[tuple, str], list[str]]:
    """(arm, protocol, metric) -> text; and numbered notes that give the reasons of runs that are not ok."""
    cells = summary(tidy(table))
    columns = [(c.protocol, c.metric) for c in table.columns]
    places = {column: decimals(cells.xs(column, level=PLACE[1:])["mean"]) for column in columns}
    texts, marks = {}, {}
    for (label, protocol, metric), cell in cells.iterrows():
        digits = places[protocol, metric]
        if failed := failed_text(cell):
            note = f"{label} on {protocol}: {reasons(table, label, protocol)}."
            mark = marks.setdefault(note, notes_before + len(marks) + 1)
            texts[label, protocol, metric] = f"{failed} [{mark}]"
        elif cell["n"] == 1:
            texts[label, protocol, metric] = f"{cell['mean']:.{digits}f}"
        else:
            texts[label, protocol, metric] = f"{cell['mean']:.{digits}f} ± {cell['sd']:.{digits}f}"
    return texts, [f"[{n}] {note}" for note, n in marks.items()]


def failed_text(cell) -> str:
    """'1 of 5 failed (1 diverged)', '' if every run came out ok; `cell` is a row of `summary`."""
    kinds = [f"{int(cell[k])} {k}" for k in ("diverged", "unfit") if cell[k]]
    failed = int(cell["diverged"] + cell["unfit"])
    return f"{failed} of {int(cell['runs'])} failed ({', '.join(kinds)})" if failed else ""


def decimals(means) -> int:
    """Three decimals for a column whose largest mean is 0.1 to 10, fewer above, more below."""
    largest = means.abs().max()
    if math.isnan(largest) or largest == 0:
        return 3
    power = math.floor(math.log10(largest))
    return max(3 - power, 0) if power >= 0 else 2 - power


def reasons(table: Table, label: str, protocol: str) -> str:
    """'loss is not finite at step 40 (seeds 0, 2)'."""
    key = next(a.key for a in table.arms if a.label == label)
    found: dict[str, list[int]] = {}
    for row in table.of(protocol):
        if row.arm == key and row.record.outcome != "ok":
            found.setdefault(f"{row.record.outcome}: {row.record.reason}", []).append(row.seed)
    return "; ".join(f"{reason} ({seeds_text(list(dict.fromkeys(seeds)))})" for reason, seeds in found.items())


def numbered_departures(table: Table) -> list[str]:
    """'[1] low_rank departs …', one text a mark, in the order of the arms."""
    return list(dict.fromkeys(f"{arm.mark.strip()} {departure_note(arm)}" for arm in table.arms if arm.mark))


def departure_note(arm: Arm) -> str:
    return f"{arm.mixer['name']} departs from the protocol by {departed_text(arm)}; source: {'; '.join(arm.sources)}."


def standing_notes(table: Table) -> list[str]:
    n = len(table.seeds)
    notes = (
        [f"One seed ({table.seeds[0]}): no spread."]
        if n == 1
        else [f"Mean ± sample standard deviation over n = {n} ({seeds_text(list(table.seeds))})."]
    )
    replicas = {p: len({r.replica for r in table.of(p)}) for p in table.protocols()}
    repeated = [f"{p} ({k})" for p, k in replicas.items() if k > 1]
    notes += [f"Replicas are averaged within their seed first: {', '.join(repeated)}."] if repeated else []
    return [*notes, "FLOPs of the mixer: its forward pass over one sequence of full length, in all layers."]


def capacity_text(table: Table, arm: Arm, key: str) -> str:
    """A count, or its range if the columns' protocols differ in it; '-' if no run of the arm was trained."""
    values = capacities(table, arm, table.protocols(), key)
    texts = list(dict.fromkeys("grows" if v < 0 else count_text(v) for v in values))
    return "-" if not texts else texts[0] if len(texts) == 1 else f"{texts[0]} to {texts[-1]}"


def count_text(count: int) -> str:
    return f"{count / 1e6:.2f}M" if count >= 1e6 else f"{count:,}"
