"""Perplexity of a model on held-out text, with its window and stride stated."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from yunmin.errors import DataError


class Places(Protocol):
    """Where each token of a text begins and ends, in characters."""

    def __getitem__(self, index: int, /) -> tuple[int, int]: ...


class Encoding(Protocol):
    """Token ids of a text, and their places in it."""

    @property
    def ids(self) -> Sequence[int]: ...

    @property
    def offsets(self) -> Places: ...


class Encoder(Protocol):
    """What turns text into token ids: a `yunmin.tokenizer.Tokenizer`, or one that somebody else has."""

    @property
    def eos_id(self) -> int | None: ...

    def encoding(self, text: str) -> Encoding: ...


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
    spans = windows(ids.numel(), window, stride)
    inputs, targets = ids[:-1], ids[1:]
    total = inputs.numel()
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


def windows(n_tokens: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    """Windows that together score each token but the first exactly once.

    Args:
        n_tokens: in all.
        window: tokens read at once.
        stride: tokens scored per window but the first, which scores all that it reads.

    Returns:
        For each window where its input begins and ends, and from where on its inputs' successors are scored.

    Raises:
        DataError: fewer than two tokens, or a stride outside 1..window.
    """
    if n_tokens < 2:
        raise DataError(f"perplexity needs at least 2 tokens, got {n_tokens}")
    if not 1 <= stride <= window:
        raise DataError(f"stride must lie in 1..window={window}, got {stride}")
    total = n_tokens - 1
    spans = [(0, min(window, total), 0)]
    while spans[-1][1] < total:
        end = min(spans[-1][1] + stride, total)
        spans.append((max(0, end - window), end, spans[-1][1]))
    return spans


def token_stream(tokenizer: Encoder, texts: Sequence[str], max_tokens: int | None) -> tuple[list[int], list[str]]:
    """As `token_pieces`, without the places where pieces end."""
    token_ids, pieces = token_pieces(tokenizer, texts, max_tokens)
    return token_ids, [piece for piece, _ in pieces]


def token_pieces(
    tokenizer: Encoder, texts: Sequence[str], max_tokens: int | None
) -> tuple[list[int], list[tuple[str, int]]]:
    """Ids of which all but the first are scored, and the pieces of text that the scored ones spell.

    Args:
        tokenizer: encodes; its end-of-text token, where it has one, goes before each text.
        texts: read only as far as needed.
        max_tokens: ids to score at most; None for all.

    Returns:
        The ids, and for each piece how many of them there are up to its end.
    """
    separator = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    room = sys.maxsize if max_tokens is None else max_tokens + 1
    token_ids: list[int] = []
    pieces: list[tuple[str, int]] = []
    for text in texts:
        token_ids += separator
        if len(token_ids) >= room:
            break
        encoding = tokenizer.encoding(text)
        taken = encoding.ids[: room - len(token_ids)]
        if not taken:
            continue
        begin = 0 if token_ids else encoding.offsets[0][1]  # the first id of all is read, not scored
        end = len(text) if len(taken) == len(encoding.ids) else encoding.offsets[len(taken) - 1][1]
        token_ids += taken
        pieces.append((text[begin:end], len(token_ids)))
    return token_ids[:room], pieces
