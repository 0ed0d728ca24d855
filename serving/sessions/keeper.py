"""What all sessions of a server have in common, whichever model it serves: a store, and threads that wait for it."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from time import time
from typing import Any, TypeVar

from serving.metrics import SessionMetrics
from serving.sessions.errors import SessionBusyError, StoreFullError
from serving.sessions.records import SessionRecord
from serving.sessions.store import Store
from yunmin.errors import YunminError

logger = logging.getLogger("yunmin.serving")

T = TypeVar("T")

_THREADS = 4
_SWEEP_S = 60.0


@dataclass(frozen=True)
class SessionLimits:
    """What one session may be.

    Attributes:
        ttl_s: seconds that it lives after it was last saved; None for ever. A client may ask for less.
        tokens: that it may have read before more are added, or when it is uploaded.
    """

    ttl_s: float | None
    tokens: int


class Keeper:
    """Runs a store's blocking methods beside the event loop, one request per session at a time.

    Args:
        store: keeps the sessions; closed with the keeper.
        limits: of each.
        metrics: what is counted.
        clock: seconds since 1970.
    """

    def __init__(
        self, store: Store, limits: SessionLimits, metrics: SessionMetrics, clock: Callable[[], float] = time
    ) -> None:
        self.store = store
        self.limits = limits
        self.clock = clock
        self.metrics = metrics
        self._threads = ThreadPoolExecutor(_THREADS, "yunmin-sessions")
        self._busy: set[str] = set()
        self._closing = threading.Event()
        self._sweeper = threading.Thread(target=self._sweep_often, name="yunmin-sessions-sweeper", daemon=True)

    def start(self) -> None:
        """Begins to remove expired sessions."""
        self._sweeper.start()

    def close(self) -> None:
        """Waits for what is being saved, and closes the store."""
        self._closing.set()
        self._threads.shutdown()
        if self._sweeper.is_alive():
            self._sweeper.join()
        self.store.close()

    @contextmanager
    def exclusive(self, session_id: str) -> Iterator[None]:
        """Keeps other requests of this process from a session; on the event loop.

        Raises:
            SessionBusyError: one has it.
        """
        if session_id in self._busy:
            raise SessionBusyError(session_id)
        self._busy.add(session_id)
        try:
            yield
        finally:
            self._busy.discard(session_id)

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """Calls a function that blocks, in a thread.

        A thread cannot be stopped. So when the caller is cancelled, this still waits for the end of the call, lest
        another request find the session half saved.
        """
        future = asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            while not future.done():
                try:
                    await asyncio.wait({future})
                except asyncio.CancelledError:
                    continue
            if not future.cancelled() and (error := future.exception()) is not None:
                logger.info("after its request had ended: %s", error)
            raise

    def save(self, record: SessionRecord, state: bytes) -> None:
        """Stores a version, over expired sessions if need be; blocks."""
        with self.metrics.save_s.time():
            self._with_room(lambda: self.store.save(record, state))

    def fork(self, source: SessionRecord, record: SessionRecord) -> None:
        """Stores a fork, over expired sessions if need be; blocks."""
        self._with_room(lambda: self.store.fork(source, record))

    def delete(self, session_id: str) -> bool:
        """Removes a session; blocks."""
        deleted = self.store.delete(session_id)
        self._report()
        return deleted

    def sweep(self) -> int:
        """Removes expired sessions, but for those in use; blocks."""
        removed = self.store.remove_expired(self.clock(), self._busy.copy())
        self._report()
        return removed

    def _with_room(self, action: Callable[[], None]) -> None:
        try:
            action()
        except StoreFullError:
            if not self.sweep():
                raise
            action()
        self._report()

    def _sweep_often(self) -> None:
        while True:
            try:
                self.sweep()
            except YunminError as error:
                logger.warning("expired sessions could not be removed: %s", error)
            except Exception:
                logger.exception("expired sessions could not be removed")
            if self._closing.wait(_SWEEP_S):
                return

    def _report(self) -> None:
        usage = self.store.usage()
        self.metrics.sessions.set(usage.sessions)
        self.metrics.state_bytes.set(usage.state_bytes)
