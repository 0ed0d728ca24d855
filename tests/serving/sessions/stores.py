"""Records and states to store, and every kind of store."""

from __future__ import annotations

import errno
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import fsspec

from serving.sessions.disk import DiskStore
from serving.sessions.memory import CachedStore, MemoryStore
from serving.sessions.records import SessionRecord, new_session_id
from serving.sessions.shared import SharedStore
from serving.sessions.store import Store

NOW = 1_700_000_000.0
LARGE = 1 << 30


def new_record(state: bytes, **values: Any) -> SessionRecord:
    """Version 1 of a new session."""
    facts: dict[str, Any] = {
        "id": new_session_id(NOW),
        "fingerprint": "f" * 64,
        "position": len(state),
        "version": 1,
        "created": NOW,
        "updated": NOW,
        "ttl_s": 60.0,
        "expires": NOW + 60.0,
        "parent": None,
        "state_bytes": len(state),
        "metadata": {"topic": "çay & \n"},
        "messages": ({"role": "user", "content": "Grüße 🙂"},),
    }
    return SessionRecord(**facts | values)


def next_record(record: SessionRecord, state: bytes, now: float = NOW, **values: Any) -> SessionRecord:
    return record.saved(now, position=len(state), state_bytes=len(state), **values)


class BucketFileSystem(fsspec.AbstractFileSystem):  # type: ignore[misc]  # fsspec has no types
    """Behaves as drivers of object stores do: whole objects by name, folders only in names, creation refused by it."""

    protocol = "bucket"
    cachable = False
    objects: ClassVar[dict[str, bytes]] = {}
    lock = threading.Lock()

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        with self.lock:
            if mode == "create" and self._strip_protocol(path) in self.objects:
                raise FileExistsError(path)
            self.objects[self._strip_protocol(path)] = bytes(value)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        data = self.objects.get(self._strip_protocol(path))
        if data is None:
            raise FileNotFoundError(path)
        if start is not None and start >= len(data):
            raise OSError(errno.EINVAL, "The requested range is not satisfiable")  # as S3 has it
        return data[start:end]

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        begin = self._strip_protocol(path).rstrip("/") + "/"
        with self.lock:
            inside = {name: len(data) for name, data in self.objects.items() if name.startswith(begin)}
        if not inside:
            raise FileNotFoundError(path)
        found = {}
        for name, size in inside.items():
            child, *deeper = name.removeprefix(begin).split("/")
            kind = "directory" if deeper else "file"
            found[begin + child] = {"name": begin + child, "size": 0 if deeper else size, "type": kind}
        return list(found.values()) if detail else list(found)

    def rm_file(self, path: str) -> None:
        with self.lock:
            if self.objects.pop(self._strip_protocol(path), None) is None:
                raise FileNotFoundError(path)


fsspec.register_implementation("bucket", BucketFileSystem, clobber=True)


def memory_store(_: Path) -> Store:
    return MemoryStore(LARGE, 1000)


def disk_store(folder: Path) -> Store:
    return DiskStore(folder / "sessions", LARGE, 1000)


def cached_disk_store(folder: Path) -> Store:
    return CachedStore(DiskStore(folder / "sessions", LARGE, 1000), 150)


def shared_local_store(folder: Path) -> Store:
    return SharedStore(f"file://{folder}/shared/sessions", 1000)


def shared_memory_store(_: Path) -> Store:
    return SharedStore(f"memory://{uuid.uuid4().hex}/sessions", 1000)


def shared_bucket_store(_: Path) -> Store:
    return SharedStore(f"bucket://{uuid.uuid4().hex}/sessions", 1000)


def cached_shared_store(folder: Path) -> Store:
    return CachedStore(shared_local_store(folder), 150)


STORES: list[Callable[[Path], Store]] = [
    memory_store,
    disk_store,
    cached_disk_store,
    shared_local_store,
    shared_memory_store,
    shared_bucket_store,
    cached_shared_store,
]
