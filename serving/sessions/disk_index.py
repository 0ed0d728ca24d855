"""The index of sessions on a disk: an SQLite file that says which state belongs to which session."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving.sessions.errors import DamagedSessionError, SessionConflictError, StoreError, StoreFullError
from serving.sessions.records import SessionRecord, decode_record, encode_record
from serving.sessions.store import Usage

_VERSION = 1
_SCHEMA = f"""
    BEGIN IMMEDIATE;
    CREATE TABLE states (name TEXT PRIMARY KEY, bytes INTEGER NOT NULL, sha256 TEXT NOT NULL);
    CREATE TABLE sessions (
        id TEXT PRIMARY KEY,
        version INTEGER NOT NULL,
        expires REAL,
        state TEXT REFERENCES states (name),  -- NULL before the first token; forks share one
        record TEXT NOT NULL,
        messages TEXT NOT NULL
    );
    CREATE INDEX sessions_by_state ON sessions (state);
    CREATE INDEX sessions_by_expiry ON sessions (expires) WHERE expires IS NOT NULL;
    PRAGMA user_version = {_VERSION};
    COMMIT;
"""


@dataclass(frozen=True)
class StateFile:
    """A state as it was written.

    Attributes:
        name: of the file.
        size_bytes: of the file.
        sha256: hexadecimal, of its bytes.
    """

    name: str
    size_bytes: int
    sha256: str


class SessionIndex:
    """Sessions and the states they need. Each change is on the disk when the method returns; threads may share it.

    Args:
        path: of the SQLite file; made where it is missing.

    Raises:
        StoreError: it is no index, or of another version.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        with self._connection_errors():
            self._database = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        try:
            with self._connection_errors():
                self._open()
        except BaseException:
            self._database.close()
            raise

    def _open(self) -> None:
        [(version,)] = self._rows("PRAGMA user_version")
        if version not in (0, _VERSION):
            raise StoreError(f"{self._path}: expected version {_VERSION} of the index of sessions, found {version}")
        self._rows("PRAGMA journal_mode = WAL")
        self._rows("PRAGMA synchronous = FULL")  # a commit survives a power cut, too
        if version == 0:
            self._database.executescript(_SCHEMA)

    def close(self) -> None:
        with self._lock:
            self._database.close()

    def put(self, record: SessionRecord, state: StateFile | None) -> list[str]:
        """Enters the next version of a session, or a new one.

        Returns:
            The state that nobody needs any more, if that is so.

        Raises:
            SessionConflictError: another version has come first.
        """
        with self._transaction():
            before = self._require_next(record)
            if state is not None:
                self._rows("INSERT INTO states VALUES (?, ?, ?)", state.name, state.size_bytes, state.sha256)
            self._enter(record, None if state is None else state.name)
            return self._forget(before)

    def fork(self, source: SessionRecord, record: SessionRecord) -> None:
        """Enters a new session that needs the same state as another.

        Raises:
            SessionConflictError: `source` is no longer the last version.
        """
        with self._transaction():
            self._require_next(record)
            found = self._rows("SELECT state FROM sessions WHERE id = ? AND version = ?", source.id, source.version)
            if not found:
                raise SessionConflictError(source.id)
            self._enter(record, found[0][0])

    def remove(self, session_id: str) -> tuple[bool, list[str]]:
        """Removes a session: whether there was one, and the state that nobody needs any more."""
        with self._transaction():
            found = self._rows("DELETE FROM sessions WHERE id = ? RETURNING state", session_id)
            return bool(found), self._forget(found[0][0]) if found else []

    def remove_expired(self, now: float, keep: Collection[str]) -> tuple[int, list[str]]:
        """Removes sessions whose time is over: how many, and the states that nobody needs any more."""
        with self._transaction():
            expired = self._rows("SELECT id, state FROM sessions WHERE expires <= ?", now)
            over = [(session_id, state) for session_id, state in expired if session_id not in keep]
            unused: list[str] = []
            for session_id, state in over:
                self._rows("DELETE FROM sessions WHERE id = ?", session_id)
                unused += self._forget(state)
            return len(over), unused

    def find(self, session_id: str) -> tuple[SessionRecord, StateFile | None] | None:
        """A session and its state."""
        with self._reading():
            found = self._rows(
                "SELECT record, messages, name, bytes, sha256 FROM sessions LEFT JOIN states ON state = name"
                " WHERE id = ?",
                session_id,
            )
        if not found:
            return None
        facts, messages, name, size, digest = found[0]
        return self._decoded(session_id, facts, messages), None if name is None else StateFile(name, size, digest)

    def records(self, limit: int, before: str | None) -> list[SessionRecord]:
        """As in `Store`."""
        with self._reading():
            rows = self._rows(
                "SELECT id, record FROM sessions WHERE ?1 IS NULL OR id < ?1 ORDER BY id DESC LIMIT ?2", before, limit
            )
        return [self._decoded(session_id, facts) for session_id, facts in rows]

    def states(self) -> dict[str, int]:
        """Sizes of all states, by name."""
        with self._reading():
            return dict(self._rows("SELECT name, bytes FROM states"))

    def usage(self) -> Usage:
        """As in `Store`."""
        with self._reading():
            [(sessions,)] = self._rows("SELECT COUNT(*) FROM sessions")
            [(size,)] = self._rows("SELECT COALESCE(SUM(bytes), 0) FROM states")
        return Usage(sessions, size)

    def needs(self, record: SessionRecord) -> tuple[bool, int]:
        """What entering a version would change: whether a session comes, and bytes of the state that would go.

        Raises:
            SessionConflictError: it could not be entered.
        """
        with self._reading():
            before = self._require_next(record)
            [(freed,)] = self._rows(
                "SELECT COALESCE(SUM(bytes), 0) FROM states WHERE name = ?1"
                " AND (SELECT COUNT(*) FROM sessions WHERE state = ?1) = 1",
                before,
            )
        return record.version == 1, freed

    def _require_next(self, record: SessionRecord) -> str | None:
        """The name of the state before a version that may come next."""
        found = self._rows("SELECT version, state FROM sessions WHERE id = ?", record.id)
        version, state = found[0] if found else (0, None)
        if record.version != version + 1:
            raise SessionConflictError(record.id)
        return None if state is None else str(state)

    def _enter(self, record: SessionRecord, state: str | None) -> None:
        facts, messages = encode_record(record)
        values = record.id, record.version, record.expires, state, facts, messages
        self._rows("INSERT OR REPLACE INTO sessions VALUES (?, ?, ?, ?, ?, ?)", *values)

    def _forget(self, state: str | None) -> list[str]:
        unused = self._rows(
            "DELETE FROM states WHERE name = ? AND NOT EXISTS (SELECT 1 FROM sessions WHERE state = name)"
            " RETURNING name",
            state,
        )
        return [name for (name,) in unused]

    def _rows(self, statement: str, *values: Any) -> list[Any]:
        return self._database.execute(statement, values).fetchall()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._reading():
            self._rows("BEGIN IMMEDIATE")
            try:
                yield
                self._rows("COMMIT")
            finally:
                if self._database.in_transaction:
                    self._rows("ROLLBACK")

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        with self._lock, self._connection_errors():
            yield

    @contextlib.contextmanager
    def _connection_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            full = getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_FULL
            kind: Callable[[str], StoreError] = StoreFullError if full else StoreError
            raise kind(f"{self._path}: the index of sessions: {error}") from None

    def _decoded(self, session_id: str, facts: str, messages: str = "[]") -> SessionRecord:
        try:
            return decode_record(facts, messages)
        except ValueError as error:
            raise DamagedSessionError(f"{self._path}: session {session_id!r}: {error}") from None
