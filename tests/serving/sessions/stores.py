"""Records and states to store, and every kind of store."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def cached_shared_store(folder: Path) -> Store:
    return CachedStore(shared_local_store(folder), 150)


STORES: list[Callable[[Path], Store]] = [
    memory_store,
    disk_store,
    cached_disk_store,
    shared_local_store,
    shared_memory_store,
    cached_shared_store,
]
