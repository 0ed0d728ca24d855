"""Clients that misbehave: nobody else notices."""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import time
from urllib.parse import urlsplit

import httpx
import pytest

from tests.serving.fixtures import Running

ENDLESS = {"prompt": "x", "max_tokens": 100_000, "temperature": 0}
SHORT = {"prompt": "x", "max_tokens": 3, "temperature": 0}


def connect(running: Running) -> socket.socket:
    address = urlsplit(running.url)
    return socket.create_connection((address.hostname, address.port), timeout=60)


def request(body: object, path: str = "/generate_stream") -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


def assert_still_serves(running: Running) -> None:
    running.wait_for("yunmin_running_sequences", 0)
    running.wait_for("yunmin_waiting_sequences", 0)
    assert httpx.post(f"{running.url}/generate", json=SHORT, timeout=60).status_code == 200
    assert running.process.poll() is None


@pytest.mark.slow
def test_two_hundred_connections_at_once_are_each_served_or_refused(running: Running) -> None:
    connections = [connect(running) for _ in range(200)]
    received = dict.fromkeys(connections, b"")
    with selectors.DefaultSelector() as selector, contextlib.ExitStack() as stack:
        for connection in connections:
            stack.enter_context(connection)
            connection.sendall(request(SHORT))
            connection.setblocking(False)
            selector.register(connection, selectors.EVENT_READ)
        end = time.monotonic() + 60
        while selector.get_map():
            assert time.monotonic() < end, f"{len(selector.get_map())} connections are still open"
            for key, _ in selector.select(1):
                assert isinstance(key.fileobj, socket.socket)
                data = key.fileobj.recv(1 << 16)
                received[key.fileobj] += data
                if not data:
                    selector.unregister(key.fileobj)
    served = [answer for answer in received.values() if answer.startswith(b"HTTP/1.1 200")]
    refused = [answer for answer in received.values() if answer.startswith(b"HTTP/1.1 429")]
    assert len(served) + len(refused) == 200
    assert served
    assert all(b"data: [DONE]" in answer for answer in served)
    assert all(b"\r\nretry-after: " in answer for answer in refused)
    assert_still_serves(running)


@pytest.mark.slow
def test_clients_that_vanish_at_any_moment_leave_nothing_behind(running: Running) -> None:
    content = request(ENDLESS)
    for cut in (0, 1, 30, len(content) - 1, len(content)):
        for pause_s in (0.0, 0.05):
            with connect(running) as connection:
                connection.sendall(content[:cut])
                time.sleep(pause_s)
                # a reset in place of a farewell
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    assert_still_serves(running)


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\0" * 1000,
    ],
)
def test_what_is_no_http_is_refused(running: Running, sent: bytes) -> None:
    with connect(running) as connection:
        with contextlib.suppress(OSError):  # it may have answered and left already
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while data := connection.recv(1 << 16):
                answer += data
    assert answer == b"" or answer.startswith((b"HTTP/1.1 4", b"HTTP/1.0 4"))
    assert_still_serves(running)
