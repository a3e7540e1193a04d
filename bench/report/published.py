"""Ours beside the published: numbers of the paper's tables (published.csv) for the arms and tasks that a table shares.

The two are never subtracted: recipes and scales differ, and the paper prints means without any spread. What is compared
is the order of the arms, by Kendall's tau-b. Keys: 'masked_lm.loss', 'glue.rte', 'glue' (the average), 'images.top1'.
"""

import csv
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from bench.report import stats, suite
from bench.report.analysis import Analysis, lower_is_better, salted
from bench.report.frame import Arm, Table, plain, protocol_value
from bench.report.sections import Section
from bench.report.stats_suite import kendall

HOME = Path(__file__).parent
COMMON = "shell.name=gated"  # the block of the mixer ablation
BROKEN = "broken: "  # begins the note of a published row that is not what it is called
DIFFER = "Recipes differ: "  # begins the notes on that
SILENT = (
    "Published: means of five fine-tuning runs of one pretraining seed; no standard deviation is printed anywhere. So "
    "no interval, test or letter can be given for a published number or for its distance from ours, nor can it be said "
    "which published arms differ; of 14 equal arms with one pretraining seed each, the best and the worst lie 3.4 "
    "standard deviations apart on average."
)
SILENT_IMAGES = (
    "Published: said to be means of five runs, three of the rows taken from the literature; no standard deviation is "
    "printed anywhere. So no interval, test or letter can be given for a published number or its distance from ours."
)


@dataclass(frozen=True)
class Published:
    """One printed number. `mixer` and `sam` ('true', 'false') name the arm, '' where none of ours is meant; `also` what
    tells it from others with this mixer: 'shell.name=plain mixer.shift=false', of the protocol or the mixer."""

    table: str
    row: str
    mixer: str
    sam: str
    also: str
    key: str
    value: float  # percent, nats, millions
    unit: str
    source: str
    note: str


@dataclass(frozen=True)
class Ours:
    """One of our columns that has a published counterpart; `values_AS` in the published unit."""

    title: str
    key: str
    keys: tuple[str, ...]  # published columns whose mean it is compared with
    task: str
    protocol: str
    values_AS: np.ndarray


@lru_cache(maxsize=1)
def numbers() -> tuple[Published, ...]:
    with (HOME / "published.csv").open(newline="", encoding="utf-8") as file:
        return tuple(Published(**{**line, "value": float(line["value"])}) for line in csv.DictReader(file))


@lru_cache(maxsize=1)
def recipe() -> tuple[dict[str, str], ...]:
    """Published settings as protocol keys: table, task, key, value, source."""
    with (HOME / "published_recipe.csv").open(newline="", encoding="utf-8") as file:
        return tuple(csv.DictReader(file))


def beside(table: Table, analysis: Analysis) -> list[Section]:
    """For each published table that has two or more of our arms: both values, recipes, agreement of orders."""
    found = []
    for name in dict.fromkeys(p.table for p in numbers()):
        values = {(p.row, p.key): p.value for p in numbers() if p.table == name}
        arms = [(i, table.arms[i], row) for i, row in places(table, name).items()]
        columns = [c for c in ours(table, analysis) if any((row, k) in values for *_, row in arms for k in c.keys)]
        if len(arms) >= 2 and columns:
            found += [both(name, arms, columns, values, table), agreement(name, arms, columns, values, analysis.alpha)]
    return found


def places(table: Table, name: str) -> dict[int, str]:
    """Place of an arm -> its row of a published table.

    A row that several arms are, with other heads say, is none of theirs: which of them the paper ran is not known, and
    counted once for each it would make the agreement of orders look surer than it is.
    """
    rows = [row_of(table, name, arm) for arm in table.arms]
    return {i: row for i, row in enumerate(rows) if row and rows.count(row) == 1}


def several(table: Table, name: str) -> list[str]:
    """The rows of a published table that more than one arm is, and are left out."""
    rows = [row for arm in table.arms if (row := row_of(table, name, arm))]
    return [row for row in dict.fromkeys(rows) if rows.count(row) > 1]


def row_of(table: Table, name: str, arm: Arm) -> str:
    """The row of a published table that one of our arms is, '' if none: by mixer, level of SAM and its `also`."""
    run = next((r.record.run for r in table.rows if r.arm == arm.key and r.record), None)
    if salted(arm) or run is None:
        return ""
    for p in numbers():
        if (p.table, p.mixer, p.sam) == (name, arm.mixer["name"], plain(arm.mixer["sam"])):
            pairs = [text.split("=") for text in p.also.split()]
            if all(plain(value_of(run, arm.mixer, key)) == value for key, value in pairs):
                return p.row
    return ""


def broken_rows(name: str) -> dict[str, str]:
    """Row of a published table that is not what it is called -> why."""
    return {p.row: p.note.removeprefix(BROKEN) for p in numbers() if p.table == name and p.note.startswith(BROKEN)}


def value_of(run: dict, mixer: dict, key: str):
    group, _, rest = key.partition(".")
    return mixer.get(rest) if group == "mixer" else protocol_value(run, key)


