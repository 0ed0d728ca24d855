"""What is measured of one server over HTTP: throughput, stalls, sessions, the prefix cache."""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from benchmarks.latency import percentile
from benchmarks.serve_client import Client, Exchange, Request, Script
from benchmarks.serve_servers import Server
from yunmin.errors import YunminError
from yunmin.tokenizer import Tokenizer

_LIMIT_S = 900.0
_WORDS = 12
_CREATED_PROMPT_TOKENS = 32
_CREATED_NEW_TOKENS = 4
_LONG_TOKENS = 4096  # more than a stream gives before it is left
_TAIL_TOKENS = 16
_HITS = 3  # later requests with one prefix

Part = dict[str, Any]
Restart = Callable[[], AbstractContextManager[Server]]


@dataclass(frozen=True)
class Plan:
    """How much to measure.

    Attributes:
        threads: of every engine.
        streams: numbers of streams at once.
        new_tokens: of each stream.
        repeats: samples, beside one that warms up.
        stall_streams: that run while a prompt is read.
        stall_prompt: its tokens.
        stall_tokens: that each stream gives before.
        sessions: to be created and used once.
        at_once: clients that do so.
        session_tokens: that the restored session has read.
        prefix_tokens: that prompts have in common.
        limit_s: a peer takes no further sample once it has taken this long.
    """

    threads: int
    streams: tuple[int, ...] = (1, 16)
    new_tokens: int = 256
    repeats: int = 5
    stall_streams: int = 8
    stall_prompt: int = 4096
    stall_tokens: int = 100
    sessions: int = 1000
    at_once: int = 16
    session_tokens: int = 10_000
    prefix_tokens: int = 2048
    limit_s: float = 60.0

    @classmethod
    def quick(cls, threads: int) -> Plan:
        """For trying the command out."""
        return cls(
            threads,
            new_tokens=64,
            repeats=2,
            stall_prompt=2048,
            stall_tokens=40,
            sessions=100,
            session_tokens=2000,
            prefix_tokens=512,
            limit_s=15.0,
        )


class Prompts:
    """Prompts that were never used before, so that no cache knows them.

    Args:
        tokenizer: of the model.
        n_tokens: ids below it are drawn.
    """

    def __init__(self, tokenizer: Tokenizer, n_tokens: int) -> None:
        self._draw = random.Random(0)  # noqa: S311 (text for a benchmark)
        self._n_tokens = n_tokens
        # models with random weights repeat the last id: it must be one that shows
        self._last_id = tokenizer.encode("x")[-1]

    def ids(self, length: int) -> list[int]:
        """Random ids; the first are not those of another prompt."""
        return [self._draw.randrange(self._n_tokens) for _ in range(length - 1)] + [self._last_id]

    def text(self) -> str:
        """Some words, the same number of tokens to every engine."""
        return " ".join(f"{self._draw.randrange(10**6)}" for _ in range(_WORDS)) + " x"


