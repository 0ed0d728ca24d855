from __future__ import annotations

import re
from pathlib import Path

import httpx
from playwright.sync_api import expect

from tests.serving.fixtures import Running
from tests.serving.page.browser import Visit, generated, sessions


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
