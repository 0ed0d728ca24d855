"""Conversations: messages as clients send them, as templates want them, and as the model reads them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import Field

from serving.api.backend import Backend
from serving.api.chat_template import BUILT_IN, ChatTemplate, turn_positions
from serving.api.failures import ApiError
from serving.api.protocol import Body, ListOf
from serving.api.start import Start
from yunmin.errors import RequestError
from yunmin.sampling import SamplingParams
from yunmin.tokenizer import Tokenizer

Message = dict[str, Any]
# characters and messages whose rendering and encoding take long enough to hold up the event loop
_LONG_TEXT = 4096
_MANY_MESSAGES = 64


class TextPart(Body):
    """A part of a message's content; there are no others than text."""

    type: Literal["text", "input_text", "output_text"]
    text: str
    annotations: list[Any] | None = Field(None, description="accepted and not used")
    logprobs: list[Any] | None = Field(None, description="accepted and not used")


class ChatMessage(Body):
    """One message of a conversation, as OpenAI's clients send them and get them back."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | ListOf[TextPart] | None = Field(None, description="text, whole or in parts")
    name: str | None = Field(None, description="for the chat template")
    tool_call_id: str | None = Field(None, description="for the chat template")
    tool_calls: ListOf[dict[str, Any]] | None = Field(None, description="for the chat template")
    refusal: str | None = Field(None, description="accepted and not used")
    annotations: list[Any] | None = Field(None, description="accepted and not used")
    audio: None = Field(None, description="only null")
    function_call: None = Field(None, description="only null")

    def to_message(self) -> Message:
        """As templates want it."""
        content = self.content
        if isinstance(content, list):
            content = "\n".join(part.text for part in content)
        optional = {name: getattr(self, name) for name in ("name", "tool_call_id", "tool_calls")}
        return {
            "role": "system" if self.role == "developer" else self.role,
            "content": content or "",
            **{name: value for name, value in optional.items() if value},
        }


@dataclass(frozen=True)
class Conversation:
    """A conversation as the model reads it.

    Attributes:
        messages: all of them.
        token_ids: of its text, up to where the assistant's turn begins.
        turn_ends: positions in them.
    """

    messages: list[Message]
    token_ids: list[int]
    turn_ends: list[int]

    def after(self, start: Start) -> Start:
        """Where the model goes on from: the start, if the conversation begins with it, else the beginning."""
        before = start.token_ids
        begins = len(before) <= len(self.token_ids) and self.token_ids[: len(before)] == list(before)
        return start if begins else replace(start, snapshot=None)


def require_template(backend: Backend) -> ChatTemplate:
    """The chat template.

    Raises:
        ApiError: the model has none, and none is configured.
        RequestError: there is no tokenizer.
    """
    backend.require_tokenizer("messages")
    if backend.template is None:
        names = " or ".join(BUILT_IN)
        message = (
            f"messages: this model has no chat template; start the server with --chat-template {names}, or a file, "
            "or put a chat_template.jinja beside the model"
        )
        raise ApiError(400, message, param="messages", code="no_chat_template")
    return backend.template


async def read_conversation(backend: Backend, messages: Sequence[Message], start: Start, field: str) -> Conversation:
    """Renders and encodes a conversation.

    Args:
        backend: whose template and tokenizer are used.
        messages: all of them.
        start: what has been read already.
        field: of the request.

    Raises:
        RequestError: the template refuses the messages, or there is more to read than the server allows.
    """
    if not messages:
        raise RequestError(field, "must not be empty")
    template, tokenizer = require_template(backend), backend.require_tokenizer(field)
    limit = backend.settings.max_prompt_tokens
    most = len(start.token_ids) + limit
    is_long = sum(len(message["content"]) for message in messages) > _LONG_TEXT
    try:
        if is_long or len(messages) > _MANY_MESSAGES:
            ids, ends = await asyncio.to_thread(turn_positions, template, tokenizer, messages, most)
        else:
            ids, ends = turn_positions(template, tokenizer, messages, most)
    except RequestError as error:
        raise RequestError(field, str(error).removeprefix(f"{error.field}: ")) from None
    if not ids:
        raise RequestError(field, "gave no text by the chat template")
    conversation = Conversation(list(messages), ids, ends)
    if start.token_ids and conversation.after(start).snapshot is None:
        respelled = await asyncio.to_thread(_begun_by, start.token_ids, template, tokenizer, messages)
        if respelled is not None:
            conversation = Conversation(list(messages), respelled, [])
    new = len(conversation.token_ids) - len(conversation.after(start).token_ids)
    if new > limit:
        raise RequestError(field, f"must have at most {limit} tokens on this server, got {new}")
    return conversation


def _begun_by(
    token_ids: tuple[int, ...], template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Message]
) -> list[int] | None:
    """The ids of a conversation that begins with text read or generated before, whatever ids that was spelled in.

    A model need not spell its answer as the tokenizer would; what it has said is what it goes on from.

    Args:
        token_ids: of that text.
        template, tokenizer: render and encode what comes after it.
        messages: all of them.

    Returns:
        None where it does not begin so.
    """
    text, read = template.render(messages), tokenizer.backend.decode(list(token_ids), skip_special_tokens=False)
    if not text.startswith(read):
        return None
    return [*token_ids, *tokenizer.encode(text[len(read) :])]


def ending_turns(params: SamplingParams, backend: Backend) -> SamplingParams:
    """Parameters that end the text where the assistant's turn ends, too.

    That is at the template's own marks, and at the tokenizer's end-of-text token, which for chat models often is
    another one than the model's.
    """
    template, tokenizer = require_template(backend), backend.require_tokenizer("messages")
    if params.ignore_eos:
        return params
    ids = {tokenizer.eos_id} if tokenizer.eos_id is not None else set()
    texts = []
    for mark in template.stop:
        token_id = tokenizer.backend.token_to_id(mark)
        if token_id is None:
            texts.append(mark)
        else:
            ids.add(token_id)
    return replace(
        params, stop=(*params.stop, *texts), stop_token_ids=tuple(dict.fromkeys((*params.stop_token_ids, *sorted(ids))))
    )
