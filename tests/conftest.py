"""Fixtures shared by all tests."""

from __future__ import annotations

import os

import pytest
import torch

# sampling a test's processes must not depend on how many cores the machine has
os.environ.setdefault("OMP_NUM_THREADS", "2")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and this machine has none")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
