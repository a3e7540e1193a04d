"""Summaries over a suite of tasks: IQM, performance profiles, probability of improvement, ranks, agreement of orders.

Pure functions. Axes: T tasks, A arms, S seeds, R resamples, K thresholds. Larger values are better: negate losses.
Tasks of one seed stem from one checkpoint, so seeds are resampled jointly over tasks and arms; these intervals are
bootstraps over seeds and carry `stats_bootstrap.caution`. Values of different metrics must be made comparable before.
"""

from typing import NamedTuple

import numpy as np
from scipy.special import betaincinv, ndtri

from bench import Refusal
from bench.report.stats_bootstrap import of_resamples, resampled
from bench.report.stats_tests import Interval, finite, require_fraction

FEWEST_ARMS = 10  # below, the interval of `kendall` is a rough guide


def scaled(values_TAS: np.ndarray) -> np.ndarray:
    """Values of different metrics made comparable, task by task: 0 the worst run of all arms and seeds, 1 the best.

    It depends on the arms that are there. NaN stays NaN; a task in which all runs are equal is 0.5.
    """
    values_TAS = finite(values_TAS)
    low, high = (of(values_TAS, axis=(1, 2), keepdims=True) for of in (np.nanmin, np.nanmax))
    return np.where(high > low, (values_TAS - low) / np.where(high > low, high - low, 1), 0.5 + 0 * values_TAS)


def iqm(values_TS: np.ndarray) -> np.ndarray:
    """Interquartile mean, `...TS` -> `...`: mean of the middle half of all tasks' runs pooled (Agarwal et al. 2021).

    floor(N / 4) values are cut from either end. NaN if a run failed.
    """
    pooled = finite(values_TS)
    pooled = pooled.reshape(*pooled.shape[:-2], -1)
    count = pooled.shape[-1]
    cut = count // 4
    failed = np.isnan(pooled).any(-1)
    kept = np.partition(pooled, (cut, count - cut - 1), axis=-1)[..., cut : count - cut]
    return np.where(failed, np.nan, kept.mean(-1))


def iqm_interval(values_TS: np.ndarray, weights_RS: np.ndarray, level: float) -> Interval:
    """`iqm` of `...TS` with its percentile interval over resampled seeds; `weights_RS` from `stats_bootstrap.draws`."""
    chosen_RS = chosen(weights_RS)
    values_TS = finite(values_TS)
    resampled_R = iqm(np.moveaxis(values_TS[..., chosen_RS], -2, -3))
    return of_resamples(iqm(values_TS), resampled_R, level)


def chosen(weights_RS: np.ndarray) -> np.ndarray:
    """Indices of the drawn seeds, `RS`, from their weights."""
    counts_RS = np.rint(weights_RS * weights_RS.shape[1]).astype(int)
    places = np.tile(np.arange(counts_RS.shape[1]), len(counts_RS))
    return np.repeat(places, counts_RS.ravel()).reshape(counts_RS.shape)


def profile(values_TS: np.ndarray, thresholds_K: np.ndarray, weights_RS: np.ndarray, level: float) -> Interval:
    """Performance profile, `...TS` -> `...K`: the share of (task, seed) runs that score above each threshold.

    rliable's run-score distribution. A failed run is above no threshold. The band holds threshold by threshold.
    """
    above_TSK = finite(values_TS)[..., None] > np.asarray(thresholds_K, float)
    share_KS = np.moveaxis(above_TSK.mean(-3), -2, -1)
    return of_resamples(share_KS.mean(-1), resampled(share_KS, weights_RS), level)


def improvement(first_TS: np.ndarray, second_TS: np.ndarray, weights_RS: np.ndarray, level: float) -> Interval:
    """Chance that a run of the first arm beats a run of the second on the same task, mean over tasks (rliable).

    All pairs of seeds count, ties half (Mann-Whitney); a failed run loses against one that is ok. Scalars; 0.5 is none.
    """
    first_TS, second_TS = (np.nan_to_num(finite(v), nan=-np.inf) for v in (first_TS, second_TS))
    if first_TS.shape != second_TS.shape or first_TS.ndim != 2:
        raise Refusal(f"two arms of the same tasks and seeds are wanted, not {first_TS.shape} and {second_TS.shape}")
    one_TSS, other_TSS = first_TS[:, :, None], second_TS[:, None, :]
    wins_SS = ((one_TSS > other_TSS) + 0.5 * (one_TSS == other_TSS)).mean(0)
    resampled_R = (weights_RS.T * resampled(wins_SS, weights_RS)).sum(0)
    return of_resamples(wins_SS.mean(), resampled_R, level)


