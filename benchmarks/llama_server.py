"""Builds llama.cpp's own server from the sources that the Python bindings were built from: part of `make peers`."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from yunmin.cli import run
from yunmin.errors import YunminError
from yunmin.files import atomic_file

_PACKAGE = "llama-cpp-python"
# processor-specific code as in the bindings; the rest is what a benchmark on this machine does not need
_OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
    "LLAMA_OPENSSL": "OFF",
}


def main(argv: list[str]) -> int:
    """`python -m benchmarks.llama_server OUT`, under an interpreter that has the bindings."""
    arguments = argparse.ArgumentParser(prog="python -m benchmarks.llama_server", description=__doc__)
    arguments.add_argument("out", type=Path, help="the program to write")
    options = arguments.parse_args(argv)
    try:
        wanted = version(_PACKAGE)
    except PackageNotFoundError:
        raise YunminError(f"{sys.executable}: {_PACKAGE} is not installed; make peers installs it") from None
    with tempfile.TemporaryDirectory() as folder:
        build(wanted, Path(folder), options.out)
    return 0


def build(wanted: str, work: Path, out: Path) -> None:
    """Downloads the bindings' source package with pip, compiles the server, and puts it in its place.

    Args:
        wanted: version of the bindings.
        work: folder for sources and objects.
        out: the program; appears whole or not at all.

    Raises:
        YunminError: a step fails; says which and why.
    """
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    _run([*pip, "download", "--no-deps", "--no-binary", _PACKAGE, "--dest", str(work), f"{_PACKAGE}=={wanted}"])
    package = next(work.glob("*.tar.gz"))
    with tarfile.open(package) as archive:
        archive.extractall(work / "source", filter="data")
    sources = next((work / "source").glob("*/vendor/llama.cpp"))
    cmake = shutil.which("cmake") or str(Path(sys.executable).with_name("cmake"))
    options = [f"-D{name}={value}" for name, value in _OPTIONS.items()]
    _run([cmake, "-S", str(sources), "-B", str(work / "build"), *options])
    jobs = str(os.cpu_count() or 1)
    _run([cmake, "--build", str(work / "build"), "--target", "llama-server", "--parallel", jobs])
    with atomic_file(out) as aside:
        shutil.copyfile(work / "build" / "bin" / "llama-server", aside)
    out.chmod(0o755)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise YunminError(f"{command[0]} does not start: {error.strerror}") from None
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise YunminError(f"{' '.join(command[:4])} ... ended with {done.returncode}: {''.join(lines[-1:])[:300]}")


if __name__ == "__main__":
    raise SystemExit(run(main))
