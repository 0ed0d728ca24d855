"""The command line: finds the stages' subcommands by entry points, and names none of them.

An entry point of the group `yunmin.commands` names a function `main(argv) -> int`. Its module's docstring gives the
one-line summary, read without importing the module, so that `yunmin --help` is instant.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points, version
from pathlib import Path
from typing import Any, NoReturn

from yunmin.errors import YunminError

GROUP = "yunmin.commands"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `yunmin COMMAND ...`; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands = {point.name: point for point in sorted(entry_points(group=GROUP), key=lambda p: p.name)}
    if arguments and arguments[0] in ("-V", "--version"):
        print(f"yunmin {version('yunmin')}")
        return 0
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview(commands))
        return 0 if arguments else 2
    if arguments[0] not in commands:
        return _fail(f"unknown command {arguments[0]!r}, expected one of {', '.join(commands)}", 2)
    try:
        command = commands[arguments[0]].load()
    except ModuleNotFoundError as error:
        return _fail(f"the command {arguments[0]!r} needs the package {error.name!r}, which is not installed")
    return run(command, arguments[1:])


def run(command: Callable[[list[str]], int], argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand's `main`, turning the errors a user can cause into one line on stderr.

    Args:
        command: takes the arguments after its name and returns an exit status.
        argv: those arguments; None takes the process's.
    """
    level = os.environ.get("YUNMIN_LOG", "WARNING").upper()
    if level not in logging.getLevelNamesMapping():
        return _fail(f"YUNMIN_LOG: expected one of {', '.join(logging.getLevelNamesMapping())}, found {level!r}")
    logging.basicConfig(level=level, format="%(name)s: %(message)s")
    try:
        return command(list(sys.argv[1:] if argv is None else argv))
    except YunminError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.filename is None:
            raise
        return _fail(f"{error.filename}: {error.strerror}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Says what is wrong in one line, without the usage, which can take a screen."""
        self.exit(_fail(f"{message} ({self.prog} --help explains)", 2))


def parser(prog: str, description: str, examples: Sequence[str]) -> argparse.ArgumentParser:
    """An argument parser whose help ends with examples, and whose errors are one line."""
    epilog = "examples:\n" + "\n".join(f"  {example}" for example in examples)
    return _Parser(
        prog=f"yunmin {prog}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def print_json(value: Any) -> None:
    """Prints a result as one JSON object on stdout."""
    print(json.dumps(value, ensure_ascii=False))


def _fail(message: str, status: int = 1) -> int:
    print(f"yunmin: error: {' '.join(message.split())}", file=sys.stderr)
    return status


def _overview(commands: dict[str, EntryPoint]) -> str:
    width = max((len(name) for name in commands), default=0)
    lines = [f"  {name:<{width}}  {_summary(point)}" for name, point in commands.items()]
    return "\n".join(
        [
            "usage: yunmin COMMAND [ARGUMENT ...]",
            "",
            "Takes a Mamba language model from fine-tuning to production.",
            "",
            "commands:",
            *lines,
            "",
            "yunmin COMMAND --help explains a command; yunmin --version prints the version.",
        ]
    )


def _summary(point: EntryPoint) -> str:
    """First line of the docstring of the command's module, without importing it."""
    try:
        spec = importlib.util.find_spec(point.module)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None:
        return "(not installed)"
    docstring = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0].rstrip(".")
