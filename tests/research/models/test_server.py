"""Requests to a server: patience where it is busy, one line where it fails, and never the key."""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from research.models.remote import RemoteModel
from research.models.server import Call, Server, ServerError
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

    monkeypatch.setattr("research.models.server.asyncio.sleep", asleep)
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


def _damaged(_: httpx.Request) -> httpx.Response:
    return httpx.Response(200, headers={"Content-Encoding": "gzip"}, content=b"no archive")


def _slow(_: httpx.Request) -> httpx.Response:
    raise httpx.ReadTimeout("")


@pytest.mark.parametrize(
    ("handler", "message"),
    [
        (_broken, "http://test/v1/x: the connection broke off: peer closed connection"),
        (_slow, "http://test/v1/x: the connection broke off: ReadTimeout"),
        (_damaged, "http://test/v1/x: the connection broke off: "),
        (lambda _: httpx.Response(200, text="[" * 100_000), "http://test/v1/x: expected a JSON object, found"),
        (lambda _: httpx.Response(401, json={"error": {"message": "no key"}}), "http://test/v1/x: status 401: no key"),
        (
            lambda _: httpx.Response(401, json={"error": {"message": f"unknown:\n{KEY}"}}),
            "http://test/v1/x: status 401: unknown: KEY",
        ),
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


@pytest.mark.parametrize("key", ["secret\nkey", "secret-schlüssel", "secret\udcff", "secret\x7f"])
def test_a_key_that_no_header_can_have_is_refused_unseen(key: str) -> None:
    with pytest.raises(ConfigError, match="expected printable ASCII") as caught:
        Server("http://test", key, 1)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://a..b", "http://" + "a" * 70, "http://test:80\x00"])
def test_a_host_s_name_that_is_none_is_one_line(url: str) -> None:
    with pytest.raises(ServerError) as caught:
        Server(url, None, 1).ask(CALLS[:1])
    assert "\n" not in str(caught.value)


FACTS = {"max_prompt_tokens": 100, "has_tokenizer": True, "end_of_text_id": 0}


def answering(answer: Any) -> RemoteModel:
    """A model behind a server that gives this answer to everything."""

    def handler(request: httpx.Request) -> httpx.Response:
        about = request.url.path == "/v1/models"
        return httpx.Response(200, content=json.dumps({"data": [FACTS]} if about else answer))

    return RemoteModel("http://test", transport=httpx.MockTransport(handler))


@pytest.mark.parametrize(
    "values", [[None, -1.0], [None, -1.0, -1.0, -1.0], [None, -1.0, None], [None, -1.0, math.nan], [None, -1.0, 0.5]]
)
def test_impossible_probabilities_change_no_figure(values: list[float | None]) -> None:
    logprobs = {"token_logprobs": values, "top_logprobs": [None, *({"x": -0.5} for _ in values[1:])]}
    with pytest.raises(ServerError, match="expected a log-probability, and the best one, for each of 3 tokens"):
        answering({"choices": [{"logprobs": logprobs}]}).score([[1, 2, 3]])


@pytest.mark.parametrize(
    "choice",
    [None, {}, {"logprobs": None}, {"logprobs": []}, {"logprobs": {}}, {"logprobs": {"token_logprobs": [None, -1]}}],
)
def test_an_answer_without_what_was_asked_for_is_one_line(choice: Any) -> None:
    model = answering({"choices": [choice]})
    with pytest.raises(ServerError, match=r"^http://test: expected"):
        model.score([[1, 2]])
    with pytest.raises(ServerError, match=r"^http://test: expected 1 choices with index and text"):
        model.complete(["x"], max_tokens=1)


@pytest.mark.parametrize("answer", [{}, {"tokens": "abc"}, {"tokens": [1, "2"]}, {"tokens": [1.5]}])
def test_token_ids_are_integers(answer: Any) -> None:
    with pytest.raises(ServerError, match=r"^http://test/tokenize: expected a list of token ids"):
        answering(answer).tokenizer.encoding("text")
