"""The application: which path leads where, and what becomes of errors."""

from __future__ import annotations

import asyncio
import functools
import os
from http import HTTPStatus

from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, generate_latest, multiprocess
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Match, Route
from starlette.types import Scope

from serving.api.admin import reload
from serving.api.chat import chat_completions
from serving.api.completions import completions
from serving.api.failures import ApiError, api_error
from serving.api.gate import CLIENT_LEFT, EVERYTHING_ELSE, Gate
from serving.api.generate import generate, generate_stream
from serving.api.models import list_models, show_model
from serving.api.openapi import openapi_document
from serving.api.page import page_routes
from serving.api.record import backend_of, record_of
from serving.api.responses import create_response
from serving.api.sessions import SESSION_ROUTES
from serving.api.stored_responses import delete_response, show_response
from serving.api.tokens import detokenize, tokenize
from serving.api.transport import ClientLeftError
from yunmin.errors import YunminError

_FILES_OF_METRICS = "PROMETHEUS_MULTIPROC_DIR"
# BentoML answers these
_PROBES = frozenset({"/livez", "/healthz", "/readyz", "/schema.json"})


_document = functools.cache(openapi_document)  # making it holds up the event loop


async def document(_: Request) -> Response:
    return JSONResponse(_document())


async def health(request: Request) -> Response:
    """Readiness, at the path where load balancers and load generators look for it."""
    if not backend_of(request).engine.accepting:
        raise ApiError(503, "the engine does not take requests", code="engine_stopped")
    return Response()


async def metrics(request: Request) -> Response:
    """What Prometheus scrapes."""
    registry: CollectorRegistry = request.app.state.registry
    if _FILES_OF_METRICS in os.environ:  # as `bentoml serve` sets it, whose worker is another process
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    content = await asyncio.to_thread(generate_latest, registry)
    return Response(content, media_type=CONTENT_TYPE_LATEST)


async def unmatched(request: Request) -> Response:
    """404 or 405, in the shape of every other error."""
    allowed: set[str] = {"GET", "HEAD"} if request.url.path in _PROBES else set()
    for route in request.app.routes:
        if isinstance(route, Route) and route.matches(request.scope)[0] is Match.PARTIAL:
            allowed |= route.methods or set()
    if allowed:
        headers = {"Allow": ", ".join(sorted(allowed))}
        message = f"{request.method} is not allowed for {request.url.path}"
        raise ApiError(405, message, code="method_not_allowed", headers=headers)
    raise ApiError(404, f"no such path: {request.url.path}", code="not_found")


class _Unmatched(Route):
    """Matches what no other route does, but for the scripts of the page, which BentoML serves after us."""

    def __init__(self) -> None:
        super().__init__(EVERYTHING_ELSE, unmatched)
        self.methods = None  # every method

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        if scope["path"].startswith("/static_content/"):
            return Match.NONE, {}
        return super().matches(scope)


async def on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    record_of(request).outcome = error.code
    return error.response()


async def on_yunmin_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, YunminError)
    return await on_api_error(request, api_error(error))


async def on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = HTTPStatus(error.status_code).name.lower()
    return await on_api_error(request, ApiError(error.status_code, error.detail, code=code, headers=error.headers))


async def on_client_left(request: Request, _: Exception) -> Response:
    record_of(request).outcome = "client_left"
    return Response(status_code=CLIENT_LEFT)  # for the logs alone


def create_app() -> Starlette:
    """The application; `app.state.backend` must be set before it serves.

    `app.state.retiring` are the backends that a reload has replaced and that still answer requests.
    """
    app = Starlette(
        routes=[
            Route("/generate", generate, methods=["POST"]),
            Route("/generate_stream", generate_stream, methods=["POST"]),
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/chat/completions", chat_completions, methods=["POST"]),
            Route("/v1/responses", create_response, methods=["POST"]),
            Route("/v1/responses/{id}", show_response, methods=["GET"]),
            Route("/v1/responses/{id}", delete_response, methods=["DELETE"]),
            Route("/tokenize", tokenize, methods=["POST"]),
            Route("/detokenize", detokenize, methods=["POST"]),
            Route("/v1/models", list_models, methods=["GET"]),
            Route("/v1/models/{name:path}", show_model, methods=["GET"]),
            *SESSION_ROUTES,
            Route("/admin/reload", reload, methods=["POST"]),
            *page_routes(),
            Route("/metrics", metrics, methods=["GET"]),
            Route("/health", health, methods=["GET"]),
            Route("/openapi.json", document, methods=["GET"]),
            Route("/docs.json", document, methods=["GET"]),  # where BentoML has its own
            _Unmatched(),
        ],
        middleware=[Middleware(Gate)],
        exception_handlers={
            ApiError: on_api_error,
            YunminError: on_yunmin_error,
            HTTPException: on_http_error,
            ClientLeftError: on_client_left,
        },
    )
    app.state.registry = REGISTRY
    app.state.retiring = set()
    app.state.reloading = asyncio.Lock()
    app.state.retirements = set()
    return app
