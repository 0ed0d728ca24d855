"""What the endpoints answer, as JSON schemas for the OpenAPI document."""

from __future__ import annotations

from typing import Any

_INTEGER = {"type": "integer", "minimum": 0}
_TEXT = {"type": "string"}
_NUMBER = {"type": "number"}
_FINISH = {"enum": ["stop", "length"]}


def _object(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "type": "object",
        "required": list(required),
        "properties": required | (optional or {}),
        "additionalProperties": False,
    }


def _list(items: Any) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


_TOKEN_LOGPROB = _object({"token": _TEXT, "logprob": _NUMBER, "bytes": _or_null(_list(_INTEGER))})
_TOKEN_LOGPROBS = _object(_TOKEN_LOGPROB["properties"] | {"top_logprobs": _list(_TOKEN_LOGPROB)})
_HEAD = {"id": _TEXT, "created": _INTEGER, "model": _TEXT}

SCHEMAS: dict[str, Any] = {
    "Error": _object(
        {
            "error": _object(
                {
                    "message": _TEXT,
                    "type": {"enum": ["invalid_request_error", "rate_limit_error", "server_error"]},
                    "param": _or_null(_TEXT | {"description": "the field that is at fault"}),
                    "code": _or_null(_TEXT | {"description": "for programs"}),
                }
            )
        }
    ),
    "Usage": _object(
        {
            "prompt_tokens": _INTEGER | {"description": "read, those of a session or state included"},
            "completion_tokens": _INTEGER,
            "total_tokens": _INTEGER,
            "prompt_tokens_details": _object(
                {"cached_tokens": _INTEGER | {"description": "of the prompt, not read again"}}
            ),
        }
    ),
    "SessionPosition": _object({"id": _TEXT, "position": _INTEGER | {"description": "tokens read by now"}}),
    "Timings": _object(
        {"queue_ms": _NUMBER, "time_to_first_token_ms": _NUMBER, "decode_ms": _NUMBER, "total_ms": _NUMBER},
        {"decode_tokens_per_second": _NUMBER},
    ),
    "GenerateAnswer": _object(
        {
            "text": _TEXT,
            "token_ids": _list(_INTEGER),
            "finish_reason": _FINISH,
            "usage": _ref("Usage"),
            "timings": _ref("Timings"),
        },
        {"session": _ref("SessionPosition")},
    ),
    "CompletionAnswer": _object(
        _HEAD
        | {
            "object": {"const": "text_completion"},
            "choices": _list(
                _object(
                    {
                        "index": _INTEGER,
                        "text": _TEXT,
                        "finish_reason": _FINISH,
                        "logprobs": _or_null(
                            _object(
                                {
                                    "tokens": _list(_TEXT),
                                    "token_logprobs": _list(_or_null(_NUMBER)),
                                    "top_logprobs": _list(
                                        _or_null({"type": "object", "additionalProperties": _NUMBER})
                                    ),
                                    "text_offset": _list(_INTEGER | {"description": "characters of the choice's text"}),
                                }
                            )
                        ),
                    }
                )
            ),
            "usage": _ref("Usage"),
        },
        {"session": _ref("SessionPosition")},
    ),
    "ChatAnswer": _object(
        _HEAD
        | {
            "object": {"const": "chat.completion"},
            "choices": _list(
                _object(
                    {
                        "index": _INTEGER,
                        "message": _object(
                            {"role": {"const": "assistant"}, "content": _TEXT, "refusal": {"type": "null"}}
                        ),
                        "finish_reason": _FINISH,
                        "logprobs": _or_null(_object({"content": _list(_TOKEN_LOGPROBS), "refusal": {"type": "null"}})),
                    }
                )
            ),
            "usage": _ref("Usage"),
        },
        {"session": _ref("SessionPosition")},
    ),
    "ResponseAnswer": {
        "type": "object",
        "description": "OpenAI's response, with what applies of it",
        "required": ["id", "object", "created_at", "status", "model", "output", "usage"],
        "properties": {
            "id": _TEXT,
            "object": {"const": "response"},
            "created_at": _INTEGER,
            "status": {"enum": ["completed", "incomplete"]},
            "model": _TEXT,
            "previous_response_id": _or_null(_TEXT),
            "store": {"type": "boolean"},
            "output": _list(
                _object(
                    {
                        "id": _TEXT,
                        "type": {"const": "message"},
                        "status": {"enum": ["completed", "incomplete"]},
                        "role": {"const": "assistant"},
                        "content": _list(
                            _object(
                                {
                                    "type": {"const": "output_text"},
                                    "text": _TEXT,
                                    "annotations": _list({}),
                                    "logprobs": _list(_TOKEN_LOGPROBS),
                                }
                            )
                        ),
                    }
                )
            ),
            "usage": _object(
                {
                    "input_tokens": _INTEGER,
                    "input_tokens_details": _object({"cached_tokens": _INTEGER, "cache_write_tokens": _INTEGER}),
                    "output_tokens": _INTEGER,
                    "output_tokens_details": _object({"reasoning_tokens": _INTEGER}),
                    "total_tokens": _INTEGER,
                }
            ),
        },
    },
    "ResponseDeleted": _object({"id": _TEXT, "object": {"const": "response"}, "deleted": {"const": True}}),
    "Model": _object(
        {
            "id": _TEXT,
            "object": {"const": "model"},
            "created": _INTEGER,
            "owned_by": _TEXT,
            "max_model_len": _INTEGER,
            "max_prompt_tokens": _INTEGER,
            "max_tokens": _INTEGER,
            "n_layers": _INTEGER,
            "vocabulary": _INTEGER,
            "state_bytes": _INTEGER | {"description": "of one sequence, whatever its length"},
            "has_tokenizer": {"type": "boolean"},
            "has_chat_template": {"type": "boolean"},
            "end_of_text_id": _or_null(_INTEGER),
        }
    ),
    "ModelList": _object({"object": {"const": "list"}, "data": _list(_ref("Model"))}),
    "TokenizeAnswer": _object(
        {"count": _INTEGER, "max_model_len": _INTEGER, "tokens": _list(_INTEGER)}, {"token_strs": _list(_TEXT)}
    ),
    "DetokenizeAnswer": _object({"prompt": _TEXT}),
    "ReloadAnswer": _object(
        {
            "object": {"const": "reload"},
            "model": _TEXT,
            "artifact": _TEXT,
            "fingerprint": _TEXT | {"description": "SHA-256 over config and weights"},
            "created": _INTEGER,
        }
    ),
}
