"""Requests of an offline batch through the server's application, without a socket, many at once and in order."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from typing import Any

from starlette.types import ASGIApp, Message

from serving.batch_files import JSON, Asked, Tally
from yunmin.errors import YunminError
from yunmin.terminal_bar import TerminalBar

_AHEAD = 8  # times as many requests as run at once may be answered before the first of them is
_RETRY_S = 0.05
_SAID_S = 10.0  # between two lines of progress where there is no terminal
_STOPPED = "engine_stopped"


class Caller:
    """Calls an ASGI application.

    Args:
        app: answers.
        salt: makes the ids of answers other ones than those of another file's.
        limit: requests under way at once.
    """

    def __init__(self, app: ASGIApp, salt: str, limit: int) -> None:
        self._app = app
        self._salt = salt
        self._limit = limit
        self._places = asyncio.Semaphore(limit)
        self._running = 0

    async def answer_in_order(self, requests: Iterator[Asked]) -> AsyncIterator[JSON]:
        """The answers, each once all before it are there; those further on are under way meanwhile.

        Raises:
            YunminError: the engine has stopped; the rest is not answered.
        """
        under_way: deque[asyncio.Task[JSON]] = deque()
        try:
            while True:
                while len(under_way) < _AHEAD * self._limit and (asked := next(requests, None)) is not None:
                    under_way.append(asyncio.create_task(self._answer(asked)))
                if not under_way:
                    return
                yield await under_way[0]
                under_way.popleft()
        finally:
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)

    async def _answer(self, asked: Asked) -> JSON:
        async with self._places:
            self._running += 1
            try:
                status, body = await self._call_until_let_in(asked)
            finally:
                self._running -= 1
        error = body.get("error") if isinstance(body, dict) else None
        if isinstance(error, dict) and error.get("code") == _STOPPED:
            raise YunminError(f"line {asked.number}: {error['message']}; the same command goes on from here")
        failure = None
        if status >= 500:  # the fault is not the request's
            told = error if isinstance(error, dict) else {}
            failure = {"code": told.get("code") or f"status_{status}", "message": told.get("message") or ""}
        return {
            "id": f"batch_req_{self._id('answer', asked)}",
            "custom_id": asked.custom_id,
            "response": {"status_code": status, "request_id": f"req_{self._id('request', asked)}", "body": body},
            "error": failure,
        }

    async def _call_until_let_in(self, asked: Asked) -> tuple[int, Any]:
        """Asks again while the queue is full of requests that leave it: one may take the places of several."""
        while True:
            is_alone = self._running == 1
            status, body = await call(self._app, asked.url, asked.body)
            if status != 429 or is_alone:
                return status, body
            await asyncio.sleep(_RETRY_S)

    def _id(self, kind: str, asked: Asked) -> str:
        """The same after a restart."""
        return hashlib.sha256(f"{self._salt} {kind} {asked.custom_id}".encode(errors="surrogatepass")).hexdigest()[:24]


async def call(app: ASGIApp, path: str, body: JSON) -> tuple[int, Any]:
    """One POST of JSON to an ASGI application: the status and the JSON that it answers with."""
    content = json.dumps(body).encode()
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())],
        "client": None,
        "server": None,
    }
    messages = iter([{"type": "http.request", "body": content, "more_body": False}])
    left = asyncio.Event()
    status = 0
    parts: list[bytes] = []

    async def receive() -> Message:
        if (message := next(messages, None)) is not None:
            return message
        await left.wait()  # this client never leaves before the answer
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        elif message["type"] == "http.response.body":
            parts.append(message.get("body", b""))

    try:
        await app(scope, receive, send)
    finally:
        left.set()
    return status, json.loads(b"".join(parts))


class Progress(TerminalBar):
    """A bar on a terminal where there is one to draw it with, a line now and then elsewhere; on stderr.

    Args:
        total: requests.
        tally: of answers, which grows.
    """

    def __init__(self, total: int, tally: Tally) -> None:
        super().__init__(
            after="{task.fields[rate]:,.0f} tokens/s ",
            shows_time_left=True,
            total=total,
            completed=tally.total,
            rate=0.0,
        )
        self._total = total
        self._tally = tally
        self._begin = self._said = time.monotonic()
        self._generated = tally.generated_tokens  # by an earlier run

    def show(self) -> None:
        """Says how far it is."""
        now = time.monotonic()
        rate = (self._tally.generated_tokens - self._generated) / max(now - self._begin, 1e-9)
        self.update(completed=self._tally.total, rate=rate)
        if not self.is_drawn and now - self._said >= _SAID_S:
            self._said = now
            self.line(f"yunmin: {self._tally.total:,} of {self._total:,}, {rate:,.0f} tokens/s")
