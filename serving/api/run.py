"""The sequences of one request, from the engine's queue to their last pieces."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

from serving.api.record import Record
from serving.api.start import Start
from serving.api.tracing import trace_run
from serving.engine.job import Job
from serving.engine.streams import TokenStream
from serving.settings import Settings
from yunmin.errors import RequestError, YunminError
from yunmin.generate import Piece
from yunmin.sampling import SamplingParams

_SEEDS = 2**63
Arrivals = AsyncGenerator[tuple[int, list[Piece]], None]


@dataclass(frozen=True)
class Asked:
    """What a request asks of the engine.

    Attributes:
        prompts: token ids of each prompt, those of the start included.
        params: how to sample.
        deadline_s: of all.
        copies: sequences of each prompt.
        priority: higher is served first.
        turn_ends: positions in the only prompt where turns of a conversation end.
        prompt_logprobs: alternatives to give per token of the prompts; None for no probabilities.
    """

    prompts: Sequence[Sequence[int]]
    params: SamplingParams
    deadline_s: float
    copies: int = 1
    priority: int = 0
    turn_ends: Sequence[int] = ()
    prompt_logprobs: int | None = None


class Run:
    """Sequences that run; leaving its `with` block cancels those that still do, and writes down what was used.

    Attributes:
        streams: prompt after prompt, the copies of each one after the other.
        copies: of each prompt.
        session: what to tell of the session, once it has been saved.

    Args:
        record: of the request.
        asked: what to run.
        start: where it goes on from.

    Raises:
        RequestError: more sequences than the server ever takes.
        YunminError: there is no room for them now.
    """

    def __init__(self, record: Record, asked: Asked, start: Start) -> None:
        backend = record.backend
        settings = backend.settings
        require_room(len(asked.prompts) * asked.copies, settings)
        self.copies = asked.copies
        self.session: dict[str, Any] | None = None
        self._closed = False
        self._record = record
        self._start = start
        self.streams: list[TokenStream] = []
        params = seeded_apart(asked.params, asked.copies)
        try:
            for prompt_ids in asked.prompts:
                job = Job(
                    prompt_ids,
                    asked.params,
                    asked.deadline_s,
                    start=start.snapshot,
                    keep=start.lease is not None,
                    priority=asked.priority,
                    turn_ends=asked.turn_ends,
                    prompt_logprobs=asked.prompt_logprobs,
                )
                self.streams += backend.engine.submit_all(job, params)
        except BaseException:
            self._cancel()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancels what still runs and notes what was used, for the log, the key's limits and the trace."""
        self._cancel()
        if self._closed:
            return
        self._closed = True
        record, leaders = self._record, self.leaders
        record.prompt_tokens = self.prompt_tokens
        record.cached_tokens = sum(stream.cached_tokens for stream in leaders)
        record.completion_tokens = self.completion_tokens
        if leaders and leaders[0].timings.finished:
            record.timings = leaders[0].timings.to_dict(len(leaders[0].generation.token_ids))
        trace_run(record, self.streams)

    @property
    def leaders(self) -> list[TokenStream]:
        """The first sequence of each prompt."""
        return self.streams[:: self.copies]

    @property
    def prompt_tokens(self) -> int:
        return sum(stream.prompt_tokens for stream in self.leaders)

    @property
    def completion_tokens(self) -> int:
        return sum(len(stream.generation.token_ids) for stream in self.streams)

    def usage(self) -> dict[str, Any]:
        """What was read and generated, in OpenAI's words; a prompt counts once, however many choices it has."""
        prompt_tokens, completion_tokens = self.prompt_tokens, self.completion_tokens
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(stream.cached_tokens for stream in self.leaders)},
        }

    async def save(self, messages: Sequence[Mapping[str, Any]] | None = None) -> None:
        """Saves the session, where there is one, when its sequence has ended and before its last piece is sent.

        Args:
            messages: the conversation by now; None for text.
        """
        lease = self._start.lease
        if lease is None:
            return
        snapshot = self.streams[0].snapshot
        assert snapshot is not None
        saved = await lease.commit(snapshot, messages)
        self.session = {"id": saved.id, "position": saved.position}

    async def pieces(self) -> list[list[Piece]]:
        """All pieces of all sequences."""
        return await asyncio.gather(*(_all_pieces(stream) for stream in self.streams))

    async def arrivals(self) -> Arrivals:
        """Pieces as they come: the sequence's number, and what is there of it."""
        if len(self.streams) == 1:
            stream = self.streams[0]
            async for piece in stream:
                yield 0, [piece, *stream.ready()]
            return
        arrived: asyncio.Queue[tuple[int, list[Piece] | BaseException | None]] = asyncio.Queue()

        async def pump(index: int, stream: TokenStream) -> None:
            try:
                async for piece in stream:
                    arrived.put_nowait((index, [piece, *stream.ready()]))
                arrived.put_nowait((index, None))
            except YunminError as error:
                arrived.put_nowait((index, error))

        pumps = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(self.streams)]
        try:
            left = len(pumps)
            while left:
                index, pieces = await arrived.get()
                if isinstance(pieces, BaseException):
                    raise pieces
                if pieces is None:
                    left -= 1
                else:
                    yield index, pieces
        finally:
            for task in pumps:
                task.cancel()

    def _cancel(self) -> None:
        for stream in self.streams:
            stream.cancel()


def require_room(sequences: int, settings: Settings) -> None:
    """Refuses more sequences than the server ever takes at a time.

    Raises:
        RequestError: there are more.
    """
    if sequences > (most := settings.slots + settings.queue):
        raise RequestError("n", f"at most {most} sequences per request on this server, got {sequences}")


def seeded_apart(params: SamplingParams, copies: int) -> list[SamplingParams]:
    """Parameters for each copy: the i-th draws with seed + i, so that it is repeatable and no other's twin."""
    if params.seed is None:
        return [params] * copies
    return [replace(params, seed=(params.seed + copy) % _SEEDS) for copy in range(copies)]


def text_of(pieces: Iterable[Piece]) -> str:
    """The text of a sequence."""
    return "".join(piece.text for piece in pieces)


async def _all_pieces(stream: TokenStream) -> list[Piece]:
    return [piece async for piece in stream]
