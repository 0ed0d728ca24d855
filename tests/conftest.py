"""Fixtures shared by all tests; `tests.models` has the functions behind them."""

from __future__ import annotations

import gc
import os
from pathlib import Path

# before torch starts its threads: a test must not depend on how many cores the machine has, and tiny models are three
# times faster on one thread than on two that wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from tests.models import trained_tokenizer, write_model
from yunmin.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A byte-level BPE of 300 ids."""
    return trained_tokenizer()


@pytest.fixture
def model_folder(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """A random small model with tokenizer, as a Hugging Face folder."""
    return write_model(tmp_path / "model", tokenizer=tokenizer)


@pytest.fixture(scope="module", autouse=True)
def _what_is_there_already_is_no_garbage() -> None:
    """Exports collect garbage many times; a look through all that is imported would be most of their time."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and this machine has none")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
