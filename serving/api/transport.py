"""What HTTP needs here beyond Starlette: bounded bodies, work that ends when the client leaves, event streams."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serving.api.failures import ApiError
from serving.api.record import record_in

T = TypeVar("T")

_DRAIN_S = 2.0
_DRAIN_BODIES = 16


class ClientLeftError(Exception):
    """The client has closed the connection; nobody reads a response."""


async def read_body(request: Request, limit_bytes: int) -> bytes:
    """The whole body, refused as soon as it is known to be too large.

    Raises:
        ApiError: 413, 400 for a bad Content-Length, or 408 when it does not arrive as long as a request may take.
        ClientLeftError: the client left while sending.
    """
    declared = request.headers.get("content-length", "0")
    if not declared.isdecimal():
        raise ApiError(400, f"Content-Length must be a number, got {declared!r}", code="invalid_header")
    chunks: list[bytes] = []
    size, more = int(declared), True
    if size <= limit_bytes:
        size, longest_s = 0, record_in(request.scope).backend.settings.deadline_s
        try:
            async with asyncio.timeout(longest_s):
                while more and size <= limit_bytes:  # a chunked body declares no length
                    chunk, more = await _next_chunk(request)
                    size += len(chunk)
                    chunks.append(chunk)
        except TimeoutError:
            message = f"the body did not arrive within {longest_s:g} s"
            raise ApiError(408, message, code="request_timeout", headers={"Connection": "close"}) from None
    if size > limit_bytes:
        if more and "expect" not in request.headers:  # who expects to be told has sent nothing yet
            await _drain(request, limit_bytes * _DRAIN_BODIES)
        message = f"the body is larger than {limit_bytes} bytes"
        raise ApiError(413, message, code="body_too_large", headers={"Connection": "close"})
    return b"".join(chunks)


async def _next_chunk(request: Request) -> tuple[bytes, bool]:
    """Some of the body, and whether there is more."""
    message = await request.receive()
    if message["type"] == "http.disconnect":
        raise ClientLeftError
    return message.get("body", b""), message.get("more_body", False)


async def _drain(request: Request, limit_bytes: int) -> None:
    """Discards some of what is still coming: most clients read no response before they have sent their request."""
    size, more = 0, True
    with contextlib.suppress(asyncio.TimeoutError):
        async with asyncio.timeout(_DRAIN_S):
            while more and size < limit_bytes:
                chunk, more = await _next_chunk(request)
                size += len(chunk)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Runs `work`, and cancels it when the client leaves; the body must have been read.

    Raises:
        ClientLeftError: the client left first.
    """
    task = asyncio.ensure_future(work)
    departure = asyncio.ensure_future(_departure(receive))
    try:
        await asyncio.wait({task, departure}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeftError
        return task.result()
    finally:
        task.cancel()
        departure.cancel()
        await asyncio.gather(task, departure, return_exceptions=True)


async def _departure(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def frame(event: dict[str, Any], name: str | None = None) -> bytes:
    """One server-sent event, with its name where the protocol has names."""
    data = b"data: " + json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
    return data if name is None else b"event: " + name.encode() + b"\n" + data


class EventStream(Response):
    """A response of server-sent events.

    Args:
        frames: framed events; it reports its own errors as events, since the status has been sent by then.
        on_close: awaited when the last frame is sent or the client has left.
    """

    media_type = "text/event-stream"

    def __init__(self, frames: AsyncGenerator[bytes], on_close: Callable[[], Awaitable[None]]) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._frames = frames
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            longest_s = record_in(scope).backend.settings.deadline_s
            await while_connected(receive, self._send_all(send, longest_s))
        except ClientLeftError:
            record_in(scope).outcome = "client_left"
        finally:
            try:
                await self._frames.aclose()
            finally:
                await self._on_close()  # whatever happens, nothing stays held

    async def _send_all(self, send: Send, longest_s: float) -> None:
        """Sends the frames; a client that takes none of them for so long, and holds on to a session, has left."""
        try:
            async for data in self._frames:
                async with asyncio.timeout(longest_s):
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            raise ClientLeftError from None
