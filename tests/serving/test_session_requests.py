"""Requests that go on with a session or a named state: equal to one long request, and never half done."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette

from tests.serving.apps import JSON, error_of, events_of, http_client, serving
from yunmin.errors import YunminError
from yunmin.language_model import LanguageModel
from yunmin.snapshots import save_snapshot

GREEDY: JSON = {"max_tokens": 6, "temperature": 0}


async def new_session(client: Any, **asked: Any) -> str:
    made = await client.post("/v1/sessions", json=asked)
    assert made.status_code == 201, made.text
    session_id: str = made.json()["id"]
    return session_id


async def position_of(client: Any, session_id: str) -> tuple[int, int]:
    record = (await client.get(f"/v1/sessions/{session_id}")).json()
    return record["position"], record["version"]


def greedy(model: LanguageModel, ids: list[int], count: int = 6) -> list[int]:
    return list(model.generate(ids, max_tokens=count, temperature=0).token_ids)


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_turns_with_a_session_equal_whole_prompts(model: LanguageModel, path: str, stream: bool) -> None:
    async def ask(client: Any, body: JSON) -> tuple[str, JSON]:
        if not stream:
            answer = (await client.post(path, json=body)).json()
            return (answer["choices"][0]["text"] if "choices" in answer else answer["text"]), answer
        if path == "/generate":
            events = events_of(await client.post("/generate_stream", json=body))
            return "".join(event["text"] for event in events), events[-1]
        extra = {"stream": True, "stream_options": {"include_usage": True}}
        *events, last = events_of(await client.post(path, json=body | extra))
        return "".join(event["choices"][0]["text"] for event in events), events[-1] | {"usage": last["usage"]}

    async def body(app: Starlette) -> None:
        async with http_client(app) as client:
            session_id = await new_session(client)
            read: list[int] = []
            for tail in ("def main(", "", " Grüße"):
                before = len(read)
                if not read and not tail:
                    continue
                text, answer = await ask(client, GREEDY | {"session_id": session_id, "prompt": tail})
                read += model.encode(tail) if tail else []
                new = greedy(model, read)
                assert text == model.generate(read, max_tokens=6, temperature=0).text
                assert answer["usage"]["prompt_tokens"] == len(read)
                assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == before
                read += new
                assert answer["session"] == {"id": session_id, "position": len(read)}
                assert (await position_of(client, session_id))[0] == len(read)

    serving(model, body, CACHE_BYTES="0")


def test_draws_go_on_where_they_stopped(model: LanguageModel) -> None:
    async def body(app: Starlette) -> None:
        async with http_client(app) as client:
            session_id = await new_session(client)
            drawn: list[int] = []
            for index in range(3):
                asked: JSON = {"session_id": session_id, "max_tokens": 5, "prompt": "" if index else "def main("}
                asked |= {} if index else {"seed": 11}
                drawn += (await client.post("/generate", json=asked)).json()["token_ids"]
        assert drawn == list(model.generate("def main(", max_tokens=15, seed=11).token_ids)

    serving(model, body)


def test_a_prompt_may_only_be_read(model: LanguageModel) -> None:
    async def body(app: Starlette) -> None:
        async with http_client(app) as client:
            session_id = await new_session(client)
            asked: JSON = {"session_id": session_id, "prompt": "def main(", "max_tokens": 0}
            answer = (await client.post("/generate", json=asked)).json()
            ids = model.encode("def main(")
            assert answer["token_ids"] == []
            assert answer["session"]["position"] == len(ids)
            again = (await client.post("/generate", json=GREEDY | {"session_id": session_id, "prompt": ""})).json()
            assert again["token_ids"] == greedy(model, ids)

    serving(model, body)


def test_what_fails_leaves_the_session_as_it_was(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(app: Starlette) -> None:
        async with http_client(app) as client:
            session_id = await new_session(client, prompt="def main(")
            before = await position_of(client, session_id)
            asked = GREEDY | {"session_id": session_id, "prompt": "x"}
            wrong = error_of(await client.post("/generate", json=asked | {"session_position": 1}), 409)
            assert wrong["code"] == "session_position"
            error_of(await client.post("/generate", json=asked | {"temperature": -1}), 400)
            late = asked | {"max_tokens": 1000, "timeout_s": 0.001}
            error_of(await client.post("/generate", json=late), 504)
            engine = app.state.backend.engine
            prefill = engine._runtime.prefill

            def broken(*_: Any) -> None:
                raise YunminError("a broken kernel")

            monkeypatch.setattr(engine._runtime, "prefill", broken)
            error_of(await client.post("/generate", json=asked), 500)
            monkeypatch.setattr(engine._runtime, "prefill", prefill)
            assert await position_of(client, session_id) == before
            answer = (await client.post("/generate", json=asked)).json()
            assert answer["token_ids"] == greedy(model, model.encode("def main(") + model.encode("x"))

    serving(model, body)


def test_a_commit_that_fails_is_an_error_event_without_done(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(app: Starlette) -> None:
        async with http_client(app) as client:
            session_id = await new_session(client, prompt="def main(")

            def full(*_: Any) -> None:
                from serving.sessions.errors import StoreFullError

                raise StoreFullError("no room")

            monkeypatch.setattr(app.state.backend.sessions.keeper, "save", full)
            asked = GREEDY | {"session_id": session_id, "prompt": "x"}
            assert error_of(await client.post("/generate", json=asked), 507)["message"] == "no room"
            streamed = (await client.post("/generate_stream", json=asked)).text
            assert '"finish_reason"' not in streamed
            assert streamed.rstrip().split("\n\n")[-1].startswith('data: {"error":{"message":"no room"')
            assert "[DONE]" not in streamed

    serving(model, body)


def test_a_session_is_one_requests_at_a_time_and_free_when_its_client_leaves(model: LanguageModel) -> None:
    async def body(app: Starlette) -> None:
        async with http_client(app) as client:
            session_id = await new_session(client, prompt="def main(")
            before = await position_of(client, session_id)
            endless: JSON = {"session_id": session_id, "prompt": "x", "max_tokens": 1000, "ignore_eos": True}
            task = asyncio.create_task(client.post("/generate", json=endless))
            while app.state.backend.engine.load.running == 0:
                await asyncio.sleep(0.001)
            busy = error_of(await client.post("/generate", json=GREEDY | {"session_id": session_id, "prompt": ""}), 409)
            assert busy["code"] == "session_busy"
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert await position_of(client, session_id) == before
            answer = await client.post("/generate", json=GREEDY | {"session_id": session_id, "prompt": ""})
            assert answer.json()["token_ids"] == greedy(model, model.encode("def main("))

    serving(model, body)


@pytest.mark.parametrize("asked", [{"session_id": "sess_0"}, {"session_id": "../x"}, {"state": "nothing"}])
def test_what_is_not_there_is_a_404(model: LanguageModel, asked: JSON) -> None:
    async def body(app: Starlette) -> None:
        async with http_client(app) as client:
            error_of(await client.post("/generate", json=GREEDY | {"prompt": "x"} | asked), 404)

    serving(model, body)


def test_an_empty_session_needs_a_prompt(model: LanguageModel) -> None:
    async def body(app: Starlette) -> None:
        async with http_client(app) as client:
            session_id = await new_session(client)
            asked = GREEDY | {"prompt": "", "session_id": session_id}
            assert error_of(await client.post("/generate", json=asked), 400)["param"] == "prompt"

    serving(model, body)


def test_a_named_state_goes_before_the_prompt(model: LanguageModel, tmp_path: Path) -> None:
    save_snapshot(tmp_path / "s.safetensors", model.snapshot("System: be brief.\n"), model.fingerprint, name="brief")

    async def body(app: Starlette) -> None:
        async with http_client(app) as client:
            for path in ("/generate", "/v1/completions"):
                answer = (await client.post(path, json=GREEDY | {"prompt": "x", "state": "brief"})).json()
                text = answer["choices"][0]["text"] if "choices" in answer else answer["text"]
                ids = model.encode("System: be brief.\n") + model.encode("x")
                assert text == model.generate(ids, max_tokens=6, temperature=0).text
                cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
                assert cached == len(model.encode("System: be brief.\n"))
            only = (await client.post("/generate", json=GREEDY | {"prompt": "", "state": "brief"})).json()
            assert only["token_ids"] == greedy(model, model.encode("System: be brief.\n"))

    serving(model, body, STATES=str(tmp_path))


def test_a_chat_that_does_not_begin_with_the_state_is_refused(model: LanguageModel, tmp_path: Path) -> None:
    beginning = "Be brief.\n\n"  # as the template renders the system's message
    save_snapshot(tmp_path / "s.safetensors", model.snapshot(beginning), model.fingerprint, name="brief")
    user = {"role": "user", "content": "x"}

    async def body(app: Starlette) -> None:
        async with http_client(app) as client:
            path = "/v1/chat/completions"
            asked = GREEDY | {"state": "brief"}
            messages = [{"role": "system", "content": "Be brief."}, user]
            answer = (await client.post(path, json=asked | {"messages": messages})).json()
            assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == len(model.encode(beginning))
            whole = (await client.post(path, json=GREEDY | {"messages": messages})).json()
            assert answer["choices"] == whole["choices"]
            refused = await client.post(path, json=asked | {"messages": [user]})
            assert error_of(refused, 400)["param"] == "state"

    serving(model, body, STATES=str(tmp_path), CHAT_TEMPLATE="plain")
