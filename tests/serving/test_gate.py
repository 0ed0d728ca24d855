"""What every request passes: ids, keys, limits, logs, cross-origin pages, counts, traces."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import openai
import pytest
from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.applications import Starlette
from starlette.routing import Mount

from tests.serving.apps import JSON, error_of, http_client, openai_client, serving
from yunmin.language_model import LanguageModel

ASKED: JSON = {"prompt": "def main(", "max_tokens": 5, "temperature": 0}
KEYS = """
[keys.alice]
key = "secret-alice"
concurrent = 1

[keys.bob]
key = "secret-bob"
requests_per_minute = 2

[keys.carol]
key = "secret-carol"
tokens_per_minute = 12
"""


def keyed(model: LanguageModel, tmp_path: Path, body: Any, **variables: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(KEYS)
    serving(model, body, **({"API_KEY_FILE": str(path), "API_KEYS": "secret-env"} | variables))


def test_keys_open_what_is_not_open_anyway(model: LanguageModel, tmp_path: Path) -> None:
    async def body(app: Starlette) -> None:
        async with http_client(app) as client:
            for path in ("/", "/docs", "/openapi.json", "/health", "/page/page.js"):
                assert (await client.get(path)).status_code == 200, path
            for path in ("/v1/models", "/metrics", "/v1/sessions", "/nothing"):
                refused = await client.get(path)
                assert error_of(refused, 401)["code"] == "missing_api_key"
                assert refused.headers["www-authenticate"] == "Bearer"
            for path in ("/generate", "/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize"):
                error_of(await client.post(path, json=ASKED), 401)
        async with http_client(app, "secret-wrong") as client:
            assert error_of(await client.post("/generate", json=ASKED), 401)["code"] == "invalid_api_key"
        for key in ("secret-alice", "secret-env"):
            async with http_client(app, key) as client:
                assert (await client.post("/generate", json=ASKED)).status_code == 200
                assert (await client.get("/metrics")).status_code == 200

    keyed(model, tmp_path, body)


def test_openais_client_sends_its_key_and_tells_a_wrong_one(model: LanguageModel, tmp_path: Path) -> None:
    async def body(app: Starlette) -> None:
        async with openai_client(app, "secret-env") as client:
            assert (await client.completions.create(model="tiny", **ASKED)).choices
        async with openai_client(app, "secret-wrong") as client:
            with pytest.raises(openai.AuthenticationError) as refused:
                await client.completions.create(model="tiny", **ASKED)
        assert refused.value.code == "invalid_api_key"
        assert "secret" not in str(refused.value)

    keyed(model, tmp_path, body)


def test_limits_of_a_key_are_429_with_retry_after(model: LanguageModel, tmp_path: Path) -> None:
    async def body(app: Starlette) -> None:
        async def limited(key: str, count: int) -> httpx.Response:
            async with http_client(app, key) as client:
                for _ in range(count):
                    assert (await client.post("/generate", json=ASKED)).status_code == 200
                answer = await client.post("/generate", json=ASKED)
            assert error_of(answer, 429)["code"] == "rate_limit_exceeded"
            assert int(answer.headers["retry-after"]) >= 1
            return answer

        assert "requests per minute" in (await limited("secret-bob", 2)).text
        assert "tokens per minute" in (await limited("secret-carol", 2)).text
        async with http_client(app, "secret-alice") as client:
            endless = asyncio.create_task(client.post("/generate", json=ASKED | {"max_tokens": 1000}))
            while app.state.backend.engine.load.running == 0:
                await asyncio.sleep(0.001)
            refused = error_of(await client.post("/generate", json=ASKED), 429)
            assert "at a time" in refused["message"]
            await endless
            assert (await client.post("/generate", json=ASKED)).status_code == 200

    keyed(model, tmp_path, body)


def test_sessions_belong_to_their_key(model: LanguageModel, tmp_path: Path) -> None:
    async def body(app: Starlette) -> None:
        async with http_client(app, "secret-alice") as alice, http_client(app, "secret-env") as other:
            session_id = (await alice.post("/v1/sessions", json={"prompt": "x"})).json()["id"]
            response = (await alice.post("/v1/responses", json={"input": "x", "max_output_tokens": 2})).json()
            error_of(await other.post("/generate", json=ASKED | {"session_id": session_id}), 404)
            error_of(await other.get(f"/v1/responses/{response['id']}"), 404)
            assert (await alice.get(f"/v1/responses/{response['id']}")).status_code == 200

    keyed(model, tmp_path, body, CHAT_TEMPLATE="plain")


@pytest.mark.parametrize(
    ("given", "kept"), [("my-id.1", True), ("a" * 128, True), ("a" * 129, False), ("a b", False), ("ä", False)]
)
def test_a_request_keeps_its_id_or_gets_one(model: LanguageModel, given: str, kept: bool) -> None:
    async def body(app: Starlette) -> None:
        async with http_client(app) as client:
            headers = {"X-Request-Id": given.encode()}
            for path in ("/generate", "/generate_stream", "/nothing"):
                answer = await client.post(path, json=ASKED, headers=headers)  # type: ignore[arg-type]
                assert (answer.headers["x-request-id"] == given) == kept
                assert len(answer.headers["x-request-id"]) >= 7
            assert "x-request-id" in (await client.post("/generate", json={})).headers

    serving(model, body)


def lines_of(caplog: pytest.LogCaptureFixture) -> list[JSON]:
    return [json.loads(record.message) for record in caplog.records if record.name == "yunmin.requests"]


@pytest.fixture
def requests_log(caplog: pytest.LogCaptureFixture) -> Any:
    logger = logging.getLogger("yunmin.requests")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)
    logger.disabled = True


def logged(model: LanguageModel, tmp_path: Path, caplog: Any, **variables: str) -> list[JSON]:
    async def body(app: Starlette) -> None:
        logging.getLogger("yunmin.requests").addHandler(caplog.handler)
        async with http_client(app, "secret-alice") as client:
            headers = {"X-Request-Id": "one"}
            assert (await client.post("/generate", json=ASKED, headers=headers)).status_code == 200
            await client.post("/v1/completions", json=ASKED | {"stream": True})
            await client.post("/generate", json={"prompt": "SECRET TEXT", "temperature": -1})
            messages = [{"role": "user", "content": "hi"}]
            await client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 2})
        async with http_client(app, "secret-wrong") as client:
            await client.post("/generate", json=ASKED)

    keyed(model, tmp_path, body, CHAT_TEMPLATE="plain", **variables)
    return lines_of(caplog)


def test_one_line_of_json_per_request_without_text_or_keys(
    model: LanguageModel, tmp_path: Path, requests_log: pytest.LogCaptureFixture
) -> None:
    lines = logged(model, tmp_path, requests_log, LOG_FORMAT="json")
    assert [(line["path"], line["status"], line.get("key"), line.get("outcome")) for line in lines] == [
        ("/generate", 200, "alice", None),
        ("/v1/completions", 200, "alice", None),
        ("/generate", 400, "alice", "invalid_value"),
        ("/v1/chat/completions", 200, "alice", None),
        ("/generate", 401, None, "invalid_api_key"),
    ]
    first = lines[0]
    assert first["request_id"] == "one"
    assert first["method"] == "POST"
    assert (first["prompt_tokens"], first["completion_tokens"]) == (len(model.encode("def main(")), 5)
    assert 0 <= first["queue_ms"] <= first["time_to_first_token_ms"] <= first["total_ms"] <= first["duration_ms"]
    assert lines[1]["cached_tokens"] >= 0
    assert "prompt_tokens" not in lines[2]
    everything = requests_log.text
    for text in ("def main", "SECRET TEXT", "secret-"):
        assert text not in everything


def test_text_is_logged_only_where_asked(
    model: LanguageModel, tmp_path: Path, requests_log: pytest.LogCaptureFixture
) -> None:
    lines = logged(model, tmp_path, requests_log, LOG_FORMAT="json", LOG_PROMPTS="true")
    expected = model.generate("def main(", max_tokens=5, temperature=0).text
    assert [line["prompt"] for line in lines[:2]] == ["def main(", "def main("]
    assert [line["answer"] for line in lines[:2]] == [[expected], [expected]]
    assert lines[3]["prompt"] == [{"role": "user", "content": "hi"}]
    assert "secret-" not in requests_log.text


def test_lines_of_text_quote_what_could_break_them(
    model: LanguageModel, requests_log: pytest.LogCaptureFixture
) -> None:
    async def body(app: Starlette) -> None:
        logging.getLogger("yunmin.requests").addHandler(requests_log.handler)
        async with http_client(app) as client:
            await client.get("/a%20b%0Astatus=200")

    serving(model, body, LOG_FORMAT="text")
    (line,) = [record.message for record in requests_log.records if record.name == "yunmin.requests"]
    assert "\n" not in line
    assert 'path="/a b\\nstatus=200" status=404 outcome=not_found' in line


@pytest.mark.parametrize("form", ["text", "json"])
def test_no_path_begins_a_line_or_commands_a_terminal(
    model: LanguageModel, requests_log: pytest.LogCaptureFixture, form: str
) -> None:
    path = "/\x1b[31m\x9b\r\n\u2028\u202e\U000e0001 status=200"

    async def body(app: Starlette) -> None:
        logging.getLogger("yunmin.requests").addHandler(requests_log.handler)
        async with http_client(app) as client:
            await client.get(quote(path))
        logging.getLogger("bentoml.access").warning("(path=%s)", path)  # as `bentoml serve` does
        logging.getLogger("yunmin.serving").warning("request failed: %s", path)

    serving(model, body, LOG_FORMAT=form)
    assert len(requests_log.records) == 3
    assert all(record.getMessage().isprintable() for record in requests_log.records)
    if form == "json":
        assert json.loads(requests_log.records[0].getMessage())["path"] == path


def test_pages_of_other_origins_are_shut_out_unless_named(model: LanguageModel) -> None:
    asked = {"Origin": "https://mine.example", "Access-Control-Request-Method": "POST"}

    async def closed(app: Starlette) -> None:
        async with http_client(app) as client:
            answer = await client.options("/generate", headers=asked)
            assert "access-control-allow-origin" not in answer.headers
            answer = await client.post("/generate", json=ASKED, headers={"Origin": "https://mine.example"})
            assert "access-control-allow-origin" not in answer.headers

    async def opened(app: Starlette) -> None:
        async with http_client(app) as client:
            headers = asked | {"Access-Control-Request-Headers": "authorization,content-type"}
            answer = await client.options("/generate", headers=headers)  # without a key, as browsers ask
            assert answer.status_code == 200
            assert answer.headers["access-control-allow-origin"] == "https://mine.example"
            refused = await client.options("/generate", headers=headers | {"Origin": "https://other.example"})
            assert refused.status_code == 400
            answer = await client.post("/generate", json=ASKED, headers={"Origin": "https://mine.example"})
            assert answer.status_code == 401
            assert answer.headers["access-control-allow-origin"] == "https://mine.example"

    serving(model, closed)
    serving(model, opened, CORS_ORIGINS="https://mine.example, https://too.example", API_KEYS="secret")


def test_what_has_no_key_is_counted_as_one_path(model: LanguageModel, tmp_path: Path) -> None:
    async def body(app: Starlette) -> None:
        mounted = Starlette(routes=[Mount("/", app)])  # as BentoML has it
        async with http_client(mounted) as client:
            for path in ("/v1/models", "/x"):
                error_of(await client.get(path), 401)
        async with http_client(app, "secret-alice") as client:
            text = (await client.get("/metrics")).text
        assert 'yunmin_http_requests_total{path="other",status="401"} 2.0' in text

    keyed(model, tmp_path, body)


def test_made_up_paths_are_counted_as_one(model: LanguageModel) -> None:
    async def body(app: Starlette) -> None:
        async with http_client(app) as client:
            for path in ("/a", "/b", "/v1/sessions/x", "/v1/sessions/y", "/generate"):
                await client.get(path)
            await client.post("/generate", json=ASKED)
            text = (await client.get("/metrics")).text
        counts = {line for line in text.splitlines() if line.startswith("yunmin_http_requests_total")}
        assert counts == {
            'yunmin_http_requests_total{path="other",status="404"} 2.0',
            'yunmin_http_requests_total{path="other",status="405"} 1.0',
            'yunmin_http_requests_total{path="/v1/sessions/{id}",status="404"} 2.0',
            'yunmin_http_requests_total{path="/generate",status="200"} 1.0',
        }

    serving(model, body)


def test_an_unexpected_error_in_mid_stream_is_an_error_event(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def body(app: Starlette) -> None:
        from serving.api import generate

        def broken(*_: Any) -> None:
            raise RuntimeError("secret path")

        monkeypatch.setattr(generate, "_ending", broken)
        async with http_client(app) as client:
            answer = await client.post("/generate_stream", json=ASKED)
        *_, last, rest = answer.text.split("\n\n")
        assert rest == ""
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "internal_error"
        assert "secret" not in answer.text
        assert "[DONE]" not in answer.text

    serving(model, body)
    assert "secret path" in caplog.text


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_a_traced_request_has_spans_of_its_phases(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    # as the service does it, which can be done once only
    monkeypatch.setattr("serving.api.tracing.trace.get_tracer", lambda name: provider.get_tracer(name))

    async def body(app: Starlette) -> None:
        tracer = provider.get_tracer("asgi")
        traced = OpenTelemetryMiddleware(app, tracer=tracer, exclude_spans=["receive", "send"])
        async with http_client(traced) as client:  # type: ignore[arg-type]
            assert (await client.post(path, json=ASKED)).status_code == 200
        async with http_client(app) as client:  # not traced
            assert (await client.post(path, json=ASKED)).status_code == 200

    serving(model, body)
    spans = {span.name: span for span in exporter.get_finished_spans()}
    request = spans.pop(f"POST {path}")
    assert set(spans) == {"yunmin.queue", "yunmin.prefill", "yunmin.decode"}
    for span in spans.values():
        assert span.parent is not None
        assert span.parent.span_id == request.context.span_id
        assert span.start_time is not None
        assert span.end_time is not None
        assert span.start_time <= span.end_time
    assert spans["yunmin.queue"].end_time == spans["yunmin.prefill"].start_time
    assert spans["yunmin.prefill"].end_time == spans["yunmin.decode"].start_time
    assert request.attributes is not None
    assert request.attributes["gen_ai.usage.input_tokens"] == len(model.encode("def main("))
    assert request.attributes["gen_ai.usage.output_tokens"] == 5
    assert "def main" not in str([span.attributes for span in (request, *spans.values())])
