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
from serving.api.completion_request import CompletionRequest
from serving.api.failures import ApiError
from serving.api.logprobs import LegacyLogprobs, mean_logprob
from serving.api.models import check_model
from serving.api.protocol import parse_request
from serving.api.record import record_of
from serving.api.run import Asked, Run, text_of
from serving.api.start import start_of
from serving.api.streaming import DONE, TextFrame, event_stream
from serving.api.structured import constraint_of
from serving.api.transport import frame, read_body, while_connected
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
    async with AsyncExitStack() as stack:
        start = await stack.enter_async_context(start_of(record, asked, "text"))
        prompts = asked.prompts()
        if settings.log_prompts:
            record.prompt = asked.prompt
        tails = await backend.encode_all("prompt", prompts, may_be_empty=bool(start.token_ids))
        wanted = Asked(
            [start.followed_by(tail) for tail in tails],
            params,
            asked.copies,
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


class _Writer:
    """Choices as JSON, whole or piece by piece.

    Args:
        asked: the request.
        run: its sequences.
        tails: token ids of each prompt.
        backend: that generates.
    """

    def __init__(self, asked: CompletionRequest, run: Run, tails: list[list[int]], backend: Backend) -> None:
        self._asked = asked
        self._run = run
        self._tails = tails
        self._backend = backend
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": backend.settings.served_name,
        }
        self._includes_usage = asked.stream_options is not None and asked.stream_options.include_usage
        self._frames = [TextFrame(self._chunk(index, TextFrame.SLOT, None, None)) for index in range(len(run.streams))]
        self._logprobs: dict[int, LegacyLogprobs] = {}
        self._begun: set[int] = set()

    def whole(self, found: list[list[Piece]]) -> dict[str, Any]:
        """The answer to a request that is not streamed.

        Args:
            found: pieces of each sequence.
        """
        choices: list[dict[str, Any]] = []
        for prompt in range(len(self._tails)):
            copies = range(prompt * self._asked.copies, (prompt + 1) * self._asked.copies)
            best = sorted(copies, key=lambda index: -mean_logprob(found[index])) if self._is_ranked else copies
            for index in list(best)[: self._asked.choices]:
                echo, logprobs = self._beginning(index)
                if logprobs is not None:
                    logprobs.add_pieces(found[index])
                choices.append(
                    {
                        "index": len(choices),
                        "text": echo + text_of(found[index]),
                        "logprobs": None if logprobs is None else logprobs.take(),
                        "finish_reason": found[index][-1].finish_reason,
                    }
                )
        return self._head | {"choices": choices, "usage": self._run.usage()} | self._session()

    def opening(self) -> bytes:
        return b""

    def piece(self, index: int, piece: Piece) -> bytes:
        opening = b""
        if (self._asked.echo or self._asked.logprobs is not None) and index not in self._begun:
            self._begun.add(index)
            echo, logprobs = self._beginning(index)
            if logprobs is not None:
                self._logprobs[index] = logprobs
            if echo:
                shown = None if logprobs is None else logprobs.take()
                opening = frame(self._chunk(index, echo, shown, None))
        if piece.finish_reason is None and not self._logprobs:
            return opening + self._frames[index].with_text(piece.text) if piece.text else opening
        shown = None
        if index in self._logprobs:
            self._logprobs[index].add_pieces([piece])
            shown = self._logprobs[index].take()
        return opening + frame(self._chunk(index, piece.text, shown, piece.finish_reason))

    async def end(self, index: int) -> None:  # noqa: ARG002 (a session has one sequence)
        await self._run.save()

    def closing(self) -> bytes:
        if not self._includes_usage:
            return DONE
        return frame(self._head | {"choices": [], "usage": self._run.usage()}) + DONE

    def failure(self, error: ApiError) -> bytes:
        return frame(error.body())

    @property
    def _is_ranked(self) -> bool:
        return self._asked.copies > self._asked.choices

    def _beginning(self, index: int) -> tuple[str, LegacyLogprobs | None]:
        """What is shown of the prompt before a sequence, and the log-probabilities that begin with it."""
        prompt = index // self._asked.copies
        echo = ""
        if self._asked.echo:
            asked = self._asked.prompts()[prompt]
            echo = asked if isinstance(asked, str) else self._backend.decode(asked)
        if self._asked.logprobs is None:
            return echo, None
        texts, tokenizer = self._backend.token_texts, self._backend.model.tokenizer
        assert tokenizer is not None
        logprobs = LegacyLogprobs(texts)
        if self._asked.echo:
            leader = self._run.streams[prompt * self._asked.copies]
            logprobs.add_prompt(tokenizer, self._tails[prompt], leader.prompt_logprobs)
        return echo, logprobs

    def _chunk(
        self, index: int, text: str, logprobs: dict[str, Any] | None, finish_reason: str | None
    ) -> dict[str, Any]:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
        chunk = self._head | {"choices": [choice]} | ({"usage": None} if self._includes_usage else {})
        return chunk if finish_reason is None else chunk | self._session()

    def _session(self) -> dict[str, Any]:
        return {} if self._run.session is None else {"session": self._run.session}
