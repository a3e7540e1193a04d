"""Bootstraps: percentile and BCa over seeds, and a hierarchical one for a suite of tasks with replicas and items.

Pure functions. Axes: A arms, S seeds, F fine-tuning replicas, I items, M moments of an item, R resamples; `...` is any
leading axes. All arms and tasks share the same resampled seeds, so differences of arms stay paired. With few seeds
these intervals are too narrow (results/calibration/table.md): `caution` says so, and t intervals are the primary ones.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr, ndtri

from bench import Refusal
from bench.report.stats_tests import Interval, finite, require_fraction

ENOUGH = 20  # seeds; below, nominal 95 % intervals cover visibly less


def caution(n: int) -> str:
    """The label that every bootstrap over n seeds carries; empty from 20 seeds on."""
    return "undercovers at this n" if n < ENOUGH else ""


def draws(n: int, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Weights `RS` of resampled means: how often each of n seeds was drawn, over n. Every row sums to 1."""
    if n < 1 or resamples < 1:
        raise Refusal(f"a bootstrap needs at least 1 seed and 1 resample, not {n} and {resamples}")
    return rng.multinomial(n, np.full(n, 1 / n), size=resamples) / n


def resampled(values_S: np.ndarray, weights_RS: np.ndarray) -> np.ndarray:
    """Means of resamples, `...S` -> `...R`: values_S @ weights_RS.T, seed after seed.

    BLAS adds in another order on another processor, and a table would have other last digits there.
    """
    found_R = values_S[..., :1] * weights_RS[:, 0]
    for seed in range(1, values_S.shape[-1]):
        found_R += values_S[..., seed, None] * weights_RS[:, seed]
    return found_R


def percentile(values_S: np.ndarray, weights_RS: np.ndarray, level: float) -> Interval:
    """Mean over seeds (`...S` -> `...`) and its percentile interval (Efron 1979); NaN where a run failed."""
    values_S = finite(values_S)
    return of_resamples(values_S.mean(-1), resampled(values_S, weights_RS), level)


def of_resamples(estimate: np.ndarray, resampled_R: np.ndarray, level: float) -> Interval:
    """Percentile interval of any resampled statistic: estimate `...`, resampled `...R`."""
    require_fraction("level", level)
    tails = [(1 - level) / 2, (1 + level) / 2]
    low, high = np.quantile(resampled_R, tails, axis=-1)
    return Interval(np.asarray(estimate), low, high)


def bca(values_S: np.ndarray, weights_RS: np.ndarray, level: float) -> Interval:
    """Mean over seeds (`...S` -> `...`) and its BCa interval (Efron 1987): corrected for bias and for skew.

    A row without spread gives its value three times. NaN where a run failed and for one seed.
    """
    require_fraction("level", level)
    values_S = finite(values_S)
    mean = values_S.mean(-1)
    resampled_R = np.sort(resampled(values_S, weights_RS), axis=-1)
    count = resampled_R.shape[-1]
    near = 1e-12 * np.abs(values_S).max(-1)  # a resample that equals the mean does so up to rounding
    below = (resampled_R < (mean - near)[..., None]).sum(-1) + (resampled_R <= (mean + near)[..., None]).sum(-1)
    bias = ndtri(np.clip(below / (2 * count), 0.5 / count, 1 - 0.5 / count))
    off_S = values_S - mean[..., None]  # what leaving a seed out moves the mean by, times 1 - n
    spread = (off_S**2).sum(-1)
    skew = (off_S**3).sum(-1) / (6 * np.where(spread > near**2, spread, 1) ** 1.5)
    ends = []
    for tail in ((1 - level) / 2, (1 + level) / 2):
        z = bias + ndtri(tail)
        place = ndtr(bias + z / (1 - skew * z)) * (count - 1)
        ends.append(np.where(spread > near**2, _at(resampled_R, place), mean + 0 * spread))
    if values_S.shape[-1] < 2:
        ends = [np.full_like(mean, np.nan)] * 2
    return Interval(mean, *ends)


