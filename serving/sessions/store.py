"""Where sessions are kept: one Protocol for memory, a disk and what workers share."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from serving.sessions.records import SessionRecord


@dataclass(frozen=True)
class Usage:
    """What a store holds.

    Attributes:
        sessions: how many, expired ones that have not been removed yet included.
        state_bytes: of all their states; one that forks share counts once where it is stored once.
    """

    sessions: int
    state_bytes: int


class Store(Protocol):
    """Keeps the last version of each session. Its methods block; threads may share it.

    A session's state is a saved snapshot, or empty before its first token. After `save` has returned, the version is
    there until it is replaced, deleted or expired (or, where all is memory, until others need its place); when it
    raises, the version before is there. Nobody ever reads half of one.
    """

    def save(self, record: SessionRecord, state: bytes) -> None:
        """Stores the next version of a session, or a new session as version 1.

        Raises:
            SessionConflictError: the version stored is not the one before this.
            StoreFullError: there is no room.
            StoreError: the store cannot be reached.
        """
        ...

    def fork(self, source: SessionRecord, record: SessionRecord) -> None:
        """Stores a new session whose state is that of another, without moving its bytes where that is possible.

        Raises:
            SessionConflictError: `source` is no longer the last version.
            StoreFullError, StoreError: as above.
        """
        ...

    def find(self, session_id: str) -> SessionRecord | None:
        """The last version's record."""
        ...

    def load(self, session_id: str) -> tuple[SessionRecord, bytes] | None:
        """The last version, whole.

        Raises:
            DamagedSessionError: it is not what was saved.
        """
        ...

    def delete(self, session_id: str) -> bool:
        """Removes a session; false where there is none."""
        ...

    def records(self, limit: int, before: str | None = None) -> list[SessionRecord]:
        """The newest sessions first, by creation, without their messages.

        Args:
            limit: how many at most.
            before: only sessions older than this one.
        """
        ...

    def remove_expired(self, now: float, keep: Collection[str]) -> int:
        """Removes the sessions whose time is over, but for some; returns how many."""
        ...

    def usage(self) -> Usage:
        """What it holds; quick, and in a store that others write to not always the latest."""
        ...

    def close(self) -> None: ...
