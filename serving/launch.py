"""From settings to a running engine: for the service, for `yunmin batch`, and for whoever measures the engine alone."""

from __future__ import annotations

from serving.api.access import read_access
from serving.api.backend import Backend
from serving.api.chat_template import find_template
from serving.engine.engine import Engine
from serving.sessions.manager import Sessions
from serving.settings import Settings, require_artifact
from yunmin.language_model import LanguageModel, load
from yunmin.threads import set_threads


def load_served(settings: Settings) -> LanguageModel:
    """Sets the number of threads and loads what is to be served.

    Raises:
        YunminError: it is missing or damaged.
    """
    if settings.threads:
        set_threads(settings.threads)
    return load(require_artifact(settings), device=settings.device, runtime=settings.runtime)


def make_backend(model: LanguageModel, engine: Engine, settings: Settings, sessions: Sessions | None = None) -> Backend:
    """What the HTTP surface works with.

    Args:
        model: that is served.
        engine: that runs it.
        settings: keys, chat template.
        sessions: of this model; None for offline work.

    Raises:
        YunminError: a file that the settings name cannot be read.
    """
    template = find_template(settings.chat_template, model.folder)
    return Backend(model, engine, settings, access=read_access(settings), template=template, sessions=sessions)
