"""Mixed load for some minutes: streams, clients that leave, sessions, refused requests, long prompts."""

from __future__ import annotations

import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.serve_client import Client, Request, Script
from benchmarks.serve_parts import Part, Prompts, completion, require_whole
from benchmarks.serve_servers import Server
from yunmin.errors import YunminError

_SAMPLE_S = 1.0
_WARM_UP_SHARE = 0.2  # of the time
_COMPARED_SHARE = 0.1  # of the time: the tenth after the warm-up, and the last one
_MOST_FAILURES = 50
_KEPT_PREFIXES = 4
_PREFIX_TOKENS = 512
_GRACE_S = 120.0
_REFUSED = range(400, 500)


class Soak:
    """Keeps a server busy and counts what it answers.

    Args:
        server: to load; its memory is watched.
        client: to load it with.
        prompts: to draw from.
        long_tokens: of a long prompt.
        most_tokens: that the server lets a prompt have; one more is refused.
    """

    def __init__(self, server: Server, client: Client, prompts: Prompts, *, long_tokens: int, most_tokens: int) -> None:
        self._server = server
        self._client = client
        self._prompts = prompts
        self._long_tokens = long_tokens
        self._most_tokens = most_tokens
        self._draw = random.Random(1)  # noqa: S311 (which request comes next)
        self._prefixes = [prompts.ids(_PREFIX_TOKENS) for _ in range(_KEPT_PREFIXES)]
        self._kinds: dict[str, tuple[int, Callable[[], Script]]] = {
            "stream": (30, self._stream),
            "whole answer": (10, self._whole),
            "client leaves": (15, self._leave),
            "session": (15, self._session),
            "refused": (15, self._refused),
            "shared prefix": (10, self._shared),
            "long prompt": (5, self._long),
        }
        self._counts: Counter[str] = Counter()
        self._failures: list[str] = []
        self._memory: list[tuple[float, int]] = []

    def run(self, minutes: float, at_once: int) -> Part:
        """Loads the server for so long, by so many clients.

        Returns:
            Scripts by kind, what failed against expectation, and the server's memory over time.
        """
        self._client.run_scripts(self._scripts(60 * minutes), at_once=at_once, limit_s=60 * minutes + _GRACE_S)
        return {
            "minutes": minutes,
            "at_once": at_once,
            "counts": dict(self._counts),
            "failures": self._failures,
            "alive": self._server.process.poll() is None,
            **memory_growth(self._memory),
            "memory": self._memory,
        }

    def _scripts(self, seconds: float) -> Iterator[Script]:
        begin = time.perf_counter()
        weights = [weight for weight, _ in self._kinds.values()]
        while (now := time.perf_counter() - begin) < seconds and len(self._failures) < _MOST_FAILURES:
            if not self._memory or now - self._memory[-1][0] >= _SAMPLE_S:
                self._memory.append((now, self._server.memory_bytes))
            (kind,) = self._draw.choices(list(self._kinds), weights)
            yield self._watched(kind, self._kinds[kind][1]())

    def _watched(self, kind: str, script: Script) -> Script:
        try:
            yield from script
        except (YunminError, KeyError) as error:
            self._failures.append(f"{kind}: {error}")
        else:
            self._counts[kind] += 1

    def _stream(self) -> Script:
        require_whole((yield completion(self._short(), self._draw.randrange(4, 64), temperature=1.0)))

    def _whole(self) -> Script:
        answer = yield completion(self._short(), self._draw.randrange(1, 32), stream=False)
        assert answer.json()["choices"][0]["finish_reason"] == "length"

    def _leave(self) -> Script:
        request = completion(self._short(), 1000)
        answer = yield Request(request.path, request.body, leave_after=self._draw.randrange(1, 20))
        if answer.status != 200 or answer.is_whole:
            raise YunminError(f"expected a stream that still ran, found {answer.explain()}")

    def _session(self) -> Script:
        created = yield Request("/v1/sessions", {"token_ids": self._short()})
        session = created.json()["id"]
        for _ in range(2):
            require_whole((yield completion(self._short(), 8, session_id=session)))
        forked = yield Request(f"/v1/sessions/{session}/fork", {})
        fork = forked.json()["id"]
        require_whole((yield completion("", 8, session_id=fork)))
        for name in (session, fork):
            deleted = yield Request(f"/v1/sessions/{name}", method="DELETE")
            if deleted.status not in (200, 204):
                raise YunminError(f"deleting: {deleted.explain()}")

    def _refused(self) -> Script:
        bad: list[Any] = [
            b'{"prompt": ',
            {"prompt": "x", "max_tokens": -1},
            {"prompt": "x", "no_such_field": 1},
            {"prompt": ["x", 3]},
            {"prompt": "x", "model": "another"},
            {"prompt": "x", "session_id": "sess_" + 32 * "0"},
            {"prompt": self._prompts.ids(self._most_tokens + 1)},
        ]
        answer = yield Request("/v1/completions", self._draw.choice(bad))
        if answer.status not in _REFUSED:
            raise YunminError(f"expected a refusal, found {answer.explain()}")

    def _shared(self) -> Script:
        prefix = self._draw.choice(self._prefixes)
        require_whole((yield completion([*prefix, *self._short()], 8)))

    def _long(self) -> Script:
        require_whole((yield completion(self._prompts.ids(self._long_tokens), 4)))

    def _short(self) -> list[int]:
        return self._prompts.ids(self._draw.randrange(2, 200))


def memory_growth(samples: list[tuple[float, int]]) -> dict[str, float | None]:
    """How much more memory a server has at the end than after its warm-up.

    Args:
        samples: seconds since the beginning, and resident bytes.

    Returns:
        Medians of the tenth of the time after the first fifth and of the last tenth, in bytes, and their ratio less 1;
        None where there are too few samples.
    """
    end = samples[-1][0] if samples else 0.0
    warm, compared = end * _WARM_UP_SHARE, end * _COMPARED_SHARE
    first = [size for moment, size in samples if warm <= moment <= warm + compared]
    last = [size for moment, size in samples if moment >= end - compared]
    if not first or not last or not all(first):
        return {"memory_warm_bytes": None, "memory_end_bytes": None, "memory_growth": None}
    before, after = statistics.median(first), statistics.median(last)
    return {"memory_warm_bytes": before, "memory_end_bytes": after, "memory_growth": after / before - 1}
