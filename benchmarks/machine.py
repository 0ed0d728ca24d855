"""Facts about the machine and this process, without which no timing means anything."""

from __future__ import annotations

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


def _kibibytes(field: str) -> int:
    return int(field.split()[0]) * 1024
