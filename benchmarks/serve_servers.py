"""Servers as processes: ours, and llama.cpp's two, each on a free port of this machine."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yunmin.threads  # noqa: F401 (takes back how our own threads wait, which is not for peers to inherit)
from benchmarks.contestant_files import Absent
from benchmarks.contestants import default_python
from benchmarks.serve_client import Client, Request
from yunmin.errors import YunminError

LLAMA_SERVER = Path(".venv-peers/llama-server/bin/llama-server")
_YUNMIN = (sys.executable, "-c", "import sys; from yunmin.cli import main; sys.exit(main())")
_START_LIMIT_S = 300.0
_STOP_LIMIT_S = 30.0
_OK = 200


@dataclass(frozen=True)
class Server:
    """A server that runs.

    Attributes:
        name: as a report shows it.
        url: where it listens.
        process: that was started.
        log: its output.
    """

    name: str
    url: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def memory_bytes(self) -> int:
        """Resident memory; 0 where the system does not tell (it is Linux's /proc that does)."""
        try:
            pages = int(Path(f"/proc/{self.process.pid}/statm").read_text(encoding="ascii").split()[1])
        except (OSError, IndexError):
            return 0
        return pages * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def our_server(folder: Path, work: Path, settings: Mapping[str, str | int]) -> Iterator[Server]:
    """`yunmin serve`, with settings by the names of `serving.settings.Settings`."""
    options = [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    command = [*_YUNMIN, "serve", str(folder), "--port", "0", *options]
    with _started("ours", command, work / "yunmin-serve.log") as server:
        yield server


@contextlib.contextmanager
def llama_server(gguf: Path, work: Path, *, threads: int, slots: int) -> Iterator[Server]:
    """llama.cpp's own server, which advances all its slots together.

    Raises:
        Absent: it is not built here.
    """
    if not LLAMA_SERVER.is_file():
        raise Absent(f"{LLAMA_SERVER} is not there; make peers builds it")
    port = _free_port()
    context = ["--ctx-size", str(slots * 8192), "--parallel", str(slots)]
    command = [str(LLAMA_SERVER), "--model", str(gguf), "--port", str(port), "--threads", str(threads), *context]
    with _started("llama-server", command, work / "llama-server.log", port=port) as server:
        yield server


@contextlib.contextmanager
def llama_cpp_python(gguf: Path, work: Path, *, threads: int) -> Iterator[Server]:
    """The server of llama.cpp's Python bindings, which answers one request after the other.

    Raises:
        Absent: it is not installed.
    """
    python = default_python("llama.cpp")
    check = subprocess.run([python, "-c", "import llama_cpp.server.app"], capture_output=True, text=True, check=False)
    if check.returncode:
        last = check.stderr.strip().splitlines()[-1:]
        raise Absent(f"llama-cpp-python's server does not import ({''.join(last)}); make peers installs it")
    port = _free_port()
    command = [python, "-m", "llama_cpp.server", "--model", str(gguf), "--port", str(port), "--n_ctx", "8192"]
    # by default a new request cuts the stream of the one before
    command += ["--n_threads", str(threads), "--n_threads_batch", str(threads), "--interrupt_requests", "false"]
    with _started("llama-cpp-python", command, work / "llama-cpp-python.log", port=port) as server:
        yield server


@contextlib.contextmanager
def _started(name: str, command: Sequence[str], log: Path, *, port: int = 0) -> Iterator[Server]:
    """Runs a server until the block ends; without a port, its output tells where it listens."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + _START_LIMIT_S
        url = f"http://127.0.0.1:{port}" if port else ""
        while not (url := url or _told_url(log)) or not _is_ready(url):
            if process.poll() is not None:
                raise YunminError(f"{name}: its process ended with {process.returncode}: {_last_line(log)}")
            if time.monotonic() > deadline:
                raise YunminError(f"{name}: was not ready within {_START_LIMIT_S:g} s, see {log}")
            time.sleep(0.05)
        yield Server(name, url, process, log)
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(_STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _is_ready(url: str) -> bool:
    """Both of the peers load the model before they answer, or answer 503 until they have."""
    client = Client(url)
    try:
        return client.fetch(Request("/v1/models", method="GET"), 10.0).status == _OK
    except YunminError:
        return False
    finally:
        client.close()


def _told_url(log: Path) -> str:
    found = re.search(r"serving .* on (http://\S+)", log.read_text(encoding="utf-8", errors="replace"))
    return found[1] if found else ""


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip()[:300] if lines else "it printed nothing"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
