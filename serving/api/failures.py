"""Errors as clients see them: a status code and OpenAI's error object."""

from __future__ import annotations

import http
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse, Response

from serving.engine.job import DeadlineError, EngineStoppedError, QueueFullError
from serving.sessions.errors import (
    DamagedSessionError,
    EmptySessionError,
    PositionError,
    SessionBusyError,
    SessionConflictError,
    SessionExpiredError,
    SessionTooLongError,
    StoreError,
    StoreFullError,
    UnknownSessionError,
    UnknownStateError,
    WrongModelError,
)
from yunmin.errors import RequestError, StateError, TokenizerError, YunminError

# the first that fits
_STATE_ERRORS: tuple[tuple[type[YunminError], int, str], ...] = (
    (UnknownSessionError, 404, "session_not_found"),
    (SessionExpiredError, 404, "session_expired"),
    (UnknownStateError, 404, "state_not_found"),
    (SessionBusyError, 409, "session_busy"),
    (SessionConflictError, 409, "session_conflict"),
    (PositionError, 409, "session_position"),
    (SessionTooLongError, 409, "session_too_long"),
    (EmptySessionError, 409, "session_empty"),
    (WrongModelError, 409, "session_wrong_model"),
    (DamagedSessionError, 500, "session_damaged"),
    (StateError, 400, "invalid_state"),
    (StoreFullError, 507, "session_store_full"),
    (StoreError, 503, "session_store_unavailable"),
)

_LONGEST_MESSAGE, _LONGEST_NAME = 1000, 200  # what was sent is told back in part only


class ApiError(Exception):
    """An error with everything a response needs.

    Attributes:
        status: HTTP status code.
        param: the offending field of the request, or None.
        code: for programs, or None.
        headers: to send beside the body.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(_cut(message, _LONGEST_MESSAGE))
        self.status = status
        self.param = None if param is None else _cut(param, _LONGEST_NAME)
        self.code = code
        self.headers = dict(headers or {})

    @property
    def kind(self) -> str:
        """OpenAI's `type` of an error with this status."""
        if self.status == http.HTTPStatus.TOO_MANY_REQUESTS:
            return "rate_limit_error"
        return "server_error" if self.status >= http.HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"

    def body(self) -> dict[str, Any]:
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return JSONResponse(self.body(), self.status, headers=self.headers)


def api_error(error: YunminError) -> ApiError:
    """How one of our own errors looks to a client."""
    match error:
        case RequestError():
            return ApiError(400, str(error), param=error.field, code="invalid_value")
        case TokenizerError():
            return ApiError(400, "prompt: this model has no tokenizer, give token ids", param="prompt")
        case QueueFullError():
            headers = {"Retry-After": str(error.retry_after_s)}
            return ApiError(429, str(error), code="queue_full", headers=headers)
        case DeadlineError():
            return ApiError(504, str(error), code="deadline_exceeded")
        case EngineStoppedError():
            return ApiError(503, str(error), code="engine_stopped")
    for kind, status, code in _STATE_ERRORS:
        if isinstance(error, kind):
            return ApiError(status, str(error), code=code)
    return ApiError(500, str(error), code="generation_failed")


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}..."


def internal_error() -> ApiError:
    """What a client may know of an error that nobody has thought of."""
    return ApiError(500, "internal error, the server's log has the reason", code="internal_error")
