"""What is known of a session beside its state."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

Message = Mapping[str, Any]

_ID = re.compile(r"sess_[0-9a-f]{32}")


@dataclass(frozen=True)
class SessionRecord:
    """A session as it was last saved.

    Attributes:
        id: "sess_" and 32 hexadecimal digits; later sessions have greater ids.
        fingerprint: of the model it belongs to.
        position: tokens read; 0 before any, when there is no state.
        version: 1 when created, one more with each save.
        created, updated: seconds since 1970.
        ttl_s: seconds it lives after it was last saved; None for ever.
        expires: seconds since 1970, or None.
        parent: the session it was forked from, or None.
        owner: whose it is, by the name of a key; "" where the server has no keys.
        state_bytes: size of the saved state; 0 where there is none.
        metadata: the client's own.
        messages: the conversation that led here, for chats; else empty.
    """

    id: str
    fingerprint: str
    position: int
    version: int
    created: float
    updated: float
    ttl_s: float | None
    expires: float | None
    parent: str | None
    state_bytes: int
    owner: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    messages: tuple[Message, ...] = ()

    def expired(self, now: float) -> bool:
        return self.expires is not None and now >= self.expires

    def saved(self, now: float, **changes: Any) -> SessionRecord:
        """The next version, which lives a whole lifetime again."""
        expires = None if self.ttl_s is None else now + self.ttl_s
        return replace(self, version=self.version + 1, updated=now, expires=expires, **changes)


def new_session_id(now: float) -> str:
    """An id nobody can guess (72 random bits), whose order is that of creation, to the microsecond."""
    return f"sess_{int(now * 1e6) & (1 << 56) - 1:014x}{secrets.token_hex(9)}"


def is_session_id(value: str) -> bool:
    """Whether a client's string may name a session, and a file."""
    return _ID.fullmatch(value) is not None


def encode_record(record: SessionRecord) -> tuple[str, str]:
    """A record as JSON in two parts: all but the messages, and the messages, which can be long."""
    facts = {name: value for name, value in asdict(record).items() if name != "messages"}
    return _compact(facts), _compact([dict(message) for message in record.messages])


def decode_record(facts: str | bytes, messages: str | bytes = "[]") -> SessionRecord:
    """The record that `encode_record` encoded; without its messages where they are not given.

    Raises:
        ValueError: it is none.
    """
    values, conversation = json.loads(facts), json.loads(messages)
    if not isinstance(values, dict) or values.keys() != _FACTS or not isinstance(conversation, list):
        raise ValueError("expected the record of a session")
    for name, kind in _KINDS.items():
        if not isinstance(values[name], kind):
            raise ValueError(f"{name}: unexpected value in the record of a session")  # noqa: TRY004 (as JSON's own)
    return SessionRecord(**values, messages=tuple(conversation))


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


_FACTS = {f.name for f in fields(SessionRecord)} - {"messages"}
_KINDS: dict[str, Any] = {
    "id": str,
    "fingerprint": str,
    "position": int,
    "version": int,
    "created": int | float,
    "updated": int | float,
    "ttl_s": int | float | None,
    "expires": int | float | None,
    "parent": str | None,
    "state_bytes": int,
    "owner": str,
    "metadata": dict,
}
