"""What runs in a confined process: a program that answers calls, or the tests that make them and give the verdict."""

from __future__ import annotations

import builtins
import json
import os
import sys
import types
from collections.abc import Callable
from typing import Any, TextIO

from research.sandbox.confine import MissingLayerError, confine
from research.sandbox.values import NotPlainError, dumps, loads

_CONFINED = "confined\n"  # a program's first line, written before any foreign code runs
_ENDED = "the program ended before it answered, or used up its processor time"
_REPLY_LETTERS = 4 << 20
_DETAIL_LETTERS = 500


def main() -> None:
    """Does the job that stands on stdin as JSON; never returns."""
    with open(0, encoding="utf-8") as file:
        job = json.load(file)
    os.open(os.devnull, os.O_RDWR)  # takes the number 0
    roles: dict[str, Callable[..., None]] = {"program": _program, "tests": _tests, "probe": _probe}
    role = roles[job["role"]]
    if role is _probe:
        import research.sandbox.probe  # noqa: F401 - its file cannot be read any more once this is confined
    pipes = [os.fdopen(pipe, mode, encoding="ascii", errors="replace", newline="\n") for pipe, mode in job["pipes"]]
    try:
        confine(job["parent"], job["cpu_s"], job["memory_bytes"])
    except MissingLayerError as error:
        _write(pipes[-1], json.dumps({"missing": str(error)}))
        os._exit(1)
    role(job, *pipes)
    os._exit(0)


def _write(pipe: TextIO, line: str) -> None:
    pipe.write(line + "\n")
    pipe.flush()


def _probe(job: dict[str, Any], report: TextIO) -> None:
    from research.sandbox.probe import open_doors

    _write(report, json.dumps({"doors": open_doors(job)}))


def _program(job: dict[str, Any], calls: TextIO, replies: TextIO) -> None:
    """Runs the program, then answers each line of `calls` with one line of `replies`."""
    replies.write(_CONFINED)
    replies.flush()
    module = types.ModuleType("program")
    sys.modules["program"] = module  # where dataclasses look for the names of annotations
    try:
        exec(compile(job["program"], "<program>", "exec"), module.__dict__)  # noqa: S102 - this is what is confined
        function = module.__dict__[job["entry_point"]]
        reply = dumps({"value": None})
    except BaseException as error:  # noqa: BLE001 - whatever the program raises is its answer
        reply = _raised(error)
    _write(replies, reply)
    for line in calls:
        try:
            arguments, named = loads(line)
            reply = dumps({"value": function(*arguments, **named)})
        except BaseException as error:  # noqa: BLE001
            reply = _raised(error)
        _write(replies, reply)


def _raised(error: BaseException) -> str:
    names = [kind.__name__ for kind in type(error).__mro__]
    try:
        return dumps({"raised": names, "arguments": error.args})
    except Exception:  # noqa: BLE001 - what cannot be sent as it is goes as text
        return dumps({"raised": names, "arguments": (str(error),)})


class _StopTestsError(BaseException):
    """Ends the tests; no `except Exception` of theirs may take it for an exception of the program."""


class _Candidate:
    """The program's function, as the tests call it.

    Attributes:
        called: whether the tests have called it.
        fault: why the verdict is no pass, whatever the tests make of it; "" so far.
        broken: what the tests asked for that cannot be done; "" so far.
    """

    def __init__(self, name: str, calls: TextIO, replies: TextIO) -> None:
        self.__name__ = name
        self.called = False
        self.fault = ""
        self.broken = ""
        self._calls = calls
        self._replies = replies

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self.called = True
        try:
            line = dumps((arguments, named))
        except NotPlainError as error:
            self.broken = f"an argument of {self.__name__}: {error}"
            raise _StopTestsError from None
        try:
            _write(self._calls, line)
        except BrokenPipeError:
            raise self._fault(_ENDED) from None
        return self.receive()

    def receive(self) -> Any:
        """The program's next reply: returns its value or raises its exception."""
        line = self._replies.readline(_REPLY_LETTERS)
        if not line.endswith("\n"):
            raise self._fault(f"an answer of more than {_REPLY_LETTERS} letters" if line else _ENDED)
        try:
            reply = loads(line)
            if "value" in reply:
                return reply["value"]
            exception = _exception(reply["raised"], reply["arguments"])
        except Exception as error:  # noqa: BLE001 - the program may write anything
            raise self._fault(f"an answer that cannot be read: {error!r}") from None
        raise exception

    def wait_for_program(self) -> None:
        """Returns when the program has run and defined its function."""
        if self._replies.readline(len(_CONFINED)) != _CONFINED:
            self.broken = "the program's process was not confined"
            raise _StopTestsError
        self.receive()

    def _fault(self, what: str) -> _StopTestsError:
        self.fault = what
        return _StopTestsError(what)


def _exception(names: list[str], arguments: tuple[Any, ...]) -> Exception:
    """An exception of the first of these classes that Python has built in."""
    for name in names:
        kind = getattr(builtins, name, None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            try:
                return kind(*arguments)
            except Exception:  # noqa: BLE001, S112 - some classes want other arguments; their base will do
                continue
    return RuntimeError(f"{names[0]}: {arguments}")


def _tests(job: dict[str, Any], calls: TextIO, replies: TextIO, verdict: TextIO) -> None:
    """Runs the tests against the program in the other process, and writes the verdict."""
    candidate = _Candidate(job["entry_point"], calls, replies)
    module = types.ModuleType("tests")
    sys.modules["tests"] = module
    detail = ""
    try:
        exec(compile(job["setup"], "<setup>", "exec"), module.__dict__)  # noqa: S102
        module.__dict__[job["entry_point"]] = candidate
        tests = compile(job["tests"], "<tests>", "exec")
    except BaseException as error:  # noqa: BLE001
        candidate.broken = _describe(error)
    try:
        if not candidate.broken:
            candidate.wait_for_program()
            exec(tests, module.__dict__)  # noqa: S102
            if "check" in module.__dict__:
                module.__dict__["check"](candidate)
            if not candidate.called:  # as of functions and classes that a framework would have run
                candidate.broken = (
                    f"they never call {job['entry_point']}; expected check(candidate), or statements that call it"
                )
    except BaseException as error:  # noqa: BLE001 - whatever goes wrong, it is no pass
        detail = _describe(error, job["tests"]) or type(error).__name__
    detail = candidate.fault or detail
    result = {"passed": not detail and not candidate.broken, "detail": detail[:_DETAIL_LETTERS]}
    if candidate.broken:
        result["broken"] = candidate.broken[:_DETAIL_LETTERS]
    _write(verdict, json.dumps(result))


def _describe(error: BaseException, tests: str = "") -> str:
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    lines = tests.splitlines()
    trace = error.__traceback__
    number = 0
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<tests>":
            number = trace.tb_lineno
        trace = trace.tb_next
    return f"{text}, at: {lines[number - 1].strip()}" if 0 < number <= len(lines) else text
