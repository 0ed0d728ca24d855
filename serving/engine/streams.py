"""The two ends of one sequence: what the engine's thread works on, and what an asyncio caller reads."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from torch import Tensor

from yunmin.errors import YunminError
from yunmin.generate import Generation, Piece
from yunmin.state import MambaState


class QueueFullError(YunminError):
    """No slot is free and the queue is full.

    Attributes:
        retry_after_s: when a place may be free, as a whole number of seconds.
    """

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"every slot is busy and the queue is full, try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class DeadlineError(YunminError):
    """A request took longer than it may."""


class SequenceError(YunminError):
    """The model failed on this sequence."""


class EngineStoppedError(YunminError):
    """The engine is shutting down, or its thread has died."""


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
        decode_s = self.finished - self.first_token
        values = {
            "queue_ms": 1e3 * (self.admitted - self.submitted),
            "time_to_first_token_ms": 1e3 * (self.first_token - self.submitted),
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
        prompt_tokens: ids in the prompt.
        timings: when it arrived, was admitted, gave its first token and ended.
    """

    def __init__(self, generation: Generation, prompt_tokens: int, on_cancel: Callable[[], None]) -> None:
        self.generation = generation
        self.prompt_tokens = prompt_tokens
        self.timings = Timings()
        self.cancelled = False  # read by the engine's thread
        self._on_cancel = on_cancel
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Piece | YunminError] = asyncio.Queue()
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
        event = await self._events.get()
        if isinstance(event, YunminError):
            self._ended = True
            raise event
        self._ended = event.finish_reason is not None
        return event

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()

    def cancel(self) -> None:
        """Gives the slot back before the next step; nothing happens to a sequence that has ended."""
        if not self._ended:
            self._ended = self.cancelled = True
            self._on_cancel()

    def put(self, event: Piece | YunminError) -> None:
        """Called from the engine's thread."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:
            if not self._loop.is_closed():
                raise
            self.cancelled = True  # whoever waited is gone with its loop


@dataclass(eq=False)
class ActiveSequence:
    """A sequence as the engine's thread sees it.

    Attributes:
        stream: where its pieces go.
        prompt_ids: what is to be read.
        deadline: on `time.monotonic`'s clock.
        slot: in the pool, -1 before admission.
        read: prompt tokens read so far.
        state: of batch size 1, between two chunks of the prompt.
        next_id: token that the next step feeds.
        last_token: when the last token came, on `time.monotonic`'s clock.
    """

    stream: TokenStream
    prompt_ids: Sequence[int]
    deadline: float
    slot: int = -1
    read: int = 0
    state: MambaState | None = None
    next_id: int = -1
    last_token: float = 0.0

    def advance(self, logits: Tensor) -> Piece:
        """Samples the next token from logits (V,)."""
        piece = self.stream.generation.advance(logits)
        if piece.token_id is not None:
            self.next_id = piece.token_id
        return piece
