"""One tiny model and one server on it for all tests of the HTTP surface."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import yunmin
from tests.serving.fixtures import YUNMIN, Running, server, write_model
from tests.serving.refusals import Refusals, refusals
from yunmin.language_model import LanguageModel


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("serving") / "tiny")


@pytest.fixture(scope="session")
def model(model_folder: Path) -> LanguageModel:
    return yunmin.load(model_folder, device="cpu")


@pytest.fixture(scope="session")
def running(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    log = tmp_path_factory.mktemp("server") / "log.txt"
    limits = ["--slots", "2", "--queue", "2", "--prefill-chunk", "16", "--max-prompt-tokens", "400"]
    limits += ["--max-tokens", "100000", "--max-body-bytes", "20000", "--deadline-s", "60", "--threads", "1"]
    limits += ["--chat-template", "chatml"]
    with server([*YUNMIN, "serve", str(model_folder), "--port", "0", "--device", "cpu", *limits], log) as started:
        yield started


@pytest.fixture(scope="session")
def serve() -> Iterator[Refusals]:
    with refusals() as started:
        yield started
