"""`/v1/chat/completions`: OpenAI's chat completions."""

from __future__ import annotations

import time
import uuid
from contextlib import AsyncExitStack
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serving.api.backend import Backend
from serving.api.chat_request import ChatRequest
from serving.api.chunks import ChunkWriter
from serving.api.conversation import Conversation, ending_turns, read_conversation, require_template
from serving.api.logprobs import chat_logprobs
from serving.api.models import check_model
from serving.api.protocol import parse_request
from serving.api.record import record_of
from serving.api.run import Asked, Run, text_of
from serving.api.start import start_of
from serving.api.streaming import event_stream
from serving.api.structured import constraint_of
from serving.api.transport import read_body, while_connected
from yunmin.errors import RequestError
from yunmin.generate import Piece


async def chat_completions(request: Request) -> Response:
    """OpenAI's chat completions."""
    record = record_of(request)
    backend = record.backend
    settings = backend.settings
    asked = parse_request(ChatRequest, await read_body(request, settings.max_body_bytes))
    asked.check()
    check_model(asked.model, backend)
    require_template(backend)
    params = asked.sampling(
        asked.limit,
        settings.max_tokens,
        default=settings.max_tokens,
        field=asked.limit_field,
        constraint=await constraint_of(asked, backend),
        logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
    )
    deadline_s = asked.deadline_s(settings.deadline_s)
    async with AsyncExitStack() as stack:
        start = await stack.enter_async_context(start_of(record, asked, "conversation"))
        before = [] if start.lease is None else [dict(message) for message in start.lease.record.messages]
        messages = [*before, *(message.to_message() for message in asked.messages)]
        if settings.log_prompts:
            record.prompt = messages
        conversation = await read_conversation(backend, messages, start, "messages")
        begun = conversation.after(start)
        if asked.state is not None and begun.snapshot is None:
            raise RequestError("state", "the conversation, as the chat template renders it, does not begin with it")
        wanted = Asked(
            [conversation.token_ids],
            ending_turns(params, backend),
            copies=asked.copies,
            deadline_s=deadline_s,
            priority=asked.priority or 0,
            turn_ends=conversation.turn_ends,
        )
        run = stack.enter_context(Run(record, wanted, begun))
        writer = _Writer(asked, run, conversation, backend)
        if asked.stream:
            return await event_stream(request, run, writer, stack)
        found = await while_connected(request.receive, run.pieces())
        record.answer = [text_of(pieces) for pieces in found]
        await writer.end(0, record.answer[0])
        return JSONResponse(writer.whole(found))


class _Writer(ChunkWriter):
    """Choices as messages, whole or in deltas.

    Args:
        asked: the request.
        run: its sequences.
        conversation: that they answer.
        backend: that generates.
    """

    def __init__(self, asked: ChatRequest, run: Run, conversation: Conversation, backend: Backend) -> None:
        head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion.chunk" if asked.stream else "chat.completion",
            "created": int(time.time()),
            "model": backend.settings.served_name,
        }
        super().__init__(run, head, asked.stream_options)
        self._conversation = conversation
        self._texts = backend.token_texts if asked.logprobs else None

    def whole(self, found: list[list[Piece]]) -> dict[str, Any]:
        """The answer to a request that is not streamed.

        Args:
            found: pieces of each sequence.
        """
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": text_of(pieces), "refusal": None},
                "logprobs": None if self._texts is None else chat_logprobs(self._texts, pieces),
                "finish_reason": pieces[-1].finish_reason,
            }
            for index, pieces in enumerate(found)
        ]
        return self.head | {"choices": choices, "usage": self.run.usage()} | self.session()

    def opening(self) -> bytes:
        return b"".join(self.first_chunk(index) for index in range(len(self.run.streams)))

    def first_chunk(self, index: int) -> bytes:
        delta = {"role": "assistant", "content": "", "refusal": None}
        return self.frame_of({"index": index, "delta": delta, "logprobs": None, "finish_reason": None})

    def choice(
        self, index: int, text: str, logprobs: dict[str, Any] | None, finish_reason: str | None
    ) -> dict[str, Any]:
        delta = {"content": text} if text else {}
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}

    def logprobs(self, index: int, piece: Piece) -> dict[str, Any] | None:  # noqa: ARG002
        return None if self._texts is None else chat_logprobs(self._texts, [piece])

    async def end(self, index: int, text: str) -> None:  # noqa: ARG002 (a session has one sequence)
        await self.run.save([*self._conversation.messages, {"role": "assistant", "content": text}])
