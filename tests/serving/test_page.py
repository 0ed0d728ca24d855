from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, expect

from serving.api.page import FILES
from tests.serving.browser import BINARY, Visit, chromium, contrast
from tests.serving.fixtures import YUNMIN, Running, server
from yunmin.language_model import LanguageModel
from yunmin.snapshots import save_snapshot

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BINARY is None, reason="no chromium here (Debian: apt-get install chromium)"),
]
Visiting = Callable[..., Visit]
KEY = "a key of the tests"


@pytest.fixture(scope="module")
def named_states(model: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("states")
    save_snapshot(folder / "greeting.safetensors", model.snapshot("Grüße aus 東京"), model.fingerprint, name="greeting")
    return folder


@pytest.fixture(scope="module")
def serving(model_folder: Path, named_states: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    log = tmp_path_factory.mktemp("page") / "log.txt"
    limits = ["--slots", "4", "--max-tokens", "20000", "--threads", "1", "--states", str(named_states)]
    with server([*YUNMIN, "serve", str(model_folder), "--port", "0", "--device", "cpu", *limits], log) as started:
        yield started


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture
def visiting(browser: Browser, serving: Running) -> Iterator[Visiting]:
    """Opens the page; at the end nothing may have complained."""
    visits: list[Visit] = []

    def open_page(url: str = serving.url, **options: object) -> Visit:
        visits.append(Visit(browser, url, **options))
        return visits[-1]

    yield open_page
    for visit in visits:
        visit.check()
        visit.close()


@pytest.fixture
def visit(visiting: Visiting) -> Visit:
    opened = visiting()
    opened.set(temperature=0, max_tokens=12)
    return opened


def sessions(running: Running) -> set[str]:
    found = httpx.get(f"{running.url}/v1/sessions?limit=100").json()
    assert not found["has_more"]
    return {session["id"] for session in found["data"]}


def generated(running: Running, prompt: str, max_tokens: int) -> tuple[str, list[int]]:
    """Text and token ids of the API."""
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    answer = httpx.post(f"{running.url}/generate", json=body, timeout=60).json()
    return answer["text"], answer["token_ids"]


def test_a_prompt_streams_with_its_figures(visit: Visit, serving: Running) -> None:
    visit.set(max_tokens=20_000)
    visit.start("def main(")
    visit.wait_for_tokens(300)
    assert visit.button("Stop").is_visible()  # these are figures of a stream that runs
    assert re.fullmatch(r"[\d,.]+ tokens/s", visit.figure("speed"))
    assert re.fullmatch(r"[\d,.]+ m?s", visit.figure("first"))
    assert re.fullmatch(r"[\d.]+ (kB|MB)", visit.figure("state"))
    visit.page.keyboard.press("Escape")
    visit.settle(1)
    serving.wait_for("yunmin_running_sequences", 0)  # the server was told


def test_the_text_is_what_the_api_gives(visit: Visit, serving: Running, model: LanguageModel) -> None:
    assert visit.send("def main(") == generated(serving, "def main(", 12)[0]
    assert visit.figure("tokens") == "12 tokens"
    assert visit.figure("position") == f"{len(model.encode('def main(')) + 12}"
    assert "reached max tokens" in visit.facts()


def test_a_turn_goes_on_from_the_state_before_it(visit: Visit) -> None:
    visit.send("def main(")
    position = int(visit.figure("position"))
    visit.send("argument")
    cached, _, read = visit.figure("cached").partition(" of ")
    assert int(cached) >= position
    assert int(read) > int(cached)
    assert int(visit.figure("position")) == int(read) + 12


def test_branches_at_one_turn_are_independent_and_compare(visit: Visit) -> None:
    visit.send("def main(")
    first = visit.send("x")
    visit.button("Branch at turn 1").click()
    expect(visit.articles).to_have_count(1)
    other = visit.send("argument")
    visit.button("Branch at turn 1").click()
    assert visit.send("x") == first  # whatever the branches beside it have read
    assert visit.labels() == ["1", "2a", "2b", "2c"]

    visit.button("Compare turn 2c").click()
    columns = visit.page.locator(".column .text")
    assert columns.all_inner_texts() == [f"x{first}", f"argument{other}"]
    assert columns.locator("mark").count() > 0
    assert "1 turn in common" in visit.page.locator("#compare").inner_text()
    visit.page.get_by_label("Right branch").locator("visible=true").last.select_option(index=1)
    assert columns.all_inner_texts() == [f"x{first}", f"x{first}"]
    assert columns.locator("mark").count() == 0
    assert "The same text" in visit.page.locator("#compare").inner_text()
    same = visit.page.locator("tr", has_text="Seed")
    expect(same).to_have_class("differs")  # drawn by the page
    expect(visit.page.locator("tr", has_text="Max tokens")).to_have_class("same")
    visit.button("Close").click()
    expect(visit.articles).to_have_count(2)


def test_a_stopped_turn_can_be_gone_on_with_where_it_was_stopped(visit: Visit, serving: Running) -> None:
    visit.set(max_tokens=5000)
    visit.start("def main(")
    visit.wait_for_tokens(20)
    visit.page.keyboard.press("Escape")
    visit.settle(1)
    stopped = int(visit.figure("tokens").split()[0].replace(",", ""))
    assert 20 <= stopped < 5000
    expect(visit.rows.first).to_contain_text("stopped")
    visit.set(max_tokens=30)
    visit.send("")
    assert visit.token_ids() == generated(serving, "def main(", stopped + 30)[1]


def test_again_runs_the_same_prompt_beside_the_turn(visit: Visit) -> None:
    visit.set(temperature=1)
    first = visit.send("def main(")
    seed = next(fact for fact in visit.facts() if fact.startswith("seed "))
    visit.set(seed=seed.split()[1])
    visit.button("Run again turn 1").click()
    visit.settle(2)
    assert visit.text() == first
    visit.set(seed=7)
    visit.button("Run again turn 1").click()
    visit.settle(3)
    assert visit.text() != first


def test_reload_finds_the_tree_and_goes_on(visit: Visit) -> None:
    visit.send("def main(")
    visit.send("x")
    visit.button("Branch at turn 1").click()
    text = visit.send("argument")
    visit.page.reload()
    assert visit.labels() == ["1", "2a", "2b"]
    assert visit.text() == text
    assert visit.page.input_value("#max_tokens") == "12"
    visit.send("y")
    assert visit.labels() == ["1", "2a", "2b", "3"]


def test_another_tab_shows_the_same_tree(visit: Visit) -> None:
    visit.send("def main(")
    other = visit.new_tab()
    expect(other.get_by_role("treeitem")).to_have_count(1)
    visit.send("x")
    expect(other.get_by_role("treeitem")).to_have_count(2)


def test_a_turn_cut_off_by_a_reload_is_shown_and_can_be_read_again(visit: Visit, serving: Running) -> None:
    visit.set(max_tokens=20_000)
    visit.start("def main(")
    visit.wait_for_tokens(50)
    visit.page.reload()
    expect(visit.rows).to_have_text(re.compile("stopped"))
    visit.button("Read again turn 1").click()
    expect(visit.button("Download the state of turn 1")).to_be_visible()
    visit.set(max_tokens=5)
    visit.send("")
    found = visit.token_ids()
    assert found == generated(serving, "def main(", len(found))[1]


def test_sessions_the_server_lost_are_shown_as_gone_and_can_be_read_again(visit: Visit, serving: Running) -> None:
    before = sessions(serving)
    visit.send("def main(")
    visit.send("x")
    first = visit.send("y")
    for session in sessions(serving) - before:
        httpx.delete(f"{serving.url}/v1/sessions/{session}").raise_for_status()
    visit.expected = ["404"]
    visit.page.reload()
    expect(visit.page.locator(".row .mark")).to_have_text(["gone"] * 3)
    visit.page.get_by_role("treeitem").nth(1).click()
    visit.start("y")
    expect(visit.notice).to_contain_text("no state to go on from after turn 2")
    visit.button("Read again and send").click()
    visit.settle(4)
    assert visit.text() == first
    assert visit.page.locator(".row .mark").all_inner_texts() == ["gone"]  # the branch that nobody asked for


def test_deleting_a_branch_deletes_its_sessions(visit: Visit, serving: Running) -> None:
    before = sessions(serving)
    visit.send("def main(")
    kept = sessions(serving)
    visit.send("x")
    visit.send("y")
    assert len(sessions(serving) - before) == 3
    visit.button("Delete turn 2").click()
    assert "and the 1 turn after it" in visit.page.get_by_role("dialog").inner_text()
    visit.button("Cancel").click()
    assert visit.labels() == ["1", "2", "3"]
    visit.button("Delete turn 2").click()
    with visit.page.expect_response(lambda response: response.request.method == "DELETE"):
        visit.button("Delete").click()
    visit.settle(1)
    visit.page.wait_for_function("() => !Object.keys(localStorage).some((key) => key.includes('trash'))")
    assert sessions(serving) == kept


def test_a_state_can_be_downloaded_and_uploaded(visit: Visit, tmp_path: Path) -> None:
    visit.send("def main(")
    position = visit.figure("position")
    with visit.page.expect_download() as download:
        visit.button("Download the state of turn 1").click()
    state = tmp_path / "state.safetensors"
    download.value.save_as(state)
    following = visit.send("x")
    visit.page.set_input_files("#upload-file", state)
    visit.settle(3)
    assert visit.figure("position") == position
    expect(visit.articles).to_contain_text("state.safetensors")
    assert visit.send("x") == following

    state.write_bytes(state.read_bytes()[:-1])
    visit.expected = ["400"]
    visit.page.set_input_files("#upload-file", state)
    expect(visit.notice).to_contain_text("damaged")
    visit.settle(4)


def test_a_named_state_is_a_first_turn(visit: Visit, serving: Running) -> None:
    visit.page.select_option("#states", "greeting")
    visit.settle(1)
    assert visit.send("x") == generated(serving, "Grüße aus 東京x", 12)[0]


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


def test_the_keyboard_is_enough(visiting: Visiting) -> None:
    visit = visiting()
    keys = visit.page.keyboard
    expect(visit.prompt).to_be_focused()
    keys.type("def main(")
    keys.press("Tab")
    keys.type("0")  # temperature
    keys.press("Tab")  # top p
    keys.press("Tab")
    keys.type("9")
    keys.press("Shift+Tab")
    keys.press("Shift+Tab")
    keys.press("Shift+Tab")
    for turns in (1, 2):
        keys.press("Control+Enter")
        visit.settle(turns)
        expect(visit.prompt).to_be_focused()
        keys.type("x")
    assert visit.figure("tokens") == "9 tokens"

    while visit.page.evaluate("() => document.activeElement.getAttribute('role')") != "treeitem":
        keys.press("Shift+Tab")
        assert visit.page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle") != "none"
    keys.press("ArrowUp")
    keys.press("Enter")
    expect(visit.articles).to_have_count(1)
    expect(visit.rows.first).to_be_focused()
    visit.prompt.focus()
    keys.press("Control+Enter")
    visit.settle(3)
    while visit.page.evaluate("() => document.activeElement.getAttribute('role')") != "treeitem":
        keys.press("Shift+Tab")
    keys.press("Home")
    keys.press("ArrowDown")
    keys.press("c")
    expect(visit.page.locator(".column:visible")).to_have_count(2)
    keys.press("Escape")
    expect(visit.page.locator(".column:visible")).to_have_count(0)
    visit.rows.nth(1).focus()
    keys.press("Delete")
    keys.press("Tab")
    keys.press("Enter")
    visit.settle(2)
    assert "Ended: 9 tokens." in visit.page.locator("#spoken").inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 1280])
