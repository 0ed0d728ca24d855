"""One server and one browser for the tests of the page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from tests.serving.fixtures import YUNMIN, Running, server
from tests.serving.page.browser import BINARY, Visit, chromium
from yunmin.language_model import LanguageModel
from yunmin.snapshots import save_snapshot

Visiting = Callable[..., Visit]


@pytest.fixture(scope="package")
def named_states(model: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("states")
    save_snapshot(folder / "greeting.safetensors", model.snapshot("Grüße aus 東京"), model.fingerprint, name="greeting")
    return folder


@pytest.fixture(scope="package")
def serving(model_folder: Path, named_states: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    log = tmp_path_factory.mktemp("page") / "log.txt"
    limits = ["--slots", "4", "--max-tokens", "20000", "--threads", "1", "--states", str(named_states)]
    with server([*YUNMIN, "serve", str(model_folder), "--port", "0", "--device", "cpu", *limits], log) as started:
        yield started


@pytest.fixture(scope="package")
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.slow)
            if BINARY is None:
                item.add_marker(pytest.mark.skip(reason="no chromium here (Debian: apt-get install chromium)"))
