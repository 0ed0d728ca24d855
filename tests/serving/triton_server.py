"""A real Triton server with its python backend, as the package nvidia-pytriton brings it."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.peer_venv import peer_python

ROOT = Path(__file__).parents[2]
# the server's stub was built against numpy 1
PACKAGES = (
    "nvidia-pytriton==0.7.0",
    "numpy<2",
    "huggingface-hub",
    "llguidance",
    "numba",
    "prometheus-client",
    "pydantic",
    "safetensors",
    "tokenizers",
    "torch",
)
_PINNED = {"huggingface_hub", "llguidance", "llvmlite", "numba", "pydantic", "pydantic_core", "safetensors"}
_PINNED |= {"tokenizers", "torch"}
_START_S = 90.0
_EXIT_S = 20


@dataclass(frozen=True)
class TritonServer:
    """Where a server listens, and what runs there."""

    grpc: str
    http: str
    process: subprocess.Popen[bytes]
    log: Path

    def end(self) -> int:
        """Sends SIGTERM and waits; the exit status, which is not 0 where something still ran when time was up."""
        self.process.terminate()
        return self.process.wait(3 * _EXIT_S)


def triton_site() -> Path:
    """The packages of the server's environment, made where it is not there yet (40 s); skips where it cannot be."""
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.split("==")[0] in _PINNED]
    venv = peer_python("triton", *PACKAGES, *pins).parents[1]
    return venv / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"


@contextlib.contextmanager
def triton_server(repository: Path, model: str, scratch: Path) -> Iterator[TritonServer]:
    """Serves one model of a repository while the block runs."""
    site = triton_site()
    home = site / "pytriton" / "tritonserver"
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    backend = shutil.copytree(home / "backends" / "python", scratch / "backends" / "python")
    shutil.copy2(home / "python_backend_stubs" / version / "triton_python_backend_stub", backend)
    grpc_port, http_port = free_ports(2)
    libraries = [site / "nvidia_pytriton.libs", home / "external_libs", sysconfig.get_config_var("LIBDIR")]
    environment = {
        **os.environ,
        "PATH": f"{site.parents[2] / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{site}",
        "LD_LIBRARY_PATH": os.pathsep.join(map(str, libraries)),
    }
    command = [
        str(home / "bin" / "tritonserver"),
        f"--model-repository={repository}",
        f"--backend-directory={scratch / 'backends'}",
        "--model-control-mode=explicit",
        f"--load-model={model}",
        f"--grpc-port={grpc_port}",
        f"--http-port={http_port}",
        "--grpc-address=127.0.0.1",
        "--http-address=127.0.0.1",
        "--allow-metrics=false",
        "--disable-auto-complete-config",
        f"--exit-timeout-secs={_EXIT_S}",
    ]
    log = scratch / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            server = TritonServer(f"grpc://127.0.0.1:{grpc_port}", f"http://127.0.0.1:{http_port}", process, log)
            _wait(server)
            yield server
        finally:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [s.getsockname()[1] for s in sockets]


def _wait(server: TritonServer) -> None:
    end = time.monotonic() + _START_S
    while time.monotonic() < end and server.process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{server.http}/v2/health/ready", timeout=5):
            return
        time.sleep(0.2)
    raise AssertionError(f"the server did not start:\n{server.log.read_text(errors='replace')[-4000:]}")
