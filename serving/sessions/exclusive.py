"""Objects of an `fsspec` file system that appear whole, and only where there was none: what workers agree by."""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from serving.sessions.errors import StoreError, StoreFullError, is_full
from yunmin.errors import MissingExtraError

_ASIDE = ".aside-"
_STALE_S = 86_400.0  # no write takes a day
# fsspec's memory is one for all file systems of a process, and threads may not share it
_memory_lock = threading.RLock()


class ObjectStore:
    """The few deeds that the shared store needs, the same on every file system.

    Args:
        url: of a folder, as fsspec names it: `s3://bucket/folder`, `file:///folder`, `memory://folder`.

    Raises:
        MissingExtraError: the file system's driver is not installed.
        StoreError: it cannot be reached, or its driver does not create objects exclusively.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._lock: AbstractContextManager[object] = contextlib.nullcontext()
        with self._errors():
            try:
                # another worker's objects must be seen at once
                self._files, self._root = fsspec.core.url_to_fs(url, use_listings_cache=False)
            except ImportError as error:
                raise MissingExtraError(str(error.name or error), "serve", f"session_url {url}") from None
            except ValueError as error:
                raise StoreError(f"session_url {url}: {error}") from None
        if isinstance(self._files, MemoryFileSystem):
            self._lock = _memory_lock
        if not self._creates_exclusively():
            raise StoreError(f"session_url {url}: this file system cannot create an object only where there is none")
        with self._errors():
            self._files.makedirs(self._root, exist_ok=True)

    def create(self, name: str, data: bytes) -> bool:
        """Writes an object whole; false, and nothing happens, where one of that name is there.

        Raises:
            StoreFullError: there is no room.
            StoreError: as everywhere here, the file system cannot be reached.
        """
        path = self._path(name)
        with self._errors():
            try:
                if isinstance(self._files, LocalFileSystem):
                    with self._aside(path, data) as aside:
                        os.link(aside, path)
                else:
                    self._files.pipe_file(path, data, mode="create")
            except FileExistsError:
                return False
        return True

    def replace(self, name: str, data: bytes) -> None:
        """Writes an object whole, in place of the one there."""
        path = self._path(name)
        with self._errors():
            if isinstance(self._files, LocalFileSystem):
                with self._aside(path, data) as aside:
                    Path(aside).replace(path)
            else:
                self._files.pipe_file(path, data)

    def read(self, name: str, end: int | None = None) -> bytes | None:
        """An object, or its first bytes; None where there is none."""
        with self._errors():
            try:
                return bytes(self._files.cat_file(self._path(name), start=None if end is None else 0, end=end))
            except FileNotFoundError:
                return None

    def names(self, folder: str = "") -> list[str]:
        """Names of the objects and folders in a folder, in no order."""
        path = self._path(folder)
        with self._errors():
            self._files.invalidate_cache(path)
            try:
                found = self._files.ls(path, detail=False)
            except FileNotFoundError:
                return []
        return [base for found_path in found if not (base := found_path.rstrip("/").rpartition("/")[2]).startswith(".")]

    def sizes(self) -> dict[str, int]:
        """Sizes of all objects in all folders, by name with folder."""
        with self._errors():
            self._files.invalidate_cache(self._root)
            try:
                found = self._files.find(self._root, detail=True)
            except FileNotFoundError:
                return {}
        beneath = len(self._root.rstrip("/")) + 1
        return {path[beneath:]: int(info.get("size") or 0) for path, info in found.items() if f"/{_ASIDE}" not in path}

    def remove(self, name: str) -> None:
        """Removes an object; nothing happens where there is none."""
        with self._errors(), contextlib.suppress(FileNotFoundError):
            self._files.rm_file(self._path(name))

    def remove_folder(self, folder: str) -> None:
        """Removes a folder that is empty; object stores have none."""
        with self._lock, contextlib.suppress(OSError, NotImplementedError):
            self._files.rmdir(self._path(folder))

    def remove_leftovers(self) -> None:
        """Removes what writers left that were killed a day ago."""
        if isinstance(self._files, LocalFileSystem):
            with contextlib.suppress(OSError):
                for path in Path(self._root).glob(f"{_ASIDE}*"):
                    if path.stat().st_mtime < time.time() - _STALE_S:
                        path.unlink()

    def _creates_exclusively(self) -> bool:
        """Whether the driver itself knows how; the base class looks first and writes then, which is not enough."""
        kind = type(self._files)
        if isinstance(self._files, LocalFileSystem | MemoryFileSystem):
            return True
        if isinstance(self._files, AsyncFileSystem):
            return kind._pipe_file is not AsyncFileSystem._pipe_file
        return kind.pipe_file is not fsspec.AbstractFileSystem.pipe_file

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}" if name else self._root

    @contextlib.contextmanager
    def _aside(self, path: str, data: bytes) -> Iterator[str]:
        """A synced file beside the folders, to be linked or renamed into one."""
        aside = f"{self._root}/{_ASIDE}{secrets.token_hex(8)}"
        parent = Path(path).parent
        parent.mkdir(parents=True, exist_ok=True)
        try:
            with Path(aside).open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield aside
            for folder in (parent, parent.parent):
                descriptor = os.open(folder, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
        finally:
            with contextlib.suppress(FileNotFoundError):
                Path(aside).unlink()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            with self._lock:
                yield
        except (StoreError, MissingExtraError):
            raise
        except Exception as error:  # drivers raise whatever their clients do
            if is_full(error):
                raise StoreFullError(f"{self.url}: no room: {error}") from None
            reason = " ".join(str(error).split()) or type(error).__name__
            raise StoreError(f"{self.url}: {reason}") from error
