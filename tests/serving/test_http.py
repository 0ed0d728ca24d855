from __future__ import annotations

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.serving.fixtures import Running
from yunmin import __version__
from yunmin.language_model import LanguageModel

JSON = dict[str, Any]


def post(running: Running, path: str, body: Any = None, **options: Any) -> httpx.Response:
    if body is not None:
        options["json"] = body
    return httpx.post(running.url + path, timeout=60, **options)


def events(response: httpx.Response) -> list[JSON]:
    """The events of a whole stream, after checking how it is framed and that it ends well."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    frames = response.text.split("\n\n")
    assert frames.pop() == ""
    assert frames.pop() == "data: [DONE]"
    assert all(f.startswith("data: ") for f in frames)
    return [json.loads(f.removeprefix("data: ")) for f in frames]


def refusal(response: httpx.Response, status: int, param: str | None = None) -> str:
    """The message of an error in OpenAI's shape."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["param"] == param
    message = body["error"]["message"]
    assert isinstance(message, str)
    assert "\n" not in message
    return message


def connected(running: Running) -> socket.socket:
    address = urlsplit(running.url)
    return socket.create_connection((address.hostname, address.port), timeout=60)


def head(path: str, *headers: str) -> bytes:
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: x", *headers, "", ""]).encode()


GREEDY: JSON = {"prompt": "def main(", "max_tokens": 12, "temperature": 0}
SEEDED: JSON = {"prompt": "Grüße aus 東京 🙂", "max_tokens": 30, "seed": 3, "top_k": 50, "repetition_penalty": 1.2}


@pytest.mark.parametrize("body", [GREEDY, SEEDED])
def test_generate_gives_what_the_library_gives(running: Running, model: LanguageModel, body: JSON) -> None:
    expected = model.generate(**body)
    answer = post(running, "/generate", body).json()
    assert answer["text"] == expected.text
    assert answer["token_ids"] == list(expected.token_ids)
    assert answer["finish_reason"] == expected.finish_reason
    count = len(expected.token_ids)
    assert answer["usage"] == {
        "prompt_tokens": expected.prompt_tokens,
        "completion_tokens": count,
        "total_tokens": expected.prompt_tokens + count,
        "prompt_tokens_details": {"cached_tokens": answer["usage"]["prompt_tokens_details"]["cached_tokens"]},
    }
    timings = answer["timings"]
    assert 0 <= timings["queue_ms"] <= timings["time_to_first_token_ms"] <= timings["total_ms"]


def test_generate_takes_token_ids(running: Running, model: LanguageModel) -> None:
    ids = model.encode("def main(")
    body = {"token_ids": ids, "max_tokens": 12, "temperature": 0}
    assert post(running, "/generate", body).json()["text"] == post(running, "/generate", GREEDY).json()["text"]


@pytest.mark.parametrize("body", [GREEDY, SEEDED])
def test_stream_concatenates_to_the_whole(running: Running, model: LanguageModel, body: JSON) -> None:
    expected = model.generate(**body)
    *before, last = events(post(running, "/generate_stream", body))
    assert "".join(e["text"] for e in [*before, last]) == expected.text
    assert [e["token_id"] for e in [*before, last]] == list(expected.token_ids)
    assert all("finish_reason" not in e for e in before)
    assert last["finish_reason"] == expected.finish_reason
    assert last["usage"]["completion_tokens"] == len(expected.token_ids)


def test_pieces_arrive_while_the_model_still_generates(running: Running) -> None:
    body = {"prompt": "x", "max_tokens": 100_000, "temperature": 0}
    with httpx.stream("POST", f"{running.url}/generate_stream", json=body, timeout=60) as response:
        lines = response.iter_lines()
        assert json.loads(next(lines).removeprefix("data: "))["token_id"] >= 0
        assert running.metric("yunmin_running_sequences") == 1
    running.wait_for("yunmin_running_sequences", 0)


