"""Perplexity of a model on held-out text, with its window and stride stated."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from yunmin.errors import DataError
from yunmin.tokenizer import Tokenizer


@dataclass(frozen=True)
class Perplexity:
    """A measured perplexity.

    Attributes:
        token_perplexity: exp of the mean negative log-likelihood.
        mean_nll: in nats per token.
        tokens: tokens scored.
        window: tokens the model reads at once.
        stride: tokens scored per window; the rest of the window is context.
    """

    token_perplexity: float
    mean_nll: float
    tokens: int
    window: int
    stride: int


@torch.inference_mode()
def perplexity(
    forward: Callable[[Tensor], Tensor],
    token_ids: Sequence[int] | Tensor,
    *,
    window: int = 512,
    stride: int = 512,
    batch_size: int = 8,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Scores each token but the first exactly once, given at least `window - stride` tokens before it.

    Args:
        forward: int64 ids (B, L) -> logits (B, L, V).
        token_ids: int64 (n,), n >= 2.
        window: longest input to `forward`.
        stride: step between windows, at most `window`.
        batch_size: windows per call.
        device: where `forward` computes.
        progress: called with windows done and in all.

    Raises:
        DataError: fewer than two tokens, or a stride outside 1..window.
    """
    ids = torch.as_tensor(token_ids, dtype=torch.int64)
    if ids.numel() < 2:
        raise DataError(f"perplexity needs at least 2 tokens, got {ids.numel()}")
    if not 1 <= stride <= window:
        raise DataError(f"stride must lie in 1..window={window}, got {stride}")
    inputs, targets = ids[:-1], ids[1:]
    total = inputs.numel()
    # each window: where it begins, and from which target on it scores
    spans = [(0, min(window, total), 0)]
    while spans[-1][1] < total:
        end = min(spans[-1][1] + stride, total)
        spans.append((max(0, end - window), end, spans[-1][1]))
    by_length: dict[int, list[tuple[int, int, int]]] = {}
    for span in spans:
        by_length.setdefault(span[1] - span[0], []).append(span)
    nll, done = 0.0, 0
    for group in by_length.values():  # equal lengths need no padding
        for first in range(0, len(group), batch_size):
            batch = group[first : first + batch_size]
            logits = forward(torch.stack([inputs[a:b] for a, b, _ in batch]).to(device))  # (B, L, V)
            for row, (begin, end, scored) in enumerate(batch):
                picked = logits[row, scored - begin :].float()
                nll += float(F.cross_entropy(picked, targets[scored:end].to(device), reduction="sum"))
            done += len(batch)
            if progress is not None:
                progress(done, len(spans))
    mean = nll / total
    return Perplexity(math.exp(mean) if mean < 700 else math.inf, mean, total, window, stride)


def token_stream(tokenizer: Tokenizer, texts: Sequence[str], max_tokens: int | None) -> tuple[list[int], list[str]]:
    """Ids of which all but the first are scored, and the pieces of text that the scored ones spell.

    Args:
        tokenizer: encodes; its end-of-text token, where it has one, goes before each text.
        texts: read only as far as needed.
        max_tokens: ids to score at most; None for all.
    """
    separator = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    room = sys.maxsize if max_tokens is None else max_tokens + 1
    token_ids: list[int] = []
    scored: list[str] = []
    for text in texts:
        token_ids += separator
        if len(token_ids) >= room:
            break
        encoding = tokenizer.backend.encode(text, add_special_tokens=False)
        taken = encoding.ids[: room - len(token_ids)]
        if not taken:
            continue
        begin = 0 if token_ids else encoding.offsets[0][1]  # the first id of all is read, not scored
        end = len(text) if len(taken) == len(encoding.ids) else encoding.offsets[len(taken) - 1][1]
        scored.append(text[begin:end])
        token_ids += taken
    return token_ids[:room], scored
