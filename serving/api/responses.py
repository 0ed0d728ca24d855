"""`/v1/responses`: OpenAI's responses, whose conversations are sessions."""

from __future__ import annotations

import time
from contextlib import AsyncExitStack
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serving.api.backend import Backend
from serving.api.conversation import ending_turns, read_conversation, require_template
from serving.api.failures import ApiError
from serving.api.logprobs import content_logprobs
from serving.api.models import check_model
from serving.api.protocol import parse_request
from serving.api.record import record_of
from serving.api.response_object import output_item, output_item_id, with_output
from serving.api.response_request import ResponseRequest
from serving.api.run import Asked, Run, text_of
from serving.api.stored_responses import Place, kept_message, place_for
from serving.api.streaming import TextFrame, event_stream
from serving.api.structured import constraint_of
from serving.api.transport import frame, read_body, while_connected
from yunmin.errors import RequestError
from yunmin.generate import Piece

_STATUS = {"stop": "completed", "length": "incomplete"}


async def create_response(request: Request) -> Response:
    """OpenAI's responses."""
    record = record_of(request)
    backend = record.backend
    settings = backend.settings
    asked = parse_request(ResponseRequest, await read_body(request, settings.max_body_bytes)).with_format()
    check_model(asked.model, backend)
    require_template(backend)
    try:
        constraint = await constraint_of(asked, backend)
    except RequestError as error:
        if error.field != "response_format" or asked.text is None:
            raise
        raise RequestError("text", str(error).removeprefix("response_format: ")) from None
    params = asked.sampling(
        asked.max_output_tokens,
        settings.max_tokens,
        default=settings.max_tokens,
        field="max_output_tokens",
        constraint=constraint,
        logprobs=asked.logprobs,
    )
    deadline_s = asked.deadline_s(settings.deadline_s)
    async with AsyncExitStack() as stack:
        place = await stack.enter_async_context(place_for(record, asked.previous_response_id, asked.store))
        instructions = [{"role": "system", "content": asked.instructions}] if asked.instructions else []
        place.messages.extend(asked.messages())
        if settings.log_prompts:
            record.prompt = [*instructions, *place.messages]
        conversation = await read_conversation(backend, [*instructions, *place.messages], place.start, "input")
        wanted = Asked(
            [conversation.token_ids],
            ending_turns(params, backend),
            deadline_s=deadline_s,
            priority=asked.priority or 0,
            turn_ends=conversation.turn_ends,
        )
        run = stack.enter_context(Run(record, wanted, conversation.after(place.start)))
        writer = _Writer(asked, run, place, backend)
        if asked.stream:
            return await event_stream(request, run, writer, stack)
        (pieces,) = await while_connected(request.receive, run.pieces())
        text = text_of(pieces)
        record.answer = [text]
        writer.note(pieces)
        await writer.end(0, text)
        return JSONResponse(writer.response())


class _Writer:
    """A response as JSON, whole or as events.

    Args:
        asked: the request.
        run: its sequence.
        place: where it is kept.
        backend: that generates.
    """

    def __init__(self, asked: ResponseRequest, run: Run, place: Place, backend: Backend) -> None:
        self._asked = asked
        self._run = run
        self._place = place
        self._texts = None if asked.logprobs is None else backend.token_texts
        self._created = int(time.time())
        self._model = backend.settings.served_name
        self._text = ""
        self._logprobs: list[dict[str, Any]] = []
        self._finish_reason = ""
        self._events = 0
        delta = self._event("response.output_text.delta", delta=TextFrame.SLOT, logprobs=[])
        del delta["sequence_number"]
        self._delta = TextFrame(delta, "response.output_text.delta")
        self._events = 0

    def note(self, pieces: list[Piece]) -> None:
        """Takes pieces in order."""
        for piece in pieces:
            self._finish_reason = piece.finish_reason or ""
        if self._texts is not None:
            self._logprobs += content_logprobs(self._texts, pieces)

    def response(self) -> dict[str, Any]:
        """The whole response, once it has ended."""
        return with_output(self._facts(), self._text, self._logprobs)

    def opening(self) -> bytes:
        item = output_item(self._place.id, "in_progress", "", [])
        begun = self._facts() | {"output": []}
        return b"".join(
            (
                self._named("response.created", response=begun),
                self._named("response.in_progress", response=begun),
                self._named("response.output_item.added", output_index=0, item=item | {"content": []}),
                self._named("response.content_part.added", part=item["content"][0]),
            )
        )

    def piece(self, index: int, piece: Piece) -> bytes:  # noqa: ARG002 (there is one sequence)
        before = len(self._logprobs)
        if self._texts is not None or piece.finish_reason is not None:
            self.note([piece])
        if not piece.text and len(self._logprobs) == before:
            return b""
        if self._texts is not None:
            return self._named("response.output_text.delta", delta=piece.text, logprobs=self._logprobs[before:])
        self._events += 1
        return self._delta.with_text_and_number(piece.text, "sequence_number", self._events - 1)

    async def end(self, index: int, text: str) -> None:  # noqa: ARG002
        self._text = text
        self._finish_reason = self._run.streams[0].generation.finish_reason or ""
        if self._place.start.lease is not None:
            await self._run.save([*self._place.messages, kept_message(text, self._facts())])

    def closing(self) -> bytes:
        response = self.response()
        item = response["output"][0]
        part = item["content"][0]
        return b"".join(
            (
                self._named("response.output_text.done", text=self._text, logprobs=self._logprobs),
                self._named("response.content_part.done", part=part),
                self._named("response.output_item.done", output_index=0, item=item),
                self._named(f"response.{response['status']}", response=response),
            )
        )

    def failure(self, error: ApiError) -> bytes:
        return self._named("error", code=error.code, message=str(error), param=error.param)

    def _named(self, name: str, **fields: Any) -> bytes:
        return frame(self._event(name, **fields), name)

    def _event(self, name: str, **fields: Any) -> dict[str, Any]:
        event: dict[str, Any] = {"type": name}
        if "delta" in fields or "text" in fields or "part" in fields:
            event |= {"item_id": output_item_id(self._place.id), "output_index": 0, "content_index": 0}
        event |= fields | {"sequence_number": self._events}
        self._events += 1
        return event

    def _facts(self) -> dict[str, Any]:
        """The response without its output."""
        asked = self._asked
        status = _STATUS.get(self._finish_reason, "in_progress")
        form = {"type": "text"} if asked.text is None or asked.text.format is None else asked.text.format
        return {
            "id": self._place.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "model": self._model,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": asked.instructions,
            "previous_response_id": asked.previous_response_id,
            "store": self._place.start.lease is not None,
            "max_output_tokens": asked.max_output_tokens,
            "temperature": 1.0 if asked.temperature is None else asked.temperature,
            "top_p": 1.0 if asked.top_p is None else asked.top_p,
            "text": {"format": form if isinstance(form, dict) else form.model_dump(by_alias=True, exclude_none=True)},
            "tools": [],
            "tool_choice": "none",
            "parallel_tool_calls": False,
            "truncation": "disabled",
            "metadata": asked.metadata or {},
            "usage": self._usage() if self._finish_reason else None,
        }

    def _usage(self) -> dict[str, Any]:
        usage = self._run.usage()
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }
