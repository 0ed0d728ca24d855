"""From logits to a token id."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from yunmin.errors import RequestError, YunminError
from yunmin.kernels.candidates import BUCKETS, CHUNK
from yunmin.kernels.sampling import NONE_ALLOWED, NOT_FINITE, choose, log_probabilities
from yunmin.kernels.vector import LANES
from yunmin.sampling import SamplingParams

_ALL_ALLOWED = np.empty(0, np.uint32)
_NOT_FINITE = "the model gave logits that are not finite"


@dataclass(frozen=True)
class TokenLogprob:
    """How probable the model found a token, whatever was done to its logits before one was chosen.

    Attributes:
        logprob: log-softmax of the logits as the model gave them, over all ids that are no padding.
        top: ids and log-probabilities of the most probable tokens, the best first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


class Sampler:
    """Draws one sequence's tokens with a random generator of its own.

    In this order: what `allowed` leaves out is gone, `logit_bias` is added, the repetition penalty divides or
    multiplies, frequency and presence penalties are subtracted, the temperature divides; then top-k, top-p and min-p
    each keep the first of the candidates that the one before has kept, best first, equal ones by id. One number drawn
    from the generator chooses among those, in the order of their ids; at temperature 0 none is drawn.

    Args:
        params: how to choose.
        n_tokens: ids from here on are padding of the vocabulary and never chosen.
        prompt_ids: what the repetition penalty applies to from the start.
        sampler_state: uint8, from `state()`, to go on where another sampler stopped.

    Raises:
        RequestError: `logit_bias` names an id that is none.
    """

    def __init__(
        self,
        params: SamplingParams,
        n_tokens: int,
        prompt_ids: Iterable[int] = (),
        sampler_state: Tensor | None = None,
    ) -> None:
        self.params = params
        self.n_tokens = n_tokens
        self.generator = torch.Generator()
        if sampler_state is not None:
            self.generator.set_state(sampler_state)
        elif params.seed is not None:
            self.generator.manual_seed(params.seed)
        else:
            self.generator.seed()
        require_ids("logit_bias", (token_id for token_id, _ in params.logit_bias), n_tokens)
        self._bias_ids = np.array([token_id for token_id, _ in params.logit_bias], np.int32)
        self._biases = np.array([bias for _, bias in params.logit_bias], np.float64)
        self._seen = _Seen(prompt_ids if params.repetition_penalty != 1.0 else ())
        self._is_penalized = params.repetition_penalty != 1.0 or bool(
            params.presence_penalty or params.frequency_penalty
        )

    def state(self) -> Tensor:
        return self.generator.get_state()

    def choose(self, logits: Tensor, allowed: NDArray[np.uint32] | None = None) -> int:
        """Chooses the next token.

        Args:
            logits: (V,), any float dtype, any device.
            allowed: a bit for each id, the lowest first, or None where all are allowed.

        Returns:
            A token id below `n_tokens`.

        Raises:
            YunminError: the logits hold NaN or infinity, or no id is allowed.
        """
        p = self.params
        draw = torch.rand(1, generator=self.generator, dtype=torch.float64).item() if p.temperature else 0.0
        token_id: int = choose(
            _row(logits, self.n_tokens),
            draw,
            float(p.temperature),
            min(p.top_k, self.n_tokens),
            float(p.top_p),
            float(p.min_p),
            _ALL_ALLOWED if allowed is None else allowed,
            self._bias_ids,
            self._biases,
            self._seen.ids,
            self._seen.counts,
            float(p.repetition_penalty),
            float(p.presence_penalty),
            float(p.frequency_penalty),
            *_SCRATCH.for_row(self.n_tokens),
        )
        if token_id == NOT_FINITE:
            raise YunminError(_NOT_FINITE)
        if token_id == NONE_ALLOWED:
            raise YunminError("the constraint allows none of the model's tokens")
        return token_id

    def record(self, token_id: int) -> None:
        """Has the penalties apply to a token that was generated."""
        if self._is_penalized:
            self._seen.add(token_id)


def token_logprob(logits: Tensor, n_tokens: int, token_id: int, alternatives: int = 0) -> TokenLogprob:
    """How probable the model finds a token, and which ones it finds the most probable.

    Args:
        logits: (V,), any float dtype, any device.
        n_tokens: ids from here on are padding and have no part in it.
        token_id: the token.
        alternatives: how many of the most probable ones to name.

    Raises:
        YunminError: the logits hold NaN or infinity.
    """
    ids = np.empty(min(alternatives, n_tokens), np.int32)
    values = np.empty(ids.size, np.float64)
    logprob = log_probabilities(_row(logits, n_tokens), token_id, ids, values, *_SCRATCH.for_row(n_tokens))
    if np.isnan(logprob):
        raise YunminError(_NOT_FINITE)
    return TokenLogprob(logprob, tuple(zip(ids.tolist(), values.tolist(), strict=True)))


def require_ids(field: str, token_ids: Iterable[int], n_tokens: int) -> None:
    """Refuses a request's ids that are none of the model's.

    Raises:
        RequestError: names the field.
    """
    for token_id in token_ids:
        if token_id >= n_tokens:
            raise RequestError(field, f"token ids must lie in 0..{n_tokens - 1}, got {token_id}")


class _Seen:
    """The distinct ids that penalties apply to, and how often each was generated."""

    def __init__(self, prompt_ids: Iterable[int]) -> None:
        self._places = {token_id: place for place, token_id in enumerate(dict.fromkeys(prompt_ids))}
        self._ids = np.array(list(self._places), np.int32)
        self._counts = np.zeros(self._ids.size, np.int32)

    @property
    def ids(self) -> NDArray[np.int32]:
        return self._ids[: len(self._places)]

    @property
    def counts(self) -> NDArray[np.int32]:
        return self._counts[: len(self._places)]

    def add(self, token_id: int) -> None:
        place = self._places.setdefault(token_id, len(self._places))
        if place == self._ids.size:
            room = np.zeros(max(64, place), np.int32)
            self._ids, self._counts = (np.concatenate([known, room]) for known in (self._ids, self._counts))
        self._ids[place] = token_id
        self._counts[place] += 1


class _Scratch(threading.local):
    """Memory for the kernels; each thread has its own, for the vocabulary it saw last."""

    def __init__(self) -> None:
        self._chunks = 0
        self._arrays: tuple[NDArray[np.generic], ...] = ()

    def for_row(self, n_tokens: int) -> tuple[NDArray[np.generic], ...]:
        chunks = -(-n_tokens // CHUNK)
        if chunks != self._chunks:
            size = chunks * CHUNK
            self._chunks = chunks
            self._arrays = (
                np.empty(size, np.float32),  # scores
                np.empty(chunks * LANES, np.float32),  # peaks
                np.empty(size, np.float64),  # weights
                np.empty(size, np.int32),  # members
                np.empty(BUCKETS, np.float64),
                np.empty(chunks, np.float64),  # sums
            )
        return self._arrays


_SCRATCH = _Scratch()


def _row(logits: Tensor, n_tokens: int) -> NDArray[np.float32]:
    row: NDArray[np.float32] = logits.detach().to("cpu", torch.float32).numpy()[:n_tokens]
    # the kernels are compiled for plain arrays only
    return row if row.flags.carray else row.copy()
