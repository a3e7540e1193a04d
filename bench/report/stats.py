"""The statistics of one column: which arms differ, by how much, and the rules on what may be said at all.

Pure functions of arrays. Axes: A arms, S pretraining seeds (the unit: replicas are averaged before), P declared pairs
of arms, I items; `...` is any leading axes. The primary test is the paired t-test with Holm over the declared family;
the exact sign-flip test and a pooled block model stand beside it. A value that is not finite is a failed run.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from bench import Refusal
from bench.report.stats_letters import letters
from bench.report.stats_tests import (
    Interval,
    can_test,
    finite,
    holm,
    mean_and_error,
    require_fraction,
    sign_flip,
    t_interval,
    t_test,
    two_sided,
)

FAILED, FEW, DIFFERS, OPEN = "failed runs", "too few seeds to test", "differs", "not separable"
Pairs = list[tuple[int, int]]  # (arm, the arm that it is compared with); a list of them is a declared family


def against(arms: int, reference: int) -> Pairs:
    """The family 'each arm against the reference', in the order of the arms."""
    return [(arm, reference) for arm in range(arms) if arm != reference]


def every_pair(arms: int) -> Pairs:
    """The family of all pairs, which significance groups need."""
    return [(i, j) for i in range(arms) for j in range(i + 1, arms)]


@dataclass(frozen=True)
class Comparisons:
    """A declared family on one column; arrays run over its pairs (`...P`), differences are first minus second.

    Intervals hold for one pair each (level 1 - alpha); the adjusted p hold for the family.
    """

    pairs: Pairs
    seeds: int
    alpha: float
    difference_P: Interval  # mean paired difference, t interval
    p_P: np.ndarray  # paired t
    adjusted_P: np.ndarray  # of p_P, Holm: the primary test
    flip_P: np.ndarray  # exact sign-flip
    flip_adjusted_P: np.ndarray
    pooled_P: Interval  # sensitivity: the block model
    pooled_adjusted_P: np.ndarray
    tested: bool  # False: intervals only, too few seeds to test
    significant_P: np.ndarray  # tested and adjusted_P <= alpha

    def verdicts(self) -> list[str]:
        """One of 'failed runs', 'too few seeds to test', 'differs', 'not separable' for each pair of one column."""
        tested = [DIFFERS if s else OPEN for s in self.significant_P] if self.tested else [FEW] * len(self.pairs)
        return [FAILED if np.isnan(d) else t for d, t in zip(self.difference_P.estimate, tested, strict=True)]


def compare(values_AS: np.ndarray, pairs: Pairs, alpha: float) -> Comparisons:
    """All tests of a declared family on the values of one column, `...AS`, in the column's units.

    A pair with a failed run has no result and keeps its place in the family. With fewer seeds than can reach alpha by
    sign-flips after Holm nothing is called significant: the t-test would then rest on normality alone.
    """
    require_fraction("alpha", alpha)
    values_AS = finite(values_AS)
    check_pairs(values_AS, pairs)
    seeds = values_AS.shape[-1]
    differences_PS = differences(values_AS, pairs)
    p_P, flip_P = t_test(differences_PS), sign_flip(differences_PS)
    pooled_P, pooled_p_P = pooled(values_AS, pairs, 1 - alpha)
    adjusted_P, tested = holm(p_P), can_test(seeds, len(pairs), alpha)
    return Comparisons(
        pairs=list(pairs),
        seeds=seeds,
        alpha=alpha,
        difference_P=t_interval(differences_PS, 1 - alpha),
        p_P=p_P,
        adjusted_P=adjusted_P,
        flip_P=flip_P,
        flip_adjusted_P=holm(flip_P),
        pooled_P=pooled_P,
        pooled_adjusted_P=holm(pooled_p_P),
        tested=tested,
        significant_P=(adjusted_P <= alpha) & tested,
    )


def check_pairs(values_AS: np.ndarray, pairs: Pairs) -> None:
    """Refuse a family that is empty, repeats a pair, or names an arm that is not there."""
    if values_AS.ndim < 2 or values_AS.shape[-1] < 1:
        raise Refusal(f"values must be arms x seeds, not of shape {values_AS.shape}")
    arms = values_AS.shape[-2]
    wrong = [p for p in pairs if len(p) != 2 or p[0] == p[1] or not all(0 <= arm < arms for arm in p)]
    if wrong or not pairs:
        raise Refusal(f"a family is a list of pairs of different arms 0 to {arms - 1}; wrong: {wrong or 'it is empty'}")
    if len({frozenset(p) for p in pairs}) < len(pairs):
        raise Refusal("a pair of arms stands twice in the family")


def differences(values_AS: np.ndarray, pairs: Pairs) -> np.ndarray:
    """Paired differences by seed, `...AS` -> `...PS`; what is only rounding of the two values is 0."""
    first, second = np.asarray(pairs).T
    one_PS, other_PS = values_AS[..., first, :], values_AS[..., second, :]
    gap_PS = one_PS - other_PS
    return np.where(np.abs(gap_PS) <= 1e-12 * np.maximum(np.abs(one_PS), np.abs(other_PS)), 0.0, gap_PS)


def pooled(values_AS: np.ndarray, pairs: Pairs, level: float) -> tuple[Interval, np.ndarray]:
    """Sensitivity analysis: the block model value = arm + seed + noise, one noise variance for all arms.

    `...AS` -> (differences of arm means with their intervals, two-sided p), both `...P`. The residual variance of the A
    complete arms has (A - 1)(S - 1) degrees of freedom (randomised complete blocks, Fisher 1935): far more than S - 1
    of one pair, but wrong where some arms are noisier than others. For two arms it is the paired t-test.
    """
    whole_A1 = ~np.isnan(values_AS).any(-1, keepdims=True)
    seeds, arms = values_AS.shape[-1], whole_A1.sum((-2, -1))
    filled_AS = np.where(whole_A1, values_AS, 0.0)
    arm_A1 = filled_AS.mean(-1, keepdims=True)
    count = np.maximum(arms, 1)[..., None, None]
    seed_1S = filled_AS.sum(-2, keepdims=True) / count
    rest_AS = (filled_AS - arm_A1 - seed_1S + arm_A1.sum(-2, keepdims=True) / count) * whole_A1
    df = (arms - 1) * (seeds - 1)
    variance = np.where(df > 0, (rest_AS**2).sum((-2, -1)) / np.maximum(df, 1), np.nan)
    error = np.sqrt(2 * variance / seeds)[..., None]
    estimate_P = differences(values_AS, pairs).mean(-1)
    error_P, df = error + 0 * estimate_P, np.maximum(df, 1)[..., None]
    reach_P = error_P * stdtrit(df, (1 + level) / 2)
    return Interval(estimate_P, estimate_P - reach_P, estimate_P + reach_P), two_sided(estimate_P, error_P, df, seeds)


def groups(values_AS: np.ndarray, alpha: float) -> tuple[list[str], str]:
    """(letters of each arm, reason why there are none or ''): arms that share a letter were not declared different.

    Different is the paired t-test with Holm over all pairs of `values_AS`. An arm with failed runs has no letter.
    """
    values_AS = finite(values_AS)
    arms = len(values_AS)
    if arms < 2:
        return letters(np.zeros((arms, arms), bool), values_AS.mean(-1)), ""
    if not can_test(values_AS.shape[-1], len(every_pair(arms)), alpha):
        return [""] * arms, FEW
    pairs = every_pair(arms)
    p_P = holm(t_test(differences(values_AS, pairs)))
    differs_AA = np.zeros((arms, arms), bool)
    first, second = np.asarray(pairs).T
    differs_AA[first, second] = differs_AA[second, first] = p_P <= alpha
    return letters(differs_AA, values_AS.mean(-1)), ""


# Rules --------------------------------------------------------------------------------------------------------------


def failures(values_S: np.ndarray) -> np.ndarray:
    """How many runs of each arm failed, `...S` -> `...`. An arm with any has no mean, interval or letter."""
    return np.isnan(finite(values_S)).sum(-1)


def failed_text(failed: int, runs: int) -> str:
    """'2 of 5 failed', or '' if none did."""
    return f"{failed} of {runs} failed" if failed else ""


def majority(label_I: np.ndarray) -> tuple[float, float]:
    """(share of the most frequent class, its standard error over items): what a model that ignores its input scores."""
    counts = np.unique(np.asarray(label_I), return_counts=True)[1]
    if not len(counts):
        raise Refusal("the majority class of no items; give the labels of the reported set")
    rate = counts.max() / counts.sum()
    return float(rate), float(np.sqrt(rate * (1 - rate) / counts.sum()))


def at_floor(reference_S: np.ndarray, floor: float, floor_error: float) -> np.ndarray:
    """Whether the reference arm's mean is not more than 3 standard errors above the floor, `...S` -> `...` booleans.

    Such a task tells no arms apart: it is shown as 'at floor' and enters no average. `floor` and its error over items
    come from `majority` (of a correlation: 0 and 1 / sqrt(items)); the seeds' standard error is added as variances
    add. A reference with failed runs is at the floor: nothing shows that the task can be learnt.
    """
    mean, error = mean_and_error(reference_S)
    seeds_error = 0.0 if np.shape(reference_S)[-1] < 2 else error
    return ~(mean - floor > 3 * np.sqrt(seeds_error**2 + np.square(floor_error)))
