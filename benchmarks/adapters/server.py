"""The process of one contestant: reads one request a line from stdin and answers one JSON object a line on stdout.

The first line on stdout tells how loading went; after it, `{"task": NAME, ...}` is answered by what the function of
that name measured. Times are in seconds, memory in bytes. Standard library only: it runs under any interpreter.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks.adapters.contract import Engine, Setup, engine_class, make_engine, reason
from yunmin.machine import memory_bytes

_WARM_STEPS = 2


class Server:
    """Measures one engine.

    Args:
        engine: not loaded yet.
        n_tokens: ids below it are drawn as text; the same ones for every contestant.
    """

    def __init__(self, engine: Engine, n_tokens: int) -> None:
        self.engine = engine
        self.n_tokens = n_tokens
        self._depth = -1  # tokens that the one deep sequence has read, -1 without one
        self._tasks: dict[str, Callable[..., dict[str, Any]]] = {
            "prefill": self.prefill,
            "decode": self.decode,
            "deepen": self.deepen,
            "deep": self.deep,
            "logits": self.logits,
            "memory": self.memory,
        }

    def load(self) -> dict[str, Any]:
        """Loads the engine and computes one token; the imports are over by now."""
        before, _ = memory_bytes()
        begin = time.perf_counter()
        self.engine.load()
        loaded = time.perf_counter()
        self.engine.start(1)
        self.engine.read([0])
        ready = time.perf_counter()
        resident, peak = memory_bytes()
        return {
            "load_s": loaded - begin,
            "first_token_s": ready - begin,
            "memory_before_bytes": before,
            "memory_loaded_bytes": resident,
            "memory_load_peak_bytes": peak,
            "versions": dict(self.engine.versions),
            "can_continue": self.engine.can_continue,
        }

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        task = request.pop("task")
        return self._tasks[task](**request)

    def prefill(self, length: int) -> dict[str, Any]:
        """Reads a text of `length` tokens from the empty state."""
        self._depth = -1
        token_ids = self._ids(length, length)
        self.engine.start(1)
        begin = time.perf_counter()
        self.engine.read(token_ids)
        return {"seconds": time.perf_counter() - begin}

    def decode(self, batch_size: int, steps: int) -> dict[str, Any]:
        """`steps` steps of a batch, each timed; some more go before them."""
        self._depth = -1
        self.engine.start(batch_size)
        return {"step_s": self._steps(batch_size, steps, _WARM_STEPS)}

    def deepen(self, depth: int) -> dict[str, Any]:
        """Brings the one deep sequence to `depth` tokens."""
        if self._depth < 0:
            self.engine.start(1)
            self._depth = 0
        missing = depth - self._depth
        begin = time.perf_counter()
        if missing > 0:
            self.engine.read(self._ids(depth, missing))
            self._depth = depth
        return {"seconds": time.perf_counter() - begin, "tokens": max(0, missing)}

    def deep(self, steps: int) -> dict[str, Any]:
        """Steps of the deep sequence, from wherever it is."""
        self._depth += steps + _WARM_STEPS
        return {"step_s": self._steps(1, steps, _WARM_STEPS)}

    def logits(self, length: int) -> dict[str, Any]:
        """Logits after a text, half of it read at once and half step by step where the engine can; else all at once."""
        self._depth = -1
        token_ids = self._ids(1, length)
        self.engine.start(1)
        at_once = length // 2 if self.engine.can_continue else length
        self.engine.read(token_ids[:at_once])
        for token_id in token_ids[at_once:]:
            self.engine.step([token_id])
        return {"logits": self.engine.logits()}

    def memory(self) -> dict[str, Any]:
        resident, peak = memory_bytes()
        return {"memory_bytes": resident, "memory_peak_bytes": peak}

    def _steps(self, batch_size: int, steps: int, warm: int) -> list[float]:
        seconds = []
        for index in range(warm + steps):
            token_ids = self._ids(index, batch_size)
            begin = time.perf_counter()
            self.engine.step(token_ids)
            seconds.append(time.perf_counter() - begin)
        return seconds[warm:]

    def _ids(self, seed: int, count: int) -> list[int]:
        draw = random.Random(seed)  # noqa: S311 (text for a benchmark)
        return [draw.randrange(self.n_tokens) for _ in range(count)]


def main(argv: list[str]) -> int:
    """Takes one JSON object: `kind`, `model`, `threads`, `options`, `n_tokens`; or `kind` and `prepare`."""
    spec = json.loads(argv[0])
    with contextlib.redirect_stdout(sys.stderr):
        # what a library prints, from C as well, must not break the protocol
        channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

        def say(message: dict[str, Any]) -> None:
            print(json.dumps(message), file=channel, flush=True)

        try:
            if "prepare" in spec:
                engine_class(spec["kind"]).prepare(*spec["prepare"])
                say({})
                return 0
            server = Server(
                make_engine(spec["kind"], Setup(spec["model"], spec["threads"], spec["options"])), spec["n_tokens"]
            )
            say(server.load())
        except Exception as error:  # noqa: BLE001 (whatever an engine raises is the reason it is not measured)
            say({"unavailable": reason(error)})
            return 0
        for line in sys.stdin:
            try:
                say(server.answer(json.loads(line)))
            except Exception as error:  # noqa: BLE001 (the report names it, the others go on)
                say({"failed": reason(error)})
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