def ours(table: Table, analysis: Analysis) -> list[Ours]:
    """Our columns by published key; a GLUE task by the score that enters the average, whatever metric is shown."""
    found = []
    low = {m.column.protocol for m in analysis.measured if m.at_floor}
    for protocol in table.protocols():
        rows = table.of(protocol)
        task, subset = rows[0].record.run["protocol"]["task"]["name"], suite.subset_of(rows)
        if subset:
            key, values_AS = f"glue.{subset}", suite.scores(table, protocol, subset)
            title = f"{protocol} score" + " (at floor)" * (protocol in low)
            found.append(Ours(title, key, (key,), task, protocol, 100 * values_AS))
        for measured in (m for m in analysis.measured if m.column.protocol == protocol and not subset):
            metric, key = measured.column.metric, f"{task}.{measured.column.metric}"
            scale = 1 if lower_is_better(metric) else 100
            found.append(Ours(f"{protocol} {metric}", key, (key,), task, protocol, scale * measured.values_AS))
    if analysis.average:
        tasks = analysis.average.tasks
        keys = ("glue",) if len(tasks) == len(suite.SCORES) else tuple(f"glue.{t}" for t in tasks)
        title = "GLUE average" + f" of {', '.join(tasks)}" * (len(keys) > 1)
        found.append(Ours(title, "glue", keys, "", "", 100 * analysis.average.values_AS))
    return found


def printed(row: str, column: Ours, values: dict[tuple, float]) -> float:
    """The published counterpart, NaN if the paper has none."""
    return float(np.mean([values.get((row, key), np.nan) for key in column.keys]))


def both(name: str, arms: list, columns: list[Ours], values: dict, table: Table) -> Section:
    head = ["arm"]
    for column in columns:
        head += [f"{column.title}: ours", "published"]
    lines = []
    for place, arm, row in arms:
        line = [arm.label]
        for column in columns:
            digits = 2 if lower_is_better(column.key.split(".")[-1]) else 1
            values_S, theirs = column.values_AS[place], printed(row, column, values)
            failed = stats.failed_text(int(stats.failures(values_S)), len(values_S))
            line += [failed or f"{values_S.mean():.{digits}f}", "-" if np.isnan(theirs) else f"{theirs:.{digits}f}"]
        lines.append(line)
    source = next(p.source for p in numbers() if p.table == name)
    images = all(column.task == "images" for column in columns)
    notes = [f"Published: {source}; scores in percent, losses in nats.", SILENT_IMAGES if images else SILENT]
    if any(p.table == name and p.mixer and COMMON not in p.also for p in numbers()):  # its rows are models, not mixers
        notes.append("Arms by their published names: " + ", ".join(f"{a.label}: {row}" for _, a, row in arms) + ".")
    if left := several(table, name):
        notes.append(f"Left out, as more than one arm here is this one row: {', '.join(left)}.")
    differing: dict[str, dict[str, None]] = {}
    for column in (c for c in columns if c.protocol):
        differing.setdefault(recipe_text(name, column, table), {})[column.protocol] = None
    notes += [f"{DIFFER}{', '.join(places)}: {text}." for text, places in differing.items() if text]
    return Section(f"Ours and the published, Table {name}", head, lines, 1, notes)


def recipe_text(name: str, column: Ours, table: Table) -> str:
    """'backbone.layers 6 (published 12), …' of what is known of the published recipe, '' where nothing differs."""
    run = table.of(column.protocol)[0].record.run
    known = {r["key"]: r["value"] for r in recipe() if (r["table"], r["task"]) == (name, column.task)}
    pairs = {key: (plain(protocol_value(run, key)), value) for key, value in known.items()}
    return ", ".join(f"{key} {own} (published {theirs})" for key, (own, theirs) in pairs.items() if own != theirs)


def agreement(name: str, arms: list, columns: list[Ours], values: dict, alpha: float) -> Section:
    """Kendall's tau-b of our order of the arms and the published one, column by column."""
    lines, notes = [], {}
    for column in columns:
        mine_A = np.array([column.values_AS[place].mean() for place, *_ in arms])
        theirs_A = np.array([printed(row, column, values) for *_, row in arms])
        found = kendall(mine_A, theirs_A, 1 - alpha)
        interval = "-" if np.isnan(found.low) else f"[{found.low:+.2f}, {found.high:+.2f}]"
        tau = "-" if np.isnan(found.tau) else f"{found.tau:+.2f}"
        lines.append([column.title, str(found.arms), tau, interval])
        notes[f"Interval: {found.note}."] = None
    texts = ["1: the same order, -1: reversed. The gap between ours and the published is not interpreted."]
    why = {arm.label: broken_rows(name).get(row) for _, arm, row in arms}
    if odd := [f"{arm} ({text})" for arm, text in why.items() if text]:
        texts.append(f"Among them are published rows that are not what they are called: {', '.join(odd)}.")
    texts += notes
    return Section(
        f"Agreement of orders with Table {name}", ["column", "arms", "Kendall's tau-b", "interval"], lines, 1, texts
    )
