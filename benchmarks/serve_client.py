"""A client that costs a few system calls per event, and so takes next to nothing from a server on the same machine.

One thread, one connection per request, no HTTP library: a response ends where the server closes the connection, and an
event of a stream is counted where a line begins with `data: {`. Bodies are taken apart only after a measurement.
"""

from __future__ import annotations

import json
import selectors
import socket
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from yunmin.errors import YunminError

_EVENT = b"\ndata: {"  # within JSON a line break is escaped, and a chunk's length ends with one
_DONE = b"\ndata: [DONE]"
_RECEIVED_BYTES = 1 << 18
_CONNECT_S = 10.0
_POLL_S = 0.2


@dataclass(frozen=True)
class Request:
    """What to send.

    Attributes:
        path: of the URL.
        body: sent as JSON, or as it is where it is bytes; None for no body.
        method: of HTTP.
        leave_after: events after which the connection is closed; 0 stays to the end.
    """

    path: str
    body: Any = None
    method: str = "POST"
    leave_after: int = 0

    def encode(self, host: str) -> bytes:
        """As HTTP/1.1 puts it on the wire."""
        body = self.body if isinstance(self.body, bytes) else b"" if self.body is None else _compact(self.body)
        head = [f"{self.method} {self.path} HTTP/1.1", f"Host: {host}", "Connection: close"]
        if self.body is not None:
            head += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        return "\r\n".join([*head, "", ""]).encode() + body


@dataclass(eq=False)
class Exchange:
    """A request and what has come back of its response.

    Attributes:
        request: that was sent.
        sent: when, on `time.perf_counter`'s clock.
        ended: when the connection was closed; 0 before.
        moments: when each event came.
        received: every byte.
        failure: why the connection broke, or "".
    """

    request: Request
    sent: float
    ended: float = 0.0
    moments: list[float] = field(default_factory=list)
    received: bytearray = field(default_factory=bytearray)
    failure: str = ""

    def take(self, data: bytes, now: float) -> None:
        """Adds what has arrived."""
        begin = max(0, len(self.received) - len(_EVENT) + 1)
        self.received += data
        self.moments += [now] * self.received.count(_EVENT, begin)

    @property
    def first_event_s(self) -> float:
        """From sending to the first event, connecting included.

        Raises:
            YunminError: there was none.
        """
        if not self.moments:
            raise YunminError(f"{self.request.path}: expected a stream, found {self.explain()}")
        return self.moments[0] - self.sent

    @property
    def seconds(self) -> float:
        return self.ended - self.sent

    @property
    def status(self) -> int:
        """Of the response; 0 where there is none."""
        words = bytes(self.received[:32]).split(b" ", 2)
        return int(words[1]) if len(words) == 3 and words[1].isdigit() else 0

    @property
    def is_whole(self) -> bool:
        """Whether a stream came to its clean end."""
        return _DONE in self.received

    def body(self) -> bytes:
        """The response without its head and the lengths of its chunks.

        Raises:
            YunminError: something else is where a length should be.
        """
        head, _, rest = bytes(self.received).partition(b"\r\n\r\n")
        if b"transfer-encoding: chunked" not in head.lower():
            return rest
        found = []
        while rest:
            length, _, rest = rest.partition(b"\r\n")
            try:
                size = int(length.split(b";")[0] or b"0", 16)
            except ValueError:
                raise YunminError(f"{self.request.path}: expected a chunk's length, found {length[:40]!r}") from None
            found.append(rest[:size])
            rest = rest[size + 2 :]
        return b"".join(found)

    def json(self) -> dict[str, Any]:
        """The body of a response that is one JSON object.

        Raises:
            YunminError: it is none, or an error's.
        """
        try:
            value = json.loads(self.body())
        except ValueError:
            value = None
        if self.status // 100 != 2 or not isinstance(value, dict):
            raise YunminError(f"{self.request.method} {self.request.path}: {self.explain()}")
        return value

    def events(self) -> list[dict[str, Any]]:
        """The events of a stream, `[DONE]` left out."""
        lines = self.body().splitlines()
        frames = [line[6:] for line in lines if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]")]
        return [json.loads(frame) for frame in frames]

    def explain(self) -> str:
        """What came, in a few words."""
        if self.failure:
            return self.failure
        text = self.body()[:300].decode(errors="replace")
        return f"status {self.status}: {' '.join(text.split())}" if self.received else "an empty answer"


Script = Generator[Request, Exchange, None]


