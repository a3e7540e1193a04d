"""Tests and t intervals: paired t, exact sign-flip, Holm, equivalence, McNemar, and what n seeds can show at all.

Pure functions of numpy arrays. Axes: S seeds, P comparisons of one declared family, I items; `...` is any leading axes.
A value that is not finite is a failed run: its comparison has no result (NaN) but keeps its place in the family.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.special import bdtr, nctdtr, stdtr, stdtrit

from bench import Refusal

MOST_FLIPPED = 40  # seeds; the two halves of 2^40 sign patterns still fit in memory
ROUNDING = 1e-9  # a spread this small against its mean is rounding, not noise


class Interval(NamedTuple):
    """An estimate and the ends of its interval, arrays of one shape, in the units of the values."""

    estimate: np.ndarray
    low: np.ndarray
    high: np.ndarray


# Student's t --------------------------------------------------------------------------------------------------------


def t_interval(values_S: np.ndarray, level: float) -> Interval:
    """Mean over the last axis (`...S` -> `...`) and its t interval; no ends for one seed, all NaN where one failed.

    Exact for normal noise at every n >= 2 (Student 1908).
    """
    require_fraction("level", level)
    mean, error = mean_and_error(values_S)
    n = np.shape(values_S)[-1]
    reach = error * stdtrit(max(n - 1, 1), (1 + level) / 2)
    return Interval(mean, mean - reach, mean + reach)


def t_test(differences_S: np.ndarray) -> np.ndarray:
    """Two-sided p of the paired t-test, `...S` paired differences -> `...`; NaN for one seed or a failed run.

    Without any spread t has no meaning: p is 1 if all differences are 0, else the least that a sign-flip could give.
    """
    mean, error = mean_and_error(differences_S)
    return two_sided(mean, error, np.shape(differences_S)[-1] - 1, np.shape(differences_S)[-1])


def mean_and_error(values_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over seeds and its standard error, `...S` -> `...`; the error of one seed is NaN."""
    values_S = finite(values_S)
    n = values_S.shape[-1]
    mean = values_S.mean(-1)
    if n < 2:
        return mean, np.full_like(mean, np.nan)
    return mean, values_S.std(-1, ddof=1) / np.sqrt(n)


def two_sided(estimate: np.ndarray, error: np.ndarray, df: float, n: int) -> np.ndarray:
    """Two-sided p of estimate / error under t with df degrees of freedom, elementwise; see `t_test` for error 0."""
    flat = error <= ROUNDING * np.abs(estimate)
    p = 2 * stdtr(df, -np.abs(estimate / np.where(flat, 1, error)))
    return np.where(flat, np.where(estimate == 0, 1.0, smallest_flip_p(n)), p)


def finite(values: np.ndarray) -> np.ndarray:
    """Floats with NaN for what is not finite."""
    values = np.asarray(values, float)
    return np.where(np.isfinite(values), values, np.nan)


# Exact sign-flip ----------------------------------------------------------------------------------------------------


def sign_flip(differences_S: np.ndarray) -> np.ndarray:
    """Two-sided p of the exact sign-flip test on the mean, `...S` -> `...` (Fisher 1935): all 2^n patterns are counted.

    Valid for any noise that is symmetric around the true difference. NaN where a run failed or above 40 seeds. Sums
    of either half of the seeds are listed, and pairs of them counted by bisection: 40 seeds need 2^20 numbers.
    """
    rows_NS = finite(differences_S).reshape(-1, np.shape(differences_S)[-1])
    return np.array([_flipped(row_S) for row_S in rows_NS]).reshape(np.shape(differences_S)[:-1])


