"""A browser without a window, the page in it as a user finds things there, and what the server says without it."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

import httpx
from playwright.sync_api import Browser, Locator, Page, Route, expect, sync_playwright

from tests.serving.fixtures import Running

BINARY = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_ARGUMENTS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
_PATIENCE_MS = 60_000  # machines are slow at times; nothing here waits that long otherwise
expect.set_options(timeout=_PATIENCE_MS)


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """The browser that is installed; no other is fetched."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BINARY, args=_ARGUMENTS)
        yield browser
        browser.close()


class Visit:
    """The page of a server in a tab of its own; whatever the page does wrong fails `check`.

    Args:
        browser: that shows it.
        url: of the server.
        options: of the browser's context: its size, its colours.
    """

    def __init__(self, browser: Browser, url: str, **options: object) -> None:
        self.url = url
        self.context = browser.new_context(**options)  # type: ignore[arg-type]
        self.context.set_default_timeout(_PATIENCE_MS)
        self.complaints: list[str] = []
        self.expected: list[str] = []  # patterns of complaints that a test provokes
        self.hosts: set[str] = set()
        self.page = self.new_tab()

    def new_tab(self) -> Page:
        page = self.context.new_page()
        page.on("console", lambda message: self._hear(message.type, message.text, message.location["url"]))
        page.on("pageerror", lambda error: self._hear("error", str(error), page.url))
        page.on("request", lambda request: self._note(request.url))
        page.goto(self.url)
        return page

    def _hear(self, kind: str, text: str, where: str) -> None:
        if kind in ("error", "warning"):
            self.complaints.append(f"{text} {where}")

    def _note(self, url: str) -> None:
        if urlsplit(url).scheme != "blob":  # a file that the page itself has made
            self.hosts.add(urlsplit(url).netloc)

    def check(self) -> None:
        """No complaint but the expected ones, and no request to another server."""
        unexpected = [text for text in self.complaints if not any(re.search(p, text) for p in self.expected)]
        assert not unexpected, unexpected
        assert self.hosts == {urlsplit(self.url).netloc}, self.hosts

    def close(self) -> None:
        self.context.close()

    # ---- what is on the page

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name, exact=True)

    @property
    def prompt(self) -> Locator:
        return self.page.locator("#prompt")

    @property
    def rows(self) -> Locator:
        """Turns in the tree."""
        return self.page.get_by_role("treeitem")

    def labels(self) -> list[str]:
        """Numbers of the turns, as the tree shows them."""
        return self.page.locator(".row .number").all_inner_texts()

    @property
    def articles(self) -> Locator:
        """Turns of the path that is shown."""
        return self.page.locator("article")

    def text(self, index: int = -1) -> str:
        """What a turn of the path generated."""
        return self.articles.nth(index).locator(".came").inner_text()

    def token_ids(self) -> list[int]:
        """What all turns generated, the earliest first; texts may be cut within a character, ids are not."""
        stored = self.page.evaluate("() => Object.entries(localStorage)")
        turns = [json.loads(value) for name, value in stored if name.startswith("yunmin.turn.")]
        return [id_ for turn in sorted(turns, key=lambda turn: turn["created"]) for id_ in turn["tokenIds"]]

    def facts(self, index: int = -1) -> list[str]:
        """Figures of a turn of the path."""
        return self.articles.nth(index).locator(".facts li").all_inner_texts()

    def figure(self, name: str) -> str:
        """One of the figures over the prompt."""
        return self.page.locator(f"#figure-{name}").inner_text()

    @property
    def notice(self) -> Locator:
        return self.page.locator("#notice")

    # ---- what a user does

    def set(self, **values: object) -> None:
        """Sets controls of sampling."""
        for name, value in values.items():
            self.page.fill(f"#{name}", str(value))

    def start(self, prompt: str) -> None:
        """Sends a prompt, and does not wait."""
        self.prompt.fill(prompt)
        self.prompt.press("Control+Enter")

    def send(self, prompt: str) -> str:
        """Sends a prompt; gives what was generated, when all is done."""
        turns = self.rows.count()
        self.start(prompt)
        self.settle(turns + 1)
        return self.text()

    def settle(self, turns: int) -> None:
        """Waits until so many turns are there and none runs."""
        expression = """turns => document.querySelectorAll(".row").length === turns
            && !document.querySelector("#send").disabled && document.querySelector("#stop").hidden"""
        self.page.wait_for_function(expression, arg=turns)

    def wait_for_tokens(self, count: int) -> None:
        """Waits until a turn that runs has so many."""
        self.page.wait_for_function(
            "count => Number.parseInt(document.querySelector('#figure-tokens').textContent.replace(',', '')) >= count",
            arg=count,
        )

    def answer(self, path: str, status: int, body: str, **headers: str) -> None:
        """Answers requests to a path in the server's place."""
        kind = "text/event-stream" if body.startswith("data:") else "application/json"
        every = {"content-type": kind} | {name.replace("_", "-"): value for name, value in headers.items()}

        def fulfill(route: Route) -> None:
            route.fulfill(status=status, body=body, headers=every)

        self.page.route(f"**/{path}", fulfill)


def contrast(first: Sequence[float], second: Sequence[float]) -> float:
    """WCAG's ratio of two colours, each red, green and blue in 0..255."""
    lighter, darker = sorted((_luminance(first), _luminance(second)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def _luminance(colour: Sequence[float]) -> float:
    linear = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


# ---- what the server says without the page


def generated(running: Running, prompt: str, max_tokens: int) -> tuple[str, list[int]]:
    """Text and token ids of the API."""
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    answer = httpx.post(f"{running.url}/generate", json=body, timeout=60).json()
    return answer["text"], answer["token_ids"]


def sessions(running: Running) -> set[str]:
    """Ids of all sessions."""
    found = httpx.get(f"{running.url}/v1/sessions?limit=100").json()
    assert not found["has_more"]
    return {session["id"] for session in found["data"]}
