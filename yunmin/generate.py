"""One sequence being generated: what is sampled, what is shown, when it ends.

The same object drives `model.generate` and every slot of the server, so that both give the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from yunmin.config import MambaConfig
from yunmin.sampling import Sampler, SamplingParams
from yunmin.text_stream import TextStream
from yunmin.tokenizer import Tokenizer

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Piece:
    """What one decode step gives.

    Attributes:
        token_id: the sampled token, or None for an end-of-text token.
        text: text that became certain, possibly empty.
        finish_reason: "stop" at end of text or a stop string, "length" at max_tokens; None while running.
    """

    token_id: int | None
    text: str
    finish_reason: FinishReason | None


@dataclass(frozen=True)
class Completion:
    """A finished generation.

    Attributes:
        text: without the prompt, cut before a stop string.
        token_ids: as sampled, without the end-of-text token.
        finish_reason: "stop" or "length".
        prompt_tokens: ids in the prompt.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int


class Generation:
    """Samples one sequence token by token.

    Args:
        params: how to choose and when to stop.
        prompt_ids: every id the model has read.
        config: names the end-of-text ids and the ids that may be sampled.
        tokenizer: None gives ids without text.
        sampler_state: to continue another sampler's draws.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        config: MambaConfig,
        tokenizer: Tokenizer | None,
        sampler_state: Tensor | None = None,
    ) -> None:
        self.params = params
        self.sampler = Sampler(params, config.n_tokens, sampler_state)
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._history = set(prompt_ids)
        self._eos_ids = frozenset(config.eos_token_ids)
        self._text = None if tokenizer is None else TextStream(tokenizer, params.stop, prompt_ids)

    def advance(self, logits: Tensor) -> Piece:
        """Samples from logits (V,) after the last token; must not be called once finished."""
        assert self.finish_reason is None
        token_id = self.sampler.choose(logits, self._history)
        if token_id in self._eos_ids:
            self.finish_reason = "stop"
            return Piece(None, "" if self._text is None else self._text.finish(), "stop")
        self.token_ids.append(token_id)
        self._history.add(token_id)
        text = "" if self._text is None else self._text.push(token_id)
        if self._text is not None and self._text.stopped:
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self.params.max_tokens:
            self.finish_reason = "length"
            if self._text is not None:
                text += self._text.finish()
                if self._text.stopped:
                    self.finish_reason = "stop"
        return Piece(token_id, text, self.finish_reason)
