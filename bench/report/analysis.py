"""What the statistics say about a table: the declared families on every column, significance groups, the A/A arms.

The primary column decides, by the paired t-test with Holm inside each declared family; other columns are exploration
(Benjamini-Hochberg). Axes: A arms, S seeds, P pairs of a family. Values are as recorded, a loss stays a loss.
"""

from dataclasses import dataclass

import numpy as np

from bench.config import MISALIGNED, digest
from bench.matching import matched
from bench.report import stats
from bench.report.frame import Arm, Table
from bench.report.stats_bootstrap import bca, caution, draws
from bench.report.stats_suite import improvement, iqm_interval, profile, rank_over_seeds, ranks, scaled
from bench.report.stats_tests import Equivalence, Interval, benjamini_hochberg, can_test, equivalence, holm, t_interval
from bench.report.suite import Average, Floor, glue_average
from bench.report.tables import by_seed, tidy
from bench.sweep import AGAINST, PARTS, SAM, Column

A_A = "a_a"  # an arm against itself with other initial values of the mixer: whatever is found there is noise
RESAMPLES = 2000
THRESHOLDS_K = np.linspace(0, 1, 101)  # of the performance profile


@dataclass(frozen=True)
class Measured:
    """One column's values and groups."""

    column: Column
    values_AS: np.ndarray  # replicas averaged; NaN where a run failed
    interval_A: Interval  # mean over seeds and its t interval
    rank_A: Interval  # mean over seeds of the rank within the seed, 1 the best; percentile interval; NaN for an A/A arm
    sign: int  # 1 where larger is better, -1 for a loss
    letters: list[str]  # arms that share one were not declared different; '' for an arm without
    no_letters: str  # why there are none, or ''
    at_floor: bool  # the reference arm does no better than always saying the most frequent class


@dataclass(frozen=True)
class Result:
    """One family on one column."""

    kind: str
    measured: Measured
    primary: bool  # else exploration
    found: stats.Comparisons
    explored_P: np.ndarray  # Benjamini-Hochberg
    bca_P: Interval  # of the primary column, beside the t interval; NaN elsewhere
    equivalence: Equivalence | None  # of the primary column if a margin is declared; p adjusted by Holm

    def marks(self) -> list[str]:
        """'*' for a pair that differs on the primary column, '°' for one that does in exploration, else ''.

        A/A pairs have none: they are judged over all columns at once (`Analysis.flagged`).
        """
        if self.kind == A_A:
            return [""] * len(self.found.pairs)
        p_P = self.found.adjusted_P if self.primary else self.explored_P
        mark = "*" if self.primary else "°"
        return [mark if self.found.tested and p <= self.found.alpha else "" for p in p_P]


@dataclass(frozen=True)
class Overall:
    """Over all tasks (the first column of each protocol), with bootstraps over seeds.

    IQM and profile are of values scaled task by task: 0 the worst run of the task, 1 its best.
    """

    tasks: int
    rank_A: Interval
    iqm_A: Interval
    profile_AK: Interval  # share of runs above THRESHOLDS_K
    improvement_A: Interval | None  # chance to beat the reference arm
    caution: str


@dataclass(frozen=True)
class Analysis:
    measured: list[Measured]
    results: list[Result]
    families: dict[str, stats.Pairs]
    reference: int | None  # place of the reference arm
    average: Average | None
    overall: Overall | None
    alpha: float

    def result(self, kind: str, column: Column) -> Result:
        return next(r for r in self.results if r.kind == kind and r.measured.column == column)

    @property
    def a_a_tested(self) -> bool:
        """Whether there are A/A arms and seeds enough to test them on all columns at once."""
        found = [r.found for r in self.results if r.kind == A_A]
        return bool(found) and can_test(found[0].seeds, sum(len(f.pairs) for f in found), self.alpha)

    def flagged(self) -> list[tuple[int, Column]]:
        """(A/A arm, column) that came out different: paired t, Holm over all A/A pairs and columns of the table."""
        results = [r for r in self.results if r.kind == A_A]
        places = [(pair[0], r.measured.column) for r in results for pair in r.found.pairs]
        if not self.a_a_tested:
            return []
        adjusted = holm(np.concatenate([r.found.p_P for r in results]))
        return [place for place, p in zip(places, adjusted, strict=True) if p <= self.alpha]


