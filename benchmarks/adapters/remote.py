"""The parent's end of a contestant's process."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yunmin.threads  # noqa: F401 (takes back how our own threads wait, which is not for peers to inherit)

_PACKAGE = Path(__file__).resolve().parents[1]
# Runs the server from the package's own folder under any interpreter: with the folder above it on the path, a foreign
# interpreter would find the packages of ours, too.
_BOOT = """
import importlib.util, sys
folder, module = sys.argv[1:3]
init, places = folder + "/__init__.py", [folder]
spec = importlib.util.spec_from_file_location("benchmarks", init, submodule_search_locations=places)
package = importlib.util.module_from_spec(spec)
sys.modules["benchmarks"] = package
spec.loader.exec_module(package)
raise SystemExit(importlib.import_module("benchmarks." + module).main(sys.argv[3:]))
"""
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
_POLL_S = 0.05


class Failed(Exception):  # noqa: N818 (not an error of ours: the report names it)
    """A contestant did not answer; the message says why."""


class Remote:
    """A server under some interpreter, asked by lines of JSON.

    Args:
        module: below `benchmarks`, with a `main(argv)`.
        spec: its only argument.
        python: the interpreter.
        threads: for libraries that read their number of threads from the environment.
        memory_limit_bytes: resident memory beyond which it is ended; 0 for none.
    """

    def __init__(
        self, module: str, spec: Mapping[str, Any], *, python: str, threads: int, memory_limit_bytes: int = 0
    ) -> None:
        environment = {**os.environ, **dict.fromkeys(_THREAD_VARIABLES, str(threads))}
        environment.setdefault("TOKENIZERS_PARALLELISM", "false")
        environment.setdefault("HF_HUB_OFFLINE", "1")
        command = [python, "-c", _BOOT, str(_PACKAGE), module, json.dumps(spec)]
        self._log: list[bytes] = []
        self._memory_limit_bytes = memory_limit_bytes
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
            )
        except OSError as error:
            raise Failed(f"{python} does not start: {error.strerror}") from None
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._selector = selectors.DefaultSelector()
        for pipe in (self._process.stdout, self._process.stderr):
            os.set_blocking(pipe.fileno(), False)
            self._selector.register(pipe, selectors.EVENT_READ)
        self._unread = b""

    def ask(self, request: Mapping[str, Any], limit_s: float) -> dict[str, Any]:
        """Sends a request and waits for the answer.

        Raises:
            Failed: the process died, took too long or too much memory, or says that it could not.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # `read` finds out how the process ended
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        return self.read(limit_s)

    def read(self, limit_s: float) -> dict[str, Any]:
        """Waits for the next message; raises as `ask` does."""
        deadline = time.monotonic() + limit_s
        while b"\n" not in self._unread:
            if time.monotonic() > deadline:
                self.close()
                raise Failed(f"took longer than {limit_s:g} s")
            self._check_memory()
            if not self._receive() and self._process.poll() is not None and not self._receive():
                raise Failed(self._ending())
        line, _, self._unread = self._unread.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        for key in ("unavailable", "failed"):
            if key in message:
                raise Failed(str(message[key]))
        return message

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        """Ends the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        self._selector.close()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):  # what was still to be written to it
                pipe.close()

    def _receive(self) -> bool:
        """Takes in what the process has written; returns whether it was anything."""
        any_bytes = False
        for key, _ in self._selector.select(_POLL_S):
            data = os.read(key.fd, 1 << 20)
            if not data:
                self._selector.unregister(key.fileobj)
            elif key.fileobj is self._process.stdout:
                self._unread += data
            else:
                self._log = [*self._log[-20:], data]
            any_bytes = any_bytes or bool(data)
        return any_bytes

    def _check_memory(self) -> None:
        if not self._memory_limit_bytes or not sys.platform.startswith("linux"):
            return
        try:
            pages = int(Path(f"/proc/{self._process.pid}/statm").read_text(encoding="ascii").split()[1])
        except (OSError, IndexError):
            return
        if pages * os.sysconf("SC_PAGE_SIZE") > self._memory_limit_bytes:
            self.close()
            raise Failed(f"took more than {self._memory_limit_bytes / 1e9:.1f} GB of memory")

    def _ending(self) -> str:
        status = self._process.wait()
        lines = b"".join(self._log).decode(errors="replace").strip().splitlines()
        last = f": {lines[-1].strip()[:200]}" if lines else ""
        self.close()
        return f"its process ended with status {status}{last}"
