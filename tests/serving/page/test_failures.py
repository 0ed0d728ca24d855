from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

from playwright.sync_api import expect

from tests.serving.fixtures import YUNMIN, server
from tests.serving.page.browser import Visit
from tests.serving.page.conftest import Visiting

KEY = "a key of the tests"
ERROR: dict[str, Any] = {"type": "x", "param": None, "code": "x"}


def test_a_429_says_when_to_try_again_and_keeps_the_prompt(visit: Visit) -> None:
    body = {"error": ERROR | {"message": "the queue is full"}}
    visit.expected = ["429"]
    visit.answer("generate_stream", 429, json.dumps(body), retry_after="2")
    visit.start("def main(")
    expect(visit.notice).to_contain_text("the queue is full")
    again = visit.notice.get_by_role("button").first
    expect(again).to_be_disabled()
    expect(again).to_have_text(re.compile(r"Try again in \d s"))
    expect(visit.prompt).to_have_value("def main(")
    assert visit.labels() == []
    visit.page.unroute("**/generate_stream")
    expect(again).to_have_text("Try again")
    again.click()
    visit.settle(1)
    expect(visit.prompt).to_have_value("")
    expect(visit.notice).to_be_empty()


def test_an_error_in_mid_stream_keeps_what_came(visit: Visit) -> None:
    visit.send("def main(")
    pieces = [{"token_id": 70, "text": "one"}, {"token_id": 71, "text": " two"}]
    frames = [*pieces, {"error": ERROR | {"message": "the engine has stopped"}}]
    visit.answer("generate_stream", 200, "".join(f"data: {json.dumps(frame)}\n\n" for frame in frames))
    visit.start("x")
    expect(visit.notice).to_contain_text("the engine has stopped")
    visit.settle(2)
    assert visit.text() == "one two"
    assert visit.figure("tokens") == "2 tokens"
    expect(visit.rows.last).to_contain_text("failed")
    visit.answer("generate_stream", 200, "".join(f"data: {json.dumps(frame)}\n\n" for frame in pieces))
    visit.button("Try again").click()
    expect(visit.notice).to_contain_text("broke off")
    visit.settle(3)
    visit.page.unroute("**/generate_stream")
    visit.button("Try again").click()
    visit.settle(4)
    assert visit.labels() == ["1", "2a", "2b", "2c"]


def test_a_bad_value_is_refused_by_the_page_and_named_by_the_server(visit: Visit) -> None:
    visit.set(top_p=2)
    visit.start("def main(")
    expect(visit.page.locator("#top_p")).to_be_focused()
    visit.set(top_p=0)
    visit.expected = ["400"]
    visit.start("def main(")
    expect(visit.notice).to_contain_text("top_p")
    assert visit.labels() == []
    visit.button("New").click()
    visit.start("")
    expect(visit.notice).to_contain_text("needs a prompt")


def test_a_server_that_is_gone_is_waited_for(visit: Visit) -> None:
    visit.send("def main(")
    visit.expected = ["ERR_INTERNET_DISCONNECTED"]
    visit.context.set_offline(True)
    visit.start("x")
    expect(visit.notice).to_contain_text("cannot be reached")
    expect(visit.page.locator("#health")).to_have_text("not reachable")
    visit.context.set_offline(False)
    expect(visit.page.locator("#health")).to_be_empty()
    visit.button("Try again").click()
    visit.settle(2)


def test_a_key_is_asked_for_and_a_server_that_dies_in_mid_stream_is_told(
    visiting: Visiting, model_folder: Path, tmp_path: Path
) -> None:
    command = [*YUNMIN, "serve", str(model_folder), "--port", "0", "--device", "cpu", "--max-tokens", "20000"]
    with server(command, tmp_path / "log.txt", environ={"YUNMIN_API_KEYS": KEY}) as started:
        visit = visiting(started.url)
        visit.expected = ["401", "ERR_"]
        dialog = visit.page.get_by_role("dialog")
        expect(dialog).to_contain_text("An API key is needed", ignore_case=True)
        visit.page.keyboard.type("wrong")
        visit.page.keyboard.press("Enter")
        expect(dialog).to_contain_text("not one of this server's")
        visit.page.fill("#key", KEY)
        visit.button("Use it").click()
        expect(visit.page.locator("#model")).to_have_text("tiny")
        visit.set(max_tokens=12, temperature=0)
        visit.send("def main(")
        assert KEY not in visit.page.evaluate("() => JSON.stringify(localStorage)")
        visit.page.reload()
        expect(visit.page.locator("#model")).to_have_text("tiny")  # not asked again
        assert visit.page.goto(f"{started.url}/docs") is not None
        expect(visit.page.locator(".swagger-ui .info")).to_be_visible()
        visit.page.goto(started.url)

        visit.set(max_tokens=20_000)
        visit.start("x")
        visit.wait_for_tokens(50)
        os.killpg(started.process.pid, signal.SIGKILL)
        expect(visit.notice).to_contain_text("connection was lost")
        expect(visit.page.locator("#health")).to_have_text("not reachable")
        expect(visit.rows.last).to_contain_text("failed")
