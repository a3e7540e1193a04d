"""Tests, families, letters and rules of the report: closed forms, scipy, hand-made cases, and simulated tables.

No number here was trained. Axes as in bench/report/stats.py: A arms, S seeds, P pairs.
"""

import itertools

import numpy as np
import pytest
from scipy import stats as scipy_stats

from bench import Refusal
from bench.report import stats, stats_tests
from bench.report.stats import DIFFERS, FAILED, FEW, OPEN
from bench.report.stats_letters import alike, letters
from bench.report.stats_tests import benjamini_hochberg, can_test, holm, sign_flip, t_interval, t_test
from benchmarks import calibration

RNG = np.random.default_rng


# Student's t --------------------------------------------------------------------------------------------------------


def test_the_t_interval_of_one_two_three():
    interval = t_interval(np.array([1.0, 2.0, 3.0]), 0.95)
    assert interval.estimate == 2 and interval.high - 2 == pytest.approx(4.30265 / 3**0.5, rel=1e-5)
    assert 2 - interval.low == interval.high - 2


def test_intervals_and_p_are_scipys():
    values_AS = RNG(0).normal(1, 2, (6, 5))
    found, p = t_interval(values_AS, 0.9), t_test(values_AS)
    for row, low, high, own_p in zip(values_AS, found.low, found.high, p, strict=True):
        expected = scipy_stats.ttest_1samp(row, 0)
        assert own_p == pytest.approx(expected.pvalue, rel=1e-12)
        assert (low, high) == pytest.approx(tuple(expected.confidence_interval(0.9)), rel=1e-12)


def test_without_spread_a_p_is_that_of_the_sign_flips():
    same = [[0, 0, 0, 0], [0.1, 0.1, 0.1, 0.1], [0.3 - 0.2, 0.1, 0.4 - 0.3, 0.1]]
    assert t_test(np.array(same)).tolist() == [1, 1 / 8, 1 / 8]


def test_one_seed_and_a_failed_run_have_no_test():
    assert np.isnan(t_test(np.array([[0.3], [0.0]]))).all() and np.isnan(t_interval([[0.3]], 0.95).low).all()
    p = t_test(np.array([[1, 2, np.nan], [1, 2, np.inf], [1, 2, 4]]))
    assert np.isnan(p).tolist() == [True, True, False]
    assert np.isnan(sign_flip(np.array([1, 2, np.nan])))


# Exact sign-flip ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", range(1, 10))
def test_sign_flips_are_counted_one_by_one(n):
    """Small integers: many sums are equal, and all are exact."""
    for row in RNG(n).integers(-3, 4, (20, n)):
        sums = [abs(np.dot(signs, row)) for signs in itertools.product((-1, 1), repeat=n)]
        assert sign_flip(row) == np.mean(np.array(sums) >= abs(row.sum()))
        assert sign_flip(row * 0.1) == sign_flip(row), "rounding must not break ties"


