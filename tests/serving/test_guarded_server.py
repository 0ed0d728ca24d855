"""`yunmin serve` with keys, limits, logs and reloads, as it is run."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

import yunmin
from tests.serving.fixtures import ROOT, YUNMIN, Running, server, write_model
from tests.serving.refusals import Refusals

pytestmark = pytest.mark.slow

KEY = {"Authorization": "Bearer secret-alice"}
ADMIN = {"Authorization": "Bearer secret-admin"}
ENDLESS: dict[str, Any] = {"prompt": "x", "max_tokens": 100_000, "temperature": 0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    return write_model(root / "first"), write_model(root / "second", seed=1)


@pytest.fixture(scope="module")
def guarded(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "keys.toml").write_text('[keys.alice]\nkey = "secret-alice"\nconcurrent = 3\n')
    options = ["--port", "0", "--device", "cpu", "--threads", "1", "--max-tokens", "100000", "--slots", "4"]
    options += ["--api-key-file", str(folder / "keys.toml"), "--log-format", "json", "--model-name", "mine"]
    options += ["--reload-root", str(folders[0].parent)]
    command = [*YUNMIN, "serve", str(folders[0]), *options]
    with server(command, folder / "log.txt", environ={"YUNMIN_ADMIN_KEY": "secret-admin"}) as running:
        yield running


def lines(running: Running) -> list[dict[str, Any]]:
    return [json.loads(line) for line in running.log.read_text().splitlines() if line.startswith("{")]


def last_line(running: Running, request_id: str) -> dict[str, Any]:
    """The line of a request, once it is there."""
    for _ in range(600):
        found = [line for line in lines(running) if line["request_id"] == request_id]
        if found:
            return found[0]
        threading.Event().wait(0.05)
    raise AssertionError(f"no line of {request_id}")


def test_probes_are_open_and_the_rest_is_not(guarded: Running) -> None:
    for path in ("/livez", "/readyz", "/healthz", "/health", "/", "/docs", "/openapi.json"):
        assert httpx.get(guarded.url + path).status_code == 200, path
    for path in ("/metrics", "/v1/models"):
        assert httpx.get(guarded.url + path).status_code == 401, path
        assert httpx.get(guarded.url + path, headers=KEY).status_code == 200, path


@pytest.mark.parametrize(("path", "status"), [("/generate", 499), ("/generate_stream", 200)])
def test_a_client_that_leaves_is_told_apart_in_the_log(guarded: Running, path: str, status: int) -> None:
    body = json.dumps(ENDLESS).encode()
    name = path.strip("/") + "-left"
    address = urlsplit(guarded.url)
    with socket.create_connection((address.hostname, address.port), timeout=60) as client:
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret-alice\r\nX-Request-Id: {name}\r\n"
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        if status == 200:
            assert client.recv(1000).startswith(b"HTTP/1.1 200")
        else:
            threading.Event().wait(0.3)
    line = last_line(guarded, name)
    assert (line["status"], line["outcome"], line["key"]) == (status, "client_left", "alice")
    assert line["completion_tokens"] > 0


def test_a_reload_drops_no_stream(guarded: Running, folders: tuple[Path, Path]) -> None:
    first, second = (yunmin.load(folder, device="cpu") for folder in folders)
    asked = {"prompt": "x", "max_tokens": 4000, "temperature": 0}
    ids: list[int] = []
    with httpx.stream("POST", f"{guarded.url}/generate_stream", json=asked, headers=KEY, timeout=60) as response:
        events = (json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {"))
        ids.append(next(events)["token_id"])
        reloaded = httpx.post(
            f"{guarded.url}/admin/reload", json={"artifact": str(folders[1])}, headers=ADMIN, timeout=60
        )
        assert reloaded.status_code == 200, reloaded.text
        short = {"prompt": "x", "max_tokens": 20, "temperature": 0}
        answer = httpx.post(f"{guarded.url}/generate", json=short, headers=KEY, timeout=60).json()
        assert answer["token_ids"] == list(second.generate("x", max_tokens=20, temperature=0).token_ids)
        ids += [event["token_id"] for event in events]
    assert ids == list(first.generate("x", max_tokens=4000, temperature=0).token_ids)
    models = httpx.get(f"{guarded.url}/v1/models", headers=KEY).json()["data"]
    assert [model["id"] for model in models] == ["mine"]
    assert httpx.get(f"{guarded.url}/readyz").status_code == 200


def test_no_key_is_in_the_log_or_the_process_list(guarded: Running) -> None:
    httpx.get(f"{guarded.url}/v1/models", headers={"Authorization": "Bearer secret-wrong"})
    assert "secret-" not in guarded.log.read_text()
    assert "secret-" not in Path(f"/proc/{guarded.process.pid}/cmdline").read_text()


TRACED = """
import asyncio, httpx
from opentelemetry import trace
from serving.service import create_asgi

async def main():
    app = create_asgi()
    async with app.router.lifespan_context(app):
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            assert (await client.post("/generate_stream", json={"prompt": "x", "max_tokens": 3})).status_code == 200
    provider = trace.get_tracer_provider()
    provider.force_flush()
    (processor,) = provider._active_span_processor._span_processors
    spans = {span.name: span for span in processor.span_exporter.get_finished_spans()}
    parent = spans["POST /generate_stream"].context.span_id
    for name in ("queue", "prefill", "decode"):
        assert spans["yunmin." + name].parent.span_id == parent

asyncio.run(main())
"""


def test_bentomls_own_settings_turn_traces_on(folders: tuple[Path, Path], tmp_path: Path) -> None:
    tracing = {"exporter_type": "in_memory", "sample_rate": "1.0"}
    environ = {
        "YUNMIN_ARTIFACT": str(folders[0]),
        "YUNMIN_DEVICE": "cpu",
        "BENTOML_HOME": str(tmp_path),
        "BENTOML_CONFIG_OPTIONS": " ".join(f"services.yunmin.tracing.{key}={value}" for key, value in tracing.items()),
    }
    done = subprocess.run(
        [sys.executable, "-c", TRACED],
        cwd=ROOT,
        env=os.environ | environ,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_a_key_file_with_a_mistake_is_one_line(serve: Refusals, folders: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "keys.toml").write_text('[keys.a]\nkey = "secret-a"\nconcurrent = 0\n')
    for arguments, expected in (
        (["--api-key-file", str(tmp_path / "keys.toml")], "keys.a.concurrent"),
        (["--chat-template", "nothing"], "chat template 'nothing'"),
        (["--log-format", "xml"], "YUNMIN_LOG_FORMAT"),
    ):
        status, errors = serve(str(folders[0]), "--port", "0", "--device", "cpu", *arguments)
        assert status == 1
        assert len(errors.splitlines()) == 1
        assert expected in errors
        assert "secret-" not in errors
