"""The prompt of a command: text, a file, or token ids."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from yunmin.errors import RequestError


def add_prompt_arguments(arguments: argparse.ArgumentParser) -> None:
    """Adds `--prompt`, `--prompt-file` and `--token-ids`, one of which must be given."""
    prompt = arguments.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="text to continue")
    prompt.add_argument("--prompt-file", metavar="FILE", help="file with the text to continue (- for stdin)")
    prompt.add_argument("--token-ids", metavar="IDS", help="comma-separated token ids to continue")


def read_prompt(options: argparse.Namespace) -> str | list[int]:
    """The prompt that those arguments give.

    Raises:
        RequestError: the file cannot be read, or the ids are none.
    """
    text: str | None = options.prompt
    if text is not None:
        return text
    file: str | None = options.prompt_file
    if file is not None:
        try:
            data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
            return data.decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError("prompt-file", f"{file}: {error}") from None
    try:
        return [int(part) for part in (options.token_ids or "").split(",")]
    except ValueError:
        raise RequestError(
            "token-ids", f"must be integers separated by commas, got {options.token_ids!r:.80}"
        ) from None
