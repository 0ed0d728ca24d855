"""A response as JSON, apart from how it came about."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def with_output(facts: Mapping[str, Any], text: str, logprobs: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """A response whose only output is a text.

    Args:
        facts: the rest of the response.
        text: the answer.
        logprobs: of its tokens.
    """
    return {**facts, "output": [output_item(facts["id"], facts["status"], text, logprobs or [])]}


def output_item(response_id: str, status: str, text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a response has as its output."""
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}
    return {
        "id": output_item_id(response_id),
        "type": "message",
        "status": status,
        "role": "assistant",
        "content": [part],
    }


def output_item_id(response_id: str) -> str:
    """The id of that message."""
    return "msg_" + response_id.removeprefix("resp_")