def wins(differences_S: np.ndarray, level: float) -> Interval:
    """Share of seeds on which the first arm beats the second, paired, with the exact interval of Clopper and Pearson.

    Covers at least `level` at every n, so it is wide. A tie counts half, for which the interval is an approximation.
    """
    require_fraction("level", level)
    differences_S = finite(differences_S)
    if np.isnan(differences_S).any():
        return Interval(*np.full(3, np.nan))
    n, k = len(differences_S), np.sum(differences_S > 0) + 0.5 * np.sum(differences_S == 0)
    tail = (1 - level) / 2
    low = betaincinv(k, n - k + 1, tail) if k > 0 else 0.0
    high = betaincinv(k + 1, n - k, 1 - tail) if k < n else 1.0
    return Interval(np.asarray(k / n), np.asarray(low), np.asarray(high))


# Ranks --------------------------------------------------------------------------------------------------------------


def ranks(values_TAS: np.ndarray, weights_RS: np.ndarray, level: float) -> Interval:
    """Rank of each arm by its mean over seeds, 1 the best, averaged over tasks (`A`), with percentile intervals.

    Equal means share the mean of their ranks. An arm with a failed run in a task loses there: it shares the last ranks.
    """
    values_TAS = finite(values_TAS)
    resampled_RTA = np.moveaxis(resampled(values_TAS, weights_RS), -1, 0)
    resampled_AR = ranked(resampled_RTA).mean(1).T
    return of_resamples(ranked(values_TAS.mean(-1)).mean(0), resampled_AR, level)


def rank_over_seeds(values_AS: np.ndarray, weights_RS: np.ndarray, level: float) -> Interval:
    """Rank of each arm within each seed, 1 the best, averaged over seeds (`A`), with percentile intervals.

    Ties share the mean of their ranks; a failed run is last in its seed.
    """
    rank_AS = ranked(finite(values_AS).T).T
    return of_resamples(rank_AS.mean(-1), resampled(rank_AS, weights_RS), level)


def ranked(values_A: np.ndarray) -> np.ndarray:
    """Ranks along the last axis, 1 for the largest, ties their mean, NaN last."""
    scale = np.max(np.abs(values_A), axis=-1, initial=0.0, where=np.isfinite(values_A), keepdims=True)
    filled_A = np.nan_to_num(values_A, nan=-np.inf)
    sorted_A = np.sort(filled_A, axis=-1)
    apart = 1e-12 * scale  # the same values summed in another order are a tie
    rank_A = np.empty(filled_A.shape)
    for place in range(filled_A.shape[-1]):
        one = filled_A[..., place, None]
        above = (sorted_A > one + apart).sum(-1)
        tied = (sorted_A >= one - apart).sum(-1) - above
        rank_A[..., place] = above + (tied + 1) / 2
    return rank_A


# Agreement ----------------------------------------------------------------------------------------------------------


class Agreement(NamedTuple):
    """Kendall's tau-b of two orders of the same arms and what its interval is worth."""

    tau: float
    low: float
    high: float
    arms: int
    note: str


def kendall(first_A: np.ndarray, second_A: np.ndarray, level: float) -> Agreement:
    """Kendall's tau-b (1945) of two lists of values of the same arms, with Fieller's interval.

    Fieller, Hartley and Pearson (1957): atanh(tau) has variance 0.437 / (n - 4). It takes the arms as a sample of
    mixers and was found for n >= 10, no ties and |tau| < 0.8; seeds' noise is in neither end. NaN ends below five arms
    or at |tau| = 1; arms with a failed run are left out.
    """
    require_fraction("level", level)
    first_A, second_A = finite(first_A), finite(second_A)
    if first_A.ndim != 1 or first_A.shape != second_A.shape:
        raise Refusal(f"two lists of the same arms are wanted, not shapes {first_A.shape} and {second_A.shape}")
    both = ~np.isnan(first_A) & ~np.isnan(second_A)
    n = int(both.sum())
    signs = [np.sign(v[both][:, None] - v[both]) for v in (first_A, second_A)]
    untied = np.sqrt(np.prod([(s != 0).sum(dtype=float) for s in signs]))
    tau = float((signs[0] * signs[1]).sum() / untied) if untied else np.nan
    note = "arms as a sample of mixers" + ("" if n >= FEWEST_ARMS else "; rough below ten arms")
    if n < 5 or not abs(tau) < 1:
        return Agreement(tau, np.nan, np.nan, n, "no interval below five arms, with a constant list or at tau = ±1")
    reach = ndtri((1 + level) / 2) * np.sqrt(0.437 / (n - 4))
    low, high = np.tanh(np.arctanh(tau) + np.array([-reach, reach]))
    return Agreement(tau, float(low), float(high), n, note)
