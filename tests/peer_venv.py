"""Environments of their own for other people's packages, which the tests' one does not take."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

_FOLDER = Path(__file__).resolve().parents[1] / ".venv-peers"
_BUILD_S = 300


def peer_python(name: str, *requirements: str) -> Path:
    """The interpreter of an environment, made where it is not there yet; skips, and says why, where it cannot be.

    Args:
        name: of its folder in `.venv-peers`.
        requirements: what pip installs; other ones than before make it again.
    """
    venv = _FOLDER / name
    _FOLDER.mkdir(exist_ok=True)
    with FileLock(_FOLDER / f"{name}.lock"):  # tests that run beside one another may want the same
        return _made(venv, *requirements)


def _made(venv: Path, *requirements: str) -> Path:
    python, stamp = venv / "bin" / "python", venv / ".installed"
    wanted = "\n".join([sys.version, *requirements])
    if not stamp.is_file() or stamp.read_text() != wanted:
        commands = [
            [sys.executable, "-m", "venv", "--clear", str(venv)],
            [str(python), "-m", "pip", "install", "--quiet", "--no-compile", *requirements],
        ]
        try:
            for command in commands:
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=_BUILD_S)
        except (subprocess.SubprocessError, OSError) as error:
            last = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
            pytest.skip(f"{', '.join(requirements)} cannot be installed here: {last}")
        stamp.write_text(wanted)
    return python
