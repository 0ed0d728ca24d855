"""Asks a model under Triton for text, over gRPC (tritonclient) or over HTTP (`generate_stream`, nothing installed)."""

from __future__ import annotations

import http.client
import json
import queue
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

from yunmin.errors import ConfigError, MissingExtraError, RequestError, YunminError
from yunmin.triton_contract import (
    IDS_INPUT,
    IDS_OUTPUT,
    REASON_OUTPUT,
    SAMPLING_INPUT,
    STREAM_INPUT,
    TEXT_INPUT,
    TEXT_OUTPUT,
)

_CONNECT_S = 10.0
_LONGEST_LINE = 4_194_304
_LONGEST_WAIT_S = 86_400.0
_LARGEST_ID = 2**63 - 1


class TritonError(YunminError):
    """The server is away, has no such model, or refuses or fails a request."""


@dataclass(frozen=True)
class Answer:
    """One response: what was ready, or everything where nothing is streamed.

    Attributes:
        text: that became certain, possibly none.
        token_ids: behind it.
        finish_reason: "stop" or "length" in the last answer, else None.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None


def ask(
    url: str,
    model: str,
    prompt: str | list[int],
    sampling: Mapping[str, Any],
    *,
    stream: bool = True,
    timeout_s: float = 300.0,
) -> Iterator[Answer]:
    """Generates, answer by answer; a caller who stops reading cancels the request.

    Args:
        url: `grpc://host:port` or `http://host:port` (or `grpcs`, `https`).
        model: its name in the repository.
        prompt: text or token ids.
        sampling: fields as in `yunmin.triton_contract.SAMPLING_FIELDS`.
        stream: whether tokens are answered as they come.
        timeout_s: most seconds between two answers.

    Raises:
        ConfigError: the URL is none of these, or the time is impossible.
        RequestError: the prompt is no text, or a token id none of Triton's integers.
        MissingExtraError: the URL wants gRPC, and tritonclient is not installed.
        TritonError: the server is away, knows no such model, or refuses or fails the request.
    """
    parts = urlsplit(url)
    try:
        has_port = parts.port is not None
    except ValueError as error:
        raise ConfigError(f"URL {url!r}: expected a port, {error}") from None
    is_grpc = parts.scheme in ("grpc", "grpcs")
    has_more = parts.query or parts.fragment or (is_grpc and parts.path.strip("/"))
    if has_more or not (is_grpc or parts.scheme in ("http", "https")) or not parts.hostname:
        raise ConfigError(f"URL {url!r}: expected grpc://HOST:PORT or http://HOST:PORT")
    if not 0 < timeout_s <= _LONGEST_WAIT_S:  # NaN fails this, too
        raise ConfigError(f"timeout: expected seconds above 0, at most {_LONGEST_WAIT_S:g}, got {timeout_s:g}")
    if isinstance(prompt, str):
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise RequestError(TEXT_INPUT, f"must be UTF-8, character {error.start} is not") from None
    elif not all(-_LARGEST_ID <= token_id <= _LARGEST_ID for token_id in prompt):
        raise RequestError(IDS_INPUT, "token ids must be integers of 64 bits")
    if is_grpc:
        if not has_port:
            raise ConfigError(f"URL {url!r}: expected a port, as in grpc://{parts.hostname}:8001")
        return _ask_grpc(parts.netloc, parts.scheme == "grpcs", model, prompt, sampling, stream, timeout_s)
    return _ask_http(url.rstrip("/"), model, prompt, sampling, stream, timeout_s)


def _ask_http(
    url: str, model: str, prompt: str | list[int], sampling: Mapping[str, Any], stream: bool, timeout_s: float
) -> Iterator[Answer]:
    body: dict[str, Any] = {
        TEXT_INPUT if isinstance(prompt, str) else IDS_INPUT: prompt,
        STREAM_INPUT: stream,
        SAMPLING_INPUT: json.dumps(sampling),
    }
    request = urllib.request.Request(  # noqa: S310 (the scheme was checked)
        f"{url}/v2/models/{quote(model, safe='')}/generate_stream",
        json.dumps(body).encode(),
        {"content-type": "application/json", "accept": "text/event-stream"},
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:  # noqa: S310
            while line := response.readline(_LONGEST_LINE):
                if line.startswith(b"data:"):
                    yield _answer_of_event(url, model, line[5:])
    except urllib.error.HTTPError as error:
        with error:  # else its connection lives as long as the error, and Triton waits for it before it ends
            message = _message(error.read(_LONGEST_LINE), error.reason)
        raise TritonError(f"{url}: model {model!r}: {message}") from None
    except http.client.HTTPException as error:
        raise TritonError(f"{url}: no Triton server answers: expected HTTP, found {str(error)[:80]!r}") from None
    except OSError as error:
        reason = getattr(error, "reason", None) or error
        raise TritonError(f"{url}: no Triton server answers: {reason}") from None


def _answer_of_event(url: str, model: str, data: bytes) -> Answer:
    try:
        event: Any = json.loads(data)
    except ValueError:
        raise TritonError(f"{url}: expected a JSON event, found {data[:80]!r}") from None
    if not isinstance(event, dict) or "error" in event:
        raise TritonError(f"{url}: model {model!r}: {_message(data, 'an event without a message')}")
    ids = event.get(IDS_OUTPUT, [])
    return Answer(
        str(event.get(TEXT_OUTPUT, "")),
        tuple(ids) if isinstance(ids, list) else (int(ids),),
        event.get(REASON_OUTPUT) or None,
    )


def _message(data: bytes, otherwise: str) -> str:
    """What Triton says in an error's body, which `generate_stream` sends as an event."""
    try:
        return str(json.loads(data.strip().removeprefix(b"data:"))["error"])
    except (ValueError, KeyError, TypeError):
        return otherwise


