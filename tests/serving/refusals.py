"""Runs `yunmin serve` where it must refuse, each in a process forked from one that has imported what takes seconds.

`python -m tests.serving.refusals` reads a JSON line `[ARGUMENTS, VARIABLES]` for each, and answers with
`[STATUS, STDOUT, STDERR]`.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from tests.serving.fixtures import ROOT


class Refusals:
    """Calls of `yunmin serve` that must end by themselves."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def __call__(self, *arguments: str, **environ: str) -> tuple[int, str]:
        """Status and stderr; nothing may be on stdout."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([arguments, environ]), file=self._process.stdin, flush=True)
        status, output, errors = json.loads(self._process.stdout.readline())
        assert output == ""
        return status, errors


@contextmanager
def refusals() -> Iterator[Refusals]:
    """The process that forks, until the block ends."""
    command = [sys.executable, "-m", "tests.serving.refusals"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Refusals(process)


def main() -> None:
    """Forks for each line."""
    importlib.import_module("serving.server")
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        arguments, environ = json.loads(line)
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
            child = os.fork()
            if not child:
                os.dup2(output.fileno(), 1)
                os.dup2(errors.fileno(), 2)
                _run(arguments, environ)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            print(json.dumps([status, *(_text(file.fileno()) for file in (output, errors))]), flush=True)


def _run(arguments: list[str], environ: dict[str, str]) -> NoReturn:
    from yunmin.cli import main as yunmin

    os.environ.update(environ)
    status = 70
    try:
        status = yunmin(["serve", *arguments])
    finally:  # the interpreter's own end would look at, and so copy, all that is imported
        sys.stdout.flush()
        os._exit(status)


def _text(file: int) -> str:
    return os.pread(file, 1 << 20, 0).decode()


if __name__ == "__main__":
    main()
