"""The OpenAPI document of the endpoints."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from serving.api.completion_request import CompletionRequest
from serving.api.generate import GenerateRequest
from serving.api.session_paths import session_paths, session_schemas
from yunmin import __version__

_REF = "#/components/schemas/{model}"
_ERRORS = {
    "400": "A field is missing, unknown or impossible; `param` names it",
    "404": "No such model",
    "413": "The body is too large",
    "429": "Every slot is busy and the queue is full; `Retry-After` says when to try again",
    "500": "The model failed on this sequence",
    "503": "The engine is not running",
    "504": "The request took longer than it may",
}
_ERROR_SCHEMA = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": "string", "nullable": True},
                "code": {"type": "string", "nullable": True},
            },
        }
    },
}
_GENERATION_EXAMPLE = {
    "text": " hello",
    "token_ids": [312, 45],
    "finish_reason": "length",
    "usage": {"prompt_tokens": 4, "completion_tokens": 2, "total_tokens": 6},
    "timings": {"queue_ms": 0.1, "time_to_first_token_ms": 21.3, "decode_ms": 9.8, "total_ms": 31.2},
}
_STREAM_EXAMPLE = (
    'data: {"token_id":312,"text":" hel"}\n\n'
    'data: {"token_id":45,"text":"lo","finish_reason":"length","usage":{"prompt_tokens":4,'
    '"completion_tokens":2,"total_tokens":6},"timings":{"total_ms":31.2}}\n\n'
    "data: [DONE]\n\n"
)
_COMPLETION_EXAMPLE = {
    "id": "cmpl-0123",
    "object": "text_completion",
    "created": 1735689600,
    "model": "artifact",
    "choices": [{"index": 0, "text": " hello", "finish_reason": "length", "logprobs": None}],
    "usage": {"prompt_tokens": 4, "completion_tokens": 2, "total_tokens": 6},
}


def openapi_document() -> dict[str, Any]:
    """The document, as `/openapi.json` gives it and the page at `/docs` shows it."""
    schemas: dict[str, Any] = {"Error": _ERROR_SCHEMA, **session_schemas()}
    for model in (GenerateRequest, CompletionRequest):
        schema = model.model_json_schema(ref_template=_REF)
        schemas |= schema.pop("$defs", {})
        schemas[model.__name__] = schema
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "yunmin",
            "version": __version__,
            "description": "Tokens of a Mamba language model over HTTP. A stream that fails ends with an event that "
            "has an `error`, and without `[DONE]`.",
        },
        "servers": [{"url": "."}],
        "paths": {
            "/generate": {"post": _post(GenerateRequest, "Generate a whole text", {"json": _GENERATION_EXAMPLE})},
            "/generate_stream": {"post": _post(GenerateRequest, "Generate piece by piece", {"sse": _STREAM_EXAMPLE})},
            "/v1/completions": {
                "post": _post(CompletionRequest, "OpenAI's completions, streamed or not", {"json": _COMPLETION_EXAMPLE})
            },
            "/v1/models": {"get": _get("The served model")},
            "/v1/models/{name}": {
                "get": _get("The served model, by name")
                | {"parameters": [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]}
            },
            **session_paths(),
            "/livez": {"get": _get("Whether the process works", {"503": "The engine has stopped"})},
            "/healthz": {"get": _get("The same as /livez", {"503": "The engine has stopped"})},
            "/readyz": {"get": _get("Whether the model is loaded and taking requests", {"503": "It is not"})},
            "/metrics": {"get": _get("Prometheus metrics")},
        },
        "components": {"schemas": schemas},
    }


def _post(body: type[BaseModel], summary: str, examples: dict[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if "json" in examples:
        content["application/json"] = {"example": examples["json"]}
    if "sse" in examples:
        content["text/event-stream"] = {"example": examples["sse"]}
    error = {"application/json": {"schema": {"$ref": _REF.format(model="Error")}}}
    return {
        "summary": summary,
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": _REF.format(model=body.__name__)}}},
        },
        "responses": {
            "200": {"description": "OK", "content": content},
            **{status: {"description": text, "content": error} for status, text in _ERRORS.items()},
        },
    }


def _get(summary: str, failures: dict[str, str] | None = None) -> dict[str, Any]:
    responses = {"200": "OK", **(failures or {})}
    return {"summary": summary, "responses": {status: {"description": text} for status, text in responses.items()}}
