"""Perplexity of a model on texts, by token, byte and word."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from yunmin.errors import DataError, TokenizerError
from yunmin.language_model import LanguageModel
from yunmin.perplexity import perplexity
from yunmin.perplexity import token_stream as token_stream


def evaluate_perplexity(
    model: LanguageModel,
    texts: Sequence[str],
    *,
    window: int = 512,
    stride: int = 512,
    max_tokens: int | None = None,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Scores texts as one stream, with the end-of-text token before and between them.

    Each token of each text is scored, and the end-of-text tokens between them are. A model without such a token cannot
    score the very first token, whose bytes then do not count.

    Args:
        model: has a tokenizer.
        texts: to score, in this order.
        window: tokens read at once.
        stride: tokens scored per window, the rest of it being context.
        max_tokens: score no more than this; bytes and words count up to there.
        batch_size: windows per forward pass.
        progress: called with windows done and in all.

    Returns:
        `token_perplexity`, `bits_per_byte` (of UTF-8) and `word_perplexity` (words are what whitespace separates), with
        the counts and settings they rest on.

    Raises:
        TokenizerError: the model has no tokenizer.
        DataError: fewer than two tokens, no words, or an impossible stride.
    """
    if model.tokenizer is None:
        raise TokenizerError(f"{model.folder}: no tokenizer.json, so text cannot be scored")
    token_ids, scored = token_stream(model.tokenizer, texts, max_tokens)
    words = sum(len(text.split()) for text in scored)
    if words == 0:
        raise DataError("the text to score has no words")
    found = perplexity(
        model.runtime.forward,
        token_ids,
        window=window,
        stride=stride,
        batch_size=batch_size,
        progress=progress,
    )
    nll = found.mean_nll * found.tokens
    n_bytes = sum(len(text.encode("utf-8")) for text in scored)
    return {
        "token_perplexity": found.token_perplexity,
        "bits_per_byte": nll / math.log(2) / n_bytes,
        "word_perplexity": math.exp(nll / words) if nll / words < 700 else math.inf,
        "tokens": found.tokens,
        "bytes": n_bytes,
        "words": words,
        "window": found.window,
        "stride": found.stride,
    }
