from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from serving.settings import read_settings, require_artifact, variables
from tests.serving.fixtures import ROOT, YUNMIN, free_port, server, write_model
from tests.serving.refusals import Refusals
from yunmin.artifact import write_manifest
from yunmin.config import MambaConfig
from yunmin.cost import cost_of
from yunmin.errors import ConfigError
from yunmin.files import write_json

BENTOML = (sys.executable, "-m", "bentoml")


def artifact_at(folder: Path) -> Path:
    """An artifact as an export writes it."""
    write_model(folder)
    cost = cost_of(MambaConfig.from_file(folder / "config.json"))
    write_manifest(folder, provenance={"source": "test"}, before=cost, after=cost, cuts=[], parity={})
    return folder


def test_settings_come_from_the_environment() -> None:
    settings = read_settings({"YUNMIN_ARTIFACT": "some/model", "YUNMIN_SLOTS": "3", "YUNMIN_QUEUE": ""})
    assert (settings.artifact, settings.slots, settings.queue) == ("some/model", 3, 64)
    assert settings.served_name == "model"
    assert read_settings({"YUNMIN_MODEL_NAME": "mine"}).served_name == "mine"
    assert all(v.name == f"YUNMIN_{v.field.upper()}" and v.description for v in variables())


@pytest.mark.parametrize(
    ("name", "value"),
    [("SLOTS", "0"), ("SLOTS", "many"), ("QUEUE", "-1"), ("DEADLINE_S", "nan"), ("DEADLINE_S", "0"), ("THREADS", "-2")],
)
def test_an_impossible_setting_is_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"^YUNMIN_{name} .*: .*got '{value}'$"):
        read_settings({f"YUNMIN_{name}": value})


def test_no_artifact_is_an_error() -> None:
    with pytest.raises(ConfigError, match="YUNMIN_ARTIFACT"):
        require_artifact(read_settings({}))