class Client:
    """Sends requests to one server and collects what comes back.

    Args:
        url: of the server, without a path.
    """

    def __init__(self, url: str) -> None:
        address = urlsplit(url)
        assert address.hostname is not None
        assert address.port is not None
        self._address = (address.hostname, address.port)
        self._host = address.netloc
        self._selector = selectors.DefaultSelector()
        self._open: dict[Exchange, socket.socket] = {}

    def start(self, request: Request) -> Exchange:
        """Sends a request; `turn` takes in what comes back. A refused connection is an exchange that has failed."""
        data = request.encode(self._host)
        exchange = Exchange(request, time.perf_counter())
        try:
            connection = socket.create_connection(self._address, timeout=_CONNECT_S)
        except OSError as error:
            exchange.failure, exchange.ended = f"connecting: {error}", time.perf_counter()
            return exchange
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            connection.sendall(data)
        except OSError as error:  # it may have answered and closed before it had read everything
            exchange.failure = f"sending: {error}"
        connection.setblocking(False)
        self._open[exchange] = connection
        self._selector.register(connection, selectors.EVENT_READ, exchange)
        return exchange

    def turn(self, limit_s: float = _POLL_S) -> list[Exchange]:
        """Waits for something to arrive, at most so long, and returns the exchanges that ended by it."""
        ended = []
        for key, _ in self._selector.select(limit_s):
            exchange: Exchange = key.data
            connection = self._open[exchange]
            try:
                data = connection.recv(_RECEIVED_BYTES)
            except BlockingIOError:
                continue
            except OSError as error:
                data, exchange.failure = b"", f"receiving: {error}"
            if data:
                exchange.take(data, time.perf_counter())
                leave_after = exchange.request.leave_after
                if not leave_after or len(exchange.moments) < leave_after:
                    continue
            self.leave(exchange)
            ended.append(exchange)
        return ended

    def leave(self, exchange: Exchange) -> None:
        """Closes the connection, whatever is still to come."""
        connection = self._open.pop(exchange, None)
        if connection is not None:
            self._selector.unregister(connection)
            connection.close()
            exchange.ended = time.perf_counter()
            if exchange.status:
                exchange.failure = ""  # a server that answers early may close before it has read everything

    def run_until(self, condition: Callable[[], bool], limit_s: float) -> None:
        """Takes in what comes until a condition holds.

        Raises:
            YunminError: it does not hold in time.
        """
        deadline = time.perf_counter() + limit_s
        while not condition():
            if time.perf_counter() > deadline:
                raise YunminError(f"the server did not answer {len(self._open)} requests within {limit_s:g} s")
            self.turn()

    def fetch(self, request: Request, limit_s: float = 600.0) -> Exchange:
        """Sends a request and waits for the end of its response."""
        exchange = self.start(request)
        self.run_until(lambda: bool(exchange.ended), limit_s)
        return exchange

    def gather(self, requests: Iterable[Request], limit_s: float = 600.0) -> list[Exchange]:
        """Sends requests at once and waits for the end of all responses."""
        exchanges = [self.start(request) for request in requests]
        self.run_until(lambda: all(exchange.ended for exchange in exchanges), limit_s)
        return exchanges

    def run_scripts(self, scripts: Iterable[Script], *, at_once: int, limit_s: float = 3600.0) -> None:
        """Runs generators that yield requests and get the exchanges, so many at once.

        Args:
            scripts: one after the other takes the place of one that has ended; read as places become free.
            at_once: places.
            limit_s: for all.

        Raises:
            YunminError: they have not ended in time.
        """
        deadline = time.perf_counter() + limit_s
        waiting = iter(scripts)
        running: dict[Exchange, Script] = {}
        self._fill(running, waiting, at_once)
        while running:
            if time.perf_counter() > deadline:
                raise YunminError(f"{len(running)} clients had not finished within {limit_s:g} s")
            self.turn()
            for exchange in [e for e in running if e.ended]:  # those that never connected, too
                script = running.pop(exchange)
                _go_on(self, script, exchange, running)
            self._fill(running, waiting, at_once)

    def close(self) -> None:
        """Leaves every open connection."""
        for exchange in list(self._open):
            self.leave(exchange)
        self._selector.close()

    def _fill(self, running: dict[Exchange, Script], waiting: Iterator[Script], at_once: int) -> None:
        while len(running) < at_once:
            script = next(waiting, None)
            if script is None:
                return
            _go_on(self, script, None, running)


def _go_on(client: Client, script: Script, exchange: Exchange | None, running: dict[Exchange, Script]) -> None:
    try:
        request = next(script) if exchange is None else script.send(exchange)
    except StopIteration:
        return
    running[client.start(request)] = script


def _compact(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
