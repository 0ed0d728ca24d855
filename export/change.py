"""What an export changes beyond what is exact: precision, and width where a limit on perplexity allows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from export.options import Options
from export.quantize import quantize_checkpoint
from export.search import FORMATS, Search, facts_of
from export.texts import Texts
from yunmin.artifact import PerplexityRecord
from yunmin.checkpoint import Checkpoint
from yunmin.quantization.layout import Quantization


@dataclass(frozen=True)
class Change:
    """The outcome.

    Attributes:
        artifact: what is stored; the very object that was given where nothing changed.
        kept: per layer, the inner channels that are left, int64.
        facts: for the manifest.
    """

    artifact: Checkpoint
    kept: tuple[Tensor, ...]
    facts: dict[str, Any]


def changed(
    exact: Checkpoint,
    before: PerplexityRecord | None,
    texts: Texts | None,
    options: Options,
    report: Callable[[str], None],
) -> Change:
    """Quantizes, and searches for precision and width, as the options ask for.

    Args:
        exact: float32, proven equal to what was trained; not modified.
        before: its perplexity, where there is text to measure.
        texts: to measure and calibrate on.
        options: what is wanted.
        report: told how far it is.

    Raises:
        VerificationError: nothing smaller keeps the perplexity.
        CheckpointError: a weight cannot be quantized.
    """
    facts: dict[str, Any] = {"order": options.order}
    if texts is not None and texts.calibration is not None:
        facts["calibration"] = texts.calibration.describe()
    whole = tuple(torch.arange(inner) for inner in exact.config.d_inner)
    if options.max_increase is not None:
        assert texts is not None
        assert before is not None
        limit = before.token_perplexity * (1 + options.max_increase)
        search = Search(
            exact,
            before,
            limit,
            texts,
            calibrates=options.rounds_by_text,
            multiple=options.width_multiple,
            report=report,
        )
        found = search.smallest(FORMATS if options.quantize == "none" else (options.quantize,))
        facts |= facts_of(found, options.max_increase, limit, texts, search.full)
        return Change(found.checkpoint, found.kept, facts)
    if options.quantize == "none":
        return Change(exact, whole, facts)
    calibration = texts.calibration if texts is not None and options.rounds_by_text else None
    return Change(quantize_checkpoint(exact, Quantization(options.quantize), calibration, report), whole, facts)
