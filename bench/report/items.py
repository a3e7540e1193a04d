"""What single items say: two checkpoints side by side (McNemar); GLUE's average with seeds, replicas and items drawn.

Reads items.parquet: one line an example, as the tasks wrote it. Runs whose items are not in the store are left out.
Axes: A arms, S seeds, F replicas, I items, M moments of an item.
"""

import numpy as np

from bench.report import stats_bootstrap, suite
from bench.report.analysis import A_A, Analysis
from bench.report.frame import Row, Table, seeds_text
from bench.report.sections import Section, interval_text, p_text, percent
from bench.report.stats_bootstrap import Outcomes, confusion, f1, matthews, mean_of_items, ratio
from bench.report.stats_tests import Interval, mcnemar
from bench.report.tables import column_title
from bench.store import Store
from bench.sweep import Column

RESAMPLES = 1000
RIGHT = ("accuracy", "top1")  # metrics that are a share of items that are right


def sections(table: Table, analysis: Analysis, store: Store) -> list[Section]:
    return [*two_checkpoints(table, analysis, store), *hierarchical(table, analysis, store)]


def items_of(rows: list[Row], store: Store) -> dict[str, dict[str, np.ndarray]]:
    """Run -> column -> values, ordered by part and item; runs without labels and predictions are not there."""
    wanted = {r.run_id for r in rows if r.record.outcome == "ok"}
    paths = [store.folder(run) / "items.parquet" for run in wanted]
    found: dict[str, dict[str, np.ndarray]] = {}
    for path in [*filter(lambda p: p.exists(), paths), *sorted(store.root.glob("*/items.parquet"))]:
        missing, columns = sorted(wanted - set(found)), ["run", "part", "item", "label", "prediction"]
        table = suite.item_table(path, columns, missing) if missing else None
        if table is not None:
            frame = table.to_pandas()
            for run, one in frame.dropna(subset=["label", "prediction"]).groupby("run"):
                ordered = one.sort_values(["part", "item"], kind="stable")
                found[run] = {name: ordered[name].to_numpy() for name in columns[1:]}
    return found


def same_items(found: list[dict]) -> bool:
    """Whether all runs were judged on the same items."""
    keys = ("part", "item", "label")
    return all(all(np.array_equal(one[key], found[0][key]) for key in keys) for one in found)


# Two checkpoints ----------------------------------------------------------------------------------------------------


def two_checkpoints(table: Table, analysis: Analysis, store: Store) -> list[Section]:
    """For each declared pair, of the first seed; on the primary column, or the first whose items are right or wrong."""
    pairs = [pair for kind, of in analysis.families.items() if kind != A_A for pair in of]
    chosen = sorted((c for c in table.columns if metric(c) in RIGHT), key=lambda c: c != table.primary)
    if not pairs or not chosen:
        return []
    column, seed = chosen[0], table.seeds[0]
    rows = [r for r in table.of(column.protocol) if r.seed == seed]
    rows = [r for r in rows if r.replica == min(x.replica for x in rows)]
    places, found = {a.key: i for i, a in enumerate(table.arms)}, items_of(rows, store)
    right_A = {places[r.arm]: right(found[r.run_id], column) for r in rows if r.run_id in found}
    lines = []
    for first, second in pairs:
        one, other = right_A.get(first), right_A.get(second)
        if one is not None and other is not None and len(one) and len(one) == len(other):
            result = mcnemar(one, other)
            cells = [result.only_first, result.only_second, result.items]
            label = f"{table.arms[first].label} - {table.arms[second].label}"
            lines.append([label, *(f"{n:,}" for n in cells), p_text(result.p)])
    lines = list({line[0]: line for line in lines}.values())
    if not lines or not same_items([found[r.run_id] for r in rows if r.run_id in found]):
        return []
    head = ["two checkpoints", "only the first right", "only the second", "of items", "p (McNemar)"]
    notes = [
        f"Each line is about these two checkpoints ({seeds_text([seed])}), not about their mixers: another seed is "
        "another checkpoint. Exact two-sided p, not adjusted; no claim about a mixer rests on it."
    ]
    return [Section(f"Items of two checkpoints on {column_title(column)}", head, lines, 1, notes)]


def metric(column: Column) -> str:
    return column.metric.removeprefix("ema_").partition("_")[0]


def right(items: dict[str, np.ndarray], column: Column) -> np.ndarray:
    """1 for an item that is right, 0 for a wrong one; of the column's part where it names one."""
    part = column.metric.removeprefix("ema_").partition("_")[2]
    shown = items["part"] == part if part else np.ones(len(items["part"]), bool)
    return (items["label"] == items["prediction"])[shown].astype(int)