def test_concurrent_requests_give_what_each_gives_alone(running: Running) -> None:
    bodies: list[JSON] = [GREEDY, SEEDED, {**SEEDED, "seed": 4}, {**GREEDY, "prompt": "a" * 100}]
    alone = [post(running, "/generate", body).json()["token_ids"] for body in bodies]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            together = pool.map(lambda body: post(running, "/generate", body).json(), bodies)
            assert [answer["token_ids"] for answer in together] == alone


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/v1/completions"])
def test_a_client_that_leaves_frees_its_slot(running: Running, path: str) -> None:
    cancelled = running.metric('yunmin_requests_total{outcome="cancelled"}')
    body = json.dumps({"prompt": "x", "max_tokens": 100_000, "temperature": 0}).encode()
    address = urlsplit(running.url)
    with socket.create_connection((address.hostname, address.port)) as client:
        head = (
            f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        client.sendall(head.encode() + body)
        running.wait_for("yunmin_running_sequences", 1)
    running.wait_for("yunmin_running_sequences", 0)
    assert running.metric('yunmin_requests_total{outcome="cancelled"}') == cancelled + 1


def test_a_full_queue_answers_429_with_retry_after(running: Running) -> None:
    body = {"prompt": "x", "max_tokens": 100_000, "temperature": 0}
    raw = json.dumps(body).encode()
    clients = []
    try:
        for _ in range(4):  # two slots and two places in the queue
            clients.append(connected(running))
            clients[-1].sendall(head("/generate", f"Content-Length: {len(raw)}") + raw)
        running.wait_for("yunmin_waiting_sequences", 2)
        refused = post(running, "/generate", GREEDY)
        refusal(refused, 429)
        assert int(refused.headers["retry-after"]) >= 1
        refusal(post(running, "/generate_stream", GREEDY), 429)
        # those that wait may leave, too
        clients.pop().close()
        clients.pop().close()
        running.wait_for("yunmin_waiting_sequences", 0)
    finally:
        for client in clients:
            client.close()
    running.wait_for("yunmin_running_sequences", 0)
    assert post(running, "/generate", GREEDY).status_code == 200


def test_a_deadline_before_the_first_byte_is_a_504_and_after_it_an_error_event(running: Running) -> None:
    endless = {"prompt": "x", "max_tokens": 100_000, "temperature": 0, "timeout_s": 0.3}
    assert "0.3 s" in refusal(post(running, "/generate", endless), 504)
    response = post(running, "/generate_stream", endless)
    assert response.status_code == 200
    assert "[DONE]" not in response.text
    last = json.loads(response.text.split("\n\n")[-2].removeprefix("data: "))
    assert last["error"]["code"] == "deadline_exceeded"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": "x" * 500}, "prompt"),
        ({"prompt": None, "token_ids": []}, "token_ids"),
        ({"prompt": None, "token_ids": [10_000]}, "token_ids"),
        ({"prompt": None, "token_ids": [-1]}, "token_ids"),
        ({"prompt": None, "token_ids": [True]}, "token_ids"),
        ({"prompt": None, "token_ids": "12"}, "token_ids"),
        ({"token_ids": [1]}, "token_ids"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 100_001}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"max_tokens": "12"}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"temperature": -0.5}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"seed": -1}, "seed"),
        ({"stop": 5}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"timeout_s": 61}, "timeout_s"),
        ({"tempreature": 1}, "tempreature"),
    ],
)
@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_a_bad_field_is_refused_by_name(running: Running, path: str, change: JSON, param: str) -> None:
    message = refusal(post(running, path, GREEDY | change), 400, param)
    assert param in message


@pytest.mark.parametrize(
    "content", [b'{"prompt": ', b"", b"[1]", b'"text"', b"null", b"{'prompt': 'x'}", b'{"a": 1} x']
)
@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/v1/completions"])
def test_a_body_that_is_no_json_object_is_a_400(running: Running, path: str, content: bytes) -> None:
    assert "JSON" in refusal(post(running, path, content=content), 400)


def test_deeply_nested_json_is_refused(running: Running) -> None:
    assert "JSON" in refusal(post(running, "/generate", content=b'{"prompt":' + b"[" * 9000 + b"]" * 9000 + b"}"), 400)


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/v1/completions"])
@pytest.mark.parametrize("content", [b'{"prompt": "\xff"}', "{'prompt': 'ü'}".encode("utf-16")])
def test_a_body_that_is_not_utf8_is_a_400(running: Running, path: str, content: bytes) -> None:
    assert "UTF-8" in refusal(post(running, path, content=content), 400)


