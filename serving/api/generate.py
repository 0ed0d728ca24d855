"""`/generate` and `/generate_stream`: this server's own requests, with token ids and timings."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Any

from pydantic import ConfigDict, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serving.api.failures import ApiError
from serving.api.protocol import GenerationBody, ListOf, parse_request
from serving.api.record import Record, record_of
from serving.api.run import Asked, Run, text_of
from serving.api.start import start_of
from serving.api.streaming import DONE, TextFrame, event_stream
from serving.api.structured import constraint_of
from serving.api.transport import frame, read_body, while_connected
from yunmin.errors import RequestError
from yunmin.generate import Piece


class GenerateRequest(GenerationBody):
    """Body of `/generate` and `/generate_stream`; exactly one of `prompt` and `token_ids`."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"prompt": "def main(", "max_tokens": 16, "temperature": 0}]}
    )

    prompt: str | None = Field(None, description="text to continue; with a session, what follows it")
    token_ids: ListOf[int] | None = Field(None, description="token ids to continue")
    max_tokens: int | None = Field(
        None, json_schema_extra={"minimum": 0}, description="most tokens to generate; 0 only reads the prompt"
    )

    def prompt_field(self) -> tuple[str, str | list[int]]:
        """The name and value of the prompt.

        Raises:
            RequestError: there is none, or there are two.
        """
        if self.prompt is not None and self.token_ids is not None:
            raise RequestError("token_ids", "give either prompt or token_ids, not both")
        if self.token_ids is not None:
            return "token_ids", self.token_ids
        if self.prompt is None:
            raise RequestError("prompt", "is missing: give a prompt or token_ids")
        return "prompt", self.prompt


async def generate(request: Request) -> Response:
    """JSON in, JSON out."""
    record = record_of(request)
    async with AsyncExitStack() as stack:
        run = await _begin(request, record, stack)
        (pieces,) = await while_connected(request.receive, run.pieces())
        await run.save()
        answer = {"text": text_of(pieces), "token_ids": run.streams[0].generation.token_ids}
        record.answer = [answer["text"]]
        return JSONResponse(answer | _ending(run, pieces[-1]))


async def generate_stream(request: Request) -> Response:
    """JSON in, an event per token out."""
    record = record_of(request)
    async with AsyncExitStack() as stack:
        run = await _begin(request, record, stack)
        return await event_stream(request, run, _Events(run), stack)


class _Events:
    def __init__(self, run: Run) -> None:
        self._run = run

    def opening(self) -> bytes:
        return b""

    def piece(self, index: int, piece: Piece) -> bytes:  # noqa: ARG002 (there is one sequence)
        if piece.finish_reason is None:
            # by far the most frequent event, so without a general encoder for all of it
            assert piece.token_id is not None
            return b'data: {"token_id":%d,"text":%b}\n\n' % (piece.token_id, TextFrame.encode(piece.text))
        return frame({"token_id": piece.token_id, "text": piece.text} | _ending(self._run, piece))

    async def end(self, index: int, text: str) -> None:  # noqa: ARG002
        await self._run.save()

    def closing(self) -> bytes:
        return DONE

    def failure(self, error: ApiError) -> bytes:
        return frame(error.body())


async def _begin(request: Request, record: Record, stack: AsyncExitStack) -> Run:
    backend = record.backend
    asked = parse_request(GenerateRequest, await read_body(request, backend.settings.max_body_bytes))
    deadline_s = asked.deadline_s(backend.settings.deadline_s)
    constraint = await constraint_of(asked, backend)
    params = asked.sampling(asked.max_tokens, backend.settings.max_tokens, constraint=constraint)
    start = await stack.enter_async_context(start_of(record, asked, "text"))
    field, prompt = asked.prompt_field()
    if backend.settings.log_prompts:
        record.prompt = prompt
    tail = await backend.encode(field, prompt, may_be_empty=bool(start.token_ids))
    wanted = Asked([start.followed_by(tail)], params, deadline_s=deadline_s, priority=asked.priority or 0)
    return stack.enter_context(Run(record, wanted, start))


def _ending(run: Run, last: Piece) -> dict[str, Any]:
    stream = run.streams[0]
    ending: dict[str, Any] = {
        "finish_reason": last.finish_reason,
        "usage": run.usage(),
        "timings": stream.timings.to_dict(len(stream.generation.token_ids)),
    }
    return ending if run.session is None else ending | {"session": run.session}
