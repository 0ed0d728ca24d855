"""Every store keeps the last version of each session whole, refuses stale ones, and behaves as a dict would."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from serving.sessions.errors import SessionConflictError, StoreFullError
from serving.sessions.memory import MemoryStore
from serving.sessions.records import SessionRecord, new_session_id
from serving.sessions.store import Store
from tests.serving.sessions.stores import (
    NOW,
    STORES,
    cached_disk_store,
    cached_shared_store,
    disk_store,
    new_record,
    next_record,
    shared_local_store,
)


@pytest.fixture(params=STORES, ids=lambda make: make.__name__)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    made: Store = request.param(tmp_path)
    yield made
    made.close()


def test_the_last_version_is_read_whole(store: Store) -> None:
    record = new_record(b"one")
    store.save(record, b"one")
    second = next_record(record, b"two!", messages=({"role": "user", "content": "x" * 100_000},))
    store.save(second, b"two!")
    assert store.load(record.id) == (second, b"two!")
    assert store.find(record.id) == second
    assert store.usage().sessions == 1
    assert store.usage().state_bytes == 4


def test_a_session_without_a_token_is_a_session(store: Store) -> None:
    record = new_record(b"", metadata={}, messages=(), ttl_s=None, expires=None)
    store.save(record, b"")
    assert store.load(record.id) == (record, b"")
    second = next_record(record, b"now")
    store.save(second, b"now")
    assert store.load(record.id) == (second, b"now")


def test_what_is_not_there_is_none(store: Store) -> None:
    missing = new_session_id(NOW)
    assert store.find(missing) is None
    assert store.load(missing) is None
    assert store.delete(missing) is False
    assert store.records(10) == []


@pytest.mark.parametrize("version", [1, 2, 4])
def test_only_the_next_version_is_saved(store: Store, version: int) -> None:
    record = new_record(b"one")
    store.save(record, b"one")
    second = next_record(record, b"two")
    store.save(second, b"two")
    with pytest.raises(SessionConflictError):
        store.save(replace(second, version=version), b"other")
    assert store.load(record.id) == (second, b"two")


def test_a_later_version_of_nothing_is_refused(store: Store) -> None:
    record = new_record(b"one")
    store.save(record, b"one")
    store.delete(record.id)
    with pytest.raises(SessionConflictError):
        store.save(next_record(record, b"two"), b"two")
    assert store.load(record.id) is None


def test_a_fork_and_its_parent_go_their_own_ways(store: Store) -> None:
    parent = new_record(b"shared")
    store.save(parent, b"shared")
    child = new_record(b"shared", parent=parent.id)
    store.fork(parent, child)
    changed = next_record(parent, b"changed")
    store.save(changed, b"changed")
    assert store.load(child.id) == (child, b"shared")
    store.delete(parent.id)
    assert store.load(child.id) == (child, b"shared")
    grown = next_record(child, b"grown")
    store.save(grown, b"grown")
    assert store.load(child.id) == (grown, b"grown")
    with pytest.raises(SessionConflictError):
        store.fork(child, new_record(b"shared"))
    with pytest.raises(SessionConflictError):
        store.fork(parent, new_record(b"shared"))


def test_expired_sessions_go_but_for_those_in_use(store: Store) -> None:
    ends = [new_record(b"x", expires=expires) for expires in (NOW - 1, NOW, NOW + 1, None, NOW - 5)]
    for record in ends:
        store.save(record, b"x")
    assert store.remove_expired(NOW, {ends[4].id}) == 2
    assert [store.find(record.id) is not None for record in ends] == [False, False, True, True, True]
    assert store.remove_expired(NOW, ()) == 1
    assert store.remove_expired(NOW, ()) == 0
    assert store.usage().sessions == 2


def test_the_newest_come_first_a_page_at_a_time(store: Store) -> None:
    made = [new_record(b"x", id=new_session_id(NOW + second)) for second in range(5)]
    for record in made[::2] + made[1::2]:
        store.save(record, b"x")
    expected = [replace(record, messages=()) for record in reversed(made)]
    assert store.records(10) == expected
    assert store.records(2) == expected[:2]
    assert store.records(2, before=expected[1].id) == expected[2:4]
    assert store.records(2, before=expected[4].id) == []


def test_saves_of_one_version_by_many_threads_end_in_one_winner(store: Store) -> None:
    first = new_record(b"0")
    store.save(first, b"0")
    outcomes: list[bytes] = []
    start = threading.Barrier(6)

    def race(name: bytes) -> None:
        start.wait()
        try:
            store.save(next_record(first, name), name)
        except SessionConflictError:
            return
        outcomes.append(name)

    threads = [threading.Thread(target=race, args=(b"%d" % i * 50,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 1
    loaded = store.load(first.id)
    assert loaded is not None
    assert loaded[1] == outcomes[0]


def test_a_reader_beside_a_writer_sees_one_whole_version_after_another(store: Store) -> None:
    record = new_record(b"0" * 1000)
    store.save(record, b"0" * 1000)
    seen: list[int] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            loaded = store.load(record.id)
            assert loaded is not None
            assert set(loaded[1]) == {ord(str(loaded[0].version % 10))} or loaded[0].version == 1
            seen.append(loaded[0].version)

    reader = threading.Thread(target=read)
    reader.start()
    current = record
    for version in range(2, 40):
        state = str(version % 10).encode() * (900 + version)
        current = next_record(current, state)
        store.save(current, state)
    done.set()
    reader.join()
    assert seen == sorted(seen)


def test_memory_alone_gives_up_what_was_used_least_recently() -> None:
    store = MemoryStore(30, 3)
    a, _, c, d = records = [new_record(b"x" * 10) for _ in range(4)]
    for record in records[:3]:
        store.save(record, b"x" * 10)
    store.load(a.id)
    store.save(d, b"x" * 10)
    assert [store.find(r.id) is not None for r in records] == [True, False, True, True]
    store.save(next_record(c, b"x" * 20), b"x" * 20)  # a is the oldest now
    assert [store.find(r.id) is not None for r in records] == [False, False, True, True]
    with pytest.raises(StoreFullError, match="31 bytes is more than sessions may take, 30"):
        store.save(next_record(d, b"x" * 31), b"x" * 31)
    assert store.find(d.id) == d
    assert store.usage().state_bytes == 30


class StoreMachine(RuleBasedStateMachine):
    """Random deeds, beside a dict that does the same."""

    sessions = Bundle("sessions")

    def __init__(self, make: Callable[[Path], Store], reopens: bool) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.make = make
        self.reopens = reopens
        self.expected: dict[str, tuple[SessionRecord, bytes]] = {}
        self.now = NOW

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.folder)

    @initialize()
    def open(self) -> None:
        self.store = self.make(self.folder)

    @rule()
    def reopen(self) -> None:
        if self.reopens:
            self.store.close()
            self.store = self.make(self.folder)

    @rule(target=sessions, state=st.binary(max_size=100), ttl_s=st.sampled_from([None, 10.0, 30.0]))
    def create(self, state: bytes, ttl_s: float | None) -> str:
        self.now += 0.5
        expires = None if ttl_s is None else self.now + ttl_s
        record = new_record(state, id=new_session_id(self.now), ttl_s=ttl_s, expires=expires)
        self.store.save(record, state)
        self.expected[record.id] = record, state
        return record.id

    @rule(session=sessions, state=st.binary(max_size=100), back=st.integers(0, 2))
    def save(self, session: str, state: bytes, back: int) -> None:
        if session not in self.expected:
            return
        record = next_record(self.expected[session][0], state, self.now)
        if back == 0:
            self.store.save(record, state)
            self.expected[session] = record, state
        else:
            with pytest.raises(SessionConflictError):
                self.store.save(replace(record, version=record.version - back), state)

    @rule(target=sessions, session=sessions)
    def fork(self, session: str) -> object:
        if session not in self.expected:
            return multiple()
        self.now += 0.5
        source, state = self.expected[session]
        child = new_record(state, id=new_session_id(self.now), parent=session)
        self.store.fork(source, child)
        self.expected[child.id] = child, state
        return child.id

    @rule(session=consumes(sessions))
    def delete(self, session: str) -> None:
        assert self.store.delete(session) == (self.expected.pop(session, None) is not None)

    @rule(seconds=st.floats(0, 20))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        over = [i for i, (record, _) in self.expected.items() if record.expired(self.now)]
        assert self.store.remove_expired(self.now, ()) == len(over)
        for session_id in over:
            del self.expected[session_id]

    @invariant()
    def holds_what_a_dict_would(self) -> None:
        newest = sorted(self.expected, reverse=True)
        assert [record.id for record in self.store.records(100)] == newest
        for session_id in newest:
            assert self.store.load(session_id) == self.expected[session_id]


@pytest.mark.parametrize("make", STORES, ids=lambda make: make.__name__)
def test_every_store_behaves_as_a_dict_would(make: Callable[[Path], Store]) -> None:
    reopens = make in (disk_store, cached_disk_store, shared_local_store, cached_shared_store)
    run_state_machine_as_test(
        lambda: StoreMachine(make, reopens),  # type: ignore[arg-type]  # it calls what it is given
        settings=settings(max_examples=15, stateful_step_count=25, deadline=None),
    )
