from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette

from serving.api.app import create_app
from serving.api.backend import Backend
from serving.engine.engine import Engine
from serving.metrics import Metrics
from serving.settings import read_settings
from yunmin.language_model import LanguageModel


@pytest.fixture
def engine(model: LanguageModel) -> Iterator[Engine]:
    made = Engine(model.runtime, None, slots=2, queue=2, prefill_chunk=8, metrics=Metrics(CollectorRegistry()))
    made.start()
    yield made
    made.stop()


def app_without_tokenizer(model: LanguageModel, engine: Engine) -> Starlette:
    app = create_app()
    settings = read_settings({"YUNMIN_ARTIFACT": "bare", "YUNMIN_MAX_TOKENS": "100"})
    app.state.backend = Backend(LanguageModel(model.runtime, None, Path("bare"), lambda: ""), engine, settings)
    return app


async def post(app: Starlette, path: str, body: object) -> httpx.Response:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.post(path, json=body)


def run(app: Starlette, path: str, body: object) -> httpx.Response:
    return asyncio.run(post(app, path, body))


def test_a_model_without_tokenizer_serves_ids_and_refuses_text(model: LanguageModel, engine: Engine) -> None:
    app = app_without_tokenizer(model, engine)
    answer = run(app, "/generate", {"token_ids": [5, 6], "max_tokens": 4, "temperature": 0}).json()
    assert answer["token_ids"] == list(model.generate([5, 6], max_tokens=4, temperature=0).token_ids)
    assert answer["text"] == ""
    for body, field in (({"prompt": "x"}, "prompt"), ({"token_ids": [5], "stop": "x"}, "stop")):
        refused = run(app, "/generate", body)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == field


def test_the_default_length_never_exceeds_the_limit(model: LanguageModel, engine: Engine) -> None:
    app = app_without_tokenizer(model, engine)
    answer = run(app, "/generate", {"token_ids": [5], "temperature": 0}).json()
    assert len(answer["token_ids"]) == 100


def test_a_stopped_engine_answers_503(model: LanguageModel, engine: Engine) -> None:
    app = app_without_tokenizer(model, engine)
    engine.stop()
    refused = run(app, "/generate", {"token_ids": [5]})
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "engine_stopped"


def test_an_unexpected_error_is_a_500_that_tells_nothing_inside(
    model: LanguageModel, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("secret path")

    app = app_without_tokenizer(model, engine)
    monkeypatch.setattr(engine, "submit_all", broken)
    failed = run(app, "/generate", {"token_ids": [5]})
    assert failed.status_code == 500
    assert "secret" not in failed.text
    assert failed.json()["error"]["type"] == "server_error"
