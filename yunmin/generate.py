"""One sequence being generated: what is sampled, what is shown, when it ends.

The same object drives `model.generate` and every slot of the server, so that both give the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from yunmin.config import MambaConfig
from yunmin.constraints import compile_constraint
from yunmin.errors import RequestError
from yunmin.sampler import Sampler, require_ids, token_logprob
from yunmin.sampling import SamplingParams
from yunmin.text_stream import TextStream
from yunmin.tokenizer import Tokenizer

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Piece:
    """What one decode step gives.

    Attributes:
        token_id: the sampled token, or None for one that ends the text and is no part of it.
        text: text that became certain, possibly empty.
        finish_reason: "stop" at end of text, a stop string, a stop id or the end of what a constraint allows, "length"
            at max_tokens; None while running.
        logprob: of the token, see `yunmin.sampler.TokenLogprob`; None where not asked for or where there is no token.
        top_logprobs: ids and log-probabilities of the most probable tokens, the best first; None likewise.
    """

    token_id: int | None
    text: str
    finish_reason: FinishReason | None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] | None = None


@dataclass(frozen=True)
class Completion:
    """A finished generation.

    Attributes:
        text: without the prompt, cut before a stop string.
        token_ids: as sampled, without the token that ended the text.
        finish_reason: as in `Piece`.
        prompt_tokens: ids in the prompt.
        logprobs: of each token; None where not asked for.
        top_logprobs: of each token the most probable ones in its place; None likewise.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    logprobs: tuple[float, ...] | None = None
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] | None = None


class Generation:
    """Samples one sequence token by token.

    With `max_tokens` 0 it is finished from the start, with reason "length", and is never advanced.

    Args:
        params: how to choose and when to stop.
        prompt_ids: every id the model has read.
        config: names the end-of-text ids and the ids that may be sampled.
        tokenizer: None gives ids without text.
        sampler_state: to continue another sampler's draws.

    Attributes:
        sampler: draws.
        token_ids: sampled so far, without a token that ended the text.
        finish_reason: None while running.

    Raises:
        RequestError: an id that the model does not have, a constraint that cannot be compiled, or stop strings or a
            constraint without a tokenizer; names the field.
        MissingExtraError: there is a constraint, and llguidance is not installed.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        config: MambaConfig,
        tokenizer: Tokenizer | None,
        sampler_state: Tensor | None = None,
    ) -> None:
        if params.stop and tokenizer is None:
            raise RequestError("stop", "needs a tokenizer, and this model has none")
        require_ids("stop_token_ids", params.stop_token_ids, config.n_tokens)
        self.params = params
        self.sampler = Sampler(params, config.n_tokens, prompt_ids, sampler_state)
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None if params.max_tokens else "length"
        eos_ids = () if params.ignore_eos else config.eos_token_ids
        self._end_ids = frozenset((*eos_ids, *params.stop_token_ids))
        self._text = None if tokenizer is None else TextStream(tokenizer, params.stop, prompt_ids)
        self._matcher = None
        if params.constraint is not None:
            self._matcher = compile_constraint(params.constraint, tokenizer, config.n_tokens).begin(eos_ids)

    def advance(self, logits: Tensor) -> Piece:
        """Samples from logits (V,) after the last token; must not be called once finished.

        Raises:
            YunminError: the logits hold NaN or infinity, or the constraint cannot be followed.
        """
        assert self.finish_reason is None
        allowed = None if self._matcher is None else self._matcher.allowed()
        if self._matcher is not None and allowed is None:
            return self._end()
        token_id = self.sampler.choose(logits, allowed)
        if token_id in self._end_ids:
            return self._end()
        self.token_ids.append(token_id)
        self.sampler.record(token_id)
        text = "" if self._text is None else self._text.push(token_id)
        is_complete = self._matcher is not None and self._matcher.accept(token_id)
        if is_complete or (self._text is not None and self._text.stopped):
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self.params.max_tokens:
            self.finish_reason = "length"
        if self.finish_reason is not None and self._text is not None:
            text += self._text.finish()
            if self._text.stopped:
                self.finish_reason = "stop"
        if self.params.logprobs is None:
            return Piece(token_id, text, self.finish_reason)
        found = token_logprob(logits, self.sampler.n_tokens, token_id, self.params.logprobs)
        return Piece(token_id, text, self.finish_reason, found.logprob, found.top)

    def _end(self) -> Piece:
        """The text ends with a token that is no part of it, or with none."""
        self.finish_reason = "stop"
        return Piece(None, "" if self._text is None else self._text.finish(), "stop")