@pytest.mark.slow
def test_a_bad_artifact_is_one_line_and_a_failure(serve: Refusals, tmp_path: Path) -> None:
    def refused(folder: Path, expected: str) -> None:
        status, errors = serve(str(folder), "--port", "0", "--device", "cpu")
        assert status == 1
        assert len(errors.splitlines()) == 1
        assert expected in errors

    refused(tmp_path / "missing", "missing")
    whole = artifact_at(tmp_path / "whole")
    changed = shutil.copytree(whole, tmp_path / "changed")
    (changed / "config.json").write_text((changed / "config.json").read_text() + "\n")
    refused(changed, "wrong hash")
    newer = shutil.copytree(whole, tmp_path / "newer")
    write_json(newer / "manifest.json", {"format_version": 99})
    refused(newer, "expected format_version 1, found 99")
    truncated = write_model(tmp_path / "truncated")
    with (truncated / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    refused(truncated, "truncated")


@pytest.mark.slow
def test_impossible_options_are_one_line(serve: Refusals, model_folder: Path) -> None:
    for arguments, expected in (
        (["--slots", "0"], "YUNMIN_SLOTS"),
        (["--device", "toaster"], "toaster"),
        (["--port", "70000"], "got 70000"),
        (["--host", "256.0.0.1"], "--host 256.0.0.1"),
        (["--grace-s", "nan"], "--grace-s: expected seconds"),
    ):
        status, errors = serve(str(model_folder), "--port", "0", *arguments)
        assert status == 1
        assert len(errors.splitlines()) == 1
        assert expected in errors


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_server_cleanly(tmp_path: Path, sent: signal.Signals) -> None:
    artifact = artifact_at(tmp_path / "artifact")
    log = tmp_path / "log.txt"
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    command = [*YUNMIN, "serve", str(artifact), "--port", "0", "--device", "cpu"]
    with server(command, log, environ={"TMPDIR": str(temporary)}) as running:
        assert (
            httpx.post(f"{running.url}/generate", json={"prompt": "x", "max_tokens": 2}, timeout=60).status_code == 200
        )
        running.process.send_signal(sent)
        assert running.process.wait(30) == 0
        assert log.read_text().splitlines() == [f"yunmin: serving 'artifact' on {running.url} (Ctrl-C stops)"]
    assert not list(temporary.glob("yunmin-*"))


@pytest.mark.slow
def test_a_stream_that_outlives_the_server_ends_with_an_error_event(model_folder: Path, tmp_path: Path) -> None:
    command = [*YUNMIN, "serve", str(model_folder), "--port", "0", "--max-tokens", "10000000", "--grace-s", "0.5"]
    body = {"prompt": "x", "max_tokens": 10_000_000, "temperature": 0}
    with (
        server(command, tmp_path / "log.txt") as running,
        httpx.stream("POST", f"{running.url}/generate_stream", json=body, timeout=60) as response,
    ):
        lines = response.iter_lines()
        assert "token_id" in next(lines)
        running.process.send_signal(signal.SIGINT)
        last = [line for line in lines if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_stopped"
        assert running.process.wait(30) == 0
        assert len(running.log.read_text().splitlines()) == 1


@pytest.mark.slow
def test_a_signal_drains_the_server(model_folder: Path, tmp_path: Path) -> None:
    command = [*YUNMIN, "serve", str(model_folder), "--port", "0", "--max-tokens", "10000", "--grace-s", "60"]
    body = {"prompt": "x", "max_tokens": 10_000, "temperature": 0}
    with (
        server(command, tmp_path / "log.txt") as running,
        httpx.stream("POST", f"{running.url}/generate_stream", json=body, timeout=60) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        running.process.send_signal(signal.SIGTERM)
        while httpx.get(f"{running.url}/readyz").status_code == 200:
            pass
        assert httpx.get(f"{running.url}/readyz").status_code == 503
        assert httpx.get(f"{running.url}/livez").status_code == 200
        refused = httpx.post(f"{running.url}/generate", json=body)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "engine_stopped"
        assert [line for line in lines if line][-1] == "data: [DONE]"  # the running stream came to its end
        assert running.process.wait(30) == 0


@pytest.mark.slow
def test_bentoml_serve_starts_the_same_service_from_the_project_root(model_folder: Path, tmp_path: Path) -> None:
    port = free_port()
    environ = {"YUNMIN_ARTIFACT": str(model_folder), "YUNMIN_DEVICE": "cpu", "BENTOML_HOME": str(tmp_path / "home")}
    command = [*BENTOML, "serve", "--host", "127.0.0.1", "--port", str(port)]
    with server(command, tmp_path / "log.txt", url=f"http://127.0.0.1:{port}", environ=environ) as running:
        body = {"prompt": "def main(", "max_tokens": 5, "temperature": 0}
        assert httpx.post(f"{running.url}/generate", json=body).json()["usage"]["completion_tokens"] == 5
        assert running.metric("yunmin_generated_tokens_total") == 5
        assert httpx.post(f"{running.url}/generate", json={"prompt": ""}).json()["error"]["param"] == "prompt"


@pytest.mark.slow
def test_bentoml_serve_refuses_a_bad_artifact_with_one_line(tmp_path: Path) -> None:
    for artifact in ("", str(tmp_path / "missing")):
        environ = os.environ | {"YUNMIN_ARTIFACT": artifact, "BENTOML_HOME": str(tmp_path / "home")}
        done = subprocess.run(
            [*BENTOML, "serve", "--port", str(free_port())],
            cwd=ROOT,
            env=environ,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert (artifact or "YUNMIN_ARTIFACT") in done.stderr


@pytest.mark.slow
def test_bentoml_build_packs_the_service(tmp_path: Path) -> None:
    environ = os.environ | {"BENTOML_HOME": str(tmp_path / "home"), "BENTOML_DO_NOT_TRACK": "True"}
    done = subprocess.run(
        [*BENTOML, "build", "--output", "tag"], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    source = next((tmp_path / "home" / "bentos" / "yunmin").glob("*/src"))
    assert {"serving", "yunmin"} <= {path.name for path in source.iterdir()}
    assert (source / "serving" / "page" / "index.html").is_file()
    assert not list(source.rglob("test_*.py"))
    assert "gpu: 1" in (source.parent / "bento.yaml").read_text()
