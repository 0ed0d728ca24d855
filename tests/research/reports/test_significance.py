"""Tests on paired differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from research.reports.significance import effect_interval, hedges_factor, holm, paired, smallest_wilcoxon


@pytest.mark.parametrize("n", [2, 3, 5, 12])
def test_p_values_equal_scipys(n: int) -> None:
    rng = np.random.default_rng(n)
    first, second = rng.normal(0.05, 0.1, n), rng.normal(0, 0.1, n)
    found = paired(list(first - second))
    expected = stats.ttest_rel(first, second)
    assert found.p_t == pytest.approx(expected.pvalue, rel=1e-9)
    assert found.interval == pytest.approx(tuple(expected.confidence_interval()), rel=1e-9)
    assert found.p_wilcoxon == pytest.approx(stats.wilcoxon(first, second).pvalue)


def test_effect_size_is_the_bias_free_one() -> None:
    # mean 2, standard deviation 1; for 2 degrees of freedom the factor is 1 / sqrt(pi)
    assert paired([1.0, 2.0, 3.0]).effect_size == pytest.approx(2 / math.sqrt(math.pi))
    assert hedges_factor(10) == pytest.approx(1 - 3 / (4 * 10 - 1), abs=1e-3)  # Hedges' own approximation


@pytest.mark.parametrize(("t", "n"), [(0.0, 5), (2.0, 3), (-3.0, 8), (40.0, 5)])
def test_interval_of_effect_inverts_the_noncentral_t(t: float, n: int) -> None:
    low, high = (end * math.sqrt(n) for end in effect_interval(t, n))
    assert stats.nct.cdf(t, n - 1, low) == pytest.approx(0.975, abs=1e-4)
    assert stats.nct.cdf(t, n - 1, high) == pytest.approx(0.025, abs=1e-4)


def test_interval_of_effect_stands_huge_effects() -> None:
    low, high = effect_interval(1e9, 3)
    assert 0 < low < 1e9 / math.sqrt(3) < high < math.inf


def test_one_unit_is_not_tested() -> None:
    found = paired([0.3])
    assert (found.mean, found.p_t, found.p_wilcoxon, found.interval, found.effect_size) == (0.3, None, None, None, None)


def test_repetitions_of_one_experiment_are_not_tested() -> None:
    assert paired([0.1, 0.1, 0.1]).p_t is None


def test_differences_of_rounding_are_none() -> None:
    found = paired([1e-6, 2e-6, 1.5e-6])
    assert (found.mean, found.interval, found.p_t, found.p_wilcoxon) == (0.0, (0.0, 0.0), None, None)


def test_holm_corrects_as_in_the_textbook() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize("n", [1, 3, 5, 8])
def test_smallest_wilcoxon_is_that_of_equal_signs(n: int) -> None:
    assert smallest_wilcoxon(n) == stats.wilcoxon([1.0 + i / 10 for i in range(n)]).pvalue
