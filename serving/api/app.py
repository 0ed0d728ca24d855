"""The HTTP endpoints: bytes to a validated request, a stream of pieces to a response."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Match, Route
from starlette.types import Scope

from serving.api.backend import Backend
from serving.api.failures import ApiError, api_error
from serving.api.gate import CLIENT_LEFT, Gate
from serving.api.openapi import PAGE, openapi_document
from serving.api.protocol import OPENAI_DEFAULT_MAX_TOKENS, CompletionRequest, GenerateRequest, parse_request
from serving.api.record import backend_of, record_of
from serving.api.sessions import SESSION_ROUTES
from serving.api.transport import DONE, ClientLeftError, EventStream, frame, read_body, while_connected
from serving.engine.job import Job
from serving.engine.streams import TokenStream
from yunmin.errors import RequestError, YunminError
from yunmin.generate import Piece
from yunmin.sampling import SamplingParams

Frames = Callable[[Piece], AsyncIterator[bytes]]
# BentoML answers these
_PROBES = frozenset({"/livez", "/healthz", "/readyz", "/metrics", "/schema.json"})


async def generate(request: Request) -> Response:
    """JSON in, JSON out."""
    stream = await _submit_generation(request)
    with stream:
        pieces = await while_connected(request.receive, _all_pieces(stream))
    return JSONResponse(
        {
            "text": "".join(piece.text for piece in pieces),
            "token_ids": stream.generation.token_ids,
            **_ending(stream, pieces[-1]),
        }
    )


async def generate_stream(request: Request) -> Response:
    """JSON in, an event per piece out."""
    stream = await _submit_generation(request)

    async def frames(first: Piece) -> AsyncIterator[bytes]:
        async for piece in _pieces_from(first, stream):
            event: dict[str, Any] = {"token_id": piece.token_id, "text": piece.text}
            yield frame(event if piece.finish_reason is None else event | _ending(stream, piece))

    return await _event_stream(request, stream, frames)


async def completions(request: Request) -> Response:
    """OpenAI's completions."""
    backend = _backend(request)
    asked = parse_request(CompletionRequest, await read_body(request, backend.settings.max_body_bytes))
    asked.check_supported()
    _check_model(asked.model, backend)
    default = min(OPENAI_DEFAULT_MAX_TOKENS, backend.settings.max_tokens)
    params = asked.sampling(backend.settings.max_tokens, default)
    stream = await _submit(backend, *asked.prompt_field(), params)
    head = {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": backend.settings.served_name,
    }

    def choice(text: str, finish_reason: str | None) -> dict[str, Any]:
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}

    if not asked.stream:
        with stream:
            pieces = await while_connected(request.receive, _all_pieces(stream))
        text = "".join(piece.text for piece in pieces)
        return JSONResponse(head | {"choices": [choice(text, pieces[-1].finish_reason)], "usage": _usage(stream)})
    include_usage = asked.stream_options is not None and asked.stream_options.include_usage

    async def frames(first: Piece) -> AsyncIterator[bytes]:
        no_usage: dict[str, Any] = {"usage": None} if include_usage else {}
        async for piece in _pieces_from(first, stream):
            if piece.text or piece.finish_reason is not None:
                yield frame(head | {"choices": [choice(piece.text, piece.finish_reason)]} | no_usage)
        if include_usage:
            yield frame(head | {"choices": [], "usage": _usage(stream)})

    return await _event_stream(request, stream, frames)


async def list_models(request: Request) -> Response:
    """The served model, as a list of one."""
    return JSONResponse({"object": "list", "data": [_model_record(_backend(request))]})


async def show_model(request: Request) -> Response:
    """The served model, by its name."""
    backend = _backend(request)
    _check_model(request.path_params["name"], backend)
    return JSONResponse(_model_record(backend))


async def document(_: Request) -> Response:
    return JSONResponse(openapi_document())