def test_it_is_readable(visiting: Visiting, scheme: str, width: int) -> None:
    visit = visiting(viewport={"width": width, "height": 800}, color_scheme=scheme)
    visit.set(max_tokens=200)
    visit.send("def main(argument):\n    " + "a" * 200)
    visit.button("Run again turn 1").click()
    visit.settle(2)
    overflow = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert visit.page.evaluate(overflow) == 0
    visit.button("Compare turn 1").click()
    assert visit.page.evaluate(overflow) == 0
    colours = visit.page.evaluate("""() => {
        const rgb = (name) => {
            const probe = document.createElement("i");
            probe.style.color = `var(--${name})`;
            document.body.append(probe);
            const found = getComputedStyle(probe).color.match(/[\\d.]+/g).map(Number);
            probe.remove();
            return found;
        };
        const names = "ground surface ink quiet accent on-accent given differs danger danger-ground".split(" ");
        return Object.fromEntries(names.map((name) => [name, rgb(name)]));
    }""")
    pairs = "ink/ground ink/surface quiet/ground quiet/surface accent/surface accent/ground on-accent/accent ink/given "
    pairs += "accent/given ink/differs danger/danger-ground danger/ground"
    for pair in pairs.split():
        above, _, below = pair.partition("/")
        assert contrast(colours[above], colours[below]) >= 4.5, pair


