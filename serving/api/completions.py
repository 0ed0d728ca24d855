"""`/v1/completions`: OpenAI's completions."""

from __future__ import annotations

import asyncio
import time
import uuid
from contextlib import AsyncExitStack
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serving.api.backend import Backend
from serving.api.chunks import ChunkWriter
from serving.api.completion_request import CompletionRequest
from serving.api.logprobs import LegacyLogprobs, mean_logprob
from serving.api.models import check_model
from serving.api.protocol import parse_request
from serving.api.record import record_of
from serving.api.run import Asked, Run, require_room, text_of
from serving.api.start import start_of
from serving.api.streaming import event_stream
from serving.api.structured import constraint_of
from serving.api.transport import read_body, while_connected
from yunmin.generate import Piece

_DEFAULT_MAX_TOKENS = 16  # OpenAI's


async def completions(request: Request) -> Response:
    """OpenAI's completions."""
    record = record_of(request)
    backend = record.backend
    settings = backend.settings
    asked = parse_request(CompletionRequest, await read_body(request, settings.max_body_bytes))
    asked.check()
    check_model(asked.model, backend)
    if asked.logprobs is not None:
        backend.require_tokenizer("logprobs")
    ranked = asked.copies > asked.choices
    params = asked.sampling(
        asked.max_tokens,
        settings.max_tokens,
        default=_DEFAULT_MAX_TOKENS,
        constraint=await constraint_of(asked, backend),
        logprobs=0 if ranked and asked.logprobs is None else asked.logprobs,
    )
    deadline_s = asked.deadline_s(settings.deadline_s)
    async with AsyncExitStack() as stack:
        start = await stack.enter_async_context(start_of(record, asked, "text"))
        prompts = asked.prompts()
        require_room(len(prompts) * asked.copies, settings)  # before there may be very many to encode
        if settings.log_prompts:
            record.prompt = asked.prompt
        tails = await backend.encode_all("prompt", prompts, may_be_empty=bool(start.token_ids))
        wanted = Asked(
            [start.followed_by(tail) for tail in tails],
            params,
            copies=asked.copies,
            deadline_s=deadline_s,
            priority=asked.priority or 0,
            prompt_logprobs=asked.logprobs if asked.echo else None,
        )
        run = stack.enter_context(Run(record, wanted, start))
        writer = _Writer(asked, run, tails, backend)
        if asked.stream:
            return await event_stream(request, run, writer, stack)
        found = await while_connected(request.receive, run.pieces())
        await run.save()
        answer = await asyncio.to_thread(writer.whole, found) if asked.logprobs is not None else writer.whole(found)
        record.answer = [choice["text"] for choice in answer["choices"]]
        return JSONResponse(answer)


class _Writer(ChunkWriter):
    """Choices as JSON, whole or piece by piece.

    Args:
        asked: the request.
        run: its sequences.
        tails: token ids of each prompt.
        backend: that generates.
    """

    def __init__(self, asked: CompletionRequest, run: Run, tails: list[list[int]], backend: Backend) -> None:
        head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": backend.settings.served_name,
        }
        super().__init__(run, head, asked.stream_options)
        self._asked = asked
        self._tails = tails
        self._backend = backend
        self._logprobs: dict[int, LegacyLogprobs] = {}
        self._to_begin = set(range(len(run.streams))) if asked.echo or asked.logprobs is not None else set()

    def whole(self, found: list[list[Piece]]) -> dict[str, Any]:
        """The answer to a request that is not streamed.

        Args:
            found: pieces of each sequence.
        """
        choices: list[dict[str, Any]] = []
        for prompt in range(len(self._tails)):
            copies = list(range(prompt * self._asked.copies, (prompt + 1) * self._asked.copies))
            if self._asked.copies > self._asked.choices:
                copies.sort(key=lambda index: mean_logprob(found[index]), reverse=True)
            for index in copies[: self._asked.choices]:
                echo, logprobs = self._beginning(index)
                if logprobs is not None:
                    logprobs.add_pieces(found[index])
                shown = None if logprobs is None else logprobs.take()
                text = echo + text_of(found[index])
                choices.append(self.choice(len(choices), text, shown, found[index][-1].finish_reason))
        return self.head | {"choices": choices, "usage": self.run.usage()} | self.session()

    def choice(
        self, index: int, text: str, logprobs: dict[str, Any] | None, finish_reason: str | None
    ) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def before(self, index: int) -> bytes:
        if index not in self._to_begin:
            return b""
        self._to_begin.remove(index)
        echo, logprobs = self._beginning(index)
        if logprobs is not None:
            self._logprobs[index] = logprobs
        return self.frame(index, echo, None if logprobs is None else logprobs.take()) if echo else b""

    def logprobs(self, index: int, piece: Piece) -> dict[str, Any] | None:
        if index not in self._logprobs:
            return None
        self._logprobs[index].add_pieces([piece])
        return self._logprobs[index].take()

    def _beginning(self, index: int) -> tuple[str, LegacyLogprobs | None]:
        """What is shown of the prompt before a sequence, and the log-probabilities that begin with it."""
        prompt = index // self._asked.copies
        echo = ""
        if self._asked.echo:
            asked = self._asked.prompts()[prompt]
            echo = asked if isinstance(asked, str) else self._backend.decode(asked)
        if self._asked.logprobs is None:
            return echo, None
        logprobs = LegacyLogprobs(self._backend.token_texts)
        if self._asked.echo:
            found = self.run.leaders[prompt].prompt_logprobs
            logprobs.add_prompt(self._backend.require_tokenizer("logprobs"), self._tails[prompt], found)
        return echo, logprobs
