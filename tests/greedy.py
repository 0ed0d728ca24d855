"""When two greedy generations count as the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

TIE = 1e-4  # of the largest logit


def require_same_greedy(
    found: Sequence[int], expected: Sequence[int], logits_after: Callable[[Sequence[int]], Tensor]
) -> None:
    """Fails unless the ids are the same up to where the two best logits are as good as equal.

    Args:
        found: generated ids.
        expected: those of the reference.
        logits_after: the reference's logits (V,) after some of its ids.
    """
    assert len(found) == len(expected)
    for position, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        if mine != theirs:
            logits = logits_after(expected[:position])
            first, second = logits.topk(2).values.tolist()
            assert first - second <= TIE * float(logits.abs().max()), f"token {position}: {mine}, not {theirs}"
            assert mine in logits.topk(2).indices.tolist()
            return  # from here on they read different texts