def _flipped(row_S: np.ndarray) -> float:
    n = len(row_S)
    observed, total = abs(row_S.sum()), np.abs(row_S).sum()
    if np.isnan(total) or n > MOST_FLIPPED:
        return np.nan
    at_least = observed - 1e-10 * total  # equal sums may differ by rounding
    if at_least <= 0:
        return 1.0
    left, right = _signed_sums(row_S[: n // 2]), np.sort(_signed_sums(row_S[n // 2 :]))
    count = len(left) * len(right) - np.searchsorted(right, at_least - left).sum()
    return 2.0 * count / 2.0**n


def _signed_sums(row_S: np.ndarray) -> np.ndarray:
    sums = np.zeros(1)
    for value in row_S:
        sums = np.concatenate([sums + value, sums - value])
    return sums


def smallest_flip_p(n: int) -> float:
    """The least two-sided p of a sign-flip test on n seeds: all differences on one side, 2 of 2^n patterns."""
    return min(1.0, 2.0 ** (1 - n))


def can_test(n: int, family: int, alpha: float) -> bool:
    """Whether n seeds can reach alpha after Holm in a family of that size, without leaning on normality.

    False: 'too few seeds to test', the table shows intervals only. At .05: n >= 6 for one, 8 for six, 10 for thirteen.
    """
    return family * smallest_flip_p(n) <= alpha


# Several comparisons ------------------------------------------------------------------------------------------------


def holm(p_P: np.ndarray) -> np.ndarray:
    """Holm-adjusted p (1979), `...P` -> `...P`: the family-wise error holds whatever the dependence.

    The family is the last axis as declared. A NaN stays NaN and counts as never significant, so a failed arm does not
    make the others' threshold easier.
    """
    order, sorted_P, m = _ascending(p_P)
    raised_P = np.maximum.accumulate(sorted_P * (m - np.arange(m)), axis=-1)
    return _put_back(np.minimum(raised_P, 1), order, p_P)


def benjamini_hochberg(p_P: np.ndarray) -> np.ndarray:
    """p adjusted for the false discovery rate (1995), `...P` -> `...P`. For exploration only: no claim rests on it."""
    order, sorted_P, m = _ascending(p_P)
    raised_P = sorted_P * m / np.arange(1, m + 1)
    least_P = np.minimum.accumulate(raised_P[..., ::-1], axis=-1)[..., ::-1]
    return _put_back(np.minimum(least_P, 1), order, p_P)


def _ascending(p_P: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    filled_P = np.where(np.isnan(p_P), 1.0, p_P)
    order = np.argsort(filled_P, axis=-1, kind="stable")
    return order, np.take_along_axis(filled_P, order, -1), filled_P.shape[-1]


def _put_back(sorted_P: np.ndarray, order: np.ndarray, p_P: np.ndarray) -> np.ndarray:
    adjusted_P = np.empty_like(sorted_P)
    np.put_along_axis(adjusted_P, order, sorted_P, -1)
    return np.where(np.isnan(p_P), np.nan, adjusted_P)


# Equivalence, items -------------------------------------------------------------------------------------------------


class Equivalence(NamedTuple):
    """Two one-sided tests; adjust `p` by `holm` in a family. `low`, `high`: the 1 - 2 alpha interval that decides."""

    p: np.ndarray
    low: np.ndarray
    high: np.ndarray
    equivalent: np.ndarray


def equivalence(differences_S: np.ndarray, margin: float, alpha: float) -> Equivalence:
    """TOST (Schuirmann 1987) on paired differences `...S`: is the true mean within ± margin, in the values' units?

    The margin is declared before the runs. Not equivalent is not the same as different.
    """
    if not margin > 0:
        raise Refusal(f"an equivalence margin must be greater than 0, not {margin}; it is in the units of the column")
    require_fraction("alpha", alpha)
    mean, error = mean_and_error(differences_S)
    n = np.shape(differences_S)[-1]
    room = margin - np.abs(mean)  # distance to the nearer end: its one-sided test is the larger of the two
    half = two_sided(room, error, n - 1, n) / 2
    p = np.where(room > 0, half, 1 - half)
    _, low, high = t_interval(differences_S, 1 - 2 * alpha)
    return Equivalence(p, low, high, p <= alpha)


@dataclass(frozen=True)
class McNemar:
    """Items on which just one of two checkpoints is right. It speaks of these two checkpoints, not of their mixers."""

    only_first: int
    only_second: int
    items: int
    p: float
    level = "items of these two checkpoints"


def mcnemar(first_I: np.ndarray, second_I: np.ndarray) -> McNemar:
    """Exact two-sided McNemar test (1947) on right/wrong outcomes of the same items in the same order."""
    first_I, second_I = np.asarray(first_I), np.asarray(second_I)
    if first_I.ndim != 1 or first_I.shape != second_I.shape:
        raise Refusal(f"two lists of the same items are wanted, not shapes {first_I.shape} and {second_I.shape}")
    if not (np.isin(first_I, (0, 1)).all() and np.isin(second_I, (0, 1)).all()):
        raise Refusal("outcomes of items must be 0 (wrong) or 1 (right)")
    b, c = int(np.sum(first_I > second_I)), int(np.sum(first_I < second_I))
    p = min(1.0, 2 * float(bdtr(min(b, c), b + c, 0.5))) if b + c else 1.0
    return McNemar(b, c, len(first_I), p)


# Power --------------------------------------------------------------------------------------------------------------


def power(effect: float, n: int, family: int, alpha: float) -> float:
    """Chance that a paired t-test on n seeds finds a true mean difference of `effect` run-to-run SDs of differences.

    At alpha / family, Holm's first step: exact for one comparison, a lower bound inside a family. Noncentral t.
    """
    require_fraction("alpha", alpha)
    if n < 2 or family < 1:
        raise Refusal(f"power needs at least 2 seeds and a family of at least 1, not {n} seeds and {family}")
    df, shift = n - 1, abs(effect) * np.sqrt(n)
    critical = stdtrit(df, 1 - alpha / family / 2)
    # scipy's noncentral t is NaN where it is 0 to 1e-13; there and only there.
    below, wrong_side = np.nan_to_num([nctdtr(df, shift, critical), nctdtr(df, shift, -critical)])
    return float(1 - below + wrong_side)


def detectable(n: int, family: int, alpha: float, wanted: float) -> float:
    """The least true difference, in SDs of paired differences, that n seeds find with probability `wanted`.

    It trusts the t-test at any n; ask `can_test` whether the report will test at all.
    """
    require_fraction("power", wanted)
    high = 1.0
    while power(high, n, family, alpha) < wanted:
        high *= 2
    if power(0.0, n, family, alpha) >= wanted:
        return 0.0
    low = 0.0
    while high - low > 1e-12 * high:  # by bisection: loading scipy.optimize takes longer than all of this
        middle = (low + high) / 2
        low, high = (middle, high) if power(middle, n, family, alpha) < wanted else (low, middle)
    return high


def seeds_to_find(effect: float, family: int, alpha: float, wanted: float) -> int:
    """The least n that `can_test` allows and that finds `effect` (SDs of differences) with probability `wanted`."""
    require_fraction("power", wanted)
    if not abs(effect) >= 0.01:
        raise Refusal(f"an effect below 0.01 SDs needs more than 80,000 seeds; {effect} is not a plan")
    n = 2
    while not (can_test(n, family, alpha) and power(effect, n, family, alpha) >= wanted):
        n += 1
    return n


def require_fraction(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise Refusal(f"{name} must lie between 0 and 1, not {value}")