async def page(_: Request) -> Response:
    return HTMLResponse(PAGE)


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
        super().__init__("/{path:path}", unmatched)
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
    return await on_api_error(request, ApiError(error.status_code, error.detail, headers=error.headers))


async def on_client_left(request: Request, _: Exception) -> Response:
    record_of(request).outcome = "client_left"
    return Response(status_code=CLIENT_LEFT)  # for the logs alone


def create_app() -> Starlette:
    """The application; `app.state.backend` must be set before it serves."""
    return Starlette(
        routes=[
            Route("/generate", generate, methods=["POST"]),
            Route("/generate_stream", generate_stream, methods=["POST"]),
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/models", list_models, methods=["GET"]),
            Route("/v1/models/{name:path}", show_model, methods=["GET"]),
            *SESSION_ROUTES,
            Route("/", page, methods=["GET"]),
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


def _backend(request: Request) -> Backend:
    return backend_of(request)


async def _submit_generation(request: Request) -> TokenStream:
    backend = _backend(request)
    asked = parse_request(GenerateRequest, await read_body(request, backend.settings.max_body_bytes))
    params = asked.sampling(backend.settings.max_tokens)
    limit = backend.settings.deadline_s
    if asked.timeout_s is not None and not 0 < asked.timeout_s <= limit:  # NaN fails this, too
        raise RequestError("timeout_s", f"must be above 0 and at most {limit:g}, got {asked.timeout_s!r}")
    return await _submit(backend, *asked.prompt_field(), params, asked.timeout_s)


async def _submit(
    backend: Backend, field: str, prompt: str | list[int], params: SamplingParams, deadline_s: float | None = None
) -> TokenStream:
    """Validates the prompt and queues the sequence."""
    if params.stop and backend.model.tokenizer is None:
        raise RequestError("stop", "needs a tokenizer, and this model has none")
    token_ids = await backend.encode(field, prompt)
    return backend.engine.submit(Job(token_ids, params, deadline_s or backend.settings.deadline_s))


async def _all_pieces(stream: TokenStream) -> list[Piece]:
    return [piece async for piece in stream]


async def _pieces_from(first: Piece, stream: TokenStream) -> AsyncIterator[Piece]:
    yield first
    async for piece in stream:
        yield piece


async def _event_stream(request: Request, stream: TokenStream, frames: Frames) -> Response:
    """Waits for the first piece, so that what fails before it still has a status code of its own."""
    try:
        first = await while_connected(request.receive, anext(stream))
    except BaseException:
        stream.cancel()
        raise

    async def guarded() -> AsyncIterator[bytes]:
        try:
            async for data in frames(first):
                yield data
        except YunminError as error:
            yield frame(api_error(error).body())
            return  # without [DONE]: this is no clean end
        yield DONE

    return EventStream(guarded(), stream.cancel)


def _usage(stream: TokenStream) -> dict[str, int]:
    generated = len(stream.generation.token_ids)
    return {
        "prompt_tokens": stream.prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": stream.prompt_tokens + generated,
    }


def _ending(stream: TokenStream, last: Piece) -> dict[str, Any]:
    timings = stream.timings.to_dict(len(stream.generation.token_ids))
    return {"finish_reason": last.finish_reason, "usage": _usage(stream), "timings": timings}


def _check_model(name: str | None, backend: Backend) -> None:
    served = backend.settings.served_name
    if name is not None and name != served:
        raise ApiError(404, f"model: expected {served!r}, got {name!r}", param="model", code="model_not_found")


def _model_record(backend: Backend) -> dict[str, Any]:
    config = backend.model.config
    return {
        "id": backend.settings.served_name,
        "object": "model",
        "created": backend.created,
        "owned_by": "yunmin",
        "max_prompt_tokens": backend.settings.max_prompt_tokens,
        "max_tokens": backend.settings.max_tokens,
        "n_layers": config.n_layers,
        "vocabulary": config.n_tokens,
    }
