"""Structured output in the engine: beside whomever, the same as alone."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from serving.engine.job import Job
from tests.serving.engines import REQUESTS, alone, engine_on, read, run
from yunmin.constraints import Constraint
from yunmin.language_model import LanguageModel
from yunmin.sampling import sampling_params_from

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "ü"]}}, "required": ["b"]}
CONSTRAINED: list[tuple[str | list[int], dict[str, Any]]] = [
    ("JSON: ", {"constraint": Constraint.json_schema(SCHEMA), "seed": 1, "max_tokens": 60}),
    ("JSON: ", {"constraint": Constraint.json_schema(SCHEMA), "seed": 2, "max_tokens": 60, "temperature": 2.0}),
    ("Date: ", {"constraint": Constraint("regex", r"\d{4}-\d\d-\d\d"), "temperature": 0.0}),
    ("?", {"constraint": Constraint.choice(["yes", "no", "perhaps"]), "seed": 3, "logprobs": 2}),
    ("?", {"constraint": Constraint("regex", "[a-e]{30}"), "seed": 4, "stop": ["e"]}),
]


@pytest.mark.parametrize("slots", [1, 4])
def test_constrained_output_equals_generating_alone_whoever_the_neighbours_are(
    model: LanguageModel, slots: int
) -> None:
    requests = [request for pair in zip(CONSTRAINED, REQUESTS, strict=False) for request in pair] * 2

    async def main() -> None:
        async with engine_on(model, slots=slots) as engine:
            streams = [engine.submit(Job(model.encode(p), sampling_params_from(params), 60)) for p, params in requests]
            results = await asyncio.gather(*map(read, streams))
        assert results == [alone(model, p, params) for p, params in requests]

    run(main())
