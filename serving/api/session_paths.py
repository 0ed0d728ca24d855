"""The part of the OpenAPI document that describes sessions and named states."""

from __future__ import annotations

from typing import Any

from serving.api.sessions import DEFAULT_PAGE, LARGEST_PAGE, STATE_MEDIA_TYPE, ForkRequest, SessionRequest

_REF = "#/components/schemas/{model}"
_INTEGER = {"type": "integer"}
_TEXT = {"type": "string"}
_BYTES = {"type": "string", "format": "binary"}
_SESSION = {
    "type": "object",
    "required": ["id", "object", "position", "version", "created", "updated", "expires", "parent", "state_bytes"],
    "properties": {
        "id": _TEXT,
        "object": {"const": "session"},
        "position": _INTEGER | {"description": "tokens read"},
        "version": _INTEGER | {"description": "1 when created, one more with each save"},
        "created": _INTEGER | {"description": "seconds since 1970"},
        "updated": _INTEGER | {"description": "seconds since 1970"},
        "expires": {"type": ["integer", "null"], "description": "seconds since 1970; null for never"},
        "parent": {"type": ["string", "null"], "description": "the session it was forked from"},
        "state_bytes": _INTEGER,
        "metadata": {"type": "object", "additionalProperties": _TEXT},
        "model": {"type": ["string", "null"], "description": "the served model; null where it belongs to another"},
        "messages": {"type": "array", "items": {"type": "object"}, "description": "of one session alone"},
    },
}
_FAILURES = {
    "400": "A field is missing, unknown or impossible; `param` names it",
    "404": "There is no such session, or it has expired; or there is no such state",
    "409": "Another request uses the session, it is elsewhere, or it belongs to another model; `code` says which",
    "413": "The body is too large",
    "429": "Every slot is busy and the queue is full; `Retry-After` says when to try again",
    "500": "What was stored is damaged",
    "503": "The engine is not running, or the store cannot be reached",
    "504": "Reading the prompt took longer than it may",
    "507": "The store is full",
}


def session_schemas() -> dict[str, Any]:
    """The bodies, by name."""
    bodies = {kind.__name__: kind.model_json_schema(ref_template=_REF) for kind in (SessionRequest, ForkRequest)}
    return {"Session": _SESSION, **bodies}


def session_paths() -> dict[str, Any]:
    """The endpoints, by path."""
    session = {"application/json": {"schema": {"$ref": _REF.format(model="Session")}}}
    one = [{"name": "id", "in": "path", "required": True, "schema": _TEXT}]
    page = [
        _query("limit", "how many", _INTEGER | {"minimum": 1, "maximum": LARGEST_PAGE, "default": DEFAULT_PAGE}),
        _query("before", "only sessions older than the one of this id", _TEXT),
    ]
    return {
        "/v1/sessions": {
            "get": _operation("The newest sessions first", "200", _list_of("Session"), "400 503")
            | {"parameters": page},
            "post": _operation("Begin a session", "201", session, "400 404 413 429 500 503 504 507")
            | {"requestBody": _json_body("SessionRequest")},
        },
        "/v1/sessions/{id}": {
            "parameters": one,
            "get": _operation("One session, with its conversation", "200", session, "404 500 503"),
            "delete": _operation("Remove a session", "200", {"application/json": {}}, "404 409 500 503"),
        },
        "/v1/sessions/{id}/fork": {
            "parameters": one,
            "post": _operation(
                "Begin a session where another is, which may be in use", "201", session, "400 404 409 413 500 503 507"
            )
            | {"requestBody": _json_body("ForkRequest")},
        },
        "/v1/sessions/{id}/state": {
            "parameters": one,
            "get": _operation(
                "Download the state, as safetensors", "200", {STATE_MEDIA_TYPE: {"schema": _BYTES}}, "404 409 500 503"
            ),
            "put": _operation(
                "Upload a state, in place of the one there", "200", session, "400 404 409 413 500 503 507"
            )
            | {"requestBody": {"required": True, "content": {STATE_MEDIA_TYPE: {"schema": _BYTES}}}},
        },
        "/v1/states": {
            "get": _operation("Named states, which requests may begin after", "200", {"application/json": {}}, "")
        },
    }


def _operation(summary: str, status: str, content: dict[str, Any], failures: str) -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": _REF.format(model="Error")}}}
    return {
        "summary": summary,
        "responses": {
            status: {"description": "OK", "content": content},
            **{number: {"description": _FAILURES[number], "content": error} for number in failures.split()},
        },
    }


def _query(name: str, description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "query", "description": description, "schema": schema}


def _json_body(model: str) -> dict[str, Any]:
    return {"content": {"application/json": {"schema": {"$ref": _REF.format(model=model)}}}}


def _list_of(model: str) -> dict[str, Any]:
    items = {"type": "array", "items": {"$ref": _REF.format(model=model)}}
    properties = {"object": {"const": "list"}, "data": items, "has_more": {"type": "boolean"}}
    return {"application/json": {"schema": {"type": "object", "properties": properties}}}
