"""How a real Triton server lets go of a model that runs: unloaded, or told to end."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from export.triton import write_repository
from serving.triton.client import Answer, TritonError, ask
from tests.serving.triton_server import TritonServer, triton_server
from tests.triton_models import write_tiny_artifact

LONG = {"temperature": 0, "max_tokens": 1000, "ignore_eos": True}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("triton")
    write_repository(folder / "repository", write_tiny_artifact(folder / "artifact"))
    return folder / "repository"


@pytest.fixture
def server(repository: Path, tmp_path: Path) -> Iterator[TritonServer]:
    with triton_server(repository, "mamba", tmp_path) as running:
        yield running


def begun(url: str, sampling: Mapping[str, object]) -> Iterator[Answer]:
    """A stream whose first answer is there."""
    answers = ask(url, "mamba", "x", sampling, timeout_s=60)
    assert next(answers).finish_reason is None
    return answers


def post(server: TritonServer, path: str) -> bytes:
    request = urllib.request.Request(f"{server.http}/v2/repository/{path}", b"{}")
    with urllib.request.urlopen(request, timeout=60) as response:
        return bytes(response.read())


def wait_until_unloaded(server: TritonServer) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        (entry,) = (model for model in json.loads(post(server, "index")) if model["name"] == "mamba")
        if entry.get("reason") == "unloaded":
            return
        time.sleep(0.1)
    raise AssertionError(f"still {entry}")


def test_unloading_lets_running_requests_finish(server: TritonServer) -> None:
    running = [begun(url, LONG) for url in (server.grpc, server.http)]
    post(server, "models/mamba/unload")
    for answers in running:
        assert [answer.finish_reason for answer in answers][-1] == "length"
    wait_until_unloaded(server)
    post(server, "models/mamba/load")
    assert list(ask(server.grpc, "mamba", "x", LONG))


def test_loading_it_anew_interrupts_no_stream(server: TritonServer, repository: Path) -> None:
    answers = begun(server.grpc, LONG)
    (repository / "mamba" / "1" / "model.py").touch()
    post(server, "models/mamba/load")
    assert [answer.finish_reason for answer in answers][-1] == "length"


def test_sigterm_waits_for_running_requests(server: TritonServer) -> None:
    answers = begun(server.http, LONG)
    server.process.terminate()
    assert [answer.finish_reason for answer in answers][-1] == "length"
    assert server.process.wait(60) == 0


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_abandoned_and_refused_requests_leave_the_server_in_order(server: TritonServer, protocol: str) -> None:
    url = getattr(server, protocol)
    for _ in range(12):
        begun(url, LONG).close()  # type: ignore[attr-defined]
    with pytest.raises(TritonError, match="top_q"):
        list(ask(url, "mamba", "x", {"top_q": 1}))
    assert list(ask(url, "mamba", "x", LONG))