def test_sign_flips_are_scipys_permutation_test():
    row = RNG(3).normal(0.4, 1, 11)
    expected = scipy_stats.permutation_test((row,), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue
    assert sign_flip(row) == pytest.approx(expected, rel=1e-12)


def test_the_smallest_p_is_reached_and_no_other_is_smaller():
    for n in (1, 2, 5, 10, 24, 40):
        assert sign_flip(np.arange(1.0, n + 1)) == stats_tests.smallest_flip_p(n)
    assert np.isnan(sign_flip(np.ones(41)))
    assert sign_flip(RNG(0).normal(0, 1, (50, 6))).min() >= 2**-5


def test_a_sign_flip_does_not_see_order_sign_or_unit():
    row = RNG(1).normal(0.5, 1, 9)
    assert sign_flip(row) == sign_flip(row[::-1]) == sign_flip(-row) == sign_flip(1e-6 * row)


@pytest.mark.parametrize("family, least", [(1, 6), (6, 8), (13, 10), (91, 12)])
def test_the_fewest_seeds_that_can_be_tested(family, least):
    assert next(n for n in range(1, 20) if can_test(n, family, 0.05)) == least


# Several comparisons ------------------------------------------------------------------------------------------------


def test_holm_of_four_by_hand():
    assert holm(np.array([0.01, 0.04, 0.03, 0.005])) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holm_rejects_what_the_step_down_procedure_rejects():
    for p in RNG(0).random((200, 7)) ** 3:
        rejected = np.zeros(7, bool)
        for step, place in enumerate(np.argsort(p)):
            if p[place] > 0.05 / (7 - step):
                break
            rejected[place] = True
        assert ((holm(p) <= 0.05) == rejected).all()


def test_a_missing_p_keeps_its_place_in_the_family():
    assert holm(np.array([0.01, np.nan, 0.02]))[[0, 2]] == pytest.approx([0.03, 0.04])
    assert np.isnan(holm(np.array([0.01, np.nan])))[1] and np.isnan(benjamini_hochberg(np.array([np.nan, 0.1])))[0]


def test_benjamini_hochberg_is_scipys_row_by_row():
    p = RNG(0).random((9, 13))
    expected = scipy_stats.false_discovery_control(p, axis=-1)
    np.testing.assert_allclose(benjamini_hochberg(p), expected, rtol=1e-12)
    assert (benjamini_hochberg(p) <= holm(p) + 1e-15).all()


# Equivalence, items, power ------------------------------------------------------------------------------------------


def test_equivalence_is_two_one_sided_tests_and_its_interval_decides():
    for row in RNG(0).normal(0.1, 0.3, (40, 6)):
        below = scipy_stats.ttest_1samp(row, 0.4, alternative="less").pvalue
        above = scipy_stats.ttest_1samp(row, -0.4, alternative="greater").pvalue
        found = stats_tests.equivalence(row, 0.4, 0.05)
        assert found.p == pytest.approx(max(below, above), rel=1e-9)
        assert found.equivalent == (found.low > -0.4 and found.high < 0.4) == (found.p <= 0.05)
    assert stats_tests.equivalence(np.full(6, 0.5), 0.4, 0.05).p > 0.5
    with pytest.raises(Refusal, match="margin must be greater than 0, not 0"):
        stats_tests.equivalence(np.ones(3), 0.0, 0.05)


def test_mcnemar_by_hand_and_by_scipy():
    first, second = np.array([1] + 8 * [0] + 5 * [1] + 2 * [0]), np.array([0] + 8 * [1] + 5 * [1] + 2 * [0])
    found = stats_tests.mcnemar(first, second)
    assert (found.only_first, found.only_second, found.items, found.p) == (1, 8, 16, 2 * (1 + 9) / 2**9)
    assert found.p == pytest.approx(scipy_stats.binomtest(1, 9).pvalue) and "checkpoints" in found.level
    assert stats_tests.mcnemar(second, first).p == found.p
    assert stats_tests.mcnemar(first, first).p == 1 == stats_tests.mcnemar(first[:2], 1 - first[:2]).p
    with pytest.raises(Refusal, match="same items"):
        stats_tests.mcnemar(first, second[1:])
    with pytest.raises(Refusal, match=r"0 \(wrong\) or 1"):
        stats_tests.mcnemar(first, second * 0.5)


@pytest.mark.parametrize(
    "n, one, thirteen", [(3, 3.26, 11.8), (5, 1.68, 3.38), (8, 1.16, 1.89), (10, 1.00, 1.54), (20, 0.66, 0.94)]
)
def test_the_effects_that_80_percent_find(n, one, thirteen):
    assert stats_tests.detectable(n, 1, 0.05, 0.8) == pytest.approx(one, abs=0.006)
    assert stats_tests.detectable(n, 13, 0.05, 0.8) == pytest.approx(thirteen, abs=0.06)


def test_power_is_the_noncentral_t_and_at_no_effect_the_level():
    critical = scipy_stats.t.isf(0.025, 9)
    theory = scipy_stats.nct.sf(critical, 9, 0.7 * 10**0.5) + scipy_stats.nct.cdf(-critical, 9, 0.7 * 10**0.5)
    assert stats_tests.power(-0.7, 10, 1, 0.05) == pytest.approx(theory, rel=1e-9)
    assert stats_tests.power(0, 10, 13, 0.05) == pytest.approx(0.05 / 13, rel=1e-9)
    assert stats_tests.detectable(10, 1, 0.05, 0.04) == 0
    effect = stats_tests.detectable(9, 4, 0.05, 0.9)
    assert stats_tests.power(effect, 9, 4, 0.05) == pytest.approx(0.9, abs=1e-9)


@pytest.mark.parametrize("n, family", [(2, 1), (3, 13), (9, 1), (10, 91), (1000, 1000)])
def test_power_grows_with_the_effect_to_one_without_a_gap(n, family):
    powers = [stats_tests.power(effect, n, family, 0.05) for effect in np.geomspace(1e-3, 1e5, 500)]
    assert (np.diff(powers) > -1e-9).all() and powers[-1] == 1


def test_seeds_to_find_are_the_least_that_are_tested_and_suffice():
    n = stats_tests.seeds_to_find(1.0, 13, 0.05, 0.8)
    assert stats_tests.power(1.0, n, 13, 0.05) >= 0.8 > stats_tests.power(1.0, n - 1, 13, 0.05)
    assert stats_tests.seeds_to_find(50, 13, 0.05, 0.8) == 10, "however large the effect, fewer cannot be tested"
    for wrong in (lambda: stats_tests.seeds_to_find(0, 1, 0.05, 0.8), lambda: stats_tests.power(1, 1, 1, 0.05)):
        with pytest.raises(Refusal):
            wrong()


# Letters ------------------------------------------------------------------------------------------------------------


def check_display(differs_AA: np.ndarray, texts: list[str]) -> None:
    """Two arms share a letter iff not different; without any one letter that would be false."""

    def shared(without: str) -> np.ndarray:
        sets = [set(text) - {without} for text in texts]
        return np.array([[bool(a & b) for b in sets] for a in sets])

    assert (shared("") == ~differs_AA).all()
    for letter in set("".join(texts)):
        assert (shared(letter) != ~differs_AA).any(), f"{letter} is not needed in {texts}"


@pytest.mark.parametrize("arms", range(1, 6))
def test_letters_are_right_and_minimal_for_every_pattern_of_differences(arms):
    pairs = list(itertools.combinations(range(arms), 2))
    for pattern in itertools.product((False, True), repeat=len(pairs)):
        differs_AA = np.zeros((arms, arms), bool)
        for (i, j), differs in zip(pairs, pattern, strict=True):
            differs_AA[i, j] = differs_AA[j, i] = differs
        texts = letters(differs_AA, np.arange(arms))
        check_display(differs_AA, texts)
        assert "a" in texts[-1], "the best arm is in the first group"


@pytest.mark.parametrize("seed", range(20))
def test_letters_are_right_for_seventeen_arms(seed):
    differs_AA = np.triu(RNG(seed).random((17, 17)) < seed / 20, 1)
    differs_AA |= differs_AA.T
    check_display(differs_AA, letters(differs_AA, RNG(seed).random(17)))
    groups = alike(differs_AA)
    assert not any(one < other for one in groups for other in groups), "a group holds all arms that it can"


def test_letters_of_a_ladder():
    """Arms a step apart overlap with their neighbours only: the display of a textbook."""
    value_A = np.array([3.0, 1.0, 2.0, 4.0])
    differs_AA = np.abs(value_A[:, None] - value_A) > 1.5
    assert letters(differs_AA, value_A) == ["ab", "c", "bc", "a"]


def test_an_arm_with_failed_runs_has_no_letter():
    assert letters(np.zeros((3, 3)), np.array([1.0, np.nan, 2.0])) == ["a", "", "a"]
    for wrong in (np.eye(3), np.triu(np.ones((3, 3)), 1), np.zeros((2, 2))):
        with pytest.raises(Refusal, match="symmetric, 3 x 3"):
            letters(wrong, np.arange(3))


# A column -----------------------------------------------------------------------------------------------------------


def column(arms: int = 5, seeds: int = 10, seed: int = 0) -> np.ndarray:
    """Arm a is a SDs of noise above arm 0; the seeds' own effect is far larger."""
    rng = RNG(seed)
    return np.arange(arms)[:, None] + 30 * rng.standard_normal(seeds) + rng.standard_normal((arms, seeds))


def test_each_arm_is_compared_with_the_reference_by_seed():
    values_AS = column()
    found = stats.compare(values_AS, stats.against(5, 2), 0.05)
    assert found.pairs == [(0, 2), (1, 2), (3, 2), (4, 2)]
    for place, (arm, reference) in enumerate(found.pairs):
        expected = scipy_stats.ttest_rel(values_AS[arm], values_AS[reference])
        assert found.p_P[place] == pytest.approx(expected.pvalue, rel=1e-9)
        low, high = expected.confidence_interval(0.95)
        assert (found.difference_P.low[place], found.difference_P.high[place]) == pytest.approx((low, high))
        assert found.flip_P[place] == sign_flip(values_AS[arm] - values_AS[reference])
    np.testing.assert_allclose(found.adjusted_P, holm(found.p_P))
    np.testing.assert_allclose(found.flip_adjusted_P, holm(found.flip_P))


def test_what_a_seed_gives_to_all_arms_changes_nothing():
    found, shifted = (stats.compare(column() + s, stats.every_pair(5), 0.05) for s in (0, 50 * np.arange(10)))
    for name in ("p_P", "flip_P", "pooled_adjusted_P"):
        np.testing.assert_allclose(getattr(found, name), getattr(shifted, name), rtol=1e-6)


def test_rounding_is_no_difference():
    values_AS = np.array([[0.1 + 0.2] * 6, [0.3] * 6])
    found = stats.compare(values_AS, [(0, 1)], 0.05)
    assert found.p_P == 1 and found.difference_P.estimate == 0 and found.pooled_adjusted_P == 1


def test_the_block_model_is_least_squares_on_dummies():
    values_AS = column(4, 6)
    arms, seeds = np.indices((4, 6)).reshape(2, -1)
    design = np.column_stack([arms == a for a in range(4)] + [seeds == s for s in range(1, 6)]).astype(float)
    beta, rest, *_ = np.linalg.lstsq(design, values_AS.ravel(), rcond=None)
    error = np.sqrt(rest[0] / 15 * (np.linalg.inv(design.T @ design) @ [-1, 0, 0, 1, *5 * [0]])[[3, 0]] @ [1, -1])
    found, p = stats.pooled(values_AS, [(3, 0)], 0.95)
    assert found.estimate[0] == pytest.approx(beta[3] - beta[0])
    assert found.high[0] - found.low[0] == pytest.approx(2 * error * scipy_stats.t.isf(0.025, 15))
    assert p[0] == pytest.approx(2 * scipy_stats.t.sf(found.estimate[0] / error, 15), rel=1e-6)


def test_the_block_model_of_two_arms_is_the_paired_t_test():
    found = stats.compare(column(2, 7), [(1, 0)], 0.05)
    assert found.pooled_adjusted_P == pytest.approx(found.p_P, rel=1e-9)
    assert found.pooled_P.low == pytest.approx(found.difference_P.low)


def test_a_failed_run_costs_its_arm_and_no_other():
    values_AS = column()
    values_AS[3, 4] = np.nan
    found = stats.compare(values_AS, stats.against(5, 0), 0.05)
    without = stats.compare(np.delete(values_AS, 3, 0), [(1, 0), (2, 0), (3, 0)], 0.05)
    assert np.isnan(found.p_P).tolist() == [False, False, True, False] and found.verdicts()[2] == FAILED
    kept = [0, 1, 3]
    np.testing.assert_allclose(found.pooled_P.low[kept], without.pooled_P.low)
    assert (found.adjusted_P[kept] >= without.adjusted_P).all(), "the family stays as declared"
    values_AS[0, 0] = np.inf
    assert set(stats.compare(values_AS, stats.against(5, 0), 0.05).verdicts()) == {FAILED}


def test_verdicts():
    found = stats.compare(column(3, 10, seed=1) * [[1], [1], [1]], [(1, 0), (2, 0)], 0.05)
    equal = stats.compare(column(1, 10).repeat(3, 0) + RNG(0).normal(0, 1, (3, 10)), [(1, 0), (2, 0)], 0.05)
    assert found.verdicts()[1] == DIFFERS and equal.verdicts() == [OPEN, OPEN]
    assert stats.compare(column(14, 9), stats.against(14, 0), 0.05).verdicts() == [FEW] * 13
    assert DIFFERS in stats.compare(column(14, 10), stats.against(14, 0), 0.05).verdicts()
    assert stats.compare(column(2, 1), [(0, 1)], 0.05).verdicts() == [FEW]


def test_significant_is_what_holm_leaves_where_there_are_enough_seeds():
    values_NAS = RNG(0).normal(0, 1, (200, 7, 8))
    values_NAS[::2, 1] += 2
    found, few = (stats.compare(values_NAS[..., :n], stats.against(7, 0), 0.05) for n in (8, 7))
    assert (found.significant_P == (found.adjusted_P <= 0.05)).all() and found.significant_P.any()
    assert (found.p_P <= 0.05).sum() > found.significant_P.sum(), "Holm was needed"
    assert (few.adjusted_P <= 0.05).any() and not few.significant_P.any()


def test_many_tables_at_once_are_each_table_alone():
    values_NAS = RNG(0).normal(0, 1, (4, 5, 8))
    values_NAS[2, 1, 3] = np.nan
    found = stats.compare(values_NAS, stats.against(5, 0), 0.05)
    for n in range(4):
        alone = stats.compare(values_NAS[n], stats.against(5, 0), 0.05)
        for name in ("p_P", "adjusted_P", "flip_adjusted_P", "pooled_adjusted_P", "significant_P"):
            np.testing.assert_allclose(getattr(found, name)[n], getattr(alone, name), rtol=1e-12)


@pytest.mark.parametrize("pairs", [[], [(0, 0)], [(0, 5)], [(-1, 0)], [(0, 1), (1, 0)]])
def test_a_family_that_is_none_is_refused(pairs):
    with pytest.raises(Refusal, match="pair"):
        stats.compare(column(), pairs, 0.05)


def test_values_and_levels_that_are_none_are_refused():
    with pytest.raises(Refusal, match="arms x seeds"):
        stats.compare(np.ones(3), [(0, 1)], 0.05)
    with pytest.raises(Refusal, match="alpha must lie between 0 and 1, not 5"):
        stats.compare(column(), [(0, 1)], 5)


def test_groups_follow_the_means_and_need_enough_seeds():
    values_AS = column(4, 12) + np.array([[0], [-0.9], [20], [19.1]])
    assert stats.groups(values_AS, 0.05) == (["b", "b", "a", "a"], "")
    values_AS[2, 0] = np.nan
    assert stats.groups(values_AS, 0.05)[0][2] == ""
    assert stats.groups(column(14, 10), 0.05) == ([""] * 14, FEW)
    assert stats.groups(column(1, 3), 0.05) == (["a"], "")


# Rules --------------------------------------------------------------------------------------------------------------


def test_failed_runs_are_counted_and_named():
    counts = stats.failures(np.array([[1, 2, 3], [np.nan, 1, np.inf]]))
    assert [stats.failed_text(int(k), 3) for k in counts] == ["", "2 of 3 failed"]


def test_the_majority_class_is_a_floor():
    rate, error = stats.majority(np.array(["yes"] * 60 + ["no"] * 40))
    assert rate == 0.6 and error == pytest.approx((0.24 / 100) ** 0.5)
    assert stats.majority([2, 2, 2]) == (1, 0)
    with pytest.raises(Refusal, match="no items"):
        stats.majority([])


def test_a_task_is_at_its_floor_within_three_standard_errors():
    """Seeds .70 and .72: their standard error .01, with .01 of the items in all sqrt 2 %."""
    seeds = np.array([0.70, 0.72])
    assert not stats.at_floor(seeds, 0.71 - 3.01 * 2**0.5 * 0.01, 0.01)
    assert stats.at_floor(seeds, 0.71 - 2.99 * 2**0.5 * 0.01, 0.01)
    assert stats.at_floor(seeds, 0.9, 0.01), "below is no better"
    assert stats.at_floor(np.array([0.7]), 0.68, 0.01) and not stats.at_floor(np.array([0.7]), 0.66, 0.01)
    assert stats.at_floor(np.array([[0.9, np.nan], [0.9, 0.9]]), 0.5, 0.01).tolist() == [True, False]


# Calibration --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["letter_alarms", "null_arm", "powers", "others"])
def test_simulated_tables_agree_with_theory(part):
    rows = getattr(calibration, part)(200)
    assert rows and not [row for row in rows if not row.holds]


def test_equal_arms_are_told_apart_in_no_more_than_five_percent_of_tables():
    rows = calibration.false_alarms(400, ["normal"])
    assert len(rows) == 12 and not [row for row in rows if not row.holds]


def test_intervals_cover_what_they_say():
    rows = {row.what: row for row in calibration.coverages(1000, 300)}
    assert all(row.holds for row in rows.values())
    for seeds in (3, 5, 10):
        assert 0.93 <= rows[f"{seeds} seeds: t"].measured <= 0.97
    for n, low, high in ((3, 0.68, 0.79), (5, 0.78, 0.86), (10, 0.86, 0.93)):
        for kind in ("percentile", "BCa"):
            assert low <= rows[f"{n} seeds: {kind}"].measured <= high, "the label would be wrong"


def test_the_simulation_would_notice_a_test_without_holm():
    values_NAS = calibration.simulated(RNG(0), 400, calibration.ARMS, 10, "normal")
    found = stats.compare(values_NAS, stats.against(calibration.ARMS, 0), 0.05)
    assert not calibration.rate("no adjustment", (found.p_P <= 0.05).any(-1), 0, 0.05).holds


def test_the_committed_calibration_is_that_of_this_code():
    text = (calibration.HOME / "table.md").read_text()
    assert "| NO" not in text
    lines = calibration.markdown({"A/A": calibration.null_arm(200)}, "").splitlines()[-3:]
    for line in lines:
        cells = [cell.strip() for cell in line.split("|")]
        assert any([c.strip() for c in other.split("|")] == cells for other in text.splitlines()), line
