"""Answers as streams of events: what is encoded once for all tokens, and how a stream ends."""

from __future__ import annotations

import json
import logging
import uuid
from collections import defaultdict
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response

from serving.api.failures import ApiError, api_error, internal_error
from serving.api.record import Record, record_of
from serving.api.run import Arrivals, Run
from serving.api.transport import EventStream, frame, while_connected
from yunmin.errors import YunminError
from yunmin.generate import Piece

logger = logging.getLogger("yunmin.serving")

DONE = b"data: [DONE]\n\n"
_SLOT = uuid.uuid4().hex  # stands for text that is not known yet
_encode = json.JSONEncoder(ensure_ascii=False).encode


class Events(Protocol):
    """How one endpoint writes its stream."""

    def opening(self) -> bytes:
        """Before the first piece."""
        ...

    def piece(self, index: int, piece: Piece) -> bytes:
        """One piece of a sequence, by its number; possibly nothing."""
        ...

    async def end(self, index: int, text: str) -> None:
        """Called with all text of a sequence before its last piece is written: saves what has to be saved."""
        ...

    def closing(self) -> bytes:
        """After the last piece of all."""
        ...

    def failure(self, error: ApiError) -> bytes:
        """In place of everything that would have followed."""
        ...


class TextFrame:
    """An event that is the same for every token but for one text in it.

    Args:
        event: with `TextFrame.SLOT` as the text.
        name: of the event, where the protocol has names.
    """

    SLOT = _SLOT

    def __init__(self, event: dict[str, Any], name: str | None = None) -> None:
        self._before, self._after = frame(event, name).split(f'"{_SLOT}"'.encode())

    def with_text(self, text: str) -> bytes:
        return self._before + self.encode(text) + self._after

    def with_text_and_number(self, text: str, field: str, number: int) -> bytes:
        """The same with one more field, which must be the last one of the event."""
        return b'%b%b%b,"%b":%d}\n\n' % (self._before, self.encode(text), self._after[:-3], field.encode(), number)

    @staticmethod
    def encode(text: str) -> bytes:
        """Text as JSON."""
        return _encode(text).encode()


async def event_stream(request: Request, run: Run, events: Events, stack: AsyncExitStack) -> Response:
    """A response that begins with the first piece, so that what fails before it still has a status of its own.

    Args:
        request: whose body has been read.
        run: what is generated.
        events: how it is written.
        stack: what the request holds until the stream ends; the response takes it over.
    """
    arrivals = run.arrivals()
    stack.push_async_callback(arrivals.aclose)
    first = await while_connected(request.receive, _first(arrivals))
    held = stack.pop_all()
    return EventStream(_frames(record_of(request), run, first, arrivals, events), held.aclose)


async def _first(arrivals: Arrivals) -> tuple[int, list[Piece]]:
    return await anext(arrivals)


async def _frames(
    record: Record, run: Run, first: tuple[int, list[Piece]], arrivals: Arrivals, events: Events
) -> AsyncGenerator[bytes]:
    try:
        texts: defaultdict[int, list[str]] = defaultdict(list)
        index, pieces = first
        data = events.opening()
        while True:
            for piece in pieces:
                texts[index].append(piece.text)
                if piece.finish_reason is not None:
                    await events.end(index, "".join(texts[index]))
                data += events.piece(index, piece)
            if data:
                yield data
                data = b""
            try:
                index, pieces = await anext(arrivals)
            except StopAsyncIteration:
                break
        if record.backend.settings.log_prompts:
            record.answer = ["".join(texts[index]) for index in sorted(texts)]
        run.close()  # the request's trace ends with the last byte
        yield events.closing()
    except (YunminError, ApiError) as error:
        known = error if isinstance(error, ApiError) else api_error(error)
        record.outcome = known.code
        run.close()
        yield events.failure(known)
    except Exception:
        logger.exception("request %s failed while it was streaming", record.id)
        record.outcome = "internal_error"
        run.close()
        yield events.failure(internal_error())
