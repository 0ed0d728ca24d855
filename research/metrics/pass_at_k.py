"""pass@k: how often at least one of k programs passes its tests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from research.metrics.bootstrap import CONFIDENCE, bootstrap_interval
from yunmin.errors import DataError


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Share of all k-subsets of the samples with a passing one: the unbiased estimator of Chen et al. 2021, eq. 1.

    `1 - comb(samples - passed, k) / comb(samples, k)` in whole numbers, so that it is exact but for one rounding.

    Args:
        samples: programs written for one problem.
        passed: how many of them pass.
        k: programs that one may try; at most `samples`.

    Raises:
        DataError: impossible numbers.
    """
    if not 0 <= passed <= samples or not 1 <= k <= samples:
        raise DataError(f"pass@{k}: impossible with {passed} passing programs of {samples}")
    all_subsets = math.comb(samples, k)
    return (all_subsets - math.comb(samples - passed, k)) / all_subsets


def score_passes(passes: Sequence[Sequence[bool]], ks: Sequence[int]) -> dict[str, Any]:
    """Mean pass@k over problems, with bootstrap intervals over the problems.

    Args:
        passes: for each problem, whether each of its samples passes; at least as many samples as the largest k.
        ks: to estimate.

    Returns:
        `pass@k` for each k, the number of `problems`, and `intervals`.

    Raises:
        DataError: no problems, or fewer samples than k.
    """
    figures: dict[str, Any] = {}
    intervals: dict[str, Any] = {"confidence": CONFIDENCE, "resampled": "problems", "units": len(passes)}
    for k in ks:
        name = f"pass@{k}"
        estimates = [pass_at_k(len(samples), sum(samples), k) for samples in passes]
        intervals[name] = list(bootstrap_interval(estimates))  # it refuses an empty list
        figures[name] = math.fsum(estimates) / len(estimates)
    return {**figures, "problems": len(passes), "intervals": intervals}
