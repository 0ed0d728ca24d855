"""The learning rate over the steps of a run: a linear warm-up, then half a cosine down to a floor."""

from __future__ import annotations

import math
from collections.abc import Sequence

from training.config import TrainingConfig
from training.phases import Phase, PhaseSpan


def rate_factor(step: int, steps: int, warmup_share: float, floor: float) -> float:
    """The share of the peak learning rate at a step.

    Args:
        step: from 0.
        steps: how many the schedule has.
        warmup_share: share of the steps with a rising rate.
        floor: the factor at the last step.
    """
    warmup = round(warmup_share * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup - 1)
    return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2


def rate_factor_in_run(step: int, spans: Sequence[PhaseSpan], config: TrainingConfig) -> float:
    """The factor at a step of a run: the weights' phases share one schedule, the adapters have their own."""
    is_adapters = next(span for span in spans if span.start <= step < span.stop).phase is Phase.ADAPTERS
    own = [span for span in spans if (span.phase is Phase.ADAPTERS) == is_adapters]
    first, stop = own[0].start, own[-1].stop
    return rate_factor(step - first, stop - first, config.warmup_share, config.min_learning_rate_share)
