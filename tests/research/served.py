"""A server's application in this process, for `research.models.remote`: no socket, no second process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import httpx
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette

from research.models.remote import RemoteModel
from serving.api.app import create_app
from serving.launch import make_backend
from serving.settings import read_settings
from serving.start import start_engine
from yunmin.language_model import LanguageModel

URL = "http://test"


@contextlib.contextmanager
def served(model: LanguageModel, **variables: str) -> Iterator[Starlette]:
    """The application on a model.

    Args:
        model: to serve.
        **variables: settings as the environment gives them, without their prefix.
    """
    defaults = {"ARTIFACT": "tiny", "SLOTS": "2", "QUEUE": "30"} | variables
    settings = read_settings({f"YUNMIN_{name}": value for name, value in defaults.items()})
    engine = start_engine(model, settings, CollectorRegistry())
    app = create_app()
    app.state.backend = make_backend(model, engine, settings)
    try:
        yield app
    finally:
        engine.stop()


def remote(app: Starlette, **options: Any) -> RemoteModel:
    """A model behind an application."""
    return RemoteModel(URL, transport=httpx.ASGITransport(app), **options)