def _at(sorted_R: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Linear interpolation of sorted rows at a place of their own (0 .. R - 1); NaN rows give NaN."""
    place = np.where(np.isnan(place), 0, place)
    left = np.clip(np.floor(place).astype(int), 0, sorted_R.shape[-1] - 2)
    ends = np.take_along_axis(sorted_R, np.stack([left, left + 1], -1), -1)
    return ends[..., 0] + (place - left) * (ends[..., 1] - ends[..., 0])


# A suite of tasks ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcomes:
    """One task's items. The score of a run is `metric` of the means over its items of their moments.

    moments_ASFIM: for accuracy M = 1 and the moment is right (1) or wrong (0); for others see `confusion`, `products`.
    A task without outcomes of items has I = 1 and its score as the moment; one without replicas has F = 1.
    """

    moments_ASFIM: np.ndarray
    metric: Callable[[np.ndarray], np.ndarray]


def hierarchical(tasks: list[Outcomes], resamples: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(mean score over tasks of each arm `A`, the same resampled `AR`); give them, or differences, to `of_resamples`.

    Three levels: the pretraining seed, as one unit over all tasks and arms (the tasks of one checkpoint are not
    independent); within each drawn seed its replicas, task by task; and the items of a task, the same for all its runs
    (Sellam et al. 2022, 'The MultiBERTs', for seeds x items). An arm with a failed run anywhere is NaN. Scores that are
    not linear in the moments carry the usual small bias of a resampled ratio.
    """
    if not tasks:
        raise Refusal("a suite needs at least one task")
    arms, seeds = np.shape(tasks[0].moments_ASFIM)[:2]
    for place, task in enumerate(tasks):
        shape = np.shape(task.moments_ASFIM)
        if len(shape) != 5 or shape[:2] != (arms, seeds):
            raise Refusal(f"task {place} of the suite has shape {shape}; wanted ({arms}, {seeds}, F, I, M)")
    drawn_RS = rng.integers(seeds, size=(resamples, seeds))
    estimate_A, resampled_AR = np.zeros(arms), np.zeros((arms, resamples))
    for task in tasks:
        moments_ASFIM = finite(task.moments_ASFIM)
        estimate_A += task.metric(moments_ASFIM.mean(-2)).mean((1, 2))
        resampled_AR += _resampled(moments_ASFIM, task.metric, drawn_RS, rng)
    return estimate_A / len(tasks), resampled_AR / len(tasks)


def _resampled(moments_ASFIM: np.ndarray, metric, drawn_RS: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One task's mean score over seeds and replicas, `AR`. In slices of resamples, to bound memory."""
    arms, seeds, replicas, items, moments = moments_ASFIM.shape
    flat_XI = np.ascontiguousarray(np.moveaxis(moments_ASFIM, -2, -1)).reshape(-1, items)
    parts = []
    for start in range(0, len(drawn_RS), 250):
        some_RS = drawn_RS[start : start + 250]
        items_RI = rng.multinomial(items, np.full(items, 1 / items), size=len(some_RS)).astype(float)
        means = (flat_XI @ items_RI.T / items).reshape(arms, seeds, replicas, moments, -1)  # of whole numbers: exact
        scores_ASFR = metric(np.moveaxis(means, -2, -1))
        parts.append(np.einsum("asfr,rsf->ar", scores_ASFR, _nested(some_RS, replicas, rng)))
    return np.concatenate(parts, axis=1)


def _nested(drawn_RS: np.ndarray, replicas: int, rng: np.random.Generator) -> np.ndarray:
    """Weights `RSF` that sum to 1: each draw of a seed draws that many of its replicas anew."""
    count, seeds = drawn_RS.shape
    chosen_RSF = rng.multinomial(replicas, np.full(replicas, 1 / replicas), size=(count, seeds))
    weights_RSF = np.zeros((count, seeds, replicas))
    np.add.at(weights_RSF, (np.arange(count)[:, None], drawn_RS), chosen_RSF)
    return weights_RSF / (seeds * replicas)


# Scores as functions of mean moments (`...M` -> `...`). Spearman's is not one: its ranks depend on the sample.


def mean_of_items(moments_M: np.ndarray) -> np.ndarray:
    """The mean itself (M = 1): accuracy from right and wrong, or a score that has no items."""
    return moments_M[..., 0]


def confusion(label_I: np.ndarray, prediction_I: np.ndarray) -> np.ndarray:
    """Moments `...IM` of a task with classes 0 and 1: true and false positives, false and true negatives."""
    label_I, prediction_I = np.broadcast_arrays(np.asarray(label_I) == 1, np.asarray(prediction_I) == 1)
    pairs = ((1, 1), (0, 1), (1, 0), (0, 0))
    return np.stack([(label_I == a) & (prediction_I == b) for a, b in pairs], -1).astype(float)


def f1(moments_M: np.ndarray) -> np.ndarray:
    """F1 of class 1 from `confusion`; 0 if it is neither predicted nor present."""
    tp, fp, fn, _ = np.moveaxis(moments_M, -1, 0)
    return ratio(2 * tp, 2 * tp + fp + fn)


def matthews(moments_M: np.ndarray) -> np.ndarray:
    """Matthews correlation from `confusion`; 0 if labels or predictions are constant."""
    tp, fp, fn, tn = np.moveaxis(moments_M, -1, 0)
    return ratio(tp * tn - fp * fn, np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))


def products(label_I: np.ndarray, prediction_I: np.ndarray) -> np.ndarray:
    """Moments `...IM` for `pearson`: x, y, xx, yy, xy."""
    x, y = np.broadcast_arrays(np.asarray(label_I, float), np.asarray(prediction_I, float))
    return np.stack([x, y, x * x, y * y, x * y], -1)


def pearson(moments_M: np.ndarray) -> np.ndarray:
    """Pearson's correlation from `products`; 0 if labels or predictions are constant."""
    x, y, xx, yy, xy = np.moveaxis(moments_M, -1, 0)
    spread_x, spread_y = (np.where(v > 1e-12 * s, v, 0) for v, s in ((xx - x * x, xx), (yy - y * y, yy)))
    return ratio(xy - x * y, np.sqrt(spread_x * spread_y))


def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / below, 0 where below is 0, NaN where it is NaN."""
    return np.where(below == 0, 0.0, above / np.where(below == 0, 1, below))
