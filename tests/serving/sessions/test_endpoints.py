"""The endpoints of sessions: what they answer, what they refuse and with which status."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry

from serving.api.access import Access, Key
from serving.api.app import create_app
from serving.api.backend import Backend
from serving.engine.engine import Engine
from serving.metrics import Metrics
from serving.sessions.opening import open_sessions
from serving.settings import read_settings
from tests.serving.engines import run
from tests.serving.fixtures import write_model
from yunmin.language_model import LanguageModel, load
from yunmin.snapshots import save_snapshot, snapshot_from_bytes, snapshot_to_bytes

KEYS = Access([Key("me", "mine"), Key("you", "yours")])


@asynccontextmanager
async def client_on(
    model: LanguageModel, *, access: Access | None = None, clock: Callable[[], float] = time.time, **variables: str
) -> AsyncIterator[httpx.AsyncClient]:
    settings = read_settings({"YUNMIN_ARTIFACT": "tiny", "YUNMIN_MAX_PROMPT_TOKENS": "100"} | variables)
    registry = CollectorRegistry()
    engine = Engine(model.runtime, model.tokenizer, slots=2, queue=2, prefill_chunk=8, metrics=Metrics(registry))
    engine.start()
    sessions = open_sessions(model, settings, registry)
    sessions.keeper.clock = clock
    app = create_app()
    app.state.backend = Backend(model, engine, settings, access=access or Access(), sessions=sessions)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://test/v1") as client:
            yield client
    finally:
        engine.stop()
        sessions.keeper.close()


def serving(model: LanguageModel, body: Callable[[httpx.AsyncClient], Any], **options: Any) -> None:
    async def main() -> None:
        async with client_on(model, **options) as client:
            await body(client)

    run(main())


def refusal(answer: httpx.Response) -> tuple[int, str]:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return answer.status_code, error["code"]


def test_a_session_is_made_shown_listed_forked_and_deleted(model: LanguageModel) -> None:
    async def body(client: httpx.AsyncClient) -> None:
        made = await client.post("/sessions", json={"prompt": "def main(", "metadata": {"a": "ç"}, "ttl_s": 60})
        assert made.status_code == 201
        record = made.json()
        tokens = len(model.encode("def main("))
        assert record["object"] == "session"
        assert (record["position"], record["version"], record["parent"]) == (tokens, 1, None)
        assert record["model"] == "tiny"
        assert record["metadata"] == {"a": "ç"}
        assert 59 <= record["expires"] - record["created"] <= 61
        shown = (await client.get(f"/sessions/{record['id']}")).json()
        assert shown == record | {"messages": []}
        fork = (await client.post(f"/sessions/{record['id']}/fork", json={"position": tokens})).json()
        assert (fork["parent"], fork["position"], fork["metadata"]) == (record["id"], tokens, {"a": "ç"})
        assert fork["state_bytes"] == record["state_bytes"] > 0
        listed = (await client.get("/sessions", params={"limit": 1})).json()
        assert (listed["data"], listed["has_more"]) == ([fork], True)
        listed = (await client.get("/sessions", params={"before": fork["id"]})).json()
        assert (listed["data"], listed["has_more"]) == ([record], False)
        gone = await client.delete(f"/sessions/{record['id']}")
        assert gone.json() == {"id": record["id"], "object": "session.deleted", "deleted": True}
        assert refusal(await client.get(f"/sessions/{record['id']}")) == (404, "session_not_found")
        assert (await client.get(f"/sessions/{fork['id']}")).status_code == 200

    serving(model, body)


@pytest.mark.parametrize("asked", [None, {}, {"prompt": ""}, {"token_ids": []}])
def test_a_session_may_begin_with_nothing(model: LanguageModel, asked: dict[str, Any] | None) -> None:
    async def body(client: httpx.AsyncClient) -> None:
        record = (await client.post("/sessions", json=asked)).json()
        assert (record["position"], record["state_bytes"]) == (0, 0)
        assert refusal(await client.get(f"/sessions/{record['id']}/state")) == (409, "session_empty")

    serving(model, body)


def test_the_state_of_a_prompt_is_what_the_library_computes(model: LanguageModel) -> None:
    async def body(client: httpx.AsyncClient) -> None:
        ids = list(range(1, 60))
        record = (await client.post("/sessions", json={"token_ids": ids})).json()
        answer = await client.get(f"/sessions/{record['id']}/state")
        assert answer.headers["content-type"] == "application/octet-stream"
        assert answer.headers["x-session-position"] == "59"
        assert len(answer.content) == record["state_bytes"]
        read = snapshot_from_bytes("answer", answer.content, model.config, model.fingerprint)
        expected = model.snapshot(ids)
        assert read.token_ids == tuple(ids)
        for found, wanted in zip((*read.state.ssm, read.logits), (*expected.state.ssm, expected.logits), strict=True):
            assert float((found - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max())
        assert list(model.generate(read, max_tokens=9, temperature=0).token_ids) == list(
            model.generate(ids, max_tokens=9, temperature=0).token_ids
        )

    serving(model, body)


def test_a_state_goes_up_where_another_came_down(model: LanguageModel) -> None:
    async def body(client: httpx.AsyncClient) -> None:
        source = (await client.post("/sessions", json={"prompt": "x = 1"})).json()
        target = (await client.post("/sessions")).json()
        data = (await client.get(f"/sessions/{source['id']}/state")).content

        async def in_chunks() -> AsyncIterator[bytes]:
            for begin in range(0, len(data), 1000):
                yield data[begin : begin + 1000]

        answer = await client.put(f"/sessions/{target['id']}/state", content=in_chunks())
        assert answer.status_code == 200
        assert (answer.json()["position"], answer.json()["version"]) == (source["position"], 2)
        assert (await client.get(f"/sessions/{target['id']}/state")).content == data
        for damaged in (b"", data[:-1], b"{}" * 100):
            refused = await client.put(f"/sessions/{target['id']}/state", content=damaged)
            assert refusal(refused) == (400, "invalid_state")
        assert (await client.get(f"/sessions/{target['id']}")).json()["version"] == 2
        big = b"x" * 50_000_000
        assert refusal(await client.put(f"/sessions/{target['id']}/state", content=big)) == (413, "body_too_large")
        unknown = f"/sessions/sess_{'0' * 32}/state"
        assert refusal(await client.put(unknown, content=data)) == (404, "session_not_found")

    serving(model, body)


def test_a_state_of_another_model_is_refused(model: LanguageModel, tmp_path: Path) -> None:
    other = load(write_model(tmp_path / "other", seed=1), device="cpu")

    async def body(client: httpx.AsyncClient) -> None:
        record = (await client.post("/sessions")).json()
        data = snapshot_to_bytes(other.snapshot([1]), other.fingerprint)
        refused = await client.put(f"/sessions/{record['id']}/state", content=data)
        assert refusal(refused) == (400, "invalid_state")
        assert "belongs to another model" in refused.json()["error"]["message"]

    serving(model, body)


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"prompt": 5}, "prompt"),
        ({"prompt": "a", "token_ids": [1]}, "token_ids"),
        ({"token_ids": [10**6]}, "token_ids"),
        ({"token_ids": list(range(101))}, "token_ids"),
        ({"ttl_s": 0}, "ttl_s"),
        ({"ttl_s": 1e12}, "ttl_s"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
        ({"metadata": {"a": "x" * 513}}, "metadata"),
        ({"metadata": {"x" * 65: ""}}, "metadata"),
        ({"unknown": 1}, "unknown"),
        ({"state": 1}, "state"),
    ],
)
def test_a_field_that_cannot_be_is_refused_by_name(model: LanguageModel, asked: dict[str, Any], param: str) -> None:
    async def body(client: httpx.AsyncClient) -> None:
        refused = await client.post("/sessions", json=asked)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == param
        assert (await client.get("/sessions")).json()["data"] == []

    serving(model, body)


@pytest.mark.parametrize("limit", ["0", "101", "-1", "x", "", "1e1", "9" * 100, "000000001" + "9" * 20, "²"])
def test_a_page_has_1_to_100_sessions(model: LanguageModel, limit: str) -> None:
    async def body(client: httpx.AsyncClient) -> None:
        refused = await client.get("/sessions", params={"limit": limit})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "limit"

    serving(model, body)


def test_a_fork_elsewhere_than_the_session_is_refused(model: LanguageModel) -> None:
    async def body(client: httpx.AsyncClient) -> None:
        record = (await client.post("/sessions", json={"token_ids": [1, 2]})).json()
        refused = await client.post(f"/sessions/{record['id']}/fork", json={"position": 1})
        assert refusal(refused) == (409, "session_position")
        assert (await client.post(f"/sessions/{record['id']}/fork", content=b"")).status_code == 201
        assert refusal(await client.post("/sessions/nonsense/fork")) == (404, "session_not_found")
        assert refusal(await client.delete("/sessions/nonsense")) == (404, "session_not_found")

    serving(model, body)


def test_a_full_store_is_a_507_and_expired_sessions_make_room(model: LanguageModel, tmp_path: Path) -> None:
    now = time.time()

    async def body(client: httpx.AsyncClient) -> None:
        nonlocal now
        first = (await client.post("/sessions", json={"ttl_s": 10})).json()
        assert (await client.post("/sessions")).status_code == 201
        assert refusal(await client.post("/sessions")) == (507, "session_store_full")
        now += 11
        assert refusal(await client.get(f"/sessions/{first['id']}")) == (404, "session_expired")
        assert (await client.post("/sessions")).status_code == 201

    variables = {"YUNMIN_MAX_SESSIONS": "2", "YUNMIN_SESSION_DIR": str(tmp_path)}
    serving(model, body, clock=lambda: now, **variables)


def test_each_key_sees_its_own_sessions(model: LanguageModel) -> None:
    async def body(client: httpx.AsyncClient) -> None:
        me, you = ({"Authorization": f"Bearer {key}"} for key in ("mine", "yours"))
        record = (await client.post("/sessions", headers=me)).json()
        assert (await client.get("/sessions", headers=me)).json()["data"] == [record]
        assert (await client.get("/sessions", headers=you)).json()["data"] == []
        assert refusal(await client.get(f"/sessions/{record['id']}", headers=you)) == (404, "session_not_found")
        assert (await client.get("/sessions")).status_code == 401

    serving(model, body, access=KEYS)


def test_named_states_are_listed_and_begun_after(model: LanguageModel, tmp_path: Path) -> None:
    ids = list(range(1, 30))
    save_snapshot(tmp_path / "a.safetensors", model.snapshot(ids), model.fingerprint, name="few-shot")

    async def body(client: httpx.AsyncClient) -> None:
        size = (tmp_path / "a.safetensors").stat().st_size
        listed = (await client.get("/states")).json()
        assert listed == {
            "object": "list",
            "data": [{"id": "few-shot", "object": "state", "position": 29, "state_bytes": size}],
        }
        plain = (await client.post("/sessions", json={"state": "few-shot"})).json()
        assert plain["position"] == 29
        longer = (await client.post("/sessions", json={"state": "few-shot", "token_ids": [5, 6]})).json()
        data = (await client.get(f"/sessions/{longer['id']}/state")).content
        read = snapshot_from_bytes("answer", data, model.config, model.fingerprint)
        assert read.token_ids == (*ids, 5, 6)
        expected = model.generate([*ids, 5, 6], max_tokens=9, temperature=0).token_ids
        assert model.generate(read, max_tokens=9, temperature=0).token_ids == expected
        refused = await client.post("/sessions", json={"state": "other"})
        assert refusal(refused) == (404, "state_not_found")

    serving(model, body, YUNMIN_STATES=str(tmp_path))


def test_sessions_in_a_folder_outlive_the_server(model: LanguageModel, tmp_path: Path) -> None:
    made: dict[str, Any] = {}

    async def before(client: httpx.AsyncClient) -> None:
        made.update((await client.post("/sessions", json={"prompt": "x = 1"})).json())

    async def after(client: httpx.AsyncClient) -> None:
        assert (await client.get(f"/sessions/{made['id']}")).json() == made | {"messages": []}

    for body in (before, after):
        serving(model, body, YUNMIN_SESSION_DIR=str(tmp_path))
