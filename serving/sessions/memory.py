"""Sessions in memory: alone, or in front of another store."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import replace

from serving.sessions.errors import SessionConflictError, StoreFullError
from serving.sessions.records import SessionRecord
from serving.sessions.store import Store, Usage


class MemoryStore:
    """Sessions that live as long as the process; the least recently used ones give way to others.

    Args:
        max_bytes: of states together.
        max_sessions: how many.
    """

    def __init__(self, max_bytes: int, max_sessions: int) -> None:
        self._max_bytes = max_bytes
        self._max_sessions = max_sessions
        self._lock = threading.Lock()
        self._sessions: OrderedDict[str, tuple[SessionRecord, bytes]] = OrderedDict()  # least recently used first
        self._bytes = 0

    def save(self, record: SessionRecord, state: bytes) -> None:
        with self._lock:
            stored = self._sessions.get(record.id)
            if record.version != (1 if stored is None else stored[0].version + 1):
                raise SessionConflictError(record.id)
            self._put(record, state)

    def fork(self, source: SessionRecord, record: SessionRecord) -> None:
        with self._lock:
            stored = self._sessions.get(source.id)
            if stored is None or stored[0].version != source.version:
                raise SessionConflictError(source.id)
            self._put(record, stored[1])

    def find(self, session_id: str) -> SessionRecord | None:
        with self._lock:
            stored = self._sessions.get(session_id)
            return None if stored is None else stored[0]

    def load(self, session_id: str) -> tuple[SessionRecord, bytes] | None:
        with self._lock:
            if session_id not in self._sessions:
                return None
            self._sessions.move_to_end(session_id)
            return self._sessions[session_id]

    def delete(self, session_id: str) -> bool:
        with self._lock:
            return self._drop(session_id)

    def records(self, limit: int, before: str | None = None) -> list[SessionRecord]:
        with self._lock:
            ids = sorted((i for i in self._sessions if before is None or i < before), reverse=True)[:limit]
            return [replace(self._sessions[i][0], messages=()) for i in ids]

    def remove_expired(self, now: float, keep: Collection[str]) -> int:
        with self._lock:
            over = [i for i, (record, _) in self._sessions.items() if record.expired(now) and i not in keep]
            for session_id in over:
                self._drop(session_id)
            return len(over)

    def usage(self) -> Usage:
        with self._lock:
            return Usage(len(self._sessions), self._bytes)

    def close(self) -> None:
        """Nothing outlives the process anyway."""

    def _put(self, record: SessionRecord, state: bytes) -> None:
        if len(state) > self._max_bytes or self._max_sessions < 1:
            raise StoreFullError(f"a state of {len(state)} bytes is more than sessions may take, {self._max_bytes}")
        self._drop(record.id)
        while len(self._sessions) >= self._max_sessions or self._bytes + len(state) > self._max_bytes:
            self._drop(next(iter(self._sessions)))
        self._sessions[record.id] = record, state
        self._bytes += len(state)

    def _drop(self, session_id: str) -> bool:
        stored = self._sessions.pop(session_id, None)
        if stored is None:
            return False
        self._bytes -= len(stored[1])
        return True


class CachedStore:
    """Another store, with the states used last in memory.

    The record always comes from the store behind, so what another worker has saved is seen; only the state of that very
    version need not be read again.

    Args:
        behind: keeps everything.
        max_bytes: of states in memory.
    """

    def __init__(self, behind: Store, max_bytes: int) -> None:
        self._behind = behind
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._states: OrderedDict[str, tuple[int, bytes]] = OrderedDict()  # version and state, by session
        self._bytes = 0

    def save(self, record: SessionRecord, state: bytes) -> None:
        self._behind.save(record, state)
        self._put(record, state)

    def fork(self, source: SessionRecord, record: SessionRecord) -> None:
        self._behind.fork(source, record)
        if (state := self._get(source)) is not None:
            self._put(record, state)

    def find(self, session_id: str) -> SessionRecord | None:
        return self._behind.find(session_id)

    def load(self, session_id: str) -> tuple[SessionRecord, bytes] | None:
        record = self._behind.find(session_id)
        if record is not None and (state := self._get(record)) is not None:
            return record, state
        loaded = self._behind.load(session_id)
        if loaded is not None:
            self._put(*loaded)
        return loaded

    def delete(self, session_id: str) -> bool:
        deleted = self._behind.delete(session_id)
        with self._lock:
            self._drop(session_id)
        return deleted

    def records(self, limit: int, before: str | None = None) -> list[SessionRecord]:
        return self._behind.records(limit, before)

    def remove_expired(self, now: float, keep: Collection[str]) -> int:
        return self._behind.remove_expired(now, keep)  # theirs are the least recently used here, and soon gone

    def usage(self) -> Usage:
        return self._behind.usage()

    def close(self) -> None:
        self._behind.close()

    def _get(self, record: SessionRecord) -> bytes | None:
        with self._lock:
            version, state = self._states.get(record.id, (0, b""))
            if version != record.version:
                return None
            self._states.move_to_end(record.id)
            return state

    def _put(self, record: SessionRecord, state: bytes) -> None:
        with self._lock:
            if self._states.get(record.id, (0, b""))[0] > record.version:
                return  # a load that took longer than the next save
            self._drop(record.id)
            if len(state) > self._max_bytes:
                return
            self._states[record.id] = record.version, state
            self._bytes += len(state)
            while self._bytes > self._max_bytes:
                self._drop(next(iter(self._states)))

    def _drop(self, session_id: str) -> None:
        _, state = self._states.pop(session_id, (0, b""))
        self._bytes -= len(state)
