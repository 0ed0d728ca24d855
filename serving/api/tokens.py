"""`/tokenize` and `/detokenize`: text to token ids and back, with bodies like vLLM's."""

from __future__ import annotations

import asyncio

from pydantic import ConfigDict, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serving.api.conversation import ChatMessage, read_conversation
from serving.api.models import check_model
from serving.api.protocol import Body, ListOf, parse_request
from serving.api.record import record_of
from serving.api.start import Start
from serving.api.transport import read_body
from yunmin.errors import RequestError

_LONG = 4096  # ids whose decoding takes long enough to hold up the event loop


class TokenizeRequest(Body):
    """Body of `/tokenize`; exactly one of `prompt` and `messages`."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"prompt": "def main(", "return_token_strs": True}]})

    model: str | None = Field(None, description="the served model's name")
    prompt: str | None = Field(None, description="text")
    messages: ListOf[ChatMessage] | None = Field(None, description="a conversation, for the chat template")
    add_special_tokens: bool | None = Field(None, description="only false: prompts are read as they are")
    return_token_strs: bool | None = Field(None, description="whether to give each token's text, too (false)")


class DetokenizeRequest(Body):
    """Body of `/detokenize`."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"tokens": [1, 2, 3]}]})

    model: str | None = Field(None, description="the served model's name")
    tokens: ListOf[int] = Field(description="token ids")


async def tokenize(request: Request) -> Response:
    """Token ids of a text or of a conversation."""
    record = record_of(request)
    backend = record.backend
    asked = parse_request(TokenizeRequest, await read_body(request, backend.settings.max_body_bytes))
    check_model(asked.model, backend)
    backend.require_tokenizer("prompt")
    if asked.add_special_tokens:
        raise RequestError("add_special_tokens", "is not supported: prompts are read as they are")
    if (asked.prompt is None) == (asked.messages is None):
        raise RequestError("prompt", "give exactly one of prompt and messages")
    if asked.messages is not None:
        messages = [message.to_message() for message in asked.messages]
        ids = (await read_conversation(backend, messages, Start(), "messages")).token_ids
    else:
        ids = await backend.encode("prompt", asked.prompt or "", may_be_empty=True)
    settings = backend.settings
    answer = {"count": len(ids), "max_model_len": settings.max_prompt_tokens + settings.max_tokens, "tokens": ids}
    if asked.return_token_strs:
        answer["token_strs"] = await asyncio.to_thread(lambda: [backend.token_texts.text(i) for i in ids])
    return JSONResponse(answer)


async def detokenize(request: Request) -> Response:
    """Text of token ids; special tokens have none."""
    backend = record_of(request).backend
    asked = parse_request(DetokenizeRequest, await read_body(request, backend.settings.max_body_bytes))
    check_model(asked.model, backend)
    backend.require_tokenizer("tokens")
    ids = await backend.encode("tokens", asked.tokens, may_be_empty=True)
    text = await asyncio.to_thread(backend.decode, ids) if len(ids) > _LONG else backend.decode(ids)
    return JSONResponse({"prompt": text})
