"""Tests on paired differences of few seeds: t-test, Wilcoxon's test, effect size, and Holm's correction."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from yunmin.errors import MissingExtraError

LEVEL = 0.05
ROUNDING = 1e-5  # of log-perplexities: the order of float32 sums moves them by less, so it is no difference
_QUANTILES = 2000  # enough for four digits


@dataclass(frozen=True)
class Paired:
    """What differences, one per independent unit, say about their mean.

    Attributes:
        n: number of units.
        mean: of the differences.
        interval: of the mean, 95 %, from Student's t; None for one unit, or where all units agree to the last bit.
        effect_size: Hedges' g_z, which is Cohen's d_z (mean over standard deviation of the differences) times the
            exact factor that removes its bias (Hedges 1981); None below 3 units.
        effect_interval: 95 % of d_z in the population, by inverting the noncentral t distribution.
        p_t: two-sided, of the paired t-test; None where there is no interval.
        p_wilcoxon: two-sided, of Wilcoxon's signed-rank test.
    """

    n: int
    mean: float
    interval: tuple[float, float] | None = None
    effect_size: float | None = None
    effect_interval: tuple[float, float] | None = None
    p_t: float | None = None
    p_wilcoxon: float | None = None

    @property
    def change(self) -> float:
        """Of a quantity whose logarithms differ, as a share of it: exp(mean) - 1."""
        return math.expm1(self.mean)

    @property
    def change_interval(self) -> tuple[float, float] | None:
        """95 % of that change."""
        if self.interval is None:
            return None
        low, high = self.interval
        return math.expm1(low), math.expm1(high)


def paired(differences: Sequence[float], rounding: float = ROUNDING) -> Paired:
    """Tests whether the mean of paired differences is 0.

    Args:
        differences: one per independent unit; at least one.
        rounding: what is at most this far from 0 is 0.

    Returns:
        One unit is not tested. Nor are differences that are all 0, which leave nothing to test: two ways to compute
        the same. Nor are units that all differ by the same amount: they repeat one experiment, and are no independent
        evidence.

    Raises:
        MissingExtraError: scipy is not installed.
    """
    try:
        from scipy import stats
    except ModuleNotFoundError:
        raise MissingExtraError("scipy", "research", "testing differences") from None
    values = [0.0 if abs(difference) <= rounding else float(difference) for difference in differences]
    n, mean = len(values), statistics.fmean(values)
    if n == 1:
        return Paired(n, mean)
    if not any(values):
        return Paired(n, 0.0, (0.0, 0.0))
    deviation = statistics.stdev(values)
    if deviation <= 1e-9 * abs(mean):
        return Paired(n, mean)
    error = deviation / math.sqrt(n)
    t, half = mean / error, float(stats.t.ppf(1 - LEVEL / 2, n - 1)) * error
    return Paired(
        n=n,
        mean=mean,
        interval=(mean - half, mean + half),
        effect_size=hedges_factor(n - 1) * mean / deviation if n > 2 else None,
        effect_interval=effect_interval(t, n),
        p_t=float(2 * stats.t.sf(abs(t), n - 1)),
        p_wilcoxon=float(stats.wilcoxon([value for value in values if value]).pvalue),
    )


def hedges_factor(degrees: int) -> float:
    """The factor that makes a standardized mean unbiased: gamma(m/2) / (sqrt(m/2) gamma((m-1)/2)) (Hedges 1981)."""
    return math.exp(math.lgamma(degrees / 2) - math.lgamma((degrees - 1) / 2)) / math.sqrt(degrees / 2)


def effect_interval(t: float, n: int) -> tuple[float, float]:
    """95 % interval of the standardized mean of n differences whose t statistic is `t`.

    The ends are those noncentralities of the t distribution under which `t` lies at its 97.5 and 2.5 % points, over
    the square root of n (Steiger & Fouladi 1997).
    """
    if t < 0:
        low, high = effect_interval(-t, n)
        return -high, -low
    low, high = (_noncentrality(t, n - 1, share) / math.sqrt(n) for share in (1 - LEVEL / 2, LEVEL / 2))
    return low, high


def _noncentrality(t: float, degrees: int, share: float) -> float:
    """The noncentrality under which a share of the t distribution lies below t >= 0.

    scipy's own noncentral t is not a number in its tails, so the normal distribution is averaged over quantiles of the
    other part, chi over the root of its degrees of freedom.
    """
    from scipy import optimize, special

    scales = _chi_quantiles(degrees)

    def above(c: float) -> float:
        return float(special.ndtr(t * scales - c).mean()) - share

    return float(optimize.brentq(above, -10.0, 10.0 + t * float(scales[-1])))


@lru_cache(maxsize=8)
def _chi_quantiles(degrees: int) -> NDArray[np.float64]:
    from scipy import stats

    quantiles: NDArray[np.float64] = stats.chi2.ppf((np.arange(_QUANTILES) + 0.5) / _QUANTILES, degrees)
    return np.sqrt(quantiles / degrees)


def holm(p_values: Sequence[float]) -> list[float]:
    """Corrects p-values for their number, in their order (Holm 1979): valid however the tests depend on each other."""
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def smallest_wilcoxon(n: int) -> float:
    """The smallest two-sided p-value that Wilcoxon's signed-rank test can give for n units without ties."""
    return min(1.0, 2 * 0.5**n)
