"""Perplexity of a model on texts, by token, byte and word, with intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from research.metrics.bootstrap import CONFIDENCE, Interval, ratio_interval
from research.models.local import LocalModel
from research.models.model import TextModel
from yunmin.errors import DataError
from yunmin.language_model import LanguageModel
from yunmin.perplexity import token_pieces, windows

_WINDOWS = 8  # read at a time, of a `LanguageModel`
_ENOUGH_DOCUMENTS = 30  # of which intervals are drawn; from fewer, windows are


def evaluate_perplexity(
    model: LanguageModel | TextModel,
    texts: Sequence[str],
    *,
    window: int = 512,
    stride: int = 512,
    max_tokens: int | None = None,
) -> dict[str, Any]:
    """Scores texts as one stream, with the end-of-text token before and between them.

    Each token of each text is scored, and the end-of-text tokens between them are. A model without such a token cannot
    score the very first token, whose bytes then do not count. Probabilities are over the ids that the tokenizer knows,
    as a server gives them: padding of the vocabulary has no part in them.

    The intervals say how far the figures would move with other text of the same kind: documents are drawn again, or
    windows where there are few documents, each with its own tokens, bytes and words.

    Args:
        model: has a tokenizer.
        texts: to score, in this order.
        window: tokens read at once; a token is never scored with more than these before it.
        stride: tokens scored per window, the rest of it being context.
        max_tokens: score no more than this; bytes and words count up to there.

    Returns:
        `token_perplexity`, `bits_per_byte` (of UTF-8), `byte_perplexity` and `word_perplexity` (words are what
        whitespace separates), with the counts and settings they rest on, and `intervals` of each.

    Raises:
        TokenizerError: the model has no tokenizer.
        DataError: fewer than two tokens, no words, an impossible stride, or a window that a server does not read.
        ServerError: a server refuses or fails.
    """
    if isinstance(model, LanguageModel):
        model = LocalModel(model, batch_size=_WINDOWS)
    token_ids, pieces = token_pieces(model.tokenizer, texts, max_tokens)
    words = np.array([len(text.split()) for text, _ in pieces])
    n_bytes = np.array([len(text.encode("utf-8")) for text, _ in pieces])
    if not words.sum():
        raise DataError("the text to score has no words")
    spans = windows(len(token_ids), window, stride)
    sequences = [token_ids[begin : end + 1] for begin, end, _ in spans]
    scored = model.score(sequences, [first - begin + 1 for begin, _, first in spans])
    nll = -np.concatenate([part.logprobs for part in scored])  # of each token but the first

    if len(pieces) >= _ENOUGH_DOCUMENTS:
        unit = "documents"
        ends = np.array([end for _, end in pieces]) - 1
        ends[-1] = nll.size  # an end-of-text token that begins a text which is not read
        by_unit, counts = _sums(nll, ends), np.diff(ends, prepend=0)
        per_unit = {"token": counts, "byte": n_bytes, "word": words}
    else:
        unit = "windows"
        ends = np.array([end for _, end, _ in spans])
        by_unit, counts = _sums(nll, ends), np.diff(ends, prepend=0)
        per_unit = {"token": counts} | {
            name: counts * (total.sum() / nll.size) for name, total in (("byte", n_bytes), ("word", words))
        }
    nats = {name: _ratio(by_unit, count) for name, count in per_unit.items()}
    return {
        "token_perplexity": _exp(nats["token"][0]),
        "bits_per_byte": nats["byte"][0] / math.log(2),
        "byte_perplexity": _exp(nats["byte"][0]),
        "word_perplexity": _exp(nats["word"][0]),
        "tokens": nll.size,
        "bytes": int(n_bytes.sum()),
        "words": int(words.sum()),
        "window": window,
        "stride": stride,
        "intervals": {
            "confidence": CONFIDENCE,
            "resampled": unit,
            "units": len(by_unit),
            "token_perplexity": _ends(nats["token"][1], _exp),
            "bits_per_byte": _ends(nats["byte"][1], lambda value: value / math.log(2)),
            "byte_perplexity": _ends(nats["byte"][1], _exp),
            "word_perplexity": _ends(nats["word"][1], _exp),
        },
    }


def _sums(values: NDArray[np.float64], ends: NDArray[np.int64]) -> NDArray[np.float64]:
    """Sums of consecutive runs of values, by where each run ends."""
    return np.diff(np.concatenate([[0.0], np.cumsum(values)])[ends], prepend=0.0)


def _ratio(numerators: NDArray[np.float64], denominators: NDArray[Any]) -> tuple[float, Interval | None]:
    """Sum over sum, and its interval; None where there is but one unit, or one that counts nothing."""
    ratio = float(numerators.sum() / denominators.sum())
    if len(numerators) < 2 or not np.isfinite(ratio) or not bool((denominators > 0).all()):
        return ratio, None
    return ratio, ratio_interval(numerators, denominators)


def _ends(interval: Interval | None, scale: Callable[[float], float]) -> list[float] | None:
    return None if interval is None else [scale(end) for end in interval]


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf
