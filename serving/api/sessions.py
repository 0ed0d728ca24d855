"""The endpoints of sessions and of named states."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from serving.api.backend import Backend
from serving.api.protocol import ListOf, parse_request
from serving.api.record import backend_of, record_of
from serving.api.start import sessions_of
from serving.api.transport import read_body, while_connected
from serving.engine.job import Job
from serving.engine.streams import TokenStream
from serving.sessions.records import SessionRecord
from yunmin.errors import RequestError
from yunmin.sampling import SamplingParams
from yunmin.state import Snapshot

DEFAULT_PAGE = 20
LARGEST_PAGE = 100
STATE_MEDIA_TYPE = "application/octet-stream"
_ONLY_READ = SamplingParams(max_tokens=0)

Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]


class _SessionBody(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    ttl_s: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="seconds that it lives after it was last saved (the server's own)"
    )


class SessionRequest(_SessionBody):
    """Body of `POST /v1/sessions`; all of it may be left out."""

    prompt: str | None = Field(None, description="text to begin with")
    token_ids: ListOf[int] | None = Field(None, description="token ids to begin with, in place of a text")
    state: str | None = Field(None, description="named state to begin after, as `/v1/states` lists it")
    metadata: Metadata | None = Field(None, description="up to 16 texts of your own")


class ForkRequest(_SessionBody):
    """Body of `POST /v1/sessions/{id}/fork`; all of it may be left out."""

    position: int | None = Field(None, description="where the session must be, in tokens")
    metadata: Metadata | None = Field(None, description="up to 16 texts of your own (the session's)")


def session_json(record: SessionRecord, served_name: str, fingerprint: str) -> dict[str, Any]:
    """A session as clients see it."""
    return {
        "id": record.id,
        "object": "session",
        "position": record.position,
        "version": record.version,
        "created": int(record.created),
        "updated": int(record.updated),
        "expires": None if record.expires is None else math.ceil(record.expires),
        "parent": record.parent,
        "state_bytes": record.state_bytes,
        "metadata": dict(record.metadata),
        "model": served_name if record.fingerprint == fingerprint else None,
    }


async def create_session(request: Request) -> Response:
    """A new session: empty, after a named state, or after a prompt."""
    backend, sessions = backend_of(request), sessions_of(record_of(request))
    asked = parse_request(SessionRequest, await _body(request))
    _require_ttl(asked.ttl_s, backend)
    start = None if asked.state is None else sessions.named(asked.state)
    if asked.prompt is not None and asked.token_ids is not None:
        raise RequestError("token_ids", "give either prompt or token_ids, not both")
    field, prompt = ("prompt", asked.prompt or "") if asked.token_ids is None else ("token_ids", asked.token_ids)
    token_ids = await backend.encode(field, prompt, may_be_empty=True)
    snapshot = await _read_prompt(request, start, token_ids) if token_ids else start
    record = await sessions.create(snapshot, ttl_s=asked.ttl_s, metadata=asked.metadata)
    return _answer(backend, record, 201)


async def list_sessions(request: Request) -> Response:
    """The newest sessions, a page at a time."""
    backend = backend_of(request)
    limit = _page_limit(request)
    found = await sessions_of(record_of(request)).newest(limit + 1, request.query_params.get("before"))
    page = [session_json(r, backend.settings.served_name, backend.model.fingerprint) for r in found[:limit]]
    return JSONResponse({"object": "list", "data": page, "has_more": len(found) > limit})


async def show_session(request: Request) -> Response:
    """One session, with its conversation."""
    backend = backend_of(request)
    record = await sessions_of(record_of(request)).describe(_id(request))
    shown = session_json(record, backend.settings.served_name, backend.model.fingerprint)
    return JSONResponse(shown | {"messages": [dict(message) for message in record.messages]})


async def delete_session(request: Request) -> Response:
    """Removes a session."""
    await sessions_of(record_of(request)).delete(_id(request))
    return JSONResponse({"id": _id(request), "object": "session.deleted", "deleted": True})


async def fork_session(request: Request) -> Response:
    """A new session that begins where another is."""
    backend = backend_of(request)
    asked = parse_request(ForkRequest, await _body(request))
    _require_ttl(asked.ttl_s, backend)
    record = await sessions_of(record_of(request)).fork(
        _id(request), position=asked.position, ttl_s=asked.ttl_s, metadata=asked.metadata
    )
    return _answer(backend, record, 201)


async def download_state(request: Request) -> Response:
    """A session's state as a safetensors file."""
    record, data = await sessions_of(record_of(request)).download(_id(request))
    headers = {
        "Content-Disposition": f'attachment; filename="{record.id}.safetensors"',
        "X-Session-Position": str(record.position),
        "X-Session-Version": str(record.version),
    }
    return Response(data, media_type=STATE_MEDIA_TYPE, headers=headers)


