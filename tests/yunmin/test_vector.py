"""Functions of vectors against numpy in higher precision, and what they do at the edges."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from yunmin.kernels.comparisons import any_between, take_above, take_from, to_double
from yunmin.kernels.jit import jit
from yunmin.kernels.vector import LANES, exp2, larger, largest, load, sigmoid, silu, softplus, store, total

DTYPES = [np.float32, np.float64]
EXP2, SIGMOID, SILU, SOFTPLUS = range(4)


@jit
def _apply(which: int, x: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    for i in range(0, x.size, LANES):
        value = load(x, i)
        if which == EXP2:
            value = exp2(value)
        elif which == SIGMOID:
            value = sigmoid(value)
        elif which == SILU:
            value = silu(value)
        else:
            value = softplus(value)
        store(out, i, value)


@jit
def _reduce(x: NDArray[np.float32], y: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    out[0] = total(load(x, 0))
    out[1] = largest(load(x, 0))
    store(out, LANES, larger(load(x, 0), load(y, 0)))


def apply(which: int, x: NDArray[np.floating]) -> NDArray[np.floating]:
    padded = np.zeros(-(-x.size // LANES) * LANES, x.dtype)
    padded[: x.size] = x
    out = np.empty_like(padded)
    _apply(which, padded, out)
    return out[: x.size]


EXACT: dict[int, Callable[[Any], Any]] = {
    EXP2: np.exp2,
    SIGMOID: lambda x: 1 / (1 + np.exp(-x)),
    SILU: lambda x: x / (1 + np.exp(-x)),
    SOFTPLUS: lambda x: np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x))),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", EXACT)
def test_functions_equal_numpy_in_long_double(which: int, dtype: type[np.floating]) -> None:
    x = np.linspace(-80, 80, 40001).astype(dtype)
    expected = EXACT[which](x.astype(np.longdouble))
    # relative to the result; where exp(x) is tiny, x itself was rounded relative to 80
    limit = 40 * np.finfo(dtype).eps
    assert float(np.abs(apply(which, x) / np.where(expected == 0, 1, expected) - (expected != 0)).max()) < limit


@pytest.mark.parametrize("dtype", DTYPES)
def test_powers_of_two_are_exact_and_the_ends_are_zero_and_infinity(dtype: type[np.floating]) -> None:
    lowest = np.finfo(dtype).minexp
    whole = np.arange(lowest, -lowest + 1).astype(dtype)
    assert (apply(EXP2, whole) == np.exp2(whole)).all()
    ends = apply(EXP2, np.array([-np.inf, -1e30, lowest - 2, 2 - lowest, 1e30, np.inf], dtype))
    assert ends.tolist() == [0, 0, 0, np.inf, np.inf, np.inf]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", EXACT)
def test_nan_stays_nan(which: int, dtype: type[np.floating]) -> None:
    bits = {np.float32: np.uint32, np.float64: np.uint64}[dtype]
    payload = (np.array([np.nan], dtype).view(bits) + bits(12345)).view(dtype)  # a NaN with digits in its low bits
    assert np.isnan(apply(which, np.concatenate([np.array([np.nan, -np.nan], dtype), payload]))).all()


def test_infinity_passes_through_softplus_and_silu_as_in_torch() -> None:
    ends = np.array([np.inf, -np.inf], np.float32)
    assert apply(SOFTPLUS, ends).tolist() == [np.inf, 0]
    silu_ends = apply(SILU, ends)
    assert silu_ends[0] == np.inf
    assert np.isnan(silu_ends[1])  # -inf * 0, as in torch


@pytest.mark.parametrize("dtype", DTYPES)
def test_reductions_take_every_lane(dtype: type[np.floating]) -> None:
    rng = np.random.default_rng(0)
    x, y = (rng.permutation(LANES).astype(dtype) - 3 for _ in range(2))
    out = np.zeros(2 * LANES, dtype)
    _reduce(x, y, out)
    assert out[0] == x.sum()
    assert out[1] == x.max()
    assert (out[LANES:] == np.maximum(x, y)).all()


@jit
def _compare(x: NDArray[np.float32], values: NDArray[np.float64], bound: float, out: NDArray[np.float64]) -> bool:
    store(out, 0, take_above(load(values, 0), bound, load(x, 0)))
    store(out, LANES, take_from(load(values, 0), bound, load(x, 0)))
    store(out, 2 * LANES, to_double(load(x, 0)))
    return any_between(load(x, 0), bound, bound + 1.0)


def test_comparisons_take_lanes_by_another_vector_and_never_where_it_is_nan() -> None:
    x = np.arange(LANES, dtype=np.float32)
    x[3] = np.nan
    values, out = np.arange(1.0, LANES + 1), np.empty(3 * LANES)
    assert _compare(x, values, 7.0, out)
    np.testing.assert_array_equal(out[:LANES], np.where(x > 7, values, 0))
    np.testing.assert_array_equal(out[LANES : 2 * LANES], np.where(x >= 7, values, 0))
    np.testing.assert_array_equal(out[2 * LANES :], x.astype(np.float64))
    assert not _compare(x, values, 2.5 - 1e-9, out)  # 2.5 to 3.5, where the only lane is NaN
    assert _compare(x, values, 3.5, out)
    assert not _compare(x, values, LANES - 1.0, out)