# GLUE's average -----------------------------------------------------------------------------------------------------


def hierarchical(table: Table, analysis: Analysis, store: Store) -> list[Section]:
    """The average's intervals by the hierarchical bootstrap; none with one seed or without all items."""
    if analysis.average is None or len(table.seeds) < 2:
        return []
    protocols = {suite.subset_of(table.of(p)): p for p in table.protocols()}
    tasks = [task(table, protocols[subset], subset, store) for subset in analysis.average.tasks]
    if None in tasks:
        return []
    level, reference = 1 - analysis.alpha, analysis.reference
    mean_A, drawn_AR = stats_bootstrap.hierarchical(tasks, RESAMPLES, np.random.default_rng(0))
    columns = [stats_bootstrap.of_resamples(mean_A, drawn_AR, level)]
    head = ["arm", "average"]
    if reference is not None:
        gap = stats_bootstrap.of_resamples(mean_A - mean_A[reference], drawn_AR - drawn_AR[reference], level)
        columns, head = [*columns, gap], [*head, f"minus {table.arms[reference].label}"]
    lines = []
    for place, arm in enumerate(table.arms):
        cells = [text(interval, place, signed=number > 0) for number, interval in enumerate(columns)]
        lines.append([arm.label, *(cells if place != reference else [cells[0], *["-"] * (len(cells) - 1)])])
    caution = stats_bootstrap.caution(len(table.seeds))
    notes = [
        f"[{percent(level)} hierarchical bootstrap{': ' * bool(caution)}{caution}]: pretraining seeds, as one unit "
        "over all tasks and arms, then their fine-tuning seeds, then the items of each task. None with failed runs."
    ]
    return [Section(f"Hierarchical bootstrap on {column_title(analysis.average.column)}", head, lines, 1, notes)]


def text(interval: Interval, place: int, signed: bool) -> str:
    if np.isnan(interval.estimate[place]):
        return "failed runs"
    found = interval_text(interval, place, 3)
    return found if signed else found.replace("+", "")


def task(table: Table, protocol: str, subset: str, store: Store) -> Outcomes | None:
    """One task's items as moments; None if the items of a run that is ok are not there or not the same."""
    rows = table.of(protocol)
    ok = [r for r in rows if r.record.outcome == "ok"]
    if subset == "stsb":  # Spearman's correlation is no function of means over items: seeds and replicas only
        moments = {r.run_id: np.array([[suite.score(subset, r.record.metrics)]]) for r in ok}
    else:
        found = items_of(rows, store)
        if len(found) < len(ok) or not ok or not same_items(list(found.values())):
            return None
        moments = {run: moments_of(subset, items) for run, items in found.items()}
    replicas = sorted({r.replica for r in rows})
    shape = next(iter(moments.values())).shape
    moments_ASFIM = np.full((len(table.arms), len(table.seeds), len(replicas), *shape), np.nan)
    arms = {a.key: i for i, a in enumerate(table.arms)}
    for row in rows:
        if row.run_id in moments:
            place = arms[row.arm], table.seeds.index(row.seed), replicas.index(row.replica)
            moments_ASFIM[place] = moments[row.run_id]
    return Outcomes(moments_ASFIM, METRICS.get(subset, mean_of_items))


def moments_of(subset: str, items: dict[str, np.ndarray]) -> np.ndarray:
    """`IM`: of MNLI right and there, set by set; of F1 and Matthews the confusion; else right or wrong."""
    label, prediction = items["label"], items["prediction"]
    right_I = (label == prediction).astype(float)
    if subset == "mnli":
        there = [(items["part"] == part).astype(float) for part in ("matched", "mismatched")]
        return np.stack([right_I * there[0], there[0], right_I * there[1], there[1]], -1)
    return confusion(label, prediction) if subset in METRICS else right_I[:, None]


def both_sets(moments_M: np.ndarray) -> np.ndarray:
    return (ratio(moments_M[..., 0], moments_M[..., 1]) + ratio(moments_M[..., 2], moments_M[..., 3])) / 2


def accuracy_and_f1(moments_M: np.ndarray) -> np.ndarray:
    return (moments_M[..., 0] + moments_M[..., 3] + f1(moments_M)) / 2


METRICS = {"mnli": both_sets, "qqp": accuracy_and_f1, "mrpc": accuracy_and_f1, "cola": matthews}
