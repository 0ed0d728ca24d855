"""What `yunmin serve` adds to uvicorn's HTTP: a request's line and headers end somewhere, and in time."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serving.api.failures import ApiError

MAX_HEAD_BYTES = 65_536
HEAD_S = 60.0


class Connection(HttpToolsProtocol):
    """One connection; anybody may open it, so nothing that comes before a key is checked may grow without bound."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head = False
        self._head_bytes = 0
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        was_in_head = self._in_head
        super().data_received(data)
        if not self._in_head or self.transport.is_closing():
            return
        if was_in_head:  # what came with the end of the request before is not this one's
            self._head_bytes += len(data)
        if self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(
                431, f"the request's line and headers are larger than {MAX_HEAD_BYTES} bytes", "head_too_large"
            )
        elif self._timer is None:
            self._expect_head()

    def on_message_begin(self) -> None:
        self._in_head = True
        self._head_bytes = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_waiting()
        super().on_headers_complete()

    def _expect_head(self) -> None:
        self._timer = self.loop.call_later(
            HEAD_S, self._refuse, 408, f"no request came within {HEAD_S:g} s", "request_timeout"
        )

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, status: int, message: str, code: str) -> None:
        self._stop_waiting()
        if self.transport.is_closing():
            return
        if not self._in_head:  # it has asked nothing
            self.transport.close()
            return
        body = json.dumps(ApiError(status, message, code=code).body()).encode()
        head = f"HTTP/1.1 {status} \r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
        self.transport.close()
