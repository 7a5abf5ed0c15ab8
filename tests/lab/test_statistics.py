"""Mean, spread and p of few seeds, and what is said where none can be."""

import math

import numpy as np
import pytest
from scipy import stats

from schatten.lab.statistics import compared, mean, p_value, spread, summary

A, B = (1.0, 1.2, 0.9, 1.1), (1.3, 1.35, 1.2, 1.5)


def test_mean_and_spread_are_those_of_a_sample():
    assert mean(A) == pytest.approx(np.mean(A)) and spread(A) == pytest.approx(np.std(A, ddof=1))
    assert math.isnan(spread((1.0,))) and math.isnan(spread((1.0, math.inf)))


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ((1.23456, 1.23466), "1.235 +- 7.1e-05 (n = 2)"),
        ((2.0,), "2 (n = 1)"),
        ((1.0, math.inf, 3.0), "2 +- 1.4 (n = 3, 1 diverged)"),
        ((1.0, math.nan), "1 (n = 2, 1 diverged)"),
        ((math.inf, math.nan), "inf (n = 2, all diverged)"),
    ],
)
def test_a_summary_counts_what_diverged(values, text):
    assert summary(values) == text


def test_p_values_are_welchs_and_the_paired_ones():
    assert p_value(A, B) == pytest.approx(stats.ttest_ind(A, B, equal_var=False).pvalue, rel=1e-12)
    assert p_value(A, B[:3]) == pytest.approx(stats.ttest_ind(A, B[:3], equal_var=False).pvalue, rel=1e-12)
    assert p_value(A, B, paired=True) == pytest.approx(stats.ttest_rel(A, B).pvalue, rel=1e-12)
    assert p_value(A, B, paired=True) == p_value(B, A, paired=True)


@pytest.mark.parametrize(
    ("ours", "others"), [((1.0,), (2.0, 3.0)), ((1.0, math.inf), (2.0, 3.0)), ((1.0, 2.0), (math.nan, 3.0)), ((), ())]
)
@pytest.mark.parametrize("paired", [False, True])
def test_nothing_is_claimed_of_one_value_or_of_diverged_ones(ours, others, paired):
    assert math.isnan(p_value(ours, others, paired=paired))
    assert compared(ours, others, paired=paired) == f"n = {min(len(ours), len(others))}, no p-value"


@pytest.mark.parametrize("paired", [False, True])
def test_values_that_do_not_vary_differ_surely_or_not_at_all(paired):
    assert p_value((1.0, 1.0), (1.0, 1.0), paired=paired) == 1
    assert p_value((1.0, 1.0), (2.0, 2.0), paired=paired) == 0


def test_values_that_vary_by_rounding_alone_give_a_number_without_a_warning():
    ours, others = (0.1, 0.2, 0.3), (0.2, 0.2 + 0.1, 0.4)
    assert 0 <= p_value(ours, others, paired=True) < 1e-6
    assert 0 <= p_value((1.0, 1.0 + 1e-16), (2.0, 2.0 + 4e-16)) < 1e-6


def test_pairs_need_equal_numbers_of_seeds():
    with pytest.raises(ValueError):
        p_value((1.0, 2.0), (1.0, 2.0, 3.0), paired=True)


def test_a_claim_carries_n_and_p():
    assert compared(A, B) == f"n = 4, p = {p_value(A, B, paired=True):.2g}"