def lower_is_better(metric: str) -> bool:
    return "loss" in metric.split("_")


def analyse(table: Table, floors: dict[Column, Floor]) -> Analysis:
    """`floors`: of the columns that have one (`suite.floors`)."""
    family, reference = table.sweep.family, reference_of(table)
    values = {c: v for c, v in zip(table.columns, by_column(table), strict=True)}
    low = {
        c: reference is not None and c in floors and bool(stats.at_floor(v[reference], *floors[c]))
        for c, v in values.items()
    }
    average = glue_average(table, [c.protocol for c, bad in low.items() if bad])
    if average:
        values[average.column] = average.values_AS
    shown = [place for place, arm in enumerate(table.arms) if not salted(arm)]
    measured = [measure(c, v, shown, family.alpha, low.get(c, False)) for c, v in values.items()]
    families = pairs(table, reference)
    results = [result(table, kind, m, of) for kind, of in families.items() for m in measured]
    found = overall(table, measured, reference, family.alpha)
    return Analysis(measured, results, families, reference, average, found, family.alpha)


def by_column(table: Table) -> list[np.ndarray]:
    """`AS` of each column, in the table's order of arms and seeds."""
    wide = by_seed(tidy(table))
    labels = [a.label for a in table.arms]
    every = [wide.xs((c.protocol, c.metric), level=("protocol", "metric")) for c in table.columns]
    return [one.reindex(index=labels, columns=table.seeds).to_numpy(float) for one in every]


def measure(column: Column, values_AS: np.ndarray, shown: list[int], alpha: float, low: bool) -> Measured:
    sign = -1 if lower_is_better(column.metric) else 1
    found, why = stats.groups(sign * values_AS[shown], alpha)
    weights_RS = draws(values_AS.shape[1], RESAMPLES, np.random.default_rng(0))
    interval_A, among = (
        t_interval(values_AS, 1 - alpha),
        rank_over_seeds(sign * values_AS[shown], weights_RS, 1 - alpha),
    )
    rank_A = Interval(*np.full((3, len(values_AS)), np.nan))
    for ends, of in zip(rank_A, among, strict=True):
        ends[shown] = of
    letters = [""] * len(values_AS)
    for place, text in zip(shown, found, strict=True):
        letters[place] = text
    return Measured(column, values_AS, interval_A, rank_A, sign, letters, why, low)


def result(table: Table, kind: str, measured: Measured, of: stats.Pairs) -> Result:
    family = table.sweep.family
    found = stats.compare(measured.values_AS, of, family.alpha)
    primary, same = measured.column == table.primary, None
    if primary and family.margin and len(measured.values_AS[0]) > 1:
        same = equivalence(stats.differences(stats.finite(measured.values_AS), of), family.margin, family.alpha)
        adjusted = holm(same.p)
        same = same._replace(p=adjusted, equivalent=(adjusted <= family.alpha) & found.tested)
    beside = Interval(*np.full((3, len(of)), np.nan))
    if primary and found.seeds > 1:
        weights_RS = draws(found.seeds, RESAMPLES, np.random.default_rng(0))
        beside = bca(stats.differences(stats.finite(measured.values_AS), of), weights_RS, 1 - family.alpha)
    return Result(kind, measured, primary, found, benjamini_hochberg(found.p_P), beside, same)


# Families -----------------------------------------------------------------------------------------------------------


def salted(arm: Arm) -> bool:
    return bool(arm.mixer.get("salt", 0))


def controls(table: Table) -> list[int]:
    """Places of the arms that the sweep shows without a comparison."""
    return [i for i, a in enumerate(table.arms) if any(matched(c, a.mixer) for c in table.sweep.controls)]


def reference_of(table: Table) -> int | None:
    given = table.sweep.family.reference
    places = [i for i, a in enumerate(table.arms) if matched(given, a.mixer)]
    places = [i for i in places if not salted(table.arms[i])]
    return places[0] if given and places else None


