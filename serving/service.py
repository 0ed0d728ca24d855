"""The BentoML service: `bentoml serve` and `bentoml build` find it through bentofile.yaml."""

from __future__ import annotations

import asyncio
import functools
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")  # before BentoML is imported

import bentoml
from bentoml._internal.configuration.containers import BentoMLContainer
from bentoml._internal.server.http import traffic
from bentoml.exceptions import BentoMLException
from opentelemetry import trace
from opentelemetry.instrumentation import asgi as instrumentation
from prometheus_client import REGISTRY
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.api.access import read_access
from serving.api.app import create_app
from serving.api.backend import Backend
from serving.api.chat_template import find_template
from serving.api.plain_errors import PlainErrors
from serving.api.request_log import set_up_log
from serving.engine.engine import Engine
from serving.launch import load_served, make_backend
from serving.sessions.manager import Sessions
from serving.sessions.opening import open_sessions
from serving.settings import read_settings, require_artifact
from serving.start import start_engine
from yunmin.errors import YunminError
from yunmin.language_model import LanguageModel

_app = create_app()


class _NoTimeout:
    """Stands in for BentoML's limit on the time to the first byte, which no setting leaves out.

    That one keeps a timer, and with it the request, for as long as the limit is, however soon it was answered: at a
    hundred requests a second they take hundreds of megabytes. The engine's own deadline answers better.
    """

    def __init__(self, app: ASGIApp, timeout: float) -> None:  # noqa: ARG002 (BentoML gives it)
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


class _FewerSpans(instrumentation.OpenTelemetryMiddleware):
    """BentoML's traces without a span per message: one per token is half of what the event loop does."""

    def __init__(self, app: ASGIApp, **options: Any) -> None:
        super().__init__(app, **options, exclude_spans=["receive", "send"])


# BentoML imports both where it puts an application together
traffic.TimeoutMiddleware = _NoTimeout
instrumentation.OpenTelemetryMiddleware = _FewerSpans  # type: ignore[misc, assignment]


@functools.cache
def served_model() -> LanguageModel:
    """The model that this process serves; loaded once.

    Raises:
        YunminError: it is missing or damaged, or another file that the settings name is.
    """
    settings = read_settings()
    read_access(settings)
    model = load_served(settings)
    find_template(settings.chat_template, model.folder)
    return model


@functools.cache
def served_sessions() -> Sessions:
    """The sessions that this process serves; opened once.

    Raises:
        YunminError: their store cannot be opened, or a named state does not belong to the model.
    """
    return open_sessions(served_model(), read_settings(), REGISTRY)


@bentoml.service(
    name="yunmin",
    workers=1,  # workers share no memory: one process, one engine
    resources={"gpu": 1},
    # its own metrics have a series for every path ever asked for, so that anyone could fill the memory; ours do not
    metrics={"enabled": False},
)
@bentoml.asgi_app(_app, path="/")
class MambaService:
    """Tokens of a Mamba language model over HTTP."""

    def __init__(self) -> None:
        settings = read_settings()
        model = served_model()
        set_up_log(settings)
        if isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):  # none is chosen yet
            trace.set_tracer_provider(BentoMLContainer.tracer_provider.get())
        sessions = served_sessions()
        _app.state.backend = make_backend(model, start_engine(model, settings, REGISTRY), settings, sessions)
        # nothing else holds on to a model that a reload replaces
        served_model.cache_clear()
        served_sessions.cache_clear()

    @bentoml.on_deployment  # type: ignore[untyped-decorator]  # BentoML is not followed by mypy
    @staticmethod
    def verify_artifact() -> None:
        """Runs once, before any worker starts: a bad artifact ends the command with one line."""
        from yunmin.artifact import is_artifact, read_manifest
        from yunmin.trained import load_trained

        try:
            settings = read_settings()
            artifact = require_artifact(settings)
            read_access(settings)
            if is_artifact(artifact):
                read_manifest(artifact)
            else:
                load_trained(artifact)
            find_template(settings.chat_template, Path(artifact))
        except YunminError as error:
            raise BentoMLException(str(error)) from None

    @bentoml.on_shutdown  # type: ignore[untyped-decorator]
    async def stop(self) -> None:
        for engine in running_engines():
            await asyncio.to_thread(engine.stop)
        sessions: Sessions = _app.state.backend.sessions
        await asyncio.to_thread(sessions.keeper.close)

    async def __is_alive__(self) -> bool:
        return running_engines()[0].is_alive

    async def __is_ready__(self) -> bool:
        return running_engines()[0].accepting


MambaService.add_asgi_middleware(PlainErrors)  # type: ignore[attr-defined]  # the decorator makes it a Service


def running_engines() -> list[Engine]:
    """The engine that takes this process's requests, and those before it that still answer some."""
    backends: list[Backend] = [_app.state.backend, *_app.state.retiring]
    return [backend.engine for backend in backends]


def create_asgi() -> ASGIApp:
    """The whole service, BentoML's middleware and probes included, for a server in this process."""
    app: ASGIApp = MambaService.to_asgi(is_main=True)  # type: ignore[attr-defined]  # the decorator makes it a Service
    return app
