"""The README does what it says: its code blocks run, in order, as a reader would type them.

Rules for the README:
- Every block fenced as ```bash or ```python is run, all in one folder that holds what a fresh clone holds, `yunmin`
  being on the PATH. Other fences (```text, ```json, ```yaml, ...) are only shown.
- `<!-- not run: REASON -->` right before a fence exempts it: commands that install, need a network or a GPU, or that
  another test runs (`make quickstart`).
- `yunmin train ...` gets `SHORTER` appended, and `SMALLER` where it starts from scratch, so that it ends within
  seconds; all else runs as it stands.
- `yunmin serve ...` and `bentoml serve ...` (with or without a trailing `&`) run in the background until the next of
  them or the end; the test waits until the server is ready on its `--port` (3000 if none is given).
- A command that fails fails the test, and shows its line.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.ground.readme import Block, code_blocks, commands

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHORTER = "max_steps=20 batch_size=4 sequence_length=32 max_documents=40 validation_tokens=256 channel_multiple=8"
SMALLER = "d_model=32 n_layers=2 vocab_size=300"
CLONED = ("yunmin", "training", "export", "serving", "research", "benchmarks", "pyproject.toml", "bentofile.yaml")
_SERVER = re.compile(r"^(\w+=\S+ )*(yunmin serve|bentoml serve)\b")
_LIMIT_S = 300


def test_blocks_are_found_with_their_lines_and_reasons() -> None:
    markdown = (
        "# T\n\n```bash\na\n```\n\n<!-- not run: needs a GPU -->\n```python\nb\n```\n\n1. x\n\n   ```bash\n   c \\\n"
    )
    markdown += "     d\n   ```\n\n```text\ne\n```\n"
    assert code_blocks(markdown) == [
        Block("bash", "a\n", 4, None),
        Block("python", "b\n", 9, "needs a GPU"),
        Block("bash", "c \\\n  d\n", 15, None),
    ]


def test_commands_end_where_a_shell_ends_them() -> None:
    code = "# a comment, it's skipped\na 'one\ntwo' # isn't open\n\nb \\\n  --c\nd \"it's\"\n"
    assert commands(code) == ["a 'one\ntwo' # isn't open", "b \\\n  --c", 'd "it\'s"']
    with pytest.raises(ValueError, match="unfinished"):
        commands("a 'b\n")


def test_every_command_named_in_the_readme_exists() -> None:
    from importlib.metadata import entry_points

    known = {point.name for point in entry_points(group="yunmin.commands")}
    text = "\n".join(block.code for block in code_blocks(README))
    named = set(re.findall(r"^\s*yunmin ([a-z]+)", text, re.MULTILINE))
    targets = set(re.findall(r"^\s*make ([a-z]+)", text, re.MULTILINE))
    assert named - known == set()
    assert targets - set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)) == set()


def test_every_local_link_of_the_readme_leads_somewhere() -> None:
    links = re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", README)
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.slow
def test_the_readme_runs(tmp_path: Path) -> None:
    blocks = [block for block in code_blocks(README) if block.not_run is None]
    assert blocks, "the README has no block to run"
    if shutil.which("curl") is None and any("curl" in block.code for block in blocks):
        pytest.skip("the README uses curl, and this machine has none")
    for name in CLONED:
        (tmp_path / name).symlink_to(ROOT / name)
    server: subprocess.Popen[bytes] | None = None
    environment = _environment()
    try:
        for block in blocks:
            if block.language == "python":
                _run([sys.executable, "-c", block.code], block, block.code, tmp_path, environment)
                continue
            for command in commands(block.code):
                if _SERVER.match(command):
                    _stop(server)
                    server = _start(command, tmp_path, environment)
                else:
                    shown = shortened(command)
                    _run(["bash", "-euo", "pipefail", "-c", shown], block, shown, tmp_path, environment)
    finally:
        _stop(server)


@pytest.mark.parametrize(
    ("command", "appended"),
    [
        ("yunmin train data=stdlib", f" {SHORTER} {SMALLER}"),
        ("yunmin train checkpoint=a/ data=b.txt", f" {SHORTER}"),
        ("yunmin train --resume runs/a", ""),
        ("yunmin train --help", ""),
        ("yunmin export runs/a artifact/", ""),
    ],
)
def test_only_new_trainings_are_shortened(command: str, appended: str) -> None:
    assert shortened(command) == command + appended


def shortened(command: str) -> str:
    """A command as it is run: a training that begins is made small and short."""
    if not re.match(r"yunmin train\b(?!.*--(resume|help))", command, re.DOTALL):
        return command
    return " ".join([command, SHORTER] + ([] if "checkpoint=" in command else [SMALLER]))


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return os.environ | {"PATH": path, "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1", "BENTOML_DO_NOT_TRACK": "true"}


def _run(argv: list[str], block: Block, shown: str, folder: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(
        argv, cwd=folder, env=environment, capture_output=True, text=True, timeout=_LIMIT_S, check=False
    )
    if done.returncode != 0:
        pytest.fail(f"README.md:{block.line}: status {done.returncode} of\n{shown}\n{done.stdout}\n{done.stderr}")


def _start(command: str, folder: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Starts a server as the leader of its own group and waits until it is ready."""
    port = int(found[1]) if (found := re.search(r"--port[ =](\d+)", command)) else 3000
    log = (folder / "server.log").open("wb")
    with log:
        server = subprocess.Popen(
            ["bash", "-c", command.strip().removesuffix("&")],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    deadline = time.monotonic() + _LIMIT_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5):
                return server
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
    _stop(server)
    pytest.fail(f"{command}\nwas not ready:\n{(folder / 'server.log').read_text(errors='replace')}")


def _stop(server: subprocess.Popen[bytes] | None) -> None:
    if server is None or server.poll() is not None:
        return
    os.killpg(server.pid, signal.SIGTERM)
    try:
        server.wait(timeout=30)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
