"""Where a request goes on from: a session, a named state, or the beginning."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal

from serving.api.failures import ApiError
from serving.api.protocol import GenerationBody
from serving.api.record import Record
from serving.sessions.manager import Lease, Sessions
from yunmin.errors import RequestError
from yunmin.state import Snapshot

Kind = Literal["text", "conversation"]


@dataclass(frozen=True)
class Start:
    """What has been read before the request.

    Attributes:
        snapshot: after it; None where there is nothing.
        lease: of the session that is to be saved at the end; None where there is none.
    """

    snapshot: Snapshot | None = None
    lease: Lease | None = None

    @property
    def token_ids(self) -> tuple[int, ...]:
        return () if self.snapshot is None else self.snapshot.token_ids

    def followed_by(self, tail: list[int]) -> list[int]:
        """Token ids of everything the model must have read."""
        return tail if self.snapshot is None else [*self.snapshot.token_ids, *tail]


def sessions_of(record: Record) -> Sessions:
    """The sessions of the key that a request came with; without keys, everyone's."""
    sessions = record.backend.sessions
    if sessions is None:
        raise ApiError(400, "this server keeps no sessions", code="no_sessions")
    return sessions if record.key is None else sessions.of_owner(record.key.name)


@asynccontextmanager
async def start_of(record: Record, asked: GenerationBody, kind: Kind) -> AsyncIterator[Start]:
    """Where a request goes on from; a session is the request's alone until the block ends.

    Args:
        record: of the request.
        asked: names a session or a state, or neither.
        kind: what the request adds; a session holds text or a conversation, never both.

    Raises:
        RequestError: the fields contradict each other.
        ApiError: the session is of the other kind.
        YunminError: there is no such session or state, or it cannot be used now.
    """
    if asked.session_id is not None and asked.state is not None:
        raise RequestError("state", "give either session_id or state, not both (a session can be created from a state)")
    if asked.session_position is not None and asked.session_id is None:
        raise RequestError("session_position", "is only allowed with session_id")
    if asked.state is not None:
        yield Start(sessions_of(record).named(asked.state))
    elif asked.session_id is None:
        yield Start()
    else:
        async with sessions_of(record).use(asked.session_id, asked.session_position) as lease:
            _check_kind(lease, kind)
            yield Start(lease.snapshot, lease)


def _check_kind(lease: Lease, kind: Kind) -> None:
    if lease.snapshot is None:
        return
    found: Kind = "conversation" if lease.record.messages else "text"
    if found != kind:
        hint = "/v1/chat/completions goes on with it" if found == "conversation" else "/v1/completions goes on with it"
        message = f"session_id: {lease.record.id!r} holds a {found}, expected a {kind}; {hint}"
        raise ApiError(409, message, param="session_id", code="wrong_session_kind")
