from __future__ import annotations

import itertools
import re

from playwright.sync_api import expect

from tests.serving.fixtures import Running
from tests.serving.page.browser import Visit, generated
from yunmin.language_model import LanguageModel


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


TEXTS = ["", "one two three", "two, one three", "one two three four\n", "x" * 40, "日本 語 one"]
LONG = " ".join(f"w{number}" for number in range(3000))
SCRIPT = "texts => import('./page/compare.js').then((module) => module.differences(...texts))"


def test_what_two_texts_share_is_unmarked_in_both(visit: Visit) -> None:
    for left, right in itertools.product([*TEXTS, LONG], [*TEXTS, f"{LONG} end"]):
        marked = visit.page.evaluate(SCRIPT, [left, right])
        assert ["".join(word for word, _ in words) for words in marked] == [left, right]
        shared = [[word for word, differs in words if not differs and word.strip()] for words in marked]
        assert shared[0] == shared[1]
        if left == right:
            assert not any(differs for _, differs in marked[0])
        elif {left, right} == {TEXTS[1], TEXTS[2]}:
            assert len(shared[0]) == 2  # the most that are in the same order in both
        elif (left, right) == (LONG, f"{LONG} end"):
            assert [word for word, differs in marked[1] if differs] == ["end"]
