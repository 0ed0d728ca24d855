from __future__ import annotations

import pytest

from research.sandbox.runner import Sandbox
from yunmin.errors import SandboxError


@pytest.fixture(scope="session")
def sandbox() -> Sandbox:
    try:
        return Sandbox()
    except SandboxError as error:
        pytest.skip(str(error))
