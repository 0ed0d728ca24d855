"""What anybody may send is refused at little cost: no one else waits meanwhile, and nothing is held for ever."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.types import Message

from serving.api import structured
from serving.api.chat_request import ChatRequest
from serving.api.chat_template import ChatTemplate
from serving.api.completion_request import CompletionRequest
from serving.api.protocol import parse_request
from serving.connection import MAX_HEAD_BYTES
from tests.serving.apps import JSON, error_of, http_client, serving
from tests.serving.fixtures import Running
from tests.serving.test_http import connected
from yunmin.constraints import compile_constraint
from yunmin.language_model import LanguageModel

ASKED: JSON = {"prompt": "def main(", "max_tokens": 5, "temperature": 0}


def scope_of(app: Starlette, path: str) -> dict[str, Any]:
    return {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [],
        "app": app,
    }


@pytest.mark.parametrize("body", [{"prompt": [1.5] * 50_000}, {"prompt": "x", "stop_token_ids": ["a"] * 50_000}])
def test_a_long_list_is_read_to_its_first_wrong_item(body: JSON) -> None:
    with pytest.raises(ValidationError) as refused:
        CompletionRequest.model_validate_json(json.dumps(body))
    assert refused.value.error_count() <= 4  # what a prompt may be


def test_a_body_of_very_many_errors_is_refused_by_their_number() -> None:
    body = json.dumps({"messages": [{"role": "user"} | {f"field{n}": 1 for n in range(2000)}]}).encode()
    with pytest.raises(Exception, match=r"^the body has 2000 errors$"):
        parse_request(ChatRequest, body)


def test_what_was_sent_is_told_back_in_part_only(model: LanguageModel) -> None:
    async def body(app: Starlette) -> None:
        async with http_client(app) as client:
            for change in ({"f" * 100_000: 1}, {"logit_bias": {"9" * 100_000: 1}}):
                answer = await client.post("/v1/completions", json=ASKED | change)
                error_of(answer, 400)
                assert len(answer.content) < 2000

    serving(model, body)


def test_more_prompts_than_the_server_takes_are_refused_before_one_is_encoded(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(_: Any) -> list[int]:
        raise AssertionError("a prompt was encoded")

    async def body(app: Starlette) -> None:
        monkeypatch.setattr(app.state.backend.model, "encode", encode)
        async with http_client(app) as client:
            error = error_of(await client.post("/v1/completions", json=ASKED | {"prompt": [[1]] * 100}), 400)
            assert error["message"] == "n: at most 10 sequences per request on this server, got 100"

    serving(model, body)


def test_a_conversation_that_is_too_long_is_rendered_once(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered = 0
    render = ChatTemplate.render

    def counted(*args: Any, **kwargs: Any) -> str:
        nonlocal rendered
        rendered += 1
        return render(*args, **kwargs)

    async def body(app: Starlette) -> None:
        monkeypatch.setattr(ChatTemplate, "render", counted)
        async with http_client(app) as client:
            messages = [{"role": "user", "content": "x"}] * 200
            error = error_of(await client.post("/v1/chat/completions", json={"messages": messages}), 400)
            assert "must have at most 100 tokens" in error["message"]
        assert rendered == 1

    serving(model, body, CHAT_TEMPLATE="chatml", MAX_PROMPT_TOKENS="100")


def test_a_constraint_that_is_slow_to_compile_holds_up_no_other_work_and_ends_in_time(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(app: Starlette) -> None:
        released = asyncio.Event()
        loop = asyncio.get_running_loop()

        def slow(*args: Any) -> Any:
            asyncio.run_coroutine_threadsafe(released.wait(), loop).result(60)
            return compile_constraint(*args)

        async with http_client(app) as client:
            known = ASKED | {"regex": "[a-z]{3}"}
            assert (await client.post("/v1/completions", json=known)).status_code == 200
            monkeypatch.setattr(structured, "compile_constraint", slow)
            asked = [client.post("/v1/completions", json=ASKED | {"regex": f"x{n}"}) for n in range(20)]
            waiting = [asyncio.create_task(one) for one in asked]
            await asyncio.sleep(0.1)
            assert (await client.post("/v1/completions", json=known)).status_code == 200
            assert (await client.get("/metrics")).status_code == 200  # made in a thread
            for answer in await asyncio.gather(*waiting):
                assert error_of(answer, 504)["code"] == "deadline_exceeded"
            released.set()

    serving(model, body, DEADLINE_S="5", SLOTS="2", QUEUE="30")


def test_a_body_that_does_not_arrive_is_a_408(model: LanguageModel) -> None:
    async def body(app: Starlette) -> None:
        sent: list[Message] = []
        messages = iter([{"type": "http.request", "body": b'{"prompt":', "more_body": True}])

        async def receive() -> Message:
            if (message := next(messages, None)) is None:
                await asyncio.Event().wait()
            assert message is not None
            return message

        async def send(message: Message) -> None:
            sent.append(message)

        async with asyncio.timeout(60):
            await app(scope_of(app, "/generate"), receive, send)
        assert sent[0]["status"] == 408
        assert json.loads(sent[1]["body"])["error"]["code"] == "request_timeout"
        assert app.state.backend.users == 0

    serving(model, body, DEADLINE_S="0.2")


def test_a_client_that_reads_nothing_does_not_hold_its_session_for_ever(model: LanguageModel) -> None:
    async def body(app: Starlette) -> None:
        async with http_client(app) as client:
            session_id = (await client.post("/v1/sessions", json={"prompt": "def"})).json()["id"]
            asked = ASKED | {"session_id": session_id}
            messages = iter([{"type": "http.request", "body": json.dumps(asked).encode(), "more_body": False}])

            async def receive() -> Message:
                if (message := next(messages, None)) is None:
                    await asyncio.Event().wait()
                assert message is not None
                return message

            async def send(message: Message) -> None:
                if message["type"] == "http.response.body":
                    await asyncio.Event().wait()

            async with asyncio.timeout(60):
                await app(scope_of(app, "/generate_stream"), receive, send)
            assert app.state.backend.users == 0
            assert (await client.post("/generate", json=asked)).status_code == 200

    serving(model, body, DEADLINE_S="2")


def test_a_head_without_an_end_is_a_431(running: Running) -> None:
    with connected(running) as connection:
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n")
        line = b"X-Filler: " + b"a" * 1000 + b"\r\n"
        sent, answer = 0, b""
        connection.settimeout(0.02)
        while not answer and sent < 100 * MAX_HEAD_BYTES:
            connection.sendall(line)
            sent += len(line)
            try:
                answer = connection.recv(1 << 16)
            except TimeoutError:
                continue
        assert answer.startswith(b"HTTP/1.1 431 ")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "head_too_large"
        assert sent < 3 * MAX_HEAD_BYTES


def test_a_large_body_and_many_requests_on_one_connection_are_no_large_head(running: Running) -> None:
    content = json.dumps(ASKED | {"user": "u" * 15_000}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n".encode()
    with connected(running) as connection:
        for _ in range(6):
            connection.sendall(head[:30])
            connection.sendall(head[30:] + content)
            answer = b""
            while not answer.endswith(b"}"):
                answer += connection.recv(1 << 16)
            assert answer.startswith(b"HTTP/1.1 200 ")


def test_connections_that_ask_nothing_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    import uvicorn

    from serving import connection as limits

    monkeypatch.setattr(limits, "HEAD_S", 0.2)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    async def body() -> None:
        config = uvicorn.Config(app, http=limits.Connection, lifespan="off", log_config=None, port=0)
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        async with asyncio.timeout(60):
            reader, silent = await asyncio.open_connection("127.0.0.1", port)
            assert await reader.read() == b""
            reader, slow = await asyncio.open_connection("127.0.0.1", port)
            slow.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\nGET / HTTP/1.1\r\nHo")
            await slow.drain()
            answer = await reader.read()
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert b"HTTP/1.1 408 " in answer
        for writer in (silent, slow):
            writer.close()
        server.should_exit = True
        await serving

    asyncio.run(body())


def test_answers_never_go_into_the_file_of_requests(model_folder: Path, tmp_path: Path) -> None:
    from serving.batch import main
    from yunmin.errors import DataError

    requests = tmp_path / "in.jsonl"
    text = json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": ASKED}) + "\n"
    requests.write_text(text)
    (tmp_path / "link.jsonl").symlink_to(requests)
    for answers in (requests, tmp_path / "link.jsonl"):
        with pytest.raises(DataError, match="expected another file for the answers"):
            main([str(model_folder), str(requests), str(answers), "--force"])
        assert requests.read_text() == text
