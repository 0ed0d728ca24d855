from __future__ import annotations

import json
import socketserver
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from benchmarks.serve_client import Client, Exchange, Request, Script
from benchmarks.serve_parts import completion, require_whole, streams
from tests.serving.fixtures import free_port
from yunmin.errors import YunminError

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def event(text: str, reason: str | None = None) -> bytes:
    choice = {"text": text, "finish_reason": reason}
    return chunk(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")


END = chunk(b"data: [DONE]\n\n") + chunk(b"")
WHOLE = HEAD + event("\ndata: {a text like an event") + event("") + event("x", "length") + END


class Scripted:
    """A server that answers each request with the bytes that `reply` gives, and counts."""

    def __init__(self, reply: Callable[[bytes], bytes]) -> None:
        outer = self
        self.at_once = self.most_at_once = 0
        self._lock = threading.Lock()

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                with outer._lock:
                    outer.at_once += 1
                    outer.most_at_once = max(outer.most_at_once, outer.at_once)
                asked = self.rfile.readline()
                length = 0
                while (line := self.rfile.readline()) not in (b"\r\n", b""):
                    name, _, value = line.partition(b":")
                    if name.lower() == b"content-length":
                        length = int(value)
                asked += self.rfile.read(length)
                with outer._lock:
                    outer.at_once -= 1
                self.wfile.write(reply(asked))

        class Server(socketserver.ThreadingTCPServer):
            allow_reuse_address = True
            daemon_threads = True

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def scripted() -> Iterator[Callable[[Callable[[bytes], bytes]], tuple[Client, Scripted]]]:
    opened: list[tuple[Client, Scripted]] = []

    def start(reply: Callable[[bytes], bytes]) -> tuple[Client, Scripted]:
        server = Scripted(reply)
        opened.append((Client(server.url), server))
        return opened[-1]

    yield start
    for client, server in opened:
        client.close()
        server.server.shutdown()
        server.server.server_close()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50, 10**6])
def test_events_are_counted_however_they_are_cut(size: int) -> None:
    exchange = Exchange(Request("/"), 0.0)
    for begin in range(0, len(WHOLE), size):
        exchange.take(WHOLE[begin : begin + size], float(begin))
    assert len(exchange.moments) == 3
    assert exchange.moments == sorted(exchange.moments)
    assert [e["choices"][0]["text"] for e in exchange.events()] == ["\ndata: {a text like an event", "", "x"]
    assert exchange.status == 200
    assert exchange.is_whole
    require_whole(exchange)


@pytest.mark.parametrize(
    ("received", "message"),
    [
        (
            WHOLE.replace(END, chunk(b'data: {"error":{"message":"why"}}\n\n')),
            "expected a whole stream, found status 200",
        ),
        (HEAD + event("x") + event("", "stop") + END, "a stream that ends by its length, found 'stop'"),
        (b'HTTP/1.1 400 Bad Request\r\n\r\n{"error": "why"}', 'a whole stream, found status 400: {"error": "why"}'),
        (b"", "a whole stream, found an empty answer"),
    ],
)
def test_a_stream_that_ends_otherwise_is_refused(received: bytes, message: str) -> None:
    exchange = Exchange(Request("/v1/completions"), 0.0, received=bytearray(received))
    with pytest.raises(YunminError, match=message):
        require_whole(exchange)


def test_a_request_is_one_message_with_its_length() -> None:
    head, _, body = Request("/a", {"b": "ü"}).encode("h:1").partition(b"\r\n\r\n")
    assert json.loads(body) == {"b": "ü"}
    assert head.splitlines()[0] == b"POST /a HTTP/1.1"
    assert f"Content-Length: {len(body)}".encode() in head.splitlines()
    assert b"Connection: close" in head.splitlines()
    assert Request("/a", method="GET").encode("h:1").endswith(b"\r\n\r\n")
    assert Request("/a", b"{bad").encode("h:1").endswith(b"\r\n\r\n{bad")


def test_a_refused_connection_is_a_failed_exchange() -> None:
    client = Client(f"http://127.0.0.1:{free_port()}")
    exchange = client.fetch(Request("/"))
    assert "refused" in exchange.failure
    assert exchange.status == 0
    with pytest.raises(YunminError, match=r"^POST /: connecting: .*refused"):
        exchange.json()
    client.close()


def test_streams_are_counted_by_their_length(scripted: Any) -> None:
    client, _ = scripted(lambda _: WHOLE)
    found = streams(client, [completion("a", 3) for _ in range(5)], 3)
    assert found["events_per_token"] == 1.0
    assert found["tokens_per_s"] == pytest.approx(15 / found["seconds"])
    assert 0 < found["first_token_s"] < found["seconds"]


def test_a_client_leaves_after_so_many_events(scripted: Any) -> None:
    client, _ = scripted(lambda _: HEAD + event("a") * 1000)  # and no end
    exchange = client.fetch(Request("/", {}, leave_after=2))
    assert len(exchange.moments) >= 2
    assert not exchange.is_whole


def test_an_answer_that_is_no_object_is_an_error_with_its_status(scripted: Any) -> None:
    client, _ = scripted(lambda _: b"HTTP/1.1 404 Not Found\r\n\r\nnothing\nhere")
    with pytest.raises(YunminError, match=r"GET /x: status 404: nothing here"):
        client.fetch(Request("/x", method="GET")).json()


def test_scripts_take_each_others_places(scripted: Any) -> None:
    client, server = scripted(lambda asked: b'HTTP/1.1 200 OK\r\n\r\n{"n": ' + asked.rpartition(b"\n")[2] + b"}")
    seen: list[int] = []

    def script(n: int) -> Script:
        for step in range(3):
            answer = yield Request("/", 10 * n + step)
            seen.append(answer.json()["n"])

    client.run_scripts((script(n) for n in range(20)), at_once=4)
    assert sorted(seen) == [10 * n + step for n in range(20) for step in range(3)]
    assert [n for n in seen if n // 10 == 7] == [70, 71, 72]
    assert server.most_at_once <= 4


def test_a_server_that_does_not_answer_is_given_up(scripted: Any) -> None:
    release = threading.Event()

    def reply(_: bytes) -> bytes:
        release.wait(10)
        return b""

    client, _ = scripted(reply)
    with pytest.raises(YunminError, match=r"did not answer 1 requests within 0\.1 s"):
        client.fetch(Request("/"), limit_s=0.1)
    release.set()
