"""Another model in place of the one that is served, without an end to any stream."""

from __future__ import annotations

import asyncio
from pathlib import Path

from starlette.applications import Starlette

from serving.api.backend import Backend
from serving.api.chat_template import find_template
from serving.engine.job import EngineStoppedError
from serving.sessions.opening import named_states
from serving.settings import Settings
from serving.start import start_engine
from yunmin.errors import ConfigError
from yunmin.language_model import load

_POLL_S = 0.05


def allowed_artifact(settings: Settings, wanted: str | None) -> str:
    """The artifact that a reload may load.

    Args:
        settings: name the artifact that is served, and the folder that others may come from.
        wanted: path of another one; None for the same one again.

    Raises:
        ConfigError: it may not be loaded.
    """
    if wanted is None or wanted == settings.artifact:
        return settings.artifact
    absolute = str(Path(wanted).absolute())  # else the name of no folder here would be looked for in the Hub
    try:
        path = Path(absolute).resolve()
        path.exists()
    except (OSError, ValueError) as error:  # too long a name, or a NUL in it
        raise ConfigError(f"expected the path of an artifact, {error}") from None
    if path == Path(settings.artifact).resolve():
        return absolute
    if not settings.reload_root:
        raise ConfigError("only the artifact that is served can be loaded again: this server has no reload_root")
    if not path.is_relative_to(Path(settings.reload_root).resolve()):
        raise ConfigError("expected an artifact in the server's reload_root, it lies elsewhere")
    return absolute


def load_beside(backend: Backend, artifact: str) -> Backend:
    """Loads and checks a model, and starts an engine for it beside the one that runs; blocks.

    The name that requests give stays the same. For a while both models are in memory.

    Args:
        backend: that serves now.
        artifact: to load.

    Raises:
        YunminError: the artifact is missing or damaged, or a named state does not belong to it.
    """
    settings = backend.settings.model_copy(update={"artifact": artifact, "model_name": backend.settings.served_name})
    model = load(artifact, device=settings.device, runtime=settings.runtime)
    template = find_template(settings.chat_template, model.folder)
    sessions = backend.sessions
    if sessions is not None:
        sessions = sessions.of_model(model, named_states(model, settings))
    engine = start_engine(model, settings, backend.engine.metrics)
    return Backend(model, engine, settings, access=backend.access, template=template, sessions=sessions)


async def swap(app: Starlette, artifact: str) -> Backend:
    """Serves another model to new requests; the one before ends with its last request.

    Args:
        app: the application.
        artifact: to load; one that may be.

    Returns:
        What serves now.

    Raises:
        YunminError: it cannot be loaded; what was served still is.
        EngineStoppedError: the server is shutting down.
    """
    before: Backend = app.state.backend
    after = await asyncio.to_thread(load_beside, before, artifact)
    if before.engine.is_draining:  # nobody would stop the new one
        await asyncio.to_thread(after.engine.stop)
        raise EngineStoppedError("the server is shutting down")
    app.state.backend = after
    app.state.retiring.add(before)
    task = asyncio.create_task(_retire(app, before))
    app.state.retirements.add(task)
    task.add_done_callback(app.state.retirements.discard)
    return after


async def _retire(app: Starlette, backend: Backend) -> None:
    while backend.users:
        await asyncio.sleep(_POLL_S)
    await asyncio.to_thread(backend.engine.stop)
    app.state.retiring.discard(backend)
