"""Sessions as requests use them: read, gone on with, saved, forked, moved."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace

from serving.sessions.errors import (
    EmptySessionError,
    PositionError,
    SessionExpiredError,
    SessionTooLongError,
    UnknownSessionError,
    WrongModelError,
)
from serving.sessions.keeper import Keeper
from serving.sessions.named import NamedState, find_state
from serving.sessions.records import Message, SessionRecord, is_session_id, new_session_id
from yunmin.errors import StateError
from yunmin.language_model import LanguageModel
from yunmin.snapshots import max_snapshot_bytes, snapshot_from_bytes, snapshot_to_bytes
from yunmin.state import Snapshot


class Sessions:
    """The sessions of one model, and of one owner.

    A session is a conversation, a document or whatever a client goes on with: the state after its last token, its
    tokens and its sampler. A request that goes on uses it exclusively and commits at its end, or leaves it as it was:

        async with sessions.use(session_id) as lease:
            ids = [*lease.token_ids, *tail]
            stream = engine.submit(Job(ids, params, deadline_s, start=lease.snapshot, keep=True))
            ...                                         # send all but the last event
            record = await lease.commit(stream.snapshot)
            ...                                         # the last event names record.id and record.position

    Its methods belong on an event loop; what blocks runs in threads. They raise, beside what they name themselves:

    - `UnknownSessionError`, `SessionExpiredError`: 404;
    - `SessionBusyError`, `SessionConflictError`, `PositionError`, `WrongModelError`, `EmptySessionError`: 409;
    - `DamagedSessionError`: 500; `StoreError`: 503; `StoreFullError`: 507.

    Args:
        keeper: of all sessions.
        model: that the sessions go on with.
        states: named ones of this model.
        owner: name of the key whose sessions these are; others' are unknown here.
    """

    def __init__(
        self, keeper: Keeper, model: LanguageModel, states: Mapping[str, NamedState] | None = None, owner: str = ""
    ) -> None:
        self.keeper = keeper
        self.states = dict(states or {})
        self._model = model
        self._owner = owner

    def of_model(self, model: LanguageModel, states: Mapping[str, NamedState]) -> Sessions:
        """The same sessions for another model, which will refuse those of this one."""
        return Sessions(self.keeper, model, states, self._owner)

    def of_owner(self, owner: str) -> Sessions:
        """The sessions of one key."""
        return Sessions(self.keeper, self._model, self.states, owner)

    def named(self, name: str) -> Snapshot:
        """The snapshot of a named state.

        Raises:
            UnknownStateError: there is none.
        """
        return find_state(self.states, name).snapshot

    @property
    def upload_limit_bytes(self) -> int:
        """The largest state that may be uploaded."""
        return max_snapshot_bytes(self._model.config, self.keeper.limits.tokens)

    async def create(
        self,
        snapshot: Snapshot | None = None,
        *,
        ttl_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
        messages: Sequence[Message] = (),
    ) -> SessionRecord:
        """A new session.

        Args:
            snapshot: where it begins; None before the first token.
            ttl_s: seconds that it lives after it was last saved, at most the server's own limit; None for that.
            metadata: the client's own.
            messages: the conversation that led to the snapshot.
        """
        return await self.keeper.run(self._create, snapshot, ttl_s, dict(metadata or {}), tuple(messages))

    async def describe(self, session_id: str) -> SessionRecord:
        """A session as it was last saved."""
        return await self.keeper.run(self._find, session_id)

    async def newest(self, limit: int, before: str | None = None) -> list[SessionRecord]:
        """The newest sessions first, without their messages.

        Args:
            limit: how many at most.
            before: only those older than this one.
        """
        return await self.keeper.run(self._newest, limit, before)

    async def delete(self, session_id: str) -> None:
        """Removes a session that nobody uses."""
        with self.keeper.exclusive(session_id):
            await self.keeper.run(self._delete, session_id)

    async def fork(
        self,
        session_id: str,
        *,
        position: int | None = None,
        ttl_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> SessionRecord:
        """A new session that goes on from where another was last saved; that one may be in use.

        Args:
            session_id: of the other.
            position: where it must be; None wherever it is.
            ttl_s: of the fork, as in `create`.
            metadata: of the fork; None for those of the other.
        """
        return await self.keeper.run(self._fork, session_id, position, ttl_s, metadata)

    async def download(self, session_id: str) -> tuple[SessionRecord, bytes]:
        """A session's state as it was last saved, as safetensors."""
        return await self.keeper.run(self._download, session_id)

    async def upload(self, session_id: str, data: bytes) -> SessionRecord:
        """Puts another state in the place of a session's, which forgets its conversation.

        Args:
            session_id: of the session.
            data: from `download`, here or elsewhere; of the same model.

        Raises:
            StateError: the data are damaged, another model's, or too long.
        """
        with self.keeper.exclusive(session_id):
            return await self.keeper.run(self._upload, session_id, data)

    @asynccontextmanager
    async def use(self, session_id: str, position: int | None = None) -> AsyncIterator[Lease]:
        """A session for one request, exclusively until it has committed or the block ends.

        Args:
            session_id: of the session.
            position: where the client believes it to be; None wherever it is.

        Raises:
            SessionTooLongError: it may not grow further.
        """
        with ExitStack() as held:
            held.enter_context(self.keeper.exclusive(session_id))
            record, snapshot = await self.keeper.run(self._restore, session_id, position)
            yield Lease(self, record, snapshot, held.close)

    def _create(
        self,
        snapshot: Snapshot | None,
        ttl_s: float | None,
        metadata: Mapping[str, str],
        messages: tuple[Message, ...],
    ) -> SessionRecord:
        state = b"" if snapshot is None else snapshot_to_bytes(snapshot, self._model.fingerprint)
        position = 0 if snapshot is None else len(snapshot.token_ids)
        record = self._new_record(ttl_s, position, len(state), metadata, messages)
        self.keeper.save(record, state)
        return record

    def _new_record(
        self,
        ttl_s: float | None,
        position: int,
        state_bytes: int,
        metadata: Mapping[str, str],
        messages: tuple[Message, ...],
        parent: str | None = None,
    ) -> SessionRecord:
        now, limit = self.keeper.clock(), self.keeper.limits.ttl_s
        if limit is not None:
            ttl_s = limit if ttl_s is None else min(ttl_s, limit)
        return SessionRecord(
            id=new_session_id(now),
            fingerprint=self._model.fingerprint,
            position=position,
            version=1,
            created=now,
            updated=now,
            ttl_s=ttl_s,
            expires=None if ttl_s is None else now + ttl_s,
            parent=parent,
            state_bytes=state_bytes,
            owner=self._owner,
            metadata=metadata,
            messages=messages,
        )

    def _find(self, session_id: str) -> SessionRecord:
        record = self.keeper.store.find(session_id) if is_session_id(session_id) else None
        return self._checked(session_id, record)

    def _checked(self, session_id: str, record: SessionRecord | None) -> SessionRecord:
        if record is None or record.owner != self._owner:
            raise UnknownSessionError(session_id)
        if record.expired(self.keeper.clock()):
            raise SessionExpiredError(session_id)
        return record

    def _require_model(self, record: SessionRecord) -> None:
        if record.fingerprint != self._model.fingerprint:
            raise WrongModelError(record.id, self._model.fingerprint, record.fingerprint)

    def _load(self, session_id: str) -> tuple[SessionRecord, bytes]:
        loaded = self.keeper.store.load(session_id) if is_session_id(session_id) else None
        record = self._checked(session_id, None if loaded is None else loaded[0])
        assert loaded is not None
        return record, loaded[1]

    def _newest(self, limit: int, before: str | None) -> list[SessionRecord]:
        found: list[SessionRecord] = []
        now = self.keeper.clock()
        while len(found) < limit and (page := self.keeper.store.records(limit, before)):
            found += [record for record in page if record.owner == self._owner and not record.expired(now)]
            before = page[-1].id
        return found[:limit]

    def _delete(self, session_id: str) -> None:
        self._find(session_id)
        if not self.keeper.delete(session_id):
            raise UnknownSessionError(session_id)

    def _fork(
        self, session_id: str, position: int | None, ttl_s: float | None, metadata: Mapping[str, str] | None
    ) -> SessionRecord:
        source = self._find(session_id)
        self._require_model(source)
        _require_position(source, position)
        own = source.metadata if metadata is None else dict(metadata)
        ttl_s = source.ttl_s if ttl_s is None else ttl_s
        record = self._new_record(ttl_s, source.position, source.state_bytes, own, source.messages, source.id)
        self.keeper.fork(source, record)
        return record

    def _download(self, session_id: str) -> tuple[SessionRecord, bytes]:
        record, state = self._load(session_id)
        if not state:
            raise EmptySessionError(session_id)
        return record, state

    def _upload(self, session_id: str, data: bytes) -> SessionRecord:
        record = self._find(session_id)
        snapshot = snapshot_from_bytes("uploaded state", data, self._model.config, self._model.fingerprint)
        if (tokens := len(snapshot.token_ids)) > self.keeper.limits.tokens:
            raise StateError(
                f"uploaded state: holds {tokens} tokens, at most {self.keeper.limits.tokens} on this server"
            )
        return self._save(replace(record, messages=()), snapshot)

    def _restore(self, session_id: str, position: int | None) -> tuple[SessionRecord, Snapshot | None]:
        with self.keeper.metrics.restore_s.time():
            record, state = self._load(session_id)
            self._require_model(record)
            _require_position(record, position)
            if record.position >= self.keeper.limits.tokens:
                raise SessionTooLongError(session_id, record.position, self.keeper.limits.tokens)
            if not state:
                return record, None
            snapshot = snapshot_from_bytes(
                f"session {session_id!r}", state, self._model.config, self._model.fingerprint
            )
            return record, replace(snapshot, state=snapshot.state.to(self._model.runtime.device))

    def _save(
        self, record: SessionRecord, snapshot: Snapshot, messages: tuple[Message, ...] | None = None
    ) -> SessionRecord:
        state = snapshot_to_bytes(snapshot, self._model.fingerprint)
        saved = record.saved(
            self.keeper.clock(),
            fingerprint=self._model.fingerprint,
            position=len(snapshot.token_ids),
            state_bytes=len(state),
            messages=record.messages if messages is None else messages,
        )
        self.keeper.save(saved, state)
        return saved


