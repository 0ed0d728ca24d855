"""Memory is kept while a run lasts, and given back when it ends."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# in a process of its own, since what an allocator does depends on everything it did before
_PROGRAM = """
import resource, torch
from training.allocator import freed_memory_kept

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(1 << 24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

default = faults()
with freed_memory_kept():
    for _ in range(4):
        faults()
    kept, held = faults(), resident()
assert kept < default / 10, (kept, default)
assert held - resident() > 1 << 25
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep memory")
def test_freed_memory_is_kept_within_and_given_back_after() -> None:
    subprocess.run([sys.executable, "-c", _PROGRAM], check=True)
