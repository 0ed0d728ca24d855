"""The OpenAPI document of the endpoints."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from serving.api.access import OPEN_PATHS
from serving.api.admin import ReloadRequest
from serving.api.answers import SCHEMAS
from serving.api.chat_request import ChatRequest
from serving.api.completion_request import CompletionRequest
from serving.api.generate import GenerateRequest
from serving.api.response_request import ResponseRequest
from serving.api.session_paths import session_paths, session_schemas
from serving.api.tokens import DetokenizeRequest, TokenizeRequest
from yunmin import __version__

_REF = "#/components/schemas/{model}"
_BODIES: tuple[type[BaseModel], ...] = (
    GenerateRequest,
    CompletionRequest,
    ChatRequest,
    ResponseRequest,
    TokenizeRequest,
    DetokenizeRequest,
    ReloadRequest,
)
_FAILURES = {
    "400": "A field is missing, unknown or impossible; `param` names it",
    "401": "The API key is missing or wrong, where the server has keys",
    "404": "There is no such thing; `code` says what",
    "408": "The body did not arrive in time",
    "409": "The session is in use, elsewhere, of another kind or of another model; `code` says which",
    "413": "The body is too large",
    "429": "The queue is full, or the key has reached a limit; `Retry-After` says when to try again",
    "500": "The model failed on this sequence, or there is a fault in the server",
    "503": "The engine is not running, or the store of sessions cannot be reached",
    "504": "The request took longer than it may",
    "507": "The store of sessions is full",
}
_PROBED = {"200": "It is so", "503": "It is not"}
_GENERATING = "400 404 408 409 413 429 500 503 504 507"
_STREAM_EXAMPLE = (
    'data: {"token_id":312,"text":" hel"}\n\n'
    'data: {"token_id":45,"text":"lo","finish_reason":"length","usage":{"prompt_tokens":4,'
    '"completion_tokens":2,"total_tokens":6,"prompt_tokens_details":{"cached_tokens":0}},"timings":{"total_ms":31.2}}\n\n'
    "data: [DONE]\n\n"
)
_DESCRIPTION = (
    "Tokens of a Mamba language model over HTTP. A stream that fails ends with an event that has an `error`, and "
    "without `[DONE]`. Every response but those of the probes has an `X-Request-Id`, the request's own where it has "
    "one. Where the server has keys, all but the paths without `security` need one. Under `/admin/` the admin key "
    "alone is good."
)


def openapi_document() -> dict[str, Any]:
    """The document, as `/openapi.json` gives it and the page at `/docs` shows it."""
    schemas: dict[str, Any] = SCHEMAS | session_schemas()
    for model in _BODIES:
        schema = model.model_json_schema(ref_template=_REF)
        schemas |= schema.pop("$defs", {})
        schemas[model.__name__] = schema
    return {
        "openapi": "3.1.0",
        "info": {"title": "yunmin", "version": __version__, "description": _DESCRIPTION},
        "servers": [{"url": "."}],
        "paths": {path: _guarded(path, item) for path, item in (_paths() | session_paths()).items()},
        "components": {"schemas": schemas, "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}}},
    }


def _paths() -> dict[str, Any]:
    stream = {"example": _STREAM_EXAMPLE}
    events: dict[str, Any] = {"text/event-stream": {}}
    by_id = [{"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}]
    by_name = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]
    return {
        "/generate": {"post": _post(GenerateRequest, "Generate a whole text", _json("GenerateAnswer"))},
        "/generate_stream": {"post": _post(GenerateRequest, "Generate token by token", {"text/event-stream": stream})},
        "/v1/completions": {
            "post": _post(CompletionRequest, "OpenAI's completions", _json("CompletionAnswer") | events)
        },
        "/v1/chat/completions": {"post": _post(ChatRequest, "OpenAI's chat completions", _json("ChatAnswer") | events)},
        "/v1/responses": {"post": _post(ResponseRequest, "OpenAI's responses", _json("ResponseAnswer") | events)},
        "/v1/responses/{id}": {
            "parameters": by_id,
            "get": _operation("A response that was stored", _json("ResponseAnswer"), "404 500 503"),
            "delete": _operation("Forget a response", _json("ResponseDeleted"), "404 409 500 503"),
        },
        "/tokenize": {
            "post": _post(TokenizeRequest, "Token ids of a text", _json("TokenizeAnswer"), "400 404 408 413 500")
        },
        "/detokenize": {
            "post": _post(DetokenizeRequest, "Text of token ids", _json("DetokenizeAnswer"), "400 404 408 413 500")
        },
        "/v1/models": {"get": _operation("The served model", _json("ModelList"))},
        "/v1/models/{name}": {
            "parameters": by_name,
            "get": _operation("The served model, by name", _json("Model"), "404"),
        },
        "/admin/reload": {
            "post": _post(
                ReloadRequest,
                "Serve another artifact to new requests",
                _json("ReloadAnswer"),
                "400 404 408 409 413 500 503",
            )
            | {"security": [{"bearer": []}]}
        },
        "/metrics": {"get": _operation("Prometheus metrics", _plain())},
        "/health": {"get": _operation("The same as /readyz", {}, "503")},
        "/livez": {"get": _probe("Whether the process works")},
        "/healthz": {"get": _probe("The same as /livez")},
        "/readyz": {"get": _probe("Whether the model is loaded and taking requests")},
    }


def _guarded(path: str, item: dict[str, Any]) -> dict[str, Any]:
    """Adds what a key means for every operation of a path that needs one where the server has keys."""
    if path in OPEN_PATHS or path.endswith("z"):
        return item
    keyed = {}
    for method, operation in item.items():
        if method == "parameters":
            keyed[method] = operation
            continue
        failures = {status: _failure(status) for status in ("401", "429")}
        keyed[method] = {"security": [{}, {"bearer": []}]} | operation
        keyed[method]["responses"] = dict(sorted((failures | operation["responses"]).items()))
    return keyed


def _post(body: type[BaseModel], summary: str, content: dict[str, Any], failures: str = _GENERATING) -> dict[str, Any]:
    required = body is not ReloadRequest  # all of that may be left out
    return _operation(summary, content, failures) | {
        "requestBody": {"required": required, "content": _json(body.__name__)},
    }


def _operation(summary: str, content: dict[str, Any], failures: str = "") -> dict[str, Any]:
    return {
        "summary": summary,
        "responses": {
            "200": {"description": "OK", "content": content},
            **{status: _failure(status) for status in failures.split()},
        },
    }


def _probe(summary: str) -> dict[str, Any]:
    return {
        "summary": summary,
        "responses": {status: {"description": text, "content": _plain()} for status, text in _PROBED.items()},
    }


def _failure(status: str) -> dict[str, Any]:
    return {"description": _FAILURES[status], "content": _json("Error")}


def _json(model: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _REF.format(model=model)}}}


def _plain() -> dict[str, Any]:
    return {"text/plain": {"schema": {"type": "string"}}}