def _ask_grpc(
    address: str,
    ssl: bool,
    model: str,
    prompt: str | list[int],
    sampling: Mapping[str, Any],
    stream: bool,
    timeout_s: float,
) -> Iterator[Answer]:
    try:
        from tritonclient import grpc
        from tritonclient.utils import InferenceServerException
    except ModuleNotFoundError:
        raise MissingExtraError("tritonclient[grpc]", "triton", "a grpc:// URL") from None
    responses: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
    client = grpc.InferenceServerClient(address, ssl=ssl)
    with closing(client):
        try:
            if not client.is_model_ready(model, client_timeout=_CONNECT_S):
                raise TritonError(f"grpc://{address}: the server has no model {model!r} that is ready")
            client.start_stream(lambda result, error: responses.put((result, error)))
            client.async_stream_infer(
                model, _grpc_inputs(grpc, prompt, sampling, stream), enable_empty_final_response=True
            )
            yield from _grpc_answers(address, model, responses, timeout_s)
        except InferenceServerException as error:
            raise TritonError(f"grpc://{address}: no Triton server answers: {error.message()}") from None
        finally:
            client.stop_stream(cancel_requests=True)


def _grpc_inputs(grpc: Any, prompt: str | list[int], sampling: Mapping[str, Any], stream: bool) -> list[Any]:
    import numpy as np

    is_text = isinstance(prompt, str)
    values = {
        TEXT_INPUT if is_text else IDS_INPUT: (
            np.array([prompt.encode()], np.object_) if isinstance(prompt, str) else np.array(prompt, np.int64)
        ),
        STREAM_INPUT: np.array([stream]),
        SAMPLING_INPUT: np.array([json.dumps(sampling).encode()], np.object_),
    }
    types = {TEXT_INPUT: "BYTES", IDS_INPUT: "INT64", STREAM_INPUT: "BOOL", SAMPLING_INPUT: "BYTES"}
    inputs = []
    for name, array in values.items():
        tensor = grpc.InferInput(name, list(array.shape), types[name])
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    return inputs


def _grpc_answers(address: str, model: str, responses: queue.SimpleQueue[Any], timeout_s: float) -> Iterator[Answer]:
    while True:
        try:
            result, error = responses.get(timeout=timeout_s)
        except queue.Empty:
            raise TritonError(f"grpc://{address}: model {model!r}: no answer within {timeout_s:g} s") from None
        if error is not None:
            raise TritonError(f"grpc://{address}: model {model!r}: {error.message()}")
        response = result.get_response()
        text = result.as_numpy(TEXT_OUTPUT)
        if text is not None:
            reason = result.as_numpy(REASON_OUTPUT)[0].decode() or None
            yield Answer(text[0].decode(), tuple(result.as_numpy(IDS_OUTPUT).tolist()), reason)
        if response.parameters["triton_final_response"].bool_param:
            return
