"""What the endpoints work with: one model, the engine that runs it, and what belongs to them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from serving.api.access import Access
from serving.api.chat_template import ChatTemplate
from serving.api.token_texts import TokenTexts
from serving.engine.engine import Engine
from serving.sessions.manager import Sessions
from serving.settings import Settings
from yunmin.errors import RequestError
from yunmin.language_model import LanguageModel
from yunmin.tokenizer import Tokenizer

_LONG_PROMPT = 4096  # characters or ids whose encoding takes long enough to hold up the event loop


@dataclass(eq=False)
class Backend:
    """A served model; set as `app.state.backend` before the first request, and replaced as a whole by a reload.

    Attributes:
        model: to generate with.
        engine: runs it.
        settings: of the server.
        access: its keys.
        template: renders conversations; None where the model has none and none is configured.
        sessions: that requests go on with; None where there are none (a batch needs none).
        created: unix seconds.
        users: requests that began with this backend and have not ended.
    """

    model: LanguageModel
    engine: Engine
    settings: Settings
    access: Access = field(default_factory=Access)
    template: ChatTemplate | None = None
    sessions: Sessions | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    users: int = 0

    async def encode(self, field: str, prompt: str | list[int], *, may_be_empty: bool = False) -> list[int]:
        """Token ids of a prompt, with errors that name the request's field.

        Args:
            field: of the request.
            prompt: text or token ids.
            may_be_empty: whether there is something before it to go on from.

        Raises:
            RequestError: it is empty, too long, or has an id outside the vocabulary.
            TokenizerError: it is text and the model has no tokenizer.
        """
        if may_be_empty and not prompt:
            return []
        try:
            if len(prompt) > _LONG_PROMPT:
                token_ids = await asyncio.to_thread(self.model.encode, prompt)
            else:
                token_ids = self.model.encode(prompt)
        except RequestError as error:
            raise RequestError(field, str(error).removeprefix(f"{error.field}: ")) from None
        if len(token_ids) > (limit := self.settings.max_prompt_tokens):
            raise RequestError(field, f"must have at most {limit} tokens on this server, got {len(token_ids)}")
        return token_ids

    async def encode_all(
        self, field: str, prompts: Sequence[str | list[int]], *, may_be_empty: bool = False
    ) -> list[list[int]]:
        """Token ids of several prompts, each as `encode` gives them."""
        return [await self.encode(field, prompt, may_be_empty=may_be_empty) for prompt in prompts]

    def decode(self, token_ids: list[int]) -> str:
        """Text of token ids; none without a tokenizer."""
        tokenizer = self.model.tokenizer
        return "" if tokenizer is None else tokenizer.decode(token_ids)

    def require_tokenizer(self, field: str) -> Tokenizer:
        """The tokenizer, for a field that needs one.

        Raises:
            RequestError: the model has none.
        """
        if self.model.tokenizer is None:
            raise RequestError(field, "needs a tokenizer, and this model has none")
        return self.model.tokenizer

    @cached_property
    def token_texts(self) -> TokenTexts:
        """Single tokens as text; there must be a tokenizer."""
        assert self.model.tokenizer is not None
        return TokenTexts(self.model.tokenizer)
