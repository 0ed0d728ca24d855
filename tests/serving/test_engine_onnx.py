"""The engine on onnxruntime: together as alone, prefixes reused, and no step copies a state."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor

from serving.engine.job import Job
from serving.launch import load_served
from serving.settings import read_settings
from tests.greedy import require_same_greedy
from tests.onnx_artifacts import checkpoint_of, write_onnx_artifact
from tests.serving.engines import WatchedRuntime, engine_on, read, run
from tests.serving.fixtures import YUNMIN, server
from yunmin.language_model import LanguageModel
from yunmin.sampling import SamplingParams

PROMPTS: list[str | list[int]] = [
    "def main(",
    "Grüße aus 東京, " * 5,
    [5],
    "x",
    "a" * 40,
    "🙂",
    "return argument\n" * 3,
]
PLENTY = 1 << 28


@pytest.fixture(scope="module")
def folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = checkpoint_of(model_folder)
    return write_onnx_artifact(
        tmp_path_factory.mktemp("onnx") / "artifact", source.config, tensors=source.tensors, tokenizer=source.tokenizer
    )


@pytest.fixture(scope="module")
def model(folder: Path) -> LanguageModel:
    settings = read_settings({"YUNMIN_ARTIFACT": str(folder), "YUNMIN_RUNTIME": "onnx", "YUNMIN_DEVICE": "cpu"})
    loaded = load_served(settings)
    assert loaded.runtime.name == "onnx"
    return loaded


def greedy(count: int) -> SamplingParams:
    return SamplingParams(max_tokens=count, temperature=0.0)


def require_as_alone(model: LanguageModel, prompt: str | list[int], found: Sequence[int]) -> None:
    def logits_after(ids: Sequence[int]) -> Tensor:
        return model.prefill([*model.encode(prompt), *ids])[0]

    alone = model.generate(prompt, max_tokens=len(found), temperature=0.0).token_ids
    require_same_greedy(found, alone, logits_after)


@pytest.mark.parametrize("slots", [1, 3, 16])
def test_output_equals_generating_alone_whoever_the_neighbours_are(model: LanguageModel, slots: int) -> None:
    requests = [(prompt, 10 + 7 * number) for number, prompt in enumerate(PROMPTS)] * 2

    async def main() -> None:
        async with engine_on(model, slots=slots, cache_bytes=PLENTY, cache_interval=16) as engine:
            streams = [engine.submit(Job(model.encode(p), greedy(count), 60)) for p, count in requests]
            for (prompt, count), (_, ids, reason) in zip(
                requests, await asyncio.gather(*map(read, streams)), strict=True
            ):
                assert (len(ids), reason) == (count, "length")
                require_as_alone(model, prompt, ids)
            again = engine.submit(Job(model.encode(PROMPTS[4]), greedy(9), 60))
            require_as_alone(model, PROMPTS[4], (await read(again))[1])
            assert again.cached_tokens > 8

    run(main())


def test_a_snapshot_goes_on_with_the_same_tokens(model: LanguageModel) -> None:
    async def main() -> None:
        async with engine_on(model, slots=2) as engine:
            ids = model.encode("def main(")
            first = engine.submit(Job(ids, greedy(12), 60, keep=True))
            neighbour = engine.submit(Job([7], greedy(40), 60))
            before = (await read(first))[1]
            assert first.snapshot is not None
            second = engine.submit(Job((*ids, *before), greedy(12), 60, start=first.snapshot))
            require_as_alone(model, ids, [*before, *(await read(second))[1]])
            require_as_alone(model, [7], (await read(neighbour))[1])

    run(main())


def test_a_step_of_the_batch_copies_no_state(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = WatchedRuntime(model)
    copies: list[str] = []
    for name in ("index_copy_", "copy_", "clone", "index_select"):
        plain = getattr(torch.Tensor, name)

        def watched(self: Tensor, *given: Any, plain: Any = plain, name: str = name, **options: Any) -> Any:
            if self.dim() == 3 or (given and isinstance(given[0], Tensor) and given[0].dim() == 3):
                copies.append(name)
            return plain(self, *given, **options)

        monkeypatch.setattr(torch.Tensor, name, watched)
    during_steps: list[list[str]] = []
    runtime.before_step = lambda _: copies.clear()
    runtime.after_step = lambda _, __: during_steps.append(list(copies))

    async def main() -> None:
        async with engine_on(model, runtime=runtime, slots=3) as engine:
            streams = [engine.submit(Job([number], greedy(5 + number), 60)) for number in (5, 6, 7, 8)]
            await asyncio.gather(*map(read, streams))

    run(main())
    assert len(during_steps) > 10
    assert not any(during_steps)


@pytest.mark.slow
def test_the_server_generates_on_onnxruntime(folder: Path, model: LanguageModel, tmp_path: Path) -> None:
    command = [*YUNMIN, "serve", str(folder), "--port", "0", "--runtime", "onnx", "--device", "cpu", "--threads", "1"]
    with server(command, tmp_path / "log.txt") as running:
        body = {"model": "artifact", "prompt": "def main(", "max_tokens": 20, "temperature": 0}
        found = httpx.post(f"{running.url}/v1/completions", json=body, timeout=60).json()
        assert found["choices"][0]["text"] == model.generate("def main(", max_tokens=20, temperature=0.0).text
