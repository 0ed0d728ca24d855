"""The OpenAPI document is true: by its own account, and by what a real server answers to thousands of requests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from serving.api.app import create_app
from serving.api.openapi import openapi_document
from tests.serving.apps import JSON, http_client, serving
from tests.serving.fixtures import YUNMIN, server
from yunmin.language_model import LanguageModel

PROBES = {"/livez", "/healthz", "/readyz"}  # BentoML's
UNDOCUMENTED = {"/", "/docs", "/page/{name}", "/openapi.json", "/docs.json", "/{path:path}"}  # of the pages


def test_the_document_has_every_path_and_method_and_no_others() -> None:
    documented = {
        (path, method.upper())
        for path, item in openapi_document()["paths"].items()
        for method in item
        if method != "parameters" and path not in PROBES
    }
    served = {
        (route.path.replace(":path}", "}"), method)
        for route in create_app().routes
        if isinstance(route, Route) and route.path not in UNDOCUMENTED
        for method in (route.methods or set()) - {"HEAD"}
    }
    assert documented == served


def test_every_reference_is_there_and_every_schema_is_used() -> None:
    document = openapi_document()
    text = json.dumps(document)
    names = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert names == set(document["components"]["schemas"])


def test_every_example_of_a_request_is_answered(model: LanguageModel) -> None:
    document = openapi_document()
    schemas = document["components"]["schemas"]

    async def body(app: Starlette) -> None:
        async with http_client(app) as client:
            for path, item in document["paths"].items():
                content: JSON = item.get("post", {}).get("requestBody", {}).get("content", {})
                name = content.get("application/json", {}).get("schema", {}).get("$ref", "").rpartition("/")[2]
                for example in schemas.get(name, {}).get("examples", []):
                    answer = await client.post(path, json=example)
                    assert answer.status_code == 200, (path, answer.text)

    serving(model, body, CHAT_TEMPLATE="plain")


CONFIG: str = """
[checks.negative_data_rejection]
expected-statuses = ["4xx"]

[checks.positive_data_acceptance]
enabled = false  # much of what is wrong with a request is not for a schema to say
"""


@pytest.mark.slow
def test_a_server_keeps_to_the_document_whatever_it_is_sent(model_folder: Path, tmp_path: Path) -> None:
    limits = ["--slots", "4", "--max-tokens", "16", "--max-prompt-tokens", "400", "--max-body-bytes", "20000"]
    command = [*YUNMIN, "serve", str(model_folder), "--port", "0", "--device", "cpu", "--threads", "1", *limits]
    environ = {"YUNMIN_API_KEYS": "secret-key", "YUNMIN_ADMIN_KEY": "secret-admin", "YUNMIN_CHAT_TEMPLATE": "plain"}
    config = tmp_path / "schemathesis.toml"
    config.write_text(CONFIG)
    with server(command, tmp_path / "log.txt", environ=environ) as running:

        def run(key: str, *options: str) -> Any:
            return subprocess.run(
                [
                    *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(config), "run"),
                    f"{running.url}/openapi.json",
                    *("--seed", "1", "--workers", "1", "--max-examples", "20", "--request-timeout", "30"),
                    *("--phases", "examples,coverage,fuzzing", "-H", f"Authorization: Bearer {key}", *options),
                ],
                cwd=tmp_path,
                env=os.environ | {"PYTHONWARNINGS": "default"},
                capture_output=True,
                text=True,
                timeout=300,
            )

        done = run("secret-key", "--exclude-path-regex", "^/admin")
        assert done.returncode == 0, done.stdout[-4000:]
        done = run("secret-admin", "--include-path-regex", "^/admin")
        assert done.returncode == 0, done.stdout[-4000:]
        assert running.process.poll() is None
        log = running.log.read_text()
    assert "Traceback" not in log
    assert "secret-" not in log
