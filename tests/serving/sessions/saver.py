"""Processes to be killed: each saves versions of sessions as fast as it can, and says which are acknowledged.

`python -m tests.serving.sessions.saver disk|shared PLACE` forks one for each line that it reads, and prints `killed`
when that one is. It prints its own id, `ID VERSION` after each save, and `ID -` before it deletes a fork. Each state is
the version repeated, so a reader can tell a whole one.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

from serving.sessions.disk import DiskStore
from serving.sessions.shared import SharedStore
from serving.sessions.store import Store
from tests.serving.sessions.stores import LARGE, new_record, next_record

SESSIONS = 3


def state_of(version: int) -> bytes:
    """Large enough that a kill falls into the writing."""
    return b"%08d" % version * 40_000


def open_store(kind: str, place: Path) -> Store:
    return DiskStore(place, LARGE, 10_000) if kind == "disk" else SharedStore(f"file://{place}", 10_000)


def main(kind: str, place: str) -> None:
    """Imports once what takes a second, and forks."""
    for _ in sys.stdin:
        child = os.fork()
        if not child:
            print(os.getpid(), flush=True)
            _save(kind, place)
        os.waitpid(child, 0)
        print("killed", flush=True)


def _save(kind: str, place: str) -> NoReturn:
    store = open_store(kind, Path(place))
    records = [record for record in store.records(10_000) if record.parent is None]
    while len(records) < SESSIONS:
        records.append(new_record(state_of(1), ttl_s=None, expires=None))
        store.save(records[-1], state_of(1))
        print(records[-1].id, 1, flush=True)
    fork = ""
    while True:
        for index, record in enumerate(records):
            following = next_record(record, state_of(record.version + 1))
            store.save(following, state_of(following.version))
            print(following.id, following.version, flush=True)
            records[index] = following
            if following.version % 3 == 0:
                if fork:
                    print(fork, "-", flush=True)
                    store.delete(fork)
                child = new_record(state_of(following.version), parent=following.id, ttl_s=None, expires=None)
                store.fork(following, child)
                fork = child.id
                print(fork, 1, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
