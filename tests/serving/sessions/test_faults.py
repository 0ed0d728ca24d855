"""Stores that are killed, filled up and damaged: each session is whole or absent, and no acknowledged one is lost."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from serving.sessions.disk import DiskStore
from serving.sessions.errors import DamagedSessionError, SessionConflictError, StoreError, StoreFullError
from serving.sessions.exclusive import ObjectStore
from serving.sessions.shared import SharedStore
from serving.sessions.store import Store
from tests.serving.fixtures import ROOT
from tests.serving.sessions.saver import open_store, state_of
from tests.serving.sessions.stores import (
    LARGE,
    NOW,
    BucketFileSystem,
    disk_store,
    new_record,
    next_record,
    shared_bucket_store,
    shared_local_store,
)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["disk", "shared"])
def test_after_kill_9_every_session_is_whole_or_absent_and_none_acknowledged_is_lost(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "sessions"
    # the last version that each session must have; 0 where it may be gone
    acknowledged: dict[str, int] = {}
    rng = random.Random(5)
    command = [sys.executable, "-m", "tests.serving.sessions.saver", kind, str(place)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as forking:
        assert forking.stdin is not None
        assert forking.stdout is not None
        for _ in range(12):
            forking.stdin.write("\n")
            saving = int(forking.stdout.readline())
            lines = [forking.stdout.readline()]  # it has begun
            time.sleep(rng.uniform(0.0, 0.25))
            os.kill(saving, signal.SIGKILL)
            lines += iter(forking.stdout.readline, "killed\n")
            for line in lines:
                session_id, said = line.split()
                acknowledged[session_id] = 0 if said == "-" else int(said)
            _check(kind, place, acknowledged)
    assert max(acknowledged.values()) > 12


def _check(kind: str, place: Path, acknowledged: dict[str, int]) -> None:
    """Compares what a store holds with what was acknowledged, and notes what is there."""
    store = open_store(kind, place)
    found = {record.id: record for record in store.records(10_000)}
    for session_id, version in acknowledged.items():
        if version:
            assert session_id in found, f"{session_id} was acknowledged and is gone"
            assert found[session_id].version in (version, version + 1)
    for session_id, record in found.items():
        loaded = store.load(session_id)
        assert loaded is not None
        assert loaded[1] == state_of(record.version if record.parent is None else int(loaded[1][:8]))
        acknowledged[session_id] = record.version
    if kind == "disk":
        assert len(list((place / "states").iterdir())) <= len(found)
    store.close()


def test_a_disk_that_is_full_is_one_error_and_the_old_version_stays(tmp_path: Path) -> None:
    script = (
        "import sys, resource, pathlib\n"
        "from tests.serving.sessions.stores import *\n"
        "from serving.sessions.errors import StoreFullError\n"
        "store = disk_store(pathlib.Path(sys.argv[1]))\n"
        "record = new_record(b'x' * 1000)\n"
        "store.save(record, b'x' * 1000)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
        "big = b'y' * 300_000\n"
        "try:\n"
        "    store.save(next_record(record, big), big)\n"
        "except StoreFullError as error:\n"
        "    print(error)\n"
        "assert store.load(record.id) == (record, b'x' * 1000)\n"
        "second = next_record(record, b'z' * 1000)\n"
        "store.save(second, b'z' * 1000)\n"
        "assert store.load(record.id) == (second, b'z' * 1000)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "no room for 300000 bytes" in done.stdout
    assert len(done.stdout.splitlines()) == 1
    assert len(list((tmp_path / "sessions" / "states").iterdir())) == 1


@pytest.mark.parametrize("make", [disk_store, shared_local_store], ids=lambda make: make.__name__)
@pytest.mark.parametrize("failing", ["write", "fsync"])
def test_a_write_that_fails_leaves_nothing_and_the_old_version(
    tmp_path: Path, make: object, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store: Store = make(tmp_path)  # type: ignore[operator]
    record = new_record(b"one")
    store.save(record, b"one")
    files = sorted(path for path in tmp_path.rglob("*") if "index" not in path.name)

    def no_space(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        if failing == "fsync":
            patched.setattr(os, "fsync", no_space)
        else:
            patched.setattr(Path, "write_bytes", no_space)
            patched.setattr(os, "link", no_space)
        with pytest.raises(StoreFullError, match="No space left on device"):
            store.save(next_record(record, b"two"), b"two")
    assert store.load(record.id) == (record, b"one")
    assert sorted(path for path in tmp_path.rglob("*") if "index" not in path.name) == files
    second = next_record(record, b"two")
    store.save(second, b"two")
    assert store.load(record.id) == (second, b"two")


def test_an_index_that_is_full_is_one_error_and_the_old_version_stays(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, LARGE, 1000)
    record = new_record(b"one")
    store.save(record, b"one")
    pages = store._index._rows("PRAGMA page_count")[0][0]
    store._index._rows(f"PRAGMA max_page_count = {pages}")
    long = next_record(record, b"two", messages=({"role": "user", "content": "x" * 100_000},))
    with pytest.raises(StoreFullError, match="index of sessions: database or disk is full"):
        store.save(long, b"two")
    assert store.load(record.id) == (record, b"one")
    assert len(list((tmp_path / "states").iterdir())) == 1
    store.close()


def test_a_quota_counts_what_is_being_written_and_what_would_go(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, 30, 3)
    a, b = new_record(b"a" * 10), new_record(b"b" * 10)
    store.save(a, b"a" * 10)
    store.save(b, b"b" * 10)
    a2 = next_record(a, b"A" * 20)
    store.save(a2, b"A" * 20)
    with pytest.raises(StoreFullError, match="sessions may take 30 bytes on disk"):
        store.save(next_record(b, b"B" * 11), b"B" * 11)
    store.save(next_record(b, b"B" * 10), b"B" * 10)
    fork = new_record(b"A" * 20, parent=a.id)
    store.fork(a2, fork)  # shares its file
    assert store.usage().state_bytes == 30
    with pytest.raises(StoreFullError, match="3 sessions at most"):
        store.save(new_record(b""), b"")
    with pytest.raises(StoreFullError):
        store.save(next_record(a2, b"c"), b"c")  # the fork needs what it would have replaced
    store.delete(fork.id)
    store.save(next_record(a2, b"c"), b"c")
    store.close()


@pytest.mark.parametrize("damage", ["truncated", "longer", "flipped", "empty", "missing", "folder"])
def test_a_damaged_state_file_is_named_and_its_session_can_be_deleted(tmp_path: Path, damage: str) -> None:
    store = disk_store(tmp_path)
    record, other = new_record(b"state" * 100), new_record(b"other" * 100)
    store.save(record, b"state" * 100)
    store.save(other, b"other" * 100)
    [path] = (tmp_path / "sessions" / "states").glob(f"{record.id}*")
    data = path.read_bytes()
    match damage:
        case "truncated":
            path.write_bytes(data[:-1])
        case "longer":
            path.write_bytes(data + b"x")
        case "flipped":
            path.write_bytes(data[:250] + bytes([data[250] ^ 1]) + data[251:])
        case "empty":
            path.write_bytes(b"")
        case "missing":
            path.unlink()
        case "folder":
            path.unlink()
            path.mkdir()
    for _ in range(2):
        with pytest.raises(DamagedSessionError, match=path.name) as caught:
            store.load(record.id)
        assert "\n" not in str(caught.value)
        assert store.find(record.id) == record
        assert store.load(other.id) == (other, b"other" * 100)
        store.close()
        store = disk_store(tmp_path)
    assert store.delete(record.id)
    assert store.load(record.id) is None
    store.close()


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no record", "another's", "empty", "replaced"])
def test_a_damaged_object_is_named_and_the_others_are_listed(tmp_path: Path, damage: str) -> None:
    store = shared_local_store(tmp_path)
    record, other = new_record(b"state" * 100), new_record(b"other" * 100)
    store.save(record, b"state" * 100)
    store.save(other, b"other" * 100)
    path = tmp_path / "shared" / "sessions" / record.id / "00000001"
    data = path.read_bytes()
    match damage:
        case "truncated":
            path.write_bytes(data[:-1])
        case "flipped":
            path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
        case "no record":
            path.write_bytes(b"\x00" * 100_000)
        case "another's":
            path.write_bytes((path.parent.parent / other.id / "00000001").read_bytes())
        case "empty":
            path.write_bytes(b"")
        case "replaced":
            path.write_bytes(b"replaced\n")
    with pytest.raises(DamagedSessionError, match=f"{record.id}/00000001: damaged: ") as caught:
        store.load(record.id)
    assert "\n" not in str(caught.value)
    assert other.id in {found.id for found in store.records(10)}
    assert store.load(other.id) == (other, b"other" * 100)
    store.remove_expired(NOW, ())
    assert store.load(other.id) == (other, b"other" * 100)


def test_a_damaged_index_is_refused_by_name(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, LARGE, 10)
    store.close()
    (tmp_path / "index.sqlite").write_bytes(b"this is no database at all" * 100)
    with pytest.raises(StoreError, match=r"index.sqlite: the index of sessions: file is not a database"):
        DiskStore(tmp_path, LARGE, 10)
    (tmp_path / "index.sqlite").unlink()
    newer = sqlite3.connect(tmp_path / "index.sqlite")
    newer.execute("PRAGMA user_version = 9")
    newer.close()
    with pytest.raises(StoreError, match="expected version 1 of the index of sessions, found 9"):
        DiskStore(tmp_path, LARGE, 10)
    (tmp_path / "index.sqlite").unlink()
    DiskStore(tmp_path, LARGE, 10).close()  # neither attempt kept the folder locked


def test_a_folder_is_one_processs_and_must_be_a_folder(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "a", LARGE, 10)
    with pytest.raises(StoreError, match="another process keeps its sessions there"):
        DiskStore(tmp_path / "a", LARGE, 10)
    store.close()
    DiskStore(tmp_path / "a", LARGE, 10).close()
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot keep sessions there"):
        DiskStore(tmp_path / "file", LARGE, 10)


def test_leftovers_of_a_killed_save_are_removed_when_the_folder_is_opened(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, LARGE, 10)
    record = new_record(b"one")
    store.save(record, b"one")
    store.close()
    (tmp_path / "states" / f".{record.id}-2-abcd.safetensors.0123").write_bytes(b"half")
    (tmp_path / "states" / f"{record.id}-2-abcd.safetensors").write_bytes(b"whole, but not in the index")
    store = DiskStore(tmp_path, LARGE, 10)
    assert len(list((tmp_path / "states").iterdir())) == 1
    assert store.load(record.id) == (record, b"one")
    store.close()


def test_a_worker_that_slept_through_changes_cannot_bring_an_old_version_back(tmp_path: Path) -> None:
    awake, asleep = shared_local_store(tmp_path), shared_local_store(tmp_path)
    record = new_record(b"1")
    awake.save(record, b"1")
    stale = next_record(record, b"stale")
    current = record
    for version in range(2, 12):
        current = next_record(current, b"%d" % version)
        awake.save(current, b"%d" % version)
    with pytest.raises(SessionConflictError):
        asleep.save(stale, b"stale")
    # even where it looked just before the others came
    objects = ObjectStore(f"file://{tmp_path}/shared/sessions")
    assert not objects.create(f"{record.id}/00000002", b"stale")
    awake.delete(record.id)
    assert not objects.create(f"{record.id}/00000002", b"stale")
    assert not objects.create(f"{record.id}/{current.version + 1:08d}", b"stale")
    with pytest.raises(SessionConflictError):
        asleep.save(next_record(current, b"stale"), b"stale")
    assert asleep.load(record.id) is None


def test_sweeping_tidies_up_behind_workers_that_were_killed(tmp_path: Path) -> None:
    store = shared_local_store(tmp_path)
    folder = tmp_path / "shared" / "sessions"
    record = new_record(b"1" * 1000, expires=None)
    store.save(record, b"1" * 1000)
    before = (folder / record.id / "00000001").read_bytes()
    second = next_record(record, b"2" * 1000, now=NOW)
    store.save(second, b"2" * 1000)
    (folder / record.id / "00000001").write_bytes(before)  # as if it had been killed before marking it
    leftover = folder / ".aside-0123"
    leftover.write_bytes(b"half")
    os.utime(leftover, (NOW, NOW))
    gone = new_record(b"x")
    store.save(gone, b"x")
    store.delete(gone.id)
    fresh = shared_local_store(tmp_path)
    assert fresh.usage().sessions == 0  # not counted yet
    assert fresh.remove_expired(NOW, ()) == 0
    assert (fresh.usage().sessions, fresh.usage().state_bytes) == (1, 1000)
    assert (folder / record.id / "00000001").stat().st_size < 10
    assert fresh.load(record.id) == (second, b"2" * 1000)
    assert not leftover.exists()
    assert (folder / gone.id).exists()  # lest a stale worker save it again
    assert fresh.remove_expired(time.time() + 100_000, ()) == 1  # the second's own time is over by then, too
    assert not (folder / gone.id).exists()


def test_many_versions_leave_few_objects(tmp_path: Path) -> None:
    store = shared_local_store(tmp_path)
    record = new_record(b"1")
    store.save(record, b"1")
    for version in range(2, 60):
        record = next_record(record, b"%d" % version)
        store.save(record, b"%d" % version)
    assert len(list((tmp_path / "shared" / "sessions" / record.id).iterdir())) <= 18
    assert store.load(record.id) == (record, b"59")


def test_a_file_system_that_cannot_create_exclusively_is_refused() -> None:
    class Plain(fsspec.AbstractFileSystem):  # type: ignore[misc]  # fsspec has no types
        protocol = "plain"

    fsspec.register_implementation("plain", Plain, clobber=True)
    with pytest.raises(StoreError, match="cannot create an object only where there is none"):
        SharedStore("plain://x", 10)


@pytest.mark.parametrize("url", ["nonsense://x", "ftp://127.0.0.1:1/x", "file:///proc/1/nowhere"])
def test_a_place_that_cannot_be_reached_is_one_error(url: str) -> None:
    with pytest.raises(StoreError, match=url) as caught:
        SharedStore(url, 10)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("deed", ["find", "load", "delete", "names"])
def test_a_driver_that_fails_is_one_error(deed: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    store = shared_bucket_store(tmp_path)
    record = new_record(b"one")
    store.save(record, b"one")

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("endpoint\nunreachable")

    for name in ("ls", "cat_file", "pipe_file"):
        monkeypatch.setattr(BucketFileSystem, name, broken)
    deeds: dict[str, Callable[[str], object]] = {
        "find": store.find,
        "load": store.load,
        "delete": store.delete,
        "names": lambda _: store.records(5),
    }
    with pytest.raises(StoreError, match=r"bucket://.*endpoint unreachable"):
        deeds[deed](record.id)
