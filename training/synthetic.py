"""Token sequences with something to learn, for runs that need neither text nor tokenizer.

A document is a walk through a sparse random Markov chain, written twice: its first half rewards knowing the chain, its
second half rewards remembering the first.
"""

from __future__ import annotations

import numpy as np

from yunmin.errors import ConfigError

TOKENS = 131_072  # in all, held-out ones included, unless the number of documents is given
_SUCCESSORS = 4
_WALK = (12, 48)  # shortest and longest walk, in tokens
_PROBABILITIES = (0.55, 0.25, 0.15, 0.05)


def synthetic_documents(n_tokens: int, separator: int, seed: int, most: int | None = None) -> list[list[int]]:
    """Draws documents of token ids.

    Args:
        n_tokens: ids lie below this.
        separator: the id that stands between documents, which no document contains.
        seed: of the chain and the walks.
        most: documents to draw; None stops at `TOKENS` tokens.

    Returns:
        Documents, none twice.

    Raises:
        ConfigError: too few ids for a chain.
    """
    if n_tokens < _SUCCESSORS + 1:
        raise ConfigError(f"vocab_size: synthetic data needs at least {_SUCCESSORS + 1} ids, got {n_tokens}")
    rng = np.random.default_rng(seed)
    ids = np.delete(np.arange(n_tokens), separator) if separator < n_tokens else np.arange(n_tokens)
    successors = ids[rng.integers(ids.size, size=(n_tokens, _SUCCESSORS))]
    documents: dict[tuple[int, ...], None] = {}
    drawn = 0
    while drawn < TOKENS if most is None else len(documents) < most:
        length = int(rng.integers(_WALK[0], _WALK[1] + 1))
        choices = rng.choice(_SUCCESSORS, size=length, p=_PROBABILITIES)
        walk = [int(rng.choice(ids))]
        for choice in choices[1:]:
            walk.append(int(successors[walk[-1], choice]))
        documents[tuple(walk + walk)] = None
        drawn += 2 * length + 1
    return [list(document) for document in documents]