def pairs(table: Table, reference: int | None) -> dict[str, stats.Pairs]:
    """Kind -> its pairs, kinds without any left out. An A/A arm stands in no declared family, only beside its twin; a
    control in none."""
    arms = table.arms
    plain = [i for i, a in enumerate(arms) if not salted(a)]
    compared = [i for i in plain if i not in controls(table)]
    found = {}
    if AGAINST in table.sweep.family.comparisons and reference is not None:
        found[AGAINST] = [(i, reference) for i in compared if i != reference]
    if SAM in table.sweep.family.comparisons:
        found[SAM] = sam_pairs(arms, compared)
    if PARTS in table.sweep.family.comparisons:
        found[PARTS] = part_pairs(arms, compared)
    twins = {}
    for i in plain:
        twins[tuple(sorted((k, str(v)) for k, v in arms[i].mixer.items() if k != "salt"))] = i
    keys = [tuple(sorted((k, str(v)) for k, v in a.mixer.items() if k != "salt")) for a in arms]
    found[A_A] = [(i, twins[keys[i]]) for i, a in enumerate(arms) if salted(a) and keys[i] in twins]
    return {kind: of for kind, of in found.items() if of}


def sam_pairs(arms: tuple[Arm, ...], plain: list[int]) -> stats.Pairs:
    """(SAM, not SAM) of each mixer: those that agree in all other keys, or the only two that there are."""
    found = []
    for i in plain:
        mixer = arms[i].mixer
        others = [j for j in plain if arms[j].mixer["name"] == mixer["name"] and arms[j].mixer["sam"] is False]
        alike = [j for j in others if {**arms[j].mixer, "sam": True} == mixer]
        aligned = [j for j in plain if arms[j].mixer["name"] == mixer["name"] and arms[j].mixer["sam"] is True]
        if mixer["sam"] is True and (alike or len(others) == len(aligned) == 1):
            found.append((i, (alike or others)[0]))
    return found


def part_pairs(arms: tuple[Arm, ...], plain: list[int]) -> stats.Pairs:
    """(misaligned, not SAM) and (SAM, misaligned) of each SAM pair that has a misaligned arm: its gain is their sum."""
    found = []
    for aligned, free in sam_pairs(arms, plain):
        between = [i for i in plain if {**arms[i].mixer, "sam": True} == arms[aligned].mixer]
        for i in between:
            if arms[i].mixer["sam"] == MISALIGNED:
                found += [(i, free), (aligned, i)]
    return found


# Over tasks ---------------------------------------------------------------------------------------------------------


def overall(table: Table, measured: list[Measured], reference: int | None, alpha: float) -> Overall | None:
    """None with fewer than two tasks, seeds or arms. Protocols that differ in anything but the task are of one."""
    first = {}
    for m in reversed(measured):
        if m.column in table.columns and not m.at_floor:
            first[digest({"task": table.of(m.column.protocol)[0].record.run["protocol"]["task"]})] = m
    if len(first) < 2 or len(table.seeds) < 2 or len(table.arms) < 2:
        return None
    values_TAS = np.array([m.sign * m.values_AS for m in reversed(first.values())])
    weights_RS = draws(len(table.seeds), RESAMPLES, np.random.default_rng(0))
    better = None
    if reference is not None:
        every = [
            improvement(values_TAS[:, a], values_TAS[:, reference], weights_RS, 1 - alpha)
            for a in range(len(table.arms))
        ]
        better = Interval(*(np.array(ends, float) for ends in zip(*every, strict=True)))
    values_ATS = np.moveaxis(scaled(values_TAS), 1, 0)
    return Overall(
        tasks=len(first),
        rank_A=ranks(values_TAS, weights_RS, 1 - alpha),
        iqm_A=iqm_interval(values_ATS, weights_RS, 1 - alpha),
        profile_AK=profile(values_ATS, THRESHOLDS_K, weights_RS, 1 - alpha),
        improvement_A=better,
        caution=caution(len(table.seeds)),
    )