def completion(prompt: str | list[int], new_tokens: int, **fields: Any) -> Request:
    """A greedy stream of exactly so many tokens."""
    body = {"prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "stream": True, "ignore_eos": True}
    return Request("/v1/completions", body | fields)


def streams(client: Client, requests: Iterable[Request], new_tokens: int) -> Part:
    """Requests sent at once: tokens per second over all, from the first byte sent to the last one received.

    Raises:
        YunminError: a stream broke off, or gave fewer tokens than were asked for.
    """
    cpu, begin = time.process_time(), time.perf_counter()
    exchanges = client.gather(requests, _LIMIT_S)
    end = max(exchange.ended for exchange in exchanges)
    cpu_s = time.process_time() - cpu
    for exchange in exchanges:
        require_whole(exchange)
    return {
        "seconds": end - begin,
        "tokens_per_s": len(exchanges) * new_tokens / (end - begin),
        "first_token_s": statistics.mean(exchange.first_event_s for exchange in exchanges),
        "events_per_token": sum(len(e.moments) for e in exchanges) / (len(exchanges) * new_tokens),
        "client_cpu_share": cpu_s / (end - begin),
    }


def require_whole(exchange: Exchange) -> None:
    """Refuses a stream that ended otherwise than by its length.

    Raises:
        YunminError: says what came.
    """
    if exchange.status != 200 or not exchange.is_whole:
        raise YunminError(f"{exchange.request.path}: expected a whole stream, found {exchange.explain()}")
    reasons = [choice.get("finish_reason") for event in exchange.events() for choice in event.get("choices", ())]
    if "length" not in reasons:
        found = next((reason for reason in reasons if reason), None)
        raise YunminError(f"{exchange.request.path}: expected a stream that ends by its length, found {found!r}")


def stall(client: Client, prompts: Prompts, plan: Plan) -> Part:
    """Gaps between the tokens of running streams, before and while a long prompt is read beside them.

    Returns:
        `median_before_s`, `p99_during_s`, their `ratio`, and the gaps themselves.
    """
    running = [client.start(completion(prompts.ids(16), _LONG_TOKENS)) for _ in range(plan.stall_streams)]

    def has_begun() -> bool:
        for exchange in running:
            if exchange.ended:
                require_whole(exchange)
                raise YunminError(f"a stream of {_LONG_TOKENS} tokens ended before the long prompt was read")
        return all(len(exchange.moments) > plan.stall_tokens for exchange in running)

    client.run_until(has_begun, _LIMIT_S)
    long = client.start(completion(prompts.ids(plan.stall_prompt), 1))
    client.run_until(lambda: bool(long.ended), _LIMIT_S)
    require_whole(long)
    for exchange in running:
        client.leave(exchange)
    skipped = plan.stall_tokens // 4  # while the last of them were still being admitted
    before = [gap for e in running for gap in _gaps(e.moments[skipped:], 0.0, long.sent)]
    during = [gap for e in running for gap in _gaps(e.moments, long.sent, long.first_event_s + long.sent)]
    if not during:
        raise YunminError(f"the prompt of {plan.stall_prompt} tokens was read within one gap between two tokens")
    median, p99 = statistics.median(before), percentile(sorted(during), 0.99)
    return {
        "median_before_s": median,
        "p99_before_s": percentile(sorted(before), 0.99),
        "median_during_s": statistics.median(during),
        "p99_during_s": p99,
        "ratio": p99 / median if median else None,  # tokens of a tiny model arrive several at once
        "read_s": long.first_event_s,
        "before_s": before,
        "during_s": during,
    }


def sessions(client: Client, prompts: Prompts, plan: Plan) -> tuple[Part, str]:
    """Creates sessions, each used once, by several clients at once; and one that has read a long text.

    Returns:
        Seconds for all and the share of single requests, and the id of the long session.

    Raises:
        YunminError: any of it fails.
    """
    created_s: list[float] = []
    used_s: list[float] = []

    def one() -> Script:
        created = yield Request("/v1/sessions", {"token_ids": prompts.ids(_CREATED_PROMPT_TOKENS)})
        session = created.json()["id"]
        created_s.append(created.seconds)
        used = yield completion("", _CREATED_NEW_TOKENS, session_id=session)
        require_whole(used)
        used_s.append(used.seconds)

    begin = time.perf_counter()
    client.run_scripts((one() for _ in range(plan.sessions)), at_once=plan.at_once)
    seconds = time.perf_counter() - begin
    long = client.fetch(Request("/v1/sessions", {"token_ids": prompts.ids(plan.session_tokens)}), _LIMIT_S)
    part = {
        "sessions": plan.sessions,
        "seconds": seconds,
        "create_s": statistics.median(created_s),
        "generate_s": statistics.median(used_s),
        "long_create_s": long.seconds,
    }
    return part, str(long.json()["id"])


def restored(client: Client, session: str) -> float:
    """Seconds to the first token of a session that a restarted server finds on disk."""
    exchange = client.fetch(completion("", 1, session_id=session), _LIMIT_S)
    require_whole(exchange)
    return exchange.first_event_s


def recomputed(client: Client, prompts: Prompts, plan: Plan) -> float:
    """Seconds to the first token of an unknown prompt as long as the session."""
    exchange = client.fetch(completion(prompts.ids(plan.session_tokens), 1), _LIMIT_S)
    require_whole(exchange)
    return exchange.first_event_s


def prefix(client: Client, prompts: Prompts, plan: Plan) -> Part:
    """Time to the first token of prompts with one long beginning: of the first, and of later ones with other ends."""
    samples: dict[str, list[float]] = {"cold_s": [], "second_s": [], "hit_s": []}
    cached: list[int] = []
    for _ in range(plan.repeats):
        shared = prompts.ids(plan.prefix_tokens)
        for index in range(2 + _HITS):
            asked = completion([*shared, *prompts.ids(_TAIL_TOKENS)], 1, stream_options={"include_usage": True})
            exchange = client.fetch(asked, _LIMIT_S)
            require_whole(exchange)
            samples[("cold_s", "second_s", "hit_s")[min(index, 2)]].append(exchange.first_event_s)
            usage = next(event["usage"] for event in exchange.events() if event.get("usage"))
            if index == 2:  # the second one has shown where prompts part
                cached.append(usage["prompt_tokens_details"]["cached_tokens"])
    medians = {name: statistics.median(taken) for name, taken in samples.items()}
    return {
        "prefix_tokens": plan.prefix_tokens,
        **medians,
        "ratio": medians["cold_s"] / medians["hit_s"],
        "cached_tokens": statistics.median(cached),
        "samples": samples,
    }


def _gaps(moments: list[float], begin: float, end: float) -> list[float]:
    """Between neighbours of which the later lies within the time."""
    return [later - earlier for earlier, later in itertools.pairwise(moments) if begin < later <= end]
