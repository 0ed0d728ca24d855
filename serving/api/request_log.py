"""One line per request, for people or for programs; prompts only where asked for, keys never."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from typing import Any

from starlette.types import Scope

from serving.api.record import Record
from serving.settings import Settings

_logger = logging.getLogger("yunmin.requests")
_WITH_PATHS = ("yunmin.requests", "yunmin.serving", "bentoml.access")


class _OneLine(logging.Filter):
    """Escapes what could begin a line of its own or command a terminal: paths come decoded, and from anybody."""

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if not message.isprintable():
            record.msg = "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in message)
            record.args = ()
        return True


_ONE_LINE = _OneLine()


def set_up_log(settings: Settings) -> None:
    """Sends the lines to stderr, as the settings say."""
    for name in _WITH_PATHS:
        logging.getLogger(name).addFilter(_ONE_LINE)  # once, however often it is added
    for handler in list(_logger.handlers):
        _logger.removeHandler(handler)
    _logger.propagate = False
    _logger.disabled = settings.log_format == "off"
    _logger.setLevel(logging.INFO)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    _logger.addHandler(handler)


def log_request(record: Record, scope: Scope, status: int) -> None:
    """Writes the line of a request that has ended.

    Args:
        record: of the request.
        scope: of ASGI.
        status: of the response; 499 where the client left before there was one.
    """
    settings = record.backend.settings
    if settings.log_format == "off":
        return
    facts: dict[str, Any] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()) + "Z",
        "request_id": record.id,
        "method": scope["method"],
        "path": scope["path"],
        "status": status,
        "outcome": record.outcome,
        "key": None if record.key is None else record.key.name,
        "duration_ms": round(1e3 * (time.monotonic() - record.started), 3),
    }
    if record.prompt_tokens or record.completion_tokens:
        facts |= {
            "prompt_tokens": record.prompt_tokens,
            "cached_tokens": record.cached_tokens,
            "completion_tokens": record.completion_tokens,
            **record.timings,
        }
    if settings.log_prompts:
        facts |= {"prompt": record.prompt, "answer": record.answer}
    facts = {name: value for name, value in facts.items() if value is not None}
    _logger.info(json.dumps(facts, ensure_ascii=False) if settings.log_format == "json" else _as_text(facts))


def _as_text(facts: Mapping[str, Any]) -> str:
    """`name=value` pairs; whatever could be taken for more than one of them is quoted."""
    words = []
    for name, value in facts.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        is_plain = text.isprintable() and not set(text) & set(' "=')
        words.append(f"{name}={text if is_plain else json.dumps(text, ensure_ascii=False)}")
    return " ".join(words)
