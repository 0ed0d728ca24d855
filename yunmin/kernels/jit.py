"""How kernels are compiled: numba, without the interpreter's lock, cached on disk.

numba's cache notices a changed file, but not a changed function that it calls in another file. So the folder of the
cache is named by a hash over all kernels: a new version of yunmin never meets old machine code. `YUNMIN_CACHE` names
the folder above it; where none can be written, kernels are compiled in every process.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba.core import config as numba_config

logger = logging.getLogger("yunmin.kernels")

# a multiply and an add may become one instruction, and the sign of zero may be lost; sums keep their order, and NaN and
# infinity stay what they are
FLOAT_RULES = frozenset({"contract", "nsz"})


def jit(function: Callable[..., Any]) -> Any:
    """Compiles a kernel at its first call, or loads what an earlier process compiled."""
    folder = cache_folder()
    options = {"nogil": True, "error_model": "numpy", "fastmath": set(FLOAT_RULES), "boundscheck": False}
    if folder is None:
        return numba.njit(**options)(function)
    before = numba_config.CACHE_DIR
    numba_config.CACHE_DIR = str(folder)  # read while a function is decorated
    try:
        return numba.njit(cache=True, **options)(function)
    finally:
        numba_config.CACHE_DIR = before


def inline(function: Callable[..., Any]) -> Any:
    """Compiles a part of kernels; LLVM makes it part of their code."""
    return numba.njit(nogil=True, error_model="numpy", fastmath=set(FLOAT_RULES))(function)


@functools.cache
def cache_folder() -> Path | None:
    """Where compiled kernels are kept; None where nothing can be written."""
    root = os.environ.get("YUNMIN_CACHE") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(root) / "yunmin" / f"kernels-{_source_hash()}"
    try:
        folder = folder.expanduser()  # a user may have no home
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, RuntimeError) as error:
        logger.warning("compiled kernels cannot be kept in %s (%s): every process compiles its own", folder, error)
        return None
    return folder


def _source_hash() -> str:
    """Over every module that may hold kernels, and the compiler's version."""
    digest = hashlib.sha256(numba.__version__.encode())
    package = Path(__file__).parent.parent
    for path in sorted([*package.glob("kernels/**/*.py"), *package.glob("runtime/**/*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
