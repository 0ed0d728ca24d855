"""What one request asks for, from the tensors and parameters that Triton hands over."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from serving.settings import Settings
from yunmin.errors import RequestError
from yunmin.sampling import SamplingParams, sampling_params_from
from yunmin.triton_contract import IDS_INPUT, SAMPLING_FIELDS, SAMPLING_INPUT, STREAM_INPUT, TEXT_INPUT

_LONGEST_JSON = 1_048_576


@dataclass(frozen=True)
class Asked:
    """A request, checked as far as it can be without the model.

    Attributes:
        field: by which the prompt was given.
        prompt: text or token ids.
        params: how to choose and when to stop.
        stream: whether every token is a response.
    """

    field: str
    prompt: str | list[int]
    params: SamplingParams
    stream: bool


def read_request(values: Callable[[str], Sequence[Any] | None], parameters: str, settings: Settings) -> Asked:
    """Reads a request.

    Args:
        values: the elements of an input by its name, None where the request has none of that name.
        parameters: of the request, a JSON object as the python backend gives it; empty for none.
        settings: limits.

    Raises:
        RequestError: something is missing, unknown or impossible; names it.
    """
    text, ids = values(TEXT_INPUT), values(IDS_INPUT)
    if text is not None and ids is not None:
        raise RequestError(IDS_INPUT, f"give either {TEXT_INPUT} or {IDS_INPUT}, not both")
    stream = values(STREAM_INPUT)
    wants_stream = False if stream is None else bool(_one(STREAM_INPUT, stream))
    params = _sampling(values(SAMPLING_INPUT), parameters, settings)
    if ids is not None:
        _require_short(IDS_INPUT, len(ids), settings)
        return Asked(IDS_INPUT, [int(token_id) for token_id in ids], params, wants_stream)
    if text is None:
        raise RequestError(TEXT_INPUT, f"is missing: give {TEXT_INPUT} or {IDS_INPUT}")
    data = _bytes(TEXT_INPUT, text, settings.max_body_bytes)
    return Asked(TEXT_INPUT, _decoded(TEXT_INPUT, data), params, wants_stream)


def require_short(asked: Asked, token_ids: Sequence[int], settings: Settings) -> None:
    """Refuses prompts longer than the settings allow.

    Raises:
        RequestError: it is; names the input.
    """
    _require_short(asked.field, len(token_ids), settings)


def _sampling(values: Sequence[Any] | None, parameters: str, settings: Settings) -> SamplingParams:
    given: dict[str, Any] = {}
    if values is not None:
        given = _object(SAMPLING_INPUT, _decoded(SAMPLING_INPUT, _bytes(SAMPLING_INPUT, values, _LONGEST_JSON)))
    for name, value in _object("parameters", parameters or "{}").items():
        if name in given:
            raise RequestError(name, f"is given twice, in {SAMPLING_INPUT} and as a parameter of the request")
        given[name] = value
    for name in given:
        if name not in SAMPLING_FIELDS:
            raise RequestError(name, f"unknown parameter, expected one of {', '.join(SAMPLING_FIELDS)}")
    if given.get("max_tokens") is None:
        given["max_tokens"] = min(SamplingParams.max_tokens, settings.max_tokens)
    params = sampling_params_from(given)
    if params.max_tokens > settings.max_tokens:
        raise RequestError(
            "max_tokens", f"must be at most {settings.max_tokens} on this server, got {params.max_tokens}"
        )
    return params


def _object(name: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(name, f"must be a JSON object: {error}") from None
    if not isinstance(value, dict):
        raise RequestError(name, f"must be a JSON object, got {type(value).__name__}")
    return value


def _one(name: str, values: Sequence[Any]) -> Any:
    if len(values) != 1:
        raise RequestError(name, f"must have one element, got {len(values)}")
    return values[0]


def _bytes(name: str, values: Sequence[Any], most: int) -> bytes:
    value = _one(name, values)
    data = value.encode() if isinstance(value, str) else bytes(value)
    if len(data) > most:
        raise RequestError(name, f"must have at most {most} bytes, got {len(data)}")
    return data


def _decoded(name: str, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(name, f"must be UTF-8, byte {error.start} is not") from None


def _require_short(name: str, tokens: int, settings: Settings) -> None:
    if tokens > settings.max_prompt_tokens:
        raise RequestError(name, f"must have at most {settings.max_prompt_tokens} tokens on this server, got {tokens}")
