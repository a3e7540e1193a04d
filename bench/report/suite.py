"""A suite of tasks: GLUE's average as the paper computes it, and floors: what a model that ignores its input scores.

Scores of GLUE (arXiv 2407.09941 and its released code): MNLI the mean of matched and mismatched accuracy, QQP and MRPC
the mean of accuracy and F1, CoLA Matthews, STS-B Spearman, the others accuracy. Floors come from the labels in
items.parquet, of one run of each column. Axes: A arms, S seeds.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bench import Refusal
from bench.report.frame import Row, Table
from bench.report.stats import majority
from bench.store import Store
from bench.sweep import Column

SCORES = {
    "mnli": ("accuracy_matched", "accuracy_mismatched"),
    "qnli": ("accuracy",),
    "qqp": ("accuracy", "f1"),
    "rte": ("accuracy",),
    "sst2": ("accuracy",),
    "mrpc": ("accuracy", "f1"),
    "cola": ("matthews",),
    "stsb": ("spearman",),
}


class Floor(NamedTuple):
    value: float
    error: float  # standard error over items


@dataclass(frozen=True)
class Average:
    """GLUE's average as a column of its own."""

    column: Column
    values_AS: np.ndarray
    tasks: list[str]  # subsets that entered
    note: str


def score(subset: str, metrics: dict[str, float]) -> float:
    """One task's score as a fraction."""
    return float(np.mean([metrics[name] for name in SCORES[subset]]))


def glue_average(table: Table, at_floor: list[str]) -> Average | None:
    """Mean over the table's GLUE tasks of their scores, seed by seed; None with fewer than two, or one twice.

    `at_floor`: protocols that enter no average.
    """
    found = {p: subset for p in table.protocols() if (subset := subset_of(table.of(p)))}
    if len(found) < 2 or len(set(found.values())) < len(found):
        return None
    kept = {p: s for p, s in found.items() if p not in at_floor}
    if len(kept) < 2:
        return None
    values_TAS = np.array([scores(table, protocol, subset) for protocol, subset in kept.items()])
    n = len(kept)
    note = "mean over tasks of MNLI's mean accuracy, accuracy and F1 of QQP and MRPC, Matthews, Spearman, or accuracy"
    out = [s for p, s in found.items() if p in at_floor]
    note += f"; left out, at floor: {', '.join(out)}" if out else ""
    if n < len(SCORES):
        note += f"; only {', '.join(kept.values())}, so not to be compared with the average of all {len(SCORES)}"
    column = Column("GLUE", "average" if n == len(SCORES) else f"average_of_{n}_of_{len(SCORES)}_tasks")
    return Average(column, values_TAS.mean(0), list(kept.values()), note)


def subset_of(rows: list[Row]) -> str:
    """The GLUE task of a column, '' of another."""
    task = rows[0].record.run["protocol"]["task"]
    return task.get("subset", "") if task["name"] == "glue" else ""


def scores(table: Table, protocol: str, subset: str) -> np.ndarray:
    """`AS`; replicas averaged within their seed, NaN where one of them is not ok."""
    places = {a.key: i for i, a in enumerate(table.arms)}
    found: dict[tuple, list[float]] = {}
    for row in table.of(protocol):
        value = score(subset, row.record.metrics) if row.record.outcome == "ok" else math.nan
        found.setdefault((places[row.arm], table.seeds.index(row.seed)), []).append(value)
    values_AS = np.full((len(table.arms), len(table.seeds)), np.nan)
    for place, values in found.items():
        values_AS[place] = np.mean(values)
    return values_AS


# Floors -------------------------------------------------------------------------------------------------------------


def floors(table: Table, store: Store) -> dict[Column, Floor]:
    """Of each column whose metric has one and whose items, with labels, are in the store."""
    found = {}
    for protocol in table.protocols():
        columns = [c for c in table.columns if c.protocol == protocol]
        run = next((r.run_id for r in table.of(protocol) if r.record.outcome == "ok"), "")
        labels = labels_of(run, store) if run else {}
        for column in columns:
            floor = floor_of(column.metric, labels)
            if floor:
                found[column] = floor
    return found


def labels_of(run_id: str, store: Store) -> dict[str, np.ndarray]:
    """Part -> labels of its items; {} where there are none."""
    for path in (store.folder(run_id) / "items.parquet", *sorted(store.root.glob("*/items.parquet"))):
        items = item_table(path, ["part", "label"], [run_id]) if path.exists() else None
        if items is not None and len(items):
            part, label = items["part"].to_numpy(zero_copy_only=False), items["label"].to_numpy(zero_copy_only=False)
            if np.isfinite(label.astype(float)).all():
                return {name: label[part == name] for name in np.unique(part)}
    return {}


def item_table(path: Path, columns: list[str], runs: list[str]):
    """Those columns of the runs' items (pyarrow); None if the file lacks one of them, a Refusal if it is damaged."""
    import pyarrow.parquet as pq

    try:
        if not {"run", *columns} <= set(pq.read_schema(path).names):
            return None
        return pq.read_table(path, columns=columns, filters=[("run", "in", runs)])
    except (OSError, ValueError) as error:  # ValueError: what pyarrow raises for a file that is no whole Parquet
        about = " ".join(str(error).split())
        raise Refusal(
            f"{path}: not a whole table of items ({about}); restore it, or delete it and go without"
        ) from None


def floor_of(metric: str, labels: dict[str, np.ndarray]) -> Floor | None:
    """What always saying one class scores: the most frequent for accuracy, class 1 for F1; 0 for a correlation."""
    name, _, part = metric.removeprefix("ema_").partition("_")
    label = labels.get(part) if part else next(iter(labels.values()), None) if len(labels) == 1 else None
    if label is None:
        return None
    if name in ("matthews", "pearson", "spearman"):
        return Floor(0.0, 1 / math.sqrt(len(label)))
    rate, error = majority(label)
    if name in ("accuracy", "top1"):
        return Floor(rate, error)
    if name == "f1":
        rate = float(np.mean(label == 1))
        return Floor(2 * rate / (1 + rate), 2 / (1 + rate) ** 2 * math.sqrt(rate * (1 - rate) / len(label)))
    return None
