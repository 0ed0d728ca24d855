"""A tiny model folder with a real tokenizer, and servers on it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import torch

from yunmin.axes import expected_shapes
from yunmin.checkpoint import write_checkpoint
from yunmin.config import MambaConfig
from yunmin.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
TEXTS = ["def main(argument):\n    return argument + 1\n", "Grüße aus 東京 und ağaç 🙂, naïve café\n"] * 4
YUNMIN = (sys.executable, "-c", "import sys; from yunmin.cli import main; sys.exit(main())")
_START_S = 120


def write_model(folder: Path, *, seed: int = 0) -> Path:
    """A random checkpoint with biases and a byte-level BPE, whose greedy text never ends by itself."""
    folder.mkdir(parents=True)
    tokenizer = Tokenizer.train(TEXTS, 300)
    tokenizer.save(folder)
    assert tokenizer.eos_id is not None
    config = MambaConfig.create(
        vocab_size=304,
        n_tokens=tokenizer.vocab_size,
        d_model=24,
        n_layers=2,
        d_state=5,
        dt_rank=3,
        use_bias=True,
        tie_word_embeddings=False,
        eos_token_ids=(tokenizer.eos_id,),
    )
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(shape, generator=generator) * (0.6 if len(shape) > 1 else 0.3)
        for name, shape in expected_shapes(config).items()
    }
    tensors["lm_head.weight"][tokenizer.eos_id] = 0.0  # its logit is 0, and the best of 300 is above
    write_checkpoint(folder, config, tensors)
    return folder


@dataclass(frozen=True)
class Running:
    """A server under test."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def metric(self, name: str) -> float:
        """The value of a metric by its full name with labels; 0 where it has not been counted yet."""
        text = httpx.get(f"{self.url}/metrics").text
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    def wait_for(self, name: str, value: float) -> None:
        """Waits until a metric has a value."""
        end = time.monotonic() + _START_S
        while self.metric(name) != value:
            assert time.monotonic() < end, f"{name} is {self.metric(name)}, expected {value}"
            time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def server(
    command: Sequence[str], log: Path, *, url: str = "", environ: dict[str, str] | None = None
) -> Iterator[Running]:
    """Runs a server from the project's root until the block ends; its whole process group ends with it.

    Args:
        command: starts it.
        log: file for its output.
        url: where it will be; empty where its log line tells.
        environ: variables to add.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"BENTOML_DO_NOT_TRACK": "True"} | (environ or {}),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        end = time.monotonic() + _START_S
        while not (found := url or _logged_url(log)) or not _is_ready(found):
            assert process.poll() is None, f"the server ended with {process.returncode}: {log.read_text()}"
            assert time.monotonic() < end, f"the server did not start: {log.read_text()}"
            time.sleep(0.05)
        yield Running(found, process, log)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _logged_url(log: Path) -> str:
    found = re.search(r"serving .* on (http://\S+)", log.read_text())
    return found[1] if found else ""


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=10).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False
