"""The engine without HTTP, in a process of its own: one request a line on stdin, one answer a line on stdout.

    {"prompts": [[1, 2, 3], ...], "max_tokens": 64} -> {"seconds": 0.7, "tokens": 64, "first_token_s": [0.01, ...]}

The first line on stdout tells that it is ready.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
from typing import Any

from prometheus_client import CollectorRegistry

from serving.engine.engine import Engine
from serving.engine.job import Job
from serving.launch import load_served
from serving.settings import Settings
from serving.start import start_engine
from yunmin.sampling import SamplingParams

_DEADLINE_S = 3600.0


async def generate(engine: Engine, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
    """Greedy sequences submitted at once; a caller on the event loop takes every piece, as the server's would."""
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    begin = time.perf_counter()

    async def one(prompt_ids: list[int]) -> tuple[float, int]:
        stream = engine.submit(Job(prompt_ids, params, _DEADLINE_S))
        first = 0.0
        async for _ in stream:
            first = first or time.perf_counter() - begin
        return first, len(stream.generation.token_ids)

    found = await asyncio.gather(*map(one, prompts))
    return {
        "seconds": time.perf_counter() - begin,
        "tokens": sum(tokens for _, tokens in found),
        "first_token_s": [first for first, _ in found],
    }


def main(argv: list[str]) -> int:
    """Takes one JSON object: `artifact`, `settings`."""
    spec = json.loads(argv[0])
    settings = Settings(artifact=spec["artifact"], **spec["settings"])
    with contextlib.redirect_stdout(sys.stderr):
        channel = os.fdopen(os.dup(1), "w", encoding="utf-8")  # what a library prints must not break the protocol
        os.dup2(2, 1)

        def say(message: dict[str, Any]) -> None:
            print(json.dumps(message), file=channel, flush=True)

        engine = start_engine(load_served(settings), settings, CollectorRegistry())
        say({})
        for line in sys.stdin:
            say(asyncio.run(generate(engine, **json.loads(line))))
        engine.stop()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
