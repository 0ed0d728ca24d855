"""Sessions: exclusive, exact, and refused by name where they are not the client's to go on with."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry

import yunmin
from serving.engine.job import Job
from serving.metrics import SessionMetrics
from serving.sessions.errors import (
    DamagedSessionError,
    EmptySessionError,
    PositionError,
    SessionBusyError,
    SessionConflictError,
    SessionExpiredError,
    SessionTooLongError,
    StoreFullError,
    UnknownSessionError,
    WrongModelError,
)
from serving.sessions.keeper import Keeper, SessionLimits
from serving.sessions.manager import Lease, Sessions
from serving.sessions.memory import MemoryStore
from serving.sessions.store import Store
from tests.serving.engines import engine_on, run
from tests.serving.fixtures import write_model
from tests.serving.sessions.stores import LARGE, NOW, STORES, disk_store, memory_store, shared_local_store
from yunmin.errors import StateError
from yunmin.language_model import LanguageModel
from yunmin.sampling import SamplingParams
from yunmin.snapshots import max_snapshot_bytes, snapshot_to_bytes
from yunmin.state import Snapshot

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, repetition_penalty=1.1)
SEEDED = SamplingParams(max_tokens=12, temperature=1.3, seed=5, top_k=50)


@dataclass
class Clock:
    now: float = NOW

    def __call__(self) -> float:
        return self.now


@asynccontextmanager
async def sessions_on(
    model: LanguageModel, store: Store, *, clock: Clock | None = None, ttl_s: float | None = 100.0, tokens: int = 10_000
) -> AsyncIterator[Sessions]:
    keeper = Keeper(store, SessionLimits(ttl_s, tokens), SessionMetrics(CollectorRegistry()), clock or Clock())
    try:
        yield Sessions(keeper, model)
    finally:
        await asyncio.to_thread(keeper.close)


def in_memory(model: LanguageModel, body: Callable[[Sessions], Coroutine[Any, Any, None]], **options: Any) -> None:
    async def main() -> None:
        async with sessions_on(model, MemoryStore(LARGE, 1000), **options) as sessions:
            await body(sessions)

    run(main())


def same(a: Snapshot, b: Snapshot) -> bool:
    tensors = zip((*a.state.conv, *a.state.ssm, a.logits), (*b.state.conv, *b.state.ssm, b.logits), strict=True)
    return a.token_ids == b.token_ids and all(torch.equal(x, y) for x, y in tensors)


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("make", STORES, ids=lambda make: make.__name__)
def test_going_on_with_a_session_equals_never_having_stopped(
    model: LanguageModel, tmp_path: Path, make: Callable[[Path], Store], params: SamplingParams
) -> None:
    head, tail = model.encode("def main("), model.encode(" argument):\n")
    onward = replace(params, seed=None)  # as its sampler would

    async def main() -> None:
        async with engine_on(model) as engine, sessions_on(model, make(tmp_path)) as sessions:

            async def turn(session_id: str, new: list[int], params: SamplingParams) -> list[int]:
                async with sessions.use(session_id) as lease:
                    job = Job([*lease.token_ids, *new], params, 60, start=lease.snapshot, keep=True)
                    with engine.submit(job) as stream:
                        tokens = [piece.token_id async for piece in stream]
                    assert stream.snapshot is not None
                    await lease.commit(stream.snapshot)
                    return [token for token in tokens if token is not None]

            whole = engine.submit(Job(head, replace(params, max_tokens=36), 60, keep=True))
            expected = [piece.token_id async for piece in whole]
            saved = await sessions.create()
            assert await turn(saved.id, head, params) == expected[:12]
            fork = await sessions.fork(saved.id, position=len(head) + 12)
            moved = await sessions.create()
            await sessions.upload(moved.id, (await sessions.download(fork.id))[1])
            for session in (saved, fork, moved):
                assert await turn(session.id, [], onward) == expected[12:24]
                assert await turn(session.id, [], onward) == expected[24:]
                async with sessions.use(session.id, position=len(head) + 36) as lease:
                    assert lease.snapshot is not None
                    assert whole.snapshot is not None
                    assert same(lease.snapshot, whole.snapshot)
            assert whole.snapshot is not None
            # and new tails part them
            one, other = await turn(saved.id, tail, GREEDY), await turn(fork.id, head, GREEDY)
            alone = model.generate(
                [*whole.snapshot.token_ids, *tail], max_tokens=12, temperature=0, repetition_penalty=1.1
            )
            assert one == list(alone.token_ids)
            assert other != one

    run(main())


def test_a_record_says_where_its_session_is(model: LanguageModel) -> None:
    clock = Clock()

    async def body(sessions: Sessions) -> None:
        snapshot = model.snapshot([1, 2, 3])
        record = await sessions.create(snapshot, metadata={"a": "b"}, ttl_s=30.0, messages=[{"role": "user"}])
        assert (record.position, record.version, record.expires, record.parent) == (3, 1, NOW + 30, None)
        assert record.state_bytes == len(snapshot_to_bytes(snapshot, model.fingerprint))
        assert await sessions.describe(record.id) == record
        async with sessions.use(record.id) as lease:
            saved = await lease.commit(model.snapshot([4], lease.snapshot))
            assert saved == lease.record
            assert lease.token_ids == (1, 2, 3, 4)
        assert (saved.position, saved.version, saved.metadata, saved.messages) == (
            4,
            2,
            {"a": "b"},
            ({"role": "user"},),
        )
        clock.now += 1
        fork = await sessions.fork(record.id, metadata={}, ttl_s=1000.0)
        assert (fork.parent, fork.position, fork.version, fork.metadata) == (record.id, 4, 1, {})
        assert fork.ttl_s == 100.0  # the server's own limit
        assert fork.messages == ({"role": "user"},)
        assert [r.id for r in await sessions.newest(10)] == [fork.id, record.id]
        assert [r.id for r in await sessions.newest(1)] == [fork.id]
        assert [r.id for r in await sessions.newest(1, before=fork.id)] == [record.id]
        await sessions.delete(record.id)
        with pytest.raises(UnknownSessionError):
            await sessions.describe(record.id)
        assert sessions.keeper.store.usage().sessions == 1

    in_memory(model, body, clock=clock)


def test_a_request_that_fails_leaves_the_session_as_it_was(model: LanguageModel) -> None:
    async def body(sessions: Sessions) -> None:
        record = await sessions.create(model.snapshot([1, 2]))
        with pytest.raises(ZeroDivisionError):
            async with sessions.use(record.id):
                raise ZeroDivisionError
        task = asyncio.create_task(hold(sessions, record.id))
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        async with sessions.use(record.id) as lease:
            assert lease.record == record

    in_memory(model, body)


async def hold(sessions: Sessions, session_id: str) -> None:
    async with sessions.use(session_id):
        await asyncio.sleep(60)


def test_a_session_in_use_is_nobody_elses(model: LanguageModel) -> None:
    async def body(sessions: Sessions) -> None:
        record = await sessions.create(model.snapshot([1, 2]))
        data = (await sessions.download(record.id))[1]
        async with sessions.use(record.id) as lease:
            with pytest.raises(SessionBusyError):
                async with sessions.use(record.id):
                    pass
            with pytest.raises(SessionBusyError):
                await sessions.delete(record.id)
            with pytest.raises(SessionBusyError):
                await sessions.upload(record.id, data)
            # what only reads sees the session as it was last saved
            assert (await sessions.describe(record.id)).version == 1
            assert (await sessions.fork(record.id)).position == 2
            await lease.commit(model.snapshot([3], lease.snapshot))
            assert (await sessions.fork(record.id)).position == 3
        async with sessions.use(record.id) as lease:
            assert lease.record.version == 2

    in_memory(model, body)


def test_a_session_is_free_once_it_is_saved_though_its_request_still_sends(model: LanguageModel) -> None:
    async def body(sessions: Sessions) -> None:
        record = await sessions.create(model.snapshot([1, 2]))
        async with sessions.use(record.id) as first:
            await first.commit(model.snapshot([3], first.snapshot))
            second = sessions.use(record.id)
            lease = await second.__aenter__()
            assert lease.record.position == 3
        with pytest.raises(SessionBusyError):  # the end of the first does not free it from the second
            await sessions.delete(record.id)
        await lease.commit(model.snapshot([4], lease.snapshot))
        await second.__aexit__(None, None, None)
        await sessions.delete(record.id)

    in_memory(model, body)


def test_of_many_requests_at_once_each_is_served_or_told_and_none_is_lost(model: LanguageModel, tmp_path: Path) -> None:
    async def main() -> None:
        async with sessions_on(model, disk_store(tmp_path)) as sessions:
            record = await sessions.create(model.snapshot([1]))

            async def append(token: int) -> bool:
                try:
                    async with sessions.use(record.id) as lease:
                        await lease.commit(model.snapshot([token], lease.snapshot))
                except SessionBusyError:
                    return False
                return True

            served: list[int] = []
            for first in range(0, 60, 6):
                tokens = range(first, first + 6)
                done = await asyncio.gather(*map(append, tokens))
                served += [token for token, ok in zip(tokens, done, strict=True) if ok]
            async with sessions.use(record.id) as lease:
                assert lease.token_ids == (1, *served)
            assert len(served) >= 10

    run(main())


def test_a_request_cancelled_while_saving_keeps_the_session_until_the_save_is_done(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(sessions: Sessions) -> None:
        record = await sessions.create(model.snapshot([1]))
        saving, go_on = threading.Event(), threading.Event()
        save = MemoryStore.save

        def slow(*arguments: Any) -> None:
            saving.set()
            assert go_on.wait(30)
            save(*arguments)

        monkeypatch.setattr(MemoryStore, "save", slow)

        async def turn() -> None:
            async with sessions.use(record.id) as lease:
                await lease.commit(model.snapshot([2], lease.snapshot))

        task = asyncio.create_task(turn())
        await asyncio.to_thread(saving.wait, 30)
        for _ in range(3):  # however often
            task.cancel()
            await asyncio.sleep(0.01)
        with pytest.raises(SessionBusyError):
            async with sessions.use(record.id):
                pass
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with sessions.use(record.id) as lease:
            assert lease.token_ids == (1, 2)

    in_memory(model, body)


def test_a_wrong_position_is_refused_with_both(model: LanguageModel) -> None:
    async def body(sessions: Sessions) -> None:
        record = await sessions.create(model.snapshot([1, 2]))
        with pytest.raises(PositionError, match="expected position 3, found 2"):
            async with sessions.use(record.id, position=3):
                pass
        with pytest.raises(PositionError, match="expected position 0, found 2"):
            await sessions.fork(record.id, position=0)
        async with sessions.use(record.id, position=2) as lease:
            assert lease.record == record

    in_memory(model, body)


@pytest.mark.parametrize("session_id", ["sess_" + "0" * 32, "", "../../etc/passwd", "sess_" + "A" * 32, "x" * 10_000])
def test_an_id_that_names_no_session_is_unknown(model: LanguageModel, session_id: str) -> None:
    async def body(sessions: Sessions) -> None:
        for deed in (sessions.describe, sessions.delete, sessions.fork, sessions.download, lambda i: hold(sessions, i)):
            with pytest.raises(UnknownSessionError) as caught:
                await deed(session_id)
            assert len(str(caught.value)) < 120

    in_memory(model, body)


def test_an_expired_session_is_refused_then_removed_and_one_that_is_saved_lives_on(model: LanguageModel) -> None:
    clock = Clock()

    async def body(sessions: Sessions) -> None:
        kept, left = await sessions.create(model.snapshot([1])), await sessions.create(model.snapshot([1]))
        clock.now += 60
        async with sessions.use(kept.id) as lease:
            await lease.commit(model.snapshot([2], lease.snapshot))
        clock.now += 40
        assert [r.id for r in await sessions.newest(10)] == [kept.id]
        for deed in (sessions.describe, sessions.delete, sessions.fork, sessions.download, lambda i: hold(sessions, i)):
            with pytest.raises(SessionExpiredError):
                await deed(left.id)
        assert sessions.keeper.sweep() == 1
        with pytest.raises(UnknownSessionError):
            await sessions.describe(left.id)
        async with sessions.use(kept.id) as lease:
            clock.now += 1000
            assert sessions.keeper.sweep() == 0  # it is in use
            await lease.commit(model.snapshot([3], lease.snapshot))
        assert (await sessions.describe(kept.id)).position == 3

    in_memory(model, body, clock=clock)


def test_without_a_limit_a_session_lives_until_it_is_deleted(model: LanguageModel) -> None:
    clock = Clock()

    async def body(sessions: Sessions) -> None:
        for_ever, short = await sessions.create(), await sessions.create(ttl_s=5.0)
        clock.now += 1e9
        assert (await sessions.describe(for_ever.id)).expires is None
        with pytest.raises(SessionExpiredError):
            await sessions.describe(short.id)

    in_memory(model, body, clock=clock, ttl_s=None)


def test_expired_sessions_make_room_before_a_store_is_full(model: LanguageModel, tmp_path: Path) -> None:
    from serving.sessions.disk import DiskStore

    clock = Clock()
    size = len(snapshot_to_bytes(model.snapshot([1]), model.fingerprint))

    async def main() -> None:
        async with sessions_on(model, DiskStore(tmp_path, 2 * size, 10), clock=clock) as sessions:
            first = await sessions.create(model.snapshot([1]), ttl_s=10.0)
            await sessions.create(model.snapshot([1]))
            with pytest.raises(StoreFullError):
                await sessions.create(model.snapshot([1]))
            clock.now += 10
            third = await sessions.create(model.snapshot([1]))
            with pytest.raises(UnknownSessionError):
                await sessions.describe(first.id)
            with pytest.raises(StoreFullError):
                async with sessions.use(third.id) as lease:
                    await lease.commit(model.snapshot(list(range(2, 100)), lease.snapshot))
            assert (await sessions.describe(third.id)).position == 1

    run(main())


def test_a_session_of_another_model_is_refused(model: LanguageModel, tmp_path: Path) -> None:
    other = yunmin.load(write_model(tmp_path / "other", seed=1), device="cpu")

    async def body(sessions: Sessions) -> None:
        record = await sessions.create(model.snapshot([1]))
        after_reload = sessions.of_model(other, {})
        with pytest.raises(WrongModelError, match="belongs to another model"):
            async with after_reload.use(record.id):
                pass
        with pytest.raises(WrongModelError):
            await after_reload.fork(record.id)
        data = (await after_reload.download(record.id))[1]
        with pytest.raises(StateError, match="uploaded state: belongs to another model"):
            await after_reload.upload(record.id, data)
        # an upload of its own turns it into one of this model's
        own = snapshot_to_bytes(other.snapshot([4, 5]), other.fingerprint)
        assert (await after_reload.upload(record.id, own)).fingerprint == other.fingerprint
        async with after_reload.use(record.id) as lease:
            assert lease.token_ids == (4, 5)

    in_memory(model, body)


def test_a_session_is_unknown_to_everyone_but_its_owner(model: LanguageModel) -> None:
    async def body(sessions: Sessions) -> None:
        mine, yours = sessions.of_owner("me"), sessions.of_owner("you")
        record = await mine.create(model.snapshot([1]))
        await yours.create()
        for deed in (yours.describe, yours.delete, yours.fork, yours.download, lambda i: hold(yours, i)):
            with pytest.raises(UnknownSessionError):
                await deed(record.id)
        with pytest.raises(UnknownSessionError):
            await yours.upload(record.id, (await mine.download(record.id))[1])
        assert [r.id for r in await mine.newest(1)] == [record.id]
        assert await sessions.newest(10) == []

    in_memory(model, body)


def test_uploads_are_bounded_and_checked_and_change_nothing_when_refused(model: LanguageModel) -> None:
    async def body(sessions: Sessions) -> None:
        record = await sessions.create(model.snapshot([1, 2]), messages=[{"role": "user"}])
        whole = snapshot_to_bytes(model.snapshot(list(range(20))), model.fingerprint)
        assert len(whole) < sessions.upload_limit_bytes == max_snapshot_bytes(model.config, 20)
        for data in (b"", whole[:-1], whole[:100], b"\xff" * 1000):
            with pytest.raises(StateError, match=r"^uploaded state: "):
                await sessions.upload(record.id, data)
        longer = snapshot_to_bytes(model.snapshot(list(range(21))), model.fingerprint)
        with pytest.raises(StateError, match="holds 21 tokens, at most 20"):
            await sessions.upload(record.id, longer)
        assert await sessions.describe(record.id) == record
        uploaded = await sessions.upload(record.id, whole)
        assert (uploaded.position, uploaded.version, uploaded.messages) == (20, 2, ())
        with pytest.raises(SessionTooLongError, match="holds 20 tokens, at most 20"):
            await hold(sessions, record.id)

    in_memory(model, body, tokens=20)


def test_a_session_that_has_read_nothing_has_no_state_to_download(model: LanguageModel) -> None:
    async def body(sessions: Sessions) -> None:
        record = await sessions.create()
        with pytest.raises(EmptySessionError):
            await sessions.download(record.id)
        async with sessions.use(record.id, position=0) as lease:
            assert (lease.snapshot, lease.token_ids) == (None, ())

    in_memory(model, body)


def test_a_snapshot_that_is_not_finite_is_not_committed(model: LanguageModel) -> None:
    async def body(sessions: Sessions) -> None:
        record = await sessions.create(model.snapshot([1]))
        async with sessions.use(record.id) as lease:
            spoilt = model.snapshot([2], lease.snapshot)
            spoilt.state.ssm[0][0, 0, 0] = float("nan")
            with pytest.raises(StateError, match="expected finite numbers"):
                await lease.commit(spoilt)
        assert await sessions.describe(record.id) == record

    in_memory(model, body)


def test_two_workers_share_sessions_and_the_slower_one_is_told(model: LanguageModel, tmp_path: Path) -> None:
    async def main() -> None:
        async with (
            sessions_on(model, shared_local_store(tmp_path)) as here,
            sessions_on(model, shared_local_store(tmp_path)) as there,
        ):
            record = await here.create(model.snapshot([1]))

            async def append(sessions: Sessions, token: int) -> Lease:
                async with sessions.use(record.id) as lease:
                    await lease.commit(model.snapshot([token], lease.snapshot))
                return lease

            await append(there, 2)
            await append(here, 3)
            async with here.use(record.id) as slow:
                await append(there, 4)
                with pytest.raises(SessionConflictError):
                    await slow.commit(model.snapshot([5], slow.snapshot))
                with pytest.raises(SessionConflictError):
                    await slow.commit(model.snapshot([5], slow.snapshot))
            assert (await append(here, 6)).token_ids == (1, 2, 3, 4, 6)
            assert (await there.fork(record.id)).position == 5
            async with here.use(record.id) as slow:
                await there.delete(record.id)
                with pytest.raises(SessionConflictError):
                    await slow.commit(model.snapshot([7], slow.snapshot))
            with pytest.raises(UnknownSessionError):
                await here.describe(record.id)

    run(main())


@pytest.mark.parametrize("make", [memory_store, disk_store], ids=lambda make: make.__name__)
def test_the_event_loop_never_waits_for_the_store(
    model: LanguageModel, tmp_path: Path, make: Callable[[Path], Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    loops: set[int] = set()

    async def main() -> None:
        loops.add(threading.get_ident())
        store = make(tmp_path)
        for name in ("save", "fork", "find", "load", "delete", "records", "remove_expired", "usage"):
            method = getattr(store, name)

            def watched(*arguments: Any, method: Any = method) -> Any:
                assert threading.get_ident() not in loops, "on the event loop"
                return method(*arguments)

            monkeypatch.setattr(store, name, watched)
        async with sessions_on(model, store) as sessions:
            record = await sessions.create(model.snapshot([1]))
            await sessions.describe(record.id)
            await sessions.newest(5)
            async with sessions.use(record.id) as lease:
                await lease.commit(model.snapshot([2], lease.snapshot))
            await sessions.upload(record.id, (await sessions.download(record.id))[1])
            await sessions.delete((await sessions.fork(record.id)).id)

    run(main())


def test_a_damaged_session_is_named_and_never_half_of_one(model: LanguageModel, tmp_path: Path) -> None:
    async def main() -> None:
        async with sessions_on(model, disk_store(tmp_path)) as sessions:
            record = await sessions.create(model.snapshot([1]))
            [path] = (tmp_path / "sessions" / "states").iterdir()
            path.write_bytes(path.read_bytes()[:-1])
            for deed in (sessions.download, lambda i: hold(sessions, i)):
                with pytest.raises(DamagedSessionError, match=path.name):
                    await deed(record.id)
            await sessions.delete(record.id)

    run(main())
