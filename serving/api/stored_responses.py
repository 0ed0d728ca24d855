"""Responses that are kept: each is a session whose messages are the conversation and end with the response itself."""

from __future__ import annotations

import logging
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serving.api.conversation import Message
from serving.api.failures import ApiError
from serving.api.record import Record, record_of
from serving.api.response_object import with_output
from serving.api.start import Start, sessions_of
from serving.sessions.errors import SessionExpiredError, UnknownSessionError
from serving.sessions.manager import Sessions
from serving.sessions.records import SessionRecord
from yunmin.errors import YunminError

logger = logging.getLogger("yunmin.serving")

_PREFIX, _SESSION_PREFIX = "resp_", "sess_"
_KEPT = "response"  # key of the answer's message under which the rest of the response is kept
_METADATA = {"kind": "response"}


@dataclass(frozen=True)
class Place:
    """Where a response goes.

    Attributes:
        id: of the response.
        start: where its conversation has come to.
        messages: that were before.
    """

    id: str
    start: Start
    messages: list[Message]


@asynccontextmanager
async def place_for(record: Record, previous_id: str | None, store: bool | None) -> AsyncIterator[Place]:
    """A place for a new response; what is not saved when the block ends is removed.

    Args:
        record: of the request.
        previous_id: of the response it goes on after; None for a new conversation.
        store: whether it shall be kept; None for that where the server keeps sessions.

    Raises:
        ApiError: there is no such response to go on after.
    """
    keep = record.backend.sessions is not None if store is None else store
    if previous_id is None and not keep:
        yield Place(f"{_PREFIX}{uuid.uuid4().hex}", Start(), [])
        return
    sessions = sessions_of(record)
    if previous_id is None:
        own = await sessions.create(metadata=_METADATA)
    else:
        await _find(sessions, previous_id, "previous_response_id", 400)
        own = await sessions.fork(_session_id(previous_id), metadata=_METADATA)
    saved = False
    try:
        async with sessions.use(own.id) as lease:
            messages = [_plain(message) for message in lease.record.messages]
            before = lease.snapshot
            if before is not None:  # two that go on after the same one shall not draw the same
                before = replace(before, sampler_state=None)
            # a version that only this request has read is not worth saving
            start = Start(before, lease if keep else None)
            yield Place(_PREFIX + own.id.removeprefix(_SESSION_PREFIX), start, messages)
            saved = lease.record.version > own.version
    finally:
        if not saved:
            await _remove(sessions, own.id)


def kept_message(text: str, response: Mapping[str, Any]) -> Message:
    """The message that ends the conversation of a kept response."""
    facts = {name: value for name, value in response.items() if name != "output"}
    return {"role": "assistant", "content": text, _KEPT: facts}


async def show_response(request: Request) -> Response:
    """A kept response."""
    sessions, response_id = sessions_of(record_of(request)), request.path_params["id"]
    found = await _find(sessions, response_id, None, 404)
    last = found.messages[-1]
    return JSONResponse(with_output(last[_KEPT], last["content"]))


async def delete_response(request: Request) -> Response:
    """Forgets a kept response; those after it stay."""
    sessions, response_id = sessions_of(record_of(request)), request.path_params["id"]
    await _find(sessions, response_id, None, 404)
    await sessions.delete(_session_id(response_id))
    return JSONResponse({"id": response_id, "object": "response", "deleted": True})


async def _find(sessions: Sessions, response_id: str, field: str | None, status: int) -> SessionRecord:
    reason = "no such response"
    try:
        found = await sessions.describe(_session_id(response_id))
        if found.messages and _KEPT in found.messages[-1]:
            return found
    except UnknownSessionError:
        pass
    except SessionExpiredError:
        reason = "it has expired"
    where = "response" if field is None else field
    code = "response_not_found" if field is None else "previous_response_not_found"
    raise ApiError(status, f"{where}: {response_id[:64]!r}: {reason}", param=field, code=code)


def _session_id(response_id: str) -> str:
    if not response_id.startswith(_PREFIX):
        return ""
    return _SESSION_PREFIX + response_id.removeprefix(_PREFIX)


def _plain(message: Mapping[str, Any]) -> Message:
    return {name: value for name, value in message.items() if name != _KEPT}


async def _remove(sessions: Sessions, session_id: str) -> None:
    try:
        await sessions.delete(session_id)
    except YunminError as error:
        logger.warning("a response that was not finished is left over: %s", error)
