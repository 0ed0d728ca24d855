"""pass@k against its formula and against counting."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from research.metrics.pass_at_k import pass_at_k, score_passes
from yunmin.errors import DataError


@pytest.mark.parametrize("samples", range(1, 8))
def test_equals_the_share_of_subsets_with_a_passing_program(samples: int) -> None:
    for passed in range(samples + 1):
        programs = [i < passed for i in range(samples)]
        for k in range(1, samples + 1):
            subsets = list(itertools.combinations(programs, k))
            assert pass_at_k(samples, passed, k) == sum(map(any, subsets)) / len(subsets)


@given(st.integers(1, 2000), st.data())
def test_equals_the_closed_formula_in_exact_numbers(samples: int, data: st.DataObject) -> None:
    passed = data.draw(st.integers(0, samples))
    k = data.draw(st.integers(1, samples))
    exact = 1 - Fraction(math.comb(samples - passed, k), math.comb(samples, k))
    assert pass_at_k(samples, passed, k) == float(exact)


@given(st.integers(1, 300), st.data())
def test_equals_the_product_of_the_paper(samples: int, data: st.DataObject) -> None:
    passed = data.draw(st.integers(0, samples))
    k = data.draw(st.integers(1, samples))
    failed = samples - passed
    paper = 1.0 if failed < k else 1.0 - float(np.prod(1.0 - k / np.arange(failed + 1, samples + 1)))
    assert pass_at_k(samples, passed, k) == pytest.approx(paper, abs=1e-12)


def test_stays_exact_where_products_of_floats_end() -> None:
    assert pass_at_k(100_000, 1, 10) == 1e-4
    assert pass_at_k(10_000, 5_000, 5_000) == 1.0
    assert 0 < pass_at_k(10**9, 1, 1) < 1e-8


@pytest.mark.parametrize(("samples", "passed", "k"), [(0, 0, 1), (5, 6, 1), (5, -1, 1), (5, 1, 6), (5, 1, 0)])
def test_impossible_numbers_are_refused(samples: int, passed: int, k: int) -> None:
    with pytest.raises(DataError, match="impossible"):
        pass_at_k(samples, passed, k)


def test_means_are_over_problems_and_so_are_intervals() -> None:
    passes = [[True, False], [False, False], [True, True], [False, True]]
    result = score_passes(passes, [1, 2])
    assert result["pass@1"] == (0.5 + 0 + 1 + 0.5) / 4
    assert result["pass@2"] == 3 / 4
    assert result["problems"] == result["intervals"]["units"] == 4
    low, high = result["intervals"]["pass@2"]
    assert 0 <= low < 3 / 4 < high <= 1


def test_no_problems_have_no_score() -> None:
    with pytest.raises(DataError):
        score_passes([], [1])
