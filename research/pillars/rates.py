"""Learning rates: each method has the one that is best for it by the tuning text, with the first seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from research.studies.experiments import Experiment, Laboratory
from yunmin.errors import TrainingError

_FACTOR = 3.0  # between rates that are tried beyond the first ones
_MOST = 7


def sweep(
    ways: Iterable[str],
    seeds: Sequence[int],
    search: Callable[[str], tuple[list[Experiment], float | None]],
    experiment: Callable[[str, float, int], Experiment],
) -> list[Experiment]:
    """Rates of every way with the first seed; the other seeds at the best one, once it is known.

    Args:
        ways: that are compared.
        seeds: of all of them.
        search: `search_rate` for a way.
        experiment: of a way, a rate and a seed.
    """
    wanted = []
    for way in ways:
        tried, best = search(way)
        wanted += tried
        if best is not None:
            wanted += [experiment(way, best, seed) for seed in seeds[1:]]
    return wanted


def search_rate(
    rates: Sequence[float], experiment_at: Callable[[float], Experiment], laboratory: Laboratory
) -> tuple[list[Experiment], float | None]:
    """Tries rates, and further ones while the best lies at an end.

    Args:
        rates: to begin with, ascending.
        experiment_at: the first seed's experiment at a rate.
        laboratory: has the results so far.

    Returns:
        The experiments to be run, and the best rate once it is known.

    Raises:
        TrainingError: training diverges at all rates.
    """
    tried = {rate: replace(experiment_at(rate), may_diverge=True) for rate in rates}
    while True:
        tuned = {rate: _tuned(experiment, laboratory) for rate, experiment in tried.items()}
        known = {rate: perplexity for rate, perplexity in tuned.items() if perplexity is not None}
        if len(known) < len(tried):
            return list(tried.values()), None
        best = min(known, key=lambda rate: (known[rate], rate))
        if math.isinf(known[best]) and len(tried) >= _MOST:
            raise TrainingError(f"{tried[best].label}: training diverges at every learning rate down to {min(tried):g}")
        further = {max(tried): best * _FACTOR, min(tried): best / _FACTOR}.get(best)
        if further is None or len(tried) >= _MOST:
            return list(tried.values()), best
        rate = float(f"{further:.1g}")
        tried[rate] = replace(experiment_at(rate), may_diverge=True)


def _tuned(experiment: Experiment, laboratory: Laboratory) -> float | None:
    """Perplexity on the tuning text at the end of training: infinite where it diverged, None where it was not run."""
    result = laboratory.result(experiment)
    if result is None:
        return None if laboratory.failure(experiment) is None else math.inf
    return float(list(result["validation_perplexity"].values())[-1])
