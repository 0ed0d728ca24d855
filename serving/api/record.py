"""What is known of one HTTP request while it runs: who asks, what serves it, what it has used."""

from __future__ import annotations

import re
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.types import Scope

from serving.api.access import Key
from serving.api.backend import Backend

_SCOPE_KEY = "yunmin.record"
_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")


@dataclass(eq=False)
class Record:
    """One request.

    Attributes:
        id: from `X-Request-Id`, or made here.
        backend: that it began with; a reload in between does not change it.
        key: it came with, where keys are needed.
        prompt_tokens, cached_tokens, completion_tokens: so far; tokens read, of them those that were not read again,
            and tokens generated.
        timings: of its first sequence, in milliseconds.
        outcome: how it ended, where its status does not tell: the code of an error, or "client_left".
        prompt, answer: text, kept only where the settings ask for it.
        started: on `time.monotonic`'s clock.
    """

    id: str
    backend: Backend
    key: Key | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    timings: dict[str, float] = field(default_factory=dict)
    outcome: str | None = None
    prompt: Any = None
    answer: Any = None
    started: float = field(default_factory=time.monotonic)


def new_record(scope: Scope, backend: Backend) -> Record:
    """The record of a request that has just come, kept in its scope."""
    given = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"x-request-id"), "")
    record = Record(given if _ID.fullmatch(given) else uuid.uuid4().hex, backend)
    scope[_SCOPE_KEY] = record
    return record


def record_in(scope: Scope) -> Record:
    """The record of the request whose scope this is."""
    record: Record = scope[_SCOPE_KEY]
    return record


def record_of(request: Request) -> Record:
    """The record of the request that a handler serves."""
    return record_in(request.scope)


def backend_of(request: Request) -> Backend:
    """What serves this request."""
    return record_of(request).backend
