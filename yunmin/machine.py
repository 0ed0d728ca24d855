"""Facts about the machine and this process, without which no timing means anything."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any


def machine_facts() -> dict[str, Any]:
    """CPU, cores, system and versions; `load_average_1min` shows whether others were computing, too."""
    return {
        "cpu": cpu_model(),
        "cores_logical": os.cpu_count(),
        "cores_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average_1min": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "yunmin": version("yunmin"),
    }


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def memory_bytes() -> tuple[int, int]:
    """Resident memory of this process, now and at its peak.

    Linux counts a peak of `getrusage` on over `exec`, so that a child begins with its parent's; `VmHWM` does not.
    Elsewhere both numbers are `getrusage`'s peak.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        fields = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines() if ":" in line)
        if "VmHWM" in fields and "VmRSS" in fields:
            return _kibibytes(fields["VmRSS"]), _kibibytes(fields["VmHWM"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak_bytes = peak if sys.platform == "darwin" else peak * 1024
    return peak_bytes, peak_bytes


def available_memory_bytes() -> int:
    """Memory that a new process can have without swapping."""
    info = Path("/proc/meminfo")
    if info.is_file():
        for line in info.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return _kibibytes(line.partition(":")[2])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def reset_peak_memory() -> None:
    """Lets the peak of `memory_bytes` begin anew at what is resident now, where the system can do that (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _kibibytes(field: str) -> int:
    return int(field.split()[0]) * 1024
