"""`/admin/reload`: another model for new requests, the old one for those that run, and nothing at all without a key."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette

import yunmin
from tests.serving.apps import JSON, error_of, events_of, http_client, openai_client, serving
from tests.serving.fixtures import write_model
from tests.serving.test_cli import artifact_at
from yunmin.language_model import LanguageModel

ASKED: JSON = {"prompt": "def main(", "max_tokens": 60, "temperature": 0}


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "other", seed=1)


def reloading(model: LanguageModel, body: Any, root: Path | None = None, **variables: str) -> None:
    own = {"ARTIFACT": str(model.folder), "ADMIN_KEY": "root", "CHAT_TEMPLATE": "plain", "MODEL_NAME": "tiny"}
    if root is not None:
        own["RELOAD_ROOT"] = str(root)
    serving(model, body, **(own | variables))


async def asked_to_reload(app: Starlette, body: JSON | None = None, key: str = "root") -> Any:
    async with http_client(app, key) as client:
        return await client.post("/admin/reload", json=body)


def test_streams_keep_the_model_they_began_with(
    model: LanguageModel, other_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = yunmin.load(other_folder, device="cpu")

    async def body(app: Starlette) -> None:
        old = app.state.backend
        step, steps, go_on = old.model.runtime.step, 0, threading.Event()

        def held(*arguments: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == 5:
                assert go_on.wait(60)
            return step(*arguments)

        monkeypatch.setattr(old.model.runtime, "step", held)
        async with http_client(app) as client, openai_client(app) as openai:
            streams = [
                asyncio.create_task(client.post("/generate_stream", json=ASKED | {"seed": 1, "temperature": 1.0})),
                asyncio.create_task(client.post("/v1/completions", json=ASKED)),
            ]
            while steps < 5:
                await asyncio.sleep(0.001)
            answer = await asked_to_reload(app, {"artifact": str(other_folder)})
            assert answer.status_code == 200, answer.text
            assert answer.json()["fingerprint"] == other.fingerprint
            assert app.state.backend is not old
            assert app.state.retiring == {old}
            new = (await client.post("/generate", json=ASKED)).json()
            assert new["token_ids"] == list(other.generate("def main(", max_tokens=60, temperature=0).token_ids)
            models = await openai.models.list()
            assert [entry.id for entry in models.data] == ["tiny"]
            go_on.set()
            events = events_of(await streams[0])
            expected = model.generate("def main(", max_tokens=60, seed=1)
            assert [event["token_id"] for event in events] == list(expected.token_ids)
            text = (await streams[1]).json()["choices"][0]["text"]
            assert text == model.generate("def main(", max_tokens=60, temperature=0).text
        while app.state.retiring:
            await asyncio.sleep(0.01)
        assert not old.engine.is_alive
        assert app.state.backend.engine.is_alive

    reloading(model, body, other_folder.parent)


def test_a_replaced_model_leaves_the_memory(model: LanguageModel, other_folder: Path) -> None:
    async def body(app: Starlette) -> None:
        gone = weakref.ref(app.state.backend.model)
        for _ in range(2):  # the first model is the test's own
            gone = weakref.ref(app.state.backend.model)
            async with http_client(app) as client:
                assert (await client.post("/generate", json=ASKED)).status_code == 200
            assert (await asked_to_reload(app, {"artifact": str(other_folder)})).status_code == 200
        while app.state.retiring:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.01)
        gc.collect()
        assert gone() is None

    reloading(model, body, other_folder.parent)


def test_the_same_path_is_read_again(tmp_path: Path) -> None:
    artifact = artifact_at(tmp_path / "served")
    model = yunmin.load(artifact, device="cpu")

    async def body(app: Starlette) -> None:
        for asked in (None, {}, {"artifact": str(artifact)}):
            assert (await asked_to_reload(app, asked)).status_code == 200
        async with http_client(app) as client:
            answer = (await client.post("/generate", json=ASKED)).json()
        assert answer["token_ids"] == list(model.generate("def main(", max_tokens=60, temperature=0).token_ids)

    reloading(model, body)


def test_a_bad_artifact_leaves_the_old_one_serving(model: LanguageModel, tmp_path: Path) -> None:
    damaged = artifact_at(tmp_path / "damaged")
    (damaged / "config.json").write_text((damaged / "config.json").read_text() + "\n")
    truncated = write_model(tmp_path / "truncated")
    with (truncated / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    (tmp_path / "empty").mkdir()

    async def body(app: Starlette) -> None:
        before = app.state.backend
        for name, expected in (("damaged", "wrong hash"), ("truncated", "truncated"), ("empty", ""), ("none", "")):
            error = error_of(await asked_to_reload(app, {"artifact": str(tmp_path / name)}), 400)
            assert error["code"] == "artifact_refused"
            assert expected in error["message"]
        assert app.state.backend is before
        async with http_client(app) as client:
            assert (await client.post("/generate", json=ASKED)).status_code == 200

    reloading(model, body, tmp_path)


def test_only_the_served_artifact_or_those_in_the_root_are_loaded(
    model: LanguageModel, other_folder: Path, tmp_path: Path
) -> None:
    async def without_root(app: Starlette) -> None:
        error = error_of(await asked_to_reload(app, {"artifact": str(other_folder)}), 400)
        assert "reload_root" in error["message"]

    async def with_root(app: Starlette) -> None:
        (tmp_path / "link").symlink_to(other_folder)
        for path in (other_folder, tmp_path / ".." / other_folder.name, tmp_path / "link", Path("/etc")):
            assert "elsewhere" in error_of(await asked_to_reload(app, {"artifact": str(path)}), 400)["message"]

    async def oddly_named(app: Starlette) -> None:
        for name in ("a\0b", str(tmp_path / ("x" * 5000)), str(tmp_path / "none"), "state-spaces/mamba-130m"):
            error = error_of(await asked_to_reload(app, {"artifact": name}), 400)
            assert error["code"] == "artifact_refused"
            assert "Hub did not" not in error["message"]

    reloading(model, oddly_named, Path("/"))
    reloading(model, without_root)
    reloading(model, with_root, tmp_path)


def test_without_the_admin_key_there_is_no_reload(model: LanguageModel) -> None:
    async def keyed(app: Starlette) -> None:
        error_of(await asked_to_reload(app, key="wrong"), 401)
        async with http_client(app) as client:
            error_of(await client.post("/admin/reload"), 401)

    async def off(app: Starlette) -> None:
        error_of(await asked_to_reload(app), 404)

    reloading(model, keyed)
    serving(model, off)


def test_a_server_that_drains_takes_no_other_model(model: LanguageModel, other_folder: Path) -> None:
    async def body(app: Starlette) -> None:
        old = app.state.backend
        old.engine.drain()
        error = error_of(await asked_to_reload(app, {"artifact": str(other_folder)}), 503)
        assert error["code"] == "engine_stopped"
        assert app.state.backend is old

    reloading(model, body, other_folder.parent)


def test_one_reload_at_a_time(model: LanguageModel) -> None:
    async def body(app: Starlette) -> None:
        answers = await asyncio.gather(*(asked_to_reload(app) for _ in range(3)))
        assert sorted(answer.status_code for answer in answers) == [200, 409, 409]

    reloading(model, body)


def test_a_session_of_the_old_model_is_refused_by_the_new_one(model: LanguageModel, other_folder: Path) -> None:
    async def body(app: Starlette) -> None:
        async with http_client(app) as client:
            session_id = (await client.post("/v1/sessions", json={"prompt": "def main("})).json()["id"]
            assert (await asked_to_reload(app, {"artifact": str(other_folder)})).status_code == 200
            error = error_of(await client.post("/generate", json=ASKED | {"session_id": session_id}), 409)
            assert "another model" in error["message"]

    reloading(model, body, other_folder.parent)