class Lease:
    """One request's use of a session; made by `Sessions.use`.

    Attributes:
        record: as last saved.
        snapshot: to go on from; None before the first token.
    """

    def __init__(
        self, sessions: Sessions, record: SessionRecord, snapshot: Snapshot | None, release: Callable[[], None]
    ) -> None:
        self.record = record
        self.snapshot = snapshot
        self._sessions = sessions
        self._release = release

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Every token read so far."""
        return () if self.snapshot is None else self.snapshot.token_ids

    async def commit(self, snapshot: Snapshot, messages: Sequence[Message] | None = None) -> SessionRecord:
        """Saves the session where it is now; on the disk, or where it is kept, before this returns.

        The session is then free: whoever reads of its new position in the last event may use it at once.

        Args:
            snapshot: after the last token, from `TokenStream.snapshot`.
            messages: the whole conversation by now; None leaves it.

        Returns:
            The session's new record.

        Raises:
            SessionConflictError: another worker has come first; the session is as that one left it.
            StateError: the snapshot holds numbers that are not finite; the session is as it was.
        """
        kept = None if messages is None else tuple(messages)
        self.record = await self._sessions.keeper.run(self._sessions._save, self.record, snapshot, kept)
        self.snapshot = snapshot
        self._release()
        return self.record


def _require_position(record: SessionRecord, position: int | None) -> None:
    if position is not None and position != record.position:
        raise PositionError(record.id, position, record.position)
