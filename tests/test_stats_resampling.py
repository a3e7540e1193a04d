"""Bootstraps and summaries over tasks: scipy and scikit-learn as references, closed forms, and what pairing keeps."""

import functools
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats as scipy_stats
from sklearn import metrics as sklearn_metrics

from bench import Refusal
from bench.report import stats_bootstrap, stats_suite
from bench.report.stats_bootstrap import Outcomes, bca, draws, hierarchical, mean_of_items, of_resamples, percentile

RNG = np.random.default_rng
WEIGHTS = draws(8, 500, RNG(0))


def every_draw(n: int) -> np.ndarray:
    """Weights of all n^n resamples: the bootstrap without chance."""
    return np.array([np.bincount(d, minlength=n) / n for d in itertools.product(range(n), repeat=n)])


# Percentile and BCa -------------------------------------------------------------------------------------------------


def test_draws_are_resamples_of_n_and_repeat_with_their_seed():
    assert WEIGHTS.shape == (500, 8) and ((WEIGHTS * 8) % 1 == 0).all()
    np.testing.assert_allclose(WEIGHTS.sum(1), 1)
    assert (draws(8, 500, RNG(0)) == WEIGHTS).all() and (draws(8, 500, RNG(1)) != WEIGHTS).any()
    with pytest.raises(Refusal, match="at least 1 seed"):
        draws(0, 10, RNG(0))


def test_means_of_resamples_add_up_seed_after_seed_on_every_processor():
    """So that a table has the same last digits everywhere; a product by BLAS has them as its processor adds."""
    values_S = RNG(3).normal(size=8)
    expected = [functools.reduce(float.__add__, (values_S * row).tolist()) for row in WEIGHTS]
    assert stats_bootstrap.resampled(values_S, WEIGHTS).tolist() == expected
    assert stats_bootstrap.resampled(values_S[None].repeat(2, 0), WEIGHTS).tolist() == [expected] * 2


def test_the_percentile_interval_of_three_seeds_is_their_range():
    """One resample in 27 repeats the least value three times: more than 2.5 %."""
    found = percentile(np.array([5.0, 1.0, 2.0]), draws(3, 2000, RNG(0)), 0.95)
    assert (found.low, found.high) == pytest.approx((1, 5), abs=1e-12) and found.estimate == pytest.approx(8 / 3)


@pytest.mark.parametrize("method", ["percentile", "BCa"])
def test_intervals_are_scipys_on_the_same_resamples(method):
    ours = {"percentile": percentile, "BCa": bca}[method]
    for values_S in (
        np.rint(64 * RNG(0).exponential(1, (10, 8))) / 64
    ):  # exact sums: scipy counts ties without tolerance
        same = SimpleNamespace(bootstrap_distribution=values_S @ WEIGHTS.T)
        expected = scipy_stats.bootstrap(
            (values_S,), np.mean, n_resamples=0, method=method, bootstrap_result=same
        ).confidence_interval
        found = ours(values_S, WEIGHTS, 0.95)
        assert (found.low, found.high) == pytest.approx(tuple(expected), rel=1e-9)


def test_bca_leans_towards_the_long_tail_and_equals_percentile_without_one():
    values_S = np.array([0.0, 0.1, 0.2, 0.3, 3.0])
    plain, corrected = (f(values_S, every_draw(5), 0.9) for f in (percentile, bca))
    assert corrected.low > plain.low and corrected.high > plain.high
    values_S = np.array([-2.0, -1.0, 0.0, 1.0, 2.0])
    plain, corrected = (f(values_S, every_draw(5), 0.9) for f in (percentile, bca))
    assert (corrected.low, corrected.high) == pytest.approx((plain.low, plain.high))


def test_bca_without_spread_with_a_failed_run_and_with_one_seed():
    values_AS = np.array([[0.1 + 0.2, 0.3, 0.3], [1, np.nan, 2], [1, 2, 4]])
    found = bca(values_AS, every_draw(3), 0.95)
    assert found.low[0] == found.high[0] == pytest.approx(0.3) and np.isnan([found.low[1], found.high[1]]).all()
    assert found.low[2] < found.estimate[2] < found.high[2]
    assert np.isnan(bca(np.array([0.3]), every_draw(1), 0.95).low)


