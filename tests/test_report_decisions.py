"""Where a report decides: which way a column points, which p and which level count, what may be claimed. Fabricated
records."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from bench.report import analysis, stats
from bench.report.stats_suite import kendall
from bench.report.stats_tests import can_test, equivalence, holm, t_interval, t_test
from bench.sweep import Column
from tests.test_report import ATTENTION, DENSE, LOW, LOW_SAM, a_sweep, text_of, with_record
from tests.test_report_statistics import a_table, noisy_rows

ACCURACY, LOSS = Column("quick", "accuracy"), Column("quick", "loss")
TWIN = {**LOW_SAM, "salt": 1}


def analysed(rows: list, **changes) -> analysis.Analysis:
    return analysis.analyse(a_table(rows, **changes), {})


@pytest.mark.parametrize("metric", ["loss", "loss_far", "loss_at_64", "ema_loss", "validation_loss"])
def test_losses_are_better_if_lower_and_scores_if_higher(metric):
    assert analysis.lower_is_better(metric)
    assert not any(map(analysis.lower_is_better, ("accuracy", "top1", "spearman", "accuracy_at_64", "lossless")))


def test_the_lowest_loss_has_the_first_letter_and_rank():
    """Attention's loss is the lowest; the other three are equal."""
    found = analysed(noisy_rows({3: 0.55}, seeds=10), columns=(ACCURACY, LOSS))
    for measured in found.measured:
        assert measured.letters == ["b", "b", "b", "a"]
        assert measured.rank_A.estimate[3] == 1 and (measured.rank_A.estimate[:3] > 1.5).all()


def test_over_all_tasks_the_first_column_of_each_protocol_counts():
    """Here the loss, the second, puts the arms in the opposite order."""
    rows = noisy_rows({3: 0.6, 2: 0.55}, 4) + noisy_rows({3: 0.6, 2: 0.55}, 4, label="rough", changes={"task.patch": 4})
    rows = [with_record(r, metrics={k: r.record.metrics["accuracy"] for k in ("accuracy", "loss")}) for r in rows]
    columns = tuple(Column(label, metric) for label in ("quick", "rough") for metric in ("accuracy", "loss"))
    overall = analysed(rows, columns=columns).overall
    assert overall.tasks == 2 and overall.rank_A.estimate.argmin() == 3 and overall.iqm_A.estimate.argmax() == 3


# Levels and adjustments ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.01])
def test_intervals_have_the_declared_level(alpha):
    family = replace(a_sweep().family, alpha=alpha)
    found = analysed(noisy_rows({3: 0.55}, seeds=10), family=family)
    measured, result = found.measured[0], found.result("reference", ACCURACY)
    assert np.array_equal(measured.interval_A, t_interval(measured.values_AS, 1 - alpha))
    differences_PS = stats.differences(measured.values_AS, result.found.pairs)
    assert np.array_equal(result.found.difference_P, t_interval(differences_PS, 1 - alpha))
    same = result.equivalence  # by two one-sided tests
    assert np.allclose([same.low, same.high], t_interval(differences_PS, 1 - 2 * alpha)[1:])


def test_equivalence_is_claimed_by_p_that_are_adjusted_for_the_family():
    """One pair of three is within the margin by itself, and not as one of three."""
    rows = noisy_rows({}, seeds=10, noise=0.01)
    differences_PS = stats.differences(analysed(rows).measured[0].values_AS, [(1, 0), (2, 0), (3, 0)])
    margin = next(m for m in np.linspace(0.001, 0.05, 500) if equivalence(differences_PS, m, 0.05).p.min() < 0.03)
    raw = equivalence(differences_PS, margin, 0.05)
    same = analysed(rows, family=replace(a_sweep().family, margin=margin)).result("reference", ACCURACY).equivalence
    assert raw.equivalent.any() and np.array_equal(same.p, holm(raw.p))
    assert not same.equivalent.any()


def test_with_too_few_seeds_nothing_is_called_equivalent():
    table = a_table(noisy_rows({}, seeds=5, noise=1e-4))
    result = analysis.analyse(table, {}).result("reference", ACCURACY)
    assert (result.equivalence.p < 1e-3).all() and not result.equivalence.equivalent.any()
    assert "within ±" not in text_of(table, [])


def test_the_primary_column_is_marked_by_holm_and_others_by_benjamini_hochberg():
    result = analysed(noisy_rows({}, seeds=10)).result("reference", ACCURACY)
    found = replace(result.found, adjusted_P=np.array([0.03, 0.06, 0.06]))
    result = replace(result, found=found, explored_P=np.array([0.03, 0.04, 0.04]))
    assert result.marks() == ["*", "", ""] and replace(result, primary=False).marks() == ["°"] * 3
    assert replace(result, found=replace(found, tested=False)).marks() == [""] * 3


# A/A arms -----------------------------------------------------------------------------------------------------------


def test_a_a_arms_count_as_tested_if_the_seeds_do_for_all_columns():
    """Six seeds reach 0.03 with all signs alike, enough for one column and too little for two."""
    rows = noisy_rows({4: 0.9}, seeds=6, arms=(DENSE, LOW, LOW_SAM, ATTENTION, TWIN))
    one, two = analysed(rows), analysed(rows, columns=(ACCURACY, LOSS))
    assert one.a_a_tested and one.flagged() == [(4, ACCURACY)]
    assert not two.a_a_tested and two.flagged() == []


def test_the_reference_is_the_plain_arm_though_its_twin_stands_before_it():
    family = replace(a_sweep().family, reference=LOW_SAM)
    table = a_table(noisy_rows({}, seeds=3, arms=(TWIN, LOW_SAM, DENSE)), family=family)
    assert [bool(arm.mixer.get("salt")) for arm in table.arms] == [True, False, False]
    assert analysis.reference_of(table) == 1


# Numbers ------------------------------------------------------------------------------------------------------------


def test_a_small_spread_is_a_spread_and_a_small_difference_a_difference():
    differences_S = 1 + 1e-4 * np.random.default_rng(0).normal(size=10)
    assert t_test(differences_S) == pytest.approx(ttest_1samp(differences_S, 0).pvalue, rel=1e-9)
    gap = stats.differences(np.array([[1.0000001, 2.0], [1.0, 2.0]]), [(0, 1)])
    assert gap[0] == pytest.approx([1e-7, 0.0])


def test_seeds_that_reach_alpha_exactly_are_enough():
    assert can_test(5, 1, 0.0625) and not can_test(5, 1, 0.0624) and not can_test(5, 2, 0.0625)


def test_five_arms_have_an_interval_of_agreement():
    found = kendall(np.arange(5.0), np.array([0.0, 1, 2, 4, 3]), 0.95)
    assert found.tau == pytest.approx(0.8) and -1 < found.low < found.tau < found.high < 1