def test_a_lone_surrogate_is_refused_or_served_but_never_breaks(running: Running) -> None:
    response = post(running, "/generate", content=b'{"prompt": "\\ud800", "max_tokens": 1}')
    refusal(response, 400)


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/v1/completions"])
@pytest.mark.parametrize("size", [20_001, 10_000_000])
def test_an_oversize_body_is_refused_before_any_work(running: Running, path: str, size: int) -> None:
    done = running.metric("yunmin_prompt_tokens_total")
    assert "20000" in refusal(post(running, path, content=b" " * size), 413)
    # chunked: no length is declared
    assert "20000" in refusal(post(running, path, content=(b" " * 1000 for _ in range(size // 1000 + 1))), 413)
    assert running.metric("yunmin_prompt_tokens_total") == done


def test_an_oversize_body_is_refused_before_it_is_sent(running: Running) -> None:
    address = urlsplit(running.url)
    with socket.create_connection((address.hostname, address.port), timeout=30) as client:
        client.sendall(
            b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 10000000\r\nExpect: 100-continue\r\n\r\n"
        )
        assert client.recv(100).startswith(b"HTTP/1.1 413")


def test_a_body_that_never_ends_is_refused(running: Running) -> None:
    with connected(running) as client:
        client.sendall(head("/generate", "Transfer-Encoding: chunked"))
        client.sendall(b"6000\r\n" + b" " * 0x6000 + b"\r\n")  # and then silence
        assert client.recv(100).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/v1/completions"])
def test_a_wrong_method_is_a_405(running: Running, path: str, method: str) -> None:
    response = httpx.request(method, running.url + path)
    assert method in refusal(response, 405)
    assert response.headers["allow"] == "POST"


def test_probes_and_lists_refuse_other_methods(running: Running) -> None:
    for path in ("/readyz", "/metrics", "/v1/models", "/"):
        response = httpx.post(running.url + path, content=b"x")
        refusal(response, 405)
        assert response.headers["allow"] == "GET, HEAD"


@pytest.mark.parametrize("path", ["/nothing", "/generate/", "/v1", "/v1/chat", "/generate/x"])
def test_a_wrong_path_is_a_404(running: Running, path: str) -> None:
    assert path in refusal(httpx.post(running.url + path, json={}), 404)
    assert path in refusal(httpx.get(running.url + path), 404)


def test_probes_metrics_and_models(running: Running) -> None:
    for path in ("/livez", "/healthz", "/readyz", "/health"):
        assert httpx.get(running.url + path).status_code == 200
    metrics = httpx.get(f"{running.url}/metrics").text
    for name in (
        "yunmin_requests_total",
        "yunmin_prompt_tokens_total",
        "yunmin_generated_tokens_total",
        "yunmin_running_sequences",
        "yunmin_waiting_sequences",
        "yunmin_state_slots 2.0",
        "yunmin_time_to_first_token_seconds_bucket",
        "yunmin_inter_token_seconds_bucket",
    ):
        assert name in metrics
    models = httpx.get(f"{running.url}/v1/models").json()
    assert [entry["id"] for entry in models["data"]] == ["tiny"]
    assert httpx.get(f"{running.url}/v1/models/tiny").json() == models["data"][0]
    assert "other" in refusal(httpx.get(f"{running.url}/v1/models/other"), 404, "model")


def test_tokens_are_counted(running: Running, model: LanguageModel) -> None:
    names = ("yunmin_prompt_tokens_total", "yunmin_generated_tokens_total", 'yunmin_requests_total{outcome="length"}')
    before = [running.metric(name) for name in names]
    assert post(running, "/generate", GREEDY).json()["finish_reason"] == "length"
    after = [running.metric(name) for name in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == [len(model.encode("def main(")), 12, 1]


def test_the_openapi_document_describes_every_endpoint(running: Running) -> None:
    document = httpx.get(f"{running.url}/openapi.json").json()
    assert document["info"]["version"] == __version__
    assert set(document["paths"]) >= {"/generate", "/generate_stream", "/v1/completions", "/v1/models", "/readyz"}
    schema = document["components"]["schemas"]["GenerateRequest"]
    assert {"prompt", "token_ids", "max_tokens", "temperature", "stop"} <= set(schema["properties"])
    text = json.dumps(document)
    for name in document["components"]["schemas"]:
        assert f"#/components/schemas/{name}" in text
    page = httpx.get(f"{running.url}/docs")
    for asset in ("swagger-ui.css", "swagger-ui-bundle.js"):
        assert f"static_content/{asset}" in page.text
        assert httpx.get(f"{running.url}/static_content/{asset}").status_code == 200


def test_keep_alive_connections_survive_errors(running: Running) -> None:
    with httpx.Client(base_url=running.url, timeout=60) as client:
        for _ in range(3):
            refusal(client.post("/generate", json={}), 400, "prompt")
            assert client.post("/generate", json=GREEDY).status_code == 200


def test_a_slow_reader_holds_up_nobody(running: Running) -> None:
    body = {"prompt": "x", "max_tokens": 100_000, "temperature": 0}
    with httpx.stream("POST", f"{running.url}/generate_stream", json=body, timeout=60):
        started = time.monotonic()
        assert post(running, "/generate", GREEDY).status_code == 200
        assert time.monotonic() - started < 60
    running.wait_for("yunmin_running_sequences", 0)


@pytest.mark.parametrize("path", ["/static_content/nothing", "/v1/%0amodels"])
def test_what_is_refused_around_the_application_has_the_shape_of_its_errors(running: Running, path: str) -> None:
    assert refusal(httpx.get(running.url + path), 404) == "not found"
    assert httpx.get(f"{running.url}/static_content/swagger-ui.css").headers["content-type"].startswith("text/css")
