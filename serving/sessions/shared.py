"""Sessions that several workers or machines serve: versioned objects of an `fsspec` file system, and no other index.

Version 7 of a session is the object `SESSION/00000007`: a line of JSON with the record, the messages, the state. It is
created whole, and only where there is no object of that name, so of two workers that have read version 6 one succeeds
and the other is told. The greatest number is the session. A version that has been replaced is overwritten with a few
bytes that say so and stays for a while, lest a worker that slept through the change create it anew; a deleted session
ends with a last version that says so.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import threading
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

from serving.sessions.errors import DamagedSessionError, SessionConflictError, StoreError, StoreFullError
from serving.sessions.exclusive import ObjectStore
from serving.sessions.records import SessionRecord, decode_record, encode_record, is_session_id
from serving.sessions.store import Usage

logger = logging.getLogger("yunmin.serving")

_MAGIC = b"yunmin-session-1 "
_REPLACED = b"replaced\n"  # not empty: S3 refuses to read the first bytes of nothing
_HEAD_BYTES = 65_536  # the record is in the first of an object's; what clients may put into it is bounded
_REPLACED_KEPT = 16  # versions back; a worker that saves must not have slept through more
_DELETED_KEPT_S = 86_400.0  # no request takes as long


@dataclass(frozen=True)
class _Head:
    """The last version of a session.

    Attributes:
        version: of the session.
        record: without messages; None once deleted.
        deleted: seconds since 1970, or 0.
        begin: where the messages begin in the object.
        messages_bytes: their size; the state follows.
        sha256: hexadecimal, of both.
    """

    version: int
    record: SessionRecord | None
    deleted: float = 0.0
    begin: int = 0
    messages_bytes: int = 0
    sha256: str = ""


class SharedStore:
    """Sessions at a URL, for any number of workers; see `Store`.

    Args:
        url: as fsspec names it, such as `s3://bucket/sessions` or `file:///mnt/sessions`.
        max_sessions: how many, as far as this worker knows; it counts the others' about once a minute.
    """

    def __init__(self, url: str, max_sessions: int) -> None:
        self._objects = ObjectStore(url)
        self._max_sessions = max_sessions
        self._lock = threading.Lock()
        self._heads: dict[str, _Head] = {}  # as last seen; decides nothing but the usage and what is read when sweeping

    def save(self, record: SessionRecord, state: bytes) -> None:
        before = record.version - 1
        if before and self._last_version(record.id) != before:
            raise SessionConflictError(record.id)
        if not before and self.usage().sessions >= self._max_sessions:
            raise StoreFullError(f"this server keeps {self._max_sessions} sessions at most, and has as many")
        if not self._objects.create(_name(record.id, record.version), _framed(record, state)):
            raise SessionConflictError(record.id)
        self._replaced(record.id, before)
        self._remember(record.id, _Head(record.version, replace(record, messages=())))

    def fork(self, source: SessionRecord, record: SessionRecord) -> None:
        loaded = self.load(source.id)
        if loaded is None or loaded[0].version != source.version:
            raise SessionConflictError(source.id)
        self.save(record, loaded[1])

    def find(self, session_id: str) -> SessionRecord | None:
        found = self._read(session_id, _HEAD_BYTES)
        if found is None or found[0].record is None:
            return None
        head, data = found
        end = head.begin + head.messages_bytes
        if end > len(data):
            whole = self._objects.read(_name(session_id, head.version), end)
            if whole is None or len(whole) < end:  # replaced since
                return self.find(session_id)
            data = whole
        return self._with_messages(head, data)

    def load(self, session_id: str) -> tuple[SessionRecord, bytes] | None:
        found = self._read(session_id)
        if found is None or found[0].record is None:
            return None
        head, data = found
        if hashlib.sha256(memoryview(data)[head.begin :]).hexdigest() != head.sha256:
            raise self._damaged(session_id, head.version, f"expected SHA-256 {head.sha256[:12]}, it has another")
        return self._with_messages(head, data), data[head.begin + head.messages_bytes :]

    def delete(self, session_id: str) -> bool:
        while (found := self._read(session_id, _HEAD_BYTES)) is not None and found[0].record is not None:
            if self._end(session_id, found[0]):
                return True
        return False

    def records(self, limit: int, before: str | None = None) -> list[SessionRecord]:
        ids = sorted((i for i in self._objects.names() if is_session_id(i)), reverse=True)
        records: list[SessionRecord] = []
        for session_id in ids:
            if len(records) >= limit:
                break
            if before is None or session_id < before:
                with _logged():
                    found = self._read(session_id, _HEAD_BYTES)
                    if found is not None and found[0].record is not None:
                        records.append(found[0].record)
        return records

    def remove_expired(self, now: float, keep: Collection[str]) -> int:
        """As in `Store`; also counts anew, and tidies up behind workers that were killed."""
        sessions: dict[str, dict[int, int]] = {}
        for name, size in self._objects.sizes().items():
            session_id, _, number = name.partition("/")
            if is_session_id(session_id) and number.isdecimal():
                sessions.setdefault(session_id, {})[int(number)] = size
        with self._lock:
            self._heads = {i: head for i, head in self._heads.items() if i in sessions}
        removed = 0
        for session_id, sizes in sessions.items():
            with _logged():
                removed += self._sweep(session_id, sizes, now, keep)
        self._objects.remove_leftovers()
        return removed

    def usage(self) -> Usage:
        with self._lock:
            records = [head.record for head in self._heads.values() if head.record is not None]
        return Usage(len(records), sum(record.state_bytes for record in records))

    def close(self) -> None:
        """Nothing is held open."""

    def _sweep(self, session_id: str, sizes: dict[int, int], now: float, keep: Collection[str]) -> bool:
        last = max(sizes)
        with self._lock:
            head = self._heads.get(session_id)
        if head is None or head.version < last:
            found = self._read(session_id, _HEAD_BYTES)
            if found is None:
                return False
            head = found[0]
            self._remember(session_id, head)
        for version in sorted(sizes):
            if version < last and sizes[version] != len(_REPLACED):
                self._objects.replace(_name(session_id, version), _REPLACED)
        if head.record is None:
            if now > head.deleted + _DELETED_KEPT_S:
                for version in sorted(sizes):  # the one that says so last
                    self._objects.remove(_name(session_id, version))
                self._objects.remove_folder(session_id)
            return False
        return head.record.expired(now) and session_id not in keep and self._end(session_id, head)

    def _end(self, session_id: str, head: _Head) -> bool:
        """Adds the last version of a session; false where another version has come first."""
        now = time.time()
        line = _MAGIC + json.dumps({"deleted": now}).encode() + b"\n"
        if not self._objects.create(_name(session_id, head.version + 1), line):
            return False
        self._replaced(session_id, head.version)
        self._remember(session_id, _Head(head.version + 1, None, deleted=now))
        return True

    def _replaced(self, session_id: str, version: int) -> None:
        """Marks a version that is no longer the last; what fails here is done when sweeping."""
        with _logged():
            if version:
                self._objects.replace(_name(session_id, version), _REPLACED)
            if version > _REPLACED_KEPT:
                self._objects.remove(_name(session_id, version - _REPLACED_KEPT))

    def _remember(self, session_id: str, head: _Head) -> None:
        with self._lock:
            known = self._heads.get(session_id)
            if known is None or known.version < head.version:
                self._heads[session_id] = head

    def _last_version(self, session_id: str) -> int:
        return max((int(name) for name in self._objects.names(session_id) if name.isdecimal()), default=0)

    def _read(self, session_id: str, end: int | None = None) -> tuple[_Head, bytes] | None:
        """The head and the bytes of the last version, or its first bytes."""
        replaced = 0
        while version := self._last_version(session_id):
            if version == replaced:
                raise self._damaged(session_id, version, "it says that it has been replaced, and is the last")
            data = self._objects.read(_name(session_id, version), end)
            if data is not None and data != _REPLACED:
                return self._parsed(session_id, version, data), data
            replaced = version  # since it was listed
        return None

    def _parsed(self, session_id: str, version: int, data: bytes) -> _Head:
        try:
            return _head(session_id, version, data)
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(session_id, version, str(error)) from None

    def _with_messages(self, head: _Head, data: bytes) -> SessionRecord:
        assert head.record is not None
        try:
            messages: Any = json.loads(data[head.begin : head.begin + head.messages_bytes])
        except ValueError as error:
            raise self._damaged(head.record.id, head.version, str(error)) from None
        return replace(head.record, messages=tuple(messages))

    def _damaged(self, session_id: str, version: int, reason: str) -> DamagedSessionError:
        return DamagedSessionError(f"{self._objects.url}/{_name(session_id, version)}: damaged: {reason}")


def _name(session_id: str, version: int) -> str:
    return f"{session_id}/{version:08d}"


def _head(session_id: str, version: int, data: bytes) -> _Head:
    line, newline, _ = data[:_HEAD_BYTES].partition(b"\n")
    if not newline or not line.startswith(_MAGIC):
        raise ValueError("it does not begin with the record of a session")
    values: Any = json.loads(line[len(_MAGIC) :])
    if "deleted" in values:
        return _Head(version, None, deleted=float(values["deleted"]))
    record = decode_record(json.dumps(values["record"]))
    if (record.id, record.version) != (session_id, version):
        raise ValueError(f"it holds version {record.version} of {record.id!r}")
    return _Head(version, record, 0.0, len(line) + 1, int(values["messages_bytes"]), str(values["sha256"]))


def _framed(record: SessionRecord, state: bytes) -> bytes:
    facts, conversation = encode_record(record)
    messages = conversation.encode()
    digest = hashlib.sha256(messages)
    digest.update(state)
    head = {"record": json.loads(facts), "messages_bytes": len(messages), "sha256": digest.hexdigest()}
    line = _MAGIC + json.dumps(head, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
    assert len(line) <= _HEAD_BYTES
    return b"".join((line, messages, state))


@contextlib.contextmanager
def _logged() -> Iterator[None]:
    """One session's trouble does not stop work on the others, or undo what has been saved."""
    try:
        yield
    except (StoreError, DamagedSessionError) as error:
        logger.warning("%s", error)