def test_few_seeds_carry_a_caution():
    assert [stats_bootstrap.caution(n) for n in (2, 19, 20)] == ["undercovers at this n"] * 2 + [""]


# Hierarchical -------------------------------------------------------------------------------------------------------


def spread(moments_ASFI: np.ndarray, tasks: int = 1) -> np.ndarray:
    """Variance of the resampled suite mean of each arm, all tasks holding the same outcomes."""
    suite = [Outcomes(np.asarray(moments_ASFI, float)[..., None], mean_of_items)] * tasks
    return hierarchical(suite, 6000, RNG(0))[1].var(-1)


def test_each_level_gives_its_own_variance():
    """For values x resampled at one level with everything else equal: var(x) / n, with the population's variance."""
    x = np.array([0.0, 1.0, 5.0])
    seeds = np.broadcast_to(x[:, None, None], (1, 3, 2, 4))
    replicas = np.broadcast_to(x[None, :, None], (1, 4, 3, 2))
    items = np.broadcast_to(x, (1, 2, 2, 3))
    assert spread(seeds) == pytest.approx(x.var() / 3, rel=0.06)
    assert spread(replicas) == pytest.approx(x.var() / 3 / 4, rel=0.06), "each of four seeds draws its own replicas"
    assert spread(items) == pytest.approx(x.var() / 3, rel=0.06), "all runs answer the same items"


def test_a_seed_is_one_unit_over_tasks_and_items_are_not():
    x = np.array([0.0, 1.0, 5.0])
    seeds, items = np.broadcast_to(x[:, None, None], (1, 3, 1, 1)), np.broadcast_to(x, (1, 2, 1, 3))
    assert spread(seeds, tasks=4) == pytest.approx(spread(seeds), rel=0.05)
    assert spread(items, tasks=4) == pytest.approx(spread(items) / 4, rel=0.06)


def test_arms_are_resampled_together():
    one = RNG(0).random((1, 5, 3, 20))
    both = np.concatenate([one, one + 0.25])[..., None]
    estimate_A, resampled_AR = hierarchical([Outcomes(both, mean_of_items)] * 2, 300, RNG(0))
    np.testing.assert_allclose(resampled_AR[1] - resampled_AR[0], 0.25, rtol=1e-9)
    assert estimate_A[0] == pytest.approx(one.mean())
    interval = of_resamples(estimate_A, resampled_AR, 0.95)
    assert (interval.low < estimate_A).all() and (estimate_A < interval.high).all()


def test_a_failed_arm_has_no_suite_score_and_spoils_no_other():
    moments = RNG(0).random((3, 4, 2, 5, 1))
    moments[1, 2, 0] = np.nan
    estimate_A, resampled_AR = hierarchical([Outcomes(moments, mean_of_items)], 50, RNG(0))
    assert np.isnan(estimate_A).tolist() == [False, True, False] == np.isnan(resampled_AR).all(1).tolist()
    assert not np.isnan(resampled_AR[[0, 2]]).any()


def test_a_suite_of_other_arms_or_none_is_refused():
    with pytest.raises(Refusal, match=r"task 1 of the suite has shape \(2, 4, 1, 1, 1\); wanted \(2, 3, F, I, M\)"):
        hierarchical([Outcomes(np.ones((2, s, 1, 1, 1)), mean_of_items) for s in (3, 4)], 9, RNG(0))
    with pytest.raises(Refusal, match="at least one task"):
        hierarchical([], 9, RNG(0))


def test_scores_from_moments_are_those_of_the_libraries():
    rng = RNG(0)
    label, predicted = rng.integers(0, 2, (2, 200))
    moments = stats_bootstrap.confusion(label, predicted).mean(0)
    assert stats_bootstrap.f1(moments) == pytest.approx(sklearn_metrics.f1_score(label, predicted))
    assert stats_bootstrap.matthews(moments) == pytest.approx(sklearn_metrics.matthews_corrcoef(label, predicted))
    x, y = rng.normal(3, 1, (2, 200))
    moments = stats_bootstrap.products(x, x + y).mean(0)
    assert stats_bootstrap.pearson(moments) == pytest.approx(scipy_stats.pearsonr(x, x + y).statistic)


