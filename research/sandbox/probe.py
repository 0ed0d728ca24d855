"""Tries to break every guarantee of the sandbox from inside, where all of it must fail."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

_VARIABLES = frozenset({"LANG", "LC_CTYPE", "PYTHONHASHSEED", "TZ"})  # Python sets LC_CTYPE by itself


def open_doors(job: dict[str, Any]) -> list[str]:
    """What a confined process can do and must not; empty where the sandbox is whole.

    Args:
        job: `parent`, a process id; `folder` with a file `secret`; `memory_bytes`, the limit; `pipes` that may be open.
    """
    folder = Path(job["folder"])
    secret, new = folder / "secret", folder / "new"
    attempts: dict[str, tuple[Callable[[], Any], ...]] = {
        "open sockets": (
            lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM).close(),
            lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close(),
            lambda: socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).close(),
            socket.socketpair,
        ),
        "start processes": (
            _fork,
            lambda: os.posix_spawn("/bin/true", ["true"], {}),
            lambda: threading.Thread(target=int).start(),
        ),
        "reach other processes": (
            lambda: os.kill(job["parent"], 0),
            lambda: Path(f"/proc/{job['parent']}/environ").read_bytes(),
        ),
        "read files": (
            secret.read_bytes,
            lambda: list(folder.iterdir()),
            lambda: Path("/etc/passwd").read_bytes(),
            *(file.read_bytes for file in _package_files()),
        ),
        "write files": (
            lambda: new.write_bytes(b"x"),
            lambda: secret.write_bytes(b"x"),
            new.mkdir,
            lambda: new.symlink_to(secret),
            lambda: secret.rename(new),
            lambda: secret.chmod(0o777),
            lambda: os.truncate(secret, 0),
            lambda: os.utime(secret),
            secret.unlink,
            lambda: os.memfd_create("x"),
        ),
        "allocate without limit": (lambda: bytearray(job["memory_bytes"] + 1),),
    }
    found = [what for what, tries in attempts.items() if any(_succeeds(attempt) for attempt in tries)]
    if not _VARIABLES.issuperset(os.environ):
        found.append("see variables of the environment")
    pipes = {pipe for pipe, _ in job["pipes"]}
    if any(_succeeds(partial(os.fstat, number)) for number in set(range(3, 64)) - pipes):
        found.append("use files it inherits")
    return found


def _package_files() -> list[Path]:
    """One file of each folder where packages of this Python are installed, as far as there are any."""
    folders = [Path(path, name) for path in sys.path for name in ("site-packages", "dist-packages")]
    return [file for folder in folders if folder.is_dir() for file in _first_file(folder)]


def _first_file(folder: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return list(islice((path for path in folder.glob("**/*") if path.is_file()), 1))
    return []


def _fork() -> None:
    if os.fork() == 0:
        os._exit(0)


def _succeeds(attempt: Callable[[], Any]) -> bool:
    with contextlib.suppress(OSError, MemoryError, RuntimeError):  # a thread that cannot start is a RuntimeError
        attempt()
        return True
    return False
