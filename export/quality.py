"""Perplexity of a checkpoint as it will be served."""

from __future__ import annotations

from collections.abc import Callable

from export.texts import WINDOW, Text
from yunmin.artifact import PerplexityRecord
from yunmin.checkpoint import Checkpoint
from yunmin.perplexity import perplexity
from yunmin.runtime.native.runtime import NativeRuntime

_BATCH_SIZE = 8
_REPORTS = 4


def measure(checkpoint: Checkpoint, text: Text, report: Callable[[str], None], what: str) -> PerplexityRecord:
    """Scores held-out text in the native runtime, whatever the weights are stored in.

    Args:
        checkpoint: as stored; need not be in any folder.
        text: to score.
        report: told how far it is.
        what: the name of the model in reports.

    Raises:
        DataError: the text has fewer than two tokens.
    """
    scored = text.token_ids.numel() - 1
    reported = 0

    def progress(done: int, total: int) -> None:
        nonlocal reported
        if done * _REPORTS // total > reported:
            reported = done * _REPORTS // total
            report(f"perplexity {what}, {done} of {total} windows")

    report(f"perplexity {what}, {scored} tokens")
    found = perplexity(
        NativeRuntime(checkpoint).forward,
        text.token_ids,
        window=WINDOW,
        stride=WINDOW,
        batch_size=_BATCH_SIZE,
        progress=progress,
    )
    return PerplexityRecord(
        token_perplexity=found.token_perplexity,
        tokens=found.tokens,
        window=found.window,
        stride=found.stride,
        source=text.source,
    )