def test_scores_of_constant_predictions_are_zero():
    moments = stats_bootstrap.confusion([0, 0, 0], [0, 0, 0]).mean(0)
    assert stats_bootstrap.f1(moments) == stats_bootstrap.matthews(moments) == 0
    assert stats_bootstrap.pearson(stats_bootstrap.products([0.1, 0.2, 0.4], [0.3, 0.3, 0.3]).mean(0)) == 0
    assert np.isnan(stats_bootstrap.f1(np.full(4, np.nan)))


def test_the_suite_scores_each_run_before_it_averages():
    rng = RNG(0)
    label, predicted_ASFI = rng.integers(0, 2, 60), rng.integers(0, 2, (2, 3, 2, 60))
    suite = [Outcomes(stats_bootstrap.confusion(label, predicted_ASFI), stats_bootstrap.f1)]
    runs = predicted_ASFI.reshape(2, -1, 60)
    expected = [np.mean([sklearn_metrics.f1_score(label, run) for run in arm]) for arm in runs]
    assert hierarchical(suite, 9, RNG(0))[0] == pytest.approx(expected)


# Over tasks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tasks, seeds", [(1, 1), (1, 3), (2, 5), (7, 8)])
def test_iqm_is_the_trimmed_mean_of_all_runs(tasks, seeds):
    values_ATS = RNG(0).normal(0, 1, (3, tasks, seeds))
    expected = [scipy_stats.trim_mean(values_TS, 0.25, axis=None) for values_TS in values_ATS]
    np.testing.assert_allclose(stats_suite.iqm(values_ATS), expected)


def test_iqm_resamples_seeds_jointly_over_tasks():
    values_TS = RNG(0).normal(0, 1, (3, 8))
    found = stats_suite.iqm_interval(values_TS, WEIGHTS, 0.9)
    drawn_RS = stats_suite.chosen(WEIGHTS)
    by_hand = [scipy_stats.trim_mean(values_TS[:, drawn_S], 0.25, axis=None) for drawn_S in drawn_RS]
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(by_hand, [0.05, 0.95])))
    np.testing.assert_allclose(values_TS[0, drawn_RS].mean(-1), WEIGHTS @ values_TS[0])
    values_TS[0, 0] = np.nan
    assert np.isnan(stats_suite.iqm_interval(values_TS, WEIGHTS, 0.9).estimate)


def test_a_profile_counts_runs_above_and_a_failed_run_is_above_nothing():
    values_TS = np.array([[1.0, 2.0, 3.0, np.nan], [2.0, 2.0, 5.0, 0.0]])
    found = stats_suite.profile(values_TS, np.array([-1.0, 1.5, 2.0, 9.0]), draws(4, 200, RNG(0)), 0.95)
    assert found.estimate.tolist() == [7 / 8, 5 / 8, 2 / 8, 0]
    assert (found.low <= found.estimate).all() and (found.estimate <= found.high).all() and found.high[3] == 0


def test_improvement_is_mann_whitneys_share_averaged_over_tasks():
    first_TS, second_TS = RNG(0).integers(0, 6, (2, 4, 8)).astype(float)
    found = stats_suite.improvement(first_TS, second_TS, WEIGHTS, 0.95)
    shares = [
        scipy_stats.mannwhitneyu(x, y, method="asymptotic").statistic / 64
        for x, y in zip(first_TS, second_TS, strict=True)
    ]
    assert found.estimate == pytest.approx(np.mean(shares))
    back = stats_suite.improvement(second_TS, first_TS, WEIGHTS, 0.95)
    np.testing.assert_allclose((1 - back.estimate, 1 - back.high, 1 - back.low), found)
    x = first_TS[:, [2, 2, 0, 1, 1, 4, 5, 7]], second_TS[:, [2, 2, 0, 1, 1, 4, 5, 7]]
    weights_1S = np.bincount([2, 2, 0, 1, 1, 4, 5, 7], minlength=8)[None] / 8
    assert stats_suite.improvement(first_TS, second_TS, weights_1S, 0.5).low == pytest.approx(
        stats_suite.improvement(*x, WEIGHTS, 0.5).estimate
    ), "a resample is the statistic of the drawn seeds"


def test_improvement_at_its_ends_and_with_failed_runs():
    low, high = np.zeros((2, 8)), np.ones((2, 8))
    assert tuple(stats_suite.improvement(high, low, WEIGHTS, 0.95)) == pytest.approx((1, 1, 1))
    high[:, 0] = np.nan
    assert stats_suite.improvement(high, low, WEIGHTS, 0.95).estimate == 7 / 8
    with pytest.raises(Refusal, match="same tasks and seeds"):
        stats_suite.improvement(high, low[:1], WEIGHTS, 0.95)