async def upload_state(request: Request) -> Response:
    """Puts a state that was downloaded before, here or elsewhere, in the place of a session's."""
    sessions = sessions_of(record_of(request))
    data = await read_body(request, sessions.upload_limit_bytes)
    return _answer(backend_of(request), await sessions.upload(_id(request), data))


async def list_states(request: Request) -> Response:
    """The named states that requests may begin after."""
    states = sorted(sessions_of(record_of(request)).states.values(), key=lambda state: state.name)
    found = [
        {"id": state.name, "object": "state", "position": state.position, "state_bytes": state.size_bytes}
        for state in states
    ]
    return JSONResponse({"object": "list", "data": found})


SESSION_ROUTES = [
    Route("/v1/sessions", create_session, methods=["POST"]),
    Route("/v1/sessions", list_sessions, methods=["GET"]),
    Route("/v1/sessions/{id}", show_session, methods=["GET"]),
    Route("/v1/sessions/{id}", delete_session, methods=["DELETE"]),
    Route("/v1/sessions/{id}/fork", fork_session, methods=["POST"]),
    Route("/v1/sessions/{id}/state", download_state, methods=["GET"]),
    Route("/v1/sessions/{id}/state", upload_state, methods=["PUT"]),
    Route("/v1/states", list_states, methods=["GET"]),
]


async def _read_prompt(request: Request, start: Snapshot | None, token_ids: list[int]) -> Snapshot:
    backend, record = backend_of(request), record_of(request)
    prompt_ids = token_ids if start is None else [*start.token_ids, *token_ids]
    job = Job(prompt_ids, _ONLY_READ, backend.settings.deadline_s, start=start, keep=True)
    with backend.engine.submit(job) as stream:
        await while_connected(request.receive, _to_the_end(stream))
    record.prompt_tokens, record.cached_tokens = stream.prompt_tokens, stream.cached_tokens
    assert stream.snapshot is not None
    return stream.snapshot


async def _to_the_end(stream: TokenStream) -> None:
    async for _ in stream:
        pass


async def _body(request: Request) -> bytes:
    return await read_body(request, backend_of(request).settings.max_body_bytes) or b"{}"


def _id(request: Request) -> str:
    return str(request.path_params["id"])


def _require_ttl(ttl_s: float | None, backend: Backend) -> None:
    limit = backend.settings.session_ttl_s
    if ttl_s is not None and limit and ttl_s > limit:
        raise RequestError("ttl_s", f"must be at most {limit:g} on this server, got {ttl_s:g}")


def _page_limit(request: Request) -> int:
    for name in request.query_params:
        if name not in ("limit", "before"):
            raise RequestError(name[:80], "unknown parameter, expected limit or before")
    given = request.query_params.get("limit", str(DEFAULT_PAGE))
    if not (given.isascii() and given.isdecimal() and len(given) < 10 and 1 <= int(given) <= LARGEST_PAGE):
        raise RequestError("limit", f"must be an integer in 1..{LARGEST_PAGE}, got {given!r:.80}")
    return int(given)


def _answer(backend: Backend, record: SessionRecord, status: int = 200) -> Response:
    return JSONResponse(session_json(record, backend.settings.served_name, backend.model.fingerprint), status)
