"""A bento brings what it needs, and serves from its own folder or from BentoML's store."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from serving.bento_model import own_artifact, store_artifact
from serving.settings import read_settings
from tests.serving.fixtures import ROOT, free_port, server, write_model
from yunmin.errors import ConfigError

BENTOML = (sys.executable, "-m", "bentoml")
CODE = ("yunmin", "serving")


def test_a_bento_installs_what_pyproject_says_that_serving_needs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *extras["serve"], *(p for p in extras["onnx"] if "onnxruntime" in p)]
    packed = yaml.safe_load((ROOT / "bentofile.yaml").read_text())["python"]["packages"]
    assert sorted(packed) == sorted(package.split(";")[0].strip() for package in needed)


def test_code_outside_of_a_bento_has_no_model_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "src" / "artifact").mkdir(parents=True)
    assert own_artifact(tmp_path / "src") == ""
    (tmp_path / "bento.yaml").touch()
    assert own_artifact(tmp_path / "src") == str(tmp_path / "src" / "artifact")


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # BentoML's own
def test_a_model_that_the_store_lacks_is_named() -> None:
    with pytest.raises(ConfigError, match="bentoml:nowhere_to_be_found"):
        read_settings({"YUNMIN_ARTIFACT": "bentoml:nowhere_to_be_found"})


def test_a_version_cannot_be_called_latest_which_is_how_the_newest_is_found(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mamba:latest: latest names the newest version"):
        store_artifact(tmp_path, "mamba:latest")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of what `bentoml build` packs, with an artifact beside it."""
    folder = tmp_path / "project"
    folder.mkdir()
    for name in CODE:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "bentofile.yaml", folder)
    checkpoint = write_model(tmp_path / "checkpoint")
    command = "import sys; from yunmin.cli import main; sys.exit(main())"
    _run([sys.executable, "-c", command, "export", str(checkpoint), str(folder / "artifact")], ROOT, tmp_path)
    return folder


def _environ(home: Path) -> dict[str, str]:
    return os.environ | {"BENTOML_HOME": str(home / "home"), "BENTOML_DO_NOT_TRACK": "True", "YUNMIN_ARTIFACT": ""}


def _run(command: list[str], folder: Path, home: Path) -> str:
    done = subprocess.run(command, cwd=folder, env=_environ(home), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _build(project: Path, home: Path) -> Path:
    tag = _run([*BENTOML, "build", "--output", "tag"], project, home).strip().splitlines()[-1].removeprefix("__tag__:")
    return home / "home" / "bentos" / tag.replace(":", "/")


def _serves(bento: Path, home: Path) -> dict[str, Any]:
    """What a server on the bento's folder answers; it runs the bento's code, not this folder's."""
    port = free_port()
    command = [*BENTOML, "serve", str(bento), "--host", "127.0.0.1", "--port", str(port)]
    environ = _environ(home) | {"YUNMIN_DEVICE": "cpu"}
    with server(command, home / "log.txt", url=f"http://127.0.0.1:{port}", environ=environ) as running:
        body = {"prompt": "def main(", "max_tokens": 5, "temperature": 0}
        answer = httpx.post(f"{running.url}/generate", json=body, timeout=60).json()
        models = httpx.get(f"{running.url}/v1/models").json()
        return {"tokens": answer["usage"]["completion_tokens"], "name": models["data"][0]["id"]}


@pytest.mark.slow
def test_a_bento_serves_the_artifact_that_it_holds(project: Path, tmp_path: Path) -> None:
    bento = _build(project, tmp_path)
    shutil.rmtree(project)
    assert (bento / "src" / "artifact" / "manifest.json").is_file()
    assert _serves(bento, tmp_path) == {"tokens": 5, "name": "artifact"}
    dockerfile = (bento / "env" / "docker" / "Dockerfile").read_text()
    assert re.search(r"^FROM python:3.11", dockerfile, re.MULTILINE)
    assert "requirements.txt" in dockerfile
    assert "onnxruntime" in (bento / "env" / "python" / "requirements.txt").read_text()


@pytest.mark.slow
def test_a_bento_serves_the_model_of_the_store_that_it_names(project: Path, tmp_path: Path) -> None:
    store = [sys.executable, "-m", "serving.bento_model", "artifact", "mamba:1"]
    assert _run(store, project, tmp_path).strip().endswith("mamba:1")
    listed = json.loads(_run([*BENTOML, "models", "list", "--output", "json"], project, tmp_path))
    assert [model["tag"] for model in listed] == ["mamba:1"]
    shutil.rmtree(project / "artifact")
    bentofile = project / "bentofile.yaml"
    bentofile.write_text(bentofile.read_text() + 'models:\n  - "mamba:latest"\n')
    bento = _build(project, tmp_path)
    shutil.rmtree(project)
    assert not (bento / "src" / "artifact").exists()
    assert _serves(bento, tmp_path) == {"tokens": 5, "name": "mamba"}