@pytest.mark.parametrize("k", range(6))
def test_wins_have_the_exact_binomial_interval(k):
    expected = scipy_stats.binomtest(k, 5).proportion_ci(0.95, "exact")
    found = stats_suite.wins(np.where(np.arange(5) < k, 0.1, -0.1), 0.95)
    assert tuple(found) == pytest.approx((k / 5, expected.low, expected.high))


def test_a_tie_is_half_a_win_and_a_failed_run_no_share():
    assert stats_suite.wins(np.array([1.0, 0.0, -1.0, 0.0]), 0.95).estimate == 0.5
    assert np.isnan(stats_suite.wins(np.array([1.0, np.nan]), 0.95)).all()


# Ranks and agreement ------------------------------------------------------------------------------------------------


def test_ranks_are_scipys_and_failed_arms_share_the_last():
    values_A = np.array([3.0, np.nan, 5.0, 3.0, np.nan, 1.0])
    assert stats_suite.ranked(values_A).tolist() == [2.5, 5.5, 1, 2.5, 5.5, 4]
    values_TA = RNG(0).integers(0, 4, (20, 7)).astype(float)
    np.testing.assert_array_equal(stats_suite.ranked(values_TA), scipy_stats.rankdata(-values_TA, axis=-1))
    assert stats_suite.ranked(np.array([[0.1 + 0.2, 0.3], [np.nan, np.nan]])).tolist() == [[1.5, 1.5]] * 2


def test_ranks_over_tasks():
    values_TAS = RNG(0).normal(0, 1, (3, 4, 8))
    values_TAS[:, 2] += 100
    values_TAS[1, 0, 5] = np.nan
    found = stats_suite.ranks(values_TAS, WEIGHTS, 0.95)
    by_hand = np.mean([scipy_stats.rankdata(-np.nan_to_num(t.mean(-1), nan=-1e9)) for t in values_TAS], axis=0)
    np.testing.assert_allclose(found.estimate, by_hand)
    assert found.estimate.sum() == 10 and (found.low[2], found.estimate[2], found.high[2]) == (1, 1, 1)
    assert (found.low <= found.estimate).all() and (found.estimate <= found.high).all()
    assert found.low[0] >= (1 + 4 + 1) / 3, "the task where it failed counts as lost in every resample"


@pytest.mark.parametrize("values", [6, 100])
def test_kendall_is_scipys_tau_b_with_and_without_ties(values):
    for seed in range(20):
        first, second = RNG(seed).integers(0, values, (2, 12))
        expected = scipy_stats.kendalltau(first, second, variant="b").statistic
        assert stats_suite.kendall(first, second, 0.95).tau == pytest.approx(expected)


def test_the_interval_of_kendalls_tau_by_hand():
    """14 arms, one pair of neighbours swapped: tau = 1 - 4 / 182."""
    second = np.arange(14.0)
    second[[3, 4]] = second[[4, 3]]
    found = stats_suite.kendall(np.arange(14.0), second, 0.95)
    assert found.tau == pytest.approx(1 - 4 / 182) and found.note == "arms as a sample of mixers"
    z, reach = np.arctanh(found.tau), 1.959964 * (0.437 / 10) ** 0.5
    assert (found.low, found.high) == pytest.approx((np.tanh(z - reach), np.tanh(z + reach)), rel=1e-6)


def test_what_kendall_cannot_say_it_says():
    assert "rough below ten arms" in stats_suite.kendall([1, 2, 3, 4, 5, 6], [2, 1, 3, 4, 5, 6], 0.95).note
    perfect, constant = stats_suite.kendall(range(9), range(9), 0.95), stats_suite.kendall(range(9), [1] * 9, 0.95)
    assert perfect.tau == 1 and np.isnan(perfect.low) and np.isnan(constant.tau)
    failed = stats_suite.kendall([1, 2, 3, np.nan, 5], [2, 1, 4, 3, 5], 0.95)
    assert failed.arms == 4 and failed.tau == pytest.approx(4 / 6) and "no interval" in failed.note
    with pytest.raises(Refusal, match="same arms"):
        stats_suite.kendall([1, 2], [1, 2, 3], 0.95)
