"""Judges programs by their tests, each in a confined process of its own (see `research.sandbox`)."""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from yunmin.errors import DataError, SandboxError

_PACKAGES = str(Path(__file__).resolve().parents[2])  # the folder that has the package `research`
# last on the path, where it cannot stand before a module of Python's, and gone before anything foreign runs
_START = f"import sys; sys.path.append({_PACKAGES!r}); from research.sandbox import child; sys.path.pop(); child.main()"
# no site-packages, no user's folder, no byte code written; the seed makes the order of sets the same everywhere
_PYTHON = ("-P", "-s", "-S", "-B", "-X", "utf8", "-c", _START)
_ENVIRONMENT = {"LANG": "C.UTF-8", "TZ": "UTC", "PYTHONHASHSEED": "0"}
_VERDICT_BYTES = 1 << 16


@dataclass(frozen=True)
class Limits:
    """What a program and its tests may use, each.

    Attributes:
        cpu_s: seconds of processor time, so that what a program may do depends little on how busy the machine is.
        wall_s: seconds for both together, their start included, against those that sleep.
        memory_bytes: address space.
    """

    cpu_s: int = 10
    wall_s: float = 30.0
    memory_bytes: int = 1 << 29


@dataclass(frozen=True)
class Verdict:
    """Whether a program passed its tests.

    Attributes:
        passed: all of them.
        detail: what went wrong, for people; "" for a pass.
    """

    passed: bool
    detail: str = ""


class Sandbox:
    """Runs foreign programs, after it has proven on this very system that they are contained.

    Raises:
        SandboxError: they would not be; names every guarantee that is missing.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = Limits() if limits is None else limits
        if not sys.platform.startswith("linux"):
            raise SandboxError(
                f"programs of a model run only on Linux, where they can be confined; this is {sys.platform}"
            )
        fault = self._fault()
        if fault:
            raise SandboxError(f"programs of a model are not run, since this system cannot confine them: {fault}")

    def judge(self, program: str, entry_point: str, tests: str, setup: str = "") -> Verdict:
        """Runs tests against a function of a program. Threads may call this at the same time.

        Args:
            program: Python source that defines the function; Python's library is all it can import.
            entry_point: the function's name.
            tests: Python source that has `check(candidate)`, or that calls the function by its name; fails by raising.
                What it passes to the function must be plain data, and arrives there as a copy.
            setup: Python source that the tests stand on, run before them in their process.

        Raises:
            DataError: the tests themselves are broken, or pass what is no plain data.
        """
        with contextlib.ExitStack() as stack:
            (calls, calls_in), (replies, replies_in), (verdict, verdict_in) = (
                stack.enter_context(_pipe()) for _ in range(3)
            )
            deadline = time.monotonic() + self.limits.wall_s
            job = {"program": program, "entry_point": entry_point}
            stack.enter_context(self._started("program", [calls, replies_in], job))
            job = {"entry_point": entry_point, "setup": setup, "tests": tests}
            stack.enter_context(self._started("tests", [calls_in, replies, verdict_in], job))
            text = _read(verdict, deadline)
        if text is None:
            return Verdict(False, f"not done within {self.limits.wall_s:g} s")
        if not text.endswith(b"\n"):
            return Verdict(False, "its tests ended without a verdict")
        result = json.loads(text)
        if "missing" in result:
            raise SandboxError(f"the process of the tests was not confined: the system lacks {result['missing']}")
        if "broken" in result:
            raise DataError(f"the tests of {entry_point} cannot be run: {result['broken']}")
        return Verdict(result["passed"], result["detail"])

    def _fault(self) -> str:
        """What keeps this system from confining a program; "" if nothing does."""
        with tempfile.TemporaryDirectory(prefix="yunmin-") as folder, _pipe() as (out, into):
            (Path(folder) / "secret").write_text("secret", encoding="utf-8")
            with self._started("probe", [into], {"folder": folder}):
                text = _read(out, time.monotonic() + 30)
        if text is None or not text.endswith(b"\n"):
            return "the process that was to try it did not report"
        report = json.loads(text)
        if "missing" in report:
            return f"it lacks {report['missing']}"
        return f"a program could {', '.join(report['doors'])}" if report["doors"] else ""

    @contextlib.contextmanager
    def _started(self, role: str, pipes: list[FileIO], job: dict[str, str]) -> Iterator[None]:
        """A confined process that does a job with these ends of pipes, closed here, and is dead after the block."""
        whole: dict[str, Any] = {
            **job,
            "role": role,
            "pipes": [(pipe.fileno(), "w" if pipe.writable() else "r") for pipe in pipes],
            "parent": os.getpid(),
            "cpu_s": self.limits.cpu_s,
            "memory_bytes": self.limits.memory_bytes,
        }
        with tempfile.TemporaryFile() as file:
            file.write(json.dumps(whole).encode())
            file.seek(0)
            process = subprocess.Popen(
                [sys.executable, *_PYTHON],
                stdin=file,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[pipe.fileno() for pipe in pipes],
                env=_ENVIRONMENT,
                cwd="/",
                start_new_session=True,
            )
        try:
            for pipe in pipes:  # so that each process sees when the other is gone
                pipe.close()
            yield
        finally:
            process.kill()
            process.wait()


@contextlib.contextmanager
def _pipe() -> Iterator[tuple[FileIO, FileIO]]:
    """The end to read from and the end to write to."""
    reading, writing = os.pipe()
    with FileIO(reading, "r") as out, FileIO(writing, "w") as into:
        yield out, into


def _read(pipe: FileIO, deadline: float) -> bytes | None:
    """All that is written until the other end closes, cut where it is too much; None if that is not in time."""
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    text = b""
    while len(text) <= _VERDICT_BYTES:
        left_ms = math.ceil((deadline - time.monotonic()) * 1000)
        if left_ms <= 0 or not poll.poll(left_ms):
            return None
        chunk = os.read(pipe.fileno(), _VERDICT_BYTES)
        if not chunk:
            break
        text += chunk
    return text
