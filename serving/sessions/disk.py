"""Sessions on a local disk: an SQLite index of them, and one safetensors file per state.

A state is written aside, synced and renamed before the index names it, and a file that the index no longer names is
removed after that. So at any moment, kill -9 included, what the index names is whole; files it does not name are
removed when the folder is opened again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import secrets
import threading
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from serving.sessions.disk_index import SessionIndex, StateFile
from serving.sessions.errors import DamagedSessionError, StoreError, StoreFullError, is_full
from serving.sessions.records import SessionRecord
from serving.sessions.store import Usage
from yunmin.files import atomic_file

logger = logging.getLogger("yunmin.serving")


class DiskStore:
    """Sessions in a folder that one process uses at a time.

    Args:
        folder: made where it is missing.
        max_bytes: of states together.
        max_sessions: how many.

    Raises:
        StoreError: the folder cannot be used, another process uses it, or its index is damaged.
    """

    def __init__(self, folder: str | Path, max_bytes: int, max_sessions: int) -> None:
        self._folder = Path(folder)
        self._states = self._folder / "states"
        self._max_bytes = max_bytes
        self._max_sessions = max_sessions
        self._coming = Usage(0, 0)  # what is being written, and not in the index yet
        self._coming_lock = threading.Lock()
        with contextlib.ExitStack() as opened:
            opened.enter_context(self._locked())
            self._index = SessionIndex(self._folder / "index.sqlite")
            opened.callback(self._index.close)
            self._remove_orphans()
            self._opened = opened.pop_all()

    def save(self, record: SessionRecord, state: bytes) -> None:
        with self._room_for(record, len(state)):
            written = self._write(record, state) if state else None
            try:
                unused = self._index.put(record, written)
            except BaseException:
                if written is not None:
                    self._unlink([written.name])
                raise
        self._unlink(unused)

    def fork(self, source: SessionRecord, record: SessionRecord) -> None:
        with self._room_for(record, 0):
            self._index.fork(source, record)

    def find(self, session_id: str) -> SessionRecord | None:
        found = self._index.find(session_id)
        return None if found is None else found[0]

    def load(self, session_id: str) -> tuple[SessionRecord, bytes] | None:
        missing = ""
        while (found := self._index.find(session_id)) is not None:
            record, written = found
            if written is None:
                return record, b""
            path = self._states / written.name
            try:
                return record, _read(path, written)
            except FileNotFoundError:
                if written.name == missing:
                    raise DamagedSessionError(f"{path}: expected the state of {session_id!r}, found nothing") from None
                missing = written.name  # a save may have replaced it since the index was read
        return None

    def delete(self, session_id: str) -> bool:
        found, unused = self._index.remove(session_id)
        self._unlink(unused)
        return found

    def records(self, limit: int, before: str | None = None) -> list[SessionRecord]:
        return self._index.records(limit, before)

    def remove_expired(self, now: float, keep: Collection[str]) -> int:
        count, unused = self._index.remove_expired(now, keep)
        self._unlink(unused)
        return count

    def usage(self) -> Usage:
        return self._index.usage()

    def close(self) -> None:
        self._opened.close()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Keeps other processes out: they would take our half-written files for leftovers."""
        try:
            self._states.mkdir(parents=True, exist_ok=True)
            lock = (self._folder / "lock").open("w")
        except OSError as error:
            raise StoreError(f"{self._folder}: cannot keep sessions there: {error.strerror}") from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StoreError(
                    f"{self._folder}: another process keeps its sessions there (several can share those at one URL)"
                ) from None
            yield

    def _remove_orphans(self) -> None:
        """Removes files of saves that were cut short, and says which states are damaged."""
        sizes = self._index.states()
        for path in self._states.iterdir():
            if path.name not in sizes:
                path.unlink()
            elif path.stat().st_size == sizes[path.name]:
                del sizes[path.name]
        for name in sizes:
            logger.error("%s: missing, or not as long as it was written; its sessions cannot be read", name)

    @contextlib.contextmanager
    def _room_for(self, record: SessionRecord, size: int) -> Iterator[None]:
        """Keeps room for a version while it is being written.

        Raises:
            SessionConflictError: it could not be entered, and need not be written.
            StoreFullError: there is no room.
        """
        is_new, freed = self._index.needs(record)
        with self._coming_lock:
            used = self._index.usage()
            if is_new and used.sessions + self._coming.sessions >= self._max_sessions:
                raise StoreFullError(f"this server keeps {self._max_sessions} sessions at most, and has as many")
            if size and used.state_bytes + self._coming.state_bytes + size - freed > self._max_bytes:
                raise StoreFullError(f"no room for {size} bytes: sessions may take {self._max_bytes} bytes on disk")
            self._coming = Usage(self._coming.sessions + is_new, self._coming.state_bytes + size)
        try:
            yield
        finally:
            with self._coming_lock:
                self._coming = Usage(self._coming.sessions - is_new, self._coming.state_bytes - size)

    def _write(self, record: SessionRecord, state: bytes) -> StateFile:
        name = f"{record.id}-{record.version}-{secrets.token_hex(4)}.safetensors"
        try:
            with atomic_file(self._states / name) as aside:
                aside.write_bytes(state)
        except OSError as error:
            if is_full(error):
                raise StoreFullError(f"{self._folder}: no room for {len(state)} bytes: {error.strerror}") from None
            raise StoreError(f"{self._folder}: cannot write there: {error.strerror}") from None
        return StateFile(name, len(state), hashlib.sha256(state).hexdigest())

    def _unlink(self, names: Iterable[str]) -> None:
        """Removes states that nobody needs; one that stays is removed when the folder is opened again."""
        for name in names:
            with contextlib.suppress(OSError):
                (self._states / name).unlink()


def _read(path: Path, written: StateFile) -> bytes:
    try:
        state = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DamagedSessionError(f"{path}: expected the state of a session: {error.strerror}") from None
    if len(state) != written.size_bytes:
        raise DamagedSessionError(f"{path}: expected {written.size_bytes} bytes, found {len(state)}")
    if hashlib.sha256(state).hexdigest() != written.sha256:
        raise DamagedSessionError(f"{path}: expected SHA-256 {written.sha256[:12]}, the file has another")
    return state
