"""A server that is killed goes on with every session it has acknowledged."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.sessions.disk import DiskStore
from tests.serving.fixtures import YUNMIN, Running, server
from tests.serving.refusals import Refusals
from yunmin.language_model import LanguageModel


def post(running: Running, path: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = httpx.post(f"{running.url}{path}", json=body, timeout=60)
    assert answer.status_code in (200, 201), answer.text
    found: dict[str, Any] = answer.json()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("place", ["dir", "url"])
def test_a_server_killed_in_mid_generation_goes_on_where_its_sessions_were(
    model: LanguageModel, model_folder: Path, tmp_path: Path, place: str
) -> None:
    kept = str(tmp_path / "kept") if place == "dir" else f"file://{tmp_path}/kept"
    command = [*YUNMIN, "serve", str(model_folder), "--port", "0", "--device", "cpu", "--threads", "1"]
    command += [f"--session-{place}", kept]
    whole = list(model.generate("def main(", max_tokens=60, temperature=0).token_ids)
    read: dict[str, list[int]] = {}
    with server(command, tmp_path / "first.txt") as running:
        for _ in range(3):
            session = post(running, "/v1/sessions", {"prompt": "def main("})
            body = {"session_id": session["id"], "prompt": "", "max_tokens": 20, "temperature": 0}
            answer = post(running, "/generate", body)
            assert answer["token_ids"] == whole[:20]
            assert answer["session"]["position"] == session["position"] + 20
            read[session["id"]] = answer["token_ids"]
        forked = post(running, f"/v1/sessions/{session['id']}/fork", {})
        read[forked["id"]] = whole[:20]
        assert running.metric("yunmin_sessions") == 4

        def generate(session_id: str) -> None:
            body = {"session_id": session_id, "prompt": "", "max_tokens": 4000, "temperature": 0}
            with pytest.raises(httpx.TransportError):
                httpx.post(f"{running.url}/generate", json=body, timeout=60)

        busy = [threading.Thread(target=generate, args=(session_id,)) for session_id in read]
        for thread in busy:
            thread.start()
        running.wait_for("yunmin_running_sequences", 4)
        os.killpg(running.process.pid, signal.SIGKILL)
        for thread in busy:
            thread.join()
    with server(command, tmp_path / "second.txt") as running:
        listed = httpx.get(f"{running.url}/v1/sessions").json()["data"]
        assert {found["id"] for found in listed} == set(read)
        for session_id in read:
            body = {"session_id": session_id, "prompt": "", "max_tokens": 40, "temperature": 0}
            assert post(running, "/generate", body)["token_ids"] == whole[20:]


@pytest.mark.slow
def test_two_servers_on_one_store_serve_one_session_in_turn(
    model: LanguageModel, model_folder: Path, tmp_path: Path
) -> None:
    command = [*YUNMIN, "serve", str(model_folder), "--port", "0", "--device", "cpu", "--threads", "1"]
    command += ["--session-url", f"file://{tmp_path}/kept"]
    whole = list(model.generate("x = ", max_tokens=60, temperature=0).token_ids)
    with server(command, tmp_path / "a.txt") as a, server(command, tmp_path / "b.txt") as b:
        session = post(a, "/v1/sessions", {"prompt": "x = "})
        found: list[int] = []
        for running in (a, b, b, a, b, a):
            body = {"session_id": session["id"], "prompt": "", "max_tokens": 10, "temperature": 0}
            body["session_position"] = session["position"] + len(found)
            found += post(running, "/generate", body)["token_ids"]
        assert found == whole


@pytest.mark.slow
def test_a_folder_in_use_or_two_places_are_one_line_and_a_failure(
    serve: Refusals, model_folder: Path, tmp_path: Path
) -> None:
    store = DiskStore(tmp_path / "kept", 1 << 20, 10)
    for more, expected in (
        ([], "another process keeps its sessions there"),
        (["--session-url", "memory://x"], "expected one place for sessions, both are set"),
        (["--states", str(tmp_path / "none")], "expected a folder of named states"),
    ):
        kept = ["--session-dir", str(tmp_path / "kept"), *more]
        status, errors = serve(str(model_folder), "--port", "0", "--device", "cpu", *kept)
        assert status == 1
        assert expected in errors
        assert len(errors.splitlines()) == 1
    store.close()