def test_every_control_has_a_name(visit: Visit) -> None:
    visit.send("def main(")
    unnamed = """() => [...document.querySelectorAll("button, input, select, textarea, [role=treeitem]")]
        .filter((control) => !control.hidden && control.type !== "file")
        .filter((control) => !control.getAttribute("aria-label") && !control.labels?.length)
        .filter((control) => !control.textContent.trim())
        .map((control) => control.outerHTML)"""
    assert visit.page.evaluate(unnamed) == []


def test_files_are_served_with_a_policy_and_kept_until_they_change(serving: Running) -> None:
    for path in ("/", "/docs", *(f"/page/{name}" for name in FILES)):
        response = httpx.get(serving.url + path)
        assert response.status_code == 200, path
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "script-src 'self'" in policy or path.startswith("/page/")
        assert "'unsafe-inline'" not in policy or path == "/docs"
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["cache-control"] == "no-cache"
        known = {"if-none-match": response.headers["etag"]}
        assert httpx.get(serving.url + path, headers=known).status_code == 304
        assert httpx.get(serving.url + path, headers={"if-none-match": '"other"'}).status_code == 200
    assert httpx.get(f"{serving.url}/page/other.js").json()["error"]["code"] == "not_found"


def test_the_page_names_no_other_host() -> None:
    for name, file in FILES.items():
        found = re.findall(rb"https?://[\w.]+", file.content)
        assert set(found) <= {b"http://www.w3.org"}, name  # the namespace of SVG, which nobody fetches
