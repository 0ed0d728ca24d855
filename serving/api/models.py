"""`/v1/models`: the one model that is served."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serving.api.backend import Backend
from serving.api.failures import ApiError
from serving.api.record import backend_of


async def list_models(request: Request) -> Response:
    """The served model, as a list of one."""
    return JSONResponse({"object": "list", "data": [_model_record(backend_of(request))]})


async def show_model(request: Request) -> Response:
    """The served model, by its name."""
    backend = backend_of(request)
    check_model(request.path_params["name"], backend)
    return JSONResponse(_model_record(backend))


def check_model(name: str | None, backend: Backend) -> None:
    """Refuses another model than the one that is served.

    Raises:
        ApiError: 404, as OpenAI's.
    """
    served = backend.settings.served_name
    if name is not None and name != served:
        raise ApiError(404, f"model: expected {served!r}, got {name!r:.200}", param="model", code="model_not_found")


def _model_record(backend: Backend) -> dict[str, Any]:
    config, settings, tokenizer = backend.model.config, backend.settings, backend.model.tokenizer
    return {
        "id": settings.served_name,
        "object": "model",
        "created": backend.created,
        "owned_by": "yunmin",
        "max_model_len": settings.max_prompt_tokens + settings.max_tokens,
        "max_prompt_tokens": settings.max_prompt_tokens,
        "max_tokens": settings.max_tokens,
        "n_layers": config.n_layers,
        "vocabulary": config.n_tokens,
        "state_bytes": backend.model.runtime.new_state(1).nbytes,  # of a sequence, whatever its length
        "has_tokenizer": tokenizer is not None,
        "end_of_text_id": None if tokenizer is None else tokenizer.eos_id,  # what goes before a text
        "has_chat_template": backend.template is not None,
    }
