"""The whole application in this process, without a socket."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import httpx2  # what OpenAI's client is made with
import openai
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette

from serving.api.app import create_app
from serving.api.request_log import set_up_log
from serving.launch import make_backend
from serving.sessions.opening import open_sessions
from serving.settings import read_settings
from serving.start import start_engine
from tests.serving.engines import run
from yunmin.language_model import LanguageModel

JSON = dict[str, Any]


@asynccontextmanager
async def app_on(model: LanguageModel, **variables: str) -> AsyncIterator[Starlette]:
    """The application on a model, as the settings say.

    Args:
        model: to serve.
        **variables: settings as the environment gives them, without their prefix.
    """
    defaults = {"ARTIFACT": "tiny", "SLOTS": "2", "QUEUE": "8", "MAX_TOKENS": "1000", "PREFILL_CHUNK": "16"}
    settings = read_settings({f"YUNMIN_{name}": value for name, value in (defaults | variables).items()})
    registry = CollectorRegistry()
    sessions = open_sessions(model, settings, registry)
    app = create_app()
    app.state.registry = registry
    set_up_log(settings)
    app.state.backend = make_backend(model, start_engine(model, settings, registry), settings, sessions)
    try:
        yield app
    finally:
        app.state.backend.engine.stop()
        sessions.keeper.close()


def http_client(app: Starlette, key: str | None = None) -> httpx.AsyncClient:
    """A client of an application."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers)


def openai_client(app: Starlette, key: str = "none") -> openai.AsyncOpenAI:
    """OpenAI's client of an application."""
    http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app, raise_app_exceptions=False))
    return openai.AsyncOpenAI(base_url="http://test/v1", api_key=key, max_retries=0, http_client=http)


def serving(model: LanguageModel, body: Callable[[Starlette], Awaitable[None]], **variables: str) -> None:
    """Runs a test's body with an application on a model."""

    async def main() -> None:
        async with app_on(model, **variables) as app:
            await body(app)

    run(main())


def events_of(response: httpx.Response) -> list[JSON]:
    """The events of a stream that ended well."""
    assert response.status_code == 200, response.text
    *frames, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(frame.removeprefix("data: ")) for frame in frames]


def error_of(response: httpx.Response, status: int) -> JSON:
    """The error of a response that must be one."""
    assert response.status_code == status, response.text
    error: JSON = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error
