"""Streams of chunks, as OpenAI's completions and chat completions send them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from serving.api.failures import ApiError
from serving.api.protocol import StreamOptions
from serving.api.run import Run
from serving.api.streaming import DONE, TextFrame
from serving.api.transport import frame
from yunmin.generate import Piece


class ChunkWriter(ABC):
    """Writes a run's choices as chunks with one head; the other half of `Events` is the endpoint's.

    Args:
        run: the sequences.
        head: fields of every chunk.
        options: what the stream adds.
    """

    def __init__(self, run: Run, head: dict[str, Any], options: StreamOptions | None) -> None:
        self.run = run
        self.head = head
        self._includes_usage = options is not None and options.include_usage
        self._continuous = options is not None and options.continuous_usage_stats
        self._generated = 0
        self._frames = [
            TextFrame(self._chunk(self.choice(index, TextFrame.SLOT, None, None))) for index in range(len(run.streams))
        ]

    @abstractmethod
    def choice(
        self, index: int, text: str, logprobs: dict[str, Any] | None, finish_reason: str | None
    ) -> dict[str, Any]:
        """One choice with some of its text."""

    @abstractmethod
    def logprobs(self, index: int, piece: Piece) -> dict[str, Any] | None:
        """Log-probabilities of a piece; None where they were not asked for."""

    def before(self, index: int) -> bytes:  # noqa: ARG002 (for those that need it)
        """What goes before a piece, if it is its choice's first."""
        return b""

    def opening(self) -> bytes:
        return b""

    def piece(self, index: int, piece: Piece) -> bytes:
        before = self.before(index)
        logprobs = self.logprobs(index, piece)
        self._generated += piece.token_id is not None
        if piece.finish_reason is None and logprobs is None and not self._continuous:
            return before + self._frames[index].with_text(piece.text) if piece.text else before
        return before + self.frame(index, piece.text, logprobs, piece.finish_reason)

    async def end(self, index: int, text: str) -> None:  # noqa: ARG002 (a session has one sequence)
        await self.run.save()

    def closing(self) -> bytes:
        if not self._includes_usage:
            return DONE
        return frame(self.head | {"choices": [], "usage": self.run.usage()}) + DONE

    def failure(self, error: ApiError) -> bytes:
        return frame(error.body())

    def frame(
        self, index: int, text: str, logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
    ) -> bytes:
        """A whole chunk."""
        return self.frame_of(self.choice(index, text, logprobs, finish_reason))

    def frame_of(self, choice: dict[str, Any]) -> bytes:
        """A whole chunk with a choice."""
        chunk = self._chunk(choice)
        return frame(chunk if choice["finish_reason"] is None else chunk | self.session())

    def session(self) -> dict[str, Any]:
        """What is told of the session, where there is one."""
        return {} if self.run.session is None else {"session": self.run.session}

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        chunk = self.head | {"choices": [choice]}
        if self._continuous:
            prompt_tokens = self.run.prompt_tokens
            return chunk | {
                "usage": {
                    "prompt_tokens": prompt_tokens,
                    "completion_tokens": self._generated,
                    "total_tokens": prompt_tokens + self._generated,
                }
            }
        return chunk | {"usage": None} if self._includes_usage else chunk
