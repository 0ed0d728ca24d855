"""Where every request enters and leaves: its id, its key, its line in the log, and errors nobody has thought of."""

from __future__ import annotations

import logging

from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.api.backend import Backend
from serving.api.failures import ApiError, internal_error
from serving.api.record import Record, new_record
from serving.api.request_log import log_request

logger = logging.getLogger("yunmin.serving")

CLIENT_LEFT = 499
EVERYTHING_ELSE = "/{path:path}"  # route of what no other route serves
_EXPOSED = ("X-Request-Id", "Retry-After")


class Gate:
    """ASGI middleware of the application whose `state.backend` serves.

    Args:
        app: what is behind it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._cors: tuple[str, CORSMiddleware] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        backend: Backend = scope["app"].state.backend
        origins = backend.settings.cors_origins
        if origins and any(name == b"origin" for name, _ in scope["headers"]):
            await self._with_cors(origins)(scope, receive, send)
        else:
            await self._serve(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        record = new_record(scope, scope["app"].state.backend)
        status = CLIENT_LEFT

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", record.id.encode())]
            await send(message)

        record.backend.users += 1
        try:
            await self._admit_and_pass(record, scope, receive, send_with_id)
        except ApiError as error:
            record.outcome = error.code
            await error.response()(scope, receive, send_with_id)
        except Exception:
            logger.exception("request %s: %s %s failed", record.id, scope["method"], scope["path"])
            record.outcome = "internal_error"
            if status != CLIENT_LEFT:  # the response has begun: all that is left is to end it unfinished
                raise
            await internal_error().response()(scope, receive, send_with_id)
        finally:
            record.backend.users -= 1
            route = scope.get("route")
            # refused before it was routed, the scope has BentoML's mount
            path = route.path if isinstance(route, Route) and route.path != EVERYTHING_ELSE else "other"
            record.backend.engine.metrics.http_requests.labels(path, status).inc()
            log_request(record, scope, status)

    async def _admit_and_pass(self, record: Record, scope: Scope, receive: Receive, send: Send) -> None:
        authorization = next(
            (value.decode("latin-1") for name, value in scope["headers"] if name == b"authorization"), None
        )
        record.key = record.backend.access.admit(scope["path"], authorization)
        if record.key is None:
            await self._app(scope, receive, send)
            return
        record.key.begin()
        try:
            await self._app(scope, receive, send)
        finally:
            record.key.end(record.prompt_tokens - record.cached_tokens + record.completion_tokens)

    def _with_cors(self, origins: str) -> CORSMiddleware:
        if self._cors is None or self._cors[0] != origins:
            self._cors = (
                origins,
                CORSMiddleware(
                    self._serve,
                    allow_origins=[origin.strip() for origin in origins.split(",")],
                    allow_methods=["GET", "POST", "PUT", "DELETE"],
                    allow_headers=["*"],
                    expose_headers=_EXPOSED,
                ),
            )
        return self._cors[1]
