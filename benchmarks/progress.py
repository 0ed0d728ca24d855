"""Lines of progress on stderr."""

from __future__ import annotations

import datetime
import sys


def say(line: str) -> None:
    """Prints a line with the time of day before it."""
    print(f"{datetime.datetime.now().astimezone():%H:%M:%S} {line}", file=sys.stderr, flush=True)
