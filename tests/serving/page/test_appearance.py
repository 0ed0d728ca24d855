from __future__ import annotations

import pytest
from playwright.sync_api import expect

from tests.serving.page.browser import Visit, contrast
from tests.serving.page.conftest import Visiting


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
