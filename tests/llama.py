"""llama.cpp beside the tests: under this interpreter, or under the one that has it for benchmarks."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / ".venv-peers/common/bin/python"  # where `yunmin bench compare` has llama-cpp-python installed


@cache
def python_with_llama_cpp() -> str:
    """This interpreter, or the peers' one; skips where neither has the package."""
    if importlib.util.find_spec("llama_cpp") is not None:
        return sys.executable
    if PEERS.is_file() and subprocess.run([PEERS, "-c", "import llama_cpp"], capture_output=True).returncode == 0:
        return str(PEERS)
    pytest.skip("llama-cpp-python is not installed: pip install 'yunmin[peers]'")


def in_llama_cpp(file: Path, *, text: str = "", prompt: list[int] | None = None, greedy: int = 0) -> dict[str, Any]:
    """Runs `llama_child.py`: logits after the prompt, greedy ids, ids of the text."""
    task = {"file": str(file), "text": text, "prompt": prompt or [], "greedy": greedy}
    done = subprocess.run(
        [python_with_llama_cpp(), "-m", "tests.llama_child"],
        input=json.dumps(task),
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result
