"""What a caller holds of one sequence: an asyncio iterator over its pieces, filled from the engine's thread."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import groupby
from types import TracebackType
from typing import Self

from yunmin.errors import YunminError
from yunmin.generate import Generation, Piece
from yunmin.sampler import TokenLogprob
from yunmin.state import Snapshot

Event = Piece | YunminError


@dataclass
class Timings:
    """When things happened to a sequence, on `time.monotonic`'s clock; 0 where they have not.

    Attributes:
        submitted, admitted, first_token, finished: seconds.
    """

    submitted: float = field(default_factory=time.monotonic)
    admitted: float = 0.0
    first_token: float = 0.0
    finished: float = 0.0

    def to_dict(self, generated_tokens: int) -> dict[str, float]:
        """Durations in milliseconds, and the rate of the decode phase, for a finished sequence."""
        first = self.first_token or self.finished  # a prompt that is only read has no first token
        decode_s = self.finished - first
        values = {
            "queue_ms": 1e3 * (self.admitted - self.submitted),
            "time_to_first_token_ms": 1e3 * (first - self.submitted),
            "decode_ms": 1e3 * decode_s,
            "total_ms": 1e3 * (self.finished - self.submitted),
        }
        if generated_tokens > 1 and decode_s > 0:
            values["decode_tokens_per_second"] = (generated_tokens - 1) / decode_s
        return {name: round(value, 3) for name, value in values.items()}


class TokenStream:
    """An asyncio iterator over the pieces of one sequence; leaving its `with` block cancels what still runs.

    Attributes:
        generation: what has been sampled so far; read it only after the last piece.
        prompt_tokens: ids in the prompt, those of a start included.
        cached_tokens: how many of them were not read again; known with the first piece.
        prompt_logprobs: of each token of the prompt, None for the first; where they were asked for.
        snapshot: the sequence after its last token, where it was to be kept; there before the last piece.
        timings: when it arrived, was admitted, gave its first token and ended.
    """

    def __init__(self, generation: Generation, prompt_tokens: int, on_cancel: Callable[[], None]) -> None:
        self.generation = generation
        self.prompt_tokens = prompt_tokens
        self.cached_tokens = 0
        self.prompt_logprobs: list[TokenLogprob | None] = []
        self.snapshot: Snapshot | None = None
        self.timings = Timings()
        self.cancelled = False  # read by the engine's thread
        self._on_cancel = on_cancel
        self._loop = asyncio.get_running_loop()
        self._events: deque[Event] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._ended = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Piece:
        """The next piece; the last one has a finish reason.

        Raises:
            YunminError: why the sequence ended before its time.
        """
        if self._ended:
            raise StopAsyncIteration
        while not self._events:
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
            if self._ended:  # cancelled meanwhile
                raise StopAsyncIteration
        event = self._events.popleft()
        if isinstance(event, YunminError):
            self._ended = True
            raise event
        self._ended = event.finish_reason is not None
        return event

    def ready(self) -> list[Piece]:
        """Takes the further pieces that are there already, without waiting; an error stays for the next `anext`."""
        pieces: list[Piece] = []
        while self._events and not self._ended and isinstance(event := self._events[0], Piece):
            self._events.popleft()
            self._ended = event.finish_reason is not None
            pieces.append(event)
        return pieces

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()

    def cancel(self) -> None:
        """Gives the slot back before the next step; nothing happens to a sequence that has ended.

        Whoever waits for the next piece is told that there is none.
        """
        if not self._ended:
            self._ended = self.cancelled = True
            self._wake()
            self._on_cancel()

    def _take(self, event: Event) -> None:
        """Called on the event loop."""
        self._events.append(event)
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Outbox:
    """Collects events in the engine's thread and hands them over together: one wake-up of the event loop per turn."""

    def __init__(self) -> None:
        self._events: list[tuple[TokenStream, Event]] = []

    def put(self, stream: TokenStream, event: Event) -> None:
        self._events.append((stream, event))

    def flush(self) -> None:
        events, self._events = self._events, []
        for loop, group in groupby(events, lambda pair: pair[0]._loop):  # nearly always one
            pairs = list(group)
            try:
                loop.call_soon_threadsafe(_deliver, pairs)
            except RuntimeError:
                if not loop.is_closed():
                    raise
                for stream, _ in pairs:
                    stream.cancelled = True  # whoever waited is gone with its loop


def _deliver(events: Iterable[tuple[TokenStream, Event]]) -> None:
    for stream, event in events:
        stream._take(event)
