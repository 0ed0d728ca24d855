"""`/admin/`: what only the holder of the admin key may do."""

from __future__ import annotations

import asyncio
import logging

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serving.api.failures import ApiError
from serving.api.protocol import Body, parse_request
from serving.api.record import record_of
from serving.api.transport import read_body
from serving.engine.job import EngineStoppedError
from yunmin.errors import YunminError

logger = logging.getLogger("yunmin.serving")


class ReloadRequest(Body):
    """Body of `/admin/reload`; all of it may be left out."""

    artifact: str | None = Field(None, description="path of the artifact (the one that is served, read again)")


async def reload(request: Request) -> Response:
    """Loads another artifact and serves it to new requests; those that run keep the model they began with."""
    from serving.reload import allowed_artifact, swap  # which in turn makes backends

    record = record_of(request)
    body = await read_body(request, record.backend.settings.max_body_bytes)
    asked = parse_request(ReloadRequest, body or b"{}")
    if request.app.state.reloading.locked():
        raise ApiError(409, "another reload is under way", code="reload_in_progress")
    async with request.app.state.reloading:
        before = request.app.state.backend
        try:
            artifact = allowed_artifact(before.settings, asked.artifact)
            # a client that leaves must not stop what has begun half way
            after = await asyncio.shield(swap(request.app, artifact))
        except EngineStoppedError:
            raise
        except YunminError as error:
            logger.warning("reload refused: %s", error)
            raise ApiError(400, f"artifact: {error}", param="artifact", code="artifact_refused") from None
    fingerprint = await asyncio.to_thread(lambda: after.model.fingerprint)
    logger.info("reloaded: %s, fingerprint %s", artifact, fingerprint)
    return JSONResponse(
        {
            "object": "reload",
            "model": after.settings.served_name,
            "artifact": artifact,
            "fingerprint": fingerprint,
            "created": after.created,
        }
    )
