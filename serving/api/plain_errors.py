"""Errors of what lies around the application, in the shape of all others."""

from __future__ import annotations

from http import HTTPStatus

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.api.failures import ApiError

_PROBES = frozenset({"/livez", "/healthz", "/readyz"})


class PlainErrors:
    """ASGI middleware around BentoML's application, which answers paths that it does not pass on with plain text.

    Args:
        app: what is behind it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _PROBES:
            await self._app(scope, receive, send)
            return
        replaced: HTTPStatus | None = None

        async def send_in_shape(message: Message) -> None:
            nonlocal replaced
            if message["type"] == "http.response.start" and message["status"] >= HTTPStatus.BAD_REQUEST:
                kinds = [value for name, value in message["headers"] if name.lower() == b"content-type"]
                if kinds and kinds[0].startswith(b"text/plain"):
                    replaced = HTTPStatus(message["status"])
            if replaced is None:
                await send(message)
            elif message["type"] == "http.response.body" and not message.get("more_body", False):
                error = ApiError(replaced, replaced.phrase.lower(), code=replaced.name.lower())
                await error.response()(scope, receive, send)

        await self._app(scope, receive, send_in_shape)
