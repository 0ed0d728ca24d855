"""Requests to a running server: many at a time, patient where it is busy, one line where it fails."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from yunmin.errors import ConfigError, MissingExtraError, YunminError

if TYPE_CHECKING:
    import httpx

_BUSY = frozenset({HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE})
_TRIES = 12
_LONGEST_WAIT_S = 30.0
_CONNECT_S = 10.0
_ANSWER_S = 900.0  # longer than a server lets a request take by default


class ServerError(YunminError):
    """A server is away, refuses a request, or fails."""


@dataclass(frozen=True)
class Call:
    """One request.

    Attributes:
        path: below the server's URL.
        body: sent as JSON; None asks with GET.
        weight: sequences that it runs.
    """

    path: str
    body: dict[str, Any] | None
    weight: int = 1


class Server:
    """A server at a URL.

    Args:
        url: without a path of ours.
        api_key: sent as a bearer key; in no error.
        concurrency: sequences under way at once.
        transport: an `httpx.AsyncBaseTransport` in place of the network; None for the network.

    Raises:
        ConfigError: a key that no header can have.
        MissingExtraError: httpx is not installed.
    """

    def __init__(self, url: str, api_key: str | None, concurrency: int, transport: Any = None) -> None:
        try:
            import httpx
        except ModuleNotFoundError:
            raise MissingExtraError("httpx", "research", "a model behind a URL") from None
        # httpx would show it in its own error
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise ConfigError("the server's API key: expected printable ASCII characters, found others")
        self.url = url
        self._api_key = api_key
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._concurrency = concurrency
        self._transport = transport
        self._verify = httpx.create_ssl_context() if url.startswith("https:") else False  # slow, so once

    def ask(self, calls: Sequence[Call], progress: Callable[[int], None] = lambda _: None) -> list[dict[str, Any]]:
        """The answers to requests, in their order.

        Args:
            calls: the requests.
            progress: told how many are answered.

        Raises:
            ServerError: the first that fails; the others are given up.
        """
        import httpx

        try:
            return asyncio.run(self._ask(calls, progress))
        except (httpx.InvalidURL, UnicodeError) as error:  # a host's name that cannot be one, text that is no Unicode
            raise ServerError(f"{self.url}: cannot be asked: {_reason(error)}") from None

    async def _ask(self, calls: Sequence[Call], progress: Callable[[int], None]) -> list[dict[str, Any]]:
        import httpx

        most = max([self._concurrency // max((call.weight for call in calls), default=1), 1])
        room = asyncio.Semaphore(most)
        done = 0

        async def answer(call: Call) -> dict[str, Any]:
            nonlocal done
            async with room:
                found = await self._answer(client, call)
            done += 1
            progress(done)
            return found

        async with httpx.AsyncClient(
            base_url=self.url,
            headers=self._headers,
            timeout=httpx.Timeout(_ANSWER_S, connect=_CONNECT_S),
            limits=httpx.Limits(max_connections=most),
            transport=self._transport,
            verify=self._verify,
            trust_env=False,  # a key must not go through a proxy that nobody named here
        ) as client:
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(answer(call)) for call in calls]
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _answer(self, client: httpx.AsyncClient, call: Call) -> dict[str, Any]:
        import httpx

        method = "GET" if call.body is None else "POST"
        for attempt in range(_TRIES):
            try:
                response = await client.request(method, call.path, json=call.body)
            except httpx.ConnectError as error:
                raise ServerError(f"{self.url}: nobody answers there: {_reason(error)}") from None
            except httpx.RequestError as error:
                raise ServerError(f"{self.url}{call.path}: the connection broke off: {_reason(error)}") from None
            if response.status_code not in _BUSY or attempt == _TRIES - 1:
                return self._read(call, response)
            # by chance, too, or all who were refused together would come again together
            await asyncio.sleep(min(_LONGEST_WAIT_S, _asked_wait_s(response) + random.uniform(0, 0.1 * 2**attempt)))  # noqa: S311 (no secret)
        raise AssertionError  # the last attempt returns or raises

    def _read(self, call: Call, response: httpx.Response) -> dict[str, Any]:
        try:
            found = json.loads(response.content)
        except (ValueError, RecursionError):
            found = None
        if response.status_code != HTTPStatus.OK:
            error = found.get("error") if isinstance(found, dict) else None
            told = error.get("message") if isinstance(error, dict) else None
            times = f" after {_TRIES} tries" if response.status_code in _BUSY else ""
            raise ServerError(
                f"{self.url}{call.path}: status {response.status_code}{times}: "
                f"{self._shown(told) if told else 'no reason given'}"
            )
        if not isinstance(found, dict):
            raise ServerError(
                f"{self.url}{call.path}: expected a JSON object, found {self._shown(response.text)!r:.80}"
            )
        return found

    def _shown(self, told: object) -> str:
        """What a server said, in one line and without the key, should it have repeated that."""
        text = " ".join(str(told).split())
        return text.replace(self._api_key, "KEY") if self._api_key else text


def _asked_wait_s(response: httpx.Response) -> float:
    try:
        return max(0.0, float(response.headers.get("Retry-After", "0")))
    except ValueError:  # a date
        return 1.0


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
