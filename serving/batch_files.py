"""The files of an offline batch: requests that are checked before the first is answered, answers that survive a kill.

Beside the answers lies a small file that says which requests and which model they belong to; answers are appended in
the order of the requests, so that the number of whole lines tells where to go on.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

from yunmin.errors import DataError
from yunmin.files import atomic_file, write_json

URLS = ("/v1/completions", "/v1/chat/completions", "/v1/responses")
_FORMAT = 1
_SYNC_S = 1.0  # a power cut loses no more answers than this

JSON = dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """One line of the requests.

    Attributes:
        number: of the line, from 1.
        custom_id: the caller's name for it.
        url: one of `URLS`.
        body: of the request.
    """

    number: int
    custom_id: str
    url: str
    body: JSON


@dataclass
class Tally:
    """Answers by how they went.

    Attributes:
        answered: with a result.
        refused: with a status of 400 to 499: the request's own fault.
        failed: without either.
        prompt_tokens, generated_tokens: of the results.
    """

    answered: int = 0
    refused: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0

    @property
    def total(self) -> int:
        return self.answered + self.refused + self.failed

    def to_dict(self) -> dict[str, int]:
        return asdict(self)

    def add(self, answer: JSON) -> None:
        """Counts one line of answers."""
        response = answer.get("response") or {}
        status = response.get("status_code", 0)
        if not 200 <= status < 300:
            if 400 <= status < 500:
                self.refused += 1
            else:
                self.failed += 1
            return
        self.answered += 1
        usage = response["body"].get("usage") or {}  # the Responses API has other names for the same
        self.prompt_tokens += usage.get("prompt_tokens") or usage.get("input_tokens") or 0
        self.generated_tokens += usage.get("completion_tokens") or usage.get("output_tokens") or 0


class Requests:
    """A checked file of requests, of which only the positions are kept in memory.

    Args:
        path: of the file: one JSON object a line, as OpenAI's batches have it; empty lines are passed over.

    Attributes:
        sha256: of its bytes.

    Raises:
        DataError: a line is malformed, or two have one `custom_id`; names the lines.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: list[tuple[int, int]] = []  # offset, number of the line
        seen: dict[str, int] = {}
        digest = hashlib.sha256()
        offset = 0
        with _opened(path) as file:
            for number, line in enumerate(file, 1):
                digest.update(line)
                if line.strip():
                    asked = _parse(path, number, line)
                    if asked.custom_id in seen:
                        first = seen[asked.custom_id]
                        raise DataError(f"{path}:{number}: custom_id {asked.custom_id!r} is that of line {first}, too")
                    seen[asked.custom_id] = number
                    self._places.append((offset, number))
                offset += len(line)
        if not self._places:
            raise DataError(f"{path}: no requests found")
        self.sha256 = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._places)

    def read(self, begin: int) -> Iterator[Asked]:
        """The requests from this one on."""
        with _opened(self.path) as file:
            for offset, number in self._places[begin:]:
                file.seek(offset)
                yield _parse(self.path, number, file.readline())


class Answers:
    """The file of answers, open for whoever goes on with it.

    Args:
        path: of the file.
        requests: that are answered.
        fingerprint: of the model that answers.
        force: whether answers to other requests, or of another model, may be thrown away.

    Attributes:
        tally: of the lines in the file, those of an earlier run included.

    Raises:
        DataError: the file belongs to other requests or another model, or another process writes it.
    """

    def __init__(self, path: Path, requests: Requests, fingerprint: str, *, force: bool) -> None:
        self.path = path
        self.tally = Tally()
        facts = {"format": _FORMAT, "requests_sha256": requests.sha256, "model": fingerprint}
        beside = path.with_name(f"{path.name}.batch.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.samefile(requests.path):
            raise DataError(f"{path}: expected another file for the answers than that of the requests")
        self._file = path.open("a+b")
        try:
            self._lock()
            if force:
                self._file.truncate(0)
            elif os.fstat(self._file.fileno()).st_size:
                self._check(beside, facts)
                self._keep_whole_lines(requests)
            with atomic_file(beside) as aside:
                write_json(aside, facts)
        except BaseException:
            self._file.close()
            raise
        self._synced = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # where a line could not be written, there is nothing to add to that
        untold = contextlib.nullcontext() if error is None else contextlib.suppress(OSError)
        with untold, contextlib.closing(self._file):
            os.fsync(self._file.fileno())

    def append(self, answer: JSON) -> None:
        """Adds a line; it is with the system at once, and on the disk within a second.

        Raises:
            DataError: the file cannot be written.
        """
        try:
            self._file.write(_line(answer))
            self._file.flush()
            if time.monotonic() - self._synced >= _SYNC_S:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()
        except OSError as error:
            reason = error.strerror or str(error)
            raise DataError(f"{self.path}: {reason}; with room for it, the same command goes on from here") from None
        self.tally.add(answer)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{self.path}: another process writes it") from None

    def _check(self, beside: Path, facts: JSON) -> None:
        try:
            known = json.loads(beside.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            self._refuse(f"expected {beside.name} beside it, which says what it answers")
        if known.get("format") != _FORMAT:
            self._refuse(f"{beside.name}: expected format {_FORMAT}, found {known.get('format')!r}")
        if known.get("requests_sha256") != facts["requests_sha256"]:
            self._refuse("it answers other requests: the input has changed since")
        if known.get("model") != facts["model"]:
            self._refuse("its answers are another model's")

    def _keep_whole_lines(self, requests: Requests) -> None:
        """Cuts the half line that a killed process may have left, and reads the others."""
        self._file.seek(0)
        end = 0
        asked = requests.read(0)
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                break
            expected = next(asked, None)
            try:
                answer = json.loads(line)
                custom_id = answer["custom_id"]
            except (ValueError, KeyError, TypeError):
                self._refuse(f"line {number} is no answer")
            if expected is None or custom_id != expected.custom_id:
                wanted = "no more lines" if expected is None else f"custom_id {expected.custom_id!r}"
                self._refuse(f"line {number}: expected {wanted}, found {custom_id!r}")
            self.tally.add(answer)
            end += len(line)
        self._file.truncate(end)

    def _refuse(self, reason: str) -> NoReturn:
        raise DataError(f"{self.path}: cannot go on with it, {reason}; name another file, or --force to begin anew")


def _opened(path: Path) -> Any:
    if not path.is_file():
        raise DataError(f"{path}: expected a file of requests, found {'a folder' if path.is_dir() else 'no such file'}")
    return path.open("rb")


def _parse(path: Path, number: int, line: bytes) -> Asked:
    where = f"{path}:{number}"
    try:
        record = json.loads(line, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: expected a JSON object, {error}") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(record).__name__}")
    for name, allowed in (("method", ("POST",)), ("url", URLS)):
        if record.get(name) not in allowed:
            raise DataError(f"{where}: expected {name} {' or '.join(allowed)}, found {record.get(name)!r}")
    custom_id, body = record.get("custom_id"), record.get("body")
    if not isinstance(custom_id, str) or not custom_id:
        raise DataError(f"{where}: expected custom_id to be a text, found {custom_id!r}")
    if not isinstance(body, dict):
        raise DataError(f"{where}: expected body to be an object, found {type(body).__name__}")
    if body.get("stream"):
        raise DataError(f"{where}: a line of answers is no stream; leave out stream")
    return Asked(number, custom_id, record["url"], body)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _line(answer: JSON) -> bytes:
    try:
        return json.dumps(answer, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can escape
        return json.dumps(answer).encode() + b"\n"
