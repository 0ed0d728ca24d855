"""Requests to a server: patience where it is busy, one line where it fails, and never the key."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import httpx
import pytest

from research.remote_model import RemoteModel
from research.server import Call, Server, ServerError
from tests.serving.fixtures import free_port
from yunmin.errors import ConfigError

KEY = "a-very-secret-key"
CALLS = [Call("/v1/x", {"number": number}) for number in range(5)]


def server(handler: Callable[[httpx.Request], httpx.Response], concurrency: int = 2) -> Server:
    return Server("http://test", KEY, concurrency, httpx.MockTransport(handler))


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that were waited for, none of which pass."""
    found: list[float] = []
    sleep = asyncio.sleep

    async def asleep(seconds: float) -> None:
        found.append(seconds)
        await sleep(0)

    monkeypatch.setattr("research.server.asyncio.sleep", asleep)
    return found


def test_answers_come_in_the_order_of_the_requests_with_the_key() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        assert request.headers["Authorization"] == f"Bearer {KEY}"
        return httpx.Response(200, content=request.content)

    done: list[int] = []
    assert server(handler).ask(CALLS, done.append) == [{"number": number} for number in range(5)]
    assert done == [1, 2, 3, 4, 5]


def test_no_more_sequences_than_asked_for_are_under_way() -> None:
    running, most = 0, 0

    async def handler(_: httpx.Request) -> httpx.Response:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001)
        running -= 1
        return httpx.Response(200, json={})

    found = Server("http://test", None, 8, httpx.MockTransport(handler))
    found.ask([Call("/x", {}, weight=4) for _ in range(9)])
    assert most == 2


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again_when_it_says(status: int, waits: list[float]) -> None:
    refusals = iter([{"Retry-After": "7"}, {}, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}])

    def handler(_: httpx.Request) -> httpx.Response:
        headers = next(refusals, None)
        return httpx.Response(200, json={"ok": 1}) if headers is None else httpx.Response(status, headers=headers)

    assert server(handler).ask(CALLS[:1]) == [{"ok": 1}]
    assert len(waits) == 3
    assert 7 <= waits[0] < 8
    assert waits[1] < 1 <= waits[2]


def test_a_server_that_stays_busy_is_given_up(waits: list[float]) -> None:
    def handler(_: httpx.Request) -> httpx.Response:
        return httpx.Response(429, json={"error": {"message": "the queue is full"}})

    with pytest.raises(ServerError, match=r"http://test/v1/x: status 429 after \d+ tries: the queue is full$"):
        server(handler).ask(CALLS)
    assert max(waits) <= 30


def _broken(_: httpx.Request) -> httpx.Response:
    raise httpx.RemoteProtocolError("peer closed connection without sending complete message body")


def _slow(_: httpx.Request) -> httpx.Response:
    raise httpx.ReadTimeout("")


@pytest.mark.parametrize(
    ("handler", "message"),
    [
        (_broken, "http://test/v1/x: the connection broke off: peer closed connection"),
        (_slow, "http://test/v1/x: the connection broke off: ReadTimeout"),
        (lambda _: httpx.Response(401, json={"error": {"message": "no key"}}), "http://test/v1/x: status 401: no key"),
        (lambda _: httpx.Response(500, text="<html>"), "http://test/v1/x: status 500: no reason given"),
        (lambda _: httpx.Response(307, headers={"Location": "http://other/"}), "http://test/v1/x: status 307: no"),
        (lambda _: httpx.Response(200, text='{"half": '), "http://test/v1/x: expected a JSON object, found"),
        (lambda _: httpx.Response(200, json=[1]), "http://test/v1/x: expected a JSON object, found"),
    ],
)
def test_every_failure_is_one_line_without_the_key(
    handler: Callable[[httpx.Request], httpx.Response], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises(ServerError) as caught:
        server(handler).ask(CALLS)
    assert str(caught.value).startswith(message)
    assert KEY not in str(caught.value) + caplog.text
    assert "\n" not in str(caught.value)


def test_a_server_that_is_not_there_is_named() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(ServerError, match=f"^{url}: nobody answers there: "):
        RemoteModel(url)


@pytest.mark.parametrize("answer", [{}, {"data": []}, {"data": [{"id": "gpt"}]}, {"data": 3}])
def test_a_server_of_another_kind_is_refused(answer: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="expected a server of this version of yunmin"):
        RemoteModel("http://test", transport=httpx.MockTransport(lambda _: httpx.Response(200, json=answer)))
