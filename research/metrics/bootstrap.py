"""Confidence intervals by the bootstrap: how far a mean would move had other examples been drawn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from yunmin.errors import DataError

Interval = tuple[float, float]

_AT_ONCE = 1 << 22  # drawn indices kept in memory
CONFIDENCE = 0.95
SAMPLES = 10_000


def bootstrap_interval(
    values: ArrayLike, *, confidence: float = CONFIDENCE, samples: int = SAMPLES, seed: int = 0
) -> Interval:
    """Interval of the mean of independent examples, by the percentile method (Efron & Tibshirani 1993, ch. 13).

    Args:
        values: one number an example, (n,).
        confidence: share of resampled means inside.
        samples: how often n examples are drawn again, with replacement.
        seed: of the draws; the same seed draws the same examples whatever their values.

    Returns:
        The lower and the upper end; both the value itself where there is one example only.

    Raises:
        DataError: no values, one that is not finite, or an impossible confidence.
    """
    column = _columns([values])
    return _percentiles(_resampled(column, samples, seed)[:, 0] / column.shape[1], confidence)


def ratio_interval(
    numerators: ArrayLike,
    denominators: ArrayLike,
    *,
    confidence: float = CONFIDENCE,
    samples: int = SAMPLES,
    seed: int = 0,
) -> Interval:
    """Interval of sum(numerators) / sum(denominators), where both belong to one example and are drawn together.

    Args:
        numerators: (n,), for instance the negative log-likelihood of each document.
        denominators: (n,), for instance its tokens; above 0.
        confidence, samples, seed: as of `bootstrap_interval`.

    Raises:
        DataError: as there, or unequal lengths, or a denominator that is not above 0.
    """
    columns = _columns([numerators, denominators])
    if not bool((columns[1] > 0).all()):
        raise DataError("bootstrap: expected denominators above 0")
    sums = _resampled(columns, samples, seed)
    return _percentiles(sums[:, 0] / sums[:, 1], confidence)


def _columns(given: Sequence[ArrayLike]) -> NDArray[np.float64]:
    """The values as one array (k, n)."""
    arrays = [np.asarray(values, dtype=np.float64) for values in given]
    if any(array.ndim != 1 or array.shape != arrays[0].shape for array in arrays) or not arrays[0].size:
        shapes = ", ".join(str(array.shape) for array in arrays)
        raise DataError(f"bootstrap: expected lists of equal length of at least one value, found shapes {shapes}")
    columns = np.stack(arrays)
    if not bool(np.isfinite(columns).all()):
        raise DataError("bootstrap: expected finite values, found infinity or NaN")
    return columns


def _resampled(columns: NDArray[np.float64], samples: int, seed: int) -> NDArray[np.float64]:
    """Sums (samples, k) of the columns (k, n), each over n examples drawn with replacement."""
    if samples < 1:
        raise DataError(f"bootstrap: expected at least 1 sample, got {samples}")
    rng = np.random.default_rng(seed)
    n = columns.shape[1]
    rows = max(1, _AT_ONCE // n)
    sums = []
    for begin in range(0, samples, rows):
        drawn = rng.integers(n, size=(min(rows, samples - begin), n))
        sums.append(columns[:, drawn].sum(axis=2).T)
    return np.concatenate(sums)


def _percentiles(statistics: NDArray[np.float64], confidence: float) -> Interval:
    if not 0 < confidence < 1:
        raise DataError(f"bootstrap: the confidence must lie between 0 and 1, got {confidence}")
    low, high = np.quantile(statistics, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
