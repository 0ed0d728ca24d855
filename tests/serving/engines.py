"""Engines without HTTP, on a runtime that is watched."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any

import torch
from prometheus_client import CollectorRegistry
from torch import Tensor

from serving.engine.engine import Engine
from serving.engine.job import Load
from serving.engine.streams import TokenStream
from serving.metrics import Metrics
from yunmin.config import MambaConfig
from yunmin.language_model import LanguageModel
from yunmin.sampling import SamplingParams
from yunmin.state import MambaState

FOREVER = SamplingParams(max_tokens=10**6, temperature=0.0)
POISON = 13


class WatchedRuntime:
    """The model's own runtime, with a record of calls and places to interfere."""

    name = "watched"

    def __init__(self, model: LanguageModel) -> None:
        self.inner = model.runtime
        self.calls: list[str] = []
        self.read: list[int] = []  # tokens of each prefill
        self.before_step: Callable[[Sequence[int]], None] = lambda _: None
        self.after_step: Callable[[Sequence[int], Tensor], None] = lambda _, __: None

    @property
    def config(self) -> MambaConfig:
        return self.inner.config

    @property
    def device(self) -> torch.device:
        return self.inner.device

    @property
    def weight_bytes(self) -> int:
        return self.inner.weight_bytes

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.inner.forward(input_ids)

    def new_state(self, batch_size: int) -> MambaState:
        return self.inner.new_state(batch_size)

    def prefill(self, token_ids: Sequence[int], state: MambaState | None = None) -> tuple[Tensor, MambaState]:
        self.calls.append("prefill")
        self.read.append(len(token_ids))
        if token_ids[0] == POISON:
            raise RuntimeError("a poisoned prompt")
        return self.inner.prefill(token_ids, state)

    def score(self, token_ids: Sequence[int], state: MambaState | None = None) -> tuple[Tensor, MambaState]:
        return self.inner.score(token_ids, state)

    def step(self, token_ids: Sequence[int], state: MambaState) -> tuple[Tensor, MambaState]:
        self.calls.append("step")
        self.before_step(token_ids)
        logits, state = self.inner.step(token_ids, state)
        self.after_step(token_ids, logits)
        return logits, state

    def gather(self, pool: MambaState, slots: Sequence[int]) -> MambaState:
        self.calls.append("gather")
        return self.inner.gather(pool, slots)

    def scatter(self, pool: MambaState, slots: Sequence[int], state: MambaState) -> None:
        self.inner.scatter(pool, slots, state)


@contextlib.asynccontextmanager
async def engine_on(
    model: LanguageModel,
    *,
    runtime: WatchedRuntime | None = None,
    slots: int = 3,
    queue: int = 100,
    chunk: int = 8,
    cache_bytes: int = 0,
    cache_interval: int = 1024,
) -> AsyncIterator[Engine]:
    engine = Engine(
        runtime or WatchedRuntime(model),
        model.tokenizer,
        slots=slots,
        queue=queue,
        metrics=Metrics(CollectorRegistry()),
        prefill_chunk=chunk,
        cache_bytes=cache_bytes,
        cache_interval=cache_interval,
    )
    engine.start()
    try:
        yield engine
    finally:
        await asyncio.to_thread(engine.stop)


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(120):
            await coroutine

    asyncio.run(bounded())


async def read(stream: TokenStream) -> tuple[str, list[int], str | None]:
    pieces = [piece async for piece in stream]
    ids = [piece.token_id for piece in pieces if piece.token_id is not None]
    return "".join(piece.text for piece in pieces), ids, pieces[-1].finish_reason


async def idle(engine: Engine) -> None:
    while engine.load != Load(0, 0):
        await asyncio.sleep(0.001)


REQUESTS: list[tuple[str | list[int], dict[str, Any]]] = [
    ("def main(", {"temperature": 0.0, "max_tokens": 25}),
    ("Grüße aus 東京, " * 5, {"temperature": 0.0, "max_tokens": 9}),
    ([5], {"seed": 7, "max_tokens": 30, "top_k": 40, "repetition_penalty": 1.3}),
    ("def main(argument):\n", {"seed": 8, "temperature": 1.5, "max_tokens": 17, "stop": ["e"]}),
    ("x", {"seed": 9, "top_p": 0.9, "max_tokens": 1}),
    ("a" * 40, {"seed": 10, "min_p": 0.02, "max_tokens": 40}),
    ("🙂", {"temperature": 0.0, "max_tokens": 33}),
]


def alone(model: LanguageModel, prompt: str | list[int], params: dict[str, Any]) -> tuple[str, list[int], str]:
    completion = model.generate(prompt, **params)
    return completion.text, list(completion.token_ids), completion.finish_reason


def sampling(params: dict[str, Any]) -> SamplingParams:
    return SamplingParams(**{**params, "stop": tuple(params.get("stop", ()))})
